"""Decoding against transformers' `generate`, and decoding and learning against what the machine can do.

    python benchmarks/decoding.py

The same prompts, the same lengths, one process, in turns; medians of the rounds (of fewer where a round is long).
Writes `decoding.json` and
`decoding.md` to `benchmarks/results/`. The machine's limit is the longer of two times: its weights read once a step at
the bandwidth of a large copy, and the step's arithmetic at the speed of a large matrix product, both measured here.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from runs import RESULTS, machine
from transformers import AutoModelForCausalLM, AutoTokenizer, StoppingCriteria, StoppingCriteriaList

import instant_reward as ir
from instant_reward.batch import collate
from instant_reward.data import to_prompts
from instant_reward.models import locate
from instant_reward.policies.optimizer import Optimization
from instant_reward.policies.packed import pack
from instant_reward.reviews import movie_reviews
from instant_reward.sampling.draw import Settings
from instant_reward.sampling.engine import Engine
from instant_reward.sampling.sampler import in_order
from instant_reward.types import Prompt

MODEL = "smollm2-135m"
LONG_ROUNDS = 2
TOKENS_PER_PART = 1280  # as train.tokens_per_part comes
VARIED = [8 + (120 * number) // 31 for number in range(32)]  # 8 to 128


def clock(work: Callable[[], Any]) -> float:
    begun = time.perf_counter()
    work()
    return time.perf_counter() - begun


class Ends(StoppingCriteria):
    """Ends each row at a length of its own."""

    def __init__(self, begin: int, lengths: list[int]) -> None:
        self.lengths = torch.tensor(lengths) + begin

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor, **_: object) -> torch.Tensor:
        return input_ids.shape[1] >= self.lengths


@ir.reward(every="token")
def ends(view: ir.View) -> Any:
    """Stops each text at a length of its own."""
    return ir.stop() if view.sampled >= view.info["length"] else None


class Peer:
    """`generate` of a model in a dtype."""

    def __init__(self, dtype: torch.dtype) -> None:
        folder = locate(MODEL)
        self.tokenizer = AutoTokenizer.from_pretrained(folder, padding_side="left")
        self.model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()

    def run(self, prompts: list[Prompt], copies: int, lengths: list[int]) -> None:
        texts = [prompt.text for prompt in prompts for _ in range(copies)]
        inputs = self.tokenizer(texts, return_tensors="pt", padding=True)
        begin, longest = inputs["input_ids"].shape[1], max(lengths)
        several = len(set(lengths)) > 1
        stops = {"stopping_criteria": StoppingCriteriaList([Ends(begin, lengths)])} if several else {}
        self.model.generate(
            **inputs, **stops, do_sample=True, temperature=1.0, top_k=0, top_p=1.0, min_new_tokens=min(lengths),
            max_new_tokens=longest, pad_token_id=self.tokenizer.pad_token_id,
        )  # fmt: skip


def engines(policy: Any, longest: int) -> Engine:
    return Engine(policy, Settings(max_new_tokens=longest, min_new_tokens=longest))


def compared(policies: dict[str, Any], peers: dict[str, Peer], rounds: int) -> dict[str, dict[str, float]]:
    """Seconds of each side for each case."""
    tokenizer = next(iter(policies.values())).tokenizer
    rows = movie_reviews("held_out", limit=32)
    few = to_prompts(rows[:4], tokenizer)
    many = to_prompts([{**row, "length": length} for row, length in zip(rows, VARIED, strict=True)], tokenizer)
    cases: dict[str, tuple[list[Prompt], int, list[int], list[Any]]] = {
        "32 tokens": (few, 8, [32] * 32, []),
        "128 tokens": (few, 8, [128] * 32, []),
        "8 to 128 tokens": (many, 1, VARIED, [ends]),
    }
    found: dict[str, dict[str, float]] = {}
    for case, (prompts, copies, lengths, rewards) in cases.items():
        turns = rounds if case == "32 tokens" else min(rounds, LONG_ROUNDS)
        sides: dict[str, Callable[[], Any]] = {}
        for dtype, policy in policies.items():
            engine = engines(policy, max(lengths))
            sides[f"ours, {dtype}"] = lambda e=engine, p=prompts, c=copies, r=rewards: list(e.stream(p, c, r))
        for dtype, peer in peers.items():
            sides[f"generate, {dtype}"] = lambda g=peer, p=prompts, c=copies, n=lengths: g.run(p, c, n)
        times: dict[str, list[float]] = {side: [] for side in sides}
        warming = 0 if found else 1  # the first round of the first case warms up
        for number in range(turns + warming):
            for side, work in sides.items():
                seconds = clock(work)
                if number >= warming:
                    times[side].append(seconds)
        found[case] = {side: statistics.median(values) for side, values in times.items()}
        print(case, {side: round(value, 2) for side, value in found[case].items()}, flush=True)
    return found


def calibrated(dtype: torch.dtype) -> dict[str, float]:
    """The machine's copy bandwidth (bytes read and written) and its speed of matrix products."""
    source = torch.randn(2**26)
    target = torch.empty_like(source)
    copy = min(clock(lambda: target.copy_(source)) for _ in range(10))
    left, right = torch.randn(1024, 576).to(dtype), torch.randn(1536, 576).to(dtype)
    product = min(clock(lambda: torch.nn.functional.linear(left, right)) for _ in range(50))
    return {"bytes_per_second": 2 * 4 * source.numel() / copy, "flops": 2 * 1024 * 576 * 1536 / product}


