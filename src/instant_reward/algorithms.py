"""The named choices of (credit, loss). None is a trainer: the loop is the same for all of them.

A preset is plain data, ``PRESETS``; a config may override its fields. What a preset would do to a reward that it cannot
take as it comes is said by ``check``, which raises and names the option that allows it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Literal

import torch
from torch import Tensor

from instant_reward import credit, losses
from instant_reward.batch import Batch
from instant_reward.config import AlgorithmConfig
from instant_reward.credit import Source
from instant_reward.rewards.base import Reward
from instant_reward.types import LossOutput, UserError

KL = "kl"


@dataclass(frozen=True)
class Preset:
    """One named choice.

    Attributes:
        returns: "to_go" keeps when each reward came; "whole" sums them over the text.
        baseline: "none", "leave_one_out" (siblings, at each position) or "group_mean" (the text itself included).
        scale: "none", or advantages divided by the deviation of the group's totals, or of the batch's advantages.
        loss: "policy_gradient" or "clipped".
        normalise: what the loss is averaged over.
    """

    returns: Literal["to_go", "whole"]
    baseline: Literal["none", "leave_one_out", "group_mean"]
    scale: Literal["none", "group", "batch"]
    loss: Literal["policy_gradient", "clipped"]
    normalise: Literal["text", "tokens", "constant"]


PRESETS = {
    "reinforce": Preset("to_go", "none", "none", "policy_gradient", "text"),
    "rloo": Preset("to_go", "leave_one_out", "none", "policy_gradient", "text"),
    "grpo": Preset("whole", "group_mean", "group", "clipped", "tokens"),
}


@dataclass(frozen=True)
class Algorithm:
    """Two pure functions: ``credit(batch)`` fills in advantages, ``loss(logprobs, batch)`` makes the loss of a part."""

    credit: Callable[[Batch], Batch]
    loss: Callable[[Tensor, Batch], LossOutput]
    sources: list[Source]


def build(config: AlgorithmConfig, rewards: Sequence[Reward], max_new_tokens: int) -> Algorithm:
    """The algorithm a config names, for these rewards.

    Raises:
        UserError: where the preset would lose a reward's timing or bias it, and no option allows that.
    """
    if config.kl_as == "loss":
        losses.refuse_kl_as_loss()
    preset = PRESETS[config.name]
    chosen = {key: getattr(config, key) for key in ("scale", "loss", "normalise") if getattr(config, key) is not None}
    preset = replace(preset, **chosen)
    learned = [one for one in rewards if one.train]
    check(config, preset, learned)
    sources = [Source(one.name, one.weight, _discount(config, one), one.at) for one in learned]
    loss: Callable[..., LossOutput] = losses.policy_gradient
    if preset.loss == "clipped":
        loss = partial(losses.clipped, low=config.clip_low, high=config.clip_high)
    return Algorithm(
        credit=partial(credit_batch, preset=preset, kl=config.kl),
        loss=partial(loss, normalise=preset.normalise, constant=float(max_new_tokens)),
        sources=sources,
    )


def check(config: AlgorithmConfig, preset: Preset, rewards: Sequence[Reward]) -> None:
    """Refuses rewards whose timing or discount would be lost silently, or whose placement biases the gradient.

    Raises:
        UserError: names the rewards and the option that allows it.
    """
    if preset.returns == "whole":
        if config.timing == "keep":
            _check_timing(config, rewards)
        return  # summed over the text, a reward counts the same wherever it is paid: that biases nothing
    spans = [f"'{one.name}'" for one in rewards if one.at == "span"]
    if spans and config.biased_placement == "refuse":
        raise UserError(
            f"rewards: {', '.join(spans)} paid at=span gets no credit for tokens outside its piece that it depends on, "
            "which biases the gradient; use at=seen, or allow it with algorithm.biased_placement=allow"
        )


def _check_timing(config: AlgorithmConfig, rewards: Sequence[Reward]) -> None:
    dense = [f"'{one.name}' (every {one.every})" for one in rewards if one.every != "end"]
    dense += [f"'{one.name}' (at=span)" for one in rewards if one.every == "end" and one.at == "span"]
    dense += [f"'{KL}' (every token)"] if config.kl else []
    if dense:
        raise UserError(
            f"algorithm.name: {config.name} sums rewards over the whole text, so the timing of {', '.join(dense)} "
            "would be lost; use rloo or reinforce, or allow it with algorithm.timing=ignore"
        )
    discounted = [f"'{one.name}'" for one in rewards if _discount(config, one) != 1.0]
    if discounted:
        raise UserError(
            f"algorithm.name: {config.name} sums rewards over the whole text, so the discount of "
            f"{', '.join(discounted)} would do nothing; use rloo or reinforce, set it to 1, or allow it with "
            "algorithm.timing=ignore"
        )


def _discount(config: AlgorithmConfig, one: Reward) -> float:
    return config.discount if one.discount is None else one.discount


def credit_batch(batch: Batch, preset: Preset, kl: float = 0.0) -> Batch:
    """Marks to rewards ``[B, K, L]`` to advantages ``[B, L]``; the reference KL joins as a source of its own.

    Args:
        kl: the weight of the log-ratio to the reference, paid at each token with discount 1.
    """
    sources = list(batch.sources)
    if preset.returns == "whole":  # each mark once, wherever it is paid: a discounted span would count more often
        sources = [replace(source, discount=1.0, at="seen") for source in sources]
    rewards = credit.place(batch.marks, sources, batch.mask)
    if kl:
        assert batch.ref_logprobs is not None, "annotate the batch first: the KL needs the reference's values"
        log_ratio = torch.where(batch.mask, batch.old_logprobs - batch.ref_logprobs, 0.0)
        rewards = torch.cat([rewards, -log_ratio[:, None].to(rewards.dtype)], 1)
        sources.append(Source(KL, weight=kl, discount=1.0))
    returns = torch.zeros_like(batch.old_logprobs, dtype=rewards.dtype)
    for index, source in enumerate(sources):
        if preset.returns == "whole":
            part = credit.whole_return(rewards[:, index], batch.mask)
        else:
            part = credit.reward_to_go(rewards[:, index], batch.mask, source.discount)
        returns = returns + source.weight * part
    advantages = _scaled(returns - _baseline(returns, batch, preset), rewards, sources, batch, preset)
    return replace(batch, rewards=rewards, sources=sources, returns=returns, advantages=advantages)


def _baseline(returns: Tensor, batch: Batch, preset: Preset) -> Tensor:
    if preset.baseline == "none":
        return torch.zeros_like(returns)
    others = credit.leave_one_out(returns, batch.mask, batch.group)
    if preset.baseline == "leave_one_out":
        return others
    # The mean with the text itself: it scales the leave-one-out advantage by (n - 1) / n.
    member = torch.unique(batch.group, return_inverse=True)[1]
    size = torch.bincount(member)[member].to(returns.dtype)[:, None]
    return torch.where(batch.mask, returns + (others - returns) * (size - 1) / size, 0.0)


def _scaled(advantages: Tensor, rewards: Tensor, sources: Sequence[Source], batch: Batch, preset: Preset) -> Tensor:
    if preset.scale == "none":
        return advantages
    if preset.scale == "batch":
        return credit.scale_by_deviation(advantages, batch.mask)
    weights = torch.tensor([source.weight for source in sources], dtype=rewards.dtype)
    marks, dense = batch.marks, slice(len(batch.sources), None)
    totals = torch.einsum("bkl,k->b", rewards[:, dense], weights[dense])
    totals = totals.index_add(0, marks.row, weights[marks.source] * marks.value)
    # Rewards near 1 that differ by rounding alone are equals: the constant keeps them at 0 (it is TRL's and verl's).
    return advantages / (credit.group_deviation(totals, batch.group)[:, None] + 1e-4)
