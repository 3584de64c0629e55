"""MiniLM as a classifier of pairs, beside its own cosine: full information and bandit reward, over three seeds.

    python benchmarks/matching.py [--seeds 3]

Writes results/matching.json and results/matching.md after each run; what is in there is not measured again. Needs what
recipes/matching.yaml names, scikit-learn, and MiniLM's package (or the model hub).
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import tempfile
import time
from typing import Any

import torch
from decisions import accuracy
from runs import RECIPES, RESULTS, machine

import instant_reward as ir
from instant_reward.imports import resolve
from instant_reward.rewards.embedding import Embedder

RECIPE = RECIPES / "matching.yaml"
HELD_OUT = 1000
FOR_THRESHOLD = 1000
WAYS: dict[str, list[str]] = {
    "full information": [],
    "bandit": ["data.completion=null", "algorithm.name=reinforce", "algorithm.baseline=running_mean"],
}


def rows_of(split: str, **args: Any) -> list[dict[str, Any]]:
    """The pairs of a part, the wrong ones of the most similar of 2,000 packages unless ``args`` says otherwise."""
    limit = HELD_OUT if split == "held_out" else None
    rows: list[dict[str, Any]] = resolve(f"{RECIPES}/decisions.py:package_pairs")(split=split, limit=limit, **args)
    return rows


def parted(scores: torch.Tensor, same: torch.Tensor) -> tuple[float, float]:
    """The threshold at and above which calling a pair "same" is right most often, and how often that is."""
    right = torch.stack([((scores >= edge) == same).double().mean() for edge in scores])
    best = int(right.argmax())
    return float(scores[best]), float(right[best])


def cosines(embed: Embedder, rows: list[dict[str, Any]]) -> tuple[torch.Tensor, torch.Tensor]:
    """The cosine of each pair, and whether it is of the same package, both ``[N]``."""
    first, second = (embed([row["prompt"][side] for row in rows]) for side in (0, 1))
    return (first * second).sum(1), torch.tensor([row["label"] == "same" for row in rows])


def tf_idf(rows: list[dict[str, Any]], train: list[dict[str, Any]]) -> tuple[torch.Tensor, torch.Tensor]:
    """The same with the words' TF-IDF vectors."""
    from sklearn.feature_extraction.text import TfidfVectorizer

    made = TfidfVectorizer(sublinear_tf=True).fit([text for row in train for text in row["prompt"]])
    first, second = (made.transform([row["prompt"][side] for row in rows]) for side in (0, 1))
    scores = torch.from_numpy(first.multiply(second).sum(1).A1)
    return scores, torch.tensor([row["label"] == "same" for row in rows])


def begun() -> dict[str, Any]:
    """What is measured on, and the baselines, whose thresholds are the best of some training pairs."""
    train, test = rows_of("train"), rows_of("held_out")
    embed = Embedder("the benchmark")
    learned = rows_of(**ir.Config.load(RECIPE).data.args)
    found: dict[str, Any] = {"rows": len(learned), "held_out": len(test), "machine": machine(1)}
    ways = {
        "MiniLM cosine": lambda rows: cosines(embed, rows),
        "TF-IDF cosine": lambda rows: tf_idf(rows, train),
    }
    for name, scored in ways.items():
        edge, right = parted(*scored(train[:FOR_THRESHOLD]))
        scores, same = scored(test)
        found[name] = float(((scores >= edge) == same).double().mean())
        found[f"{name}, threshold and training accuracy"] = [edge, right]
        print(name, found[name], flush=True)
    return found | {key: [] for way in WAYS for key in (way, f"{way}, seconds")}


def measure(way: str, seed: int, found: dict[str, Any], folder: str) -> None:
    """Adds the held-out accuracy of one way with one seed."""
    with tempfile.TemporaryDirectory() as out:
        config = ir.Config.load(RECIPE, [*WAYS[way], f"model.name={folder}", f"seed={seed}", f"out={out}/run"])
        start = time.perf_counter()
        policy = ir.train(config).policy
        found[f"{way}, seconds"].append(time.perf_counter() - start)
        found[way].append(accuracy(policy, rows_of("held_out"), config.model.max_context))
    print(way, seed, found[way][-1], flush=True)


def page(found: dict[str, Any]) -> str:
    """The table."""
    names = [name for name in ("TF-IDF cosine", "MiniLM cosine") if name in found]
    lines = [
        "# Summary and description of the same package, or of the most similar other one",
        "",
        "Held-out accuracy, mean and range over seeds; half of the pairs are of the same package. Cosines are parted",
        "at the threshold that is best on 1,000 training pairs made like the held-out ones. `full information`: the",
        "likelihood of the right label. `bandit`: only the reward of the chosen label is seen. Both train all of",
        "MiniLM, which reads the two texts together. Made by `benchmarks/matching.py`.",
        "",
        f"| | {found['rows']} pairs, {found['held_out']} held out | seconds a run |",
        "|---|---|---|",
        *[f"| {name} | {found[name]:.3f} | |" for name in names],
    ]
    for way in (way for way in WAYS if found[way]):
        own, took = found[way], statistics.mean(found[f"{way}, seconds"])
        spread = f"{statistics.mean(own):.3f} ({min(own):.3f} to {max(own):.3f}, {len(own)} seeds)"
        lines.append(f"| {way} | {spread} | {took:.0f} |")
    return "\n".join([*lines, "", f"Measured on {found['machine']}.", ""])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3)
    given = parser.parse_args()
    torch.set_num_threads(1)
    file = RESULTS / "matching.json"
    found = json.loads(file.read_text()) if file.is_file() else begun()
    folder = str(Embedder("the benchmark").encoder.folder)
    for seed, way in itertools.product(range(given.seeds), WAYS):
        if len(found[way]) <= seed:  # a benchmark that was cut off goes on where it was
            measure(way, seed, found, folder)
            file.write_text(json.dumps(found, indent=1) + "\n")
            (RESULTS / "matching.md").write_text(page(found))


if __name__ == "__main__":
    main()
