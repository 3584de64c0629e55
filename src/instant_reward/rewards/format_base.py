"""What rewards for a text's form share: they read it while it is written, and stop what can no longer become valid."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Protocol

from instant_reward.types import Prompt, Stop, UserError, View


class Reader(Protocol):
    """Reads one text, piece by piece."""

    def push(self, characters: str) -> bool:
        """Reads on. False once no continuation is valid any more; nothing is read after that."""

    def valid(self) -> bool:
        """Whether what was read is valid if the text ends here."""


@dataclass
class Reading:
    """The state of one text: its reader, and how many of its characters that has read."""

    reader: Reader
    read: int = 0
    alive: bool = True


class Form(ABC):
    """A reward for a text's form, which keeps a state (``start`` and ``extend``) and reads every character once.

    Args:
        valid: what a text is paid at its end if its form is right.
        invalid: what it is paid where it is stopped, or at its end if its form is wrong or unfinished there.
        viable: what each piece before the last is paid while the text can still become valid; None for nothing.

    Attributes:
        name: the source's name in marks and metrics, unless another is given.
        every: where pieces end, unless the config or ``as_reward(form).but(every=...)`` says otherwise: a text can
            only be stopped at the end of a piece, hence "token".
        sees_end: a text gets its verdict also where another reward stops it behind its last piece.

    Raises UserError where one of the values is no finite number.
    """

    name: str = "form"
    every: str = "token"
    sees_end = True

    def __init__(self, valid: float = 1.0, invalid: float = 0.0, viable: float | None = None) -> None:
        for key, value in {"valid": valid, "invalid": invalid, "viable": 0.0 if viable is None else viable}.items():
            number = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
            if not number:
                raise UserError(f"{self.name}: {key}={value!r} must be a finite number")
        self.valid = float(valid)
        self.invalid = float(invalid)
        self.viable = None if viable is None else float(viable)

    @abstractmethod
    def reader(self) -> Reader:
        """A reader for a text that has just begun."""

    def start(self, prompt: Prompt) -> Reading:
        """The state of a text that has just begun."""
        return Reading(self.reader())

    def extend(self, state: Reading, view: View) -> float | Stop | None:
        """Reads the newest piece; stops the text where no continuation is valid any more."""
        characters = view.text[state.read :]
        state.read = len(view.text)
        state.alive = state.alive and state.reader.push(characters)
        if view.done:
            return self.valid if state.alive and state.reader.valid() else self.invalid
        return self.viable if state.alive else Stop(self.invalid)

    def score(self, text: str) -> float:
        """What one finished text is paid at its end."""
        reader = self.reader()
        return self.valid if reader.push(text) and reader.valid() else self.invalid


def flag(value: object, owner: str, key: str) -> bool:
    """A switch, checked."""
    if not isinstance(value, bool):
        raise UserError(f"{owner}: {key}={value!r} must be true or false")
    return value
