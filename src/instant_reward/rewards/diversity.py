"""How rich the words of a text are: distinct n-grams, types per token, MTLD."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Iterable, Sequence

from instant_reward.rewards.growing import Stream, check_kind, stream_of
from instant_reward.rewards.reference import Growing, Running, finite
from instant_reward.types import Prompt, UserError, View

_KINDS = ("auto", "characters")


class RunningScore(ABC):
    """What these rewards share: a score of the text so far, which reads every character once.

    Args:
        change: pays ``score(now) - score(before)`` at each piece, so that a text is paid its score less that of the
            empty text, 0. Otherwise each piece is paid the score of the text so far.

    Attributes:
        every: "end", and "word" with ``change``, unless the config says otherwise.
    """

    name: str = "running_score"
    stops = False

    def __init__(self, change: bool = False) -> None:
        if not isinstance(change, bool):
            raise UserError(f"{type(self).__name__}: change={change!r} must be true or false")
        self.change = change
        self.every = "word" if change else "end"

    @abstractmethod
    def begin(self) -> Running:
        """A running score of a new text; 0 for an empty one."""

    def start(self, prompt: Prompt) -> Growing:
        """The state of a text that has just begun."""
        return Growing(self.begin(), 0, 0.0)

    def extend(self, state: Growing, view: View) -> float:
        """The score of the text up to this piece; with ``change``, how much it rose since the last one."""
        before, state.score = state.score, state.running.add(view.text[state.read :])
        state.read = len(view.text)
        return state.score - before if self.change else state.score

    def score(self, text: str) -> float:
        """The score of one finished text."""
        return self.begin().add(text)


class Distinct(RunningScore):
    """Distinct-n: the share of the text's n-grams that are different ones. In [0, 1]; 0 where there is none.

    ``n`` is the number of words in a row. ``tokens``: "auto" (words of any script; each character of Chinese, Japanese
    or Thai is one) or "characters".

    Cost: one pass, one look-up a word. What games it: short texts (one n-gram is always distinct, and the share falls
    with the length of any honest text) and word salad; give it a length beside it, and something that reads sense.
    Source: Li et al., "A Diversity-Promoting Objective Function for Neural Conversation Models" (2016).
    """

    name = "distinct"

    def __init__(self, n: int = 2, tokens: str = "auto", change: bool = False) -> None:
        """Raises UserError where an argument is none of those."""
        self.n = whole(n, 1, "Distinct: n")
        self.tokens = check_kind(tokens, _KINDS, "Distinct")
        super().__init__(change)

    def begin(self) -> Running:
        """See ``RunningScore.begin``."""
        return _Grams(stream_of(self.tokens), self.n)


class TypeTokenRatio(RunningScore):
    """Different words per word, as a mean over all windows of ``window`` words in a row. In [0, 1]; 0 without words.

    The mean over windows does not hang on the text's length as the plain ratio does; a text shorter than the window has
    its plain ratio, and so has every text with ``window=None``. ``tokens`` as for ``Distinct``.

    Cost: one pass, a few look-ups a word. What games it: short texts, lists of rare words; a window catches no
    repetition that is farther away than its width. In Chinese it counts characters, whose ratio is lower than that of
    words. Source: Covington and McFall, "Cutting the Gordian Knot: The Moving-Average Type-Token Ratio" (2010).
    """

    name = "type_token"

    def __init__(self, window: int | None = 50, tokens: str = "auto", change: bool = False) -> None:
        """Raises UserError where an argument is none of those."""
        self.window = None if window is None else whole(window, 2, "TypeTokenRatio: window")
        self.tokens = check_kind(tokens, _KINDS, "TypeTokenRatio")
        super().__init__(change)

    def begin(self) -> Running:
        """See ``RunningScore.begin``."""
        return (
            _Grams(stream_of(self.tokens), 1) if self.window is None else _Window(stream_of(self.tokens), self.window)
        )


class Mtld(RunningScore):
    """How many words the text keeps its type-token ratio above 0.72 for, on average, over ``ceiling``. In [0, 1].

    The measure of textual lexical diversity: words are read until the ratio of different ones has fallen to
    ``threshold``, then counting begins anew; the length over the number of such stretches (the last one in part) is
    taken forwards and backwards and averaged. English prose has 50 to 120. The reward is that over ``ceiling``, at
    most 1; a text without any repeated word counts as ``ceiling``, an empty one as 0. ``tokens`` as for ``Distinct``.

    Cost: two passes over the words at each piece, since reading backwards begins at the newest word. What games it:
    rare words in any order; texts below 100 words have a coarse value, and very short ones without repetition get 1.
    Source: McCarthy and Jarvis, "MTLD, vocd-D, and HD-D: A validation study" (2010).
    """

    name = "mtld"

    def __init__(
        self, threshold: float = 0.72, ceiling: float = 100.0, tokens: str = "auto", change: bool = False
    ) -> None:
        """Raises UserError where an argument is none of those."""
        if not (finite(threshold, 0.0) and 0.0 < threshold < 1.0):
            raise UserError(f"Mtld: threshold={threshold!r} must be a number between 0 and 1")
        if not (finite(ceiling, 0.0) and ceiling > 0.0):
            raise UserError(f"Mtld: ceiling={ceiling!r} must be a number above 0")
        self.threshold = float(threshold)
        self.ceiling = float(ceiling)
        self.tokens = check_kind(tokens, _KINDS, "Mtld")
        super().__init__(change)

    def begin(self) -> Running:
        """See ``RunningScore.begin``."""
        return _Stretches(stream_of(self.tokens), self.threshold, self.ceiling)


class _Grams:
    """The share of n-grams that are different ones, of a growing text."""

    def __init__(self, stream: Stream, size: int) -> None:
        self._stream, self._size = stream, size
        self._last: tuple[str, ...] = ()  # fewer words than an n-gram has
        self._seen: set[tuple[str, ...]] = set()
        self._total = 0

    def add(self, piece: str) -> float:
        grams = self._cut(self._stream.push(piece), keep=True)
        self._seen.update(grams)
        self._total += len(grams)
        tail = self._cut(self._stream.tail(), keep=False)
        total = self._total + len(tail)
        return (len(self._seen) + len(set(tail) - self._seen)) / total if total else 0.0

    def _cut(self, tokens: Sequence[str], keep: bool) -> list[tuple[str, ...]]:
        """The n-grams that end with these tokens; with ``keep`` they are in the text for good."""
        row = (*self._last, *tokens)
        if keep:
            self._last = row[max(0, len(row) - self._size + 1) :]
        return [row[start : start + self._size] for start in range(len(row) - self._size + 1)]


class _Window:
    """The mean ratio of different tokens over all windows of one width, of a growing text."""

    def __init__(self, stream: Stream, width: int) -> None:
        self._stream, self._width = stream, width
        self._tokens: deque[str] = deque()  # the newest window
        self._counts: dict[str, int] = {}
        self._windows = 0
        self._types = 0  # summed over the full windows

    def add(self, piece: str) -> float:
        for token in self._stream.push(piece):
            types = self._types_with(token)
            self._enter(token)
            if len(self._tokens) == self._width:
                self._windows += 1
                self._types += types
        tail = self._stream.tail()  # one token at most
        size = min(self._width, len(self._tokens) + len(tail))
        types = self._types_with(tail[0]) if tail else len(self._counts)
        if size < self._width:
            return types / size if size else 0.0
        added = len(tail)
        return (self._types + types * added) / ((self._windows + added) * self._width)

    def _types_with(self, token: str) -> int:
        """How many different tokens the newest window has once this one has entered it."""
        types = len(self._counts) + (token not in self._counts)
        if len(self._tokens) == self._width:
            leaving = self._tokens[0]
            types -= leaving != token and self._counts[leaving] == 1
        return types

    def _enter(self, token: str) -> None:
        self._counts[token] = self._counts.get(token, 0) + 1
        self._tokens.append(token)
        if len(self._tokens) > self._width:
            leaving = self._tokens.popleft()
            self._counts[leaving] -= 1
            if not self._counts[leaving]:
                del self._counts[leaving]


class _Stretches:
    """MTLD over its ceiling, of a growing text."""

    def __init__(self, stream: Stream, threshold: float, ceiling: float) -> None:
        self._stream, self._threshold, self._ceiling = stream, threshold, ceiling
        self._tokens: list[str] = []

    def add(self, piece: str) -> float:
        self._tokens.extend(self._stream.push(piece))
        tokens = [*self._tokens, *self._stream.tail()]
        if not tokens:
            return 0.0
        forwards, backwards = self._count(tokens), self._count(reversed(tokens))
        if not forwards or not backwards:  # one is 0 only where the other is: no word is repeated
            return 1.0
        return min(1.0, len(tokens) * (1.0 / forwards + 1.0 / backwards) / 2.0 / self._ceiling)

    def _count(self, tokens: Iterable[str]) -> float:
        """How many stretches the tokens make, the last one in part; 0 where no token is repeated."""
        stretches, length = 0.0, 0
        seen: set[str] = set()
        for token in tokens:
            seen.add(token)
            length += 1
            if len(seen) <= self._threshold * length:
                stretches, length = stretches + 1.0, 0
                seen.clear()
        if length:
            stretches += (1.0 - len(seen) / length) / (1.0 - self._threshold)
        return stretches


def whole(value: object, least: int, what: str) -> int:
    """A whole number of at least ``least``; UserError otherwise."""
    if type(value) is int and value >= least:
        return value
    raise UserError(f"{what}={value!r} must be a whole number from {least}")
