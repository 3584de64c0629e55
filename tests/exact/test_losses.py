"""The clipped loss where it is exact, and the KL to a reference: as a reward, and why not as a loss."""

from __future__ import annotations

import math
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

import instant_reward as ir
from exact.chosen import Chosen
from exact.world import PLAIN, PROMPT, REINFORCE, Credit, World, angle_differs, chance, differ, same
from instant_reward import algorithms, losses
from instant_reward.batch import Batch, collate
from instant_reward.config import AlgorithmConfig
from instant_reward.credit import Source
from instant_reward.crediting import credit_batch
from instant_reward.presets import PRESETS, Preset
from instant_reward.types import LossOutput

torch.set_num_threads(1)
FIRST = len(PROMPT.token_ids)
FINAL = ir.reward(every="end", name="final")(lambda view: chance(view.text))
WORDS = ir.reward(every="word", name="words", discount=0.6)(lambda view: chance(f"{view.text} word"))


@pytest.fixture(scope="module")
def world() -> World:
    return World()


@pytest.mark.parametrize("normalise", ["text", "tokens", "constant"])
def test_clipped_is_the_plain_step_at_ratio_one(world: World, normalise: losses.Normalise) -> None:
    """On the policy's own texts the clipped loss takes the plain policy gradient's step.

    ratio = p / p_sampler = 1:  grad min(ratio A, clip(ratio) A) = A grad log p
    """
    plain = partial(losses.policy_gradient, normalise=normalise, constant=4.0)
    clipped = partial(losses.clipped, normalise=normalise, constant=4.0)
    step = world.expected_step([FINAL, WORDS], loss=plain)
    assert same(world.expected_step([FINAL, WORDS], loss=clipped), step)
    assert same(world.expected_step([FINAL, WORDS], loss=partial(clipped, low=0.01, high=0.5)), step)

    def off(batch: Batch) -> Batch:
        """Wrong on purpose: the sampler's log-probabilities of another temperature."""
        batch = REINFORCE(batch)
        return replace(batch, old_logprobs=batch.old_logprobs * 0.5)

    assert angle_differs(world.expected_step([FINAL, WORDS], off, clipped), step)

    def late(batch: Batch) -> Batch:
        """Wrong on purpose: the sampler's log-probabilities one token too late."""
        batch = REINFORCE(batch)
        return replace(batch, old_logprobs=batch.old_logprobs.roll(1, dims=1))

    assert angle_differs(world.expected_step([FINAL, WORDS], late, clipped), step)


@pytest.mark.parametrize("level", ["token", "piece", "sequence", "decision"])
def test_a_bound_that_is_met_exactly_is_the_plain_step_at_ratio_one(world: World, level: str) -> None:
    """On the policy's own texts every weight is 1, and a bound of 1 leaves it what it is; so do V-trace's own bounds.

    min(p / q, 1) = 1 where p = q
    """
    pieces: dict[str, Any] = {"pieces": "word"} if level == "piece" else {}
    plain = Chosen(world, [FINAL, WORDS], name="reinforce", **pieces).step()
    options = {"name": "reinforce", "importance": {"level": level, "most": 1.0}, **pieces}
    assert same(Chosen(world, [FINAL, WORDS], sampler=world, **options).step(), plain)
    batch = Chosen(world, [FINAL, WORDS], sampler=world, **options).batch()
    assert batch.weights is None or batch.weights[batch.mask].eq(1.0).all()
    values = [{prefix: 2.0 * chance(f"{number} {prefix}") for prefix in world.row_of} for number in range(2)]
    learned: dict[str, Any] = {"lam": 1.0, "values": values, **pieces}
    assert same(Chosen(world, [FINAL, WORDS], sampler=world, name="vtrace", **learned).step(), plain)
    if level != "decision":
        decoupled = {"name": "decoupled_ppo", "scale": "none", "importance": options["importance"], **learned}
        assert same(Chosen(world, [FINAL, WORDS], sampler=world, **decoupled).step(), plain)
    less = {**options, "importance": {"level": level, "most": 0.9}}
    assert same(Chosen(world, [FINAL, WORDS], sampler=world, **less).step(), 0.9 * plain), "a bound below 1 binds"
    free = {**options, "importance": {"level": level, "most": None}}
    bounded, unbounded = (Chosen(world, [FINAL, WORDS], sampler=World(seed=1), **one) for one in (options, free))
    assert angle_differs(bounded.step(), unbounded.step()), "and on another policy's texts so does 1"


def test_clipped_stops_where_it_says() -> None:
    """Beyond its bounds the clipped loss pushes no further the same way, and still pulls back.

    -min(ratio A, clip(ratio, 1 - low, 1 + high) A), token by token against plain arithmetic.
    """
    world = World()
    batch = REINFORCE(_collated(world, [FINAL]))
    moved = batch.old_logprobs + torch.linspace(-0.6, 0.6, batch.mask.numel(), dtype=torch.float64).view_as(batch.mask)
    logprobs = moved.clone().requires_grad_()
    output = losses.clipped(logprobs, batch, low=0.1, high=0.3)
    (gradient,) = torch.autograd.grad(output.loss, logprobs)
    total, cut = 0.0, 0
    for row, t in batch.mask.nonzero().tolist():
        ratio, advantage = math.exp(moved[row, t] - batch.old_logprobs[row, t]), float(batch.advantages[row, t])
        bounded = min(max(ratio, 0.9), 1.3)
        total += min(ratio * advantage, bounded * advantage)
        is_cut = bounded * advantage < ratio * advantage
        cut += is_cut
        wanted = 0.0 if is_cut else -ratio * advantage / len(batch)
        assert float(gradient[row, t]) == pytest.approx(wanted, abs=1e-12)
    assert float(output.loss.detach()) == pytest.approx(-total / len(batch), abs=1e-12)
    assert output.metrics["clipped"] == cut / int(batch.mask.sum())
    assert 0 < cut < int(batch.mask.sum())
    assert not gradient[~batch.mask].any()


