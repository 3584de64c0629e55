"""What an algorithm carries from step to step: weights that follow a target, and the running mean of the returns."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from instant_reward.batch import Batch
from instant_reward.config_algorithm import AlgorithmConfig
from instant_reward.types import Carried
from instant_reward.weights import followed

DECAY = 0.9  # of the running mean: it remembers about ten steps
LARGEST = 0.2  # the relative error that a coefficient reacts to, Ziegler et al. (2019), section 2.2


def adapt(batch: Batch, metrics: Mapping[str, float], config: AlgorithmConfig, warming: int = 0) -> Carried:
    """What the next step begins with.

    Args:
        batch: the step's, credited.
        warming: in so many steps at first the critic learns alone; the KL, the entropy and what constraints look at do
            not follow what is done about them yet, so their weights stay.
        metrics: the step's, with ``kl`` and ``entropy`` in nats per token where there are such targets.
    """
    before = batch.carried
    kl, entropy = before.kl, before.entropy
    learns = before.step >= warming
    if config.kl_target is not None and learns:
        kl = _followed(
            kl_weight(before, config), metrics["kl"] / config.kl_target - 1.0, len(batch) / config.kl_horizon
        )
    if config.entropy_target is not None and learns:
        entropy = _followed(
            entropy_weight(before, config), 1.0 - metrics["entropy"] / config.entropy_target, 0.1 / LARGEST
        )
    assert batch.returns is not None, "credit the batch first: it has no returns"
    on = batch.mask.bool()
    mean = float(batch.returns[on].mean()) if bool(on.any()) else 0.0
    weight = DECAY * before.mean_weight + (1.0 - DECAY)
    mean_return = before.mean_return + (1.0 - DECAY) / weight * (mean - before.mean_return)
    return replace(
        before,
        step=before.step + 1,
        kl=kl,
        entropy=entropy,
        mean_return=mean_return,
        mean_weight=weight,
        **followed(batch, metrics, (1.0 - DECAY) / weight, learns),
    )


def kl_weight(carried: Carried, config: AlgorithmConfig) -> float:
    """The weight of the KL as it is now."""
    return config.kl if carried.kl is None else carried.kl


def entropy_weight(carried: Carried, config: AlgorithmConfig) -> float:
    """The weight of the entropy as it is now."""
    return config.entropy if carried.entropy is None else carried.entropy


def _followed(weight: float, error: float, rate: float) -> float:
    """Ziegler et al. (2019), section 2.2: the weight grows by ``rate`` times the relative error, bounded."""
    return weight * (1.0 + min(max(error, -LARGEST), LARGEST) * min(rate, 1.0))
