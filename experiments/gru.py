"""A small GRU policy, many seeds of it side by side: a ``Learner`` of the library's loop.

A model of a few thousand weights per seed, with all seeds in one batched product, trains a hundred times as fast as as
many runs of a real one. Seeds do not touch each other: each has random numbers, weights and a learning rate of its own,
and the optimizer works number by number.

Words: ``S`` seeds, ``n`` texts per seed and update, ``B = S * n`` rows (ordered by seed), ``L`` tokens with the prompt,
``T`` sampled ones, ``V`` vocabulary, ``H`` hidden size.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from instant_reward.batch import Batch
from instant_reward.credit import Marks, Source
from instant_reward.rewards.base import Reward
from instant_reward.types import Needs, PolicyOutput

Weights = dict[str, Tensor]
STRIDE = 1000  # the group numbers of the s-th seed lie in [s * STRIDE, (s + 1) * STRIDE)


@dataclass(frozen=True)
class Texts:
    """What a task and its rewards look at: ``prompt [B, P]``, ``tokens [B, T]``, and ``on [B, T]``: which were sampled.

    Behind the end ``on`` is False, and so it is on cues, where a task has them.
    """

    prompt: Tensor
    tokens: Tensor
    on: Tensor


@dataclass(frozen=True)
class Task:
    """A toy task.

    Attributes:
        vocabulary: token ids go from 0 up to it; prompts are made of the same tokens.
        length: how many tokens are sampled; with ``end``, at most.
        prompts: int64 ``[N, P]``; each group of texts continues one of them, drawn at random.
        score: the true score of whole texts, ``[B]``; what every arm is measured by, whatever it is paid.
        end: the token that ends a text; None where all are as long. A text that reaches ``length`` is finished too.
        cues: where above 0, a token below it is drawn evenly and put before each sampled one (another speaker's word).
    """

    vocabulary: int
    length: int
    prompts: Tensor
    score: Callable[[Texts], Tensor]
    end: int | None = None
    cues: int = 0


@dataclass
class Adam:
    """Kingma and Ba (2015), number by number, with a learning rate for each seed: ``rates [S]``."""

    rates: Tensor
    decay: tuple[float, float] = (0.9, 0.999)
    epsilon: float = 1e-8
    steps: int = 0
    means: Weights = field(default_factory=dict)
    squares: Weights = field(default_factory=dict)

    def step(self, weights: Weights) -> None:
        """Moves the weights ``[S, ...]`` by their gradients, in place, and drops these."""
        self.steps += 1
        first, second = self.decay
        for name, weight in weights.items():
            if weight.grad is None:
                continue
            mean = self.means.setdefault(name, torch.zeros_like(weight, requires_grad=False))
            square = self.squares.setdefault(name, torch.zeros_like(weight, requires_grad=False))
            mean.mul_(first).add_(weight.grad, alpha=1 - first)
            square.mul_(second).addcmul_(weight.grad, weight.grad, value=1 - second)
            size = (square / (1 - second**self.steps)).sqrt() + self.epsilon
            rate = self.rates.view(-1, *[1] * (weight.dim() - 1)) / (1 - first**self.steps)
            weight.data -= rate * mean / size
            weight.grad = None


class Policy:
    """``S`` language models side by side: token -> gates of a GRU -> logits. A ``Learner`` of the library's loop.

    Attributes:
        weights: the policy's, each with a leading ``[S]``; critic: the values', empty where nobody asked for any.
        reference: what the KL is taken to (the policy as it began); teacher: any weights of the same shapes.
    """

    def __init__(
        self,
        task: Task,
        seeds: Sequence[int],
        learning_rate: float | Sequence[float] = 0.01,
        hidden: int = 32,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        """``learning_rate``: one for all seeds, or one for each. A seed's number fixes all its random numbers."""
        self.task, self.seeds, self.hidden = task, list(seeds), hidden
        rates = [learning_rate] * len(self.seeds) if isinstance(learning_rate, float) else list(learning_rate)
        self.rates = torch.tensor(rates, dtype=dtype)
        self.random = [torch.Generator().manual_seed(seed) for seed in self.seeds]
        size = task.vocabulary
        self.weights: Weights = {
            "input": self._drawn((size, 3 * hidden), 1.0, dtype),
            "hidden": self._drawn((hidden, 3 * hidden), hidden**-0.5, dtype),
            "output": self._drawn((hidden, size), 0.1 * hidden**-0.5, dtype),  # begins near to all tokens alike
            "bias": torch.zeros(len(self.seeds), 1, size, dtype=dtype, requires_grad=True),
        }
        self.critic: Weights = {}
        self.reference: Weights | None = None
        self.teacher: Weights | None = None
        self.needs = Needs()
        self.optimizers = [Adam(self.rates), Adam(self.rates)]

    def _drawn(self, shape: tuple[int, ...], scale: float, dtype: torch.dtype) -> Tensor:
        each = [torch.randn(shape, generator=one, dtype=torch.float64) * scale for one in self.random]
        return torch.stack(each).to(dtype).requires_grad_()

    def prepare(self, needs: Needs) -> None:
        """Makes what an algorithm asks for: the reference, and a critic whose trunk begins as the policy's."""
        assert needs.top_actions is None, "this policy has no Q functions"
        self.needs = needs
        self.reference = self.snapshot()
        if needs.critic is None:
            return
        assert needs.critic.model == "copy", "the critic here is a copy of the policy's trunk"
        assert needs.critic.tables == 0, "the critic here has values only"
        self.critic = {name: self.reference[name].clone().requires_grad_() for name in ("input", "hidden")}
        shape = (len(self.seeds), self.hidden, needs.critic.outputs)
        self.critic["output"] = torch.zeros(shape, dtype=self.rates.dtype, requires_grad=True)
        self.critic["bias"] = torch.zeros(shape[0], 1, shape[2], dtype=self.rates.dtype, requires_grad=True)
        if needs.critic.learning_rate is not None:
            self.optimizers[1] = Adam(torch.full_like(self.rates, needs.critic.learning_rate))

    def snapshot(self) -> Weights:
        """The policy's weights as they are now, copied, without gradient."""
        return {name: weight.detach().clone() for name, weight in self.weights.items()}

    @torch.no_grad()
    def sample(
        self,
        sources: Sequence[Source],
        rewards: Sequence[Reward],
        groups: int,
        siblings: int,
        weights: Weights | None = None,
        version: int = 0,
        random: Sequence[torch.Generator] | None = None,
    ) -> tuple[Batch, Texts]:
        """For each seed ``groups`` prompts with ``siblings`` texts each, marked by the rewards.

        Args:
            sources: what ``algorithms.build`` made of the rewards.
            weights: of an earlier policy (staleness), of that ``version``; by default this one's.
            random: generators, one per seed, in place of the policy's own (to look without disturbing).
        """
        random, rows, length = random or self.random, groups * siblings, self.task.length
        drawn = [torch.randint(len(self.task.prompts), (groups,), generator=one) for one in random]
        prompt = self.task.prompts[torch.stack(drawn)].repeat_interleave(siblings, 1)  # [S, n, P]
        noise = [torch.rand(rows, length, generator=one, dtype=torch.float64) for one in random]
        cues = None
        if self.task.cues:
            cues = torch.stack([torch.randint(self.task.cues, (rows, length), generator=one) for one in random])
        tokens, logprobs, on = self._written(weights or self.weights, prompt, torch.stack(noise), cues)
        texts = Texts(prompt.flatten(0, 1), tokens.flatten(0, 1), on.flatten(0, 1))
        group = torch.arange(len(self.seeds))[:, None] * STRIDE + torch.arange(groups).repeat_interleave(siblings)
        return as_batch(texts, logprobs.flatten(0, 1), group.flatten(), sources, rewards, version), texts

    def _written(
        self, weights: Weights, prompt: Tensor, noise: Tensor, cues: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Tokens, their log-probabilities, and which of them were sampled: ``[S, n, T]`` each; ``2T`` with cues."""
        state = torch.zeros(*prompt.shape[:2], self.hidden, dtype=self.rates.dtype)
        for one in prompt.unbind(2):
            state = _advance(weights, _gates(weights, one), state)
        writing, nothing = torch.ones(prompt.shape[:2], dtype=torch.bool), torch.zeros_like(state[..., 0])
        tokens, logprobs, on = [], [], []
        for t in range(self.task.length):
            if cues is not None:
                state = _advance(weights, _gates(weights, cues[..., t]), state)
                tokens, logprobs, on = [*tokens, cues[..., t]], [*logprobs, nothing], [*on, nothing.bool()]
            chances = (torch.bmm(state, weights["output"]) + weights["bias"]).log_softmax(-1)
            below = chances.exp().cumsum(-1) < noise[..., t : t + 1].to(chances.dtype)
            token = torch.where(writing, below.sum(-1).clamp(max=self.task.vocabulary - 1), 0)
            logprobs.append(torch.where(writing, chances.gather(-1, token[..., None])[..., 0], nothing))
            tokens.append(token)
            on.append(writing)
            writing = writing if self.task.end is None else writing & (token != self.task.end)
            state = _advance(weights, _gates(weights, token), state)
        return torch.stack(tokens, -1), torch.stack(logprobs, -1), torch.stack(on, -1)

    def __call__(self, batch: Batch) -> PolicyOutput:
        """What the loop asks: log-probabilities ``[B, L]`` and what ``prepare`` was told, of any rows in any order."""
        seats = self._seats(batch)
        chances = self._chances(self.weights, batch, seats)
        output = PolicyOutput(_of_tokens(chances, batch))
        if self.critic:
            output.values = self._values(batch, seats)
        if self.needs.entropy:
            output.entropy = torch.where(batch.mask, -(chances.exp() * chances).sum(-1), 0.0)
        if self.needs.teacher is not None and self.needs.teacher.whole:
            output.divergence = self._divergence(chances, batch, seats)
        return output

    @torch.no_grad()
    def annotate(self, batch: Batch) -> Batch:
        """The batch with values and other policies' log-probabilities, as far as ``prepare`` was told to."""
        needs, seats = self.needs, self._seats(batch)
        changes: dict[str, Any] = {}
        if needs.reference:
            assert self.reference is not None, "prepare the policy first"
            changes["ref_logprobs"] = _of_tokens(self._chances(self.reference, batch, seats), batch)
        if needs.proximal:
            changes["proximal_logprobs"] = _of_tokens(self._chances(self.weights, batch, seats), batch)
        if self.critic:
            changes["values"] = self._values(batch, seats)
            changes["bootstrap"] = torch.zeros(len(batch), len(batch.sources), dtype=self.rates.dtype)  # all finished
        if needs.teacher is not None and not needs.teacher.whole:
            assert self.teacher is not None, "give the policy a teacher: policy.teacher = other.snapshot()"
            changes["teacher_logprobs"] = _of_tokens(self._chances(self.teacher, batch, seats), batch)
            if needs.teacher.baseline:
                mine = self._chances(self.weights, batch, seats)
                changes["teacher_baseline"] = -self._divergence(mine, batch, seats)
        return replace(batch, **changes)

    def backward(self, loss: Tensor) -> None:
        """Adds to the gradients. The loss is averaged over all seeds' texts; each seed wants the mean of its own."""
        (loss * len(self.seeds)).backward()

    def forget(self) -> None:
        """Drops the gradients."""
        for weight in [*self.weights.values(), *self.critic.values()]:
            weight.grad = None

    def step(self) -> dict[str, float]:
        """One optimizer step for every seed; no norm is clipped, since that would tie them together."""
        for optimizer, weights in zip(self.optimizers, (self.weights, self.critic), strict=True):
            optimizer.step(weights)
        return {}

    def _seats(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """For each row its seed and its number among that seed's rows: where it sits in ``[S, n]``."""
        groups = torch.div(batch.group, STRIDE, rounding_mode="floor")
        order = torch.argsort(groups, stable=True)
        counts = torch.bincount(groups, minlength=len(self.seeds))
        number = torch.empty_like(groups)
        number[order] = torch.arange(len(groups)) - (counts.cumsum(0) - counts)[groups[order]]
        return groups, number

    def _run(self, weights: Weights, batch: Batch, seats: tuple[Tensor, Tensor]) -> Tensor:
        """What ``output`` makes of the text before each token, ``[B, L, out]``; prefixes, hence causal."""
        seed, number = seats
        tokens = torch.zeros(len(self.seeds), int(number.max()) + 1, batch.token_ids.shape[1], dtype=torch.long)
        tokens[seed, number] = batch.token_ids
        gates = _gates(weights, tokens).unbind(2)
        states = [torch.zeros(*tokens.shape[:2], self.hidden, dtype=self.rates.dtype)]
        for t in range(tokens.shape[2] - 1):
            states.append(_advance(weights, gates[t], states[-1]))
        said = torch.einsum("snlh,sho->snlo", torch.stack(states, 2), weights["output"]) + weights["bias"][:, None]
        return said[seed, number]

    def _chances(self, weights: Weights, batch: Batch, seats: tuple[Tensor, Tensor]) -> Tensor:
        return self._run(weights, batch, seats).log_softmax(-1)

    def _values(self, batch: Batch, seats: tuple[Tensor, Tensor]) -> Tensor:
        return torch.where(batch.mask[:, None], self._run(self.critic, batch, seats).transpose(1, 2), 0.0)

    def _divergence(self, chances: Tensor, batch: Batch, seats: tuple[Tensor, Tensor]) -> Tensor:
        """The KL to the teacher over the whole vocabulary at each prefix, ``[B, L]``."""
        assert self.teacher is not None, "give the policy a teacher: policy.teacher = other.snapshot()"
        with torch.no_grad():
            theirs = self._chances(self.teacher, batch, seats)
        return torch.where(batch.mask, (chances.exp() * (chances - theirs)).sum(-1), 0.0)


def _gates(weights: Weights, tokens: Tensor) -> Tensor:
    """What each token ``[S, n, ...]`` sends into the GRU's gates, ``[S, n, ..., 3H]``."""
    seed = torch.arange(len(tokens)).view(-1, *[1] * (tokens.dim() - 1))
    return weights["input"][seed, tokens]


def _advance(weights: Weights, gates: Tensor, state: Tensor) -> Tensor:
    """One step of a GRU, Cho et al. (2014): ``[S, n, H]``."""
    size = state.shape[-1]
    inner = torch.bmm(state, weights["hidden"])
    both = torch.sigmoid(gates[..., : 2 * size] + inner[..., : 2 * size])
    new = torch.tanh(gates[..., 2 * size :] + both[..., :size] * inner[..., 2 * size :])
    return torch.lerp(new, state, both[..., size:])


def _of_tokens(chances: Tensor, batch: Batch) -> Tensor:
    chosen = chances.gather(-1, batch.token_ids[..., None])[..., 0]
    return torch.where(batch.mask, chosen, 0.0)


def as_batch(
    texts: Texts,
    logprobs: Tensor,
    group: Tensor,
    sources: Sequence[Source],
    rewards: Sequence[Reward],
    version: int = 0,
) -> Batch:
    """Texts as a batch of the library, marked by the rewards.

    Args:
        logprobs: ``[B, T]``, the sampler's.
        group: int64 ``[B]``; ``STRIDE`` numbers for each seed.
    """
    rows, begin = texts.prompt.shape
    before = torch.zeros(rows, begin, dtype=torch.long)
    mask = torch.cat([before.bool(), texts.on], 1)
    return Batch(
        token_ids=torch.cat([texts.prompt, texts.tokens], 1),
        mask=mask,
        versions=torch.where(mask, version, -1),
        old_logprobs=torch.cat([before.to(logprobs.dtype), logprobs], 1),
        no_end=torch.zeros_like(mask),
        length=begin + _lengths(texts),
        prompt_length=torch.full((rows,), begin),
        group=group,
        cut_off=torch.zeros(rows, dtype=torch.bool),
        sources=list(sources),
        marks=_marks(texts, sources, rewards, logprobs.dtype),
        temperature=1.0,
        text_count=rows,
        token_count=int(mask.sum()),
    )


def _lengths(texts: Texts) -> Tensor:
    """Up to and with the last sampled token, ``[B]``."""
    return (texts.on * torch.arange(1, texts.on.shape[1] + 1)).amax(1)


def _marks(texts: Texts, sources: Sequence[Source], rewards: Sequence[Reward], dtype: torch.dtype) -> Marks:
    """What each reward's function says of all texts, as marks over the flat sequence."""
    begin, lengths = texts.prompt.shape[1], _lengths(texts)
    index = {source.name: number for number, source in enumerate(sources)}
    none = torch.zeros(0, dtype=torch.long)
    columns = [[none, none, none, none, none, none.to(dtype)]]  # so that no reward at all is no special case
    for reward in rewards:
        said = reward.function(texts)
        values, seen = said if isinstance(said, tuple) else (said, None)
        if values.dim() == 1:  # of the whole text
            row = torch.arange(len(values))
            start, end = torch.full_like(row, begin), begin + lengths
            known, value = end, values
        else:
            row, t = texts.on.nonzero(as_tuple=True)
            start, end, value = begin + t, begin + t + 1, values[row, t]
            known = end if seen is None else begin + seen[row, t]
        columns.append([row, torch.full_like(row, index[reward.name]), start, end, known, value.to(dtype)])
    return Marks(*(torch.cat(column) for column in zip(*columns, strict=True)))
