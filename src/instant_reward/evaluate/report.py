"""The report of a run: one HTML file with the figures, the curve, coloured texts before and after, and the config."""

from __future__ import annotations

import base64
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from instant_reward.evaluate.chart import chart
from instant_reward.evaluate.page import page
from instant_reward.evaluate.table import Row, figure
from instant_reward.screen import STOP_SIGNS, Piece, Scale, pieces, scale_of, visible
from instant_reward.types import Mark, Rollout, UserError

_STOPS = {"ended": "ended by itself", "length": "cut off at the length limit", "stopped": "stopped by a reward"}

_LONG_PROMPT = 600


def write_report(
    folder: Path | str,
    config_text: str,
    metrics: Sequence[Mapping[str, Any]],
    comparison_rows: Sequence[Row],
    before: Sequence[Rollout],
    after: Sequence[Rollout],
    curve_png: Path | str | None = None,
    limit: int = 12,
) -> Path:
    """Writes ``folder/report.html``, which needs no other file and no network, whole or not at all.

    Args:
        config_text: the run's config as it was read, shown as it is.
        metrics: one dict per step, as ``run.metrics`` has them; the curve is drawn from them.
        comparison_rows: the rows that ``compare`` gives.
        before, after: texts of the same held-out prompts, paired by the prompts' ids.
        curve_png: a picture of the curve, put in only where ``metrics`` holds nothing to draw.
        limit: for how many prompts texts are shown, from the first on: they are not chosen.

    Raises:
        UserError: the picture cannot be read, or the report cannot be written.
    """
    target = Path(folder) / "report.html"
    name = _text(Path(folder).resolve().name)
    steps = f"{len(metrics):,} {'step' if len(metrics) == 1 else 'steps'} of training"
    body = [
        f'<h1>{name}</h1>\n<p class="soft">{steps} with instant-reward</p>',
        _comparison(comparison_rows),
        _curve(metrics, curve_png),
        _samples(before, after, limit),
        _sources(before, after),
        f"<details><summary>Config of this run</summary><pre>{_text(config_text)}</pre></details>",
    ]
    html = page(visible(f"{Path(folder).resolve().name}: report"), "\n".join(part for part in body if part))
    _write(target, html)
    return target


def _write(target: Path, html: str) -> None:
    unfinished = target.with_name(f".{target.name}.{os.getpid()}")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        try:
            unfinished.write_text(html, encoding="utf-8")
            unfinished.replace(target)
        finally:
            unfinished.unlink(missing_ok=True)
    except OSError as error:
        raise UserError(
            f"cannot write the report to {target}: {error.strerror}; choose another place or make room."
        ) from error


def _text(text: str) -> str:
    """Any text as HTML: signs that a browser would take for markup, or could not show, are made harmless."""
    return escape(visible(text))


def _comparison(rows: Sequence[Row]) -> str:
    if not rows:
        return ""
    lines = []
    for row in rows:
        cells = "".join(f"<td>{_side(row, which)}</td>" for which in ("before", "after"))
        lines.append(f"<tr><td>{_text(row.label)}</td>{cells}<td>{row.change}</td></tr>")
    head = "<tr><th></th><th>before</th><th>after</th><th>change</th></tr>"
    ends = any(math.isfinite(row.before_ends[0]) or math.isfinite(row.after_ends[0]) for row in rows)
    note = (
        '<p class="soft">Small figures: the ends of the 95% interval, by a bootstrap over the prompts.</p>'
        if ends
        else ""
    )
    table = f'<div class="scroll"><table>{head}{"".join(lines)}</table></div>'
    return f"<h2>Held-out prompts, before and after</h2>\n{table}{note}"


def _side(row: Row, which: str) -> str:
    low, high = row.before_ends if which == "before" else row.after_ends
    ends = f"<small>{figure(low)} to {figure(high)}</small>" if math.isfinite(low) and math.isfinite(high) else ""
    return row.side(which, ends=False) + ends


def _curve(metrics: Sequence[Mapping[str, Any]], curve_png: Path | str | None) -> str:
    drawn = chart(metrics)
    if not drawn and curve_png is not None:
        try:
            data = base64.b64encode(Path(curve_png).read_bytes()).decode("ascii")
        except OSError as error:
            raise UserError(f"cannot read the curve at {curve_png}: {error.strerror}; draw it anew.") from error
        drawn = f'<img alt="Learning curve" src="data:image/png;base64,{data}">'
    if not drawn:
        return ""
    note = '<p class="soft">Faint: each step. Strong: smoothed. The figures beside the names are the last step\'s.</p>'
    return f"<h2>Learning curve</h2>\n{drawn}\n{note if '<figure>' in drawn else ''}"


def _samples(before: Sequence[Rollout], after: Sequence[Rollout], limit: int) -> str:
    pairs = _pairs(before, after)
    if not pairs:
        return ""
    shown = pairs[:limit]
    scale = scale_of(rollout for pair in shown for rollout in pair if rollout is not None)
    sides = [(heading, at) for at, heading in enumerate(("before", "after")) if any(pair[at] for pair in shown)]
    cards = []
    for pair in shown:
        prompt = next(rollout.prompt for rollout in pair if rollout is not None)
        texts = "".join(f"<div><h3>{heading}</h3>{_sample(pair[at], scale)}</div>" for heading, at in sides)
        cards.append(f'<div class="pair">{_prompt(prompt.text)}<div class="sides">{texts}</div></div>')
    count = f"the first {len(shown)} of {len(pairs)} pairs" if len(shown) < len(pairs) else f"all {len(pairs)}"
    note = (
        f"Every piece is coloured by the reward it earned; point at it, or tap it, for the figures. "
        f"Shown: {count}, in their order, none picked."
    )
    return f'<h2>Texts</h2>\n<p class="soft">{note}</p>\n{_legend(scale, shown)}\n' + "\n".join(cards)


