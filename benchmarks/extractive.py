"""Summaries by extraction over seeds: held-out ROUGE before and after, against lead-1 and a greedy oracle.

    python benchmarks/extractive.py --lists runs/apt-lists        (three seeds; recipes/extractive.yaml says how to
                                                                   fetch the lists)

Writes to `benchmarks/results/`: `extractive.json` and `extractive.md`. A trained policy takes its likeliest choices;
lead-1 is a document's first sentence; the oracle adds the sentence that raises ROUGE-L most until none does.
"""

from __future__ import annotations

import argparse
import json
import random
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from runs import RECIPES, RESULTS, machine

import instant_reward as ir
from instant_reward.imports import resolve
from instant_reward.policies.extractive import split
from instant_reward.policies.policy import Policy
from instant_reward.policies.scratch import new_policy
from instant_reward.rewards.metrics import Rouge

documents = resolve(f"{RECIPES / 'debian.py'}:documents")

KINDS = {"rouge_1": Rouge(1), "rouge_2": Rouge(2), "rouge_l": Rouge("L")}


def figures(texts: Sequence[str], rows: Sequence[dict[str, Any]]) -> dict[str, float]:
    """The mean of each ROUGE (F), and how many words the texts have."""
    found = {
        name: sum(one.score(text, row["reference"]) if text else 0.0 for text, row in zip(texts, rows, strict=True))
        for name, one in KINDS.items()
    }
    return {**{name: value / len(rows) for name, value in found.items()}, "words": words(texts)}


def words(texts: Sequence[str]) -> float:
    return sum(len(text.split()) for text in texts) / len(texts)


def oracle(row: dict[str, Any]) -> str:
    """The summary that greedy search with the reference in hand finds."""
    left, chosen, best = [one.strip() for one in split(row["prompt"])], list[str](), 0.0
    while left:
        score, sentence = max((KINDS["rouge_l"].score(" ".join([*chosen, one]), row["reference"]), one) for one in left)
        if score <= best:
            break
        best = score
        chosen.append(sentence)
        left.remove(sentence)
    return " ".join(chosen)


def summaries(
    policy: Policy, rows: Sequence[dict[str, Any]], temperature: float = 0.0
) -> tuple[list[str], dict[str, int]]:
    """The policy's summary of each document, the likeliest one at temperature 0, and which sentences came first."""
    rollouts = policy.sample(rows, max_new_tokens=3, temperature=temperature, rows=512)
    first = Counter("none" if one.token_ids[0] == 0 else str(one.token_ids[0]) for one in rollouts)
    return [one.text for one in rollouts], dict(first.most_common())


def gain(texts: Sequence[str], others: Sequence[str], rows: Sequence[dict[str, Any]]) -> list[float]:
    """By how much the texts' mean ROUGE-L is above the others': the mean, and a 95% interval over documents."""
    one = KINDS["rouge_l"]
    scores = [
        [one.score(text, row["reference"]) for text, row in zip(some, rows, strict=True)] for some in (texts, others)
    ]
    differences = [a - b for a, b in zip(*scores, strict=True)]
    drawn = random.Random(0)
    means = sorted(sum(drawn.choices(differences, k=len(rows))) / len(rows) for _ in range(500))
    return [sum(differences) / len(rows), means[12], means[487]]


def run(seed: int, options: argparse.Namespace, rows: Sequence[dict[str, Any]], lead: Sequence[str]) -> dict[str, Any]:
    """One model made, measured, trained and measured."""
    out = options.folder / str(seed)
    given = [f"model.scratch.seed={seed}", f"out={out}", f"seed={seed}", f"data.args.lists={options.lists}"]
    config = ir.Config.load(RECIPES / "extractive.yaml", [*given, *options.override])
    assert config.model.scratch is not None, "the recipe's model has new weights"
    # A new model has no likeliest choice: all are alike.
    before, _ = summaries(new_policy(config.model.scratch, []), rows, temperature=1.0)
    begun = time.perf_counter()
    trained = ir.train(config)
    seconds = time.perf_counter() - begun
    after, first = summaries(trained.policy, rows)
    return {
        "before": figures(before, rows),
        "after": figures(after, rows),
        "gain_over_lead": gain(after, lead, rows),
        "first_choices": first,
        "seconds": seconds,
        "steps": len(trained.metrics),
        "reward": [row["reward"] for row in trained.metrics],
    }


def table(record: dict[str, Any]) -> str:
    """The figures as Markdown."""
    count = record["documents"]
    lines = [
        "# Summaries by extraction",
        "",
        (
            f"Written by `{record['command']}`: {count['train']} training and {count['held_out']} held-out package "
            f"descriptions of 3 to 12 sentences, {record['machine']}. F measures. A new policy "
            "chooses at random; the trained one takes its likeliest choices."
        ),
        "",
        "| summary | ROUGE-1 | ROUGE-2 | ROUGE-L | words | ROUGE-L above lead-1 (95%) | training |",
        "|---|---|---|---|---|---|---|",
    ]
    names = ("rouge_1", "rouge_2", "rouge_l")
    for name, one in record["references"].items():
        cells = [f"{one[key]:.3f}" for key in names]
        lines.append(f"| {name} | {' | '.join(cells)} | {one['words']:.1f} | | |")
    for seed, one in record["seeds"].items():
        cells = [f"{one['before'][key]:.3f} → {one['after'][key]:.3f}" for key in names]
        mean, low, high = one["gain_over_lead"]
        told = f"{mean:+.3f} ({low:+.3f} to {high:+.3f}) | {one['steps']} steps, {one['seconds']:.0f} s"
        lines.append(f"| policy, seed {seed} | {' | '.join(cells)} | {one['after']['words']:.1f} | {told} |")
    return "\n".join([*lines, ""])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lists", default="runs/apt-lists", help="a folder with apt's lists")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--held-out", type=int, default=1000)
    parser.add_argument("--folder", type=Path, default=Path("runs/benchmark-extractive"))
    parser.add_argument("override", nargs="*", help="changes to the recipe, as for `instant-reward train`")
    options = parser.parse_args()
    rows = documents("held_out", options.held_out, options.lists)
    lead = [split(row["prompt"])[0].strip() for row in rows]
    drawn = random.Random(0)
    any_one = [drawn.choice(split(row["prompt"])).strip() for row in rows]
    references = {"any sentence": any_one, "lead-1": lead, "greedy oracle": [oracle(row) for row in rows]}
    record: dict[str, Any] = {
        "command": "python benchmarks/extractive.py" + "".join(f" {one}" for one in options.override),
        "machine": machine(1),
        "documents": {"train": len(documents("train", None, options.lists)), "held_out": len(rows)},
        "references": {name: figures(texts, rows) for name, texts in references.items()},
        "seeds": {},
    }
    for seed in options.seeds:
        record["seeds"][str(seed)] = run(seed, options, rows, lead)
        (RESULTS / "extractive.json").write_text(json.dumps(record, indent=1) + "\n")
        (RESULTS / "extractive.md").write_text(table(record))
    print(table(record))


if __name__ == "__main__":
    main()
