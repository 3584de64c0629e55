"""Shares of one number, cut by someone who knew the whole text (attention, a Shapley value): where they may be paid."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch

import instant_reward as ir
from exact.world import ALPHABETS, World, angle_differs, chance, differ, same
from instant_reward.types import Rollout

torch.set_num_threads(1)


def parts(text: str, count: int) -> list[float]:
    """``count`` shares that depend on the whole text and sum to its score."""
    raw = [chance(f"{text} share {number}") for number in range(count)]
    rest = (chance(text) - sum(raw)) / count
    return [value + rest for value in raw]


@ir.reward(every="end")
def attention(view: ir.View) -> list[float]:
    return parts(view.text, view.tokens)


@ir.reward(every="end")
def highlights(view: ir.View) -> list[ir.Span] | float:
    """The same on characters; a text without any gets its score as a whole."""
    if not view.text:
        return chance(view.text)
    return [view.span(share, at, at + 1) for at, share in enumerate(parts(view.text, len(view.text)))]


def understated(rollout: Rollout) -> Rollout:
    """Wrong on purpose: as if each share had only known the text up to its own token."""
    return replace(rollout, marks=[replace(mark, seen=mark.end) for mark in rollout.marks])


def fitting(rollout: Rollout) -> Rollout:
    """Wrong on purpose: the shares say that they read all but the last token."""
    known = len(rollout.token_ids) - 1
    return replace(rollout, marks=[replace(mark, seen=max(mark.end, known)) for mark in rollout.marks])


@pytest.mark.parametrize("alphabet", ALPHABETS)
@pytest.mark.parametrize("reward", [attention, highlights])
def test_shares_that_knew_the_whole_text(alphabet: tuple[str, str], reward: ir.Reward) -> None:
    """Shares that knew the whole text and sum to R have R's gradient where they were seen: at the end.

    sum_i share_i(x) = R(x),  seen = end of the text:  E[ sum_t grad log p(x_t) G[t] ] = grad sum_x p(x) R(x)

    Paid to their own tokens, G[t] leaves out the shares of earlier tokens, which depend on token t as well: biased.
    """
    world = World(alphabet)
    rollouts = world.rollouts([reward])
    for rollout in rollouts:
        assert rollout.total() == pytest.approx(chance(rollout.text), abs=1e-12)
        assert all(mark.seen == len(rollout.token_ids) for mark in rollout.marks)
    exact = world.gradient([chance(rollout.text) for rollout in rollouts])
    assert same(world.expected_step([reward]), exact)

    assert angle_differs(world.expected_step([reward.but(at="span")]), exact), "paid on their spans"
    wrong: list[Callable[[Rollout], Rollout]] = [understated, fitting]
    for change in wrong:
        assert angle_differs(world.expected_step([reward], marks=change), exact), f"seen is understated: {change}"


def test_shares_that_did_not_know_more() -> None:
    """A list per token that each token alone decides may be paid on its tokens: the bias is in what is known.

    share_i(x) = s(x_i) for one-token texts' letters: E[ sum_t grad log p(x_t) sum_{i >= t} s(x_i) ] is exact.
    """
    world = World()
    own = ir.reward(every="token", name="own")(lambda view: chance(view.piece))
    exact = world.gradient([rollout.total() for rollout in world.rollouts([own])])
    assert same(world.expected_step([own]), exact)
    assert same(world.expected_step([own.but(at="span")]), exact)
    assert differ(world.expected_step([own.but(at="span", discount=0.5)]), exact)
