"""Whatever the policy is asked for is of the distribution that the tokens were drawn from: its temperature, its bans.

The sampler divides the logits by its temperature and forbids the end tokens at first (``min_new_tokens``). Reference,
teacher, entropy, KLs and sums over next tokens are compared with transformers' own logits, one pass for each text.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import pytest
import torch
from torch import Tensor

from exact import models
from exact.world import same
from instant_reward.batch import Batch, collate
from instant_reward.policies.causal import CausalPolicy
from instant_reward.policies.optimizer import Optimization
from instant_reward.policies.teacher import shown_to_teacher
from instant_reward.sampling.draw import Settings
from instant_reward.types import CriticNeed, Needs, Rollout, TeacherNeed

torch.set_num_threads(1)
SETTINGS = Settings(max_new_tokens=5, min_new_tokens=2, temperature=0.7)
SEES = "{prompt} good"
KINDS: list[models.Kind] = ["llama", "gpt2"]
ANNOTATED = ("ref_logprobs", "proximal_logprobs", "teacher_logprobs", "teacher_baseline", "values")
ANSWERED = ("logprobs", "entropy", "divergence", "expected")


@cache
def asked(kind: models.Kind) -> tuple[CausalPolicy, list[Rollout], Batch]:
    """A policy that has left its reference, with a teacher that reads more, a critic of next tokens, and a batch."""
    policy = models.policy(kind)
    rollouts = models.sample(policy, models.prompts(4, 9), SETTINGS, 3)
    assert {rollout.stop for rollout in rollouts} == {"ended", "length"}
    policy.prepare(
        Optimization(),
        Needs(
            reference=True,
            proximal=True,
            entropy=True,
            teacher=TeacherNeed(whole=True, baseline=True),
            critic=CriticNeed("copy", tables=1),
            top_actions=0,
        ),
    )
    assert policy.critic is not None
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        policy.critic.begun.fill_(True)
        for parameter in [*policy.model.parameters(), *policy.critic.parameters()]:
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype))
    batch = collate(rollouts, pad_id=policy.pad_id, dtype=torch.float64)
    batch.shown = shown_to_teacher(rollouts, SEES, policy.tokenizer, policy.pad_id, policy.context)
    return policy, rollouts, batch


@dataclass
class Drawn:
    """How a text was drawn: what brute force does to the logits. Other values are wrong on purpose."""

    temperature: float = SETTINGS.temperature
    forbidden: int = SETTINGS.min_new_tokens

    def logprobs(self, policy: CausalPolicy, model: object, prompt: list[int], sampled: list[int]) -> Tensor:
        """``[sampled, V]`` from transformers' own logits; of forbidden tokens so low that their chance is 0."""
        logits = model(input_ids=torch.tensor([[*prompt, *sampled]]), use_cache=False).logits[0]  # type: ignore[operator]
        of_sampled = logits[len(prompt) - 1 : -1] / self.temperature
        banned = torch.zeros_like(of_sampled, dtype=torch.bool)
        banned[: self.forbidden, list(policy.end_ids)] = True
        return of_sampled.masked_fill(banned, -1e4).log_softmax(-1)


