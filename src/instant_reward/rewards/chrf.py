"""chrF and chrF++, for a text that is still being written."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from instant_reward.rewards.growing import punctuated_words, tokens_of
from instant_reward.rewards.reference import Compared, Metric, Running, finite, harmonic
from instant_reward.rewards.tallies import Codes, Overlap, Tally, ngram_counts
from instant_reward.types import UserError


class Chrf(Metric):
    """chrF: how many sequences of 1 to ``order`` characters text and reference share, white space aside. In [0, 1].

    The F-score (recall counts ``beta`` times as much) of precision and recall averaged over the orders. With
    ``words=2`` sequences of 1 and 2 words count as well: chrF++. One hundredth of sacrebleu's sentence chrF, letters
    as they are. Works for any script as it is. Of several references the best one counts, as there.

    Cost: one pass; at most ``order`` look-ups a character. What games it: with beta 2 recall weighs four times
    precision, so longer texts of common letter sequences pay; a half-written word already earns, which makes it a
    smooth reward for ``change`` at every token. Source: Popović, "chrF: character n-gram F-score for automatic MT
    evaluation" (2015) and "chrF++: words helping character n-grams" (2017).
    """

    name = "chrf"
    compares = "characters"

    def __init__(
        self,
        reference: str = "reference",
        order: int = 6,
        words: int = 0,
        beta: float = 2.0,
        change: bool = False,
    ) -> None:
        """Raises UserError where an argument cannot be used."""
        if type(order) is not int or type(words) is not int or not 1 <= order <= 20 or not 0 <= words <= 9:
            raise UserError(
                f"Chrf: order={order!r}, words={words!r} must be whole numbers from 1 to 20 and from 0 to 9"
            )
        if not finite(beta, 0.0):
            raise UserError(f"Chrf: beta={beta!r} must be a number from 0")
        self.order = order
        self.words = words
        self.beta = float(beta)
        super().__init__(reference, change)

    def prepare(self, references: tuple[str, ...]) -> Callable[[], Running] | None:
        """See ``Metric.prepare``."""
        letters = ["".join(reference.split()) for reference in references]
        words = [tokens_of(punctuated_words(), reference) for reference in references]
        codes = Codes(words)
        coded = [codes(one) for one in words]
        letter_limits = [ngram_counts(one, self.order) for one in letters]
        word_limits = [ngram_counts(one, self.words) for one in coded]
        sizes = [(len(one), len(other)) for one, other in zip(letters, coded, strict=True)]

        def begin() -> Running:
            tallies = [Overlap(limit, self.order) for limit in letter_limits]
            worded = None
            if self.words:
                by_word: list[Tally] = [Overlap(limit, self.words) for limit in word_limits]
                worded = Compared(punctuated_words(), codes, by_word, lambda found: 0.0)
            return _Letters(tallies, worded, sizes, self.beta)

        return begin


class _Letters:
    """A running chrF: letters are certain as soon as they are there; words, where they count, may still grow."""

    __slots__ = ("_beta", "_sizes", "_tallies", "_words")

    def __init__(
        self, tallies: Sequence[Overlap], words: Compared | None, sizes: Sequence[tuple[int, int]], beta: float
    ) -> None:
        self._tallies, self._words, self._sizes, self._beta = tallies, words, sizes, beta

    def add(self, piece: str) -> float:
        letters = "".join(piece.split())
        worded = self._words.compare(piece) if self._words else None
        best = 0.0
        for index, (tally, (letters_there, words_there)) in enumerate(zip(self._tallies, self._sizes, strict=True)):
            tally.push(letters)
            rows = [(letters_there, *tally.peek(""))]
            if worded is not None:
                rows.append((words_there, *worded[index]))
            best = max(best, self._rate(rows))
        return best

    def _rate(self, rows: Sequence[tuple[int, int, Sequence[int]]]) -> float:
        """The F-score over all orders that both sides are long enough for."""
        precision = recall = 0.0
        orders = 0
        for there, here, matched in rows:
            for shorter in range(min(len(matched), there, here)):
                precision += matched[shorter] / (here - shorter)
                recall += matched[shorter] / (there - shorter)
                orders += 1
        return harmonic(precision / orders, recall / orders, self._beta) if orders else 0.0
