"""Who is credited with what: marks are placed on tokens, summed to returns, and compared with a baseline. Pure.

All functions take and return ``[B, L]`` tensors over the flat sequence. Where the mask is off (prompt, padding, another
speaker) the recursions pass over a token unchanged, its own reward is ignored, and the result there is 0.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from instant_reward.config_weight import WeightRule


@dataclass(frozen=True)
class Source:
    """One row of ``rewards [B, K, L]``: its name, weight, discount per sampled token and placement.

    ``final`` says that it pays once, for the whole text: a text that was cut off has then got all there is, and nothing
    is expected beyond its end. ``earned`` is False for shaping: it is no part of what a text earned. ``dense`` names
    what the algorithm itself pays at every token: the KL to the reference, the entropy, the teacher's log-ratio, the
    length penalty.
    ``rule`` says how the weight changes with the run; ``scaled`` divides it by the running deviation of what texts earn
    from the source (the mean is not taken away: that would pay texts for their length); ``clip`` bounds each mark.
    """

    name: str
    weight: float = 1.0
    discount: float = 1.0
    at: Literal["seen", "span"] = "seen"
    final: bool = False
    earned: bool = True
    dense: Literal["", "kl", "entropy", "teacher", "length"] = ""
    rule: WeightRule | None = None
    scaled: bool = False
    clip: float | None = None


@dataclass
class Marks:
    """The marks of a batch as flat arrays of one length: row, source (index), start, end, seen (int64) and value."""

    row: Tensor
    source: Tensor
    start: Tensor
    end: Tensor
    seen: Tensor
    value: Tensor


def place(marks: Marks, sources: Sequence[Source], mask: Tensor) -> Tensor:
    """Puts every mark on the tokens that pay it: ``[B, K, L]``.

    ``at="seen"``: all of it at token ``seen - 1``, moved back to the last sampled token; every sampled token that could
    have influenced the mark then has it in its reward-to-go. ``at="span"``: such that the reward-to-go of each token of
    the piece is the value in full, of earlier ones the value discounted, of later ones nothing (biased where the mark
    depends on tokens outside its piece).

    Args:
        mask: ``[B, L]``, which tokens were sampled.
    """
    assert mask.dim() == 2, f"mask must be [B, L], not {tuple(mask.shape)}"
    rows, length = mask.shape
    rewards = torch.zeros(rows, len(sources), length, dtype=marks.value.dtype, device=mask.device)
    if marks.row.numel() == 0:
        return rewards
    last = _last_sampled(mask.bool())
    spans = torch.tensor([one.at == "span" for one in sources], device=mask.device)[marks.source]
    known = torch.where(spans, marks.end, marks.seen) - 1
    at = last[marks.row, known]
    assert bool((at >= 0).all()), "a mark lies before the first sampled token"
    rewards.index_put_((marks.row, marks.source, at), marks.value, accumulate=True)
    # With (1 - discount) of the value on the earlier tokens of the piece, each of them still gets it in full.
    discounts = torch.tensor([one.discount for one in sources], dtype=rewards.dtype, device=mask.device)
    earlier = torch.where(spans, at - marks.start, torch.zeros_like(at)).clamp(min=0)
    mark = torch.repeat_interleave(earlier)
    token = marks.start[mark] + torch.arange(len(mark), device=mask.device) - (earlier.cumsum(0) - earlier)[mark]
    row, source = marks.row[mark], marks.source[mark]
    share = (1.0 - discounts[source]) * marks.value[mark] * mask[row, token].to(rewards.dtype)
    rewards.index_put_((row, source, token), share, accumulate=True)
    return rewards


def reward_to_go(rewards: Tensor, mask: Tensor, discount: float = 1.0) -> Tensor:
    """The discounted sum of this and all later rewards, ``G[t] = r[t] + discount * G[next sampled token]``.

    Sutton and Barto (2018), equation 3.9. The discount counts sampled tokens. The prefactor ``discount ** t`` of the
    discounted objective's own gradient is left out, as everyone does.

    Args:
        rewards, mask: ``[B, L]``.

    Returns:
        ``[B, L]`` in the dtype of ``rewards``; 0 where the mask is off.
    """
    _same_shape(rewards, mask)
    on = mask.bool()
    returns = torch.zeros_like(rewards)
    running = torch.zeros_like(rewards[:, 0])
    for t in range(rewards.shape[1] - 1, -1, -1):
        running = torch.where(on[:, t], rewards[:, t] + discount * running, running)
        returns[:, t] = running
    return torch.where(on, returns, torch.zeros_like(returns))


def whole_return(rewards: Tensor, mask: Tensor) -> Tensor:
    """The sum of all rewards of a text, on each of its sampled tokens: ``[B, L]``. When a reward came is lost."""
    _same_shape(rewards, mask)
    on, zero = mask.bool(), torch.zeros_like(rewards)
    return torch.where(on, torch.where(on, rewards, zero).sum(1, keepdim=True), zero)


def leave_one_out(returns: Tensor, mask: Tensor, group: Tensor) -> Tensor:
    """The mean return of a text's siblings at the same sampled position, not yet subtracted: ``[B, L]``.

    Kool, van Hoof and Welling (2019), equation 7, at each position. Positions count sampled tokens. A sibling that has
    already finished counts 0; a text without siblings gets 0. The baseline of token ``t`` depends on the siblings
    alone, hence the gradient stays unbiased.

    Args:
        returns, mask: ``[B, L]``.
        group: int64 ``[B]``; siblings share a number.
    """
    _same_shape(returns, mask)
    on = mask.bool()
    ordinal = (on.long().cumsum(1) - 1).clamp(min=0)
    zero = torch.zeros_like(returns)
    compact = zero.scatter_add(1, ordinal, torch.where(on, returns, zero))
    _, member = torch.unique(group, return_inverse=True)
    groups = int(member.max()) + 1 if member.numel() else 0
    sums = torch.zeros(groups, returns.shape[1], dtype=returns.dtype, device=returns.device)
    # Less the group's highest at each position, so that equals sum to 0 exactly: rounding may be scaled up later.
    index = member[:, None].expand_as(compact)
    highest = torch.full_like(sums, -torch.inf).scatter_reduce(0, index, compact, "amax")[member]
    below = compact - highest
    sums = sums.index_add(0, member, below)
    sizes = torch.bincount(member, minlength=groups)[member].to(returns.dtype)[:, None]
    others = torch.where(sizes > 1, highest + (sums[member] - below) / (sizes - 1).clamp(min=1), zero)
    return torch.where(on, others.gather(1, ordinal), zero)


def group_deviation(totals: Tensor, group: Tensor) -> Tensor:
    """The sample deviation (n - 1) of ``totals [B]`` within each group, ``[B]``; 0 for a group of one."""
    assert totals.shape == group.shape == totals.shape[:1], "totals and group must both be [B]"
    _, member = torch.unique(group, return_inverse=True)
    groups = int(member.max()) + 1 if member.numel() else 0
    sizes = torch.bincount(member, minlength=groups).to(totals.dtype)
    zeros = torch.zeros(groups, dtype=totals.dtype, device=totals.device)
    means = zeros.index_add(0, member, totals) / sizes
    squares = zeros.index_add(0, member, (totals - means[member]) ** 2)
    return (squares / (sizes - 1).clamp(min=1)).sqrt()[member]


def scale_by_deviation(advantages: Tensor, mask: Tensor, shift: bool = False) -> Tensor:
    """Divides by the deviation over all sampled tokens, ``[B, L]``; ``shift`` also takes the mean away (whitening).

    The mean is kept by default: taking it away would pay texts for their length. A constant stays what it is, or
    becomes 0 with ``shift``: never NaN.
    """
    _same_shape(advantages, mask)
    on = mask.bool()
    chosen = advantages[on]
    if chosen.numel() == 0:
        return advantages
    mean = chosen.mean()
    deviation = (chosen - mean).pow(2).mean().sqrt()
    scaled = advantages - mean if shift else advantages
    # Rounding leaves a constant with a deviation of a few last bits; dividing by it would make noise of nothing.
    resolution = torch.finfo(chosen.dtype).eps * 8 * chosen.abs().max()
    scaled = torch.where(deviation > resolution, scaled / deviation.clamp(min=torch.finfo(chosen.dtype).tiny), scaled)
    return torch.where(on, scaled, torch.zeros_like(scaled))


def gae(
    rewards: Tensor,
    values: Tensor,
    mask: Tensor,
    discount: float = 1.0,
    lam: float | Tensor = 0.95,
    bootstrap: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Generalised advantage estimation, Schulman et al. (2016), equation 16: advantages and returns, ``[B, L]`` each.

    ``delta[t] = r[t] + discount * V[t+1] - V[t]``, ``A[t] = delta[t] + discount * lam * A[t+1]``, ``returns = A + V``
    (the lambda-returns, TD(lambda)'s targets), where ``t+1`` is the next sampled token.

    Args:
        rewards, values, mask: ``[B, L]``; ``values[t]`` is the value of the text before token ``t``.
        lam: one number, or one for each text, ``[B]``.
        bootstrap: ``[B]``, the value after the last token of a text that was cut off, 0 where it finished.
    """
    ones = torch.zeros_like(rewards)
    return vtrace(rewards, values, ones, mask, discount, lam, bootstrap=bootstrap)


