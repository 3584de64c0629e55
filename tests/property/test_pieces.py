"""Where pieces end: the same places however the text arrived, and never inside what is one letter on the screen."""

from __future__ import annotations

import unicodedata
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from instant_reward.text import Pieces
from instant_reward.types import UserError

CHUNKS = [
    "movie", "a", "I", "Hello", " ", "  ", "\n", "\r\n", "\t", "\u3000", ".", "...", "…", "!", "?", ",", ";", '"', "'",
    "(", ")", "“", "”", "*", "#", "-", "—", "Mr.", "Dr", "e.g.", "i.e", "etc.", "vs.", "U.S.", "J.", "no.", "3.14",
    "3", "1999", "你", "好", "世界", "。", "！", "？", "．", "１", "，", "、", "「", "」", "（", "）", "ー", "カ", "ﾞ",
    "ひ", "ส", "วั", "เ", "กำ", "\u0e35", "ခ", "ေ", "한국", "مرحبا", "؟", "।", "e\u0301", "\u0301", "\ufe0f", "\u200d",
    "\u200b", "👍", "🏽", "👨\u200d👩\u200d👧", "🇨", "🇳", "𠀀", "\ufffd", "\x00",
]  # fmt: skip
TEXTS = st.lists(st.sampled_from(CHUNKS), max_size=14).map("".join)


def by_twos(run: str) -> list[str]:
    return [run[i : i + 2] for i in range(0, len(run), 2)]


def by_its_end(run: str) -> list[str]:
    """Takes back all its words with each character that follows."""
    cut = ord(run[-1]) % len(run)
    return [run[:cut], run[cut:]]


MADE: dict[str, Callable[[], Pieces]] = {
    "word": lambda: Pieces("word"),
    "sentence": lambda: Pieces("sentence"),
    "line": lambda: Pieces("line"),
    "end": lambda: Pieces("end"),
    "word by twos": lambda: Pieces("word", segmenter=by_twos),
    "word by its end": lambda: Pieces("word", segmenter=by_its_end),
}


def cut(pieces: Pieces, text: str, done: bool = True) -> list[str]:
    ends = pieces.ends(text, 0, done)
    return [text[a:b] for a, b in pairwise([0, *ends])]


@pytest.mark.parametrize("name", MADE)
@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_ends_do_not_depend_on_how_the_text_arrived(name: str, data: st.DataObject) -> None:
    text = data.draw(TEXTS)
    sizes = data.draw(st.lists(st.integers(1, 5), max_size=len(text)))
    pieces, found, known = MADE[name](), [0], 0
    for size in sizes:
        known = min(len(text), known + size)
        found += pieces.ends(text[:known], found[-1], done=False)
    found += pieces.ends(text, found[-1], done=True)
    assert found[1:] == pieces.ends(text, 0, done=True)
    assert found == sorted(set(found))
    assert found[-1] == len(text)


@pytest.mark.parametrize("name", MADE)
@settings(max_examples=150, deadline=None)
@given(text=TEXTS)
def test_no_piece_ends_inside_a_letter(name: str, text: str) -> None:
    for end in MADE[name]().ends(text, 0, done=True)[:-1]:
        before, after = text[end - 1], text[end]
        assert before + after != "\r\n"
        if before == "\n":  # nothing joins over a line's end
            continue
        assert unicodedata.category(after)[0] != "M"
        assert after not in "\u200d\u200b🏽ﾞ\u0e33"
        assert before != "\u200d" or after.isspace()
        if after in "🇨🇳":
            flags = text[:end]
            assert (len(flags) - len(flags.rstrip("🇨🇳"))) % 2 == 0


@pytest.mark.parametrize("name", ["word", "sentence", "word by twos"])
@settings(max_examples=150, deadline=None)
@given(text=TEXTS)
def test_no_piece_is_only_white_space(name: str, text: str) -> None:
    if text.strip():
        assert all(piece.strip() for piece in cut(MADE[name](), text))


