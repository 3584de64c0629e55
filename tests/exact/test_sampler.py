"""The sampler's log-probabilities are the trainer's: one over a cache, token by token, the other in one pass."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from exact import models
from instant_reward import losses
from instant_reward.batch import Batch, collate
from instant_reward.policies.causal import CausalPolicy
from instant_reward.sampling.draw import Settings

torch.set_num_threads(1)
FORBIDDEN = Settings(max_new_tokens=14, min_new_tokens=5, temperature=0.7, rows=5)
HOT = Settings(max_new_tokens=14, temperature=1.6)
PLAIN = Settings(max_new_tokens=14)
TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-4}


def sampled(policy: CausalPolicy, settings: Settings, dtype: torch.dtype) -> Batch:
    """Groups of four, prompts of 2 to 30 tokens, more texts than rows: texts take each other's place."""
    rollouts = models.sample(policy, models.prompts(3, 30, 2, 11), settings, per_prompt=4)
    batch = collate(rollouts, pad_id=policy.pad_id, dtype=dtype)
    return replace(batch, advantages=torch.zeros_like(batch.old_logprobs))


def gap(policy: CausalPolicy, batch: Batch) -> float:
    """The largest distance between the trainer's and the sampler's log-probabilities."""
    with torch.no_grad():
        distance = (policy(batch).logprobs - batch.old_logprobs).abs()
    return float(torch.where(batch.mask, distance, 0.0).max())


@pytest.mark.parametrize("settings", [PLAIN, HOT, FORBIDDEN], ids=["plain", "hot", "forbidden"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["float64", "float32"])
@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_sampler_and_trainer_agree(kind: models.Kind, dtype: torch.dtype, settings: Settings) -> None:
    """The sampler's log-probability of each token is the trainer's, temperature and forbidden end tokens included.

    log p(x_t | x_<t) = log softmax(logits / temperature)[x_t], the end token left out while it is forbidden
    """
    policy = models.policy(kind, dtype)
    batch = sampled(policy, settings, dtype)
    assert gap(policy, batch) <= TOLERANCE[dtype]
    output = policy(batch)
    assert not output.logprobs[~batch.mask].any()
    for loss in (losses.policy_gradient, losses.clipped):
        assert loss(output.logprobs, batch).metrics["sampler_gap"] <= TOLERANCE[dtype]
        assert abs(loss(output.logprobs, batch).metrics["ratio_kl"]) <= TOLERANCE[dtype]


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_every_disagreement_shows(kind: models.Kind) -> None:
    """A forgotten temperature, a forgotten ban on the end token, weights that moved, shifted tokens: each shows."""
    policy = models.policy(kind)
    batch = sampled(policy, FORBIDDEN, torch.float64)
    assert gap(policy, batch) <= 1e-10
    nowhere = torch.zeros_like(batch.no_end)
    shifted = batch.token_ids.roll(1, dims=1)
    wrong = {
        "temperature": replace(batch, temperature=1.0),
        "forbidden end": replace(batch, no_end=nowhere),
        "one token late": replace(batch, token_ids=shifted),
        "sampler one token late": replace(batch, old_logprobs=batch.old_logprobs.roll(1, dims=1)),
    }
    for name, other in wrong.items():
        assert gap(policy, other) > 1e-3, name
        metrics = losses.policy_gradient(policy(other).logprobs, other).metrics
        assert metrics["sampler_gap"] > 1e-4, name
    with torch.no_grad():
        next(policy.model.parameters()).mul_(1.1)
    assert gap(policy, batch) > 1e-3, "other weights"


def test_forbidden_end_tokens_were_not_drawn() -> None:
    """With ``min_new_tokens`` no text ends earlier; without it, in this world, some do."""
    policy = models.policy("llama")
    early = [rollout for rollout in _texts(policy, HOT) if sum(rollout.mask) < 5]
    assert early, "this world has no short texts"
    assert all(sum(rollout.mask) >= 5 for rollout in _texts(policy, replace(HOT, min_new_tokens=4)))


def test_probabilities_sum_to_one() -> None:
    """What the trainer says of every possible token sums to 1 at each position, whatever was forbidden there."""
    policy = models.policy("llama")
    batch = sampled(policy, FORBIDDEN, torch.float64).select([0])
    at = int(batch.prompt_length[0]) + 1
    total = torch.zeros((), dtype=torch.float64)
    for token in range(len(models.shared_tokenizer())):
        ids = batch.token_ids.clone()
        ids[0, at] = token
        with torch.no_grad():
            total += policy(replace(batch, token_ids=ids)).logprobs[0, at].exp()
    assert float(total) == pytest.approx(1.0, abs=1e-10)


def _texts(policy: CausalPolicy, settings: Settings) -> list[models.Rollout]:
    return models.sample(policy, models.prompts(3, 30, 2, 11), settings, per_prompt=16)
