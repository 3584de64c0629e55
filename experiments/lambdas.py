"""Experiment 3: the policy's lambda and the critic's own, apart, with rewards at each token and with a final one.

The task is the key of experiment 1 with half the cues: the first token pays nothing and decides what all later ones are
worth, so that credit has to travel. The policy's lambda says how far its advantages look before they trust the critic;
the critic's, how far its targets do.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from gru import Policy, Task, Texts
from lab import Arm, Course, learn, race
from report import asked, compared, publish, say
from timing import key
from torch import Tensor

import instant_reward as ir

THRESHOLD = 0.8
ANSWERS = torch.tensor([3, 5, 0, 6, 1, 7, 2, 4])


def pay(texts: Texts) -> Tensor:
    """What each token earns, ``[B, 2T]``."""
    return key(texts, ANSWERS)


def score(texts: Texts) -> Tensor:
    """What the whole text earns, ``[B]``."""
    return pay(texts).sum(1)


REWARDS = {
    "rewards at each token": ir.reward(every="token", name="pay")(pay),
    "final reward": ir.reward(every="end", name="pay")(score),
}


def arm(lam: float, own: float, reward: ir.Reward) -> Arm:
    """An actor with one lambda and its critic with another."""
    return Arm(f"policy {lam:g}, critic {own:g}", {"name": "a2c", "lam": lam, "critic": {"lam": own}}, [reward])


def at_one_rate(task: Task, course: Course, seeds: int, rate: float) -> list[dict[str, Any]]:
    """Three pairs again with one learning rate for all: what the tuning seeds chose shall not be what is compared."""
    pairs = [arm(lam, own, REWARDS["rewards at each token"]) for lam, own in ((1.0, 1.0), (0.9, 1.0), (0.9, 0.9))]
    scores = {one.name: learn(Policy(task, range(seeds), rate), one, course) for one in pairs}
    return compared(scores, THRESHOLD, "policy 1, critic 1")


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs each pair of lambdas with both rewards: one table for a reward, one panel for a reward and policy lambda."""
    told = asked(__doc__, arguments)
    size, length = len(ANSWERS), 3 if told.quick else 8
    lambdas = (1.0, 0.0) if told.quick else (1.0, 0.9, 0.0)
    task = Task(size, length, torch.zeros(1, 1).long(), score, cues=size)
    course = Course(updates=6 if told.quick else 300, until=THRESHOLD)
    tables, panels = {}, {}
    for kind, reward in REWARDS.items():
        results = []
        for lam in lambdas:
            say(f"{kind}, policy lambda {lam:g}")
            ran = race(task, [arm(lam, own, reward) for own in lambdas], course, told.seeds)
            panels[f"{kind}, policy lambda {lam:g}"] = {one.name.partition(", ")[2]: one.scores for one in ran}
            results += ran
        scores = {one.name: one.scores for one in results}
        tables[kind] = compared(scores, THRESHOLD, "policy 1, critic 1", {one.name: one.rate for one in results})
    for rate in (0.01, 0.03):
        say(f"rewards at each token, all at {rate}")
        tables[f"rewards at each token, all at {rate}"] = at_one_rate(task, course, told.seeds, rate)
    publish("lambdas", told, tables, panels, THRESHOLD)


if __name__ == "__main__":
    main()
