"""Short names of the rewards that come with the library: what ``use: grammar`` in a config stands for.

A plain table: nothing signs up, and any other reward is named by its import path.
"""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Mapping
from typing import Any

from instant_reward.imports import resolve
from instant_reward.types import UserError

_HERE = "instant_reward.rewards."

NAMES = {
    name: _HERE + place
    for name, place in {
        "attention_shares": "redistribute:AttentionShares",
        "avoid": "keywords:AvoidKeywords",
        "bleu": "metrics:Bleu",
        "chrf": "metrics:Chrf",
        "classifier": "sentiment_models:Classifier",
        "distinct": "diversity:Distinct",
        "edit_similarity": "metrics:EditSimilarity",
        "ensemble": "combine:Ensemble",
        "entailment": "entailment:Entailment",
        "exact_match": "metrics:ExactMatch",
        "fluency": "fluency:Fluency",
        "full_sentence": "language:FullSentence",
        "grammar": "grammar:Grammar",
        "json": "format:Json",
        "json_schema": "format:JsonSchema",
        "judge": "judge:Judge",
        "keywords": "keywords:Keywords",
        "language": "language:Language",
        "learned_shares": "redistribute:LearnedShares",
        "length": "length:Length",
        "log_ratio": "fluency:LogRatio",
        "math_answer": "metrics:MathAnswer",
        "mtld": "diversity:Mtld",
        "novelty": "curiosity:Novelty",
        "numeric_answer": "metrics:NumericAnswer",
        "piece_classifier": "sentiment_models:PieceClassifier",
        "program_tests": "programs:ProgramTests",
        "python_code": "format:PythonCode",
        "random_distillation": "curiosity:RandomDistillation",
        "readability": "language:Readability",
        "regex": "format:Regex",
        "repetition": "repetition:Repetition",
        "review_sentiment": "sentiment:ReviewSentiment",
        "reward_model": "reward_model:RewardModel",
        "rouge": "metrics:Rouge",
        "self_bleu": "repetition:SelfBleu",
        "similarity": "embedding:Similarity",
        "spelling": "spelling:Spelling",
        "step_reward_model": "reward_model:StepRewardModel",
        "textblob": "sentiment_models:TextBlob",
        "token_f1": "metrics:TokenF1",
        "token_reward_model": "reward_model:TokenRewardModel",
        "topic": "topic:Topic",
        "type_token": "diversity:TypeTokenRatio",
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


def make(use: str, args: Mapping[str, Any], where: str) -> Any:
    """What a short name or an import path stands for; a class, and whatever has arguments, is called with them.

    Args:
        where: who asks, for the message.

    Raises:
        UserError: there is no such name, or it does not take these arguments.
    """
    try:
        found = resolve(import_path(use))
    except ValueError as error:
        raise UserError(f"{where}: the reward {error}") from None
    if not (inspect.isclass(found) or args):
        return found
    try:
        return found(**args)
    except TypeError as error:
        named = ", ".join(args) or "none"  # their values may be secrets
        raise UserError(f"{where}: {use} does not take these args ({named}): {error}; correct them") from error
