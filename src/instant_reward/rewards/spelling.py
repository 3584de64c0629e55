"""Misspelt words."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Container, Sequence
from functools import cache

from instant_reward.rewards.repetition import positive
from instant_reward.text import _SPACELESS, _ranges  # one list of the scripts without spaces for the whole library
from instant_reward.types import Span, UserError, View

# The dictionary is American. British words are looked up as American ones; only stems and endings that are British, so
# that "fourty" and "allways" stay what they are.
_BRITISH = [
    (
        re.compile(
            r"(?<!\w)(armo|behavio|cando|clamo|colo|demeano|discolo|dishono|endeavo|favo|fervo|flavo|glamo|harbo|hono"
            r"|humo|labo|misbehavio|neighbo|odo|parlo|ranco|rigo|rumo|savo|splendo|tumo|valo|vapo|vigo)ur"
        ),
        r"\1r",
    ),
    (re.compile(r"([iy])s(?=(?:e[drs]?|ers|ing|able|ations?)(?!\w))"), r"\1z"),
    (re.compile(r"(calib|cent|fib|lit|lust|meag|met|sab|somb|spect|theat)re(?=[ds]?(?!\w))"), r"\1er"),
]
_CHUNK = re.compile(r"\S++")
_ADDRESS = re.compile(r"://|www\.|@|\\")
_ALSO = re.compile(
    "aeroplane|cheques?|defences?|draught|dreamt|etc|jewellery|kerb|manoeuvre|marvellous|mouldy?|offences?|pretence|"
    "programmes?|pyjamas|sceptic|sceptical|scepticism"
)


class Spelling:
    """A penalty on the characters of each misspelt English word. In (-inf, 0].

    A word that the English dictionary of pyspellchecker has in no form is a span of ``-penalty``. British spellings are
    words too, and what ``words`` names. Left alone are words with letters beyond a to z, single letters, what touches a
    digit, an underscore or ``@``, and addresses; and, unless ``capitalised`` is true, words with a capital letter,
    since names are in no dictionary. English only: other languages in Latin letters are marked nearly word by word.
    Pieces must not cut words: "word" (the default), "sentence", "line" or "end".

    Cost: one look-up a word; the dictionary is loaded once, in about a third of a second. Needs the package
    pyspellchecker. What games it: capital letters, digits and other scripts; a wrong word that is spelt right ("form"
    for "from"); rare true words are marked ("noir"), so a policy avoids them. Source: pyspellchecker, whose word list
    is made of film subtitles.
    """

    name = "spelling"
    stops = False
    every = "word"

    def __init__(self, penalty: float = 1.0, words: Sequence[str] = (), capitalised: bool = False) -> None:
        """Raises UserError where an argument is none of those, or pyspellchecker is missing."""
        self.penalty = positive(penalty, "Spelling: penalty")
        if not isinstance(words, list | tuple) or not all(isinstance(word, str) and word for word in words):
            raise UserError(f"Spelling: words={words!r} must be a list of words that are right")
        if not isinstance(capitalised, bool):
            raise UserError(f"Spelling: capitalised={capitalised!r} must be true or false")
        self.words = frozenset(_plain(word) for word in words)
        self.capitalised = capitalised
        _dictionary()

    def __call__(self, view: View) -> list[Span] | None:
        """A negative span for each misspelt word of the piece."""
        text, begin = view.text, len(view.text) - len(view.piece)
        found = []
        for chunk in _CHUNK.finditer(text, begin):
            if not _ADDRESS.search(chunk[0]):
                words = _word().finditer(text, chunk.start(), chunk.end())
                found += [view.span(-self.penalty, *word.span()) for word in words if not self._right(word[0])]
        return found or None

    def _right(self, word: str) -> bool:
        plain = _plain(word)
        if len(plain) < 2 or not plain.isascii() or (word.lower() != word and not self.capitalised):
            return True
        return any(self._known(form) for form in (plain, plain.removesuffix("'s")))

    def _known(self, word: str) -> bool:
        if word in self.words or _ALSO.fullmatch(word) or word in _dictionary():
            return True
        return any(pattern.sub(american, word) in _dictionary() for pattern, american in _BRITISH)


def _plain(word: str) -> str:
    return word.lower().replace("\N{RIGHT SINGLE QUOTATION MARK}", "'")


@cache
def _word() -> re.Pattern[str]:
    """A word with its apostrophes that touches no digit, underscore or @; not of a script without spaces."""
    spaceless = "".join(f"\\U{low:08x}-\\U{high:08x}" for low, high in _SPACELESS)
    marks = _ranges([code for code in range(0x20000) if unicodedata.category(chr(code))[0] == "M"])
    letter, beside = rf"[^\W\d_{spaceless}]", rf"(?:[^\W{spaceless}]|[@{marks}])"
    return re.compile(rf"(?<!{beside}){letter}++(?:['\u2019]{letter}++)*+(?!{beside})")


@cache
def _dictionary() -> Container[str]:
    try:
        from spellchecker import SpellChecker
    except ImportError as error:
        message = "the spelling reward needs the package pyspellchecker; run: pip install 'instant-reward[rules]'"
        raise UserError(message) from error
    return frozenset(SpellChecker(language="en", distance=1).word_frequency.words())
