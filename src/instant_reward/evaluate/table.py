"""Two sets of figures side by side: what they were before, what they are after, what changed."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from rich.box import SIMPLE_HEAD
from rich.table import Table
from rich.text import Text

from instant_reward.evaluate.metrics import as_number

_LABELS = {
    "perplexity": "reference perplexity",
    "distinct_2": "distinct-2",
    "length": "length in tokens",
    "ended": "ended by itself",
    "texts": "texts",
    "prompts": "prompts",
}
# Figures whose size says nothing by itself: what matters is how many times as large they became.
_AS_RATIO = {"perplexity", "distinct_2", "length"}
_COUNTS = {"texts", "prompts"}
_ENDS = ("/low", "/high", "/median", "/min", "/max")


@dataclass(frozen=True, slots=True)
class Row:
    """One line of a comparison. NaN stands for a figure that is missing on a side; ends are NaN where unknown."""

    key: str
    label: str
    before: float
    after: float
    before_ends: tuple[float, float] = (math.nan, math.nan)
    after_ends: tuple[float, float] = (math.nan, math.nan)

    @property
    def change(self) -> str:
        """The difference with its sign, or the ratio for perplexity, distinct-2 and length; "-" where there is none."""
        if not (math.isfinite(self.before) and math.isfinite(self.after)):
            return "-"
        if self.key in _AS_RATIO and self.before > 0:
            return f"×{self.after / self.before:.2f}"
        if self.key in _COUNTS:
            return "" if self.before == self.after else f"{self.after - self.before:+.0f}"
        return f"{self.after - self.before:+.3f}"

    def side(self, which: str, ends: bool = True) -> str:
        """``before`` or ``after`` as text, with its interval where there is one."""
        value = self.before if which == "before" else self.after
        low, high = self.before_ends if which == "before" else self.after_ends
        if self.key in _COUNTS and math.isfinite(value):
            return f"{value:,.0f}"
        if ends and math.isfinite(low) and math.isfinite(high):
            return f"{figure(value)} [{figure(low)}, {figure(high)}]"
        return figure(value)


def figure(value: float) -> str:
    """A number in three or four digits, "-" for NaN."""
    if math.isnan(value):
        return "-"
    if math.isinf(value):
        return "∞" if value > 0 else "-∞"
    size = abs(value)
    digits = 0 if size >= 999.5 else 1 if size >= 9.995 else 2 if size >= 0.9995 else 3
    return f"{value:,.{digits}f}"


def compare(
    before: Mapping[str, float],
    after: Mapping[str, float],
    labels: Mapping[str, str] | None = None,
    title: str = "Held-out prompts, before and after",
) -> tuple[Table, list[Row]]:
    """The figures of two ``evaluate_texts``, as a table for the terminal and as rows.

    Args:
        labels: what to call a figure, by its key: ``{"score/sentiment": "sentiment (trained)"}``.
    """
    names = _LABELS | dict(labels or {})
    given = dict.fromkeys((*before, *after))
    keys = [key for key in given if not any(key.endswith(end) and key.removesuffix(end) in given for end in _ENDS)]
    rows = [
        Row(
            key,
            names.get(key, key.removeprefix("score/")),
            as_number(before.get(key)),
            as_number(after.get(key)),
            _ends(before, key),
            _ends(after, key),
        )
        for key in keys
    ]
    return _table(rows, title), rows


def _ends(figures: Mapping[str, float], key: str) -> tuple[float, float]:
    return as_number(figures.get(f"{key}/low")), as_number(figures.get(f"{key}/high"))


def _table(rows: list[Row], title: str) -> Table:
    table = Table(title=Text(title), title_justify="left", header_style="bold", box=SIMPLE_HEAD)
    table.add_column("")
    for heading in ("before", "after", "change"):
        table.add_column(heading, justify="right")
    for row in rows:
        after = Text(row.side("after"), style="bold")
        table.add_row(Text(row.label), Text(row.side("before")), after, Text(row.change))
    return table
