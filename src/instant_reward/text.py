"""Sampled token ids to characters, and where pieces end (torch-free).

A text is never tokenised again: characters come from the sampled ids alone, and a character counts as known with the
token that made it certain. Tokens that only hold bytes of an unfinished character, and special tokens, are zero width.
"""

from __future__ import annotations

import codecs
import operator
import re
import unicodedata
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Iterable, Sequence
from functools import cache
from itertools import groupby, pairwise
from typing import Any, NamedTuple, Protocol

from instant_reward.types import Every, Prompt, Tokenizer, UserError

REPLACEMENT = "\ufffd"
_BYTE_TOKEN = re.compile(r"<0x[0-9A-Fa-f]{2}>")
_WINDOW, _CONTEXT = 24, 8


class TextStream(Protocol):
    """The characters of one text, token by token."""

    def push(self, token_id: int) -> str:
        """The characters that this token made certain (often none: bytes of an unfinished character are held back)."""
        ...

    def flush(self) -> str:
        """The characters held back, as the tokenizer shows them at the end of a text. The text is over after it."""
        ...

    def copy(self) -> TextStream:
        """An independent stream that has read the same tokens."""
        ...


class Decoder(Protocol):
    """Characters from what a policy chose: tokens, or other actions."""

    def stream(self, prompt: Prompt | None = None) -> TextStream:
        """A new text behind a prompt."""
        ...


class TextDecoder:
    """Characters from the ids of one tokenizer.

    All characters of a text together equal ``tokenizer.decode(ids, skip_special_tokens=True,
    clean_up_tokenization_spaces=False)``: always with byte-level tokenizers (GPT-2, Llama 3, Qwen, SmolLM2), whose
    tokens are plain bytes; with any other one as long as decoding more tokens does not change earlier characters.
    Tokens added to the tokenizer later on are not seen: make a new decoder.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        table = _TokenBytes(tokenizer) if _is_byte_level(tokenizer) else None
        sample = list(range(0, len(tokenizer), max(1, len(tokenizer) // 256)))
        # A tokenizer may change what its backend decodes. A look at a part of the vocabulary shows it.
        if table is not None and b"".join(map(table.__getitem__, sample)).decode(errors="replace") != _decode(
            tokenizer, sample
        ):
            table = None
        self._table = table
        self._windows = None if table is not None else _Windows(tokenizer, sample)

    def stream(self, prompt: Prompt | None = None) -> TextStream:
        """A new text; it is the same behind every prompt."""
        if self._table is not None:
            return _ByteStream(self._table)
        assert self._windows is not None
        return _WindowStream(self._windows)

    def char_ends(self, token_ids: Sequence[int], done: bool = True) -> tuple[str, list[int]]:
        """The text of ``token_ids``, and how many of its characters are there after each token.

        With ``done`` the characters held back at the end count for the last token; else they are left out.
        """
        stream, parts, ends, length = self.stream(), [], [], 0
        for token_id in token_ids:
            parts.append(stream.push(token_id))
            length += len(parts[-1])
            ends.append(length)
        if done and ends:
            parts.append(stream.flush())
            ends[-1] += len(parts[-1])
        return "".join(parts), ends


def token_range(char_ends: Sequence[int], first: int, start: int, end: int) -> tuple[int, int]:
    """The tokens ``[s, e)`` that carry the characters ``[start, end)``.

    Args:
        char_ends: how many characters are there after each token of the flat sequence (0 over the prompt).
        first: the index of the first sampled token.
        start: the first character.
        end: the character after the last one, above ``start``.

    The zero-width tokens right before the character at ``start`` belong to it: they hold its first bytes.
    """
    if not (0 <= start < end and first < len(char_ends) and end <= char_ends[-1]):
        known = char_ends[-1] if first < len(char_ends) else 0
        raise ValueError(f"no tokens carry the characters [{start}, {end}) of a text of {known} characters")
    begin = bisect_right(char_ends, start, lo=first)
    if begin > first and char_ends[begin - 1] == start:
        begin = first if start == 0 else bisect_left(char_ends, start, lo=first) + 1
    return begin, bisect_left(char_ends, end, lo=first) + 1


# --- byte-level tokenizers: every token is known bytes -------------------------------------------------------------


@cache
def _byte_table() -> dict[str, int]:
    """GPT-2's printable character of each byte, turned round: visible Latin-1 stands for itself, the rest follow."""
    visible = {*range(33, 127), *range(161, 173), *range(174, 256)}
    hidden = [byte for byte in range(256) if byte not in visible]
    return {chr(byte): byte for byte in visible} | {chr(256 + i): byte for i, byte in enumerate(hidden)}


