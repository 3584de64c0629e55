"""Texts of several turns: the same sampled tokens, with what others wrote between them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import instant_reward as ir
from instant_reward.types import Rollout

Answer = Callable[[list[int]], list[int]]


def answered(rollout: Rollout, answer: Answer, rewards: Sequence[Any] = (), last: bool = False) -> Rollout:
    """What others say after each sampled token but the last one; they show nothing. Scored anew by replay.

    Args:
        answer: their tokens, given the tokens sampled so far.
        rewards: what scores the text; its marks point into the longer sequence.
        last: others also speak after the last token.
    """
    first, count = rollout.start, len(rollout.token_ids)
    per_token = {name: list(getattr(rollout, name)[:first]) for name in ("token_ids", "mask", "logprobs", "char_ends")}
    per_token["versions"] = list(rollout.versions[:first])
    for t in range(first, count):
        for name, values in per_token.items():
            values.append(getattr(rollout, name)[t])
        others = answer(rollout.token_ids[first : t + 1]) if last or t < count - 1 else []
        per_token["token_ids"] += others
        per_token["mask"] += [False] * len(others)
        per_token["logprobs"] += [0.0] * len(others)
        per_token["char_ends"] += [rollout.char_ends[t]] * len(others)
        per_token["versions"] += [-1] * len(others)
    turns = replace(rollout, **per_token, marks=[])
    turns.marks = ir.replay(rewards, turns)
    return turns


def by_parity(sampled: list[int]) -> list[int]:
    """In the small world: none to two tokens, by what was sampled so far."""
    return [[], [1], [0, 1]][(len(sampled) + sum(sampled)) % 3]
