"""Item 4: with the true value as its potential, the one-step update is the exact gradient; with no other potential."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import instant_reward as ir
from exact.chosen import Chosen, Values, true_values
from exact.world import World, angle_differs, chance, same

torch.set_num_threads(1)
FINAL = ir.reward(every="end", name="final")(lambda view: chance(view.text))


@pytest.fixture(scope="module")
def world() -> World:
    return World()


@pytest.fixture(scope="module")
def exact(world: World) -> Tensor:
    return world.gradient([chance(rollout.text) for rollout in world.rollouts([])])


class Steps:
    """Pays ``phi(now) - phi(before)`` at each token, where phi also knows the end: there it is the score."""

    def __init__(self, phi: Callable[[str], float], end: Callable[[str], float] = chance) -> None:
        self.phi, self.end = phi, end

    def start(self, prompt: ir.Prompt) -> list[float]:
        return [self.phi("")]

    def extend(self, state: list[float], view: ir.View) -> float:
        before, state[0] = state[0], self.end(view.text) if view.done else self.phi(view.text)
        return state[0] - before


def letters(world: World, values: Values) -> dict[str, float]:
    """Values by the characters of their prefix."""
    return {"".join("a "[token] for token in prefix): values[prefix] for prefix in world.row_of}


def one_step(phi: Callable[[str], float], **other: Any) -> ir.Reward:
    return ir.reward(every="token", name="steps", discount=0.0)(Steps(phi, **other))


def wrong_potentials(value: dict[str, float]) -> dict[str, Callable[[str], float]]:
    """Potentials that are not the true value, though they are near it."""
    return {
        "nothing": lambda text: 0.0,
        "a little noise": lambda text: value[text] + 0.3 * chance(f"{text} noise"),
        "twice as high": lambda text: 2.0 * value[text],
        "one token late": lambda text: value[text[:-1]],
        "the score of the text so far": chance,
    }


WRONG = ["nothing", "a little noise", "twice as high", "one token late", "the score of the text so far"]


def test_the_one_step_update_with_the_true_value_is_exact(world: World, exact: Tensor) -> None:
    """Each token is credited with how much it changed what is to be expected, and with nothing that comes later.

    V(x_<t) = E[ R | x_<t ],  V(x) = R(x) at the end
    E[ sum_t grad log p(x_t | x_<t) (V(x_<=t) - V(x_<t)) ] = grad sum_x p(x) R(x)
    """
    value = letters(world, true_values(world, [FINAL])[0])
    steps = one_step(value.__getitem__)
    assert same(world.expected_step([steps]), exact)
    assert same(Chosen(world, [steps], name="reinforce").step(), exact)
    assert same(Chosen(world, [steps], name="rloo").step(siblings=2), exact)
    assert same(world.expected_step([steps.but(discount=1.0)]), exact), "at discount 1 any potential does"
    assert same(world.expected_step([steps.but(discount=0.5)]), exact), "what comes later is 0 on average"


def test_a_constant_may_be_added(world: World, exact: Tensor) -> None:
    """What counts is the difference: with the true value plus a constant, at the end too, nothing changes."""
    value = letters(world, true_values(world, [FINAL])[0])
    steps = one_step(lambda text: value[text] + 5.0, end=lambda text: chance(text) + 5.0)
    assert same(world.expected_step([steps]), exact)
    steps = one_step(lambda text: value[text] + 5.0)
    assert angle_differs(world.expected_step([steps]), exact), "the end is not told of the constant"


@pytest.mark.parametrize("name", WRONG)
def test_with_any_other_potential_it_is_not(world: World, exact: Tensor, name: str) -> None:
    """With another potential the one-step update is no gradient of the score, though at discount 1 it is.

    phi != V + constant:  E[ sum_t grad log p(x_t) (phi(x_<=t) - phi(x_<t)) ] != grad sum_x p(x) R(x)
    """
    phi = wrong_potentials(letters(world, true_values(world, [FINAL])[0]))[name]
    steps = one_step(phi)
    assert angle_differs(world.expected_step([steps]), exact)
    assert same(world.expected_step([steps.but(discount=1.0)]), exact)


def test_another_policys_value_is_not_the_true_one(world: World, exact: Tensor) -> None:
    """The value is that of the policy which learns: after a few steps the old one no longer gives the gradient."""
    before = World(seed=1)
    value = letters(world, true_values(before, [FINAL])[0])
    assert angle_differs(world.expected_step([one_step(value.__getitem__)]), exact)


def test_the_values_of_a_critic_at_lambda_zero(world: World, exact: Tensor) -> None:
    """The critic's one-step error is the same update: exact with the true values, and with no others.

    lambda 0:  A_t = r_t + V(x_<=t) - V(x_<t)
    """
    true = true_values(world, [FINAL])[0]
    assert same(Chosen(world, [FINAL], name="a2c", lam=0.0, values=[true]).step(), exact)
    by_text = letters(world, true)
    for name in WRONG:
        phi = wrong_potentials(by_text)[name]
        values = {prefix: phi("".join("a "[token] for token in prefix)) for prefix in true}
        found = Chosen(world, [FINAL], name="a2c", lam=0.0, values=[values]).step()
        assert angle_differs(found, exact), name


def test_with_rewards_on_the_way(world: World) -> None:
    """The same holds for rewards on the way and a discount, with the value of the discounted sum.

    E[ sum_t grad log p(x_t) (r_t + g V(x_<=t) - V(x_<t)) ] = E[ sum_t grad log p(x_t) sum_{s >= t} g**(s - t) r_s ]
    """
    tokens = ir.reward(every="token", name="tokens", discount=0.6)(lambda view: chance(f"{view.text} {view.done}"))
    true = true_values(world, [tokens])[0]
    plain = world.expected_step([tokens])
    assert same(Chosen(world, [tokens], name="a2c", lam=0.0, values=[true]).step(), plain)
    undiscounted = true_values(world, [tokens.but(discount=1.0)])[0]
    assert angle_differs(Chosen(world, [tokens], name="a2c", lam=0.0, values=[undiscounted]).step(), plain)
