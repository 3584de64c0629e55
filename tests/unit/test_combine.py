"""Several rewards as one, and one final score in shares."""

from __future__ import annotations

import statistics
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import instant_reward as ir
from instant_reward.assemble import build_rewards
from instant_reward.config import RewardConfig
from instant_reward.rewards.combine import Ensemble
from instant_reward.rewards.redistribute import AttentionShares, LearnedShares, UniformShares
from tiny import tiny_folder, tiny_llama, tiny_policy

TEXTS = ["the movie was", "it was", "a film of"]
# A line, and the end token behind it.
LINE = ir.Rollout("x/0", 0, ir.Prompt("x", "x", [1]), [1, 2, 3], [False, True, True], [0.0] * 3, [0, 3, 3], "ab\n", [],
                  [-1, 0, 0], "ended")  # fmt: skip


def size(text: str) -> float:
    return float(len(text))


def vowels(text: str) -> float:
    return float(sum(letter in "aeiou" for letter in text))


def words(text: str) -> float:
    return float(len(text.split()))


class Ending:
    """Wants to know of every text's end."""

    name, sees_end = "ending", True

    def __init__(self, every: str = "end") -> None:
        self.every = every

    def __call__(self, view: ir.View) -> float:
        return float(view.done)


def rollouts(rewards: list[Any], tokens: int = 10) -> list[ir.Rollout]:
    return tiny_policy().sample(TEXTS, per_prompt=3, max_new_tokens=tokens, rewards=rewards, seed=4)


@pytest.mark.parametrize(
    ("how", "together"),
    [
        ("sum", lambda a, b, c: a + b + c),
        ("mean", lambda a, b, c: (a + b + c) / 3),
        ("minimum", min),
        ("pessimistic", lambda *three: statistics.fmean(three) - 0.5 * statistics.pstdev(three)),
    ],
    ids=["sum", "mean", "minimum", "pessimistic"],
)  # fmt: skip
def test_members_are_put_together(how: Any, together: Any) -> None:
    for one in rollouts([Ensemble([size, vowels, words], how, k=0.5)]):
        (mark,) = one.marks
        assert mark.value == pytest.approx(together(size(one.text), vowels(one.text), words(one.text)))


def test_members_that_keep_a_state_keep_it() -> None:
    changed = [ir.change(size, every="word"), ir.change(vowels, every="word")]
    for one in rollouts([Ensemble(changed, "sum")]):
        assert one.total("ensemble") == pytest.approx(size(one.text) + vowels(one.text))
        assert ir.replay([Ensemble(changed, "sum")], one) == one.marks


def test_members_that_want_to_know_of_the_end_are_told() -> None:
    ends = [Ending("line"), Ending("line")]
    together, alone = (ir.replay([reward], LINE) for reward in (Ensemble(ends), Ending("line")))
    assert [mark.value for mark in together] == [mark.value for mark in alone] == [0.0, 1.0]


