"""The plain policy gradient: a final reward, baselines, what the loss is averaged over, discounts."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial

import pytest
import torch
from torch import Tensor

import instant_reward as ir
from exact.world import ALPHABETS, PROMPT, REINFORCE, World, angle_differs, chance, differ, same
from instant_reward import credit, losses
from instant_reward.batch import Batch

torch.set_num_threads(1)
FIRST = len(PROMPT.token_ids)


@ir.reward(every="end")
def final(view: ir.View) -> float:
    return chance(view.text)


def scores(world: World) -> Tensor:
    return torch.tensor([chance(rollout.text) for rollout in world.rollouts([])], dtype=torch.float64)


def lengths(world: World) -> Tensor:
    return torch.tensor([float(len(text)) for text in world.texts], dtype=torch.float64)


def sampled_before(batch: Batch) -> Tensor:
    """How many tokens of the text were sampled before each one, float64 ``[B, L]``."""
    return (batch.mask.double().cumsum(1) - 1).clamp(min=0)


def changed(advantages: Callable[[Batch], Tensor]) -> Callable[[Batch], Batch]:
    """REINFORCE's credit, then something else in the advantages' place."""

    def credit_batch(batch: Batch) -> Batch:
        batch = REINFORCE(batch)
        return replace(batch, advantages=advantages(batch))

    return credit_batch


def test_world_is_whole() -> None:
    """Every text is there, once: the probabilities sum to 1, and no longer where one is left out."""
    world = World()
    assert len(world.texts) == 31
    assert same(world.probabilities().sum(), torch.tensor(1.0))
    assert differ(world.probabilities()[1:].sum(), torch.tensor(1.0))
    rollouts = world.rollouts([])
    assert {rollout.stop for rollout in rollouts} == {"ended", "length"}
    assert len({rollout.text for rollout in rollouts}) == 31


@pytest.mark.parametrize("alphabet", ALPHABETS)
def test_final_reward_averaged_over_texts_is_the_gradient(alphabet: tuple[str, str]) -> None:
    """REINFORCE with a final reward, averaged over texts, is the gradient of the expected reward.

    E[ sum_t grad log p(x_t | x_<t) R(x) ] = grad sum_x p(x) R(x)
    """
    world = World(alphabet)
    step = world.expected_step([final])
    assert same(step, world.gradient(scores(world)))

    unmasked = world.expected_step([final], lambda batch: REINFORCE(replace(batch, mask=torch.ones_like(batch.mask))))
    assert differ(unmasked, step), "the mask is ignored"
    rolled = world.expected_step([final], changed(lambda batch: batch.advantages.roll(1, dims=1)))
    assert differ(rolled, step), "advantages one token too late"
    rolled = world.expected_step([final], changed(lambda batch: batch.advantages.roll(-1, dims=1)))
    assert differ(rolled, step), "advantages one token too early"


def test_weights_of_rewards_add_up() -> None:
    """Several rewards are one: the gradient of the weighted sum.

    E[ sum_t grad log p(x_t | x_<t) sum_k w_k G_k[t] ] = grad sum_x p(x) sum_k w_k R_k(x)
    """
    world = World()
    length = ir.reward(every="end", name="length", weight=-0.25)(lambda view: float(len(view.text)))
    step = world.expected_step([final.but(weight=2.0), length])
    total = [2.0 * chance(rollout.text) - 0.25 * len(rollout.text) for rollout in world.rollouts([])]
    assert same(step, world.gradient(total))
    assert differ(world.expected_step([final, length]), step)


def test_baseline_of_the_prefix_changes_nothing() -> None:
    """A baseline that depends on the prefix alone leaves the expected step as it is; one that saw the token does not.

    E[ sum_t grad log p(x_t | x_<t) b(x_<t) ] = 0
    """
    world = World()

    def baseline(batch: Batch, ahead: int) -> Tensor:
        values = torch.zeros_like(batch.old_logprobs)
        for row, t in batch.mask.nonzero().tolist():
            values[row, t] = 3.0 * chance(str(batch.token_ids[row, FIRST : t + ahead].tolist()))
        return values

    step = world.expected_step([final], changed(lambda batch: batch.advantages - baseline(batch, 0)))
    assert same(step, world.gradient(scores(world)))

    peeking = world.expected_step([final], changed(lambda batch: batch.advantages - baseline(batch, 1)))
    assert differ(peeking, step), "a baseline that has seen the token"


def test_normalise_says_what_each_text_weighs() -> None:
    """Over "text" the gradient is exact, over a "constant" it is a multiple; over "tokens" texts weigh by length.

    text:      grad E[ R ]
    constant:  grad E[ R ] / c
    tokens:    in batches of one text, grad E[ R / length ]: with a reward that is always 1, shorter texts are learned.
    """
    world = World()
    exact = world.gradient(scores(world))
    constant = world.expected_step([final], loss=partial(losses.policy_gradient, normalise="constant", constant=4.0))
    assert same(constant, exact / 4.0)

    tokens = partial(losses.policy_gradient, normalise="tokens")
    per_token = world.expected_step([final], loss=tokens)
    assert same(per_token, world.gradient(scores(world) / lengths(world)))
    assert angle_differs(per_token, exact)

    always = ir.reward(every="end", name="always")(lambda view: 1.0)
    assert same(world.expected_step([always]), torch.zeros_like(exact))
    assert same(world.expected_step([always], loss=tokens), world.gradient(1.0 / lengths(world)))
    longer = world.expected_step([always], loss=tokens) * world.gradient(lengths(world))
    assert longer.sum() < 0.0

    with pytest.raises(ir.UserError, match="normalise='mean' is unknown"):
        world.expected_step([final], loss=partial(losses.policy_gradient, normalise="mean"))


def test_tokens_weigh_long_texts_more_in_a_group() -> None:
    """In a group, "tokens" is no multiple of the gradient either: the group's length depends on its texts."""
    world = World()
    exact = world.gradient(scores(world))
    assert same(world.expected_step([final], siblings=2), exact)
    tokens = world.expected_step([final], loss=partial(losses.policy_gradient, normalise="tokens"), siblings=2)
    assert angle_differs(tokens, exact)


