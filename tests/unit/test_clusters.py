"""Clustering by reward: obvious clusters are found without a label, and what was seen hangs on earlier steps alone."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import instant_reward as ir
from deciding import WORDS, classifier_folder, tiny_classifier
from instant_reward.config import Config
from instant_reward.rewards.clusters import Clusters
from instant_reward.types import UserError

GREAT = ["the film was great", "a joy", "great joy", "the great joy", "a film was a joy"]
DULL = ["slow", "dull long", "slow long", "not dull", "long not slow"]


def words(texts: Sequence[str]) -> np.ndarray:
    return np.array([[text.split().count(word) for word in WORDS] for text in texts], dtype=float)


@pytest.mark.parametrize("seed", range(3))
def test_two_obvious_clusters_are_found(tmp_path: Path, seed: int) -> None:
    folder = classifier_folder(tmp_path / "model", labels=["one", "two"])
    values = {
        "model": {"name": str(folder), "dtype": "float32"},
        "data": {"prompts": [*GREAT, *DULL]},
        "algorithm": {"name": "rloo"},
        "sampling": {"max_new_tokens": 1},
        "train": {"steps": 60, "prompts_per_step": 10, "group_size": 4, "learning_rate": 3e-3, "threads": 1},
        "seed": seed,
        "out": str(tmp_path / "run"),
    }
    done = ir.train(Config.build(values), rewards=[Clusters(["one", "two"], words)])
    chosen = [text.text for text in done.policy.sample([*GREAT, *DULL], temperature=0)]
    assert len(set(chosen[:5])) == 1
    assert len(set(chosen[5:])) == 1
    assert chosen[0] != chosen[-1]


def assigned(labels: Sequence[str]) -> list[Any]:
    policy = tiny_classifier(labels=["one", "two"])
    texts = policy.sample([*GREAT, *DULL])
    return [replace(text, text=label) for text, label in zip(texts, labels, strict=True)]


def scores(reward: Clusters, texts: list[Any]) -> list[float | None]:
    return [sum(mark.value for mark in ir.replay([reward], text)) for text in texts]


def test_the_right_assignment_earns_more_than_a_wrong_one_and_than_one_cluster_for_all() -> None:
    right, wrong = ["one"] * 5 + ["two"] * 5, ["one", "two"] * 5
    found = {}
    for name, labels in (("right", right), ("wrong", wrong), ("all", ["one"] * 10)):
        reward, texts = Clusters(["one", "two"], words), assigned(labels)
        assert scores(reward, texts) == [0] * 10  # nothing is known before the first step
        reward.observe(texts)
        found[name] = np.mean(scores(reward, texts))
    assert found["right"] > found["wrong"] + 0.5
    assert found["right"] > found["all"] + 0.5


def test_a_label_that_is_hardly_used_is_worth_more_with_balance() -> None:
    found = []
    for balance in (0.0, 1.0):
        reward = Clusters(["one", "two"], words, balance=balance)
        reward.observe(assigned(["two"] + ["one"] * 9))
        found.append(scores(reward, assigned(["two"] * 10)))
    gained = [more - less for less, more in zip(*found, strict=True)]  # type: ignore[operator]
    assert gained == pytest.approx([-np.log(2 / 12 * 2)] * 10)


def test_its_memory_goes_into_checkpoints() -> None:
    texts = assigned(["one"] * 5 + ["two"] * 5)
    before, after = Clusters(["one", "two"], words), Clusters(["one", "two"], words)
    before.observe(texts)
    after.load_state_dict(json.loads(json.dumps(before.state_dict())))
    assert scores(after, texts) == scores(before, texts)
    before.observe(texts[:3])
    assert scores(after, texts) != scores(before, texts)


def test_bad_settings_are_named() -> None:
    for options, complaint in (
        ({"labels": ["one"]}, "at least two"),
        ({"labels": ["a", "b"], "decay": 0.0}, "decay"),
        ({"labels": ["a", "b"], "balance": -1.0}, "balance"),
    ):
        with pytest.raises(UserError, match=complaint):
            Clusters(embed=words, **options)  # type: ignore[arg-type]
    reward = Clusters(["a", "b"], words)
    with pytest.raises(UserError, match="'one' is none of 'a', 'b'"):
        reward.observe(assigned(["one"] * 10))
