"""The screen, and which characters a reward colours."""

from __future__ import annotations

import io
import math
import re
import subprocess
import sys
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from instant_reward.screen import Scale, Screen, coloured, duration, figure, pieces, scale_of, sparkline, visible
from instant_reward.types import Mark, Prompt, Rollout

PROMPT = 2  # tokens


def rollout(tokens: list[str], marks: list[Mark], stop: str = "length", prompt: str = "Well,") -> Rollout:
    ends = [len("".join(tokens[: at + 1])) for at in range(len(tokens))]
    size = len(tokens)
    return Rollout(
        id="r",
        group=0,
        prompt=Prompt("p", prompt, [7] * PROMPT),
        token_ids=[7] * PROMPT + [5] * size,
        mask=[False] * PROMPT + [True] * size,
        logprobs=[0.0] * PROMPT + [-1.0] * size,
        char_ends=[0] * PROMPT + ends,
        text="".join(tokens),
        marks=marks,
        versions=[-1] * PROMPT + [0] * size,
        stop=stop,  # type: ignore[arg-type]
    )


def mark(value: float, start: int, end: int, source: str = "mood") -> Mark:
    """A mark whose tokens are counted from the first sampled one."""
    return Mark(value, PROMPT + start, PROMPT + end, source, PROMPT + end)


def values_by_character(sample: Rollout) -> list[float]:
    cut, _ = pieces(sample)
    return [piece.value for piece in cut for _ in range(piece.start, piece.end)]


def terminal(width: int = 90, height: int = 30) -> Console:
    return Console(file=io.StringIO(), force_terminal=True, width=width, height=height, color_system="truecolor")


def plain() -> Console:
    return Console(file=io.StringIO(), width=80)


def output(console: Console) -> str:
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


class TestPieces:
    def test_a_mark_covers_the_characters_of_its_tokens(self) -> None:
        sample = rollout([" won", "derful", " day"], [mark(0.5, 0, 2), mark(-0.25, 2, 3)])
        assert values_by_character(sample) == [0.5] * 10 + [-0.25] * 4

    def test_overlapping_marks_add(self) -> None:
        sample = rollout(["ab", "cd", "ef"], [mark(1.0, 0, 2), mark(0.5, 1, 3)])
        assert values_by_character(sample) == [1.0, 1.0, 1.5, 1.5, 0.5, 0.5]

    def test_the_same_mark_twice_counts_twice(self) -> None:
        once = mark(1.0, 0, 1)
        assert values_by_character(rollout(["a", "b"], [once, once])) == [2.0, 0.0]

    def test_a_mark_for_the_whole_text_is_kept_apart(self) -> None:
        cut, whole = pieces(rollout(["a", "b", ""], [mark(1.0, 0, 1), mark(3.0, 0, 3, "final")], "ended"))
        assert [piece.value for piece in cut] == [1.0, 0.0]
        assert [one.value for one in whole] == [3.0]

    def test_a_mark_on_the_end_token_has_an_empty_piece_of_its_own(self) -> None:
        cut, _ = pieces(rollout(["a", "b", ""], [mark(0.7, 2, 3)], "ended"))
        assert [(piece.start, piece.end, piece.value) for piece in cut] == [(0, 2, 0.0), (2, 2, 0.7)]

    def test_a_mark_on_half_a_character_colours_the_character_it_begins(self) -> None:
        sample = rollout(["a", "", "好", "b"], [mark(0.7, 1, 2)])
        assert values_by_character(sample) == [0.0, 0.7, 0.0]

    def test_one_source_only(self) -> None:
        sample = rollout(["a", "b"], [mark(1.0, 0, 1), mark(2.0, 0, 1, "other")])
        assert pieces(sample, "other")[0][0].value == 2.0

    def test_an_empty_text_shows_its_mark_at_its_end(self) -> None:
        assert pieces(rollout([], []))[0] == []
        assert [piece.value for piece in pieces(rollout(["", ""], [mark(2.0, 0, 2)], "ended"))[0]] == [2.0]
        assert [piece.value for piece in pieces(rollout([""], [mark(-1.0, 0, 1)], "ended"))[0]] == [-1.0]

    @given(st.data())
    def test_every_character_has_the_sum_of_its_marks(self, data: st.DataObject) -> None:
        tokens = data.draw(st.lists(st.text("xyz ", min_size=1, max_size=3), min_size=1, max_size=8))
        spans = st.tuples(st.integers(-9, 9), st.integers(0, len(tokens) - 1), st.integers(1, len(tokens)))
        marks = [mark(float(value), a, a + size) for value, a, size in data.draw(st.lists(spans, max_size=6))]
        sample = rollout(tokens, marks)
        cut, whole = pieces(sample)
        assert "".join(sample.text[piece.start : piece.end] for piece in cut) == sample.text
        owners = [PROMPT + number for number, token in enumerate(tokens) for _ in token]
        narrow = [one for one in marks if one not in whole]
        expected = [sum(one.value for one in narrow if one.start <= owner < one.end) for owner in owners]
        assert values_by_character(sample) == expected


