"""From marks to advantages: how the pure parts of ``credit`` and ``importance`` are put together for a preset."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from instant_reward import credit, importance
from instant_reward.batch import Batch
from instant_reward.carried import entropy_weight, kl_weight
from instant_reward.config_algorithm import AlgorithmConfig, ErrorConfig
from instant_reward.credit import Source
from instant_reward.presets import Preset
from instant_reward.types import UserError
from instant_reward.weights import as_they_are, planned

KL, ENTROPY, TEACHER, LENGTH = "kl", "entropy", "teacher", "length"
PLAIN = AlgorithmConfig()


def credit_batch(batch: Batch, preset: Preset, config: AlgorithmConfig = PLAIN, longest: int = 0) -> Batch:
    """Marks to rewards ``[B, K, L]`` to advantages ``[B, L]``, and targets ``[B, K, L]`` where there is a critic.

    The KL to the reference, the teacher's log-ratio and the soft length penalty are sources of their own, paid at each
    token; the policy's part of a log-ratio is the sampler's, unless the policy was asked for its own.

    Args:
        longest: ``sampling.max_new_tokens``, which the soft length penalty ends at.
    """
    batch = _clipped(batch)
    sources = [_adapted(source, batch, config) for source in as_they_are(batch.sources, batch)]
    batch = replace(batch, sources=sources)
    rewards = _rewards(batch, preset, config, longest)
    batch = replace(batch, rewards=rewards)
    if preset.loss == "likelihood":
        targets = target_weights(batch, config)
        return replace(batch, advantages=targets, returns=targets)
    log_ratio = _log_ratio(batch)
    weights = None
    if config.importance is not None and config.importance.level == "decision":
        so_far = _so_far(log_ratio, batch, config.importance.most).to(rewards.dtype)
        advantages, batch = _advantages(replace(batch, rewards=rewards * so_far[:, None]), preset, config, so_far)
        if preset.baseline == "value":  # the critic learns the rewards as they are
            batch = replace(batch, targets=_advantages(replace(batch, rewards=rewards), preset, config)[1].targets)
    else:
        advantages, batch = _advantages(batch, preset, config)
        if config.importance is not None:
            chosen = config.importance
            assert chosen.level != "decision", "handled above"
            weights = importance.weights(log_ratio, batch.mask, chosen.level, batch.pieces, chosen.most, chosen.beyond)
            if chosen.self_normalised:
                weights, level = importance.self_normalised(weights, _totals(batch), batch.mask)
                advantages = torch.where(batch.mask, advantages - level, torch.zeros_like(advantages))
    totals = _totals(batch)
    advantages = _scaled(advantages, totals, batch, preset)
    if preset.weigh == "exponential":
        advantages = credit.exponential_weights(advantages, batch.mask, config.beta, config.most_weight)
    elif preset.weigh == "best":
        best = credit.best_of_group(totals, batch.group, config.keep)
        advantages = best[:, None] * batch.mask.to(advantages.dtype)
    return replace(batch, rewards=rewards, advantages=advantages, weights=weights)


def target_weights(batch: Batch, config: AlgorithmConfig) -> Tensor:
    """What each target token's likelihood weighs, ``[B, L]``: the weighted sum of the rewards on it, times its error.

    A token that no reward rates weighs ``config.unrated``, and 1 where there is no reward at all.

    Args:
        batch: with ``rewards [B, K, L]``, each on the tokens that it rates; with ``by_error``, also the policy's own
            log-probabilities as the step began.

    Raises:
        UserError: where a weight is negative: such a likelihood has no bound.
    """
    assert batch.rewards is not None, "place the rewards first"
    weights = torch.ones_like(batch.old_logprobs)
    if batch.sources:
        on_each = [replace(source, discount=0.0, at="span") for source in batch.sources]
        ones = replace(batch.marks, value=torch.ones_like(batch.marks.value))
        rated = credit.place(ones, on_each, batch.mask).any(1)
        each = torch.tensor([source.weight for source in batch.sources], dtype=batch.rewards.dtype)
        weights = torch.where(rated, torch.einsum("bkl,k->bl", batch.rewards, each), config.unrated).to(weights)
    lowest = float(weights[batch.mask].min())
    if lowest < 0:
        raise UserError(
            f"rewards: a target token would weigh {lowest:.3g}, and a likelihood with a negative weight has no bound; "
            "let the rewards add up to 0 or more, for instance by mapping them to 0 and 1"
        )
    if config.by_error is not None:
        weights = weights * _by_error(batch, config.by_error).to(weights)
    return torch.where(batch.mask, weights, torch.zeros_like(weights))


def _by_error(batch: Batch, chosen: ErrorConfig) -> Tensor:
    assert batch.proximal_logprobs is not None, "annotate the batch first: the policy's own values are missing"
    chance = batch.proximal_logprobs.double().exp().clamp(max=1.0)
    base = 1.0 - chance if chosen.first == "harder" else chance
    weights = torch.where(batch.mask, base ** planned(chosen.strength, batch.carried), 0.0)
    total = float(weights.sum())
    return weights * (batch.token_count / total) if chosen.normalised and total > 0 else weights


def _clipped(batch: Batch) -> Batch:
    """The marks within their sources' bounds."""
    if all(source.clip is None for source in batch.sources):
        return batch
    bounds = [math.inf if source.clip is None else source.clip for source in batch.sources]
    most = torch.tensor(bounds, dtype=batch.marks.value.dtype)[batch.marks.source]
    return replace(batch, marks=replace(batch.marks, value=batch.marks.value.clamp(-most, most)))


