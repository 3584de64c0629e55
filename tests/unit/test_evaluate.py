"""Figures over texts, their comparison, curves and the report."""

from __future__ import annotations

import base64
import io
import json
import math
import sys
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
from rich.console import Console

from instant_reward.evaluate.chart import chart, ticks
from instant_reward.evaluate.metrics import (
    distinct_n,
    evaluate_texts,
    length_stats,
    mean_interval,
    perplexity,
    ratio_interval,
    series,
    smooth,
    words,
)
from instant_reward.evaluate.plot import curves, learning_curve
from instant_reward.evaluate.report import write_report
from instant_reward.evaluate.table import Row, compare, figure
from instant_reward.records import rollout_from_record, rollout_record
from instant_reward.types import Mark, Prompt, Rollout, UserError


def rollout(text: str, prompt: str = "p0", value: float = 0.5, stop: str = "length", opening: str = "Well,") -> Rollout:
    """A text with one token per character, of which the first three earned ``value``."""
    size = len(text)
    return Rollout(
        id=f"{prompt}-{text[:3]}",
        group=0,
        prompt=Prompt(prompt, opening, [1, 2]),
        token_ids=[1, 2] + [5] * size,
        mask=[False] * 2 + [True] * size,
        logprobs=[0.0] * 2 + [-1.0] * size,
        char_ends=[0, 0, *range(1, size + 1)],
        text=text,
        marks=[Mark(value, 2, min(5, 2 + size), "mood", min(6, 2 + size))],
        versions=[-1] * 2 + [0] * size,
        stop=stop,  # type: ignore[arg-type]
    )


class TestDiversity:
    @pytest.mark.parametrize(
        ("text", "expected"),
        [
            ("The cat's out. It’s", ["the", "cat's", "out", ".", "it's"]),
            ("'quoted' rock'n'roll", ["'", "quoted", "rock'n'roll"]),
            ("很好 ok", ["很", "好", "ok"]),
            ("हिन्दी भाषा", ["हिन्दी", "भाषा"]),
            ("no!!", ["no", "!", "!"]),
            ("", []),
        ],
    )
    def test_words(self, text: str, expected: list[str]) -> None:
        assert list(words(text)) == expected

    def test_distinct_pairs_over_all_pairs_of_the_whole_set(self) -> None:
        assert distinct_n(["the cat The cat"]) == pytest.approx(2 / 3)
        assert distinct_n(["a b", "a b"]) == pytest.approx(1 / 2)
        assert distinct_n(["a a a"], n=1) == pytest.approx(1 / 3)

    def test_no_pair_crosses_from_one_text_to_the_next(self) -> None:
        assert math.isnan(distinct_n(["a", "b"]))
        assert distinct_n(["a b", "b a"]) == 1.0

    def test_a_text_of_exclamation_marks_is_not_diverse(self) -> None:
        assert distinct_n(["great" + "!" * 50]) < 0.05

    def test_none_and_too_small(self) -> None:
        assert math.isnan(distinct_n([]))
        with pytest.raises(UserError, match="at least 1"):
            distinct_n(["a"], n=0)


class TestIntervals:
    def test_it_has_the_width_that_theory_gives(self) -> None:
        values = np.random.default_rng(0).normal(3.0, 2.0, 400)
        interval = mean_interval(values.tolist())
        assert interval.mean == pytest.approx(values.mean())
        half = 1.96 * values.std() / 20
        assert interval.high - interval.mean == pytest.approx(half, rel=0.1)
        assert interval.mean - interval.low == pytest.approx(half, rel=0.1)
        assert interval.count == 400

    def test_the_same_seed_gives_the_same_ends(self) -> None:
        values = np.random.default_rng(0).normal(size=30).tolist()
        assert mean_interval(values) == mean_interval(values)
        assert mean_interval(values, seed=1) != mean_interval(values)

    def test_alike_siblings_are_not_taken_for_independent_values(self) -> None:
        values = np.random.default_rng(0).normal(size=50).repeat(8).tolist()
        groups = np.arange(50).repeat(8).tolist()
        alone, grouped = mean_interval(values), mean_interval(values, groups)
        assert grouped.mean == pytest.approx(alone.mean)
        assert (grouped.high - grouped.low) / (alone.high - alone.low) == pytest.approx(math.sqrt(8), rel=0.15)

    def test_none_one_and_different_lengths(self) -> None:
        assert math.isnan(mean_interval([]).mean)
        only = mean_interval([2.0])
        assert (only.mean, only.low, only.high) == (2.0, 2.0, 2.0)
        assert math.isnan(mean_interval([math.nan, 1.0]).low)
        with pytest.raises(UserError, match="2 sums, 1 counts"):
            ratio_interval([1.0, 2.0], [1.0])


