"""The tokens of a text that is still being written, for metrics that compare tokens.

The last word of an unfinished text may go on, and its tokens with it. So a stream hands out the tokens that no further
character can change, once, and beside them those that the rest has if the text ends here.
"""

from __future__ import annotations

import re
import string
import unicodedata
from collections.abc import Callable, Iterable, Sequence
from functools import cache
from typing import Any, Protocol

from instant_reward.text import _SPACELESS, _ranges  # one list of the scripts without spaces for the whole library
from instant_reward.types import UserError

KINDS = ("auto", "rouge", "characters", "answer", "text")
SACREBLEU = ("13a", "zh", "intl", "char", "none")
_ARTICLES = frozenset({"a", "an", "the"})
HAN = "[\u3400-\u4db5\u4e00-\u9fa5]"  # some of what sacrebleu's "zh" puts between spaces
_NOT_CHINESE = re.compile("[\u0e01-\u0eff\u1000-\u109f\u1780-\u17ff\u3041-\u3096\u30a1-\u30fa\u31f0-\u31ff]")
_SPACE = re.compile(r"(?P<space>\s++)(?=\S)")
_BREAKS = {"zh": re.compile(rf"{_SPACE.pattern}|{HAN}"), "char": re.compile(r"(?P<space>(?!))|\S")}
_ASCII_PUNCTUATION = frozenset(string.punctuation)  # chrF++ splits off these alone


class Stream(Protocol):
    """The tokens of one growing text."""

    def push(self, piece: str) -> Sequence[str]:
        """Adds characters to the text; returns the tokens that have become certain."""

    def tail(self) -> Sequence[str]:
        """The tokens after the certain ones, if the text ends here."""


class Matched:
    """Tokens that a pattern finds: one that touches the end of the text may still grow, all others are certain.

    The pattern must match from left to right without looking ahead or behind, so that a text may be cut behind any
    match that something else follows.

    Args:
        pattern: finds what holds a token.
        clean: makes tokens of a match: none, one or several.
        lower: puts the text in lower case first.
    """

    __slots__ = ("_clean", "_find", "_lower", "_rest")

    def __init__(self, pattern: re.Pattern[str], clean: Callable[[str], Sequence[str]], lower: bool = False) -> None:
        self._find = pattern.findall
        self._clean = clean
        self._lower = lower
        self._rest = ""  # the last match and what follows it

    def push(self, piece: str) -> Sequence[str]:
        self._rest += piece.lower() if self._lower else piece
        found: list[str] = self._find(self._rest)
        if not found:
            self._rest = ""
            return ()
        last = found.pop() if self._rest.endswith(found[-1]) else ""
        self._rest = last
        return [token for match in found for token in self._clean(match)]

    def tail(self) -> Sequence[str]:
        return self._clean(self._rest) if self._rest else ()


class Characters:
    """Every character as it is, white space included, but for white space around the text."""

    __slots__ = ("_begun", "_space")

    def __init__(self) -> None:
        self._begun = False
        self._space = ""  # white space that belongs to the text if anything follows it

    def push(self, piece: str) -> Sequence[str]:
        visible = piece.rstrip()
        if not visible:
            self._space += piece if self._begun else ""
            return ""
        found = self._space + visible if self._begun else visible.lstrip()
        self._begun, self._space = True, piece[len(visible) :]
        return found

    def tail(self) -> Sequence[str]:
        return ""


class SacreBleu:
    """The tokens of one of sacrebleu's tokenizers, which is shown one word at a time.

    Their rules look at a character and its neighbours, and white space parts them for good: so does a Chinese character
    for "zh", and every character for "char". The one exception is what "13a" joins: a hyphen at the end of a line.
    A word that is over is shown to the tokenizer between two others, because some rules ask what stands beside it.
    """

    __slots__ = ("_begun", "_breaks", "_hyphens", "_known", "_rest", "_tokenizer")

    def __init__(self, kind: str, tokenizer: Callable[[str], str]) -> None:
        self._breaks = _BREAKS.get(kind, _SPACE)
        self._hyphens = kind == "13a"
        self._tokenizer = tokenizer
        self._rest = ""
        self._begun = False  # whether something certain stands before the rest
        self._known = 0  # the rest up to here was searched before

    def push(self, piece: str) -> Sequence[str]:
        self._rest += piece
        end = self._certain()
        if not end:
            return ()
        certain = f"{self._rest[:end]} x"
        tokens = self._tokenizer(f"x {certain}" if self._begun else certain).split()
        found = tokens[1:-1] if self._begun else tokens[:-1]
        self._rest, self._begun = self._rest[end:], True
        self._known -= end
        return found

    def tail(self) -> Sequence[str]:
        rest = self._rest.rstrip()
        if not rest:
            return ()
        return self._tokenizer(f"x {rest}").split()[1:] if self._begun else self._tokenizer(rest).split()

    def _certain(self) -> int:
        """How many characters of the rest no further one can change."""
        rest, end = self._rest, 0
        for match in self._breaks.finditer(rest, self._known):
            self._known, space = match.end(), match["space"]
            # "fore-\ncast" is one word, and "<skipped>" is taken out before that is looked for.
            joined = self._hyphens and space == "\n" and rest[match.start() - 1] in "->"
            if space is None or (match.start() and not joined):
                end = match.end()
        return end