def _is_byte_level(tokenizer: Tokenizer) -> bool:
    backend = getattr(tokenizer, "backend_tokenizer", None)
    return type(getattr(backend, "decoder", None)).__name__ == "ByteLevel"


def _special_ids(tokenizer: Any) -> frozenset[int]:
    """The ids that decoding skips: a fast tokenizer asks its added tokens, another one its named special tokens."""
    if getattr(tokenizer, "backend_tokenizer", None) is not None:
        return frozenset(i for i, token in tokenizer.added_tokens_decoder.items() if token.special)
    return frozenset(tokenizer.all_special_ids)


def _decode(tokenizer: Tokenizer, token_ids: Sequence[int]) -> str:
    return tokenizer.decode(token_ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)


class _TokenBytes(dict[int, bytes]):
    """The bytes of each token, found when first asked for; none for special tokens and unknown ids."""

    def __init__(self, tokenizer: Any) -> None:
        super().__init__(dict.fromkeys(_special_ids(tokenizer), b""))
        self._name: Callable[[int], str | None] = tokenizer.backend_tokenizer.id_to_token

    def __missing__(self, token_id: int) -> bytes:
        name, table = self._name(token_id) or "", _byte_table()
        # As the backend does: a token with any character outside the table (an added one) is raw text.
        found = bytes(map(table.__getitem__, name)) if all(c in table for c in name) else name.encode()
        self[token_id] = found
        return found


class _ByteStream:
    __slots__ = ("_table", "_utf8")

    def __init__(self, table: _TokenBytes) -> None:
        self._table = table
        self._utf8 = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def push(self, token_id: int) -> str:
        return self._utf8.decode(self._table[token_id])

    def flush(self) -> str:
        return self._utf8.decode(b"", final=True)

    def copy(self) -> _ByteStream:
        twin = _ByteStream(self._table)
        twin._utf8.setstate(self._utf8.getstate())
        return twin


# --- any other tokenizer: decode a short window ---------------------------------------------------------------------


class _Windows:
    """What the streams of one tokenizer share."""

    def __init__(self, tokenizer: Tokenizer, sample: Sequence[int]) -> None:
        self.tokenizer = tokenizer
        self.special = _special_ids(tokenizer)
        self._held: dict[int, bool] = {}
        pairs = [(a, b) for a, b in pairwise(sample) if not self.holds(a)]
        # A tokenizer may change the end of a text once more tokens follow (joins by "@@ "): then wait for one more.
        self.waits = any(
            not _decode(tokenizer, [a, b]).startswith(_decode(tokenizer, [a]).rstrip(REPLACEMENT)) for a, b in pairs
        )

    def holds(self, token_id: int) -> bool:
        """Whether this is a byte of a byte fallback: one bad byte later on would change the whole run of them."""
        if token_id not in self._held:
            name = getattr(self.tokenizer, "convert_ids_to_tokens", lambda _: "")(token_id)
            self._held[token_id] = bool(_BYTE_TOKEN.fullmatch(name or ""))
        return self._held[token_id]

    def decode(self, token_ids: Sequence[int]) -> str:
        return _decode(self.tokenizer, token_ids)


def _common(one: str, other: str) -> int:
    """How many characters both begin with."""
    pairs = enumerate(zip(one, other, strict=False))
    return next((i for i, (a, b) in pairs if a != b), min(len(one), len(other)))


