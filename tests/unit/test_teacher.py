"""A teacher for the policy's own texts: what it reads, where its answers come to lie, and what is refused."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from exact import models
from exact.world import same
from instant_reward.batch import Batch, collate
from instant_reward.credit import Source
from instant_reward.policies.causal import CausalPolicy
from instant_reward.policies.optimizer import Optimization
from instant_reward.policies.teacher import shown_to_teacher
from instant_reward.sampling.draw import Settings
from instant_reward.types import CriticNeed, Needs, Prompt, Rollout, TeacherNeed, UserError
from tiny import CONTEXT, END, shared_tokenizer, tiny_folder, tiny_llama, tiny_tokenizer

SETTINGS = Settings(max_new_tokens=6, min_new_tokens=2, temperature=0.8)
SEES = "{prompt} (the answer is {answer})"


@pytest.fixture(scope="module")
def policy() -> CausalPolicy:
    """A policy that has moved away from its teacher, which is the policy as it was."""
    made = models.policy()
    need = TeacherNeed(whole=True, baseline=True)
    made.prepare(Optimization(), Needs(teacher=need))
    with torch.no_grad():
        generator = torch.Generator().manual_seed(1)
        for parameter in made.model.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype))
    return made


@pytest.fixture(scope="module")
def rollouts(policy: CausalPolicy) -> list[Rollout]:
    prompts = [
        replace(prompt, info={"answer": answer})
        for prompt, answer in zip(models.prompts(4, 9), ("good", "a bad movie"), strict=True)
    ]
    return models.sample(policy, prompts, SETTINGS, 3)


def whole(model: object, ids: list[int], first: int, rollout: Rollout) -> Tensor:
    """Log-probabilities of every next token at the sampled places, ``[sampled, V]``, by a pass of its own."""
    logits = model(input_ids=torch.tensor([ids]), use_cache=False).logits[0] / 0.8  # type: ignore[operator]
    end = shared_tokenizer().eos_token_id
    rows = []
    for t in range(first, len(ids)):
        row = logits[t - 1].clone()
        if t - first < rollout.forbidden_end:
            row[end] = -1e30
        rows.append(row.log_softmax(-1))
    return torch.stack(rows)


@pytest.mark.parametrize("sees", [None, SEES, "{answer}"], ids=["the prompt", "more", "less"])
def test_it_is_asked_about_the_same_tokens_behind_its_own_prompt(
    policy: CausalPolicy, rollouts: list[Rollout], sees: str | None
) -> None:
    """What the teacher says lies at the policy's tokens, whatever stood before them; so do the KLs of both kinds.

    baseline = -KL(p, teacher | x_<t) over the whole vocabulary, divergence the same with gradient
    """
    batch = collate(rollouts, pad_id=policy.pad_id, dtype=torch.float64)
    if sees is not None:
        batch.shown = shown_to_teacher(rollouts, sees, policy.tokenizer, policy.pad_id, policy.context)
        assert batch.shown.token_ids.shape[1] != batch.token_ids.shape[1]
    found, output = policy.annotate(batch), policy(batch)
    for row, rollout in enumerate(rollouts):
        sampled = rollout.token_ids[rollout.start :]
        prompt = rollout.prompt.token_ids
        if sees is not None:
            text = sees.format(prompt=rollout.prompt.text, answer=rollout.info["answer"])
            prompt = shared_tokenizer()(text)["input_ids"]
        with torch.no_grad():
            theirs = whole(policy.reference, [*prompt, *sampled], len(prompt), rollout)
            ours = whole(policy.model, rollout.token_ids, rollout.start, rollout)
        gap = torch.where(ours > -1e20, ours.exp() * (ours - theirs), 0.0).sum(1)
        on = batch.mask[row]
        assert same(found.teacher_logprobs[row][on], theirs[range(len(sampled)), sampled])
        assert same(found.teacher_baseline[row][on], -gap)
        assert same(output.divergence[row][on], gap)
        assert float(gap.abs().max()) > 1e-3
    assert not found.teacher_logprobs[~batch.mask].any()
    for tokens in (1, 40):
        again = policy.annotate(batch, tokens)
        assert same(again.teacher_logprobs, found.teacher_logprobs)
        assert same(again.teacher_baseline, found.teacher_baseline)


def test_parts_take_what_is_shown_along(policy: CausalPolicy, rollouts: list[Rollout]) -> None:
    """A part of a batch, in any order, is shown its own texts."""
    batch = collate(rollouts, pad_id=policy.pad_id, dtype=torch.float64)
    batch.shown = shown_to_teacher(rollouts, SEES, policy.tokenizer, policy.pad_id, policy.context)
    wanted = policy(batch).divergence
    for rows in ([4], [5, 0], [3, 1, 2]):
        part: Batch = batch.select(rows)
        assert part.shown is not None
        assert same(policy(part).divergence, wanted[rows][:, : part.mask.shape[1]])


def test_gradient_flows_into_the_student_alone(policy: CausalPolicy, rollouts: list[Rollout]) -> None:
    batch = collate(rollouts, pad_id=policy.pad_id, dtype=torch.float64)
    policy.model.zero_grad()
    policy(batch).divergence.sum().backward()
    assert any(parameter.grad.any() for parameter in policy.model.parameters())
    assert all(parameter.grad is None for parameter in policy.reference.parameters())
    policy.model.zero_grad()


def test_a_missing_column_is_named_with_those_there_are(policy: CausalPolicy, rollouts: list[Rollout]) -> None:
    for template in ("{prompt} {hint}", "{0}", "{prompt", "{answer.length}", "{answer[word]}"):
        with pytest.raises(UserError, match=r"algorithm\.teacher\.sees: .*p0.*columns are answer, prompt"):
            shown_to_teacher(rollouts, template, policy.tokenizer, policy.pad_id, policy.context)


def test_a_text_that_is_too_long_for_the_teacher_is_refused(policy: CausalPolicy, rollouts: list[Rollout]) -> None:
    with pytest.raises(UserError, match=rf"teacher would have to read \d+ tokens and can read {CONTEXT}; shorten"):
        shown_to_teacher(rollouts, "{prompt}" + 200 * " good", policy.tokenizer, policy.pad_id, policy.context)


@pytest.mark.parametrize("what", ["teacher", "critic"])
def test_a_model_with_another_tokenizer_is_refused(tmp_path: Path, what: str) -> None:
    other = tiny_tokenizer()
    other.add_tokens(["another"])
    folder = str(tiny_folder(tmp_path / "other", tokenizer=other))
    needs = {"teacher": Needs(teacher=TeacherNeed(folder)), "critic": Needs(critic=CriticNeed(folder))}[what]
    with pytest.raises(UserError, match=rf"algorithm\.{what}\.model: .*another tokenizer"):
        models.policy().prepare(Optimization(), needs)


def test_another_model_teaches_and_another_ones_trunk_judges(tmp_path: Path) -> None:
    """A model of another size: as a teacher it is frozen, as a critic it is trained."""
    folder = str(tiny_folder(tmp_path / "other", tiny_llama(seed=5, dtype=torch.float32, hidden_size=16)))
    policy = models.policy("llama", torch.float32)
    policy.prepare(Optimization(), Needs(teacher=TeacherNeed(folder), critic=CriticNeed(folder, outputs=1)))
    prompt = Prompt("p", "the", shared_tokenizer()("the movie")["input_ids"])
    texts = models.sample(policy, [prompt], SETTINGS, 2)
    batch = policy.annotate(collate(texts, [Source("final")], pad_id=policy.pad_id))
    assert batch.teacher_logprobs[batch.mask].ne(0).all()
    policy.backward((policy(batch).values - 1.0).pow(2).sum())
    assert not any(parameter.requires_grad for parameter in policy.teacher.parameters())
    assert policy.critic is not None
    assert policy.critic.value is not None
    assert policy.critic.value.weight.shape == (1, 16)
    assert policy.critic.value.weight.grad.any()
    assert all(parameter.requires_grad for parameter in policy.critic.base.parameters())


def test_the_end_token_is_a_token_like_any_other(policy: CausalPolicy, rollouts: list[Rollout]) -> None:
    """Texts that ended are judged at their end token too."""
    ended = [rollout for rollout in rollouts if rollout.stop == "ended"]
    assert ended
    batch = policy.annotate(collate(ended, pad_id=policy.pad_id, dtype=torch.float64))
    last = batch.length - 1
    assert shared_tokenizer().convert_tokens_to_ids(END) in batch.token_ids[range(len(ended)), last]
    assert (batch.teacher_logprobs[range(len(ended)), last] < 0).all()
