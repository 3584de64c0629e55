"""What is done by how a metric goes: when training ends, and how the learning rate follows."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from instant_reward.config_train import FollowConfig, StopWhen
from instant_reward.types import UserError

NOT_ALWAYS = {"skipped_groups", "stopped_early", "ratio_kl", "sampler_gap", "clipped"}  # metrics that some steps lack
ERRORS = {"nll", "perplexity", "bits_per_character", "loss", "critic_loss", "kl", "teacher_kl", "ratio_kl"}


@dataclass
class Course:
    """How a metric has gone so far; a checkpoint keeps it.

    Attributes:
        met: for how many measurements in a row it has met its target.
        best, best_step: its best value, and when that was; NaN before the first.
        waited: how many measurements came since without a better one.
        mean: its smoothed value; NaN before the first.
        factor: what the learning rate is multiplied by.
    """

    met: int = 0
    best: float = math.nan
    best_step: int = 0
    waited: int = 0
    mean: float = math.nan
    factor: float = 1.0

    def take(self, value: float, step: int, better: Literal["higher", "lower"]) -> bool:
        """Takes in a value; whether it is the best so far."""
        found = math.isnan(self.best) or (value < self.best if better == "lower" else value > self.best)
        if found:
            self.best, self.best_step = value, step
        self.waited = 0 if found else self.waited + 1
        return found


def better_of(watched: StopWhen | FollowConfig) -> Literal["higher", "lower"]:
    """Which values of its metric are better."""
    if watched.better is not None:
        return watched.better
    return "lower" if watched.metric.rpartition("/")[2] in ERRORS else "higher"


def ends(target: StopWhen, course: Course, row: Mapping[str, float], step: int) -> bool:
    """Whether training ends with this step; the course takes its value in.

    Raises:
        UserError: there is no such metric.
    """
    value = measured(target.metric, row, "train.stop_when.metric")
    if value is None:
        course.met = course.met if target.metric.startswith("held_out/") else 0
        return False
    course.take(value, step, better_of(target))
    bounded = target.above is not None or target.below is not None
    above = target.above is None or value > target.above
    below = target.below is None or value < target.below
    course.met = course.met + 1 if bounded and above and below else 0
    reached = bounded and course.met >= target.for_steps
    return reached or (target.patience is not None and course.waited >= target.patience)


def follow(config: FollowConfig, course: Course, row: Mapping[str, float], step: int) -> bool:
    """Moves the factor of the learning rate by what the metric did; whether the policy should go back to its best.

    A new best value raises the factor; ``patience`` values in a row that are worse than the best cut it.

    Raises:
        UserError: there is no such metric.
    """
    value = measured(config.metric, row, "train.follow.metric")
    if value is None:
        return False
    known = not math.isnan(course.mean)
    course.mean = config.smoothing * course.mean + (1.0 - config.smoothing) * value if known else value
    if course.take(course.mean, step, better_of(config)):
        if known:
            course.factor = min(config.most, course.factor * config.up)
        return False
    if course.waited < config.patience:
        return False
    course.waited = 0
    course.factor = max(config.least, course.factor * config.down)
    if config.return_to_best:
        course.mean = course.best
    return config.return_to_best


def measured(metric: str, row: Mapping[str, float], option: str) -> float | None:
    """A step's metric; None where this step was not asked for it.

    Raises:
        UserError: there is no such metric.
    """
    if metric in row:
        return row[metric]
    if metric in NOT_ALWAYS or metric.startswith("held_out/"):
        return None
    known = ", ".join(sorted({*row, *NOT_ALWAYS}))
    raise UserError(f"{option}: there is no metric {metric!r}; use one of {known}")
