"""Texts of a file: which may be learned from by ratios, and where a reward that stops texts ends them."""

from __future__ import annotations

import json
from dataclasses import fields, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import instant_reward as ir
from exact import models
from exact.turns import answered, by_parity
from exact.world import World, chance
from instant_reward.batch import collate
from instant_reward.collect import actions_for, check_recorded
from instant_reward.config import Config
from instant_reward.credit import Source
from instant_reward.records import rollout_from_record, rollout_record
from instant_reward.rewards.base import as_rewards
from instant_reward.rewards.scope import replay_groups
from instant_reward.rewards.watch import Watch
from instant_reward.sampling.draw import Settings
from instant_reward.types import Prompt, Rollout, UserError
from tiny import tiny_folder, tiny_policy

FINAL = ir.reward(every="end", name="final")(lambda view: chance(f"{view.text} {view.done}"))
WORDS = ir.reward(every="word", name="words")(lambda view: chance(view.text))
RESHAPED: list[dict[str, Any]] = [{"top_p": 0.5}, {"top_k": 3}]
RATIOS = [
    *[{"name": name} for name in ("ppo", "grpo", "reinforce++", "dapo", "gspo", "cispo", "vtrace", "decoupled_ppo")],
    *[{"name": "reinforce", "importance": level} for level in ("token", "sequence", "decision")],
    {"name": "awr", "importance": "sequence"},
]
IMITATING = [{"name": name} for name in ("raft", "rwr", "awr", "value", "ilql")]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_folder(tmp_path_factory.mktemp("tiny") / "model")


@pytest.fixture(scope="module")
def recorded(folder: Path) -> dict[str, Path]:
    """Two files of texts that the policy drew: from its own softmax, and from what top-p left of it."""
    policy = ir.load_policy(str(folder), dtype="float32")
    found = {}
    for name, options in (("plain", {}), ("reshaped", {"top_p": 0.5})):
        texts = policy.sample(["it was", "a"], per_prompt=2, max_new_tokens=4, seed=1, **options)
        found[name] = folder.parent / f"{name}.jsonl"
        found[name].write_text("\n".join(json.dumps(rollout_record(one)) for one in texts))
    return found


def learn(folder: Path, file: Path, out: Path, algorithm: dict[str, Any]) -> ir.Run:
    values = {
        "model": {"name": str(folder), "dtype": "float32"},
        "data": {"rollouts": str(file)},
        "algorithm": algorithm,
        "sampling": {"max_new_tokens": 4},
        "train": {"steps": 1, "prompts_per_step": 2, "group_size": 2},
        "out": str(out),
    }
    return ir.train(Config.build(values), rewards=[FINAL])


@pytest.mark.parametrize("options", RESHAPED)
def test_a_text_remembers_that_its_distribution_was_reshaped(options: dict[str, Any]) -> None:
    """Kept sets do not travel along, so the text has to say it, in its record too."""
    policy = tiny_policy()
    (text,) = policy.sample(["it was"], max_new_tokens=3, **options)
    assert text.reshaped
    assert rollout_from_record(json.loads(json.dumps(rollout_record(text)))).reshaped
    (plain,) = policy.sample(["it was"], max_new_tokens=3)
    assert not plain.reshaped
    assert not rollout_from_record(rollout_record(plain)).reshaped
    before = rollout_record(text)
    del before["reshaped"]  # written by an older version
    assert not rollout_from_record(before).reshaped
    for one, ratios in ((text, False), (plain, True)):
        check_recorded([[one]], policy, ratios=ratios)
    with pytest.raises(UserError, match=rf"data\.rollouts: the text {text.id} was drawn with top-k, top-p or guidance"):
        check_recorded([[plain], [plain, text]], policy, ratios=True)


@pytest.mark.parametrize("algorithm", RATIOS, ids=str)
def test_ratios_to_reshaped_texts_are_refused(
    folder: Path, recorded: dict[str, Path], tmp_path: Path, algorithm: dict[str, Any]
) -> None:
    """log p - log q is no log-ratio where q is not what drew: E_q[ p / q ] = 1 no longer holds."""
    with pytest.raises(UserError, match="was drawn with top-k, top-p or guidance, so ratios"):
        learn(folder, recorded["reshaped"], tmp_path / "reshaped", algorithm)
    assert not (tmp_path / "reshaped").exists()


@pytest.mark.parametrize("algorithm", [RATIOS[0], RATIOS[8]], ids=str)
def test_plain_ones_are_taken(
    folder: Path, recorded: dict[str, Path], tmp_path: Path, algorithm: dict[str, Any]
) -> None:
    row = learn(folder, recorded["plain"], tmp_path / "plain", algorithm).metrics[0]
    assert row["effective_sample_size"] == pytest.approx(1.0, abs=1e-3), "the same policy drew them"


@pytest.mark.parametrize("algorithm", IMITATING, ids=str)
def test_whoever_imitates_takes_reshaped_ones(
    folder: Path, recorded: dict[str, Path], tmp_path: Path, algorithm: dict[str, Any]
) -> None:
    assert learn(folder, recorded["reshaped"], tmp_path / "reshaped", algorithm).step == 1


