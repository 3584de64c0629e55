"""BLEU, for a text that is still being written."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

from instant_reward.rewards.growing import SACREBLEU, SacreBleu, check_kind, sacrebleu_kind, tokens_of
from instant_reward.rewards.reference import Compared, Found, Metric, Running, finite
from instant_reward.rewards.tallies import Codes, Overlap, ngram_counts
from instant_reward.types import UserError

_SMOOTHING = {"exp": 0.0, "floor": 0.1, "add-k": 1.0, "none": 0.0}  # and the value where none is given


class Bleu(Metric):
    """BLEU of one text: how many of its word sequences, of 1 to ``order`` words, stand in a reference. In [0, 1].

    The geometric mean of the precisions, each n-gram counted at most as often as the reference has it, times a penalty
    for a text shorter than the reference. One hundredth of sacrebleu's sentence BLEU with its effective order (a text
    of two words is judged by one and two words), letters as they are. ``smoothing`` is what an order without a match
    counts: "exp" (halved for each such order: sacrebleu's default), "floor" and "add-k" (``smooth_value``, 0.1 and 1
    where it is not given) or "none" (then the score is 0). ``tokens`` is the tokenizer: "13a" (sacrebleu's default),
    "zh", "intl", "char" or "none"; "auto" is "zh" where a reference has Chinese, "char" where it has kana, Thai or a
    related script, and "13a" otherwise. Several references are pooled as there: an n-gram counts as often as the one
    that has it most, and the length is compared with the nearest (of two, the shorter).

    Cost: one pass over the text; a word that is still growing is cut anew at each piece (a "word" of n characters
    without any white space, shown character by character, costs n passes over it). Needs the package sacrebleu.
    What games it: short texts of very likely pairs of words, since recall is only a penalty on length; with "exp" a
    single right word scores well above 0; a growing text's score falls while a word is unfinished.
    Source: Papineni et al., "BLEU: a Method for Automatic Evaluation of Machine Translation" (2002); Post, "A Call for
    Clarity in Reporting BLEU Scores" (2018); smoothing: Chen and Cherry (2014).
    """

    name = "bleu"

    def __init__(
        self,
        reference: str = "reference",
        tokens: str = "auto",
        order: int = 4,
        smoothing: str = "exp",
        smooth_value: float | None = None,
        change: bool = False,
    ) -> None:
        """Raises UserError where an argument is none of those, or sacrebleu is missing."""
        self.tokens = check_kind(tokens, ("auto", *SACREBLEU), "Bleu")
        if type(order) is not int or not 1 <= order <= 9:
            raise UserError(f"Bleu: order={order!r} must be a whole number from 1 to 9")
        if smoothing not in _SMOOTHING:
            raise UserError(f"Bleu: smoothing={smoothing!r} is unknown; use {', '.join(_SMOOTHING)}")
        if smooth_value is not None and not finite(smooth_value, 0.0):
            raise UserError(f"Bleu: smooth_value={smooth_value!r} must be a number from 0")
        self.order = order
        self.smoothing = smoothing
        self.smooth_value = _SMOOTHING[smoothing] if smooth_value is None or smoothing == "none" else smooth_value
        sacrebleu_tokenizer("13a")
        super().__init__(reference, change)

    def prepare(self, references: tuple[str, ...]) -> Callable[[], Running] | None:
        """See ``Metric.prepare``."""
        kind = sacrebleu_kind(references) if self.tokens == "auto" else self.tokens
        tokenizer = sacrebleu_tokenizer(kind)
        found = [tokens_of(SacreBleu(kind, tokenizer), reference) for reference in references]
        if not all(found):
            return None
        codes = Codes(found)
        pooled, *others = [ngram_counts(codes(tokens), self.order) for tokens in found]
        for other in others:
            for gram, count in other.items():
                pooled[gram] = max(count, pooled.get(gram, 0))
        lengths = sorted({len(tokens) for tokens in found})

        def rate(found: Found) -> float:
            length, matched = found[0]
            return self._rate(matched, length, min(lengths, key=lambda whole: abs(whole - length)))

        return lambda: Compared(SacreBleu(kind, tokenizer), codes, [Overlap(pooled, self.order)], rate)

    def _rate(self, matched: Sequence[int], length: int, whole: int) -> float:
        """BLEU of these matches in a text of ``length`` tokens against one of ``whole``."""
        if not matched[0]:
            return 0.0
        logs, halved, orders = 0.0, 1.0, 0
        for size, count in enumerate(matched, start=1):
            hits, total = float(count), float(max(0, length - size + 1))
            if self.smoothing == "add-k" and size > 1:
                hits, total = hits + self.smooth_value, total + self.smooth_value
            if not total:
                break
            orders = size
            if not hits:
                halved *= 2.0
                hits = 1.0 / halved if self.smoothing == "exp" else self.smooth_value
                if not hits:
                    return 0.0
            logs += math.log(hits / total)
        return math.exp(logs / orders + min(0.0, 1.0 - whole / length))


@cache
def sacrebleu_tokenizer(kind: str) -> Any:
    """sacrebleu's tokenizer of this name. Raises UserError where the package is missing."""
    try:
        from sacrebleu.metrics.bleu import BLEU
    except ImportError as error:
        raise UserError(
            "BLEU is cut into words by sacrebleu's tokenizers: run `pip install instant-reward[metrics]`."
        ) from error
    return BLEU(tokenize=kind).tokenizer
