"""The weights of reward sources that change while a run goes on."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch

from instant_reward.batch import Batch
from instant_reward.config_weight import (
    ConstraintWeight,
    CosineWeight,
    FadeWeight,
    LinearWeight,
    Schedule,
    StepsWeight,
    WeightRule,
)
from instant_reward.credit import Source
from instant_reward.types import Carried, UserError

SMALLEST = 1e-6  # a deviation below this is none: dividing by it would make noise of nothing


def as_they_are(sources: Sequence[Source], batch: Batch) -> list[Source]:
    """The sources with their weights at this step: by their rules, over their deviations where they are scaled."""
    now = [replace(one, weight=weight_now(one.rule, one.name, batch.carried)) if one.rule else one for one in sources]
    if not any(one.scaled for one in now):
        return now
    here = deviations(batch)  # of the first step, which has none before it
    known = {**here, **batch.carried.deviations}
    return [replace(one, weight=one.weight / _spread(known[one.name])) if one.scaled else one for one in now]


def planned(value: float | Schedule, carried: Carried) -> float:
    """A number that may hang on the step: what it is in the step to come."""
    return value if isinstance(value, float) else weight_now(value, "", carried)


def weight_now(rule: WeightRule, name: str, carried: Carried) -> float:
    """What a rule makes of what is carried: the weight of the step to come, the first of which is step 1.

    Args:
        name: the source's.
    """
    step = carried.step  # taken so far
    if isinstance(rule, LinearWeight):  # a cosine one is one, too
        share = min(1.0, max(0.0, (step - rule.wait) / rule.steps))
        if isinstance(rule, CosineWeight):
            share = 0.5 - 0.5 * math.cos(math.pi * share)
        return rule.start + share * (rule.end - rule.start)
    if isinstance(rule, StepsWeight):
        passed = [at for at in rule.at if at <= step + 1]
        return rule.at[max(passed)] if passed else rule.start
    if isinstance(rule, ConstraintWeight):
        return carried.weights.get(name, min(rule.start, rule.most))
    if isinstance(rule, FadeWeight):
        if rule.metric not in carried.metrics:
            return rule.start
        share = min(1.0, max(0.0, (carried.metrics[rule.metric] - rule.low) / (rule.high - rule.low)))
        return rule.start + share * (rule.end - rule.start)
    if name not in carried.deviations:
        return rule.start
    quotient = _spread(carried.deviations[rule.to]) / _spread(carried.deviations[name])
    return rule.start * min(rule.most, max(1.0 / rule.most, quotient))


def followed(batch: Batch, row: Mapping[str, float], rate: float, learns: bool = True) -> dict[str, dict[str, float]]:
    """What is carried to the next step: by the names of ``Carried``'s fields.

    Args:
        row: the step's metrics.
        rate: how far running means move towards this step's values.
        learns: whether the policy does, and not its critic alone: without, constraints stay as they are.

    Raises:
        UserError: a rule reads a metric that there is not.
    """
    before = batch.carried
    weights, means = dict(before.weights), dict(before.metrics)
    for source in batch.sources:
        rule = source.rule
        if isinstance(rule, ConstraintWeight):
            missing = (rule.target - _metric(rule.metric, source.name, row)) * (1.0 if rule.above else -1.0)
            weight = weight_now(rule, source.name, before) + (rule.rate * missing if learns else 0.0)
            weights[source.name] = min(rule.most, max(0.0, weight))
        elif isinstance(rule, FadeWeight):
            value = _metric(rule.metric, source.name, row)
            means[rule.metric] = _moved(before.metrics.get(rule.metric, value), value, rate)  # several may hang on it
    here = deviations(batch)
    # Variances are averaged, not deviations: a mean of square roots would be too small.
    spread = {
        name: math.sqrt(_moved(before.deviations.get(name, here[name]) ** 2, here[name] ** 2, rate)) for name in here
    }
    return {"weights": weights, "deviations": spread, "metrics": means}


def deviations(batch: Batch) -> dict[str, float]:
    """By source, the deviation over the batch's texts of what a text earned from it in all, unweighed."""
    table = totals_by_source(batch)
    return {
        source.name: float(table[:, index].std(correction=0))
        for index, source in enumerate(batch.sources)
        if not source.dense
    }


def totals_by_source(batch: Batch) -> torch.Tensor:
    """What each text earned from each source, unweighed, each mark once: ``[B, K]``; 0 of the algorithm's own."""
    totals = torch.zeros(len(batch), len(batch.sources), dtype=batch.marks.value.dtype)
    return totals.index_put_((batch.marks.row, batch.marks.source), batch.marks.value, accumulate=True)


def _moved(before: float, value: float, rate: float) -> float:
    return before + rate * (value - before)


def _spread(deviation: float) -> float:
    return deviation if deviation > SMALLEST else 1.0


def _metric(metric: str, name: str, row: Mapping[str, float]) -> float:
    if metric not in row:
        known = ", ".join(sorted(row))
        raise UserError(
            f"rewards: the weight of '{name}' hangs on the metric {metric!r}, which there is not; use one of {known}"
        )
    return row[metric]
