"""Pairs to summarise, found on every Debian and Ubuntu machine: a package's long description and its one-line summary.

    data: {use: "recipes/debian.py:descriptions", args: {split: train}}

They are read from the list of installed packages where it lies, and never copied.
"""

from __future__ import annotations

import hashlib
import re
from pathlib import Path
from typing import Any

from instant_reward.text import Pieces
from instant_reward.types import UserError

STATUS = Path("/var/lib/dpkg/status")
PROMPT = "Summaries of software packages, each in a few words.\n\n{shots}Package: {text}\nSummary:"


def descriptions(split: str = "train", limit: int | None = None, words: int = 60) -> list[dict[str, Any]]:
    """Rows with ``prompt`` (two solved pairs, then a description), ``reference`` (its summary) and ``text``.

    Args:
        split: "train" or "held_out" (one package in five, by its own text); they share no description.
        words: descriptions are cut after so many.
    """
    if split not in ("train", "held_out"):
        raise UserError(f"descriptions: split is {split!r}: give train or held_out")
    if not STATUS.is_file():
        raise UserError(
            f"descriptions: there is no {STATUS} here, so this is no Debian: give data.path with a file of pairs"
        )
    pairs = [
        pair for pair in _pairs(STATUS.read_text(encoding="utf-8", errors="replace")) if len(pair[0].split()) >= 15
    ]
    shots = "".join(f"Package: {_cut(text, words)}\nSummary: {summary}\n\n" for text, summary in pairs[:2])
    rows = [
        {"prompt": PROMPT.format(shots=shots, text=_cut(text, words)), "reference": summary, "text": text}
        for text, summary in pairs[2:]
        if _held_out(text) == (split == "held_out")
    ]
    return rows[:limit]


def _pairs(status: str) -> list[tuple[str, str]]:
    """Each description and summary once, in an order that hangs on the texts alone."""
    found = re.findall(r"^Description: (.+)\n((?: .*\n)+)", status, re.MULTILINE)
    pairs = {" ".join(long.split(" .\n")[0].split()): summary for summary, long in found}
    return sorted(pairs.items(), key=lambda pair: hashlib.sha256(pair[0].encode()).digest())


def _cut(text: str, words: int) -> str:
    return " ".join(text.split()[:words])


def _held_out(text: str) -> bool:
    return hashlib.sha256(text.encode()).digest()[-1] < 256 // 5


def documents(
    split: str = "train", limit: int | None = None, lists: str | None = None, fewest: int = 3, most: int = 12
) -> list[dict[str, Any]]:
    """Rows with ``prompt`` (the whole long description, without its lists) and ``reference`` (its summary).

    Args:
        split: "train" or "held_out" (one description in five, by its own text); they share no description.
        limit: so many at most, in an order that hangs on the texts alone.
        lists: a folder with apt's lists, of which the ``*Translation-en`` files are read: ``apt-get -o
            Acquire::Languages=en update`` fetches them, 60,000 descriptions. Without it, the installed packages alone.
        fewest, most: sentences in a description; shorter and longer ones are left out.
    """
    if split not in ("train", "held_out"):
        raise UserError(f"documents: split is {split!r}: give train or held_out")
    files = [STATUS] if lists is None else sorted(Path(lists).expanduser().glob("*Translation-en"))
    if not files or not all(file.is_file() for file in files):
        raise UserError(f"documents: there are no descriptions in {lists or STATUS}: give a folder with apt's lists")
    rows = []
    for text, summary in _whole(files):
        if _held_out(text) != (split == "held_out"):
            continue
        if fewest <= len(Pieces("sentence").ends(text, 0, True)) <= most:
            rows.append({"prompt": text, "reference": summary})
        if len(rows) == limit:
            break
    return rows


def _whole(files: list[Path]) -> list[tuple[str, str]]:
    """Each description, its paragraphs in a row, and its summary."""
    pairs: dict[str, str] = {}
    for file in files:
        text = file.read_text(encoding="utf-8", errors="replace")
        for summary, long in re.findall(r"^Description(?:-en)?: (.+)\n((?: .*\n)+)", text, re.MULTILINE):
            lines = [line for line in long.split("\n") if line != " ." and not line.startswith("  ")]
            pairs.setdefault(" ".join(" ".join(lines).split()), summary)
    return sorted(pairs.items(), key=lambda pair: hashlib.sha256(pair[0].encode()).digest())