@pytest.mark.parametrize("how", ["sum", "mean", "minimum", "pessimistic"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_no_bad_number_of_a_member_is_hidden(how: Any, value: float) -> None:
    """The least of 1.0 and NaN is 1.0 in Python."""
    for members in ([size, lambda text: value], [lambda text: value, size]):
        with pytest.raises(ir.UserError, match=r"member '<lambda>' gave (nan|inf); members must give finite numbers"):
            rollouts([Ensemble(members, how)])


def test_members_may_give_numbers_of_other_libraries() -> None:
    text = rollouts([])[0]
    (mark,) = ir.replay([Ensemble([lambda text: np.float32(0.5), lambda text: torch.tensor(2.0)], "sum")], text)
    assert mark.value == 2.5


def test_members_come_from_a_config_by_name() -> None:
    members = ["vader", {"use": "review_sentiment", "args": {"min_count": 0}}]
    with pytest.raises(ir.UserError, match="ReviewSentiment: give"):
        Ensemble(members)
    config = RewardConfig(use="ensemble", args={"members": ["vader", "vader"], "how": "minimum"})
    (made,) = build_rewards([config])
    (mark,) = ir.replay([made], rollouts([])[0])
    assert (mark.source, mark.value) == ("ensemble", 0.0)


@pytest.mark.parametrize(
    ("members", "options", "sentence"),
    [
        ([size], {}, "at least two members"),
        ([size, ir.change(vowels, every="word")], {}, "must have the same every .*'size' 'end'.*'vowels' 'word'"),
        ([size, vowels], {"how": "median"}, "how='median' is unknown; use sum, mean"),
        (["vadr", "vader"], {}, "did you mean vader"),
        ([{"path": "x"}, size], {}, "a mapping with use and args"),
        ([size, ir.reward(scope="group")(lambda views: [0.0])], {}, "look beyond their own text"),
        ([size, ir.weighted(vowels, 0.5)], {}, "the weight of the member 'vowels' would be lost"),
        ([size, ir.weighted(vowels, {"rule": "linear", "steps": 2})], {}, "the weight of the member 'vowels' would be"),
        ([ir.potential(size, 0.9), ir.potential(vowels, 0.9)], {}, "the discount of the member 'size' would be lost"),
        ([size, Ending()], {}, "must have the same sees_end .*'size' False.*'ending' True"),
    ],
)  # fmt: skip
def test_what_cannot_be_put_together_is_refused(members: list[Any], options: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ir.UserError, match=sentence):
        Ensemble(members, **options)


def test_even_shares_sum_to_the_score_and_are_paid_where_it_was_known() -> None:
    for one in rollouts([UniformShares(vowels)]):
        assert one.total() == pytest.approx(vowels(one.text))
        assert len({mark.value for mark in one.marks}) == 1
        assert {mark.seen for mark in one.marks} == {len(one.token_ids)}


def test_shares_by_attention_are_spans_that_sum_to_the_score(tmp_path: Path) -> None:
    model = tiny_folder(tmp_path, tiny_llama(dtype=torch.float32))
    reward = AttentionShares(vowels, str(model))
    several = 0
    for one in rollouts([reward], tokens=16):
        assert one.total() == pytest.approx(vowels(one.text), abs=1e-5)
        assert {mark.seen for mark in one.marks} == {len(one.token_ids)}
        several += len({round(mark.value, 6) for mark in one.marks}) > 1
        assert ir.replay([reward], one) == one.marks
    assert several > 5, "they differ by token"


@pytest.mark.parametrize("text", ["", "x", "\ud83d", "🎬🎬", "电影很好看。", "a" * 10_000])
def test_shares_of_odd_texts(text: str, tmp_path: Path) -> None:
    model = tiny_folder(tmp_path, tiny_llama(dtype=torch.float32))
    view = ir.View(text, text, rollouts([])[0].prompt, {}, True, tokens=max(1, len(text)))
    found: Any = AttentionShares(size, str(model))(view)
    total = found if isinstance(found, float) else sum(span.value for span in found)
    assert total == pytest.approx(size(text), rel=1e-4)
    assert sum(UniformShares(size)(view)) == pytest.approx(size(text))


def test_a_learned_predictor_moves_the_score_to_where_it_was_decided() -> None:
    """Before it has learned, all is paid at the end; after, at the words that bring the score. Both sum to it."""
    reward = LearnedShares(vowels)
    before = rollouts([reward])
    for one in before:
        assert one.total() == pytest.approx(vowels(one.text))
        assert all(mark.value == 0.0 for mark in one.marks[:-1])
    for _ in range(3):
        reward.observe(before)
    after = rollouts([reward])
    assert [one.text for one in after] == [one.text for one in before]
    for one in after:
        assert one.total() == pytest.approx(vowels(one.text))
    early = sum(abs(mark.value) for one in after for mark in one.marks[:-1])
    assert early > 1.0
    assert [ir.replay([reward], one) for one in after] == [one.marks for one in after]
    again = LearnedShares(vowels)
    again.load_state_dict(reward.state_dict())
    assert [ir.replay([again], one) for one in after] == [one.marks for one in after]


def test_a_score_that_takes_no_text_is_refused() -> None:
    with pytest.raises(ir.UserError, match="'graded' takes no text"):
        UniformShares(ir.reward(every="end", name="graded")(lambda view: 0.0))
    with pytest.raises(ir.UserError, match="ridge=0 and keep=512 must be above 0"):
        LearnedShares(size, ridge=0)


def test_a_score_that_takes_many_texts_at_once_is_asked_so() -> None:
    """Also where only the object itself says that it is batched, as from a config."""

    class Many:
        name, batched = "many", True

        def __init__(self) -> None:
            self.asked: list[int] = []

        def __call__(self, texts: list[str]) -> list[float]:
            self.asked.append(len(texts))
            return [float(len(text)) for text in texts]

    for make in (lambda one: ir.change(one, every="token"), lambda one: ir.potential(one, 1.0, every="token")):
        many = Many()
        texts = rollouts([make(many)])
        assert max(many.asked) > 1
        assert all(text.marks for text in texts)
    assert all(one.total() == pytest.approx(size(one.text)) for one in rollouts([UniformShares(Many())]))


def test_a_score_with_settings_that_would_be_lost_is_refused() -> None:
    class Remembers:
        name, scope = "remembers", "run"

        def observe(self, rollouts: Any) -> None: ...

        def __call__(self, text: str) -> float:
            return 0.0

    for make in (ir.change, lambda one: ir.potential(one, 1.0), UniformShares):
        with pytest.raises(ir.UserError, match=r"and the weight of 'size' would be lost; set it on what is made of it"):
            make(ir.weighted(size, 0.5))
        with pytest.raises(ir.UserError, match=r"'remembers' looks beyond its text \(scope='run'\)"):
            make(Remembers())


def test_a_scores_own_segmenter_cuts_what_is_made_of_it() -> None:
    def halves(run: str) -> list[str]:
        return [run[:2], run[2:]]

    class Cut:
        name, segmenter = "cut", staticmethod(halves)

        def __call__(self, text: str) -> float:
            return float(len(text))

    assert ir.change(Cut()).segmenter is halves
    assert ir.potential(Cut(), 1.0).segmenter is halves


def test_what_a_share_or_a_member_cannot_be_made_of_is_said_in_words(tmp_path: Path) -> None:
    with pytest.raises(ir.UserError, match="shares: vader does not take these args"):
        UniformShares("vader", {"shade": 1})
    with pytest.raises(ir.UserError, match="shares: the reward must be a short name"):
        UniformShares("vadr")
    with pytest.raises(ir.UserError, match="Ensemble: vader does not take these args"):
        Ensemble([{"use": "vader", "args": {"shade": 1}}, "vader"])
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ir.UserError, match="cannot be loaded"):
        AttentionShares(vowels, str(tmp_path))
