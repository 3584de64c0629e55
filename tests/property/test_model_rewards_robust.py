"""Rewards by models, on any text: finite, within their range, and live as in replay."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from transformers import BertConfig, BertForSequenceClassification, BertModel

import instant_reward as ir
from instant_reward.imports import resolve
from instant_reward.rewards.base import as_reward
from instant_reward.rewards.compose import change
from instant_reward.rewards.embedding import Similarity
from instant_reward.rewards.entailment import Entailment
from instant_reward.rewards.sentiment_models import Classifier, PieceClassifier, TextBlob
from instant_reward.rewards.topic import Topic
from instant_reward.rewards.watch import Watch
from instant_reward.text import TextDecoder
from instant_reward.types import Prompt, Rollout, View
from tiny import END, shared_tokenizer, tiny_folder

torch.set_num_threads(1)

RECIPE = Path(__file__).parents[2] / "recipes" / "image_words.py"
FOLDERS = TemporaryDirectory()  # of models, until the tests are over
IMAGE = Image.new("RGB", (32, 32), (200, 30, 30))
SOURCE = ["The movie was good. 今天天气很好。", "a slow film"]
ABOUT = Prompt("p", "So:", [1, 2], info={"source": SOURCE, "image": IMAGE})

WEIRD = {
    "empty": "",
    "one token": "cat",
    "spaces": " \n\t\u3000 ",
    "10,000 characters": "the movie was good, 42 times. " * 334,
    "one word of 10,000": "good" * 2500,
    "10,000 marks": "!" * 10_000,
    "only emoji": "👍🏽👨‍👩‍👧🇫🇷❤️" * 20,
    "right to left": "مرحبا، كيف الحال؟ ٤٢ שלום " * 10,
    "control characters": "\x00\x07\x1b[31m\x7f\x85\u200e\u202e\ufeff42" * 10,
    "lone surrogates": "cat \ud83d 42 \udfff\ud83d",
    "a lone surrogate": "\ud83d",
    "Chinese": "今天天气很好。一共42个。" * 20,
    "special tokens": "<end><pad> <step> [CLS][SEP]",
}


def small(kind: Any, **changes: Any) -> str:
    """The folder of a random encoder that reads 48 tokens."""
    torch.manual_seed(0)
    size = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
    size |= {"vocab_size": len(shared_tokenizer()), "max_position_embeddings": 48}
    return str(
        tiny_folder(Path(FOLDERS.name) / kind.__name__, kind(BertConfig(**size, initializer_range=0.4, **changes)))
    )


@cache
def folder(kind: str) -> str:
    if kind == "encoder":
        return small(BertModel)
    return small(BertForSequenceClassification, id2label={0: "entailment", 1: "neutral", 2: "contradiction"})


@cache
def documents() -> Sequence[str]:
    words = ["good movie", "slow film", "今天 天气", "cat dog", "long it"]
    return [f"{words[n % 5]} {words[n // 5 % 5]} {words[n // 25 % 5]} {n}" for n in range(125)]


MAKE: dict[str, Callable[[int], Any]] = {
    "polarity": lambda batch: TextBlob(),
    "subjectivity": lambda batch: TextBlob("subjectivity"),
    "classifier": lambda batch: Classifier(folder("labels"), 1, batch=batch),
    "logit": lambda batch: Classifier(folder("labels"), {0: 1, 2: -1}, output="logit", batch=batch),
    "piece classifier": lambda batch: PieceClassifier(folder("labels"), 1, batch=batch),
    "similarity": lambda batch: Similarity(model=folder("encoder"), batch=batch),
    "similarity change": lambda batch: Similarity("source", model=folder("encoder"), change=True, batch=batch),
    "similarity piece": lambda batch: Similarity("source", "piece", folder("encoder"), batch=batch),
    "similarity before": lambda batch: Similarity("before", "piece", folder("encoder"), batch=batch),
    "entailment": lambda batch: Entailment(folder("labels"), "source", batch=batch),
    "entailment before": lambda batch: Entailment(folder("labels"), "before", batch=batch),
    "entailment text": lambda batch: Entailment(folder("labels"), of="text", batch=batch),
    "topic": lambda batch: Topic(documents(), ["good", "movie"], topics=3, min_count=2, max_share=0.9),
    "image words": lambda batch: resolve(f"{RECIPE}:ImageWords")(resolve(f"{RECIPE}:Scorer")().eval()),
}
PLAIN = ("polarity", "classifier", "piece classifier", "similarity", "topic")  # test_every_reward.py has them


@pytest.fixture(autouse=True, scope="module")
def own_cache(tmp_path_factory: pytest.TempPathFactory) -> Any:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("INSTANT_REWARD_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@cache
def made(name: str, batch: int = 4) -> Any:
    return MAKE[name](batch)


def rated(reward: Any, view: View) -> Any:
    one = as_reward(reward)
    return one.rate([view], [one.start(view.prompt)])[0]


@pytest.mark.parametrize("name", [name for name in MAKE if name not in PLAIN])
@pytest.mark.parametrize("text", WEIRD.values(), ids=WEIRD)
def test_weird_texts_are_finite_and_within_the_range(name: str, text: str) -> None:
    low, high = {"logit": (-99, 99), "image words": (-7, 7)}.get(name, (0 if name == "subjectivity" else -1, 1))
    for whole in (text, f"It was good. {text}"):
        value = rated(made(name), View(whole, text, ABOUT, ABOUT.info, done=True))
        assert value == rated(made(name), View(whole, text, ABOUT, ABOUT.info, done=True))
        if value is not None:
            assert math.isfinite(value)
            assert low <= value <= high


@pytest.mark.parametrize("name", ["similarity piece", "entailment"])
@pytest.mark.parametrize("text", [text for text in WEIRD.values() if text.strip()])
def test_weird_sources_are_read_too(name: str, text: str) -> None:
    about = Prompt("p", "So:", [1, 2], info={"source": text})
    assert math.isfinite(rated(made(name), View("a cat", "a cat", about, about.info, done=True)))


PIECES = [" good", " movie", ". ", "\n\n", " ", "o", "你", "。", "é", "👍🏽", " 4", "red", " the", " was", "! ", " a"]
CUTS: list[Any] = ["word", "sentence", "end", 3]


def live(rewards: Sequence[Any], ids: Sequence[list[int]], about: Prompt) -> list[Rollout]:
    """Several texts, written side by side, one token after the other."""
    watch = Watch(rewards, TextDecoder(shared_tokenizer()))
    for row in range(len(ids)):
        watch.open(row, about)
    for position in range(max(map(len, ids))):
        going = [(row, one) for row, one in enumerate(ids) if position < len(one)]
        watch.feed_many([(row, [one[position]], position == len(one) - 1) for row, one in going])
    first, rollouts = len(about.token_ids), []
    for row, own in enumerate(ids):
        text, char_ends, marks = watch.close(row)
        length = len(char_ends)
        mask, flat = [False] * first + [True] * (length - first), [*about.token_ids, *own]
        rollouts.append(
            Rollout("r", 0, about, flat, mask, [0.0] * length, char_ends, text, marks, [0] * length, "ended")
        )
    return rollouts


@given(
    st.lists(st.lists(st.sampled_from(PIECES), max_size=10).map("".join), min_size=1, max_size=3),
    st.sampled_from(list(MAKE)),
    st.booleans(),
)
@settings(max_examples=30)
def test_live_equals_replay(texts: list[str], name: str, changing: bool) -> None:
    reward = made(name, batch=1)
    one = as_reward(reward)
    rewards: list[Any] = [one.but(every=every, name=str(every)) for every in CUTS]
    if changing and one.takes == "text":
        rewards = [change(reward, every=every, batched=one.batched, name=str(every)) for every in CUTS]
    ids = [list(shared_tokenizer()(text + END)["input_ids"]) for text in texts]
    for rollout in live(rewards, ids, ABOUT):
        assert ir.replay(rewards, rollout) == rollout.marks


@given(
    st.lists(st.sampled_from(PIECES), max_size=12).map("".join), st.sampled_from(["similarity change", "image words"])
)
@settings(max_examples=25)
def test_changes_sum_to_the_final_score(text: str, name: str) -> None:
    one = as_reward(made(name, batch=1))
    rewards = [one.but(every=every, name=str(every)) for every in CUTS]
    (rollout,) = live(rewards, [list(shared_tokenizer()(text + END)["input_ids"])], ABOUT)
    for every in CUTS:
        paid = [mark.value for mark in rollout.marks if mark.source == str(every)]
        if paid:
            final = rated(made(name, batch=1), View(rollout.text, rollout.text, ABOUT, ABOUT.info, done=True))
            assert sum(paid) == pytest.approx(final, abs=1e-6)
