"""The main job over seeds, and beside it the same budget spent with the final score only.

    python benchmarks/sentiment.py                        (three seeds, two arms, one after the other)
    python benchmarks/sentiment.py --jobs 2 --threads 1   (two runs side by side, a core each)

Writes to `benchmarks/results/`: `sentiment.json` (every figure of every run, and which goals it reaches),
`sentiment.md` (the same as a table) and `sentiment.png` (the mean final score of the training texts by step).
"""

from __future__ import annotations

import argparse
import json
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from runs import RESULTS, held_out, metrics, train, versions

ARMS = {
    "change per word": [],
    "final score only": ["rewards.0.change=false", "rewards.0.every=end", "rewards.0.discount=1.0"],
}


def run(arm: str, seed: int, options: argparse.Namespace) -> Path:
    """One run in a process of its own."""
    out = options.folder / f"{arm.replace(' ', '-')}-{seed}"
    return train("sentiment", out, [*ARMS[arm], f"seed={seed}", *options.override], options.threads)


def figures(out: Path) -> dict[str, Any]:
    """What a run brought, and whether it reaches the goals set for it."""
    (before, after), rows = held_out(out), metrics(out)
    start, end = before["score/sentiment"], after["score/sentiment"]
    return {
        "before": before,
        "after": after,
        "training_seconds": sum(row["time/sampling"] + row["time/learning"] for row in rows),
        "steps": len(rows),
        "reward": [row["reward/sentiment"] for row in rows],
        "share_of_the_way_to_1": (end - start) / (1 - start),
        "goals": {
            "trained score at least halfway to its maximum": end >= start + (1 - start) / 2,
            "held-out score up": after["score/vader"] > before["score/vader"],
            "reference perplexity at most doubled": after["perplexity"] <= 2 * before["perplexity"],
            "distinct-2 at least 0.7 of before": after["distinct_2"] >= 0.7 * before["distinct_2"],
        },
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--jobs", type=int, default=1, help="runs side by side")
    parser.add_argument("--threads", type=int, help="threads of each run")
    parser.add_argument("--folder", type=Path, default=Path("runs/benchmark-sentiment"))
    parser.add_argument("override", nargs="*", help="changes to the recipe, as for `instant-reward train`")
    options = parser.parse_args()
    from instant_reward.evaluate.plot import curves
    from instant_reward.rewards.sentiment import ReviewSentiment

    wanted = [(arm, seed) for seed in range(options.seeds) for arm in ARMS]
    with ThreadPoolExecutor(options.jobs) as pool:
        outs = list(pool.map(lambda pair: run(*pair, options), wanted))
    empty = ReviewSentiment()("")
    result: dict[str, dict[str, Any]] = {arm: {} for arm in ARMS}
    lines: dict[str, list[list[dict[str, object]]]] = {arm: [] for arm in ARMS}
    for (arm, seed), out in zip(wanted, outs, strict=True):
        result[arm][str(seed)] = figures(out)
        # The changes add up to the final score less that of the empty text: with it, both arms are on one scale.
        base = empty if arm == "change per word" else 0.0
        rows = metrics(out)
        lines[arm].append([{"step": row["step"], "final score": row["reward/sentiment"] + base} for row in rows])
    made_with = versions(outs[0])
    record = {"command": "python benchmarks/sentiment.py " + " ".join(sys.argv[1:]), "versions": made_with, **result}
    (RESULTS / "sentiment.json").write_text(json.dumps(record, indent=1) + "\n")
    curves(lines, RESULTS / "sentiment.png", key="final score")
    (RESULTS / "sentiment.md").write_text(table(result, record["command"], made_with))
    print(table(result, record["command"], made_with))


def table(result: dict[str, dict[str, Any]], command: str, made_with: dict[str, Any]) -> str:
    """The figures as Markdown: one line a run."""
    what = f"sentiment.yaml, held-out prompts, torch {made_with.get('torch')}, {made_with.get('platform')}"
    columns = (
        "arm",
        "seed",
        "trained score",
        "of the way to 1",
        "held-out score",
        "reference perplexity",
        "distinct-2",
    )
    lines = [
        "# The main job: rewards per word against the final score only",
        "",
        f"Written by `{command}`: {what}. Both arms spend the same steps, texts and tokens.",
        "",
        "| " + " | ".join([*columns, "training", "goals missed"]) + " |",
        "|---" * (len(columns) + 2) + "|",
    ]
    for arm, seeds in result.items():
        for seed, one in seeds.items():
            pairs = {
                key: f"{one['before'][key]:.{digits}f} → {one['after'][key]:.{digits}f}"
                for key, digits in (("score/sentiment", 3), ("score/vader", 2), ("perplexity", 1), ("distinct_2", 2))
            }
            missed = ", ".join(goal for goal, held in one["goals"].items() if not held) or "none"
            cells = [
                arm,
                seed,
                pairs["score/sentiment"],
                f"{one['share_of_the_way_to_1']:.0%}",
                pairs["score/vader"],
                pairs["perplexity"],
                pairs["distinct_2"],
                f"{one['steps']} steps, {one['training_seconds']:.0f} s",
                missed,
            ]
            lines.append("| " + " | ".join(cells) + " |")
    goals = "; ".join(next(iter(next(iter(result.values())).values()))["goals"])
    return "\n".join([*lines, "", f"The goals: {goals}.", ""])


if __name__ == "__main__":
    main()