class _WindowStream:
    """Decodes the last tokens anew for each token, with some before them: those only lend their context."""

    __slots__ = ("_before", "_shared", "_shown", "_window")

    def __init__(self, shared: _Windows) -> None:
        self._shared = shared
        self._window: list[int] = []
        self._before = ""  # the window's text at the last token
        self._shown = 0  # how many of its characters were handed out

    def push(self, token_id: int) -> str:
        if token_id in self._shared.special:
            return ""
        self._window.append(token_id)
        if self._shared.holds(token_id):
            return ""
        now = self._shared.decode(self._window)
        if now.endswith(REPLACEMENT):
            return ""
        stable = _common(self._before, now) if self._shared.waits else len(now)
        new = now[self._shown : stable]
        self._before = now
        self._shown = max(self._shown, stable)
        if len(self._window) > _WINDOW:
            self._trim()
        return new

    def flush(self) -> str:
        return self._shared.decode(self._window)[self._shown :]

    def copy(self) -> _WindowStream:
        twin = _WindowStream(self._shared)
        twin._window, twin._before, twin._shown = self._window[:], self._before, self._shown
        return twin

    def _trim(self) -> None:
        """Forgets old tokens, if the ones left show a character: a tokenizer may strip the first space."""
        kept = self._window[-_CONTEXT:]
        text, waiting = self._shared.decode(kept), len(self._before) - self._shown
        if 0 <= waiting < len(text):
            self._window, self._before, self._shown = kept, text, len(text) - waiting


# --- pieces ---------------------------------------------------------------------------------------------------------

Segmenter = Callable[[str], Iterable[str]]
NAMES = ("token", "word", "sentence", "line", "end")
_SPACE = re.compile(r"\s*+")

# Scripts that put no spaces between words: Thai, Lao, Myanmar, Khmer, Han, Hiragana, Katakana.
_SPACELESS = (
    (0x0E01, 0x0EFF), (0x1000, 0x109F), (0x1780, 0x17FF), (0x2E80, 0x2FD5), (0x3005, 0x3007), (0x3021, 0x3029),
    (0x3038, 0x303B), (0x3041, 0x30FF), (0x31F0, 0x31FF), (0x3400, 0x4DBF), (0x4E00, 0x9FFF), (0xA9E0, 0xA9FF),
    (0xAA60, 0xAA7F), (0xF900, 0xFAFF), (0xFF66, 0xFF9D), (0x1B000, 0x1B16F), (0x20000, 0x3FFFF),
)  # fmt: skip
# What no cut may come before, beside combining marks: Thai and Lao AM, joiners, half-width voice marks, emoji
# modifiers, tags, variation selectors.
_EXTENDERS = (
    "\xad\u0e33\u0eb3\u200b\u200c\u2060\ufeff\uff9e\uff9f\U0001f3fb-\U0001f3ff\U000e0020-\U000e007f"
    "\U000e0100-\U000e01ef"
)
_FLAG = "\U0001f1e6-\U0001f1ff"  # two of them are one flag
_STARTS_A_WORD = frozenset("#@&*/\\\uff03\uff20\uff06\uff0a\uff0f\uff3c")

_FULL_STOPS = "\u3002\uff01\uff1f\uff0e\uff61\u17d4\u104b"  # they need no space after them
_STOPS = ".!?\u2026\u061f\u06d4\u0964\u0965\u203c\u2047-\u2049"
_CLOSERS = "\"'*_)\\]}\u2019\u201d\u203a\xbb\u300d\u300f\uff09\u3011\u300b\u3009\u3015\u3017\u301b\uff3d\uff5d\uff63"
_TITLES = re.compile(
    "prof|sr|jr|st|mt|rev|hon|gov|sen|rep|gen|col|sgt|capt|lt|cmdr|messrs|mme|jan|feb|apr|jun|jul|aug|sept?|oct|nov|dec"
)
_ABBREVIATIONS = re.compile(r"mrs?|ms|dr|vs|etc|eg|ie|cf|al|viz|inc|ltd|co|corp|dept|approx|est|ca|ph\.d")
_BEFORE_NUMBERS = re.compile("nos?|pp?|vol|ch|figs?|eq|sec|art")
_LAST_WORD = re.compile(r"[^\W_][\w.]*\Z")
_DOTTED = re.compile(r"(?:[^\W\d_]\.)+[^\W\d_]")  # e.g, U.S.A


