"""JSON read while it is written: a push-down reader of RFC 8259 that looks at each character once."""

from __future__ import annotations

import re
from typing import Protocol

_SPACE = re.compile(r"[ \t\n\r]*")
_PLAIN = re.compile(r'[^"\\\x00-\x1f]+')
_HEX = re.compile(r"[0-9a-fA-F]{1,4}")
_ESCAPES = {'"': '"', "\\": "\\", "/": "/", "b": "\b", "f": "\f", "n": "\n", "r": "\r", "t": "\t"}
_WORDS = {"t": "true", "f": "false", "n": "null"}
_CONSTANTS = {"N": "NaN", "I": "Infinity"}
_CLOSED_BY = {"[": "]", "{": "}"}
_DIGITS = "0123456789"

# What may follow in a number, by what it has so far: its sign, a leading zero, whole digits, a point, digits after it,
# an e, the sign of the power, the digits of the power.
_NUMBER: dict[str, dict[str, str]] = {
    "sign": {"0": "zero", **dict.fromkeys("123456789", "whole")},
    "zero": {".": "point", **dict.fromkeys("eE", "e")},
    "whole": {".": "point", **dict.fromkeys("eE", "e"), **dict.fromkeys(_DIGITS, "whole")},
    "point": dict.fromkeys(_DIGITS, "part"),
    "part": {**dict.fromkeys("eE", "e"), **dict.fromkeys(_DIGITS, "part")},
    "e": {**dict.fromkeys("+-", "power sign"), **dict.fromkeys(_DIGITS, "power")},
    "power sign": dict.fromkeys(_DIGITS, "power"),
    "power": dict.fromkeys(_DIGITS, "power"),
}
_WHOLE_NUMBERS = ("zero", "whole", "part", "power")


class Listener(Protocol):
    """Is told of a document's parts in their order. Each answer says whether the document may still be accepted."""

    def begin(self, first: str) -> bool:
        """A value begins with this character, one of ``{["-0tfn``: 0 stands for any digit."""

    def begin_key(self) -> bool:
        """A key begins."""

    def grow(self, characters: str) -> bool:
        """These characters of the key or text that is being read are certain, escapes resolved."""

    def end_key(self) -> bool:
        """The key has ended."""

    def end_text(self) -> bool:
        """The text has ended."""

    def end_number(self, number: str) -> bool:
        """The number has ended; these are its characters."""

    def end_word(self) -> bool:
        """true, false or null has ended."""

    def separate(self) -> bool:
        """A comma: another item or key must follow."""

    def close(self) -> bool:
        """The innermost list or object has ended."""


class AcceptAll:
    """Any document."""

    def begin(self, first: str) -> bool:
        return True

    def begin_key(self) -> bool:
        return True

    def grow(self, characters: str) -> bool:
        return True

    def end_key(self) -> bool:
        return True

    def end_text(self) -> bool:
        return True

    def end_number(self, number: str) -> bool:
        return True

    def end_word(self) -> bool:
        return True

    def separate(self) -> bool:
        return True

    def close(self) -> bool:
        return True


