"""Sums over the vocabulary with gradient, in chunks: ``[N, V]`` is computed again for the backward pass, never kept."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from instant_reward.policies.head import Softmax, chunks, logits_of


@dataclass(frozen=True)
class Head:
    """The states of ``N`` tokens and the output head that turns them into logits.

    Attributes:
        hidden: ``[N, D]``; weight, bias: ``[V, D]`` and ``[V]``.
        no_end: bool ``[N]``, where the end tokens are forbidden.
        shadow: the weight in the states' dtype, without gradient, where there is a copy; None otherwise.
    """

    hidden: Tensor
    weight: Tensor
    bias: Tensor | None
    no_end: Tensor
    softmax: Softmax
    shadow: Tensor | None = None

    def logprobs(self, rows: slice) -> Tensor:
        """``[n, V]``; of a forbidden token the least that the dtype holds, so that times probability 0 it is 0."""
        values = logits_of(self.hidden[rows], self.weight, self.bias, self.no_end[rows], self.softmax).log_softmax(-1)
        return values.clamp(min=torch.finfo(values.dtype).min)


def likeliest(head: Head) -> Tensor:
    """The likeliest action of each state, int64 ``[N]``, without gradient."""
    rows = chunks(len(head.hidden), head.weight.shape[0])
    return torch.cat([head.logprobs(some).argmax(-1) for some in rows] or [torch.zeros(0, dtype=torch.long)])


def entropy(head: Head) -> Tensor:
    """The entropy of the next token in nats, ``[N]``, with gradient."""

    def some(rows: slice) -> Tensor:
        values = head.logprobs(rows)
        return -(values.exp() * values).sum(-1)

    return _in_chunks(head, some)


def divergence(head: Head, teacher: Head) -> Tensor:
    """``KL(p, teacher)`` of the next token in nats, ``[N]``, with gradient into the first."""

    def some(rows: slice) -> Tensor:
        values = head.logprobs(rows)
        with torch.no_grad():
            other = teacher.logprobs(rows)
        return (values.exp() * (values - other)).sum(-1)

    return _in_chunks(head, some)


def expected_advantage(head: Head, table: Callable[[slice], Tensor], top: int = 0) -> Tensor:
    """``sum over a of p(a) * (Q(a) - V)`` with gradient into ``p`` alone, ``[N]``.

    ``V`` is the mean of Q under p over the same tokens, so that the sum is 0 in value and its gradient the policy's.

    Args:
        table: the Q of a slice of the rows, ``[n, V]``.
        top: sum over so many of the likeliest tokens, as if there were no others; 0 for all.
    """

    def some(rows: slice) -> Tensor:
        values = head.logprobs(rows)
        with torch.no_grad():
            worth = table(rows).to(values.dtype)
        if top:
            likeliest = values.detach().topk(min(top, values.shape[1]), -1).indices
            values, worth = values.gather(1, likeliest), worth.gather(1, likeliest)
        chances = values.exp()
        kept = chances.detach()
        level = (kept * worth).sum(-1, keepdim=True) / kept.sum(-1, keepdim=True)
        return (chances * (worth - level)).sum(-1)

    return _in_chunks(head, some)


def expected_value(head: Head, table: Callable[[slice], Tensor]) -> Tensor:
    """``sum over a of p(a) * Q(a)``, ``[N]``; call it without gradient."""
    parts = [
        (head.logprobs(rows).exp() * table(rows)).sum(-1) for rows in chunks(head.hidden.shape[0], head.weight.shape[0])
    ]
    return torch.cat([*parts, head.hidden.new_zeros(0)])


def log_sum_exp(table: Callable[[slice], Tensor], rows: int, width: int) -> Tensor:
    """The log-sum-exp of a Q function over the vocabulary, ``[N]``, with gradient into it."""
    parts = [
        checkpoint(lambda some: table(some).logsumexp(-1), part, use_reentrant=False) for part in chunks(rows, width)
    ]
    return torch.cat([*parts, table(slice(0, 0)).sum(-1)])


def _in_chunks(head: Head, some: Callable[[slice], Tensor]) -> Tensor:
    parts = [checkpoint(some, rows, use_reentrant=False) for rows in chunks(head.hidden.shape[0], head.weight.shape[0])]
    return torch.cat([*parts, head.hidden.new_zeros(0)])
