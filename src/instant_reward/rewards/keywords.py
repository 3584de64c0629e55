"""Words and phrases that a text should have, or should not have."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from instant_reward.rewards.repetition import positive
from instant_reward.text import _SPACELESS  # one list of the scripts without spaces for the whole library
from instant_reward.types import Prompt, Span, UserError, View

_GAP = 8  # the most white space between two words of a phrase: it bounds how far back a search must begin
_REMEMBERED = 256  # lists of keywords that were made ready: the texts of one prompt share them


@dataclass(frozen=True)
class _Keyword:
    pattern: re.Pattern[str]
    reach: int  # the most characters that a hit can have


@dataclass
class _Hunt:
    """The state of one text: its keywords, where the last hit of each ends (0: none), and how far it was read."""

    keywords: list[_Keyword]
    ends: list[int]
    read: int = 0


class _Keywords:
    """What both rewards share: the words from an argument or from a column, and the search for them.

    Raises UserError at the start of a text whose prompt has no such column, or no words in it.
    """

    name: str = "keywords"
    every = "word"
    stops = False

    def __init__(self, words: str | Sequence[str] | None = None, column: str | None = None) -> None:
        self._who = type(self).__name__
        if (words is None) == (column is None):
            raise UserError(f"{self._who}: give either words=[...] or column=..., the column with each prompt's words")
        if column is not None and (not isinstance(column, str) or not column):
            raise UserError(f"{self._who}: column={column!r} must be the name of the column with the words")
        self.words = () if words is None else self._checked(words, "the argument words")
        self.column = column
        self._ready: dict[tuple[str, ...], list[_Keyword]] = {}

    def start(self, prompt: Prompt) -> _Hunt:
        """The state of a text that has just begun."""
        words = self.words if self.column is None else self._from(self.column, prompt)
        if words not in self._ready:
            if len(self._ready) >= _REMEMBERED:
                self._ready.clear()
            self._ready[words] = [_keyword(word) for word in words]
        keywords = self._ready[words]
        return _Hunt(keywords, [0] * len(keywords))

    def _hits(self, state: _Hunt, text: str, once: bool) -> list[tuple[int, int]]:
        """The characters of each hit that ends in what is new of the text; with ``once``, only a keyword's first."""
        hits = []
        for number, keyword in enumerate(state.keywords):
            if once and state.ends[number]:
                continue
            place = max(state.ends[number], state.read - keyword.reach)
            while match := keyword.pattern.search(text, place):
                start, end = match.span()
                if _apart(text, start) and _apart(text, end):
                    hits.append((start, end))
                    state.ends[number] = place = end
                    if once:
                        break
                else:
                    place = start + 1
        state.read = len(text)
        return sorted(hits)

    def _from(self, column: str, prompt: Prompt) -> tuple[str, ...]:
        if column not in prompt.info:
            there = ", ".join(map(str, prompt.info)) or "none"
            raise UserError(
                f"{self._who}: prompt {prompt.id} has no column {column!r} (it has: {there}); add it, or name the "
                "column with the words as column=..."
            )
        return self._checked(prompt.info[column], f"column {column!r} of prompt {prompt.id}")

    def _checked(self, words: Any, where: str) -> tuple[str, ...]:
        plain = words.tolist() if hasattr(words, "tolist") else words
        listed = [plain] if isinstance(plain, str) else plain
        if not isinstance(listed, list | tuple) or not listed:
            raise UserError(f"{self._who}: {where} holds {repr(words)[:40]}; give a word or a list of words")
        for word in listed:
            if not isinstance(word, str) or not word.strip():
                raise UserError(f"{self._who}: {where} holds {repr(word)[:40]}, which is no word; give a text")
        words = [" ".join(word.split()) for word in listed]
        return tuple({word.lower(): word for word in words}.values())  # case does not matter: such twins are one


class Keywords(_Keywords):
    """How many of the wanted words the text has: each pays its share where it first stands. In [0, 1] for a text.

    ``words`` is a list of words or phrases, or ``column`` names the column with each prompt's own. Case does not
    matter; an English word counts as a whole word ("art" is not in "party"), white space in a phrase is any; of a
    script without spaces (Chinese, Japanese, Thai) any place will do. Of N words each pays 1 / N, once, as a span on
    its characters. Pieces must not cut words: "word" (the default), "sentence", "line" or "end".

    Cost: some 0.5 microseconds for each keyword and piece. What games it: a list of the words, without a sentence;
    inflected forms do not count, so name them. Source: own rule.
    """

    name = "keywords"

    def extend(self, state: _Hunt, view: View) -> list[Span]:
        """A span for each keyword that stands in the text for the first time."""
        share = 1.0 / len(state.keywords)
        return [view.span(share, start, end) for start, end in self._hits(state, view.text, once=True)]


class AvoidKeywords(_Keywords):
    """A penalty on the characters of each word that the text should not have. In (-inf, 0].

    ``words``, ``column`` and pieces as for ``Keywords``; each hit is a span of ``-penalty``, as often as it comes. Two
    keywords that overlap ("bad", "bad idea") are both hits.

    Cost: some 0.5 microseconds for each keyword and piece. What games it: other spellings, synonyms, and writing
    nothing; it reads no context ("not bad" has "bad"). Source: own rule.
    """

    name = "avoid"

    def __init__(
        self, words: str | Sequence[str] | None = None, column: str | None = None, penalty: float = 1.0
    ) -> None:
        """Raises UserError where an argument is none of those."""
        self.penalty = positive(penalty, "AvoidKeywords: penalty")
        super().__init__(words, column)

    def extend(self, state: _Hunt, view: View) -> list[Span]:
        """A negative span for each hit that ends in this piece."""
        return [view.span(-self.penalty, start, end) for start, end in self._hits(state, view.text, once=False)]


def _keyword(word: str) -> _Keyword:
    parts = word.split(" ")
    pattern = rf"\s{{1,{_GAP}}}".join(map(re.escape, parts))
    return _Keyword(re.compile(pattern, re.IGNORECASE), len(word) + (_GAP - 1) * (len(parts) - 1))


def _apart(text: str, place: int) -> bool:
    """Whether no word goes on across this place of the text."""
    if not 0 < place < len(text):
        return True
    before, after = text[place - 1], text[place]
    return unicodedata.category(after)[0] != "M" and not (_letter(before) and _letter(after))


def _letter(character: str) -> bool:
    """Whether this may stand within a word of a script that puts spaces between its words."""
    if character != "_" and unicodedata.category(character)[0] not in "LNM":
        return False
    return not any(low <= ord(character) <= high for low, high in _SPACELESS)
