"""Sentences chosen and masks filled: what was sampled is what is learned from, and the step is the exact gradient."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

import instant_reward as ir
from choosing import BLANKS, DOCUMENTS, chances, every_text, tiny_extractive, tiny_masked
from exact.world import chance
from instant_reward import algorithms
from instant_reward.batch import Batch, collate
from instant_reward.config import AlgorithmConfig
from instant_reward.policies.decisions import DecisionPolicy
from instant_reward.policies.optimizer import Optimization
from instant_reward.rewards.base import as_rewards
from instant_reward.rewards.watch import Watch
from instant_reward.types import Prompt, Rollout, UserError


@ir.reward(every="token")
def has_birds(view: ir.View) -> float:
    """One for the sentence with the word."""
    return float("birds" in view.piece.split())


def two_bs(text: str) -> float:
    """Highest, 0, where the text has two; a mask is none."""
    return -abs(text.split().count("b") - 2) / 2


TWO_BS = ir.change(two_bs, every="token")
ANIMALS = [
    "The cats sleep. All birds sing here. No dog barks.",
    "Some birds fly. The fish swim.",
    "Nobody knows. Two mice ran. Three cows. The last birds came.",
]
SPACES = ["[MASK] a [MASK] [MASK]", "[MASK] [MASK] [MASK]", "c [MASK] [MASK]"]


@dataclass(frozen=True)
class Kind:
    """A kind of policy: a tiny one, texts for it, one of which all answers are enumerated, and a small task."""

    name: str
    make: Callable[[torch.dtype], DecisionPolicy]
    texts: list[str]
    few: str
    longest: int
    task: Any
    rows: list[str]
    level: float
    learning_rate: float = 1e-2
    steps: int = 40


KINDS = [
    Kind("extractive", tiny_extractive, DOCUMENTS, DOCUMENTS[0], 3, has_birds, ANIMALS, 0.9),
    Kind("fills", tiny_masked, BLANKS, BLANKS[0], 3, TWO_BS, SPACES, 0.9, 3e-3),
    Kind("edits", lambda dtype: tiny_masked(dtype, edits=True), BLANKS, BLANKS[1], 3, TWO_BS, SPACES, 0.5, 3e-3),
]
every_kind = pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)
SCORE = ir.reward(every="end", name="score")(lambda view: chance(view.text))


def rows(texts: list[str]) -> list[dict[str, Any]]:
    return [{"prompt": text} for text in texts]


def sampled(kind: Kind, policy: DecisionPolicy, **options: Any) -> list[Rollout]:
    return policy.sample(rows(kind.texts), **{"per_prompt": 4, "max_new_tokens": 4, "rows": 5, **options})


def enumerated(policy: DecisionPolicy, prompt: Prompt, longest: int, rewards: list[Any]) -> list[Rollout]:
    """All texts, scored as they are made."""
    watch, found = Watch(as_rewards(rewards), policy.decoder()), []
    for number, actions in enumerate(every_text(policy, prompt, longest)):
        watch.open(number, prompt)
        watch.feed(number, actions, True)
        drafts = watch.drafts(number)
        text, char_ends, marks = watch.close(number)
        count, stop = len(actions), "ended" if policy.over(actions, prompt) else "length"
        found.append(
            Rollout(
                f"x/{number}", number, prompt, actions, [True] * count, [0.0] * count, char_ends, text, marks,
                [0] * count, stop, drafts=drafts,
            )  # type: ignore[arg-type]
        )  # fmt: skip
    return found


def read(policy: DecisionPolicy, batch: Batch) -> Tensor:
    with torch.no_grad():
        return policy(batch).logprobs


@every_kind
def test_what_was_sampled_has_the_chance_it_was_sampled_with(kind: Kind) -> None:
    policy = kind.make(torch.float64)
    for options in ({}, {"temperature": 0.7}, {"temperature": 1.4, "min_new_tokens": 2}):
        texts = sampled(kind, policy, **options)
        batch = collate(texts, dtype=torch.float64)
        gap = (read(policy, batch) - batch.old_logprobs).abs()
        assert float(gap.max()) <= 1e-10, options
        other = replace(batch, temperature=batch.temperature * 1.1)
        assert float((read(policy, other) - batch.old_logprobs).abs().max()) > 1e-3
    likeliest = sampled(kind, policy, temperature=0.0, per_prompt=2)
    assert all(one.token_ids == other.token_ids for one, other in zip(likeliest[::2], likeliest[1::2], strict=True))


@every_kind
def test_in_bfloat16_sampler_and_trainer_agree_to_its_precision(kind: Kind) -> None:
    policy = kind.make(torch.float32)
    policy.compute = torch.bfloat16
    policy.states = policy.new_states()
    batch = collate(sampled(kind, policy))
    assert float((read(policy, batch) - batch.old_logprobs).abs().max()) < 0.05


@every_kind
@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_chances_and_entropies_are_those_of_the_model_alone(kind: Kind, temperature: float) -> None:
    policy = kind.make(torch.float64)
    (prompt,) = policy.prompts(rows([kind.few]), "prompt", kind.longest)
    texts = enumerated(policy, prompt, kind.longest, [])
    wanted = chances(policy, texts).detach()
    assert float(wanted.sum()) == pytest.approx(1.0, abs=1e-10)
    batch = collate(texts, dtype=torch.float64)
    assert torch.allclose(read(policy, batch).sum(1).exp(), wanted, atol=1e-10, rtol=0)
    head = policy.head(policy.model, replace(batch, temperature=temperature))
    table = head.logprobs(slice(None))
    assert torch.allclose(table.exp().sum(1), torch.ones(len(table), dtype=torch.float64), atol=1e-10)
    logprobs, entropies = head.of(batch.token_ids[batch.mask])
    assert torch.allclose(logprobs, table.gather(1, batch.token_ids[batch.mask][:, None])[:, 0], atol=1e-10, rtol=0)
    assert torch.allclose(entropies, -(table.exp() * table).sum(1), atol=1e-10, rtol=0)


@every_kind
def test_nothing_counts_outside_the_mask_and_padding_changes_nothing(kind: Kind) -> None:
    policy = kind.make(torch.float64)
    batch = collate(sampled(kind, policy), dtype=torch.float64)
    whole = read(policy, batch)
    assert not whole[~batch.mask].any()
    some = batch.mask & (torch.arange(batch.mask.shape[1]) % 2 == 1)
    assert torch.allclose(read(policy, replace(batch, mask=some)), whole * some, atol=1e-12, rtol=0)
    for row in range(len(batch)):
        alone = batch.select([row])
        width = alone.token_ids.shape[1]
        assert torch.allclose(read(policy, alone), whole[row : row + 1, :width], atol=1e-10, rtol=0)
    beyond = torch.arange(batch.token_ids.shape[1]) >= batch.length[:, None]
    assert beyond.any()
    padded = replace(batch, token_ids=batch.token_ids.masked_fill(beyond, 7))
    assert torch.allclose(read(policy, padded), whole, atol=1e-10, rtol=0)
    again = [[one.token_ids for one in sampled(kind, policy, rows=count)] for count in (1, 64)]
    assert again[0] == again[1]


@every_kind
def test_the_step_is_the_exact_gradient(kind: Kind) -> None:
    """E[ sum_t grad log p(a_t | a_<t) R ] = grad sum p R, over all texts."""
    policy = kind.make(torch.float64)
    (prompt,) = policy.prompts(rows([kind.few]), "prompt", kind.longest)
    texts = enumerated(policy, prompt, kind.longest, [SCORE])
    by_model = chances(policy, texts)
    worth = torch.tensor([text.total() for text in texts], dtype=torch.float64)
    weights = list(policy.model.parameters())
    wanted = torch.autograd.grad((by_model * worth).sum(), weights, allow_unused=True)
    algorithm = algorithms.build(AlgorithmConfig(name="reinforce", baseline="none"), [SCORE], kind.longest)
    batch = algorithm.credit(collate(texts, algorithm.sources, dtype=torch.float64))
    total = torch.zeros((), dtype=torch.float64)
    for row in range(len(batch)):
        part = replace(batch.select([row]), text_count=1, token_count=int(batch.mask[row].sum()))
        total = total + by_model[row].detach() * algorithm.loss(policy(part), part).loss
    found = torch.autograd.grad(-total, weights, allow_unused=True)
    assert max(float(one.abs().max()) for one in wanted if one is not None) > 1e-3
    for one, other in zip(found, wanted, strict=True):
        one, other = (torch.zeros(1, dtype=torch.float64) if each is None else each for each in (one, other))
        assert torch.allclose(one, other, atol=1e-10, rtol=0)


@every_kind
def test_scoring_live_is_replaying(kind: Kind) -> None:
    policy = kind.make(torch.float64)

    @ir.reward(every="token")
    def seen(view: ir.View) -> float:
        return chance(view.text + "|" + view.piece)

    @ir.reward(every="word")
    def words(view: ir.View) -> Any:
        return ir.stop(chance(view.text)) if view.text.count(" ") == 3 else chance(view.text)

    @ir.reward(every="token")
    def stops(view: ir.View) -> Any:
        return ir.stop(1.0) if view.text.split()[:1] == ["b"] or "Two" in view.text else None

    rewards = [seen, words, SCORE, ir.change(chance, every="token", name="change"), stops]
    texts = sampled(kind, policy, rewards=rewards, per_prompt=8)
    assert {"stopped", "ended"} <= {text.stop for text in texts}
    for text in texts:
        assert ir.replay(rewards, text) == text.marks
        assert text.total("change") == pytest.approx(chance(text.text) - chance(""), abs=1e-12)


def config(kind: Kind, model: Path, out: Path, **changes: Any) -> ir.Config:
    sections: dict[str, Any] = {
        "model": {"name": str(model), "dtype": "float32"},
        "data": {"prompts": rows(kind.rows)},
        "algorithm": {"name": "rloo", "kl": 0.001},
        "sampling": {"max_new_tokens": 3 if kind.name != "edits" else 6},
        "train": {"prompts_per_step": 2, "learning_rate": kind.learning_rate, "threads": 1},
        "out": str(out),
    }
    for name, section in changes.items():
        sections[name] = {**sections[name], **section}
    return ir.Config.build(sections)


@pytest.fixture
def model(kind: Kind, tmp_path: Path) -> Path:
    return kind.make(torch.float32).save(tmp_path / "model")


@every_kind
def test_saved_and_loaded_it_says_the_same(kind: Kind, tmp_path: Path) -> None:
    policy = kind.make(torch.float64)
    batch = collate(sampled(kind, policy), dtype=torch.float64)
    again = ir.load_policy(str(policy.save(tmp_path / "policy")), dtype="float64")
    assert type(again) is type(policy)
    assert torch.allclose(read(again, batch), read(policy, batch), atol=1e-12, rtol=0)  # type: ignore[arg-type]
    with torch.no_grad():
        for weight in again.model.parameters():
            weight.mul_(1.1)
    assert not torch.allclose(read(again, batch), read(policy, batch), atol=1e-3, rtol=0)  # type: ignore[arg-type]
    again = ir.load_policy(str(tmp_path / "policy"), dtype="float64")
    assert [one.text for one in sampled(kind, again)] == [one.text for one in sampled(kind, policy)]  # type: ignore[arg-type]


@every_kind
def test_interrupted_and_resumed_it_is_the_same_run(kind: Kind, model: Path, tmp_path: Path) -> None:
    left = [10**9]

    @ir.reward(every="end")
    def cut(view: ir.View) -> float:
        left[0] -= 1
        if left[0] < 0:
            raise RuntimeError("the power is gone")
        return 0.0

    rewards, saved = [SCORE, cut], {"train": {"steps": 3, "save_every": 1, "group_size": 4}}
    ir.train(config(kind, model, tmp_path / "whole", **saved), rewards=rewards)
    left[0] = 2 * 4 + 1
    with pytest.raises(ir.RewardError, match="power"):
        ir.train(config(kind, model, tmp_path / "cut", **saved), rewards=rewards)
    left[0] = 10**9
    ir.train(config(kind, model, tmp_path / "cut", **saved), rewards=rewards, resume=True)
    kept = [(tmp_path / name / "samples.jsonl").read_text() for name in ("whole", "cut")]
    assert kept[0] == kept[1]
    where = "checkpoints/step-000003/policy/model.safetensors"
    weights = [load_file(tmp_path / name / where) for name in ("whole", "cut")]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])
    begun = load_file(tmp_path / "model" / "model.safetensors")
    assert any(not torch.equal(weights[0][name], begun[name]) for name in begun)


@every_kind
def test_it_learns_a_small_task(kind: Kind, model: Path, tmp_path: Path) -> None:
    train = {"steps": kind.steps, "group_size": 8, "prompts_per_step": 3}
    run = ir.train(config(kind, model, tmp_path / "run", train=train), rewards=[kind.task])
    curve = [row["reward"] for row in run.metrics]
    assert curve[0] < kind.level - 0.3, curve
    assert sum(curve[-5:]) / 5 > kind.level, curve
    assert all(math.isfinite(value) for row in run.metrics for value in row.values())


PRESETS: list[dict[str, Any]] = [
    {"name": "grpo", "timing": "ignore"},
    {"name": "a2c"},
    {"name": "a2c", "critic": {"model": "head", "detach": False}},
    {"name": "ppo", "kl": 0.01, "epochs": 2},
    {"name": "vtrace"},
    {"name": "reinforce", "kl": 0.1, "kl_as": "loss", "kl_estimator": "k3", "entropy": 0.01},
    {"name": "awr"},
    {"name": "raft", "timing": "ignore"},
    {"name": "gspo", "timing": "ignore"},
    {"name": "instant"},
]


@every_kind
@pytest.mark.parametrize("preset", PRESETS, ids=lambda preset: "-".join(map(str, preset.values()))[:40])
def test_presets_run(kind: Kind, preset: dict[str, Any], model: Path, tmp_path: Path) -> None:
    """Critics, references and entropies: two steps of each, the first of which moves the weights."""
    changes: dict[str, Any] = {"train": {"steps": 2, "group_size": 4}, "sampling": {"max_new_tokens": 3}}
    built = config(kind, model, tmp_path / "run", **changes)
    built = built.model_copy(update={"algorithm": AlgorithmConfig(**preset)})
    run = ir.train(built, rewards=[ir.reward(every="token", name="any")(lambda view: chance(view.text))])
    assert len(run.metrics) == 2
    assert run.metrics[0]["grad_norm"] > 0
    assert all(math.isfinite(value) for row in run.metrics for value in row.values())


@every_kind
def test_a_critic_of_next_actions_is_refused(kind: Kind) -> None:
    policy = kind.make(torch.float64)
    algorithm = algorithms.build(AlgorithmConfig(name="qac"), [SCORE], 3)
    with pytest.raises(UserError, match="same actions"):
        policy.prepare(Optimization(), algorithm.needs)


@every_kind
def test_another_model_may_be_the_teacher_and_the_critic(kind: Kind, model: Path, tmp_path: Path) -> None:
    """Distillation from another model of the kind, whose log-ratio is paid at each action; a critic on its trunk."""
    policy = kind.make(torch.float32)
    with torch.no_grad():
        for weight in policy.model.parameters():
            weight.mul_(1.6)
    other = policy.save(tmp_path / "other")
    taught = config(kind, model, tmp_path / "taught", train={"steps": 25, "group_size": 8, "prompts_per_step": 3})
    taught = taught.model_copy(update={"algorithm": AlgorithmConfig(name="distill", teacher={"model": str(other)})})  # type: ignore[arg-type]
    curve = [row["teacher_kl"] for row in ir.train(taught, rewards=[]).metrics]
    assert sum(curve[-5:]) < sum(curve[:5]) * 0.7, curve
    built = config(kind, model, tmp_path / "critic", train={"steps": 2, "group_size": 4})
    critic = AlgorithmConfig(name="a2c", critic={"model": str(other)})  # type: ignore[arg-type]
    assert len(ir.train(built.model_copy(update={"algorithm": critic}), rewards=[SCORE]).metrics) == 2


def test_models_that_read_otherwise_are_no_teachers(tmp_path: Path) -> None:
    folder = str(tiny_extractive(buckets=32).save(tmp_path))
    with pytest.raises(UserError, match="another buckets"):
        tiny_extractive().load_beside(folder, "algorithm.teacher.model")
