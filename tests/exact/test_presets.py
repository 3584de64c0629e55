"""The presets that are policy gradients: whose baselines are unbiased, and which take the same step at ratio 1."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

import instant_reward as ir
from exact.chosen import Chosen, Values, true_values
from exact.world import LONGEST, World, angle_differs, chance, differ, same
from instant_reward import credit
from instant_reward.batch import Batch, collate
from instant_reward.credit import Source
from instant_reward.presets import PRESETS
from instant_reward.types import Carried

torch.set_num_threads(1)
FINAL = ir.reward(every="end", name="final")(lambda view: chance(view.text))
WORDS = ir.reward(every="word", name="words", discount=0.6)(lambda view: chance(f"{view.text} word"))
BOTH = [FINAL, WORDS]


@pytest.fixture(scope="module")
def world() -> World:
    return World()


@pytest.fixture(scope="module")
def plain(world: World) -> Tensor:
    return world.expected_step(BOTH)


@pytest.fixture(scope="module")
def exact(world: World) -> Tensor:
    return world.gradient([chance(rollout.text) for rollout in world.rollouts([])])


@pytest.fixture(scope="module")
def grpo(world: World) -> Tensor:
    """GRPO's step with the plain policy gradient as its loss."""
    return Chosen(world, [FINAL], name="grpo", normalise=None, loss="policy_gradient").step(siblings=2)


def any_values(world: World, sources: int, ends: bool = False) -> list[Values]:
    """Values that mean nothing, one table a source; with ``ends``, of whole texts too."""
    known = [*world.row_of, *(tuple(text) for text in world.texts if ends)]
    return [{prefix: 2.0 * chance(f"{number} {prefix}") for prefix in known} for number in range(sources)]


def test_which_baselines_are_unbiased(world: World, plain: Tensor) -> None:
    """The mean of earlier steps and the critic's value of the prefix change no step; the batch's own mean does.

    E[ grad log p(x_t | x_<t) b ] = 0 where b knows nothing of this text beyond x_<t

    The batch's mean contains the text itself: of a batch of one it takes away what this text earned.
    """
    carried = Carried(step=2, mean_return=0.8, mean_weight=0.2)
    running = Chosen(world, BOTH, name="reinforce", baseline="running_mean", carried=carried)
    assert same(running.step(), plain)
    assert differ(running.batch().advantages, Chosen(world, BOTH, name="reinforce").batch().advantages)
    values = any_values(world, 2)
    assert same(Chosen(world, BOTH, name="reinforce", baseline="value", values=values).step(), plain)
    batch_mean = Chosen(world, BOTH, name="reinforce", baseline="batch_mean")
    assert differ(batch_mean.step(apart=True), plain)

    ahead = [{prefix: table[(*prefix, 0)] if len(prefix) < 3 else 0.0 for prefix in world.row_of} for table in values]
    assert same(Chosen(world, BOTH, name="reinforce", baseline="value", values=ahead).step(), plain), "still a prefix"

    def late(batch: Batch) -> Batch:
        """Wrong on purpose: the value of the text behind each token, which has seen it."""
        chosen = Chosen(world, BOTH, name="reinforce", baseline="value", values=values)
        batch = chosen.annotate(batch)
        return chosen.algorithm.credit(replace(batch, values=batch.values.roll(-1, dims=2).clamp(-5, 5)))

    assert differ(Chosen(world, BOTH, name="reinforce").step(credit=late), plain)


def test_the_batchs_mean_of_many_texts_is_nearly_unbiased(world: World) -> None:
    """With the text itself one of many in the mean, what is left of the bias is of the order of one text's share."""
    batch_mean = Chosen(world, [FINAL], name="reinforce", baseline="batch_mean")
    credited = batch_mean.batch()
    on = credited.mask
    assert same(credited.advantages[on], credited.returns[on] - credited.returns[on].mean())
    assert not credited.advantages[~on].any()


