"""The screen of a running training, and texts coloured by the rewards they earned.

On a terminal ``Screen`` draws in place; where the output is no terminal it prints one plain line a step.
"""

from __future__ import annotations

import math
import sys
import time
import unicodedata
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Self

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.panel import Panel
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from instant_reward.types import Mark, Rollout

# How strongly a mark for the whole text colours it, next to the marks on its pieces.
FAINT = 0.2
STOP_SIGNS = {"ended": "■", "length": "…", "stopped": "✂"}
_GOOD, _BAD, _GREY = (22, 163, 74), (229, 62, 62), (140, 140, 140)
_BARS, _ASCII_BARS = "▁▂▃▄▅▆▇█", "_.:-=+*#"
_TABLE_KEYS = {
    "kl": "KL",
    "teacher_kl": "KL to the teacher",
    "explained_variance": "critic explains",
    "entropy": "entropy",
    "loss": "loss",
    "held_out/perplexity": "held-out perplexity",
    "held_out/accuracy": "held-out accuracy",
    "tokens_per_second": "tokens/s",
}
_LINE_KEYS = (
    "nll", "held_out/perplexity", "held_out/accuracy", "kl", "teacher_kl", "explained_variance", "entropy",
)  # fmt: skip
_PROMPT_TAIL = 160
_BIDI_CONTROLS = {*range(0x202A, 0x202F), *range(0x2066, 0x206A), 0x200E, 0x200F}


@dataclass(frozen=True, slots=True)
class Piece:
    """Characters ``[start, end)`` of a rollout's text on which the same marks lie; marks for the whole text left out.

    The last piece may be empty: it carries the marks on the end token, which has no characters.
    """

    start: int
    end: int
    marks: tuple[Mark, ...]

    @property
    def value(self) -> float:
        """The sum of the marks, each with its full value: a word of five tokens is not worth less per token."""
        return sum(mark.value for mark in self.marks)


@dataclass(frozen=True, slots=True)
class Scale:
    """The values that are drawn at full strength: of a piece, and of a mark for a whole text."""

    piece: float
    whole: float

    def shade(self, piece: float, whole: float = 0.0) -> float:
        """A strength in [-1, 1] for a piece's value and the value of its whole text."""
        return _clip(_clip(piece / self.piece) + FAINT * _clip(whole / self.whole))


def _clip(value: float) -> float:
    return max(-1.0, min(1.0, value)) if not math.isnan(value) else 0.0


def pieces(rollout: Rollout, source: str | None = None) -> tuple[list[Piece], list[Mark]]:
    """The text cut wherever its marks change, and the marks that cover all of it. One source's marks, or all."""
    size = len(rollout.text)
    opening: dict[int, list[int]] = {}
    closing: dict[int, list[int]] = {}
    whole: list[Mark] = []
    for number, mark in enumerate(rollout.marks):
        if source is not None and mark.source != source:
            continue
        start, end = _characters(rollout, mark)
        if size and (start, end) == (0, size) and mark.end - mark.start > 1:
            whole.append(mark)
        else:
            opening.setdefault(start, []).append(number)
            closing.setdefault(end, []).append(number)
    cut: list[Piece] = []
    active: list[int] = []
    edges = sorted({0, size, *opening, *closing})
    for start, end in zip(edges, [*edges[1:], size], strict=True):
        closed = closing.get(start, [])
        active = [number for number in active if number not in closed] + opening.get(start, [])
        if end > start or active:
            cut.append(Piece(start, end, tuple(rollout.marks[number] for number in active)))
    return cut, whole


def _characters(rollout: Rollout, mark: Mark) -> tuple[int, int]:
    """The characters that a mark's tokens wrote. Tokens without any (half a character) point at the next one."""
    size = len(rollout.text)
    ends = [0, *rollout.char_ends]  # now ends[t] is where token t begins
    start = min(ends[min(max(mark.start, 0), len(ends) - 1)], size)
    end = min(ends[min(max(mark.end, 0), len(ends) - 1)], size)
    return (start, end) if end > start else (start, min(start + 1, size))


