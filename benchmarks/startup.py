"""How long the package takes to import, and the command to say what it can do.

    python benchmarks/startup.py

Each in processes of its own; medians. Writes `startup.json` and `startup.md` to `benchmarks/results/`.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence

from runs import RESULTS, machine

GOAL = 0.5
CASES = {
    "python, doing nothing": ["-c", ""],
    "import instant_reward": ["-c", "import instant_reward"],
    "instant-reward --help": ["-m", "instant_reward.cli", "--help"],
    "instant-reward train --help": ["-m", "instant_reward.cli", "train", "--help"],
}


def seconds(arguments: Sequence[str]) -> float:
    begun = time.perf_counter()
    subprocess.run([sys.executable, *arguments], check=True, stdout=subprocess.DEVNULL)
    return time.perf_counter() - begun


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=9)
    options = parser.parse_args()
    rows = {name: statistics.median(seconds(case) for _ in range(options.rounds)) for name, case in CASES.items()}
    record = {"machine": machine(2), "goal": GOAL, "seconds": rows}
    (RESULTS / "startup.json").write_text(json.dumps(record, indent=1) + "\n")
    how = f"medians of {options.rounds}, {record['machine']}. The goal for a line is {GOAL} s."
    lines = [
        "# Starting up",
        "",
        f"Written by `python benchmarks/startup.py`: {how}",
        "",
        "| process | seconds |",
        "|---|---|",
        *(f"| {name} | {value:.2f} |" for name, value in rows.items()),
        "",
    ]
    (RESULTS / "startup.md").write_text("\n".join(lines))
    print("\n".join(lines))


if __name__ == "__main__":
    main()
