"""The change of a score at each piece is the final score, told earlier: the same gradient at discount 1."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

import instant_reward as ir
from exact.world import ALPHABETS, PROMPT, World, angle_differs, chance, differ, same
from instant_reward.types import Rollout

torch.set_num_threads(1)
FIRST = len(PROMPT.token_ids)


def at_blank(characters: str) -> int | None:
    """Pieces end before each blank but a leading one: it is known as soon as the blank is there."""
    found = characters.find(" ", 1)
    return found if found > 0 else None


def told_at_its_end(rollout: Rollout) -> Rollout:
    """Wrong on purpose: a piece is paid at its last token, though a later one showed that it had ended."""
    return replace(rollout, marks=[replace(mark, seen=mark.end) for mark in rollout.marks])


def told_one_early(rollout: Rollout) -> Rollout:
    """Wrong on purpose: every mark one token too early."""
    return replace(rollout, marks=[replace(mark, seen=max(FIRST + 1, mark.seen - 1)) for mark in rollout.marks])


def final_gradient(world: World) -> torch.Tensor:
    return world.gradient([chance(rollout.text) - chance("") for rollout in world.rollouts([])])


@pytest.mark.parametrize("alphabet", ALPHABETS)
@pytest.mark.parametrize("every", ["token", "word", "end", 2, at_blank])
def test_changes_have_the_final_gradient(alphabet: tuple[str, str], every: Any) -> None:
    """The changes of a score, wherever pieces end, have the final score's gradient at discount 1.

    sum_i (f_i - f_{i-1}) = f(full) - f(""),  E[ sum_t grad log p(x_t) G[t] ] = grad sum_x p(x) f(x)
    """
    world = World(alphabet)
    change = ir.change(chance, every=every)
    for rollout in world.rollouts([change]):
        assert rollout.total() == pytest.approx(chance(rollout.text) - chance(""), abs=1e-12)
    step = world.expected_step([change])
    assert same(step, final_gradient(world))

    assert differ(world.expected_step([change], marks=told_one_early), step), "marks one token too early"
    doubled = world.expected_step([ir.change(chance, every=every, weight=2.0)])
    assert same(doubled, 2.0 * step)


@pytest.mark.parametrize("alphabet", ALPHABETS)
def test_a_word_is_known_with_the_token_that_ends_it(alphabet: tuple[str, str]) -> None:
    """A word of several tokens is paid where its end was seen: paid at its last token, it misses who ended it.

    G[t] holds every mark with seen > t: all that token t could have influenced, the end of a word included.
    """
    world = World(alphabet)
    change = ir.change(chance, every="word")
    marks = [mark for rollout in world.rollouts([change]) for mark in rollout.marks]
    assert any(mark.end - mark.start > 1 and mark.seen > mark.end for mark in marks), "no such word in this world"
    exact = world.expected_step([change])
    assert same(exact, final_gradient(world))
    assert differ(world.expected_step([change], marks=told_at_its_end), exact)
    assert differ(world.expected_step([change.but(at="span")]), exact)


@pytest.mark.parametrize("alphabet", ALPHABETS)
def test_word_rewards_that_are_no_change(alphabet: tuple[str, str]) -> None:
    """Any reward per word, of what stands there so far, has the gradient of its expected sum.

    E[ sum_t grad log p(x_t) G[t] ] = grad sum_x p(x) sum_i r_i(x)
    """
    world = World(alphabet)
    per_word = ir.reward(every="word", name="per_word")(lambda view: chance(f"{view.text}|{view.piece}|{view.done}"))
    exact = world.gradient([rollout.total() for rollout in world.rollouts([per_word])])
    assert same(world.expected_step([per_word]), exact)
    assert differ(world.expected_step([per_word], marks=told_at_its_end), exact)
    assert differ(world.expected_step([per_word.but(at="span")]), exact)


def test_spans_of_older_characters() -> None:
    """A value for characters written earlier is paid where it became known, not where it points to."""
    world = World()

    @ir.reward(every="token")
    def look_back(view: ir.View) -> ir.Span | None:
        return view.span(chance(view.text), 0, 1) if view.text else None

    exact = world.gradient([rollout.total() for rollout in world.rollouts([look_back])])
    assert same(world.expected_step([look_back]), exact)
    assert differ(world.expected_step([look_back], marks=told_at_its_end), exact)
    assert differ(world.expected_step([look_back.but(at="span")]), exact)


@pytest.mark.parametrize("every", ["token", "word"])
def test_changes_under_a_discount_are_another_objective(every: str) -> None:
    """With a discount below 1, the changes of a score no longer have the final score's gradient: a stated bias.

    G[t] = sum_i g**(t_i - t) (f_i - f_{i-1}) does not telescope.
    """
    world = World()
    discounted = world.expected_step([ir.change(chance, every=every, discount=0.5)])
    assert angle_differs(discounted, final_gradient(world))
