"""Every reward with a short name, on any text: finite, in its range, on the text's tokens, and live as in replay."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace
from functools import cache
from itertools import accumulate
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st

import instant_reward as ir
from instant_reward.rewards.base import Reward, as_reward
from instant_reward.rewards.names import NAMES, make
from instant_reward.rewards.sandbox import why_not
from instant_reward.rewards.scope import rate_groups
from instant_reward.rewards.watch import Watch
from instant_reward.types import Prompt, Rollout, StopReason
from local_judge import LocalJudge
from tiny import shared_tokenizer, tiny_config, tiny_folder, tiny_llama

INFO = {"reference": ["the movie was good. 42", "今天天气很好"], "answer": 42, "tests": ["assert f(1) == 1"]}
PROMPT = Prompt("p", "So: the movie", [1, 2], info=INFO)
FIRST = len(PROMPT.token_ids)
DOCUMENTS = [f"{('good', 'slow')[n % 2]} {('movie', 'film')[n // 2 % 2]} 今天 {n % 7}" for n in range(60)]
PLAIN = (
    "bleu", "distinct", "edit_similarity", "exact_match", "full_sentence", "language", "math_answer", "mtld",
    "numeric_answer", "readability", "rouge", "token_f1",
)  # fmt: skip
LABELS, PLACES = {0: "entailment", 1: "neutral", 2: "contradiction"}, dict[str, str]()
ANY, UNIT, SIGNED, PENALTY = (-math.inf, math.inf), (0.0, 1.0), (-1.0, 1.0), (-1.0, -1.0)

# Each reward's arguments, and the least and the most that one of its marks may pay. A name in brackets stands for what
# is made on the spot: a model's folder, a file, an address.
CASES: dict[str, tuple[dict[str, Any], tuple[float, float]]] = {
    "attention_shares": ({"score": "vader", "model": "<causal>"}, SIGNED),
    "avoid": ({"words": ["movie", "so good", "电影", "👍"]}, PENALTY),
    "chrf": ({"words": 2}, UNIT),
    "ensemble": ({"members": ["vader", "textblob"], "how": "minimum"}, SIGNED),
    "entailment": ({"model": "<labels>", "batch": 1}, SIGNED),
    "fluency": ({"model": "<causal>"}, ANY),  # a mark may take back what a token was paid that became another
    "grammar": ({"ignore": []}, PENALTY),
    "json": ({"viable": 0.5}, UNIT),
    "json_schema": ({"schema": {"type": "object", "properties": {"a": {"type": "integer"}}}, "viable": 0.5}, UNIT),
    "judge": ({"rubric": "It is warm.", "model": "m", "url": "<judge>", "cache": False}, UNIT),
    "keywords": ({"words": ["movie", "so good", "电影", "👍"]}, (0.25, 0.25)),
    "learned_shares": ({"score": "vader"}, ANY),
    "length": ({"target": 20}, UNIT),
    "log_ratio": ({"model": "<causal>", "reference": "<other>"}, ANY),
    "novelty": ({"n": 2}, ANY),  # as for fluency
    "program_tests": ({"seconds": 0.5, "parallel": 1}, UNIT),  # skipped where the machine has no sandbox
    "python_code": ({"viable": 0.5}, UNIT),
    "random_distillation": ({"model": "<causal>", "width": 8}, ANY),
    "regex": ({"pattern": r"(?s)[\w\s].*\d", "viable": 0.5}, UNIT),
    "repetition": ({"n": 2}, PENALTY),
    "review_sentiment": ({"labelled": "<reviews>", "min_count": 2, "piece": [3, 9]}, UNIT),
    "reward_model": ({"model": "<scores>"}, ANY),
    "self_bleu": ({}, (-1.0, 0.0)),
    "similarity": ({"model": "<encoder>", "batch": 1}, SIGNED),
    "spelling": ({}, PENALTY),
    "step_reward_model": ({"model": "<tokens>", "label": 1}, UNIT),
    "token_reward_model": ({"model": "<tokens>", "label": 1}, ANY),
    "topic": ({"corpus": DOCUMENTS, "topic": 1, "topics": 3, "min_count": 2, "max_share": 0.9}, UNIT),
    "type_token": ({"window": 4}, UNIT),
    "uniform_shares": ({"score": "vader"}, SIGNED),
    **dict.fromkeys(["classifier", "piece_classifier"], ({"model": "<labels>", "label": 1, "batch": 1}, UNIT)),
    **dict.fromkeys(["textblob", "vader"], ({}, SIGNED)),
    **dict.fromkeys(PLAIN, ({}, UNIT)),
}
SLOW = {"ensemble", "grammar", "language", "math_answer", "program_tests", "textblob", "topic", "vader"}

# One text of every kind makes an example; they are written side by side.
WORDS = st.lists(st.sampled_from(["the", "movie", "42", "moive", "an a's so.", '{"a": 1', "}", "def\n"]), max_size=9)
HALVES = st.characters(categories=["Cs"])
KINDS = {
    "plain": WORDS.map(" ".join),
    "empty": st.just(""),
    "one token": st.sampled_from(["movie", "4", "好", "{", " ", "\n"]),
    "10,000 characters": WORDS.map(lambda words: ((" ".join(words) or "x") * 10_000)[:10_000]),
    "emoji": st.text(st.sampled_from("👍🏽👨\u200d👩🇫🇷❤\ufe0f"), min_size=1, max_size=40),
    "a lone surrogate": HALVES,
    "surrogates in a text": st.text(HALVES | st.sampled_from("a b.4"), max_size=20),
    "Chinese": st.text(st.sampled_from("今天天气很好。一共42个，"), min_size=1, max_size=40),
    "right to left": st.text(st.sampled_from("مرحبا، كيف؟ ٤٢ שלום \u202e"), min_size=1, max_size=40),
    "control characters": st.text(st.characters(categories=["Cc", "Cf"]), min_size=1, max_size=20),
}


@pytest.fixture(scope="module", autouse=True)
def places(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """What the names in brackets stand for."""
    root = tmp_path_factory.mktemp("every")
    small = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
    small |= {"vocab_size": len(shared_tokenizer()), "max_position_embeddings": 48}
    torch.manual_seed(0)
    models = {
        "causal": tiny_llama(0, torch.float32, num_hidden_layers=1),
        "other": tiny_llama(1, torch.float32, num_hidden_layers=1),
        "labels": transformers.BertForSequenceClassification(transformers.BertConfig(**small, id2label=LABELS)),
        "encoder": transformers.BertModel(transformers.BertConfig(**small)),
        "scores": transformers.LlamaForSequenceClassification(transformers.LlamaConfig(**tiny_config(), num_labels=1)),
        "tokens": transformers.LlamaForTokenClassification(transformers.LlamaConfig(**tiny_config(), num_labels=2)),
    }
    for name, model in models.items():
        PLACES[f"<{name}>"] = str(tiny_folder(root / name, model))
    PLACES["<reviews>"] = str(root / "reviews.csv")
    reviews = [f"{n % 2},{n} {'a good film' if n % 2 else 'a bad movie'} it was" for n in range(200)]
    (root / "reviews.csv").write_text("\n".join(["label,text", *reviews]), encoding="utf-8")
    with pytest.MonkeyPatch.context() as patch, LocalJudge() as judge:
        patch.setenv("INSTANT_REWARD_CACHE", str(root))
        PLACES["<judge>"] = judge.url
        yield
    made.cache_clear()


@cache
def made(name: str) -> Reward:
    """The reward; one that looks at the run has seen a step of it."""
    arguments = CASES[name][0]
    placed = {key: PLACES.get(value, value) if isinstance(value, str) else value for key, value in arguments.items()}
    one = as_reward(make(name, placed, "the test"))
    if one.scope == "run":
        one.function.observe([rollout([text]) for text in ("the movie was good", "", "\ud83d 好", "a \x00")])
    return one


def cut(text: str, size: int) -> list[str]:
    """Tokens of some characters each, and an end token: no tokenizer has half a surrogate pair."""
    size = max(size, len(text) // 25)
    return [*(text[start : start + size] for start in range(0, len(text), size)), ""]


def rollout(tokens: list[str], stop: StopReason = "ended") -> Rollout:
    """What an engine makes of these tokens."""
    ids, mask = [*PROMPT.token_ids, *range(len(tokens))], [False] * FIRST + [True] * len(tokens)
    ends = [0] * FIRST + list(accumulate(map(len, tokens)))
    return Rollout("r", 0, PROMPT, ids, mask, [0.0] * len(ids), ends, "".join(tokens), [], [0] * len(ids), stop)


def live(one: Reward, texts: list[list[str]]) -> list[Rollout]:
    """Texts that are written side by side, a token of each at a time."""
    if one.scope == "group":
        finished = [rollout(tokens) for tokens in texts]
        rate_groups([one], finished)
        return finished
    flat, first = [token for tokens in texts for token in tokens], list(accumulate([0, *map(len, texts)]))
    decoder: Any = SimpleNamespace(stream=lambda _=None: SimpleNamespace(push=flat.__getitem__, flush=lambda: ""))
    watch, stopped = Watch([one], decoder), dict.fromkeys(range(len(texts)))
    for row in stopped:
        watch.open(row, PROMPT)
    for place in range(max(map(len, texts))):
        fed = [(row, [first[row] + place], place + 1 == len(texts[row])) for row in stopped if place < len(texts[row])]
        for (row, _, _), (_, end) in zip(fed, watch.feed_many(fed), strict=True):
            stopped[row] = stopped[row] or end
    found = []
    for row, tokens in enumerate(texts):
        _, ends, marks = watch.close(row)
        short = stopped[row] is not None and stopped[row] < FIRST + len(tokens)
        found.append(replace(rollout(tokens[: len(ends) - FIRST], "stopped" if short else "ended"), marks=marks))
    return found


@pytest.mark.parametrize("name", NAMES)
def test_any_text_is_rated_within_the_range_and_live_as_in_replay(name: str) -> None:
    if name == "program_tests" and why_not():
        pytest.skip(f"no sandbox: {why_not()}")
    (arguments, (low, high)), one = CASES[name], made(name)
    close = 1e-3 if "model" in arguments else 0.0  # models round otherwise for texts that are read together
    ways = [2, "end"] if close else [one.every, 7, "line"]  # 2,000 words of a text would be too many for a model

    @given(texts=st.tuples(*KINDS.values()), size=st.integers(1, 4), every=st.sampled_from(ways))
    @settings(max_examples=2 if name in SLOW or {"model", "score"} & arguments.keys() else 9)
    def check(texts: tuple[str, ...], size: int, every: Any) -> None:
        asked = one if one.scope == "group" else one.but(every=every)
        rollouts = live(asked, [cut(text, size) for text in texts])
        for written in rollouts:
            for mark in written.marks:
                assert math.isfinite(mark.value)
                assert low - 1e-6 <= mark.value <= high + 1e-6
                assert FIRST <= mark.start < mark.end <= mark.seen <= len(written.token_ids)
            if one.scope != "group":  # siblings are compared when they are finished, live as well
                again = ir.replay([asked], written)
                assert [replace(mark, value=0) for mark in again] == [replace(mark, value=0) for mark in written.marks]
                values = [mark.value for mark in written.marks]
                assert [mark.value for mark in again] == pytest.approx(values, rel=close, abs=close)

    check()


def test_every_name_has_a_case() -> None:
    """A reward that is added to the table of names is given its small arguments and its range here."""
    assert set(CASES) == set(NAMES)
