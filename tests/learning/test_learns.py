"""A tiny model learns a tiny task from rewards given while it writes, by every preset, through the public loop."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch

import instant_reward as ir
from instant_reward.presets import PRESETS
from instant_reward.start import load_run_policy
from tiny import tiny_folder, tiny_llama

PROMPTS = ["the movie was", "it was", "a film of"]


@ir.reward(every="token")
def writes_o(view: ir.View) -> float:
    """One for each token that brings the letter."""
    return 1.0 if "o" in view.piece else 0.0


@ir.reward(every="token")
def one_each(view: ir.View) -> float:
    return 1.0


def final(text: str) -> float:
    return text.count("o") / 4


SHORT = {"critic": {"bootstrap": False}}
RUNS: list[tuple[Any, Any]] = [
    ({"name": "reinforce", "scale": "batch"}, writes_o),
    ({"name": "reinforce", "baseline": "running_mean"}, writes_o),
    ({"name": "reinforce", "baseline": "value", "critic": {"model": "head"}}, writes_o),
    ("reinforce++", writes_o),
    ("rloo", writes_o),
    ("rloo", final),
    ({"name": "rloo", "kl": 0.001, "loss": "clipped", "normalise": "tokens"}, writes_o),
    ({"name": "rloo", "kl": 0.01, "kl_as": "loss", "kl_estimator": "k3", "entropy": 0.001}, writes_o),
    ({"name": "rloo", "pieces": "word", "loss": "clipped", "ratio": "piece", "epochs": 2}, writes_o),
    ("grpo", final),
    ({"name": "grpo", "timing": "ignore", "epochs": 2, "minibatches": 2}, writes_o),
    ("dr_grpo", final),
    ("dapo", final),
    ("gspo", final),
    ("cispo", final),
    ("instant", writes_o),
    ({"name": "a2c", **SHORT}, writes_o),
    ({"name": "a2c", "critic": {"model": "head", "detach": False, "bootstrap": False}}, final),
    ({"name": "ppo", "critic": {"bootstrap": False, "clip": 0.2, "warmup": 2}, "epochs": 2, "stop_kl": 0.5}, writes_o),
    ({"name": "ppo", "lam_length": 1.0, **SHORT}, writes_o),
    ({"name": "qac", **SHORT}, writes_o),
    ({"name": "qac", "top_actions": 20, **SHORT}, writes_o),
    ({"name": "vtrace", **SHORT}, writes_o),
    ({"name": "decoupled_ppo", "importance": "token", **SHORT}, writes_o),
    ({"name": "rwr", "beta": 0.05}, final),
    ({"name": "awr", "beta": 0.3, **SHORT}, writes_o),
    ("raft", final),
]


def learned(path: Path, algorithm: Any, rewards: list[Any], steps: int = 40, **sections: Any) -> ir.Run:
    """A run of the tiny model on the task, with further sections of the config."""
    folder = path / "model"
    if not folder.exists():
        tiny_folder(folder)
    train = {"steps": steps, "prompts_per_step": 2, "learning_rate": 1e-2, **sections.pop("train", {})}
    config = ir.Config.build(
        {
            "model": {"name": str(folder), "dtype": "float32"},  # "auto" hangs on the machine
            "data": {"prompts": PROMPTS},
            "algorithm": algorithm,
            "sampling": {"max_new_tokens": 6, **sections.pop("sampling", {})},
            "train": train,
            "out": str(path / f"run{len(list(path.iterdir()))}"),
            **sections,
        }
    )
    return ir.train(config, rewards=rewards)


def score(run: ir.Run, **options: Any) -> float:
    """What the task's reward gives texts of the finished policy, by text."""
    texts = run.policy.sample(PROMPTS, per_prompt=32, max_new_tokens=6, rewards=[writes_o], **options)
    return sum(text.total() for text in texts) / len(texts)


