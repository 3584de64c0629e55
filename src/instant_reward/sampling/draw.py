"""Drawing the next token: the distribution, one uniform number per row, and the log-probability of what was drawn."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from instant_reward.types import RunError, UserError


@dataclass(frozen=True)
class Settings:
    """How texts are drawn.

    Attributes:
        max_new_tokens, min_new_tokens: bounds on the sampled tokens; below the lower one the end token is forbidden.
        temperature: 0 takes the likeliest token.
        top_p: the smallest set of likeliest tokens with at least this probability; 1 keeps all.
        top_k: the so many likeliest tokens; 0 keeps all.
        stop: strings that end a text; the one that was found stays in it.
        rows: texts decoded side by side.
        stop_lag: decoding steps between a token and the moment a reward's stop takes its row out. Fixed, so that a
            slow reward never changes a batch's shape.
        guide: adds so many times the critic's Q of each next token, less its V, to the logits.
    """

    max_new_tokens: int = 32
    min_new_tokens: int = 0
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    stop: tuple[str, ...] = ()
    rows: int = 64
    stop_lag: int = 4
    guide: float = 0.0

    def __post_init__(self) -> None:
        rules = (
            ("max_new_tokens", self.max_new_tokens >= 1, "at least 1"),
            ("min_new_tokens", 0 <= self.min_new_tokens <= self.max_new_tokens, "between 0 and max_new_tokens"),
            ("temperature", 0 <= self.temperature < float("inf"), "0 or more"),
            ("top_p", 0 < self.top_p <= 1, "above 0 and at most 1"),
            ("top_k", self.top_k >= 0, "0 (all) or more"),
            ("rows", self.rows >= 1, "at least 1"),
            ("stop_lag", self.stop_lag >= 0, "0 or more"),
            ("guide", 0 <= self.guide < float("inf"), "0 or more"),
            ("stop", not isinstance(self.stop, str) and all(self.stop), "a list of strings that are not empty"),
        )
        for name, holds, need in rules:
            if not holds:
                raise UserError(f"sampling.{name}={getattr(self, name)!r} must be {need}")


def uniforms(seed: int, step: int, text: tuple[int, int], count: int) -> np.ndarray:
    """The numbers in [0, 1) one text is drawn with, ``[count]``: its own stream, whatever is decoded beside it.

    Args:
        text: what tells this text from the others of the step: two numbers below 2**64.
    """
    generator = np.random.Philox(key=np.array([seed % 2**64, step % 2**64], np.uint64), counter=[0, 0, *text])
    return np.random.Generator(generator).random(count, dtype=np.float64)


def draw(
    logits: Tensor, uniform: Tensor, forbid: Tensor, end_ids: tuple[int, ...], settings: Settings
) -> tuple[Tensor, Tensor]:
    """Draws one token a row by inverting the cumulative distribution.

    Args:
        logits: ``[R, V]``; overwritten.
        uniform: float64 ``[R]``, in [0, 1).
        forbid: bool ``[R]``, rows in which the end tokens may not be drawn.

    Returns:
        Tokens int64 ``[R]`` and their log-probabilities ``[R]`` under the distribution they were drawn from (after
        temperature, top-k, top-p and forbidden tokens; 0 for the certain choice of temperature 0).

    Raises:
        RunError: where the model's logits are no numbers.
    """
    if end_ids and bool(forbid.any()):
        logits[forbid.nonzero(), torch.tensor(end_ids, device=logits.device)] = -torch.inf
    highest = logits.amax(-1, keepdim=True)  # nothing below takes the likeliest token away
    if not bool(highest.isfinite().all()):
        raise RunError(
            "the model's logits are not finite while sampling, so training has destroyed its weights; go back to an "
            "earlier checkpoint and lower train.learning_rate"
        )
    if settings.temperature == 0:
        return logits.argmax(-1), torch.zeros(logits.shape[0], dtype=logits.dtype, device=logits.device)
    if settings.temperature != 1.0:
        logits, highest = logits.div_(settings.temperature), highest.div_(settings.temperature)
    if settings.top_k:
        lowest = logits.topk(min(settings.top_k, logits.shape[1])).values[:, -1:]
        logits = logits.masked_fill_(logits < lowest, -torch.inf)
    if settings.top_p < 1.0:
        logits = _keep_likeliest(logits, settings.top_p)
    logits = logits.sub_(highest)
    cumulative = logits.exp().cumsum_(-1)
    total = cumulative[:, -1]
    # Strictly below the total, so that the first larger entry exists and has a probability of its own.
    target = torch.minimum(uniform.to(total.dtype) * total, torch.nextafter(total, torch.zeros_like(total)))
    tokens = torch.searchsorted(cumulative, target[:, None], right=True).squeeze(1)
    chosen = logits.gather(1, tokens[:, None]).squeeze(1)
    return tokens, chosen - total.log()


def _keep_likeliest(logits: Tensor, top_p: float) -> Tensor:
    ordered, order = logits.sort(-1, descending=True)
    probabilities = ordered.softmax(-1)
    outside = probabilities.cumsum(-1) - probabilities >= top_p  # the token that crosses the bound stays
    return logits.masked_fill_(torch.zeros_like(outside).scatter(1, order, outside), -torch.inf)
