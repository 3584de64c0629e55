"""Short names of the rewards that come with the library: what ``use: grammar`` in a config stands for.

A plain table: nothing signs up, and any other reward is named by its import path.
"""

from __future__ import annotations

import difflib

_HERE = "instant_reward.rewards."

NAMES = {
    name: _HERE + place
    for name, place in {
        "attention_shares": "redistribute:AttentionShares",
        "bleu": "metrics:Bleu",
        "chrf": "metrics:Chrf",
        "edit_similarity": "metrics:EditSimilarity",
        "ensemble": "combine:Ensemble",
        "exact_match": "metrics:ExactMatch",
        "learned_shares": "redistribute:LearnedShares",
        "math_answer": "metrics:MathAnswer",
        "numeric_answer": "metrics:NumericAnswer",
        "review_sentiment": "sentiment:ReviewSentiment",
        "rouge": "metrics:Rouge",
        "token_f1": "metrics:TokenF1",
        "uniform_shares": "redistribute:UniformShares",
        "vader": "sentiment:Vader",
    }.items()
}


def import_path(use: str) -> str:
    """The import path that a short name stands for; a path is handed back as it is.

    Raises:
        ValueError: it is neither; the message says what is near it.
    """
    module, _, name = use.rpartition(":")
    if module and name:
        return use
    if use in NAMES:
        return NAMES[use]
    close = difflib.get_close_matches(use, NAMES, n=1)
    hint = f"did you mean {close[0]}?" if close else f"the short names are {', '.join(sorted(NAMES))}"
    raise ValueError(f"must be a short name, or be written module:name or folder/file.py:name, not {use!r}; {hint}")
