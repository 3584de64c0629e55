"""A slow reward beside the decoding: sampling and scoring together against the longer of the two.

    python benchmarks/overlap.py

A reward per sentence that waits (as a judge or another machine does), for so long that all its waits together take as
long as the decoding alone. Written to `benchmarks/results/overlap.json` and `overlap.md`: medians of the rounds, all in
one process. "one by one" asks for one sentence at a time; "in batches" waits once for all sentences that end with the
same token; "may stop" is the same reward without `stops=False`, whose verdict is waited for `stop_lag` steps later.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from runs import RESULTS, machine

import instant_reward as ir
from instant_reward.data import to_prompts
from instant_reward.reviews import movie_reviews
from instant_reward.sampling.draw import Settings
from instant_reward.sampling.engine import Engine

GOAL = 1.2


class Waiting:
    """A reward that waits ``seconds`` a call and counts its calls."""

    def __init__(self, seconds: float) -> None:
        self.seconds, self.calls = seconds, 0

    def one(self, view: ir.View) -> float:
        self.calls += 1
        time.sleep(self.seconds)
        return float(len(view.piece))

    def several(self, views: list[ir.View]) -> list[float]:
        self.calls += 1
        time.sleep(self.seconds)
        return [float(len(view.piece)) for view in views]


def way(name: str, waiting: Waiting) -> ir.Reward:
    batched = name != "one by one"
    function = waiting.several if batched else waiting.one
    return ir.reward(every="sentence", name="waits", batched=batched, stops=name == "may stop")(function)


def _sampled(engine: Engine, prompts: list[Any], rewards: list[Any]) -> None:
    list(engine.stream(prompts, 8, rewards))


def seconds(work: Callable[[], Any]) -> float:
    begun = time.perf_counter()
    work()
    return time.perf_counter() - begun


def measured(engine: Engine, prompts: list[Any], name: str, rounds: int) -> dict[str, float]:
    """Decoding alone, the waits alone, and both together; what is compared is measured in turn."""
    counting = Waiting(0.0)
    _sampled(engine, prompts, [way(name, counting)])
    calls, rows = counting.calls, []
    for _ in range(rounds):
        alone = seconds(partial(_sampled, engine, prompts, []))
        waiting = Waiting(alone / calls)
        rewards = [way(name, waiting)]
        together = seconds(partial(_sampled, engine, prompts, rewards))
        rows.append((alone, waiting.calls * waiting.seconds, together))
    ratios = [both / max(alone, waits) for alone, waits, both in rows]
    alone, waits, both = (statistics.median(column) for column in zip(*rows, strict=True))
    return {"calls": calls, "decoding": alone, "waiting": waits, "together": both, "ratio": statistics.median(ratios)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    policy = ir.load_policy("smollm2-135m", "auto")
    prompts = to_prompts(movie_reviews("held_out", limit=4), policy.tokenizer)
    found = {}
    for tokens in (32, 128):
        engine = Engine(policy, Settings(max_new_tokens=tokens, min_new_tokens=tokens))
        for name in ("one by one", "in batches", "may stop"):
            found[f"{tokens} tokens, {name}"] = measured(engine, prompts, name, options.rounds)
            print(f"{tokens} tokens, {name}: {found[f'{tokens} tokens, {name}']}", flush=True)
    record = {
        "machine": machine(options.threads),
        "dtype": str(policy.compute).removeprefix("torch."),
        "goal": GOAL,
        "rows": found,
    }
    (RESULTS / "overlap.json").write_text(json.dumps(record, indent=1) + "\n")
    (RESULTS / "overlap.md").write_text(table(record))
    print(table(record))


def table(record: dict[str, Any]) -> str:
    about = (
        f"Written by `python benchmarks/overlap.py`: SmolLM2-135M, 4 prompts x 8 texts, {record['dtype']}, "
        f"{record['machine']}. The ratio is both together over the longer of the two; the goal is at most {GOAL}."
    )
    lines = [
        "# A reward that waits, beside the decoding",
        "",
        about,
        "",
        "| case | calls | decoding, s | waiting, s | together, s | ratio |",
        "|---|---|---|---|---|---|",
    ]
    for name, row in record["rows"].items():
        numbers = [f"{row[key]:.2f}" for key in ("decoding", "waiting", "together", "ratio")]
        lines.append("| " + " | ".join([name, str(row["calls"]), *numbers]) + " |")
    return "\n".join([*lines, ""])


if __name__ == "__main__":
    main()
