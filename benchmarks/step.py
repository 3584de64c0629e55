"""One training step against TRL's GRPOTrainer: the same model, prompts, reward, group size, lengths and threads.

    python benchmarks/step.py                       (needs the extra "bench", or --peer-python with trl in it)
    python benchmarks/step.py --rounds 3 --steps 4

Each side runs in a process of its own, in turns (ours, TRL, ours, TRL, ...): a noisy machine is noisy to both. A
process takes one step to warm up and then `--steps` timed ones. What counts is the ratio of the medians. TRL runs as it
comes and with gradient checkpointing switched off; the ratio is taken against the faster of the two.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
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
RESULT = Path(__file__).parent / "results" / "step.json"


def reward(completions: list[str], **_: object) -> list[float]:
    """A reward that costs nothing: the share of vowels."""
    return [sum(character in "aeiou" for character in text) / max(1, len(text)) for text in completions]


def time_ours(options: argparse.Namespace, out: str) -> list[float]:
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
        dtype="float32",
        out=out,
    )
    return [row["time/sampling"] + row["time/learning"] for row in run.metrics[1:]]


def time_trl(options: argparse.Namespace, out: str, checkpointing: bool) -> list[float]:
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
        model=AutoModelForCausalLM.from_pretrained(options.model, dtype=torch.float32),
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
        if options.side == "ours":
            seconds = time_ours(options, str(Path(out) / "run"))
        else:
            seconds = time_trl(options, out, checkpointing=options.side == "trl_default")
    print(json.dumps(seconds))


def start(side: str, options: argparse.Namespace) -> list[float]:
    python = sys.executable if side == "ours" else options.peer_python
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
    return [float(value) for value in json.loads(done.stdout.strip().splitlines()[-1])]


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
    names = {
        "ours": "instant-reward",
        "trl_no_checkpointing": "TRL, gradient checkpointing off",
        "trl_default": "TRL as it comes",
    }
    rows = [
        f"| {names[side]} | {median:.2f} | {median / result['median']['ours']:.2f} |"
        for side, median in result["median"].items()
    ]
    sizes = f"{result['texts']} texts of {result['tokens']} tokens, float32, {result['threads']} thread(s)"
    how = f"SmolLM2-135M, {sizes}, each side in a process of its own, in turns. Medians."
    head = ["# One training step against TRL's GRPOTrainer", "", f"Written by `{result['command']}`: {how}", ""]
    columns = ["| | seconds a step | against ours |", "|---|---|---|"]
    return "\n".join([*head, *columns, *rows, "", f"Machine: {json.dumps(result['machine'])}", ""])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--side", choices=("ours", "trl_default", "trl_no_checkpointing"), help=argparse.SUPPRESS)
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
    sides = ("ours", "trl_no_checkpointing", "trl_default")
    seconds: dict[str, list[float]] = {side: [] for side in sides}
    for number in range(options.rounds):
        for side in sides:
            found = start(side, options)
            seconds[side] += found
            print(f"round {number + 1}  {side}: {', '.join(f'{value:.2f}' for value in found)} s", flush=True)
    medians = {side: statistics.median(values) for side, values in seconds.items()}
    result = {
        "command": "python benchmarks/step.py " + " ".join(sys.argv[1:]),
        "seconds": seconds,
        "median": medians,
        "ratio_to_the_faster_trl": min(medians[side] for side in sides if side != "ours") / medians["ours"],
        "texts": options.prompts * options.group,
        "tokens": options.tokens,
        "threads": options.threads,
        "machine": machine(),
    }
    RESULT.parent.mkdir(exist_ok=True)
    RESULT.write_text(json.dumps(result, indent=2) + "\n")
    RESULT.with_suffix(".md").write_text(table(result))
    print(f"ours is {result['ratio_to_the_faster_trl']:.2f} times as fast as the faster TRL; written to {RESULT}")


if __name__ == "__main__":
    main()
