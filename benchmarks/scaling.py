"""Cost against work: a training step with twice the tokens, prompts or siblings, and with four times the vocabulary.

    python benchmarks/scaling.py

Each case in a process of its own, median of the timed steps. A row is linear where its time grows no more than its
work. Of the larger vocabulary the weights and their optimizer states grow too: memory beyond these (16 bytes a weight,
and copies for the products) is what should stay flat. Writes `scaling.json` and `scaling.md` to `benchmarks/results/`.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
from pathlib import Path
from typing import Any

from step import RESULTS, machine, start

from instant_reward.models import locate

CASES: dict[str, dict[str, int]] = {
    "4 prompts x 8 texts x 32 tokens": {},
    "tokens x 2": {"tokens": 64},
    "prompts x 2": {"prompts": 8},
    "siblings x 2": {"group": 16},
    "vocabulary x 4": {},
}
BYTES_PER_WEIGHT = 4 * 4 + 2 * 2  # master, gradient and two states in float32; two copies in bfloat16


def widened(folder: Path, times: int, out: Path) -> Path:
    """The model with so many times the vocabulary; the new words are as likely as the old ones' mean."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder)
    size = model.get_input_embeddings().weight.shape[0]
    tokenizer.add_tokens([f"<new {number}>" for number in range(times * size - len(tokenizer))])
    model.resize_token_embeddings(times * size, mean_resizing=False)
    model.save_pretrained(out)
    tokenizer.save_pretrained(out)
    return out


def table(record: dict[str, Any]) -> str:
    base = next(iter(record["cases"].values()))
    how = "Written by `python benchmarks/scaling.py`: SmolLM2-135M, dtype auto."
    lines = [
        "# Cost against work",
        "",
        f"{how} Machine: {json.dumps(record['machine'])}",
        "",
        "| case | seconds a step | times the first row | peak, GiB | beyond weights and states, GiB |",
        "|---|---|---|---|---|",
    ]
    for name, row in record["cases"].items():
        cells = [row["seconds"], row["seconds"] / base["seconds"], row["peak_gib"], row["beyond_gib"]]
        lines.append(f"| {name} | " + " | ".join(f"{cell:.2f}" for cell in cells) + " |")
    return "\n".join([*lines, ""])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=2)
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    place = locate("smollm2-135m")
    found: dict[str, dict[str, float]] = {}
    with tempfile.TemporaryDirectory() as scratch:
        for name, changes in CASES.items():
            wide = name.startswith("vocabulary")
            model = widened(place, 4, Path(scratch) / "wide") if wide else place
            sizes = {"prompts": 4, "group": 8, "tokens": 32, **changes}
            asked = argparse.Namespace(model=str(model), steps=options.steps, threads=options.threads, **sizes)
            measured = start("ours", asked)
            weights = 134_515_008 + (3 * 49_152 * 576 if wide else 0)
            found[name] = {
                "seconds": statistics.median(measured["seconds"]),
                "peak_gib": measured["peak_gib"],
                "beyond_gib": measured["peak_gib"] - BYTES_PER_WEIGHT * weights / 2**30,
            }
            print(name, found[name], flush=True)
    record = {"machine": machine(), "cases": found}
    (RESULTS / "scaling.json").write_text(json.dumps(record, indent=1) + "\n")
    (RESULTS / "scaling.md").write_text(table(record))
    print(table(record))


if __name__ == "__main__":
    main()
