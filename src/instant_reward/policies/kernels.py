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
    """``x @ weight.T + bias`` of layers that read the same input, by one bfloat16 copy of their float32 weights.

    The gradients of the weights are made by bfloat16 products and handed on in float32. Args of ``apply``: ``x [T, I]``
    (bfloat16); ``shadow``, the weights' copies one behind the other, ``[O, I]``; whether the weights are stored
    ``[I, O]``; and the parameters: the weights, then the biases, or none. Returns ``[T, O]``.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, shadow: Tensor, flipped: bool, layers: int, *parameters: Tensor) -> Tensor:
        ctx.save_for_backward(x, shadow)
        ctx.flipped, ctx.layers, ctx.wide = flipped, layers, parameters[0].dtype
        ctx.sizes = [weight.shape[1 if flipped else 0] for weight in parameters[:layers]]
        bias = torch.cat(parameters[layers:]).to(x.dtype) if len(parameters) > layers else None
        ctx.biased = bias is not None
        return torch.nn.functional.linear(x, shadow, bias)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        x, shadow = ctx.saved_tensors
        to_x = gradient @ shadow if ctx.needs_input_grad[0] else None
        found: list[Tensor | None] = [None] * (ctx.layers * (2 if ctx.biased else 1))
        if any(ctx.needs_input_grad[4 : 4 + ctx.layers]):
            joined = gradient.t() @ x
            for number, some in enumerate(torch.split(joined, ctx.sizes)):
                wide = some.to(ctx.wide)
                found[number] = wide.t() if ctx.flipped else wide
        if ctx.biased:
            found[ctx.layers :] = torch.split(gradient.to(ctx.wide).sum(0), ctx.sizes)
        return to_x, None, None, None, *found


def root_mean_square(x: Tensor, weight: Tensor, eps: float, dtype: torch.dtype) -> Tensor:
    """Llama's norm: ``weight * x / sqrt(mean(x ** 2) + eps)`` over the last dimension, in the weight's dtype.

    Returns:
        It in ``dtype``.

    Source: Zhang and Sennrich, "Root Mean Square Layer Normalization" (2019), equation 4.
    """
    if torch.is_grad_enabled():
        normed: Tensor = _RootMeanSquare.apply(x, weight, eps, dtype)  # type: ignore[no-untyped-call]
        return normed
    return _root_mean_square(x, weight, eps, dtype)[0]


def _root_mean_square(x: Tensor, weight: Tensor, eps: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    wide = x.to(weight.dtype)
    scale = torch.linalg.vecdot(wide, wide).unsqueeze(-1).div_(x.shape[-1]).add_(eps).rsqrt_()
    return (wide * scale).mul_(weight).to(dtype), scale


class _RootMeanSquare(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float, dtype: torch.dtype) -> Tensor:
        normed, scale = _root_mean_square(x, weight, eps, dtype)
        ctx.save_for_backward(x, weight, scale)
        return normed

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


def gated(both: Tensor) -> Tensor:
    """``silu(gate) * up`` of ``[T, 2 F]``, the gate before the other; of its input only that is kept.

    Source: Shazeer, "GLU Variants Improve Transformer" (2020), SwiGLU.
    """
    if torch.is_grad_enabled():
        found: Tensor = _Gated.apply(both)  # type: ignore[no-untyped-call]
        return found
    return _gated(both)


def _gated(both: Tensor) -> Tensor:
    gate, up = both.chunk(2, -1)
    return torch.nn.functional.silu(gate).mul_(up)


class _Gated(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, both: Tensor) -> Tensor:
        ctx.save_for_backward(both)
        return _gated(both)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        (both,) = ctx.saved_tensors
        gate, up = both.chunk(2, -1)
        found = torch.empty_like(both)
        to_gate, to_up = found.chunk(2, -1)
        torch.mul(torch.nn.functional.silu(gate), gradient, out=to_up)
        to_gate.copy_(torch.ops.aten.silu_backward(gradient * up, gate))
        return found


@dataclass(frozen=True)
class Rows:
    """Which packed tokens look at which: ``R`` rows with up to ``S`` queries and ``W`` keys.

    Attributes:
        queries: int64 ``[R, S]``, packed tokens; keys: int64 ``[R, W]``, what they have in common with other rows and
            then the queries themselves; 0 where there is none. A token is a query of one row alone.
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


def rotate(x: Tensor, cos: Tensor | None, sin: Tensor | None) -> Tensor:
    """Rotary positions: the two halves of each head turned by the token's angles.

    Args:
        x: ``[T, H, d]``; cos, sin: ``[T, 1, d / 2]`` in its dtype, None for a model without: ``x`` is handed back.

    Source: Su et al., "RoFormer" (2021), equation 34, with the halves as Llama's weights have them.
    """
    if cos is None or sin is None:
        return x
    half = x.shape[-1] // 2
    first, second = x[..., :half], x[..., half:]
    turned = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    torch.mul(first, cos, out=turned[..., :half]).addcmul_(second, sin, value=-1)
    torch.mul(second, cos, out=turned[..., half:]).addcmul_(first, sin)
    return turned


