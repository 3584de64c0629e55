"""Decisions: what was sampled is what is learned from, and the step is the enumerated objective's gradient."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

import instant_reward as ir
from deciding import LABELS, Picker, tiny_classifier
from exact.world import chance
from instant_reward import algorithms
from instant_reward.batch import collate
from instant_reward.config import AlgorithmConfig
from instant_reward.policies import terms
from instant_reward.policies.decisions import DecisionPolicy
from instant_reward.policies.head import Softmax
from instant_reward.policies.optimizer import Optimization
from instant_reward.rewards.base import as_rewards
from instant_reward.types import Prompt, Rollout

TEXTS = [{"prompt": "the film was great"}, {"prompt": ["not a joy", "dull"]}, {"prompt": "slow"}]
LISTS = [{"prompt": [0.5, -1.0, 2.0]}, {"prompt": [1.5]}, {"prompt": [-0.3, 0.7]}]
SCORE = ir.reward(every="word", name="score")(lambda view: chance(view.text))
MAKE: dict[str, tuple[Callable[[], DecisionPolicy], list[dict[str, Any]]]] = {
    "classifier": (tiny_classifier, TEXTS),
    "picker": (Picker, LISTS),
}


def every_text(policy: DecisionPolicy, prompt: Prompt) -> list[list[int]]:
    """Each sequence of actions that is possible for a prompt."""
    if isinstance(policy, Picker):
        numbers = range(1, len(prompt.context or []) + 1)
        picks = [list(some) for size in range(len(numbers) + 1) for some in itertools.permutations(numbers, size)]
        return [some if len(some) == len(numbers) else [*some, 0] for some in picks]
    return [[number] for number in range(len(LABELS))]


def written(policy: DecisionPolicy, prompt: Prompt, actions: Sequence[int], rewards: Sequence[Any] = ()) -> Rollout:
    """A text of the policy's, with its own log-probabilities."""
    stream = policy.decoder().stream(prompt)
    parts = list(itertools.accumulate(map(stream.push, actions)))
    count = len(actions)
    rollout = Rollout(
        "x/0", 0, prompt, list(actions), [True] * count, [0.0] * count, list(map(len, parts)), parts[-1], [],
        [0] * count, "ended",
    )  # fmt: skip
    rollout.logprobs = policy.score(collate([rollout], dtype=torch.float64))[0].tolist()
    rollout.marks = ir.replay(rewards, rollout)
    return rollout


def gradient(policy: DecisionPolicy) -> Tensor:
    parts = [torch.zeros_like(one) if one.grad is None else one.grad for one in policy.model.parameters()]
    for one in policy.model.parameters():
        one.grad = None
    return torch.cat([part.flatten() for part in parts])


def same(one: Tensor, other: Tensor, within: float = 1e-10) -> bool:
    return bool((one - other).abs().max() <= within * max(1.0, float(other.abs().max())))


@pytest.mark.parametrize("kind", MAKE)
@pytest.mark.parametrize("temperature", [1.0, 0.6])
@pytest.mark.parametrize("least", [0, 2])
def test_the_samplers_logprobs_are_the_trainers(kind: str, temperature: float, least: int) -> None:
    policy = MAKE[kind][0]()
    texts = policy.sample(
        MAKE[kind][1], per_prompt=5, temperature=temperature, min_new_tokens=least, max_new_tokens=4, rows=4, seed=2
    )
    batch = collate(texts, dtype=torch.float64)
    assert same(policy.score(batch), batch.old_logprobs)
    assert same(policy.score(batch, tokens_per_part=1), batch.old_logprobs)
    found = policy.logprobs(batch.token_ids, batch.mask, batch.length, temperature, contexts=batch.contexts)
    if not (least and kind == "picker"):  # there the end was forbidden, which ``logprobs`` is not told
        assert same(found.detach(), batch.old_logprobs)
    if kind == "picker" and least:
        assert all(sum(text.mask) >= min(2, len(text.prompt.context or [])) for text in texts)


@pytest.mark.parametrize("kind", MAKE)
def test_all_texts_together_have_probability_1(kind: str) -> None:
    policy = MAKE[kind][0]()
    for prompt in policy.prompts(MAKE[kind][1], "prompt", 4):
        texts = [written(policy, prompt, actions) for actions in every_text(policy, prompt)]
        assert math.isclose(sum(math.exp(sum(text.logprobs)) for text in texts), 1.0, abs_tol=1e-12)


@pytest.mark.parametrize("kind", MAKE)
def test_padding_and_company_change_nothing(kind: str) -> None:
    policy = MAKE[kind][0]()
    texts = policy.sample(MAKE[kind][1], per_prompt=2, max_new_tokens=4)
    together = policy.score(collate(texts, dtype=torch.float64))
    for row, text in enumerate(texts):
        alone = policy.score(collate([text], dtype=torch.float64))[0]
        assert same(together[row, : len(alone)], alone)


@pytest.mark.parametrize("kind", MAKE)
def test_what_is_drawn_does_not_hang_on_the_rows_beside(kind: str) -> None:
    policy = MAKE[kind][0]()
    draws = [
        [text.token_ids for text in policy.sample(MAKE[kind][1], per_prompt=5, rows=rows, max_new_tokens=4, seed=4)]
        for rows in (1, 3, 64)
    ]
    assert draws[0] == draws[1] == draws[2]


