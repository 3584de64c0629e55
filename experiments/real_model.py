"""Dense against final rewards on a real model: the job of recipes/sentiment.yaml, the same texts and steps in each arm.

    python experiments/real_model.py --jobs 2 --threads 1        (every run that is not there yet, then the tables)

Each arm first chooses its learning rate by shorter runs with a seed of their own: that which scores most in the last
three steps. Writes `experiments/results/real_model.json`, `.md` and `.png`.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path
from typing import Any

import report
import torch

import instant_reward as ir

RECIPE = Path(__file__).parents[1] / "recipes" / "sentiment.yaml"
BASE = "final score only"
FINAL = ["rewards.0.change=false", "rewards.0.every=end", "rewards.0.discount=1.0"]
CRITIC = ["algorithm.name=a2c", "algorithm.lam=0.95", "algorithm.critic.model=head", "rewards.0.discount=1.0"]
CRITIC += ["algorithm.critic.learning_rate=1e-3", "algorithm.critic.bootstrap=false"]
ARMS = {
    BASE: FINAL,
    "change per word, discount 1": ["rewards.0.discount=1.0"],
    "change per word, discount 0.8": [],
    "change per word, critic, lambda 0.95": CRITIC,
    "uniform shares of the final score": [
        *FINAL, f"rewards.0.use={Path(__file__)}:uniform", "rewards.0.at=span", "algorithm.biased_placement=allow",
    ],
}  # fmt: skip
LENGTHS = {
    "tune": ["train.steps=12", "evaluate.prompts=null"],
    "32": [],
    "96": ["sampling.max_new_tokens=96", "train.steps=12", "evaluate.prompts.args.limit=48"],
}
RATES, TUNING_SEED, SEEDS = ("3.0e-5", "6.0e-5", "1.2e-4"), 9, (0, 1, 2)
LEVELS = (0.70, 0.75)
Plan = tuple[str, str, str, int]  # length, arm, learning rate, seed


@cache
def sentiment() -> Any:
    from instant_reward.rewards.sentiment import ReviewSentiment

    return ReviewSentiment()


@ir.reward(every="end", at="span", name="sentiment")
def uniform(view: ir.View) -> list[float]:
    """The final score in equal shares on all tokens of the text, which knew nothing of it: the control."""
    return [sentiment()(view.text) / view.tokens] * view.tokens


def folder(plan: Plan, options: argparse.Namespace) -> Path:
    return Path(options.folder) / "-".join(map(str, plan)).replace(",", "").replace(" ", "-")


def run(plan: Plan, options: argparse.Namespace) -> None:
    """One run in a process of its own; a finished one is not run again."""
    (length, arm, rate, seed), out = plan, folder(plan, options)
    if (out / "report.html").is_file():
        return
    shutil.rmtree(out, ignore_errors=True)  # what an interrupted run left
    overrides = [*ARMS[arm], *LENGTHS[length], f"train.learning_rate={rate}", f"seed={seed}"]
    overrides.append(f"train.threads={options.threads}")
    command = [sys.executable, "-m", "instant_reward.cli", "train", str(RECIPE), *overrides, "--out", str(out)]
    places = [str(Path(__file__).parent), *filter(None, [os.environ.get("PYTHONPATH")])]  # for the reward in this file
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(places)}
    subprocess.run(command, check=True, env=environment, stdout=subprocess.DEVNULL)
    shutil.rmtree(out / "checkpoints")  # 1.6 GB each, and nothing here reads them
    report.say(f"{out.name}: {scores(plan, options)[-1]:.3f}")


def all_of(plans: Iterable[Plan], options: argparse.Namespace) -> None:
    with ThreadPoolExecutor(options.jobs) as pool:
        list(pool.map(lambda plan: run(plan, options), plans))


def scores(plan: Plan, options: argparse.Namespace) -> list[float]:
    """The mean final score of each step's fresh texts, whose prompts were never trained on before."""
    # The changes add up to the final score less that of the empty text: with it, all arms are on one scale.
    base = float(sentiment()("")) if plan[1].startswith("change") else 0.0
    rows = [json.loads(line) for line in (folder(plan, options) / "metrics.jsonl").read_text().splitlines()]
    return [row["reward/sentiment"] + base for row in rows]