class TestColours:
    def styles(self, sample: Rollout, scale: Scale | None = None) -> dict[str, str]:
        text = coloured(sample, scale=scale)
        return {text.plain[span.start : span.end]: str(span.style) for span in text.spans}

    def test_good_is_green_bad_is_red_and_nothing_is_plain(self) -> None:
        styles = self.styles(rollout([" good", " so", " bad"], [mark(1.0, 0, 1), mark(-1.0, 2, 3)]))
        red, green = (tuple(bytes.fromhex(styles[word][1:7])[:2]) for word in ("bad", "good"))
        assert green[1] > green[0]
        assert red[0] > red[1]
        assert "bold" in styles["good"]
        assert "underline" in styles["bad"]
        assert "so" not in styles or not styles["so"]

    def test_the_prompt_is_dim_and_only_its_tail_is_shown_if_asked(self) -> None:
        sample = rollout([" good"], [], prompt="a long opening")
        assert self.styles(sample)["a long opening"] == "dim"
        assert coloured(sample, prompt_tail=7).plain == "…opening good …"

    def test_an_arrow_stands_before_a_text_that_does_not_go_on_from_its_prompt(self) -> None:
        sample = rollout(["good"], [], prompt="a film")
        sample.prompt = replace(sample.prompt, context=[1, 2])
        assert coloured(sample).plain == "a film → good …"

    def test_a_whole_text_is_coloured_faintly(self) -> None:
        scale = Scale(piece=1.0, whole=1.0)
        assert 0 < scale.shade(0.0, 1.0) < 0.3
        assert scale.shade(1.0) == 1.0

    def test_one_outlier_does_not_wash_out_the_rest(self) -> None:
        sample = rollout(["a"] * 20, [mark(0.1, at, at + 1) for at in range(19)] + [mark(100.0, 19, 20)])
        assert scale_of([sample]).piece == 0.1

    @pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
    def test_a_value_that_is_no_number_still_draws(self, value: float) -> None:
        assert " bad" in coloured(rollout([" so", " bad"], [mark(value, 1, 2), mark(-value, 1, 2)])).plain
        assert Scale(1.0, 1.0).shade(value) == (0.0 if math.isnan(value) else math.copysign(1.0, value))

    def test_no_control_character_reaches_the_terminal(self) -> None:
        nasty = "\x1b[2J \ud83d \x07 \u202e \x9b"
        shown = visible(nasty)
        assert len(shown) == len(nasty)
        assert shown.encode("utf-8")
        assert not re.search(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u202e]", shown)
        assert visible("a\tb\n") == "a\tb\n"
        assert "\x1b" not in coloured(rollout([nasty], [])).plain


class TestPlainLines:
    def test_one_line_a_step(self) -> None:
        now = [0.0]
        console = plain()
        with Screen(40, console, clock=lambda: now[0]) as screen:
            for step in (1, 2, 3):
                now[0] += 2.5
                metrics = {"reward": 0.41, "reward/mood": 0.43, "kl": 0.02, "entropy": 2.9, "tokens_per_second": 120.0}
                screen.update(step, metrics, None)
        lines = output(console).splitlines()
        assert len(lines) == 3
        expected = "step 3/40  reward 0.410  mood 0.430  kl 0.020  entropy 2.90  120 tok/s  1:32 left"
        assert lines[-1] == expected

    def test_lines_are_flushed_at_once(self) -> None:
        flushed: list[str] = []

        class File(io.StringIO):
            def flush(self) -> None:
                flushed.append(self.getvalue())

        with Screen(1, Console(file=File())) as screen:
            screen.update(1, {"reward": 0.5}, None)
            assert "reward 0.500" in flushed[-1]

    def test_missing_values_and_no_numbers_are_shown_as_such(self) -> None:
        console = plain()
        with Screen(0, console) as screen:
            screen.update(0, {"reward": math.nan, "reward/a": None, "kl": math.inf}, None)  # type: ignore[dict-item]
            screen.update(0, {}, None)
        assert "step 0/0  reward nan  a -  kl inf" in output(console)

    def test_a_source_called_kl_is_not_taken_for_the_kl(self) -> None:
        console = plain()
        Screen(2, console).update(1, {"reward/kl": -0.5, "kl": 0.25}, None)
        assert "reward/kl -0.500  kl 0.250" in output(console)

    def test_markup_and_wide_lines_stay_as_they_are(self) -> None:
        console = plain()
        Screen(2, console).note("[red]see[/red] :smile: " + "x" * 100)
        assert output(console) == "[red]see[/red] :smile: " + "x" * 100 + "\n"

    def test_a_narrow_encoding_does_not_stop_a_run(self) -> None:
        raw = io.BytesIO()
        for forced in (False, True):
            file = io.TextIOWrapper(raw, encoding="ascii", write_through=True)
            console = Console(file=file, force_terminal=forced, width=80, height=20)
            with Screen(2, console) as screen:
                screen.note("naïve 好")
                screen.update(1, {"reward/好": 0.5, "reward": 0.1}, rollout([" 好", "\ud83d"], [mark(1.0, 0, 1)]))
            file.detach()
        assert b"na?ve ?" in raw.getvalue()

    def test_where_output_is_piped_nothing_is_drawn_in_place(self) -> None:
        code = (
            "from instant_reward.screen import Screen\n"
            "with Screen(2) as screen:\n    screen.update(1, {'reward': 0.5}, None)\n"
            "import sys; assert 'torch' not in sys.modules and 'instant_reward.train' not in sys.modules\n"
        )
        environment = {"FORCE_COLOR": "1", "PYTHONPATH": ":".join(sys.path)}
        result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
        assert result.returncode == 0, result.stderr
        assert result.stdout == "step 1/2  reward 0.500  0:00 left\n"


