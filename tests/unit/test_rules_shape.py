"""Rules about a text's shape: length, diversity, repetition, readability and its end, by hand; and bad arguments."""

from __future__ import annotations

import math
import pickle
import sys
from typing import Any

import pytest
from sacrebleu.metrics.bleu import BLEU

import instant_reward as ir
from instant_reward.assemble import build_rewards
from instant_reward.config import RewardConfig
from instant_reward.rewards.base import as_reward
from instant_reward.rewards.compose import change
from instant_reward.rewards.diversity import Distinct, Mtld, TypeTokenRatio
from instant_reward.rewards.language import FullSentence, Readability, syllables
from instant_reward.rewards.length import Length
from instant_reward.rewards.repetition import Repetition, SelfBleu
from instant_reward.rewards.watch import Watch
from instant_reward.text import Pieces, TextDecoder
from instant_reward.types import Prompt, Rollout, UserError, View
from tiny import END, shared_tokenizer

PROMPT = Prompt("p3", "So the cat sat", [1, 2])


def by_piece(reward: Any, pieces: list[str]) -> list[Any]:
    """What a reward with a state pays for each piece."""
    state, text, paid = reward.start(PROMPT), "", []
    for piece in pieces:
        text += piece
        paid.append(reward.extend(state, View(text, piece, PROMPT, {}, done=False, sampled=len(paid) + 1)))
    return paid


def views(texts: list[str]) -> list[View]:
    return [View(text, text, PROMPT, {}, done=True) for text in texts]


class TestLength:
    def test_the_edge_is_smooth(self) -> None:
        length = Length(4, edge=2)
        words = ["a b", "a b c", "a b c d", "a b c d e", "a b c d e f g h"]
        assert [length.score(text) for text in words] == pytest.approx(
            [math.exp(-1), math.exp(-0.25), 1.0, math.exp(-0.25), math.exp(-4)]
        )

    @pytest.mark.parametrize(
        ("target", "good", "bad"),
        [([2, 3], ["a b", "a b c"], ["a", "a b c d"]), ([2, None], ["a b", "a " * 99], ["a", ""])],
    )
    def test_a_target_may_be_a_range_or_one_bound(self, target: Any, good: list[str], bad: list[str]) -> None:
        assert [Length(target).score(text) for text in good] == [1.0, 1.0]
        assert all(0.0 < Length(target).score(text) < 1.0 for text in bad)
        assert Length([None, 3]).score("") == 1.0

    @pytest.mark.parametrize(
        ("text", "unit", "length"),
        [
            ("Don't stop, now!", "words", 4),
            ("我爱你, really。", "words", 4),
            ("我爱 你。", "characters", 4),
            (" a b\n", "characters", 2),
            ("👍🏽 !", "words", 0),
            ("", "characters", 0),
        ],
    )
    def test_what_is_counted(self, text: str, unit: str, length: int) -> None:
        assert Length(length, unit, edge=0.1).score(text) == 1.0
        assert Length(length + 1, unit, edge=0.1).score(text) < 1e-9

    def test_tokens_are_the_sampled_ones(self) -> None:
        assert by_piece(Length(3, "tokens", edge=1), ["x", "", " y z", ""]) == pytest.approx(
            [math.exp(-4), math.exp(-1), 1.0, math.exp(-1)]
        )
        with pytest.raises(UserError, match="does not say how many tokens"):
            Length(3, "tokens").score("x")

    def test_a_word_that_grows_is_counted_once(self) -> None:
        assert by_piece(Length(2, edge=0.1), ["a", " mo", "vie", "!", " c"]) == pytest.approx([0, 1, 1, 1, 0], abs=1e-9)

    def test_changes_sum_to_the_score_less_that_of_no_text(self) -> None:
        paid = by_piece(Length(2, edge=1, change=True), ["a", " b", " c", " d"])
        assert paid == pytest.approx([math.exp(-1) - math.exp(-4), 1 - math.exp(-1), math.exp(-1) - 1, -0.349563], 1e-5)
        assert sum(paid) == pytest.approx(0.0)  # two too few and two too many

    def test_far_away_is_0_and_not_an_overflow(self) -> None:
        assert Length(5, edge=1e-300).score("a") == 0.0
        assert 0.0 < Length(1e308).score("a") < 1e-6


