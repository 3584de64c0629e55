"""Curves as HTML: lines in a stretching SVG, labels as ordinary text, so that both read on a phone."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from instant_reward.evaluate.metrics import Floats, reward_keys, series, smooth
from instant_reward.evaluate.table import figure
from instant_reward.screen import visible

# The SVG's own units; it is stretched to the width of the page.
_WIDTH, _HEIGHT = 1000.0, 300.0
_COLOURS = 6


def chart(metrics: Sequence[Mapping[str, Any]]) -> str:
    """The mean reward of each source against the step; below it the KL, the teacher's, and the critic."""
    parts = [
        _panel(metrics, reward_keys(metrics), "Mean reward by source", "tall"),
        _panel(metrics, ["kl"], "KL to the reference", "low"),
        _panel(metrics, ["teacher_kl"], "KL to the teacher", "low"),
        _panel(metrics, ["explained_variance"], "What the critic explains of its targets' variance", "low"),
    ]
    return "\n".join(part for part in parts if part)


def ticks(low: float, high: float, count: int = 4) -> list[float]:
    """About ``count`` round numbers (1, 2 or 5 times a power of ten apart) from ``low`` to ``high``."""
    if not high > low:
        return [low]
    rough = (high - low) / count
    power = 10.0 ** math.floor(math.log10(rough))
    distance = next(power * factor for factor in (1, 2, 5, 10) if power * factor >= rough * 0.999)
    first, last = math.ceil(low / distance - 1e-9), math.floor(high / distance + 1e-9)
    return [round(number * distance, 12) for number in range(first, last + 1)]


def _panel(metrics: Sequence[Mapping[str, Any]], keys: Sequence[str], title: str, height: str) -> str:
    lines = {key: points for key in keys if len((points := series(metrics, key))[0])}
    if not lines:
        return ""
    steps = sorted({float(step) for line in lines.values() for step in line[0]})
    values = [float(value) for line in lines.values() for value in line[1]]
    low, high = min(*values, 0.0), max(*values, 0.0)
    margin = 0.04 * (high - low) or 1.0
    frame = (steps[0], steps[-1], low - margin, high + margin)
    drawn = [_line(number, *line, frame) for number, line in enumerate(lines.values())]
    rows = ticks(frame[2], frame[3], 6 if height == "tall" else 3)
    grid = [
        f'<line class="grid" x1="0" x2="{_WIDTH:g}" y1="{(y := _y(row, frame)):.1f}" y2="{y:.1f}"/>' for row in rows
    ]
    svg = (
        f'<svg viewBox="0 0 {_WIDTH:g} {_HEIGHT:g}" preserveAspectRatio="none" role="img" '
        f'aria-label="{escape(title)}">{"".join(grid)}{"".join(drawn)}{_hover(steps, lines, frame)}</svg>'
    )
    left = [f'<span class="y" style="top:{_y(row, frame) / _HEIGHT:.2%}">{row:g}</span>' for row in rows]
    below = [
        f'<span class="x" style="left:{_x(step, frame) / _WIDTH:.2%}">{step:g}</span>'
        for step in ticks(steps[0], steps[-1], 5)
        if step == int(step)
    ]
    legend = [
        f'<span class="key c{number % _COLOURS}"><svg viewBox="0 0 24 4" aria-hidden="true"><path d="M0 2H24"/></svg>'
        f"{escape(visible(key.removeprefix('reward/')))} <b>{figure(float(line[1][-1]))}</b></span>"
        for number, (key, line) in enumerate(lines.items())
    ]
    return (
        f'<figure><figcaption>{escape(title)}<span class="keys">{"".join(legend)}</span></figcaption>'
        f'<div class="plot {height}">{svg}{"".join(left)}{"".join(below)}</div></figure>'
    )


def _line(number: int, steps: Floats, values: Floats, frame: tuple[float, float, float, float]) -> str:
    colour = f"c{number % _COLOURS}"
    if len(steps) == 1:  # one point is no line: a short dash stands for it
        x, y = _x(float(steps[0]), frame), _y(float(values[0]), frame)
        return f'<path class="smooth {colour}" d="M{x - 6:.1f} {y:.1f}H{x + 6:.1f}"/>'
    raw, even = _path(steps, values, frame), _path(steps, smooth(values), frame)
    return f'<path class="raw {colour}" d="{raw}"/><path class="smooth {colour}" d="{even}"/>'


def _path(steps: Floats, values: Floats, frame: tuple[float, float, float, float]) -> str:
    points = [
        f"{_x(float(step), frame):.1f} {_y(float(value), frame):.1f}" for step, value in zip(steps, values, strict=True)
    ]
    return "M" + "L".join(points)


def _hover(
    steps: Sequence[float], lines: Mapping[str, tuple[Floats, Floats]], frame: tuple[float, float, float, float]
) -> str:
    """Unseen columns, one per step, whose tooltips give the figures. Long runs get one per 400th of the width."""
    stride = max(1, len(steps) // 400)
    at = {key: dict(zip(line[0].tolist(), line[1].tolist(), strict=True)) for key, line in lines.items()}
    width = _WIDTH / max(1, len(steps) - 1) * stride
    columns = []
    for step in steps[::stride]:
        listed = [f"{key.removeprefix('reward/')} {figure(line[step])}" for key, line in at.items() if step in line]
        tip = escape(visible(", ".join([f"step {step:g}", *listed])))
        x = _x(step, frame) - width / 2
        columns.append(f'<rect x="{x:.1f}" y="0" width="{width:.1f}" height="{_HEIGHT:g}"><title>{tip}</title></rect>')
    return f'<g class="hover">{"".join(columns)}</g>'


def _x(step: float, frame: tuple[float, float, float, float]) -> float:
    first, last = frame[0], frame[1]
    return (step - first) / (last - first) * _WIDTH if last > first else _WIDTH / 2


def _y(value: float, frame: tuple[float, float, float, float]) -> float:
    return (frame[3] - value) / (frame[3] - frame[2]) * _HEIGHT
