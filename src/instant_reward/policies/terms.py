"""What each of N actions was drawn from, and sums over it with gradient.

Of a vocabulary, ``[N, V]`` is computed in chunks and again for the backward pass, never kept.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from instant_reward.policies.head import Softmax, as_drawn, chunks, logits_of, token_logprobs


class Distribution(ABC):
    """What each of ``N`` actions was drawn from.

    Attributes:
        hidden: the states that they were chosen from, ``[N, D]``.
    """

    hidden: Tensor

    @property
    @abstractmethod
    def width(self) -> int:
        """How many actions there were to choose from, ``V``."""

    @abstractmethod
    def logits(self, rows: slice) -> Tensor:
        """``[n, V]``, at the sampler's temperature; minus infinity where an action was forbidden."""

    @abstractmethod
    def of(self, targets: Tensor) -> tuple[Tensor, Tensor]:
        """The log-probabilities of the actions ``targets [N]`` with gradient, and the entropies ``[N]`` without."""

    def likeliest(self, targets: Tensor) -> Tensor:
        """The likeliest actions that might stand where ``targets [N]`` do, int64 ``[N]``, without gradient."""
        rows = chunks(len(self.hidden), self.width)
        return torch.cat([self.logprobs(some).argmax(-1) for some in rows] or [torch.zeros_like(targets)])

    def logprobs(self, rows: slice) -> Tensor:
        """``[n, V]``; of a forbidden action the least that the dtype holds, so that times probability 0 it is 0."""
        values = self.logits(rows).log_softmax(-1)
        return values.clamp(min=torch.finfo(values.dtype).min)


@dataclass(frozen=True)
class Head(Distribution):
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

    @property
    def width(self) -> int:
        """See ``Distribution``."""
        return int(self.weight.shape[0])

    def logits(self, rows: slice) -> Tensor:
        """See ``Distribution``."""
        return logits_of(self.hidden[rows], self.weight, self.bias, self.no_end[rows], self.softmax)

    def of(self, targets: Tensor) -> tuple[Tensor, Tensor]:
        """See ``Distribution``."""
        given = (self.hidden, self.weight, self.bias, targets, self.no_end, self.softmax, self.shadow)
        return token_logprobs(*given)


@dataclass(frozen=True)
class Choices(Distribution):
    """Actions that differ from row to row, such as the sentences of a document: their scores, written out.

    Attributes:
        hidden: ``[N, D]``, what a critic reads.
        scores: ``[N, A]``, minus infinity where a row has no such action or may not take it.
        no_end: bool ``[N]``, where the ends are forbidden.
    """

    hidden: Tensor
    scores: Tensor
    no_end: Tensor
    softmax: Softmax

    @property
    def width(self) -> int:
        """See ``Distribution``."""
        return int(self.scores.shape[1])

    def logits(self, rows: slice) -> Tensor:
        """See ``Distribution``."""
        return as_drawn(self.scores[rows].clone(), self.no_end[rows], self.softmax)

    def of(self, targets: Tensor) -> tuple[Tensor, Tensor]:
        """See ``Distribution``."""
        values = self.logprobs(slice(None))
        with torch.no_grad():
            entropies = -(values.exp() * values).sum(-1)
        return values.gather(1, targets[:, None]).squeeze(1), entropies


def entropy(head: Distribution) -> Tensor:
    """The entropy of the next token in nats, ``[N]``, with gradient."""

    def some(rows: slice) -> Tensor:
        values = head.logprobs(rows)
        return -(values.exp() * values).sum(-1)

    return _in_chunks(head, some)


def divergence(head: Distribution, teacher: Distribution) -> Tensor:
    """``KL(p, teacher)`` of the next token in nats, ``[N]``, with gradient into the first."""

    def some(rows: slice) -> Tensor:
        values = head.logprobs(rows)
        with torch.no_grad():
            other = teacher.logprobs(rows)
        return (values.exp() * (values - other)).sum(-1)

    return _in_chunks(head, some)


def expected_advantage(head: Distribution, table: Callable[[slice], Tensor], top: int = 0) -> Tensor:
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


def expected_value(head: Distribution, table: Callable[[slice], Tensor]) -> Tensor:
    """``sum over a of p(a) * Q(a)``, ``[N]``; call it without gradient."""
    parts = [(head.logprobs(rows).exp() * table(rows)).sum(-1) for rows in chunks(head.hidden.shape[0], head.width)]
    return torch.cat([*parts, head.hidden.new_zeros(0)])


def log_sum_exp(table: Callable[[slice], Tensor], rows: int, width: int) -> Tensor:
    """The log-sum-exp of a Q function over the vocabulary, ``[N]``, with gradient into it."""
    parts = [
        checkpoint(lambda some: table(some).logsumexp(-1), part, use_reentrant=False) for part in chunks(rows, width)
    ]
    return torch.cat([*parts, table(slice(0, 0)).sum(-1)])


def _in_chunks(head: Distribution, some: Callable[[slice], Tensor]) -> Tensor:
    parts = [checkpoint(some, rows, use_reentrant=False) for rows in chunks(head.hidden.shape[0], head.width)]
    return torch.cat([*parts, head.hidden.new_zeros(0)])