class TestDistinct:
    @pytest.mark.parametrize(
        ("n", "text", "score"),
        [
            (1, "The cat the dog", 3 / 4),
            (2, "a b a b a", 2 / 4),
            (3, "a b", 0.0),
            (2, "", 0.0),
            (1, "我爱我爱", 2 / 4),
            (2, "不要不要不要", 2 / 5),
            (1, "...!", 0.0),
        ],
    )
    def test_by_hand(self, n: int, text: str, score: float) -> None:
        assert Distinct(n).score(text) == pytest.approx(score)

    def test_characters_may_count(self) -> None:
        assert Distinct(1, tokens="characters").score("Ab ba!") == pytest.approx(3 / 5)

    def test_a_word_that_is_still_growing_counts_as_it_is(self) -> None:
        assert by_piece(Distinct(1), ["a ", "b a", "n", " b"]) == pytest.approx([1.0, 2 / 3, 1.0, 3 / 4])

    def test_changes_sum_to_the_score(self) -> None:
        assert by_piece(Distinct(1, change=True), ["a", " b", " a"]) == pytest.approx([1.0, 0.0, 2 / 3 - 1])


class TestTypeTokenRatio:
    def test_it_is_the_mean_over_the_windows(self) -> None:
        assert TypeTokenRatio(3).score("a b a a") == pytest.approx((2 / 3 + 2 / 3) / 2)
        assert TypeTokenRatio(2).score("a a b a a") == pytest.approx((1 + 2 + 2 + 1) / 8)

    def test_shorter_texts_and_no_window_have_the_plain_ratio(self) -> None:
        assert TypeTokenRatio().score("a b a") == TypeTokenRatio(None).score("a b a") == pytest.approx(2 / 3)
        assert TypeTokenRatio(None).score("a b " * 50) == pytest.approx(2 / 100)

    def test_length_alone_does_not_lower_it(self) -> None:
        verse = "a b c d e f g h i j "
        assert TypeTokenRatio(10).score(verse) == TypeTokenRatio(10).score(verse * 20) == 1.0

    def test_a_growing_word_takes_the_place_of_the_oldest(self) -> None:
        assert by_piece(TypeTokenRatio(2), ["a a", " b", " a"]) == pytest.approx([1 / 2, 3 / 4, 5 / 6])


class TestMtld:
    def test_by_hand(self) -> None:
        # Forwards "a b a" has 2 of 3, below 0.72: one stretch; "c d" is none in part. Backwards "d c a b" has 4 of 4,
        # then "a" makes it 4 of 5, part (1 - 0.8) / (1 - 0.72).
        assert Mtld(ceiling=10).score("a b a c d") == pytest.approx((5 / 1 + 5 / (0.2 / 0.28)) / 2 / 10)

    def test_without_repetition_it_is_at_its_ceiling(self) -> None:
        assert [Mtld().score(text) for text in ("", "a", "a b c", "a a a a a a")] == [0.0, 1.0, 1.0, 0.02]
        assert Mtld(ceiling=5).score("a b c d e f g h i j a k l m n o p q") == 1.0

    def test_a_lower_threshold_makes_longer_stretches(self) -> None:
        text = "the cat sat and the dog ran and the old cow slept as the pig sat and ate " * 2
        assert Mtld(threshold=0.5).score(text) > Mtld(threshold=0.72).score(text) > Mtld(threshold=0.9).score(text)

    def test_it_is_that_of_all_words_so_far(self) -> None:
        pieces = ["the cat", " and the", " cat and t", "he dog"]
        whole = ["".join(pieces[: end + 1]) for end in range(4)]
        assert by_piece(Mtld(), pieces) == [Mtld().score(text) for text in whole]


