"""The layers of a decoder-only model as plain functions of packed tokens, for training and for decoding alike.

Models shaped like Llama (Mistral, Qwen2, Qwen3, SmolLM2) and like GPT-2, and the library's own Transformer, are
computed here; the weights stay in the transformers model, which loads and saves them. What computes otherwise goes
through the model's own forward pass (``states``): ``trunk_of`` compares the two on a probe, and says which.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.nn import functional
from transformers.pytorch_utils import Conv1D

from instant_reward.policies.kernels import Attention, Linear, Rows, gated, root_mean_square

# Attends in a layer: (its number, qkv [T, H + 2 G, d], cos and sin [T, 1, d / 2] or None) -> [T, H, d]
Attend = Callable[[int, Tensor, Tensor | None, Tensor | None], Tensor]
Product = Callable[[Tensor], Tensor]  # x [T, I] -> what some layers make of it, one behind the other, [T, O]
LLAMA_SHAPED = ("llama", "mistral", "qwen2", "qwen3")
OWN_LAYERS = (".qkv", ".out", ".up", ".down")  # of the library's own Transformer
PROBE = 5


class Products(Protocol):
    """How linear layers that read the same input are computed."""

    dtype: torch.dtype

    def of(self, layers: Sequence[Any]) -> Product:
        """The function of some layers."""


class Trunk(ABC):
    """The layers between a model's token ids and the states that its output head reads.

    Args:
        base: the transformers model without its head; its weights are read at every call.
        products: computes its linear layers.

    Attributes:
        heads: H, of queries.
        wide: the dtype of the residual stream.
    """

    def __init__(self, base: Any, products: Products) -> None:
        self.base = base
        self.norm_dtype = products.dtype
        self.heads = int(base.config.num_attention_heads)
        first = next(base.parameters())
        self.wide = torch.float64 if first.dtype == torch.float64 else torch.float32

    @abstractmethod
    def __call__(self, ids: Tensor, positions: Tensor, attend: Attend) -> Tensor:
        """The states ``[T, D]`` behind the last norm, in the products' dtype, of packed ``ids [T]``."""

    def causal(self, ids: Tensor, positions: Tensor, rows: Sequence[Rows]) -> Tensor:
        """The states where attention goes by ``rows``, with gradient."""

        def attend(_: int, qkv: Tensor, cos: Tensor | None, sin: Tensor | None) -> Tensor:
            heard: Tensor = Attention.apply(qkv, self.heads, cos, sin, rows)  # type: ignore[no-untyped-call]
            return heard

        return self(ids, positions, attend)


