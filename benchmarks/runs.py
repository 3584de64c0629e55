"""What the benchmarks that train share: a run in a process of its own, and what it left behind."""

from __future__ import annotations

import json
import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
RECIPES, RESULTS = ROOT / "recipes", ROOT / "benchmarks" / "results"


def train(recipe: str, out: Path, overrides: Sequence[str] = (), threads: int | None = None) -> Path:
    """Trains a recipe into ``out``, seen from the repository's root; a finished run is not run again."""
    if not (out / "held_out" / "after.json").is_file():
        more = [f"train.threads={threads}"] if threads else []
        command = [sys.executable, "-m", "instant_reward.cli", "train", f"recipes/{recipe}.yaml", *overrides, *more]
        environment = {**os.environ, **({"OMP_NUM_THREADS": str(threads)} if threads else {})}
        out.parent.mkdir(parents=True, exist_ok=True)
        with out.with_suffix(".log").open("w") as log:
            command += ["--out", str(out.absolute())]
            subprocess.run(command, check=True, stdout=log, stderr=log, env=environment, cwd=ROOT)
        shutil.rmtree(out / "checkpoints", ignore_errors=True)  # over a gigabyte each
    print(f"{out.name}: done", flush=True)
    return out


def held_out(out: Path) -> tuple[dict[str, float], dict[str, float]]:
    """The figures of the held-out prompts before and after the run."""
    before, after = (json.loads((out / "held_out" / f"{when}.json").read_text()) for when in ("before", "after"))
    return before["figures"], after["figures"]


def metrics(out: Path) -> list[dict[str, Any]]:
    """A dict for each step."""
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def machine(threads: int) -> str:
    """What figures of this process are of."""
    import torch

    return f"{platform.processor() or platform.machine()}, {threads} threads, torch {torch.__version__}"


def versions(out: Path) -> dict[str, Any]:
    """What the run was made with."""
    found: dict[str, Any] = json.loads((out / "versions.json").read_text())
    return found