def test_metrics_say_how_far_the_sampler_is() -> None:
    """``sampler_gap`` is the log-probabilities' mean distance, ``ratio_kl`` an estimate of the KL. Parts add up."""
    world = World()
    batch = REINFORCE(_collated(world, [FINAL]))
    moved = torch.where(batch.mask, batch.old_logprobs + 0.25, torch.nan)
    for loss in (losses.policy_gradient, losses.clipped):
        metrics = loss(moved, batch).metrics
        assert metrics["sampler_gap"] == pytest.approx(0.25)
        assert metrics["ratio_kl"] == pytest.approx(math.exp(0.25) - 1.25)
        halves = [batch.select(range(10)), batch.select(range(10, 31))]
        parts = [loss(moved[rows, : part.mask.shape[1]], part).metrics for rows, part in _with_rows(halves)]
        for key, value in metrics.items():
            assert sum(part[key] for part in parts) == pytest.approx(value)


def with_kl(world: World, reference: World, weight: float = 1.0, preset: Preset = PLAIN) -> Credit:
    """The credit of a preset, with the reference's log-probabilities annotated."""
    table = reference.logprobs().detach()

    def credit(batch: Batch) -> Batch:
        ids = [batch.token_ids[row, FIRST : int(batch.length[row])].tolist() for row in range(len(batch))]
        known = table[[world.texts.index(text) for text in ids]]
        sources = [*batch.sources, Source("kl", weight, dense="kl")]
        return credit_batch(replace(batch, sources=sources, ref_logprobs=known), preset)

    return credit


def divergence(world: World, reference: World) -> list[float]:
    """``log p(x) - log q(x)`` of each text."""
    ours, theirs = (torch.where(w.mask, w.logprobs().detach(), 0.0).sum(1) for w in (world, reference))
    return (ours - theirs).tolist()


def test_kl_as_a_reward_is_the_gradient_of_the_kl(world: World) -> None:
    """The log-ratio to a reference, paid per token with discount 1, has the gradient of the KL on the policy's texts.

    E[ sum_t grad log p(x_t) sum_{s >= t} -log(p / q)(x_s) ] = -grad sum_x p(x) log(p(x) / q(x))
    """
    reference = World(seed=1)
    probabilities = world.probabilities()
    ours = torch.where(world.mask, world.logprobs(), 0.0).sum(1)
    theirs = torch.where(world.mask, reference.logprobs().detach(), 0.0).sum(1)
    (exact,) = torch.autograd.grad((probabilities * (ours - theirs)).sum(), world.logits)
    step = world.expected_step([], with_kl(world, reference))
    assert same(step, -exact)
    assert same(step, -world.gradient(divergence(world, reference)))

    rloo = with_kl(world, reference, preset=PRESETS["rloo"])
    assert same(world.expected_step([], rloo, siblings=2), -exact)
    whole = with_kl(world, reference, preset=replace(PLAIN, returns="whole"))
    assert same(world.expected_step([], whole), -exact)

    def impatient(batch: Batch) -> Batch:
        """Wrong on purpose: each token pays its own log-ratio and answers for no later one."""
        batch = with_kl(world, reference)(batch)
        return replace(batch, advantages=batch.rewards[:, 0])

    assert angle_differs(world.expected_step([], impatient), -exact)


def test_kl_joins_other_rewards_with_a_discount_of_its_own(world: World) -> None:
    """The KL keeps discount 1 beside rewards that are discounted: the step is the sum of both."""
    reference = World(seed=1)
    step = world.expected_step([WORDS], with_kl(world, reference, 0.3))
    alone = world.expected_step([WORDS])
    kl = world.gradient(divergence(world, reference))
    assert same(step, alone - 0.3 * kl)
    assert differ(step, alone - 0.6 * kl)


def test_kl_as_a_loss_holds_nothing_back(world: World) -> None:
    """The same log-ratio used as a loss has zero expected gradient, so the library refuses it.

    E[ grad sum_t (log p - log q)(x_t) ] = E[ grad log p(x) ] = 0
    """
    reference = World(seed=1).logprobs().detach()

    def log_ratio(logprobs: Tensor, batch: Batch) -> LossOutput:
        row = world.texts.index(batch.token_ids[0, FIRST : int(batch.length[0])].tolist())
        gap = logprobs - reference[row : row + 1, : logprobs.shape[1]]
        return LossOutput(torch.where(batch.mask, gap, 0.0).sum())

    step = world.expected_step([], loss=log_ratio)
    assert same(step, torch.zeros_like(step))
    assert differ(step, -world.gradient(divergence(world, World(seed=1))))

    with pytest.raises(ir.UserError, match="zero expected gradient"):
        algorithms.build(AlgorithmConfig(kl=0.1, kl_as="loss"), [FINAL], max_new_tokens=4)


def _collated(world: World, rewards: list[ir.Reward]) -> Batch:
    return collate(world.rollouts(rewards), [Source(one.name) for one in rewards], dtype=torch.float64)


def _with_rows(parts: list[Batch]) -> list[tuple[list[int], Batch]]:
    """Parts with the rows (in order) that they were made of."""
    start, result = 0, []
    for part in parts:
        result.append((list(range(start, start + len(part))), part))
        start += len(part)
    return result
