"""Item 12: distillation on the policy's own texts: sampled, with the KL as a baseline, over the whole vocabulary."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

import instant_reward as ir
from exact.chosen import Chosen, expected_over_prefixes, gradient_of, log_table
from exact.world import World, angle_differs, chance, differ, same
from instant_reward.batch import Batch
from instant_reward.types import LossOutput

torch.set_num_threads(1)
FINAL = ir.reward(every="end", name="final")(lambda view: chance(view.text))


@pytest.fixture(scope="module")
def world() -> World:
    return World()


@pytest.fixture(scope="module")
def teacher() -> World:
    return World(seed=1)


def taught(world: World, teacher: World, rewards: Any = (), **options: Any) -> Chosen:
    """The preset; ``options`` are the teacher's. Its name is never looked up here."""
    return Chosen(world, rewards, name="distill", taught_by=teacher, teacher={"model": "a teacher", **options})


def kl_of_prefixes(world: World, teacher: World) -> Tensor:
    """``sum_a p(a | prefix) log(p / teacher)(a | prefix)``, ``[prefixes]``, with gradient into the student."""
    ours, theirs = log_table(world), log_table(teacher).detach()
    return (ours.exp() * (ours - theirs)).sum(1)


def each_prefix(world: World, teacher: World) -> Tensor:
    """Less the gradient of the KL at each prefix, the prefixes held fixed."""
    return -gradient_of(world, expected_over_prefixes(world, kl_of_prefixes(world, teacher)))


def whole_text(world: World, teacher: World) -> Tensor:
    """Less the gradient of the KL between the two distributions over whole texts."""
    ours, theirs = (torch.where(w.mask, w.logprobs(), 0.0).sum(1) for w in (world, teacher))
    return -gradient_of(world, (world.probabilities() * (ours - theirs.detach())).sum())


def test_discount_zero_is_the_kl_at_each_prefix(world: World, teacher: World) -> None:
    """Each token paid its own log-ratio alone: the gradient of the KL at each sampled prefix, the prefixes held fixed.

    E[ sum_t grad log p(x_t) log(T / p)(x_t | x_<t) ] = -E[ sum_t grad KL(p, T | x_<t) ]
    """
    step = taught(world, teacher).step()
    assert same(step, each_prefix(world, teacher))
    assert angle_differs(step, whole_text(world, teacher))

    def late(batch: Batch) -> Batch:
        """Wrong on purpose: the teacher's log-probability of the token before."""
        chosen = taught(world, teacher)
        batch = chosen.annotate(batch)
        return chosen.algorithm.credit(replace(batch, teacher_logprobs=batch.teacher_logprobs.roll(1, dims=1)))

    assert angle_differs(taught(world, teacher).step(credit=late), step)


def test_discount_one_is_the_kl_of_the_whole_text(world: World, teacher: World) -> None:
    """With discount 1 a token also answers for the prefixes that it leads to: the gradient of the whole text's KL.

    E[ sum_t grad log p(x_t) sum_{s >= t} log(T / p)(x_s) ] = -grad sum_x p(x) log(p / T)(x)
    """
    assert same(taught(world, teacher, discount=1.0).step(), whole_text(world, teacher))
    assert angle_differs(taught(world, teacher, discount=1.0).step(), each_prefix(world, teacher))


def test_the_kl_as_a_baseline_leaves_the_expectation_alone(world: World, teacher: World) -> None:
    """Less its mean at the prefix, a log-ratio has the same step on average: the mean depends on the prefix alone.

    E[ grad log p(x_t) (log(T / p)(x_t) + KL(p, T | x_<t)) ] = E[ grad log p(x_t) log(T / p)(x_t) ]
    """
    plain, with_baseline = taught(world, teacher), taught(world, teacher, baseline=True)
    assert same(with_baseline.step(), plain.step())

    # It is the mean: at each prefix the advantages are 0 on average, so the noise is less.
    batch, weights = with_baseline.batch(), world.probabilities().detach()
    assert same((weights[:, None] * batch.advantages).sum(0), torch.zeros(batch.mask.shape[1]).double())
    noise = [float((weights[:, None] * one.batch().advantages ** 2).sum()) for one in (plain, with_baseline)]
    assert noise[1] < noise[0]

    def at_discount_one(batch: Batch) -> Batch:
        """Wrong on purpose: with a discount of 1 what is taken away from later tokens is no baseline of this one."""
        credited = with_baseline.credit(batch)
        to_go = ir.credit.reward_to_go(credited.advantages, credited.mask, 1.0)
        return replace(credited, advantages=to_go)

    assert angle_differs(with_baseline.step(credit=at_discount_one), whole_text(world, teacher))
    with pytest.raises(ValueError, match="baseline needs discount 0"):
        taught(world, teacher, baseline=True, discount=1.0)


