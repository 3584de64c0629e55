"""A log of decisions as data: read from columns, learned from, and refused where it cannot be right."""

from __future__ import annotations

import math
import random
from pathlib import Path
from typing import Any

import pytest

import instant_reward as ir
from deciding import classifier_folder
from instant_reward.collect import logged_groups
from instant_reward.config import Config, LoggedConfig
from instant_reward.rewards.logged import logged
from instant_reward.types import UserError

RIGHT = {"the film was great": "good", "a joy": "good", "the film was dull": "bad", "slow": "bad"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return classifier_folder(tmp_path_factory.mktemp("classifier") / "model")


def log(count: int = 200) -> list[dict[str, Any]]:
    """Decisions of somebody who mostly says "bad"."""
    draw = random.Random(0)
    rows = []
    for number in range(count):
        text, right = list(RIGHT.items())[number % len(RIGHT)]
        action, chance = draw.choices([("bad", 0.8), ("good", 0.1), ("fine", 0.1)], [0.8, 0.1, 0.1])[0]
        rows.append({"prompt": text, "action": action, "reward": float(action == right), "propensity": chance})
    return rows


def learn(folder: Path, out: Path, rows: list[dict[str, Any]], **algorithm: Any) -> ir.Run:
    values = {
        "model": {"name": str(folder), "dtype": "float32"},
        "data": {"prompts": rows, "logged": {"propensity": "propensity"}},
        "algorithm": algorithm,
        "sampling": {"max_new_tokens": 1},
        "train": {"steps": 60, "prompts_per_step": 32, "learning_rate": 3e-3, "threads": 1},
        "out": str(out),
    }
    return ir.train(Config.build(values), rewards=[])


@pytest.mark.parametrize(
    "algorithm",
    [
        {"name": "reinforce", "baseline": "running_mean", "importance": {"level": "sequence", "most": None}},
        {"name": "reinforce", "importance": {"level": "sequence", "most": None, "self_normalised": True}},
        {"name": "doubly_robust"},
    ],
    ids=["inverse propensity", "self-normalised", "doubly robust"],
)
def test_it_learns_what_the_log_shows(folder: Path, tmp_path: Path, algorithm: dict[str, Any]) -> None:
    """The log's own habit earns 0.45; what it shows of the other labels is worth more."""
    done = learn(folder, tmp_path / "run", log(), **algorithm)
    chosen = done.policy.sample(list(RIGHT), temperature=0)
    assert [text.text for text in chosen] == list(RIGHT.values())
    assert "effective_sample_size" in done.metrics[0]


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"propensity": 0.0}, "prompt 1 has 0.0 in its column 'propensity'; it must be above 0 and at most 1"),
        ({"propensity": 1.5}, "at most 1"),
        ({"propensity": "often"}, "'often' in its column 'propensity'"),
        ({"reward": float("nan")}, "prompt 1 .*nan.*'reward'"),
        ({"action": "superb"}, "label 'superb'"),
        ({"action": None}, "prompt 1 .*None.*'action'"),
    ],
)
def test_bad_rows_are_named(folder: Path, tmp_path: Path, change: dict[str, Any], complaint: str) -> None:
    rows = log(3)
    rows[1] |= change
    with pytest.raises(UserError, match=complaint):
        learn(folder, tmp_path / "run", rows, name="doubly_robust")


def test_missing_columns_are_named(folder: Path, tmp_path: Path) -> None:
    rows = [{key: value for key, value in row.items() if key != "propensity"} for row in log(3)]
    with pytest.raises(UserError, match="no column 'propensity'"):
        learn(folder, tmp_path / "run", rows, name="doubly_robust")


@pytest.mark.parametrize("name", ["reinforce", "qac", "rloo"])
def test_what_takes_the_log_for_its_own_texts_is_refused(folder: Path, tmp_path: Path, name: str) -> None:
    with pytest.raises(UserError, match="doubly_robust"):
        learn(folder, tmp_path / "run", log(3), name=name, **({"critic": {"lam": 1.0}} if name == "qac" else {}))


def test_a_log_of_several_steps_is_refused(folder: Path) -> None:
    with pytest.raises(UserError, match="self_normalised"):
        Config.build({"data": {"prompts": ["a"]}, "algorithm": {"importance": {"self_normalised": True}}})
    with pytest.raises(UserError, match="leave out completion"):
        Config.build({"data": {"prompts": ["a"], "logged": {}, "completion": "label"}})


def test_a_logged_decision_keeps_the_chance_it_was_taken_with(folder: Path) -> None:
    policy = ir.load_policy(str(folder))
    rows = log(8)
    groups = logged_groups(policy.prompts(rows, "prompt", 0), LoggedConfig(), policy)
    for row, (text,) in zip(rows, groups, strict=True):
        assert text.text == row["action"]
        assert text.logprobs == [pytest.approx(math.log(row["propensity"]))]
        assert text.stop == "ended"


def test_the_log_says_nothing_of_what_was_not_done(folder: Path) -> None:
    policy = ir.load_policy(str(folder))
    texts = policy.sample(log(8), per_prompt=6, rewards=[logged()])
    assert {text.text == text.info["action"] for text in texts} == {True, False}
    for text in texts:
        found = [mark.value for mark in text.marks]
        assert found == ([text.info["reward"]] if text.text == text.info["action"] else [])