def _adapted(source: Source, batch: Batch, config: AlgorithmConfig) -> Source:
    if source.dense == ENTROPY:
        return replace(source, weight=entropy_weight(batch.carried, config))
    return replace(source, weight=kl_weight(batch.carried, config)) if source.dense == KL and config.kl else source


def _rewards(batch: Batch, preset: Preset, config: AlgorithmConfig, longest: int) -> Tensor:
    rewards = credit.place(batch.marks, _placements(batch.sources, preset), batch.mask)
    for index, source in enumerate(batch.sources):
        if source.dense == KL:
            assert batch.ref_logprobs is not None, "annotate the batch first: the KL needs the reference's values"
            rewards[:, index] = _log_ratio_to(batch.ref_logprobs, batch, rewards.dtype)
        elif source.dense == ENTROPY:
            rewards[:, index] = _log_ratio_to(torch.zeros_like(batch.old_logprobs), batch, rewards.dtype)
        elif source.dense == TEACHER:
            assert batch.teacher_logprobs is not None, "annotate the batch first: the teacher's values are missing"
            rewards[:, index] = _log_ratio_to(batch.teacher_logprobs, batch, rewards.dtype)
            if batch.teacher_baseline is not None:
                rewards[:, index] -= batch.teacher_baseline.to(rewards.dtype)
        elif source.dense == LENGTH and config.soft_length:
            rewards[:, index] = credit.over_length(batch.mask, longest, config.soft_length).to(rewards.dtype)
    return rewards


def _log_ratio_to(other: Tensor, batch: Batch, dtype: torch.dtype) -> Tensor:
    """``log other - log p`` of the sampled tokens, ``[B, L]``; where the policy's own is known, not the sampler's."""
    own = batch.old_logprobs if batch.proximal_logprobs is None else batch.proximal_logprobs
    return torch.where(batch.mask, other - own, 0.0).to(dtype)


def _placements(sources: Sequence[Source], preset: Preset) -> list[Source]:
    if preset.returns == "whole":  # each mark once, wherever it is paid: a discounted span would count more often
        return [replace(source, discount=1.0, at="seen") for source in sources]
    if preset.returns == "own":
        return [replace(source, discount=0.0, at="span") for source in sources]
    return list(sources)


def _advantages(
    batch: Batch, preset: Preset, config: AlgorithmConfig, so_far: Tensor | None = None
) -> tuple[Tensor, Batch]:
    """Advantages ``[B, L]`` before scaling, and the batch with returns and the critic's targets.

    Where pieces are the actions, everything is folded to pieces first and unfolded in the end.

    Args:
        so_far: ``[B, L]``, each text's ratio so far, which a baseline is weighed by where the rewards are.
    """
    if config.pieces is None:
        return _per_action(batch, preset, config, so_far)
    assert batch.pieces is not None, "pieces are the actions, and the batch has none: collate with pieces"
    assert batch.rewards is not None, "place the rewards first"
    on, pieces = batch.mask, batch.pieces
    folded = replace(
        batch,
        mask=credit.fold(on.double(), on, pieces, "sum") > 0,
        rewards=torch.stack([credit.fold(one, on, pieces, "sum") for one in batch.rewards.unbind(1)], 1),
        values=None
        if batch.values is None
        else torch.stack([credit.fold(one, on, pieces, "first") for one in batch.values.unbind(1)], 1),
        old_logprobs=credit.fold(batch.old_logprobs, on, pieces, "sum"),
        proximal_logprobs=None
        if batch.proximal_logprobs is None
        else credit.fold(batch.proximal_logprobs, on, pieces, "sum"),
    )
    folded_so_far = None if so_far is None else credit.fold(so_far, on, pieces, "first")
    advantages, folded = _per_action(folded, preset, config, folded_so_far)
    assert folded.returns is not None, "credited above"
    targets = batch.targets
    if folded.targets is not None:  # every token of a piece learns what the text before the piece was worth
        targets = torch.stack([credit.unfold(one, on, pieces) for one in folded.targets.unbind(1)], 1)
    returns = credit.unfold(folded.returns, on, pieces)
    return credit.unfold(advantages, on, pieces), replace(batch, returns=returns, targets=targets)


