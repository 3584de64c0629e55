"""Tokenizers trained on texts: what they give back, what they leave out, that they are the same each time."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from instant_reward.policies.tokens import train_tokenizer
from instant_reward.text import TextDecoder
from instant_reward.types import UserError

KINDS = ["bpe", "wordpiece", "character", "word"]
TEXTS = [
    "The film was good, and long.\nThe film wasn't bad!",
    "这部电影很好看，我很喜欢。这部电影不好看。",
    "第一部 film 的 music, 很好 很好!  Two  spaces\tand ### _marks_",
] * 3


def decoded(tokenizer: Any, text: str) -> str:
    ids = tokenizer(text)["input_ids"]
    return str(tokenizer.decode(ids, skip_special_tokens=True))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("text", TEXTS[:3])
def test_a_known_text_comes_back_letter_by_letter(kind: Any, text: str) -> None:
    """With no space between Chinese characters and all white space as it was, by the library's decoder too."""
    tokenizer = train_tokenizer(TEXTS, kind, 600)
    ids = tokenizer(text)["input_ids"]
    assert tokenizer.unk_token_id not in ids
    assert decoded(tokenizer, text) == text
    characters, ends = TextDecoder(tokenizer).char_ends(ids)
    assert characters == text
    assert ends[-1] == len(text)


def test_the_kinds_cut_as_their_names_say() -> None:
    def pieces(kind: Any, text: str, **options: Any) -> list[str]:
        tokenizer = train_tokenizer(TEXTS, kind, 600, **options)
        return [tokenizer.decode([one]) for one in tokenizer(text, add_special_tokens=False)["input_ids"]]

    assert pieces("word", "The film wasn't 很好, film") == [
        "The",
        " film",
        " wasn",
        "'",
        "t",
        " ",
        "很",
        "好",
        ",",
        " film",
    ]
    assert pieces("character", "film 很好") == ["f", "i", "l", "m", " ", "很", "好"]
    assert "".join(pieces("wordpiece", "The filmfilm")) == "The filmfilm"
    assert 2 < len(pieces("wordpiece", "The filmfilm")) < 8, "an unknown word is spelled by pieces"
    assert pieces("bpe", "The film was") == ["The", " film", " was"]


def test_a_small_word_piece_vocabulary_keeps_every_character() -> None:
    """However common longer pieces are: without the characters whole words would be unknown."""
    texts = ["zebra quix", "the the the the the the the the"] * 2
    tokenizer = train_tokenizer(texts, "wordpiece", 28)
    assert len(tokenizer) == 28
    assert decoded(tokenizer, "zebra quix the") == "zebra quix the"


@pytest.mark.parametrize("kind", KINDS)
def test_lower_case(kind: Any) -> None:
    assert decoded(train_tokenizer(TEXTS, kind, 600, lower=True), "The FILM was 很好") == "the film was 很好"


def test_stop_words_are_left_out_where_they_stand_alone() -> None:
    options: dict[str, Any] = {"stop_words": ["the", "and", "的", "不好"]}
    tokenizer = train_tokenizer([*TEXTS, *["an other andes sand"] * 2], "word", 600, **options)
    assert decoded(tokenizer, "The film, and the other andes sand") == " film, other andes sand"
    assert decoded(tokenizer, "第一部的电影不好看") == "第一部电影看"
    with pytest.raises(UserError, match="stop_words are left out by kind word alone, not by bpe"):
        train_tokenizer(TEXTS, "bpe", 600, **options)


