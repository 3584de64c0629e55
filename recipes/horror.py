"""A topic of real film reviews: horror, as a topic model of them tells it from the others."""

from __future__ import annotations

from instant_reward.reviews import held_out, read_reviews
from instant_reward.rewards.topic import Topic


def horror(reviews: int = 6000) -> Topic:
    """How much of a text is about horror films, by a topic model of so many reviews that are not held out."""
    texts = [review.text for review in read_reviews(["imdb"]) if not held_out(review.text)]
    return Topic(texts[:: max(1, len(texts) // reviews)], topic=["horror", "scary", "creepy"], topics=20)
