"""Item 16 for what presets add to a run: same seed, same run; resumed at any step, the same run, bit for bit.

In one process, so that each takes a second: a critic and its optimizer, weights that follow a target, a reference that
moves, texts kept for replay, slow Q functions, a running mean, groups that are sampled again.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

import instant_reward as ir
from tiny import tiny_folder

STEPS = 3
CASES: dict[str, dict[str, Any]] = {
    "ppo": {"algorithm": {"name": "ppo", "kl": 0.1, "kl_target": 0.05, "reset_reference": 1, "epochs": 2,
                          "minibatches": 2, "stop_kl": 0.5, "entropy": 0.01, "entropy_target": 3.0,
                          "critic": {"warmup": 1, "lam": 0.9}}, "replay": True},
    "shared head": {"algorithm": {"name": "a2c", "critic": {"model": "head", "detach": False}}},
    "vtrace": {"algorithm": {"name": "vtrace", "pieces": "word"}, "replay": True},
    "qac": {"algorithm": {"name": "qac", "top_actions": 20}},
    "running mean": {"algorithm": {"name": "reinforce", "baseline": "running_mean", "kl": 0.1, "reset_reference": 2}},
    "refilled": {"algorithm": {"name": "dapo", "timing": "ignore"}},
    "ilql": {"algorithm": {"name": "ilql", "target_rate": 0.1}, "completion": True},
    "teacher": {"algorithm": {"name": "distill", "teacher": {"sees": "{prompt} good", "baseline": True}}},
}  # fmt: skip
RESUMED_AT = {"ppo": (1, 2)}
WITHOUT_CRITIC = ("running mean", "refilled", "teacher")


@ir.reward(every="word")
def vowels(view: ir.View) -> float:
    return sum(character in "aeiou" for character in view.piece) / 3


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_folder(tmp_path_factory.mktemp("model"))


def run(model: Path, out: Path, case: str, steps: int, resume: bool = False, seed: int = 0) -> ir.Run:
    choice = CASES[case]
    replay = {"replay": {"groups": 1, "staleness": 2}} if choice.get("replay") else {}
    rows = [{"prompt": "it was", "text": " a good movie"}, {"prompt": "the film", "text": " was slow"},
            {"prompt": "a", "text": " bad one and long"}]  # fmt: skip
    config = ir.Config.build(
        {
            "model": {"name": str(model), "dtype": "float32"},
            "data": {"prompts": rows, **({"completion": "text"} if choice.get("completion") else {})},
            "algorithm": choice["algorithm"],
            "sampling": {"max_new_tokens": 5},
            "train": {"steps": steps, "prompts_per_step": 2, "group_size": 2, "learning_rate": 1e-2, "save_every": 1,
                      "keep": 9, "threads": 1, **replay},
            "seed": seed,
            "out": str(out),
        }
    )  # fmt: skip
    return ir.train(config, rewards=[vowels], resume=resume)


@pytest.fixture(scope="module")
def ppo(model: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What is left of a run that was let be."""
    folder = tmp_path_factory.mktemp("ppo")
    run(model, folder / "run", "ppo", STEPS)
    return what_counts(folder / "run")


def what_counts(out: Path) -> dict[str, Any]:
    """All that a run leaves, without what the clock says."""
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    found: dict[str, Any] = {
        "metrics": [
            {k: v for k, v in row.items() if not k.startswith("time/") and k != "tokens_per_second"} for row in rows
        ],
        "samples": (out / "samples.jsonl").read_text(),
    }
    last = out / "checkpoints" / f"step-{STEPS:06d}"
    for file in sorted(last.rglob("*")):
        name = str(file.relative_to(last))
        if file.suffix == ".safetensors":
            found[name] = {key: tensor.tolist() for key, tensor in load_file(file).items()}
        elif file.name in ("state.json", "replay.jsonl"):
            found[name] = file.read_text()
    return found


@pytest.mark.parametrize("case", CASES)
def test_resumed_it_is_the_same_run(model: Path, tmp_path: Path, case: str) -> None:
    """Ended after some steps and resumed, a run has the metrics, texts, weights and states of one that was let be."""
    run(model, tmp_path / "whole", case, STEPS)
    whole = what_counts(tmp_path / "whole")
    assert len(whole["metrics"]) == STEPS
    if CASES[case].get("replay"):
        assert '"step"' in whole["replay.jsonl"]
    assert ("critic.safetensors" in whole) == (case not in WITHOUT_CRITIC)
    assert ("reference.safetensors" in whole) == ("reset_reference" in CASES[case]["algorithm"])
    for step in RESUMED_AT.get(case, (2,)):
        out = tmp_path / f"resumed at {step}"
        run(model, out, case, step)
        run(model, out, case, STEPS, resume=True)
        assert what_counts(out) == whole


def test_the_same_seed_is_the_same_run_and_another_is_not(model: Path, tmp_path: Path, ppo: dict[str, Any]) -> None:
    """What is drawn hangs on the seed alone: also which earlier texts join a step, and which minibatches are drawn."""
    run(model, tmp_path / "again", "ppo", STEPS)
    assert what_counts(tmp_path / "again") == ppo
    run(model, tmp_path / "other", "ppo", STEPS, seed=1)
    assert what_counts(tmp_path / "other")["samples"] != ppo["samples"]


@pytest.mark.parametrize("file", ["critic.safetensors", "reference.safetensors", "replay.jsonl"])
def test_what_a_resume_needs_is_seen_to_be_needed(model: Path, tmp_path: Path, ppo: dict[str, Any], file: str) -> None:
    """Wrong on purpose: with one of the files of an earlier step, the run goes on as another one."""
    run(model, tmp_path / "torn", "ppo", 2)
    checkpoints = tmp_path / "torn" / "checkpoints"
    (checkpoints / "step-000002" / file).write_bytes((checkpoints / "step-000001" / file).read_bytes())
    run(model, tmp_path / "torn", "ppo", STEPS, resume=True)
    assert what_counts(tmp_path / "torn") != ppo
