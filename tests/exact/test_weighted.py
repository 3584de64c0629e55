"""Likelihoods weighted by reward (rwr, awr, raft), and the losses of critics that learn from given texts (ilql)."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor

import instant_reward as ir
from exact.chosen import Chosen
from exact.world import World, angle_differs, chance, differ, same
from instant_reward import credit, losses
from instant_reward.batch import Batch, collate
from instant_reward.credit import Source
from instant_reward.types import LossOutput, PolicyOutput

torch.set_num_threads(1)
FINAL = ir.reward(every="end", name="final")(lambda view: chance(view.text))


@pytest.fixture(scope="module")
def world() -> World:
    return World()


def grouped(world: World, chosen: Chosen, size: int) -> Batch:
    """Every text once, in groups of so many, credited."""
    rollouts = [replace(one, group=number // size) for number, one in enumerate(world.rollouts(chosen.rewards))]
    return chosen.credit(collate(rollouts, [Source("final")], dtype=torch.float64))


def test_reward_weighted_likelihood(world: World) -> None:
    """Each text weighs by the exponential of how far it is above its group's mean, up to a bound: never below 0.

    w = min(exp((R - mean) / beta), most),  loss = -(1 / tokens) sum_x w(x) sum_t log p(x_t)     (Peters & Schaal, 2007)
    """
    chosen = Chosen(world, [FINAL], name="rwr", beta=0.3, most_weight=3.0, normalise=None)
    batch = grouped(world, chosen, 4)
    scores = [chance(rollout.text) for rollout in world.rollouts([])]
    weights = []
    for row in range(len(batch)):
        group = scores[row // 4 * 4 : row // 4 * 4 + 4]
        weights.append(min(3.0, math.exp((scores[row] - sum(group) / len(group)) / 0.3)))
    wanted = torch.where(batch.mask, torch.tensor(weights, dtype=torch.float64)[:, None], 0.0)
    assert same(batch.advantages, wanted)
    assert any(weight == 3.0 for weight in weights)
    assert (batch.advantages[batch.mask] > 0).all()
    assert not batch.advantages[~batch.mask].any()

    logprobs = world.logprobs().detach().requires_grad_()
    (gradient,) = torch.autograd.grad(chosen.loss(logprobs, batch).loss, logprobs)
    assert same(gradient, -wanted / int(batch.mask.sum()))

    unbounded = Chosen(world, [FINAL], name="rwr", beta=0.3, most_weight=1e9, normalise=None)
    assert differ(grouped(world, unbounded, 4).advantages, wanted)
    huge = torch.tensor([[5000.0, -5000.0]], dtype=torch.float64)
    assert credit.exponential_weights(huge, torch.ones(1, 2), 0.01, 20.0).tolist() == [[pytest.approx(20.0), 0.0]]


def test_advantage_weighted_likelihood(world: World) -> None:
    """The same with a critic's advantages, token by token.

    w[t] = min(exp(A[t] / beta), most),  A = GAE        (Peng et al., 2019, equation 9)
    """
    values = [{prefix: chance(f"value {prefix}") for prefix in world.row_of}]
    options = {"name": "awr", "beta": 0.5, "lam": 0.8, "values": values, "normalise": None}
    batch = Chosen(world, [FINAL], **options).batch()
    known = torch.where(batch.mask, batch.values[:, 0], 0.0)
    advantages, _ = credit.gae(batch.rewards[:, 0], known, batch.mask, 1.0, 0.8)
    assert same(batch.advantages, torch.where(batch.mask, (advantages / 0.5).exp().clamp(max=20.0), 0.0))
    assert (batch.advantages[batch.mask] > 0).all()


def test_learning_from_the_best(world: World) -> None:
    """Of each group the best ``keep`` texts are imitated, the others not at all; equals at the edge share.

    loss = -(1 / tokens) sum over the best of sum_t log p(x_t)
    """
    scores = torch.tensor([chance(rollout.text) for rollout in world.rollouts([])], dtype=torch.float64)
    for keep in (1, 2):
        chosen = Chosen(world, [FINAL], name="raft", keep=keep, normalise=None)
        batch = grouped(world, chosen, 5)
        for group in range(7):
            rows = [row for row in range(len(batch)) if int(batch.group[row]) == group]
            best = sorted(rows, key=lambda row: -float(scores[row]))[:keep]
            for row in rows:
                wanted = batch.mask[row].double() * (row in best)
                assert same(batch.advantages[row], wanted)
    totals = torch.tensor([1.0, 3.0, 3.0, 3.0, 0.0, 5.0])
    group = torch.tensor([0, 0, 0, 0, 0, 1])
    assert credit.best_of_group(totals, group, 1).tolist() == pytest.approx([0, 1 / 3, 1 / 3, 1 / 3, 0, 1])
    assert credit.best_of_group(totals, group, 4).tolist() == pytest.approx([1, 1, 1, 1, 0, 1])
    assert credit.best_of_group(totals, group, 9).tolist() == [1.0] * 6


def test_best_of_two_is_the_gradient_of_its_likelihood(world: World) -> None:
    """The best of two imitated: on average the gradient of the likelihood under the best of two, which is held fixed.

    E[ sum_t grad log p(best_t) ] = sum_x P(x is the best of two) grad log p(x)
    """
    # No two texts may score the same: a text that was cut off reads as one that ended.
    weights = world.probabilities().detach()
    apart = ir.reward(every="end", name="apart")(lambda view: chance(f"{view.text} {view.tokens}"))
    scores = torch.tensor([rollout.total() for rollout in world.rollouts([apart])], dtype=torch.float64)
    below = (scores[:, None] > scores[None, :]).double() @ weights
    equal = (scores[:, None] == scores[None, :]).double() @ weights
    best = weights * (2.0 * below + equal)
    assert float(best.sum()) == pytest.approx(1.0, abs=1e-12)
    logprobs = torch.where(world.mask, world.logprobs(), 0.0).sum(1)
    (exact,) = torch.autograd.grad((best * logprobs).sum(), world.logits)
    chosen = Chosen(world, [apart], name="raft")
    assert same(chosen.step(siblings=2), exact / 2), "of two texts, one is learned from"
    assert angle_differs(exact, world.gradient(scores)), "it is no policy gradient"


def random_answers(batch: Batch, seed: int) -> PolicyOutput:
    generator = torch.Generator().manual_seed(seed)
    rows, length = batch.mask.shape

    def numbers(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64).requires_grad_()

    return PolicyOutput(
        numbers(rows, length),
        values=numbers(rows, 1, length),
        chosen=numbers(rows, 2, length),
        spread=numbers(rows, 2, length),
    )


def test_implicit_q_against_plain_sums(world: World) -> None:
    """ILQL's loss by hand: Q fitted one step ahead, V to an expectile of the slow Q, and the CQL term.

    1/2 sum_i (Q_i - r - g V')**2 + |tau - 1(u < 0)| u**2 + alpha sum_i (lse Q_i - Q_i),  u = min slow Q - V
    """
    values = [{prefix: chance(f"v {prefix}") for prefix in world.row_of}]
    chosen = Chosen(world, [FINAL], name="ilql", expectile=0.8, cql=0.3, critic={"weight": 2.0}, values=values)
    batch = chosen.batch()
    batch = replace(batch, slow=torch.randn(batch.mask.shape, dtype=torch.float64))
    out = random_answers(batch, 1)
    total, count = 0.0, int(batch.mask.sum())
    for row, t in batch.mask.nonzero().tolist():
        later = [s for s in batch.mask[row].nonzero().flatten().tolist() if s > t]
        ahead = float(batch.values[row, 0, later[0]]) if later else 0.0
        target = float(batch.rewards[row, 0, t]) + ahead
        assert float(batch.targets[row, 0, t]) == pytest.approx(target, abs=1e-12)
        q, v = out.chosen[row, :, t], out.values[row, 0, t]
        gap = float(batch.slow[row, t]) - v
        weight = 0.2 if float(gap.detach()) < 0 else 0.8
        total = total + 0.5 * ((q - target) ** 2).sum() + weight * gap**2 + 0.3 * (out.spread[row, :, t] - q).sum()
    imitation = -out.logprobs[batch.mask].sum() / len(batch)
    found = chosen.algorithm.loss(out, batch).loss
    assert same(found, 2.0 * total / count + imitation)
    parameters = [out.values, out.chosen, out.spread, out.logprobs]
    wanted = torch.autograd.grad(2.0 * total / count + imitation, parameters)
    for one, other in zip(torch.autograd.grad(found, parameters), wanted, strict=True):
        assert same(one, other)


def test_the_value_loss_against_plain_sums(world: World) -> None:
    """The critic's error, each source by its weight squared, and no further than the clip lets it move.

    1/2 sum_k w_k**2 max((V - G)**2, (V_before + clip(V - V_before) - G)**2), per sampled token
    """
    words = ir.reward(every="word", name="words", weight=2.0)(lambda view: chance(f"{view.text} word"))
    values = [{prefix: chance(f"{number} {prefix}") for prefix in world.row_of} for number in range(2)]
    batch = Chosen(world, [FINAL, words], name="a2c", values=values).batch()
    moved = torch.randn(batch.values.shape, dtype=torch.float64).requires_grad_()
    for clip in (None, 0.2):
        total = torch.zeros((), dtype=torch.float64)
        for row, t in batch.mask.nonzero().tolist():
            for source, weight in enumerate((1.0, 2.0)):
                v, before, target = (x[row, source, t] for x in (moved, batch.values, batch.targets))
                error = (v - target) ** 2
                if clip is not None:
                    bounded = before + torch.clamp(v - before, -clip, clip)
                    error = torch.maximum(error, (bounded - target) ** 2)
                total = total + 0.5 * weight**2 * error
        found = losses.value(moved, batch, clip).loss
        assert same(found, total / int(batch.mask.sum()))
        (gradient,) = torch.autograd.grad(found, moved)
        (wanted,) = torch.autograd.grad(total / int(batch.mask.sum()), moved)
        assert same(gradient, wanted)
        assert not gradient[~batch.mask[:, None].expand_as(gradient)].any()


def test_the_critic_learns_alone_at_first(world: World) -> None:
    """In the first ``warmup`` steps there is no policy loss, and the critic's all the same."""
    values = [{prefix: chance(f"value {prefix}") for prefix in world.row_of}]
    options = {"name": "a2c", "values": values, "critic": {"warmup": 3}}

    def at(step: int) -> LossOutput:
        chosen = Chosen(world, [FINAL], carried=replace(ir.types.Carried(), step=step), **options)
        batch = chosen.batch()
        logprobs = world.logprobs().detach().requires_grad_()
        output = chosen.output(logprobs, batch)
        output.values = batch.values.clone().requires_grad_()
        loss = chosen.algorithm.loss(output, batch)
        found = torch.autograd.grad(loss.loss, [logprobs, output.values], allow_unused=True)
        assert found[1] is not None
        assert found[1].any()
        assert (found[0] is not None) == (step >= 3)
        return loss

    assert "critic_loss" in at(2).metrics
    assert "ratio_kl" in at(3).metrics
