"""The products, norms and attention of a trunk, with gradients by hand: they keep little and compute the rest anew.

Tokens are packed: ``[T, ...]`` without padding. ``wide`` is the dtype of what is not a matrix product with weights
(the residual stream, norms, attention): float32, or float64 where the weights are.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


class Linear(torch.autograd.Function):
    """``x @ weight.T + bias`` by a bfloat16 copy of a float32 weight, whose gradient is float32.

    Args of ``apply``: ``x [T, I]`` (bfloat16), ``weight`` and ``bias`` (the parameters), ``shadow`` (the copy of the
    weight), and whether the weight is stored ``[I, O]`` and not ``[O, I]``.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, shadow: Tensor, flipped: bool) -> Tensor:
        ctx.save_for_backward(x, shadow)
        ctx.flipped, ctx.biased, ctx.wide = flipped, bias is not None, weight.dtype
        matrix = shadow.t() if flipped else shadow
        return torch.nn.functional.linear(x, matrix, None if bias is None else bias.to(x.dtype))

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        x, shadow = ctx.saved_tensors
        to_x = to_weight = to_bias = None
        if ctx.needs_input_grad[0]:
            to_x = gradient @ (shadow.t() if ctx.flipped else shadow)
        if ctx.needs_input_grad[1]:
            to_weight = (x.t() @ gradient if ctx.flipped else gradient.t() @ x).to(ctx.wide)
        if ctx.biased and ctx.needs_input_grad[2]:
            to_bias = gradient.to(ctx.wide).sum(0)
        return to_x, to_weight, to_bias, None, None


