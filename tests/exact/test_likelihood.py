"""Supervised training: the gradient is that of the mean negative log-likelihood, weighed as the rewards say."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import instant_reward as ir
from exact import models
from instant_reward import algorithms
from instant_reward.algorithms import Algorithm
from instant_reward.batch import Batch, collate
from instant_reward.beside import Beside, Imitating, beside
from instant_reward.collect import numbered
from instant_reward.config import AlgorithmConfig, Config, DataConfig
from instant_reward.fitting import Texts, Written, ordered, predict, texts_to_fit, written
from instant_reward.policies.causal import CausalPolicy
from instant_reward.policies.optimizer import Optimization
from instant_reward.rewards.base import as_rewards
from instant_reward.types import Carried, UserError

TEXTS = ["the movie was good", "a slow and long movie", "it was not bad", "fine"]
KINDS = ["llama", "gpt2"]


def texts(policy: CausalPolicy) -> Written:
    return written(DataConfig(prompts=["x"], column=None, completion="text"), [{"text": one} for one in TEXTS], policy)


def credited(policy: CausalPolicy, rewards: Any = (), step: int = 0, **options: Any) -> tuple[Algorithm, Batch]:
    """All the texts as one batch, weighed."""
    named = as_rewards(list(rewards))
    algorithm = algorithms.build(AlgorithmConfig(name="likelihood", **options), named, 8)
    policy.prepare(Optimization(), algorithm.needs)
    rollouts = texts(policy)
    given = Texts(rollouts, ordered(rollouts, len(TEXTS), None, 0), policy, named)
    batch = collate(numbered(given.groups(None, 1)), algorithm.sources, policy.pad_id, dtype=torch.float64)
    batch.carried = Carried(step=step)
    return algorithm, algorithm.credit(policy.annotate(batch))


def flat(policy: CausalPolicy) -> Tensor:
    return torch.cat([one.grad.flatten() for one in policy.model.parameters()])  # type: ignore[union-attr]


def gradient(policy: CausalPolicy, algorithm: Algorithm, parts: Iterable[Batch]) -> Tensor:
    policy.model.zero_grad()
    for part in parts:
        policy.backward(algorithm.loss(policy(part), part).loss)
    return flat(policy)


def direct(policy: CausalPolicy, batch: Batch, weights: Tensor) -> Tensor:
    """Autograd through the transformers model itself, each text alone: no packing, no padding, no kernel of ours."""
    policy.model.zero_grad()
    loss = torch.zeros((), dtype=torch.float64)
    for row in range(len(batch)):
        ids = batch.token_ids[row, : int(batch.length[row])]
        logprobs = policy.model(ids[None]).logits[0].log_softmax(-1)
        for t in batch.mask[row].nonzero().flatten().tolist():
            loss = loss - weights[row, t] * logprobs[t - 1, ids[t]]
    (loss / int(batch.mask.sum())).backward()
    return flat(policy)


def same(one: Tensor, other: Tensor) -> bool:
    return bool((one - other).abs().max() < 1e-10)


@pytest.mark.parametrize("kind", KINDS)
def test_the_gradient_is_that_of_the_mean_negative_log_likelihood(kind: Any) -> None:
    """grad loss = -(1 / N) sum over texts and their tokens of grad log p(x_t | x_<t), however it is split."""
    policy = models.policy(kind)
    algorithm, batch = credited(policy)
    assert bool((batch.advantages == batch.mask).all())
    wanted = direct(policy, batch, torch.ones_like(batch.old_logprobs))
    assert wanted.abs().max() > 1e-2
    for tokens in (1, 12, 1000):
        assert same(gradient(policy, algorithm, batch.parts(tokens)), wanted)
    counts = [int(batch.length[row]) - 1 for row in range(4)]
    assert batch.token_count == sum(counts), "the opening token is no target, the end token is one"


@pytest.mark.parametrize(
    ("rewards", "options"),
    [
        ([ir.reward(every="end", name="text")(lambda view: float(len(view.text)))], {}),
        ([ir.reward(every="token", name="token")(lambda view: 0.5 + view.text.count("o"))], {}),
        ([ir.reward(every="word", name="word")(lambda view: float(len(view.piece)))], {}),
        ([ir.reward(every="end", name="span")(lambda view: [view.span(3.0, 1, 4), view.span(0.5, 0, 2)])], {}),
        ([ir.reward(every="end", name="span")(lambda view: view.span(3.0, 1, 4))], {"unrated": 0.25}),
        (
            [
                ir.reward(every="end", name="half", weight=0.5)(lambda view: 3.0),
                ir.reward(every="word", name="word", weight=2.0)(lambda view: 1.0 if "o" in view.piece else None),
            ],
            {},
        ),
    ],
    ids=["text", "token", "word", "spans", "unrated", "sum"],
)
def test_rewards_weigh_the_targets_that_they_rate(rewards: list[Any], options: dict[str, Any]) -> None:
    """w[t] = sum over sources of weight * the values on t; a token that none rates weighs ``unrated``."""
    policy = models.policy()
    algorithm, batch = credited(policy, rewards, **options)
    weights = torch.zeros_like(batch.old_logprobs)
    rated = torch.zeros_like(batch.mask)
    rollouts = texts(policy)
    for row in range(len(batch)):
        (rollout,) = [one for one in rollouts if one.token_ids == batch.token_ids[row, : batch.length[row]].tolist()]
        for one in rewards:
            for mark in ir.replay([one], rollout):
                weights[row, mark.start : mark.end] += one.weight * mark.value
                rated[row, mark.start : mark.end] = True
    weights = torch.where(rated, weights, options.get("unrated", 1.0)) * batch.mask
    assert torch.equal(batch.advantages, weights)
    assert len(set(weights[batch.mask].tolist())) > 1
    assert same(gradient(policy, algorithm, batch.parts(12)), direct(policy, batch, weights))


@pytest.mark.parametrize("first", ["harder", "easier"])
@pytest.mark.parametrize("normalised", [True, False])
def test_weights_follow_the_policys_own_error(first: str, normalised: bool) -> None:
    """w = (1 - p)**strength or p**strength, of the policy as the step began, over their mean; no gradient in w."""
    policy = models.policy()
    strength = {"rule": "linear", "start": 0.0, "end": 4.0, "steps": 8}
    options = {"by_error": {"first": first, "strength": strength, "normalised": normalised}}
    algorithm, batch = credited(policy, [], 4, **options)
    chance = policy.score(batch).exp()
    weights = ((1 - chance) if first == "harder" else chance) ** 2.0 * batch.mask  # half of the way: strength 2
    weights = weights / (weights.sum() / batch.token_count) if normalised else weights
    assert same(batch.advantages, weights)
    assert same(gradient(policy, algorithm, batch.parts(12)), direct(policy, batch, weights))
    if normalised:
        assert batch.advantages.sum() == pytest.approx(batch.token_count)


def test_a_negative_weight_is_refused() -> None:
    """-w log p with w < 0 falls without bound as p goes to 0."""
    with pytest.raises(UserError, match=r"would weigh -1, and a likelihood with a negative weight"):
        credited(models.policy(), [ir.reward(every="end", name="bad")(lambda view: -1.0)])


def test_an_output_is_what_the_policy_finds_likeliest_at_each_target() -> None:
    """f(output, target): the argmax of every next-token distribution along the given text, read as text."""
    policy = models.policy()
    seen: list[tuple[str, str]] = []

    def agrees(output: str, target: str) -> float:
        seen.append((output, target))
        return 2.0 if "movie" in target else 0.5

    _, batch = credited(policy, [agrees])
    assert sorted(target for _, target in seen) == sorted(TEXTS)
    for output, target in seen:
        (rollout,) = [one for one in texts(policy) if one.text == target]
        ids = torch.tensor(rollout.token_ids)
        likeliest = policy.model(ids[None]).logits[0, :-1].argmax(-1).tolist()
        assert output == policy.tokenizer.decode(likeliest, skip_special_tokens=True)
    assert set(batch.advantages[batch.mask].tolist()) == {2.0, 0.5}


def joined(policy: CausalPolicy, weight: Any, **options: Any) -> tuple[Beside, Config]:
    config = Config.build(
        {
            "data": {"prompts": ["a"]},
            "supervised": {
                "data": {"prompts": [{"text": one} for one in TEXTS], "column": None, "completion": "text"},
                "weight": weight,
                "texts_per_step": 3,
                **options,
            },
        }
    )
    return beside(config, policy), config


def test_the_gradient_beside_a_reward_is_the_sum_of_both() -> None:
    """grad = grad(reward loss) + weight * grad(mean negative log-likelihood), in one optimizer step."""
    policy = models.policy()
    policy.prepare(Optimization())
    given, _ = joined(policy, {"rule": "linear", "start": 1.0, "end": 0.0, "steps": 10})
    reward_loss = lambda: (policy.model.get_output_embeddings().weight ** 2).sum()  # noqa: E731
    policy.model.zero_grad()
    policy.backward(reward_loss())
    alone = flat(policy) if all(p.grad is not None for p in policy.model.parameters()) else None
    assert alone is None, "the reward's part reaches the head alone"
    first = policy.model.get_output_embeddings().weight.grad.clone()
    said = given.backward(policy, step=5, done=0)
    assert said["supervised/weight"] == pytest.approx(0.6)
    both = flat(policy)

    drawn = collate(numbered(given.texts.groups(None, 5)), pad_id=policy.pad_id, dtype=torch.float64)
    wanted = 0.6 * direct(policy, drawn, torch.ones_like(drawn.old_logprobs))
    head = [name for name, _ in policy.model.named_parameters()].index("lm_head.weight")
    sizes = [one.numel() for one in policy.model.parameters()]
    start = sum(sizes[:head])
    wanted[start : start + sizes[head]] += first.flatten()
    assert same(both, wanted)
    assert "supervised/nll" not in given.backward(policy, step=11, done=0), "at weight 0 nothing is computed"


def test_each_optimizer_step_has_texts_of_its_own() -> None:
    policy = models.policy()
    policy.prepare(Optimization())
    given, _ = joined(policy, 1.0, warmup_steps=2)
    given.updates = 2
    asked: list[int] = []
    inner = given.texts.groups
    given.texts.groups = lambda sampler, step: asked.append(step) or inner(sampler, step)  # type: ignore[method-assign,func-returns-value]
    for step in (3, 4):
        for done in (0, 1):
            given.backward(policy, step, done)
    assert asked == [3, 4, 5, 6]


def test_dropout_is_on_for_given_texts_alone() -> None:
    """A model with dropout: its own forward pass, other values each time; without, this library's layers."""
    policy = models.policy("gpt2")
    for module in policy.model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.5
    _, batch = credited(policy)
    plain = policy(batch).logprobs
    assert torch.equal(policy(batch).logprobs, plain)
    learner = Imitating(policy)
    one, other = learner(batch).logprobs, learner(batch).logprobs
    assert not torch.allclose(one, other)
    assert not policy.model.training
    assert torch.equal(policy(batch).logprobs, plain)


def test_recorded_texts_can_be_imitated(tmp_path: Path) -> None:
    import json

    from instant_reward.records import rollout_record

    policy = models.policy()
    drawn = policy.sample(["the"], per_prompt=3, max_new_tokens=4)
    file = tmp_path / "samples.jsonl"
    file.write_text("\n".join(json.dumps(rollout_record(one)) for one in drawn))
    config = Config.build({"data": {"rollouts": str(file)}, "algorithm": "likelihood"})
    given = texts_to_fit(config, [], policy, [])
    assert [one.token_ids for one in given.rollouts] == [one.token_ids for one in drawn]
    predict(list(given.rollouts), policy, 100)