class TestTimeLeft:
    def test_it_follows_the_pace_of_the_last_steps(self) -> None:
        now = [100.0]
        with Screen(100, plain(), clock=lambda: now[0]) as screen:
            assert screen.seconds_left is None
            now[0] += 4
            screen.update(1, {}, None)
            assert screen.seconds_left == pytest.approx(99 * 4)
            now[0] += 1
            screen.update(2, {}, None)
            assert screen.seconds_left == pytest.approx(98 * 5 / 2)
            for step in range(3, 40):
                now[0] += 1
                screen.update(step, {}, None)
            assert screen.seconds_left == pytest.approx(61.0)
            screen.update(101, {}, None)
            assert screen.seconds_left == 0

    def test_a_resumed_run_does_not_count_what_was_done_before(self) -> None:
        now = [0.0]
        with Screen(100, plain(), clock=lambda: now[0]) as screen:
            now[0] += 3
            screen.update(91, {}, None)
            assert screen.seconds_left == pytest.approx(27.0)

    def test_durations(self) -> None:
        assert [duration(value) for value in (0, 92.4, 7500, -3)] == ["0:00", "1:32", "2:05:00", "0:00"]


class TestTerminal:
    def run(self, steps: int = 3, **options: int) -> str:
        console = terminal(**options)
        with Screen(steps, console) as screen:
            screen.note("[loaded]")
            for step in range(1, steps + 1):
                metrics = {"reward": step / 10, "reward/mood": 0.25, "kl": 0.02, "tokens_per_second": 120.0}
                screen.update(step, metrics, rollout([" fine", " words"], [mark(0.5, 0, 1)]))
        return output(console)

    def test_it_shows_the_figures_and_a_text(self) -> None:
        drawn = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", self.run())
        for part in (
            "[loaded]",
            "step 3/3",
            "0:00 left",
            "0.300",
            "mood",
            "KL",
            "120",
            "mood +0.50",
            "Well, fine words",
        ):
            assert part in drawn
        assert "▁" in drawn

    @pytest.mark.parametrize(("width", "height"), [(20, 5), (40, 10), (71, 3), (200, 60)])
    def test_any_size_of_terminal(self, width: int, height: int) -> None:
        assert "step" in self.run(width=width, height=height)

    def test_zero_steps(self) -> None:
        console = terminal()
        with Screen(0, console):
            pass
        assert "step 0/0" in output(console)
        with Screen(0, console) as screen:
            screen.update(0, {"reward": math.nan, "loss": None}, None)  # type: ignore[dict-item]

    def test_ctrl_c_leaves_the_cursor_as_it_was(self) -> None:
        console = terminal()
        screen = Screen(3, console)

        def interrupted() -> None:
            with screen:
                screen.update(1, {"reward": 0.5}, None)
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            interrupted()
        drawn = output(console)
        assert drawn.rindex("\x1b[?25h") > drawn.rindex("\x1b[?25l")
        screen.note("saved")
        assert output(console).endswith("saved\n")

    def test_a_long_text_does_not_push_the_figures_off(self) -> None:
        console = terminal(width=60, height=16)
        with Screen(2, console) as screen:
            screen.update(1, {"reward": 0.5}, rollout([" word"] * 400, []))
        last = output(console).split("step 1/2")[-1]
        assert "(more)" in last
        assert last.count("\n") <= 16


def test_sparkline() -> None:
    assert sparkline([0.0, 0.5, 1.0]) == "▁▅█"
    assert sparkline([]) == ""
    assert sparkline([None, math.nan]) == "  "
    assert sparkline([1.0, None, 1.0]) == "▄ ▄"
    assert len(sparkline([float(at) for at in range(1000)], width=30)) == 30


def test_figures_have_about_three_digits() -> None:
    values = [0.0, 0.4123, 2.934, 12.34, 123.4, 12345.6, -0.0123, 0.00002, None, math.nan]
    assert [figure(value) for value in values] == [
        *("0.000", "0.412", "2.93", "12.3", "123", "12,346", "-0.012", "2e-05", "-", "nan")
    ]
