"""What follows a metric: the end of a run, the learning rate, and the way back to the best checkpoint."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

import instant_reward as ir
from instant_reward.config import Config, as_supervised
from instant_reward.config_train import FollowConfig, StopWhen
from instant_reward.screen import Screen
from instant_reward.train import learn, prepare
from instant_reward.types import UserError
from instant_reward.watching import OF_TEXTS, Course, better_of, ends, follow, measured
from tiny import tiny_folder
from what_counts import plain, weights

TEXTS = ["the movie was good", "the movie was bad and slow", "a fine movie but long", "it was not good"]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_folder(tmp_path_factory.mktemp("tiny") / "model")


def factors(config: FollowConfig, values: list[float | None]) -> tuple[list[float], list[int]]:
    """The factor after each step, and the steps that went back."""
    course, found, back = Course(), [], []
    for step, value in enumerate(values, start=1):
        row = {} if value is None else {config.metric: value}
        if follow(config, course, row, step):
            back.append(step)
        found.append(course.factor)
    return found, back


def test_the_rate_rises_with_each_best_value_and_is_cut_when_they_stay_away() -> None:
    config = FollowConfig(metric="held_out/accuracy", up=2.0, down=0.25, patience=2, most=8.0, least=0.5)
    found, back = factors(config, [1, 2, None, 3, 2, 2.5, 2.9, 2.9, 4, 5, 6, 7, 8, 9])
    assert found == [1, 2, 2, 4, 4, 1, 1, 0.5, 1, 2, 4, 8, 8, 8]
    assert back == []


def test_lower_is_better_where_the_metric_is_an_error() -> None:
    assert better_of(FollowConfig(metric="held_out/perplexity")) == "lower"
    assert better_of(StopWhen(metric="nll", patience=1)) == "lower"
    assert better_of(FollowConfig(metric="reward")) == "higher"
    assert better_of(FollowConfig(metric="reward/nll_of_mine", better="lower")) == "lower"
    config = FollowConfig(metric="nll", up=2.0, down=0.5, patience=1)
    assert factors(config, [3, 2, 2.5, 1])[0] == [1, 2, 1, 2]


def test_a_cut_returns_to_the_best_where_it_is_asked_to() -> None:
    config = FollowConfig(metric="reward", patience=2, return_to_best=True, smoothing=0.5)
    course = Course()
    went = [follow(config, course, {"reward": value}, step) for step, value in enumerate([1.0, 3.0, 0.0, 0.0], start=1)]
    assert went == [False, False, False, True]
    assert (course.best, course.best_step, course.mean) == (2.0, 2, 2.0), "the smoothed value goes back, too"


def test_a_target_counts_measurements_and_patience_counts_those_without_a_new_best() -> None:
    def last(target: StopWhen, values: list[float | None]) -> int:
        course = Course()
        for step, value in enumerate(values, start=1):
            if ends(target, course, {} if value is None else {target.metric: value}, step):
                return step
        return 0

    between = [0.0, None, 2.0, None, 2.0, 0.0, 2.0, None, 2.0, None, 2.0, 2.0]
    assert last(StopWhen(metric="held_out/x", above=1.0, for_steps=3), between) == 11
    assert last(StopWhen(metric="clipped", above=1.0, for_steps=2), [2.0, None, 2.0, None, 2.0, 2.0]) == 6
    assert last(StopWhen(metric="held_out/x", above=1.0, below=1.5), [2.0, 0.0, 1.2]) == 3
    assert last(StopWhen(metric="held_out/x", patience=2), [1.0, 2.0, 2.0, None, 1.0, 3.0]) == 5
    assert last(StopWhen(metric="nll", patience=2), [3.0, 2.0, 1.0, 1.5, 1.2, 0.0]) == 5
    assert last(StopWhen(metric="held_out/x", patience=9, above=5.0), [1.0, 6.0]) == 2
    with pytest.raises(UserError, match=r"train\.stop_when\.metric: there is no metric 'nope'; use one of a, clipped"):
        ends(StopWhen(metric="nope", above=1.0), Course(), {"a": 1.0}, 1)
    with pytest.raises(UserError, match=r"train\.follow\.metric: there is no metric 'reward'"):
        follow(FollowConfig(), Course(), {"nll": 1.0}, 1)


def test_another_metric_begins_a_course_of_its_own() -> None:
    """A resumed run may watch something else: a perplexity of 40 is no accuracy to be surpassed."""
    course = Course()
    before = StopWhen(metric="held_out/perplexity", patience=2)
    assert not any(ends(before, course, {before.metric: value}, step) for step, value in ((1, 40.0), (2, 41.0)))
    target = StopWhen(metric="held_out/accuracy", patience=2)
    row = {"held_out/perplexity": 41.0, "held_out/accuracy": 0.5}
    assert not ends(target, course, row, 3)
    assert (course.best, course.best_step, course.waited) == (0.5, 3, 0)
    assert not ends(StopWhen(metric="held_out/accuracy", patience=2, above=0.9), course, row, 4), "it goes on counting"
    assert course.waited == 1


@pytest.mark.parametrize(
    ("metric", "evaluate", "message"),
    [
        ("held_out/nll", {}, "'held_out/nll' is measured on held-out data, and there is none; give evaluate.texts"),
        ("held_out/nll", {"every": None}, "'held_out/nll' is measured every evaluate.every steps; say how many"),
        ("held_out/perplexty", {"every": 1}, "is not measured on texts; use one of held_out/nll, held_out/perplexity"),
    ],
)
@pytest.mark.parametrize("option", ["stop_when", "follow"])
def test_a_metric_that_never_comes_is_refused(
    option: str, metric: str, evaluate: dict[str, Any], message: str, model: Path, tmp_path: Path
) -> None:
    held_out = {"texts": {"prompts": [{"text": "the movie was slow"}]}, **evaluate} if evaluate else {}
    watched = {"metric": metric, "patience": 1, "better": "lower"}
    train = {"schedule": "follow", "follow": watched} if option == "follow" else {"stop_when": watched}
    values = {"model": str(model), "data": {"prompts": TEXTS}, "train": train, "evaluate": held_out}
    with pytest.raises(UserError, match=rf"train\.{option}\.metric: .*{message}"):
        prepare(Config.build(as_supervised({**values, "out": str(tmp_path / "run")})))
    assert not (tmp_path / "run").exists()


def test_what_the_command_alone_measures_is_refused_from_python(model: Path, tmp_path: Path) -> None:
    values = {
        "model": str(model), "data": {"prompts": ["a"]}, "out": str(tmp_path / "run"),
        "train": {"stop_when": {"metric": "held_out/score/vowel", "above": 0.5}},
        "evaluate": {"prompts": {"prompts": ["b"]}, "every": 1},
    }  # fmt: skip
    with pytest.raises(UserError, match="'held_out/score/vowel' is measured on held-out data, and there is none"):
        ir.train(Config.build(values), rewards=[vowel])
    prepare(Config.build(values), [vowel])


def test_held_out_figures_that_a_measurement_lacks_are_named() -> None:
    """Of prompts nobody knows the figures beforehand; the last step may have those of the texts alone."""
    row = {f"held_out/{one}": 1.0 for one in OF_TEXTS}
    assert measured("held_out/score/polite", row, "here") is None
    with pytest.raises(UserError, match=r"here: there is no metric 'held_out/score/polit'; use one of .*score/polite"):
        measured("held_out/score/polit", {**row, "held_out/score/polite": 1.0}, "here")


def test_for_is_for_steps() -> None:
    target = StopWhen.model_validate({"metric": "held_out/accuracy", "above": 0.9, "for": 3})
    assert target.for_steps == 3
    assert StopWhen.model_validate(target.model_dump()) == target


def config(model: Path, out: Path, follow: dict[str, Any], **train: Any) -> Config:
    values = {
        "model": {"name": str(model), "dtype": "float32"},
        "data": {"prompts": [{"text": text} for text in TEXTS]},
        "train": {"steps": 12, "learning_rate": 1e-3, "keep": 1, "schedule": "follow", "follow": follow, **train},
        "evaluate": {"texts": {"prompts": [{"text": "the movie was slow"}]}, "every": 1},
        "out": str(out),
    }
    return Config.build(as_supervised(values))


FALLS = {"metric": "held_out/perplexity", "up": 3.0, "down": 0.1, "patience": 2, "return_to_best": True, "most": 100.0}


def test_a_run_raises_its_rate_returns_and_cuts(model: Path, tmp_path: Path) -> None:
    """The rate in the metrics is the base rate times the factor; after a return the held-out value is the best one."""
    run = ir.fit(config(model, tmp_path / "run", FALLS))
    rates = [row["learning_rate"] for row in run.metrics]
    values = [row["held_out/perplexity"] for row in run.metrics]
    assert rates[0] == rates[1] == pytest.approx(1e-3)
    assert max(rates) > 2e-3
    back = [row for row in run.metrics if "returned_to" in row]
    assert back, "such a rate overshoots"
    step, best = back[0]["step"], int(back[0]["returned_to"])
    assert values[best - 1] == min(values[:step])
    assert rates[step] == pytest.approx(0.1 * rates[step - 1])
    assert run.checkpoint(int(back[-1]["returned_to"])) is not None, "the best one is kept beyond keep"


def test_a_return_takes_weights_and_moments_back_and_leaves_the_schedule(model: Path, tmp_path: Path) -> None:
    job = prepare(config(model, tmp_path / "run", FALLS, steps=3))
    with Screen(3) as screen:
        learn(job, screen)
    assert job.policy.stepper is not None
    checkpoint = job.run.latest_checkpoint()
    assert checkpoint is not None
    moments = [one.clone() for state in job.policy.stepper.optimizer.state.values() for one in state.values()]
    job.policy.stepper.done = 7
    for parameter in job.policy.model.parameters():
        parameter.data.add_(1.0)
    job.policy.load_best(checkpoint)
    stored = load_file(checkpoint / "policy" / "model.safetensors")
    assert all(bool((one == stored[name]).all()) for name, one in job.policy.model.named_parameters())
    now = [one for state in job.policy.stepper.optimizer.state.values() for one in state.values()]
    assert all(bool((one == other).all()) for one, other in zip(now, moments, strict=True))
    assert job.policy.stepper.done == 7


def test_a_best_value_is_kept_where_the_rate_would_go_back(model: Path, tmp_path: Path) -> None:
    """Two metrics may say two things of a step: the checkpoint of the one's best holds the policy that it measured."""
    falls = {
        "metric": "nll",
        "better": "higher",
        "patience": 1,
        "return_to_best": True,
    }  # so it always wants to go back
    stop = {"metric": "held_out/perplexity", "patience": 9, "return_to_best": True}
    run = ir.fit(config(model, tmp_path / "run", falls, steps=4, keep=9, stop_when=stop))
    values = [row["held_out/perplexity"] for row in run.metrics]
    best = values.index(min(values)) + 1
    assert best > 1
    assert "returned_to" not in run.metrics[best - 1]
    job = prepare(run.config, resume=True)
    assert job.held_out is not None
    folder = run.checkpoint(best)
    assert folder is not None
    job.policy.load_weights(folder)
    assert job.held_out.measure(job.policy)["perplexity"] == pytest.approx(min(values), rel=1e-6)


