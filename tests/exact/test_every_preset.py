"""Item 14, preset by preset, with all that each takes besides: any split and any ranks take the step of one batch."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor

import instant_reward as ir
from exact import models
from exact.turns import answered
from exact.world import chance, differ, same
from instant_reward import algorithms
from instant_reward.algorithms import PRESETS, Algorithm
from instant_reward.batch import Batch, collate
from instant_reward.config import AlgorithmConfig
from instant_reward.policies.causal import CausalPolicy
from instant_reward.policies.optimizer import Optimization
from instant_reward.policies.teacher import shown_to_teacher
from instant_reward.sampling.draw import Settings
from instant_reward.types import Carried, Rollout

torch.set_num_threads(1)
SETTINGS = Settings(max_new_tokens=6, min_new_tokens=2, temperature=0.8)
SEES = "{prompt} good"
WORDS = ir.reward(every="word", name="words")(lambda view: chance(view.text))
FINAL = ir.reward(every="end", name="final", weight=-0.5)(lambda view: chance(f"{view.text} end"))
REWARDS = [WORDS, FINAL]
CASES: list[tuple[str, dict[str, Any]]] = [
    *[
        (name, {} if name in ("value", "gspo") else {"normalise": "text_mean"})
        for name in PRESETS
        if name != "doubly_robust"
    ],
    ("value", {"critic": {"table": True}}),
    ("reinforce", {"baseline": "value"}),
    ("ppo", {"critic": {"model": "copy"}}),
    ("qac", {"top_actions": 3}),
    ("ppo", {"loss": "cispo", "normalise": "constant"}),
]


def everything(name: str, options: dict[str, Any]) -> dict[str, Any]:
    """A preset's options: the given ones, and all others that it takes notice of."""
    preset, found = PRESETS[name], {"name": name, "kl": 0.1, **options}
    learned = preset.critic or options.get("baseline") == "value"
    table = bool(options.get("critic", {}).get("table"))
    ahead = preset.returns in ("gae", "vtrace") and not table
    likelihood = preset.loss == "likelihood"
    if preset.returns in ("whole", "own") and not likelihood:
        found["timing"] = "ignore"
    if preset.loss == "none":
        found["teacher"] = {"sees": SEES, "discount": 1.0}
    else:
        found |= {"kl_as": "loss", "kl_estimator": "k3", "entropy": 0.05}
        found |= {"unrated": 2.0, "by_error": "harder"} if likelihood else {"soft_length": 3}
        found["teacher"] = {"sees": SEES, **({"baseline": True} if name == "distill" else {"whole": True})}
    if learned:
        head = {} if preset.loss == "none" else {"model": "head", "detach": False}
        found["critic"] = head | ({"clip": 0.3} if ahead or not preset.critic else {}) | options.get("critic", {})
        if found["critic"].get("model") == "copy":
            del found["critic"]["detach"]
    if (preset.returns in ("to_go", "whole") or ahead) and preset.weigh != "best" and name != "distill":
        found["pieces"] = "word"
    if preset.loss == "clipped" and preset.ratio == "token" and "loss" not in options:
        found["ratio"] = "piece"
    if preset.loss == "policy_gradient" and preset.weigh != "best" and preset.returns != "vtrace":
        found["importance"] = {"level": "piece" if "pieces" in found else "token", "most": 1.5}
    return found


@cache
def texts() -> list[Rollout]:
    """Two groups of three; in every other text somebody else speaks as well."""
    drawn = models.sample(models.policy(), models.prompts(9, 3), SETTINGS, 3, REWARDS)
    others = [65, 66, 67]
    return [
        answered(one, lambda sampled: others if len(sampled) == 2 else [], REWARDS) if number % 2 else one
        for number, one in enumerate(drawn)
    ]