def one_token(chosen: Chosen) -> Any:
    """The loss with its sum over tokens undivided, so that the length of a text plays no part."""

    def loss(logprobs: Tensor, part: Batch) -> LossOutput:
        return chosen.loss(logprobs, replace(part, token_count=1))

    return loss


def test_the_whole_vocabulary_is_the_expectation_of_the_sampled_loss(world: World, teacher: World) -> None:
    """The KL over the whole vocabulary in the loss takes the step that sampled log-ratios take on average.

    grad KL(p, T | x_<t) = E[ grad log p(x_t) log(p / T)(x_t) | x_<t ]
    """
    whole = taught(world, teacher, whole=True)
    assert same(whole.step(loss=one_token(whole)), each_prefix(world, teacher))
    assert same(whole.step(loss=one_token(whole)), taught(world, teacher).step())
    halved = taught(world, teacher, whole=True, weight=0.5)
    assert same(halved.step(loss=one_token(halved)), 0.5 * each_prefix(world, teacher))

    def backwards(logprobs: Tensor, part: Batch) -> LossOutput:
        """Wrong on purpose: the KL the other way round, from the teacher."""
        del logprobs
        ours, theirs = log_table(world), log_table(teacher).detach()
        rows = [world.row_of[tuple(part.token_ids[0, 2:t].tolist())] for t in part.mask[0].nonzero().flatten()]
        return LossOutput((theirs.exp() * (theirs - ours)).sum(1)[rows].sum())

    assert angle_differs(whole.step(loss=backwards), each_prefix(world, teacher))

    def as_loss(logprobs: Tensor, part: Batch) -> LossOutput:
        """Wrong on purpose: the sampled log-ratio itself as a loss, which has no gradient on average."""
        credited = taught(world, teacher).annotate(part)
        return LossOutput(torch.where(part.mask, logprobs - credited.teacher_logprobs, 0.0).sum())

    step = whole.step(loss=as_loss)
    assert same(step, torch.zeros_like(step))


@pytest.mark.parametrize("options", [{}, {"discount": 1.0}, {"baseline": True}, {"whole": True}])
def test_a_student_equal_to_its_teacher_learns_nothing(world: World, options: dict[str, Any]) -> None:
    """A student that is its teacher gets no gradient at all, text by text and not only on average.

    p = T:  log(T / p) = 0,  grad KL(p, T) = 0
    """
    chosen = taught(world, World(), **options)
    zero = torch.zeros_like(world.logits)
    assert same(chosen.step(), zero)
    batch = chosen.batch()
    for row in range(len(batch)):
        part = replace(batch.select([row]), text_count=1)
        logprobs = world.logprobs()[row : row + 1, : part.mask.shape[1]]
        assert same(gradient_of(world, chosen.loss(logprobs, part).loss), zero)
    assert differ(taught(world, World(seed=2), **options).step(), zero)


def test_a_teacher_beside_a_reward(world: World, teacher: World) -> None:
    """Beside a reward the teacher is one more source, with a weight and a discount of its own: the steps add up."""
    both = taught(world, teacher, [FINAL], weight=0.3).step()
    assert same(both, world.expected_step([FINAL]) + 0.3 * each_prefix(world, teacher))
    assert differ(both, world.expected_step([FINAL]) + 0.3 * whole_text(world, teacher))
    leave_one_out = Chosen(
        world, [FINAL], name="rloo", taught_by=teacher, teacher={"model": "a teacher", "weight": 0.3}
    ).step(siblings=2)
    assert same(leave_one_out, both)