@pytest.mark.parametrize("at", [3, 6, 9])
def test_a_resumed_run_follows_as_the_unbroken_one(model: Path, tmp_path: Path, at: int) -> None:
    unbroken = ir.fit(config(model, tmp_path / "unbroken", FALLS))
    broken = config(model, tmp_path / "broken", FALLS, save_every=1)
    job = prepare(broken)

    def killed(policy: ir.Policy, step: int) -> dict[str, float]:
        if step == at:
            raise InterruptedError
        return {}

    with Screen(12) as screen, pytest.raises(InterruptedError):
        learn(job, screen, killed)
    resumed = ir.fit(broken, resume=True)
    for one, other in zip(resumed.metrics, unbroken.metrics, strict=True):
        assert one["learning_rate"] == other["learning_rate"]
        assert one["held_out/perplexity"] == other["held_out/perplexity"]


def sampled(model: Path, out: Path, follow: dict[str, Any]) -> Config:
    return Config.build(
        {
            "model": {"name": str(model), "dtype": "float32"},
            "data": {"prompts": ["the movie", "it was"]},
            "sampling": {"max_new_tokens": 6},
            "train": {
                "steps": 8, "prompts_per_step": 2, "group_size": 4, "learning_rate": 5e-3, "save_every": 1,
                "schedule": "follow", "follow": {"metric": "reward", "up": 1.5, "return_to_best": True, **follow},
            },
            "out": str(out),
        }
    )  # fmt: skip


