"""An LSTM and a Transformer language model from nothing on film reviews, then steered by an instant reward.

    python benchmarks/language_models.py                       (three seeds, both models, one after the other)
    python benchmarks/language_models.py --models lstm --seeds 1

Each seed draws other weights and other orders of the texts. Maximum likelihood (`recipes/lstm.yaml`,
`recipes/transformer.yaml`), then `recipes/steer.yaml` from the model that came out. Writes to `benchmarks/results/`:
`language_models.json` (every figure of every run), `language_models.md` (the same as a table).
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

from runs import RECIPES, RESULTS, ROOT, held_out, metrics, train, versions

MODELS = ("lstm", "transformer")


def fit(model: str, seed: int, options: argparse.Namespace) -> Path:
    """Trains a recipe by maximum likelihood; a finished run is not run again."""
    out = (options.folder / f"{model}-{seed}").absolute()
    if not (out / "report.html").is_file():
        command = [sys.executable, "-m", "instant_reward.cli", "fit", str(RECIPES / f"{model}.yaml"), f"seed={seed}"]
        command += [f"model.scratch.seed={seed}", *options.override, "--out", str(out)]
        environment = {**os.environ, **({"OMP_NUM_THREADS": str(options.threads)} if options.threads else {})}
        out.parent.mkdir(parents=True, exist_ok=True)
        with out.with_suffix(".log").open("w") as log:
            subprocess.run(command, check=True, stdout=log, stderr=log, env=environment, cwd=ROOT)
    print(f"{out.name}: done", flush=True)
    return out


def steer(model: str, seed: int, fitted: Path, options: argparse.Namespace) -> Path:
    """Steers a fitted model by the reward."""
    overrides = [f"model.name={fitted}", f"seed={seed}"]
    return train("steer", (options.folder / f"steer-{model}-{seed}").absolute(), overrides, options.threads)


def of_fit(out: Path) -> dict[str, Any]:
    """What maximum likelihood brought: held-out figures by step, and its speed."""
    rows = metrics(out)
    held = [{key: value for key, value in row.items() if key.startswith("held_out/")} for row in rows]
    seconds = sum(row["time/learning"] for row in rows)
    tokens = sum(row["tokens"] for row in rows)
    return {"held_out": [row for row in held if row], "seconds": seconds, "tokens": tokens, "steps": len(rows)}


def of_steering(out: Path) -> dict[str, Any]:
    """What the reward brought on held-out prompts."""
    before, after = held_out(out)
    rows = metrics(out)
    spent = {key: sum(row[f"time/{key}"] for row in rows) for key in ("sampling", "learning")}
    return {"before": before, "after": after, "reward": [row["reward"] for row in rows], **spent}


def table(record: dict[str, Any]) -> str:
    """The figures as Markdown: the mean over seeds and, in brackets, the least and the most."""
    seeds = len(next(iter(record["runs"].values())))
    about = (
        f"Written by `{record['command']}`: {seeds} seeds, mean (least to most); "
        f"torch {record['versions'].get('torch')}, {record['versions'].get('platform')}."
    )
    lines = [
        "# Language models of the library's own, on film reviews",
        "",
        about,
        "",
        "| model | held-out perplexity | steered: sentiment | VADER (held out) | distinct-2 | reference perplexity |",
        "|---|---|---|---|---|---|",
    ]
    for model, runs in record["runs"].items():
        last = [run["fit"]["held_out"][-1]["held_out/perplexity"] for run in runs.values()]
        cells = [spread(last, "{:.1f}")]
        for key, form in (
            ("score/sentiment", "{:.3f}"), ("score/vader", "{:.3f}"), ("distinct_2", "{:.2f}"), ("perplexity", "{:.1f}")
        ):  # fmt: skip
            sides = [[run["steering"][side][key] for run in runs.values()] for side in ("before", "after")]
            cells.append(" → ".join(spread(side, form) for side in sides))
        lines.append(f"| {model} | {' | '.join(cells)} |")
    return "\n".join([*lines, ""])


def spread(values: list[float], form: str) -> str:
    """A mean with the least and the most."""
    mean, least, most = (form.format(one) for one in (statistics.mean(values), min(values), max(values)))
    return f"{mean} ({least} to {most})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=MODELS, default=MODELS)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--threads", type=int, help="threads of each run")
    parser.add_argument("--folder", type=Path, default=Path("runs/benchmark-language-models"))
    parser.add_argument("override", nargs="*", help="changes to the recipes of the likelihood")
    options = parser.parse_args()
    command = " ".join(["python benchmarks/language_models.py", *options.override])
    record: dict[str, Any] = {"command": command, "runs": {}, "versions": {}}
    for model in options.models:
        for seed in range(options.seeds):
            fitted = fit(model, seed, options)
            steered = steer(model, seed, fitted, options)
            found = {"fit": of_fit(fitted), "steering": of_steering(steered)}
            record["runs"].setdefault(model, {})[str(seed)] = found
            record["versions"] = versions(steered)
    (RESULTS / "language_models.json").write_text(json.dumps(record, indent=1) + "\n")
    (RESULTS / "language_models.md").write_text(table(record))
    print(table(record))


if __name__ == "__main__":
    main()
