"""Texts that another policy sampled: weights that make up for it, in full or in part. Pure, and without gradient."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

Level = Literal["token", "piece", "sequence"]


def segment_sums(values: Tensor, mask: Tensor, level: Level, pieces: Tensor | None = None) -> Tensor:
    """The sum of ``values`` over the token itself, its piece, or its whole text, on each sampled token: ``[B, L]``.

    Args:
        values, mask: ``[B, L]``.
        pieces: int64 ``[B, L]``, the number of the piece that a sampled token belongs to; for "piece" alone.
    """
    on, zero = mask.bool(), torch.zeros_like(values)
    kept = torch.where(on, values, zero)
    if level == "token":
        return kept
    if level == "sequence":
        return torch.where(on, kept.sum(1, keepdim=True), zero)
    assert pieces is not None, "ratios per piece need the batch's pieces: set algorithm.pieces"
    index = torch.where(on, pieces, torch.zeros_like(pieces))
    return torch.where(on, zero.scatter_add(1, index, kept).gather(1, index), zero)


def weights(
    log_ratio: Tensor,
    mask: Tensor,
    level: Level = "token",
    pieces: Tensor | None = None,
    most: float | None = None,
    beyond: Literal["truncate", "mask"] = "truncate",
) -> Tensor:
    """Importance weights ``p(segment) / p_sampler(segment)`` on each sampled token, ``[B, L]``, without gradient.

    Whole texts' weights (``level="sequence"``) are exact; a token's or a piece's own ratio is biased, since the prefix
    that led to it is still drawn from the sampler, and far less noisy.

    Args:
        log_ratio: ``[B, L]``, the policy's log-probability less the sampler's.
        most: "truncate" bounds weights from above by it (Espeholt et al., 2018); "mask" drops tokens whose weight lies
            outside ``[1 / most, most]``. None leaves them as they are.
    """
    ratio = segment_sums(log_ratio.detach(), mask, level, pieces).exp()
    if most is not None and beyond == "truncate":
        ratio = ratio.clamp(max=most)
    elif most is not None:
        ratio = torch.where((ratio <= most) & (ratio >= 1.0 / most), ratio, torch.zeros_like(ratio))
    return torch.where(mask.bool(), ratio, torch.zeros_like(ratio))


def self_normalised(weights: Tensor, totals: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """Weights ``[B, L]`` divided by their mean over texts, and the weighted mean of what the texts earned.

    With that mean taken away from the returns, the step is the gradient of the self-normalised estimate ``sum of w * R
    / sum of w`` (Swaminathan and Joachims, 2015). Consistent, with a bias that falls with the batch, and unlike the
    plain one it cannot be raised by weights that are large alone.

    Args:
        weights: ``[B, L]``, the same at each sampled token of a text; totals: ``[B]``.
    """
    of_text = torch.where(mask.bool(), weights, torch.zeros_like(weights)).amax(1)
    mean = of_text.mean().clamp(min=torch.finfo(weights.dtype).tiny)
    return weights / mean, (of_text * totals).sum() / of_text.sum().clamp(min=torch.finfo(weights.dtype).tiny)


def cumulative(log_ratio: Tensor, mask: Tensor, most: float | None = None) -> Tensor:
    """The ratio of each text up to and with token ``t``, ``prod over s <= t of ratio[s]``: ``[B, L]``, no gradient.

    Per-decision importance sampling (Precup, Sutton and Singh, 2000): a reward weighed by the ratio up to the token
    that pays it, a baseline by the ratio up to its own token, is exact; later tokens do not blur it.
    """
    on = mask.bool()
    ratio = torch.where(on, log_ratio.detach(), torch.zeros_like(log_ratio)).cumsum(1).exp()
    ratio = ratio if most is None else ratio.clamp(max=most)
    return torch.where(on, ratio, torch.zeros_like(ratio))


def effective_sample_size(log_ratio: Tensor, mask: Tensor) -> float:
    """How many of the texts count, as a share of them: ``(sum w)**2 / (B * sum w**2)`` of the whole texts' weights.

    Kong (1992). 1 where the policy itself sampled them; near ``1 / B`` where one text outweighs all others.
    """
    ratio = torch.where(mask.bool(), log_ratio.detach().double(), 0.0).sum(1)
    scaled = (ratio - ratio.max()).exp()  # any common factor cancels
    return float(scaled.sum() ** 2 / (len(ratio) * (scaled**2).sum()))
