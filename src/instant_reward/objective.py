"""The loss of a preset: the policy's, the critic's and the regularisers, each averaged over the whole batch."""

from __future__ import annotations

import torch
from torch import Tensor

from instant_reward import losses
from instant_reward.batch import Batch
from instant_reward.carried import entropy_weight, kl_weight
from instant_reward.config_algorithm import AlgorithmConfig
from instant_reward.presets import Preset
from instant_reward.types import LossOutput, PolicyOutput

KL_LOSSES = {"k2": losses.squared_log_ratio, "k3": losses.bounded_log_ratio}


def objective(
    output: PolicyOutput, batch: Batch, preset: Preset, config: AlgorithmConfig, constant: float = 1.0
) -> LossOutput:
    """The loss of a part of a batch, with the metrics that add up over the parts.

    Args:
        output: what the policy says of the part.
        batch: the part, credited.
        constant: the length that ``normalise: constant`` divides by.
    """
    terms: list[Tensor] = []
    metrics: dict[str, float] = {}
    if preset.critic:
        critic = _critic(output, batch, preset, config)
        terms.append(critic.loss)
        metrics |= critic.metrics
    if preset.loss != "none" and batch.carried.step >= (config.critic.warmup if preset.critic else 0):
        policy = _policy(output, batch, preset, constant)
        terms += [policy.loss, *_regularisers(output, batch, config)]
        metrics |= policy.metrics
    return LossOutput(torch.stack(terms).sum(), metrics)


def _policy(output: PolicyOutput, batch: Batch, preset: Preset, constant: float) -> LossOutput:
    bounds = {"low": preset.clip_low, "high": preset.clip_high}
    if preset.loss == "all_actions":
        assert output.expected is not None, "the policy was not asked for the sum over next tokens"
        return losses.all_actions(output.expected, batch, preset.normalise, constant)
    if preset.loss == "doubly_robust":
        assert output.expected is not None, "the policy was not asked for the sum over actions"
        assert output.chosen is not None, "the policy was not asked for Q"
        return losses.doubly_robust(
            output.logprobs, output.expected, output.chosen[:, 0], batch, preset.normalise, constant
        )
    if preset.loss == "clipped":
        decoupled = preset.ratio == "decoupled"
        ratio: losses.Ratio = "token" if preset.ratio == "decoupled" else preset.ratio
        return losses.clipped(
            output.logprobs,
            batch,
            **bounds,
            normalise=preset.normalise,
            constant=constant,
            ratio=ratio,
            proximal=decoupled,
        )
    if preset.loss == "cispo":
        return losses.cispo(output.logprobs, batch, **bounds, normalise=preset.normalise, constant=constant)
    if preset.loss == "likelihood":
        return losses.likelihood(output.logprobs, batch, preset.normalise, constant)
    if preset.loss == "ilql":  # beside the critic, the texts are imitated: guided decoding starts from that
        return LossOutput(-losses.average(output.logprobs, batch, preset.normalise, constant))
    return losses.policy_gradient(output.logprobs, batch, preset.normalise, constant)


def _critic(output: PolicyOutput, batch: Batch, preset: Preset, config: AlgorithmConfig) -> LossOutput:
    if preset.returns in ("gae", "vtrace") or preset.baseline == "value":
        assert output.values is not None, "the policy was not asked for values"
        found = losses.value(output.values, batch, config.critic.clip)
    elif preset.returns == "q":
        assert output.chosen is not None, "the policy was not asked for Q"
        found = losses.chosen_value(output.chosen, batch)
    else:
        assert output.chosen is not None, "the policy was not asked for Q"
        assert output.values is not None, "the policy was not asked for V"
        assert output.spread is not None, "the policy was not asked for the spread of Q"
        found = losses.implicit_q(output.chosen, output.values, output.spread, batch, config.expectile, config.cql)
    loss = config.critic.weight * found.loss
    return LossOutput(loss, {"critic_loss": float(found.loss.detach()), **found.metrics})


def _regularisers(output: PolicyOutput, batch: Batch, config: AlgorithmConfig) -> list[Tensor]:
    terms: list[Tensor] = []
    if config.kl and config.kl_as == "loss":
        terms.append(kl_weight(batch.carried, config) * KL_LOSSES[config.kl_estimator](output.logprobs, batch).loss)
    if config.entropy and config.entropy_as == "loss":
        assert output.entropy is not None, "the policy was not asked for the entropy"
        terms.append(-entropy_weight(batch.carried, config) * losses.average(output.entropy, batch, "tokens"))
    if config.teacher and config.teacher.whole:
        assert output.divergence is not None, "the policy was not asked for the KL to the teacher"
        terms.append(config.teacher.weight * losses.average(output.divergence, batch, "tokens"))
    return terms
