"""Metrics against a reference: values by hand, several references, Chinese, change, and what is said of bad input."""

from __future__ import annotations

import math
import pickle
import sys
import threading
from typing import Any

import pytest

import instant_reward as ir
from instant_reward.assemble import build_rewards
from instant_reward.config import RewardConfig
from instant_reward.rewards import bleu
from instant_reward.rewards.base import as_reward
from instant_reward.rewards.metrics import (
    Bleu,
    Chrf,
    EditSimilarity,
    ExactMatch,
    MathAnswer,
    NumericAnswer,
    Rouge,
    TokenF1,
)
from instant_reward.rewards.reference import Metric
from instant_reward.rewards.watch import Watch
from instant_reward.text import TextDecoder
from instant_reward.types import Prompt, UserError, View
from tiny import END, shared_tokenizer

EVERY: list[type[Metric]] = [Rouge, Bleu, Chrf, ExactMatch, TokenF1, EditSimilarity, NumericAnswer, MathAnswer]


def prompt(**info: Any) -> Prompt:
    return Prompt("p3", "So:", [1, 2], info=info)


def by_piece(metric: Metric, pieces: list[str], **info: Any) -> list[float]:
    about = prompt(**info)
    state, text, paid = metric.start(about), "", []
    for piece in pieces:
        text += piece
        paid.append(metric.extend(state, View(text, piece, about, about.info, done=False)))
    return paid


class TestRouge:
    @pytest.mark.parametrize(
        ("kind", "precision", "recall"),
        [
            (1, 4 / 5, 4 / 6),  # the, cat, the, mat
            (2, 2 / 4, 2 / 5),  # the cat, the mat
            ("2", 2 / 4, 2 / 5),
            (3, 0.0, 0.0),
            ("L", 4 / 5, 4 / 6),
            ("l", 4 / 5, 4 / 6),
        ],
    )
    def test_by_hand(self, kind: int | str, precision: float, recall: float) -> None:
        text, reference = "The cat saw the mat!", "the cat sat on the mat"
        f = 2 * precision * recall / (precision + recall) if precision else 0.0
        for measure, value in {"f": f, "precision": precision, "recall": recall}.items():
            assert Rouge(kind, measure=measure).score(text, reference) == pytest.approx(value)

    def test_order_counts_for_l_and_not_for_single_words(self) -> None:
        assert Rouge("L").score("c b a", "a b c") == pytest.approx(1 / 3)
        assert Rouge(1).score("c b a", "a b c") == 1.0

    def test_a_word_counts_as_often_as_the_reference_has_it(self) -> None:
        assert Rouge(1, measure="precision").score("the the the the", "the cat the dog") == 0.5

    def test_a_prefix_is_scored_as_if_the_text_ended_there(self) -> None:
        paid = by_piece(Rouge(1, measure="precision"), ["the c", "at s", "a", "t"], reference="the cat sat")
        assert paid == pytest.approx([1 / 2, 2 / 3, 2 / 3, 1.0])

    def test_the_reference_with_the_best_f_counts_for_precision_too(self) -> None:
        references = ["a b c d e f g h", "a b x"]  # f: 2 * 2 / (2 + 8), and 2 * 2 / (2 + 3)
        assert Rouge(1).score("a b", references) == pytest.approx(4 / 5)
        assert Rouge(1, measure="recall").score("a b", references) == pytest.approx(2 / 3)

    def test_chinese_goes_by_character_where_rouge_score_sees_nothing(self) -> None:
        text, reference = "猫坐在垫子上。", "一只猫坐在垫子上"
        assert Rouge("L", measure="precision").score(text, reference) == 1.0
        assert Rouge("L", measure="recall").score(text, reference) == pytest.approx(6 / 8)
        assert Rouge(2, measure="recall").score(text, reference) == pytest.approx(5 / 7)
        with pytest.raises(UserError, match="has no words"):
            Rouge("L", tokens="rouge").score(text, reference)

    @pytest.mark.parametrize(
        ("text", "reference"),
        [("ÉCOLE", "école"), ("ΟΔΟΣ", "οδος"), ("مرحبا", "مرحبا."), ("की", "की?"), ("Straße", "STRASSE")],
    )
    def test_words_of_any_script_have_no_case_and_keep_their_marks(self, text: str, reference: str) -> None:
        assert Rouge(1).score(text, reference) == 1.0
        assert Rouge(1).score(text[:1], reference) == 0.0


