"""The key-value cache of encoder-decoder models: one slot a text, whose newest tokens all lie in the same column."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import Cache, EncoderDecoderCache

# Of each prompt, by layer: keys and values of the decoder's own tokens and of the source's, [length, heads, size].
Kept = list[tuple[Tensor, Tensor, Tensor, Tensor]]


class ColumnCache(Cache):
    """The decoder's keys and values ``[2, slots, heads, columns, size]`` per layer, and the source's beside them.

    Every step writes one column for all rows, and a text that comes later begins in a later column. So the distance
    between two tokens of a text is the distance of their columns whatever is decoded beside it, which is what relative
    positions go by; what lies in columns before a text's first one is hidden from it. Columns that no active text
    looks at any more are dropped when the last one is reached.
    """

    def __init__(self, slots: int, width: int, layers: int) -> None:
        super().__init__(layers=[])
        self.slots, self.columns = slots, 2 * width
        self.count = 0
        self.starts = torch.zeros(slots, dtype=torch.long)
        self.sources = torch.zeros(slots, dtype=torch.long)
        self.pairs: list[Tensor] = []
        self.heard: list[Tensor] = []  # the source's keys and values, [2, slots, heads, longest source, size]
        self._layers = layers
        self._next = self._low = 0

    def add(self, prompt: Kept, copies: int) -> None:
        """Copies what was kept of one prompt into the next ``copies`` slots, its last token into the newest column."""
        first, last = self.count, self.count + copies
        length, source = len(prompt[0][0]), len(prompt[0][2])
        if not self.count:
            self._next = length
        start = self._next - length
        assert start >= 0, "a text begins with more tokens than those beside it have"
        if not self.pairs:
            self.pairs = [self._empty(keys, self.columns) for keys, _, _, _ in prompt]
            self.heard = [self._empty(keys, source) for _, _, keys, _ in prompt]
        room = self.heard[0].shape[3]
        if source > room:
            self.heard = [torch.nn.functional.pad(one, (0, 0, 0, source - room)) for one in self.heard]
        for number, (keys, values, source_keys, source_values) in enumerate(prompt):
            for index, one in enumerate((keys, values)):
                self.pairs[number][index, first:last, :, start : self._next] = one.transpose(0, 1)
            for index, one in enumerate((source_keys, source_values)):
                self.heard[number][index, first:last, :, :source] = one.transpose(0, 1)
        self.starts[first:last], self.sources[first:last] = start, source
        self.count = last

    def remove(self, slot: int) -> None:
        """Frees a slot: the last active text moves into it."""
        last = self.count - 1
        if slot != last:
            start, source = int(self.starts[last]), int(self.sources[last])
            for own, heard in zip(self.pairs, self.heard, strict=True):
                own[:, slot, :, start : self._next] = own[:, last, :, start : self._next]
                heard[:, slot, :, :source] = heard[:, last, :, :source]
            self.starts[slot], self.sources[slot] = start, source
        self.count = last

    def advance(self, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
        """Makes room for one more token a row, in one column.

        Returns:
            Its positions ``[count, 1]``, and masks ``[count, 1, 1, ...]`` of what each row may look at among its own
            tokens and in its source.
        """
        starts = self.starts[: self.count]
        self._low = int(starts.min())
        if self._next == self.columns:
            for pair in self.pairs:
                pair[..., : self._next - self._low, :] = pair[..., self._low : self._next, :].clone()
            starts -= self._low
            self._next, self._low = self._next - self._low, 0
        self._next += 1
        look = torch.arange(self._low, self._next) >= starts[:, None]
        sources = self.sources[: self.count]
        heard = torch.arange(int(sources.max())) < sources[:, None]
        positions = self._next - 1 - starts
        return positions[:, None].to(device), look[:, None, None].to(device), heard[:, None, None].to(device)

    def both(self) -> EncoderDecoderCache:
        """This cache with the sources' as transformers' decoders take them, for the step that ``advance`` began."""
        longest = int(self.sources[: self.count].max())
        heard = [one[:, : self.count, :, :longest] for one in self.heard]
        both = EncoderDecoderCache(self, _Sources([_Source(keys, values) for keys, values in heard], longest))
        both.is_updated = dict.fromkeys(range(self._layers), True)  # the source's keys are there: compute none
        return both

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *_: Any, **__: Any
    ) -> tuple[Tensor, Tensor]:
        """Writes a layer's keys and values, ``[R, heads, 1, size]``; hands back what rows see."""
        pair, at = self.pairs[layer_idx], self._next - 1
        pair[0, : self.count, :, at], pair[1, : self.count, :, at] = key_states[:, :, 0], value_states[:, :, 0]
        return pair[0, : self.count, :, self._low : self._next], pair[1, : self.count, :, self._low : self._next]

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """The columns before the one that is written."""
        return self._next - 1 - self._low

    def _empty(self, keys: Tensor, columns: int) -> Tensor:
        return keys.new_zeros(2, self.slots, keys.shape[1], columns, keys.shape[2])


class _Source:
    """One layer's keys and values of the sources, ``[R, heads, longest source, size]``."""

    def __init__(self, keys: Tensor, values: Tensor) -> None:
        self.keys, self.values = keys, values


class _Sources(Cache):
    def __init__(self, layers: list[Any], longest: int) -> None:
        super().__init__(layers=layers)
        self.longest = longest

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return self.longest
