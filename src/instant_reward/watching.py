"""What is done by how a metric goes: when training ends, and how the learning rate follows."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from instant_reward.config import Config
from instant_reward.config_train import FollowConfig, StopWhen
from instant_reward.types import UserError

NOT_ALWAYS = {"skipped_groups", "stopped_early", "ratio_kl", "sampler_gap", "clipped"}  # metrics that some steps lack
OF_TEXTS = ("nll", "perplexity", "bits_per_character", "accuracy")  # what ``held_out/`` says of given texts
ERRORS = {"nll", "perplexity", "bits_per_character", "loss", "critic_loss", "kl", "teacher_kl", "ratio_kl"}


@dataclass
class Course:
    """How a metric has gone so far; a checkpoint keeps it.

    Attributes:
        of: the metric, and which of its values are better; "" before the first.
        met: for how many measurements in a row it has met its target.
        best, best_step: its best value, and when that was; NaN before the first.
        waited: how many measurements came since without a better one.
        mean: its smoothed value; NaN before the first.
        factor: what the learning rate is multiplied by.
        over: the target by which training ended, as JSON; "" where it did not.
    """

    of: str = ""
    met: int = 0
    best: float = math.nan
    best_step: int = 0
    waited: int = 0
    mean: float = math.nan
    factor: float = 1.0
    over: str = ""

    def begin(self, watched: StopWhen | FollowConfig) -> None:
        """Begins anew where the metric is another one: a resumed run may have another target."""
        of = f"{watched.metric}, {better_of(watched)}"
        if self.of not in ("", of):
            self.met, self.best, self.best_step, self.waited = 0, math.nan, 0, 0
        self.of = of

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


def check_watched(config: Config) -> None:
    """Refuses a held-out metric that no step, or the last one alone, would have: nothing would ever follow it.

    Raises:
        UserError: names the option, and what has to be set.
    """
    evaluate = config.evaluate
    for option, watched in (("train.stop_when", config.train.stop_when), ("train.follow", config.train.follow)):
        if watched is None or not watched.metric.startswith("held_out/"):
            continue
        where, figure = f"{option}.metric: {watched.metric!r}", watched.metric.removeprefix("held_out/")
        if evaluate.texts is None and evaluate.prompts is None:
            raise UserError(f"{where} is measured on held-out data, and there is none; give evaluate.texts")
        if evaluate.every is None:
            raise UserError(f"{where} is measured every evaluate.every steps; say how many")
        if evaluate.prompts is None and figure not in OF_TEXTS:
            known = ", ".join(f"held_out/{one}" for one in OF_TEXTS)
            raise UserError(f"{where} is not measured on texts; use one of {known}")


def ends(target: StopWhen, course: Course, row: Mapping[str, float], step: int) -> bool:
    """Whether training ends with this step; the course takes its value in.

    Raises:
        UserError: there is no such metric.
    """
    course.begin(target)
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
    if reached or (target.patience is not None and course.waited >= target.patience):
        course.over = target.model_dump_json()
    return is_over(target, course)


def is_over(target: StopWhen | None, course: Course) -> bool:
    """Whether training has ended by this target; by another one it goes on."""
    return target is not None and course.over == target.model_dump_json()


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
    held_out = {key for key in row if key.startswith("held_out/")} - {f"held_out/{one}" for one in OF_TEXTS}
    # A run's last step measures its held-out texts, and not always its prompts.
    if metric in NOT_ALWAYS or (metric.startswith("held_out/") and not held_out):
        return None
    known = ", ".join(sorted({*row, *NOT_ALWAYS}))
    raise UserError(f"{option}: there is no metric {metric!r}; use one of {known}")
