"""Repetition: of word sequences within a text, and of what its siblings say."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from instant_reward.rewards.diversity import whole
from instant_reward.rewards.growing import SACREBLEU, _pattern, check_kind, sacrebleu_kind
from instant_reward.rewards.reference import finite
from instant_reward.types import Prompt, Span, UserError, View


@dataclass
class _Told:
    """The state of one text: the n-grams in it, its last words with their first characters, and how far it was read."""

    seen: set[tuple[str, ...]]
    last: deque[tuple[str, int]]
    read: int = 0
    marked: int = 0  # the characters before this one are no part of a later mark


class Repetition:
    """A penalty on the characters of every n-gram of words that stood in the text before. In (-inf, 0].

    Each time a word completes ``n`` words in a row that the text already had, ``-penalty`` is given to their
    characters, less those that were marked before: of a long passage that comes again, each further word is marked
    once. ``tokens``: "auto" compares words without case, each character of a script without spaces (Chinese, Japanese,
    Thai) being one; "characters" compares visible characters. With ``prompt``, what stands in the prompt counts as said
    before, too. Pieces must not cut words: "word" (the default), "sentence", "line" or "end".

    Cost: one pass, one look-up a word. What games it: a synonym or a swapped word in every n-gram, and short texts,
    since it never pays anything; names and set phrases of n words are marked as well. n = 3 or 4 for English, 5 or more
    for Chinese. Source: the n-gram blocking of Paulus et al., "A Deep Reinforced Model for Abstractive Summarization"
    (2017), as a penalty.
    """

    name = "repetition"
    stops = False
    every = "word"

    def __init__(self, n: int = 3, penalty: float = 1.0, tokens: str = "auto", prompt: bool = False) -> None:
        """Raises UserError where an argument is none of those."""
        self.n = whole(n, 1, "Repetition: n")
        self.penalty = positive(penalty, "Repetition: penalty")
        self.tokens = check_kind(tokens, ("auto", "characters"), "Repetition")
        if not isinstance(prompt, bool):
            raise UserError(f"Repetition: prompt={prompt!r} must be true or false")
        self.prompt = prompt

    def start(self, prompt: Prompt) -> _Told:
        """The state of a text that has just begun."""
        said = _Told(set(), deque(maxlen=self.n))
        if self.prompt:
            self._repeats(said, prompt.text)
        return _Told(said.seen, deque(maxlen=self.n))

    def extend(self, state: _Told, view: View) -> list[Span]:
        """A negative span for each word that completes an n-gram once more."""
        return [view.span(-self.penalty, start, end) for start, end in self._repeats(state, view.text)]

    def _repeats(self, state: _Told, text: str) -> list[tuple[int, int]]:
        found = []
        for match in _pattern(self.tokens).finditer(text, state.read):
            state.last.append((match[0].casefold(), match.start()))
            if len(state.last) < self.n:
                continue
            gram = tuple(word for word, _ in state.last)
            if gram in state.seen:
                found.append((next(start for _, start in state.last if start >= state.marked), match.end()))
                state.marked = match.end()
            state.seen.add(gram)
        state.read = len(text)
        return found


class SelfBleu:
    """How much of a text its siblings (the other texts of the same prompt) say too, as a penalty. In [-1, 0].

    Minus sacrebleu's sentence BLEU (with its effective order, over 100) of each text against all its siblings as
    references: -1 for a text that one of them repeats word by word, 0 where they share no words, or where there is no
    sibling. ``order`` is the longest n-gram; ``tokens`` is sacrebleu's tokenizer ("13a", "zh", "intl", "char", "none"),
    and "auto" is "zh" where a text has Chinese, "char" where it has kana, Thai or a related script, else "13a".

    Cost: for each group of G texts, G sentence BLEUs against G - 1 references, some 0.2 milliseconds for each pair of
    short texts. Needs the package sacrebleu. What games it: nonsense is unlike anything; a group can agree to differ in
    single words. It looks at siblings, so leave-one-out baselines are not unbiased for it.
    Source: Zhu et al., "Texygen: A Benchmarking Platform for Text Generation Models" (2018).
    """

    name = "self_bleu"
    stops = False
    scope = "group"
    batched = True

    def __init__(self, order: int = 4, tokens: str = "auto") -> None:
        """Raises UserError where an argument is none of those, or sacrebleu is missing."""
        self.order = whole(order, 1, "SelfBleu: order")
        self.tokens = check_kind(tokens, ("auto", *SACREBLEU), "SelfBleu")
        _sacrebleu("13a", self.order)

    def __call__(self, views: Sequence[View]) -> list[float]:
        """One value for each of the siblings' final views."""
        texts = [view.text for view in views]
        if len(texts) < 2:
            return [0.0] * len(texts)
        bleu = _sacrebleu(sacrebleu_kind(texts) if self.tokens == "auto" else self.tokens, self.order)
        scores = [
            bleu.sentence_score(text, texts[:place] + texts[place + 1 :]).score for place, text in enumerate(texts)
        ]
        return [max(-1.0, 0.0 - score / 100.0) for score in scores]  # rounding may exceed 100


def positive(value: Any, what: str) -> float:
    """A finite number above 0; UserError otherwise."""
    if finite(value, 0.0) and value > 0.0:
        return float(value)
    raise UserError(f"{what}={value!r} must be a number above 0")


def _sacrebleu(tokens: str, order: int) -> Any:
    try:
        from sacrebleu.metrics.bleu import BLEU
    except ImportError as error:
        message = "self-BLEU needs the package sacrebleu; run: pip install 'instant-reward[metrics]'"
        raise UserError(message) from error
    return BLEU(tokenize=tokens, effective_order=True, max_ngram_order=order)
