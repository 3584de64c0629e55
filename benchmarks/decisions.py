"""Classifiers from scratch on real reviews: full information against bandit feedback, beside TF-IDF, over three seeds.

    python benchmarks/decisions.py [--seeds 3] [--tasks film_labels chinese_labels]

Writes results/decisions.json and results/decisions.md; a task that has been measured is not measured again unless it is
named. Needs the packages that the recipes name.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from runs import RECIPES, RESULTS, machine

import instant_reward as ir
from instant_reward.imports import resolve
from instant_reward.policies.policy import Policy
from instant_reward.sampling.draw import Settings

TASKS = {"film_labels": "film_sentences", "chinese_labels": "chinese_reviews"}
WAYS: dict[str, list[str]] = {
    "full information": ["data.completion=label", "algorithm.name=likelihood", "algorithm.baseline=null"],
    "bandit": [],
}


def rows_of(task: str, split: str) -> list[dict[str, Any]]:
    """The labelled rows of a task."""
    rows: list[dict[str, Any]] = resolve(f"{RECIPES}/decisions.py:{TASKS[task]}")(split=split)
    return rows


def accuracy(policy: Policy, rows: list[dict[str, Any]], most: int | None) -> float:
    """How often the likeliest label is the right one."""
    prompts = policy.prompts(rows, "prompt", 1, most)
    stream = policy.engine(Settings(max_new_tokens=1, temperature=0)).stream(prompts, 1)
    found = [text.text == text.info["label"] for text in stream]
    return sum(found) / len(found)


def classical(task: str) -> float:
    """TF-IDF of words and pairs of words (in Chinese, of one to three characters), and logistic regression."""
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline

    chinese = task == "chinese_labels"
    features = TfidfVectorizer(
        analyzer="char" if chinese else "word", ngram_range=(1, 3 if chinese else 2), sublinear_tf=True, min_df=2
    )
    model = make_pipeline(features, LogisticRegression(C=4.0, max_iter=1000))
    train, test = rows_of(task, "train"), rows_of(task, "held_out")
    model.fit([row["prompt"] for row in train], [row["label"] for row in train])
    return float(model.score([row["prompt"] for row in test], [row["label"] for row in test]))


def measure(task: str, seeds: int) -> dict[str, Any]:
    """Held-out accuracies of a task, a list over seeds for each way."""
    test = rows_of(task, "held_out")
    labels = [row["label"] for row in test]
    most = max(map(labels.count, set(labels))) / len(labels)
    found: dict[str, Any] = {
        "rows": len(rows_of(task, "train")), "held_out": len(test), "commonest label": most, "tf-idf": classical(task)
    }  # fmt: skip
    for way, overrides in WAYS.items():
        found[way], found[f"{way}, seconds"] = [], []
        for seed in range(seeds):
            with tempfile.TemporaryDirectory() as folder:
                more = [*overrides, f"seed={seed}", f"model.scratch.seed={seed}", f"out={folder}/run"]
                config = ir.Config.load(RECIPES / f"{task}.yaml", more)
                begun = time.perf_counter()
                policy = ir.train(config).policy
                found[f"{way}, seconds"].append(time.perf_counter() - begun)
                found[way].append(accuracy(policy, test, config.model.max_context))
            print(task, way, seed, found[way][-1], flush=True)
    return found


def page(results: dict[str, Any]) -> str:
    """The table."""
    lines = [
        "# Classifiers from scratch on real reviews",
        "",
        "Held-out accuracy, mean and range over seeds. `bandit`: only the reward of the chosen label is seen. `full",
        "information`: the likelihood of the right label. Made by `benchmarks/decisions.py`.",
        "",
        (
            "| task | rows, held out | commonest label | TF-IDF, logistic regression | full information | bandit |"
            " seconds a run |"
        ),
        "|---|---|---|---|---|---|---|",
    ]
    for task, one in results["tasks"].items():
        cells = [f"{statistics.mean(one[way]):.3f} ({min(one[way]):.3f} to {max(one[way]):.3f})" for way in WAYS]
        took = statistics.mean([*one["full information, seconds"], *one["bandit, seconds"]])
        lines.append(
            f"| `{task}` | {one['rows']}, {one['held_out']} | {one['commonest label']:.3f} | {one['tf-idf']:.3f} | "
            f"{' | '.join(cells)} | {took:.0f} |"
        )
    return "\n".join([*lines, "", f"Measured on {results['machine']}.", ""])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--tasks", nargs="*", choices=TASKS, default=None)
    given = parser.parse_args()
    torch.set_num_threads(1)
    file: Path = RESULTS / "decisions.json"
    results = json.loads(file.read_text()) if file.is_file() else {"tasks": {}}
    results["machine"] = machine(1)
    for task in given.tasks or [one for one in TASKS if one not in results["tasks"]]:
        results["tasks"][task] = measure(task, given.seeds)
        file.write_text(json.dumps(results, indent=1) + "\n")
        (RESULTS / "decisions.md").write_text(page(results))


if __name__ == "__main__":
    main()
