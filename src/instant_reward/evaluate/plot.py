"""Curves as PNG files, by matplotlib: of one run, and of several runs with several seeds each."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from instant_reward.evaluate.metrics import reward_keys, series, smooth
from instant_reward.types import UserError

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D

# Okabe and Ito's colours, told apart with any kind of colour blindness; the dashes tell them apart in print.
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000")
DASHES = ("-", "--", "-.", ":")

Metrics = Sequence[Mapping[str, Any]]


def learning_curve(metrics: Metrics, path: Path | str, keys: Iterable[str] | None = None) -> Path:
    """Draws the mean reward of each source against the step (faint: each step, strong: smoothed), and the KL below.

    Args:
        metrics: one dict per step, as ``run.metrics`` has them.
        keys: the metrics of the upper part; by default every ``reward/<source>``, or where there is none the error on
            given texts.

    Raises:
        UserError: matplotlib is not installed, or the file cannot be written.
    """
    names = list(keys) if keys is not None else reward_keys(metrics)
    errors = [key for key in ("nll", "held_out/nll") if not names and len(series(metrics, key)[0])]
    divergence = [key for key in ("kl",) if len(series(metrics, key)[0])]
    figure = _figure(5.4 if divergence else 4.0)
    shares = [3, 1] if divergence else [1]
    axes = figure.subplots(len(shares), 1, sharex=True, squeeze=False, height_ratios=shares)[:, 0]
    _draw_lines(axes[0], metrics, names or errors)
    axes[0].set_ylabel("nats per token" if errors else "mean reward")
    if divergence:
        _draw_lines(axes[1], metrics, divergence, legend=False)
        axes[1].set_ylabel("KL")
    axes[-1].set_xlabel("step")
    return _save(figure, path)


def curves(runs: Mapping[str, Sequence[Metrics]], path: Path | str, key: str = "reward") -> Path:
    """Draws one metric of several arms, each with several seeds: median, and a band from lowest to highest.

    Args:
        runs: per arm, the metrics of each of its runs. At a step that only some of them reached, only those count.

    Raises:
        UserError: matplotlib is not installed, or the file cannot be written.
    """
    figure = _figure(4.2)
    axes = figure.subplots()
    handles: list[Line2D] = []
    labels: list[str] = []
    for number, (arm, seeds) in enumerate(runs.items()):
        lines = [dict(zip(*(part.tolist() for part in series(metrics, key)), strict=True)) for metrics in seeds]
        steps = sorted({step for line in lines for step in line})
        if not steps:
            continue
        values = [[line[step] for line in lines if step in line] for step in steps]
        colour, dash = COLOURS[number % len(COLOURS)], DASHES[number % len(DASHES)]
        axes.fill_between(steps, [min(row) for row in values], [max(row) for row in values], color=colour, alpha=0.18)
        handles += axes.plot(
            steps, [float(np.median(row)) for row in values], color=colour, linestyle=dash, linewidth=2
        )
        labels.append(f"{arm} ({len(lines)} {'run' if len(lines) == 1 else 'runs'})")
    axes.set_ylabel(key.replace("/", ": "))
    axes.set_xlabel("step")
    _finish(axes, handles, labels, "line: median of the runs, band: lowest to highest")
    return _save(figure, path)


def _draw_lines(axes: Axes, metrics: Metrics, keys: Sequence[str], legend: bool = True) -> None:
    handles: list[Line2D] = []
    labels: list[str] = []
    for number, key in enumerate(keys):
        steps, values = series(metrics, key)
        if not len(steps):
            continue
        colour, dash = COLOURS[number % len(COLOURS)], DASHES[number % len(DASHES)]
        # One point is no line: it needs a marker to be seen.
        marker = "o" if len(steps) == 1 else None
        axes.plot(steps, values, color=colour, alpha=0.3, linewidth=1, marker=marker)
        handles += axes.plot(steps, smooth(values), color=colour, linestyle=dash, linewidth=2, marker=marker)
        labels.append(key.removeprefix("reward/"))
    _finish(axes, handles if legend else [], labels if legend else [])
    if not handles:
        axes.text(0.5, 0.5, "no steps recorded", ha="center", va="center", transform=axes.transAxes, color="0.4")


def _finish(axes: Axes, handles: Sequence[Line2D], labels: Sequence[str], title: str | None = None) -> None:
    from matplotlib.ticker import MaxNLocator

    axes.grid(True, color="0.9")
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    if handles:
        # A dollar sign would begin a formula.
        texts = [label.replace("$", r"\$") for label in labels]
        axes.legend(handles, texts, frameon=False, title=title, title_fontsize="small", alignment="left")


def _figure(height: float) -> Figure:
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise UserError(
            'a curve as PNG needs matplotlib; install it with: pip install "instant-reward[plot]"'
        ) from None
    # A figure of its own, without pyplot: no window system is asked for, and no global state is left behind.
    return Figure(figsize=(7.2, height), layout="constrained", facecolor="white")


def _save(figure: Figure, path: Path | str) -> Path:
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    target = Path(path)
    FigureCanvasAgg(figure)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(target, dpi=150, format="png")
    except OSError as error:
        raise UserError(
            f"cannot write the curve to {target}: {error.strerror}; choose another place or make room."
        ) from error
    return target