class TestRepetition:
    @staticmethod
    def marked(reward: Repetition, text: str, every: str = "word", prompt: Prompt = PROMPT) -> list[tuple[str, float]]:
        state, start, found = reward.start(prompt), 0, []
        for end in Pieces(every).ends(text, 0, True):
            spans = reward.extend(state, View(text[:end], text[start:end], prompt, {}, done=end == len(text)))
            found += [(text[span.start : span.end], span.value) for span in spans]
            start = end
        return found

    @pytest.mark.parametrize(
        ("n", "text", "marked"),
        [
            (2, "the cat and the cat, and The dog", ["the cat", "and", "The"]),
            (3, "a b c. A, b; c d", ["A, b; c"]),
            (3, "a b c d a b c d", ["a b c", "d"]),
            (2, "no no no no", ["no no", "no"]),
            (1, "a b a", ["a"]),
            (3, "a b", []),
            (2, "", []),
            (3, "我喜欢你，我喜欢他", ["我喜欢"]),
        ],
    )
    def test_words_that_stood_there_before_are_marked(self, n: int, text: str, marked: list[str]) -> None:
        assert self.marked(Repetition(n), text) == [(part, -1.0) for part in marked]
        assert self.marked(Repetition(n, penalty=0.5), text, "end") == [(part, -0.5) for part in marked]

    def test_overlapping_repeats_mark_no_character_twice(self) -> None:
        text = "x " * 50
        marked = self.marked(Repetition(4), text)
        assert "".join(part for part, _ in marked).count("x") == 49  # the first n-gram is new, the next one repeats it

    def test_the_prompt_may_count(self) -> None:
        assert self.marked(Repetition(3), " and the cat sat") == []
        assert self.marked(Repetition(3, prompt=True), " and the cat sat") == [("the cat sat", -1.0)]
        assert self.marked(Repetition(2, prompt=True), " the dog") == []  # "sat the" is no n-gram of the text

    def test_characters_may_count(self) -> None:
        assert self.marked(Repetition(2, tokens="characters"), "haha") == [("ha", -1.0)]


class TestSelfBleu:
    TEXTS = ("the cat sat on the mat", "the cat sat on a mat", "dogs run")

    def test_it_is_minus_sacrebleu_against_the_siblings(self) -> None:
        library = BLEU(effective_order=True)
        texts = list(self.TEXTS)
        expected = [-library.sentence_score(one, [x for x in texts if x != one]).score / 100 for one in texts]
        assert SelfBleu()(views(texts)) == pytest.approx(expected)
        assert expected[0] < -0.3
        assert expected[2] == 0.0

    def test_the_same_text_twice_and_no_sibling(self) -> None:
        assert SelfBleu()(views(["a b c d", "a b c d"])) == pytest.approx([-1.0, -1.0])
        assert SelfBleu()(views(["a b c d"])) == [0.0]
        assert SelfBleu()(views(["", "", "a"])) == [0.0, 0.0, 0.0]

    def test_chinese_goes_by_character(self) -> None:
        texts = ["我喜欢这部电影", "我喜欢那部电影"]
        assert -0.7 < SelfBleu()(views(texts))[0] < -0.2
        assert SelfBleu(tokens="13a")(views(texts)) == [0.0, 0.0]

    def test_the_order_is_the_longest_n_gram(self) -> None:
        texts = ["a b c d", "d c b a"]
        assert SelfBleu(order=1)(views(texts)) == pytest.approx([-1.0, -1.0])
        assert SelfBleu(order=2)(views(texts))[0] > -0.5

    def test_siblings_are_compared_within_their_group(self) -> None:
        rollouts = [
            Rollout("r", number // 2, PROMPT, [1, 2, 7], [False, False, True], [0.0] * 3, [0, 0, len(text)], text, [],
                    [0] * 3, "ended")
            for number, text in enumerate(["a b c d", "a b c d", "a b c d", "e f g h"])
        ]  # fmt: skip
        ir.replay_groups([SelfBleu()], rollouts)
        assert [rollout.total("self_bleu") for rollout in rollouts] == pytest.approx([-1.0, -1.0, 0.0, 0.0])


