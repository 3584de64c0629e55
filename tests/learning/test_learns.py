"""A tiny model learns a tiny task from rewards given while it writes, by every preset, through the public loop."""

from __future__ import annotations

from pathlib import Path

import pytest

import instant_reward as ir
from tiny import tiny_folder


@ir.reward(every="token")
def writes_o(view: ir.View) -> float:
    """One for each token that brings the letter."""
    return 1.0 if "o" in view.piece else 0.0


def final(text: str) -> float:
    return text.count("o") / 4


@pytest.mark.parametrize(
    ("algorithm", "reward"),
    [
        ({"name": "reinforce", "scale": "batch"}, writes_o),
        ("rloo", writes_o),
        ("rloo", final),
        ("grpo", final),
        ({"name": "grpo", "scale": "none"}, final),
        ({"name": "grpo", "timing": "ignore", "epochs": 2, "minibatches": 2}, writes_o),
        ({"name": "rloo", "kl": 0.001, "loss": "clipped", "normalise": "tokens"}, writes_o),
    ],
)
def test_the_reward_rises(algorithm: object, reward: object, tmp_path: Path) -> None:
    run = ir.train(
        model=str(tiny_folder(tmp_path / "model")),
        prompts=["the movie was", "it was", "a film of"],
        rewards=[reward],
        algorithm=algorithm,
        steps=40,
        prompts_per_step=2,
        group_size=8,
        max_new_tokens=6,
        learning_rate=1e-2,
        out=tmp_path / "run",
    )
    name = "writes_o" if reward is writes_o else "final"
    curve = [row[f"reward/{name}"] for row in run.metrics]
    before, after = sum(curve[:5]) / 5, sum(curve[-5:]) / 5
    assert after > before + 0.3, curve
    assert "o" in run.policy.sample(["it was"], temperature=0.0, max_new_tokens=4)[0].text


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
