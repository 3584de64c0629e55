"""Texts on the terminal, coloured by what each word earned: sampled ones and given ones."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pydantic import ValidationError
from rich.console import Console

from instant_reward import assemble
from instant_reward.config import Config, RewardConfig
from instant_reward.config_problems import report, sentences
from instant_reward.records import rollout_record
from instant_reward.rewards.base import Reward
from instant_reward.rewards.scope import replay_groups
from instant_reward.screen import coloured
from instant_reward.text import TextDecoder
from instant_reward.types import Prompt, Rollout, UserError


def sample_texts(options: argparse.Namespace) -> int:
    """``instant-reward sample``."""
    from instant_reward.start import load_run_policy

    rewards = _rewards(options.reward)
    guide = options.guide or 0.0
    if (Path(options.model) / "config.yaml").is_file():
        policy, config = load_run_policy(options.model)
        rewards = rewards or [one for one in assemble.build_rewards(config.rewards) if one.takes != "pair"]
        guide = config.sampling.guide if options.guide is None else options.guide
    else:
        from instant_reward.policies.kinds import load_policy

        policy = load_policy(options.model, options.dtype)
    rollouts = policy.sample(
        options.prompts,
        options.per_prompt,
        max_new_tokens=options.max_new_tokens,
        min_new_tokens=options.min_new_tokens,
        temperature=options.temperature,
        top_p=options.top_p,
        top_k=options.top_k,
        stop=options.stop,
        rewards=rewards,
        seed=options.seed,
        guide=guide,
    )
    _show(rollouts, options.jsonl)
    return 0


def score_texts(options: argparse.Namespace) -> int:
    """``instant-reward score``."""
    rewards = _rewards(options.reward)
    if options.config:
        rewards += assemble.build_rewards(Config.load(options.config).rewards)
    if not rewards:
        raise UserError("score: name a reward with --reward module:name, or a config that has some with --config")
    tokenizer = None
    if options.model:
        from transformers import AutoTokenizer

        from instant_reward import models

        tokenizer = AutoTokenizer.from_pretrained(models.locate(options.model))
    rollouts = [_given(row, options.column, number, tokenizer) for number, row in enumerate(_rows(options.file))]
    replay_groups(rewards, rollouts)
    if options.coloured:
        _show(rollouts, as_json=False)
        return 0
    for rollout in rollouts:
        print(json.dumps(_scored(rollout, rewards)))
    return 0


def _rewards(names: Sequence[str]) -> list[Reward]:
    single = [name for given in names for name in given.split(",") if name]
    try:
        configs = [RewardConfig.model_validate(name) for name in single]
    except ValidationError as error:
        raise report("--reward", sentences(error, RewardConfig)) from None
    return assemble.build_rewards(configs)


def _show(rollouts: Sequence[Rollout], as_json: bool) -> None:
    console = Console()
    for rollout in rollouts:
        if as_json:
            print(json.dumps(rollout_record(rollout)))
            continue
        console.print(coloured(rollout))
        totals = {mark.source: rollout.total(mark.source) for mark in rollout.marks}
        figures = "  ".join(f"{name} {total:+.3f}" for name, total in totals.items())
        console.print(f"{figures}  ({rollout.stop})\n".lstrip(), style="dim", highlight=False)


def _rows(name: str) -> list[dict[str, Any]]:
    """The rows of a file: JSON lines where each line is an object, else a text a line."""
    try:
        content = sys.stdin.read() if name == "-" else Path(name).read_text(encoding="utf-8")
    except OSError as error:
        raise UserError(f"score: {name} cannot be read ({error.strerror}); check the path") from error
    except UnicodeDecodeError as error:
        raise UserError(f"score: {name} is not UTF-8 at byte {error.start}; convert it") from error
    lines = [line for line in content.split("\n") if line.strip()]
    if not lines:
        raise UserError(f"score: {name} holds no text; give a text a line, or JSON lines")
    if not lines[0].lstrip().startswith("{"):
        return [{"text": line} for line in lines]
    rows = []
    for number, line in enumerate(lines, start=1):
        try:
            rows.append(dict(json.loads(line)))
        except ValueError as error:
            raise UserError(f"score: line {number} of {name} is no JSON object: {error}; correct it") from error
    return rows


def _given(row: dict[str, Any], column: str, number: int, tokenizer: Any) -> Rollout:
    """A text as a rollout whose tokens are the tokenizer's, or characters where there is none."""
    text = row.get(column)
    if not isinstance(text, str):
        known = ", ".join(sorted(row)) or "none"
        raise UserError(
            f"score: text {number + 1} has no text in column {column!r} (its columns: {known}); see --column"
        )
    info = {key: value for key, value in row.items() if key not in (column, "prompt", "id")}
    ids = list(range(len(text))) if tokenizer is None else tokenizer(text, add_special_tokens=False)["input_ids"]
    if tokenizer is None:
        char_ends = list(range(1, len(text) + 1))
    else:
        text, char_ends = TextDecoder(tokenizer).char_ends(ids)
    prompt = Prompt(str(row.get("id", number)), str(row.get("prompt", "")), [], None, info)
    count = len(ids)
    return Rollout(
        id=f"{prompt.id}/0",
        group=number,
        prompt=prompt,
        token_ids=ids,
        mask=[True] * count,
        logprobs=[0.0] * count,
        char_ends=char_ends,
        text=text,
        marks=[],
        versions=[-1] * count,
        stop="ended",
        info=info,
    )


def _scored(rollout: Rollout, rewards: Sequence[Reward]) -> dict[str, Any]:
    """One line of ``score``: marks with their characters, and the sum of each reward."""
    ends = [0, *rollout.char_ends]
    marks = [
        {
            "source": mark.source,
            "value": mark.value,
            "start": ends[mark.start],
            "end": ends[mark.end],
            "seen": ends[mark.seen],
            "text": rollout.text[ends[mark.start] : ends[mark.end]],
        }
        for mark in rollout.marks
    ]
    totals = {one.name: rollout.total(one.name) for one in rewards}
    return {"id": rollout.prompt.id, "text": rollout.text, "totals": totals, "marks": marks}
