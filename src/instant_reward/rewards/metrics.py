"""Metrics against a reference, scored at every piece for the cost of one pass over the text.

    rewards:
      - use: instant_reward.rewards.metrics:Rouge
        args: {kind: L, reference: summary}
      - use: instant_reward.rewards.metrics:Chrf
        args: {reference: translation, change: true}
        every: word

Every score lies between 0 and 1 and is that of the text so far, whose last word may be unfinished: what the metric
would say if the text ended there. A column with a list holds several references.
"""

from __future__ import annotations

from collections.abc import Callable

from instant_reward.rewards.answers import MathAnswer as MathAnswer
from instant_reward.rewards.answers import NumericAnswer as NumericAnswer
from instant_reward.rewards.bleu import Bleu as Bleu
from instant_reward.rewards.chrf import Chrf as Chrf
from instant_reward.rewards.growing import KINDS, check_kind, stream_of
from instant_reward.rewards.reference import Compared, Found, Metric, Running, cut, harmonic
from instant_reward.rewards.rouge import Rouge as Rouge
from instant_reward.rewards.tallies import Codes, Distance, Overlap, Sameness, ngram_counts, positions


class ExactMatch(Metric):
    """Whether the text is the reference (any of them): 1 or 0.

    ``tokens`` says what is compared: "answer" is SQuAD's form (no case, punctuation, articles or extra white space),
    "text" every character but for white space around the text, "auto" words and "characters" visible characters,
    both without case.

    Cost: one pass. It is 1 only while the text is complete, so with ``change`` it pays 1 at the last right word and
    takes it back if anything follows. What games it: nothing but knowing the answer; it is too rare a signal for long
    texts. Source: Rajpurkar et al., "SQuAD: 100,000+ Questions for Machine Comprehension of Text" (2016).
    """

    name = "exact_match"

    def __init__(self, reference: str = "reference", tokens: str = "answer", change: bool = False) -> None:
        """Raises UserError where ``tokens`` is none of those."""
        self.tokens = check_kind(tokens, KINDS, "ExactMatch")
        super().__init__(reference, change)

    def prepare(self, references: tuple[str, ...]) -> Callable[[], Running] | None:
        """See ``Metric.prepare``."""
        found = cut(references, self.tokens)
        if found is None:
            return None
        codes = Codes(found)
        coded = [codes(tokens) for tokens in found]

        def rate(found: Found) -> float:
            return float(any(same for _, (same,) in found))

        return lambda: Compared(stream_of(self.tokens), codes, [Sameness(one) for one in coded], rate)


class TokenF1(Metric):
    """The F-score of the words that text and reference share, in any order: SQuAD's F1. In [0, 1].

    ``tokens`` as for ``ExactMatch``; the default "answer" is SQuAD's form of answers, with every character of Chinese,
    Japanese or Thai a word. Of several references the best one counts, as there.

    Cost: one pass, one look-up a word. What games it: the reference's words in any order; repeating one earns nothing.
    Source: Rajpurkar et al., "SQuAD: 100,000+ Questions for Machine Comprehension of Text" (2016).
    """

    name = "token_f1"

    def __init__(self, reference: str = "reference", tokens: str = "answer", change: bool = False) -> None:
        """Raises UserError where ``tokens`` is none of those."""
        self.tokens = check_kind(tokens, KINDS, "TokenF1")
        super().__init__(reference, change)

    def prepare(self, references: tuple[str, ...]) -> Callable[[], Running] | None:
        """See ``Metric.prepare``."""
        found = cut(references, self.tokens)
        if found is None:
            return None
        codes = Codes(found)
        limits = [ngram_counts(codes(tokens), 1) for tokens in found]
        wholes = [len(tokens) for tokens in found]

        def rate(found: Found) -> float:
            pairs = zip(found, wholes, strict=True)
            return max(harmonic(hits / max(1, length), hits / whole) for (length, (hits,)), whole in pairs)

        return lambda: Compared(stream_of(self.tokens), codes, [Overlap(limit, 1) for limit in limits], rate)


class EditSimilarity(Metric):
    """1 less the edits (insert, delete, replace) from text to reference, over the length of the longer. In [0, 1].

    ``tokens``: "text" (the default) edits single characters as they are, white space around the text aside; "auto" and
    the others of ``ExactMatch`` edit those tokens ("auto": like a word error rate). Of several references the best
    one counts.

    Cost: one pass with a few operations on integers with a bit for each token of the reference. What games it: any
    text of about the right length and alphabet scores 0.2 or so; a shift by one word costs two edits, however much is
    right after it. Source: Levenshtein (1966); computed after Myers (1999).
    """

    name = "edit_similarity"
    compares = "characters or words"

    def __init__(self, reference: str = "reference", tokens: str = "text", change: bool = False) -> None:
        """Raises UserError where ``tokens`` is none of those."""
        self.tokens = check_kind(tokens, KINDS, "EditSimilarity")
        super().__init__(reference, change)

    def prepare(self, references: tuple[str, ...]) -> Callable[[], Running] | None:
        """See ``Metric.prepare``."""
        found = cut(references, self.tokens)
        if found is None:
            return None
        codes = Codes(found)
        sized = [(positions(codes(tokens)), len(tokens)) for tokens in found]

        def rate(found: Found) -> float:
            pairs = zip(found, sized, strict=True)
            return max(1.0 - edits / max(length, whole) for (length, (edits,)), (_, whole) in pairs)

        return lambda: Compared(stream_of(self.tokens), codes, [Distance(mask, size) for mask, size in sized], rate)
