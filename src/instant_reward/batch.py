"""Rollouts as tensors: right-padded rows, minibatches of texts, and parts that fit in memory."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor

from instant_reward.credit import Marks, Source
from instant_reward.types import Rollout


@dataclass
class Batch:
    """``B`` texts of up to ``L`` tokens, right-padded.

    Attributes:
        token_ids, mask, versions: ``[B, L]``; ``mask`` is True where the policy sampled the token.
        old_logprobs: ``[B, L]``, the sampler's; 0 where the mask is off.
        no_end: ``[B, L]``, True where the end tokens were forbidden while sampling (``min_new_tokens``).
        length, prompt_length, group: int64 ``[B]``.
        cut_off: bool ``[B]``, texts that ran into the length limit, told apart from those that ended or were stopped.
        sources: the ``K`` reward sources; ``marks`` point into them.
        temperature: the sampler's.
        text_count, token_count: counts over the whole batch, also in a part of it, so that any split sums to one step.
        rewards: ``[B, K, L]`` once placed; ref_logprobs, advantages, returns: ``[B, L]``.
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
    rewards: Tensor | None = None
    ref_logprobs: Tensor | None = None
    advantages: Tensor | None = None
    returns: Tensor | None = None

    def __len__(self) -> int:
        return int(self.token_ids.shape[0])

    def select(self, rows: Sequence[int]) -> Batch:
        """The same batch with these rows only, trimmed to the longest; the counts stay the whole batch's."""
        index = torch.as_tensor(rows, dtype=torch.long)
        longest = int(self.length[index].max())
        changes: dict[str, Tensor] = {}
        for field in fields(self):
            value = getattr(self, field.name)
            if isinstance(value, Tensor):
                picked = value[index]
                changes[field.name] = picked[..., :longest] if picked.dim() > 1 else picked
        return replace(self, **changes)  # type: ignore[arg-type]

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
        """Row numbers: rows of like length together, siblings side by side, about so many tokens each."""
        longest_of: dict[int, int] = {}
        for group, length in zip(self.group.tolist(), self.length.tolist(), strict=True):
            longest_of[group] = max(longest_of.get(group, 0), length)
        order = sorted(range(len(self)), key=lambda row: (longest_of[int(self.group[row])], int(self.group[row]), row))
        share: list[int] = []
        longest = 0
        for row in order:
            longest = max(longest, int(self.length[row]))
            if share and longest * (len(share) + 1) > tokens_per_part:
                yield share
                share, longest = [], int(self.length[row])
            share.append(row)
        if share:
            yield share


def collate(
    rollouts: Sequence[Rollout], sources: Sequence[Source] = (), pad_id: int = 0, dtype: torch.dtype = torch.float32
) -> Batch:
    """Right-pads rollouts into a batch. Marks of sources that are not named (held-out ones) stay out.

    Args:
        rollouts: at least one.
        sources: the reward sources that are learned from.
        dtype: of rewards and log-probabilities.
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
        sources=list(sources),
        marks=_marks(rollouts, sources, dtype),
        temperature=rollouts[0].temperature,
        text_count=rows,
        token_count=int(mask.sum()),
    )


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
