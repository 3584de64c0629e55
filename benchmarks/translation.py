"""A small translation model: maximum likelihood alone against a change-in-chrF reward after it, on held-out pairs.

    python benchmarks/translation.py --out DIR [--seeds 0 1 2]
    python benchmarks/translation.py --model-only DIR

For each seed a model is trained from scratch by maximum likelihood. From there two go on for as many optimizer steps
over as many texts: one by the likelihood of the references, one by ``recipes/translation.yaml``.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import time
from pathlib import Path
from typing import Any

import torch

import instant_reward as ir
from instant_reward.batch import Batch, collate
from instant_reward.policies.optimizer import Optimization
from instant_reward.policies.policy import Policy
from instant_reward.types import Prompt, Rollout

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "recipes"))
RESULTS = ROOT / "benchmarks" / "results"
LONGEST = 24


def target(policy: Policy, prompt: Prompt) -> Rollout:
    """The reference as a text that was given."""
    ids = policy.actions_of(prompt.info["reference"], prompt)[:LONGEST]
    first, length = len(prompt.token_ids), len(prompt.token_ids) + len(ids)
    return Rollout(
        id=prompt.id,
        group=int(prompt.id),
        prompt=prompt,
        token_ids=[*prompt.token_ids, *ids],
        mask=[False] * first + [True] * len(ids),
        logprobs=[0.0] * length,
        char_ends=[0] * length,
        text=prompt.info["reference"],
        marks=[],
        versions=[-1] * length,
        stop="ended",
    )


def likelihood(policy: Policy, steps: int, texts: int, rate: float, seed: int, schedule: Any = "linear") -> None:
    """Maximum likelihood of the training pairs, with dropout: a mean over tokens, ``texts`` a step."""
    from sentence_pairs import pairs

    rollouts = [target(policy, prompt) for prompt in policy.prompts(pairs(), "prompt", LONGEST)]
    policy.prepare(Optimization(learning_rate=rate, steps=steps, schedule=schedule, warmup=min(50, steps // 10)))
    order = random.Random(seed)
    torch.manual_seed(seed)
    policy.model.train()
    for _ in range(steps):
        batch: Batch = collate(order.sample(rollouts, texts), pad_id=policy.pad_id)
        policy.backward(-policy(batch).logprobs.sum() / batch.token_count)
        policy.step()
    policy.model.eval()


def figures(policy: Policy) -> dict[str, float]:
    """Corpus chrF and BLEU of the likeliest-token translations of the held-out sources, and their length."""
    import sacrebleu
    from sentence_pairs import pairs

    rows = pairs("held_out")
    found = policy.sample([row["prompt"] for row in rows], max_new_tokens=LONGEST, temperature=0, rows=128)
    texts, references = [one.text for one in found], [[row["reference"] for row in rows]]
    return {
        "chrf": sacrebleu.corpus_chrf(texts, references).score,
        "bleu": sacrebleu.corpus_bleu(texts, references).score,
        "words": sum(len(text.split()) for text in texts) / len(texts),
    }


def begin(folder: Path, seed: int, steps: int) -> Policy:
    """A model from scratch by maximum likelihood, saved in ``folder``."""
    from sentence_pairs import untrained

    policy = ir.load_policy(str(untrained(folder, seed)), dtype="float32")
    likelihood(policy, steps, 32, 2e-3, seed)
    policy.save(folder)
    return policy


def one_seed(out: Path, seed: int, first: int, more: int, overrides: list[str]) -> dict[str, Any]:
    """The figures of one seed, and the seconds of each part."""
    row: dict[str, Any] = {"seed": seed}
    folder = out / f"likelihood-{seed}"
    clock = time.perf_counter()
    row["likelihood"] = figures(begin(folder, seed, first))
    row["seconds"] = {"likelihood": time.perf_counter() - clock}
    print(json.dumps(row), flush=True)
    clock = time.perf_counter()
    policy = ir.load_policy(str(folder), dtype="float32")
    likelihood(policy, more, 128, 2e-4, seed + 100)
    row["more_likelihood"] = figures(policy)
    row["seconds"]["more_likelihood"] = time.perf_counter() - clock
    clock = time.perf_counter()
    changes = [f"model.name={folder}", f"train.steps={more}", f"seed={seed}", f"out={out / f'chrf-{seed}'}"]
    run = ir.train(ir.Config.load(ROOT / "recipes" / "translation.yaml", [*changes, *overrides]))
    row["chrf_reward"] = figures(run.policy)
    row["seconds"]["chrf_reward"] = time.perf_counter() - clock
    row["reward"] = [run.metrics[0]["reward"], run.metrics[-1]["reward"]]
    print(json.dumps(row), flush=True)
    return row


def main() -> None:
    """Runs the seeds and writes the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/translation"))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--first", type=int, default=1200, help="steps of maximum likelihood from scratch")
    parser.add_argument("--more", type=int, default=100, help="further steps, by likelihood or by reward")
    parser.add_argument("--model-only", type=Path, help="train by maximum likelihood into this folder, and stop")
    parser.add_argument("overrides", nargs="*", help="of the recipe, dotted")
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.model_only is not None:
        print(json.dumps(figures(begin(options.model_only, options.seeds[0], options.first))))
        return
    rows = [one_seed(options.out, seed, options.first, options.more, options.overrides) for seed in options.seeds]
    found = {"rows": rows, "first": options.first, "more": options.more, "overrides": options.overrides}
    (RESULTS / "translation.json").write_text(json.dumps(found, indent=1) + "\n")
    (RESULTS / "translation.md").write_text(table(found))
    print(table(found))


def table(found: dict[str, Any]) -> str:
    """The figures as a page."""
    names = {
        "likelihood": f"maximum likelihood, {found['first']} steps",
        "more_likelihood": f"then {found['more']} more of likelihood",
        "chrf_reward": f"then {found['more']} of the reward",
    }
    lines = [
        "# Translation: a reward for the change in chrF, after maximum likelihood",
        "",
        "Chinese to English, a T5-shaped model from scratch, likeliest-token translations of held-out sentences (means",
        "over the seeds, each seed's own figure in brackets). Made by `benchmarks/translation.py` on one thread.",
        "",
        "| | chrF | BLEU | words | seconds a seed |",
        "|---|---|---|---|---|",
    ]
    for name, title in names.items():
        cells = [_cell([row[name][figure] for row in found["rows"]]) for figure in ("chrf", "bleu", "words")]
        seconds = sum(row["seconds"][name] for row in found["rows"]) / len(found["rows"])
        lines.append(f"| {title} | {' | '.join(cells)} | {seconds:.0f} |")
    return "\n".join(lines) + "\n"


def _cell(values: list[float]) -> str:
    return f"{sum(values) / len(values):.1f} ({', '.join(f'{value:.1f}' for value in values)})"


if __name__ == "__main__":
    main()