def test_what_came_up_too_seldom_is_unknown() -> None:
    texts = ["aa bb bb", "aa cc"]
    known = {kind: set(train_tokenizer(texts, kind, 600, minimum=2).get_vocab()) for kind in KINDS}  # type: ignore[arg-type]
    assert " bb" in known["word"]
    assert " cc" not in known["word"]
    assert decoded(train_tokenizer(["aab", "aa"], "character", 600, minimum=2), "aabaa") == "aaaa"
    assert " cc" not in known["wordpiece"]
    assert len(train_tokenizer(TEXTS, "word", 12)) == 12, "the commonest ones fill a small vocabulary"
    assert len(train_tokenizer(TEXTS, "bpe", 270)) == 270


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("form", "around"),
    [("causal", ("<bos>", "")), ("seq2seq", ("", "<eos>")), ("encoder", ("<cls>", "<sep>"))],
)
def test_special_tokens_stand_around_a_text(kind: Any, form: Any, around: tuple[str, str]) -> None:
    tokenizer = train_tokenizer(TEXTS, kind, 600, form=form)
    before, after = around
    assert tokenizer.decode(tokenizer("The film")["input_ids"]) == f"{before}The film{after}"
    assert {tokenizer.pad_token, tokenizer.eos_token, tokenizer.bos_token, tokenizer.unk_token} == {
        "<pad>",
        "<eos>",
        "<bos>",
        "<unk>",
    }
    if form == "encoder":
        pair = tokenizer("The", " film")
        assert tokenizer.decode(pair["input_ids"]) == "<cls>The<sep> film<sep>"
        border = pair["input_ids"].index(tokenizer.sep_token_id) + 1
        assert pair["token_type_ids"] == [0] * border + [1] * (len(pair["input_ids"]) - border)
        assert tokenizer.mask_token_id == tokenizer("<mask>", add_special_tokens=False)["input_ids"][0]


@pytest.mark.parametrize("kind", KINDS)
def test_it_is_saved_and_loaded(kind: Any, tmp_path: Path) -> None:
    from transformers import AutoTokenizer, GPT2Config

    tokenizer = train_tokenizer(TEXTS, kind, 600)
    tokenizer.save_pretrained(tmp_path)
    GPT2Config().save_pretrained(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    text = TEXTS[2]
    assert loaded(text)["input_ids"] == tokenizer(text)["input_ids"]
    assert decoded(loaded, text) == text
    assert (loaded.pad_token_id, loaded.eos_token_id) == (tokenizer.pad_token_id, tokenizer.eos_token_id)
    assert loaded.get_vocab() == tokenizer.get_vocab()


def test_another_process_trains_the_same_one() -> None:
    """The library's own WordPiece trainer does not: it numbers pieces by the order of a hash table."""
    code = (
        "import json, sys; from instant_reward.policies.tokens import train_tokenizer\n"
        "texts = json.load(sys.stdin)\n"
        "print(json.dumps([train_tokenizer(texts, k, 300).get_vocab() for k in ('bpe', 'wordpiece', 'word')], "
        "sort_keys=True))"
    )
    texts = json.dumps([f"{a}{b}{c} {c}{a} ok" for a in "abcde" for b in "fghij" for c in "klmno"])
    path = os.pathsep.join(filter(None, sys.path))
    told = {
        subprocess.run(
            [sys.executable, "-c", code],
            input=texts,
            capture_output=True,
            text=True,
            check=True,
            env={**os.environ, "PYTHONPATH": path},
        ).stdout
        for _ in range(2)
    }
    assert len(told) == 1


def test_texts_may_come_from_an_iterator() -> None:
    listed = train_tokenizer(TEXTS, "wordpiece", 600)
    assert train_tokenizer(iter(TEXTS), "wordpiece", 600).get_vocab() == listed.get_vocab()


@pytest.mark.parametrize(
    ("texts", "kind", "vocabulary", "message"),
    [
        (TEXTS, "bpe", 200, "vocabulary is 200: 256 bytes and 4 special tokens need 260 or more"),
        (TEXTS, "word", 4, "vocabulary is 4: 4 special tokens need 5 or more"),
        ([], "word", 600, "nothing came up 2 times in the texts"),
        (["one two"], "word", 600, "nothing came up 2 times in the texts"),
    ],
)
def test_bad_settings_are_named(texts: list[str], kind: Any, vocabulary: int, message: str) -> None:
    with pytest.raises(UserError, match=message):
        train_tokenizer(texts, kind, vocabulary)
