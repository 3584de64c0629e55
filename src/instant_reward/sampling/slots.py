"""The key-value cache of the decoding engine: one slot a text, filled to its own length, slots kept side by side."""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import Tensor
from transformers import Cache

# Of each prompt, by layer: its keys and values, [length, heads, size].
Filled = list[list[tuple[Tensor, Tensor]]]


class Slots(Protocol):
    """What the engine knows of a decoder's cache: active texts are the first ``count`` of its ``slots``."""

    slots: int
    count: int

    def add(self, prompt: Any, copies: int) -> None:
        """Puts what was kept of one prompt into the next ``copies`` slots."""

    def remove(self, slot: int) -> None:
        """Frees a slot: the last active text moves into it."""


class SlotCache(Cache):
    """Keys and values, ``[2, slots, heads, width, size]`` per layer, allocated once.

    Active texts are the first ``count`` slots. ``lengths[i]`` tokens of slot ``i`` are filled; the next token is
    written behind them, wherever that is in each row.
    """

    def __init__(self, slots: int, width: int, layers: int) -> None:
        super().__init__(layers=[])
        self.slots, self.width = slots, width
        self.pairs: list[Tensor | None] = [None] * layers
        self.lengths = torch.zeros(slots, dtype=torch.long)
        self.count = 0
        self._rows = torch.zeros(0, dtype=torch.long)
        self._at = torch.zeros(0, dtype=torch.long)
        self._visible = 0

    def add(self, prompt: list[tuple[Tensor, Tensor]], copies: int) -> None:
        """Copies the keys and values of one prefilled prompt into the next ``copies`` slots."""
        first, last = self.count, self.count + copies
        length = len(prompt[0][0])
        for layer, (keys, values) in enumerate(prompt):
            if self.pairs[layer] is None:
                self.pairs[layer] = keys.new_zeros(2, self.slots, keys.shape[1], self.width, keys.shape[2])
            pair = self._pair(layer)
            pair[0, first:last, :, :length] = keys.transpose(0, 1)
            pair[1, first:last, :, :length] = values.transpose(0, 1)
        self.lengths[first:last] = length
        self.count = last

    def remove(self, slot: int) -> None:
        """Frees a slot: the last active text moves into it."""
        last = self.count - 1
        if slot != last:
            length = int(self.lengths[last])
            for layer in range(len(self.pairs)):
                pair = self._pair(layer)
                pair[:, slot, :, :length] = pair[:, last, :, :length]
            self.lengths[slot] = self.lengths[last]
        self.count = last

    def advance(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """Makes room for one more token a row.

        Returns:
            Its positions ``[count, 1]`` and a mask ``[count, 1, 1, visible]`` of what each row may look at.
        """
        at = self.lengths[: self.count].clone()
        self._visible = int(at.max()) + 1
        self._rows, self._at = torch.arange(self.count, device=device), at.to(device)
        self.lengths[: self.count] += 1
        look = torch.arange(self._visible)[None, :] <= at[:, None]
        return at[:, None].to(device), look[:, None, None, :].to(device)

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *_: Any, **__: Any
    ) -> tuple[Tensor, Tensor]:
        """``write`` as a transformers model calls it in every layer, with ``[R, heads, 1, size]``."""
        return self.write(layer_idx, torch.stack([key_states[:, :, 0], value_states[:, :, 0]], 1))

    def write(self, layer: int, pair: Tensor) -> tuple[Tensor, Tensor]:
        """Writes a key and value a row, ``[R, 2, heads, size]``; hands back what rows see, ``[R, heads, W, size]``."""
        kept = self._pair(layer)
        kept[:, self._rows, :, self._at] = pair
        return kept[0, : self.count, :, : self._visible], kept[1, : self.count, :, : self._visible]

    def _pair(self, layer: int) -> Tensor:
        pair = self.pairs[layer]
        assert pair is not None, "prefill a prompt before decoding"
        return pair

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """The longest row."""
        return int(self.lengths[: self.count].max()) if self.count else 0