class TestBleu:
    def test_by_hand(self) -> None:
        text, reference = "the cat sat on mat", "the cat sat on the mat"
        precisions = 5 / 5 * 3 / 4 * 2 / 3 * 1 / 2
        assert Bleu().score(text, reference) == pytest.approx(precisions**0.25 * math.exp(1 - 6 / 5))

    def test_a_short_text_is_judged_by_the_orders_that_it_has(self) -> None:
        assert Bleu().score("the cat", "the cat sat") == pytest.approx(math.exp(1 - 3 / 2))

    @pytest.mark.parametrize(
        ("smoothing", "value", "last"),
        [("exp", None, 1 / 2), ("floor", None, 0.1), ("floor", 0.2, 0.2), ("none", 1, 0)],
    )
    def test_an_order_without_a_match(self, smoothing: str, value: float | None, last: float) -> None:
        bleu = Bleu(order=2, smoothing=smoothing, smooth_value=value)
        assert bleu.score("b a", "a b") == pytest.approx(math.sqrt(1 * last))

    def test_adding_one(self) -> None:
        assert Bleu(order=2, smoothing="add-k").score("a c b", "a b d") == pytest.approx(math.sqrt(2 / 3 * 1 / 3))

    def test_references_are_pooled_and_the_nearest_length_counts(self) -> None:
        assert Bleu(order=1).score("a b", ["a x y z", "b u v"]) == pytest.approx(math.exp(1 - 3 / 2))
        assert Bleu(order=1).score("a b c", ["a b", "c d e f"]) == 1.0  # of two as near, the shorter

    @pytest.mark.parametrize(
        ("reference", "text"), [("我爱你。", "我爱他。"), ("かなです", "かなだす"), ("แมวดำ", "แมวดี")]
    )
    def test_scripts_without_spaces_are_cut_by_character(self, reference: str, text: str) -> None:
        assert Bleu().score(reference, reference) == 1.0
        assert 0.1 < Bleu(smoothing="floor").score(text, reference) < 0.9
        assert Bleu(tokens="13a").score(text, reference) == 0.0


class TestChrf:
    def test_by_hand(self) -> None:
        assert Chrf(order=1).score("a b", "abc") == pytest.approx(5 * (2 / 3) / (4 + 2 / 3))
        assert Chrf(order=2, beta=1).score("ab", "abc") == pytest.approx(2 * (2 / 3 + 1 / 2) / 2 / (1 + 7 / 12))

    def test_words_count_as_well(self) -> None:
        precision, recall = (3 / 3 + 1 / 2) / 2, (3 / 4 + 1 / 3) / 2  # a, b, c; a, bc against a, bc, d
        expected = 5 * precision * recall / (4 * precision + recall)
        assert Chrf(order=1, words=1).score("a cb", "a bc d") == pytest.approx(expected)

    def test_the_best_reference_counts(self) -> None:
        assert Chrf().score("abc", ["xyz", "abc", "abd"]) == 1.0

    def test_white_space_aside(self) -> None:
        assert Chrf().score(" 你 好\n吗", "你好吗") == 1.0


class TestAnswers:
    @pytest.mark.parametrize(
        ("text", "reference", "value"),
        [
            ("The Beatles!", "beatles", 1.0),
            ("the  U.S.", "US", 1.0),
            ("Paul", ["John", "paul."], 1.0),
            ("The Beatles were", "beatles", 0.0),
            ("北京。", "北京", 1.0),
            ("", "x", 0.0),
        ],
    )
    def test_exact_match(self, text: str, reference: Any, value: float) -> None:
        assert ExactMatch().score(text, reference) == value

    def test_exact_match_of_the_text_as_it_is(self) -> None:
        exact = ExactMatch(tokens="text")
        assert [exact.score(text, "a  B.") for text in (" a  B.\n", "a B.", "a  b.", "a  B")] == [1, 0, 0, 0]

    def test_exact_match_comes_and_goes(self) -> None:
        pieces = ["Pa", "ris", ".", " ", "Texas"]
        assert by_piece(ExactMatch(), pieces, reference="Paris") == [0, 1, 1, 1, 0]
        assert by_piece(ExactMatch(change=True), pieces, reference="Paris") == [0, 1, 0, 0, -1]

    @pytest.mark.parametrize(
        ("text", "reference", "value"),
        [
            ("the cat sat", "A cat stood", 1 / 2),
            ("cat cat", "cat", 2 / 3),
            ("北京市", "北京", 4 / 5),
            ("a dog", ["cat", "big dog"], 2 / 3),
        ],
    )
    def test_token_f1(self, text: str, reference: Any, value: float) -> None:
        assert TokenF1().score(text, reference) == pytest.approx(value)

    @pytest.mark.parametrize(
        ("text", "reference", "tokens", "value"),
        [
            (" sitting ", "kitten", "text", 4 / 7),
            ("flaw", ["lawn", "x"], "text", 1 / 2),
            ("", "abc", "text", 0.0),
            ("a b", "ab", "text", 2 / 3),
            ("the cat sat", "the dog sat down", "auto", 1 / 2),
            ("我爱他", "我爱你", "auto", 2 / 3),
        ],
    )
    def test_edit_similarity(self, text: str, reference: Any, tokens: str, value: float) -> None:
        assert EditSimilarity(tokens=tokens).score(text, reference) == pytest.approx(value)


