"""At every prefix of any text, the incremental metrics say what the libraries say of that prefix."""

from __future__ import annotations

import string
import unicodedata
from collections import Counter
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rouge_score.rouge_scorer import RougeScorer
from sacrebleu.metrics.bleu import BLEU
from sacrebleu.metrics.chrf import CHRF

import instant_reward as ir
from instant_reward.rewards.base import as_reward
from instant_reward.rewards.growing import SACREBLEU, SacreBleu
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
from instant_reward.types import Prompt, Rollout, View
from tiny import END, shared_tokenizer

# What tokenizers trip over: joins at line ends, entities, numbers, marks in a row, letters that change length or form
# in lower case, white space that is none in ASCII, scripts without spaces.
PLAIN = [
    "the",
    "The",
    "cat",
    "cats",
    "sat",
    "on",
    "a",
    "A",
    "mat",
    "don't",
    "U.S.",
    "3.14",
    "1,000",
    "42",
    "9",
    "-",
    "_",
]
PLAIN += [
    ".",
    ",",
    "...",
    "!?",
    "(a)",
    '"',
    "'",
    "/",
    "&",
    "$5",
    "5%",
    "x-",
    "e.g.",
    " ",
    " ",
    " ",
    " ",
    "  ",
    "\n",
    "\t",
]
HARD = [
    "-\n",
    "&quot;",
    "&amp;lt;",
    "<skipped>",
    "skipped>",
    "\x1c",
    "\x00",
    "\xa0",
    "\u2028",
    "\u3000",
    "\u200b",
    "9.",
]
SCRIPTS = [
    "你",
    "好",
    "世界",
    "，",
    "。",
    "é",
    "naïve",
    "İ",
    "ΟΔΟΣ",
    "\u212a",
    "к",
    "e\u0301",
    "\u0301",
    "👍🏽",
    "½",
    "–",
    "…",
]
SCRIPTS += ["ภาษา", "カナ", "مرحبا", "ß", "٣", "「", "₿"]
TEXTS = st.lists(st.sampled_from(PLAIN + HARD + SCRIPTS), max_size=12).map("".join)
ENGLISH = st.lists(st.sampled_from(PLAIN), max_size=12).map("".join)
ROUGES = [(kind, measure) for kind in ("1", "2", "L") for measure in ("f", "precision", "recall")]


def visible(texts: st.SearchStrategy[str]) -> st.SearchStrategy[list[str]]:
    return st.lists(texts.map(lambda text: text if text.strip() else "cat"), min_size=1, max_size=3)


@st.composite
def growing(draw: st.DrawFn, texts: st.SearchStrategy[str] = TEXTS) -> tuple[list[str], list[str]]:
    """References, and the prefixes of a text that has much of one of them."""
    references = draw(visible(texts))
    model = draw(st.sampled_from(references))
    part = slice(draw(st.integers(0, 3)), draw(st.integers(0, len(model))))
    text = draw(texts) + draw(st.sampled_from(["", " "])) + model[part] + draw(texts)
    ends = draw(st.lists(st.integers(0, len(text)), max_size=12))
    return references, [text[:end] for end in sorted({*ends, len(text)})]


def scores(metric: Metric, references: Any, prefixes: Sequence[str]) -> list[float]:
    about = Prompt("p", "", [], info={"reference": references})
    state = metric.start(about)
    return [metric.extend(state, View(text, "", about, about.info, done=False)) for text in prefixes]


def near(expected: float | list[float]) -> Any:
    return pytest.approx(expected, abs=1e-12, rel=1e-12)


class Plain:
    """A tokenizer for rouge-score, written anew: one character after the other, of the whole text."""

    single = ("CJK UNIFIED", "HIRAGANA", "KATAKANA", "THAI")

    def tokenize(self, text: str) -> list[str]:
        tokens: list[str] = []
        grows = False
        for character in text:
            if unicodedata.category(character)[0] == "M":
                tokens[-1:] = [tokens[-1] + character] if grows else tokens[-1:]
            elif not character.isalnum():
                grows = False
            elif unicodedata.name(character, "").startswith(self.single):
                tokens.append(character)
                grows = True
            else:
                alone = not grows or unicodedata.name(tokens[-1][0], "").startswith(self.single)
                tokens[-1:] = [*tokens[-1:], character] if alone else [tokens[-1] + character]
                grows = True
        return [token.casefold() for token in tokens]


