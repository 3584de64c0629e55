"""Statistics, tables and figures of the experiments, and their command line.

A seed's number of updates to a threshold is censored where it never got there: it then counts as later than any other,
and a median that falls on such a seed is said to be "not reached". Ratios of medians have percentile intervals from
resampling the seeds of each arm.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from instant_reward.evaluate.plot import COLOURS, DASHES

RESULTS = Path(__file__).parent / "results"
WINDOW = 5  # updates whose mean score must reach the threshold


def updates_to(scores: Tensor, threshold: float, window: int = WINDOW) -> list[int | None]:
    """For each seed the first update at which the mean of the last ``window`` scores reached ``threshold``; or None.

    Args:
        scores: ``[S, updates]``; the entry ``u`` is that of the policy after ``u`` updates.
    """
    if scores.shape[1] < window:
        return [None] * len(scores)
    means = scores.double().unfold(1, window, 1).mean(2)
    above = means >= threshold
    return [int(row.nonzero()[0]) + window - 1 if bool(row.any()) else None for row in above]


def median(values: Sequence[float | None]) -> float | None:
    """The median where None counts as later than all others; None where it falls on such a one."""
    found = _median(np.array([math.inf if one is None else one for one in values], dtype=float))
    return float(found) if math.isfinite(found) else None


def ratio(
    ours: Sequence[float | None], theirs: Sequence[float | None], draws: int = 4000, level: float = 0.95
) -> tuple[float | None, float | None, float | None]:
    """The ratio of two medians with its percentile interval, from resampling each arm's seeds: ratio, low, high.

    ``math.inf`` (or 0) where one median lies beyond the last update; None where both do, and for the interval where
    that happens in too many draws to leave its ends unharmed.
    """
    samples = [np.array([math.inf if one is None else one for one in side], dtype=float) for side in (ours, theirs)]
    random = np.random.default_rng(0)
    drawn = [_median(side[random.integers(len(side), size=(draws, len(side)))]) for side in samples]
    point, spread = _divided(*(_median(side) for side in samples)), _divided(*drawn)
    known = np.sort(spread[~np.isnan(spread)])
    if np.isnan(point) or len(known) < draws * (1 + level) / 2:
        return (None if np.isnan(point) else float(point)), None, None
    ends = [known[round(share * (len(known) - 1))] for share in ((1 - level) / 2, (1 + level) / 2)]
    return float(point), float(ends[0]), float(ends[1])


def _median(values: np.ndarray) -> Any:
    """Along the last axis; of an even number the lower of the two in the middle, so that infinity stays whole."""
    return np.sort(values, axis=-1)[..., (values.shape[-1] - 1) // 2]


def _divided(top: Any, bottom: Any) -> Any:
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.asarray(top, dtype=float) / np.asarray(bottom, dtype=float)


def compared(
    arms: Mapping[str, Tensor], threshold: float, against: str, rates: Mapping[str, float] | None = None
) -> list[dict[str, Any]]:
    """One row of a table for each arm: updates to the threshold, and the ratio to the arm ``against``.

    Args:
        arms: scores ``[S, updates]`` of each.
        rates: their learning rates, where they are to be shown.
    """
    times = {name: updates_to(scores, threshold) for name, scores in arms.items()}
    rows = []
    for name, scores in arms.items():
        point, low, high = ratio(times[name], times[against])
        if name == against:  # the interval of an arm's ratio to itself says nothing
            low = high = None
        row: dict[str, Any] = {"arm": name}
        if rates is not None:
            row["learning rate"] = rates[name]
        row |= {
            "reached": f"{sum(one is not None for one in times[name])} of {len(times[name])}",
            "median updates": median(times[name]),
            f"ratio to {against}": point,
            "low": low,
            "high": high,
            "score when stopped": float(scores[:, -WINDOW:].mean()),
            "updates": times[name],
        }
        rows.append(row)
    return rows


def markdown(rows: Sequence[Mapping[str, Any]]) -> str:
    """A table; lists (each seed's own number) stay out of it, and the interval shares a column with its ratio."""
    shown = [{key: value for key, value in row.items() if not isinstance(value, list)} for row in rows]
    heads = [key for key in shown[0] if key not in ("low", "high")]
    lines = ["| " + " | ".join(heads) + " |", "|" + "---|" * len(heads)]
    for row in shown:
        cells = []
        for head in heads:
            text = _text(row[head], head)
            if head.startswith("ratio") and row.get("low") is not None:
                text += f" ({_text(row['low'])} to {_text(row['high'])})"
            cells.append(text)
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _text(value: Any, head: str = "") -> str:
    if value is None:
        return "not reached" if head.startswith("median") else "-"
    if isinstance(value, float):
        if math.isinf(value):
            return "infinite"
        return f"{value:g}" if value == int(value) or head == "learning rate" else f"{value:.2f}"
    return str(value)


def draw(panels: Mapping[str, Mapping[str, Tensor]], path: Path, threshold: float | None = None) -> Path:
    """Score against update, one panel for each task: the median of the seeds, and a band from quartile to quartile.

    Args:
        panels: for each, each arm's scores ``[S, updates]``. Smoothed over ``WINDOW`` updates.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    columns = min(3, len(panels))
    lines = math.ceil(len(panels) / columns)
    figure = Figure(figsize=(4.0 * columns, 3.4 * lines), layout="constrained", facecolor="white")
    grid = figure.subplots(lines, columns, squeeze=False).flatten()
    names = list(dict.fromkeys(name for arms in panels.values() for name in arms))
    for axes, (title, arms) in zip(grid, panels.items(), strict=False):
        for name, scores in arms.items():
            number = names.index(name)
            smooth = scores.double().unfold(1, min(WINDOW, scores.shape[1]), 1).mean(2)
            low, middle, high = torch.quantile(smooth, torch.tensor([0.25, 0.5, 0.75]).double(), dim=0).numpy()
            steps = np.arange(len(middle)) + scores.shape[1] - len(middle)
            colour, dash = COLOURS[number % len(COLOURS)], DASHES[number % len(DASHES)]
            axes.fill_between(steps, low, high, color=colour, alpha=0.18, linewidth=0)
            axes.plot(steps, middle, color=colour, linestyle=dash, linewidth=2, label=name)
        if threshold is not None:
            axes.axhline(threshold, color="0.6", linewidth=1)
        axes.set(title=title, xlabel="update", ylabel="true score")
        axes.grid(True, color="0.9")
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(frameon=False, fontsize="small")
    for axes in grid[len(panels) :]:
        axes.set_visible(False)
    FigureCanvasAgg(figure)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110, format="png")
    return path


@dataclass
class Asked:
    """The command line: so many seeds, whether it is only a trial of seconds, and where results go (None: nowhere)."""

    seeds: int
    quick: bool
    out: Path | None


def asked(about: str, arguments: Sequence[str] | None = None) -> Asked:
    """Reads ``[--quick] [--seeds 10] [--out FOLDER]``; a quick trial writes nothing unless told where."""
    parser = argparse.ArgumentParser(description=about.partition("\n")[0])
    parser.add_argument("--quick", action="store_true", help="tiny sizes, a few seconds; its numbers mean nothing")
    parser.add_argument("--seeds", type=int, help="trained side by side (10; with --quick 2)")
    parser.add_argument("--out", type=Path, help="folder for the results (experiments/results; with --quick none)")
    given = parser.parse_args(arguments)
    torch.set_num_threads(1)
    seeds = given.seeds or (2 if given.quick else 10)
    return Asked(seeds, given.quick, given.out or (None if given.quick else RESULTS))


def publish(
    name: str,
    told: Asked,
    tables: Mapping[str, Sequence[Mapping[str, Any]]],
    panels: Mapping[str, Mapping[str, Tensor]],
    threshold: float | None = None,
) -> None:
    """Prints the tables and, where results are kept, writes NAME.md, NAME.json and NAME.png."""
    text = "\n\n".join(f"### {title}\n\n{markdown(rows)}" for title, rows in tables.items()) + "\n"
    print(text)
    if told.out is None:
        return
    told.out.mkdir(parents=True, exist_ok=True)
    (told.out / f"{name}.md").write_text(text)
    plain = {title: [_plain(row) for row in rows] for title, rows in tables.items()}
    (told.out / f"{name}.json").write_text(json.dumps({"seeds": told.seeds, "tables": plain}, indent=1) + "\n")
    draw(panels, told.out / f"{name}.png", threshold)


def _plain(row: Mapping[str, Any]) -> dict[str, Any]:
    """JSON has no infinity: it is written as a word."""
    infinite = {key: "infinite" for key, value in row.items() if isinstance(value, float) and math.isinf(value)}
    return {**row, **infinite}


def say(line: str) -> None:
    """Progress, on standard error."""
    print(f"[{time.process_time():6.0f} s] {line}", file=sys.stderr, flush=True)
