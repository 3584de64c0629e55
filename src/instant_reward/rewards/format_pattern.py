"""Regular expressions that are asked whether an unfinished text can still match.

The package ``regex`` matches a prefix partially. What it takes for lost is lost, but for \\b and \\B: at the end of a
prefix it takes them for decided where the next character decides, hence they are written as lookarounds here. And it
takes some prefixes for viable that are not, where a lazy quantifier skips to a text that never came: prefixes are
matched with greedy ones. What is beyond that is judged at the end only.
"""

from __future__ import annotations

import importlib
import re
import time
from collections.abc import Sequence
from typing import Any

from instant_reward.notice import say
from instant_reward.types import UserError

# The parts of a pattern that matter here; a set of characters and a comment are one part each.
_PART = re.compile(
    r"(?P<comment>\(\?\#[^)]*\))"
    r"|(?P<set>\[\^?\]?(?:\\.|\[:\^?\w+:\]|[^\]\\])*\])"
    r"|(?P<group>\((?:\?(?:[:=!>|(]|<[=!]|P?<\w+>|P=|P>|&|[aiLmsux-]+[:)]|.)|\*)?)"
    r"|(?P<escape>\\.)"
    r"|(?P<quantifier>(?:[*+?]|\{\d+(?:,\d*)?\}|\{,\d+\})[?+]?)"
    r"|(?P<fuzzy>\{[\d<=+,deis ]*[deis][\d<=+,deis ]*(?::[^}]*)?\})"
    r"|(?P<other>.)",
    re.DOTALL,
)
_PLAIN_GROUP = re.compile(r"\((?:\?(?::|=|!|<[=!]|P?<\w+>|P=|[aiLmsu-]+[:)]))?")
_COMMITTED = re.compile(r"\(\?[>(]|.+\+", re.DOTALL)  # atomic, conditional, possessive: what is tried first matters
_OWN_CLASSES = re.compile(r"\(\?\w*[ax]")  # ASCII classes are the same in both; verbose: comments look like parts
_STRANGE = {"\\X", "\\G", "\\K", "\\R", "\\m", "\\M", "\\L"}
# What Python's own `re` takes for \w and \s, which the package sees otherwise: superscripts, and four control codes.
_CLASSES = {"\\w": r"\p{L}\p{nt=De}\p{nt=Di}\p{nt=Nu}_", "\\s": r"\s\x1c-\x1f"}
_WORD = "[" + _CLASSES["\\w"] + "]"
_BOUNDARIES = {
    "\\b": f"(?:(?<={_WORD})(?!{_WORD})|(?<!{_WORD})(?={_WORD}))",
    "\\B": f"(?:(?<={_WORD})(?={_WORD})|(?<!{_WORD})(?!{_WORD}))",
}
_PART_OF_TEXT = 64  # a longer text is looked at again once it has grown by this part of it


class Pattern:
    """A regular expression, compiled.

    Args:
        pattern: as Python's ``re`` reads it, and what the package ``regex`` adds.
        owner: who asks, for error messages.
        whole: whether the whole text has to match; otherwise any part of it.
        timeout: seconds of processor time that one look may take, and all looks at one text that is being written.

    Raises UserError where it cannot be compiled.
    """

    def __init__(self, pattern: str, owner: str, whole: bool = True, timeout: float = 1.0) -> None:
        self.pattern = pattern
        self.timeout = timeout
        self._owner, self._said = owner, False
        package: Any = importlib.import_module("regex")
        prefixes = prefix_pattern(pattern)
        try:
            exact = package.compile(as_in_re(pattern))
            partial = None if prefixes is None else package.compile(prefixes)
        except package.error as error:
            raise UserError(f"{owner}: the pattern {pattern!r} cannot be read: {error}; mend it") from error
        self._exact = exact.fullmatch if whole else exact.search
        self._partial = None if partial is None else partial.fullmatch if whole else partial.search

    def matches(self, text: str) -> bool:
        """Whether this finished text matches; False, and a word about it, where that takes too long to say."""
        try:
            return self._exact(text, timeout=self.timeout) is not None
        except TimeoutError:
            self.say_too_long(text)
            return False

    def viable(self, text: str) -> bool | None:
        """Whether some continuation of this text may match; None where that takes too long to say."""
        if self._partial is None:
            return True
        try:
            return self._partial(text, partial=True, timeout=self.timeout) is not None
        except TimeoutError:
            return None

    def say_too_long(self, text: str) -> None:
        """Says once that a text cannot be judged in time."""
        if not self._said:
            say(
                f"{self._owner}: the pattern {self.pattern!r} takes over {self.timeout:g} s for a text of {len(text)} "
                "characters; such a text is not stopped, and counts as wrong if its end takes as long; make it simpler"
            )
        self._said = True


