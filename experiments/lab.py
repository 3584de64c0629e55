"""What the experiments share: arms, the loop that trains them, and how their learning rates are tuned.

Nothing of the library is written anew here: credit and loss are those of ``algorithms.build``, and the optimizer steps
those of ``instant_reward.train.update``. The policy is in ``gru.py``, statistics, tables and plots in ``report.py``.

A new experiment: a ``Task``, a list of ``Arm``, ``race(...)``, and ``report.publish(...)``. See ``timing.py``.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import report
import torch
from gru import Policy, Task
from torch import Tensor

from instant_reward import algorithms
from instant_reward.batch import Batch
from instant_reward.config import Config
from instant_reward.rewards.base import Reward
from instant_reward.train import update
from instant_reward.types import Carried

RATES = (0.003, 0.01, 0.03, 0.1)  # what every arm's learning rate is chosen from
TUNING_SEEDS = range(1000, 1003)  # never those of the results


@dataclass(frozen=True)
class Arm:
    """One way to learn a task: options of ``AlgorithmConfig`` and rewards.

    ``rewards`` are declared by ``ir.reward(every=..., name=..., discount=...)`` around a function of all texts at once:
    ``f(Texts) -> values``, ``[B]`` for a mark of the whole text (``every="end"``), ``[B, T]`` for a mark on each token
    (``every="token"``). It may return ``(values, seen)``, where ``seen [B, T]`` counts the sampled tokens that were
    read to fix each mark; else a token's mark is known with the token.
    """

    name: str
    algorithm: Mapping[str, Any]
    rewards: Sequence[Reward]


@dataclass(frozen=True)
class Course:
    """How long and on how many texts an arm is trained.

    Attributes:
        updates: at most.
        groups, siblings: prompts per seed and update, and texts of each.
        until: stop when the recent mean score of every seed has reached this; None to go on to the end.
        crowd: stop as soon as all of so many seeds in a row have reached it; 0 for all seeds.
        lag: texts are sampled by the policy as it was so many updates ago.
    """

    updates: int = 300
    groups: int = 2
    siblings: int = 8
    until: float | None = None
    crowd: int = 0
    lag: int = 0


def settings(task: Task, options: Mapping[str, Any]) -> Config:
    """A whole config of the library for an arm: each batch goes through the policy in one part."""
    return Config.build(
        {
            "data": {"prompts": ["of the task"]},
            "algorithm": dict(options),
            "sampling": {"max_new_tokens": task.length},
            "train": {"tokens_per_part": 10**12},
        }
    )


def learn(
    policy: Policy,
    arm: Arm,
    course: Course,
    watch: Callable[[int, Batch], None] | None = None,
) -> Tensor:
    """Trains all seeds of a policy on its task, in place.

    Args:
        watch: called with the number of updates done and each credited batch, before the policy learns from it.

    Returns:
        ``[S, updates]``, each seed's mean true score: entry ``u`` is that of the policy after ``u`` updates, over the
        texts that it learns from next (with a lag: over fresh ones, which nothing learns from).
    """
    config = settings(policy.task, arm.algorithm)
    algorithm = algorithms.build(config.algorithm, arm.rewards, policy.task.length)
    policy.prepare(algorithm.needs)
    carried, scores = Carried(), []
    asked = (algorithm.sources, arm.rewards, course.groups, course.siblings)
    aside = [torch.Generator().manual_seed(seed + 10**6) for seed in policy.seeds]
    older = deque([policy.snapshot()], maxlen=course.lag + 1)
    for step in range(course.updates):
        batch, texts = policy.sample(*asked, weights=older[0], version=max(0, step - course.lag))
        judged = policy.sample(*asked, random=aside)[1] if course.lag else texts
        scores.append(policy.task.score(judged).view(len(policy.seeds), -1).mean(1))
        batch.carried = carried
        batch = algorithm.credit(policy.annotate(batch))
        if watch is not None:
            watch(step, batch)
        update(policy, algorithm, batch, config, step)
        carried = algorithm.adapt(batch, {})
        older.append(policy.snapshot())
        if course.until is not None and _reached(scores, course):
            break
    return torch.stack(scores, 1)


def _reached(scores: Sequence[Tensor], course: Course) -> bool:
    """Whether all seeds of a crowd have."""
    recent = report.updates_to(torch.stack(list(scores), 1), course.until)
    crowd = course.crowd or len(recent)
    return any(None not in recent[begin : begin + crowd] for begin in range(0, len(recent), crowd))


def tuned(task: Task, arm: Arm, course: Course, rates: Sequence[float] = RATES, **policy: Any) -> float:
    """The learning rate whose slowest tuning seed first reaches ``course.until``; where none does, the best scorer.

    All rates are tried side by side, on three seeds each that are not those of the results, for as many updates.
    """
    seeds = [seed for _ in rates for seed in TUNING_SEEDS]
    each = [rate for rate in rates for _ in TUNING_SEEDS]
    scores = learn(Policy(task, seeds, each, **policy), arm, replace(course, crowd=len(TUNING_SEEDS)))
    scores = scores.view(len(rates), len(TUNING_SEEDS), -1)

    def rank(number: int) -> tuple[bool, float]:
        reached = course.until is not None and None not in report.updates_to(scores[number], course.until)
        return reached, float(scores[number].mean())

    return rates[max(range(len(rates)), key=rank)]


@dataclass
class Result:
    """What an arm did: its learning rate, and each seed's score after each update, ``scores [S, updates]``."""

    name: str
    rate: float
    scores: Tensor
    policy: Policy = field(repr=False)


def race(
    task: Task, arms: Sequence[Arm], course: Course, seeds: int, rates: Sequence[float] = RATES, **policy: Any
) -> list[Result]:
    """Tunes and trains every arm alike, each on the same seeds."""
    results = []
    for arm in arms:
        rate = tuned(task, arm, course, rates, **policy)
        learner = Policy(task, range(seeds), rate, **policy)
        results.append(Result(arm.name, rate, learn(learner, arm, course), learner))
        report.say(f"{arm.name}: learning rate {rate}, {results[-1].scores.shape[1]} updates")
    return results
