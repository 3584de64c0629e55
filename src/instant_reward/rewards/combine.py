"""Several rewards as one: their sum, mean, minimum, or the mean less so many deviations."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Any, Literal

from instant_reward.rewards.base import Reward, as_rewards, own_settings
from instant_reward.rewards.names import make
from instant_reward.types import Prompt, UserError, View

How = Literal["sum", "mean", "minimum", "pessimistic"]
HOW = ("sum", "mean", "minimum", "pessimistic")


class Ensemble:
    """Several rewards of the same pieces as one: their sum, mean, minimum, or their mean less k deviations.

    Its range is that of its members. Every member must hand back a number for each piece. "minimum" and "pessimistic"
    are for members that should agree, such as reward models trained on different halves of the labels: where they
    disagree, at least one of them is wrong, and a policy that is paid for the mean goes there.

    Cost: that of all members. What games it: what games all of its members at once; a mistake that they share is not
    seen (experiments/README.md, number 6). Source: Coste et al., "Reward Model Ensembles Help Mitigate
    Overoptimization" (2024), whose worst-case and uncertainty-weighted optimisation these are.
    """

    name, batched, stops = "ensemble", True, False

    def __init__(self, members: Sequence[Any], how: How = "mean", k: float = 1.0) -> None:
        """Takes the members together.

        Args:
            members: at least two rewards; from a config short names, import paths, or mappings with ``use`` and
                ``args``.
            k: how many deviations (over the members) "pessimistic" takes off.

        Raises:
            UserError: too few members, members of different pieces or scopes or with a weight or another setting that
                would be lost, or ``how`` is none of those.
        """
        if how not in HOW:
            raise UserError(f"Ensemble: how={how!r} is unknown; use {', '.join(HOW)}")
        if isinstance(members, str) or len(members) < 2:
            raise UserError("Ensemble: give a list of at least two members")
        self.members = as_rewards([_made(member) for member in members])
        self.how, self.k = how, k
        self.every = self._shared("every")
        self.segmenter = self._shared("segmenter")
        self.sees_end = self._shared("sees_end")
        if any(one.scope != "text" for one in self.members):
            raise UserError(
                "Ensemble: members that look beyond their own text (scope) are not supported; leave them out"
            )
        for one in self.members:
            if lost := own_settings(one):
                raise UserError(
                    f"Ensemble: the {lost[0]} of the member '{one.name}' would be lost; set it on the ensemble"
                )

    def start(self, prompt: Prompt) -> list[Any]:
        """The states of the members."""
        return [one.start(prompt) for one in self.members]

    def extend(self, states: Sequence[list[Any]], views: Sequence[View]) -> list[float]:
        """One number for each view."""
        columns = [
            self._numbers(one, one.rate(views, [state[index] for state in states]), len(views))
            for index, one in enumerate(self.members)
        ]
        return [self._together(row) for row in zip(*columns, strict=True)]

    def _together(self, values: Sequence[float]) -> float:
        if self.how == "sum":
            return sum(values)
        if self.how == "minimum":
            return min(values)
        mean = statistics.fmean(values)
        return mean if self.how == "mean" else mean - self.k * statistics.pstdev(values)

    @staticmethod
    def _numbers(one: Reward, values: Any, count: int) -> list[float]:
        if not isinstance(values, list) or len(values) != count:
            raise UserError(f"the member '{one.name}' must hand back {count} values, one for each piece")
        numbers = [value.tolist() if hasattr(value, "tolist") else value for value in values]
        for value in numbers:
            if not isinstance(value, bool | int | float):
                raise UserError(f"the member '{one.name}' gave a {type(value).__name__}; members must give numbers")
            if not math.isfinite(value):  # a minimum might hide it
                raise UserError(f"the member '{one.name}' gave {value}; members must give finite numbers")
        return [float(value) for value in numbers]

    def _shared(self, key: str) -> Any:
        found = [getattr(one, key) for one in self.members]
        if any(value != found[0] for value in found):
            listed = ", ".join(f"'{one.name}' {getattr(one, key)!r}" for one in self.members)
            raise UserError(f"Ensemble: members must have the same {key} ({listed}); give them the same")
        return found[0]


def _made(member: Any) -> Any:
    """A member given by name or as a mapping from a config; any other is taken as it is."""
    if isinstance(member, str):
        member = {"use": member}
    if not isinstance(member, Mapping):
        return member
    unknown = sorted(set(member) - {"use", "args"})
    if unknown or "use" not in member:
        raise UserError(f"Ensemble: a member is a name, or a mapping with use and args, not {dict(member)!r}")
    return make(member["use"], dict(member.get("args") or {}), "Ensemble")
