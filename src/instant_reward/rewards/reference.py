"""Rewards that compare a text with a reference from the data set, for the cost of one pass over the text."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from instant_reward.rewards.growing import Stream, stream_of, tokens_of
from instant_reward.rewards.tallies import Codes, Tally
from instant_reward.types import Prompt, UserError, View

Found = Sequence[tuple[int, Sequence[int]]]  # what each tally says: the text's length in tokens, and its numbers
_REMEMBERED = 256  # references that were prepared: the texts of one prompt share them


class Running(Protocol):
    """A score that is kept up to date while its text grows."""

    def add(self, piece: str) -> float:
        """Reads the next characters of the text; returns the score of all of it so far."""


@dataclass
class Growing:
    """The state of one text: its running score, how many characters that has read, and the score at the last piece."""

    running: Running
    read: int
    score: float


class Metric(ABC):
    """What the metrics share: a reward that keeps a state (``start`` and ``extend``) and reads every character once.

    Args:
        reference: the column of ``view.info`` that holds the reference, or a list of them.
        change: pays ``score(now) - score(before)`` at each piece, from the empty text's score on: the sum over a text
            is ``score(full) - score("")``. Otherwise each piece is paid the score of the text so far.

    Attributes:
        name: the source's name in marks and metrics, unless another is given.
        every: where pieces end, unless the config or ``as_reward(metric).but(every=...)`` says otherwise: "end", and
            "word" with ``change``.

    Raises UserError at the start of a text whose prompt has no such column, or no usable reference in it.
    """

    name: str = "metric"
    stops = False
    rereads = True
    compares: str = "words"

    def __init__(self, reference: str = "reference", change: bool = False) -> None:
        if not isinstance(reference, str) or not reference:
            raise UserError(f"{self.name}: reference={reference!r} must be the name of the column with the reference")
        if not isinstance(change, bool):
            raise UserError(f"{self.name}: change={change!r} must be true or false")
        self.reference = reference
        self.change = change
        self.every = "word" if change else "end"
        self._prepared: dict[tuple[str, ...], Callable[[], Running]] = {}

    def start(self, prompt: Prompt) -> Growing:
        """The state of a text that has just begun."""
        running = self._begin(self._column(prompt), f"column {self.reference!r} of prompt {prompt.id}")
        return Growing(running, 0, running.add(""))

    def extend(self, state: Growing, view: View) -> float:
        """The score of the text up to this piece; with ``change``, how much it rose since the last one."""
        if len(view.piece) == len(view.text) and state.read:  # all of it is new: it was changed in its middle
            state.running, state.read = self._begin(self._column(view.prompt), f"prompt {view.prompt.id}"), 0
        before, state.score = state.score, state.running.add(view.text[state.read :])
        state.read = len(view.text)
        return state.score - before if self.change else state.score

    def score(self, text: str, references: str | Sequence[str]) -> float:
        """The score of one finished text."""
        return self._begin(self._checked(references, "the argument references"), "the argument references").add(text)

    @abstractmethod
    def prepare(self, references: tuple[str, ...]) -> Callable[[], Running] | None:
        """What makes a running score against these references; None where one of them has nothing to compare."""

    def _begin(self, references: tuple[str, ...], where: str) -> Running:
        made = self._prepared.get(references)
        if made is None:
            made = self.prepare(references)
            if made is None:
                raise UserError(f"{self.name}: a reference in {where} has no {self.compares}; mend it or leave it out")
            if len(self._prepared) >= _REMEMBERED:
                self._prepared.clear()
            self._prepared[references] = made
        return made()

    def _column(self, prompt: Prompt) -> tuple[str, ...]:
        if self.reference not in prompt.info:
            there = ", ".join(map(str, prompt.info)) or "none"
            raise UserError(
                f"{self.name}: prompt {prompt.id} has no column {self.reference!r} (it has: {there}); add it, or name "
                "the column with the reference as reference=..."
            )
        return self._checked(prompt.info[self.reference], f"column {self.reference!r} of prompt {prompt.id}")

    def _checked(self, value: Any, where: str) -> tuple[str, ...]:
        plain = value.tolist() if hasattr(value, "tolist") else value
        references = list(plain) if isinstance(plain, Sequence) and not isinstance(plain, str | bytes) else [plain]
        if not references:
            raise UserError(f"{self.name}: {where} is an empty list; give at least one reference")
        texts = tuple(self.as_text(one) for one in references)
        for one, text in zip(references, texts, strict=True):
            if text is None:
                kind = type(one).__name__
                raise UserError(
                    f"{self.name}: {where} holds {repr(one)[:40]} ({kind}), not text; give a text or a list of texts"
                )
            if not text.strip():
                raise UserError(f"{self.name}: a reference in {where} is empty; give one, or leave the prompt out")
        return tuple(text for text in texts if text is not None)

    def as_text(self, value: Any) -> str | None:
        """A reference as text; None where it cannot be one."""
        return value if isinstance(value, str) else None

    def __getstate__(self) -> Mapping[str, Any]:
        """What is prepared holds functions, which cannot be sent to another process: it is made anew there."""
        return {**self.__dict__, "_prepared": {}}


class Compared:
    """Running comparisons of one token stream, rated together.

    Args:
        stream: cuts the text into tokens.
        codes: gives each token its character.
        tallies: one for each reference, or one for all.
        rate: makes the score of what the tallies say: the text's length in tokens and each one's numbers.
    """

    __slots__ = ("_codes", "_rate", "_stream", "_tallies")

    def __init__(
        self,
        stream: Stream,
        codes: Codes,
        tallies: Sequence[Tally],
        rate: Callable[[Found], float],
    ) -> None:
        self._stream, self._codes, self._tallies, self._rate = stream, codes, tallies, rate

    def add(self, piece: str) -> float:
        return self._rate(self.compare(piece))

    def compare(self, piece: str) -> Found:
        """Reads on; returns what each tally says of the text so far."""
        certain = self._stream.push(piece)
        if certain:
            codes = self._codes(certain)
            for tally in self._tallies:
                tally.push(codes)
        tail = self._codes(self._stream.tail())
        return [tally.peek(tail) for tally in self._tallies]


def cut(references: Sequence[str], kind: str) -> list[list[str]] | None:
    """The tokens of each reference; None where one has none."""
    found = [tokens_of(stream_of(kind), reference) for reference in references]
    return found if all(found) else None


def harmonic(precision: float, recall: float, beta: float = 1.0) -> float:
    """F-beta: the harmonic mean, in which recall counts ``beta`` times as much; 0 where both are."""
    weight = beta * beta
    if not precision + recall > 0.0:
        return 0.0
    return (1.0 + weight) * precision * recall / (weight * precision + recall)


def finite(value: Any, low: float) -> bool:
    """Whether this is a finite number of at least ``low``."""
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value) and value >= low
