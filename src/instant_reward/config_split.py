"""How a config cuts its data into parts."""

from __future__ import annotations

from typing import Annotated, Self

from pydantic import Field, model_validator

from instant_reward.config_section import Fraction, Section, Text, Whole

PARTS = ("train", "validation", "test")
Part = Annotated[Fraction | Text | None, Field(union_mode="left_to_right")]


class SplitConfig(Section):
    """The parts of the data: either fractions of its rows, drawn by ``seed``, or a file each. What the fractions do
    not reach is left out."""

    train: Part = None
    validation: Part = None
    test: Part = None
    seed: Whole = 0

    @property
    def fractions(self) -> dict[str, float]:
        """The parts that are fractions, by name."""
        return {name: part for name in PARTS if isinstance(part := getattr(self, name), float)}

    @property
    def files(self) -> dict[str, str]:
        """The parts that are files, by name."""
        return {name: part for name in PARTS if isinstance(part := getattr(self, name), str)}

    @model_validator(mode="after")
    def _one_kind(self) -> Self:
        if bool(self.fractions) == bool(self.files):
            raise ValueError("give each part as a fraction of the rows (train: 0.8, test: 0.2) or each as a file")
        if sum(self.fractions.values()) > 1 + 1e-9:
            raise ValueError(f"the fractions add up to {sum(self.fractions.values()):g}; lower them to 1 or less")
        if self.files and self.seed:
            raise ValueError("a seed draws fractions; leave it out where each part is a file")
        return self