@ir.reward(every="token", name="stop")
def twice(view: ir.View) -> Any:
    """Ends a text with its second letter "a", and says nothing before."""
    return ir.stop(chance(view.text)) if view.text.count("a") == 2 else None


def live(world: World, number: int, rewards: list[Any]) -> tuple[list[Any], int | None, str]:
    """A text as live scoring sees it, token by token until a reward stops it: marks, length, characters."""
    watch, text, stopped = Watch(rewards, world.decoder), world.texts[number], None
    rollout = world.rollouts([])[number]
    watch.open(0, rollout.prompt)
    for t, token in enumerate(text):
        _, stopped = watch.feed(0, [token], done=t == len(text) - 1)
        if stopped is not None:
            break
    characters, _, marks = watch.close(0)
    return marks, stopped, characters


@pytest.mark.parametrize("turns", [False, True], ids=["one turn", "several"])
def test_a_text_ends_where_a_reward_stops_it(turns: bool) -> None:
    """Replayed, a text is cut at the token with which live scoring would have stopped it, and it counts as stopped.

    Every text of the small world. What is expected beyond it is nothing: it was not cut off by its length.
    """
    world = World()
    rewards = as_rewards([WORDS, twice, FINAL])
    stopped_early = 0
    for number, rollout in enumerate(world.rollouts([])):
        given = answered(rollout, by_parity) if turns else replace(rollout, info={})
        whole = {one.name: getattr(given, one.name) for one in fields(Rollout)}
        marks, stopped, characters = live(world, number, rewards)
        replay_groups(rewards, [given])
        assert [(one.source, one.value) for one in given.marks] == [(one.source, one.value) for one in marks]
        assert given.text == characters
        if stopped is None:
            assert (given.stop, given.token_ids) == (whole["stop"], whole["token_ids"])
            continue
        stopped_early += stopped < len(rollout.token_ids)
        by_itself = whole["stop"] == "ended" and len(given.token_ids) == len(whole["token_ids"])
        assert given.stop == ("ended" if by_itself else "stopped")
        assert sum(given.mask) == stopped - rollout.start
        if not turns:
            assert given.marks == marks
            assert len(given.token_ids) == stopped
        for name in ("token_ids", "mask", "logprobs", "char_ends", "versions"):
            assert getattr(given, name) == whole[name][: len(given.token_ids)], name
        assert all(mark.seen <= len(given.token_ids) for mark in given.marks)
        batch = collate([given], [Source(one.name) for one in rewards], dtype=torch.float64)
        assert not batch.cut_off.any()
        once = sorted((one.source, one.seen, one.value) for one in given.marks)
        replay_groups(rewards, [given])
        assert sorted((one.source, one.seen, one.value) for one in given.marks) == once, "again"
    assert stopped_early >= 5


def test_replayed_texts_are_the_live_ones() -> None:
    """The engine with a reward that stops texts, and the same texts written to their end and replayed, are the same.

    A text that ends by itself with the very token at which the reward stops it has ended; one that would have been cut
    off there is stopped.
    """
    rewards = [
        ir.reward(every="token", name="stop")(
            lambda view: ir.stop(chance(view.text)) if view.done or view.sampled > 2 + len(view.text) % 9 else None
        ),
        WORDS,
        FINAL,
    ]
    settings = Settings(max_new_tokens=6, temperature=0.8)
    prompts = models.prompts(3, 5, 4)
    written = models.sample(models.policy(), prompts, settings, 6)
    stopped = models.sample(models.policy(), prompts, settings, 6, rewards)
    before = [(one.stop, len(one.token_ids)) for one in written]
    replay_groups(rewards, written)
    for found, wanted in zip(written, stopped, strict=True):
        assert found.logprobs == pytest.approx(wanted.logprobs, abs=1e-10)
        assert replace(found, logprobs=[]) == replace(wanted, logprobs=[])
    after = [(one.stop, len(one.token_ids)) for one in written]
    assert {stop for stop, _ in after} == {"ended", "stopped"}
    assert any(was == ("length", size) and stop == "stopped" for was, (stop, size) in zip(before, after, strict=True))
    assert any(size < was for (_, was), (_, size) in zip(before, after, strict=True))


class TestNumbers:
    @staticmethod
    def written(value: object) -> list[Any]:
        policy: Any = SimpleNamespace(actions_of=lambda text, prompt: [text])
        return actions_for(Prompt("7", "a film", [1], info={"label": value}), "label", policy)

    @pytest.mark.parametrize(("value", "text"), [(3, "3"), (1.0, "1"), (True, "1"), (0, "0")])
    def test_a_label_that_is_a_number_is_read_as_its_text(self, value: object, text: str) -> None:
        assert self.written(value) == [text]

    @pytest.mark.parametrize("value", [None, "", float("nan")])
    def test_nothing_is_no_label(self, value: object) -> None:
        with pytest.raises(UserError, match=r"prompt 7 has no text in its column 'label'"):
            self.written(value)
