"""Experiment 4: learning from texts that the policy wrote so many updates ago, by what is done about their age.

A chain: each token should be the successor of the one before it, so what is right hangs on what the policy itself
wrote. All arms are an actor with the same critic of prefixes and take two steps on each batch; they differ in their
importance weights and in how the ratio is bounded, and in nothing else. At lag 0 the first of the two steps is the same
for all.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from gru import Policy, Task, Texts, Weights
from lab import Arm, Course, learn, race, settings
from report import asked, compared, publish, say
from torch import Tensor

import instant_reward as ir
from instant_reward import algorithms
from instant_reward.train import update
from instant_reward.types import Carried

SUCCESSORS = torch.tensor([3, 6, 0, 5, 7, 2, 1, 4])
THRESHOLD = 0.8
RATES = (0.003, 0.01, 0.03)
BASE = {"normalise": "tokens", "epochs": 2}
ARMS: dict[str, dict[str, Any]] = {
    "uncorrected": {"name": "a2c", **BASE},
    "clipped": {"name": "a2c", "loss": "clipped", **BASE},
    "truncated": {"name": "a2c", "importance": {"level": "token", "most": 2.0}, **BASE},
    "CISPO": {"name": "a2c", "loss": "cispo", "clip_low": 1.0, "clip_high": 4.0, **BASE},
    "V-trace": {"name": "vtrace", **BASE},
    "decoupled": {"name": "decoupled_ppo", "scale": "none", **BASE},
}


def chain(texts: Texts) -> Tensor:
    """What each token earns, ``[B, T]``: its share of 1 where it follows from the one before it (at first, a 0)."""
    before = torch.nn.functional.pad(texts.tokens, (1, -1))
    return (texts.tokens == SUCCESSORS[before]) * texts.on / texts.on.sum(1, keepdim=True)


def arms() -> list[Arm]:
    """The same pay, with each token, for every way to deal with age."""
    pay = ir.reward(every="token", name="pay")(chain)
    return [Arm(name, options, [pay]) for name, options in ARMS.items()]


def on_policy(policy: Policy, arm: Arm, course: Course) -> Weights:
    """Trains without any thought of age: the policy writes, and learns from it at once. What lag 0 must be."""
    config = settings(policy.task, arm.algorithm)
    algorithm = algorithms.build(config.algorithm, arm.rewards, policy.task.length)
    policy.prepare(algorithm.needs)
    carried = Carried()
    for step in range(course.updates):
        batch, _ = policy.sample(algorithm.sources, arm.rewards, course.groups, course.siblings, version=step)
        batch.carried = carried
        batch = algorithm.credit(policy.annotate(batch))
        update(policy, algorithm, batch, config, step)
        carried = algorithm.adapt(batch, {})
    return policy.snapshot()


def check_lag_0(task: Task, updates: int = 5) -> None:
    """Lag 0 is on-policy training, bit for bit, for every arm; and a lag is not.

    Raises:
        AssertionError: names the arm.
    """

    def same(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> bool:
        return all(torch.equal(weight, other[name]) for name, weight in one.items())

    for arm in arms():
        plain = on_policy(Policy(task, [1, 2], 0.03), arm, Course(updates, groups=1))
        for lag in (0, 1):
            policy = Policy(task, [1, 2], 0.03)
            learn(policy, arm, Course(updates, groups=1, lag=lag))
            assert same(plain, policy.snapshot()) == (lag == 0), f"{arm.name}: lag {lag}"


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs all arms at every lag, to the same number of updates, and publishes one table for each lag."""
    told = asked(__doc__, arguments)
    task = Task(8, 3 if told.quick else 5, torch.zeros(1, 1).long(), lambda texts: chain(texts).sum(1))
    check_lag_0(task, 2 if told.quick else 20)
    say("lag 0 is on-policy training, bit for bit")
    tables, panels = {}, {}
    for lag in (2,) if told.quick else (0, 1, 4, 16, 64):
        title = f"lag {lag}"
        say(title)
        course = Course(updates=5 if told.quick else 140, groups=1, lag=lag)
        results = race(task, arms(), course, told.seeds, RATES, hidden=16)
        panels[title] = {one.name: one.scores for one in results}
        rates = {one.name: one.rate for one in results}
        tables[title] = compared(panels[title], THRESHOLD, "uncorrected", rates)
    publish("staleness", told, tables, panels, THRESHOLD)


if __name__ == "__main__":
    main()
