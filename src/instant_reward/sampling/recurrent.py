"""Decoding with a recurrent model: one state a text, of the same size however long the text is."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from instant_reward.policies.recurrence import Steps
from instant_reward.policies.recurrent import Recurrent
from instant_reward.sampling.weights import Joined, Packed, follow, twin_of
from instant_reward.types import Prompt


class StateCache:
    """The states of texts, ``[layers, parts, slots, C]``; the active texts are the first ``count`` slots."""

    def __init__(self, slots: int, empty: Tensor) -> None:
        self.slots, self.count = slots, 0
        self.states = empty

    def add(self, prompt: Tensor, copies: int) -> None:
        """Copies the state behind a prompt, ``[layers, parts, C]``, into the next ``copies`` slots."""
        self.states[:, :, self.count : self.count + copies] = prompt[:, :, None]
        self.count += copies

    def remove(self, slot: int) -> None:
        """Frees a slot: the last active text moves into it."""
        self.count -= 1
        self.states[:, :, slot] = self.states[:, :, self.count]


class RecurrentDecoder:
    """Decodes with copies of a recurrent model's weights, packed for products with few rows.

    Args:
        model: a ``RecurrentModel``.
        dtype: of the matrix products.
    """

    def __init__(self, model: Any, dtype: torch.dtype) -> None:
        self.twin = twin_of(model.trunk).eval()
        self.products = Packed(dtype)
        self.reader = Recurrent(self.twin, self.products)
        self._head = Joined([model.get_output_embeddings()], dtype)
        self._of = model
        self.load(model)

    @torch.no_grad()
    def load(self, model: Any) -> None:
        """See ``Decoder``."""
        assert model is self._of, "the linear weights are read where they lie: another model takes another decoder"
        follow(self.twin, model.trunk, [*self.products.made, self._head])

    def new_cache(self, slots: int, width: int) -> StateCache:
        """See ``Decoder``; a state has the same size for texts of any width."""
        del width
        return StateCache(slots, _stacked(self.reader.nothing(slots)).clone())

    @torch.inference_mode()
    def prefill(self, prompts: Sequence[Prompt], pad: int) -> tuple[Sequence[Tensor], Tensor]:
        """See ``Decoder``: keeps of each prompt the states ``[layers, parts, C]`` behind it."""
        device = self.twin.tokens.weight.device
        rows = torch.nn.utils.rnn.pad_sequence(
            [torch.tensor(prompt.token_ids) for prompt in prompts], batch_first=True, padding_value=float(pad)
        )
        lengths = torch.tensor([len(prompt.token_ids) for prompt in prompts])
        steps = Steps.of(lengths)
        states, carried = self.reader(steps.pack(rows).to(device), self.reader.nothing(len(prompts)), steps.counts)
        ends = steps.at(torch.arange(len(prompts)), lengths - 1).to(device)
        return list(_stacked(carried)[:, :, ends].unbind(2)), states[ends]

    @torch.inference_mode()
    def decode(self, tokens: Tensor, cache: StateCache) -> Tensor:
        """See ``Decoder``."""
        now = cache.states[:, :, : cache.count]
        start = [tuple(layer.unbind(0)) for layer in now.unbind(0)]
        states, carried = self.reader(tokens.to(now.device), start, [cache.count])
        now.copy_(_stacked(carried))
        return states

    def head(self, states: Tensor) -> Tensor:
        """See ``Decoder``."""
        return self._head(states)


def _stacked(states: Sequence[Sequence[Tensor]]) -> Tensor:
    """``[layers, parts, R, C]``."""
    return torch.stack([torch.stack(list(layer)) for layer in states])