@cache
def rouge_score(plain: bool) -> RougeScorer:
    return RougeScorer(["rouge1", "rouge2", "rougeL"], tokenizer=Plain() if plain else None)


def compare_rouge(tokens: str, plain: bool, references: list[str], prefixes: list[str]) -> None:
    found = [rouge_score(plain).score_multi(references, prefix) for prefix in prefixes]
    for kind, measure in ROUGES:
        name = "fmeasure" if measure == "f" else measure
        expected = [float(getattr(each[f"rouge{kind}"], name)) for each in found]
        assert scores(Rouge(kind, measure=measure, tokens=tokens), references, prefixes) == near(expected)


def has_tokens(tokenizer: Any, references: list[str]) -> bool:
    return all(tokenizer.tokenize(reference) for reference in references)


@given(growing())
@settings(max_examples=60)
def test_rouge_is_that_of_rouge_score_for_any_text(case: tuple[list[str], list[str]]) -> None:
    if has_tokens(rouge_score(False)._tokenizer, case[0]):
        compare_rouge("rouge", False, *case)


@given(growing())
@settings(max_examples=60)
def test_rouge_of_any_script_is_that_of_rouge_score_with_such_a_tokenizer(case: tuple[list[str], list[str]]) -> None:
    if has_tokens(Plain(), case[0]):
        compare_rouge("auto", True, *case)


@given(growing(ENGLISH))
@settings(max_examples=30)
def test_in_english_both_are_one(case: tuple[list[str], list[str]]) -> None:
    if has_tokens(rouge_score(False)._tokenizer, case[0]):
        compare_rouge("auto", False, *case)


@pytest.mark.parametrize("tokens", SACREBLEU)
@given(growing(), st.sampled_from(["exp", "floor", "add-k", "none"]), st.sampled_from([4, 4, 1, 2]))
@settings(max_examples=50)
def test_bleu_is_that_of_sacrebleu(tokens: str, case: tuple[list[str], list[str]], smoothing: str, order: int) -> None:
    library = BLEU(tokenize=tokens, smooth_method=smoothing, max_ngram_order=order, effective_order=True)
    references, prefixes = case
    if not all(library.tokenizer(reference) for reference in references):  # nothing but "<skipped>"
        return
    expected = [library.sentence_score(prefix, references).score / 100 for prefix in prefixes]
    metric = Bleu(tokens=tokens, smoothing=smoothing, order=order)
    assert scores(metric, references, prefixes) == near(expected)


TRICKY = [
    "fore-\ncast on a mat",
    "a cat-\n\nsat <skip\nped> on<skipped>\na mat-<skipped>\nand x-\n y",
    "say &quot;hi&quot; &amp;lt; at 3.14, 1,000. 5. .5 -7 9-9 10%",
    ".5 9. and (it's) so... !? ...",
    "中国，3.14。5.中 .5 is x-中-\n国\t中",
    "\u3000。\x1c.5\x85-\n9\u2028“a” ₿5",
]


@pytest.mark.parametrize("tokens", SACREBLEU)
@pytest.mark.parametrize("text", TRICKY)
def test_bleu_of_what_tokenizers_trip_over_is_that_of_sacrebleu_at_every_character(tokens: str, text: str) -> None:
    library = BLEU(tokenize=tokens, smooth_method="floor", max_ngram_order=2, effective_order=True)
    references = [text, text.replace("\n", "")]
    prefixes = [text[:end] for end in range(len(text) + 1)]
    expected = [library.sentence_score(prefix, references).score / 100 for prefix in prefixes]
    assert scores(Bleu(tokens=tokens, order=2, smoothing="floor"), references, prefixes) == near(expected)


