"""Rewards that look beyond their own text: at siblings, and at what the run wrote before."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

import instant_reward as ir
from instant_reward.config import Config
from instant_reward.types import Rollout
from tiny import tiny_folder, tiny_policy

PROMPTS = ["it was", "a film of", "the movie"]


@ir.reward(scope="group")
def rank(views: list[ir.View]) -> list[float]:
    """How many siblings are shorter; whoever asks with other texts, or one by one, gets something else."""
    assert all(view.done and view.text == view.piece for view in views)
    assert len({view.prompt.id for view in views}) == 1
    return [float(sum(len(other.text) < len(view.text) for other in views)) for view in views]


class Familiar:
    """Pays for each token how often earlier steps wrote it."""

    name, every, scope = "familiar", "token", "run"

    def __init__(self) -> None:
        self.counts: dict[str, int] = {}
        self.told = 0

    def __call__(self, view: ir.View) -> float:
        return float(self.counts.get(view.piece, 0))

    def observe(self, rollouts: Sequence[Rollout]) -> None:
        self.told += 1
        for rollout in rollouts:
            for mark in rollout.marks:
                if mark.source == self.name:
                    ends = [0, *rollout.char_ends]
                    piece = rollout.text[ends[mark.start] : ends[mark.end]]
                    self.counts[piece] = self.counts.get(piece, 0) + 1

    def state_dict(self) -> dict[str, Any]:
        return {"counts": dict(self.counts), "told": torch.tensor(self.told)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.counts, self.told = dict(state["counts"]), int(state["told"])


def run(path: Path, rewards: list[Any], resume: bool = False, **train: Any) -> ir.Run:
    folder = path / "model"
    if not folder.exists():
        tiny_folder(folder)
    values = {
        "model": {"name": str(folder), "dtype": "float32"},
        "data": {"prompts": PROMPTS},
        "algorithm": {"name": "reinforce", "baseline": "running_mean"},
        "sampling": {"max_new_tokens": 5},
        "train": {"prompts_per_step": 2, "group_size": 3, "learning_rate": 1e-2, "samples": "all", **train},
        "out": str(path / "run"),
    }
    return ir.train(Config.build(values), rewards=rewards, resume=resume)


@pytest.mark.parametrize("rows", [2, 64])
def test_siblings_are_compared_once_all_have_finished(rows: int) -> None:
    """However many texts are decoded side by side, and whoever finishes first."""
    rollouts = tiny_policy().sample(PROMPTS, per_prompt=4, max_new_tokens=8, rewards=[rank], seed=3, rows=rows)
    for group in range(len(PROMPTS)):
        texts = [rollout for rollout in rollouts if rollout.group == group]
        sizes = [len(rollout.text) for rollout in texts]
        assert [rollout.total("rank") for rollout in texts] == [sum(b < a for b in sizes) for a in sizes]
        assert all(mark.seen == len(rollout.token_ids) for rollout in texts for mark in rollout.marks)


def test_live_is_replay_for_a_group() -> None:
    @ir.reward(every="word")
    def short(view: ir.View) -> float:
        return 1.0 if len(view.piece) < 4 else 0.0

    rollouts = tiny_policy().sample(PROMPTS, per_prompt=3, max_new_tokens=8, rewards=[short, rank], seed=1)
    live = [list(rollout.marks) for rollout in rollouts]
    ir.replay_groups([short, rank], rollouts)
    assert [rollout.marks for rollout in rollouts] == live
    with pytest.raises(ir.UserError, match=r"'rank' compares siblings; .*ir\.replay_groups"):
        ir.replay([rank], rollouts[0])


def test_a_group_reward_is_learned_from_and_errors_name_it(tmp_path: Path) -> None:
    assert run(tmp_path / "good", [rank], steps=2).metrics[-1]["reward/rank"] > 0

    @ir.reward(scope="group", name="broken")
    def broken(views: list[ir.View]) -> list[float]:
        return [1.0]

    with pytest.raises(ir.RewardError, match=r"'broken' on prompt .* at step 1 handed back 1 values for 3 texts"):
        run(tmp_path / "bad", [broken], steps=1)


def test_a_reward_of_the_run_reads_what_was_known_when_the_step_began(tmp_path: Path) -> None:
    reward = Familiar()
    found = run(tmp_path, [reward], steps=3)
    assert found.metrics[0]["reward/familiar"] == 0.0, "in the first step nothing is known, however often it is written"
    assert found.metrics[1]["reward/familiar"] > 0.0
    assert reward.told == 3


def test_what_a_reward_remembers_is_in_the_checkpoint(tmp_path: Path) -> None:
    whole = run(tmp_path / "whole", [Familiar()], steps=4, save_every=2).metrics
    run(tmp_path / "apart", [Familiar()], steps=2, save_every=2)
    resumed = run(tmp_path / "apart", [Familiar()], resume=True, steps=4, save_every=2).metrics
    keys = ("reward/familiar", "loss", "length")
    assert [[row[key] for key in keys] for row in resumed] == [[row[key] for key in keys] for row in whole]


def test_scopes_that_cannot_be_are_refused() -> None:
    with pytest.raises(ir.UserError, match="scope='group' compares finished siblings; leave every at 'end'"):
        ir.reward(every="word", scope="group")(lambda views: [0.0 for _ in views])
    with pytest.raises(ir.UserError, match=r"scope='run' needs an object with observe\(rollouts\)"):
        ir.reward(scope="run")(lambda view: 0.0)
    with pytest.raises(ir.UserError, match="scope='world' is unknown"):
        ir.reward(scope="world")(lambda view: 0.0)  # type: ignore[arg-type]


def test_texts_that_are_replayed_end_where_a_reward_stops_them() -> None:
    (rollout,) = tiny_policy().sample(["it was"], max_new_tokens=8, min_new_tokens=8, seed=2)

    @ir.reward(every=3)
    def enough(view: ir.View) -> Any:
        return ir.stop(1.0)

    (live,) = tiny_policy().sample(["it was"], max_new_tokens=8, min_new_tokens=8, seed=2, rewards=[enough])
    ir.replay_groups([enough], [rollout])
    assert (rollout.stop, rollout.token_ids, rollout.text) == ("stopped", live.token_ids, live.text)
    assert rollout.marks == live.marks