def _prompt(text: str) -> str:
    if len(text) <= _LONG_PROMPT:
        return f'<p class="prompt" dir="auto">{_text(text)}</p>'
    tail = _text(text[-_LONG_PROMPT // 2 :])
    return f'<details class="prompt"><summary dir="auto">… {tail}</summary><p dir="auto">{_text(text)}</p></details>'


def _pairs(before: Sequence[Rollout], after: Sequence[Rollout]) -> list[tuple[Rollout | None, Rollout | None]]:
    """The first text of each prompt with the first one after, the second with the second; ``None`` where one lacks."""
    sides: list[dict[tuple[str, int], Rollout]] = []
    for rollouts in (before, after):
        counted: dict[str, int] = {}
        side: dict[tuple[str, int], Rollout] = {}
        for rollout in rollouts:
            number = counted[rollout.prompt.id] = counted.get(rollout.prompt.id, -1) + 1
            side[rollout.prompt.id, number] = rollout
        sides.append(side)
    # One text of every prompt comes before a second text of any.
    keys = sorted(dict.fromkeys([*sides[0], *sides[1]]), key=lambda key: key[1])
    return [(sides[0].get(key), sides[1].get(key)) for key in keys]


def _legend(scale: Scale, shown: Sequence[tuple[Rollout | None, Rollout | None]]) -> str:
    ramp = "".join(_swatch(step / 4) for step in range(-4, 5))
    ends = figure(-scale.piece), f"{figure(scale.piece)} and beyond"
    parts = [f'<span>{ends[0]}<span class="ramp" aria-hidden="true">{ramp}</span>{ends[1]}</span>']
    if any(pieces(rollout)[1] for pair in shown for rollout in pair if rollout is not None):
        parts.append("<span>A faint tint over all: a score for the whole text</span>")
    parts.append('<span><span class="p bad" style="--s:0">dotted</span>: below zero</span>')
    parts += [f"<span>{STOP_SIGNS[stop]} {words}</span>" for stop, words in _STOPS.items() if _stops(stop, shown)]
    return f'<div class="legend soft">{"".join(parts)}</div>'


def _stops(stop: str, shown: Sequence[tuple[Rollout | None, Rollout | None]]) -> bool:
    return any(rollout.stop == stop for pair in shown for rollout in pair if rollout is not None)


def _swatch(shade: float) -> str:
    return f'<span class="p {"good" if shade > 0 else "bad"}" style="--s:{abs(shade):.2f}"></span>'


def _sample(rollout: Rollout | None, scale: Scale) -> str:
    if rollout is None:
        return '<p class="text soft">no text for this prompt</p>'
    cut, whole = pieces(rollout)
    total = sum(mark.value for mark in whole)
    spans = "".join(_piece(rollout, piece, whole, scale.shade(piece.value, total)) for piece in cut)
    ending = (
        "" if cut and cut[-1].start == cut[-1].end else f' <span class="soft">{STOP_SIGNS.get(rollout.stop, "")}</span>'
    )
    sources = dict.fromkeys(mark.source for mark in rollout.marks)
    earned = " · ".join(f"{_text(source)} {rollout.total(source):+.3f}" for source in sources) or "no reward"
    return f'<p class="text" dir="auto">{spans}{ending}</p><p class="earned">{earned}</p>'


def _piece(rollout: Rollout, piece: Piece, whole: Sequence[Mark], shade: float) -> str:
    text = visible(rollout.text[piece.start : piece.end]) or f" {STOP_SIGNS.get(rollout.stop, '')}"
    if not text.strip() or not (piece.marks or whole):
        return escape(text if piece.start else text.lstrip(" "))
    word = text.lstrip()
    lead = text[: len(text) - len(word)] if piece.start else ""  # each text begins on a line of its own
    lines = [_tip(rollout, mark) for mark in piece.marks]
    lines += [f"{_tip(rollout, mark)}, for the whole text" for mark in whole]
    kind = "good" if shade > 0 else "bad" if shade < 0 else "none"
    tip = _text("\n".join(lines)).replace("\n", "&#10;")
    # A tab index of -1 lets a tap open the tooltip and keeps hundreds of words out of the tab order.
    return (
        f'{lead}<span class="p {kind}" style="--s:{abs(shade):.2f}" tabindex="-1" title="{tip}">{escape(word)}</span>'
    )


def _tip(rollout: Rollout, mark: Mark) -> str:
    read = max(0, mark.seen - rollout.start)
    tokens = len(rollout.token_ids) - rollout.start
    return f"{mark.source} {mark.value:+.4g}, fixed after {read} of {tokens} tokens"


def _sources(before: Sequence[Rollout], after: Sequence[Rollout]) -> str:
    """What each source paid per text: computed from the marks, so weights count as they did in training."""
    names = dict.fromkeys(mark.source for rollout in (*before, *after) for mark in rollout.marks)
    if not names:
        return ""
    lines = []
    for name in names:
        cells = [f"<td>{figure(_mean(side, name))}</td>" for side in (before, after)]
        counts = [sum(mark.source == name for mark in rollout.marks) for rollout in (*before, *after)]
        lines.append(f"<tr><td>{_text(name)}</td>{''.join(cells)}<td>{figure(sum(counts) / len(counts))}</td></tr>")
    head = "<tr><th></th><th>per text, before</th><th>per text, after</th><th>marks per text</th></tr>"
    return f'<h2>Reward sources</h2>\n<div class="scroll"><table>{head}{"".join(lines)}</table></div>'


def _mean(rollouts: Iterable[Rollout], source: str) -> float:
    totals = [rollout.total(source) for rollout in rollouts]
    return sum(totals) / len(totals) if totals else math.nan
