"""Dense against final rewards on a real model: the job of recipes/sentiment.yaml, the same texts and steps in each arm.

    python experiments/real_model.py --jobs 2 --threads 1        (every run that is not there yet, then the summary)
    python experiments/real_model.py --only-summary              (of the runs that are there)

Writes `experiments/results/real_model.json`, `.md` and `.png`.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import instant_reward as ir

HERE = Path(__file__).parent
RECIPE = HERE.parent / "recipes" / "sentiment.yaml"
FINAL = ["rewards.0.change=false", "rewards.0.every=end", "rewards.0.discount=1.0"]
CRITIC = ["algorithm.name=a2c", "algorithm.lam=0.95", "algorithm.critic.model=head", "rewards.0.discount=1.0"]
CRITIC += ["algorithm.critic.learning_rate=1e-3", "algorithm.critic.bootstrap=false"]
ARMS = {
    "final score only": FINAL,
    "change per word, discount 1": ["rewards.0.discount=1.0"],
    "change per word, discount 0.8": [],
    "change per word, critic, lambda 0.95": CRITIC,
    "uniform shares of the final score": [
        *FINAL, f"rewards.0.use={Path(__file__)}:uniform", "rewards.0.at=span", "algorithm.biased_placement=allow",
    ],
}  # fmt: skip
LONG = ["sampling.max_new_tokens=96", "train.steps=12", "evaluate.prompts.args.limit=48"]
# (tokens, learning rate, arms, seeds): what is run. The first line is the comparison, the others tune and lengthen it.
PLAN: list[tuple[int, str, list[str], list[int]]] = [
    (32, "6.0e-5", list(ARMS), [0, 1, 2]),
    (32, "1.2e-4", list(ARMS)[:3], [0]),
    (96, "6.0e-5", ["final score only", "change per word, discount 0.8"], [0, 1, 2]),
]
LEVELS = (0.70, 0.75)
_SCORES: list[Any] = []


@ir.reward(every="end", at="span", name="sentiment")
def uniform(view: ir.View) -> list[float]:
    """The final score in equal shares on all tokens of the text, which knew nothing of it: the control."""
    from instant_reward.rewards.sentiment import ReviewSentiment

    if not _SCORES:
        _SCORES.append(ReviewSentiment())
    return [_SCORES[0](view.text) / view.tokens] * view.tokens


def run(tokens: int, rate: str, arm: str, seed: int, options: argparse.Namespace) -> Path:
    """One run in a process of its own; a finished one is not run again."""
    out: Path = options.folder / f"{arm.replace(',', '').replace(' ', '-')}-{tokens}-{rate}-{seed}"
    if not options.only_summary and not (out / "held_out" / "after.json").is_file():
        overrides = [*ARMS[arm], *(LONG if tokens == 96 else []), f"train.learning_rate={rate}", f"seed={seed}"]
        if options.threads:
            overrides.append(f"train.threads={options.threads}")
        command = [sys.executable, "-m", "instant_reward.cli", "train", str(RECIPE), *overrides, "--out", str(out)]
        environment = {**os.environ, **({"OMP_NUM_THREADS": str(options.threads)} if options.threads else {})}
        subprocess.run(command, check=True, env=environment)
    return out


def figures(out: Path, arm: str, empty: float) -> dict[str, Any]:
    """The final score of each step's fresh texts, and the held-out one before and after."""
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    before, after = (
        json.loads((out / "held_out" / f"{when}.json").read_text())["figures"] for when in ("before", "after")
    )
    # The changes add up to the final score less that of the empty text: with it, all arms are on one scale.
    base = empty if arm.startswith("change") else 0.0
    keys = ("score/sentiment", "score/vader", "perplexity", "distinct_2")
    return {
        "score": [row["reward/sentiment"] + base for row in rows],
        "before": {key: before[key] for key in keys},
        "after": {key: after[key] for key in keys},
    }


def steps_to(scores: list[float], level: float) -> int | None:
    """The first step at which the mean of three steps' fresh texts is at the level; None where it never is."""
    means = [sum(scores[max(0, step - 2) : step + 1]) / min(3, step + 1) for step in range(len(scores))]
    return next((step + 1 for step, mean in enumerate(means) if mean >= level and step >= 2), None)


def table(found: dict[str, dict[str, Any]]) -> list[str]:
    """The summary, a line for each arm, length and learning rate."""
    lines = [
        "| tokens | rate | arm | seeds | held-out score, before to after | perplexity | to 0.70 | to 0.75 |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for key, one in found.items():
        tokens, rate, arm = key.split("|")
        seeds = one["seeds"].values()
        pairs = [
            ", ".join(f"{seed['before'][name]:.{digits}f} to {seed['after'][name]:.{digits}f}" for seed in seeds)
            for name, digits in (("score/sentiment", 3), ("perplexity", 0))
        ]
        reached = [
            ", ".join(str(steps_to(seed["score"], level) or f"over {len(seed['score'])}") for seed in seeds)
            for level in LEVELS
        ]
        cells = [tokens, rate, arm, ", ".join(one["seeds"]), *pairs, *reached]
        lines.append("| " + " | ".join(cells) + " |")
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--jobs", type=int, default=1, help="runs side by side")
    parser.add_argument("--threads", type=int, help="threads of each run")
    parser.add_argument("--folder", type=Path, default=Path("runs/experiment-real-model"))
    parser.add_argument("--only-summary", action="store_true", help="run nothing; leave out what is missing")
    options = parser.parse_args()
    from instant_reward.evaluate.plot import curves
    from instant_reward.rewards.sentiment import ReviewSentiment

    options.folder.mkdir(parents=True, exist_ok=True)
    wanted = [(tokens, rate, arm, seed) for tokens, rate, arms, seeds in PLAN for arm in arms for seed in seeds]
    with ThreadPoolExecutor(options.jobs) as pool:
        outs = list(pool.map(lambda one: run(*one, options), wanted))
    empty = ReviewSentiment()("")
    found: dict[str, dict[str, Any]] = {}
    plotted: dict[str, list[list[dict[str, object]]]] = {}
    for (tokens, rate, arm, seed), out in zip(wanted, outs, strict=True):
        if not (out / "held_out" / "after.json").is_file():
            continue
        one = figures(out, arm, empty)
        found.setdefault(f"{tokens}|{rate}|{arm}", {"seeds": {}})["seeds"][str(seed)] = one
        if (tokens, rate) == (32, "6.0e-5"):
            line: list[dict[str, object]] = [
                {"step": n + 1, "final score": value} for n, value in enumerate(one["score"])
            ]
            plotted.setdefault(arm, []).append(line)
    (HERE / "results").mkdir(exist_ok=True)
    (HERE / "results" / "real_model.json").write_text(json.dumps(found, indent=1) + "\n")
    (HERE / "results" / "real_model.md").write_text(
        "\n".join(["# Dense against final rewards on SmolLM2-135M", "", *table(found), ""])
    )
    curves(plotted, HERE / "results" / "real_model.png", key="final score")
    print("\n".join(table(found)))


if __name__ == "__main__":
    main()