class Pieces:
    """Where the pieces of a text end.

    Attributes:
        by_tokens: how many tokens a piece has ("token": 1, a number: itself), or None: characters decide.
        whole: whether the whole text is one piece ("end").

    White space belongs to the word or sentence after it, and to the last one at the end of the text: so a piece is
    certain once a visible character after it is known.
    A function is asked with the characters since the last piece: it answers True (a piece ends right here), how many
    of them are a piece (it is asked again for the rest), or None, False or 0.
    A ``segmenter`` splits runs of characters of scripts without spaces into words (for "word"; else one character is a
    word): it is called once per run, when the run is over, and gives the run's words in order.
    Raises ``UserError`` for an ``every`` that is none of these.
    """

    def __init__(self, every: Every, segmenter: Segmenter | None = None) -> None:
        by_tokens: int | None = 1 if every == "token" else None
        if isinstance(every, int) and not isinstance(every, bool):
            by_tokens = every
        named = isinstance(every, str) and every in NAMES
        if not (named or callable(every) or (by_tokens is not None and by_tokens > 0)):
            allowed = ", ".join(f'"{name}"' for name in NAMES)
            raise UserError(
                f"every={every!r} does not say where pieces end: use {allowed}, a positive number of tokens, "
                "or a function of the text."
            )
        if segmenter is not None and not callable(segmenter):
            raise UserError(f"segmenter={segmenter!r} is no function: give one that splits a string into words.")
        self.every = every
        self.by_tokens = by_tokens
        self.whole = isinstance(every, str) and every == "end"
        self._segmenter = segmenter if every == "word" else None
        if callable(every):
            self._cut: Callable[[str, int], list[int]] = _Asked(every)
        else:
            self._cut = {"word": _word, "sentence": _sentence, "line": _line}.get(str(every), _nowhere)

    def ends(self, text: str, start: int, done: bool) -> list[int]:
        """The character ends (above ``start``, ascending) of the pieces of ``text[start:]`` that are certain.

        ``text`` is all that is known so far and ``start`` the end of the last piece found. With ``done`` nothing
        follows: what is left is the last piece. The ends do not depend on how the text arrived (those of a function
        may). Pieces by tokens are the caller's to count: ``ValueError``.
        """
        if self.by_tokens is not None:
            raise ValueError(f"pieces of {self.by_tokens} tokens are counted in tokens, not in characters")
        found: list[int] = []
        while start < len(text):
            cut = self._cut(text, start) if self._segmenter is None else self._segmented(text, start, done)
            if not cut:
                break
            found += cut
            start = cut[-1]
        if done and start < len(text):
            found.append(len(text))
        return found

    def _segmented(self, text: str, start: int, done: bool) -> list[int]:
        """All words of the run at ``start``, once what follows it is known; a segmenter may take back its words."""
        match = _patterns().run.match(text, start)
        if match is None or self._segmenter is None:
            return _word(text, start)
        over = _after_space(text, match.end()) < len(text)
        if not (over or done):
            return []
        run, position, ends = match["run"], match.start("run"), []
        segmenter = self._segmenter
        words = _call(lambda run: [word for word in segmenter(run) if word], run, "The segmenter")
        if not all(isinstance(word, str) for word in words) or "".join(words) != run:
            raise UserError(
                f"The segmenter made {words!r} of {run!r}: it must give back the run's words, in order and unchanged."
            )
        for word in words:
            position += len(word)
            if position < match.end("run") and not _patterns().joined.match(text, position - 1):
                ends.append(position)
        return [*ends, match.end() if over else len(text)]


def _nowhere(text: str, start: int) -> list[int]:
    return []


def _line(text: str, start: int) -> list[int]:
    newline = text.find("\n", start)
    return [newline + 1] if newline >= 0 else []


def _word(text: str, start: int) -> list[int]:
    match = _patterns().word.match(text, start)
    return [match.end()] if match and _after_space(text, match.end()) < len(text) else []


def _sentence(text: str, start: int) -> list[int]:
    first = _after_space(text, start)
    for match in _patterns().stop.finditer(text, first):
        after = _after_space(text, match.end())
        if after == len(text):
            break
        newline = text.rfind("\n", match.start(), after)
        if newline >= 0:
            return [newline + 1]
        if _is_stop(text, first, match, after):
            return [match.end()]
    return []


def _is_stop(text: str, first: int, match: re.Match[str], after: int) -> bool:
    """Whether these stops end the sentence that begins at ``first``; ``after`` is the next visible character's."""
    stops, position, end = match["stops"], match.start(), match.end()
    if any(stop in _FULL_STOPS for stop in stops):
        return not (stops == "\uff0e" and text[position - 1 : position].isdigit() and text[end].isdigit())
    if after == end:
        return False
    found = _LAST_WORD.search(text[max(first, position - 12) : position])
    if stops != "." or not found:
        return True
    word, name = found[0], found[0].lower()
    if _ABBREVIATIONS.fullmatch(name) or _DOTTED.fullmatch(word) or (len(word) == 1 and word.isupper()):
        return False
    if word[0].isupper() and _TITLES.fullmatch(name):
        return False
    if _BEFORE_NUMBERS.fullmatch(name) and text[after].isdigit():
        return False
    return not (word.isdigit() and text[first:position] == word)  # the number of a list's item


