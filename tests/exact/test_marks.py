"""Marks survive any tokenizer, and live scoring is what a replay finds: over random rewards, tokens and chunks."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import instant_reward as ir
from exact.world import same
from instant_reward import credit
from instant_reward.batch import collate
from instant_reward.credit import Source
from instant_reward.text import TextDecoder
from instant_reward.types import Mark, Prompt, Rollout
from tiny import END, STEP, shared_tokenizer

torch.set_num_threads(1)
# Words with their space, bytes of characters of two, three and four bytes, blanks, stops, a special token.
TOKENS = sorted({*shared_tokenizer().encode(f" the movie was good. 你好。 é e\u0301 👍 a!\n\n b\n{STEP} \xff it! x.")})
TOKENS += shared_tokenizer().convert_tokens_to_ids([".Ġ"])  # one token, two pieces
END_ID, STEP_ID = shared_tokenizer().convert_tokens_to_ids([END, STEP])
DECODER = TextDecoder(shared_tokenizer())
PROMPTS = [Prompt("p0", "Hi", [1]), Prompt("p1", "Hello you", [0, 3, 4], info={"wanted": 2.0})]


def every_third(characters: str) -> int | None:
    return 3 if len(characters) > 3 else None


EVERY: list[Any] = ["token", "word", "sentence", "line", "end", 2, 3, every_third]


class Rule:
    """A random but fixed function of the view: what it hands back depends on all that it may look at."""

    def __init__(self, seed: int, kinds: Sequence[str]) -> None:
        self.seed, self.kinds = seed, list(kinds)

    def __call__(self, view: ir.View) -> Any:
        return self.answer(view, 0)

    def answer(self, view: ir.View, memory: int) -> Any:
        seen = (self.seed, view.text, view.piece, view.done, view.prompt.id, dict(view.info), view.tokens, memory)
        dice = random.Random(repr(seen))
        kind = dice.choice(self.kinds)
        if kind == "list":
            return [dice.uniform(-1, 1) for _ in range(view.tokens)]
        if kind == "spans" and view.text:
            spans = []
            for _ in range(dice.randint(1, 3)):
                start = dice.randrange(len(view.text))
                spans.append(view.span(dice.uniform(-1, 1), start, dice.randint(start + 1, len(view.text))))
            return spans if len(spans) > 1 else spans[0]
        if kind == "stop" and dice.random() < 0.3:
            return ir.stop(dice.choice([None, dice.uniform(-1, 1)]))
        return None if kind == "none" else dice.uniform(-1, 1)


class Stateful:
    """The same with a memory of how often it was asked."""

    def __init__(self, rule: Rule, batched: bool) -> None:
        self.rule, self.batched = rule, batched

    def start(self, prompt: Prompt) -> list[int]:
        return [len(prompt.text)]

    def extend(self, state: Any, view: Any) -> Any:
        if self.batched:
            return [self._one(*pair) for pair in zip(state, view, strict=True)]
        return self._one(state, view)

    def _one(self, state: list[int], view: ir.View) -> Any:
        state[0] += 1
        return self.rule.answer(view, state[0])


@st.composite
def rewards(draw: Any) -> list[ir.Reward]:
    """One to three rewards of any kind."""
    made = []
    for number in range(draw(st.integers(1, 3))):
        kinds = draw(st.lists(st.sampled_from(["float", "list", "spans", "none", "stop"]), min_size=1, max_size=3))
        rule, batched = Rule(draw(st.integers(0, 99)), kinds), draw(st.booleans())
        function: Any = rule
        if draw(st.booleans()):
            function = Stateful(rule, batched)
        elif batched:
            function = lambda views, rule=rule: [rule(view) for view in views]  # noqa: E731
        made.append(ir.reward(every=draw(st.sampled_from(EVERY)), batched=batched, name=f"r{number}")(function))
    return made


@st.composite
def texts(draw: Any) -> list[int]:
    """Tokens, tokens that show nothing among them, and sometimes the end token behind."""
    found: list[int] = draw(st.lists(st.sampled_from([*TOKENS, STEP_ID]), min_size=1, max_size=14))
    return [*found, END_ID] if draw(st.booleans()) else found


def watch_live(rewards: Sequence[Any], texts: Sequence[list[int]], chunk: int = 1, prompt: int = 0) -> list[Rollout]:
    """Texts scored side by side as an engine does it: fed in chunks, each cut where a reward stops it.

    Prompts take turns, beginning with ``prompt``.
    """
    prompts = [PROMPTS[(prompt + row) % 2] for row in range(len(texts))]
    watch = ir.Watch(rewards, DECODER)
    stopped: dict[int, int] = {}
    for row in range(len(texts)):
        watch.open(row, prompts[row])
    for at in range(0, max(map(len, texts)), chunk):
        rows = [row for row, text in enumerate(texts) if at < len(text) and row not in stopped]
        items = [(row, texts[row][at : at + chunk], at + chunk >= len(texts[row])) for row in rows]
        for row, (_, stop) in zip(rows, watch.feed_many(items), strict=True):
            if stop is not None:
                stopped[row] = stop
    return [_rollout(prompts[row], text, *watch.close(row), row in stopped) for row, text in enumerate(texts)]


def _rollout(prompt: Prompt, text: list[int], chars: str, ends: list[int], marks: list[Mark], stop: bool) -> Rollout:
    first, kept = len(prompt.token_ids), len(ends) - len(prompt.token_ids)
    ended = text[-1] == END_ID
    early = stop and kept < len(text)
    return Rollout(
        id=f"{prompt.id}/0",
        group=0,
        prompt=prompt,
        token_ids=[*prompt.token_ids, *text[:kept]],
        mask=[False] * first + [True] * kept,
        logprobs=[0.0] * len(ends),
        char_ends=ends,
        text=chars,
        marks=marks,
        versions=[0] * len(ends),
        stop="stopped" if early else "ended" if ended else "length",
        info=prompt.info,
    )


@settings(max_examples=60)
@given(rewards(), st.lists(texts(), min_size=1, max_size=3), st.integers(2, 5))
def test_live_is_replay(rewards: list[ir.Reward], texts: list[list[int]], chunk: int) -> None:
    """Marks made while a text is written equal those of a replay, however it was fed and whatever was beside it."""
    live = watch_live(rewards, texts)
    for number, rollout in enumerate(live):
        assert ir.replay(rewards, rollout) == rollout.marks
        for one in rewards:  # each on its own, though another one may have stopped the text
            assert ir.replay([one], rollout) == [mark for mark in rollout.marks if mark.source == one.name]
        alone = watch_live(rewards, [texts[number]], prompt=number)[0]
        assert alone.marks == rollout.marks
    assert [rollout.marks for rollout in watch_live(rewards, texts, chunk)] == [rollout.marks for rollout in live]


@settings(max_examples=50)
@given(rewards(), texts())
def test_live_is_replay_at_every_prefix(rewards: list[ir.Reward], text: list[int]) -> None:
    """After each token, the marks so far are those the whole text will have with that much seen: none looks ahead.

    marks(x_<=t, still written) = { m in marks(x) : m.seen <= t };  marks(x_<=t, cut off at t) = its replay
    """
    whole = watch_live(rewards, [text])[0]
    watch, first = ir.Watch(rewards, DECODER), len(PROMPTS[0].token_ids)
    watch.open(0, PROMPTS[0])
    found: list[Mark] = []
    for count in range(1, len(whole.token_ids) - first + 1):
        found += watch.feed(0, [text[count - 1]], done=count == len(text))[0]
        assert found == [mark for mark in whole.marks if mark.seen <= first + count]
        assert all(first <= mark.start < mark.end <= mark.seen for mark in found)
        cut = watch_live(rewards, [text[:count]])[0]
        assert ir.replay(rewards, cut) == cut.marks
    assert found == whole.marks


@settings(max_examples=50)
@given(rewards(), st.lists(texts(), min_size=1, max_size=3), st.sampled_from(["seen", "span"]))
def test_totals_survive_the_way_to_the_tokens(rewards: list[ir.Reward], texts: list[list[int]], at: Any) -> None:
    """Placed on tokens, each source still sums to its marks: over bytes of characters, merged and zero-width tokens."""
    live = watch_live(rewards, texts)
    sources = [Source(one.name, at=at) for one in rewards]
    batch = collate(live, sources, dtype=torch.float64)
    placed = credit.place(batch.marks, sources, batch.mask)
    wanted = torch.tensor([[rollout.total(one.name) for one in rewards] for rollout in live], dtype=torch.float64)
    assert same(placed.sum(2), wanted)
    assert not placed.transpose(1, 2)[~batch.mask].any()


@settings(max_examples=50)
@given(texts(), st.sampled_from(EVERY))
def test_pieces_are_the_whole_text(text: list[int], every: Any) -> None:
    """Every character is in one piece, every token in one or more, and changes sum to the final score."""
    length = ir.reward(every=every, name="length")(lambda view: float(len(view.piece)))
    change = ir.change(lambda characters: float(len(characters)) ** 1.5, every=every, name="change")
    each = ir.reward(every=every, name="each")(lambda view: [1.0] * view.tokens)
    rollout = watch_live([length, change, each], [text])[0]
    assert rollout.total("length") == len(rollout.text)
    assert rollout.total("change") == pytest.approx(len(rollout.text) ** 1.5)
    assert rollout.text == shared_tokenizer().decode(text, skip_special_tokens=True, clean_up_tokenization_spaces=False)
    counted = [mark.start for mark in rollout.marks if mark.source == "each"]
    if every in ("token", "end", 2, 3):
        assert sorted(counted) == list(range(rollout.start, len(rollout.token_ids)))
    elif every in ("word", "sentence") and rollout.text:  # a token may hold the end of one piece and the next
        assert set(counted) == set(range(rollout.start, len(rollout.token_ids)))


def test_what_would_lose_a_marks_place_is_noticed() -> None:
    """A text that the tokenizer would cut otherwise: its marks keep their tokens; told by tokenising anew, they move.

    sum over tokens of the rewards = sum of the marks, each at the token that was sampled
    """
    encode = shared_tokenizer().encode
    text = [*encode(" g"), *encode("ood"), *encode("你"), STEP_ID, *encode(" bad"), END_ID]  # not as it would encode it
    each = ir.reward(every="word", name="each")(lambda view: [0.5 + number for number in range(view.tokens)])
    rollout = watch_live([each], [text])[0]
    assert {mark.start - rollout.start for mark in rollout.marks} == set(range(len(text))), "every sampled token"
    anew = encode(rollout.text)
    assert shared_tokenizer().decode(anew) == rollout.text
    assert len(anew) < len(text) - 2

    def retold(mark: Mark) -> Mark:
        """Wrong on purpose: the token of the mark's first character, in the text tokenised anew."""
        before = ([0] * rollout.start + rollout.char_ends[rollout.start :])[mark.start - 1]
        lengths = [len(shared_tokenizer().decode(anew[: count + 1])) for count in range(len(anew))]
        token = rollout.start + sum(length <= before for length in lengths)
        return Mark(mark.value, token, token + 1, mark.source, mark.seen)

    moved = [retold(mark).start for mark in rollout.marks]
    assert moved != [mark.start for mark in rollout.marks]
    assert len(set(moved)) < len({mark.start for mark in rollout.marks}), "two tokens' marks on one"


def test_a_reward_that_looks_beyond_its_view_is_noticed() -> None:
    """Live equals replay because a view hides the future; a function that finds it elsewhere is told apart.

    Wrong on purpose: what it answers hangs on how much of the text had been written when it was asked.
    """
    text = shared_tokenizer().encode(" the movie was good.")
    written: list[int] = []

    @ir.reward(every="word")
    def peeking(view: ir.View) -> float:
        return float(len(written))

    watch = ir.Watch([peeking], DECODER)
    watch.open(0, PROMPTS[0])
    for number, token in enumerate(text):
        written.append(token)
        watch.feed(0, [token], number == len(text) - 1)
    rollout = _rollout(PROMPTS[0], text, *watch.close(0), False)
    assert ir.replay([peeking], rollout) != rollout.marks
