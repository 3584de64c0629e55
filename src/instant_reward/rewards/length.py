"""How long a text is, and how near that is to what is wanted."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from instant_reward.rewards.growing import Stream, stream_of
from instant_reward.rewards.reference import finite
from instant_reward.types import Prompt, UserError, View

UNITS = ("tokens", "words", "characters")


@dataclass
class _Count:
    """The state of one text: how far it was read, its length without the word that may still grow, its last score."""

    stream: Stream
    read: int
    length: int
    score: float


class Length:
    """How near the text's length is to a target, with a smooth edge. In [0, 1], 1 at the target.

    ``target`` is a number, or the least and the most that count as right, such as ``[80, 120]`` (either may be null:
    no bound). Beyond it the score falls as ``exp(-(distance / edge)**2)``: 0.37 at ``edge`` units from the target, 0.02
    at twice as many, so that even a much too long text still learns which way is better. ``edge`` is a quarter of the
    target where it is not given. ``unit``: "tokens" counts sampled tokens, the end token included; "words" counts runs
    of letters and digits, and each character of a script without spaces (Chinese, Japanese, Thai); "characters" counts
    visible ones. With ``change``, each piece is paid how much the score rose since the last one (``every`` is then
    "word"): the sum over a text is its score less that of no text.

    Cost: one pass over the text. What games it: any filler of the right length, or one "word" of it, depending on the
    unit; it says nothing of what is written. As a change per word it pays for every word up to the target.
    Source: own formula.
    """

    name = "length"
    stops = False

    def __init__(
        self,
        target: float | Sequence[float | None],
        unit: str = "words",
        edge: float | None = None,
        change: bool = False,
    ) -> None:
        """Raises UserError where an argument is none of those."""
        self.low, self.high = bounds(target, "Length")
        if unit not in UNITS:
            raise UserError(f"Length: unit={unit!r} is unknown; use {', '.join(UNITS)}")
        if edge is not None and not (finite(edge, 0.0) and edge > 0.0):
            raise UserError(f"Length: edge={edge!r} must be a number above 0")
        if not isinstance(change, bool):
            raise UserError(f"Length: change={change!r} must be true or false")
        largest = self.high if math.isfinite(self.high) else self.low
        self.edge = float(edge) if edge is not None else max(1.0, largest / 4.0)
        self.unit = unit
        self.change = change
        self.every = "word" if change else "end"

    def start(self, prompt: Prompt) -> _Count:
        """The state of a text that has just begun."""
        return _Count(stream_of("characters" if self.unit == "characters" else "auto"), 0, 0, self._rate(0))

    def extend(self, state: _Count, view: View) -> float:
        """The score of the text up to this piece; with ``change``, how much it rose since the last one."""
        length = view.sampled if self.unit == "tokens" else self._read(state, view.text)
        before, state.score = state.score, self._rate(length)
        return state.score - before if self.change else state.score

    def score(self, text: str) -> float:
        """The score of one finished text, in words or characters."""
        if self.unit == "tokens":
            raise UserError("Length: a text alone does not say how many tokens it has; use unit words or characters")
        return self._rate(self._read(self.start(Prompt("", "", [])), text))

    def _rate(self, length: int) -> float:
        return nearness(length, self.low, self.high, self.edge)

    @staticmethod
    def _read(state: _Count, text: str) -> int:
        """Reads what is new of the text; returns its length, as if it ended here."""
        state.length += len(state.stream.push(text[state.read :]))
        state.read = len(text)
        return state.length + len(state.stream.tail())


def nearness(value: float, low: float, high: float, edge: float) -> float:
    """1 between ``low`` and ``high``, and ``exp(-(distance / edge)**2)`` outside. In [0, 1]."""
    distance = max(low - value, value - high, 0.0) / edge
    return math.exp(-(min(distance, 30.0) ** 2))  # 30 makes it 0 already, and a square may overflow


def bounds(target: Any, who: str) -> tuple[float, float]:
    """The least and the most of a target: of a number, or of a pair in which one may be None. UserError otherwise."""
    pair = list(target) if isinstance(target, list | tuple) else [target, target]
    known = [value for value in pair if value is not None]
    if len(pair) == 2 and known and all(finite(value, 0.0) for value in known):
        low, high = (pair[0] or 0.0), (math.inf if pair[1] is None else pair[1])
        if low <= high:
            return float(low), float(high)
    raise UserError(
        f"{who}: target={target!r} must be a number from 0, or the least and the most, such as [80, 120] or [80, null]"
    )
