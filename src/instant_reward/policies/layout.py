"""How the rows of a batch are laid out for a model's own forward pass, where the library has no trunk of its shape.

Plain: a row a text. Shared: siblings lie behind one copy of their prompt, each seeing the prompt and itself only, so
that a group's prompt is computed once. Both give the same hidden states; the cheaper one is taken.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from instant_reward.batch import Batch

SHARED_LIMIT = 1024  # tokens side by side: beyond it the quadratic attention over siblings costs more than it saves


@dataclass(frozen=True)
class Layout:
    """What the trunk reads, and where the states are that predict the sampled tokens.

    Attributes:
        input_ids, position_ids: int64 ``[R, S]``.
        attention_mask: bool ``[R, 1, S, S]`` (True: may look), or None for plain causal attention.
        rows, columns: int64 ``[N]``, the state that predicts each sampled token, in the order of ``mask.nonzero()``.
    """

    input_ids: Tensor
    position_ids: Tensor
    attention_mask: Tensor | None
    rows: Tensor
    columns: Tensor


def lay_out(batch: Batch) -> Layout:
    """The cheaper of the two layouts for these rows."""
    groups = sibling_rows(batch)
    plain_tokens = len(batch) * batch.token_ids.shape[1]
    widths = [int(batch.prompt_length[rows[0]]) + sum(sampled_span(batch, row) for row in rows) for rows in groups]
    shared_tokens = len(groups) * max(widths)
    if max(widths) <= SHARED_LIMIT and shared_tokens < 0.95 * plain_tokens and len(groups) < len(batch):
        return _shared(batch, groups, max(widths))
    return _plain(batch)


def _plain(batch: Batch) -> Layout:
    rows, at = batch.mask.bool().nonzero(as_tuple=True)
    length = max(1, batch.token_ids.shape[1] - 1)  # the last token predicts nothing that was sampled
    positions = torch.arange(length).expand(len(batch), length)
    return Layout(batch.token_ids[:, :length], positions, None, rows, at - 1)


def _shared(batch: Batch, groups: list[list[int]], width: int) -> Layout:
    input_ids = torch.zeros(len(groups), width, dtype=torch.long)
    positions = torch.zeros(len(groups), width, dtype=torch.long)
    # Segment 0 is the prompt, 1, 2, ... the siblings; padding has -1 and sees itself, so that no softmax is empty.
    segment = torch.full((len(groups), width), -1, dtype=torch.long)
    place: dict[int, tuple[int, int]] = {}
    for number, rows in enumerate(groups):
        prompt = int(batch.prompt_length[rows[0]])
        input_ids[number, :prompt] = batch.token_ids[rows[0], :prompt]
        positions[number, :prompt] = torch.arange(prompt)
        segment[number, :prompt] = 0
        start = prompt
        for order, row in enumerate(rows, start=1):
            span = sampled_span(batch, row)
            input_ids[number, start : start + span] = batch.token_ids[row, prompt : prompt + span]
            positions[number, start : start + span] = torch.arange(prompt, prompt + span)
            segment[number, start : start + span] = order
            place[row] = (number, start - prompt)
            start += span
    causal = torch.ones(width, width, dtype=torch.bool).tril()
    same = segment[:, :, None] == segment[:, None, :]
    look = causal & (same | (segment[:, None, :] == 0)) | torch.eye(width, dtype=torch.bool)
    texts, at = batch.mask.bool().nonzero(as_tuple=True)
    numbers = torch.tensor([place[row][0] for row in range(len(batch))])
    offsets = torch.tensor([place[row][1] for row in range(len(batch))])
    before = at - 1
    columns = torch.where(before < batch.prompt_length[texts], before, before + offsets[texts])
    return Layout(input_ids, positions, look[:, None], numbers[texts], columns)


def sampled_span(batch: Batch, row: int) -> int:
    """Tokens behind the prompt, less the last, which predicts nothing."""
    return max(0, int(batch.length[row]) - int(batch.prompt_length[row]) - 1)


def sibling_rows(batch: Batch) -> list[list[int]]:
    """Rows of one group that begin with the same prompt tokens."""
    found: dict[tuple[int, tuple[int, ...]], list[int]] = {}
    for row in range(len(batch)):
        prompt = tuple(batch.token_ids[row, : int(batch.prompt_length[row])].tolist())
        found.setdefault((int(batch.group[row]), prompt), []).append(row)
    return list(found.values())
