"""Whatever a text is cut into, a language model's rewards are those of one pass over the text, at every prefix."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from itertools import pairwise
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

import instant_reward as ir
from instant_reward.rewards.base import as_reward
from instant_reward.rewards.curiosity import Novelty
from instant_reward.rewards.fluency import Fluency, LogRatio
from instant_reward.rewards.token_values import Cut
from instant_reward.rewards.watch import Watch
from instant_reward.text import TextDecoder
from instant_reward.types import Prompt, Rollout, View
from tiny import CONTEXT, END, exact, shared_tokenizer, tiny_folder, tiny_gpt2, tiny_llama

PIECES = [
    " good",
    " movie",
    ". ",
    "\n\n",
    " ",
    "o",
    "你",
    "你好。",
    "é",
    "👍🏽",
    " 4",
    "2",
    "e\u0301",
    "\n",
    " the",
    "m",
]
PIECES += [" was", "-\n", "\ud83d", "\x00", "مر", "'", "s ", "  "]
TEXTS = st.lists(st.sampled_from(PIECES), max_size=14)
PROMPTS = ["", "So:", "The movie was", "你"]


def without_borders() -> PreTrainedTokenizerFast:
    """Bytes that merge across words, and letters that become other tokens when more of them follow."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {character: number for number, character in enumerate(alphabet)}
    merges = []
    for word in ["oo", "good", "dĠm", "movie", "Ġ4", "42", "ĠĠ", "ä½ł", "ä½łå", "theĠgood", "ĊĊ"]:
        grown = word[0]
        for character in word[1:]:
            if (grown, character) not in merges:
                merges.append((grown, character))
            grown += character
            vocabulary.setdefault(grown, len(vocabulary))
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=merges))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([END])
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token=END)


def likeliest_cut() -> PreTrainedTokenizerFast:
    """Words with their space in front, which every text has, cut into the likeliest pieces; unknown characters."""
    pieces = ["<unk>", END, "▁", *"abcdefghijklmnopqrstuvwxyz.0123456789", "▁good", "ood", "▁mo", "▁movie", "vie", "go"]
    pieces += ["▁the", "m▁", "▁was", "as", "你好", "你"]
    backend = Tokenizer(models.Unigram([(piece, -1.0 - len(piece) / 3) for piece in pieces], unk_id=0))
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always", split=False)
    backend.decoder = decoders.Metaspace(prepend_scheme="always")
    backend.add_special_tokens([END])
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token=END, unk_token="<unk>")


TOKENIZERS: dict[str, Callable[[], PreTrainedTokenizerFast]] = {
    "the policy's": shared_tokenizer,
    "without borders": without_borders,
    "likeliest cut": likeliest_cut,
}


@cache
def folder(tokenizer: str, seed: int = 0) -> str:
    return str(tiny_folder(Path(mkdtemp()), tiny_llama(seed), TOKENIZERS[tokenizer]()))


@cache
def fluency(tokenizer: str) -> Fluency:
    made = Fluency(folder(tokenizer), dtype="float64")
    exact(made.scorers[0][0].frozen.model)
    return made


def reads(reward: Any) -> int:
    return sum(scorer.frozen.tokens_read for scorer, _ in reward.scorers)


def tokens_of(tokenizer: Any, text: str) -> list[int]:
    """The tokens of a text that goes on from another."""
    text = "".join("\ufffd" if 0xD800 <= ord(character) < 0xE000 else character for character in text)
    if tokenizer.unk_token is None:
        return list(tokenizer(text, add_special_tokens=False)["input_ids"])
    return list(tokenizer("." + text, add_special_tokens=False)["input_ids"][2:])  # without the space before all text


def one_pass(reward: Fluency, prompt: str, text: str) -> list[float]:
    """The log-probabilities of the text's tokens, by one pass of the plain model."""
    frozen = reward.scorers[0][0].frozen
    before = frozen.tokenizer(prompt, add_special_tokens=False)["input_ids"] or [frozen.tokenizer.eos_token_id]
    ids = before + tokens_of(frozen.tokenizer, text)
    with torch.no_grad():
        logprobs = frozen.model(torch.tensor([ids])).logits[0].log_softmax(-1)
    return [float(logprobs[i - 1, ids[i]]) for i in range(len(before), len(ids))]


def view(text: str, piece: str, prompt: Prompt, done: bool) -> View:
    return View(text, piece, prompt, prompt.info, done)


