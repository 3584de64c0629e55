"""A small Transformer language model in plain PyTorch, trained from nothing.

Blocks with layer norms before their parts (Xiong et al., 2020, "On Layer Normalization in the Transformer
Architecture") over learned positions. It loads, saves and decodes as every other causal model of transformers does.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import AutoConfig, AutoModelForCausalLM, DynamicCache, GenerationMixin, PretrainedConfig
from transformers.modeling_outputs import BaseModelOutputWithPast

from instant_reward.policies.own import OwnModel, OwnTrunk, check_share
from instant_reward.types import UserError


class TransformerConfig(PretrainedConfig):  # type: ignore[no-untyped-call]
    """The shape of a ``TransformerModel``.

    Args:
        vocab_size: V, of the tokenizer.
        hidden_size: D, of embeddings and states; ``num_attention_heads`` divides it.
        intermediate_size: of the two linear layers in each block; without it, four times ``hidden_size``.
        max_position_embeddings: how many tokens a text may have, prompt included.
        dropout: the share of values dropped behind the embeddings, in attention and behind each part of a block; in
            supervised training only, since a policy runs without.
        tie_word_embeddings: the output head is the embeddings' own matrix.
        initializer_range: the deviation of the first weights.

    Raises:
        UserError: where the heads do not share ``hidden_size`` evenly, or ``dropout`` is no share.
    """

    model_type = "transformer"

    def __init__(
        self,
        vocab_size: int = 8192,
        hidden_size: int = 256,
        num_hidden_layers: int = 4,
        num_attention_heads: int = 4,
        intermediate_size: int | None = None,
        max_position_embeddings: int = 512,
        dropout: float = 0.0,
        layer_norm_eps: float = 1e-5,
        initializer_range: float = 0.02,
        tie_word_embeddings: bool = True,
        bos_token_id: int | None = None,
        eos_token_id: int | list[int] | None = None,
        pad_token_id: int | None = None,
        **others: Any,
    ) -> None:
        if hidden_size % num_attention_heads:
            raise UserError(
                f"transformer: num_attention_heads={num_attention_heads} does not divide hidden_size={hidden_size}; "
                "choose sizes that do"
            )
        check_share("transformer", dropout)
        self.vocab_size, self.max_position_embeddings = vocab_size, max_position_embeddings
        self.hidden_size, self.intermediate_size = hidden_size, intermediate_size or 4 * hidden_size
        self.num_hidden_layers, self.num_attention_heads = num_hidden_layers, num_attention_heads
        self.dropout, self.layer_norm_eps, self.initializer_range = dropout, layer_norm_eps, initializer_range
        self.tie_word_embeddings = tie_word_embeddings
        self.bos_token_id, self.eos_token_id, self.pad_token_id = bos_token_id, eos_token_id, pad_token_id
        super().__init__(**others)


class Block(nn.Module):
    """Attention and two linear layers, each behind a norm and added to what came in."""

    def __init__(self, config: TransformerConfig, number: int) -> None:
        super().__init__()
        width, inner = config.hidden_size, config.intermediate_size
        self.number, self.heads, self.share = number, config.num_attention_heads, config.dropout
        self.norm_1 = nn.LayerNorm(width, eps=config.layer_norm_eps)
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)
        self.norm_2 = nn.LayerNorm(width, eps=config.layer_norm_eps)
        self.up = nn.Linear(width, inner)
        self.down = nn.Linear(inner, width)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x: Tensor, look: Tensor | None, cache: Any) -> Tensor:
        """``[R, Q, D]`` to the same; ``look`` bool ``[R, 1, Q, K]``, or None for causal attention among ``x`` alone."""
        rows, length, width = x.shape
        queries, keys, values = (
            one.view(rows, length, self.heads, -1).transpose(1, 2) for one in self.qkv(self.norm_1(x)).chunk(3, -1)
        )
        if cache is not None:
            keys, values = cache.update(keys, values, self.number)
        heard = functional.scaled_dot_product_attention(
            queries,
            keys.to(queries.dtype),
            values.to(queries.dtype),
            attn_mask=look,
            dropout_p=self.share if self.training else 0.0,
            is_causal=look is None,
        )
        x = x + self.dropout(self.out(heard.transpose(1, 2).reshape(rows, length, width)))
        inner = self.down(functional.gelu(self.up(self.norm_2(x))))
        total: Tensor = x + self.dropout(inner)
        return total


class TransformerTrunk(OwnTrunk):  # type: ignore[no-untyped-call]
    """Learned positions, then blocks, then a last norm."""

    config_class = TransformerConfig

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__(config)
        self.positions = nn.Embedding(config.max_position_embeddings, config.hidden_size)
        self.blocks = nn.ModuleList([Block(config, number) for number in range(config.num_hidden_layers)])
        self.norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.post_init()  # type: ignore[no-untyped-call]

    def forward(
        self,
        input_ids: Tensor,
        position_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        past_key_values: Any = None,
        use_cache: bool = False,
        **_: Any,
    ) -> BaseModelOutputWithPast:
        """The states ``[R, Q, D]`` of ``input_ids [R, Q]``.

        Args:
            position_ids: int64 ``[R, Q]``; without it they count the tokens before, less the padding.
            attention_mask: bool ``[R, 1, Q, K]``, True where a token may look; or 1 and 0 ``[R, K]``, 0 where a key is
                padding; without it each token looks at itself and at all before it.
            past_key_values: a cache with ``update(keys, values, layer)``; with ``use_cache`` one is made.
        """
        cache = DynamicCache() if use_cache and past_key_values is None else past_key_values
        length, before = input_ids.shape[1], 0 if cache is None else int(cache.get_seq_length())
        if position_ids is None:
            position_ids = _places(attention_mask, before, length, input_ids.device)
        look = _look(attention_mask, before, length, input_ids.device)
        x = self.dropout(self.tokens(input_ids) + self.positions(position_ids))
        for block in self.blocks:
            x = block(x, look, cache)
        return BaseModelOutputWithPast(last_hidden_state=self.norm(x), past_key_values=cache)


def _places(mask: Tensor | None, before: int, length: int, device: torch.device) -> Tensor:
    """How many tokens that are no padding stand before each token, int64 ``[R or 1, Q]``."""
    if mask is None or mask.dim() == 4:
        return torch.arange(before, before + length, device=device)[None]
    return (mask.long().cumsum(1) - 1).clamp(min=0)[:, -length:]


def _look(mask: Tensor | None, before: int, length: int, device: torch.device) -> Tensor | None:
    """Who looks at whom, bool ``[R, 1, Q, K]``; None for causal attention with nothing before it."""
    if mask is not None and mask.dim() == 4:
        return mask.bool()
    if mask is None and not before:
        return None
    causal = torch.ones(length, before + length, dtype=torch.bool, device=device).tril(before)
    # A key that is padding is hidden; every query sees itself, so that no softmax is empty.
    own = torch.eye(length, dtype=torch.bool, device=device)
    itself = functional.pad(own, (before, 0))
    return causal[None, None] if mask is None else (causal & mask.bool()[:, None, None, :]) | itself


class TransformerModel(OwnModel, GenerationMixin):  # type: ignore[no-untyped-call]
    """The trunk and its output head; what transformers' ``generate`` decodes as well."""

    config_class = TransformerConfig
    trunk_class = TransformerTrunk


AutoConfig.register("transformer", TransformerConfig)
AutoModelForCausalLM.register(TransformerConfig, TransformerModel)