class RootMeanSquare(torch.autograd.Function):
    """Llama's norm: ``weight * x / sqrt(mean(x ** 2) + eps)`` over the last dimension, in the wide dtype.

    Source: Zhang and Sennrich, "Root Mean Square Layer Normalization" (2019), equation 4.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float, dtype: torch.dtype) -> Tensor:
        wide = x.to(weight.dtype)
        scale = wide.square().mean(-1, keepdim=True).add_(eps).rsqrt_()
        ctx.save_for_backward(x, weight, scale)
        return (wide * scale).mul_(weight).to(dtype)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, scale = ctx.saved_tensors
        gradient = gradient.to(weight.dtype)
        normed = x.to(weight.dtype) * scale
        to_weight = None
        if ctx.needs_input_grad[1]:
            to_weight = (gradient * normed).flatten(0, -2).sum(0)
        inner = gradient * weight
        level = (inner * normed).mean(-1, keepdim=True)
        return inner.sub_(normed.mul_(level)).mul_(scale).to(x.dtype), to_weight, None, None


class Gated(torch.autograd.Function):
    """``silu(gate) * up``: of its inputs only they are kept. Source: Shazeer, "GLU Variants" (2020), SwiGLU."""

    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor) -> Tensor:
        ctx.save_for_backward(gate, up)
        return torch.nn.functional.silu(gate).mul_(up)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor]:
        gate, up = ctx.saved_tensors
        to_up = torch.nn.functional.silu(gate).mul_(gradient)
        to_gate = torch.ops.aten.silu_backward(gradient * up, gate)
        return to_gate, to_up


@dataclass(frozen=True)
class Rows:
    """Which packed tokens look at which: ``R`` rows with up to ``S`` queries and ``W`` keys.

    Attributes:
        queries: int64 ``[R, S]``, packed tokens; keys: int64 ``[R, W]``; 0 where there is none.
        look: bool ``[R, S, W]``, which key a query looks at; every query looks at one at least.
        places, tokens: int64 ``[N]``, the queries that are tokens: their place in ``[R * S]``, and their token.
    """

    queries: Tensor
    keys: Tensor
    look: Tensor
    places: Tensor
    tokens: Tensor

    def to(self, device: torch.device) -> Rows:
        """The same on a device."""
        parts = (self.queries, self.keys, self.look, self.places, self.tokens)
        return Rows(*(part.to(device) for part in parts))


def rotate(x: Tensor, cos: Tensor | None, sin: Tensor | None, wide: torch.dtype) -> Tensor:
    """Rotary positions: the two halves of each head turned by the token's angles.

    Args:
        x: ``[T, H, d]``; cos, sin: ``[T, 1, d / 2]`` in the wide dtype, None for a model without.

    Source: Su et al., "RoFormer" (2021), equation 34, with the halves as Llama's weights have them.
    """
    if cos is None or sin is None:
        return x.to(wide)
    half = x.shape[-1] // 2
    first, second = x[..., :half], x[..., half:]
    turned = torch.empty(x.shape, dtype=wide, device=x.device)
    torch.mul(first, cos, out=turned[..., :half]).addcmul_(second, sin, value=-1)
    torch.mul(second, cos, out=turned[..., half:]).addcmul_(first, sin)
    return turned


class Attention(torch.autograd.Function):
    """Softmax attention of packed tokens by rows, rotary positions included; it keeps ``q``, ``k`` and ``v`` alone.

    Args of ``apply``: ``q [T, H, d]``, ``k`` and ``v`` ``[T, G, d]`` (G divides H: heads share keys), ``cos`` and
    ``sin`` (see ``rotate``), the ``rows``, and the scale of the scores. Returns ``[T, H, d]`` in the dtype of ``q``.

    Source: Vaswani et al., "Attention Is All You Need" (2017), equation 1; Ainslie et al., "GQA" (2023).
    """

    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        cos: Tensor | None,
        sin: Tensor | None,
        rows: Sequence[Rows],
        scale: float,
    ) -> Tensor:
        wide = _wide(q)
        query, key, value = rotate(q, cos, sin, wide), rotate(k, cos, sin, wide), v.to(wide)
        out = torch.empty_like(q)
        for one in rows:
            chances = _chances(query, key, one, scale)
            heard = chances @ value[one.keys].transpose(1, 2)  # [R, G, (H / G) * S, d]
            _scatter(out, heard, one)
        ctx.save_for_backward(q, k, v, cos, sin)
        ctx.rows, ctx.scale = rows, scale
        return out

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, cos, sin = ctx.saved_tensors
        wide = _wide(q)
        query, key, value = rotate(q, cos, sin, wide), rotate(k, cos, sin, wide), v.to(wide)
        to_query, to_key, to_value = (torch.zeros_like(one) for one in (query, key, value))
        gradient = gradient.to(wide)
        for one in ctx.rows:
            chances = _chances(query, key, one, ctx.scale)
            upstream = _by_key_head(gradient, one, key.shape[1])
            empty = torch.ones(one.queries.numel(), dtype=torch.bool, device=q.device)
            empty[one.places] = False  # what stands where no token is must not be learned from
            grouped = upstream.view(*upstream.shape[:2], -1, *one.queries.shape[1:], upstream.shape[-1])
            grouped.masked_fill_(empty.view(len(one.queries), 1, 1, -1, 1), 0.0)
            values, keys = value[one.keys].transpose(1, 2), key[one.keys].transpose(1, 2)
            _gather_back(to_value, chances.transpose(-1, -2) @ upstream, one)
            slope = upstream @ values.transpose(-1, -2)
            slope.sub_((slope * chances).sum(-1, keepdim=True)).mul_(chances).mul_(ctx.scale)
            _scatter(to_query, slope @ keys, one)
            _gather_back(to_key, slope.transpose(-1, -2) @ _by_key_head(query, one, key.shape[1]), one)
        back = None if sin is None else -sin
        to_q = rotate(to_query, cos, back, wide).to(q.dtype)
        to_k = rotate(to_key, cos, back, wide).to(k.dtype)
        return to_q, to_k, to_value.to(v.dtype), None, None, None, None


def _wide(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _by_key_head(x: Tensor, rows: Rows, heads: int) -> Tensor:
    """``[T, H, d]`` as ``[R, G, (H / G) * S, d]``: the queries that share a key head are rows of one product."""
    some = x[rows.queries]  # [R, S, H, d]
    count, width, _, size = some.shape
    return some.view(count, width, heads, -1, size).permute(0, 2, 3, 1, 4).reshape(count, heads, -1, size)


def _chances(query: Tensor, key: Tensor, rows: Rows, scale: float) -> Tensor:
    """``[R, G, (H / G) * S, W]``: what each query gives to each key."""
    queries = _by_key_head(query, rows, key.shape[1])
    scores = (queries @ key[rows.keys].permute(0, 2, 3, 1)).mul_(scale)
    count, width = rows.queries.shape
    split = scores.view(count, key.shape[1], -1, width, scores.shape[-1])
    split.masked_fill_(~rows.look[:, None, None], -torch.inf)
    return scores.softmax(-1)


def _scatter(out: Tensor, heard: Tensor, rows: Rows) -> None:
    """Puts ``[R, G, (H / G) * S, d]`` on the tokens that asked, ``out [T, H, d]``."""
    count, width = rows.queries.shape
    split = heard.view(count, heard.shape[1], -1, width, heard.shape[-1]).permute(0, 3, 1, 2, 4)
    flat = split.reshape(count * width, *out.shape[1:])
    out[rows.tokens] = flat[rows.places].to(out.dtype)


def _gather_back(total: Tensor, gradient: Tensor, rows: Rows) -> None:
    """Adds what ``[R, G, W, d]`` says of keys or values to the tokens they are of, ``total [T, G, d]``."""
    total.index_add_(0, rows.keys.flatten(), gradient.transpose(1, 2).flatten(0, 1))