class TestReadability:
    def test_by_hand(self) -> None:
        text = "The old man walked to the harbour. He was tired!"  # 10 words, 2 sentences, 13 syllables
        words = {"The": 1, "old": 1, "man": 1, "walked": 1, "to": 1, "harbour": 2, "He": 1, "was": 1, "tired": 1}
        assert {word: syllables(word) for word in words} == words
        ease = 206.835 - 1.015 * 10 / 2 - 84.6 * 11 / 10
        assert Readability().score(text) == min(1.0, ease / 100)
        assert Readability(target=ease).score(text) == pytest.approx(1.0)
        assert Readability(target=[0, ease - 15]).score(text) == pytest.approx(math.exp(-1))

    def test_easy_texts_are_easy(self) -> None:
        easy = "I like the cat. It is small and soft, and it likes me."
        news = "The government announced yesterday that the new road will open before the end of the year."
        hard = "Institutional heterogeneity necessitates comprehensive methodological reconsideration."
        score = Readability().score
        assert score(easy) == 1.0
        assert score(easy) > score(news) > score(hard) == 0.0

    @pytest.mark.parametrize("text", ["", "...", "今天天气很好。", "42 + 7", "👍🏽"])
    def test_texts_without_english_words_score_nothing(self, text: str) -> None:
        assert Readability().score(text) == Readability(target=[0, None]).score(text) == 0.0

    @pytest.mark.parametrize(
        ("word", "count"),
        [
            ("a", 1), ("the", 1), ("movie", 2), ("beautiful", 3), ("table", 2), ("loved", 1), ("wanted", 2),
            ("boxes", 2), ("makes", 1), ("houses", 2), ("create", 2), ("reading", 2), ("idea", 3), ("don't", 1),
            ("didn't", 2), ("Playing", 2), ("lovely", 2), ("radio", 3), ("nation", 2), ("queue", 1), ("science", 2),
            ("I’ll", 1), ("brrr", 1), ("rhythm", 1), ("actually", 4),
        ],
    )  # fmt: skip
    def test_syllables(self, word: str, count: int) -> None:
        assert syllables(word) == count

    def test_what_has_no_english_word_is_no_sentence(self) -> None:
        score = Readability(target=50, edge=100).score
        assert score("今天很好。A cat sleeps. ... 42!") == score("A cat sleeps.") != score("A cat. Sleeps.")

    def test_a_sentence_counts_once_it_is_there(self) -> None:
        pieces = ["Cats sle", "ep. Do", "gs r", "un."]
        whole = ["".join(pieces[: end + 1]) for end in range(4)]
        assert by_piece(Readability(target=50), pieces) == [Readability(target=50).score(text) for text in whole]
        paid = by_piece(Readability(target=50, change=True), pieces)
        assert sum(paid) == pytest.approx(Readability(target=50).score(whole[-1]))


class TestFullSentence:
    @pytest.mark.parametrize(
        "text",
        ["Yes.", "It ended. ", "Did it?\n", "He said: \"No!\"", "(It did.)", "今天很好。", "“真的吗？”", "好！\n",
         "Well…", "I have 3.", "نعم؟", "हाँ।", "x " * 5000 + "end."],
    )  # fmt: skip
    def test_a_text_that_ends_with_a_full_sentence(self, text: str) -> None:
        assert FullSentence()(text) == 1.0

    @pytest.mark.parametrize(
        "text",
        ["", " ", "Yes", "Yes. And", "今天很好", "今天。然后", "I met Mr.", "cats, dogs, etc.", "It is 3.1", "...",
         "Wow! !!!", "1.", "Yes,", "Yes:", "👍🏽", "好，"],
    )  # fmt: skip
    def test_a_text_that_does_not(self, text: str) -> None:
        assert FullSentence()(text) == 0.0

    def test_as_a_change_it_pays_at_the_end_of_each_sentence(self) -> None:
        one = as_reward(change(FullSentence()))
        state = one.start(PROMPT)
        texts = ["It", "It ended.", "It ended. Or", "It ended. Or not?"]
        assert [one.rate([View(text, "", PROMPT, {}, done=False)], [state])[0] for text in texts] == [0, 1, -1, 1]


