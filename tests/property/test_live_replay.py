"""Scoring a text while it is written equals scoring it again once it is finished, for any reward and any text."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any
from zlib import crc32

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import instant_reward as ir
from instant_reward.rewards.base import as_reward
from instant_reward.rewards.watch import Watch
from instant_reward.text import TextDecoder
from instant_reward.types import Mark, Prompt, Rollout, StopReason
from tiny import END, STEP, shared_tokenizer, tiny_gpt2, tiny_policy

PROMPT = Prompt("p", "So:", [1, 2], info={"salt": 3})
FIRST = len(PROMPT.token_ids)
DECODER = TextDecoder(shared_tokenizer())
CUTS: list[Any] = [
    "token",
    "word",
    "sentence",
    "line",
    "end",
    2,
    5,
    lambda rest: len(rest) >= 6,
    lambda rest: rest.find("o") + 1,
]
FORMS = ("view", "text", "columns", "batched", "state", "batched state")
FORMS += ("change", "batched change", "potential", "batched potential")


def pairs(run: str) -> list[str]:
    return [run[at : at + 2] for at in range(0, len(run), 2)]


@dataclass
class Spec:
    """A reward that decides by a hash of all it can see; ``views`` are the views it was asked about."""

    form: str
    every: Any
    salt: int
    stops: bool
    segmented: bool
    views: list[ir.View] = field(default_factory=list)

    def reward(self, name: str) -> Any:
        """A fresh reward, which shares nothing with another one of the same spec but ``views``."""
        if "change" in self.form or "potential" in self.form:
            batched = self.form.startswith("batched")
            score = (lambda texts: [self.score(text) for text in texts]) if batched else self.score
            if "change" in self.form:
                return ir.change(score, every=self.every, batched=batched, name=name)
            return ir.potential(score, 0.75, every=self.every, batched=batched, name=name)
        functions: dict[str, Any] = {
            "view": self.value,
            "text": self.score,
            "columns": self.columns,
            "batched": lambda views: [self.value(view) for view in views],
            "state": State(self, batched=False),
            "batched state": State(self, batched=True),
        }
        if self.form in ("text", "columns"):
            return as_reward(functions[self.form]).but(name=name, every=self.every)
        segmenter = pairs if self.segmented else None
        batched = self.form.startswith("batched")
        return ir.reward(every=self.every, batched=batched, name=name, segmenter=segmenter)(functions[self.form])

    def chance(self, *seen: Any) -> int:
        return crc32(repr((self.salt, *seen)).encode(errors="replace"))

    def score(self, text: str) -> float:
        return self.chance(text) % 64 / 8

    def columns(self, prompts: Sequence[str], completions: Sequence[str], salt: Sequence[int]) -> list[float]:
        return [self.chance(*row) % 64 / 8 for row in zip(prompts, completions, salt, strict=True)]

    def value(self, view: ir.View, *state: Any) -> Any:
        self.views.append(view)
        number = self.chance(view.text, view.piece, view.done, view.tokens, view.sampled, view.prompt, *state)
        value, kind = number % 64 / 8, number // 64 % 12
        if kind < 5:
            return value
        if kind == 5:
            return [value + at for at in range(view.tokens)]
        if kind in (6, 7) and view.text:
            ends = [(number // 7**k % len(view.text), number // 11**k % len(view.text)) for k in (1, 2)]
            spans = [view.span(value, min(pair), max(pair) + 1) for pair in ends]
            return spans if kind == 6 else spans[0]
        if kind == 8 and self.stops:
            return ir.stop(value if number % 2 else None)
        return None


class State:
    """Remembers the pieces that it saw."""

    def __init__(self, spec: Spec, batched: bool) -> None:
        self.spec, self.batched = spec, batched

    def start(self, prompt: Prompt) -> list[str]:
        return [prompt.text]

    def extend(self, state: Any, view: Any) -> Any:
        if self.batched:
            assert len({id(one) for one in state}) == len(state), "a state is asked about one piece at a time"
            return [self.one(a_state, a_view) for a_state, a_view in zip(state, view, strict=True)]
        return self.one(state, view)

    def one(self, state: list[str], view: ir.View) -> Any:
        state.append(view.piece)
        return self.spec.value(view, tuple(state))


def token_lists() -> st.SearchStrategy[list[int]]:
    tokenizer = shared_tokenizer()
    readable = st.lists(
        st.sampled_from(
            [" good", " movie", ". ", "\n\n", " ", "o", "你", "。", "é", "👍🏽", "e\u0301", "\n", "No", STEP]
        ),
        max_size=20,
    ).map(lambda parts: list(tokenizer("".join(parts))["input_ids"]))
    # Any ids at all: they split characters, and make bytes that are none.
    return st.one_of(readable, st.lists(st.integers(0, len(tokenizer) - 1), max_size=20))


def specs(stops: bool = True) -> st.SearchStrategy[list[Spec]]:
    one = st.builds(
        Spec,
        form=st.sampled_from(FORMS),
        every=st.sampled_from(CUTS),
        salt=st.integers(0, 9999),
        stops=st.booleans() if stops else st.just(False),
        segmented=st.booleans(),
    )
    return st.lists(one, min_size=1, max_size=4)


def named(chosen: Sequence[Spec]) -> list[Any]:
    return [spec.reward(f"r{number}") for number, spec in enumerate(chosen)]


def finish(watch: Watch, row: int, ids: Sequence[int], reason: StopReason) -> Rollout:
    text, char_ends, marks = watch.close(row)
    kept, length = len(char_ends) - FIRST, len(char_ends)
    return Rollout(
        id=f"p/{row}",
        group=0,
        prompt=PROMPT,
        token_ids=[*PROMPT.token_ids, *ids[:kept]],
        mask=[False] * FIRST + [True] * kept,
        logprobs=[0.0] * length,
        char_ends=char_ends,
        text=text,
        marks=marks,
        versions=[-1] * FIRST + [0] * kept,
        stop=reason,
    )


@dataclass
class Writing:
    """One text that is being written: its tokens, how it ends, and how many were fed."""

    ids: list[int]
    reason: StopReason
    fed: int = 0
    stopped: int | None = None


def write(
    rewards: Sequence[Any], texts: Sequence[tuple[list[int], StopReason]], chunk: Callable[[], int]
) -> list[Rollout]:
    """Feeds texts side by side, in chunks, and goes on feeding a stopped one, as an engine does that decodes ahead."""
    watch = Watch(rewards, DECODER)
    rows = [Writing(list(ids), reason) for ids, reason in texts]
    for number in range(len(rows)):
        watch.open(number, PROMPT)
    while any(row.fed < len(row.ids) for row in rows):
        fed = []
        for number, row in enumerate(rows):
            size = min(chunk(), len(row.ids) - row.fed)
            if size:
                row.fed += size
                fed.append((number, row.ids[row.fed - size : row.fed], row.fed == len(row.ids)))
        for (number, _, _), (marks, stopped) in zip(fed, watch.feed_many(fed), strict=True):
            row = rows[number]
            assert all(mark.seen <= FIRST + row.fed for mark in marks), (
                "a mark has seen tokens that were not written yet"
            )
            row.stopped = row.stopped or stopped
    finished = []
    for number, row in enumerate(rows):
        at_the_end = row.stopped == FIRST + len(row.ids)
        reason: StopReason = "stopped" if row.stopped and not at_the_end else row.reason
        finished.append(finish(watch, number, row.ids, reason))
    return finished


ENDINGS = st.sampled_from(["ended", "length"])


@given(chosen=specs(), texts=st.lists(st.tuples(token_lists(), ENDINGS), min_size=1, max_size=3), data=st.data())
@settings(max_examples=150)
def test_live_equals_replay(chosen: list[Spec], texts: list[tuple[list[int], StopReason]], data: st.DataObject) -> None:
    end = shared_tokenizer().convert_tokens_to_ids(END)
    texts = [([*ids, end] if reason == "ended" or not ids else ids, reason) for ids, reason in texts]
    rollouts = write(named(chosen), texts, lambda: data.draw(st.integers(0, 4)) or 1)
    live = [list(spec.views) for spec in chosen]
    for spec in chosen:
        spec.views.clear()
    for rollout in rollouts:
        assert ir.replay(named(chosen), rollout) == rollout.marks
    for spec, seen in zip(chosen, live, strict=True):  # beside each other live, one after the other in replay
        assert sorted(map(repr, spec.views)) == sorted(map(repr, seen))
    for rollout in rollouts:
        for one in named(chosen):  # also where another reward stopped the text
            assert ir.replay([one], rollout) == [mark for mark in rollout.marks if mark.source == one.name]


@given(chosen=specs(), ids=token_lists(), data=st.data())
@settings(max_examples=50)
def test_the_marks_do_not_depend_on_the_chunks_they_were_fed_in(
    chosen: list[Spec], ids: list[int], data: st.DataObject
) -> None:
    ids = ids or [1]
    one_by_one = write(named(chosen), [(ids, "length")], lambda: 1)
    assert write(named(chosen), [(ids, "length")], lambda: data.draw(st.integers(1, 9))) == one_by_one


@given(chosen=specs(), ids=token_lists(), futures=st.tuples(token_lists(), token_lists()))
@settings(max_examples=50)
def test_no_mark_depends_on_the_tokens_after_those_it_has_seen(
    chosen: list[Spec], ids: list[int], futures: tuple[list[int], list[int]]
) -> None:
    limit = FIRST + len(ids)
    known: list[list[Mark]] = []
    for future in futures:
        (rollout,) = write(named(chosen), [([*ids, *future, 0], "length")], lambda: 1)
        known.append([mark for mark in ir.replay(named(chosen), rollout) if mark.seen <= limit])
    assert known[0] == known[1]


@given(chosen=specs(stops=False), ids=token_lists(), last=st.sampled_from([END, STEP, "a", "Ġgood"]))
@settings(max_examples=50)
def test_views_together_show_the_text_once(chosen: list[Spec], ids: list[int], last: str) -> None:
    ids = [*ids, shared_tokenizer().convert_tokens_to_ids(last)]
    (rollout,) = write(named(chosen), [(ids, "ended" if last == END else "length")], lambda: 1)
    for spec in chosen:
        if spec.form in ("view", "batched", "state", "batched state"):
            assert "".join(view.piece for view in spec.views) == rollout.text
            assert all(view.text.endswith(view.piece) for view in spec.views)
            assert all(rollout.text.startswith(view.text) for view in spec.views)
            assert not any(view.done for view in spec.views[:-1])
    for mark in rollout.marks:
        assert FIRST <= mark.start < mark.end <= mark.seen <= len(rollout.token_ids)


@given(salt=st.integers(0, 9999), every=st.sampled_from(CUTS), batched=st.booleans(), ids=token_lists())
@settings(max_examples=50)
def test_the_changes_of_a_score_sum_to_its_last_value_less_its_first(
    salt: int, every: Any, batched: bool, ids: list[int]
) -> None:
    spec = Spec("batched change" if batched else "change", every, salt, stops=False, segmented=False)
    (rollout,) = write(named([spec]), [(ids or [1], "length")], lambda: 1)
    assert rollout.total() == spec.score(rollout.text) - spec.score("")


@given(salt=st.integers(0, 9999), every=st.sampled_from(CUTS), batched=st.booleans(), ids=token_lists())
@settings(max_examples=50)
def test_the_discounted_marks_of_a_potential_sum_to_nothing(
    salt: int, every: Any, batched: bool, ids: list[int]
) -> None:
    spec = Spec("batched potential" if batched else "potential", every, salt, stops=False, segmented=False)
    (rollout,) = write(named([spec]), [(ids or [1], "length")], lambda: 1)
    paid = [mark.value * 0.75 ** (mark.seen - FIRST) for mark in rollout.marks]
    assert sum(paid) == pytest.approx(0.0, abs=1e-9)


@pytest.mark.parametrize("seed", range(4))
def test_what_the_engine_scored_equals_replay(seed: int) -> None:
    everything = [
        Spec(form, CUTS[(seed + number) % len(CUTS)], seed, stops=number == 2, segmented=False)
        for number, form in enumerate(FORMS)
    ]
    rollouts = tiny_policy(tiny_gpt2()).sample(
        [{"prompt": "So:", "salt": 3}, {"prompt": "the movie", "salt": 4}],
        per_prompt=4,
        max_new_tokens=16,
        stop=["oo"],
        rewards=named(everything),
        seed=seed,
        rows=5,
    )
    assert sum(len(rollout.marks) for rollout in rollouts) > 20
    for rollout in rollouts:
        assert ir.replay(named(everything), rollout) == rollout.marks
