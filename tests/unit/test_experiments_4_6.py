"""Experiments 4 to 6: each runs in seconds, and what each rests on holds."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import instant_reward as ir
from instant_reward import algorithms
from instant_reward.types import Needs

FOLDER = Path(__file__).parents[2] / "experiments"


@pytest.fixture(autouse=True)
def _the_folder(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """As when a file of the folder is run, with the names that only it knows forgotten again."""
    monkeypatch.syspath_prepend(str(FOLDER))
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)
    for path in FOLDER.glob("*.py"):
        sys.modules.pop(path.stem, None)


def load(name: str) -> Any:
    return importlib.import_module(name)


def a_policy(seeds: list[int], length: int = 4, size: int = 8) -> Any:
    gru = load("gru")
    task = gru.Task(size, length, torch.zeros(1, 1).long(), lambda texts: texts.tokens[:, 0].float())
    return gru.Policy(task, seeds, 0.05, hidden=6, dtype=torch.float64)


def test_the_check_of_lag_0_notices_texts_that_are_one_update_too_old(monkeypatch: pytest.MonkeyPatch) -> None:
    staleness = load("staleness")
    task = load("gru").Task(8, 3, torch.arange(8)[:, None], lambda texts: staleness.chain(texts).sum(1))
    staleness.check_lag_0(task, 2)

    def late(policy: Any, arm: Any, course: Any) -> Any:
        return load("lab").learn(policy, arm, replace(course, lag=course.lag + 1))

    monkeypatch.setattr(staleness, "learn", late)
    with pytest.raises(AssertionError, match="lag 0"):
        staleness.check_lag_0(task, 2)


def test_on_fresh_texts_all_ways_to_deal_with_age_take_the_same_first_step() -> None:
    """At ratio 1 no weight and no bound does anything (to rounding: sampler and learner sum in another order)."""
    staleness, lab = load("staleness"), load("lab")
    moved = {}
    for arm in staleness.arms():
        policy = a_policy([1, 2])
        algorithm = algorithms.build(lab.settings(policy.task, arm.algorithm).algorithm, arm.rewards, 4)
        policy.prepare(algorithm.needs)
        batch, _ = policy.sample(algorithm.sources, arm.rewards, 1, 6)
        batch = algorithm.credit(policy.annotate(batch))
        policy.backward(algorithm.loss(policy(batch), batch).loss)
        moved[arm.name] = policy.weights["hidden"].grad
    assert float(moved["uncorrected"].abs().max()) > 1e-4
    for name, gradient in moved.items():
        assert torch.allclose(gradient, moved["uncorrected"], atol=1e-12), name


def test_the_verdict_and_a_kl_to_the_start_sum_to_the_log_ratio_to_the_teacher() -> None:
    """``log p_teacher - log p_start + sum of (log p_start - log p)``: the same return as of the dense log-ratios."""
    distilling, lab = load("distilling"), load("lab")
    policy, teacher = a_policy([1, 2]), a_policy([3, 4])
    policy.teacher = teacher.snapshot()
    measure = distilling.ruler(policy, policy.teacher)
    verdict = distilling.verdict(measure, 2)
    dense = algorithms.build(
        lab.settings(policy.task, distilling.DENSE["log-ratio, to go"]).algorithm, [], policy.task.length
    )
    sparse = algorithms.build(
        lab.settings(policy.task, {"name": "rloo", "kl": 1.0}).algorithm, [verdict], policy.task.length
    )
    policy.prepare(sparse.needs)
    policy.weights["bias"].data += torch.randn(2, 1, 8, dtype=torch.float64)  # it has learned something since
    batch, _ = policy.sample(sparse.sources, [verdict], 1, 5)
    paid = sparse.credit(policy.annotate(batch)).returns
    policy.needs = dense.needs
    batch.sources, batch.marks = dense.sources, policy.sample([], [], 1, 5)[0].marks
    owed = dense.credit(policy.annotate(batch)).returns
    first = batch.mask & (batch.mask.long().cumsum(1) == 1)
    assert torch.allclose(paid[first], owed[first], atol=1e-6)
    assert float((paid - owed).abs().max()) > 0.01, "what comes later in a text is paid at other places"


def test_the_ruler_measures_the_kl_by_enumeration_and_follows_the_policy() -> None:
    distilling = load("distilling")
    policy = a_policy([1], length=1)
    measure = distilling.ruler(policy, policy.snapshot())
    batch, _ = policy.sample([], [], 1, 3)
    assert torch.allclose(distilling.gap(measure(batch)), torch.zeros(3).double(), atol=1e-12)
    policy.weights["bias"].data[0, 0] = torch.linspace(-1, 1, 8)
    every = batch.select([0] * 8)
    every.token_ids[:, 1] = torch.arange(8)
    found = measure(every)
    ours = policy(every).logprobs[:, 1].detach()
    assert policy.needs == Needs(), "measuring leaves the policy as it was"
    expected = (ours.exp() * (ours - found.teacher_logprobs[:, 1])).sum()
    assert float(expected) > 0.1
    assert torch.allclose(distilling.gap(found), expected.expand(8))


def test_a_rate_is_picked_by_the_tuning_seeds_alone() -> None:
    distilling = load("distilling")
    seeds, rates = distilling.crowd(2, [0.1, 0.2])
    assert seeds == [1000, 1001, 1002, 0, 1] * 2
    assert rates == [0.1] * 5 + [0.2] * 5
    measured = torch.tensor([[0.0]] * 3 + [[9.0]] * 2 + [[1.0]] * 3 + [[2.0], [3.0]])
    best, found = distilling.picked(measured, [0.1, 0.2])
    assert (best, found.tolist()) == (1, [[2.0], [3.0]])
    assert distilling.picked(measured, [0.1, 0.2], -measured)[0] == 0


def test_gold_counts_a_pair_once_and_a_classifier_of_many_labels_finds_the_rule() -> None:
    over = load("overoptimisation")
    good = int((over.GOLD == 1).nonzero()[0])
    first, second = good // over.SIZE, good % over.SIZE
    once = torch.tensor([[first, second]])
    assert float(over.gold(once)) == 1.0
    if first != second:
        again = over.gold(torch.tensor([[first, second, first, second]]))
        back = over.GOLD[second * over.SIZE + first]
        assert float(again) == pytest.approx(float(1 + back) / 3)
    few, many = (float(torch.corrcoef(torch.stack([over.models(n, 0)[0], over.GOLD]))[0, 1]) for n in (200, 10000))
    assert few < 0.8 < 0.95 < many


def test_guards_stop_where_they_say() -> None:
    over = load("overoptimisation")
    gold = torch.cat([torch.linspace(0, 0.5, 30), torch.linspace(0.5, 0.1, 30)]).expand(2, -1)
    kl = torch.linspace(0, 12, 60).expand(2, -1)
    held = torch.cat([torch.linspace(0, 1, 25), torch.linspace(0.99, 0, 35)]).expand(2, -1)
    curves = {"gold": gold, "kl": kl, "held": held}
    rows = {row["arm"]: row for row in over.guarded(dict.fromkeys(over.ARMS, (0.01, curves)))}
    assert rows["the peak"]["ratio to the peak"] == 1.0
    assert rows["no guard"]["ratio to the peak"] == pytest.approx(0.2)
    assert rows["stop at a KL of 5"]["KL"] == pytest.approx(5.0, abs=0.21)
    assert rows["stop at a KL of 5"]["KL"] >= 5.0
    assert rows["early stop, other half"]["update"] == 24 + over.WINDOW - 1
    assert rows["ensemble minimum"]["update"] == 59 + over.WINDOW - 1


def test_an_ensemble_pays_the_least_of_its_members() -> None:
    over = load("overoptimisation")
    weights = torch.randn(2, 3, over.SIZE**2, generator=torch.Generator().manual_seed(0))
    tokens = torch.randint(over.SIZE, (8, over.LENGTH), generator=torch.Generator().manual_seed(1))
    counts = over.pairs(tokens)
    for row in range(8):
        each = [float(counts[row] @ weights[row // 4, member]) for member in range(3)]
        assert float(over.verdicts(tokens, weights)[row]) == pytest.approx(min(each), abs=1e-5)
    assert isinstance(ir.reward(every="end", name="proxy")(lambda texts: texts), ir.Reward)