def near(value: Any) -> Any:
    return pytest.approx(value, abs=1e-6)


@pytest.mark.parametrize("tokenizer", TOKENIZERS)
@given(st.lists(st.tuples(st.sampled_from(PROMPTS), TEXTS), min_size=1, max_size=4))
@settings(max_examples=12)
def test_at_every_prefix_of_every_text_of_a_batch_the_sum_is_that_of_one_pass(
    tokenizer: str, rows: list[tuple[str, list[str]]]
) -> None:
    reward = fluency(tokenizer)
    prompts = [Prompt("p", prompt, []) for prompt, _ in rows]
    states = [reward.start(prompt) for prompt in prompts]
    sums = [0.0 for _ in rows]
    for step in range(max(len(pieces) for _, pieces in rows)):
        going = [row for row, (_, pieces) in enumerate(rows) if step < len(pieces)]
        texts = ["".join(rows[row][1][: step + 1]) for row in going]
        views = [
            view(text, rows[row][1][step], prompts[row], step + 1 == len(rows[row][1]))
            for row, text in zip(going, texts, strict=True)
        ]
        paid = reward.extend([states[row] for row in going], views)
        for row, text, spans in zip(going, texts, paid, strict=True):
            assert all(0 <= span.start < span.end <= len(text) for span in spans)
            sums[row] += sum(span.value for span in spans)
            assert sums[row] == near(sum(one_pass(reward, rows[row][0], text)))


@given(st.lists(st.sampled_from([" good", " movie", " was", " the", " 42", " slow"]), min_size=1, max_size=12))
@settings(max_examples=10)
def test_a_text_by_words_is_paid_token_by_token_and_read_once(words: list[str]) -> None:
    reward = fluency("the policy's")
    counted: list[int] = []
    model = reward.scorers[0][0].frozen.model
    hook = model.model.register_forward_pre_hook(
        lambda module, args, options: counted.append(options["input_ids"].numel()), with_kwargs=True
    )
    prompt, text, paid = Prompt("p", "The movie was", []), "", []
    state = reward.start(prompt)
    for number, word in enumerate(words):
        text += word
        paid += reward.extend([state], [view(text, word, prompt, number + 1 == len(words))])[0]
    hook.remove()
    expected = one_pass(reward, prompt.text, text)
    assert [span.value for span in paid] == near(expected)
    assert "".join(text[span.start : span.end] for span in paid) == text
    # The last token need not be read, and the prompt is read but for its last, which goes with the first of the text.
    assert sum(counted) == len(shared_tokenizer()(prompt.text)["input_ids"]) + len(expected) - 1


@given(TEXTS)
@settings(max_examples=10)
def test_a_text_by_characters_is_hardly_read_twice(pieces: list[str]) -> None:
    reward, text = fluency("the policy's"), "".join(pieces)
    prompt = Prompt("p", "So:", [])
    state, before = reward.start(prompt), reads(reward)
    for end in range(1, len(text) + 1):
        reward.extend([state], [view(text[:end], text[end - 1], prompt, end == len(text))])
    # A character of a word that grows takes back at most one token: the word so far.
    assert reads(reward) - before <= len(prompt.text) + len(one_pass(reward, "So:", text)) + len(text)


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


@pytest.mark.parametrize("tokenizer", TOKENIZERS)
@given(TEXTS.map("".join), st.integers(1, 4))
@settings(max_examples=4)
def test_live_equals_replay_and_every_way_of_cutting_has_the_same_sum(tokenizer: str, text: str, chunk: int) -> None:
    text = text.replace("\ud83d", "")  # a policy's tokens cannot spell it
    # The policy's tokens cut characters, and the last of them may stay incomplete.
    ids = [*shared_tokenizer()(text)["input_ids"], *shared_tokenizer()("你")["input_ids"][:1]]
    ids = ids + shared_tokenizer()("🎬")["input_ids"][:2] + shared_tokenizer()(END)["input_ids"]
    about = Prompt("p", "So:", [1, 2])
    reward = fluency(tokenizer)
    rewards: list[Any] = [as_reward(reward).but(every=every, name=str(every)) for every in CUTS]
    rewards.append(as_reward(Novelty(2)).but(every="token", name="new"))
    rollout = live(rewards, ids, about, chunk)
    replayed = ir.replay(rewards, rollout)
    assert [(mark.source, mark.start, mark.end, mark.seen) for mark in replayed] == [
        (mark.source, mark.start, mark.end, mark.seen) for mark in rollout.marks
    ]
    assert [mark.value for mark in replayed] == near([mark.value for mark in rollout.marks])
    for every in CUTS:
        assert rollout.total(str(every)) == near(sum(one_pass(reward, "So:", rollout.text)))


