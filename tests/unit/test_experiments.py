"""The experiments' laboratory: seeds side by side are seeds alone, and every experiment runs in seconds."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

import instant_reward as ir
from instant_reward import algorithms

FOLDER = Path(__file__).parents[2] / "experiments"
NOT_EXPERIMENTS = {"lab", "gru", "report", "real_model", "real_runs"}  # the last one needs a real model, and minutes
EXPERIMENTS = sorted({path.stem for path in FOLDER.glob("*.py")} - NOT_EXPERIMENTS)


@pytest.fixture(autouse=True)
def _the_folder(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """As when a file of the folder is run, with the names that only it knows forgotten again."""
    monkeypatch.syspath_prepend(str(FOLDER))
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)
    for name in [*NOT_EXPERIMENTS, *EXPERIMENTS]:
        sys.modules.pop(name, None)


def load(name: str) -> Any:
    return importlib.import_module(name)


def a_task(end: int | None = None, cues: int = 0) -> Any:
    """Tokens of 5 kinds; the score is the share of threes."""
    return load("gru").Task(5, 6, torch.tensor([[0, 1], [2, 3]]), lambda texts: threes(texts).sum(1), end, cues)


def threes(texts: Any) -> torch.Tensor:
    return (texts.tokens == 3) * texts.on / 6.0


def an_arm(**options: Any) -> Any:
    return load("lab").Arm("arm", options, [ir.reward(every="token", name="threes")(threes)])


def a_policy(seeds: list[int], task: Any, rate: Any = 0.05) -> Any:
    return load("gru").Policy(task, seeds, rate, hidden=6, dtype=torch.float64)


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_an_experiment_runs_in_seconds_and_writes_what_it_is_told(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    load(name).main(["--quick", "--out", str(tmp_path)])
    assert {path.name for path in tmp_path.iterdir()} >= {f"{name}.md", f"{name}.json", f"{name}.png"}
    assert "| arm |" in capsys.readouterr().out


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_an_experiment_is_short_and_its_results_are_kept(name: str) -> None:
    assert len((FOLDER / f"{name}.py").read_text().splitlines()) < 150
    for kind in ("md", "json", "png"):
        assert (FOLDER / "results" / f"{name}.{kind}").is_file(), f"run python experiments/{name}.py"
    assert f"results/{name}.png" in (FOLDER / "README.md").read_text()


@pytest.mark.parametrize("options", [{"name": "instant"}, {"name": "rloo"}, {"name": "a2c", "lam": 0.9}])
def test_seeds_side_by_side_are_seeds_alone(options: dict[str, Any]) -> None:
    task, arm, course = a_task(), an_arm(**options), load("lab").Course(updates=12, groups=2, siblings=3)
    both = a_policy([7, 8], task, [0.05, 0.02])
    scores = load("lab").learn(both, arm, course)
    for number, (seed, rate) in enumerate([(7, 0.05), (8, 0.02)]):
        alone = a_policy([seed], task, rate)
        assert torch.equal(load("lab").learn(alone, arm, course)[0], scores[number])
        for name, weight in alone.weights.items():
            assert torch.allclose(weight[0], both.weights[name][number], atol=1e-6, rtol=0), name
    moved = both.weights["output"] - a_policy([7, 8], task).weights["output"]
    assert bool((moved.abs().amax((1, 2)) > 0.01).all()), "nothing was learned: the comparison says nothing"


@pytest.mark.parametrize(("end", "cues"), [(None, 0), (3, 0), (None, 5)])
def test_the_sampler_and_the_learner_agree_on_log_probabilities_in_any_order_of_rows(
    end: int | None, cues: int
) -> None:
    policy = a_policy([1, 2, 3], a_task(end, cues))
    arm = an_arm(name="rloo")
    sources = algorithms.build(load("lab").settings(policy.task, arm.algorithm).algorithm, arm.rewards, 6).sources
    batch, texts = policy.sample(sources, arm.rewards, 2, 4)
    assert torch.allclose(policy(batch).logprobs, batch.old_logprobs, atol=1e-12)
    assert int(batch.mask.sum()) == int(texts.on.sum()) == len(batch.marks.row)
    rows = torch.randperm(len(batch)).tolist()[:10]
    part = batch.select(rows)
    assert torch.allclose(policy(part).logprobs, part.old_logprobs, atol=1e-12)
    assert bool((batch.mask.sum(1) < 6).any()) == (end is not None), "texts end early where there is an end token"


def test_the_sampler_draws_from_the_policy() -> None:
    policy = a_policy([5], a_task())
    batch, _ = policy.sample([], [], 1, 4000)
    first = torch.bincount(batch.token_ids[:, 2], minlength=5) / 4000
    said = batch.old_logprobs[:, 2].exp()
    for token in range(5):
        assert abs(float(first[token]) - float(said[batch.token_ids[:, 2] == token][0])) < 0.03


def test_an_optimizer_step_is_that_of_adam() -> None:
    gru = load("gru")
    ours, theirs = torch.ones(2, 3, requires_grad=True), torch.ones(2, 3, requires_grad=True)
    optimizer, plain = gru.Adam(torch.tensor([0.1, 0.1])), torch.optim.Adam([theirs], 0.1)
    for target in (1.0, -2.0, 3.0):
        for weights in (ours, theirs):
            ((weights - target) ** 3).sum().backward()
        optimizer.step({"w": ours})
        plain.step()
        plain.zero_grad()
        assert torch.allclose(ours, theirs, atol=1e-6)


def test_seeds_that_never_arrive_count_as_later_than_all_others() -> None:
    report: ModuleType = load("report")
    scores = torch.tensor([[0.0] * 4 + [1.0] * 6, [0.0] * 10])
    assert report.updates_to(scores, 0.8, window=2) == [5, None]
    assert report.median([3, None, 5]) == 5
    assert report.median([None, None, 5]) is None
    assert report.ratio([10, 20, 30], [10, 20, 30])[0] == 1.0
    low, high = report.ratio([10] * 5 + [12] * 5, [20] * 5 + [24] * 5)[1:]
    assert 0.4 < low <= 0.5 <= high < 0.7
    assert report.ratio([10] * 9, [None] * 9)[0] == 0.0
    assert report.ratio([None] * 9, [None] * 9) == (None, None, None)