def test_whitening_turns_the_step(world: World, exact: Tensor) -> None:
    """Divided by the batch's deviation and less its mean, advantages of small batches point elsewhere.

    A' = (A - mean) / deviation, over the sampled tokens of the batch
    """
    options = {"name": "reinforce++", "normalise": "text"}
    assert angle_differs(Chosen(world, [FINAL], **options).step(siblings=2, apart=True), exact)
    assert same(Chosen(world, [FINAL], **options, scale="none").step(), exact)
    batch, raw = (Chosen(world, [FINAL], **options, scale=scale).batch() for scale in ("whiten", "none"))
    values = raw.advantages[raw.mask]
    wanted = (values - values.mean()) / values.std(correction=0)
    assert same(batch.advantages[batch.mask], wanted)


def test_dr_grpo_is_grpo_without_the_deviation(world: World, exact: Tensor) -> None:
    """Without the deviation, divided by a constant: the exact gradient, shorter by (n - 1) / n and the longest length.

    grad E[ R ] (n - 1) / (n longest)
    """
    step = Chosen(world, [FINAL], name="dr_grpo", normalise=None).step(siblings=2)
    assert same(step, exact / 2 / LONGEST)
    same_thing = Chosen(world, [FINAL], name="grpo", scale="none", normalise="constant")
    assert same_thing.algorithm.preset == PRESETS["dr_grpo"]
    assert angle_differs(Chosen(world, [FINAL], name="grpo", normalise="constant").step(siblings=2), exact)
    # DAPO's wider bound above plays no part on the policy's own texts, where any bounds take the same step.
    assert PRESETS["dapo"] == replace(PRESETS["grpo"], clip_high=0.28, skip_equal=True)


