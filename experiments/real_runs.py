"""Runs of the real model, each in a process of its own; what each left behind; and the table of several arms."""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import report

RECIPE = Path(__file__).parents[1] / "recipes" / "sentiment.yaml"
WINDOW = 3  # steps whose mean must be at a level


@dataclass(frozen=True)
class Plan:
    """One run: its ``kind`` names a set of overrides, as ``arm`` does."""

    kind: str
    arm: str
    rate: str
    seed: int

    def folder(self, options: argparse.Namespace) -> Path:
        """Where it lies."""
        name = f"{self.kind}-{self.arm}-{self.rate}-{self.seed}"
        return Path(options.folder) / name.replace(",", "").replace(" ", "-")

    def finished(self, options: argparse.Namespace) -> bool:
        """Whether it has come to its end."""
        return (self.folder(options) / "report.html").is_file()


def options_of(about: str | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=about, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--jobs", type=int, default=1, help="runs side by side")
    parser.add_argument("--threads", type=int, default=1, help="threads of each run")
    parser.add_argument("--only-tables", action="store_true", help="run nothing; leave out what is missing")
    parser.add_argument("--folder", type=Path, default=Path("runs/experiment-real-model"))
    return parser.parse_args()


def make(plans: Iterable[Plan], overrides: Callable[[Plan], list[str]], options: argparse.Namespace) -> None:
    """Makes the runs that are not there yet, ``options.jobs`` side by side."""
    with ThreadPoolExecutor(options.jobs) as pool:
        list(pool.map(partial(_make, overrides=overrides, options=options), plans))


def _make(plan: Plan, overrides: Callable[[Plan], list[str]], options: argparse.Namespace) -> None:
    out = plan.folder(options)
    if options.only_tables or plan.finished(options):
        return
    shutil.rmtree(out, ignore_errors=True)  # what an interrupted run left
    changes = [*overrides(plan), f"train.learning_rate={plan.rate}", f"seed={plan.seed}"]
    changes.append(f"train.threads={options.threads}")
    command = [sys.executable, "-m", "instant_reward.cli", "train", str(RECIPE), *changes, "--out", str(out)]
    # For rewards that lie in a file of this folder.
    places = [str(Path(__file__).parent), *filter(None, [os.environ.get("PYTHONPATH")])]
    subprocess.run(
        command, check=True, env={**os.environ, "PYTHONPATH": os.pathsep.join(places)}, stdout=subprocess.DEVNULL
    )
    shutil.rmtree(out / "checkpoints")  # 1.6 GB each, and nothing here reads them
    report.say(out.name)


def scores(plan: Plan, options: argparse.Namespace, base: float) -> list[float]:
    """The mean final score of each step's fresh texts, whose prompts were never trained on before.

    Args:
        base: what is added where only the score's changes are paid: the score of the empty text.
    """
    lines = (plan.folder(options) / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line)["reward/sentiment"] + base for line in lines]


def steps_to(found: Sequence[float], level: float) -> int | None:
    """The first step at which the mean of the last three steps is at the level; None where it never is."""
    ends = range(WINDOW, len(found) + 1)
    return next((step for step in ends if sum(found[step - WINDOW : step]) / WINDOW >= level), None)


def row(plans: Sequence[Plan], levels: Sequence[float], options: argparse.Namespace, base: float) -> dict[str, Any]:
    """One arm's line of the table, with each seed's own numbers."""
    plans = [plan for plan in plans if plan.finished(options)]
    curves = [scores(plan, options, base) for plan in plans]
    held = [plan.folder(options) / "held_out" for plan in plans]
    ends = [[json.loads((one / f"{when}.json").read_text())["figures"] for when in ("before", "after")] for one in held]
    line: dict[str, Any] = {"arm": plans[0].arm, "learning rate": float(plans[0].rate)}
    line["seeds"] = ", ".join(str(plan.seed) for plan in plans)
    for name, digits in (("score/sentiment", 2), ("perplexity", 0), ("distinct_2", 2)):
        pairs = [" to ".join(f"{one[name]:.{digits}f}" for one in both) for both in ends]
        line[f"held-out {name.removeprefix('score/')}"] = ", ".join(pairs)
    for level in levels:
        steps = [steps_to(curve, level) for curve in curves]
        line[f"steps to {level}"] = ", ".join(str(one or f"over {len(curves[0])}") for one in steps)
        line[f"reached {level}"] = steps
    return {**line, "curves": curves, "figures": ends}


def compared(rows: list[dict[str, Any]], level: float, against: str) -> list[dict[str, Any]]:
    """Beside each arm's steps to a level, the ratio of its median to that of the arm ``against``, with an interval."""
    base = next(one for one in rows if one["arm"] == against)[f"reached {level}"]
    for one in rows:
        point, low, high = report.ratio(one[f"reached {level}"], base)
        itself = one["arm"] == against  # the interval of an arm's ratio to itself says nothing
        one |= {f"ratio to {against}": point, "low": None if itself else low, "high": None if itself else high}
    return rows