class TestPerplexity:
    def test_a_uniform_distribution_has_the_perplexity_of_its_size(self) -> None:
        assert perplexity([[-math.log(7)] * 3, [-math.log(7)]]) == pytest.approx(7.0)

    def test_it_is_a_mean_over_tokens_not_over_texts(self) -> None:
        assert perplexity([[-1.0] * 3, [-5.0]]) == pytest.approx(math.exp(2.0))

    def test_none_and_impossible_tokens(self) -> None:
        assert math.isnan(perplexity([]))
        assert math.isnan(perplexity([[], []]))
        assert perplexity([[-math.inf]]) == math.inf
        assert perplexity([[-1e9]]) == math.inf


class TestEvaluateTexts:
    texts = (rollout("good day", "a", stop="ended"), rollout("a bad day", "a"), rollout("fine", "b"))

    def test_every_figure(self) -> None:
        figures = evaluate_texts(
            self.texts,
            {"size": lambda texts: [float(len(text)) for text in texts]},
            lambda rollouts: [[-2.0] * sum(one.mask) for one in rollouts],
        )
        assert figures["score/size"] == pytest.approx(7.0)
        assert figures["score/size/low"] <= 7.0 <= figures["score/size/high"]
        assert figures["perplexity"] == pytest.approx(math.exp(2.0))
        assert figures["perplexity/low"] == pytest.approx(figures["perplexity/high"]) == pytest.approx(math.exp(2.0))
        assert figures["distinct_2"] == 1.0
        assert (figures["length"], figures["length/min"], figures["length/max"]) == (7.0, 4.0, 9.0)
        assert figures["length/median"] == 8.0
        assert figures["ended"] == pytest.approx(1 / 3)
        assert (figures["texts"], figures["prompts"]) == (3, 2)
        assert json.loads(json.dumps(figures)) == figures

    def test_without_texts_and_without_a_reference(self) -> None:
        figures = evaluate_texts([], {"size": lambda texts: [1.0 for _ in texts]})
        assert math.isnan(figures["score/size"])
        assert figures["texts"] == 0
        assert "perplexity" not in figures
        assert all(math.isnan(value) for value in length_stats([]).values())

    def test_a_score_that_gives_too_few_or_no_numbers_is_named(self) -> None:
        with pytest.raises(UserError, match="the score 'size' gave 1 values for 3 texts"):
            evaluate_texts(self.texts, {"size": lambda texts: [1.0]})
        with pytest.raises(UserError, match="the score 'size' gave nan for the text of prompt 'a'"):
            evaluate_texts(self.texts, {"size": lambda texts: [math.nan] * 3})
        with pytest.raises(UserError, match="reference_logprobs gave 0 values"):
            evaluate_texts(self.texts, {}, lambda rollouts: [])


class TestComparison:
    before: ClassVar = {
        "score/mood": 0.25,
        "score/mood/low": 0.2,
        "score/mood/high": 0.3,
        "perplexity": 20.0,
        "texts": 64,
    }
    after: ClassVar = {
        "score/mood": 0.75,
        "score/mood/low": 0.7,
        "score/mood/high": 0.8,
        "perplexity": 30.0,
        "texts": 64,
    }

    def test_rows(self) -> None:
        _, rows = compare(self.before, self.after, {"score/mood": "mood (trained)"})
        assert [(row.label, row.side("before"), row.side("after"), row.change) for row in rows] == [
            ("mood (trained)", "0.250 [0.200, 0.300]", "0.750 [0.700, 0.800]", "+0.500"),
            ("reference perplexity", "20.0", "30.0", "×1.50"),
            ("texts", "64", "64", ""),
        ]

    def test_the_table_shows_the_rows(self) -> None:
        console = Console(file=io.StringIO(), width=100)
        console.print(compare(self.before, self.after)[0])
        assert isinstance(console.file, io.StringIO)
        shown = console.file.getvalue()
        assert all(part in shown for part in ("mood", "0.750 [0.700, 0.800]", "+0.500", "×1.50", "before", "after"))

    def test_what_only_one_side_has_shows_no_change(self) -> None:
        _, rows = compare({"score/a": 1.0, "distinct_2": math.nan}, {"score/b": 2.0, "distinct_2": 0.5})
        assert [(row.label, row.side("before"), row.side("after"), row.change) for row in rows] == [
            ("a", "1.00", "-", "-"),
            ("distinct-2", "-", "0.500", "-"),
            ("b", "-", "2.00", "-"),
        ]

    def test_a_score_whose_name_looks_like_an_end_is_not_lost(self) -> None:
        assert [row.key for row in compare({"score/fat/low": 1.0}, {})[1]] == ["score/fat/low"]

    def test_figures(self) -> None:
        values = [0.12345, 1.234, 12.34, 12345.6, math.nan, math.inf, -0.5]
        assert [figure(value) for value in values] == ["0.123", "1.23", "12.3", "12,346", "-", "∞", "-0.500"]


