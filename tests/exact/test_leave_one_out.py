"""Baselines from siblings: groups of two, every pair enumerated, and groups whose texts are equals."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

import instant_reward as ir
from exact.world import LONGEST, REINFORCE, World, angle_differs, chance, differ, same
from instant_reward import algorithms, credit
from instant_reward.batch import Batch, collate
from instant_reward.config import AlgorithmConfig
from instant_reward.crediting import credit_batch
from instant_reward.presets import PRESETS, Preset
from instant_reward.rewards.scope import rate_groups
from instant_reward.types import Carried, Rollout, UserError

torch.set_num_threads(1)
RLOO = partial(credit_batch, preset=PRESETS["rloo"])
FINAL = ir.reward(every="end", name="final")(lambda view: chance(view.text))
WORDS = ir.reward(every="word", name="words", discount=0.6)(lambda view: chance(f"{view.text} word"))


@pytest.fixture(scope="module")
def world() -> World:
    return World()


@pytest.mark.parametrize("rewards", [[FINAL], [WORDS], [FINAL, WORDS]], ids=["final", "words", "both"])
def test_leave_one_out_is_unbiased(world: World, rewards: list[ir.Reward]) -> None:
    """The siblings' mean as a baseline changes no step on average: for a final reward, and at each position.

    E[ sum_t grad log p(x_t | x_<t) (G[t] - G'[t]) ] = E[ sum_t grad log p(x_t | x_<t) G[t] ]

    G' is the other text's return at the same position, 0 once it has finished.
    """
    plain = world.expected_step(rewards)
    assert same(world.expected_step(rewards, RLOO, siblings=2), plain)

    def itself(batch: Batch) -> Batch:
        """Wrong on purpose: the text's own return is a part of its baseline."""
        batch = REINFORCE(batch)
        others = credit.leave_one_out(batch.returns, batch.mask, batch.group)
        return replace(batch, advantages=batch.returns - (batch.returns + others) / 2)

    assert differ(world.expected_step(rewards, itself, siblings=2), plain)


def test_the_mean_with_itself_is_a_shorter_step(world: World) -> None:
    """The group's mean, the text itself included, shortens the step by (n - 1) / n and turns it nowhere.

    G - (G + G') / 2 = (G - G') / 2
    """
    preset = Preset("to_go", "group_mean", "none", "policy_gradient", "text")
    step = world.expected_step([FINAL, WORDS], partial(credit_batch, preset=preset), siblings=2)
    assert same(step, world.expected_step([FINAL, WORDS]) / 2)


def test_dividing_by_the_groups_deviation_turns_the_step(world: World) -> None:
    """Dividing by the group's deviation changes the direction, not only the length: groups weigh unlike.

    E[ sum_t grad log p(x_t) (R - mean) / deviation ] is no multiple of grad E[ R ]; without the division it is.
    """
    exact = world.gradient([chance(rollout.text) for rollout in world.rollouts([])])
    divided = replace(PRESETS["grpo"], normalise="text")
    kept = replace(divided, scale="none")
    assert same(world.expected_step([FINAL], partial(credit_batch, preset=kept), siblings=2), exact / 2)
    step = world.expected_step([FINAL], partial(credit_batch, preset=divided), siblings=2)
    assert angle_differs(step, exact)


def test_summing_over_the_text_is_unbiased(world: World) -> None:
    """Rewards summed over the whole text are still exact, undiscounted: only their timing, that is variance, is lost.

    E[ sum_t grad log p(x_t) sum_s r_s ] = E[ sum_t grad log p(x_t) sum_{s >= t} r_s ]
    """
    words = WORDS.but(discount=1.0)
    whole = Preset("whole", "leave_one_out", "none", "policy_gradient", "text")
    step = world.expected_step([words], partial(credit_batch, preset=whole), siblings=2)
    assert same(step, world.expected_step([words]))
    assert differ(step, world.expected_step([WORDS])), "the discount is lost with the timing"


UNLIKE = ir.reward(scope="group", name="unlike")(
    lambda views: [
        chance(f"{one.text} beside {' '.join(other.text for other in views if other is not one)}") for one in views
    ]
)


@pytest.fixture(scope="module")
def pairs(world: World) -> list[Rollout]:
    """Every pair of texts as a group, scored together by a reward that compares them."""
    rollouts, texts = world.rollouts([]), range(len(world.texts))
    both = [(one, other) for one in texts for other in texts]
    rows = [replace(rollouts[text], group=group, marks=[]) for group, pair in enumerate(both) for text in pair]
    rate_groups([UNLIKE], rows)
    return rows


def compared(world: World, pairs: list[Rollout], **options: Any) -> Tensor:
    """The expected step: each group by its probability, averaged over its two texts."""
    algorithm = algorithms.build(AlgorithmConfig(**options), [UNLIKE], LONGEST)
    batch = replace(collate(pairs, algorithm.sources, dtype=torch.float64), carried=Carried(3, mean_return=0.4))
    if algorithm.needs.critic is not None:  # its value of a prefix: any function of the tokens before
        batch = replace(batch, values=(batch.token_ids.cumsum(1).roll(1, dims=1) * 0.37).sin()[:, None].double())
    advantages = algorithm.credit(batch).advantages
    texts = torch.arange(len(world.texts))
    texts = torch.stack(torch.meshgrid(texts, texts, indexing="ij"), -1).flatten()  # of each row of the batch
    chances = world.probabilities().detach()[texts].view(-1, 2).prod(1).repeat_interleave(2)
    per_text = torch.where(batch.mask, advantages * world.logprobs()[texts], 0.0).sum(1)
    (gradient,) = torch.autograd.grad((chances / 2 * per_text).sum(), world.logits)
    return gradient


def test_siblings_are_a_biased_baseline_of_a_reward_that_compares_them(world: World, pairs: list[Rollout]) -> None:
    """A sibling's reward hangs on this text where rewards compare siblings: as a baseline it turns the step.

    E[ grad log p(x) r(x; x') ] is exact, the sibling held fixed;  E[ grad log p(x) r(x'; x) ] != 0

    The mean of earlier steps and the critic's value of the prefix know nothing of this text, and stay unbiased.
    """
    texts = [rollout.text for rollout in world.rollouts([])]
    table = torch.tensor([[chance(f"{one} beside {other}") for other in texts] for one in texts], dtype=torch.float64)
    chances = world.probabilities()
    (exact,) = torch.autograd.grad(chances @ table @ chances.detach(), world.logits)
    assert same(compared(world, pairs, name="reinforce"), exact)
    assert same(compared(world, pairs, name="reinforce", baseline="running_mean"), exact)
    assert same(compared(world, pairs, name="reinforce", baseline="value"), exact)
    assert angle_differs(compared(world, pairs, name="rloo", biased_baseline="allow"), exact)
    whole = compared(world, pairs, name="dr_grpo", baseline="leave_one_out", biased_baseline="allow")
    assert angle_differs(whole, exact)
    chances = world.probabilities()
    (pull,) = torch.autograd.grad(chances.detach() @ table @ chances, world.logits)
    assert same(whole, exact - pull), "the sibling's reward pulls the other way"


def test_such_a_baseline_is_refused() -> None:
    """Whoever compares siblings' returns refuses rewards that compare siblings, unless the bias is allowed by name."""
    refused = {"rloo", "grpo", "dr_grpo", "dapo", "gspo", "cispo", "instant", "rwr"}
    for name in set(PRESETS) - {"distill"}:
        if name not in refused:
            algorithms.build(AlgorithmConfig(name=name), [UNLIKE], LONGEST)
            continue
        with pytest.raises(UserError, match=r"'unlike' compares siblings.*algorithm\.biased_baseline=allow"):
            algorithms.build(AlgorithmConfig(name=name), [FINAL, UNLIKE], LONGEST)
        algorithms.build(AlgorithmConfig(name=name, biased_baseline="allow"), [UNLIKE], LONGEST)
        algorithms.build(AlgorithmConfig(name=name, baseline="running_mean"), [UNLIKE], LONGEST)
        algorithms.build(AlgorithmConfig(name=name), [FINAL, UNLIKE.but(train=False)], LONGEST)
    for baseline in ("leave_one_out", "group_mean"):
        with pytest.raises(UserError, match=rf"'unlike' compares siblings.*\({baseline}\)"):
            algorithms.build(AlgorithmConfig(name="reinforce", baseline=baseline), [UNLIKE], LONGEST)


def reference_leave_one_out(returns: list[list[float]], groups: list[int]) -> list[list[float]]:
    """Row by row, over sampled tokens only."""
    result = []
    for row, own in enumerate(returns):
        siblings = [other for o, other in enumerate(returns) if groups[o] == groups[row] and o != row]
        result.append(
            [sum(s[t] if t < len(s) else 0.0 for s in siblings) / max(1, len(siblings)) for t in range(len(own))]
        )
    return result


@pytest.mark.parametrize("seed", range(5))
def test_leave_one_out_against_a_plain_loop(seed: int) -> None:
    """Groups of any size and order, prompts of any length, gaps and padding: equal to a loop over Python lists."""
    generator = torch.Generator().manual_seed(seed)
    mask = torch.rand(9, 7, generator=generator) < 0.6
    returns = torch.randn(9, 7, generator=generator, dtype=torch.float64)
    group = torch.randint(-2, 3, (9,), generator=generator)
    found = credit.leave_one_out(returns, mask, group)
    listed = [returns[row][mask[row]].tolist() for row in range(9)]
    for row, wanted in enumerate(reference_leave_one_out(listed, group.tolist())):
        assert found[row][mask[row]].tolist() == pytest.approx(wanted, abs=1e-12)
    assert not found[~mask].any()
    assert same(credit.leave_one_out(returns, mask.int(), group), found), "a mask of numbers"


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("scale", ["none", "group", "batch"])
@pytest.mark.parametrize("baseline", ["leave_one_out", "group_mean"])
@pytest.mark.parametrize("returns", ["to_go", "whole"])
def test_equals_get_zeros(returns: str, baseline: str, scale: str, dtype: torch.dtype) -> None:
    """Groups of equals give zeros, never NaN and never rounding blown up, whatever the scale.

    G - G' = 0 exactly, and 0 / (deviation of nothing) = 0.
    """
    preset = Preset(returns, baseline, scale, "policy_gradient", "text")  # type: ignore[arg-type]
    group = torch.arange(6).repeat_interleave(7)
    # 0.1, 0.3, ...: numbers whose sums round, each group another one.
    value = (torch.arange(6, dtype=dtype) * 0.2 + 0.1).repeat_interleave(7)
    batch = _final_batch(value, group, dtype)
    advantages = credit_batch(batch, preset).advantages
    assert advantages is not None
    assert torch.equal(advantages, torch.zeros_like(advantages))


def test_scaling_by_the_batchs_deviation() -> None:
    """Advantages over their deviation over all sampled tokens; the mean stays, unless it is asked to go.

    A / deviation;  with shift (A - mean) / deviation;  a constant stays, or becomes 0 with shift: never NaN
    """
    mask = torch.tensor([[0, 1, 1], [0, 1, 0]])
    advantages = torch.tensor([[9.0, 1.0, 3.0], [9.0, 8.0, 9.0]], dtype=torch.float64)
    deviation = (((1 - 4) ** 2 + (3 - 4) ** 2 + (8 - 4) ** 2) / 3) ** 0.5
    wanted = torch.tensor([[0.0, 1.0, 3.0], [0.0, 8.0, 0.0]], dtype=torch.float64) / deviation
    assert same(credit.scale_by_deviation(advantages, mask), wanted)
    shifted = torch.tensor([[0.0, -3.0, -1.0], [0.0, 4.0, 0.0]], dtype=torch.float64) / deviation
    assert same(credit.scale_by_deviation(advantages, mask, shift=True), shifted)

    for dtype in (torch.float32, torch.float64):
        constant = torch.full((4, 5), 0.1, dtype=dtype)
        everywhere = torch.ones(4, 5)
        assert credit.scale_by_deviation(constant, everywhere).equal(constant)
        assert credit.scale_by_deviation(constant, everywhere, shift=True).abs().max() < 1e-6
        nowhere = credit.scale_by_deviation(constant, torch.zeros(4, 5))
        assert bool(torch.isfinite(nowhere).all())


def test_one_without_siblings_has_no_baseline() -> None:
    """A text without siblings gets 0 for a baseline, and no NaN for a deviation."""
    value, group = torch.tensor([0.5, 0.1, 0.2]), torch.tensor([7, 3, 3])
    batch = _final_batch(value, group, torch.float32)
    assert credit_batch(batch, PRESETS["rloo"]).advantages[0, -1] == 0.5
    grpo = credit_batch(batch, PRESETS["grpo"]).advantages
    assert grpo[0, -1] == 0.0
    assert bool(torch.isfinite(grpo).all())
    assert credit.group_deviation(value, group)[0] == 0.0
    assert float(credit.group_deviation(value, group)[1]) == pytest.approx(0.1 / 2**0.5)


def _final_batch(value: Tensor, group: Tensor, dtype: torch.dtype) -> Batch:
    """Texts of four tokens, one of them the prompt, each paid its value at the end."""
    rows = len(value)
    end = torch.full((rows,), 4)
    mask = torch.ones(rows, 4, dtype=torch.bool)
    mask[:, 0] = False
    return Batch(
        token_ids=torch.zeros(rows, 4, dtype=torch.long),
        mask=mask,
        versions=torch.zeros(rows, 4, dtype=torch.long),
        old_logprobs=torch.zeros(rows, 4, dtype=dtype),
        no_end=torch.zeros(rows, 4, dtype=torch.bool),
        length=end,
        prompt_length=torch.ones(rows, dtype=torch.long),
        group=group,
        cut_off=torch.zeros(rows, dtype=torch.bool),
        sources=[credit.Source("final")],
        marks=credit.Marks(
            torch.arange(rows), torch.zeros(rows).long(), torch.ones(rows).long(), end, end, value.to(dtype)
        ),
        temperature=1.0,
        text_count=rows,
        token_count=3 * rows,
    )
