"""The part of the config that says how long a run trains, how fast, and when it ends."""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self

from pydantic import Field, model_validator

from instant_reward.config_section import Count, NotNegative, Positive, Section, Text, Whole


class ReplayConfig(Section):
    """Texts of earlier steps that join each step once more: so many ``groups``, at most ``staleness`` steps old."""

    groups: Count = 2
    staleness: Count = 4


class StopWhen(Section):
    """When to end training: by a target, by patience, or by whichever comes first.

    What counts are the steps that have the metric: a held-out one is measured every so many steps.

    Attributes:
        above, below: end once the metric was above the one and below the other, whichever is given, for ``for_steps``
            (``for``) steps in a row.
        patience: end after so many steps in a row without a new best value.
        better: which values are; without it "lower" for errors (perplexity, nll, loss, ...), "higher" for others.
        return_to_best: the policy ends as it was at its best value, from that step's checkpoint.
    """

    metric: Text
    above: float | None = None
    below: float | None = None
    for_steps: Count = 1
    patience: Count | None = None
    better: Literal["higher", "lower"] | None = None
    return_to_best: bool = False

    @model_validator(mode="before")
    @classmethod
    def _for(cls, values: Any) -> Any:
        """``for`` is another way to write ``for_steps``."""
        if isinstance(values, dict) and "for" in values and "for_steps" not in values:
            return {("for_steps" if key == "for" else key): value for key, value in values.items()}
        return values

    @model_validator(mode="after")
    def _some_end(self) -> Self:
        if self.above is None and self.below is None and self.patience is None:
            raise ValueError("give above, below or patience: without one it never ends the run")
        if self.for_steps > 1 and self.above is None and self.below is None:
            raise ValueError("for_steps counts steps at a target; give above or below, or leave it out")
        return self


class FollowConfig(Section):
    """A learning rate that follows a metric, for ``train.schedule: follow``.

    A new best value multiplies the rate by ``up``; ``patience`` values in a row that are worse than the best multiply
    it by ``down``. What counts are the steps that have the metric.

    Attributes:
        metric: any one of the run's; better: which values are (see ``StopWhen``).
        smoothing: 0 takes each value as it is; above, it is averaged with so much of its running mean.
        least, most: the rate stays within so many times ``train.learning_rate``.
        return_to_best: with each cut the policy and its optimizer go back to the checkpoint of the best value.
    """

    metric: Text = "reward"
    better: Literal["higher", "lower"] | None = None
    up: Annotated[float, Field(ge=1)] = 1.05
    down: Annotated[float, Field(gt=0, lt=1)] = 0.5
    patience: Count = 3
    smoothing: Annotated[float, Field(ge=0, lt=1)] = 0.0
    least: Positive = 0.01
    most: Positive = 10.0
    return_to_best: bool = False

    @model_validator(mode="after")
    def _ordered(self) -> Self:
        if not self.least <= 1.0 <= self.most:
            raise ValueError(
                "the rate begins at 1 times train.learning_rate: let least be at most 1 and most at least 1"
            )
        return self


class TrainConfig(Section):
    """The loop. ``tokens_per_part`` bounds the memory of a forward pass, and ``keep`` how many checkpoints stay.
    ``samples``: which texts of a step go to ``samples.jsonl``: those of its "first" prompt, or "all".
    For given texts: ``epochs``, in place of ``steps``, and ``tokens_per_step``, in place of ``prompts_per_step``: texts
    of like length together, about so many tokens a step."""

    steps: Count = 40
    epochs: Positive | None = None
    prompts_per_step: Count = 4
    tokens_per_step: Count | None = None
    group_size: Count = 8
    learning_rate: NotNegative = 1e-5
    schedule: Literal["constant", "linear", "cosine", "follow"] = "constant"
    follow: FollowConfig | None = None
    warmup: Whole = 0
    weight_decay: NotNegative = 0.0
    max_grad_norm: Positive = 1.0
    tokens_per_part: Count = 1280
    save_every: Count | None = None
    keep: Count = 2
    samples: Literal["first", "all"] = "first"
    stop_when: StopWhen | None = None
    replay: ReplayConfig | None = None
    threads: Count | None = None

    @model_validator(mode="before")
    @classmethod
    def _no_steps(cls, values: Any) -> Any:
        """Beside ``epochs``, ``steps: null`` leaves out the steps that a config names."""
        if isinstance(values, dict) and values.get("epochs") is not None and values.get("steps", 0) is None:
            return {key: value for key, value in values.items() if key != "steps"}
        return values

    @model_validator(mode="after")
    def _one_length(self) -> Self:
        if self.epochs is not None and self.steps != type(self).model_fields["steps"].default:
            raise ValueError(
                "epochs says how long the run is, and so does steps; give one of them (steps: null leaves it out)"
            )
        if (self.schedule == "follow") != (self.follow is not None):
            raise ValueError("schedule: follow and the section follow go together; give both or neither")
        return self