def run_metrics(steps: int = 20) -> list[dict[str, Any]]:
    return [{"step": at, "reward/mood": at / 20, "reward/$x": -0.1, "kl": at / 100} for at in range(1, steps + 1)]


class TestSeries:
    def test_what_is_no_number_is_left_out(self) -> None:
        rows = [{"step": 1, "a": 1.0}, {"step": 2, "a": None}, {"step": 3, "a": math.nan}, {"a": 4}, {"step": 9}]
        steps, values = series(rows, "a")
        assert steps.tolist() == [1.0, 4.0]
        assert values.tolist() == [1.0, 4.0]

    def test_smoothing_keeps_a_line_and_evens_out_noise(self) -> None:
        line = np.arange(50.0)
        assert smooth(line)[3:-3] == pytest.approx(line[3:-3])
        noise = np.random.default_rng(0).normal(size=500)
        assert smooth(noise).std() < 0.3
        assert len(smooth(np.asarray([]))) == 0


def png_size(path: Path) -> tuple[int, int]:
    data = path.read_bytes()
    assert data[:8] == b"\x89PNG\r\n\x1a\n"
    return int.from_bytes(data[16:20], "big"), int.from_bytes(data[20:24], "big")


@pytest.mark.filterwarnings("error")
class TestPlots:
    @pytest.fixture(autouse=True)
    def _matplotlib(self) -> None:
        pytest.importorskip("matplotlib")

    @pytest.mark.parametrize("steps", [0, 1, 20])
    def test_a_curve_is_a_picture_whatever_there_is_to_draw(self, steps: int, tmp_path: Path) -> None:
        path = learning_curve(run_metrics(steps), tmp_path / "new" / "curve.png")
        assert min(png_size(path)) > 500

    def test_the_drawing_has_the_figures(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        drawn: list[tuple[str, list[float]]] = []
        from matplotlib.axes import Axes

        plot = Axes.plot

        def record(axes: Axes, steps: Any, values: Any, **options: Any) -> Any:
            drawn.append((options["color"], list(values)))
            return plot(axes, steps, values, **options)

        monkeypatch.setattr(Axes, "plot", record)
        learning_curve(run_metrics(5), tmp_path / "curve.png", ["reward/mood"])
        assert drawn[0][1] == [0.05, 0.1, 0.15, 0.2, 0.25]
        drawn.clear()
        seeds = [[{"step": 1, "reward": value}, {"step": 2, "reward": value + 1}] for value in (0.0, 1.0, 5.0)]
        curves({"one": seeds, "none": []}, tmp_path / "curves.png")
        assert [values for _, values in drawn] == [[1.0, 2.0]]

    def test_without_matplotlib_the_command_to_install_it_is_given(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
        with pytest.raises(UserError, match=r'pip install "instant-reward\[plot\]"'):
            learning_curve(run_metrics(), tmp_path / "curve.png")

    def test_a_place_that_cannot_be_written(self, tmp_path: Path) -> None:
        (tmp_path / "file").write_text("")
        with pytest.raises(UserError, match="cannot write the curve"):
            learning_curve(run_metrics(), tmp_path / "file" / "curve.png")


class Page(HTMLParser):
    """Reads a page and holds that its tags are balanced; ``text`` is what a reader sees."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.text, self.tags, self._open = "", [], []  # type: ignore[var-annotated]
        self.feed(html)
        self.close()
        assert self._open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in ("meta", "img"):
            self._open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self._open and self._open[-1] != "style":
            self.text += data

    def attributes(self, name: str) -> Iterator[str]:
        return (attributes[name] or "" for _, attributes in self.tags if name in attributes)


def report(folder: Path, **changes: Any) -> Page:
    given: dict[str, Any] = {
        "config_text": "train:\n  steps: 40\n",
        "metrics": run_metrics(),
        "comparison_rows": compare({"score/mood": 0.25}, {"score/mood": 0.5})[1],
        "before": [rollout(" a bad day", "a", -0.5), rollout(" fine", "b")],
        "after": [rollout(" good day", "a", 0.75), rollout(" finer", "b")],
    }
    return Page(write_report(folder, **(given | changes)).read_text(encoding="utf-8"))


class TestReport:
    def test_it_holds_the_run(self, tmp_path: Path) -> None:
        page = report(tmp_path / "first run")
        for part in ("first run", "20 steps", "0.250", "+0.250", "bad day", "good day", "mood -0.500", "steps: 40"):
            assert part in page.text
        assert "mood +0.75, fixed after 4 of 9 tokens" in list(page.attributes("title"))

    def test_texts_of_one_prompt_stand_side_by_side(self, tmp_path: Path) -> None:
        after = [rollout(" finer", "b"), rollout(" good day", "a", 0.75), rollout(" new", "c")]
        page = report(tmp_path, after=after).text
        parts = ("a bad day", "good day", "fine", "finer", "no text for this prompt", "new")
        places = [page.index(part) for part in parts]
        assert places == sorted(places)

    def test_a_text_of_every_prompt_comes_before_a_second_of_any(self, tmp_path: Path) -> None:
        texts = [rollout(" first", "a"), rollout(" second", "a"), rollout(" third", "b")]
        page = report(tmp_path, before=texts, after=texts, limit=2).text
        assert "third" in page
        assert "second" not in page

    def test_a_long_prompt_is_folded(self, tmp_path: Path) -> None:
        texts = [rollout(" fine", opening="word " * 500)]
        page = report(tmp_path, before=texts, after=texts)
        assert [tag for tag, _ in page.tags].count("summary") == 2
        assert page.text.count("word") > 500

    def test_it_needs_nothing_from_outside_and_runs_nothing(self, tmp_path: Path) -> None:
        page = report(tmp_path)
        assert not any(tag in ("script", "link", "iframe", "object") for tag, _ in page.tags)
        for name in ("src", "href", "xlink:href", "srcset"):
            assert list(page.attributes(name)) == []
        html = (tmp_path / "report.html").read_text(encoding="utf-8")
        assert "http://" not in html
        assert "https://" not in html
        assert "url(" not in html
        assert "default-src 'none'" in next(value for value in page.attributes("content") if "src" in value)

    def test_nothing_from_a_run_becomes_markup(self, tmp_path: Path) -> None:
        nasty = '</pre><script>alert("x")</script>&amp;\x00\x1b[31m\x9b\ud83d\u202e"\' onload="x'
        sample = rollout(nasty, nasty, opening=nasty)
        sample.marks = [Mark(0.5, 2, 32, nasty, 32)]
        page = report(
            tmp_path / "<b>run",
            config_text=nasty,
            metrics=[{"step": 1, f"reward/{nasty}": 0.5}, {"step": 2, f"reward/{nasty}": 0.6}],
            comparison_rows=[Row(nasty, nasty, 0.1, 0.2)],
            before=[sample],
            after=[sample],
        )
        assert not any(tag in ("script", "b") and "onload" in attributes for tag, attributes in page.tags)
        assert "script" not in {tag for tag, _ in page.tags}
        assert list(page.attributes("onload")) == []
        # Config, label, chart's key, prompt, two texts, their totals, and the source's name: each as a reader's text.
        assert page.text.count('</pre><script>alert("x")</script>&amp;') >= 8
        assert not set("\x00\x1b\x9b\ud83d\u202e") & set((tmp_path / "<b>run" / "report.html").read_text("utf-8"))

    def test_every_coloured_piece_says_its_figures(self, tmp_path: Path) -> None:
        page = report(tmp_path)
        coloured = [one for tag, one in page.tags if "tabindex" in one]
        assert coloured
        assert all("mood" in (one["title"] or "") for one in coloured)
        assert {one["class"] for one in coloured} == {"p good", "p bad"}

    def test_a_score_for_the_whole_text_tints_it_and_is_named(self, tmp_path: Path) -> None:
        sample = rollout(" good", "a")
        sample.marks = [Mark(0.9, 2, 7, "final", 7)]
        page = report(tmp_path, before=[], after=[sample])
        tinted = [one for _, one in page.tags if "tabindex" in one]
        assert [one["title"] for one in tinted] == ["final +0.9, fixed after 5 of 5 tokens, for the whole text"]
        assert tinted[0]["style"] == "--s:0.20"
        assert "A faint tint over all" in page.text
        assert "before" not in page.text.split("Texts")[1].split("Reward sources")[0]

    def test_only_the_first_prompts_are_shown_and_that_is_said(self, tmp_path: Path) -> None:
        many = [rollout(f" text {at}", f"p{at}") for at in range(30)]
        page = report(tmp_path, before=many, after=many, limit=5)
        assert "the first 5 of 30 pairs" in page.text
        assert "text 4" in page.text
        assert "text 5" not in page.text

    def test_a_run_without_anything(self, tmp_path: Path) -> None:
        page = report(tmp_path, metrics=[], comparison_rows=[], before=[], after=[], config_text="")
        assert "0 steps" in page.text

    def test_a_picture_stands_in_for_a_curve_that_cannot_be_drawn(self, tmp_path: Path) -> None:
        (tmp_path / "curve.png").write_bytes(b"\x89PNG picture")
        page = report(tmp_path, metrics=[], curve_png=tmp_path / "curve.png")
        data = next(page.attributes("src")).removeprefix("data:image/png;base64,")
        assert base64.b64decode(data) == b"\x89PNG picture"
        with pytest.raises(UserError, match="cannot read the curve"):
            report(tmp_path, metrics=[], curve_png=tmp_path / "none.png")

    def test_it_is_the_same_from_samples_read_back(self, tmp_path: Path) -> None:
        samples = [rollout(" a bad day", "a", -0.5), rollout(" half \ud83d", "b")]
        lines = [json.dumps(rollout_record(one)) for one in samples]
        back = [rollout_from_record(json.loads(line)) for line in lines]
        report(tmp_path / "one" / "run", before=samples, after=samples)
        report(tmp_path / "two" / "run", before=back, after=back)
        assert (tmp_path / "one/run/report.html").read_bytes() == (tmp_path / "two/run/report.html").read_bytes()

    def test_a_full_disk_leaves_the_report_that_was_there(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        report(tmp_path)
        old = (tmp_path / "report.html").read_bytes()
        write = Path.write_text

        def half(path: Path, text: str, **options: Any) -> int:
            write(path, text[:100], **options)
            raise OSError(28, "No space left on device")

        monkeypatch.setattr(Path, "write_text", half)
        with pytest.raises(UserError, match="No space left on device"):
            report(tmp_path, config_text="other")
        assert (tmp_path / "report.html").read_bytes() == old
        assert [path.name for path in tmp_path.iterdir()] == ["report.html"]


class TestChart:
    def test_lines_run_from_the_first_step_to_the_last(self) -> None:
        drawn = chart(run_metrics(3))
        raw = next(attributes["d"] for tag, attributes in Page(drawn).tags if attributes.get("class") == "raw c0")
        assert raw is not None
        points = [tuple(map(float, point.split())) for point in raw[1:].split("L")]
        assert [point[0] for point in points] == [0.0, 500.0, 1000.0]
        assert points[0][1] > points[1][1] > points[2][1]

    def test_its_tooltips_have_the_figures(self) -> None:
        assert "step 2, mood 0.100, $x -0.100" in Page(chart(run_metrics(3))).text

    def test_nothing_one_step_and_a_flat_line(self) -> None:
        assert chart([]) == ""
        assert chart([{"step": 1, "loss": 2.0}]) == ""
        assert "nan" not in chart([{"step": 1, "reward": 0.0}])
        assert "nan" not in chart([{"step": at, "reward": 0.0, "kl": math.nan} for at in range(5)])

    def test_ticks_are_round_and_inside(self) -> None:
        assert ticks(0.0, 1.0, 4) == [0.0, 0.5, 1.0]
        assert ticks(-0.03, 0.97, 5) == [0.0, 0.2, 0.4, 0.6, 0.8]
        assert ticks(1, 40, 5) == [10.0, 20.0, 30.0, 40.0]
        assert ticks(2.0, 2.0) == [2.0]
