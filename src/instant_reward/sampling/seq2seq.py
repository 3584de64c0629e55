"""Decoding with an encoder-decoder model: each source is read once, and its texts are written side by side."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from instant_reward.policies.encoder_decoder import EncoderDecoder, output_bias, start_ids
from instant_reward.policies.sources import distinct, padded
from instant_reward.sampling.columns import ColumnCache, Kept
from instant_reward.sampling.decoder import bfloat16_copy
from instant_reward.types import Prompt, UserError

PROBE = 4


class Seq2SeqDecoder:
    """See ``decoder.Decoder``. The model's own forward passes; with bfloat16 products over a bfloat16 copy of it."""

    def __init__(self, model: Any, dtype: torch.dtype) -> None:
        self.copies = dtype == torch.bfloat16
        self.model = bfloat16_copy(model) if self.copies else model
        self.parts = EncoderDecoder(self.model)

    @torch.no_grad()
    def load(self, model: Any) -> None:
        """See ``Decoder``."""
        if self.copies:
            for mine, theirs in zip(self.model.parameters(), model.parameters(), strict=True):
                mine.copy_(theirs)

    def new_cache(self, slots: int, width: int) -> ColumnCache:
        """See ``Decoder``."""
        return ColumnCache(slots, width, self._layers())

    @torch.inference_mode()
    def prefill(self, prompts: Sequence[Prompt], pad: int) -> tuple[list[Kept], Tensor]:
        """See ``Decoder``: encodes the sources, and reads what the texts begin with, which is the same for all."""
        del pad
        device = self._device()
        begun = torch.tensor([prompt.token_ids for prompt in prompts], device=device)
        sources, source_of = distinct([prompt.context or [] for prompt in prompts])
        ids, look = padded(sources, device)
        at = torch.tensor(source_of, device=device)
        encoded = self.parts.read(ids, look)[at]
        states, cache = self.parts.write(begun, encoded, None if look is None else look[at], use_cache=True)
        layers = zip(cache.self_attention_cache.layers, cache.cross_attention_cache.layers, strict=True)
        tensors = [(own.keys, own.values, heard.keys, heard.values) for own, heard in layers]
        kept = [
            [self._of_row(layer, row, len(prompt.context or ())) for layer in tensors]
            for row, prompt in enumerate(prompts)
        ]
        return kept, states[:, -1]

    @staticmethod
    def _of_row(layer: tuple[Tensor, ...], row: int, source: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        keys, values, source_keys, source_values = (one[row].transpose(0, 1) for one in layer)
        return keys, values, source_keys[:source], source_values[:source]

    @torch.inference_mode()
    def decode(self, tokens: Tensor, cache: ColumnCache) -> Tensor:
        """See ``Decoder``."""
        device = self._device()
        positions, look, heard = cache.advance(device)
        # The sources' keys and values are in the cache: of their states a decoder asks for no more than the shape.
        encoded = torch.zeros(1, 1, 1, device=device).expand(len(tokens), heard.shape[-1], self.parts.width)
        with self.parts.at(positions) as placed:
            states = self.parts.write(
                tokens.to(device)[:, None],
                encoded,
                heard,
                attention_mask=look,
                past_key_values=cache.both(),
                use_cache=True,
                **placed,
            )[0]
        return states[:, -1]

    @torch.inference_mode()
    def head(self, states: Tensor) -> Tensor:
        """See ``Decoder``."""
        bias = output_bias(self.model)
        weight = self.model.get_output_embeddings().weight
        return functional.linear(states, weight, None if bias is None else bias.to(weight.dtype))

    def _layers(self) -> int:
        config = self.parts.decoder.config
        return int(getattr(config, "decoder_layers", None) or config.num_hidden_layers)

    def _device(self) -> torch.device:
        return next(self.model.parameters()).device  # type: ignore[no-any-return]


@torch.inference_mode()
def check_decoding(model: Any) -> None:
    """Refuses a model that says other things of a text where others, of other lengths, are decoded beside it.

    Raises:
        UserError: names the model.
    """
    starts = start_ids(model)
    device = next(model.parameters()).device
    decoder = Seq2SeqDecoder(model, next(model.parameters()).dtype)
    sources = [list(range(1, PROBE + 1)), [1]]
    prompts = [Prompt(str(number), "", starts, context=source) for number, source in enumerate(sources)]
    cache = decoder.new_cache(2, len(starts) + 3)
    cache.add(decoder.prefill(prompts[:1], 0)[0][0], 1)
    decoder.decode(torch.tensor([1]), cache)
    cache.add(decoder.prefill(prompts[1:], 0)[0][0], 1)
    beside = decoder.decode(torch.tensor([2, 1]), cache)
    for source, more, found in zip(sources, [[1, 2], [1]], beside, strict=True):
        encoded = decoder.parts.read(torch.tensor([source], device=device), None)
        ids = torch.tensor([[*starts, *more]], device=device)
        alone = decoder.parts.write(ids, encoded, None, use_cache=False)[0][0, -1]
        if not float((alone - found).norm()) <= 1e-3 * float(alone.norm()):
            raise UserError(
                f"{type(model).__name__} places its tokens in a way that is not known here, so texts of different "
                "lengths cannot be decoded side by side; T5, BART, Marian and encoder-decoders of two BERTs are known: "
                "use one of their shape"
            )
