"""Rollouts as JSON and back."""

from __future__ import annotations

import dataclasses
import json
import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from instant_reward.records import rollout_from_record, rollout_record
from instant_reward.types import Mark, Prompt, Rollout, UserError


def example(**changes: Any) -> Rollout:
    prompt = Prompt("p", "Say:", [1, 2], [{"role": "user", "content": "Say:"}], {"topic": "films", "tags": ["a"]})
    whole = Rollout(
        id="r1",
        group=3,
        prompt=prompt,
        token_ids=[1, 2, 8, 9],
        mask=[False, False, True, True],
        logprobs=[0.0, 0.0, -0.1, -1 / 3],
        char_ends=[0, 0, 2, 5],
        text=" good",
        marks=[Mark(0.1, 2, 4, "mood", 4), Mark(-1e-17, 2, 3, "kl", 3)],
        versions=[-1, -1, 0, 1],
        stop="stopped",
        temperature=0.7,
        forbidden_end=1,
        info={"step": 4},
    )
    return dataclasses.replace(whole, **changes)


def through_json(rollout: Rollout) -> Rollout:
    return rollout_from_record(json.loads(json.dumps(rollout_record(rollout), allow_nan=False)))


def test_nothing_is_lost() -> None:
    assert through_json(example()) == example()
    # A field that is added to the types must not be forgotten here.
    assert set(rollout_record(example())) == {field.name for field in dataclasses.fields(Rollout)}
    kept = {
        field.name for field in dataclasses.fields(Prompt) if field.compare
    }  # its place in the data is for messages
    assert set(rollout_record(example())["prompt"]) == kept


@given(
    st.text(st.characters(exclude_categories=()), max_size=20),
    st.lists(st.floats(allow_nan=False, allow_infinity=False), max_size=4),
)
def test_any_text_and_any_number_come_back_as_they_were(text: str, values: list[float]) -> None:
    rollout = example(text=text, marks=[Mark(value, 2, 4, text, 4) for value in values])
    assert through_json(rollout) == rollout


def test_info_that_json_cannot_hold_is_made_plain() -> None:
    info = {"array": np.arange(2), "number": np.float32(0.5), "none": math.nan, 3: {"set": frozenset({1})}}
    assert through_json(example(info=info)).info == {
        "array": [0, 1],
        "number": 0.5,
        "none": None,
        "3": {"set": "frozenset({1})"},
    }


def test_further_keys_are_passed_over() -> None:
    assert rollout_from_record(rollout_record(example()) | {"written_at": "today"}) == example()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"text": None}, "sample r1 cannot be read: expected text"),
        ({"marks": [{"value": 1.0}]}, "sample r1 has no 'start'"),
        ({"mask": [True]}, "mask 1"),
        ({"stop": "tired"}, "stop='tired'"),
        ({"prompt": None}, "sample r1 cannot be read"),
        ({"prompt": {}}, "sample r1 has no"),
        ({"group": "many"}, "sample r1 cannot be read"),
    ],
)
def test_what_is_wrong_is_said_in_one_sentence(change: dict[str, Any], words: str) -> None:
    with pytest.raises(UserError, match=words) as caught:
        rollout_from_record(rollout_record(example()) | change)
    assert "\n" not in str(caught.value)


def test_a_line_that_is_no_record() -> None:
    with pytest.raises(UserError, match="no record of a sample"):
        rollout_from_record([1, 2])  # type: ignore[arg-type]
