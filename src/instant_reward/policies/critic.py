"""The critic of a policy: values of prefixes, or of next tokens, on a trunk of its own or on the policy's."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from instant_reward import credit
from instant_reward.batch import Batch
from instant_reward.policies.states import Reader
from instant_reward.types import CriticNeed


class Critic(nn.Module):
    """Values ``[N, K]`` and Q functions ``[N, V]`` from the states of ``N`` prefixes.

    All heads begin at 0 in their weights; ``begin`` puts the mean return into their biases, so that the critic starts
    as the mean and not as noise.

    Args:
        base: a trunk of its own, or None for a head on the policy's.
        width: of the trunk's states.
        vocabulary: how many next tokens there are.
        dtype, device: of the heads.
    """

    def __init__(
        self, need: CriticNeed, base: Any, width: int, vocabulary: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        super().__init__()
        self.need = need
        self.base = base
        place: dict[str, Any] = {"dtype": dtype, "device": device}
        # With one Q function the value is its mean under the policy; it needs no head.
        self.value = None if need.tables == 1 else _zero(nn.Linear(width, need.outputs, **place))
        self.tables = _Tables([_zero(nn.Linear(width, vocabulary, **place)) for _ in range(need.tables)])
        self.slow = copy.deepcopy(self.tables).requires_grad_(False) if need.target_rate else None
        self.begun: Tensor
        self.register_buffer("begun", torch.zeros((), dtype=torch.bool, device=device))

    def states(self, batch: Batch, of_policy: Tensor | None, reader: Reader) -> Tensor:
        """The states it reads, ``[N, D]``: its own trunk's, or the policy's."""
        if self.base is not None:
            states = reader.of_sampled(self.base, batch)
        else:
            assert of_policy is not None, "a head on the policy's trunk needs the policy's states"
            alone = self.need.detach or batch.carried.step < self.need.warmup
            states = of_policy.detach() if alone else of_policy
        head = self.value if self.value is not None else self.tables.all()[0]
        return states.to(head.weight.dtype)

    def values(self, states: Tensor) -> Tensor:
        """``[N, K]``."""
        assert self.value is not None, "a critic of next tokens alone has no value of its own"
        values: Tensor = self.value(states)
        return values

    def chosen(self, states: Tensor, targets: Tensor, slow: bool = False) -> Tensor:
        """Each Q function's value of the tokens ``targets [N]`` alone: ``[N, tables]``."""
        tables = self.slow if slow else self.tables
        assert tables is not None, "this critic keeps no slow copy"
        found = [(states * table.weight[targets]).sum(-1) + table.bias[targets] for table in tables.all()]
        return torch.stack(found, 1)

    def table(self, states: Tensor, number: int = 0) -> Callable[[slice], Tensor]:
        """A Q function over the vocabulary, for slices of the rows."""
        head = self.tables.all()[number]
        return lambda rows: nn.functional.linear(states[rows], head.weight, head.bias)

    def least(self, states: Tensor) -> Tensor:
        """The least of the Q functions, less the value where there is one, ``[N, V]``: what guides the decoding."""
        states = states.to(self.tables.all()[0].weight.dtype)
        worth = torch.stack([nn.functional.linear(states, one.weight, one.bias) for one in self.tables.all()]).amin(0)
        return worth if self.value is None else worth - self.values(states)

    @torch.no_grad()
    def begin(self, batch: Batch) -> None:
        """Puts the mean reward-to-go of a first batch into the biases; later calls do nothing."""
        if bool(self.begun):
            return
        self.begun.fill_(True)
        means = mean_returns(batch)
        if self.need.tables:
            weights = torch.tensor([source.weight for source in batch.sources], dtype=means.dtype)
            means = (weights * means).sum()[None]
        heads = [] if self.value is None else [self.value]
        for head in [*heads, *self.tables.all(), *(self.slow.all() if self.slow else [])]:
            head.bias.copy_(means.to(head.bias).expand_as(head.bias))

    @torch.no_grad()
    def follow(self) -> None:
        """Lets the slow Q functions follow the quick ones (Polyak averaging)."""
        if self.slow is not None:
            for slow, quick in zip(self.slow.parameters(), self.tables.parameters(), strict=True):
                slow.lerp_(quick, self.need.target_rate)


class _Tables(nn.ModuleList):
    """Q functions over the vocabulary, one linear head each."""

    def all(self) -> list[nn.Linear]:
        return [head for head in self if isinstance(head, nn.Linear)]


def mean_returns(batch: Batch) -> Tensor:
    """The mean reward-to-go over sampled tokens, by source: ``[K]``; of dense sources, which begin at 0, 0."""
    rewards = credit.place(batch.marks, batch.sources, batch.mask)
    to_go = [
        credit.reward_to_go(rewards[:, index], batch.mask, source.discount)
        for index, source in enumerate(batch.sources)
    ]
    return torch.stack([one.sum() / max(1, int(batch.mask.sum())) for one in to_go])


def _zero(head: nn.Linear) -> nn.Linear:
    nn.init.zeros_(head.weight)
    nn.init.zeros_(head.bias)
    return head