@given(growing(), st.sampled_from([6, 2]), st.sampled_from([0, 0, 1, 2]), st.sampled_from([2, 1, 3]))
@settings(max_examples=70)
def test_chrf_is_that_of_sacrebleu(case: tuple[list[str], list[str]], order: int, words: int, beta: int) -> None:
    library = CHRF(char_order=order, word_order=words, beta=beta)
    references, prefixes = case
    expected = [library.sentence_score(prefix, references).score / 100 for prefix in prefixes]
    assert scores(Chrf(order=order, words=words, beta=beta), references, prefixes) == near(expected)


def squad(text: str) -> list[str]:
    """SQuAD's normal form, of the whole text; Chinese and its like by character."""
    kept = ""
    for character in text.casefold():
        alone = unicodedata.name(character, "").startswith(Plain.single)
        dropped = character in string.punctuation or unicodedata.category(character)[0] == "P"
        kept += f" {character} " if alone else "" if dropped else character
    return [word for word in kept.split() if word not in ("a", "an", "the")]


def f1(text: list[str], reference: list[str]) -> float:
    both = sum((Counter(text) & Counter(reference)).values())
    return 2 * both / (len(text) + len(reference))


def levenshtein(text: Sequence[str], reference: Sequence[str]) -> int:
    row = list(range(len(reference) + 1))
    for number, one in enumerate(text, start=1):
        above, row = row, [number]
        for place, other in enumerate(reference):
            row.append(min(above[place] + (one != other), above[place + 1] + 1, row[place] + 1))
    return row[-1]


WORDS = [text for text in PLAIN + HARD + SCRIPTS if text not in ("ภาษา", "「", "e\u0301", "\u0301")]


@given(growing(st.lists(st.sampled_from(WORDS), max_size=12).map("".join)))
@settings(max_examples=70)
def test_answers_are_compared_in_the_form_of_squad(case: tuple[list[str], list[str]]) -> None:
    references, prefixes = case
    forms = [squad(reference) for reference in references]
    if not all(forms):
        return
    found = [squad(prefix) for prefix in prefixes]
    assert scores(TokenF1(), references, prefixes) == near([max(f1(one, form) for form in forms) for one in found])
    assert scores(ExactMatch(), references, prefixes) == [float(one in forms) for one in found]


@given(growing())
@settings(max_examples=40)
def test_edits_are_counted_as_in_the_textbook(case: tuple[list[str], list[str]]) -> None:
    references, prefixes = case

    def similarity(text: Sequence[str], cut: Callable[[str], Sequence[str]]) -> float:
        golden = [cut(reference) for reference in references]
        return max(1 - levenshtein(text, one) / max(len(text), len(one)) for one in golden)

    expected = [similarity(prefix.strip(), str.strip) for prefix in prefixes]
    assert scores(EditSimilarity(), references, prefixes) == near(expected)
    plain = Plain().tokenize
    if all(plain(reference) for reference in references):
        expected = [similarity(plain(prefix), plain) for prefix in prefixes]
        assert scores(EditSimilarity(tokens="auto"), references, prefixes) == near(expected)


