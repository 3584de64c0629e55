"""Experiment 2: a potential beside a final reward, with full returns and with a critic that looks less far ahead.

The task is that of experiment 1 ("answers") with half the cues, paid at the end only. The good potential is the share
of right answers so far, the misleading one that of wrong answers. Both are paid as differences, and back at the end.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from gru import Policy, Task, Texts
from lab import Arm, Course, learn, race
from report import WINDOW, asked, compared, publish, say
from timing import answers
from torch import Tensor

import instant_reward as ir

THRESHOLD = 0.8
ANSWERS = torch.tensor([3, 5, 0, 6, 1, 7, 2, 4])
Potential = Callable[[Texts], Tensor]


def good(texts: Texts) -> Tensor:
    """The share of right answers, of all that will be given, after each token: ``[B, 2T]``."""
    return answers(texts, ANSWERS).cumsum(1)


def score(texts: Texts) -> Tensor:
    """The share of right answers in the whole text, ``[B]``."""
    return good(texts)[:, -1]


def misleading(texts: Texts) -> Tensor:
    """The share of wrong answers after each token: ``[B, 2T]``."""
    return (texts.on / texts.on.sum(1, keepdim=True)).cumsum(1) - good(texts)


def shaped_by(potential: Potential) -> ir.Reward:
    """``phi(now) - phi(before)`` with each sampled token, and 0 for phi after the end (Ng et al., 1999, discount 1)."""

    def difference(texts: Texts) -> Tensor:
        now = potential(texts)
        before = torch.nn.functional.pad(now, (1, -1))  # a cue changes no potential
        after = now.clone()
        after[:, -1] = 0.0
        return after - before

    return ir.reward(every="token", name="shaping", discount=1.0)(difference)


def arms(algorithm: dict[str, Any]) -> list[Arm]:
    """The final reward alone, and beside it either potential."""
    final = ir.reward(every="end", name="score")(score)
    return [
        Arm("final only", algorithm, [final]),
        Arm("good potential", algorithm, [final, shaped_by(good)]),
        Arm("misleading potential", algorithm, [final, shaped_by(misleading)]),
    ]


def in_the_end(task: Task, seeds: int, updates: int) -> list[dict[str, Any]]:
    """What every potential's seeds score once all are done learning: at lambda 0.9, with one small learning rate."""
    rows = []
    for arm in arms({"name": "a2c", "lam": 0.9}):
        scores = learn(Policy(task, range(seeds), 0.01), arm, Course(updates=updates))[:, -WINDOW:].mean(1)
        rows.append({"arm": arm.name, "mean": float(scores.mean()), "lowest seed": float(scores.min())})
        say(f"to the end, {arm.name}")
    return rows


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs every choice of returns with every potential, and one choice on to the end."""
    told = asked(__doc__, arguments)
    size, length = len(ANSWERS), 3 if told.quick else 8
    task = Task(size, length, torch.zeros(1, 1).long(), score, cues=size)
    course = Course(updates=6 if told.quick else 400, until=THRESHOLD)
    choices: dict[str, dict[str, Any]] = {"full returns, leave-one-out": {"name": "rloo"}}
    for lam in (1.0, 0.0) if told.quick else (1.0, 0.9, 0.0):
        choices[f"critic, lambda {lam:g}"] = {"name": "a2c", "lam": lam}
    tables, panels = {}, {}
    for title, algorithm in choices.items():
        say(title)
        results = race(task, arms(algorithm), course, told.seeds)
        panels[title] = {one.name: one.scores for one in results}
        tables[title] = compared(panels[title], THRESHOLD, "final only", {one.name: one.rate for one in results})
    more = 2 * course.updates
    tables[f"critic, lambda 0.9, after {more} updates"] = in_the_end(task, told.seeds, more)
    publish("shaping", told, tables, panels, THRESHOLD)


if __name__ == "__main__":
    main()
