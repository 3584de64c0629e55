"""A config's algorithm in the small world: what a policy would annotate and answer is looked up in tables.

``Chosen(world, rewards, name="a2c", ...)`` builds the algorithm as a run does. Where nothing was sampled, the tables
hold large numbers, so that whoever reads there is seen.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from exact.world import LONGEST, PROMPT, REINFORCE, World
from instant_reward import algorithms
from instant_reward.batch import Batch, collate
from instant_reward.config import AlgorithmConfig
from instant_reward.credit import Source
from instant_reward.policies import terms
from instant_reward.policies.head import Softmax
from instant_reward.policies.states import on_tokens
from instant_reward.rewards.base import as_rewards
from instant_reward.types import Carried, LossOutput, PolicyOutput

FIRST = len(PROMPT.token_ids)
JUNK = 1e3
Values = Mapping[tuple[int, ...], float]


class Chosen:
    """An algorithm and all that it asks for.

    Args:
        sampler: who wrote the texts, where it is not the policy.
        reference, taught_by: other policies; the teacher's options are under ``teacher``.
        values: for each source the critic's value of each prefix; of whole texts too, for what lies beyond a cut.
        table: the Q of each prefix and next token, ``[prefixes, 3]``.
        carried: what earlier steps left.
        options: of ``AlgorithmConfig``; ``normalise`` is "text" where it is not given.
    """

    def __init__(
        self,
        world: World,
        rewards: Sequence[Any],
        *,
        sampler: World | None = None,
        reference: World | None = None,
        taught_by: World | None = None,
        values: Sequence[Values] = (),
        table: Tensor | None = None,
        carried: Carried | None = None,
        **options: Any,
    ) -> None:
        self.world, self.rewards, self.sampler = world, as_rewards(rewards), sampler
        self.reference, self.teacher, self.values, self.table = reference, taught_by, values, table
        self.carried = Carried() if carried is None else carried
        config = AlgorithmConfig(**{"normalise": "text", **options})
        self.config = config
        self.algorithm = algorithms.build(config, self.rewards, LONGEST)

    def step(self, siblings: int = 1, apart: bool = False, credit: Any = None, loss: Any = None) -> Tensor:
        """The expected step; ``credit`` and ``loss`` stand in for its own, to build something wrong on purpose."""
        return self.world.expected_step(
            self.rewards,
            self.credit if credit is None else credit,
            self.loss if loss is None else loss,
            siblings,
            sampler=self.sampler,
            pieces=self.config.pieces,
            apart=apart,
        )

    def credit(self, batch: Batch) -> Batch:
        return self.algorithm.credit(self.annotate(batch))

    def loss(self, logprobs: Tensor, part: Batch) -> LossOutput:
        return self.algorithm.loss(self.output(logprobs, part), part)

    def annotate(self, batch: Batch) -> Batch:
        """What the algorithm needs of the policy before it can credit, and nothing else."""
        needs, found = self.algorithm.needs, dict[str, Any]()
        if self.sampler is not None:  # none of the texts is the policy's own
            found["fresh"] = torch.zeros(len(batch), dtype=torch.bool)
        if needs.proximal:
            found["proximal_logprobs"] = self.known(self.world, batch)
        if needs.reference:
            assert self.reference is not None
            found["ref_logprobs"] = self.known(self.reference, batch)
        if needs.teacher is not None:
            assert self.teacher is not None
            found["teacher_logprobs"] = self.known(self.teacher, batch)
            if needs.teacher.baseline:
                gap = terms.divergence(head(self.world, batch), head(self.teacher, batch)).detach()
                found["teacher_baseline"] = filled(on_tokens(-gap, batch.mask), batch)
        if needs.critic is not None:
            found |= self.judged(batch)
        return replace(batch, sources=self.algorithm.sources, carried=self.carried, **found)

    def judged(self, batch: Batch) -> dict[str, Tensor]:
        """What a critic says of a batch."""
        if self.table is not None:
            table, on = self.table, head(self.world, batch)
            rows = prefixes(self.world, batch)
            values = terms.expected_value(on, lambda some: table[rows[some]]).detach()
            return {"values": filled(on_tokens(values[:, None], batch.mask), batch)}
        values = torch.full((len(batch), len(self.values), batch.mask.shape[1]), JUNK, dtype=torch.float64)
        beyond = torch.zeros(len(batch), len(self.values), dtype=torch.float64)
        for source, of_prefix in enumerate(self.values):
            for row, t in batch.mask.nonzero().tolist():
                values[row, source, t] = of_prefix[tuple(batch.token_ids[row, FIRST:t].tolist())]
            for row, text in enumerate(written(batch)):
                if bool(batch.cut_off[row]):
                    beyond[row, source] = of_prefix.get(tuple(text), 0.0)
        return {"values": values, "bootstrap": beyond}

    def output(self, logprobs: Tensor, part: Batch) -> PolicyOutput:
        """What the policy answers for a part, with gradient into the world's logits."""
        needs = self.algorithm.needs
        output = PolicyOutput(logprobs, values=part.values)
        if needs.entropy:
            output.entropy = on_tokens(terms.entropy(head(self.world, part)), part.mask)
        if needs.teacher is not None and needs.teacher.whole:
            assert self.teacher is not None
            gap = terms.divergence(head(self.world, part), head(self.teacher, part))
            output.divergence = on_tokens(gap, part.mask)
        if self.table is not None:
            table, rows = self.table, prefixes(self.world, part)
            output.chosen = on_tokens(table[rows, part.token_ids[part.mask]][:, None], part.mask)
            if needs.top_actions is not None:
                on = head(self.world, part)
                expected = terms.expected_advantage(on, lambda some: table[rows[some]], needs.top_actions)
                output.expected = on_tokens(expected, part.mask)
        return output

    def known(self, world: World, batch: Batch) -> Tensor:
        """What another policy says of the sampled tokens, ``[B, L]``, without gradient."""
        return known(world, batch)

    def batch(self) -> Batch:
        """Every text once, annotated and credited."""
        writer = self.world if self.sampler is None else self.sampler
        rollouts = writer.rollouts(self.rewards)
        sources = [Source(one.name) for one in self.rewards]
        return self.credit(collate(rollouts, sources, dtype=torch.float64, pieces=self.config.pieces))


