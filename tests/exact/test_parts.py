"""Splits for memory and layouts for speed: the step is that of one big batch, whatever the split."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import replace
from functools import cache, partial

import pytest
import torch
from torch import Tensor

import instant_reward as ir
from exact import models
from exact.world import chance, differ, same
from instant_reward import algorithms, losses
from instant_reward.algorithms import PRESETS, Algorithm
from instant_reward.batch import Batch, collate
from instant_reward.config import AlgorithmConfig
from instant_reward.policies import layout
from instant_reward.policies.causal import CausalPolicy
from instant_reward.policies.optimizer import Optimization
from instant_reward.policies.states import States
from instant_reward.sampling.draw import Settings
from instant_reward.types import Rollout

torch.set_num_threads(1)
NORMALISE: list[losses.Normalise] = ["text", "tokens", "constant"]
SETTINGS = Settings(max_new_tokens=10, min_new_tokens=2, temperature=0.8)
WHOLE = 10**9


def rewards() -> list[ir.Reward]:
    words = ir.reward(every="word", name="words", discount=0.8)(lambda view: chance(view.text))
    final = ir.reward(every="end", name="final")(lambda view: chance(f"{view.text} end"))
    return [words, final]


@cache
def rollouts() -> tuple[list[Rollout], CausalPolicy]:
    policy = models.policy("llama")
    return models.sample(policy, models.prompts(20, 3, 9), SETTINGS, per_prompt=4, rewards=rewards()), policy


def credited(name: str = "rloo", kl: float = 0.2) -> tuple[Algorithm, Batch, CausalPolicy]:
    """A batch of three groups of four with advantages, and the policy that has since moved away from its sampler."""
    texts, _ = rollouts()
    policy = models.policy("llama")
    with torch.no_grad():
        generator = torch.Generator().manual_seed(1)
        for parameter in policy.model.parameters():
            parameter.add_(0.02 * torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype))
    timing = "ignore" if PRESETS[name].returns == "whole" else "keep"
    bounds = {"clip_low": 0.05, "clip_high": 0.05} if PRESETS[name].loss == "clipped" else {}
    config = AlgorithmConfig(name=name, kl=kl, timing=timing, **bounds)
    algorithm = algorithms.build(config, rewards(), SETTINGS.max_new_tokens)
    policy.prepare(Optimization(learning_rate=0.1), algorithm.needs)
    batch = policy.annotate(collate(texts, algorithm.sources, policy.pad_id, dtype=torch.float64))
    return algorithm, algorithm.credit(batch), policy


def gradient(
    policy: CausalPolicy, parts: Iterable[Batch], loss: Callable[[Tensor, Batch], ir.LossOutput]
) -> tuple[Tensor, dict[str, float]]:
    """The gradient of all weights in a row, and the metrics summed over the parts."""
    policy.model.zero_grad()
    metrics: dict[str, float] = {}
    for part in parts:
        output = loss(policy(part).logprobs, part)
        policy.backward(output.loss)
        for key, value in output.metrics.items():
            metrics[key] = metrics.get(key, 0.0) + value
    return torch.cat([parameter.grad.flatten() for parameter in policy.model.parameters()]), metrics


def _loss_of(algorithm: Algorithm, logprobs: Tensor, part: Batch) -> ir.LossOutput:
    return algorithm.loss(ir.PolicyOutput(logprobs), part)


@pytest.mark.parametrize("normalise", NORMALISE)
@pytest.mark.parametrize("loss", [losses.policy_gradient, partial(losses.clipped, low=0.05, high=0.05)])
def test_any_split_is_one_step(loss: Callable[..., ir.LossOutput], normalise: losses.Normalise) -> None:
    """However a batch is split for memory, the parts' gradients sum to the whole batch's, for every average.

    sum over parts of grad loss(part) = grad loss(batch), both divided by the whole batch's count
    """
    _, batch, policy = credited()
    loss = partial(loss, normalise=normalise, constant=10.0)
    whole, metrics = gradient(policy, [batch], loss)
    assert whole.abs().max() > 1e-3
    for tokens in (WHOLE, 130, 60, 1):
        parts = list(batch.parts(tokens))
        assert sum(len(part) for part in parts) == len(batch)
        found, summed = gradient(policy, parts, loss)
        assert same(found, whole), f"{len(parts)} parts"
        assert summed == pytest.approx(metrics)
    odd = [batch.select([3, 0, 7]), batch.select([11]), batch.select([1, 2, 4, 5, 6, 8, 9, 10])]
    assert same(gradient(policy, odd, loss)[0], whole)

    def local(part: Batch) -> Batch:
        """Wrong on purpose: a part divides by its own counts."""
        return replace(part, text_count=len(part), token_count=int(part.mask.sum()))

    parts = list(batch.parts(60))
    assert len(parts) > 2
    assert differ(gradient(policy, map(local, parts), loss)[0], whole)
    averaged = gradient(policy, map(local, parts), loss)[0] / len(parts)
    assert differ(averaged, whole), "the mean of the parts' means"


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_both_layouts_are_one_step(kind: models.Kind, monkeypatch: pytest.MonkeyPatch) -> None:
    """Packed tokens, siblings behind one shared prompt, and a row for each text have the same states and step."""
    _, batch, _ = credited()
    policy = models.policy(kind)  # any weights do, all read the same ones
    loss = losses.policy_gradient
    parts = [batch, batch.select([0, 1, 2]), batch.select([4, 9])]
    for part in parts:
        packed, _ = gradient(policy, [part], loss)
        monkeypatch.setattr("instant_reward.policies.states.trunk_of", lambda *_: None)
        policy.states = States(policy.compute)
        monkeypatch.setattr(layout, "SHARED_LIMIT", 0)
        assert layout.lay_out(part).attention_mask is None
        plain, _ = gradient(policy, [part], loss)
        assert same(packed, plain)
        values = policy(part)
        monkeypatch.setattr(layout, "SHARED_LIMIT", 10**6)
        shared = layout._shared(part, layout.sibling_rows(part), 200)
        monkeypatch.setattr("instant_reward.policies.states.lay_out", lambda _, shared=shared: shared)
        found, _ = gradient(policy, [part], loss)
        assert same(found, plain)
        assert same(policy(part).logprobs, values.logprobs)
        assert same(policy(part).entropy, values.entropy)
        leaky = replace(shared, attention_mask=torch.ones_like(shared.attention_mask).tril())
        monkeypatch.setattr("instant_reward.policies.states.lay_out", lambda _, leaky=leaky: leaky)
        if len(part) > 2:
            assert differ(gradient(policy, [part], loss)[0], plain), "siblings see each other"
        monkeypatch.undo()
        policy.states = States(policy.compute)


def test_the_cheaper_layout_is_taken() -> None:
    """Groups of siblings share their prompt where that is less to compute; single texts never."""
    _, batch, _ = credited()
    assert layout.lay_out(batch.select([0, 1, 2, 3])).attention_mask is not None
    assert layout.lay_out(batch.select([0, 4, 8])).attention_mask is None


@pytest.mark.parametrize("name", ["reinforce", "rloo", "grpo"])
def test_presets_take_one_step_whatever_the_split(name: str) -> None:
    """The optimizer's step of every preset, KL included, is the same for any split of the batch."""
    moved = []
    for tokens in (WHOLE, 70, 1):
        algorithm, batch, policy = credited(name)
        gradient(policy, batch.parts(tokens), partial(_loss_of, algorithm))
        policy.step()
        moved.append(torch.cat([parameter.detach().flatten() for parameter in policy.model.parameters()]))
    assert differ(moved[0], torch.cat([p.detach().flatten() for p in credited(name)[2].model.parameters()]))
    assert same(moved[0], moved[1])
    assert same(moved[0], moved[2])


def test_annotations_do_not_hang_on_the_split() -> None:
    """The reference's log-probabilities are the same for any split, in the batch's own order."""
    _, batch, policy = credited()
    assert batch.ref_logprobs is not None
    assert batch.ref_logprobs.abs().sum() > 0
    for tokens in (60, 1):
        assert same(policy.annotate(batch, tokens).ref_logprobs, batch.ref_logprobs)


def test_minibatches_are_batches_of_their_own() -> None:
    """Minibatches are random shares with counts of their own: each text is in one, each takes a step of its mean."""
    _, batch, policy = credited()
    shares = list(batch.minibatches(3, seed=5))
    assert [share.text_count for share in shares] == [4, 4, 4]
    assert sum(share.token_count for share in shares) == batch.token_count
    rows = sorted(tuple(ids) for share in shares for ids in _texts(share))
    assert rows == sorted(tuple(ids) for ids in _texts(batch))
    mean = sum(gradient(policy, share.parts(60), losses.policy_gradient)[0] for share in shares) / 3
    assert same(mean, gradient(policy, [batch], losses.policy_gradient)[0])


def _texts(batch: Batch) -> list[list[int]]:
    return [ids[:length].tolist() for ids, length in zip(batch.token_ids, batch.length, strict=True)]
