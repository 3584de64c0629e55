"""A small translation model: a reward for the change in chrF after maximum likelihood, against more likelihood alone.

    python benchmarks/translation.py [--seeds 0 1 2] [--folder runs/benchmark-translation]

Each seed draws other weights and other orders of the texts. A model is trained from nothing by
`recipes/translation.yaml`. From it two go on for as many optimizer steps: one by the likelihood of the references, with
as many texts a step as the reward samples, and one by `recipes/translation_reward.yaml`. Writes
`results/translation.json` and `.md` after each seed.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import sacrebleu
import torch
from runs import RECIPES, RESULTS, ROOT, machine

import instant_reward as ir
from instant_reward.config import Config
from instant_reward.policies.policy import Policy

sys.path.insert(0, str(RECIPES))
FIGURES = {"chrf": "chrF", "bleu": "BLEU", "sampled_chrf": "chrF, sampled", "sampled_bleu": "BLEU, sampled"}


def figures(policy: Policy, limit: int) -> dict[str, Any]:
    """Corpus chrF and BLEU of held-out translations, by the likeliest token and sampled at temperature 1."""
    from sentence_pairs import pairs

    rows = pairs("held_out", limit)
    references = [[row["reference"] for row in rows]]
    found: dict[str, Any] = {}
    for name, temperature in (("", 0.0), ("sampled_", 1.0)):
        rollouts = policy.sample([row["prompt"] for row in rows], 1, 24, temperature, rows=128)
        texts = [one.text for one in rollouts]
        found[f"{name}chrf"] = sacrebleu.corpus_chrf(texts, references).score
        found[f"{name}bleu"] = sacrebleu.corpus_bleu(texts, references).score
        found[f"{name}words"] = sum(len(text.split()) for text in texts) / len(texts)
        if not temperature:
            found["examples"] = [[row["prompt"], text] for row, text in zip(rows[:8], texts, strict=False)]
    return found


def run_part(name: str, recipe: str, changes: list[str], folder: Path, options: argparse.Namespace) -> dict[str, Any]:
    """Trains a recipe, and keeps the policy and its figures in ``folder``; what is there is not run again."""
    kept = folder / f"{name}.json"
    if not kept.is_file():
        clock = time.perf_counter()
        changes = [*changes, f"out={folder / name}", "train.threads=1"]
        run = ir.train(Config.load(RECIPES / f"{recipe}.yaml", changes, recipe == "translation"))
        seconds = time.perf_counter() - clock
        run.policy.save(folder / f"{name}-model")
        found = {"seconds": seconds, "steps": len(run.metrics), **figures(run.policy, options.held_out)}
        found |= {key: run.metrics[-1][key] for key in ("held_out/nll",) if key in run.metrics[-1]}
        found |= {"reward": [row["reward"] for row in run.metrics]} if recipe != "translation" else {}
        kept.write_text(json.dumps(found, ensure_ascii=False), "utf-8")
    found = json.loads(kept.read_text("utf-8"))
    print(folder.name, name, {key: round(found[key], 1) for key in (*FIGURES, "words", "seconds")}, flush=True)
    return dict(found)


def one_seed(seed: int, options: argparse.Namespace) -> dict[str, Any]:
    """The figures of one seed's three models."""
    folder, same = options.folder / f"seed-{seed}", f"seed={seed}"
    row = {"likelihood": run_part("likelihood", "translation", [same, f"model.scratch.seed={seed}"], folder, options)}
    if options.first_only:
        return row
    start = f"model.name={folder / 'likelihood-model'}"
    reward = Config.load(RECIPES / "translation_reward.yaml", options.override).train
    again = [f"train.{key}={getattr(reward, key)}" for key in ("steps", "learning_rate", "schedule", "warmup")]
    again += [f"train.prompts_per_step={reward.prompts_per_step * reward.group_size}", "train.tokens_per_step=null"]
    again += [start, same, "model.scratch=null", "train.epochs=null", "evaluate.every=null", "evaluate.texts=null"]
    row["more_likelihood"] = run_part("more_likelihood", "translation", again, folder, options)
    changes = [start, same, *options.override]
    row["chrf_reward"] = run_part("chrf_reward", "translation_reward", changes, folder, options)
    return row


def table(record: dict[str, Any]) -> str:
    """The figures as a page: means over the seeds, each seed's own in brackets."""
    rows = record["rows"]
    steps = {name: part["steps"] for name, part in rows[0].items()}
    titles = {
        "likelihood": f"likelihood, {steps['likelihood']} steps",
        "more_likelihood": f"then {steps['more_likelihood']} more of likelihood",
        "chrf_reward": f"then {steps['chrf_reward']} of the change in chrF, likelihood beside it",
    }
    about = (
        "English to Spanish as Apertium writes it, short sentences of film reviews; a BART-shaped model from nothing; "
        f"{len(rows)} seeds; corpus scores by sacrebleu on {record['held_out']} held-out sentences, by the likeliest "
        "token and sampled at temperature 1. Means, each seed's own figure in brackets. Written by "
        f"`python benchmarks/translation.py`; {record['machine']}, a shared machine."
    )
    lines = [
        "# Translation: a reward for the change in chrF, after maximum likelihood",
        "",
        about,
        "",
        f"| | {' | '.join(FIGURES.values())} | seconds a seed |",
        f"|---|{'---|' * (len(FIGURES) + 1)}",
    ]
    for name, title in titles.items():
        cells = [cell([row[name][key] for row in rows]) for key in FIGURES]
        seconds = statistics.mean(row[name]["seconds"] for row in rows)
        lines.append(f"| {title} | {' | '.join(cells)} | {seconds:.0f} |")
    gaps = [[row["chrf_reward"][key] - row["more_likelihood"][key] for row in rows] for key in FIGURES]
    lines.append(f"| the last less the one before | {' | '.join(cell(one) for one in gaps)} | |")
    return "\n".join(lines) + "\n"


def cell(values: list[float]) -> str:
    """A mean, and what it is of."""
    return f"{statistics.mean(values):.1f} ({', '.join(f'{value:.1f}' for value in values)})"


def main() -> None:
    """Runs the seeds and writes the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=ROOT / "runs" / "benchmark-translation")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--held-out", type=int, default=600, help="how many held-out sentences are translated")
    parser.add_argument("--first-only", action="store_true", help="stop after the likelihood from nothing")
    parser.add_argument("override", nargs="*", help="changes to recipes/translation_reward.yaml")
    options = parser.parse_args()
    torch.set_num_threads(1)
    record: dict[str, Any] = {
        "held_out": options.held_out,
        "override": options.override,
        "machine": machine(1),
        "rows": [],
    }
    for seed in options.seeds:
        record["rows"].append(one_seed(seed, options))
        if options.first_only:
            continue
        (RESULTS / "translation.json").write_text(json.dumps(record, indent=1, ensure_ascii=False) + "\n", "utf-8")
        (RESULTS / "translation.md").write_text(table(record), "utf-8")
    if not options.first_only:
        print(table(record))


if __name__ == "__main__":
    main()
