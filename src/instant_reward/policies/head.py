"""Log-probabilities of sampled tokens from hidden states, in chunks: ``[B, L, V]`` never exists."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

CHUNK_ELEMENTS = 2**25  # logits of one chunk: 128 MiB in float32
CACHED_ELEMENTS = 2**22  # of these 16 MiB stay in a processor's cache, from one pass over them to the next
KEPT_BYTES = 2**28  # up to here the backward pass finds the probabilities kept; beyond, it computes them anew


@dataclass(frozen=True)
class Softmax:
    """How the sampler drew: its temperature, and the end tokens it forbade at some positions."""

    temperature: float = 1.0
    end_ids: tuple[int, ...] = ()


def token_logprobs(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    no_end: Tensor,
    softmax: Softmax,
    shadow: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The log-probability of each target, and the entropy of the distribution it was drawn from.

    Args:
        hidden: ``[N, D]``, the states that predict the targets.
        weight, bias: the output head, ``[V, D]`` and ``[V]``.
        targets: int64 ``[N]``.
        no_end: bool ``[N]``, where the end tokens are forbidden.
        shadow: the weight in the dtype of ``hidden``, where there is a copy already.

    Returns:
        Log-probabilities ``[N]`` with gradient, and entropies ``[N]`` in nats without.
    """
    assert hidden.dim() == 2, f"hidden must be [N, D], not {tuple(hidden.shape)}"
    assert hidden.shape[0] == targets.shape[0], "hidden [N, D] and targets [N] must agree"
    matrix = weight.detach().to(hidden.dtype) if shadow is None else shadow
    result: tuple[Tensor, Tensor] = _TokenLogprobs.apply(hidden, weight, bias, targets, no_end, softmax, matrix)  # type: ignore[no-untyped-call]
    return result


class _TokenLogprobs(torch.autograd.Function):
    """The gradient by hand. Of many tokens it keeps the log-normalisers only and computes the logits once more.

    Its passes over the vocabulary go through slices that stay in the processor's cache; its products through chunks.
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        no_end: Tensor,
        softmax: Softmax,
        matrix: Tensor,
    ) -> tuple[Tensor, Tensor]:
        count, width = hidden.shape[0], weight.shape[0]
        keep = ctx.needs_input_grad[0] and count * width * hidden.element_size() <= KEPT_BYTES
        kept = hidden.new_empty(count, width) if keep else None
        logprobs, entropies, normalisers = [], [], []
        for rows in chunks(count, width, CACHED_ELEMENTS if hidden.device.type == "cpu" else CHUNK_ELEMENTS):
            logits = logits_of(hidden[rows], matrix, bias, no_end[rows], softmax)
            highest = logits.amax(-1, keepdim=True)
            exponentials = (logits - highest).exp_()
            total = exponentials.sum(-1)
            normaliser = total.log() + highest.squeeze(1)
            logprobs.append(logits.gather(1, targets[rows, None]).squeeze(1) - normaliser)
            # Entropy is the normaliser less the mean logit; a forbidden token's -inf counts 0.
            if softmax.end_ids:
                ends = logits[:, softmax.end_ids]
                logits[:, softmax.end_ids] = ends.masked_fill(ends == -torch.inf, 0.0)
            entropies.append(normaliser - torch.linalg.vecdot(exponentials, logits) / total)
            normalisers.append(normaliser)
            if kept is not None:
                torch.div(exponentials, total[:, None], out=exponentials)
                kept[rows] = exponentials
        empty = hidden.new_zeros(0, dtype=_wide(hidden.dtype))
        chosen = torch.cat([*logprobs, empty])
        normaliser = torch.cat([*normalisers, empty])
        ctx.save_for_backward(hidden, weight, bias, targets, no_end, normaliser, chosen, matrix, kept)
        ctx.softmax = softmax
        entropy = torch.cat([*entropies, empty])
        ctx.mark_non_differentiable(entropy)
        return chosen, entropy

    @staticmethod
    def backward(ctx: Any, gradient: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight, bias, targets, no_end, normaliser, chosen, matrix, kept = ctx.saved_tensors
        grad_hidden = torch.empty_like(hidden)
        grad_weight = None
        grad_bias = torch.zeros_like(bias) if bias is not None and ctx.needs_input_grad[2] else None
        for rows in chunks(hidden.shape[0], weight.shape[0]):
            if kept is not None:
                probabilities = kept[rows]
            else:
                logits = logits_of(hidden[rows], matrix, bias, no_end[rows], ctx.softmax)
                probabilities = logits.sub_(normaliser[rows, None]).exp_()
            # d logp / d logits = one-hot(target) - softmax; of a nearly certain target 1 - p must not be taken of a
            # rounded p.
            upstream = gradient[rows, None] / ctx.softmax.temperature
            own = -torch.expm1(chosen[rows, None]) * upstream
            slope = probabilities * -upstream.to(probabilities.dtype)
            slope = slope.scatter_(1, targets[rows, None], own.to(slope.dtype)).to(hidden.dtype)
            grad_hidden[rows] = slope @ matrix
            if ctx.needs_input_grad[1]:
                some = (slope.T @ hidden[rows]).to(weight.dtype)
                grad_weight = some if grad_weight is None else grad_weight.add_(some)
            if grad_bias is not None:
                grad_bias += slope.sum(0)
        if grad_weight is None and ctx.needs_input_grad[1]:
            grad_weight = torch.zeros_like(weight)
        return grad_hidden, grad_weight, grad_bias, None, None, None, None


def chunks(rows: int, width: int, elements: int = CHUNK_ELEMENTS) -> list[slice]:
    """Slices of so many rows that the logits of one, ``width`` wide, are at most so many."""
    size = max(1, elements // width)
    return [slice(start, start + size) for start in range(0, rows, size)]


def logits_of(hidden: Tensor, weight: Tensor, bias: Tensor | None, no_end: Tensor, softmax: Softmax) -> Tensor:
    """The logits ``[n, V]`` that were drawn from: at the sampler's temperature, minus infinity where forbidden."""
    dtype = hidden.dtype
    logits = torch.nn.functional.linear(hidden, weight.to(dtype), None if bias is None else bias.to(dtype)).to(
        _wide(dtype)
    )
    return as_drawn(logits, no_end, softmax)


def as_drawn(logits: Tensor, no_end: Tensor, softmax: Softmax) -> Tensor:
    """The logits ``[n, V]`` as the sampler had them; where ``no_end [n]`` is on, the ends are forbidden (in place)."""
    if softmax.temperature != 1.0:
        logits = logits / softmax.temperature
    if softmax.end_ids and bool(no_end.any()):
        ends = torch.tensor(softmax.end_ids, device=logits.device)
        logits[no_end.nonzero(), ends] = -torch.inf
    return logits


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32
