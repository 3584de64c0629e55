"""A final score cut into shares: evenly, by attention, or by what a learned predictor says of the text so far.

Whoever cuts a share from a whole knew the whole text. Paid where that became known (``at="seen"``, the default), even
shares and shares by attention act as the final score that they were cut from: exact, and no gain. Placed on their
tokens (``at="span"``, by name) they may help, and bias the gradient: see docs/algorithms.md.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable, Sequence
from typing import Any

from instant_reward import models
from instant_reward.notice import without_bars
from instant_reward.rewards.base import as_score
from instant_reward.rewards.language_model import load_tokenizer
from instant_reward.rewards.names import make
from instant_reward.types import Prompt, Rollout, Span, UserError, View

WIDTH = 4096  # features of a prefix; words that fall together share one


class UniformShares:
    """A final score in equal shares on the tokens of the text. The shares sum to the score, whatever its range.

    Cost: that of the score, once a text. What games it: what games the score. On the tokens (``at: span``) every token
    of a text is told the same, so it says no more than the score at the end: the control to compare others with.
    Source: Ren et al., "Learning Long-Term Reward Redistribution via Randomized Return Decomposition" (2022).
    """

    name, every = "uniform_shares", "end"

    def __init__(self, score: Any, args: dict[str, Any] | None = None) -> None:
        """``score`` is ``f(text) -> float``, or its short name or import path, made with ``args``."""
        self.score = score_of(score, args)

    def __call__(self, view: View) -> list[float]:
        return [self.score(view.text) / max(1, view.tokens)] * view.tokens


class AttentionShares:
    """A final score in shares on the words of the text, by how much a language model's last token attends to them.

    The shares are spans of characters and sum to the score, whatever its range. The attention is the mean over the
    heads of the last layer, the first token left out (models park attention there).

    Cost: one pass of the model over the text, with its attention kept: quadratic in the length. What games it: what
    games the score. Source: Chan et al., "Dense Reward for Free in Reinforcement Learning from Human Feedback" (2024),
    with a frozen model of your choice for their reward model.
    """

    name, every = "attention_shares", "end"

    def __init__(self, score: Any, model: str = "smollm2-135m", args: dict[str, Any] | None = None) -> None:
        """``score`` as for ``UniformShares``; ``model`` is a causal model's short name, folder or hub id."""
        from transformers import AutoModelForCausalLM

        self.score = score_of(score, args)
        self.tokenizer = load_tokenizer(model)
        if not self.tokenizer.is_fast:
            raise UserError(f"AttentionShares: the tokenizer of {model} does not say where its tokens lie; use another")
        try:
            with without_bars():
                found: Any = AutoModelForCausalLM.from_pretrained(models.locate(model), attn_implementation="eager")
        except (OSError, ValueError, KeyError, RuntimeError) as error:
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            raise UserError(f"AttentionShares: the model {model} cannot be loaded: {reason}; use another") from error
        self.model = found.eval().requires_grad_(False)

    def __call__(self, view: View) -> float | list[Span]:
        import torch

        score = self.score(view.text)
        text = view.text.encode("utf-8", "replace").decode("utf-8")  # half a surrogate pair is no text to a tokenizer
        encoded = self.tokenizer(text, return_tensors="pt", return_offsets_mapping=True, add_special_tokens=False)
        ids = encoded["input_ids"]
        if ids.shape[1] < 3 or ids.shape[1] > (getattr(self.model.config, "max_position_embeddings", None) or 2**30):
            return score
        with torch.no_grad():
            last = self.model(input_ids=ids, output_attentions=True, use_cache=False).attentions[-1]
        attention = last[0, :, -1, 1:].mean(0).double()
        places = encoded["offset_mapping"][0, 1:].tolist()
        kept = [(share, a, b) for share, (a, b) in zip(attention.tolist(), places, strict=True) if b > a]
        whole = sum(share for share, _, _ in kept)
        if not whole > 0.0:
            return score
        return [view.span(score * share / whole, a, b) for share, a, b in kept]