def vowel(text: str) -> float:
    return text.count("o") / 6


def test_it_follows_a_reward_too(model: Path, tmp_path: Path) -> None:
    run = ir.train(sampled(model, tmp_path / "run", {"smoothing": 0.5, "patience": 2}), rewards=[vowel])
    assert len({row["learning_rate"] for row in run.metrics}) > 1
    assert all(math.isfinite(row["reward"]) for row in run.metrics)


def test_after_a_return_the_best_policy_writes_the_texts(model: Path, tmp_path: Path) -> None:
    """Whoever samples has gone back, too: its log-probabilities are the policy's, and a resumed run is the unbroken."""
    whole = ir.train(sampled(model, tmp_path / "whole", {"patience": 1}), rewards=[vowel])
    back = next(row["step"] for row in whole.metrics if "returned_to" in row)
    assert back < 8
    assert max(row["sampler_gap"] for row in whole.metrics) < 1e-5
    job = prepare(sampled(model, tmp_path / "broken", {"patience": 1}), [vowel])

    def killed(policy: ir.Policy, step: int) -> dict[str, float]:
        if step == back + 1:
            raise InterruptedError
        return {}

    with Screen(8) as screen, pytest.raises(InterruptedError):
        learn(job, screen, killed)
    resumed = ir.train(job.config, rewards=[vowel], resume=True)
    assert plain(resumed.metrics) == plain(whole.metrics)
    assert weights(resumed) == weights(whole)
