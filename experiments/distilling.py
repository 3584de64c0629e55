"""Experiment 5: learning from a teacher on one's own texts, against learning from an outcome at the end of the text.

The task is "answers" of experiment 1. A teacher of the same size has learned it (from the pay of each token) to about
90%. The student hears of it in one of six ways: the task's score at the end; the teacher's verdict on the whole text
at the end, with the same optimum as the other four (see ``verdict``); the teacher's log-ratio with each token, which is
credited with all that follow or with its own alone, the latter without and with its mean taken away; or the KL over the
whole vocabulary.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import torch
from gru import STRIDE, Policy, Task, Texts, Weights, as_batch
from lab import TUNING_SEEDS, Arm, Course, learn
from report import Asked, asked, compared, publish, say
from timing import ANSWERS, answers
from torch import Tensor

import instant_reward as ir
from instant_reward.batch import Batch
from instant_reward.types import Needs, TeacherNeed

THRESHOLD = 0.8
RATES = (0.003, 0.01, 0.03)
SCORE, CLOSE = "task score", "closeness to the teacher, exp(-KL per token)"
TEACHER = {"model": "the teacher"}
DENSE: dict[str, dict[str, Any]] = {
    "log-ratio, to go": {"name": "distill", "baseline": "leave_one_out", "teacher": {**TEACHER, "discount": 1.0}},
    "log-ratio": {"name": "distill", "teacher": TEACHER},
    "log-ratio less its mean": {"name": "distill", "teacher": {**TEACHER, "baseline": True}},
    "whole vocabulary": {"name": "distill", "teacher": {**TEACHER, "whole": True}},
}


def crowd(seeds: int, rates: Sequence[float]) -> tuple[list[int], list[float]]:
    """Seeds and learning rates of one policy that holds them all: for each rate the tuning seeds, then the results'."""
    each = [*TUNING_SEEDS, *range(seeds)]
    return each * len(rates), [rate for rate in rates for _ in each]


def picked(measured: Tensor, rates: Sequence[float], by: Tensor | None = None) -> tuple[int, Tensor]:
    """The number of the rate whose tuning seeds did best on average, and what the results' seeds did with it.

    Args:
        measured: ``[rates * seeds, updates]``, in the order of ``crowd``.
        by: what counts as better, ``[rates * seeds, any]``, where it is not ``measured`` itself.
    """
    tuning = len(TUNING_SEEDS)
    by = measured if by is None else by
    best = int(by.view(len(rates), -1, by.shape[1])[:, :tuning].mean((1, 2)).argmax())
    return best, measured.view(len(rates), -1, measured.shape[1])[best, tuning:]


def ruler(policy: Policy, other: Weights) -> Callable[[Batch], Batch]:
    """Annotates a batch with the KL of the policy, as it is then, to ``other`` (and with both log-probabilities).

    The KL at each prefix stands in ``teacher_baseline``, negative; the start policy's in ``ref_logprobs``.
    """
    twin = copy.copy(policy)  # it has the very same weights, and they learn in place
    twin.needs = Needs(reference=True, teacher=TeacherNeed("other", baseline=True))
    twin.teacher, twin.reference = other, policy.snapshot()
    return twin.annotate


def gap(batch: Batch) -> Tensor:
    """The KL that a ruler has found, summed over each text's tokens, in nats: ``[B]``."""
    assert batch.teacher_baseline is not None
    return -batch.teacher_baseline.sum(1)


def verdict(measure: Callable[[Batch], Batch], seeds: int) -> ir.Reward:
    """``log p_teacher(x) - log p_start(x)`` of the whole text, at its end.

    Beside a KL to the start policy of weight 1, paid as a reward, it sums to ``log p_teacher(x) - log p(x)``: minus
    the KL to the teacher, as with the dense rewards.
    """

    def judge(texts: Texts) -> Tensor:
        group = torch.arange(seeds).repeat_interleave(len(texts.tokens) // seeds) * STRIDE
        batch = measure(as_batch(texts, torch.zeros(texts.tokens.shape), group, [], []))
        assert batch.teacher_logprobs is not None
        assert batch.ref_logprobs is not None
        return (batch.teacher_logprobs - batch.ref_logprobs).sum(1)

    return ir.reward(every="end", name="verdict")(judge)


def teachers(task: Task, seeds: Sequence[int], updates: int) -> tuple[Weights, Tensor]:
    """One for each seed, taught by the pay of each token; and their mean scores at the end, ``[S]``."""
    policy = Policy(task, [seed + 500 for seed in seeds], 0.02)
    arm = Arm("teacher", {"name": "instant"}, [ir.reward(every="token", name="pay")(answers)])
    scores = learn(policy, arm, Course(updates, until=0.85))
    return policy.snapshot(), scores[:, -5:].mean(1)


def student(task: Task, told: Asked, name: str, known: Weights, course: Course) -> dict[str, tuple[float, Tensor]]:
    """For each of the two measures the arm's learning rate and its ``[S, updates]``."""
    seeds, rates = crowd(told.seeds, RATES)
    policy = Policy(task, seeds, rates)
    policy.teacher = {key: weight.repeat(len(RATES), *[1] * (weight.dim() - 1)) for key, weight in known.items()}
    measure = ruler(policy, policy.teacher)
    arm = Arm(name, DENSE.get(name, {"name": "rloo"}), [])
    if name == "score at the end":
        arm = Arm(name, {"name": "rloo"}, [ir.reward(every="end", name="pay")(lambda texts: answers(texts).sum(1))])
    elif name == "verdict at the end":
        arm = Arm(name, {"name": "rloo", "kl": 1.0}, [verdict(measure, len(seeds))])
    near: list[Tensor] = []

    def watch(step: int, batch: Batch) -> None:
        each = gap(measure(batch)) / batch.mask.sum(1)
        near.append((-each.view(len(seeds), -1).mean(1)).exp())

    found = {SCORE: learn(policy, arm, course, watch), CLOSE: torch.stack(near, 1)}
    chosen = {title: picked(measured, RATES) for title, measured in found.items()}
    return {title: (RATES[best], measured) for title, (best, measured) in chosen.items()}


def main(arguments: Sequence[str] | None = None) -> None:
    """Trains a teacher for each seed, then every student, and publishes a table for each measure."""
    told = asked(__doc__, arguments)
    size = len(ANSWERS)
    task = Task(size, 3 if told.quick else 6, torch.zeros(1, 1).long(), lambda texts: answers(texts).sum(1), cues=size)
    known, scores = teachers(task, crowd(told.seeds, [0.0])[0], 5 if told.quick else 200)
    say(f"the teachers' scores: {scores.min():.2f} to {scores.max():.2f}, mean {scores.mean():.2f}")
    course = Course(updates=5 if told.quick else 130, groups=1)
    results = {}
    for name in ("score at the end", "verdict at the end", *DENSE):
        results[name] = student(task, told, name, known, course)
        say(name)
    tables, panels = {}, {}
    for title in (SCORE, CLOSE):
        panels[title] = {name: result[title][1] for name, result in results.items()}
        rates = {name: result[title][0] for name, result in results.items()}
        tables[title] = compared(panels[title], THRESHOLD, "score at the end", rates)
    for row in tables[CLOSE]:
        row["KL, nats per token"] = float(-panels[CLOSE][row["arm"]][:, -5:].log().mean())
    publish("distilling", told, tables, panels, THRESHOLD)


if __name__ == "__main__":
    main()