class LearnedShares:
    """A final score in shares by a predictor of it: a word gets what it changed of the prediction for the text so far.

    The predictor is a ridge regression of the score on the words of a text, learned from the run's own texts: after
    each step it learns from what was written (``scope="run"``), and while a step runs it stays as it was. What it did
    not foresee of a text's score is paid at the end, so that the shares sum to the score, whatever its range. A share
    knows the text so far alone: paid where it is seen, as it comes, it is exact.

    Cost: that of the score, once a text, and some microseconds a word; after a step one small linear system. What games
    it: what games the score; early on the predictor knows nothing, and everything is paid at the end. Source:
    Arjona-Medina et al., "RUDDER: Return Decomposition for Delayed Rewards" (2019), a linear predictor for its LSTM.
    """

    name, every, scope, sees_end, stops = "learned_shares", "word", "run", True, False

    def __init__(self, score: Any, args: dict[str, Any] | None = None, ridge: float = 10.0, keep: int = 512) -> None:
        """Takes the score.

        Args:
            score: as for ``UniformShares``.
            ridge: how strongly the regression holds its weights down.
            keep: it learns from so many of the newest texts.

        Raises:
            UserError: ``ridge`` or ``keep`` is not above 0, or the score takes no text.
        """
        if not ridge > 0 or keep < 1:
            raise UserError(f"LearnedShares: ridge={ridge!r} and keep={keep!r} must be above 0; give numbers that are")
        self.score = score_of(score, args)
        self.ridge, self.keep = ridge, keep
        self.texts: list[str] = []
        self.scores: list[float] = []
        self.mean = 0.0
        self.weights: Any = {}

    def start(self, prompt: Prompt) -> list[float]:
        """The state is what has been paid so far, in a list of one so that it can be replaced."""
        return [0.0]

    def extend(self, state: list[float], view: View) -> float:
        """The change of the prediction at this word; at the end, what is missing of the score."""
        now: float = self.score(view.text) if view.done else self.predicted(view.text) - self.mean
        paid, state[0] = state[0], now
        return now - paid

    def predicted(self, text: str) -> float:
        """What a text is expected to score that begins so."""
        found = features(text)
        known: float = sum(self.weights.get(index, 0.0) for index in found)
        return self.mean + known / math.sqrt(max(1, len(found)))

    def observe(self, rollouts: Sequence[Rollout]) -> None:
        """Learns from a step's texts."""
        self.texts = [*self.texts, *(rollout.text for rollout in rollouts)][-self.keep :]
        self.scores = [*self.scores, *(self.score(rollout.text) for rollout in rollouts)][-self.keep :]
        self._learn()

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint has to hold: the texts, from which the rest is learned again."""
        return {"texts": list(self.texts), "scores": list(self.scores)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes on from a checkpoint."""
        self.texts, self.scores = list(state["texts"]), list(state["scores"])
        self._learn()

    def _learn(self) -> None:
        import numpy as np

        if not self.texts:
            return
        table = np.zeros((len(self.texts), WIDTH))
        for row, text in enumerate(self.texts):
            found = features(text)
            np.add.at(table[row], found, 1.0 / max(1, len(found)) ** 0.5)
        self.mean = float(np.mean(self.scores))
        # Solved in the space of texts, of which there are fewer than features.
        gram = table @ table.T + self.ridge * np.eye(len(self.texts))
        weights = table.T @ np.linalg.solve(gram, np.array(self.scores) - self.mean)
        self.weights = {int(index): float(weights[index]) for index in np.flatnonzero(weights)}


def features(text: str) -> list[int]:
    """The words of a text, each by a number below ``WIDTH`` that is the same in every process."""
    return [zlib.crc32(word.encode("utf-8", "surrogatepass")) % WIDTH for word in text.lower().split()]


def score_of(score: Any, args: dict[str, Any] | None) -> Callable[[str], float]:
    """``f(text) -> float`` of what a user names; UserError where it takes something else."""
    if isinstance(score, str):
        score = make(score, args or {}, "shares")
    one = as_score(score, "shares are cut from the score of a text")
    return lambda text: float(one.function([text])[0] if one.batched else one.function(text))