@pytest.mark.parametrize("kind", MAKE)
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_reinforce_is_the_gradient_of_the_enumerated_objective(kind: str, temperature: float) -> None:
    """Item 1 for decisions: each text's step by its probability, against autograd through sum of p * reward."""
    policy = MAKE[kind][0]()
    algorithm = algorithms.build(AlgorithmConfig(name="reinforce"), as_rewards([SCORE]), 4)
    for prompt in policy.prompts(MAKE[kind][1], "prompt", 4):
        texts = [written(policy, prompt, actions, [SCORE]) for actions in every_text(policy, prompt)]
        texts = [replace(text, temperature=temperature) for text in texts]
        batch = collate(texts, algorithm.sources, dtype=torch.float64)
        batch = replace(batch, old_logprobs=policy.score(batch))
        logs = policy(batch).logprobs.sum(1)
        worth = torch.tensor([text.total() for text in texts], dtype=torch.float64)
        (logs.exp() * worth).sum().backward()
        exact = gradient(policy)
        assert float(exact.abs().max()) > 1e-4
        step, credited = torch.zeros_like(exact), algorithm.credit(batch)
        for row in range(len(texts)):
            one = replace(credited.select([row]), text_count=1, token_count=int(batch.mask[row].sum()))
            algorithm.loss(policy(one), one).loss.backward()
            step -= math.exp(float(logs[row].detach())) * gradient(policy)
        assert same(step, exact)


@pytest.mark.parametrize("kind", MAKE)
def test_sums_over_actions_are_exact(kind: str) -> None:
    """Entropy, its gradient and the KL to the reference, against the distribution itself."""
    policy = MAKE[kind][0]()
    prompt = policy.prompts(MAKE[kind][1], "prompt", 4)[0]
    texts = [written(policy, prompt, actions) for actions in every_text(policy, prompt)]
    batch = collate(texts, dtype=torch.float64)
    first = policy.logprobs(batch.token_ids, batch.mask, contexts=batch.contexts)[:, 0]
    of_action = {int(ids[0]): value for ids, value in zip(batch.token_ids, first, strict=True)}
    logs = torch.stack(list(of_action.values()))
    expected = -(logs.exp() * logs).sum()
    head = policy.head(policy.model, batch.select([0]))
    found = terms.entropy(head)[0]
    assert same(found[None].detach(), expected[None].detach())
    assert same(policy(batch).entropy[0, :1], expected[None].detach())  # type: ignore[index]
    found.backward()
    exact = gradient(policy)
    expected.backward()
    assert same(gradient(policy), exact)
    other = MAKE[kind][0]()
    with torch.no_grad():
        for parameter in other.model.parameters():
            parameter += 0.05
    beside = other.head(other.model, batch.select([0]))
    divergence = terms.divergence(policy.head(policy.model, batch.select([0])), beside)[0]
    theirs = {int(ids[0]): value for ids, value in zip(batch.token_ids, other.score(batch)[:, 0], strict=True)}
    by_hand = (logs.exp() * (logs - torch.stack([theirs[action] for action in of_action]))).sum()
    assert divergence > 1e-6
    assert same(divergence[None].detach(), by_hand[None].detach())


def test_the_step_with_the_true_values_of_all_labels_is_exact() -> None:
    """Bandit feedback with a critic of labels ("qac"): where Q is the reward, one text has the exact gradient."""
    policy = tiny_classifier()
    config = AlgorithmConfig(name="qac", critic={"model": "head"})  # type: ignore[arg-type]
    algorithm = algorithms.build(config, as_rewards([SCORE]), 1)
    policy.prepare(Optimization(), algorithm.needs)
    prompt = policy.prompts(TEXTS, "prompt", 1)[0]
    texts = [written(policy, prompt, actions, [SCORE]) for actions in every_text(policy, prompt)]
    worth = torch.tensor([text.total() for text in texts], dtype=torch.float64)
    assert policy.critic is not None
    policy.critic.begun.fill_(True)
    with torch.no_grad():
        policy.critic.tables.all()[0].bias.copy_(worth)
    batch = collate(texts, algorithm.sources, dtype=torch.float64)
    logs = policy.token_logprobs(policy.head(policy.model, batch), batch).logprobs.sum(1)
    (logs.exp() * worth).sum().backward()
    exact = gradient(policy)
    credited = algorithm.credit(policy.annotate(batch))
    for row in range(len(texts)):
        one = replace(credited.select([row]), text_count=1, token_count=1)
        algorithm.loss(policy(one), one).loss.backward()
        assert same(-gradient(policy), exact)


def test_scores_stay_as_they_are_where_an_end_is_forbidden() -> None:
    scores = torch.zeros(2, 3)
    head = terms.Choices(torch.zeros(2, 1), scores, torch.tensor([True, False]), Softmax(1.0, (0,)))
    assert head.logits(slice(None)).isinf().tolist() == [[True, False, False], [False] * 3]
    assert not scores.any()


def test_marks_of_actions() -> None:
    """A word's mark lies on the action that wrote it, and is paid where the next action showed that it had ended."""
    policy = Picker()
    prompt = policy.prompts(LISTS, "prompt", 4)[0]
    text = written(policy, prompt, [2, 3, 0], [ir.reward(every="word", name="w")(lambda view: len(view.piece))])
    assert text.text == "-1 2"
    assert text.char_ends == [2, 4, 4]
    assert [(mark.start, mark.end, mark.seen) for mark in text.marks] == [(0, 1, 2), (1, 3, 3)]
