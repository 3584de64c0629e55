"""The recurrent part of LSTM and GRU layers, over rows of different lengths without padding, its gradient by hand.

What a layer makes of its inputs is one matrix product over all tokens, taken before; what it makes of its own state is
computed here, step by step. In the backward pass the weights' gradient is again one product over all tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

GATES = {"lstm": 4, "gru": 3}
PARTS = {"lstm": 2, "gru": 1}  # an LSTM carries its output and a cell, a GRU its output alone

State = tuple[Tensor, ...]  # [R, C] each


@dataclass(frozen=True)
class Steps:
    """Rows of tokens in the order of time: the first token of every row, then the second of every row that has one, ...

    Attributes:
        order: int64 ``[R]``, the rows by length, longest first: in each step the active ones stand in front.
        rank: int64 ``[R]``, where each row stands in that order.
        starts: int64 ``[T]``, where each step's tokens begin.
        counts: how many rows each step has.
    """

    order: Tensor
    rank: Tensor
    starts: Tensor
    counts: list[int]

    @classmethod
    def of(cls, lengths: Tensor) -> Steps:
        """The steps of rows of ``lengths [R]``, each at least 1."""
        assert bool((lengths > 0).all()), "a row without tokens has no step"
        order = lengths.argsort(descending=True, stable=True)
        counts = (lengths[None, :] > torch.arange(int(lengths.max()))[:, None]).sum(1)
        return cls(order, order.argsort(), counts.cumsum(0) - counts, counts.tolist())

    def pack(self, rows: Tensor) -> Tensor:
        """Right-padded ``[R, T]`` as ``[N]``."""
        ranks = torch.arange(len(self.order))
        on = ranks[None, :] < torch.tensor(self.counts)[:, None]
        return rows[self.order].t()[on]

    def at(self, rows: Tensor, places: Tensor) -> Tensor:
        """Where the tokens at ``places`` of ``rows`` stand."""
        return self.starts[places] + self.rank[rows]


def run(
    cell: str, carry: Callable[[Tensor], Tensor], gates: Tensor, start: State, counts: Sequence[int]
) -> tuple[State, Tensor]:
    """A layer's states behind each token, and what its gates were.

    Args:
        cell: "lstm" (Gers, Schmidhuber, Cummins, 2000, "Learning to Forget") or "gru" (Cho et al., 2014, with the reset
            gate behind the product, as in cuDNN).
        carry: what the layer makes of its own output, ``[R, C]`` to ``[R, G C]``.
        gates: what it makes of its inputs, ``[N, G C]`` in the order of ``Steps``.
        start: the states before, for rows in the order of ``Steps``.
        counts: rows in each step.

    Returns:
        States ``[N, C]``; and ``[N, 4 C]``: output, input and forget gate and candidate of an LSTM; reset and update
        gate, candidate and the candidate's share of the state of a GRU.
    """
    step = _lstm if cell == "lstm" else _gru
    width = start[0].shape[1]
    states = tuple(gates.new_empty(len(gates), width, dtype=start[0].dtype) for _ in start)
    kept = gates.new_empty(len(gates), 4 * width, dtype=start[0].dtype)
    at, before = 0, start
    for count in counts:
        rows = slice(at, at + count)
        now = tuple(one[rows] for one in states)
        step(gates[rows], carry(before[0][:count]), tuple(one[:count] for one in before), now, kept[rows])
        at, before = at + count, now
    return states, kept


def _lstm(gates: Tensor, carried: Tensor, before: State, now: State, kept: Tensor) -> None:
    width = before[0].shape[1]
    torch.add(gates, carried, out=kept)
    kept[:, : 3 * width].sigmoid_()
    kept[:, 3 * width :].tanh_()
    output, taken, forget, candidate = kept.chunk(4, 1)
    torch.mul(forget, before[1], out=now[1]).addcmul_(taken, candidate)
    torch.tanh(now[1], out=now[0]).mul_(output)


def _gru(gates: Tensor, carried: Tensor, before: State, now: State, kept: Tensor) -> None:
    width = before[0].shape[1]
    torch.add(gates[:, : 2 * width], carried[:, : 2 * width], out=kept[:, : 2 * width]).sigmoid_()
    reset, update, candidate, share = kept.chunk(4, 1)
    share.copy_(carried[:, 2 * width :])
    torch.addcmul(gates[:, 2 * width :], reset, share, out=candidate).tanh_()
    torch.sub(before[0], candidate, out=now[0]).mul_(update).add_(candidate)


class Recurrence(torch.autograd.Function):
    """``run`` with gradient.

    Args of ``apply``: ``cell``, ``carry``, ``counts``; ``gates``; the weight ``[G C, C]`` of ``carry`` and its bias or
    None; and the states before. Returns the states ``[N, C]``.
    """

    @staticmethod
    def forward(
        ctx: Any,
        cell: str,
        carry: Callable[[Tensor], Tensor],
        counts: Sequence[int],
        gates: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        *start: Tensor,
    ) -> State:
        states, kept = run(cell, carry, gates, start, counts)
        ctx.cell, ctx.counts, ctx.given, ctx.biased = cell, counts, gates.dtype, bias is not None
        ctx.save_for_backward(weight, kept, *start, *states)
        return states

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Any, ...]:
        weight, kept, *both = ctx.saved_tensors
        start, states = both[: len(gradients)], both[len(gradients) :]
        previous = _previous(len(start[0]), ctx.counts, kept.device)
        before = [torch.cat([first, one])[previous] for first, one in zip(start, states, strict=True)]
        matrix = weight.to(ctx.given)
        back = _lstm_back if ctx.cell == "lstm" else _gru_back
        to_gates, to_carried, to_start = back(matrix, kept, before, states, gradients, ctx.counts)
        narrow = to_carried.to(ctx.given)
        to_weight = (narrow.t() @ before[0].to(ctx.given)).to(weight.dtype) if ctx.needs_input_grad[4] else None
        to_bias = to_carried.sum(0).to(weight.dtype) if ctx.biased else None
        return None, None, None, to_gates.to(ctx.given), to_weight, to_bias, *to_start


def _previous(rows: int, counts: Sequence[int], device: torch.device) -> Tensor:
    """Where the state before each token stands in ``[start; states]``."""
    firsts = [0, rows]  # of each step's previous states
    for count in counts[:-1]:
        firsts.append(firsts[-1] + count)
    return torch.cat([torch.arange(first, first + count) for first, count in zip(firsts, counts, strict=False)]).to(
        device
    )


def _lstm_back(
    matrix: Tensor,
    kept: Tensor,
    before: Sequence[Tensor],
    states: Sequence[Tensor],
    gradients: Sequence[Tensor],
    counts: Sequence[int],
) -> tuple[Tensor, Tensor, list[Tensor]]:
    """The gradients of the gates ``[N, 4 C]``, of what was carried (the same), and of the states before."""
    output, taken, forget, candidate = kept.chunk(4, 1)
    bent = states[1].tanh()
    to_cell = output * (1.0 - bent * bent)  # of the cell, for one of the output
    to_output = bent * output * (1.0 - output)
    slopes = torch.stack(
        [
            candidate * taken * (1.0 - taken),
            before[1] * forget * (1.0 - forget),
            taken * (1.0 - candidate * candidate),
        ],
        1,
    )
    found = torch.empty_like(kept)
    each = found.view(len(found), 4, -1)
    late_output, late_cell = (torch.zeros_like(one[: counts[0]]) for one in before)
    at = len(kept)
    for count in reversed(counts):
        rows = slice(at - count, at)
        of_output = gradients[0][rows] + late_output[:count]
        of_cell = (gradients[1][rows] + late_cell[:count]).addcmul_(of_output, to_cell[rows])
        torch.mul(of_output, to_output[rows], out=each[rows, 0])
        torch.mul(of_cell[:, None], slopes[rows], out=each[rows, 1:])
        late_output[:count] = found[rows].to(matrix.dtype) @ matrix
        torch.mul(of_cell, forget[rows], out=late_cell[:count])
        at -= count
    return found, found, [late_output, late_cell]


def _gru_back(
    matrix: Tensor,
    kept: Tensor,
    before: Sequence[Tensor],
    states: Sequence[Tensor],
    gradients: Sequence[Tensor],
    counts: Sequence[int],
) -> tuple[Tensor, Tensor, list[Tensor]]:
    """The gradients of the gates ``[N, 3 C]``, of what was carried ``[N, 3 C]``, and of the state before."""
    del states
    reset, update, candidate, share = kept.chunk(4, 1)
    to_candidate = (1.0 - update) * (1.0 - candidate * candidate)
    to_reset = to_candidate * share * reset * (1.0 - reset)
    to_update = (before[0] - candidate) * update * (1.0 - update)
    slopes = torch.stack([to_reset, to_update, to_candidate * reset], 1)
    carried = kept.new_empty(len(kept), 3, update.shape[1])
    to_gates = torch.empty_like(carried)
    late = torch.zeros_like(before[0][: counts[0]])
    at = len(kept)
    for count in reversed(counts):
        rows = slice(at - count, at)
        of_output = gradients[0][rows] + late[:count]
        torch.mul(of_output[:, None], slopes[rows], out=carried[rows])
        torch.mul(of_output, to_candidate[rows], out=to_gates[rows, 2])
        through = carried[rows].view(count, -1).to(matrix.dtype) @ matrix
        torch.mul(of_output, update[rows], out=late[:count]).add_(through)
        at -= count
    to_gates[:, :2] = carried[:, :2]
    return to_gates.view(len(kept), -1), carried.view(len(kept), -1), [late]
