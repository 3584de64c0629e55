"""Texts as packed tokens, without padding: one copy of each group's prompt, and the texts behind it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from instant_reward.batch import Batch
from instant_reward.policies.kernels import Rows
from instant_reward.policies.layout import sampled_span, sibling_rows

BUCKETS = 2.5  # a row that would pay so many times its own scores goes into another product


@dataclass(frozen=True)
class Packed:
    """``T`` tokens, who looks at whom, and where the states are that predict the sampled tokens.

    Attributes:
        ids, positions: int64 ``[T]``.
        rows: the attention, a product a bucket of like lengths.
        states: int64 ``[N]``, in the order of ``mask.nonzero()``.
    """

    ids: Tensor
    positions: Tensor
    rows: list[Rows]
    states: Tensor


def pack(batch: Batch) -> Packed:
    """Prompts first, each once for its group, then each text's own tokens (less the last, which predicts nothing)."""
    groups = sibling_rows(batch)
    ids: list[Tensor] = []
    positions: list[Tensor] = []
    spans: list[tuple[range, range]] = []  # queries and, before them, what else they look at
    start_of = torch.zeros(len(batch), dtype=torch.long)  # where a text's position 0 would be, for its own tokens
    prompt_of = torch.zeros(len(batch), dtype=torch.long)
    size = 0
    for rows in groups:
        prompt = int(batch.prompt_length[rows[0]])
        ids.append(batch.token_ids[rows[0], :prompt])
        positions.append(torch.arange(prompt))
        before = range(size, size + prompt)
        spans.append((before, range(0)))
        size += prompt
        for row in rows:
            own = sampled_span(batch, row)
            ids.append(batch.token_ids[row, prompt : prompt + own])
            positions.append(torch.arange(prompt, prompt + own))
            prompt_of[row], start_of[row] = before.start, size - prompt
            if own:
                spans.append((range(size, size + own), before))
            size += own
    texts, at = batch.mask.bool().nonzero(as_tuple=True)
    state = at - 1
    states = torch.where(state < batch.prompt_length[texts], prompt_of[texts], start_of[texts]) + state
    return Packed(torch.cat(ids), torch.cat(positions), rows_of(spans), states)


def rows_of(spans: Sequence[tuple[range, range]]) -> list[Rows]:
    """Causal attention of spans of tokens over what lies before them and over themselves.

    Args:
        spans: packed tokens, and those that all of them look at; none of the first is empty.
    """
    order = sorted(spans, key=lambda span: (len(span[1]) > 0, -len(span[0]) - len(span[1])))
    found: list[Rows] = []
    some: list[tuple[range, range]] = []
    long = wide = least = 0
    for span in order:
        own, before = map(len, span)
        asked = own * (own + before)
        most = max(long, own) * (max(long, own) + max(wide, before))  # what each row of the product would pay
        smallest = min(least, asked) if some else asked
        if some and (bool(some[0][1]) != bool(before) or most > BUCKETS * smallest + 512):
            found.append(_rows(some))
            some, long, wide, smallest = [], 0, 0, asked
        some.append(span)
        long, wide, least = max(long, own), max(wide, before), smallest
    return [*found, _rows(some)] if some else found


def _rows(spans: Sequence[tuple[range, range]]) -> Rows:
    wide = max(len(before) for _, before in spans)
    long = max(len(own) for own, _ in spans)
    queries = torch.zeros(len(spans), long, dtype=torch.long)
    keys = torch.zeros(len(spans), wide + long, dtype=torch.long)
    befores = torch.tensor([len(before) for _, before in spans])
    owns = torch.tensor([len(own) for own, _ in spans])
    for row, (own, before) in enumerate(spans):
        queries[row, : len(own)] = torch.arange(own.start, own.stop)
        keys[row, : len(before)] = torch.arange(before.start, before.stop)
        keys[row, wide : wide + len(own)] = torch.arange(own.start, own.stop)
    column = torch.arange(long)
    to_before = (torch.arange(wide) < befores[:, None])[:, None, :].expand(-1, long, -1)
    # A query that is no token looks at itself, so that no softmax is empty.
    to_own = (column[None, :, None] >= column[None, None, :]).expand(len(spans), -1, -1)
    places = (column < owns[:, None]).flatten().nonzero().squeeze(1)
    return Rows(queries, keys, torch.cat([to_before, to_own], -1), places, queries.flatten()[places])
