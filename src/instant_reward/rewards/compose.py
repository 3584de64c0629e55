"""Rewards made of other things: the change of a score, a weight."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from pydantic import TypeAdapter, ValidationError

from instant_reward.config_weight import WeightRule
from instant_reward.rewards.base import Reward, as_reward, as_score, own_settings
from instant_reward.types import Every, Prompt, UserError, View


class Change:
    """Pays ``score(now) - score(before)`` at each piece, beginning from ``score("")``.

    The sum over a text is ``score(full) - score("")``. With discount 1 it has the final score's gradient; with a
    discount below 1 it is another objective, in which effects soon after a word count more.
    """

    rereads = True

    def __init__(self, score: Callable[[Any], Any], batched: bool) -> None:
        self.score = score
        self.batched = batched
        self._empty: float | None = None

    def start(self, prompt: Prompt) -> list[float]:
        """The state is the last score, in a list of one so that it can be replaced."""
        if self._empty is None:
            self._empty = float(self.score([""])[0] if self.batched else self.score(""))
        return [self._empty]

    def extend(self, state: Any, view: Any) -> Any:
        """The change at this piece; lists of states and views where ``batched``."""
        if not self.batched:
            return self._step(state, float(self.score(view.text)))
        states: Sequence[list[float]] = state
        views: Sequence[View] = view
        now = [float(value) for value in self.score([one.text for one in views])]
        if len(now) != len(views):
            return now  # the watcher names the reward and says that the length is wrong
        return [self._step(one, value) for one, value in zip(states, now, strict=True)]

    @staticmethod
    def _step(state: list[float], now: float) -> float:
        before, state[0] = state[0], now
        return now - before


def change(
    score: Callable[[Any], Any],
    every: Every = "word",
    *,
    name: str | None = None,
    batched: bool = False,
    weight: float = 1.0,
    discount: float | None = None,
) -> Reward:
    """The change of ``score`` at each piece: its sum over a text is ``score(full) - score("")``.

    Args:
        score: ``f(text) -> float``; with ``batched``, ``f(list of texts) -> list of floats``. Or one of the library's
            scores that read each character once and can pay their own change, such as ``Rouge()``.
        every: where pieces end, as for ``ir.reward``.
        name: the source's name; the score's where it is not given.
        discount: per sampled token; 1 keeps the final score's gradient, less is a stated bias.

    Raises:
        UserError: where ``score`` takes anything but a text, or has a weight or another setting that would be lost.
    """
    what = "ir.change compares scores of texts"
    itself = as_reward(score)
    if itself.takes == "state" and isinstance(getattr(itself.function, "change", None), bool):
        if getattr(itself.function, "of", "text") != "text":
            raise UserError(f"{what}, and '{itself.name}' rates pieces; make it with of='text'")
        if lost := own_settings(itself):
            raise UserError(f"{what}, and the {lost[0]} of '{itself.name}' would be lost; give it to ir.change")
        changing = copy.copy(itself.function)
        changing.change = True
        return itself.but(function=changing, name=name or itself.name, every=every, weight=weight, discount=discount)
    one = as_score(score, what)
    batched = batched or one.batched
    return Reward(
        function=Change(one.function, batched),
        name=name or one.name,
        every=every,
        batched=batched,
        weight=weight,
        discount=discount,
        takes="state",
        stops=False,
        segmenter=one.segmenter,
    )


def weighted(candidate: Any, weight: float | Mapping[str, Any], name: str | None = None) -> Reward:
    """The same reward with another weight in the sum, and another name where one is given.

    Args:
        weight: a number, or a rule by which it changes while the run goes on, such as
            ``{"rule": "linear", "start": 1.0, "end": 0.0, "steps": 100}``: ``config_weight`` has them all.

    Raises:
        UserError: where the rule is none of those.
    """
    one = as_reward(candidate)
    if isinstance(weight, Mapping):
        return one.but(rule=weight_rule(weight, one.name), name=name or one.name)
    return one.but(weight=weight, rule=None, name=name or one.name)


def weight_rule(values: Mapping[str, Any], name: str) -> Any:
    """The rule that plain values stand for; UserError where they stand for none."""
    try:
        return TypeAdapter(WeightRule).validate_python(dict(values))
    except ValidationError as error:
        wrong = error.errors(include_url=False)[0]
        where = ".".join(str(part) for part in wrong["loc"][1:])
        message = f"{where}: {wrong['msg']}" if where else wrong["msg"]
        raise UserError(f"reward '{name}': weight={dict(values)} is no rule ({message}); correct it") from None