class LlamaShaped(Trunk):
    """Rotary positions, root-mean-square norms, gated layers; Qwen3's norms of queries and keys too."""

    def __init__(self, base: Any, products: Products) -> None:
        super().__init__(base, products)
        attentions = [layer.self_attn for layer in base.layers]
        self.size = attentions[0].head_dim
        self.inputs = [products.of([one.q_proj, one.k_proj, one.v_proj]) for one in attentions]
        self.outputs = [products.of([one.o_proj]) for one in attentions]
        self.opening = [products.of([layer.mlp.gate_proj, layer.mlp.up_proj]) for layer in base.layers]
        self.closing = [products.of([layer.mlp.down_proj]) for layer in base.layers]

    def __call__(self, ids: Tensor, positions: Tensor, attend: Attend) -> Tensor:
        """See ``Trunk``."""
        x = _embedded(self.base.embed_tokens, ids)
        cos, sin = self._angles(positions)
        for number, layer in enumerate(self.base.layers):
            qkv = self.inputs[number](_rms(layer.input_layernorm, x, self.norm_dtype)).view(len(x), -1, self.size)
            if hasattr(layer.self_attn, "q_norm"):
                groups = (qkv.shape[1] - self.heads) // 2
                q, k, v = torch.split(qkv, [self.heads, groups, groups], 1)
                norms = layer.self_attn.q_norm, layer.self_attn.k_norm
                qkv = torch.cat([_rms(norms[0], q, q.dtype), _rms(norms[1], k, k.dtype), v], 1)
            x = x + self.outputs[number](attend(number, qkv, cos, sin).reshape(len(x), -1))
            both = self.opening[number](_rms(layer.post_attention_layernorm, x, self.norm_dtype))
            x = x + self.closing[number](gated(both))
        return _rms(self.base.norm, x, self.norm_dtype)

    def _angles(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        probe = torch.empty(0, dtype=self.wide, device=positions.device)
        cos, sin = self.base.rotary_emb(probe, positions[None])
        half = self.size // 2
        return cos[0, :, None, :half], sin[0, :, None, :half]


class Gpt2Shaped(Trunk):
    """Learned positions and layer norms."""

    def __init__(self, base: Any, products: Products) -> None:
        super().__init__(base, products)
        self.inputs = [products.of([block.attn.c_attn]) for block in base.h]
        self.outputs = [products.of([block.attn.c_proj]) for block in base.h]
        self.opening = [products.of([block.mlp.c_fc]) for block in base.h]
        self.closing = [products.of([block.mlp.c_proj]) for block in base.h]

    def __call__(self, ids: Tensor, positions: Tensor, attend: Attend) -> Tensor:
        """See ``Trunk``."""
        x = _embedded(self.base.wte, ids) + _embedded(self.base.wpe, positions)
        for number, block in enumerate(self.base.h):
            qkv = self.inputs[number](block.ln_1(x).to(self.norm_dtype)).view(len(x), 3 * self.heads, -1)
            x = x + self.outputs[number](attend(number, qkv, None, None).reshape(len(x), -1))
            inner = block.mlp.act(self.opening[number](block.ln_2(x).to(self.norm_dtype)))
            x = x + self.closing[number](inner)
        states: Tensor = self.base.ln_f(x).to(self.norm_dtype)
        return states


class TransformerShaped(Trunk):
    """The library's own Transformer (``transformer``)."""

    def __init__(self, base: Any, products: Products) -> None:
        super().__init__(base, products)
        self.inputs = [products.of([block.qkv]) for block in base.blocks]
        self.outputs = [products.of([block.out]) for block in base.blocks]
        self.opening = [products.of([block.up]) for block in base.blocks]
        self.closing = [products.of([block.down]) for block in base.blocks]

    def __call__(self, ids: Tensor, positions: Tensor, attend: Attend) -> Tensor:
        """See ``Trunk``."""
        x = _embedded(self.base.tokens, ids) + _embedded(self.base.positions, positions)
        for number, block in enumerate(self.base.blocks):
            qkv = self.inputs[number](block.norm_1(x).to(self.norm_dtype)).view(len(x), 3 * self.heads, -1)
            x = x + self.outputs[number](attend(number, qkv, None, None).reshape(len(x), -1))
            inner = functional.gelu(self.opening[number](block.norm_2(x).to(self.norm_dtype)))
            x = x + self.closing[number](inner)
        states: Tensor = self.base.norm(x).to(self.norm_dtype)
        return states


def _embedded(table: Any, ids: Tensor) -> Tensor:
    return functional.embedding(ids, table.weight, table.padding_idx)


def _rms(norm: Any, x: Tensor, dtype: torch.dtype) -> Tensor:
    eps = norm.variance_epsilon if hasattr(norm, "variance_epsilon") else norm.eps
    return root_mean_square(x, norm.weight, eps, dtype)


class Trained:
    """Products with gradient: in the weights' own dtype, or by bfloat16 copies of them that follow every step."""

    def __init__(self, dtype: torch.dtype) -> None:
        self.dtype = dtype
        self._shadows: dict[tuple[int, ...], _Shadow] = {}

    def of(self, layers: Sequence[Any]) -> Product:
        """See ``Products``."""
        flipped = not isinstance(layers[0], torch.nn.Linear)

        def product(x: Tensor) -> Tensor:
            weights = [layer.weight for layer in layers]
            biases = [layer.bias for layer in layers if layer.bias is not None]
            if self.dtype == weights[0].dtype:
                found = [functional.linear(x, one.t() if flipped else one) for one in weights]
                joined = found[0] if len(found) == 1 else torch.cat(found, -1)
                return joined + torch.cat(biases) if biases else joined
            shadow = self._shadow(weights, flipped)
            made: Tensor = Linear.apply(x, shadow, flipped, len(weights), *weights, *biases)  # type: ignore[no-untyped-call]
            return made

        return product

    def shadow(self, weight: Tensor) -> Tensor:
        """A weight in the products' dtype, as it is now; without gradient."""
        return weight.detach() if weight.dtype == self.dtype else self._shadow([weight], False)

    def _shadow(self, weights: Sequence[Tensor], flipped: bool) -> Tensor:
        key = tuple(map(id, weights))
        if key not in self._shadows:
            self._shadows[key] = _Shadow(weights, flipped, self.dtype)
        return self._shadows[key].now()


class _Shadow:
    """Copies of weights in another dtype, one behind the other, ``[O, I]``; it keeps the weights, whose ids it has."""

    def __init__(self, weights: Sequence[Tensor], flipped: bool, dtype: torch.dtype) -> None:
        self.weights = [weight.detach().t() if flipped else weight.detach() for weight in weights]
        self.versions = [-1] * len(self.weights)
        self.joined = torch.empty(
            sum(len(one) for one in self.weights), self.weights[0].shape[1], dtype=dtype, device=weights[0].device
        )

    def now(self) -> Tensor:
        """As the weights are now: what changed since the last call is copied again."""
        parts = torch.split(self.joined, [len(weight) for weight in self.weights])
        for number, (part, weight) in enumerate(zip(parts, self.weights, strict=True)):
            if self.versions[number] != weight._version:  # a detached tensor shares its count of changes in place
                part.copy_(weight)
                self.versions[number] = weight._version
        return self.joined


def shape_of(base: Any) -> type[Trunk] | None:
    """The shape of a model, found out on a probe, or None for one that does not compute as those here do."""
    kind = base.config.model_type
    others: dict[str, type[Trunk]] = {"gpt2": Gpt2Shaped, "transformer": TransformerShaped}
    shape = LlamaShaped if kind in LLAMA_SHAPED else others.get(kind)
    if shape is None or not _plain(base):
        return None
    return shape if _same(base, shape(base, Trained(next(base.parameters()).dtype))) else None


def trunk_of(base: Any, products: Products) -> Trunk | None:
    """The trunk of a model, or None for one of another shape."""
    shape = shape_of(base)
    return None if shape is None else shape(base, products)


def is_linear(module: Any) -> bool:
    """Whether it is a plain linear layer, of torch or as GPT-2 has it; an adapter around one is not."""
    return type(module) in (torch.nn.Linear, Conv1D)


def _plain(base: Any) -> bool:
    """Whether the layers are the library's own (no adapter), every token looks at all before it, and all is kept."""
    layers = [one for name, one in base.named_modules() if name.endswith(("proj", "c_fc", "c_attn", *OWN_LAYERS))]
    linear = all(is_linear(one) for one in layers) and not any(hasattr(one, "base_layer") for one in base.modules())
    config = base.config
    slides = getattr(config, "sliding_window", None) is not None and getattr(config, "use_sliding_window", True)
    return linear and not slides


def _same(base: Any, trunk: Trunk) -> bool:
    """Whether it says of a few tokens what the model's own forward pass says."""
    device = next(base.parameters()).device
    ids = torch.arange(1, PROBE + 1, device=device) % base.get_input_embeddings().weight.shape[0]
    with torch.no_grad():
        own = base(input_ids=ids[None], use_cache=False).last_hidden_state[0]
        one = torch.arange(PROBE, device=device)
        look = one[None, :, None] >= one[None, None, :]
        rows = Rows(one[None], one[None], look, one, one)
        return torch.allclose(trunk.causal(ids, one, [rows]).to(own.dtype), own, atol=1e-3, rtol=1e-3)