WORDS = {
    "The movie was great, really.  ": ["The", " movie", " was", " great,", " really.  "],
    "\n\n a  b\n": ["\n\n a", "  b\n"],
    "你好，世界！": ["你", "好，", "世", "界！"],
    "「你好」（他）说：“好。”": ["「你", "好」", "（他）", "说：", "“好。”"],
    "iPhone手机 is 好": ["iPhone", "手", "机", " is", " 好"],
    "3月good(好)": ["3", "月", "good", "(好)"],
    "见 (note)，好#tag": ["见", " (note)，", "好", "#tag"],
    "ここは東京です": ["こ", "こ", "は", "東", "京", "で", "す"],
    "สวัสดี กำ": ["ส", "วั", "ส", "ดี", " กำ"],
    "한국 영화는": ["한국", " 영화는"],
    "مرحبا بك": ["مرحبا", " بك"],
    "好\ufe00好🏽👨\u200d👩\u200d👧 🇨🇳🇨🇳": ["好\ufe00", "好🏽", "👨\u200d👩\u200d👧", " 🇨🇳🇨🇳"],
    "cafe\u0301 x\u0301": ["cafe\u0301", " x\u0301"],
    "a\u200d好人": ["a\u200d好", "人"],
    "好\u200d\u200d好人": ["好\u200d\u200d好", "人"],
    "好\u200d🇨🇳🇨🇳": ["好\u200d🇨🇳", "🇨🇳"],
    "don't well-made 3.14": ["don't", " well-made", " 3.14"],
    "   ": ["   "],
    "": [],
}
SENTENCES = {
    "It was good. I liked it! ": ["It was good.", " I liked it! "],
    'He said "Go." Then (yes.) he left': ['He said "Go."', " Then (yes.)", " he left"],
    "Mr. Smith met Dr. J. R. Ewing vs. the U.S. team, e.g. Bob, i.e. him etc. and left. Ok": [
        "Mr. Smith met Dr. J. R. Ewing vs. the U.S. team, e.g. Bob, i.e. him etc. and left.",
        " Ok",
    ],
    "Pi is 3.14. See no. 5 of p. 7. I said no. Then": ["Pi is 3.14.", " See no. 5 of p. 7.", " I said no.", " Then"],
    "Prof. Li left on Jan. 5. One rep. Ok": ["Prof. Li left on Jan. 5.", " One rep.", " Ok"],
    "Wait... What?! Yes… ok example.com": ["Wait...", " What?!", " Yes…", " ok example.com"],
    "1. First. 2. Second. It was 1999. End": ["1. First.", " 2. Second.", " It was 1999.", " End"],
    "Title\n\n\nText. \n \n  More": ["Title\n\n\n", "Text. \n \n", "  More"],
    "a\r\n\r\nb": ["a\r\n\r\n", "b"],
    "\n\nHi. Ok\n": ["\n\nHi.", " Ok\n"],
    "你好。世界！？“好。”他说｡对": ["你好。", "世界！？", "“好。”", "他说｡", "对"],
    "３．１４。好．对": ["３．１４。", "好．", "对"],
    "هل؟ نعم": ["هل؟", " نعم"],
    "**Bold.** Then": ["**Bold.**", " Then"],
    "": [],
}


@pytest.mark.parametrize("text", WORDS)
def test_words(text: str) -> None:
    assert cut(Pieces("word"), text) == WORDS[text]


@pytest.mark.parametrize("text", SENTENCES)
def test_sentences(text: str) -> None:
    assert cut(Pieces("sentence"), text) == SENTENCES[text]


def test_lines() -> None:
    assert cut(Pieces("line"), "a\r\nb\n\n c") == ["a\r\n", "b\n", "\n", " c"]
    assert Pieces("line").ends("a\nb", 0, done=False) == [2]
    assert Pieces("line").ends("a\n", 0, done=False) == [2]


@pytest.mark.parametrize(
    ("every", "text", "certain"),
    [
        ("word", "movie", []),
        ("word", "movie ", []),  # more white space may follow, or the end: then it is the word's
        ("word", "movie w", [5]),
        ("word", "你", []),  # a mark may follow
        ("word", "你，", []),
        ("word", "你好", [1]),
        ("word", "a（", []),  # which word the bracket belongs to is not known
        ("word", "a（你", [1]),
        ("sentence", "Hi.", []),
        ("sentence", "Hi. ", []),
        ("sentence", "Hi. Y", [3]),
        ("sentence", "Hi.\n", []),
        ("sentence", "Hi.\n\nY", [5]),
        ("sentence", "3.", []),
        ("sentence", "3.1", []),
        ("sentence", "你好。", []),
        ("sentence", "你好。」", []),
        ("sentence", "你好。」他", [4]),
        ("end", "Hi. Y", []),
    ],
)
def test_a_piece_is_certain_once_what_follows_it_is_known(every: str, text: str, certain: list[int]) -> None:
    assert Pieces(every).ends(text, 0, done=False) == certain