@pytest.mark.parametrize(("algorithm", "reward"), RUNS, ids=lambda one: str(getattr(one, "name", one))[:60])
def test_the_reward_rises(algorithm: Any, reward: Any, tmp_path: Path) -> None:
    run = learned(tmp_path, algorithm, [reward])
    name = "writes_o" if reward is writes_o else "final"
    curve = [row[f"reward/{name}"] for row in run.metrics]
    before, after = sum(curve[:5]) / 5, sum(curve[-5:]) / 5
    assert after > before + 0.3, curve
    assert all(math.isfinite(value) for row in run.metrics for value in row.values())
    assert "o" in run.policy.sample(["it was"], temperature=0.0, max_new_tokens=4)[0].text


def test_every_preset_learns_here() -> None:
    """Those that follow no reward of their own texts have tests of their own below."""
    named = {one if isinstance(one, str) else one["name"] for one, _ in RUNS}
    assert named | {"value", "ilql", "distill", "doubly_robust", "likelihood"} == set(PRESETS)


@pytest.fixture(scope="module")
def given(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Texts of the untrained model, as a run writes them."""
    path = tmp_path_factory.mktemp("given")
    run = learned(path, "value", [writes_o], train={"learning_rate": 1e-7, "prompts_per_step": 4})
    return run.path / "samples.jsonl"


@pytest.mark.parametrize("critic", [{"lam": 1.0}, {"lam": 0.5}, {"table": True}], ids=str)
def test_values_are_fit_to_given_texts(critic: dict[str, Any], given: Path, tmp_path: Path) -> None:
    """What is still to come can be told from the place: a critic that knows only the mean explains nothing of it."""
    algorithm = {"name": "value", "critic": {"bootstrap": False, **critic}}
    run = learned(tmp_path, algorithm, [one_each], steps=60, data={"rollouts": str(given)})
    explained = [row["explained_variance"] for row in run.metrics]
    assert abs(explained[0]) < 0.15
    assert sum(explained[-10:]) / 10 > 0.3, explained
    assert all(row["tokens"] > 0 for row in run.metrics), "the given texts' tokens are counted"


def test_decoding_guided_by_values_of_given_texts(given: Path, tmp_path: Path) -> None:
    algorithm = {
        "name": "ilql", "cql": 0.001, "target_rate": 0.1,
        "critic": {"model": "head", "learning_rate": 3e-2, "bootstrap": False},
    }  # fmt: skip
    run = learned(
        tmp_path,
        algorithm,
        [writes_o],
        data={"rollouts": str(given)},
        sampling={"guide": 8.0},
        train={"learning_rate": 1e-3, "prompts_per_step": 4},
    )
    plain, guided = score(run), score(run, guide=8.0)
    assert guided > plain + 1.0, (plain, guided)
    kept, config = load_run_policy(run.path)
    assert config.sampling.guide == 8.0
    again = kept.sample(PROMPTS, per_prompt=4, max_new_tokens=6, guide=8.0)
    assert [one.text for one in again] == [
        one.text for one in run.policy.sample(PROMPTS, per_prompt=4, max_new_tokens=6, guide=8.0)
    ]


@pytest.mark.parametrize("way", [{}, {"discount": 1.0}, {"baseline": True}, {"whole": True}], ids=str)
def test_a_teacher_is_followed(way: dict[str, Any], tmp_path: Path) -> None:
    teacher = tiny_folder(tmp_path / "teacher", tiny_llama(seed=7, dtype=torch.float32))
    # With discount 1 a token answers for all that follows it, which is noisy without siblings to compare with.
    baseline = {"baseline": "leave_one_out"} if way.get("discount") else {}
    run = learned(tmp_path, {"name": "distill", "teacher": {"model": str(teacher), **way}, **baseline}, [])
    # With discount 1 it is the whole text's KL that falls: the KL per token may rise meanwhile, as texts end sooner.
    away = [row["teacher_kl"] * (row["length"] if way.get("discount") else 1.0) for row in run.metrics]
    assert sum(away[-5:]) < 0.75 * sum(away[:5]), away


def test_the_policy_learns_what_it_would_have_said_knowing_more(tmp_path: Path) -> None:
    """The teacher is the model itself, which reads the answer before the prompt."""
    prompts = [{"prompt": text, "answer": "good good good"} for text in PROMPTS]
    algorithm = {"name": "distill", "teacher": {"sees": "{answer} {prompt}", "whole": True}}
    run = learned(tmp_path, algorithm, [], data={"prompts": prompts})
    away = [row["teacher_kl"] for row in run.metrics]
    assert sum(away[-5:]) < 0.75 * sum(away[:5]), away


def test_old_texts_are_learned_from_again(tmp_path: Path) -> None:
    run = learned(
        tmp_path,
        {"name": "rloo", "importance": "sequence"},
        [writes_o],
        train={"replay": {"groups": 2, "staleness": 3}},
    )
    rows = run.metrics
    assert rows[0]["staleness"] == 0.0
    assert all(0.0 < row["staleness"] <= 3.0 for row in rows[1:])
    assert all(0.0 < row["effective_sample_size"] <= 1.0 for row in rows)
    assert rows[-1]["reward"] > rows[0]["reward"] + 0.3


def test_weights_follow_their_targets(tmp_path: Path) -> None:
    """A KL above its target raises its weight, an entropy below its target raises the entropy's."""
    algorithm = {
        "name": "rloo", "kl": 0.01, "kl_target": 0.001, "kl_horizon": 32, "entropy": 0.01, "entropy_target": 8.0,
    }  # fmt: skip
    run = learned(tmp_path, algorithm, [writes_o], steps=10)
    first, last = run.metrics[2], run.metrics[-1]
    assert last["weight/kl"] > first["weight/kl"] > 0.0
    assert last["weight/entropy"] > first["weight/entropy"] > 0.0


def test_the_reference_moves_along(tmp_path: Path) -> None:
    kept = learned(tmp_path, {"name": "rloo", "kl": 1e-6}, [writes_o], steps=12)
    moved = learned(tmp_path, {"name": "rloo", "kl": 1e-6, "reset_reference": 4}, [writes_o], steps=12)
    assert moved.metrics[3]["kl"] == kept.metrics[3]["kl"]
    assert moved.metrics[4]["kl"] == pytest.approx(0.0, abs=1e-6)
    assert abs(kept.metrics[4]["kl"]) > 1e-3


def test_training_ends_when_the_target_holds(tmp_path: Path) -> None:
    config = ir.Config.build(
        {
            "model": str(tiny_folder(tmp_path / "model")),
            "data": {"prompts": ["it was"]},
            "sampling": {"max_new_tokens": 4},
            "train": {"steps": 30, "stop_when": {"metric": "length", "above": 1.0, "for_steps": 3}, "group_size": 2},
            "out": str(tmp_path / "run"),
        }
    )
    assert ir.train(config, rewards=[final]).step == 3


def test_a_target_that_is_no_metric_is_named_with_the_ones_there_are(tmp_path: Path) -> None:
    config = ir.Config.build(
        {
            "model": str(tiny_folder(tmp_path / "model")),
            "data": {"prompts": ["it was"]},
            "sampling": {"max_new_tokens": 4},
            "train": {"steps": 3, "stop_when": {"metric": "rewrad", "above": 1.0}, "group_size": 2},
            "out": str(tmp_path / "run"),
        }
    )
    with pytest.raises(ir.UserError, match=r"rewrad.*use one of .*reward"):
        ir.train(config, rewards=[final])


def test_group_rewards_that_lose_their_timing_are_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(ir.UserError, match=r"writes_o.*algorithm\.timing=ignore"):
        ir.train(model="unused", prompts=["a"], rewards=[writes_o], algorithm="grpo", out=tmp_path / "run")