def by_hand(
    kind: models.Kind, ours: Drawn, reference: Drawn, teacher: Drawn, entropy: Drawn, seen: str = SEES
) -> dict[str, Tensor]:
    """All that is asked of the policy, of each sampled token in a row, with gradient into the policy."""
    policy, rollouts, _ = asked(kind)
    assert policy.critic is not None
    found: dict[str, list[Tensor]] = {name: [] for name in (*ANNOTATED, *ANSWERED)}
    for rollout in rollouts:
        prompt, sampled = rollout.prompt.token_ids, rollout.token_ids[rollout.start :]
        other = policy.tokenizer(seen.format(prompt=rollout.prompt.text))["input_ids"]
        now = ours.logprobs(policy, policy.model, prompt, sampled)
        with torch.no_grad():
            before = reference.logprobs(policy, policy.reference, prompt, sampled)
            taught = teacher.logprobs(policy, policy.reference, other, sampled)
            ids = torch.tensor([[*prompt, *sampled]])
            states = policy.critic.base(input_ids=ids, use_cache=False).last_hidden_state[0, len(prompt) - 1 : -1]
            table = policy.critic.table(states)(slice(None))
        drawn = (range(len(sampled)), sampled)
        chances, spread = now.exp(), entropy.logprobs(policy, policy.model, prompt, sampled)
        gap = (chances * (now - taught)).sum(1)
        level = (chances * table).sum(1)
        for name, values in {
            "ref_logprobs": before[drawn],
            "proximal_logprobs": now[drawn],
            "teacher_logprobs": taught[drawn],
            "teacher_baseline": -gap,
            "values": level,
            "logprobs": now[drawn],
            "entropy": -(spread.exp() * spread).sum(1),
            "divergence": gap,
            "expected": (chances * (table - level.detach()[:, None])).sum(1),
        }.items():
            found[name].append(values)
    return {name: torch.cat(values) for name, values in found.items()}


def slope(policy: CausalPolicy, values: Tensor) -> Tensor:
    """The gradient of a weighted sum over tokens, of all weights in a row."""
    weights = torch.linspace(0.5, 1.5, len(values), dtype=torch.float64)
    gradients = torch.autograd.grad((weights * values).sum(), list(policy.model.parameters()), retain_graph=True)
    return torch.cat([one.flatten() for one in gradients])


@pytest.mark.parametrize("kind", KINDS)
def test_all_that_is_asked_is_of_the_drawn_distribution(kind: models.Kind) -> None:
    """At the sampler's temperature, without what it forbade: reference, teacher, values, KLs, entropy, and gradients.

    p(a | x_<t) = softmax(logits / temperature), 0 for the end tokens while they are forbidden, for all of them
    """
    policy, _, batch = asked(kind)
    with torch.no_grad():
        wanted = by_hand(kind, Drawn(), Drawn(), Drawn(), Drawn())
    annotated = policy.annotate(batch)
    for name in ANNOTATED:
        values = getattr(annotated, name)
        assert same((values if values.dim() == 2 else values[:, 0])[batch.mask], wanted[name]), name
    again = policy.annotate(batch, 30)
    assert all(same(getattr(again, name), getattr(annotated, name)) for name in ANNOTATED)
    assert same(policy.score(batch)[batch.mask], wanted["logprobs"])

    output, brute = policy(batch), by_hand(kind, Drawn(), Drawn(), Drawn(), Drawn())
    for name in ANSWERED:
        values = getattr(output, name)[batch.mask]
        assert same(values, wanted[name]), name
        assert same(slope(policy, values), slope(policy, brute[name])), f"the gradient of {name}"


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("wrong", [Drawn(temperature=1.0), Drawn(forbidden=0)], ids=["temperature", "forbidden"])
def test_another_temperature_and_a_forgotten_ban_are_caught(kind: models.Kind, wrong: Drawn) -> None:
    """Each of them at temperature 1, or with the end tokens allowed, is another number."""
    policy, _, batch = asked(kind)
    right, annotated, output = Drawn(), policy.annotate(batch), policy(batch)
    with torch.no_grad():
        others = by_hand(kind, right, wrong, wrong, wrong)
        own = by_hand(kind, wrong, right, right, right)
        elsewhere = by_hand(kind, right, right, right, right, "{prompt}")["teacher_logprobs"]
    for name in ("ref_logprobs", "teacher_logprobs", "teacher_baseline", "divergence", "entropy"):
        assert caught(others[name], getattr(annotated if name in ANNOTATED else output, name)[batch.mask]), name
    assert caught(own["logprobs"], output.logprobs[batch.mask])
    assert caught(own["values"], annotated.values[:, 0][batch.mask])
    assert caught(elsewhere, annotated.teacher_logprobs[batch.mask]), "behind the policy's own prompt"


def caught(one: Tensor, other: Tensor) -> bool:
    """No matter of rounding."""
    return bool((one - other.detach()).abs().max() > 1e-3)
