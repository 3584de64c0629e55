"""Saying on standard error what takes long: a moving line on a terminal, a plain line elsewhere."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from typing import Any


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


@contextlib.contextmanager
def without_bars() -> Iterator[None]:
    """Keeps transformers' progress bars for files that lie here already out of the run's own display."""
    from transformers.utils import logging

    bars: Any = logging
    shown = bars.is_progress_bar_enabled()
    bars.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            bars.enable_progress_bar()


def say(text: str) -> None:
    """One plain line."""
    print(text, file=sys.stderr, flush=True)
