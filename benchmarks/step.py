"""One training step against TRL's GRPOTrainer: the same model, prompts, reward, group size, lengths and threads.

    python benchmarks/step.py                       (needs the extra "bench", or --peer-python with trl in it)
    python benchmarks/step.py --tokens 128 --sides ours trl

Each side runs in a process of its own, in turns: a noisy machine is noisy to all. A process takes one step to warm up
and then `--steps` timed ones. What counts is the ratio of the medians, and of the processes' peak memory. The sides:

    ours, ours_float32             as it comes (dtype auto), and in float32
    trl                            float32 (its autocast off), gradient checkpointing on as it comes
    trl_no_checkpointing           the same with checkpointing off
    trl_bfloat16                   weights in bfloat16, checkpointing off: the fastest of these

TRL learns from all texts in one pass; in several it would be slower and hold less.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

OPENINGS = [
    "I rented this film because of all the",
    "If only to avoid making this type of",
    "This is a story about a young man",
    "Oh, brother, after hearing about this ridiculous film",
    "I would put this at the top of",
    "Whoever wrote the screenplay for this movie obviously",
    "When I first saw a glimpse of this",
    "Who are these people and why did they",
]
RESULTS = Path(__file__).parent / "results"
SIDES = ("ours", "trl", "ours_float32", "trl_no_checkpointing", "trl_bfloat16")
SAID = {
    "ours": "instant-reward as it comes",
    "ours_float32": "instant-reward, float32",
    "trl": "TRL, float32",
    "trl_no_checkpointing": "TRL, float32, gradient checkpointing off",
    "trl_bfloat16": "TRL, weights in bfloat16, checkpointing off",
}
GOALS = {  # (whose time, over whose): the ratio to reach
    ("trl", "ours"): 4.0,
    ("trl_bfloat16", "ours"): 3.0,
    ("trl_no_checkpointing", "ours_float32"): 1.8,
}


def reward(completions: list[str], **_: object) -> list[float]:
    """A reward that costs nothing: the share of vowels."""
    return [sum(character in "aeiou" for character in text) / max(1, len(text)) for text in completions]


def time_ours(options: argparse.Namespace, out: str, dtype: str) -> list[float]:
    import torch

    import instant_reward as ir

    torch.set_num_threads(options.threads)
    run = ir.train(
        model=options.model,
        prompts=OPENINGS,
        rewards=[reward],
        algorithm={"name": "grpo"},
        steps=options.steps + 1,
        prompts_per_step=options.prompts,
        group_size=options.group,
        max_new_tokens=options.tokens,
        min_new_tokens=options.tokens,
        learning_rate=1e-6,
        dtype=dtype,
        out=out,
    )
    return [row["time/sampling"] + row["time/learning"] for row in run.metrics[1:]]


def time_trl(options: argparse.Namespace, out: str, checkpointing: bool, dtype: str) -> list[float]:
    import torch
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
    from trl import GRPOConfig, GRPOTrainer

    torch.set_num_threads(options.threads)
    seconds: list[float] = []

    class Clock(TrainerCallback):  # generation is part of the step: it happens in `training_step`
        def on_step_begin(self, *_: object, **__: object) -> None:
            self.begun = time.perf_counter()

        def on_step_end(self, *_: object, **__: object) -> None:
            seconds.append(time.perf_counter() - self.begun)

    texts = options.prompts * options.group
    settings = GRPOConfig(
        output_dir=out,
        per_device_train_batch_size=texts,
        num_generations=options.group,
        max_completion_length=options.tokens,
        generation_kwargs={"min_new_tokens": options.tokens},
        max_steps=options.steps + 1,
        learning_rate=1e-6,
        temperature=1.0,
        beta=0.0,
        bf16=False,
        use_cpu=True,
        gradient_checkpointing=checkpointing,
        report_to="none",
        save_strategy="no",
        logging_steps=1000,
        disable_tqdm=True,
    )
    trainer = GRPOTrainer(
        model=AutoModelForCausalLM.from_pretrained(options.model, dtype=getattr(torch, dtype)),
        processing_class=AutoTokenizer.from_pretrained(options.model),
        reward_funcs=reward,
        args=settings,
        train_dataset=Dataset.from_dict({"prompt": OPENINGS * 8}),
        callbacks=[Clock()],
    )
    trainer.train()
    return seconds[1:]


def work(options: argparse.Namespace) -> None:
    """What a process of one side does; its last line is its figures."""
    with tempfile.TemporaryDirectory() as out:
        if options.side.startswith("ours"):
            seconds = time_ours(
                options, str(Path(out) / "run"), "float32" if options.side == "ours_float32" else "auto"
            )
        else:
            dtype = "bfloat16" if options.side == "trl_bfloat16" else "float32"
            seconds = time_trl(options, out, checkpointing=options.side == "trl", dtype=dtype)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20  # from KiB
    print(json.dumps({"seconds": seconds, "peak_gib": peak}))


def start(side: str, options: argparse.Namespace) -> dict[str, Any]:
    python = sys.executable if side.startswith("ours") else options.peer_python
    shared = ["--model", options.model, "--steps", str(options.steps), "--threads", str(options.threads)]
    sizes = ["--prompts", str(options.prompts), "--group", str(options.group), "--tokens", str(options.tokens)]
    environment = {**os.environ, "OMP_NUM_THREADS": str(options.threads), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [python, __file__, "--side", side, *shared, *sizes],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        sys.exit(f"the side {side} failed:\n{done.stderr[-2000:]}")
    found: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return found


def machine() -> dict[str, object]:
    names = ("torch", "transformers", "trl", "instant-reward")
    found = {}
    for name in names:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "in another environment"
    return {"processor": platform.processor() or platform.machine(), "cores": os.cpu_count(), "versions": found}


def table(result: dict[str, Any]) -> str:
    """The figures as Markdown."""
    median, peak = result["median"], result["peak_gib"]
    rows = [f"| {SAID[side]} | {median[side]:.2f} | {peak[side]:.2f} |" for side in median]
    sizes = f"{result['texts']} texts of {result['tokens']} tokens, {result['threads']} threads"
    how = f"SmolLM2-135M, {sizes}; each side in a process of its own, in turns."
    head = [f"# One training step of {result['tokens']} tokens against TRL's GRPOTrainer", ""]
    head += [f"Written by `{result['command']}`: {how}", ""]
    columns = ["| | seconds a step (median) | peak memory, GiB |", "|---|---|---|"]
    ratios = ["", "| ratio | reached | goal |", "|---|---|---|"]
    for (over, under), goal in GOALS.items():
        if over in median and under in median:
            reached = f"{median[over] / median[under]:.2f}"
            ratios.append(f"| time: {SAID[over]}, over {SAID[under]} | {reached} | at least {goal} |")
    if "trl" in peak:
        said = "memory: ours as it comes, over TRL's, float32, in one pass"
        ratios.append(f"| {said} | {peak['ours'] / peak['trl']:.2f} | at most 0.6 at 128 tokens |")
    return "\n".join([*head, *columns, *rows, *ratios, "", f"Machine: {json.dumps(result['machine'])}", ""])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--side", choices=SIDES, help=argparse.SUPPRESS)
    parser.add_argument("--sides", nargs="+", choices=SIDES, default=SIDES)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--prompts", type=int, default=4)
    parser.add_argument("--group", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=32)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--peer-python", default=sys.executable, help="the Python that has trl")
    options = parser.parse_args()
    if options.side:
        work(options)
        return
    from instant_reward.models import locate

    options.model = str(locate(options.model))
    found: dict[str, list[dict[str, Any]]] = {side: [] for side in options.sides}
    for number in range(options.rounds):
        for side in options.sides:
            found[side].append(start(side, options))
            times = ", ".join(f"{value:.2f}" for value in found[side][-1]["seconds"])
            print(f"round {number + 1}  {side}: {times} s, {found[side][-1]['peak_gib']:.2f} GiB", flush=True)
    seconds = {side: [value for one in runs for value in one["seconds"]] for side, runs in found.items()}
    result = {
        "command": "python benchmarks/step.py " + " ".join(sys.argv[1:]).replace(options.peer_python, "PYTHON"),
        "seconds": seconds,
        "median": {side: statistics.median(values) for side, values in seconds.items()},
        "peak_gib": {side: max(one["peak_gib"] for one in runs) for side, runs in found.items()},
        "texts": options.prompts * options.group,
        "tokens": options.tokens,
        "threads": options.threads,
        "machine": machine(),
    }
    place = RESULTS / f"step-{options.tokens}.json"
    place.write_text(json.dumps(result, indent=2) + "\n")
    place.with_suffix(".md").write_text(table(result))
    print(table(result))


if __name__ == "__main__":
    main()