CUTS: list[Any] = ["token", "word", "sentence", "line", "end", 3]


@given(TEXTS)
@settings(max_examples=10)
def test_the_log_ratio_of_models_with_other_tokenizers_is_that_of_two_passes(pieces: list[str]) -> None:
    ratio = two_tokenizers()
    prompt, text, total = Prompt("p", "So:", []), "", 0.0
    state = ratio.start(prompt)
    for number, piece in enumerate(pieces):
        text += piece
        (spans,) = ratio.extend([state], [view(text, piece, prompt, number + 1 == len(pieces))])
        assert all(a.end <= b.start for a, b in pairwise(spans))
        total += sum(span.value for span in spans)
        values = [sum(one_pass(fluency(name), "So:", text)) for name in ("without borders", "likeliest cut")]
        assert total == near(values[0] - values[1])


@cache
def two_tokenizers() -> LogRatio:
    return LogRatio(folder("without borders"), folder("likeliest cut"), dtype="float64")


@pytest.mark.parametrize("kind", [tiny_llama, tiny_gpt2])
def test_a_text_longer_than_the_context_is_read_in_windows_that_do_not_depend_on_the_cuts(
    kind: Callable[[], Any], tmp_path: Path
) -> None:
    reward = Fluency(str(tiny_folder(tmp_path / "long", kind())), dtype="float64")
    frozen = reward.scorers[0][0].frozen
    exact(frozen.model)
    text = " the movie was not good, and slow but fine." * 40
    ids = shared_tokenizer()("So:" + text)["input_ids"]
    first = len(shared_tokenizer()("So:")["input_ids"])
    assert len(ids) > 3 * CONTEXT
    windows: dict[int, list[int]] = {}  # where the window of each output begins: at least half a context before it
    for number in range(first - 1, len(ids) - 1):
        start = 0 if number < CONTEXT else ((number - CONTEXT) // (CONTEXT // 2) + 1) * (CONTEXT // 2)
        assert start == 0 or CONTEXT // 2 <= number - start < CONTEXT
        windows.setdefault(start, []).append(number)
    expected = 0.0
    for start, numbers in windows.items():
        with torch.no_grad():
            found = frozen.model(torch.tensor([ids[start : numbers[-1] + 1]])).logits[0].log_softmax(-1)
        expected += sum(float(found[number - start, ids[number + 1]]) for number in numbers)
    prompt = Prompt("p", "So:", [])
    for step in (61, 300, len(text)):
        state, total = reward.start(prompt), 0.0
        before = frozen.tokens_read
        for start in range(0, len(text), step):
            end = min(len(text), start + step)
            (spans,) = reward.extend([state], [view(text[:end], text[start:end], prompt, end == len(text))])
            total += sum(span.value for span in spans)
        assert total == near(expected)
        assert step < 300 or frozen.tokens_read - before < 2.2 * len(ids)


@pytest.mark.parametrize("tokenizer", TOKENIZERS)
def test_long_texts_are_tokenised_from_a_place_near_their_end(tokenizer: str, monkeypatch: pytest.MonkeyPatch) -> None:
    tokens = fluency(tokenizer).scorers[0][0].tokens
    text = (" the movie was good" * 40 + "。你好，" * 10 + " slow.\n") * 4
    shown: list[int] = []
    encode = tokens._encode
    monkeypatch.setattr(tokens, "_encode", lambda texts: shown.extend(map(len, texts)) or encode(texts))

    cut = Cut()
    for end in range(0, len(text), 5):
        tokens.grow([cut], [(text[:end], False)])
        if end % 35 == 0:
            assert cut.ids == tokens_of(tokens.tokenizer, text[:end])
            assert [cut.spans[0][0] if cut.spans else 0, *(stop for _, stop in cut.spans)][-1] <= end
    assert max(shown) < 1000 < len(text) / 2
    tokens.grow([cut], [(text, True)])
    assert cut.ids == tokens_of(tokens.tokenizer, text)