def noise(tensors: Iterable[Tensor], size: float, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for tensor in tensors:
            tensor.add_(size * torch.randn(tensor.shape, generator=generator, dtype=tensor.dtype))


def prepared(options: dict[str, Any]) -> tuple[Algorithm, Batch, CausalPolicy]:
    """A batch that is not credited yet, and a policy that has left its sampler, with a critic that says something."""
    likelihood = options["name"] == "likelihood"  # whose weights may not be negative
    rewards = [one.but(weight=abs(one.weight)) for one in REWARDS] if likelihood else REWARDS
    algorithm = algorithms.build(AlgorithmConfig(**options), rewards, SETTINGS.max_new_tokens)
    policy = models.policy()
    policy.prepare(Optimization(learning_rate=1e-2), algorithm.needs)
    noise(policy.model.parameters(), 0.02, 1)
    if policy.critic is not None:
        policy.critic.begun.fill_(True)
        noise(policy.critic.parameters(), 0.3, 2)
    batch = collate(texts(), algorithm.sources, policy.pad_id, dtype=torch.float64, pieces=options.get("pieces"))
    if likelihood:
        batch.marks.value.abs_()
    batch.carried = Carried(step=5, mean_return=0.3, mean_weight=0.4)
    batch.shown = shown_to_teacher(texts(), SEES, policy.tokenizer, policy.pad_id, policy.context)
    return algorithm, batch, policy


def gradient(algorithm: Algorithm, policy: CausalPolicy, parts: Iterable[Batch]) -> tuple[Tensor, dict[str, float]]:
    """The gradient of all weights in a row, the critic's too, and the metrics summed over the parts."""
    weights = [*policy.model.parameters(), *(policy.critic.parameters() if policy.critic else [])]
    for one in weights:
        one.grad = None
    metrics: dict[str, float] = {}
    for part in parts:
        output = algorithm.loss(policy(part), part)
        policy.backward(output.loss)
        for key, value in {"loss": float(output.loss.detach()), **output.metrics}.items():
            metrics[key] = metrics.get(key, 0.0) + value
    return torch.cat([(torch.zeros_like(one) if one.grad is None else one.grad).flatten() for one in weights]), metrics


def splits(batch: Batch) -> dict[str, list[list[Batch]]]:
    """Ways to share a batch out: over ranks, each of which splits its own share into parts."""
    rows = list(range(len(batch)))
    odd = [batch.select(rows[-1:]), batch.select([*rows[1:-1], rows[0]])]
    ranks = [batch.select(rows[rank::2]) for rank in range(2)]
    return {"parts": [list(batch.parts(25))], "ranks in parts": [[ranks[0]], list(ranks[1].parts(1))], "odd": [odd]}


@pytest.mark.parametrize(("name", "options"), CASES, ids=lambda value: value if isinstance(value, str) else str(value))
def test_any_split_and_any_ranks_are_one_step(name: str, options: dict[str, Any]) -> None:
    """Every preset's gradient is the sum of its parts' and of its ranks', all terms and the critic included.

    sum over ranks and parts of grad loss(part) = grad loss(batch), for a batch and for each of its minibatches

    So is what the credit is made of: reference, teacher and values are the same for any split.
    """
    algorithm, bare, policy = prepared(everything(name, options))
    batch = algorithm.credit(policy.annotate(bare))
    again = algorithm.credit(policy.annotate(bare, 30))
    for field in ("values", "slow", "bootstrap", "ref_logprobs", "proximal_logprobs", "teacher_logprobs", "advantages"):
        one, other = getattr(batch, field), getattr(again, field)
        assert (one is None and other is None) or same(one, other), field
    wanted, metrics = gradient(algorithm, policy, [batch])
    assert wanted.abs().max() > 1e-3
    for what, ranks in splits(batch).items():
        assert sorted(ids.tolist() for rank in ranks for part in rank for ids in part.length) == sorted(batch.length)
        _is_one_step(algorithm, policy, ranks, wanted, metrics, what)
    share = next(batch.minibatches(2, seed=1))
    _is_one_step(algorithm, policy, splits(share)["ranks in parts"], *gradient(algorithm, policy, [share]), "a share")

    def local(part: Batch) -> Batch:
        """Wrong on purpose: a part divides by its own counts."""
        return replace(part, text_count=len(part), token_count=int(part.mask.sum()))

    assert differ(gradient(algorithm, policy, map(local, batch.parts(25)))[0], wanted)


def _is_one_step(
    algorithm: Algorithm,
    policy: CausalPolicy,
    ranks: list[list[Batch]],
    wanted: Tensor,
    metrics: dict[str, float],
    what: str,
) -> None:
    each = [gradient(algorithm, policy, rank) for rank in ranks]
    assert same(torch.stack([found for found, _ in each]).sum(0), wanted), what
    for key, value in metrics.items():
        assert sum(said[key] for _, said in each) == pytest.approx(value, abs=1e-10), (what, key)
