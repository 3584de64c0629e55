"""The rules at every prefix of any text: live equals replay, increments equal counting anew, and nothing breaks."""

from __future__ import annotations

import math
import re
import unicodedata
from collections.abc import Callable
from functools import cache
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import instant_reward as ir
from instant_reward.rewards.base import Reward, as_reward
from instant_reward.rewards.compose import change
from instant_reward.rewards.diversity import Distinct, Mtld, TypeTokenRatio
from instant_reward.rewards.grammar import Grammar
from instant_reward.rewards.keywords import AvoidKeywords, Keywords
from instant_reward.rewards.language import FullSentence, Language, Readability
from instant_reward.rewards.length import Length
from instant_reward.rewards.repetition import Repetition, SelfBleu
from instant_reward.rewards.spelling import Spelling
from instant_reward.rewards.watch import Watch
from instant_reward.text import Pieces, TextDecoder
from instant_reward.types import Prompt, Rollout, View
from tiny import END, shared_tokenizer

PROMPT = Prompt("p", "So: the movie", [1, 2], info={"topic": ["movie", "好"]})
FIRST = len(PROMPT.token_ids)
WORDS = ["movie", "so good", "电影", "a", "好好", "👍", "e\u0301"]

# Each reward, and the lowest and the highest number that it may give for one mark.
ALL: dict[str, tuple[Callable[[], Any], float, float]] = {
    "grammar": (Grammar, -1, -1),
    "grammar of all kinds": (lambda: Grammar(ignore=[]), -1, -1),
    "spelling": (lambda: Spelling(penalty=2), -2, -2),
    "spelling of names": (lambda: Spelling(capitalised=True), -1, -1),
    "distinct 1": (lambda: Distinct(1), 0, 1),
    "distinct 3 of characters": (lambda: Distinct(3, tokens="characters"), 0, 1),
    "distinct as a change": (lambda: Distinct(change=True), -1, 1),
    "type_token": (lambda: TypeTokenRatio(4), 0, 1),
    "type token without a window": (lambda: TypeTokenRatio(None), 0, 1),
    "mtld": (Mtld, 0, 1),
    "repetition": (lambda: Repetition(2), -1, -1),
    "repetition of characters and the prompt": (lambda: Repetition(3, tokens="characters", prompt=True), -1, -1),
    "length": (lambda: Length(20), 0, 1),
    "length in characters": (lambda: Length([5, None], "characters"), 0, 1),
    "length in tokens": (lambda: Length([None, 9], "tokens", change=True), -1, 1),
    "keywords": (lambda: Keywords(WORDS), 1 / len(WORDS), 1 / len(WORDS)),
    "keywords of the prompt": (lambda: Keywords(column="topic"), 0.5, 0.5),
    "avoid": (lambda: AvoidKeywords(WORDS), -1, -1),
    "language": (Language, 0, 1),
    "language as a change": (lambda: change(Language("zh")), -1, 1),
    "readability": (Readability, 0, 1),
    "readability near a target": (lambda: Readability(target=[60, 80], change=True), -1, 1),
    "full_sentence": (FullSentence, 0, 1),
    "full sentence as a change": (lambda: change(FullSentence()), -1, 1),
}
LONG = "The movie was so good that I saw it again, and a movie like that is rare. "
WEIRD = {
    "empty": "",
    "one token": "movie",
    "spaces": " \n\t\u3000 ",
    "10,000 characters": (LONG * 135)[:10_000],
    "10,000 characters without a space": "一部好电影，" * 1667,
    "one word of 1,000": "movie" * 200,
    "only emoji": "👍🏽👨‍👩‍👧🇫🇷❤️" * 20,
    "right to left": "مرحبا، كيف الحال؟ ٤٢ שלום " * 10,
    "control characters": "\x00\x07\x1b[31m\x7f\x85\u200e\u202e\ufeff42 an test" * 10,
    "a lone surrogate": "\ud83d",
    "lone surrogates in a text": "an test \ud800 42 \udfff\ud800movie\ud83d moive.",
    "Chinese": "今天天气很好。一共42个。这部电影真好！" * 20,
    "combining marks": "a\u0301\u0301\u0301 e\u0301\u0327 \u0301 कमी का",
    "marks alone": "((( ''' ... !!! -- __ ”“ 。。" * 20,
}


