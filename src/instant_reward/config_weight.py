"""A reward's weight that changes while the run goes on: schedules over the steps, and rules that read the metrics."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal, Self

from pydantic import Discriminator, Field, Tag, model_validator

from instant_reward.config_section import Count, NotNegative, Positive, Section, Text, Whole


class LinearWeight(Section):
    """From ``start`` to ``end`` in a straight line over ``steps`` steps, the first ``wait`` of the run left out."""

    rule: Literal["linear"]
    start: float = 0.0
    end: float = 1.0
    steps: Count
    wait: Whole = 0


class CosineWeight(LinearWeight):
    """The same along half a cosine: slow at both ends."""

    rule: Literal["cosine"]  # type: ignore[assignment]


class StepsWeight(Section):
    """``start``, and from each of the steps in ``at`` on the weight that stands there: ``{20: 0.5, 60: 0.1}``."""

    rule: Literal["steps"]
    start: float = 1.0
    at: dict[Annotated[int, Field(ge=1)], float]

    @model_validator(mode="after")
    def _some(self) -> Self:
        if not self.at:
            raise ValueError("at is empty; give a weight for at least one step, for instance {20: 0.5}")
        return self


class ConstraintWeight(Section):
    """A constraint's weight, raised while the constraint does not hold and lowered while it does (Lagrangian).

    Each step it moves by ``rate`` times what is missing: ``target - metric`` with ``above``, ``metric - target``
    without, where ``metric`` is this step's; while a critic warms up alone it stays. It is kept within 0 and ``most``.
    Stooke, Achiam and Abbeel (2020), "Responsive safety in reinforcement learning by PID Lagrangian methods", section
    3, the integral part.
    """

    rule: Literal["constraint"]
    metric: Text
    target: float
    above: bool = True
    start: NotNegative = 0.0
    rate: Positive = 0.1
    most: Positive = 10.0


class FadeWeight(Section):
    """``start`` while ``metric`` is at or below ``low``, ``end`` from ``high`` on, a straight line between them.

    The metric is its running mean over about ten steps. For a dense term that shows the way until the final score is
    learned.
    """

    rule: Literal["fade"]
    metric: Text
    low: float
    high: float
    start: float = 1.0
    end: float = 0.0

    @model_validator(mode="after")
    def _ordered(self) -> Self:
        if self.high <= self.low:
            raise ValueError(f"high ({self.high:g}) must be above low ({self.low:g})")
        return self


class EqualWeight(Section):
    """``start`` times what makes this source's spread that of the source ``to``: the quotient of running deviations.

    The deviation is that of what a text earned from the source in all, over the texts of about ten steps. ``most``
    bounds the quotient from both sides.
    """

    rule: Literal["equalise"]
    to: Text
    start: float = 1.0
    most: Positive = 100.0


WeightRule = Annotated[
    LinearWeight | CosineWeight | StepsWeight | ConstraintWeight | FadeWeight | EqualWeight,
    Field(discriminator="rule"),
]
Schedule = Annotated[LinearWeight | CosineWeight | StepsWeight, Field(discriminator="rule")]
RULES: dict[str, type[Section]] = {
    "linear": LinearWeight,
    "cosine": CosineWeight,
    "steps": StepsWeight,
    "constraint": ConstraintWeight,
    "fade": FadeWeight,
    "equalise": EqualWeight,
}


def _kind(value: Any) -> str:
    return "rule" if isinstance(value, Mapping | Section) else "number"


Weight = Annotated[Annotated[float, Tag("number")] | Annotated[WeightRule, Tag("rule")], Discriminator(_kind)]
# A number, or one that hangs on the step alone.
Planned = Annotated[Annotated[float, Tag("number")] | Annotated[Schedule, Tag("rule")], Discriminator(_kind)]


def least(planned: float | LinearWeight | StepsWeight) -> float:
    """The lowest value that such a number ever has."""
    if isinstance(planned, LinearWeight):
        return min(planned.start, planned.end)
    if isinstance(planned, StepsWeight):
        return min(planned.start, *planned.at.values())
    return planned