ALL: dict[str, Callable[[bool], Metric]] = {
    "rouge 1": lambda change: Rouge(1, change=change),
    "rouge 2 of characters": lambda change: Rouge(2, tokens="characters", change=change),
    "rouge L": lambda change: Rouge(change=change),
    "bleu": lambda change: Bleu(change=change),
    "chrf": lambda change: Chrf(change=change),
    "chrf++": lambda change: Chrf(words=2, change=change),
    "exact match": lambda change: ExactMatch(change=change),
    "token f1": lambda change: TokenF1(change=change),
    "edit similarity": lambda change: EditSimilarity(change=change),
    "numeric answer": lambda change: NumericAnswer("reference", change=change),
}
LONG = "the cat sat on a mat, 42 times. "
WEIRD = {
    "empty": "",
    "one token": "cat",
    "spaces": " \n\t\u3000 ",
    "10,000 characters": LONG * 313,
    "one word of 2,000": "cat" * 667,
    "lines of hyphens": "-\n" * 1000,
    "only emoji": "👍🏽👨‍👩‍👧🇫🇷❤️" * 20,
    "right to left": "مرحبا، كيف الحال؟ ٤٢ שלום " * 10,
    "control characters": "\x00\x07\x1b[31m\x7f\x85\u200e\u202e\ufeff42" * 10,
    "a lone surrogate": "cat \ud800 42 \udfff\ud800",
    "Chinese": "今天天气很好。一共42个。" * 20,
}


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("text", WEIRD.values(), ids=WEIRD)
def test_weird_texts_are_scored_and_the_same_however_they_are_cut(name: str, text: str) -> None:
    references = ["the cat sat on 42 mats 今天。", text + " 42 cat"]
    step = max(1, len(text) // 200)
    prefixes = [text[:end] for end in range(0, len(text) + 1, step)] + [text]
    metric = ALL[name](False)
    found = scores(metric, references, prefixes)
    assert all(0.0 <= score <= 1.0 for score in found)
    for index in {len(found) // 2, len(found) - 1}:
        assert found[index] == metric.score(prefixes[index], references)
    assert sum(scores(ALL[name](True), references, prefixes)) == near(found[-1] - metric.score("", references))


@pytest.mark.parametrize("text", WEIRD.values(), ids=WEIRD)
def test_weird_texts_have_no_mathematical_answer_that_breaks(text: str) -> None:
    assert MathAnswer("reference").score(text, "42 + x") in (0.0, 1.0)


@pytest.mark.parametrize("tokens", SACREBLEU)
def test_what_is_kept_to_be_cut_again_stays_short(tokens: str) -> None:
    shown: list[int] = []

    def tokenizer(text: str) -> str:
        shown.append(len(text))
        return text

    stream = SacreBleu(tokens, tokenizer)
    for character in LONG * 20:
        stream.push(character)
        stream.tail()
    assert max(shown) < 12  # the longest word, and the words beside it


PIECES = [
    " good",
    " movie",
    ". ",
    "\n\n",
    " ",
    "o",
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
    "-\n",
]


def live(rewards: Sequence[Any], ids: list[int], about: Prompt, chunk: int) -> Rollout:
    watch = Watch(rewards, TextDecoder(shared_tokenizer()))
    watch.open(0, about)
    for start in range(0, len(ids), chunk):
        watch.feed(0, ids[start : start + chunk], done=start + chunk >= len(ids))
    text, char_ends, marks = watch.close(0)
    first, length = len(about.token_ids), len(char_ends)
    mask = [False] * first + [True] * (length - first)
    flat = [*about.token_ids, *ids]
    return Rollout("r", 0, about, flat, mask, [0.0] * length, char_ends, text, marks, [0] * length, "ended")


@given(
    st.lists(st.sampled_from(PIECES), max_size=15).map("".join),
    st.booleans(),
    st.integers(1, 4),
    st.sampled_from(list(ALL)),
)
@settings(max_examples=60)
def test_live_equals_replay_and_changes_sum_to_the_final_score(text: str, change: bool, chunk: int, name: str) -> None:
    about = Prompt("p", "So:", [1, 2], info={"reference": ["The movie was good. 42", "你。 a good movie 42"]})
    cuts: list[Any] = ["token", "word", "sentence", "end", 3]
    ids = list(shared_tokenizer()(text + END)["input_ids"])
    metric = ALL[name](change)
    rewards = [as_reward(metric).but(every=every, name=str(every)) for every in cuts]
    rollout = live(rewards, ids, about, chunk)
    assert ir.replay(rewards, rollout) == rollout.marks
    final = ALL[name](False).score(rollout.text, about.info["reference"])
    for every in cuts:
        paid = [mark.value for mark in rollout.marks if mark.source == str(every)]
        if paid:
            assert (sum(paid) if change else paid[-1]) == near(final)