def _per_action(batch: Batch, preset: Preset, config: AlgorithmConfig, so_far: Tensor | None) -> tuple[Tensor, Batch]:
    if preset.returns in ("gae", "vtrace"):
        return _looking_ahead(batch, preset, config)
    if preset.returns in ("q", "bellman"):
        return _of_next_tokens(batch, preset, config)
    assert batch.rewards is not None, "place the rewards first"
    returns = torch.zeros(batch.mask.shape, dtype=batch.rewards.dtype)
    for index, source in enumerate(batch.sources):
        one = batch.rewards[:, index]
        if preset.returns == "whole":
            part = credit.whole_return(one, batch.mask)
        else:
            discount = 0.0 if preset.returns == "own" and not source.dense else source.discount
            part = credit.reward_to_go(one, batch.mask, discount)
        returns = returns + source.weight * part
    baseline, batch = _baseline(returns, batch, preset, config)
    if so_far is not None:
        baseline = baseline * so_far.to(baseline.dtype)
    return returns - baseline, replace(batch, returns=returns)


def _looking_ahead(batch: Batch, preset: Preset, config: AlgorithmConfig) -> tuple[Tensor, Batch]:
    """GAE or V-trace for each source with its own discount, weighed and summed; the critic has its own lambda."""
    assert batch.rewards is not None, "place the rewards first"
    assert batch.values is not None, "annotate the batch first: the values are missing"
    lam: float | Tensor = config.lam
    if config.lam_length is not None:
        lam = credit.length_lambda(batch.mask, config.lam_length).to(batch.rewards.dtype)
    ratio = _log_ratio(batch) if preset.returns == "vtrace" else torch.zeros_like(batch.rewards[:, 0])
    advantages, returns = torch.zeros_like(ratio), torch.zeros_like(ratio)
    targets = torch.zeros_like(batch.rewards)
    for index, source in enumerate(batch.sources):
        given = (batch.rewards[:, index], batch.values[:, index].to(ratio.dtype), ratio, batch.mask, source.discount)
        beyond = _beyond(batch, index, config)
        advantages = advantages + source.weight * credit.vtrace(*given, lam, bootstrap=beyond)[0]
        targets[:, index] = credit.vtrace(*given, config.critic.lam, bootstrap=beyond)[1]
        returns = returns + source.weight * targets[:, index]
    returns = torch.where(batch.mask, returns, torch.zeros_like(returns))
    return advantages, replace(batch, returns=returns, targets=targets)


def _of_next_tokens(batch: Batch, preset: Preset, config: AlgorithmConfig) -> tuple[Tensor, Batch]:
    """The targets of a critic of next tokens, for the weighted sum of all sources, which share one discount."""
    assert batch.rewards is not None, "place the rewards first"
    assert batch.values is not None, "annotate the batch first: the values are missing"
    weights = torch.tensor([source.weight for source in batch.sources], dtype=batch.rewards.dtype)
    total = torch.einsum("bkl,k->bl", batch.rewards, weights)
    discount = batch.sources[0].discount if batch.sources else 1.0
    beyond = None
    if config.critic.bootstrap and batch.bootstrap is not None and not any(one.final for one in batch.sources):
        beyond = batch.bootstrap[:, 0]
    lam = 0.0 if preset.returns == "bellman" else config.critic.lam
    values = batch.values[:, 0].to(total.dtype)
    targets = credit.gae(total, values, batch.mask, discount, lam, beyond)[1]
    returns = torch.where(batch.mask, targets, torch.zeros_like(targets))
    return torch.where(batch.mask, targets - values, 0.0), replace(batch, returns=returns, targets=targets[:, None])


def _beyond(batch: Batch, index: int, config: AlgorithmConfig) -> Tensor | None:
    """What is expected after the end of a text that was cut off: nothing more where the whole was paid."""
    if batch.bootstrap is None or not config.critic.bootstrap or batch.sources[index].final:
        return None
    return batch.bootstrap[:, index]


