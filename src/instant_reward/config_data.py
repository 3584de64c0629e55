"""Sections of a config's data: logged decisions, and masks that are put into texts."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field, field_validator

from instant_reward.config_section import Fraction, Section, Text, Whole


class LoggedConfig(Section):
    """Which columns of the data are a log of decisions: the ``action`` that was taken, what it earned (``reward``), and
    with what chance it had been chosen (``propensity``)."""

    action: Text = "action"
    reward: Text = "reward"
    propensity: Text = "propensity"


class MasksConfig(Section):
    """Random masks in texts, from which a masked model learns what stood there.

    Attributes:
        share: of a text's tokens that are masked, rounded up; or two shares, between which each text's is drawn evenly.
        seed: draws the share and the places, anew each time that a text comes; of held-out texts once and for all.
    """

    share: Fraction | Annotated[list[Fraction], Field(min_length=2, max_length=2)] = 0.15
    seed: Whole = 0

    @field_validator("share")
    @classmethod
    def _rising(cls, value: float | list[float]) -> float | list[float]:
        if isinstance(value, list) and value[0] > value[1]:
            raise ValueError(f"goes from {value[0]:g} down to {value[1]:g}; give the lower one first")
        return value

    @property
    def shares(self) -> tuple[float, float]:
        """The lowest and the highest share."""
        return (self.share[0], self.share[1]) if isinstance(self.share, list) else (self.share, self.share)