class JsonReader:
    """Reads one JSON text, with white space around it or without.

    Accepts what RFC 8259 does, nested as deep as it may be, and the same key twice. A high surrogate that is escaped is
    held back until it is certain whether its other half follows.

    Args:
        constants: whether NaN, Infinity and -Infinity are values, as for Python's ``json``.
        listener: is told of the document's parts and may reject it.
    """

    def __init__(self, constants: bool = False, listener: Listener | None = None) -> None:
        self.alive = True
        self._words = {**_WORDS, **_CONSTANTS} if constants else _WORDS
        self._listener: Listener = AcceptAll() if listener is None else listener
        self._open: list[str] = []  # the brackets that are open
        self._read = self._value  # what is read next
        self._rest = ""  # of a word such as true
        self._number = ""  # what the number has so far
        self._digits: list[str] = []
        self._is_key = False
        self._hex = ""
        self._high = ""  # a high surrogate that waits for its other half

    def push(self, characters: str) -> bool:
        """See ``Reader``."""
        at, end = 0, len(characters)
        while at < end and self.alive:
            at = self._read(characters, at)
        return self.alive

    def valid(self) -> bool:
        """See ``Reader``."""
        ended = self._read == self._after or (self._read == self._in_number and self._number in _WHOLE_NUMBERS)
        return self.alive and ended and not self._open

    # Each of these reads on from a place that holds a character, and returns the place behind what it has read.

    def _value(self, characters: str, at: int) -> int:
        at = _behind_space(characters, at)
        if at == len(characters):
            return at
        first = characters[at]
        if first in "{[":
            self._open.append(first)
            self._read = self._first_key if first == "{" else self._first_item
        elif first == '"':
            self._is_key, self._read = False, self._in_text
        elif first == "-" or first in _DIGITS:
            self._number = "sign" if first == "-" else _NUMBER["sign"][first]
            self._digits = [first]
            self._read = self._in_number
        elif first in self._words:
            self._rest, self._read = self._words[first][1:], self._in_word
        else:
            self.alive = False
            return at
        self.alive = self._listener.begin("0" if first in _DIGITS else first)
        return at + 1

    def _first_item(self, characters: str, at: int) -> int:
        at = _behind_space(characters, at)
        if at == len(characters):
            return at
        if characters[at] == "]":
            return self._close(at)
        self._read = self._value
        return at

    def _first_key(self, characters: str, at: int) -> int:
        at = _behind_space(characters, at)
        if at < len(characters) and characters[at] == "}":
            return self._close(at)
        return self._key(characters, at)

    def _key(self, characters: str, at: int) -> int:
        at = _behind_space(characters, at)
        if at == len(characters):
            return at
        self._is_key, self._read = True, self._in_text
        self.alive = characters[at] == '"' and self._listener.begin_key()
        return at + 1

    def _colon(self, characters: str, at: int) -> int:
        at = _behind_space(characters, at)
        if at == len(characters):
            return at
        self._read = self._value
        self.alive = characters[at] == ":"
        return at + 1

    def _after(self, characters: str, at: int) -> int:
        """After a value."""
        at = _behind_space(characters, at)
        if at == len(characters):
            return at
        if self._open and characters[at] == ",":
            self._read = self._key if self._open[-1] == "{" else self._value
            self.alive = self._listener.separate()
            return at + 1
        if self._open and characters[at] == _CLOSED_BY[self._open[-1]]:
            return self._close(at)
        self.alive = False
        return at

    def _close(self, at: int) -> int:
        self._open.pop()
        self._read = self._after
        self.alive = self._listener.close()
        return at + 1

    def _in_number(self, characters: str, at: int) -> int:
        begin = at
        while at < len(characters):
            following = _NUMBER[self._number].get(characters[at])
            if following is None:
                break
            self._number = following
            at += 1
        self._digits.append(characters[begin:at])
        if at == len(characters):
            return at
        if self._number == "sign" and characters[at] in self._words and characters[at] == "I":
            self._rest, self._read = self._words["I"][1:], self._in_word
            return at + 1
        self._read = self._after  # it looks at the same character
        self.alive = self._number in _WHOLE_NUMBERS and self._listener.end_number("".join(self._digits))
        return at

    def _in_word(self, characters: str, at: int) -> int:
        known = characters[at : at + len(self._rest)]
        self.alive = self._rest.startswith(known)
        self._rest = self._rest[len(known) :]
        if self.alive and not self._rest:
            self._read = self._after
            self.alive = self._listener.end_word()
        return at + len(known)

    def _in_text(self, characters: str, at: int) -> int:
        plain = _PLAIN.match(characters, at)
        if plain is not None:
            self._grow(plain[0])
            return plain.end()
        if characters[at] == "\\":
            self._read = self._in_escape
        elif characters[at] == '"':
            self._grow("")
            self._read = self._colon if self._is_key else self._after
            end = self._listener.end_key if self._is_key else self._listener.end_text
            self.alive = self.alive and end()
        else:  # a control character
            self.alive = False
        return at + 1

    def _in_escape(self, characters: str, at: int) -> int:
        letter = characters[at]
        if letter == "u":
            self._hex, self._read = "", self._in_hex
        elif letter in _ESCAPES:
            self._grow(_ESCAPES[letter])
            self._read = self._in_text
        else:
            self.alive = False
        return at + 1

    def _in_hex(self, characters: str, at: int) -> int:
        digits = _HEX.match(characters[at : at + 4 - len(self._hex)])
        if digits is None:
            self.alive = False
            return at
        self._hex += digits[0]
        if len(self._hex) == 4:
            self._read = self._in_text
            code = int(self._hex, 16)
            if self._high and 0xDC00 <= code < 0xE000:
                high, self._high = ord(self._high), ""
                self._grow(chr(0x10000 + ((high - 0xD800) << 10) + code - 0xDC00))
            elif 0xD800 <= code < 0xDC00:
                self._grow("")
                self._high = chr(code)
            else:
                self._grow(chr(code))
        return at + len(digits[0])

    def _grow(self, characters: str) -> None:
        certain = self._high + characters
        self._high = ""
        if certain:
            self.alive = self.alive and self._listener.grow(certain)


def _behind_space(characters: str, at: int) -> int:
    found = _SPACE.match(characters, at)
    assert found is not None  # it matches nothing, too
    return found.end()
