"""What each kind of trained tokenizer gives back, for any text."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from instant_reward.policies.tokens import train_tokenizer
from instant_reward.text import TextDecoder

LETTERS = "abcdeABCDÉßあいカ中文电影ไทย, .!?'\"-_#0123\n\t。，️♥"
LEARNED = [LETTERS * 2, " ".join(LETTERS) * 2, "abc dea cab bad 中文 电影 ไทย\n\n#ab  _ba"] * 2
known = st.text(alphabet=LETTERS + " ", max_size=40)
anything = st.text(alphabet=st.characters(exclude_categories=["Cs"]), max_size=40)


@cache
def trained(kind: Any) -> Any:
    return train_tokenizer(LEARNED, kind, 500)


def back(kind: str, text: str) -> tuple[str, str, bool]:
    """The text by the tokenizer and by the library's decoder, and whether something in it was unknown."""
    tokenizer = trained(kind)
    ids = tokenizer(text)["input_ids"]
    whole = tokenizer.decode(ids, skip_special_tokens=True)
    return whole, TextDecoder(tokenizer).char_ends(ids)[0], tokenizer.unk_token_id in ids


@settings(max_examples=200, deadline=None)
@given(anything)
def test_bpe_gives_back_any_text(text: str) -> None:
    assert back("bpe", text) == (text, text, False)


@pytest.mark.parametrize("kind", ["character", "wordpiece"])
@settings(max_examples=200, deadline=None)
@given(text=known)
def test_known_characters_come_back_whatever_the_words(kind: str, text: str) -> None:
    assert back(kind, text) == (text, text, False)


@settings(max_examples=200, deadline=None)
@given(text=anything)
def test_characters_leave_out_unknown_ones_alone(text: str) -> None:
    told = "".join(one for one in text if one in LETTERS + " ")
    assert back("character", text)[:2] == (told, told)


@settings(max_examples=200, deadline=None)
@given(text=known)
def test_words_come_back_unless_one_is_unknown(text: str) -> None:
    whole, own, unknown = back("word", text)
    assert whole == own
    assert (whole == text) == (not unknown)
