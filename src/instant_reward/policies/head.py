"""Log-probabilities of sampled tokens from hidden states, in chunks: ``[B, L, V]`` never exists."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

CHUNK_ELEMENTS = 2**25  # logits of one chunk: 128 MiB in float32
KEPT_ELEMENTS = (
    2**26
)  # up to here (256 MiB) the backward pass finds the probabilities kept; beyond, it computes them anew


@dataclass(frozen=True)
class Softmax:
    """How the sampler drew: its temperature, and the end tokens it forbade at some positions."""

    temperature: float = 1.0
    end_ids: tuple[int, ...] = ()


def token_logprobs(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, no_end: Tensor, softmax: Softmax
) -> tuple[Tensor, Tensor]:
    """The log-probability of each target, and the entropy of the distribution it was drawn from.

    Args:
        hidden: ``[N, D]``, the states that predict the targets.
        weight, bias: the output head, ``[V, D]`` and ``[V]``.
        targets: int64 ``[N]``.
        no_end: bool ``[N]``, where the end tokens are forbidden.

    Returns:
        Log-probabilities ``[N]`` with gradient, and entropies ``[N]`` in nats without.
    """
    assert hidden.dim() == 2, f"hidden must be [N, D], not {tuple(hidden.shape)}"
    assert hidden.shape[0] == targets.shape[0], "hidden [N, D] and targets [N] must agree"
    result: tuple[Tensor, Tensor] = _TokenLogprobs.apply(hidden, weight, bias, targets, no_end, softmax)  # type: ignore[no-untyped-call]
    return result


class _TokenLogprobs(torch.autograd.Function):
    """The gradient by hand. Of many tokens it keeps the log-normalisers only and computes the logits once more."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, no_end: Tensor, softmax: Softmax
    ) -> tuple[Tensor, Tensor]:
        logprobs, entropies, normalisers = [], [], []
        keep = ctx.needs_input_grad[0] and hidden.shape[0] * weight.shape[0] <= KEPT_ELEMENTS
        ctx.kept = []
        for rows in chunks(hidden.shape[0], weight.shape[0]):
            logits = logits_of(hidden[rows], weight, bias, no_end[rows], softmax)
            highest = logits.amax(-1, keepdim=True)
            exponentials = (logits - highest).exp_()
            total = exponentials.sum(-1)
            normaliser = total.log() + highest.squeeze(1)
            logprobs.append(logits.gather(1, targets[rows, None]).squeeze(1) - normaliser)
            # Entropy is the normaliser less the mean logit; a forbidden token's -inf counts 0.
            if softmax.end_ids:
                logits.masked_fill_(logits == -torch.inf, 0.0)
            entropies.append(normaliser - torch.linalg.vecdot(exponentials, logits) / total)
            normalisers.append(normaliser)
            if keep:
                ctx.kept.append(exponentials.div_(total[:, None]))
        empty = hidden.new_zeros(0, dtype=_wide(hidden.dtype))
        ctx.save_for_backward(hidden, weight, bias, targets, no_end, torch.cat([*normalisers, empty]))
        ctx.softmax = softmax
        entropy = torch.cat([*entropies, empty])
        ctx.mark_non_differentiable(entropy)
        return torch.cat([*logprobs, empty]), entropy

    @staticmethod
    def backward(ctx: Any, gradient: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight, bias, targets, no_end, normaliser = ctx.saved_tensors
        grad_hidden = torch.zeros_like(hidden)
        grad_weight = torch.zeros_like(weight) if ctx.needs_input_grad[1] else None
        grad_bias = torch.zeros_like(bias) if bias is not None and ctx.needs_input_grad[2] else None
        for number, rows in enumerate(chunks(hidden.shape[0], weight.shape[0])):
            if ctx.kept:
                probabilities = ctx.kept[number]
            else:
                logits = logits_of(hidden[rows], weight, bias, no_end[rows], ctx.softmax)
                probabilities = logits.sub_(normaliser[rows, None]).exp_()
            # d logp / d logits = one-hot(target) - softmax
            upstream = gradient[rows, None] / ctx.softmax.temperature
            slope = probabilities * -upstream
            slope = slope.scatter_add_(1, targets[rows, None], upstream).to(hidden.dtype)
            grad_hidden[rows] = (slope @ weight.to(slope.dtype)).to(hidden.dtype)
            if grad_weight is not None:
                grad_weight += slope.T @ hidden[rows].to(slope.dtype)
            if grad_bias is not None:
                grad_bias += slope.sum(0)
        return grad_hidden, grad_weight, grad_bias, None, None, None


def chunks(rows: int, width: int) -> list[slice]:
    """Slices of so many rows that the logits of one, ``width`` wide, fit into a chunk."""
    size = max(1, CHUNK_ELEMENTS // width)
    return [slice(start, start + size) for start in range(0, rows, size)]


def logits_of(hidden: Tensor, weight: Tensor, bias: Tensor | None, no_end: Tensor, softmax: Softmax) -> Tensor:
    """The logits ``[n, V]`` that were drawn from: at the sampler's temperature, minus infinity where forbidden."""
    dtype = hidden.dtype
    logits = torch.nn.functional.linear(
        hidden.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype)
    ).to(_wide(hidden.dtype))
    if softmax.temperature != 1.0:
        logits = logits / softmax.temperature
    if softmax.end_ids and bool(no_end.any()):
        ends = torch.tensor(softmax.end_ids, device=logits.device)
        logits[no_end.nonzero(), ends] = -torch.inf
    return logits


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32
