"""What a growing sequence has in common with a reference, kept up to date token by token.

Tokens are single characters here: ``Codes`` gives every token of the references one, so that n-grams are slices of a
string. Each tally can also say how it would stand with some more tokens (``peek``), without keeping them.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Protocol

UNKNOWN = "\U0010ffff"  # any token that no reference has


class Codes:
    """One character for every token of some references."""

    def __init__(self, references: Iterable[Iterable[str]]) -> None:
        tokens = dict.fromkeys(token for reference in references for token in reference)
        self._code = {token: chr(number) for number, token in enumerate(tokens)}

    def __call__(self, tokens: Iterable[str]) -> str:
        """The tokens as a string of as many characters."""
        return "".join([self._code.get(token, UNKNOWN) for token in tokens])


class Tally(Protocol):
    """A comparison of one growing sequence with one reference (or with several, pooled)."""

    def push(self, codes: str) -> None:
        """Adds tokens for good."""

    def peek(self, codes: str) -> tuple[int, Sequence[int]]:
        """The length and the numbers of this comparison as they would be with these tokens added."""


def ngram_counts(codes: str, order: int) -> dict[str, int]:
    """How often each n-gram of 1 to ``order`` tokens occurs."""
    counts: dict[str, int] = {}
    for size in range(1, order + 1):
        for start in range(len(codes) - size + 1):
            gram = codes[start : start + size]
            counts[gram] = counts.get(gram, 0) + 1
    return counts


class Overlap:
    """How many n-grams of each order are in the reference too, each counted at most as often as it is there.

    Its numbers are the matches of order 1, 2, ... Cost: for each token one look-up and one more for each n-gram that
    ends with it and is in the reference.
    """

    __slots__ = ("_length", "_limit", "_matched", "_order", "_used", "_window")

    def __init__(self, limit: dict[str, int], order: int) -> None:
        self._limit = limit
        self._order = order
        self._used: dict[str, int] = {}
        self._matched = [0] * order
        self._window = ""
        self._length = 0

    def push(self, codes: str) -> None:
        self._count(codes)
        self._length += len(codes)

    def peek(self, codes: str) -> tuple[int, Sequence[int]]:
        if not codes:
            return self._length, self._matched
        window, matched = self._window, self._matched
        self._matched = matched[:]
        counted = self._count(codes)
        then = self._matched
        self._window, self._matched = window, matched
        for gram in counted:
            self._used[gram] -= 1
        return self._length + len(codes), then

    def _count(self, codes: str) -> list[str]:
        """Adds tokens; returns the n-grams that were counted."""
        limit, used, matched, order = self._limit, self._used, self._matched, self._order
        window, counted = self._window, []
        for code in codes:
            window = window[1 - order :] + code if order > 1 else code
            for size in range(1, len(window) + 1):
                gram = window[-size:]
                most = limit.get(gram)
                if most is None:
                    break  # a longer one that ends alike is in no reference either
                times = used.get(gram, 0)
                if times < most:
                    used[gram] = times + 1
                    matched[size - 1] += 1
                    counted.append(gram)
        self._window = window
        return counted


def positions(codes: str) -> dict[str, int]:
    """For each token the places where it stands, as the bits of a number."""
    masks: dict[str, int] = {}
    for place, code in enumerate(codes):
        masks[code] = masks.get(code, 0) | 1 << place
    return masks


class Subsequence:
    """The length of the longest common subsequence: its one number.

    Bit-parallel, after Hyyrö, "Bit-parallel LCS-length computation revisited" (2004): a row of the table is one integer
    whose zeros are the places where the length grows. Cost: a few operations on as many bits as the reference has
    tokens, for each token.
    """

    __slots__ = ("_full", "_length", "_masks", "_row", "_size")

    def __init__(self, masks: dict[str, int], size: int) -> None:
        self._masks = masks
        self._size = size
        self._full = (1 << size) - 1
        self._row = self._full
        self._length = 0

    def push(self, codes: str) -> None:
        self._row = self._after(codes)
        self._length += len(codes)

    def peek(self, codes: str) -> tuple[int, Sequence[int]]:
        return self._length + len(codes), (self._size - self._after(codes).bit_count(),)

    def _after(self, codes: str) -> int:
        row, masks = self._row, self._masks
        for code in codes:
            mask = masks.get(code)
            if mask is not None:
                common = row & mask
                row = ((row + common) | (row - common)) & self._full
        return row


class Distance:
    """The number of tokens to insert, delete or replace (Levenshtein): its one number.

    Bit-parallel, after Myers, "A fast bit-vector algorithm for approximate string matching based on dynamic
    programming" (1999), in the form of Hyyrö (2003) that compares whole sequences: a column of the table is kept as the
    places where it goes up and where it goes down. Cost as for ``Subsequence``.
    """

    __slots__ = ("_column", "_full", "_high", "_length", "_masks")

    def __init__(self, masks: dict[str, int], size: int) -> None:
        self._masks = masks
        self._full = (1 << size) - 1
        self._high = 1 << (size - 1)
        self._column = (self._full, 0, size)  # up, down, and the value at the foot
        self._length = 0

    def push(self, codes: str) -> None:
        self._column = self._after(codes)
        self._length += len(codes)

    def peek(self, codes: str) -> tuple[int, Sequence[int]]:
        return self._length + len(codes), (self._after(codes)[2],)

    def _after(self, codes: str) -> tuple[int, int, int]:
        full, high, masks = self._full, self._high, self._masks
        up, down, foot = self._column
        for code in codes:
            equal = masks.get(code, 0)
            diagonal = ((((equal & up) + up) ^ up) | equal | down) & full
            right_up = (down | ~(diagonal | up)) & full
            right_down = up & diagonal
            if right_up & high:
                foot += 1
            elif right_down & high:
                foot -= 1
            right_up = (right_up << 1 | 1) & full
            right_down = right_down << 1 & full
            up = (right_down | ~(diagonal | right_up)) & full
            down = right_up & diagonal
        return up, down, foot


class Sameness:
    """Whether the sequence is the reference: its one number, 1 or 0."""

    __slots__ = ("_length", "_reference", "_same")

    def __init__(self, reference: str) -> None:
        self._reference = reference
        self._same = True
        self._length = 0

    def push(self, codes: str) -> None:
        self._same = self._same and self._reference.startswith(codes, self._length)
        self._length += len(codes)

    def peek(self, codes: str) -> tuple[int, Sequence[int]]:
        length = self._length + len(codes)
        same = self._same and length == len(self._reference) and self._reference.endswith(codes)
        return length, (int(same),)
