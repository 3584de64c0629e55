"""Which language a text is in, how easily it reads, and whether it ends with a full sentence."""

from __future__ import annotations

import copy
import re
from collections.abc import Sequence
from functools import cache, lru_cache
from typing import Any

from instant_reward.rewards.diversity import RunningScore, whole
from instant_reward.rewards.length import bounds, nearness
from instant_reward.rewards.reference import Running
from instant_reward.rewards.repetition import positive
from instant_reward.text import Pieces
from instant_reward.types import UserError

# Those that much is written in. Each further one takes probability from its neighbours: with all 139 that py3langid
# knows, a short English text may as well be Nigerian Pidgin.
AMONG = (
    "ar", "cs", "da", "de", "el", "en", "es", "fa", "fi", "fr", "he", "hi", "hu", "id", "it", "ja", "ko", "nl", "no",
    "pl", "pt", "ro", "ru", "sv", "th", "tr", "uk", "vi", "zh",
)  # fmt: skip
_NO_LANGUAGE = "zxx"  # numbers, code, emoji
_FAMILY = {"zh": ("zh", "yue", "wuu")}  # they share a script, and short texts
_SENTENCES = Pieces("sentence")


class Language:
    """The probability that the text is in a language: ``f(text) -> float`` in [0, 1].

    ``language`` is an ISO 639 code such as "en" or "zh"; ``among`` lists the languages that it is told from (29 that
    much is written in, where it is not given), beside "no language" (numbers, code, emoji). Written Cantonese and Wu
    count as "zh". Only the ``last`` characters are read, so that a change of language shows in a long text, too, and
    scoring every prefix stays cheap (null: all are read). A text with nothing to judge by, the empty one too, scores
    one in all of them: 0.03 (0.09 for the three that count as "zh"). A few words make a probability of 0.9 in English,
    one character in Chinese.

    Cost: some 0.1 to 0.3 milliseconds for each piece that is scored; the model is loaded once, in a second. Needs the
    package py3langid. What games it: a few very typical words; in a mixed text it tells which language prevails, and a
    short passage in another one hardly lowers a high score. Source: Lui and Baldwin, "langid.py: An Off-the-shelf
    Language Identification Tool" (2012), as kept up in py3langid.
    """

    name = "language"
    stops = False

    def __init__(self, language: str = "en", among: Sequence[str] = AMONG, last: int | None = 1000) -> None:
        """Raises UserError where a language is unknown, another argument is none of those, or py3langid is missing."""
        if not isinstance(among, list | tuple) or not among:
            raise UserError(f"Language: among={among!r} must be a list of languages such as [en, zh, fr]")
        known = _model().labels
        for code in (language, *among):
            if code not in known:
                raise UserError(f"Language: {code!r} is unknown; use one of {', '.join(sorted(known))}")
        self.last = None if last is None else whole(last, 1, "Language: last")
        self.language = language
        self.among = tuple(sorted({language, _NO_LANGUAGE, *among}))

    def __call__(self, text: str) -> float:
        """The probability in [0, 1] that the text is in the language."""
        probabilities = dict(_identifier(self.among).rank(text if self.last is None else text[-self.last :]))
        total = sum(probabilities[code] for code in _FAMILY.get(self.language, (self.language,)))
        return min(1.0, float(total))


class Readability(RunningScore):
    """How easily English prose reads: the Flesch reading ease, over 100, or how near it is to a target. In [0, 1].

    The ease is ``206.835 - 1.015 * words per sentence - 84.6 * syllables per word``: 90 reads like talk, 60 like a
    newspaper, 30 like a scholarly article. Without a ``target`` the score is the ease over 100, cut to [0, 1]: the
    easier the better. With one (a number, or the least and the most such as ``[60, 80]``) it is 1 there and falls as
    ``exp(-(distance / edge)**2)``. Syllables are counted by rules of spelling. A text without English words scores 0;
    English only, since the formula's weights are.

    Cost: one pass, and the unfinished sentence anew at each piece. What games it: short words in short sentences,
    whether they make sense or not; a full stop after every word. Source: Flesch, "A New Readability Yardstick" (1948).
    """

    name = "readability"

    def __init__(
        self, target: float | Sequence[float | None] | None = None, edge: float = 15.0, change: bool = False
    ) -> None:
        """Raises UserError where an argument is none of those."""
        self.target = None if target is None else bounds(target, "Readability")
        self.edge = positive(edge, "Readability: edge")
        super().__init__(change)

    def begin(self) -> Running:
        """See ``RunningScore.begin``."""
        return _Reading(self)

    def rate(self, sentences: int, words: int, syllables: int) -> float:
        """The score of a text with so many of each; 0 where it has no words."""
        if not words:
            return 0.0
        ease = 206.835 - 1.015 * words / sentences - 84.6 * syllables / words
        return min(1.0, max(0.0, ease / 100.0)) if self.target is None else nearness(ease, *self.target, self.edge)