def test_only_the_text_from_the_start_is_read() -> None:
    assert Pieces("word").ends("one two three", 3, done=False) == [7]
    assert Pieces("sentence").ends("One. Two. Three", 4, done=True) == [9, 15]


def test_a_segmenter_is_asked_once_per_run_when_the_run_is_over() -> None:
    asked: list[str] = []

    def segmenter(run: str) -> list[str]:
        asked.append(run)
        return by_twos(run)

    pieces, text = Pieces("word", segmenter=segmenter), "（我喜欢\u0301你的，真的 ok"
    found = [0]
    for known in range(len(text)):
        found += pieces.ends(text[:known], found[-1], done=False)
    found += pieces.ends(text, found[-1], done=True)
    # "欢" and its mark are not parted, though the segmenter does; the comma goes with the last word of its run.
    assert [text[a:b] for a, b in pairwise(found)] == [
        "（我喜", "欢\u0301", "你的，", "真的", " ok",
    ]  # fmt: skip
    assert asked == ["我喜欢\u0301你的", "真的"]


def test_a_segmenter_cannot_part_a_flag() -> None:
    assert cut(Pieces("word", segmenter=list), "好\u200d🇨🇳人") == ["好\u200d🇨🇳", "人"]


@pytest.mark.parametrize(
    ("segmenter", "message"),
    [
        (lambda run: [run[1:]], "in order and unchanged"),
        (lambda run: [1, 2], "in order and unchanged"),
        (lambda run: None, "segmenter failed on '你好'.*TypeError"),
        (lambda run: 1 / 0, "segmenter failed on '你好'.*ZeroDivisionError"),
    ],
)
def test_a_bad_segmenter_is_named(segmenter: Any, message: str) -> None:
    with pytest.raises(UserError, match=message):
        Pieces("word", segmenter=segmenter).ends("你好", 0, done=True)


def test_a_function_says_where_pieces_end() -> None:
    asked: list[str] = []

    def commas(rest: str) -> int:
        asked.append(rest)
        return rest.find(",") + 1

    assert Pieces(commas).ends("x,a,b", 2, done=False) == [4]
    assert asked == ["a,b", "b"]
    assert Pieces(commas).ends("a,b", 0, done=True) == [2, 3]
    assert Pieces(lambda rest: len(rest) >= 3).ends("abcd", 0, done=False) == [4]
    assert Pieces(lambda rest: None).ends("abcd", 0, done=False) == []
    assert Pieces(lambda rest: None).ends("abcd", 0, done=True) == [4]


@pytest.mark.parametrize("answer", [-1, 4, 1.0, "yes"])
def test_an_answer_that_is_no_place_is_an_error(answer: Any) -> None:
    with pytest.raises(UserError, match="how many of its 3 characters"):
        Pieces(lambda rest: answer).ends("abc", 0, done=False)


def test_a_function_that_fails_is_named() -> None:
    def broken(rest: str) -> bool:
        raise KeyError("mood")

    with pytest.raises(UserError, match="broken failed on 'abc': KeyError: 'mood'"):
        Pieces(broken).ends("abc", 0, done=False)


@pytest.mark.parametrize("every", [0, -3, True, False, "words", "", None, 2.5, ["word"]])
def test_what_is_no_granularity_is_refused_with_the_ones_there_are(every: Any) -> None:
    with pytest.raises(UserError, match='"token", "word", "sentence", "line", "end", a positive number'):
        Pieces(every)


@pytest.mark.parametrize(("every", "by_tokens", "whole"), [("token", 1, False), (5, 5, False), ("end", None, True)])
def test_pieces_of_tokens_are_the_callers_to_count(every: str | int, by_tokens: int | None, whole: bool) -> None:
    pieces = Pieces(every)
    assert (pieces.by_tokens, pieces.whole) == (by_tokens, whole)
    if by_tokens:
        with pytest.raises(ValueError, match="counted in tokens"):
            pieces.ends("abc", 0, done=True)
