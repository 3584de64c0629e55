"""Openings of film reviews to be described in JSON, with two solved examples before each."""

from __future__ import annotations

from typing import Any, Literal

from instant_reward.reviews import movie_reviews

PROMPT = """Each review is described by one line of JSON.

Review: "A slow start, and then I could not stop laughing. The best evening in months."
JSON: {{"stars": 5, "mood": "funny", "words": ["slow", "laughing", "best"]}}

Review: "I fell asleep after ten minutes and missed nothing at all."
JSON: {{"stars": 1, "mood": "dull", "words": ["asleep", "missed", "nothing"]}}

Review: "{opening}"
JSON:"""


def openings(split: Literal["train", "held_out"] = "train", limit: int | None = None) -> list[dict[str, Any]]:
    """Rows with ``prompt`` and the columns of ``movie_reviews``."""
    rows = movie_reviews(split, words=12, limit=limit)
    return [{**row, "prompt": PROMPT.format(opening=row["prompt"])} for row in rows]