def test_a_whole_text_is_compared_with_whole_texts(world: World) -> None:
    """Where rewards are summed over the text, siblings count whole as well, however short they were: equals get 0.

    A[t] = R - (1 / n) sum of the group's R, the same for all t
    """
    for name, factor in (("dr_grpo", 1.0), ("rwr", None)):
        chosen = Chosen(world, [FINAL], name=name)
        rollouts = [replace(one, group=number // 6) for number, one in enumerate(world.rollouts([FINAL]))]
        batch = chosen.credit(collate(rollouts, [Source("final")], dtype=torch.float64))
        for row, rollout in enumerate(rollouts):
            group = [one.total() for one in rollouts if one.group == rollout.group]
            above = rollout.total() - sum(group) / len(group)
            found = batch.advantages[row][batch.mask[row]]
            wanted = above if factor else min(math.exp(above), 20.0)
            assert same(found, torch.full_like(found, wanted))
    always = ir.reward(every="end", name="final")(lambda view: 1.0)
    for name in ("grpo", "dr_grpo", "gspo", "cispo", "dapo"):
        equals = [replace(one, group=0) for one in world.rollouts([always])]
        credited = Chosen(world, [always], name=name).credit(collate(equals, [Source("final")], dtype=torch.float64))
        assert same(credited.advantages, torch.zeros_like(credited.advantages)), "texts of all lengths earned the same"


def test_gspo_is_grpo_text_by_text_at_ratio_one(world: World, grpo: Tensor) -> None:
    """On the policy's own texts the whole text's ratio is 1, and its step that of GRPO averaged text by text.

    grad exp(mean over t of log ratio[t]) = (1 / length) sum_t grad log p(x_t)
    """
    step = Chosen(world, [FINAL], name="gspo", normalise=None).step(siblings=2)
    assert same(step, Chosen(world, [FINAL], name="grpo", normalise="text_mean").step(siblings=2))
    assert differ(step, grpo)


def test_cispo_at_ratio_one_and_beyond_its_bounds(world: World, grpo: Tensor) -> None:
    """On its own texts CISPO takes the plain step; elsewhere its weight is bounded, and no token's gradient is cut off.

    grad = -clip(ratio, 1 - low, 1 + high) A grad log p
    """
    assert same(Chosen(world, [FINAL], name="cispo", normalise=None).step(siblings=2), grpo)

    chosen = Chosen(world, [FINAL], sampler=World(seed=1), name="cispo", scale="none", clip_low=0.4, clip_high=0.3)
    batch = chosen.batch()
    batch = replace(batch, advantages=torch.where(batch.mask, torch.randn(batch.mask.shape).double(), 0.0))
    logprobs = world.logprobs().detach().requires_grad_()
    output = chosen.loss(logprobs, batch)
    (gradient,) = torch.autograd.grad(output.loss, logprobs)
    clipped = Chosen(world, [FINAL], name="grpo", scale="none", clip_low=0.4, clip_high=0.3)
    (cut,) = torch.autograd.grad(clipped.loss(logprobs, batch).loss, logprobs)
    bounded = 0
    for row, t in batch.mask.nonzero().tolist():
        ratio = math.exp(float(logprobs[row, t].detach() - batch.old_logprobs[row, t]))
        weight = min(max(ratio, 0.6), 1.3)
        bounded += weight != ratio
        assert float(gradient[row, t]) == pytest.approx(-weight * float(batch.advantages[row, t]) / 31, abs=1e-12)
    assert (gradient[batch.mask] != 0).all()
    assert (cut[batch.mask] == 0).any(), "the clipped loss cuts tokens off"
    assert output.metrics["clipped"] == pytest.approx(bounded / int(batch.mask.sum()))


@pytest.mark.parametrize("name", ["a2c", "ppo", "vtrace", "decoupled_ppo"])
def test_any_critic_is_unbiased_at_lambda_one(world: World, plain: Tensor, name: str) -> None:
    """With lambda 1 the critic is a baseline of the prefix, whatever it says; each source has a value and a discount.

    A_t = sum_k w_k (G_k[t] - V_k[t]):  E[ sum_t grad log p(x_t) A_t ] = E[ sum_t grad log p(x_t) G[t] ]
    """
    scale = {} if name in ("a2c", "vtrace") else {"scale": "none"}
    values = any_values(world, 2)
    assert same(Chosen(world, BOTH, name=name, lam=1.0, values=values, **scale).step(), plain)
    assert angle_differs(Chosen(world, BOTH, name=name, lam=0.5, values=values, **scale).step(), plain)
    for lam in (0.0, 0.5):
        true = [true_values(world, [one])[0] for one in BOTH]
        assert same(Chosen(world, BOTH, name=name, lam=lam, values=true, **scale).step(), plain)
    swapped = [true_values(world, [one])[0] for one in reversed(BOTH)]
    assert angle_differs(Chosen(world, BOTH, name=name, lam=0.0, values=swapped, **scale).step(), plain)
    heavy = [WORDS.but(weight=3.0), FINAL]
    weighed = Chosen(world, heavy, name=name, lam=1.0, values=values, **scale)
    assert same(weighed.step(), world.expected_step(heavy))
    if scale:
        whitened = Chosen(world, BOTH, name=name, lam=1.0, values=values).step(apart=True)
        assert angle_differs(whitened, plain), "whitened, batch by batch"


def test_one_critic_for_two_discounts_is_caught(world: World) -> None:
    """Each source's error uses its own discount: with one for all, even the true values are none.

    delta_k[t] = r_k[t] + g_k V_k[t+1] - V_k[t]
    """
    true = [true_values(world, [one])[0] for one in BOTH]
    chosen = Chosen(world, BOTH, name="a2c", lam=0.0, values=true)

    def one_for_all(batch: Batch) -> Batch:
        batch = chosen.annotate(batch)
        return chosen.algorithm.credit(replace(batch, sources=[replace(s, discount=1.0) for s in batch.sources]))

    assert angle_differs(chosen.step(credit=one_for_all), world.expected_step(BOTH))


def test_a_cut_off_text_goes_on_with_its_value(world: World) -> None:
    """Of a text that was cut off more is expected: its value after the end counts as if it had been paid there.

    grad E[ sum_t r_t + V(x) [x was cut off] ];  a final score was paid in full: nothing more is expected of it
    """
    words, values = WORDS.but(discount=1.0), any_values(world, 1, ends=True)
    total = []
    for text, rollout in zip(world.texts, world.rollouts([words]), strict=True):
        beyond = values[0][tuple(text)] if rollout.stop == "length" else 0.0
        total.append(rollout.total() + beyond)
    assert same(Chosen(world, [words], name="a2c", lam=1.0, values=values).step(), world.gradient(total))
    without = Chosen(world, [words], name="a2c", lam=1.0, values=values, critic={"bootstrap": False})
    assert same(without.step(), world.expected_step([words]))
    final = Chosen(world, [FINAL], name="a2c", lam=1.0, values=values)
    assert same(final.step(), world.expected_step([FINAL]))

    def everyone(batch: Batch) -> Batch:
        """Wrong on purpose: finished texts go on as well."""
        chosen = Chosen(world, [words], name="a2c", lam=1.0, values=values)
        batch = chosen.annotate(replace(batch, cut_off=torch.ones_like(batch.cut_off)))
        return chosen.algorithm.credit(batch)

    assert angle_differs(without.step(credit=everyone), world.gradient(total))


def test_the_critic_has_a_lambda_of_its_own(world: World) -> None:
    """The critic's targets have its own lambda, the advantages the policy's, whatever the other is.

    targets = V + A at the critic's lambda;  advantages = A at the policy's
    """
    values = any_values(world, 1)
    batch = Chosen(world, [FINAL], name="a2c", lam=0.3, values=values, critic={"lam": 0.8}).batch()
    for lam, found in ((0.3, batch.advantages), (0.8, batch.targets[:, 0] - batch.values[:, 0])):
        wanted, _ = credit.gae(batch.rewards[:, 0], batch.values[:, 0], batch.mask, 1.0, lam)
        assert same(torch.where(batch.mask, found, 0.0), wanted)
    monte_carlo = Chosen(world, [FINAL], name="value", normalise=None, values=values).batch()
    assert same(monte_carlo.targets[:, 0], credit.reward_to_go(batch.rewards[:, 0], batch.mask))


def test_a_lambda_for_each_length(world: World) -> None:
    """Longer texts have a longer memory: the policy's lambda is one number a text.

    lambda = 1 - 1 / (alpha length), at least 0       (Yue et al., 2025)
    """
    values = any_values(world, 1)
    batch = Chosen(world, [FINAL], name="ppo", scale="none", lam_length=0.5, values=values).batch()
    for row, text in enumerate(world.texts):
        lam = max(0.0, 1.0 - 1.0 / (0.5 * len(text)))
        one = slice(row, row + 1)
        wanted, _ = credit.gae(batch.rewards[one, 0], batch.values[one, 0], batch.mask[one], 1.0, lam)
        assert same(batch.advantages[one], wanted)
    found = credit.length_lambda(torch.tensor([[0, 1, 1, 0, 1], [0, 0, 0, 0, 0], [1, 1, 1, 1, 1]]), 0.5)
    assert found.tolist() == pytest.approx([1 - 2 / 3, 0.0, 1 - 2 / 5])


def test_decoupled_is_exact_where_the_weights_are(world: World) -> None:
    """Decoupled, the ratio is to the policy as the step began, which is 1; the weights make up for the sampler.

    E_q[ w sum_t grad (p / p_begin)(x_t) A_t ] = E_q[ w sum_t A_t grad log p(x_t) ],  w = p/q(x): the exact gradient
    """
    options: dict[str, Any] = {"name": "decoupled_ppo", "scale": "none", "lam": 1.0, "values": any_values(world, 2)}
    weights = {"level": "sequence", "most": None}
    step = Chosen(world, BOTH, sampler=World(seed=1), importance=weights, **options).step()
    assert same(step, world.expected_step(BOTH))
    assert angle_differs(Chosen(world, BOTH, sampler=World(seed=1), **options).step(), step), "the weights left out"
    token = {"level": "token", "most": None}
    assert angle_differs(Chosen(world, BOTH, sampler=World(seed=1), importance=token, **options).step(), step)
