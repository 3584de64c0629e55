"""Losses: pure functions of the policy's log-probabilities and a batch. What they return has gradient once.

``normalise`` says what the sum over tokens is divided by, counted over the whole batch, however it is split:
"text" (the number of texts: the exact policy gradient), "tokens" (the number of sampled tokens: long texts weigh
more), "constant" (texts times a fixed length: the exact gradient up to a factor that no batch changes).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

from instant_reward.types import LossOutput, UserError

if TYPE_CHECKING:
    from instant_reward.batch import Batch

Normalise = Literal["text", "tokens", "constant"]


def policy_gradient(logprobs: Tensor, batch: Batch, normalise: Normalise = "text", constant: float = 1.0) -> LossOutput:
    """REINFORCE, Williams (1992): ``-sum over tokens of A[t] * log p(x_t | x_<t)``.

    Args:
        logprobs: ``[B, L]`` with gradient.
        batch: with ``advantages [B, L]``.
        constant: the length that "constant" divides by, in tokens.
    """
    advantages = _advantages(batch, logprobs)
    loss = -_total(advantages * logprobs, batch, normalise, constant)
    return LossOutput(loss, _metrics(logprobs, batch))


def clipped(
    logprobs: Tensor,
    batch: Batch,
    low: float = 0.2,
    high: float = 0.2,
    normalise: Normalise = "text",
    constant: float = 1.0,
) -> LossOutput:
    """PPO's surrogate, Schulman et al. (2017), equation 7: ``-min(ratio * A, clip(ratio, 1 - low, 1 + high) * A)``.

    The ratio to the sampler's log-probabilities is the surrogate, per token, and carries the gradient. Exact at ratio
    1, where it takes the plain policy gradient's step; biased away from it.

    Args:
        logprobs: ``[B, L]`` with gradient.
        batch: with ``advantages`` and ``old_logprobs``, ``[B, L]``.
    """
    advantages = _advantages(batch, logprobs)
    on = batch.mask.bool()
    ratio = torch.where(on, logprobs - batch.old_logprobs.to(logprobs.dtype), torch.zeros_like(logprobs)).exp()
    bounded = ratio.clamp(1.0 - low, 1.0 + high)
    surrogate = torch.minimum(ratio * advantages, bounded * advantages)
    loss = -_total(surrogate, batch, normalise, constant)
    metrics = _metrics(logprobs, batch)
    cut = (bounded * advantages < ratio * advantages) & on
    metrics["clipped"] = float(cut.sum()) / max(1, batch.token_count)
    return LossOutput(loss, metrics)


def refuse_kl_as_loss() -> None:
    """The log-ratio used as a loss has zero expected gradient on the policy's own texts: it would hold nothing back.

    Raises:
        UserError: always.
    """
    raise UserError(
        "algorithm.kl_as: the log-ratio used as a loss has zero expected gradient and holds nothing back; "
        "set algorithm.kl_as to 'reward', where its reward-to-go is the gradient of the KL"
    )


def _advantages(batch: Batch, logprobs: Tensor) -> Tensor:
    assert batch.advantages is not None, "credit the batch first: it has no advantages"
    assert logprobs.shape == batch.advantages.shape, "logprobs and advantages must both be [B, L]"
    return batch.advantages.detach().to(logprobs.dtype)


def _total(per_token: Tensor, batch: Batch, normalise: Normalise, constant: float) -> Tensor:
    summed = torch.where(batch.mask.bool(), per_token, torch.zeros_like(per_token)).sum()
    if normalise == "text":
        return summed / batch.text_count
    if normalise == "tokens":
        return summed / batch.token_count
    if normalise == "constant":
        return summed / (batch.text_count * constant)
    raise UserError(f"normalise={normalise!r} is unknown; use 'text', 'tokens' or 'constant'")


def _metrics(logprobs: Tensor, batch: Batch) -> dict[str, float]:
    """How far the policy is from the one that sampled, per token over the whole batch (parts add up)."""
    gap = torch.where(batch.mask.bool(), logprobs.detach() - batch.old_logprobs.to(logprobs.dtype), 0.0)
    count = max(1, batch.token_count)
    return {
        "ratio_kl": float((gap.exp() - 1.0 - gap).sum()) / count,
        "sampler_gap": float(gap.abs().sum()) / count,
    }
