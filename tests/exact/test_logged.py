"""Learning from logged decisions: which estimates of the gradient are exact, and which only seem to be."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

import instant_reward as ir
from deciding import LABELS, tiny_classifier
from exact.test_decisions import TEXTS, gradient, same, written
from exact.world import chance
from instant_reward import algorithms
from instant_reward.batch import Batch, collate
from instant_reward.config import AlgorithmConfig
from instant_reward.policies.classifier import ClassifierPolicy
from instant_reward.policies.optimizer import Optimization
from instant_reward.rewards.base import as_rewards

EARNED = ir.reward(every="end", name="earned")(lambda view: chance(view.text) + 1.0)
CHANCES = torch.tensor([0.7, 0.2, 0.1], dtype=torch.float64)  # of the policy that made the log
WRONG = torch.tensor([0.3, 0.3, 0.4], dtype=torch.float64)
EXACT: dict[str, dict[str, Any]] = {
    "inverse propensity": {"name": "reinforce", "importance": {"level": "sequence", "most": None}},
    "by decision": {"name": "reinforce", "importance": {"level": "decision", "most": None}},
}
DOUBLY: dict[str, Any] = {"name": "doubly_robust", "critic": {"model": "head"}}


class Log:
    """Every label as a logged decision, with the chance that the log says; ``expected`` weighs them by the true one."""

    def __init__(self, config: dict[str, Any], said: Tensor = CHANCES, worth: Tensor | None = None) -> None:
        self.policy = tiny_classifier()
        self.algorithm = algorithms.build(AlgorithmConfig(**config), as_rewards([EARNED]), 1)
        self.policy.prepare(Optimization(), self.algorithm.needs)
        prompt = self.policy.prompts(TEXTS, "prompt", 1)[0]
        texts = [written(self.policy, prompt, [label], [EARNED]) for label in range(len(LABELS))]
        self.earned = torch.tensor([text.total() for text in texts], dtype=torch.float64)
        if self.policy.critic is not None:
            self.policy.critic.begun.fill_(True)
            with torch.no_grad():
                self.policy.critic.tables.all()[0].bias.copy_(self.earned if worth is None else worth)
        batch = collate(texts, self.algorithm.sources, dtype=torch.float64)
        self.batch = replace(batch, old_logprobs=said.log()[:, None])

    def exact(self) -> Tensor:
        """The gradient of what the policy earns on average."""
        logs = learning(self.policy, self.batch).sum(1)
        (logs.exp() * self.earned).sum().backward()
        return gradient(self.policy)

    def expected(self) -> Tensor:
        """The step, on average over what the log may hold."""
        batch = self.algorithm.credit(self.policy.annotate(self.batch))
        total = torch.zeros_like(self.exact())
        for label in range(len(LABELS)):
            one = replace(batch.select([label]), text_count=1, token_count=1)
            self.algorithm.loss(self.policy(one), one).loss.backward()
            total -= CHANCES[label] * gradient(self.policy)
        return total


def learning(policy: ClassifierPolicy, batch: Batch) -> Tensor:
    return policy.token_logprobs(policy.head(policy.model, batch), batch).logprobs


@pytest.mark.parametrize("name", EXACT)
def test_inverse_propensities_are_exact(name: str) -> None:
    log = Log(EXACT[name])
    assert same(log.expected(), log.exact())


@pytest.mark.parametrize(
    "config",
    [
        {"name": "reinforce"},
        {"name": "reinforce", "importance": {"level": "sequence", "most": 1.5}},
    ],
    ids=["without weights", "weights cut off"],
)
def test_what_leaves_the_weights_out_is_biased(config: dict[str, Any]) -> None:
    log = Log(config)
    assert not same(log.expected(), log.exact(), within=1e-3)


def test_wrong_propensities_bias_the_weights() -> None:
    log = Log(EXACT["inverse propensity"], said=WRONG)
    assert not same(log.expected(), log.exact(), within=1e-3)


@pytest.mark.parametrize(
    ("said", "worth", "exact"),
    [
        (CHANCES, None, True),
        (CHANCES, torch.tensor([0.3, -2.0, 1.0], dtype=torch.float64), True),
        (WRONG, None, True),
        (WRONG, torch.tensor([0.3, -2.0, 1.0], dtype=torch.float64), False),
    ],
    ids=["both right", "propensities right", "values right", "both wrong"],
)
def test_doubly_robust_needs_one_of_both(said: Tensor, worth: Tensor | None, exact: bool) -> None:
    log = Log(DOUBLY, said, worth)
    assert same(log.expected(), log.exact(), within=1e-10 if exact else 1e-3) == exact


def test_with_the_true_values_doubly_robust_has_no_noise() -> None:
    log = Log(DOUBLY)
    batch = log.algorithm.credit(log.policy.annotate(log.batch))
    exact = log.exact()
    for label in range(len(LABELS)):
        one = replace(batch.select([label]), text_count=1, token_count=1)
        log.algorithm.loss(log.policy(one), one).loss.backward()
        assert same(-gradient(log.policy), exact)


def test_self_normalised_weights_are_the_gradient_of_that_estimate() -> None:
    """Against autograd through ``sum of w * r / sum of w`` of one log; plain weights take another step on it."""
    config = {"name": "reinforce", "importance": {"level": "sequence", "most": None, "self_normalised": True}}
    steps = {}
    for own in (True, False):
        config["importance"]["self_normalised"] = own  # type: ignore[index]
        log = Log(config)
        batch = log.algorithm.credit(log.policy.annotate(log.batch))
        log.algorithm.loss(log.policy(batch), batch).loss.backward()
        steps[own] = -gradient(log.policy)
    weights = (learning(log.policy, log.batch) - log.batch.old_logprobs).exp()[:, 0]
    ((weights * log.earned).sum() / weights.sum()).backward()
    exact = gradient(log.policy)
    assert same(steps[True], exact)
    assert not same(steps[False], exact, within=1e-3)