def _after_space(text: str, position: int) -> int:
    match = _SPACE.match(text, position)
    assert match is not None  # it may be empty
    return match.end()


class _Asked:
    """A user's function that says where pieces end."""

    def __init__(self, function: Callable[[str], bool | int | None]) -> None:
        self._function = function
        self._name = f"every={getattr(function, '__qualname__', repr(function))}"

    def __call__(self, text: str, start: int) -> list[int]:
        rest = text[start:]
        answer = _call(self._function, rest, self._name)
        if answer is None or answer is False:
            return []
        if answer is True:
            return [len(text)]
        try:
            count = operator.index(answer)
        except TypeError:
            count = -1
        if not 0 <= count <= len(rest):
            raise UserError(
                f"{self._name} gave {answer!r} for {rest!r}: return True, how many of its {len(rest)} characters are a "
                "piece, or None."
            )
        return [start + count] if count else []


def _call(function: Callable[[str], Any], text: str, name: str) -> Any:
    try:
        return function(text)
    except Exception as error:
        raise UserError(f"{name} failed on {text!r}: {type(error).__name__}: {error}; mend the function.") from error


class _Patterns(NamedTuple):
    word: re.Pattern[str]  # white space and a word
    run: re.Pattern[str]  # white space and a run of characters of scripts without spaces
    joined: re.Pattern[str]  # from the character before a place where no cut may come
    stop: re.Pattern[str]  # what may end a sentence


@cache
def _patterns() -> _Patterns:
    """Built when first needed: it looks at 131,072 characters. Nothing in them backtracks (possessive), so that what
    a pattern found does not change with the characters that follow."""
    kinds: dict[str, list[int]] = {"marks": [], "opens": [], "closes": [], "letters": []}
    spaceless = {code for low, high in _SPACELESS[:-1] for code in range(low, high + 1)}
    for code in range(0x20000):
        category = unicodedata.category(chr(code))
        if category[0] == "M":
            kinds["marks"].append(code)
        elif category in ("Ps", "Pi"):
            kinds["opens"].append(code)
        elif category in ("Po", "Pe", "Pf", "Pd") and chr(code) not in _STARTS_A_WORD:
            kinds["closes"].append(code)
        elif code in spaceless and code not in (0x0E33, 0x0EB3):
            kinds["letters"].append(code)
    low, high = _SPACELESS[-1]
    extends = _ranges(kinds["marks"]) + _EXTENDERS
    opens, closes = f"[{_ranges(kinds['opens'])}]", _ranges(kinds["closes"]) + "\uff5e"
    letter = f"[{_ranges(kinds['letters'])}{chr(low)}-{chr(high)}]"
    joint = f"\u200d++(?:[{_FLAG}]{{2}}|\\S)?+"
    attached = f"(?:{joint}|[{extends}])"
    return _Patterns(
        word=re.compile(
            rf"\s*+(?:{opens}*+{letter}(?:{joint}|[{extends}{closes}])*+|(?:{joint}|(?!{opens}*+{letter})\S)++)"
        ),
        run=re.compile(rf"\s*+{opens}*+(?P<run>(?:{letter}{attached}*+)++)(?:{joint}|[{extends}{closes}])*+"),
        joined=re.compile(rf"\u200d|.[\u200d{extends}]|[{_FLAG}]{{2}}", re.DOTALL),
        stop=re.compile(rf"\n|(?P<stops>[{_STOPS}{_FULL_STOPS}]++)(?:{joint}|[{extends}{_CLOSERS}])*+"),
    )


def _ranges(codes: list[int]) -> str:
    """The members of a regular expression's character class."""
    runs = [[code for _, code in run] for _, run in groupby(enumerate(codes), lambda pair: pair[1] - pair[0])]
    return "".join(f"\\U{run[0]:08x}-\\U{run[-1]:08x}" for run in runs)
