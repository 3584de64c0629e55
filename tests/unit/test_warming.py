"""A critic that learns alone at first: what its error and the regularisers move meanwhile, and from then on."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import instant_reward as ir
from exact import models
from exact.world import chance
from instant_reward import algorithms
from instant_reward.batch import collate
from instant_reward.config import AlgorithmConfig
from instant_reward.policies.optimizer import Optimization
from instant_reward.sampling.draw import Settings
from instant_reward.types import Carried

WORDS = ir.reward(every="word", name="words")(lambda view: chance(view.text))
WARMUP = 3


def reached(step: int, **options: Any) -> tuple[set[str], dict[str, float]]:
    """Whose weights the loss of a run's step moves, and its metrics."""
    algorithm = algorithms.build(AlgorithmConfig(**options), [WORDS], 5)
    policy = models.policy()
    texts = models.sample(policy, models.prompts(3, 5), Settings(max_new_tokens=5), 2, [WORDS])
    policy.prepare(Optimization(), algorithm.needs)
    with torch.no_grad():
        policy.critic.begun.fill_(True)
        for index, parameter in enumerate([*policy.model.parameters(), *policy.critic.parameters()]):
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(index)).double())
    batch = collate(texts, algorithm.sources, policy.pad_id, dtype=torch.float64)
    batch.carried = Carried(step=step)  # so many were taken before it
    batch = algorithm.credit(policy.annotate(batch))
    loss = algorithm.loss(policy(batch), batch)
    policy.backward(loss.loss)
    parts = {"policy": policy.model.parameters(), "critic": policy.critic.parameters()}
    moved = {name for name, weights in parts.items() if any(one.grad is not None and one.grad.any() for one in weights)}
    return moved, loss.metrics


@pytest.mark.parametrize("name", ["a2c", "ppo", "qac", "awr"])
@pytest.mark.parametrize("model", ["copy", "attached"])
def test_while_it_warms_up_nothing_moves_the_policy(name: str, model: str) -> None:
    """No policy loss, no entropy bonus, no KL, and no gradient of an attached head's error into the policy's trunk."""
    head: dict[str, Any] = {"model": "head", "detach": False} if model == "attached" else {"model": "copy"}
    options: dict[str, Any] = {"name": name, "kl": 0.1, "kl_as": "loss", "kl_estimator": "k2", "entropy": 0.1}
    for step in range(WARMUP):
        moved, metrics = reached(step, critic={**head, "warmup": WARMUP}, **options)
        assert moved == {"critic"}
        assert metrics["critic_loss"] > 0.0
    assert reached(WARMUP, critic={**head, "warmup": WARMUP}, **options)[0] == {"critic", "policy"}
    assert reached(0, critic=head, **options)[0] == {"critic", "policy"}, "without a warm-up from the first step on"


def test_an_attached_heads_error_moves_the_trunk_afterwards() -> None:
    """What was held back while it warmed up is the critic's own error: of a detached head it never comes."""
    for detach, wanted in ((False, {"critic", "policy"}), (True, {"critic"})):
        critic = {"model": "head", "detach": detach, "warmup": WARMUP}
        algorithm = algorithms.build(AlgorithmConfig(name="a2c", critic=critic), [WORDS], 5)
        policy = models.policy()
        texts = models.sample(policy, models.prompts(3), Settings(max_new_tokens=5), 2, [WORDS])
        policy.prepare(Optimization(), algorithm.needs)
        with torch.no_grad():
            policy.critic.value.weight.fill_(0.3)
        for step, found in ((WARMUP - 1, {"critic"}), (WARMUP, wanted)):
            batch = collate(texts, algorithm.sources, policy.pad_id, dtype=torch.float64)
            batch.carried = Carried(step=step)
            policy.model.zero_grad()
            policy.backward((policy(batch).values ** 2).sum())
            trunk = any(one.grad is not None and one.grad.any() for one in policy.model.parameters())
            assert {"critic", *(["policy"] if trunk else [])} == found, (detach, step)
