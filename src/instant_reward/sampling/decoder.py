"""What the engine decodes with: a model's weights as they were at the last ``load``, and the passes over them.

``TrunkDecoder`` runs the library's own functions of packed tokens, with joined and packed weight matrices; models of
another shape (``shape_of``) go through their own forward pass (``ModelDecoder``), recurrent ones through
``RecurrentDecoder``.
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor
from transformers import DynamicCache

from instant_reward.policies.kernels import Attention, parted
from instant_reward.policies.packed import rows_of
from instant_reward.policies.recurrent import RecurrentTrunk
from instant_reward.policies.trunk import Trunk, shape_of
from instant_reward.sampling.recurrent import RecurrentDecoder
from instant_reward.sampling.slots import Filled, SlotCache, Slots
from instant_reward.sampling.weights import Joined, Packed, follow, twin_of
from instant_reward.types import Prompt


class Decoder(Protocol):
    """Reads prompts and goes on with texts, token by token."""

    def load(self, model: Any) -> None:
        """Takes over a model's weights as they are now."""

    def new_cache(self, slots: int, width: int) -> Slots:
        """Room for so many texts, of ``width`` tokens each, prompt included."""

    def prefill(self, prompts: Sequence[Prompt], pad: int) -> tuple[Sequence[Any], Tensor]:
        """Reads the prompts; returns what the cache keeps of each, and the states ``[P, D]`` of their ends."""

    def decode(self, tokens: Tensor, cache: Any) -> Tensor:
        """One token a row, ``[R]``; returns the states ``[R, D]`` behind them."""

    def head(self, states: Tensor) -> Tensor:
        """The logits ``[R, V]`` of states."""


class TrunkDecoder:
    """The library's own functions over copies of the weights, linear layers that read the same input joined.

    Args:
        model: a transformers model.
        dtype: of the matrix products.
        shape: the model's, where it is known already (``shape_of``).
    """

    def __init__(self, model: Any, dtype: torch.dtype, shape: type[Trunk] | None = None) -> None:
        base = getattr(model, model.base_model_prefix)
        shape = shape or shape_of(base)
        assert shape is not None, "this model computes otherwise: decode with ModelDecoder"
        self.twin = twin_of(base)
        self.products = Packed(dtype)
        self.trunk = shape(self.twin, self.products)
        self._head = Joined([model.get_output_embeddings()], dtype)
        self._of = model
        self.load(model)

    @torch.no_grad()
    def load(self, model: Any) -> None:
        """See ``Decoder``."""
        assert model is self._of, "the linear weights are read where they lie: another model takes another decoder"
        base = getattr(model, model.base_model_prefix)
        follow(self.twin, base, [*self.products.made, self._head])

    def new_cache(self, slots: int, width: int) -> SlotCache:
        """See ``Decoder``."""
        return SlotCache(slots, width, int(self.trunk.base.config.num_hidden_layers))

    @torch.inference_mode()
    def prefill(self, prompts: Sequence[Prompt], pad: int) -> tuple[Filled, Tensor]:
        """See ``Decoder``."""
        device = self._device()
        lengths = [len(prompt.token_ids) for prompt in prompts]
        ends = list(itertools.accumulate(lengths))
        spans = [range(end - length, end) for length, end in zip(lengths, ends, strict=True)]
        rows = [one.to(device) for one in rows_of([(span, range(0)) for span in spans])]
        ids = torch.tensor([token for prompt in prompts for token in prompt.token_ids], device=device)
        positions = torch.cat([torch.arange(length) for length in lengths]).to(device)
        kept: list[tuple[Tensor, Tensor]] = []

        def attend(_: int, qkv: Tensor, cos: Tensor | None, sin: Tensor | None) -> Tensor:
            keys, values = parted(qkv, self.trunk.heads, cos, sin)[1:]
            kept.append((keys.to(self._kept(qkv)), values.to(self._kept(qkv))))
            heard: Tensor = Attention.apply(qkv, self.trunk.heads, cos, sin, rows)  # type: ignore[no-untyped-call]
            return heard

        states = self.trunk(ids, positions, attend)
        filled = [
            [(keys[span.start : span.stop], values[span.start : span.stop]) for keys, values in kept] for span in spans
        ]
        return filled, states[torch.tensor(ends, device=device) - 1]

    @torch.inference_mode()
    def decode(self, tokens: Tensor, cache: SlotCache) -> Tensor:
        """See ``Decoder``."""
        device = self._device()
        positions, look = cache.advance(device)
        hidden = torch.zeros(look.shape, device=device).masked_fill_(~look, -torch.inf)

        def attend(number: int, qkv: Tensor, cos: Tensor | None, sin: Tensor | None) -> Tensor:
            asking, key, value = parted(qkv, self.trunk.heads, cos, sin)
            keys, values = cache.write(number, torch.stack([key, value], 1).to(self._kept(qkv)))
            count, groups, size = key.shape
            queries = (asking * size**-0.5).view(count, groups, -1, size)  # wide, as the trainer's are
            scores = (queries @ keys.to(queries.dtype).transpose(-1, -2)).add_(hidden)
            heard: Tensor = scores.softmax(-1) @ values.to(queries.dtype)
            return heard.view(asking.shape).to(qkv.dtype)

        return self.trunk(tokens.to(device), positions.squeeze(1), attend)

    def head(self, states: Tensor) -> Tensor:
        """See ``Decoder``."""
        return self._head(states)

    def _device(self) -> torch.device:
        return next(self.twin.parameters()).device  # type: ignore[no-any-return]

    def _kept(self, x: Tensor) -> torch.dtype:
        """The dtype of keys and values. On a processor float32: its small products are no faster in bfloat16."""
        return self.trunk.wide if x.device.type == "cpu" else x.dtype