def known(world: World, batch: Batch) -> Tensor:
    """A policy's log-probabilities of the sampled tokens, ``[B, L]``, without gradient; junk elsewhere."""
    rows = [world.texts.index(text) for text in written(batch)]
    return filled(world.logprobs().detach()[rows][:, : batch.mask.shape[1]], batch)


def written(batch: Batch) -> list[list[int]]:
    """The sampled tokens of each text."""
    return [batch.token_ids[row, FIRST : int(batch.length[row])].tolist() for row in range(len(batch))]


def filled(values: Tensor, batch: Batch) -> Tensor:
    """Junk where nothing was sampled: ``[B, L]`` or ``[B, K, L]``."""
    on = batch.mask if values.dim() == 2 else batch.mask[:, None].expand_as(values)
    return torch.where(on, values, JUNK)


def prefixes(world: World, batch: Batch) -> Tensor:
    """The row of the policy's table that each sampled token was drawn from, ``[N]``."""
    at = [tuple(batch.token_ids[row, FIRST:t].tolist()) for row, t in batch.mask.nonzero().tolist()]
    return torch.tensor([world.row_of[prefix] for prefix in at])


def head(world: World, batch: Batch) -> terms.Head:
    """The policy as the library's output head: the state of a prefix is its place in the table."""
    rows = prefixes(world, batch)
    states = torch.nn.functional.one_hot(rows, len(world.row_of)).double()
    none = torch.zeros(len(rows), dtype=torch.bool)
    return terms.Head(states, world.logits.T, None, none, Softmax())


def true_values(world: World, rewards: Sequence[Any], credit: Any = REINFORCE) -> tuple[dict[Any, float], Tensor]:
    """The expected return of each prefix, and of each prefix and next token ``[prefixes, 3]``: by enumeration."""
    named = as_rewards(rewards)
    sources = [Source(one.name, one.weight, 1.0 if one.discount is None else one.discount) for one in named]
    batch = credit(collate(world.rollouts(named), sources, dtype=torch.float64))
    weights = world.probabilities().detach()
    total = torch.zeros(len(world.row_of), 3, dtype=torch.float64)
    mass = torch.zeros_like(total)
    for row, t in batch.mask.nonzero().tolist():
        place = (world.row_of[tuple(batch.token_ids[row, FIRST:t].tolist())], int(batch.token_ids[row, t]))
        total[place] += weights[row] * batch.returns[row, t]
        mass[place] += weights[row]
    values = total.sum(1) / mass.sum(1)
    return {prefix: float(values[row]) for prefix, row in world.row_of.items()}, total / mass


def expected_over_prefixes(world: World, per_prefix: Tensor) -> Tensor:
    """The sum of ``per_prefix [prefixes]`` over the prefixes that a text passes, on average, held fixed."""
    reached = torch.zeros(len(world.row_of), dtype=torch.float64)
    for text, weight in zip(world.texts, world.probabilities().detach().tolist(), strict=True):
        for t in range(len(text)):
            reached[world.row_of[tuple(text[:t])]] += weight
    return (reached * per_prefix).sum()


def log_table(world: World) -> Tensor:
    """Log-probabilities, ``[prefixes, 3]``, with gradient."""
    return world.logits.log_softmax(-1)


def gradient_of(world: World, scalar: Tensor) -> Tensor:
    (gradient,) = torch.autograd.grad(scalar, world.logits)
    return gradient