def random_rewards(batch: Batch) -> Tensor:
    """A reward at every token that depends on the text up to it, ``[B, L]``."""
    values = torch.zeros_like(batch.old_logprobs)
    for row, t in batch.mask.nonzero().tolist():
        values[row, t] = chance(str(batch.token_ids[row, : t + 1].tolist()))
    return values


def test_discount_leaves_out_the_prefactor() -> None:
    """With a discount, reward-to-go is the discounted objective's gradient but for the factor of later tokens.

    grad E[ sum_t g**t r_t ] = E[ sum_t g**t grad log p(x_t | x_<t) G[t] ],  G[t] = r_t + g G[t+1]

    The library leaves out the g**t, as everyone does; with it put back, the gradient is exact.
    """
    world, discount = World(), 0.7

    def credited(batch: Batch, prefactor: bool, discount_used: float = discount) -> Batch:
        returns = credit.reward_to_go(random_rewards(batch), batch.mask, discount_used)
        factor = discount ** sampled_before(batch) if prefactor else torch.ones_like(returns)
        return replace(batch, advantages=returns * factor)

    objective = []
    for text in world.texts:
        tokens = [*PROMPT.token_ids, *text]
        values = [chance(str(tokens[: FIRST + t + 1])) for t in range(len(text))]
        objective.append(sum(discount**t * value for t, value in enumerate(values)))
    exact = world.gradient(objective)
    assert same(world.expected_step([], lambda batch: credited(batch, prefactor=True)), exact)
    assert differ(world.expected_step([], lambda batch: credited(batch, prefactor=False)), exact)
    assert differ(world.expected_step([], lambda batch: credited(batch, True, 1.0)), exact), "the discount is missing"


def test_every_source_has_its_own_discount() -> None:
    """Sources are discounted apart: the step of two is the sum of the steps of each."""
    world = World()
    near = ir.reward(every="token", name="near", discount=0.5)(lambda view: chance(view.text))
    both = world.expected_step([near, final])
    assert same(both, world.expected_step([near]) + world.expected_step([final]))
    far = near.but(discount=1.0)
    assert differ(both, world.expected_step([far, final])), "one discount for all"