def steps_to(found: list[float], level: float) -> int | None:
    """The first step at which the mean of three steps' fresh texts is at the level; None where it never is."""
    return next((step for step in range(3, len(found) + 1) if sum(found[step - 3 : step]) / 3 >= level), None)


def chosen_rate(arm: str, options: argparse.Namespace) -> tuple[str, dict[str, float]]:
    """The learning rate with the best last three steps of its tuning run, and what each rate got there."""
    last = {rate: sum(scores(("tune", arm, rate, TUNING_SEED), options)[-3:]) / 3 for rate in RATES}
    return max(RATES, key=lambda rate: last[rate]), last


def row(length: str, arm: str, rate: str, options: argparse.Namespace) -> dict[str, Any]:
    """One arm's line of the table, with each seed's own numbers."""
    curves = {seed: scores((length, arm, rate, seed), options) for seed in SEEDS}
    held = [folder((length, arm, rate, seed), options) / "held_out" for seed in SEEDS]
    ends = [[json.loads((one / f"{when}.json").read_text())["figures"] for when in ("before", "after")] for one in held]
    line: dict[str, Any] = {"arm": arm, "learning rate": float(rate)}
    for name, digits in (("score/sentiment", 2), ("perplexity", 0), ("distinct_2", 2)):
        pairs = [" to ".join(f"{one[name]:.{digits}f}" for one in both) for both in ends]
        line[f"held-out {name.removeprefix('score/')}"] = ", ".join(pairs)
    for level in LEVELS:
        steps = [steps_to(curve, level) for curve in curves.values()]
        line[f"steps to {level}"] = ", ".join(str(one or f"over {len(curves[0])}") for one in steps)
        line[f"reached {level}"] = steps
    return {**line, "curves": list(curves.values()), "figures": [ends]}


def compared(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Beside each arm's steps to the first level, the ratio of its median to the final score's, with an interval."""
    level = f"reached {LEVELS[0]}"
    base = next(one for one in rows if one["arm"] == BASE)[level]
    for one in rows:
        point, low, high = report.ratio(one[level], base)
        one |= {f"ratio to {BASE}": point, "low": None if one["arm"] == BASE else low, "high": high}
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--jobs", type=int, default=1, help="runs side by side")
    parser.add_argument("--threads", type=int, default=1, help="threads of each run")
    parser.add_argument("--folder", type=Path, default=Path("runs/experiment-real-model"))
    options = parser.parse_args()
    all_of([("tune", arm, rate, TUNING_SEED) for arm in ARMS for rate in RATES], options)
    rates = {arm: chosen_rate(arm, options) for arm in ARMS}
    lengths = {"32": list(ARMS), "96": [BASE, "change per word, discount 0.8"]}
    all_of([(key, arm, rates[arm][0], seed) for key in lengths for seed in SEEDS for arm in lengths[key]], options)
    tables: dict[str, list[dict[str, Any]]] = {
        f"{key} new tokens": compared([row(key, arm, rates[arm][0], options) for arm in arms])
        for key, arms in lengths.items()
    }
    panels = {title: {one["arm"]: torch.tensor(one["curves"]) for one in rows} for title, rows in tables.items()}
    tuned = [{"arm": arm, **{f"rate {rate}": last[rate] for rate in RATES}} for arm, (_, last) in rates.items()]
    tables["score of the tuning runs, last three of 12 steps"] = tuned
    report.publish("real_model", report.Asked(len(SEEDS), False, report.RESULTS), tables, panels, LEVELS[0])


if __name__ == "__main__":
    main()