def stream_of(kind: str) -> Stream:
    """A stream of the tokens called ``kind``.

    "auto": words of letters and digits of any script, without case; in scripts without spaces (Chinese, Japanese, Thai)
    every character is one. "rouge": rouge-score's own, which know only a to z and 0 to 9. "characters": every visible
    character, without case. "answer": SQuAD's form of answers: words between white space, without case, punctuation
    and articles; scripts without spaces by character. "text": every character as it is.
    """
    if kind == "text":
        return Characters()
    return Matched(_pattern(kind), _CLEAN[kind], lower=kind == "rouge")


def punctuated_words() -> Stream:
    """The words of chrF++: a mark at the end of a word is a word of its own, or else one at its beginning."""
    return Matched(_pattern("chrf"), _CLEAN["chrf"])


def bleu_stream(kind: str, tokenizer: Callable[[str], str]) -> Stream:
    """A stream of the tokens that ``tokenizer``, sacrebleu's of the name ``kind``, finds."""
    return SacreBleu(kind, tokenizer)


def tokens_of(stream: Stream, text: str) -> list[str]:
    """The tokens of a whole text, by a fresh ``stream``."""
    return [*stream.push(text), *stream.tail()]


def check_kind(kind: Any, known: Iterable[str], who: str) -> str:
    """``kind``, if it is one of the ``known`` ways to cut tokens; else a UserError that names them."""
    known = list(known)
    if kind not in known:
        raise UserError(f"{who}: tokens={kind!r} is unknown; use {', '.join(known)}")
    return str(kind)


def sacrebleu_kind(references: Sequence[str]) -> str:
    """The tokenizer that "auto" stands for: "char" for kana, Thai and the like, "zh" for Chinese, else "13a"."""
    together = "".join(references)
    if _NOT_CHINESE.search(together):
        return "char"
    return "zh" if re.search(HAN, together) else "13a"


def _same(match: str) -> Sequence[str]:
    return (match,)


def _folded(match: str) -> Sequence[str]:
    return (match.casefold(),)


def _answer(match: str) -> Sequence[str]:
    token = match.casefold()
    if not token.isalnum():
        token = "".join(c for c in token if c not in _ASCII_PUNCTUATION and unicodedata.category(c)[0] != "P")
    return () if not token or token in _ARTICLES else (token,)


def _split_mark(match: str) -> Sequence[str]:
    if len(match) > 1 and match[-1] in _ASCII_PUNCTUATION:
        return match[:-1], match[-1]
    if len(match) > 1 and match[0] in _ASCII_PUNCTUATION:
        return match[0], match[1:]
    return (match,)


_CLEAN: dict[str, Callable[[str], Sequence[str]]] = {
    "auto": _folded,
    "rouge": _same,
    "characters": _folded,
    "answer": _answer,
    "chrf": _split_mark,
}
_SIMPLE = {"rouge": r"[a-z0-9]++", "characters": r"\S", "chrf": r"\S++"}


@cache
def _pattern(kind: str) -> re.Pattern[str]:
    """Built when first needed: it may look at 131,072 characters. Possessive, so that nothing matched is given up."""
    if kind in _SIMPLE:
        return re.compile(_SIMPLE[kind])
    marks = _ranges([code for code in range(0x20000) if unicodedata.category(chr(code))[0] == "M"])
    marks += "\U000e0100-\U000e01ef"
    spaceless = "".join(f"\\U{low:08x}-\\U{high:08x}" for low, high in _SPACELESS)
    if kind == "answer":
        return re.compile(rf"[{spaceless}][{marks}]*+|[^\s{spaceless}]++")
    letter = rf"[^\W_{spaceless}]"
    return re.compile(rf"(?=[^\W_])[{spaceless}][{marks}]*+|{letter}(?:{letter}|[{marks}])*+")