class TestNumbers:
    @pytest.mark.parametrize(
        ("text", "reference"),
        [
            ("so it is 42.", 42),
            ("= 42, I think", "42"),
            ("first 7, then $1,234.50!", 1234.5),
            ("x = -3", "-3.0"),
            ("x=\u22123", -3),
            ("half: 1/2", 0.5),
            ("2.5e-3", "0.0025"),
            ("50%", "50"),
            ("答案是42个", "… #### 42"),
            ("４２", 42),
            ("٤٢", 42),
            ("about v1.5: 42", ["41", "42"]),
            ("3 and x2", 3),
            ("a loss of -$5.", -5),
            ("\u2212€1,200", "-1200"),
            ("3-$5", 5),
            ("p = .5", "0.5"),
            ("-.25", -0.25),
            ("1/.5 is 2...", 2),
        ],
    )
    def test_the_last_number_counts(self, text: str, reference: Any) -> None:
        assert NumericAnswer().score(text, reference) == 1.0

    @pytest.mark.parametrize(
        "text", ["", "none", "42 or 43", "4 2", "1/0", "9" * 5000, "42.0000001", "x42", "5-42.5", "-$42", ".42"]
    )
    def test_wrong_answers(self, text: str) -> None:
        assert NumericAnswer().score(text, "42") == 0.0

    def test_within_a_tolerance(self) -> None:
        near = NumericAnswer(tolerance=0.01)
        assert [near.score(text, -200) for text in ("-202", "-198", "-202.1", "200")] == [1, 1, 0, 0]

    def test_a_number_that_grows(self) -> None:
        assert by_piece(NumericAnswer(), ["4", "2", ",", "000", " kg", " 1"], answer=42) == [0, 1, 1, 0, 0, 0]

    @pytest.mark.parametrize(
        ("text", "reference", "value"),
        [
            (r"so $\frac{2}{4}$", "1/2", 1.0),
            (r"\boxed{1+x}", "x+1", 1.0),
            ("it is 0.5", r"thus \boxed{\frac{1}{2}}", 1.0),
            ("it is 7", 8, 0.0),
            ("no idea", ["8", "9"], 0.0),
            ("$(1,2)$", ["8", "(1, 2)"], 1.0),
        ],
    )
    def test_mathematics(self, text: str, reference: Any, value: float) -> None:
        assert MathAnswer().score(text, reference) == value

    def test_mathematics_in_another_thread(self) -> None:
        values: list[float] = []
        worker = threading.Thread(target=lambda: values.append(MathAnswer().score("so $0.5$", "1/2")))
        worker.start()
        worker.join()
        assert values == [1.0]

    def test_mathematics_by_piece(self) -> None:
        assert by_piece(MathAnswer(), ["it is $1", "/2$", "", " or $3$"], answer="0.5") == [0, 1, 1, 0]


class TestAsRewards:
    def test_a_config_names_them(self) -> None:
        use = "instant_reward.rewards.metrics:Rouge"
        final, each, changing = build_rewards(
            [
                RewardConfig(use=use, args={"kind": 1, "reference": "summary"}),
                RewardConfig(use=use, args={"reference": "summary"}, every="word", name="words"),
                RewardConfig(use=use, args={"reference": "summary", "change": True}, name="changes"),
            ]
        )
        assert [one.every for one in (final, each, changing)] == ["end", "word", "word"]
        watch = Watch([final, each, changing], TextDecoder(shared_tokenizer()))
        watch.open(0, prompt(summary=["good slow movie", "it!"]))
        marks, _ = watch.feed(0, shared_tokenizer()(" good good movie" + END)["input_ids"], done=True)
        paid = {name: [mark.value for mark in marks if mark.source == name] for name in ("Rouge", "words", "changes")}
        assert paid["Rouge"] == pytest.approx([2 / 3])
        assert paid["words"] == pytest.approx([1 / 2, 2 / 5, 2 / 3])
        assert paid["changes"] == pytest.approx([1 / 2, 2 / 5 - 1 / 2, 2 / 3 - 2 / 5])

    def test_names_tell_them_apart(self) -> None:
        names = [as_reward(made).name for made in (Rouge(2), Rouge(), Bleu(), TokenF1(), MathAnswer())]
        assert names == ["rouge_2", "rouge_l", "bleu", "token_f1", "math_answer"]

    @pytest.mark.parametrize("kind", EVERY)
    def test_another_process_can_have_them(self, kind: type[Metric]) -> None:
        metric = kind(reference="gold")
        metric.start(prompt(gold="42"))
        twin = pickle.loads(pickle.dumps(metric))
        assert twin.score("42", "42") == metric.score("42", "42") == 1.0

    @pytest.mark.parametrize("kind", EVERY)
    def test_texts_of_one_prompt_do_not_mix(self, kind: type[Metric]) -> None:
        metric, about = kind(reference="gold"), prompt(gold="42")
        one, other = metric.start(about), metric.start(about)
        metric.extend(one, View("7", "7", about, about.info, done=True))
        assert metric.extend(other, View("42", "42", about, about.info, done=True)) == 1.0