def scale_of(rollouts: Iterable[Rollout], source: str | None = None) -> Scale:
    """The 90th percentile of the sizes that are not zero, so that one outlier does not wash out the rest."""
    parts: list[float] = []
    totals: list[float] = []
    for rollout in rollouts:
        cut, whole = pieces(rollout, source)
        parts += [abs(piece.value) for piece in cut]
        totals.append(abs(sum(mark.value for mark in whole)))
    return Scale(_high(parts), _high(totals))


def _high(sizes: Sequence[float]) -> float:
    ranked = sorted(size for size in sizes if size > 0 and math.isfinite(size))
    return ranked[math.ceil(0.9 * len(ranked)) - 1] if ranked else 1.0


def visible(text: str) -> str:
    """``text`` with every control character, half surrogate and change of direction replaced by one visible sign.

    The length stays, so that offsets into the text hold. Tabs and line ends are kept.
    """
    return "".join(_sign(character) for character in text)


def _sign(character: str) -> str:
    code = ord(character)
    if character in "\t\n":
        return character
    if code < 32:
        return chr(0x2400 + code)
    return "\ufffd" if unicodedata.category(character) in ("Cc", "Cs") or code in _BIDI_CONTROLS else character


def coloured(
    rollout: Rollout, source: str | None = None, scale: Scale | None = None, prompt_tail: int | None = None
) -> Text:
    """The prompt, dim, and the sampled text, each piece coloured by what it earned: green and bold, or red, underlined.

    An arrow stands between them where the text does not go on from the prompt: a translation, a label, a filled draft.

    Args:
        source: only this source's marks; all of them where None.
        scale: what counts as strong; by default the rollout's own values.
        prompt_tail: at most this many characters of the prompt, its last ones.
    """
    prompt = visible(rollout.prompt.text)
    if prompt_tail is not None and len(prompt) > prompt_tail:
        prompt = "…" + prompt[-prompt_tail:]
    text = Text(prompt, style="")
    if rollout.prompt.context is not None:
        text.append(" → ")
    text.stylize("dim")
    cut, whole = pieces(rollout, source)
    scale = scale or scale_of([rollout], source)
    total = sum(mark.value for mark in whole)
    shown = visible(rollout.text)
    ending = 0.0
    for piece in cut:
        if piece.end > piece.start:
            part = shown[piece.start : piece.end]
            word = part.lstrip()
            text.append(part[: len(part) - len(word)])  # an underlined space before the word would look like a blank
            text.append(word, _style(scale.shade(piece.value, total)))
        else:
            ending = piece.value
    text.append(" " + STOP_SIGNS.get(rollout.stop, ""), _style(scale.shade(ending)) or "dim")
    return text


def _style(shade: float) -> str:
    """Foreground colours of middle lightness, which read on dark and on light terminals alike."""
    if abs(shade) < 0.02:
        return ""
    share = 0.3 + 0.7 * abs(shade)
    target = _GOOD if shade > 0 else _BAD
    mixed = [round(grey + share * (full - grey)) for grey, full in zip(_GREY, target, strict=True)]
    strong = " bold" if shade > 0.6 else " underline" if shade < -0.3 else ""
    return f"#{mixed[0]:02x}{mixed[1]:02x}{mixed[2]:02x}{strong}"


def figure(value: float | None) -> str:
    """A metric in three digits: "-" where there is none, "nan" where it is no number."""
    if value is None:
        return "-"
    size = abs(value)
    if 0 < size < 0.0005:
        return f"{value:.0e}"
    digits = 0 if size >= 100 else 1 if size >= 10 else 2 if size >= 1 else 3
    return f"{value:,.{digits}f}"


def duration(seconds: float) -> str:
    """``1:32``, or ``2:05:00`` from an hour on."""
    minutes, second = divmod(max(0, round(seconds)), 60)
    hours, minute = divmod(minutes, 60)
    return f"{hours}:{minute:02d}:{second:02d}" if hours else f"{minute}:{second:02d}"


