"""The recipes of the families of rewards, each trained once: what the reward and the held-out scores became.

    python benchmarks/recipes.py                     (all of them, one after the other)
    python benchmarks/recipes.py json judge          (some; the others' figures stay)

Writes to `benchmarks/results/`: `recipes.json`, `recipes.md`, and a curve `recipe-NAME.png` for each. `json` runs
twice, with texts stopped as soon as they are spoilt and with the same reward at the end: what stopping saves. `judge`
talks to the local server of `tests/local_judge.py`.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from runs import RESULTS, ROOT, held_out, metrics, train, versions

from instant_reward.evaluate.plot import curves, learning_curve

NAMES = ("grammar", "summary", "json", "topic", "judge")
AT_THE_END = ["rewards.0.every=end"]
PORT = 8765


@contextlib.contextmanager
def local_judge() -> Iterator[None]:
    """The server that grades by a rule, while the recipe runs."""
    server = subprocess.Popen([sys.executable, str(ROOT / "tests" / "local_judge.py"), "--port", str(PORT)])
    try:
        for _ in range(100):
            with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", PORT), timeout=1):
                break
            time.sleep(0.1)
        yield
    finally:
        server.terminate()
        server.wait()


def figures(out: Path) -> dict[str, Any]:
    """What a run brought."""
    before, after = held_out(out)
    rows = metrics(out)
    return {
        "steps": len(rows),
        "training_seconds": sum(row["time/sampling"] + row["time/learning"] for row in rows),
        "sampling_seconds": sum(row["time/sampling"] for row in rows),
        "tokens": sum(row["tokens"] for row in rows),
        "tokens_of_steps": [row["tokens"] for row in rows],
        "reward": [row["reward"] for row in rows],
        "before": before,
        "after": after,
        "versions": versions(out),
    }


def run(name: str, folder: Path) -> dict[str, Any]:
    """The runs of one recipe, and its curve."""
    picture = RESULTS / f"recipe-{name}.png"
    with local_judge() if name == "judge" else contextlib.nullcontext():
        out = train(name, folder / name)
    if name != "json":
        learning_curve(metrics(out), picture)
        return {name: figures(out)}
    whole = train(name, folder / "json-at-the-end", AT_THE_END)
    arms = {"stopped when spoilt": out, "judged at the end": whole}
    curves({arm: [metrics(one)] for arm, one in arms.items()}, picture)
    return {f"json, {arm}": figures(one) for arm, one in arms.items()}


def table(record: dict[str, Any]) -> str:
    """The figures as Markdown."""
    first = next(iter(record.values()))["versions"]
    about = (
        f"Written by `python benchmarks/recipes.py`: one seed each, held-out prompts before and after; "
        f"torch {first.get('torch')}, {first.get('platform')}."
    )
    lines = [
        "# A recipe for each family of rewards",
        "",
        about,
        "",
        "| recipe | held-out scores | reference perplexity | distinct-2 | training | tokens |",
        "|---|---|---|---|---|---|",
    ]
    for name, one in record.items():
        before, after = one["before"], one["after"]
        scores = "; ".join(
            f"{key.removeprefix('score/')} {before[key]:.3f} → {after[key]:.3f}"
            for key in before
            if key.startswith("score/") and not key.endswith(("/low", "/high"))
        )
        perplexity, distinct = (f"{before[key]:.2f} → {after[key]:.2f}" for key in ("perplexity", "distinct_2"))
        spent = f"{one['steps']} steps, {one['training_seconds']:.0f} s"
        lines.append(f"| {name} | {scores} | {perplexity} | {distinct} | {spent} | {one['tokens']:.0f} |")
    stopped, whole = (record.get(f"json, {arm}") for arm in ("stopped when spoilt", "judged at the end"))
    if stopped and whole:
        saved = 1 - stopped["tokens"] / whole["tokens"]
        early = 1 - sum(stopped["tokens_of_steps"][:4]) / sum(whole["tokens_of_steps"][:4])
        last = [sum(one["reward"][-4:]) / 4 for one in (stopped, whole)]
        text = (
            f"Stopping spoilt texts sampled {saved:.0%} fewer tokens, {early:.0%} fewer in the first four steps, when "
            f"most are spoilt; the mean reward of the last four steps was {last[0]:.2f} and {last[1]:.2f}."
        )
        lines += ["", text]
    return "\n".join([*lines, "", *(f"![{name}](recipe-{name}.png)" for name in NAMES), ""])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(NAMES)}")
    parser.add_argument("--folder", type=Path, default=Path("runs/benchmark-recipes"))
    options = parser.parse_args()
    unknown = [name for name in options.names if name not in NAMES]
    if unknown:
        parser.error(f"there is no recipe {unknown[0]}; name some of {', '.join(NAMES)}")
    kept = RESULTS / "recipes.json"
    record: dict[str, Any] = json.loads(kept.read_text()) if kept.is_file() else {}
    for name in options.names or NAMES:
        record |= run(name, options.folder)
        kept.write_text(json.dumps(record, indent=1) + "\n")
        (RESULTS / "recipes.md").write_text(table(record))
    print(table(record))


if __name__ == "__main__":
    main()