class TestRefusals:
    @pytest.mark.parametrize("kind", EVERY)
    @pytest.mark.parametrize(
        ("info", "said"),
        [
            ({}, "prompt p3 has no column 'gold' (it has: none)"),
            ({"summary": "x", "n": 1}, "prompt p3 has no column 'gold' (it has: summary, n)"),
            ({"gold": ""}, "a reference in column 'gold' of prompt p3 is empty"),
            ({"gold": ["x1", " \n"]}, "a reference in column 'gold' of prompt p3 is empty"),
            ({"gold": []}, "column 'gold' of prompt p3 is an empty list"),
            ({"gold": None}, "column 'gold' of prompt p3 holds None (NoneType), not text"),
            ({"gold": ["1", {"a": 1}]}, "column 'gold' of prompt p3 holds {'a': 1} (dict), not text"),
            ({"gold": b"x"}, "column 'gold' of prompt p3 holds b'x' (bytes), not text"),
            ({"gold": float("nan")}, "column 'gold' of prompt p3 holds nan (float), not text"),
        ],
    )
    def test_references_that_cannot_be_used(self, kind: type[Metric], info: dict[str, Any], said: str) -> None:
        with pytest.raises(UserError) as caught:
            kind(reference="gold").start(prompt(**info))
        assert said in str(caught.value)
        assert "\n" not in str(caught.value)

    @pytest.mark.parametrize(
        ("metric", "reference", "said"),
        [
            (Rouge(), "👍🏽 !", "a reference in column 'reference' of prompt p3 has no words"),
            (TokenF1(), "The", "has no words"),
            (NumericAnswer("reference"), "forty-two", "has no number"),
            (NumericAnswer("reference"), "1/0", "has no number"),
            (Rouge(), 42, "holds 42 (int), not text"),
            (NumericAnswer("reference"), True, "holds True (bool), not text"),
        ],
    )
    def test_references_with_nothing_to_compare(self, metric: Metric, reference: Any, said: str) -> None:
        with pytest.raises(UserError) as caught:
            metric.start(prompt(reference=reference))
        assert said in str(caught.value)

    @pytest.mark.parametrize(
        ("kind", "args"),
        [
            (Rouge, {"kind": "W"}),
            (Rouge, {"kind": True}),
            (Rouge, {"kind": 0}),
            (Rouge, {"measure": "accuracy"}),
            (Rouge, {"tokens": "13a"}),
            (Bleu, {"tokens": "rouge"}),
            (Bleu, {"order": 0}),
            (Bleu, {"order": 2.0}),
            (Bleu, {"smoothing": "some"}),
            (Bleu, {"smooth_value": -1}),
            (Chrf, {"order": 0}),
            (Chrf, {"words": -1}),
            (Chrf, {"beta": float("inf")}),
            (ExactMatch, {"tokens": ["text"]}),
            (NumericAnswer, {"tolerance": "1%"}),
            (TokenF1, {"reference": ""}),
            (EditSimilarity, {"change": "yes"}),
        ],
    )
    def test_arguments_that_are_none(self, kind: Any, args: dict[str, Any]) -> None:
        with pytest.raises(UserError, match=next(iter(args))):
            kind(**args)

    @pytest.mark.parametrize(
        ("kind", "module"), [(Bleu, "sacrebleu.metrics.bleu"), (MathAnswer, "math_verify")], ids=["bleu", "math"]
    )
    def test_a_missing_package_is_named(self, kind: Any, module: str, monkeypatch: pytest.MonkeyPatch) -> None:
        bleu.sacrebleu_tokenizer.cache_clear()
        monkeypatch.setitem(sys.modules, module, None)
        with pytest.raises(UserError, match=r"pip install instant-reward\[metrics\]"):
            kind()

    def test_the_watcher_names_reward_and_prompt(self) -> None:
        watch = Watch([Rouge(reference="gold")])
        with pytest.raises(ir.types.UserError, match=r"reward 'rouge_l' on prompt p3 .*no column 'gold'"):
            watch.open(0, prompt())
