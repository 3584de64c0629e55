"""Likelihood beside a reward in one run: demonstrations first, then both, with a weight that follows a schedule."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import instant_reward as ir
from instant_reward.config import Config
from instant_reward.screen import Screen
from instant_reward.train import learn, prepare
from tiny import tiny_folder
from what_counts import plain, weights

PAIRS = [{"prompt": "the movie", "answer": " was good"}, {"prompt": "it", "answer": " was not bad"}]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_folder(tmp_path_factory.mktemp("tiny") / "model")


def vowels(text: str) -> float:
    return sum(character in "aeiou" for character in text) / max(1, len(text))


def config(model: Path, out: Path, supervised: dict[str, Any] | None, algorithm: Any = None, **train: Any) -> Config:
    given = {"data": {"prompts": PAIRS, "completion": "answer"}, "texts_per_step": 2}
    values: dict[str, Any] = {
        "model": {"name": str(model), "dtype": "float32"},
        "data": {"prompts": ["the movie", "it"]},
        "algorithm": algorithm or {"name": "rloo", "kl": 0.05},
        "sampling": {"max_new_tokens": 5},
        "train": {"steps": 6, "prompts_per_step": 2, "group_size": 2, "learning_rate": 2e-3, **train},
        "out": str(out),
    }
    if supervised is not None:
        values["supervised"] = {**given, **supervised}
    return Config.build(values)


def test_demonstrations_first_then_both_then_the_reward_alone(model: Path, tmp_path: Path) -> None:
    weight = {"rule": "steps", "start": 1.0, "at": {5: 0.5, 6: 0.0}}
    run = ir.train(config(model, tmp_path / "run", {"warmup_steps": 3, "weight": weight}), rewards=[vowels])
    warm, later = run.metrics[:3], run.metrics[3:]
    assert all("nll" in row and "reward" not in row and "kl" not in row for row in warm)
    assert all("reward" in row and "nll" not in row for row in later)
    assert [row["supervised/weight"] for row in later] == [1.0, 0.5, 0.0]
    assert ["supervised/nll" in row for row in later] == [True, True, False]
    assert later[0]["supervised/nll"] < warm[0]["nll"]
    assert later[0]["kl"] == pytest.approx(0.0, abs=1e-4), "the reference is what the demonstrations made of the policy"
    assert [sample["text"] for sample in run.samples()[:2]] != []


def test_weight_zero_is_the_run_without(model: Path, tmp_path: Path) -> None:
    beside = ir.train(config(model, tmp_path / "beside", {"weight": 0.0}), rewards=[vowels])
    alone = ir.train(config(model, tmp_path / "alone", None), rewards=[vowels])
    assert weights(beside) == weights(alone)
    both = ir.train(config(model, tmp_path / "both", {"weight": 1.0}), rewards=[vowels])
    assert weights(both) != weights(alone)


@pytest.mark.parametrize("algorithm", [{"name": "ppo", "minibatches": 2, "epochs": 2}, {"name": "rloo", "kl": 0.05}])
def test_a_resumed_run_is_the_unbroken_one(model: Path, tmp_path: Path, algorithm: dict[str, Any]) -> None:
    weight = {"rule": "linear", "start": 1.0, "end": 0.1, "steps": 5}
    supervised = {"warmup_steps": 2, "weight": weight}
    unbroken = ir.train(config(model, tmp_path / "unbroken", supervised, algorithm), rewards=[vowels])
    broken = config(model, tmp_path / "broken", supervised, algorithm, save_every=1)
    for at in (2, 4):
        job = prepare(broken, [vowels], resume=at != 2)

        def killed(policy: ir.Policy, step: int, at: int = at) -> dict[str, float]:
            if step == at:
                raise InterruptedError
            return {}

        with Screen(6) as screen, pytest.raises(InterruptedError):
            learn(job, screen, killed)
    resumed = ir.train(broken, rewards=[vowels], resume=True)
    assert plain(resumed.metrics) == plain(unbroken.metrics)
    assert weights(resumed) == weights(unbroken)


def test_imitation_leads_where_the_reward_alone_does_not(model: Path, tmp_path: Path) -> None:
    """A reward for one whole sentence is hardly ever met by chance: after demonstrations it is."""

    def said(text: str) -> float:
        return float(text in {one["answer"] for one in PAIRS})

    rewards = {}
    for name, steps in (("alone", None), ("warm", {"warmup_steps": 20})):
        run = ir.train(
            config(model, tmp_path / name, steps, {"name": "rloo"}, steps=22, learning_rate=1e-2), rewards=[said]
        )
        rewards[name] = run.metrics[-1]["reward"]
    assert rewards["alone"] == 0.0
    assert rewards["warm"] > 0.5


def test_the_steps_of_a_schedule_count_the_warm_up(model: Path, tmp_path: Path) -> None:
    """Three steps of imitation with one update, three of ppo with four: a cosine ends with the fifteenth."""
    algorithm = {"name": "ppo", "minibatches": 2, "epochs": 2}
    job = prepare(config(model, tmp_path / "run", {"warmup_steps": 3}, algorithm, schedule="cosine"), [vowels])
    assert job.policy.stepper is not None
    assert job.policy.stepper.settings.steps == 3 + 3 * 4


def test_the_likelihood_preset_takes_no_second_source() -> None:
    with pytest.raises(ir.UserError, match="supervised: likelihood learns from given texts already"):
        Config.build(
            {
                "data": {"prompts": PAIRS, "completion": "answer"},
                "algorithm": "likelihood",
                "supervised": {"data": {"prompts": PAIRS, "completion": "answer"}},
            }
        )