def parted(qkv: Tensor, heads: int, cos: Tensor | None, sin: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """Queries ``[T, H, d]`` and keys ``[T, G, d]`` turned by their angles, and values ``[T, G, d]``, in wide dtype."""
    wide = qkv.to(_wide(qkv))
    groups = (wide.shape[1] - heads) // 2
    turned = rotate(wide[:, : heads + groups], cos, sin)
    return turned[:, :heads], turned[:, heads:], wide[:, heads + groups :]


class Attention(torch.autograd.Function):
    """Softmax attention of packed tokens by rows, rotary positions included; it keeps its input alone.

    Args of ``apply``: ``qkv [T, H + 2 G, d]``, the heads' queries, then keys, then values (G divides H: heads share
    keys); H; ``cos`` and ``sin`` (see ``rotate``); the ``rows``. Returns ``[T, H, d]`` in the dtype of ``qkv``.

    Source: Vaswani et al., "Attention Is All You Need" (2017), equation 1; Ainslie et al., "GQA" (2023).
    """

    @staticmethod
    def forward(
        ctx: Any, qkv: Tensor, heads: int, cos: Tensor | None, sin: Tensor | None, rows: Sequence[Rows]
    ) -> Tensor:
        query, key, value = parted(qkv, heads, cos, sin)
        out = torch.empty(query.shape, dtype=qkv.dtype, device=qkv.device)
        for one in rows:
            heard = _chances(query, key, one) @ value[one.keys].transpose(1, 2)  # [R, G, (H / G) * S, d]
            _scatter(out, heard, one)
        ctx.save_for_backward(qkv, cos, sin)
        ctx.heads, ctx.rows = heads, rows
        return out

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        qkv, cos, sin = ctx.saved_tensors
        query, key, value = parted(qkv, ctx.heads, cos, sin)
        groups, size = key.shape[1:]
        total = torch.zeros(qkv.shape, dtype=query.dtype, device=qkv.device)
        to_query, to_key, to_value = torch.split(total, [ctx.heads, groups, groups], 1)
        gradient = gradient.to(query.dtype)
        for one in ctx.rows:
            chances = _chances(query, key, one)
            upstream = _by_key_head(gradient, one, groups)
            if len(one.places) < one.queries.numel():
                empty = torch.ones(one.queries.numel(), dtype=torch.bool, device=qkv.device)
                empty[one.places] = False  # what stands where no token is must not be learned from
                grouped = upstream.view(*upstream.shape[:2], -1, *one.queries.shape[1:], size)
                grouped.masked_fill_(empty.view(len(one.queries), 1, 1, -1, 1), 0.0)
            values, keys = value[one.keys].transpose(1, 2), key[one.keys].transpose(1, 2)
            _gather_back(to_value, chances.transpose(-1, -2) @ upstream, one)
            slope = upstream @ values.transpose(-1, -2)
            slope.sub_((slope * chances).sum(-1, keepdim=True)).mul_(chances).mul_(size**-0.5)
            _scatter(to_query, slope @ keys, one)
            _gather_back(to_key, slope.transpose(-1, -2) @ _by_key_head(query, one, groups), one)
        if sin is not None:
            turned = total[:, : ctx.heads + groups]
            turned.copy_(rotate(turned, cos, -sin))
        return total.to(qkv.dtype), None, None, None, None


def _wide(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _by_key_head(x: Tensor, rows: Rows, heads: int) -> Tensor:
    """``[T, H, d]`` as ``[R, G, (H / G) * S, d]``: the queries that share a key head are rows of one product."""
    some = x[rows.queries]  # [R, S, H, d]
    count, width, _, size = some.shape
    return some.view(count, width, heads, -1, size).permute(0, 2, 3, 1, 4).reshape(count, heads, -1, size)


def _chances(query: Tensor, key: Tensor, rows: Rows) -> Tensor:
    """``[R, G, (H / G) * S, W]``: what each query gives to each key."""
    queries = _by_key_head(query, rows, key.shape[1])
    scores = (queries @ key[rows.keys].permute(0, 2, 3, 1)).mul_(query.shape[-1] ** -0.5)
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
    count, width = rows.queries.shape
    before = rows.keys.shape[1] - width
    own = gradient[:, :, before:].transpose(1, 2).reshape(count * width, *total.shape[1:])
    total[rows.tokens] += own[rows.places]  # each of them once, which an index_add_ would not know
    if before:
        shared = gradient[:, :, :before].transpose(1, 2).flatten(0, 1)
        total.index_add_(0, rows.keys[:, :before].flatten(), shared)
