"""Losses: pure functions of the policy's log-probabilities and a batch. What they return has gradient once.

``normalise`` says what the sum over tokens is divided by, counted over the whole batch, however it is split:
"text" (the number of texts: the exact policy gradient), "tokens" (the number of sampled tokens: long texts weigh
more), "constant" (texts times a fixed length: the exact gradient up to a factor that no batch changes), "text_mean"
(each text by its own tokens, then by the number of texts: a long text's tokens weigh less).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

from instant_reward.importance import segment_sums
from instant_reward.types import LossOutput, UserError

if TYPE_CHECKING:
    from instant_reward.batch import Batch

Normalise = Literal["text", "tokens", "constant", "text_mean"]
Ratio = Literal["token", "piece", "sequence"]


def policy_gradient(logprobs: Tensor, batch: Batch, normalise: Normalise = "text", constant: float = 1.0) -> LossOutput:
    """REINFORCE, Williams (1992): ``-sum over tokens of A[t] * log p(x_t | x_<t)``, times importance weights if any.

    With weights in place of advantages (``awr``, ``rwr``, ``raft``) it is a weighted likelihood.

    Args:
        logprobs: ``[B, L]`` with gradient.
        batch: with ``advantages [B, L]``; its ``weights`` carry no gradient.
        constant: the length that "constant" divides by, in tokens.
    """
    advantages = _advantages(batch, logprobs)
    loss = -average(advantages * logprobs, batch, normalise, constant)
    return LossOutput(loss, _metrics(logprobs, batch))


def likelihood(logprobs: Tensor, batch: Batch, normalise: Normalise = "tokens", constant: float = 1.0) -> LossOutput:
    """Maximum likelihood of given texts: ``-sum over tokens of w[t] * log p(x_t | x_<t)``.

    Args:
        logprobs: ``[B, L]`` with gradient.
        batch: its ``advantages [B, L]`` are the weights ``w``, 1 where nobody says otherwise.
    """
    weights = _advantages(batch, logprobs)
    on = batch.mask.bool()
    count = max(1, batch.token_count)
    metrics = {
        "nll": -float(logprobs.detach()[on].sum()) / count,
        "target_weight": float(weights[on].sum()) / count,
    }
    return LossOutput(-average(weights * logprobs, batch, normalise, constant), metrics)


def clipped(
    logprobs: Tensor,
    batch: Batch,
    low: float = 0.2,
    high: float = 0.2,
    normalise: Normalise = "text",
    constant: float = 1.0,
    ratio: Ratio = "token",
    proximal: bool = False,
) -> LossOutput:
    """PPO's surrogate, Schulman et al. (2017), equation 7: ``-min(ratio * A, clip(ratio, 1 - low, 1 + high) * A)``.

    The ratio is the surrogate and carries the gradient. Exact at ratio 1, where it takes the plain policy gradient's
    step; biased away from it.

    Args:
        logprobs: ``[B, L]`` with gradient.
        batch: with ``advantages`` and ``old_logprobs``, ``[B, L]``; its ``weights`` carry no gradient.
        ratio: of the token; of its piece (the product over the piece's tokens, one action); or of the whole text, by
            its length: ``exp(mean over t of log ratio[t])`` in value, with each token's own gradient (Zheng et al.,
            2025, "GSPO", equations 7 and 14). Its bounds are narrower than the rounding of a sampler in bfloat16: of
            fresh texts it is taken to the policy as the step began, where the batch has those values.
        proximal: take the ratio to the policy as it was when the step began, not to the sampler: the decoupled
            objective of Hilton, Cobbe and Schulman (2022), equation 5, with the batch's weights for the rest.
    """
    advantages = _advantages(batch, logprobs)
    on = batch.mask.bool()
    value = _ratio(logprobs, batch, ratio, proximal)
    bounded = value.clamp(1.0 - low, 1.0 + high)
    surrogate = torch.minimum(value * advantages, bounded * advantages)
    if ratio == "piece":  # a piece is one action: its surrogate counts once
        assert batch.pieces is not None, "ratios per piece need the batch's pieces: set algorithm.pieces"
        surrogate = surrogate / segment_sums(on.to(surrogate.dtype), on, "piece", batch.pieces).clamp(min=1.0)
    loss = -average(surrogate, batch, normalise, constant)
    metrics = _metrics(logprobs, batch)
    cut = (bounded * advantages < value * advantages) & on
    metrics["clipped"] = float(cut.sum()) / max(1, batch.token_count)
    return LossOutput(loss, metrics)


def cispo(
    logprobs: Tensor,
    batch: Batch,
    low: float = 1.0,
    high: float = 4.0,
    normalise: Normalise = "tokens",
    constant: float = 1.0,
) -> LossOutput:
    """Clipped importance weights, MiniMax (2025), "MiniMax-M1", equation 4: no token's gradient is ever cut off.

    ``-clip(ratio, 1 - low, 1 + high) * A * log p``, the clipped ratio without gradient. ``low=1`` is no lower bound.

    Args:
        logprobs: ``[B, L]`` with gradient.
        batch: with ``advantages`` and ``old_logprobs``, ``[B, L]``.
    """
    advantages = _advantages(batch, logprobs)
    ratio = _ratio(logprobs, batch, "token", False).detach()
    bounded = ratio.clamp(1.0 - low, 1.0 + high)
    loss = -average(bounded * advantages * logprobs, batch, normalise, constant)
    metrics = _metrics(logprobs, batch)
    metrics["clipped"] = float(((bounded != ratio) & batch.mask.bool()).sum()) / max(1, batch.token_count)
    return LossOutput(loss, metrics)


def all_actions(expected: Tensor, batch: Batch, normalise: Normalise = "text", constant: float = 1.0) -> LossOutput:
    """The policy gradient summed over next tokens, Sutton et al. (2000), theorem 1: ``-sum over a of p(a) * A(a)``.

    Exact at each prefix where the critic is; the token that was drawn plays no part in it.

    Args:
        expected: ``[B, L]``, the sum over next tokens of probability times advantage, with gradient into the former.
    """
    return LossOutput(-average(expected, batch, normalise, constant))


def doubly_robust(
    logprobs: Tensor,
    expected: Tensor,
    chosen: Tensor,
    batch: Batch,
    normalise: Normalise = "text",
    constant: float = 1.0,
) -> LossOutput:
    """The gradient of the doubly robust estimate, Dudik, Langford and Li (2011): for decisions of one step.

    The estimate of what a policy earns is ``sum over a of p(a) * Q(a) + weight * (reward - Q(action))``. It is unbiased
    where the chances that the log has are right or where Q is.

    Args:
        logprobs, expected: ``[B, L]`` with gradient: of the logged actions, and the sum over actions of probability
            times advantage.
        chosen: ``[B, L]``, Q of the logged action.
        batch: with ``targets [B, 1, L]``, the logged rewards, and ``weights [B, L]``.
    """
    assert batch.targets is not None, "credit the batch first: the critic has no targets"
    assert batch.weights is not None, "credit the batch first: it has no importance weights"
    if bool((batch.mask.sum(1) > 1).any()):
        raise UserError(
            "algorithm.name: doubly_robust is for decisions of one step, and these texts have several; use vtrace, or "
            "reinforce with importance"
        )
    error = (batch.targets[:, 0].to(chosen.dtype) - chosen.detach()) * batch.weights.to(chosen.dtype)
    return LossOutput(-average(expected + error * logprobs, batch, normalise, constant), _metrics(logprobs, batch))


def value(values: Tensor, batch: Batch, clip: float | None = None) -> LossOutput:
    """The critic's squared error, per sampled token: ``1/2 * sum over k of w_k**2 * (V_k[t] - target_k[t])**2``.

    Weighed so, an error counts by what it does to the weighted sum of the sources.

    Args:
        values: ``[B, K, L]`` with gradient.
        batch: with ``targets`` and, where it is clipped, ``values``: ``[B, K, L]`` as they were when the step began.
        clip: the value moves by at most this much from where it was before its error stops counting: the larger of the
            clipped and unclipped errors is taken (the value clipping that PPO's authors' code has).
    """
    assert batch.targets is not None, "credit the batch first: the critic has no targets"
    assert values.shape == batch.targets.shape, "values and targets must both be [B, K, L]"
    targets = batch.targets.to(values.dtype)
    error = (values - targets) ** 2
    if clip is not None:
        assert batch.values is not None, "a clipped value loss needs the values as they were"
        before = batch.values.to(values.dtype)
        error = torch.maximum(error, (before + (values - before).clamp(-clip, clip) - targets) ** 2)
    weights = torch.tensor([source.weight for source in batch.sources], dtype=values.dtype, device=values.device)
    return LossOutput(average(0.5 * (error * weights[:, None] ** 2).sum(1), batch, "tokens"))


def chosen_value(chosen: Tensor, batch: Batch) -> LossOutput:
    """The squared error of Q at the sampled tokens, per token: ``1/2 * (Q(x_<t, x_t) - target[t])**2``.

    Args:
        chosen: ``[B, N, L]``, of each of ``N`` Q functions, with gradient.
        batch: with ``targets [B, 1, L]``.
    """
    assert batch.targets is not None, "credit the batch first: the critic has no targets"
    error = 0.5 * ((chosen - batch.targets.to(chosen.dtype)) ** 2).sum(1)
    return LossOutput(average(error, batch, "tokens"))


def implicit_q(
    chosen: Tensor, values: Tensor, spread: Tensor, batch: Batch, expectile: float = 0.7, cql: float = 0.01
) -> LossOutput:
    """Implicit language Q-learning, Snell et al. (2023), section 4.2: two Q, an expectile V, and a CQL term.

    ``1/2 * sum_i (Q_i[t] - r[t] - discount * V[t+1])**2 + |expectile - 1(u < 0)| * u**2 + cql * sum_i (lse Q_i[t] -
    Q_i[t])`` with ``u = min_i slow Q_i[t] - V[t]``, per sampled token.

    Args:
        chosen, spread: ``[B, N, L]``, each Q function's value of the sampled token, and its log-sum-exp.
        values: ``[B, 1, L]``, V with gradient.
        batch: with ``targets [B, 1, L]`` and ``slow [B, L]``.
    """
    assert batch.slow is not None, "annotate the batch first: the slow Q is missing"
    fit = chosen_value(chosen, batch)
    gap = batch.slow.to(values.dtype) - values[:, 0]
    weight = (expectile - (gap.detach() < 0).to(gap.dtype)).abs()
    level = average(weight * gap**2, batch, "tokens")
    conservative = average((spread - chosen).sum(1), batch, "tokens")
    return LossOutput(fit.loss + level + cql * conservative, {"cql": float(conservative.detach())})


def squared_log_ratio(logprobs: Tensor, batch: Batch) -> LossOutput:
    """The k2 estimate of the KL to the reference as a loss, per sampled token: ``1/2 * log(p / p_ref)**2``.

    Schulman (2020), "Approximating KL divergence". On the policy's own texts its expected gradient is that of the KL
    at each prefix; how a token changes the prefixes after it is left out (paid as a reward, the KL has that too).
    """
    ratio = _reference_ratio(logprobs, batch)
    return LossOutput(average(0.5 * ratio**2, batch, "tokens"))


def bounded_log_ratio(logprobs: Tensor, batch: Batch) -> LossOutput:
    """The k3 estimate of the KL to the reference as a loss, per sampled token: ``p_ref / p - 1 - log(p_ref / p)``.

    Schulman (2020). In value it estimates ``KL(p, p_ref)``; as a loss its expected gradient is that of the other KL,
    ``KL(p_ref, p)``, at each prefix. It is what Shao et al. (2024) use, equation 4.
    """
    ratio = _reference_ratio(logprobs, batch)
    return LossOutput(average((-ratio).exp() - 1.0 + ratio, batch, "tokens"))


# Why k1 is no loss: on the policy's own texts its expected gradient is 0.
KL_AS_LOSS = (
    "algorithm.kl_as: the log-ratio (k1) used as a loss has zero expected gradient and holds nothing back; "
    "set algorithm.kl_as to 'reward', where its reward-to-go is the gradient of the KL, or "
    "algorithm.kl_estimator to k2 or k3"
)


def average(per_token: Tensor, batch: Batch, normalise: Normalise, constant: float = 1.0) -> Tensor:
    """The sum over sampled tokens, divided by what ``normalise`` says, counted over the whole batch."""
    per_token = torch.where(batch.mask.bool(), per_token, torch.zeros_like(per_token))
    if normalise == "text_mean":
        lengths = batch.mask.bool().sum(1).clamp(min=1).to(per_token.dtype)
        return (per_token.sum(1) / lengths).sum() / batch.text_count
    summed = per_token.sum()
    if normalise == "text":
        return summed / batch.text_count
    if normalise == "tokens":
        return summed / batch.token_count
    if normalise == "constant":
        return summed / (batch.text_count * constant)
    raise UserError(f"normalise={normalise!r} is unknown; use 'text', 'tokens', 'constant' or 'text_mean'")


def _advantages(batch: Batch, logprobs: Tensor) -> Tensor:
    """Times the importance weights: both are weights, and neither carries gradient."""
    assert batch.advantages is not None, "credit the batch first: it has no advantages"
    assert logprobs.shape == batch.advantages.shape, "logprobs and advantages must both be [B, L]"
    advantages = batch.advantages if batch.weights is None else batch.advantages * batch.weights
    return advantages.detach().to(logprobs.dtype)


def _ratio(logprobs: Tensor, batch: Batch, level: Ratio, proximal: bool) -> Tensor:
    on = batch.mask.bool()
    before = batch.old_logprobs
    if proximal:
        assert batch.proximal_logprobs is not None, "annotate the batch first: the policy's own values are missing"
        before = batch.proximal_logprobs
    elif level == "sequence" and batch.proximal_logprobs is not None:
        before = torch.where(batch.own, batch.proximal_logprobs, before)
    gap = torch.where(on, logprobs - before.to(logprobs.dtype), torch.zeros_like(logprobs))
    if level == "sequence":
        mean = (gap.sum(1) / on.sum(1).clamp(min=1)).detach()
        own = torch.where(on, logprobs - logprobs.detach(), torch.zeros_like(logprobs))
        gap = torch.where(on, mean[:, None] + own, torch.zeros_like(own))
    elif level == "piece":
        gap = segment_sums(gap, on, "piece", batch.pieces)
    return gap.exp()


def _reference_ratio(logprobs: Tensor, batch: Batch) -> Tensor:
    assert batch.ref_logprobs is not None, "annotate the batch first: the KL needs the reference's values"
    gap = logprobs - batch.ref_logprobs.to(logprobs.dtype)
    return torch.where(batch.mask.bool(), gap, torch.zeros_like(gap))


def _metrics(logprobs: Tensor, batch: Batch) -> dict[str, float]:
    """How far the policy is from the one that sampled, per token over the whole batch (parts add up)."""
    gap = torch.where(batch.mask.bool(), logprobs.detach() - batch.old_logprobs.to(logprobs.dtype), 0.0)
    count = max(1, batch.token_count)
    return {
        "ratio_kl": float((gap.exp() - 1.0 - gap).sum()) / count,
        "sampler_gap": float(gap.abs().sum()) / count,
    }
