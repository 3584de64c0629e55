"""Saying on standard error what takes long: a moving line on a terminal, a plain line elsewhere."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator


@contextlib.contextmanager
def status(text: str) -> Iterator[None]:
    """Says ``text`` while the block runs."""
    from rich.console import Console

    console = Console(file=sys.stderr)
    if console.is_terminal:
        with console.status(text):
            yield
    else:
        say(text)
        yield


def say(text: str) -> None:
    """One plain line."""
    print(text, file=sys.stderr, flush=True)
