"""The parts of an encoder-decoder model, whatever its shape: what reads a source, what writes, what makes logits."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from instant_reward.types import UserError

PROBE = 4
NEVER = -1e4  # a logit whose probability is 0, also where it is multiplied by one (minus infinity would give NaN)


class EncoderDecoder(nn.Module):
    """An encoder-decoder model without its output head; its modules are the model's own.

    The states it returns are what the output head reads: scaled as T5 does it, behind BERT's transform.

    Args:
        model: a transformers model: T5-, BART- or Marian-shaped, or an ``EncoderDecoderModel``.
    """

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.encoder = model.get_encoder()
        decoder = model.get_decoder()
        writes = decoder.get_output_embeddings() is not None  # two models joined: the decoder brings its own head
        self.decoder = getattr(decoder, decoder.base_model_prefix) if writes else decoder
        self.project = getattr(model, "enc_to_dec_proj", None)
        predictions = getattr(getattr(decoder, "cls", None), "predictions", None)
        self.transform = getattr(predictions, "transform", None)
        scaled = getattr(model.config, "scale_decoder_outputs", False)
        self.scale = float(model.config.d_model**-0.5) if scaled else 1.0
        self.width = int(model.get_output_embeddings().weight.shape[1])

    def read(self, ids: Tensor, look: Tensor | None) -> Tensor:
        """Sources ``[S, E]``, right-padded, and a mask of what they hold, as states ``[S, E, D]``."""
        states: Tensor = self.encoder(input_ids=ids, attention_mask=look).last_hidden_state
        return states if self.project is None else self.project(states)

    def write(self, ids: Tensor, encoded: Tensor, look: Tensor | None, **options: Any) -> tuple[Tensor, Any]:
        """The states ``[B, L, D]`` behind each token of ``ids [B, L]``, which the head reads, and the cache.

        Args:
            encoded: ``[B, E, D]``, of each row's source; look: bool, what of it is there.
            options: of the decoder's own forward pass (a cache, a mask).
        """
        out = self.decoder(input_ids=ids, encoder_hidden_states=encoded, encoder_attention_mask=look, **options)
        states: Tensor = out.last_hidden_state if self.scale == 1.0 else out.last_hidden_state * self.scale
        return states if self.transform is None else self.transform(states), out.past_key_values

    @property
    def limit(self) -> int:
        """How many tokens a source may have, and a text; of relative positions any number."""
        limits = [getattr(part.config, "max_position_embeddings", None) for part in (self.encoder, self.decoder)]
        return min((int(limit) for limit in limits if limit), default=2**31)

    @contextmanager
    def at(self, positions: Tensor) -> Iterator[dict[str, Any]]:
        """Has the decoder place the tokens of the rows where each row is, ``[B, 1]``, whatever a cache's length says.

        Yields:
            What ``write`` takes besides. Relative positions need nothing: they come from where tokens lie in the cache.
        """
        if "position_ids" in inspect.signature(self.decoder.forward).parameters:
            yield {"position_ids": positions}
            return
        table = getattr(self.decoder, "embed_positions", None)
        if getattr(table, "weight", None) is None:  # M2M100 computes its own; ``check_decoding`` refuses what is lost
            yield {}
            return
        assert table is not None

        def moved(module: Any, _: Any, __: Any) -> Tensor:
            return nn.functional.embedding(positions + getattr(module, "offset", 0), module.weight)

        handle = table.register_forward_hook(moved)
        try:
            yield {}
        finally:
            handle.remove()


def output_bias(model: Any) -> Tensor | None:
    """What is added to the head's logits, ``[V]``: its bias, the model's, and what forbids the tokens that are banned.

    A model's generation config may name tokens that it never writes (``bad_words_ids``; Marian's padding token). They
    are left out of the distribution, in sampling and in training alike.
    """
    head = model.get_output_embeddings()
    bias: Tensor | None = getattr(head, "bias", None)
    added: Tensor | None = getattr(model, "final_logits_bias", None)
    if added is not None:
        bias = added[0].to(head.weight) if bias is None else bias + added[0].to(head.weight)
    banned = banned_ids(model)
    if banned:
        ban = torch.zeros(len(head.weight), dtype=head.weight.dtype, device=head.weight.device)
        ban[banned] = NEVER
        bias = ban if bias is None else bias + ban
    return bias


def banned_ids(model: Any) -> list[int]:
    """The single tokens that a model's generation config says it never writes."""
    settings = getattr(model, "generation_config", None)
    words = getattr(settings, "bad_words_ids", None) or []
    return sorted({int(word[0]) for word in words if len(word) == 1})


def start_ids(model: Any) -> list[int]:
    """What every text of the decoder begins with: its start token, and the first token that a config forces.

    Raises:
        UserError: where no config names the start token.
    """
    sources = (getattr(model, "generation_config", None), model.config)
    start = _first(sources, "decoder_start_token_id")
    if start is None:
        raise UserError(
            f"the config of this {type(model).__name__} names no decoder_start_token_id, which every text begins with; "
            "set it in config.json (of two BERTs it is the [CLS] token's)"
        )
    forced = _first(sources, "forced_bos_token_id")
    return [start] if forced is None or forced == start else [start, forced]


def _first(sources: Sequence[Any], name: str) -> int | None:
    values = (getattr(source, name, None) for source in sources)
    found = next((value for value in values if value is not None), None)
    return None if found is None else int(found)


def check_parts(model: Any) -> None:
    """Refuses a model whose log-probabilities could not be computed from its parts.

    Raises:
        UserError: names what stands in the way.
    """
    kind = type(model).__name__
    if model.get_output_embeddings() is None:
        raise UserError(f"{kind} has no output head over tokens, so it cannot write; use another model")
    parts = EncoderDecoder(model)
    for part in (parts.encoder, parts.decoder):
        attention = part.config._attn_implementation
        if attention != "sdpa":
            raise UserError(
                f"{kind} runs the attention {attention!r}, and only 'sdpa' is supported; load it with "
                "attn_implementation='sdpa', or use another model"
            )
    head = model.get_output_embeddings()
    device = head.weight.device
    starts = torch.tensor([start_ids(model)], device=device)
    source = torch.arange(1, PROBE + 1, device=device)[None] % parts.encoder.get_input_embeddings().weight.shape[0]
    more = torch.arange(1, PROBE + 1, device=device)[None] % len(head.weight)
    ids = torch.cat([starts, more], 1)
    with torch.no_grad():
        own = model(input_ids=source, decoder_input_ids=ids, use_cache=False).logits
        states = parts.write(ids, parts.read(source, None), None, use_cache=False)[0]
        found = nn.functional.linear(states, head.weight, output_bias(model))
    kept = torch.ones(own.shape[-1], dtype=torch.bool, device=device)
    kept[banned_ids(model)] = False
    gap = (own - found)[..., kept].norm() / own[..., kept].norm().clamp(min=1e-30)
    # A cap does next to nothing to the small logits of a young model, hence the look at the config.
    if getattr(model.config, "final_logit_softcapping", None) or not float(gap) <= 1e-3:
        raise UserError(
            f"{kind} makes its logits in a way that is not known here (between its decoder and its output head, or "
            "behind it); T5, BART, Marian and encoder-decoders of two BERTs are known: use one of their shape"
        )
