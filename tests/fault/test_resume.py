"""Item 16: killed and resumed at any step, the same run, bit for bit, on one CPU process."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from safetensors.torch import load_file

from tiny import tiny_folder

STEPS = 100
REWARDS = '''
import random

import instant_reward as ir


@ir.reward(every="word")
def noisy_vowels(view):
    """Draws from Python's own random numbers: they too must go on where they were."""
    return sum(character in "aeiou" for character in view.piece) + 0.1 * random.random()
'''


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("resume")
    tiny_folder(folder / "model")
    (folder / "rewards.py").write_text(REWARDS)
    config = {
        "model": {"name": str(folder / "model"), "dtype": "float32"},
        "data": {"prompts": ["the movie", "a film", "it was", "not a bad one"]},
        "rewards": [f"{folder / 'rewards.py'}:noisy_vowels"],
        "algorithm": {"name": "rloo", "kl": 0.05, "minibatches": 2},
        "sampling": {"max_new_tokens": 8},
        "train": {"steps": STEPS, "prompts_per_step": 2, "group_size": 2, "learning_rate": 1e-3, "save_every": 2,
                  "schedule": "cosine", "warmup": 2, "threads": 1},
        "out": str(folder / "unused"),
    }  # fmt: skip
    (folder / "config.yaml").write_text(json.dumps(config))
    return folder


def start(work: Path, *arguments: str) -> subprocess.Popen[str]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "instant_reward.cli", "train", *arguments]
    return subprocess.Popen(
        command, cwd=work, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )


def finish(process: subprocess.Popen[str]) -> None:
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 0, output


def what_counts(run: Path) -> tuple[list[dict[str, object]], list[dict[str, object]], dict[str, object]]:
    """Metrics without what the clock says, samples, and the last checkpoint's weights."""
    metrics = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    plain = [
        {k: v for k, v in row.items() if not k.startswith("time/") and k != "tokens_per_second"} for row in metrics
    ]
    samples = [json.loads(line) for line in (run / "samples.jsonl").read_text().splitlines()]
    weights = load_file(run / "checkpoints" / f"step-{STEPS:06d}" / "policy" / "model.safetensors")
    return plain, samples, {name: tensor.tolist() for name, tensor in weights.items()}


@pytest.mark.slow
def test_a_run_killed_ten_times_at_random_points_is_the_run_that_was_let_be(work: Path) -> None:
    undisturbed = work / "undisturbed"
    finish(start(work, "config.yaml", "--out", str(undisturbed)))
    killed = work / "killed"
    dice = random.Random(0)
    first = True
    for _ in range(10):
        arguments = ["config.yaml", "--out", str(killed)] if first else ["--resume", str(killed)]
        process = start(work, *arguments)
        # Let it come to its first steps, then kill it somewhere inside one or inside a checkpoint.
        wait_for_progress(process, killed)
        time.sleep(dice.uniform(0.0, 0.3))
        assert process.poll() is None, "the run had ended before it could be killed: give it more steps"
        process.send_signal(signal.SIGKILL)
        process.communicate()
        first = first and not (killed / "config.yaml").exists()
    finish(start(work, "--resume", str(killed)))
    assert what_counts(killed) == what_counts(undisturbed)


def wait_for_progress(process: subprocess.Popen[str], run: Path) -> None:
    size = (run / "metrics.jsonl").stat().st_size if (run / "metrics.jsonl").exists() else 0
    deadline = time.monotonic() + 60
    while process.poll() is None and time.monotonic() < deadline:
        now = (run / "metrics.jsonl").stat().st_size if (run / "metrics.jsonl").exists() else 0
        if now != size:
            return
        time.sleep(0.005)


def test_ctrl_c_finishes_the_step_saves_and_says_how_to_go_on(work: Path) -> None:
    run = work / "interrupted"
    process = start(work, "config.yaml", "train.steps=2000", "train.save_every=null", "--out", str(run))
    wait_for_progress(process, run)
    process.send_signal(signal.SIGINT)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 130, output
    assert "--resume" in output
    steps = len((run / "metrics.jsonl").read_text().splitlines())
    assert (run / "checkpoints" / f"step-{steps:06d}" / "optimizer.pt").is_file()


def test_a_resume_with_a_changed_config_is_refused_and_names_the_change(work: Path) -> None:
    run = work / "changed"
    finish(start(work, "config.yaml", "train.steps=2", "train.schedule=constant", "--out", str(run)))
    process = start(work, "--resume", str(run), "train.learning_rate=0.5")
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 2
    assert "train.learning_rate" in output
    finish(start(work, "--resume", str(run), "train.steps=3"))  # a longer run is the same run


def test_more_steps_are_refused_where_the_learning_rate_depends_on_their_number(work: Path) -> None:
    run = work / "schedule"
    finish(start(work, "config.yaml", "train.steps=2", "--out", str(run)))
    process = start(work, "--resume", str(run), "train.steps=3")
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 2
    assert "train.steps" in output