def test_a_config_names_them_and_the_watcher_pays_them() -> None:
    rooms = "instant_reward.rewards"
    configs = [
        RewardConfig(use=f"{rooms}.length:Length", name="tokens", args={"target": 6, "unit": "tokens"}),
        RewardConfig(use=f"{rooms}.length:Length", name="changes", args={"target": [4, 5], "change": True}),
        RewardConfig(use=f"{rooms}.diversity:Distinct", name="distinct", args={"n": 1}, every="word"),
        RewardConfig(use=f"{rooms}.repetition:Repetition", name="repetition", args={"n": 1}),
        RewardConfig(use=f"{rooms}.language:FullSentence", name="full", change=True),
    ]
    made = build_rewards(configs)
    assert [one.every for one in made] == ["end", "word", "word", "word", "word"]
    watch = Watch(made, TextDecoder(shared_tokenizer()))
    watch.open(0, PROMPT)
    found, _ = watch.feed(0, shared_tokenizer()(" good good movie." + END)["input_ids"], done=True)
    paid = {name: [mark.value for mark in found if mark.source == name] for name in (one.name for one in made)}
    count = 2 + len("movie.") - 5  # "movie" is one token
    assert paid["tokens"] == pytest.approx([math.exp(-(((6 - count - 2) / 1.5) ** 2))])
    assert sum(paid["changes"]) == pytest.approx(Length([4, 5]).score("good good movie") - Length([4, 5]).score(""))
    assert paid["distinct"] == pytest.approx([1.0, 1 / 2, 2 / 3])
    assert paid["repetition"] == [-1.0]
    assert paid["full"] == [0.0, 0.0, 1.0]


@pytest.mark.parametrize("reward", [Length(3), Distinct(), TypeTokenRatio(), Mtld(), Readability(), Repetition(1)])
def test_another_process_can_have_them(reward: Any) -> None:
    twin = pickle.loads(pickle.dumps(reward))
    assert by_piece(twin, ["the cat", " the"]) == by_piece(reward, ["the cat", " the"])


class TestRefusals:
    @pytest.mark.parametrize(
        ("kind", "args"),
        [
            (Length, {"target": -1}),
            (Length, {"target": [5, 3]}),
            (Length, {"target": [None, None]}),
            (Length, {"target": [1, 2, 3]}),
            (Length, {"target": "80"}),
            (Length, {"target": [1, float("inf")]}),
            (Length, {"target": 5, "unit": "letters"}),
            (Length, {"target": 5, "edge": 0}),
            (Length, {"target": 5, "change": 1}),
            (Distinct, {"n": 0}),
            (Distinct, {"n": 2.0}),
            (Distinct, {"tokens": "13a"}),
            (Distinct, {"change": "yes"}),
            (TypeTokenRatio, {"window": 1}),
            (TypeTokenRatio, {"tokens": "words"}),
            (Mtld, {"threshold": 1}),
            (Mtld, {"ceiling": 0}),
            (Mtld, {"tokens": "words"}),
            (Repetition, {"n": True}),
            (Repetition, {"penalty": -1}),
            (Repetition, {"tokens": "text"}),
            (Repetition, {"prompt": "yes"}),
            (SelfBleu, {"order": 0}),
            (SelfBleu, {"tokens": "auto2"}),
            (Readability, {"target": [9, 1]}),
            (Readability, {"edge": -1}),
            (Readability, {"change": None}),
        ],
    )
    def test_arguments_that_are_none(self, kind: Any, args: dict[str, Any]) -> None:
        with pytest.raises(UserError) as caught:
            kind(**args)
        assert str(caught.value).startswith(f"{kind.__name__}: ")
        assert list(args)[-1] in str(caught.value)
        assert "\n" not in str(caught.value)

    def test_a_missing_package_is_named(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setitem(sys.modules, "sacrebleu.metrics.bleu", None)
        with pytest.raises(UserError, match=r"sacrebleu; run: pip install 'instant-reward\[metrics\]'"):
            SelfBleu()

    def test_siblings_are_not_replayed_alone(self) -> None:
        alone = Rollout("r", 0, PROMPT, [1, 2], [False] * 2, [0.0] * 2, [0, 0], "", [], [0] * 2, "ended")
        with pytest.raises(UserError, match="'self_bleu' compares siblings"):
            ir.replay([SelfBleu()], alone)
