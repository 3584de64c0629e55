"""Where a step's texts come from: groups of equals sampled again, replay, texts of a file or of a column."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

import instant_reward as ir
from exact import models
from instant_reward.collect import (
    Given,
    Replay,
    Sampled,
    check_source,
    numbered,
    recorded_groups,
    written_groups,
)
from instant_reward.config import Config
from instant_reward.config_weight import LinearWeight
from instant_reward.credit import Source
from instant_reward.presets import preset_of
from instant_reward.records import rollout_record
from instant_reward.rewards.base import as_rewards
from instant_reward.types import Mark, Prompt, Rollout, UserError
from tiny import CONTEXT, shared_tokenizer, tiny_folder


def text(prompt: str, number: int, value: float, other: float = 0.0, group: int = 0) -> Rollout:
    return Rollout(
        id=f"{prompt}/{number}",
        group=group,
        prompt=Prompt(prompt, prompt, [60, 61]),
        token_ids=[60, 61, 70],
        mask=[False, False, True],
        logprobs=[0.0, 0.0, -0.25],
        char_ends=[0, 0, 1],
        text="a",
        marks=[Mark(value, 2, 3, "one", 3), Mark(other, 2, 3, "two", 3)],
        versions=[-1, -1, 4],
        stop="length",
    )


class Sampler:
    """Draws texts whose values are told by prompt; it notes with what it was asked."""

    def __init__(self, values: dict[str, Sequence[float]]) -> None:
        self.values, self.asked = values, []

    def stream(self, prompts: Sequence[Prompt], count: int, rewards: Any, seed: int, step: int) -> Iterator[Rollout]:
        self.asked.append(([prompt.id for prompt in prompts], seed, step))
        drawn = [
            text(prompt.id, number, self.values[prompt.id][number], group=group)
            for group, prompt in enumerate(prompts)
            for number in range(count)
        ]
        yield from reversed(drawn)  # a stream is in no order


def config(**algorithm: Any) -> Config:
    return Config.build(
        {
            "data": {"prompts": ["x"]},
            "algorithm": {"name": "dapo", **algorithm},
            "train": {"prompts_per_step": 2, "group_size": 2},
            "seed": 5,
        }
    )


def sampled(prompts: str, skip: bool = True, weights: Sequence[float] = (1.0, 0.0), **algorithm: Any) -> Sampled:
    sources = [Source("one", weights[0]), Source("two", weights[1])]
    return Sampled([Prompt(name, name, [60, 61]) for name in prompts], [], config(**algorithm), sources, skip)


def names(groups: Sequence[Sequence[Rollout]]) -> list[str]:
    assert all(len({rollout.prompt.id for rollout in group}) == 1 for group in groups)
    return [group[0].prompt.id for group in groups]


class TestGroupsOfEquals:
    def test_they_are_left_out_and_others_sampled(self) -> None:
        sampler = Sampler({"a": (1, 1), "b": (0, 1), "c": (2, 2), "d": (0, 3)})
        source = sampled("abcd", refill=20)
        found = source.groups(sampler, 1)
        assert len(found) == 2
        assert set(names(found)) <= {"b", "d"}
        assert [rollout.id.rpartition("/")[2] for group in found for rollout in group] == ["0", "1"] * 2
        assert source.skipped == sum(name in "ac" for asked, _, _ in sampler.asked for name in asked)
        assert all(step == 1 for _, _, step in sampler.asked)
        seeds = [seed for _, seed, _ in sampler.asked]
        assert seeds[0] == 5
        assert len(set(seeds)) == len(seeds), "the same prompt never gets the same texts again"

    def test_no_more_often_than_asked_and_then_what_there_is(self) -> None:
        sampler = Sampler(dict.fromkeys("abcd", (1, 1)) | {"d": (0, 1)})
        source = sampled("abcd", refill=1)
        for step in range(1, 7):
            sampler.asked.clear()
            found = source.groups(sampler, step)
            assert len(sampler.asked) <= 2
            differing = [name for asked, _, _ in sampler.asked for name in asked if name == "d"]
            assert names(found) == differing[:2] if differing else len(found) == 2

    def test_where_all_are_equal_the_last_ones_stay(self) -> None:
        sampler = Sampler({"a": (1, 1), "b": (2, 2)})
        source = sampled("ab", refill=2)
        assert len(source.groups(sampler, 1)) == 2
        assert len(sampler.asked) == 3
        assert source.skipped == 6

    def test_resumed_it_asks_for_the_same(self) -> None:
        values = {"a": (1, 1), "b": (0, 1), "c": (2, 2), "d": (0, 3)}
        whole, source = Sampler(values), sampled("abcd")
        for step in (1, 2, 3):
            source.groups(whole, step)
        resumed = Sampler(values)
        sampled("abcd").groups(resumed, 3)
        assert resumed.asked == [asked for asked in whole.asked if asked[2] == 3]

    def test_other_presets_take_them_as_they_come(self) -> None:
        sampler = Sampler({"a": (1, 1), "b": (2, 2)})
        source = sampled("ab", skip=False)
        assert len(source.groups(sampler, 1)) == 2
        assert len(sampler.asked) == 1
        assert source.skipped == 0

    def test_equals_are_told_by_what_is_learned_from(self) -> None:
        class Two(Sampler):
            def stream(self, *given: Any) -> Iterator[Rollout]:
                yield from (text(one.prompt.id, int(one.id[-1]), 0.0, 3.0 * int(one.id[-1]), one.group)
                            for one in super().stream(*given))  # fmt: skip

        values = {"a": (0, 0), "b": (0, 0)}
        assert sampled("ab", weights=(1.0, 0.0)).groups(Two(values), 1)
        watched, learned = sampled("ab", weights=(1.0, 0.0), refill=0), sampled("ab", weights=(1.0, 0.5), refill=0)
        watched.groups(Two(values), 1)
        learned.groups(Two(values), 1)
        assert (watched.skipped, learned.skipped) == (2, 0)

    @pytest.mark.parametrize("scaled", [True, False], ids=["scaled", "by a rule"])
    def test_sources_whose_weights_change_do_not_make_up_for_each_other(self, scaled: bool) -> None:
        """One text earns 1 of the first source and the other 1 of the second: equals at weights of 1 alone."""

        class Either(Sampler):
            def stream(self, *given: Any) -> Iterator[Rollout]:
                yield from (text(one.prompt.id, int(one.id[-1]), one.total("one"), 1.0 - one.total("one"), one.group)
                            for one in super().stream(*given))  # fmt: skip

        changing = {"scaled": True} if scaled else {"rule": LinearWeight(rule="linear", steps=5)}
        for options, skipped in (({}, 2), (changing, 0)):
            sources = [Source("one"), Source("two", **options)]
            prompts = [Prompt(name, name, [60, 61]) for name in "ab"]
            source = Sampled(prompts, [], config(refill=0), sources, True)
            source.groups(Either({"a": (0, 1), "b": (1, 0)}), 1)
            assert source.skipped == skipped


class TestReplay:
    def groups(self, step: int) -> list[list[Rollout]]:
        return [[text(f"{step}.{number}", n, 1.0) for n in range(2)] for number in range(2)]

    def test_older_texts_join_and_the_oldest_leave(self) -> None:
        kept = Replay(count=3, staleness=2, seed=0)
        for step in range(1, 9):
            older = kept.exchange(self.groups(step), step)
            ages = [step - int(group[0].prompt.id.split(".")[0]) for group in older]
            assert all(1 <= age <= 2 for age in ages), "none of this step, none that is too old"
            assert len(older) == min(3, 2 * min(step - 1, 2))
            assert len({group[0].prompt.id for group in older}) == len(older), "each once"
            assert len(kept.kept) == 2 * min(step, 3)

    def test_it_is_what_it_was_after_being_saved(self, tmp_path: Path) -> None:
        kept, found = Replay(count=2, staleness=3, seed=4), []
        for step in range(1, 4):
            kept.exchange(self.groups(step), step)
        kept.save(tmp_path / "replay.jsonl")
        again = Replay(count=2, staleness=3, seed=4)
        again.load(tmp_path / "replay.jsonl")
        assert again == kept
        for one in (kept, again):
            found.append(one.exchange(self.groups(4), 4))
        assert found[0] == found[1]
        assert all(rollout.versions == [-1, -1, 4] for group in found[0] for rollout in group), "it keeps its version"
        empty = Replay(2, 3, 4)
        empty.save(tmp_path / "empty.jsonl")
        again.load(tmp_path / "empty.jsonl")
        assert again.kept == []

    def test_groups_are_numbered_anew(self) -> None:
        """Groups of other steps had numbers that fresh ones have too: siblings must not be mixed up."""
        rows = numbered([*self.groups(1), *self.groups(2)])
        assert [rollout.group for rollout in rows] == [0, 0, 1, 1, 2, 2, 3, 3]


class TestGiven:
    def test_recorded_texts_come_by_prompt_and_step_and_are_scored_again(self, tmp_path: Path) -> None:
        file = tmp_path / "samples.jsonl"
        records = [{"step": step, **rollout_record(text("p", number, 9.0))} for step in (1, 2) for number in (0, 1)]
        records[0]["text"] = records[1]["text"] = "\u2028"  # a line for Python's splitlines, and none for JSON
        file.write_text("\n".join(json.dumps(record, ensure_ascii=False) for record in records) + "\n\n", "utf-8")
        groups = recorded_groups(file)
        assert [len(group) for group in groups] == [2, 2]
        length = ir.reward(every="end", name="length")(lambda view: float(len(view.text)))
        given = Given(groups, as_rewards([length]), config(), [Source("length")], False)
        for group in given.groups(None, 1):  # type: ignore[arg-type]
            assert [[mark.value for mark in rollout.marks] for rollout in group] == [[1.0], [1.0]]
            assert all(rollout.logprobs == [0.0, 0.0, -0.25] for rollout in group)
        skipping = Given(groups, as_rewards([length]), config(), [Source("length")], True)
        assert len(skipping.groups(None, 1)) == 2, "where none is left, they stay"  # type: ignore[arg-type]
        assert skipping.skipped == 2

    @pytest.mark.parametrize(
        ("content", "message"),
        [
            (None, r"data\.rollouts: there is no file"),
            ("", r"data\.rollouts: .* holds no texts"),
            ('{"id": "a"\n', r"line 1 is not JSON"),
            ('\n{"id": "a"}\n', r"samples\.jsonl, line 2: the record of sample a has no 'prompt'"),
            ("[1, 2]\n", r"samples\.jsonl, line 1: this is no record of a sample"),
        ],
    )
    def test_a_file_that_is_none_is_refused(self, tmp_path: Path, content: str | None, message: str) -> None:
        file = tmp_path / "samples.jsonl"
        if content is not None:
            file.write_text(content)
        with pytest.raises(UserError, match=message):
            recorded_groups(file)

    def test_written_texts_become_rollouts_of_the_policy_as_it_is(self) -> None:
        policy = models.policy()
        rows = [("p0", "the movie", " was good"), ("p1", "it", " was bad"), ("p2", "the movie", " was slow")]
        prompts = [Prompt(i, p, shared_tokenizer()(p)["input_ids"], info={"answer": a}) for i, p, a in rows]
        groups = written_groups(prompts, "answer", policy)
        assert [[rollout.text for rollout in group] for group in groups] == [[" was good", " was slow"], [" was bad"]]
        for rollout in (rollout for group in groups for rollout in group):
            assert rollout.stop == "ended"
            assert rollout.token_ids[-1] == policy.end_ids[0]
            assert sum(rollout.mask) == len(rollout.token_ids) - rollout.start
            ids, mask = [rollout.token_ids], [[int(on) for on in rollout.mask]]
            assert rollout.logprobs == pytest.approx(policy.logprobs(ids, mask)[0].tolist(), abs=1e-6)
            assert rollout.char_ends[-1] == len(rollout.text)

    @pytest.mark.parametrize("answer", [None, "", ["good"]])
    def test_a_row_without_its_text_is_named(self, answer: object) -> None:
        prompt = Prompt("row 7", "it", [60], info={} if answer is None else {"answer": answer})
        with pytest.raises(UserError, match=r"prompt row 7 has no text in its column 'answer'"):
            written_groups([prompt], "answer", models.policy())

    def test_a_text_that_is_too_long_is_named(self) -> None:
        prompt = Prompt("row 7", "it", [60], info={"answer": " good" * CONTEXT})
        with pytest.raises(UserError, match=rf"prompt row 7 .* the model reads {CONTEXT}"):
            written_groups([prompt], "answer", models.policy())


def full(data: dict[str, Any] | None = None, replay: bool = False, **algorithm: Any) -> Config:
    train = {"replay": {"groups": 1}} if replay else {}
    return Config.build({"data": data or {"prompts": ["x"]}, "algorithm": algorithm, "train": train})


COLUMN = {"prompts": [{"prompt": "x", "answer": "y"}], "completion": "answer"}
RECORDED = {"rollouts": "samples.jsonl"}


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (full(replay=True, name="rloo"), r"train\.replay: rloo takes these texts .* set algorithm\.importance"),
        (full(replay=True, name="a2c"), r"train\.replay: a2c takes these texts"),
        (full(RECORDED, name="reinforce"), r"data: reinforce takes these texts"),
        (full(COLUMN, name="reinforce", importance={"level": "sequence"}), r"data\.completion: nobody knows"),
        (full(COLUMN, name="vtrace"), r"data\.completion: nobody knows"),
        (full(RECORDED, replay=True, name="raft"), r"train\.replay: the texts are given"),
        (full({"prompts": ["x"]}, name="ppo").model_copy(
            update={"sampling": config().sampling.model_copy(update={"guide": 1.0})}), r"sampling\.guide"),
    ],
)  # fmt: skip
def test_texts_of_others_are_refused_where_they_would_bias(config: Config, message: str) -> None:
    with pytest.raises(UserError, match=message):
        check_source(config, preset_of(config.algorithm))


@pytest.mark.parametrize(
    "config",
    [
        full(replay=True, name="ppo"),
        full(replay=True, name="vtrace"),
        full(replay=True, name="rloo", importance={"level": "decision"}),
        full(RECORDED, name="grpo"),
        full(RECORDED, name="decoupled_ppo"),
        full(COLUMN, name="raft"),
        full(COLUMN, name="ilql"),
        full(COLUMN, name="value"),
        full(name="rloo"),
    ],
)
def test_and_taken_where_something_makes_up_for_them(config: Config) -> None:
    check_source(config, preset_of(config.algorithm))


def tiny_run(tmp_path: Path, name: str, algorithm: dict[str, Any], **sections: Any) -> ir.Run:
    folder = tmp_path / "model"
    if not folder.exists():
        tiny_folder(folder)
    values = {
        "model": {"name": str(folder), "dtype": "float32"},
        "data": {"prompts": ["it was", "a film of"]},
        "algorithm": algorithm,
        "sampling": {"max_new_tokens": 4},
        "train": {"steps": 3, "prompts_per_step": 2, "group_size": 2, "learning_rate": 3e-2, "samples": "all"}
        | sections.pop("train", {}),
        "out": str(tmp_path / name),
        **sections,
    }
    return ir.train(Config.build(values), rewards=[lambda text: float(text.count("o"))])


def test_the_kl_is_measured_on_the_policys_own_texts_alone(tmp_path: Path) -> None:
    """On texts that an older policy wrote, the mean log-ratio is no KL: it is negative where the policy left them."""
    run = tiny_run(tmp_path, "kept", {"name": "ppo", "kl": 0.01}, train={"replay": {"groups": 2}})
    assert all(row["kl"] >= -1e-6 for row in run.metrics)
    assert {"effective_sample_size", "staleness"} <= set(run.metrics[0])
    given = {"rollouts": str(tmp_path / "kept" / "samples.jsonl")}
    assert "kl" not in tiny_run(tmp_path, "given", {"name": "ppo", "kl": 0.01}, data=given).metrics[0]
    with pytest.raises(UserError, match=r"algorithm\.kl_target: the KL is measured on texts of the policy's own"):
        tiny_run(tmp_path, "target", {"name": "ppo", "kl": 0.01, "kl_target": 0.1}, data=given)


def test_siblings_that_the_given_texts_lack_are_asked_for(tmp_path: Path) -> None:
    data = {"prompts": [{"prompt": "it was", "answer": " good"}], "completion": "answer"}
    with pytest.raises(UserError, match="rwr compares the texts of one prompt, and each prompt here has one"):
        tiny_run(tmp_path, "alone", {"name": "rwr"}, data=data)
    assert tiny_run(tmp_path, "imitated", {"name": "raft"}, data=data).step == 3


@pytest.mark.parametrize(
    ("algorithm", "sections"),
    [
        ({"name": "distill", "teacher": {"sees": "{answer}"}}, {}),
        ({"name": "a2c", "critic": {"model": "./nowhere"}}, {}),
        ({"name": "rloo"}, {"evaluate": {"prompts": {"path": "nowhere.jsonl"}}}),
    ],
    ids=["teacher", "critic", "evaluation"],
)
def test_a_start_that_fails_leaves_the_folder_free(
    algorithm: dict[str, Any], sections: dict[str, Any], tmp_path: Path
) -> None:
    with pytest.raises(UserError):
        tiny_run(tmp_path, "run", algorithm, **sections)
    assert not (tmp_path / "run").exists()


def test_a_metric_that_some_steps_lack_ends_no_run(tmp_path: Path) -> None:
    stop = {"stop_when": {"metric": "skipped_groups", "above": 100.0}}
    assert tiny_run(tmp_path, "run", {"name": "dapo"}, train=stop).step == 3
