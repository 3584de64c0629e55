"""The table of docs/rewards.md: what each reward measures, from its docstring, and what it costs, measured here.

    python benchmarks/rewards.py            (measures, writes benchmarks/results/rewards.json and the table)
    python benchmarks/rewards.py --table    (writes the table from the figures that are there)

Milliseconds of one thread, medians of three rounds (of one where a round takes half a minute), one text after the
other: 64 texts of 48 words scored when they are finished, and at every
word while they grow. Rewards whose model must be given, or that need a server or a sandbox, are listed without figures.
"""

from __future__ import annotations

import argparse
import inspect
import json
import re
import statistics
import time
from pathlib import Path
from typing import Any

from instant_reward.imports import resolve
from instant_reward.rewards.base import as_reward
from instant_reward.rewards.names import NAMES
from instant_reward.rewards.scope import replay_groups
from instant_reward.types import Prompt, Rollout

PAGE = Path(__file__).parents[1] / "docs" / "rewards.md"
RESULTS = Path(__file__).parent / "results" / "rewards.json"
BEGIN, END = "<!-- table: written by benchmarks/rewards.py -->\n", "<!-- end of table -->"
TEXT = (
    "the film was a slow and quiet story about two old friends who go back to the sea one last time and it is good to "
    "see how well they know each other even if some of the jokes are not as funny as they could have been I liked it"
)
WORDS = TEXT.split()
TEXTS = [" ".join([*WORDS[start:], *WORDS[:start]])[:-1] + "." for start in range(len(WORDS))]
ARGS: dict[str, dict[str, Any]] = {
    "attention_shares": {"score": "vader"},
    "avoid": {"words": ["jokes", "slow"]},
    "ensemble": {"members": ["vader", "review_sentiment"]},
    "fluency": {"model": "smollm2-135m"},
    "keywords": {"words": ["sea", "friends"]},
    "language": {"language": "en"},
    "learned_shares": {"score": "vader"},
    "length": {"target": 40},
    "uniform_shares": {"score": "vader"},
}
GIVEN = {  # what each needs that this script does not have
    "classifier": "a model", "piece_classifier": "a model", "entailment": "a model", "log_ratio": "two models",
    "reward_model": "a model", "step_reward_model": "a model", "token_reward_model": "a model", "judge": "a server",
    "program_tests": "a sandbox",
    "regex": "a pattern", "json_schema": "a schema", "topic": "a corpus", "random_distillation": "a model",
}  # fmt: skip
WHOLE = {"attention_shares", "uniform_shares"}  # cut from a finished text's score: of no use at every word


def about(name: str) -> dict[str, str]:
    """The parts of a reward's docstring."""
    text = " ".join((inspect.getdoc(resolve(NAMES[name])) or "").split())
    first = re.split(r"(?<=[.\]])\s", text)[0]
    parts = {
        key: re.search(rf"{key}: (.*?)(?= (?:Cost|What games it|Source|Attributes): |$)", text)
        for key in ("What games it",)
    }
    return {"measures": first, **{key: found[1] if found else "" for key, found in parts.items()}}


def finished(number: int, text: str) -> Rollout:
    """A text whose tokens are words, with what the metrics compare it with."""
    ends = [match.end() for match in re.finditer(r"\S+\s*", text)]
    info = {"reference": TEXTS[0], "answer": "12"}
    prompt = Prompt(str(number), "Tell me of a film:", [], None, info)
    count = len(ends)
    return Rollout(
        id=f"{number}/0", group=number // 8, prompt=prompt, token_ids=list(range(count)), mask=[True] * count,
        logprobs=[0.0] * count, char_ends=ends, text=text, marks=[], versions=[0] * count, stop="ended", info=info,
    )  # fmt: skip


def milliseconds(name: str, every: str, rounds: int = 3) -> float | None:
    """For 64 texts; None where the reward has pieces of its own that leave no choice."""
    made = as_reward(resolve(NAMES[name])(**ARGS.get(name, {})))
    if every == "word" and made.scope == "group":
        return None
    try:
        made = made.but(every=every) if made.scope != "group" else made
    except ValueError:
        return None
    spent = []
    while len(spent) < rounds and sum(spent) < 30_000:  # the slow ones once
        texts = [finished(number, TEXTS[number % len(TEXTS)]) for number in range(64)]
        begun = time.perf_counter()
        replay_groups([made], texts)
        spent.append(1000 * (time.perf_counter() - begun))
    return statistics.median(spent)


def table(figures: dict[str, Any]) -> str:
    measured = "machine" in figures
    lines = ["| `use` | what it measures | what games it | ms, finished | ms, at every word |", "|---|---|---|---|---|"]
    for name in sorted(NAMES):
        one, told = figures.get(name, {}), about(name)
        cells = [f"{one[key]:.0f}" if isinstance(one.get(key), float) else "" for key in ("end", "word")]
        if name in GIVEN:
            cells = [f"needs {GIVEN[name]}", ""]
        row = [f"`{name}`", told["measures"], told["What games it"], *cells]
        row = row if measured else row[:3]
        lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |")
    if not measured:
        return "\n".join(["| `use` | what it measures | what games it |", "|---|---|---|", *lines[2:], ""])
    machine = figures.get("machine")
    note = f"Milliseconds for 64 texts of {len(WORDS)} words, one after the other, on one thread of {machine}."
    return "\n".join([*lines, "", note, ""])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--table", action="store_true", help="measure nothing")
    options = parser.parse_args()
    figures: dict[str, Any] = json.loads(RESULTS.read_text()) if RESULTS.is_file() else {}
    if not options.table:
        import platform

        import torch

        torch.set_num_threads(1)
        figures = {"machine": f"{platform.machine()}, {torch.__version__.partition('+')[0]}"}
        for name in sorted(set(NAMES) - set(GIVEN)):
            places = ("end",) if name in WHOLE else ("end", "word")
            figures[name] = {every: milliseconds(name, every) for every in places}
            print(name, figures[name], flush=True)
        RESULTS.write_text(json.dumps(figures, indent=1) + "\n")
    page = PAGE.read_text()
    before, _, rest = page.partition(BEGIN)
    PAGE.write_text(before + BEGIN + "\n" + table(figures) + "\n" + END + rest.partition(END)[2])


if __name__ == "__main__":
    main()