@cache
def made(name: str) -> Reward:
    return as_reward(ALL[name][0]()).but(name=name)


def by_characters(text: str, step: int = 1) -> Rollout:
    """A text whose tokens are ``step`` characters each, and an end token: no tokenizer has a lone surrogate."""
    ends = [*range(step, len(text), step), len(text), len(text)] if text else [0]
    count, tokens = FIRST + len(ends), len(ends)
    mask = [False] * FIRST + [True] * tokens
    ids, char_ends = [*PROMPT.token_ids, *range(tokens)], [0] * FIRST + ends
    return Rollout("r", 0, PROMPT, ids, mask, [0.0] * count, char_ends, text, [], [0] * count, "ended")


# With the arguments that most take, test_every_reward.py has them.
@pytest.mark.parametrize("name", [name for name in ALL if " " in name])
@pytest.mark.parametrize("text", WEIRD.values(), ids=WEIRD)
def test_weird_texts_get_finite_values_in_range(name: str, text: str) -> None:
    rollout = by_characters(text, step=max(1, len(text) // 500))
    low, high = ALL[name][1:]
    own = made(name).every if " " in text else 50  # a piece for each of 10,000 characters would only take long
    for every in [own] if len(text) > 1000 else ["word", "line", 3]:
        marks = ir.replay([made(name).but(every=every)], rollout)
        assert all(math.isfinite(mark.value) and low - 1e-9 <= mark.value <= high + 1e-9 for mark in marks)


@pytest.mark.parametrize("text", WEIRD.values(), ids=WEIRD)
def test_weird_siblings_are_compared(text: str) -> None:
    texts = [text[:2000], text[:1000], LONG, ""]
    rollouts = [by_characters(one, step=max(1, len(one))) for one in texts]
    for tokens in ("auto", "13a", "char"):
        ir.replay_groups([SelfBleu(tokens=tokens)], rollouts)
        values = [rollout.total("self_bleu") for rollout in rollouts]
        assert all(-1.0 <= value <= 0.0 for value in values)
        assert values[-1] == 0.0


PIECES = [
    " good",
    " movie",
    ". ",
    "\n\n",
    " ",
    "o",
    "a",
    "你",
    "。",
    "é",
    "👍🏽",
    " 4",
    "2",
    "e\u0301",
    "\n",
    " the",
    " was",
]
PIECES += [" moive", " an test", "好", "电影", "'s", "-", "So", " so", "_", "! "]
TEXTS = st.lists(st.sampled_from(PIECES), max_size=15).map("".join)


def live(rewards: list[Any], ids: list[int], chunk: int, reason: Any) -> Rollout:
    watch = Watch(rewards, TextDecoder(shared_tokenizer()))
    watch.open(0, PROMPT)
    for start in range(0, len(ids), chunk):
        watch.feed(0, ids[start : start + chunk], done=start + chunk >= len(ids))
    text, char_ends, marks = watch.close(0)
    length = len(char_ends)
    mask = [False] * FIRST + [True] * (length - FIRST)
    flat = [*PROMPT.token_ids, *ids]
    return Rollout("r", 0, PROMPT, flat, mask, [0.0] * length, char_ends, text, marks, [0] * length, reason)


@given(
    st.one_of(
        TEXTS.map(lambda text: list(shared_tokenizer()(text)["input_ids"])),
        st.lists(st.integers(0, len(shared_tokenizer()) - 1), max_size=15),  # they split characters
    ),
    st.integers(1, 4),
    st.sampled_from(["ended", "length"]),
)
@settings(max_examples=60, deadline=None)
def test_live_equals_replay_and_no_mark_knows_the_future(ids: list[int], chunk: int, reason: Any) -> None:
    end = shared_tokenizer().convert_tokens_to_ids(END)
    ids = [*ids, end] if reason == "ended" or not ids else ids
    rewards = [made(name) for name in ALL]
    rollout = live(rewards, ids, chunk, reason)
    assert ir.replay(rewards, rollout) == rollout.marks
    half = len(ids) // 2
    if half:
        known = [mark for mark in rollout.marks if mark.seen <= FIRST + half]
        other = live(rewards, [*ids[:half], *ids[:half], end], chunk, "ended")
        assert [mark for mark in other.marks if mark.seen <= FIRST + half] == known


def grown(reward: Any, text: str, every: str = "word") -> list[tuple[str, Any]]:
    """The prefixes at which pieces end, and what the reward says at each."""
    one, start, found = as_reward(reward), 0, []
    state = one.start(PROMPT)
    for end in Pieces(every).ends(text, 0, True):
        view = View(text[:end], text[start:end], PROMPT, PROMPT.info, done=end == len(text))
        found.append((view.text, one.rate([view], [state])[0]))
        start = end
    return found


def plain_words(text: str) -> list[str]:
    """Words without case, characters of scripts without spaces alone: written anew, one character after the other."""
    words: list[str] = []
    grows = False
    for character in text:
        alone = unicodedata.name(character, "").startswith("CJK UNIFIED")
        if unicodedata.category(character)[0] == "M":
            words[-1:] = [words[-1] + character] if grows else words[-1:]
        elif not character.isalnum():
            grows = False
        else:
            joins = grows and not alone and not unicodedata.name(words[-1][0], "").startswith("CJK UNIFIED")
            words[-1:] = [words[-1] + character] if joins else [*words[-1:], character]
            grows = True
    return [word.casefold() for word in words]


def grams(words: list[str], n: int) -> list[tuple[str, ...]]:
    return [tuple(words[start : start + n]) for start in range(len(words) - n + 1)]


@given(TEXTS, st.sampled_from(["word", "sentence", "end"]))
@settings(max_examples=80, deadline=None)
def test_scores_of_prefixes_equal_counting_anew(text: str, every: str) -> None:
    for prefix, score in grown(Distinct(2), text, every):
        pairs = grams(plain_words(prefix), 2)
        assert score == (len(set(pairs)) / len(pairs) if pairs else 0.0)
    for prefix, score in grown(TypeTokenRatio(4), text, every):
        words = plain_words(prefix)
        windows = grams(words, min(4, len(words))) if words else []
        assert score == pytest.approx(sum(len(set(one)) / len(one) for one in windows) / max(1, len(windows)))
    for prefix, score in grown(Length(5, edge=2), text, every):
        assert score == pytest.approx(math.exp(-(((len(plain_words(prefix)) - 5) / 2) ** 2)))
    for prefix, score in grown(Length(9, "characters", edge=2), text, every):
        assert score == pytest.approx(math.exp(-(((len("".join(prefix.split())) - 9) / 2) ** 2)))
    for kind in (Mtld(), Readability(), Readability(target=70)):
        for prefix, score in grown(kind, text, every):
            assert score == kind.score(prefix)


@given(TEXTS, st.integers(1, 3), st.sampled_from(["word", "sentence", "end"]))
@settings(max_examples=80, deadline=None)
def test_every_n_gram_that_comes_again_is_marked_once(text: str, n: int, every: str) -> None:
    spans = [span for _, found in grown(Repetition(n), text, every) for span in found]
    all_grams = grams(plain_words(text), n)
    assert len(spans) == len(all_grams) - len(set(all_grams))
    assert all(one.end <= other.start for one, other in pairwise(spans))


@given(TEXTS, st.sampled_from(WORDS), st.sampled_from(["word", "sentence", "end"]))
@settings(max_examples=80, deadline=None)
def test_hits_of_a_keyword_are_those_in_the_whole_text(text: str, word: str, every: str) -> None:
    letter = "[^\\W\u4e00-\u9fff]|\u0301"
    edge = "" if word in ("电影", "好好", "👍") else f"(?<!{letter})"
    pattern = edge + r"\s+".join(map(re.escape, word.split())) + (edge and f"(?!{letter})")
    whole = [match.span() for match in re.finditer(pattern, text, re.IGNORECASE)]
    hits = [(span.start, span.end) for _, found in grown(AvoidKeywords([word]), text, every) for span in found]
    assert hits == whole
    first = [(span.start, span.end) for _, found in grown(Keywords([word]), text, every) for span in found]
    assert first == whole[:1]


@given(TEXTS)
@settings(max_examples=40, deadline=None)
def test_misspelt_words_do_not_depend_on_the_pieces(text: str) -> None:
    spelling = Spelling(capitalised=True)
    found = [
        [span for _, spans in grown(spelling, text, every) for span in spans or []]
        for every in ("word", "sentence", "end")
    ]
    assert found[0] == found[1] == found[2]
