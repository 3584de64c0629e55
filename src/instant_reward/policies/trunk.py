"""The layers of a decoder-only model as plain functions of packed tokens, for training and for decoding alike.

Models shaped like Llama (Mistral, Qwen2, Qwen3, SmolLM2) and like GPT-2 are computed here; the weights stay in the
transformers model, which loads and saves them. What computes otherwise goes through the model's own forward pass
(``states``): ``trunk_of`` compares the two on a probe, and says which.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.nn import functional

from instant_reward.policies.kernels import Attention, Gated, Linear, RootMeanSquare, Rows

# Attends in a layer: (its number, q [T, H, d], k and v [T, G, d], cos and sin [T, 1, d / 2] or None) -> [T, H, d]
Attend = Callable[[int, Tensor, Tensor, Tensor, Tensor | None, Tensor | None], Tensor]
Product = Callable[[Tensor], tuple[Tensor, ...]]  # x [T, I] -> what each of some layers makes of it, [T, O]
LLAMA_SHAPED = ("llama", "mistral", "qwen2", "qwen3")
PROBE = 5


class Products(Protocol):
    """How linear layers that read the same input are computed."""

    dtype: torch.dtype

    def of(self, layers: Sequence[Any]) -> Product:
        """The function of some layers."""


class Trunk:
    """The layers between a model's token ids and the states that its output head reads.

    Args:
        base: the transformers model without its head; its weights are read at every call.
        products: computes its linear layers.
    """

    def __init__(self, base: Any, products: Products) -> None:
        self.base, self.products = base, products
        self.norm_dtype = products.dtype
        first = next(base.parameters())
        self.wide = torch.float64 if first.dtype == torch.float64 else torch.float32

    def __call__(self, ids: Tensor, positions: Tensor, attend: Attend) -> Tensor:
        """The states ``[T, D]`` behind the last norm, in the products' dtype, of packed ``ids [T]``."""
        raise NotImplementedError

    def causal(self, ids: Tensor, positions: Tensor, rows: Sequence[Rows]) -> Tensor:
        """The states where attention goes by ``rows``, with gradient."""

        def attend(_: int, q: Tensor, k: Tensor, v: Tensor, cos: Tensor | None, sin: Tensor | None) -> Tensor:
            heard: Tensor = Attention.apply(q, k, v, cos, sin, rows, q.shape[-1] ** -0.5)  # type: ignore[no-untyped-call]
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
            queries, keys, values = self.inputs[number](_rms(layer.input_layernorm, x, self.norm_dtype))
            q, k, v = (one.view(len(x), -1, self.size) for one in (queries, keys, values))
            if hasattr(layer.self_attn, "q_norm"):
                q, k = _rms(layer.self_attn.q_norm, q, q.dtype), _rms(layer.self_attn.k_norm, k, k.dtype)
            heard = attend(number, q, k, v, cos, sin).reshape(len(x), -1)
            x = x + self.outputs[number](heard)[0]
            gate, up = self.opening[number](_rms(layer.post_attention_layernorm, x, self.norm_dtype))
            inner: Tensor = Gated.apply(gate, up)  # type: ignore[no-untyped-call]
            x = x + self.closing[number](inner)[0]
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
        self.heads = base.config.num_attention_heads
        self.inputs = [products.of([block.attn.c_attn]) for block in base.h]
        self.outputs = [products.of([block.attn.c_proj]) for block in base.h]
        self.opening = [products.of([block.mlp.c_fc]) for block in base.h]
        self.closing = [products.of([block.mlp.c_proj]) for block in base.h]

    def __call__(self, ids: Tensor, positions: Tensor, attend: Attend) -> Tensor:
        """See ``Trunk``."""
        x = _embedded(self.base.wte, ids) + _embedded(self.base.wpe, positions)
        for number, block in enumerate(self.base.h):
            joined = self.inputs[number](block.ln_1(x).to(self.norm_dtype))[0]
            q, k, v = joined.view(len(x), 3, self.heads, -1).unbind(1)
            x = x + self.outputs[number](attend(number, q, k, v, None, None).reshape(len(x), -1))[0]
            inner = block.mlp.act(self.opening[number](block.ln_2(x).to(self.norm_dtype))[0])
            x = x + self.closing[number](inner)[0]
        states: Tensor = self.base.ln_f(x).to(self.norm_dtype)
        return states


def _embedded(table: Any, ids: Tensor) -> Tensor:
    return functional.embedding(ids, table.weight, table.padding_idx)


def _rms(norm: Any, x: Tensor, dtype: torch.dtype) -> Tensor:
    eps = norm.variance_epsilon if hasattr(norm, "variance_epsilon") else norm.eps
    normed: Tensor = RootMeanSquare.apply(x, norm.weight, eps, dtype)  # type: ignore[no-untyped-call]
    return normed


class Trained:
    """Products with gradient: in the weights' own dtype, or by bfloat16 copies of them that follow every step."""

    def __init__(self, dtype: torch.dtype) -> None:
        self.dtype = dtype
        self._shadows: dict[int, tuple[Tensor, int, Tensor]] = {}

    def of(self, layers: Sequence[Any]) -> Product:
        """See ``Products``."""
        return lambda x: tuple(self._product(layer, x) for layer in layers)

    def _product(self, layer: Any, x: Tensor) -> Tensor:
        weight, bias, flipped = layer.weight, layer.bias, not isinstance(layer, torch.nn.Linear)
        if self.dtype == weight.dtype:
            return functional.linear(x, weight.t() if flipped else weight, bias)
        product: Tensor = Linear.apply(x, weight, bias, self.shadow(weight), flipped)  # type: ignore[no-untyped-call]
        return product

    def shadow(self, weight: Tensor) -> Tensor:
        """A weight in the products' dtype, as it is now; without gradient."""
        if weight.dtype == self.dtype:
            return weight.detach()
        _, version, copy = self._shadows.get(id(weight), (None, -1, None))
        if copy is None:
            copy = weight.detach().to(self.dtype)
        elif version != weight._version:
            copy.copy_(weight.detach())
        self._shadows[id(weight)] = (weight, weight._version, copy)  # with the weight, whose id is then no other's
        return copy


def trunk_of(base: Any, products: Products) -> Trunk | None:
    """The trunk of a model, or None for one that does not compute as those here do."""
    kind = base.config.model_type
    shape = LlamaShaped if kind in LLAMA_SHAPED else Gpt2Shaped if kind == "gpt2" else None
    if shape is None or not _plain(base):
        return None
    made = shape(base, products)
    exact = shape(base, Trained(next(base.parameters()).dtype))
    return made if _same(base, exact) else None


def _plain(base: Any) -> bool:
    """Whether the layers are the library's own (no adapter), every token looks at all before it, and all is kept."""
    layers = [one for name, one in base.named_modules() if name.endswith(("proj", "c_fc", "c_attn"))]
    linear = all(type(one).__name__ in ("Linear", "Conv1D") for one in layers)
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