def sparkline(values: Sequence[float | None], width: int = 40, bars: str = _BARS) -> str:
    """The values as a row of bars, averaged in buckets if there are more than ``width``; a gap for what is missing."""
    if not values or width < 1:
        return ""
    count = min(width, len(values))
    buckets = [values[len(values) * at // count : len(values) * (at + 1) // count] for at in range(count)]
    finite = [[value for value in bucket if value is not None and math.isfinite(value)] for bucket in buckets]
    means = [math.fsum(bucket) / len(bucket) if bucket else None for bucket in finite]
    known = [mean for mean in means if mean is not None]
    if not known:
        return " " * count
    low, spread = min(known), max(known) - min(known)
    top = len(bars) - 1
    return "".join(
        " " if mean is None else bars[round((mean - low) / spread * top) if spread > 0 else top // 2] for mean in means
    )


class Screen:
    """The progress of a training, on a terminal drawn in place, elsewhere a plain line a step.

    Use it as a context manager: it gives the terminal back as it was, on Ctrl-C too. Metrics it knows: ``reward``,
    ``reward/<source>``, ``kl``, ``entropy``, ``loss``, ``tokens_per_second``; one that is missing is left out.
    """

    def __init__(
        self, total_steps: int, console: Console | None = None, clock: Callable[[], float] = time.monotonic
    ) -> None:
        # Colours may be forced on a pipe (FORCE_COLOR in a build log); drawing in place there would fill the log.
        self.console = console or Console(force_interactive=None if sys.stdout.isatty() else False)
        self.total_steps = max(0, total_steps)
        self._clock = clock
        self._began = clock()
        self._pace: deque[tuple[float, int]] = deque(maxlen=20)
        self._step = 0
        self._metrics: dict[str, float] = {}
        self._history: dict[str, list[float | None]] = {}
        self._held_out: dict[str, float] = {}  # measured at some steps alone: the last ones stay on the screen
        self._samples: deque[Rollout] = deque(maxlen=20)
        self._body: RenderableType = Text("waiting for the first step", style="dim")
        self._live: Live | None = None

    def __enter__(self) -> Self:
        self._began = self._clock()
        if self.console.is_terminal and self.console.is_interactive:
            # The clock is drawn anew twice a second; the rest only when a step brings something new.
            self._live = Live(console=self.console, get_renderable=self._draw, refresh_per_second=2)
            try:
                self._live.start(refresh=True)
            except BaseException:
                self._live.stop()
                raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        live, self._live = self._live, None
        if live is not None:
            live.stop()

    def update(self, step: int, metrics: Mapping[str, float], sample: Rollout | None = None) -> None:
        """Shows that ``step`` is done, with its figures and one of its texts; without one, the last stays."""
        if not self._pace:
            self._pace.append((self._began, step - 1))
        self._pace.append((self._clock(), step))
        self._step, self._metrics = step, dict(metrics)
        self._held_out |= {key: value for key, value in metrics.items() if key.startswith("held_out/")}
        for key in metrics:
            if key in ("reward", "nll") or key.startswith("reward/"):
                self._history.setdefault(key, []).append(_number(metrics[key]))
        if sample is not None:
            self._samples.append(sample)
        if self._live is None:
            self._print(self._line())
            return
        self._body = self._draw_body()
        self._live.refresh()

    def note(self, text: str) -> None:
        """One line of its own, above the drawing."""
        self._print(text)

    @property
    def seconds_left(self) -> float | None:
        """The steps that are left at the pace of the last ones; ``None`` before the first."""
        if not self._pace:
            return None
        (before, first), (now, last) = self._pace[0], self._pace[-1]
        return max(0, self.total_steps - last) * (now - before) / (last - first) if last > first else None

    def _print(self, text: str) -> None:
        self.console.print(
            _plain(self.console, visible(text)), markup=False, highlight=False, emoji=False, soft_wrap=True
        )

    def _line(self) -> str:
        others = ("reward", *_LINE_KEYS)
        parts = [f"step {self._step}/{self.total_steps}"]
        for key in ("reward", *self._sources(), *_LINE_KEYS):
            if key in self._metrics:
                # A source may be called "kl" too: it then keeps its prefix.
                short = key.removeprefix("reward/")
                parts.append(f"{key if short in others else short} {figure(self._metrics[key])}")
        if "tokens_per_second" in self._metrics:
            parts.append(f"{figure(self._metrics['tokens_per_second'])} tok/s")
        if (left := self.seconds_left) is not None:
            parts.append(f"{duration(left)} left")
        return "  ".join(parts)

    def _sources(self) -> dict[str, float]:
        return {key: value for key, value in self._metrics.items() if key.startswith("reward/")}

    def _draw(self) -> RenderableType:
        elapsed = self._clock() - self._began
        left = self.seconds_left
        if left is not None:
            left = max(0.0, left - (self._clock() - self._pace[-1][0]))
        done = self._step if self.total_steps else 1
        bar = ProgressBar(max(self.total_steps, 1), done, complete_style="cyan", finished_style="green")
        head = Table.grid(padding=(0, 2), expand=True)
        head.add_column(no_wrap=True)
        head.add_column(ratio=1)
        head.add_column(no_wrap=True, justify="right")
        times = f"{duration(elapsed)} so far" + ("" if left is None else f", {duration(left)} left")
        head.add_row(Text(f"step {self._step}/{self.total_steps}", style="bold"), bar, times)
        return Group(head, Text(""), self._body)

    def _draw_body(self) -> RenderableType:
        bars = _ASCII_BARS if self.console.options.ascii_only else _BARS
        wide = self.console.width >= 72
        rewards = Table.grid(padding=(0, 2))
        known = self._held_out | self._metrics
        for key in ("reward", *self._sources(), "nll"):
            if key in self._metrics:
                name = Text(_plain(self.console, key.removeprefix("reward/")), style="bold" if key == "reward" else "")
                line = Text(sparkline(self._history[key], 32 if wide else 16, bars), style="cyan")
                rewards.add_row(name, Text(figure(self._metrics[key]), justify="right"), line)
        figures = Table.grid(padding=(0, 2)) if wide else rewards
        for key, title in _TABLE_KEYS.items():
            if key in known:
                figures.add_row(Text(title, style="dim"), Text(figure(known[key]), justify="right"))
        both = Table.grid(padding=(0, 4))
        both.add_row(*([rewards, figures] if wide else [rewards]))
        parts: list[RenderableType] = [both]
        if self._samples:
            room = self.console.height - max(rewards.row_count, figures.row_count) - 6
            parts += [Text(""), self._draw_sample(max(3, room))]
        return Group(*parts)

    def _draw_sample(self, room: int) -> Panel:
        """The newest text in a frame of at most ``room`` lines inside."""
        sample = self._samples[-1]
        text = coloured(sample, scale=scale_of(self._samples), prompt_tail=_PROMPT_TAIL)
        if self.console.options.ascii_only:
            text.plain = _plain(self.console, text.plain)
        lines = text.wrap(self.console, max(1, self.console.width - 4))
        if len(lines) > room:
            lines[room - 1] = Text("(more)", style="dim")
        sources = dict.fromkeys(mark.source for mark in sample.marks)
        earned = ", ".join(f"{name} {sample.total(name):+.2f}" for name in sources) or "no reward"
        title = Text(_plain(self.console, visible(f"one text: {earned}")))
        return Panel(Group(*lines[:room]), title=title, title_align="left", border_style="dim")


def _plain(console: Console, text: str) -> str:
    """``text`` as this console can print it; signs it has no code for become question marks, one for one."""
    encoding = console.encoding or "utf-8"
    return text.encode(encoding, "replace").decode(encoding)


def _number(value: object) -> float | None:
    return float(value) if isinstance(value, (int, float)) and math.isfinite(value) else None