def _baseline(returns: Tensor, batch: Batch, preset: Preset, config: AlgorithmConfig) -> tuple[Tensor, Batch]:
    """The baseline ``[B, L]``, and the batch with targets where the baseline is learned."""
    on, zero = batch.mask, torch.zeros_like(returns)
    if preset.baseline == "none":
        return zero, batch
    if preset.baseline == "running_mean":  # of earlier steps alone, so it cannot depend on these texts
        return torch.where(on, torch.full_like(returns, batch.carried.mean_return), zero), batch
    if preset.baseline == "batch_mean":
        return torch.where(on, returns.sum() / max(1, int(on.sum())), zero), batch
    if preset.baseline == "value":
        return _learned_baseline(batch, config)
    others = _of_siblings(returns, batch, preset)
    if preset.baseline == "leave_one_out":
        return others, batch
    # The mean with the text itself: it scales the leave-one-out advantage by (n - 1) / n.
    member = torch.unique(batch.group, return_inverse=True)[1]
    size = torch.bincount(member)[member].to(returns.dtype)[:, None]
    return torch.where(on, returns + (others - returns) * (size - 1) / size, zero), batch


def _of_siblings(returns: Tensor, batch: Batch, preset: Preset) -> Tensor:
    """The siblings' mean return, ``[B, L]``: at the same position; of whole texts, which have no position, of all."""
    if preset.returns != "whole":
        return credit.leave_one_out(returns, batch.mask, batch.group)
    first = batch.mask & (batch.mask.long().cumsum(1) == 1)
    of_text = torch.where(first, returns, torch.zeros_like(returns)).sum(1, keepdim=True)
    others = credit.leave_one_out(of_text, torch.ones_like(of_text), batch.group)
    return torch.where(batch.mask, others.expand_as(returns), torch.zeros_like(returns))


def _learned_baseline(batch: Batch, config: AlgorithmConfig) -> tuple[Tensor, Batch]:
    assert batch.rewards is not None, "place the rewards first"
    assert batch.values is not None, "annotate the batch first: the values are missing"
    weights = torch.tensor([source.weight for source in batch.sources], dtype=batch.rewards.dtype)
    baseline = torch.einsum("bkl,k->bl", batch.values.to(weights.dtype), weights)
    targets = [
        credit.gae(
            batch.rewards[:, index],
            batch.values[:, index].to(weights.dtype),
            batch.mask,
            source.discount,
            config.critic.lam,
        )[1]
        for index, source in enumerate(batch.sources)
    ]
    return torch.where(batch.mask, baseline, torch.zeros_like(baseline)), replace(
        batch, targets=torch.stack(targets, 1)
    )


def _so_far(log_ratio: Tensor, batch: Batch, most: float | None) -> Tensor:
    """Each text's ratio up to and with token t, ``[B, L]``; where pieces are the actions, up to the end of t's piece.

    A piece is credited as one: each of its tokens gets all that the piece is paid, earlier payments in it included.
    """
    if batch.pieces is None:
        return importance.cumulative(log_ratio, batch.mask, most)
    on = credit.fold(batch.mask.double(), batch.mask, batch.pieces, "sum") > 0
    folded = importance.cumulative(credit.fold(log_ratio, batch.mask, batch.pieces, "sum"), on, most)
    return credit.unfold(folded, batch.mask, batch.pieces)


def _log_ratio(batch: Batch) -> Tensor:
    """The policy's log-probability as the step began, less the sampler's, ``[B, L]``; 0 where nobody asked for it."""
    if batch.proximal_logprobs is None:
        return torch.zeros_like(batch.old_logprobs)
    return torch.where(batch.mask, batch.proximal_logprobs - batch.old_logprobs, torch.zeros_like(batch.old_logprobs))


def _totals(batch: Batch) -> Tensor:
    """What each text earned in all, weighed, each mark once, wherever it is paid: ``[B]``."""
    assert batch.rewards is not None, "place the rewards first"
    weights = torch.tensor([source.weight for source in batch.sources], dtype=batch.rewards.dtype)
    own = torch.tensor([bool(source.dense) for source in batch.sources], dtype=torch.bool)
    totals = torch.einsum("bkl,k->b", batch.rewards[:, own], weights[own])
    weights = weights * torch.tensor([source.earned for source in batch.sources], dtype=weights.dtype)
    return totals.index_add(0, batch.marks.row, weights[batch.marks.source] * batch.marks.value)


def _scaled(advantages: Tensor, totals: Tensor, batch: Batch, preset: Preset) -> Tensor:
    if preset.scale == "none":
        return advantages
    if preset.scale == "group":
        # Rewards near 1 that differ by rounding alone are equals: the constant keeps them at 0 (TRL's and verl's).
        deviation = credit.group_deviation(totals, batch.group)[:, None]
        if preset.returns == "whole" and preset.baseline in ("group_mean", "leave_one_out"):
            return advantages / (deviation + 1e-4)
        # Of equal totals other advantages need not be 0: they stay as they are.
        return torch.where(deviation > 1e-4, advantages / deviation.clamp(min=1e-4), advantages)
    return credit.scale_by_deviation(advantages, batch.mask, shift=preset.scale == "whiten")