class ModelDecoder:
    """The model's own forward pass; with bfloat16 products over a bfloat16 copy of it."""

    def __init__(self, model: Any, dtype: torch.dtype) -> None:
        self.copies = dtype == torch.bfloat16
        self.model = bfloat16_copy(model) if self.copies else model

    @torch.no_grad()
    def load(self, model: Any) -> None:
        """See ``Decoder``."""
        if self.copies:
            for mine, theirs in zip(self.model.parameters(), model.parameters(), strict=True):
                mine.copy_(theirs)

    def new_cache(self, slots: int, width: int) -> SlotCache:
        """See ``Decoder``."""
        return SlotCache(slots, width, int(self.model.config.num_hidden_layers))

    @torch.inference_mode()
    def prefill(self, prompts: Sequence[Prompt], pad: int) -> tuple[Filled, Tensor]:
        """See ``Decoder``."""
        device = next(self.model.parameters()).device
        lengths = [len(prompt.token_ids) for prompt in prompts]
        ids = torch.full((len(prompts), max(lengths)), pad)
        for row, prompt in enumerate(prompts):
            ids[row, : lengths[row]] = torch.tensor(prompt.token_ids)
        # Plain causal attention: what is right of a prompt's last token cannot reach it.
        out = self._base()(input_ids=ids.to(device), use_cache=True)
        cache: DynamicCache = out.past_key_values
        layers: list[Any] = cache.layers
        filled = [
            [(one.keys[row, :, :length].transpose(0, 1), one.values[row, :, :length].transpose(0, 1)) for one in layers]
            for row, length in enumerate(lengths)
        ]
        last = torch.tensor(lengths, device=device) - 1
        states: Tensor = out.last_hidden_state[torch.arange(len(prompts), device=device), last]
        return filled, states

    @torch.inference_mode()
    def decode(self, tokens: Tensor, cache: SlotCache) -> Tensor:
        """See ``Decoder``."""
        device = next(self.model.parameters()).device
        positions, look = cache.advance(device)
        ids = tokens.to(device)[:, None]
        out = self._base()(
            input_ids=ids, position_ids=positions, attention_mask=look, past_key_values=cache, use_cache=True
        )
        states: Tensor = out.last_hidden_state[:, -1]
        return states

    def head(self, states: Tensor) -> Tensor:
        """See ``Decoder``."""
        logits: Tensor = self.model.get_output_embeddings()(states)
        return logits

    def _base(self) -> Any:
        return getattr(self.model, self.model.base_model_prefix)


def bfloat16_copy(model: Any) -> Any:
    """Buffers stay as they are: in bfloat16 the frequencies of rotary positions would be other ones."""
    twin = copy.deepcopy(model).requires_grad_(False)
    for parameter in twin.parameters():
        parameter.data = parameter.data.to(torch.bfloat16)
    return twin


def decoder_of(model: Any, dtype: torch.dtype) -> Decoder:
    """The faster decoder that fits a model."""
    if getattr(model.config, "is_encoder_decoder", False):
        from instant_reward.sampling.seq2seq import Seq2SeqDecoder

        return Seq2SeqDecoder(model, dtype)
    if isinstance(getattr(model, model.base_model_prefix), RecurrentTrunk):
        return RecurrentDecoder(model, dtype)
    shape = shape_of(getattr(model, model.base_model_prefix))
    return ModelDecoder(model, dtype) if shape is None else TrunkDecoder(model, dtype, shape)
