"""Copies of linear layers' weights for decoding: joined where they read the same input, packed for fast products."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from instant_reward.policies.trunk import Product, is_linear

PACKED_ROWS = 32  # the matrices are packed for products with about so many rows


class Packed:
    """Products by matrices of their own, without gradient; what is made is loaded together."""

    def __init__(self, dtype: torch.dtype) -> None:
        self.dtype = dtype
        self.made: list[Joined] = []

    def of(self, layers: Sequence[Any]) -> Product:
        """See ``trunk.Products``."""
        self.made.append(Joined(layers, self.dtype))
        return self.made[-1]


class Joined:
    """Linear layers that read the same input, as one product; on a processor in the order that it reads fastest."""

    def __init__(self, layers: Sequence[Any], dtype: torch.dtype) -> None:
        self.layers, self.dtype = list(layers), dtype
        weights = [self._matrix(layer) for layer in self.layers]
        self.packs = (
            weights[0].device.type == "cpu"
            and dtype in (torch.float32, torch.bfloat16)
            and torch._C._has_mkldnn
            and torch.backends.mkldnn.enabled
            and hasattr(torch.ops.mkldnn, "_reorder_linear_weight")
            # Packing refuses bfloat16 on a processor without its instructions.
            and (dtype != torch.bfloat16 or torch.ops.mkldnn._is_mkldnn_bf16_supported())
        )
        self.weight: Tensor | None = None
        self.bias: Tensor | None = None

    def load(self) -> None:
        """Takes over the layers' weights."""
        weights = [self._matrix(layer).detach().to(self.dtype) for layer in self.layers]
        joined = (weights[0] if len(weights) == 1 else torch.cat(weights)).contiguous()
        biases = [getattr(layer, "bias", None) for layer in self.layers]
        if biases[0] is not None:
            self.bias = torch.cat([bias.detach() for bias in biases if bias is not None]).to(self.dtype)
        if self.packs:
            self.weight = torch.ops.mkldnn._reorder_linear_weight(joined, PACKED_ROWS)
        else:
            shared = joined.data_ptr() == self._matrix(self.layers[0]).data_ptr()
            self.weight = joined.clone() if shared else joined

    def __call__(self, x: Tensor) -> Tensor:
        """What the layers make of ``x [T, I]``, one behind the other."""
        assert self.weight is not None, "load the weights first"
        if self.packs:
            found: Tensor = torch.ops.mkldnn._linear_pointwise(x, self.weight, self.bias, "none", [], "")
            return found
        return functional.linear(x, self.weight, self.bias)

    @staticmethod
    def _matrix(layer: Any) -> Tensor:
        """``[O, I]``; GPT-2 stores it the other way round."""
        weight: Tensor = layer.weight
        return weight if isinstance(layer, nn.Linear) else weight.t()


def twin_of(base: Any) -> Any:
    """A copy of a trunk with norms, embeddings and biases of its own; its linear weights are the trunk's."""
    linear = [one.weight for one in base.modules() if is_linear(one)]
    return copy.deepcopy(base, {id(weight): weight for weight in linear})


@torch.no_grad()
def follow(twin: Any, base: Any, products: Iterable[Joined]) -> None:
    """Takes over a trunk's weights as they are now, into its twin and into the products made of it."""
    for mine, theirs in zip(twin.parameters(), base.parameters(), strict=True):
        if mine is not theirs:
            mine.copy_(theirs)
    for one in products:
        one.load()
