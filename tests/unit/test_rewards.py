"""What a reward may be, what it may hand back, and what is said where it fails."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from fractions import Fraction
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

import instant_reward as ir
from instant_reward.assemble import build_rewards
from instant_reward.config import RewardConfig
from instant_reward.rewards.base import as_reward, as_rewards
from instant_reward.rewards.compose import weighted
from instant_reward.rewards.watch import Watch
from instant_reward.text import TextDecoder
from instant_reward.types import Mark, Message, Prompt, RewardError, Span, UserError
from tiny import END, shared_tokenizer

PROMPT = 2  # tokens
STEP = 7
Reward = Any  # whatever a user hands in


def tokens(text: str) -> list[int]:
    return list(shared_tokenizer()(text)["input_ids"])


def prompt(text: str = "So:", messages: list[Message] | None = None, **info: Any) -> Prompt:
    return Prompt(id="p3", text=text, token_ids=[1] * PROMPT, messages=messages, info=info)


def watch(*rewards: Reward) -> Watch:
    return Watch(rewards, TextDecoder(shared_tokenizer()), STEP)


def score(text: str, *rewards: Reward, about: Prompt | None = None) -> list[Mark]:
    """The marks of a text that is fed token by token and closed by the end token."""
    watcher = watch(*rewards)
    watcher.open("row", about or prompt())
    ids = tokens(text + END)
    marks = []
    for index, token in enumerate(ids):
        found, stopped = watcher.feed("row", [token], done=index == len(ids) - 1)
        marks += found
        if stopped is not None:
            break
    assert watcher.close("row")[2] == marks
    return marks


def values(marks: Sequence[Mark], source: str | None = None) -> list[float]:
    return [mark.value for mark in marks if source in (None, mark.source)]


def gives(value: Any, every: Any = "end", **options: Any) -> Reward:
    """A reward named "it" that hands back ``value``, or ``value(view)``."""
    make: Callable[[Any], Any] = value if callable(value) else lambda _: value
    return ir.reward(every=every, name="it", **options)(lambda view: make(view))


def refusal(*rewards: Reward, text: str = " good movie", about: Prompt | None = None) -> str:
    with pytest.raises(RewardError) as caught:
        score(text, *rewards, about=about)
    return str(caught.value)


class TestWhatIsHandedBack:
    @pytest.mark.parametrize(
        ("value", "number"),
        [
            (0.5, 0.5),
            (-3, -3.0),
            (True, 1.0),
            (np.float32(0.25), 0.25),
            (np.int64(4), 4.0),
            (np.bool_(False), 0.0),
            (np.array(0.75), 0.75),
            (torch.tensor(0.125), 0.125),
            (torch.tensor(2.0, requires_grad=True), 2.0),
            (torch.tensor(1.5, dtype=torch.bfloat16), 1.5),
            (Fraction(1, 4), 0.25),
        ],
        ids=lambda value: type(value).__name__,
    )
    def test_a_number_of_any_kind_rates_the_piece(self, value: Any, number: float) -> None:
        (mark,) = score(" good movie", gives(value))
        assert mark == Mark(number, PROMPT, PROMPT + 3, "it", PROMPT + 3)
        assert type(mark.value) is float

    def test_a_word_is_rated_once_the_next_token_shows_its_end(self) -> None:
        assert score(" good movie", gives(lambda view: len(view.piece), every="word")) == [
            Mark(5.0, PROMPT, PROMPT + 1, "it", PROMPT + 2),
            Mark(6.0, PROMPT + 1, PROMPT + 3, "it", PROMPT + 3),  # the end token belongs to the last word
        ]

    @pytest.mark.parametrize("kind", [list, tuple, np.array, torch.tensor])
    def test_a_list_rates_each_token_of_the_piece(self, kind: Any) -> None:
        marks = score(" good xyz movie", gives(lambda view: kind([0.5] * (view.tokens - 1) + [2.0]), every="word"))
        first = [Mark(2.0, 2, 3, "it", 5)]  # the space alone does not show that the word is over
        second = [Mark(value, 3 + at, 4 + at, "it", 8) for at, value in enumerate([0.5, 0.5, 0.5, 2.0])]
        third = [Mark(0.5, 7, 8, "it", 9), Mark(2.0, 8, 9, "it", 9)]
        assert marks == first + second + third

    def test_a_span_rates_characters_anywhere_in_the_text_so_far(self) -> None:
        def last_and_first(view: ir.View) -> Any:
            if view.done:
                return [view.span(1.0, 0, 2), view.span(-0.5, len(view.text) - 2, len(view.text))]
            return None

        assert score(" good xyz movie", gives(last_and_first, every="word")) == [
            Mark(1.0, 2, 3, "it", 9),
            Mark(-0.5, 7, 8, "it", 9),
        ]

    def test_one_span_needs_no_list(self) -> None:
        assert score(" good movie", gives(lambda view: view.span(3, 5, 11))) == [Mark(3.0, 3, 4, "it", 5)]

    def test_an_empty_list_and_none_rate_nothing(self) -> None:
        assert score(" good movie", gives(None), gives([])) == []

    def test_stop_rates_the_piece_and_ends_the_text(self) -> None:
        marks = score(" good bad movie", gives(lambda view: ir.stop(-1) if "bad" in view.piece else 1, every="word"))
        assert [(mark.value, mark.seen - PROMPT) for mark in marks] == [(1.0, 2), (-1.0, 3)]

    def test_stop_without_a_value_only_ends_the_text(self) -> None:
        watcher = watch(gives(lambda view: ir.stop() if "bad" in view.piece else None, every="token"))
        watcher.open(0, prompt())
        assert watcher.feed(0, tokens(" good bad movie"), done=False) == ([], PROMPT + 2)
        assert watcher.close(0) == (" good bad", [0, 0, 5, 9], [])

    def test_where_one_reward_stops_the_others_see_their_last_piece(self) -> None:
        stops = gives(lambda view: ir.stop() if "bad" in view.piece else None, every="token")
        seen: list[tuple[str, bool]] = []
        words = ir.reward(every="word", name="words")(lambda view: seen.append((view.piece, view.done)))
        final = ir.reward(name="final")(lambda view: len(view.text))
        marks = score(" good bad movie", words, stops, final)
        assert seen == [(" good", False), (" bad", True)]
        assert marks == [Mark(9.0, PROMPT, PROMPT + 2, "final", PROMPT + 2)]

    def test_the_reward_that_stopped_is_asked_no_more(self) -> None:
        asked: list[str] = []

        def stops(view: ir.View) -> Any:
            asked.append(view.piece)
            return ir.stop(0.5)

        watcher = watch(ir.reward(every="line")(stops))
        watcher.open(0, prompt())
        # The last token ends two lines at once: the second is no longer asked for.
        marks, stopped = watcher.feed(0, tokens("a") + tokens("\n\n"), done=False)
        assert (values(marks), stopped) == ([0.5], PROMPT + 2)
        assert asked == ["a\n"]


class TestForms:
    def test_batched_functions_get_the_views_of_all_texts_at_once(self) -> None:
        calls: list[list[str]] = []

        @ir.reward(every="word", batched=True)
        def lengths(views: list[ir.View]) -> list[int]:
            calls.append([view.piece for view in views])
            return [len(view.piece) for view in views]

        watcher = watch(lengths)
        for row in "ab":
            watcher.open(row, prompt())
        fed = watcher.feed_many([("a", tokens(" good movie"), False), ("b", tokens(" bad film"), False)])
        assert calls == [[" good", " bad"]]
        assert [values(marks) for marks, _ in fed] == [[5.0], [4.0]]

    @pytest.mark.parametrize("kind", [list, tuple, np.array, torch.tensor, iter], ids=lambda kind: kind.__name__)
    def test_batched_functions_may_give_any_sequence(self, kind: Any) -> None:
        assert values(score(" good", gives(lambda views: kind([2.0] * len(views)), batched=True))) == [2.0]

    def test_batched_functions_may_mix_what_they_hand_back(self) -> None:
        answers = iter([None, [1.0], ir.stop(3.0)])
        marks = score(" a a a a", gives(lambda views: [next(answers) for _ in views], every="token", batched=True))
        assert [(mark.value, mark.seen - PROMPT) for mark in marks] == [(1.0, 2), (3.0, 3)]

    def test_a_plain_function_of_the_text_is_a_final_score(self) -> None:
        def length(text: str) -> int:
            return len(text)

        assert score(" good movie", length) == [Mark(11.0, PROMPT, PROMPT + 3, "length", PROMPT + 3)]
        assert values(score(" good movie", len)) == [11.0]

    def test_a_plain_function_of_a_view_gets_one(self) -> None:
        def by_name(view: Any) -> int:
            return len(view.prompt.text)

        def by_type(v: ir.View) -> int:
            return len(v.prompt.text)

        assert values(score(" good", by_name, by_type)) == [3.0, 3.0]

    def test_columns_come_by_name_from_the_data_set(self) -> None:
        seen: dict[str, Any] = {}

        def all_of_them(prompts: Any, completions: Any, **columns: Any) -> list[float]:
            seen.update(columns, prompts=prompts, completions=completions)
            return [0.5]

        def one_of_them(completions: list[str], answer: list[str]) -> list[float]:
            return [float(answer[0] in completions[0])]

        about = prompt(answer="good", source="here")
        assert score(" good", all_of_them, one_of_them, about=about) == [
            Mark(0.5, 2, 4, "all_of_them", 4),
            Mark(1.0, 2, 4, "one_of_them", 4),
        ]
        assert seen == {"prompts": ["So:"], "completions": [" good"], "answer": ["good"], "source": ["here"]}

    def test_columns_of_chats_are_messages(self) -> None:
        asked: list[Message] = [{"role": "user", "content": "So?"}]

        def of_a_chat(prompts: Any, completions: Any) -> list[float]:
            assert prompts == [asked]
            assert completions == [[{"role": "assistant", "content": " good"}]]
            return [1.0]

        assert values(score(" good", of_a_chat, about=prompt(messages=asked))) == [1.0]

    def test_columns_hold_none_where_a_text_has_no_such_column(self) -> None:
        def answers(completions: Any, answer: Any) -> list[float]:
            assert answer == ["yes", None]
            return [1.0] * len(completions)

        watcher = watch(answers)
        watcher.open(0, prompt(answer="yes"))
        watcher.open(1, prompt())
        watcher.feed_many([(0, tokens(" good"), True), (1, tokens(" bad"), True)])

    def test_a_reward_may_keep_a_state_for_each_text(self) -> None:
        class Count:
            every = "word"

            def start(self, about: Prompt) -> list[int]:
                return [len(about.text)]

            def extend(self, state: list[int], view: ir.View) -> int:
                state[0] += 1
                return state[0]

        watcher = watch(Count())
        for row in "ab":
            watcher.open(row, prompt())
        watcher.feed("a", tokens(" good"), done=True)
        watcher.feed("b", tokens(" good bad fine"), done=True)
        assert [values(watcher.close(row)[2]) for row in "ab"] == [[4.0], [4.0, 5.0, 6.0]]

    def test_a_batched_state_never_sees_two_pieces_of_one_text_in_one_call(self) -> None:
        calls: list[list[str]] = []

        class Gather:
            def start(self, about: Prompt) -> list[str]:
                return []

            def extend(self, states: list[list[str]], views: list[ir.View]) -> list[int]:
                calls.append([view.piece for view in views])
                for state, view in zip(states, views, strict=True):
                    state.append(view.piece)
                return [len(state) for state in states]

        watcher = watch(ir.reward(every="line", batched=True, name="gather")(Gather()))
        for row in "ab":
            watcher.open(row, prompt())
        fed = watcher.feed_many([("a", tokens("\n\n"), False), ("b", tokens("\n\n"), False)])
        assert calls == [["\n", "\n"], ["\n", "\n"]]
        assert [values(marks) for marks, _ in fed] == [[1.0, 2.0], [1.0, 2.0]]

    def test_a_decorated_function_can_still_be_called(self) -> None:
        polite = ir.reward(every="word")(lambda view: len(view.piece))
        assert polite(SimpleNamespace(piece="abc")) == 3


class TestNamesAndWeights:
    def test_names_and_weights_are_kept(self) -> None:
        @ir.reward(every="word", weight=0.5, discount=0.9, at="span")
        def polite(view: ir.View) -> float:
            return 1.0

        assert (polite.name, polite.weight, polite.discount, polite.at) == ("polite", 0.5, 0.9, "span")
        assert (polite.but(weight=2.0).weight, polite.weight) == (2.0, 0.5)
        assert weighted(len, 0.25, "length").weight == 0.25
        assert weighted(polite, 3.0).name == "polite"
        assert ir.reward(name="other")(len).name == "other"

    def test_the_weight_does_not_change_the_marks(self) -> None:
        assert values(score(" good", weighted(len, 100.0))) == [5.0]

    def test_two_of_one_name_get_numbers_that_nobody_else_has(self) -> None:
        rewards = [ir.reward(name=name)(len) for name in ("a", "a", "a_2", "b", "a")]
        assert [one.name for one in as_rewards(rewards)] == ["a", "a_3", "a_2", "b", "a_4"]


class TestChange:
    @pytest.mark.parametrize("every", ["token", "word", "sentence", "line", "end", 3, lambda rest: len(rest) > 4])
    @pytest.mark.parametrize("batched", [False, True])
    @pytest.mark.parametrize("text", [" good. Bad\n\n movie", "", "\n", " 你 é good", "a\n"])
    def test_the_changes_sum_to_the_final_score_less_that_of_the_empty_text(
        self, every: Any, batched: bool, text: str
    ) -> None:
        def one(text: str) -> float:
            return 3.0 + sum(ord(character) * (at + 1) for at, character in enumerate(text))

        function = (lambda texts: [one(text) for text in texts]) if batched else one
        marks = score(text, ir.change(function, every=every, batched=batched, name="change"))
        assert sum(values(marks)) == one(text) - one("")

    def test_each_piece_is_paid_what_it_changed(self) -> None:
        def goods(text: str) -> float:
            return text.count("good") - 2.0 * text.count("bad") + 10.0

        marks = score(" good bad movie good", ir.change(goods))
        assert [(mark.value, mark.source) for mark in marks] == [(v, "goods") for v in (1.0, -2.0, 0.0, 1.0)]

    def test_the_state_of_one_text_is_not_that_of_another(self) -> None:
        watcher = watch(ir.change(len, every="token"))
        for row in "ab":
            watcher.open(row, prompt())
        for row in "ab":
            assert values(watcher.feed(row, tokens(" good movie"), True)[0]) == [5.0, 6.0]

    def test_a_score_of_anything_but_a_text_is_refused(self) -> None:
        @ir.reward(every="word")
        def polite(view: ir.View) -> float:
            return 1.0

        with pytest.raises(UserError, match=r"'polite' takes no text; give it f\(text\)"):
            ir.change(polite)

    @pytest.mark.parametrize("use", ["rouge", "chrf", "distinct", "length"])
    def test_a_score_that_grows_with_its_text_pays_its_own_change(self, use: str) -> None:
        args: dict[str, Any] = {"target": 3} if use == "length" else {}
        (made,) = build_rewards([RewardConfig(use=use, args=args, change=True, every="token", weight=0.5)])
        (own,) = build_rewards([RewardConfig(use=use, args={**args, "change": True}, every="token", weight=0.5)])
        (plain,) = build_rewards([RewardConfig(use=use, args=args, every="token")])
        about = prompt(reference="a good movie")
        changes, scores = (values(score(" good movie", one, about=about)) for one in (made, plain))
        assert changes == values(score(" good movie", own, about=about))
        assert len(changes) == len(scores) > 1
        assert changes[1] == pytest.approx(scores[1] - scores[0])
        assert (made.name, made.weight, plain.function.change) == (use, 0.5, False)

    def test_a_score_of_wrong_length_is_named(self) -> None:
        said = refusal(ir.change(lambda texts: [1.0] * (len(texts) + 1), batched=True, name="odd"))
        assert "reward 'odd'" in said
        assert "2 values for 1 texts" in said


class TestPotential:
    @pytest.mark.parametrize("every", ["token", "word", "sentence", "line", "end", 3, lambda rest: len(rest) > 4])
    @pytest.mark.parametrize("batched", [False, True])
    @pytest.mark.parametrize("text", [" good. Bad\n\n movie", "", "\n", " 你 é good", "a\n"])
    def test_the_discounted_payments_sum_to_nothing(self, every: Any, batched: bool, text: str) -> None:
        def one(text: str) -> float:
            return 3.0 + sum(ord(character) * (at + 1) for at, character in enumerate(text)) / 1000

        phi = (lambda texts: [one(text) for text in texts]) if batched else one
        marks = score(text, ir.potential(phi, 0.8, every=every, batched=batched, name="phi"))
        assert sum(mark.value * 0.8 ** (mark.seen - PROMPT) for mark in marks) == pytest.approx(0.0, abs=1e-9)
        assert marks[-1].seen == PROMPT + len(tokens(text + END))

    def test_each_piece_is_paid_where_its_end_was_seen(self) -> None:
        def goods(text: str) -> float:
            return text.count("good") + 10.0

        marks = score(" good xyz movie", ir.potential(goods, 0.5))
        # The second word is known three tokens after the first one; the end pays the last potential back.
        assert [(mark.value, mark.seen - PROMPT, mark.source) for mark in marks] == [
            (0.5 * 11.0, 3, "goods"),
            (0.5 * 11.0 - 0.5**-2 * 11.0, 6, "goods"),
            (-11.0, 7, "goods"),
        ]

    def test_the_end_is_told_where_its_last_piece_had_ended_before(self) -> None:
        marks = score("a\n", ir.potential(len, 0.5, every="line"))
        assert marks == [Mark(1.0, PROMPT, PROMPT + 2, "len", PROMPT + 2), Mark(-2.0, PROMPT + 2, PROMPT + 3, "len", 5)]
        assert len(score("a\n", ir.change(len, every="line"))) == 1, "other rewards are not asked about an empty piece"

    def test_the_end_is_told_where_another_reward_stopped_the_text(self) -> None:
        stops = gives(lambda view: ir.stop() if "bad" in view.piece else None, every="token")
        marks = score(" good bad movie", ir.potential(len, 1.0, "token"), stops)
        assert values(marks) == [5.0, 4.0, -9.0]
        assert marks[-1].seen == PROMPT + 2

    def test_phi_is_asked_about_no_empty_text_and_no_end(self) -> None:
        asked: list[str] = []
        score(" good bad", ir.potential(lambda text: asked.append(text) or 1 / len(text), 0.9, name="mean"))
        assert asked == [" good"]

    def test_texts_are_asked_about_together(self) -> None:
        calls: list[list[str]] = []
        phi = ir.potential(
            lambda texts: calls.append(texts) or [1.0] * len(texts), 0.5, "token", batched=True, name="p"
        )
        watcher = watch(phi)
        for row in "abc":
            watcher.open(row, prompt())
        fed = [("a", tokens(" good"), False), ("b", tokens(" bad"), True), ("c", tokens(" fine"), False)]
        assert [values(marks) for marks, _ in watcher.feed_many(fed)] == [[0.5], [0.0], [0.5]]
        assert calls == [[" good", " fine"]]
        watcher.feed_many([("a", tokens(" movie"), True), ("c", tokens(" movie"), True)])
        assert len(calls) == 1, "there was nothing to ask about"

    def test_its_discount_and_its_place_are_its_own(self) -> None:
        shaping = ir.potential(len, 0.9, weight=0.5)
        assert (shaping.discount, shaping.weight, shaping.at, shaping.every) == (0.9, 0.5, "seen", "word")
        assert weighted(shaping, 2.0).weight == 2.0
        assert shaping.but(every="line", name="other", discount=0.9).sees_end
        for discount in (1.0, None):
            with pytest.raises(UserError, match=r"'len': it was shaped for discount=0\.9 and .* discount=(1\.0|None);"):
                shaping.but(discount=discount)
        with pytest.raises(UserError, match="'len': shaping is exact only where at='seen'"):
            shaping.but(at="span")

    @pytest.mark.parametrize("discount", [0.0, -0.5, 1.01, math.nan, math.inf, "word", None, True])
    def test_a_discount_that_is_none_is_refused(self, discount: Any) -> None:
        with pytest.raises(UserError, match="is not above 0 and at most 1; give a number that is"):
            ir.potential(len, discount)

    def test_a_phi_of_anything_but_a_text_is_refused(self) -> None:
        @ir.reward(every="word")
        def polite(view: ir.View) -> float:
            return 1.0

        with pytest.raises(UserError, match=r"'polite' takes no text; give it f\(text\)"):
            ir.potential(polite, 0.9)

    @pytest.mark.parametrize("value", [math.nan, math.inf])
    def test_a_phi_that_is_no_number_is_named(self, value: float) -> None:
        said = refusal(ir.potential(lambda text: value, 0.9, name="odd"))
        assert said.startswith("reward 'odd' on prompt p3 ('So:') at step 7 gave ")
        assert "return a finite number" in said

    def test_a_batched_phi_of_wrong_length_is_named(self) -> None:
        said = refusal(ir.potential(lambda texts: [1.0] * (len(texts) + 1), 0.9, batched=True, name="odd"))
        assert "reward 'odd'" in said
        assert "phi gave 2 values for 1 texts; return one for each" in said

    def test_a_piece_that_is_too_long_for_its_discount_is_named(self) -> None:
        said = refusal(ir.potential(len, 1e-200, every=3), text=" good movie" * 4)
        assert "reward 'len'" in said
        assert "use shorter pieces or a discount nearer to 1" in said


class TestViews:
    def test_a_view_ends_with_its_piece_and_cannot_show_the_future(self) -> None:
        text = " good. 你 Movie\n\nwas fine"
        every = ["token", "word", "sentence", "line", "end", 2]
        seen: list[tuple[Any, ir.View, int]] = []
        watcher = watch(*[ir.reward(e, name=str(e))(lambda view, e=e: seen.append((e, view, fed))) for e in every])
        watcher.open(0, prompt())
        ids = tokens(text + END)
        so_far = ""
        for fed, token in enumerate(ids, start=1):
            before = len(seen)
            watcher.feed(0, [token], done=fed == len(ids))
            so_far = TextDecoder(shared_tokenizer()).char_ends(ids[:fed], done=False)[0]
            for _, view, _ in seen[before:]:
                assert view.text.endswith(view.piece)
                assert so_far.startswith(view.text)
        for one in every:
            views = [view for e, view, _ in seen if e == one]
            assert "".join(view.piece for view in views) == text
            assert [view.done for view in views] == [False] * (len(views) - 1) + [True]
            assert views[-1].text == text

    def test_of_two_pieces_that_end_with_the_last_token_only_the_last_is_done(self) -> None:
        seen: list[tuple[str, bool]] = []
        watcher = watch(ir.reward(every="word")(lambda view: seen.append((view.piece, view.done))))
        watcher.open(0, prompt())
        watcher.feed(0, tokens(" good movie"), done=True)
        assert seen == [(" good", False), (" movie", True)]

    def test_a_view_counts_the_tokens_of_its_piece(self) -> None:
        found: list[tuple[str, int]] = []
        score(" good xyz", gives(lambda view: found.append((view.piece, view.tokens)), every="word"))
        assert found == [(" good", 1), (" xyz", 5)]

    def test_a_view_counts_the_sampled_tokens_that_were_read_to_fix_it(self) -> None:
        found: list[tuple[str, int]] = []
        marks = score(" good xyz", gives(lambda view: found.append((view.piece, view.sampled)) or 1.0, every="word"))
        assert found == [(" good", 3), (" xyz", 6)]
        assert [mark.seen - PROMPT for mark in marks] == [3, 6]

    def test_a_view_shows_the_prompt_and_the_columns(self) -> None:
        about = prompt(answer=42)
        seen = []
        score(" good", gives(lambda view: seen.append(view)), about=about)
        assert (seen[0].prompt, seen[0].info) == (about, {"answer": 42})

    def test_a_character_of_several_tokens_is_one_piece(self) -> None:
        euro = tokens("€")  # three bytes, three tokens
        assert len(euro) == 3
        pieces: list[tuple[str, int]] = []
        score("€a", gives(lambda view: pieces.append((view.piece, view.tokens)), every="token"))
        assert pieces == [("€", 3), ("a", 1), ("", 1)]


class TestFailures:
    @pytest.mark.parametrize(
        ("value", "complaint"),
        [
            (math.nan, "gave nan; return a finite number"),
            (np.float32("nan"), "gave nan"),
            (-math.inf, "gave -inf; return a finite number"),
            (10**400, "gave a int; return a number"),
            ("0.5", "gave the text '0.5'; return a number"),
            ({"score": 1.0}, "gave a dict; return a number"),
            (1j, "gave a complex; return a number"),
            ([1.0], "a list of 1 values for a piece of 3 tokens; give one for each token"),
            (torch.ones(4), "a list of 4 values for a piece of 3 tokens"),
            ([1.0, math.nan, 1.0], "gave nan"),
            ([1.0, "x", 1.0], "gave the text 'x'"),
            (np.ones((3, 2)), "gave a list; return a number"),
            ([1.0, Span(1.0, 0, 1), 1.0], "gave a Span"),
            (Span(1.0, 3, 12), r"the span [3, 12); it must hold characters of the text, between 0 and 11"),
            (Span(1.0, -1, 3), "the span [-1, 3)"),
            (Span(1.0, 3, 3), "the span [3, 3)"),
            (Span(1.0, 4, 3), "the span [4, 3)"),
            (Span(1.0, 0.5, 3), "the span [0.5, 3)"),
            (Span(math.inf, 0, 3), "gave inf"),
            (ir.stop("no"), "gave the text 'no'"),
        ],
        ids=str,
    )
    def test_a_bad_value_names_the_reward_the_prompt_and_the_step(self, value: Any, complaint: str) -> None:
        said = refusal(gives(value))
        assert said.startswith("reward 'it' on prompt p3 ('So:') at step 7 ")
        assert complaint in said

    def test_a_span_of_text_that_is_not_written_yet_is_refused(self) -> None:
        said = refusal(gives(lambda view: view.span(1.0, 0, 11), every="word"))
        assert "between 0 and 5" in said

    def test_an_exception_inside_is_named_and_kept_as_the_cause(self) -> None:
        def broken(text: str) -> float:
            raise KeyError("lexicon")

        with pytest.raises(
            RewardError, match=r"reward 'broken' on prompt p3 .* at step 7 raised KeyError: 'lexicon'"
        ) as e:
            score(" good", broken)
        assert isinstance(e.value.__cause__, KeyError)

    def test_an_exception_while_a_state_begins_is_named(self) -> None:
        said = refusal(ir.change(lambda text: 1 / len(text), name="mean"))
        assert "reward 'mean'" in said
        assert "raised ZeroDivisionError in start" in said

    def test_a_wrong_signature_is_named_when_it_is_called(self) -> None:
        assert "raised TypeError" in refusal(ir.reward(name="two")(lambda one, two: 1.0))

    def test_a_missing_column_is_named(self) -> None:
        def needs(completions: Any, answer: Any) -> list[float]:
            return [1.0]

        said = refusal(needs)
        assert "reward 'needs'" in said
        assert "answer" in said

    @pytest.mark.parametrize(
        ("value", "complaint"),
        [
            ([1.0, 2.0], "handed back 2 values for 1 texts; return one for each"),
            ([], "handed back 0 values for 1 texts"),
            (0.5, "handed back a float for 1 texts; return a list with one value for each"),
            (None, "handed back a NoneType for 1 texts"),
            ("x", "handed back a str for 1 texts"),
            (torch.tensor(0.5), "handed back a float for 1 texts"),
            ({"a": 1.0}, "handed back a dict for 1 texts"),
        ],
        ids=str,
    )
    def test_a_batched_function_must_give_one_value_a_text(self, value: Any, complaint: str) -> None:
        said = refusal(gives(lambda _: value, batched=True))
        assert said.startswith("reward 'it' on prompt p3 ('So:') at step 7 ")
        assert complaint in said

    def test_the_same_holds_for_functions_of_columns(self) -> None:
        def short(prompts: Any, completions: Any, **columns: Any) -> Any:
            return 1.0

        assert "reward 'short'" in refusal(short)
        assert "handed back a float" in refusal(short)

    def test_the_prompt_is_the_one_that_failed(self) -> None:
        watcher = watch(gives(lambda view: math.nan if view.prompt.id == "bad" else 1.0))
        watcher.open(0, Prompt("fine", "x", [1]))
        watcher.open(1, Prompt("bad", "Why", [1]))
        with pytest.raises(RewardError, match=r"on prompt bad \('Why'\) at step 7"):
            watcher.feed_many([(0, tokens(" good"), True), (1, tokens(" good"), True)])


class TestRefusedBeforeAnythingRuns:
    def test_ir_reward_without_brackets(self) -> None:
        with pytest.raises(UserError, match=r"without brackets; write @ir\.reward\(every=\.\.\.\)"):

            @ir.reward
            def polite(view: ir.View) -> float:
                return 1.0

    def test_ir_reward_without_brackets_above_a_function_of_the_text(self) -> None:
        @ir.reward
        def polite(text: str) -> float:  # may be a function that says where pieces end: seen only when it is used
            return 1.0

        with pytest.raises(UserError, match=r"has no function yet; write @ir\.reward"):
            as_rewards([polite])

    @pytest.mark.parametrize(
        ("candidate", "complaint"),
        [
            (0.5, r"0.5 is no reward; give a function f\(text\) -> float"),
            ("my_rewards:polite", "is no reward; give a function"),
            (lambda text, other: 1.0, r"takes \(text, other\); write it as f\(text\)"),
            (lambda: 1.0, r"takes \(\); write it as f\(text\)"),
            (lambda text, *, other: 1.0, r"takes \(text, other\)"),
        ],
        ids=["number", "string", "two", "none", "keyword"],
    )
    def test_what_is_no_reward(self, candidate: Any, complaint: str) -> None:
        with pytest.raises(UserError, match=complaint):
            as_reward(candidate)

    def test_a_class_where_an_object_is_needed(self) -> None:
        class Count:
            def start(self, about: Prompt) -> int:
                return 0

            def extend(self, state: int, view: ir.View) -> int:
                return 1

        with pytest.raises(UserError, match=r"'Count' is a class; hand in an object of it: Count\(\.\.\.\)"):
            as_reward(Count)

    def test_something_under_ir_reward_that_cannot_be_called(self) -> None:
        with pytest.raises(UserError, match="reward 'it' is 3, which cannot be called; give a function"):
            ir.reward(name="it")(3)

    @pytest.mark.parametrize(
        "options",
        [
            {"every": "words"},
            {"every": 0},
            {"every": True},
            {"every": None},
            {"at": "end"},
            {"weight": math.nan},
            {"discount": 1.5},
        ],
        ids=str,
    )
    def test_an_unknown_option_names_the_reward(self, options: dict[str, Any]) -> None:
        with pytest.raises(UserError, match=r"reward 'it': "):
            ir.reward(name="it", **options)(lambda view: 1.0)

    @pytest.mark.parametrize("rewards", [len, "len", {"len": len}], ids=["function", "string", "mapping"])
    def test_rewards_must_be_a_list(self, rewards: Any) -> None:
        with pytest.raises(UserError, match=r"rewards must be a list"):
            as_rewards(rewards)