class Growth:
    """One growing text under one pattern.

    A long text is not looked at at every piece, which would cost a pass over it each time, but whenever it has grown by
    a 64th: hence no text costs more than 70 passes, and one of under 128 characters is looked at at every piece. Where
    the looks have taken longer than the pattern's limit together, there are no more of them.
    """

    __slots__ = ("_looked", "_pattern", "_seconds")

    def __init__(self, pattern: Pattern) -> None:
        self._pattern = pattern
        self._looked: int | None = 0  # how many characters had been there; None for no more looks
        self._seconds = 0.0

    def viable(self, text: str) -> bool:
        """Whether some continuation may match, as far as is known. ``text`` begins with what was last shown."""
        if self._looked is None or len(text) - self._looked < max(1, len(text) // _PART_OF_TEXT):
            return True
        begin = time.thread_time()
        found = self._pattern.viable(text)
        self._seconds += time.thread_time() - begin
        self._looked = len(text)
        if found is None or self._seconds > self._pattern.timeout:
            self._pattern.say_too_long(text)
            self._looked = None
        return found is not False


class PatternReader:
    """Reads a text that has to match a pattern as a whole."""

    def __init__(self, pattern: Pattern) -> None:
        self._pattern, self._growth = pattern, Growth(pattern)
        self._text = ""

    def push(self, characters: str) -> bool:
        """See ``Reader``."""
        self._text += characters
        return self._growth.viable(self._text)

    def valid(self) -> bool:
        """See ``Reader``."""
        return self._pattern.matches(self._text)


def as_in_re(pattern: str) -> str:
    """The pattern with \\w, \\s and \\b as Python's ``re`` has them."""
    parts = _parts(pattern)
    return pattern if _has_own_classes(parts) else "".join(_as_in_re(kind, part) for kind, part in parts)


def prefix_pattern(pattern: str) -> str | None:
    """The pattern that prefixes are partially matched with; None where no such match can be relied on."""
    parts = _parts(pattern)
    if any(_is_strange(kind, part) for kind, part in parts):
        return None
    own = _has_own_classes(parts)
    if own and any(part in _BOUNDARIES for kind, part in parts if kind == "escape"):
        return None
    committed = any(_COMMITTED.fullmatch(part) for kind, part in parts if kind in ("group", "quantifier"))
    made = []
    for kind, part in parts:
        lazy = kind == "quantifier" and part.endswith("?") and len(part) > 1
        if lazy and not committed:
            made.append(part[:-1])  # greedy: it matches the same texts
        else:
            made.append(part if own else _as_in_re(kind, part))
    return "".join(made)


def _parts(pattern: str) -> list[tuple[str, str]]:
    return [(str(match.lastgroup), match[0]) for match in _PART.finditer(pattern)]


def _has_own_classes(parts: Sequence[tuple[str, str]]) -> bool:
    return any(_OWN_CLASSES.match(part) for kind, part in parts if kind == "group")


def _is_strange(kind: str, part: str) -> bool:
    if kind == "group":
        return not (_PLAIN_GROUP.fullmatch(part) or _COMMITTED.fullmatch(part))
    return kind == "fuzzy" or (kind == "escape" and part in _STRANGE)


def _as_in_re(kind: str, part: str) -> str:
    if kind == "set":
        return re.sub(r"\\.", lambda match: _CLASSES.get(match[0], match[0]), part, flags=re.DOTALL)
    if kind != "escape":
        return part
    if part.lower() in _CLASSES:
        return f"[{'^' if part.isupper() else ''}{_CLASSES[part.lower()]}]"
    return _BOUNDARIES.get(part, part)
