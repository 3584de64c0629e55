"""Classifiers from scratch on real reviews: full information against bandit feedback, beside TF-IDF, over three seeds.

    python benchmarks/decisions.py [--seeds 3] [--tasks film_labels chinese_labels]

Writes results/decisions.json and results/decisions.md after each seed; what is in there is not measured again. Needs
the packages that the recipes name.
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


def begun(task: str) -> dict[str, Any]:
    """What a task is measured on, and its baselines."""
    test = rows_of(task, "held_out")
    labels = [row["label"] for row in test]
    return {
        "rows": len(rows_of(task, "train")),
        "held_out": len(test),
        "commonest label": max(map(labels.count, set(labels))) / len(labels),
        "tf-idf": classical(task),
        **{key: [] for way in WAYS for key in (way, f"{way}, seconds")},
    }


def measure(task: str, seed: int, found: dict[str, Any]) -> None:
    """Adds the held-out accuracy of each way with one seed."""
    test = rows_of(task, "held_out")
    for way, overrides in WAYS.items():
        with tempfile.TemporaryDirectory() as folder:
            more = [*overrides, f"seed={seed}", f"model.scratch.seed={seed}", f"out={folder}/run"]
            config = ir.Config.load(RECIPES / f"{task}.yaml", more)
            start = time.perf_counter()
            policy = ir.train(config).policy
            found[f"{way}, seconds"].append(time.perf_counter() - start)
            found[way].append(accuracy(policy, test, config.model.max_context))
        print(task, way, seed, found[way][-1], flush=True)


def page(results: dict[str, Any]) -> str:
    """The table."""
    lines = [
        "# Classifiers from scratch on real reviews",
        "",
        "Held-out accuracy, mean and range over seeds. `bandit`: only the reward of the chosen label is seen. `full",
        "information`: the likelihood of the right label. Made by `benchmarks/decisions.py`.",
        "",
        (
            "| task | rows, held out | seeds | commonest label | TF-IDF, logistic regression | full information |"
            " bandit | seconds a run |"
        ),
        "|---|---|---|---|---|---|---|---|",
    ]
    for task, one in results["tasks"].items():
        cells = [f"{statistics.mean(one[way]):.3f} ({min(one[way]):.3f} to {max(one[way]):.3f})" for way in WAYS]
        took = statistics.mean([*one["full information, seconds"], *one["bandit, seconds"]])
        first = [f"`{task}`", f"{one['rows']}, {one['held_out']}", str(len(one["bandit"]))]
        plain = [f"{one[name]:.3f}" for name in ("commonest label", "tf-idf")]
        lines.append(f"| {' | '.join([*first, *plain, *cells, f'{took:.0f}'])} |")
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
    for task in given.tasks or TASKS:
        found = results["tasks"].get(task) or begun(task)
        for seed in range(len(found["bandit"]), given.seeds):  # a run that was cut off goes on where it was
            measure(task, seed, found)
            results["tasks"][task] = found
            file.write_text(json.dumps(results, indent=1) + "\n")
            (RESULTS / "decisions.md").write_text(page(results))


if __name__ == "__main__":
    main()
