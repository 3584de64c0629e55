"""Every preset takes two steps on the real model, by the recipe of the main job.

    python benchmarks/presets.py                 (all of them, two prompts with four texts each)
    python benchmarks/presets.py ppo qac         (these; the rows of the others stay)

Writes `benchmarks/results/presets.md` and `presets.json`: the command of each, its losses, and the seconds of a step.
"""

from __future__ import annotations

import argparse
import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

from instant_reward.policies.load import compute_dtype
from instant_reward.presets import PRESETS

HERE = Path(__file__).parent
SIZE = ["train.steps=2", "train.prompts_per_step=2", "train.group_size=4", "evaluate.prompts=null"]
# What the recipe's rewards per word, its KL, its discount of 0.8 or its scaling need beside the preset's name.
OPTIONS = {
    **{name: ["algorithm.timing=ignore"] for name, preset in PRESETS.items() if preset.returns == "whole"},
    "raft": ["algorithm.timing=ignore", "algorithm.scale=null"],
    "instant": ["algorithm.timing=ignore"],
    "value": ["algorithm.scale=null"],
    "qac": ["algorithm.scale=null", "algorithm.kl=0"],
    "ilql": ["algorithm.scale=null", "algorithm.kl=0"],
    "distill": ["algorithm.teacher.sees=A warm and happy review. {prompt}"],
}


def run(name: str, folder: Path, threads: int) -> dict[str, Any]:
    """Two steps of one preset in a process of its own."""
    overrides = [f"algorithm={name}", *OPTIONS.get(name, [])]
    command = [sys.executable, "-m", "instant_reward.cli", "train", str(HERE.parent / "recipes" / "sentiment.yaml")]
    command += [*overrides, *SIZE, f"train.threads={threads}", "--out", str(folder / name)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        return {"overrides": overrides, "error": (done.stderr or done.stdout).strip().splitlines()[-1]}
    rows = [json.loads(line) for line in (folder / name / "metrics.jsonl").read_text().splitlines()]
    return {
        "overrides": overrides,
        "loss": [row["loss"] for row in rows],
        "grad_norm": [row["grad_norm"] for row in rows],
        "seconds": rows[-1]["time/sampling"] + rows[-1]["time/learning"],
        "finite": all(math.isfinite(value) for row in rows for value in row.values() if isinstance(value, float)),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", default=list(PRESETS), help="presets; all without any")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--folder", type=Path, default=Path("runs/benchmark-presets"))
    options = parser.parse_args()
    kept = HERE / "results" / "presets.json"
    known = json.loads(kept.read_text()) if kept.is_file() else {}
    for name in options.names:
        known[name] = run(name, options.folder, options.threads)
        print(name, known[name], flush=True)
    found = {name: known[name] for name in PRESETS if name in known}
    dtype = str(compute_dtype("auto", "cpu")).removeprefix("torch.")  # what the recipe's "auto" is on this machine
    lines = [
        "# Two steps of every preset on the real model",
        "",
        f"SmolLM2-135M, `recipes/sentiment.yaml` with `{' '.join(SIZE)}`, {options.threads} threads, {dtype}.",
        "Written by `python benchmarks/presets.py`.",
        "",
        "| overrides | loss of step 1, 2 | gradient norm | second step, s | all finite |",
        "|---|---|---|---|---|",
    ]
    for one in found.values():
        words = " ".join(f"'{word}'" if " " in word else word for word in one["overrides"])
        if "error" in one:
            lines.append(f"| `{words}` | {one['error']} | | | no |")
            continue
        pairs = [", ".join(f"{value:.4g}" for value in one[key]) for key in ("loss", "grad_norm")]
        finite = "yes" if one["finite"] else "no"
        lines.append(f"| `{words}` | {pairs[0]} | {pairs[1]} | {one['seconds']:.1f} | {finite} |")
    (HERE / "results" / "presets.md").write_text("\n".join([*lines, ""]))
    kept.write_text(json.dumps(found, indent=1) + "\n")
    if not all(one.get("finite") for one in found.values()):
        raise SystemExit("some preset failed: see benchmarks/results/presets.md")


if __name__ == "__main__":
    main()