class FullSentence:
    """Whether the text ends with a full sentence: ``f(text) -> float``, 1 or 0.

    It does where its last visible character is the end of a sentence as ``every="sentence"`` cuts them: a full stop,
    question or exclamation mark or dots, also of Chinese, Japanese, Arabic or Hindi, with quotes and brackets that
    close after it, and with a letter or digit before it. An abbreviation ("Mr.", "etc.") ends none.

    Cost: some microseconds; it reads the last 400 characters. What games it: a full stop anywhere, "No."; it knows
    nothing of grammar. As a change per word it pays 1 at each sentence's end and takes it back with the next word.
    Source: own rule.
    """

    name = "full_sentence"
    stops = False

    def __call__(self, text: str) -> float:
        """1 where the text ends with a full sentence, else 0."""
        visible = text.rstrip()[-400:]
        ends = _SENTENCES.ends(f"{visible} A", 0, False)  # what might follow shows whether a sentence has ended
        if not ends or ends[-1] != len(visible):
            return 0.0
        last = visible[ends[-2] if len(ends) > 1 else 0 :]
        return float(any(character.isalnum() for character in last))


class _Reading:
    """The readability of a growing text."""

    def __init__(self, rating: Readability) -> None:
        self._rating = rating
        self._rest = ""  # the sentence that is not over
        self._finished = (0, 0, 0)  # sentences, words and syllables before it

    def add(self, piece: str) -> float:
        self._rest += piece
        start = 0
        for end in _SENTENCES.ends(self._rest, 0, False):
            self._finished = _sum(self._finished, _count(self._rest[start:end]))
            start = end
        self._rest = self._rest[start:]
        return self._rating.rate(*_sum(self._finished, _count(self._rest)))


def _sum(one: tuple[int, int, int], other: tuple[int, int, int]) -> tuple[int, int, int]:
    return one[0] + other[0], one[1] + other[1], one[2] + other[2]


def _count(sentence: str) -> tuple[int, int, int]:
    """Sentences (0 where there is no word), English words and their syllables."""
    words = _WORD.findall(sentence)
    return int(bool(words)), len(words), sum(map(syllables, words))


_WORD = re.compile(r"(?<!\w)[A-Za-z]+(?:['\u2019][A-Za-z]+)*")
_VOWELS = re.compile("[aeiouy]+")
_SILENT = re.compile(
    "(?<![aeiouy])(?<![^aeiouylr]l)(?:e$|(?<![td])ed$|(?<![scxzg])(?<![cs]h)es$|e(?=ly|ment|ful|less|ness|some))"
)
# Vowels in a row that are two syllables, and syllables without a vowel.
_SPLIT = re.compile(
    r"(?<![ctsgx])i(?:a|o(?!u))|(?<=[^q])ua(?!r)|[aeouy]ing|eo(?!u|ple)|(?<=[dr])ea(?=s?$)"
    r"|[iy]e(?:t|r|n(?!d|ch))(?=.)|uou|creat|iu|sm$|(?<=[ds])n't$"
)


@lru_cache(maxsize=20_000)
def syllables(word: str) -> int:
    """How many syllables an English word has, by rules of spelling: at least one."""
    plain = word.lower().replace("\N{RIGHT SINGLE QUOTATION MARK}", "'")
    silent = _SILENT.search(plain) is not None
    return max(1, len(_VOWELS.findall(plain)) - silent + len(_SPLIT.findall(plain)))


@cache
def _model() -> Any:
    try:
        from py3langid.langid import MODEL_FILE, LanguageIdentifier
    except ImportError as error:
        message = "the language reward needs the package py3langid; run: pip install 'instant-reward[rules]'"
        raise UserError(message) from error
    return LanguageIdentifier.from_model_file(MODEL_FILE, norm_probs=True)


@cache
def _identifier(among: tuple[str, ...]) -> Any:
    """The model, with no other languages than these."""
    one = copy.copy(_model())
    one.set_languages([member for code in among for member in _FAMILY.get(code, (code,))])
    return one
