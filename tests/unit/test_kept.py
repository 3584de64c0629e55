"""Checkpoints that are damaged, or of another model, are named in one sentence when a run resumes."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import instant_reward as ir
from instant_reward.config import Config
from instant_reward.types import UserError
from tiny import tiny_folder


def length_of(text: str) -> float:
    return len(text) / 10


def config(model: Path, out: Path, steps: int = 2) -> Config:
    train: dict[str, Any] = {"steps": steps, "prompts_per_step": 1, "group_size": 2, "save_every": 2}
    return Config.build(
        {
            "model": {"name": str(model), "dtype": "float32"},
            "data": {"prompts": ["the movie"]},
            "algorithm": {"name": "ppo"},
            "sampling": {"max_new_tokens": 3},
            "train": train,
            "out": str(out),
        }
    )


def halve(file: Path) -> None:
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def widen(file: Path) -> None:
    name, values = next((name, values) for name, values in load_file(file).items() if values.dim() == 2)
    save_file({**load_file(file), name: torch.cat([values, values])}, file)


@pytest.mark.parametrize(
    ("name", "spoil"),
    [
        ("policy/model.safetensors", halve),
        ("policy/model.safetensors", widen),
        ("policy/model.safetensors", Path.unlink),
        ("critic.safetensors", halve),
        ("critic.safetensors", widen),
        ("optimizer.pt", halve),
        ("optimizer.pt", Path.unlink),
    ],
)
def test_a_damaged_checkpoint_is_named(tmp_path: Path, name: str, spoil: Any, begun: tuple[Path, Path]) -> None:
    model, run = begun
    shutil.copytree(run, tmp_path / "run")
    spoil(tmp_path / "run" / "checkpoints" / "step-000002" / name)
    with pytest.raises(UserError, match=r"the checkpoint .*step-000002 cannot be read \(.+\): it is damaged or of"):
        ir.train(config(model, tmp_path / "run", 3), rewards=[length_of], resume=True)


def test_without_the_damaged_checkpoint_the_run_begins_anew(tmp_path: Path, begun: tuple[Path, Path]) -> None:
    model, run = begun
    shutil.copytree(run, tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "step-000002")
    again = ir.train(config(model, tmp_path / "run", 3), rewards=[length_of], resume=True)
    assert [row["step"] for row in again.metrics] == [1, 2, 3]


@pytest.fixture(scope="module")
def begun(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("kept")
    model = tiny_folder(folder / "model")
    return model, ir.train(config(model, folder / "run"), rewards=[length_of]).path