def vtrace(
    rewards: Tensor,
    values: Tensor,
    log_ratio: Tensor,
    mask: Tensor,
    discount: float = 1.0,
    lam: float | Tensor = 1.0,
    rho_max: float = 1.0,
    c_max: float = 1.0,
    bootstrap: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """V-trace, Espeholt et al. (2018), equation 1, with lambda: advantages and targets, ``[B, L]`` each.

    ``targets[t] = V[t] + delta[t] + discount * c[t] * (targets[t+1] - V[t+1])``,
    ``delta[t] = rho[t] * (r[t] + discount * V[t+1] - V[t])``, ``c = lam * min(c_max, ratio)``,
    ``rho = min(rho_max, ratio)``;
    ``advantages[t] = rho[t] * (r[t] + discount * (lam * targets[t+1] + (1 - lam) * V[t+1]) - V[t])``, so that on-policy
    they are GAE's; ``t+1`` is the next sampled token. The ratio is a weight: no gradient flows through it.

    Args:
        log_ratio: ``[B, L]``, the policy's log-probability less the sampler's.
        lam: one number, or one for each text, ``[B]``.
        bootstrap: ``[B]``, the value after the last token of a text that was cut off, 0 where it finished.
    """
    _same_shape(rewards, mask)
    _same_shape(values, mask)
    _same_shape(log_ratio, mask)
    on = mask.bool()
    ratio = log_ratio.detach().exp()
    share = lam[:, None] if isinstance(lam, Tensor) else lam
    rho, c = ratio.clamp(max=rho_max), share * ratio.clamp(max=c_max)
    next_value = torch.zeros_like(rewards[:, 0]) if bootstrap is None else bootstrap.to(rewards.dtype)
    next_target = next_value
    advantages, targets = torch.zeros_like(rewards), torch.zeros_like(rewards)
    for t in range(rewards.shape[1] - 1, -1, -1):
        value, r = values[:, t].to(rewards.dtype), rewards[:, t]
        delta = rho[:, t] * (r + discount * next_value - value)
        target = value + delta + discount * c[:, t] * (next_target - next_value)
        ahead = lam * next_target + (1.0 - lam) * next_value
        advantages[:, t] = torch.where(on[:, t], rho[:, t] * (r + discount * ahead - value), advantages[:, t])
        targets[:, t] = torch.where(on[:, t], target, targets[:, t])
        next_target = torch.where(on[:, t], target, next_target)
        next_value = torch.where(on[:, t], value, next_value)
    return advantages, targets


def length_lambda(mask: Tensor, alpha: float) -> Tensor:
    """The policy's lambda for each text, ``1 - 1 / (alpha * length)``, at least 0: ``[B]``.

    Yue et al. (2025), "VAPO", section 4.2: with a fixed lambda the error of a token late in a long text hardly reaches
    its beginning; with this one the sum of its weights grows with the length.

    Args:
        mask: ``[B, L]``; the length of a text is the number of its sampled tokens.
    """
    lengths = mask.bool().sum(1).clamp(min=1).double()
    return (1.0 - 1.0 / (alpha * lengths)).clamp(min=0.0)


def over_length(mask: Tensor, longest: int, soft: int) -> Tensor:
    """The soft length penalty of Yu et al. (2025), "DAPO", equation 13, on each text's last sampled token: ``[B, L]``.

    0 up to ``longest - soft`` sampled tokens, from there linearly down to -1 at ``longest``.
    """
    on = mask.bool()
    lengths = on.sum(1)
    penalty = ((longest - soft - lengths.double()) / soft).clamp(min=-1.0, max=0.0)
    last = on & (on.long().cumsum(1) == lengths[:, None])
    return torch.where(last, penalty[:, None], 0.0)


def fold(values: Tensor, mask: Tensor, pieces: Tensor, take: Literal["sum", "first"]) -> Tensor:
    """Tokens to pieces, ``[B, L]`` to ``[B, L]``: piece ``p`` of a text stands in column ``p``, 0 beyond the last one.

    Args:
        pieces: int64 ``[B, L]``, the number of the piece that a sampled token belongs to: 0, 1, ... in each text.
        take: "sum" adds up a piece's tokens; "first" takes its first one (its value is that of the text before it).
    """
    on, zero = mask.bool(), torch.zeros_like(values)
    index = torch.where(on, pieces, torch.zeros_like(pieces))
    if take == "sum":
        return zero.scatter_add(1, index, torch.where(on, values, zero))
    before = torch.nn.functional.pad(
        torch.where(on, index, torch.full_like(index, -1)).cummax(1).values, (1, -1), value=-1
    )
    first = on & (index > before)
    return zero.scatter_add(1, index, torch.where(first, values, zero))


def unfold(values: Tensor, mask: Tensor, pieces: Tensor) -> Tensor:
    """Pieces back to tokens, ``[B, L]``: each sampled token gets what its piece has; 0 where the mask is off."""
    on = mask.bool()
    index = torch.where(on, pieces, torch.zeros_like(pieces))
    return torch.where(on, values.gather(1, index), torch.zeros_like(values))


def best_of_group(totals: Tensor, group: Tensor, keep: int) -> Tensor:
    """1 for the ``keep`` texts of each group with the highest totals, 0 for the others: ``[B]``.

    Equals at the edge share what is left of it, so that nothing hangs on their order.
    """
    higher = (totals[None, :] > totals[:, None]) & (group[None, :] == group[:, None])
    equal = (totals[None, :] == totals[:, None]) & (group[None, :] == group[:, None])
    left = (keep - higher.sum(1)).clamp(min=0).to(totals.dtype)
    return (left / equal.sum(1)).clamp(max=1.0)


def exponential_weights(advantages: Tensor, mask: Tensor, beta: float, most: float) -> Tensor:
    """``min(exp(A / beta), most)`` where the mask is on, ``[B, L]``.

    Peng et al. (2019), "Advantage-weighted regression", equation 9, with the bound that they use in practice.
    """
    _same_shape(advantages, mask)
    weights = (advantages / beta).clamp(max=math.log(most)).exp()
    return torch.where(mask.bool(), weights, torch.zeros_like(weights))


def _last_sampled(on: Tensor) -> Tensor:
    """For each position the index of the last sampled token at or before it, -1 where there is none: ``[B, L]``."""
    index = torch.arange(on.shape[1], device=on.device).expand_as(on)
    return torch.where(on, index, torch.full_like(index, -1)).cummax(1).values


def _same_shape(values: Tensor, mask: Tensor) -> None:
    shapes = f"values {tuple(values.shape)} and mask {tuple(mask.shape)} must both be [B, L]"
    assert values.shape == mask.shape == values.shape[:2], shapes
