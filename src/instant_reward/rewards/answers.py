"""Rewards that read the answer out of a text and compare it with the right one."""

from __future__ import annotations

import re
import threading
from collections.abc import Callable, Sequence
from decimal import Decimal
from fractions import Fraction
from functools import lru_cache
from typing import Any

from instant_reward.rewards.growing import HAN, Matched, Stream
from instant_reward.rewards.reference import Metric, Running, finite
from instant_reward.types import UserError

_NUMBER = re.compile(
    r"(?<![A-Za-z_\d.])(?:(?P<sign>[-+\u2212\uff0d])[$\u00a3\u00a5\u20ac]?)?"
    r"(?P<whole>\d{1,3}(?:,\d{3})+(?!\d)|\d+|(?=\.\d))(?P<part>\.\d+)?"
    r"(?:[eE](?P<power>[-+]?\d{1,3})(?!\d)|/(?P<below>\d+))?"
)
_WORD = re.compile(rf"(?:(?!{HAN})\S)++")  # no number goes on past white space or a Chinese character
_LONGEST = 100  # digits of an answer that is read at all: exact arithmetic on more only costs time
_FORMULA_MARKS = ("$", "\\boxed", "\\(", "\\[", "####")
_SECONDS = 5  # math-verify's own limit


class NumericAnswer(Metric):
    """Whether the last number of the text so far is the reference's last number: 1 or 0.

    Reads 42, -3, -$3, .5, 1,234.5, 2.5e-3 and 1/2, also with digits of other scripts, and compares exactly; units,
    currency and % are left out, a number inside a name (x2, v1.5) is none, and number words (forty-two, 四十二) are not
    read. The reference may be a number, or a text whose last number counts ("... #### 42"). With several references any
    will do.

    Args:
        tolerance: how far off the answer may be, as a part of the reference: 0.01 is one percent.

    Cost: one pass; a regular expression. What games it: ending with a guess, or with the number that is most often
    right; wrong reasoning costs nothing. A text that goes on after its answer may lose it to a later number, which
    teaches to end. Source: the usual scoring of GSM8K (Cobbe et al., "Training Verifiers to Solve Math Word Problems",
    2021), which reads the number behind "####".
    """

    name = "numeric_answer"
    compares = "number that can be read"

    def __init__(self, reference: str = "answer", tolerance: float = 0.0, change: bool = False) -> None:
        """Raises UserError where ``tolerance`` is no number from 0."""
        if not finite(tolerance, 0.0):
            raise UserError(f"NumericAnswer: tolerance={tolerance!r} must be a number from 0")
        self.tolerance = Fraction(tolerance)
        super().__init__(reference, change)

    def as_text(self, value: Any) -> str | None:
        """A reference may be a number."""
        return str(value) if finite(value, float("-inf")) else super().as_text(value)

    def prepare(self, references: tuple[str, ...]) -> Callable[[], Running] | None:
        """See ``Metric.prepare``."""
        values = []
        for reference in references:
            stream = _numbers()
            found = [*stream.push(reference), *stream.tail()]
            value = _value(found[-1]) if found else None
            if value is None:
                return None
            values.append(value)
        allowed = [(value - self.tolerance * abs(value), value + self.tolerance * abs(value)) for value in values]

        @lru_cache(maxsize=64)
        def right(number: str) -> float:
            value = _value(number)
            return float(value is not None and any(low <= value <= high for low, high in allowed))

        return lambda: _LastNumber(_numbers(), right)


class _LastNumber:
    """Whether the last number so far is right."""

    __slots__ = ("_last", "_right", "_stream")

    def __init__(self, stream: Stream, right: Callable[[str], float]) -> None:
        self._stream, self._right = stream, right
        self._last: str | None = None

    def add(self, piece: str) -> float:
        certain = self._stream.push(piece)
        self._last = certain[-1] if certain else self._last
        growing = self._stream.tail()
        number = growing[-1] if growing else self._last
        return 0.0 if number is None else self._right(number)


def _numbers() -> Matched:
    return Matched(_WORD, lambda word: [match[0] for match in _NUMBER.finditer(word)])


def _value(number: str) -> Fraction | None:
    """The number's exact value; None where it divides by 0 or has more digits than anyone means."""
    match = _NUMBER.fullmatch(number)
    if match is None or len(number) > _LONGEST:
        return None
    value = Fraction(Decimal(match["whole"].replace(",", "") + (match["part"] or "")))
    if match["power"]:
        value *= Fraction(10) ** int(match["power"])
    if match["below"]:
        if not int(match["below"]):
            return None
        value /= int(match["below"])
    return value if match["sign"] in (None, "+") else -value


class MathAnswer(Metric):
    """Whether math-verify finds the text's answer equal to the reference, as mathematics: 1 or 0.

    Formulas, sets, intervals, fractions and numbers, in LaTeX or plain. A reference is taken as a formula unless it
    marks one itself ($, \\boxed, \\(, \\[ or ####). With several references any will do.

    Cost: the package reads the whole text anew at each piece, 1 ms for 300 characters and 17 ms for 10,000: use it at
    the end, or by sentence. It limits each call to 5 seconds with a signal, which only the main thread may; in other
    threads there is **no limit**, and a tower of powers in the text can hang the run: keep it on the main thread, or in
    a process that is limited. What games it: see ``NumericAnswer``; several formulas in one text are tried in turn.
    Source: the package math-verify of Hugging Face. Raises UserError where it is missing.
    """

    name = "math_answer"
    compares = "answer that math-verify can read"

    def __init__(self, reference: str = "answer", change: bool = False) -> None:
        """Raises UserError where math-verify is missing."""
        self._library()
        super().__init__(reference, change)

    def as_text(self, value: Any) -> str | None:
        """A reference may be a number."""
        return str(value) if finite(value, float("-inf")) else super().as_text(value)

    def prepare(self, references: tuple[str, ...]) -> Callable[[], Running] | None:
        """See ``Metric.prepare``."""
        golden = [self._golden(reference) for reference in references]
        return (lambda: _Read(self, golden)) if all(golden) else None

    def right(self, golden: Sequence[Any], text: str) -> float:
        """1 where the text's answer equals one of the parsed references."""
        library, seconds = self._library(), _seconds()
        found = library.parse(text, parsing_timeout=seconds)
        return float(bool(found) and any(library.verify(one, found, timeout_seconds=seconds) for one in golden))

    def _golden(self, reference: str) -> Any:
        parse, seconds = self._library().parse, _seconds()
        marked = any(mark in reference for mark in _FORMULA_MARKS)
        found = [] if marked else parse(f"${reference}$", parsing_timeout=seconds)
        return found or parse(reference, parsing_timeout=seconds)

    @staticmethod
    def _library() -> Any:
        try:
            import math_verify
        except ImportError as error:
            raise UserError(
                "mathematical answers are read by the package math-verify: run `pip install instant-reward[metrics]`."
            ) from error
        return math_verify


class _Read:
    """The text so far, read anew at each piece."""

    __slots__ = ("_golden", "_metric", "_score", "_text")

    def __init__(self, metric: MathAnswer, golden: Sequence[Any]) -> None:
        self._metric, self._golden = metric, golden
        self._text = ""
        self._score = 0.0

    def add(self, piece: str) -> float:
        if piece:
            self._text += piece
            self._score = self._metric.right(self._golden, self._text)
        return self._score


def _seconds() -> int | None:
    """math-verify's time limits are signals, which only the main thread can set."""
    return _SECONDS if threading.current_thread() is threading.main_thread() else None
