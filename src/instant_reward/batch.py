"""Rollouts as tensors: right-padded rows, minibatches of texts, and parts that fit in memory."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any, Protocol

import torch
from torch import Tensor

from instant_reward.credit import Marks, Source
from instant_reward.text import Pieces
from instant_reward.types import Carried, Every, PolicyOutput, Rollout

PER_TEXT = ("length", "prompt_length", "group", "cut_off", "fresh", "bootstrap")


@dataclass
class Batch:
    """``B`` texts of up to ``L`` tokens, right-padded.

    Attributes:
        token_ids, mask, versions: ``[B, L]``; ``mask`` is True where the policy sampled the token.
        old_logprobs: ``[B, L]``, the sampler's; 0 where the mask is off.
        no_end: ``[B, L]``, True where the end tokens were forbidden while sampling (``min_new_tokens``).
        length, prompt_length, group: int64 ``[B]``.
        cut_off: bool ``[B]``, texts that ran into the length limit, told apart from those that ended or were stopped.
        fresh: bool ``[B]``, texts that the policy wrote as it was when the step began; None where all are.
        sources: the ``K`` reward sources; ``marks`` point into them.
        temperature: the sampler's.
        text_count, token_count: counts over the whole batch, also in a part of it, so that any split sums to one step.
        carried: what the algorithm carries from step to step, as it was before this one.
        pieces: int64 ``[B, L]``, where pieces (words, sentences, ...) are the actions: the number of the one that a
            sampled token belongs to; 0, 1, ... in each text. One ends with the token that shows that a piece is over.
        contexts: of each text what the policy reads besides the flat sequence; None where that is all.
        reread: whether the contexts are read anew for each action: where actions change a text in its middle.
        shown: the same texts behind the prompts that the teacher sees, where it sees other ones than the policy.
        ref_logprobs, proximal_logprobs, teacher_logprobs: ``[B, L]``, of the reference, of the policy as it was when
            the step began, and of the teacher.
        teacher_baseline: ``[B, L]``, what the teacher's log-ratio is on average at that prefix: the KL, negative.
        values: ``[B, K, L]``, the critic's value of the text before each token, for each source.
        slow: ``[B, L]``, the least of the slow Q functions' values of the sampled token.
        bootstrap: ``[B, K]``, its value after the last token of a text that was cut off; 0 where it finished.
        rewards: ``[B, K, L]`` once placed; targets: ``[B, K, L]``, what the critic learns.
        advantages, returns: ``[B, L]``; weights: ``[B, L]``, importance weights, without gradient.
    """

    token_ids: Tensor
    mask: Tensor
    versions: Tensor
    old_logprobs: Tensor
    no_end: Tensor
    length: Tensor
    prompt_length: Tensor
    group: Tensor
    cut_off: Tensor
    sources: list[Source]
    marks: Marks
    temperature: float
    text_count: int
    token_count: int
    carried: Carried = field(default_factory=Carried)
    fresh: Tensor | None = None
    pieces: Tensor | None = None
    contexts: list[Any] | None = None
    reread: bool = False
    shown: Batch | None = None
    ref_logprobs: Tensor | None = None
    proximal_logprobs: Tensor | None = None
    teacher_logprobs: Tensor | None = None
    teacher_baseline: Tensor | None = None
    values: Tensor | None = None
    slow: Tensor | None = None
    bootstrap: Tensor | None = None
    rewards: Tensor | None = None
    targets: Tensor | None = None
    advantages: Tensor | None = None
    returns: Tensor | None = None
    weights: Tensor | None = None

    def __len__(self) -> int:
        return int(self.token_ids.shape[0])

    @property
    def own(self) -> Tensor:
        """``[B, L]``, the sampled tokens of the policy's own texts, as it was when the step began."""
        return self.mask if self.fresh is None else self.mask & self.fresh[:, None]

    def select(self, rows: Sequence[int]) -> Batch:
        """The same batch with these rows only, trimmed to the longest; the counts stay the whole batch's."""
        index = torch.as_tensor(rows, dtype=torch.long)
        longest = int(self.length[index].max())
        changes: dict[str, Any] = {}
        for one in fields(self):
            value = getattr(self, one.name)
            if isinstance(value, Tensor):
                changes[one.name] = value[index] if one.name in PER_TEXT else value[index][..., :longest]
            elif isinstance(value, Batch):
                changes[one.name] = value.select(rows)
        if self.contexts is not None:
            changes["contexts"] = [self.contexts[row] for row in index.tolist()]
        return replace(self, **changes)

    def minibatches(self, count: int, seed: int) -> Iterator[Batch]:
        """``count`` random shares of the texts, each with its own counts: one optimizer step each."""
        order = torch.randperm(len(self), generator=torch.Generator().manual_seed(seed)).tolist()
        count = min(count, len(self))
        for number in range(count):
            rows = sorted(order[number::count])
            share = self.select(rows)
            yield replace(share, text_count=len(rows), token_count=int(share.mask.sum()))

    def parts(self, tokens_per_part: int) -> Iterator[Batch]:
        """Splits for memory's sake; with the whole batch's counts their losses add up to the whole batch's loss."""
        return (self.select(rows) for rows in self.shares(tokens_per_part))

    def shares(self, tokens_per_part: int) -> Iterator[list[int]]:
        """Row numbers: rows of like length together, siblings side by side, about so many tokens each, evenly.

        A group's prompt counts once in a share, what is read besides the flat sequence included: siblings have it in
        common. What is read anew for each action counts each time.
        """
        longest_of: dict[int, int] = {}
        besides = [0] * len(self) if self.contexts is None else [_numbers_in(one) for one in self.contexts]
        for group, length, more in zip(self.group.tolist(), self.length.tolist(), besides, strict=True):
            longest_of[group] = max(longest_of.get(group, 0), length + more)
        order = sorted(range(len(self)), key=lambda row: (longest_of[int(self.group[row])], int(self.group[row]), row))
        common = [0] * len(self) if self.reread else besides
        prompts = {int(self.group[row]): int(self.prompt_length[row]) + common[row] for row in order}
        actions = (self.length - self.prompt_length).tolist()
        sizes = [own * more if self.reread else own for own, more in zip(actions, besides, strict=True)]
        total = sum(prompts.values()) + sum(sizes)
        even = total / max(1, -(-total // tokens_per_part))
        share: list[int] = []
        groups: set[int] = set()
        used = 0
        for row in order:
            group = int(self.group[row])
            own = sizes[row]
            more = own + (0 if group in groups else prompts[group])
            if share and used + more / 2 > even:
                yield share
                share, groups, used, more = [], set(), 0, own + prompts[group]
            share.append(row)
            groups.add(group)
            used += more
        if share:
            yield share


def _numbers_in(context: Any) -> int:
    """How many numbers a context holds, in lists of lists too."""
    return sum(map(_numbers_in, context)) if isinstance(context, list | tuple) else int(context is not None)


class Learner(Protocol):
    """What the loop asks of a policy that learns."""

    def __call__(self, batch: Batch) -> PolicyOutput:
        """What the policy says of the sampled tokens, with gradient."""

    def backward(self, loss: Tensor) -> None:
        """Adds a part's gradient to the step's."""

    def forget(self) -> None:
        """Drops the gradients that have gathered."""

    def step(self) -> dict[str, float]:
        """One optimizer step from the gathered gradients; returns what it has to say of it."""


def collate(
    rollouts: Sequence[Rollout],
    sources: Sequence[Source] = (),
    pad_id: int = 0,
    dtype: torch.dtype = torch.float32,
    pieces: Every | None = None,
    fresh: int | None = None,
) -> Batch:
    """Right-pads rollouts into a batch. Marks of sources that are not named (held-out ones) stay out.

    Args:
        rollouts: at least one.
        sources: the reward sources that are learned from.
        dtype: of rewards and log-probabilities.
        pieces: where pieces end, where they are the actions ("word", "sentence", "line", ...).
        fresh: so many of the first ones were written by the policy as it is; all where it is not given.
    """
    assert rollouts, "a batch needs at least one rollout"
    rows, longest = len(rollouts), max(len(rollout.token_ids) for rollout in rollouts)
    token_ids = torch.full((rows, longest), pad_id, dtype=torch.long)
    mask = torch.zeros(rows, longest, dtype=torch.bool)
    no_end = torch.zeros(rows, longest, dtype=torch.bool)
    versions = torch.full((rows, longest), -1, dtype=torch.long)
    old_logprobs = torch.zeros(rows, longest, dtype=dtype)
    for row, rollout in enumerate(rollouts):
        length = len(rollout.token_ids)
        token_ids[row, :length] = torch.tensor(rollout.token_ids)
        mask[row, :length] = torch.tensor(rollout.mask)
        versions[row, :length] = torch.tensor(rollout.versions)
        old_logprobs[row, :length] = torch.tensor(rollout.logprobs, dtype=dtype)
        no_end[row] = mask[row] & (mask[row].long().cumsum(0) <= rollout.forbidden_end)
    return Batch(
        token_ids=token_ids,
        mask=mask,
        versions=versions,
        old_logprobs=old_logprobs,
        no_end=no_end,
        length=torch.tensor([len(rollout.token_ids) for rollout in rollouts]),
        prompt_length=torch.tensor([rollout.start for rollout in rollouts]),
        group=torch.tensor([rollout.group for rollout in rollouts]),
        cut_off=torch.tensor([rollout.stop == "length" for rollout in rollouts]),
        fresh=None if fresh is None else torch.arange(rows) < fresh,
        sources=list(sources),
        marks=_marks(rollouts, sources, dtype),
        temperature=rollouts[0].temperature,
        text_count=rows,
        token_count=int(mask.sum()),
        pieces=None if pieces is None else _piece_numbers(rollouts, pieces, longest),
        contexts=None if rollouts[0].context is None else [rollout.context for rollout in rollouts],
        reread=rollouts[0].drafts is not None,
    )


def _piece_numbers(rollouts: Sequence[Rollout], every: Every, longest: int) -> Tensor:
    """The action that each sampled token belongs to, ``[B, L]``; one ends with the token that shows a piece's end.

    That is where the piece's own marks are paid. Which action a token belongs to then hangs on the text before it
    alone. Were it to hang on the token too (a blank that begins the next word), the token would choose by what it is
    whether it is credited with what came before it in the piece, and the gradient would be biased.
    """
    numbers = torch.zeros(len(rollouts), longest, dtype=torch.long)
    cutter = Pieces(every)
    for row, rollout in enumerate(rollouts):
        found, number = 0, 0
        for t in range(rollout.start, len(rollout.token_ids)):
            numbers[row, t] = number
            ends = cutter.ends(rollout.text[: rollout.char_ends[t]], found, False)
            if ends:  # one token may show the end of several
                found, number = ends[-1], number + 1
    return numbers


def _marks(rollouts: Sequence[Rollout], sources: Sequence[Source], dtype: torch.dtype) -> Marks:
    index = {source.name: number for number, source in enumerate(sources)}
    table = [
        (row, index[mark.source], mark.start, mark.end, mark.seen, mark.value)
        for row, rollout in enumerate(rollouts)
        for mark in rollout.marks
        if mark.source in index
    ]
    row, source, start, end, seen = (
        torch.tensor([entry[column] for entry in table], dtype=torch.long) for column in range(5)
    )
    return Marks(row, source, start, end, seen, torch.tensor([entry[5] for entry in table], dtype=dtype))