def limits(policy: Any, decoding: dict[str, dict[str, float]], side: str, rounds: int) -> dict[str, Any]:
    """Decoding and learning as shares of what the calibration allows."""
    speed = calibrated(policy.compute)
    head = policy.model.get_output_embeddings().weight.numel()
    layers = sum(parameter.numel() for parameter in policy.model.parameters()) - head  # the embeddings are the head
    size = 2 if policy.compute == torch.bfloat16 else 4
    least = max((layers + head) * size / speed["bytes_per_second"], 2 * 32 * (layers + head) / speed["flops"])
    found: dict[str, Any] = {**speed, "decoding_limit_ms": 1000 * least}
    for tokens in (32, 128):
        step = decoding[f"{tokens} tokens"][side] / tokens
        found[f"decoding_{tokens}"] = {"ms": 1000 * step, "share": least / step}
        prompts = to_prompts(movie_reviews("held_out", limit=4), policy.tokenizer)
        batch = collate(in_order(engines(policy, tokens).stream(prompts, 8)), pad_id=policy.pad_id)
        policy.prepare(Optimization())

        def learn(batch: Any = batch) -> None:
            for part in batch.parts(TOKENS_PER_PART):
                policy.backward(policy(part).logprobs.sum())
            policy.forget()

        seconds = statistics.median(clock(learn) for _ in range(min(rounds, 3)))
        work = sum(
            6 * (layers * len(pack(part).ids) + head * int(part.mask.sum())) for part in batch.parts(TOKENS_PER_PART)
        )
        found[f"learning_{tokens}"] = {"seconds": seconds, "share": work / speed["flops"] / seconds}
    return found


def table(record: dict[str, Any]) -> str:
    lines = [
        "# Decoding against `generate`, and against the machine",
        "",
        f"Written by `python benchmarks/decoding.py`: SmolLM2-135M, 32 texts, {record['machine']}. Medians, seconds.",
        "",
        "| texts of | "
        + " | ".join(next(iter(record["seconds"].values())))
        + " | generate over ours, each as it comes |",
        "|---" * (len(next(iter(record["seconds"].values()))) + 2) + "|",
    ]
    for case, row in record["seconds"].items():
        ratio = row["generate, float32"] / row[f"ours, {record['dtype']}"]
        lines.append(f"| {case} | " + " | ".join(f"{value:.2f}" for value in row.values()) + f" | {ratio:.2f} |")
    limit = record["limits"]
    lines += ["", "| against the machine | measured | share of the limit |", "|---|---|---|"]
    for tokens in (32, 128):
        one, other = limit[f"decoding_{tokens}"], limit[f"learning_{tokens}"]
        lines.append(f"| decoding, a step of 32 rows, {tokens} tokens | {one['ms']:.0f} ms | {one['share']:.0%} |")
        lines.append(f"| forward and backward, {tokens} tokens | {other['seconds']:.2f} s | {other['share']:.0%} |")
    calibration = f"{limit['bytes_per_second'] / 1e9:.0f} GB/s copied, {limit['flops'] / 1e9:.0f} GFLOP/s"
    least = f"a decoding step takes at least {limit['decoding_limit_ms']:.0f} ms"
    lines += ["", f"Calibration ({record['dtype']}): {calibration}: {least}. As it comes `generate` is float32."]
    return "\n".join([*lines, ""])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    policy = ir.load_policy(MODEL, "auto")
    dtype = str(policy.compute).removeprefix("torch.")
    policies = {dtype: policy} | ({} if dtype == "float32" else {"float32": ir.load_policy(MODEL, "float32")})
    peers = {"float32": Peer(torch.float32), "bfloat16": Peer(torch.bfloat16)}
    seconds = compared(policies, peers, options.rounds)
    record = {
        "machine": machine(options.threads),
        "dtype": dtype,
        "seconds": seconds,
        "limits": limits(policy, seconds, f"ours, {dtype}", options.rounds),
    }
    (RESULTS / "decoding.json").write_text(json.dumps(record, indent=1) + "\n")
    (RESULTS / "decoding.md").write_text(table(record))
    print(table(record))


if __name__ == "__main__":
    main()
