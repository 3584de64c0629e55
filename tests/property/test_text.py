"""Sampled ids to characters: the same text as ``tokenizer.decode``, whatever the tokenizer, wherever it ends."""

from __future__ import annotations

import unicodedata
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers
from tokenizers import Tokenizer as Backend
from transformers import AutoTokenizer, ByT5Tokenizer, PreTrainedTokenizerFast

from instant_reward.models import locate
from instant_reward.text import Pieces, TextDecoder, token_range

# Some of these are several code points: keep them apart (no normalising).
NASTY = [
    "movie", " was", " ", "\n", "  ", ".", "'s", "你", "好", "世界", "。", "e\u0301", "é", "\u0301", "👍🏽",
    "👨\u200d👩\u200d👧", "🇨🇳", "🇩", "❤\ufe0f", "สวัสดี", "กำ", "مرحبا", "한국", "\u200d", "\U0001f1e8", "𝔘",
    "\ufffd", "\x00", "Ġ", "<x>", "日本",
]  # fmt: skip
BYTES = [0x80, 0xBF, 0xC3, 0xA9, 0xE4, 0xBD, 0xA0, 0xF0, 0x9F, 0x98, 0x80, 0xED, 0xA0, 0xC0, 0xFF, 0x41]


def byte_alphabet() -> list[str]:
    """The printable characters that stand for the bytes 0 to 255, in this order."""
    hidden = iter(range(256, 512))
    visible = {*range(33, 127), *range(161, 173), *range(174, 256)}
    return [chr(byte) if byte in visible else chr(next(hidden)) for byte in range(256)]


def byte_level() -> Any:
    alphabet = byte_alphabet()
    assert sorted(alphabet) == sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {char: i for i, char in enumerate(alphabet)}
    merges = []
    for word in ("ab", " you", "你", "é", "👍", "\u200d"):  # a part of each character is a token of its own
        units = [alphabet[byte] for byte in word.encode()]
        while len(units) > 1 and (len(units) > 2 or word == " you"):
            merges.append((units[0], units[1]))
            units[:2] = [units[0] + units[1]]
            vocabulary.setdefault(units[0], len(vocabulary))
    backend = Backend(models.BPE(vocab=vocabulary, merges=list(dict.fromkeys(merges))))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(["<end>", "<pad>"])
    # Added tokens: raw text with characters outside the byte table, and "é", which the backend takes for one byte.
    backend.add_tokens([AddedToken("日本", normalized=False), AddedToken("<x> ", normalized=False), AddedToken("é")])
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<end>", pad_token="<pad>")


def byte_fallback() -> Any:
    """Llama 2's shape: pieces with a space mark, bytes for all else, and the first space stripped."""
    names = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    names += ["▁", "▁▁", "▁movie", "▁was", "movie", "was", "你", "世界", ".", "\n", "a", "▁a", "\u0301", "\ufffd", "👍"]
    backend = Backend(models.BPE({n: i for i, n in enumerate(names)}, [], unk_token="<unk>", byte_fallback=True))
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    backend.add_special_tokens(["<s>", "</s>"])
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


def unigram() -> Any:
    """T5's shape: a space mark, the first one dropped."""
    names = ["<pad>", "</s>", "<unk>", "▁", "▁movie", "▁was", "ing", "你", "好", ".", "\u0301", "e", "👍", "▁a", " "]
    backend = Backend(models.Unigram([(name, -float(i)) for i, name in enumerate(names)], 2))
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    backend.decoder = decoders.Metaspace()
    backend.add_special_tokens(["<pad>", "</s>"])
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>", pad_token="<pad>", unk_token="<unk>")


def word_piece() -> Any:
    names = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "the", "movie", "##s", "##ing", "was", ".", ",", "'", "s", "n't", "你"]
    backend = Backend(models.WordPiece({n: i for i, n in enumerate(names)}, unk_token="[UNK]"))
    backend.normalizer = normalizers.BertNormalizer()
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    backend.decoder = decoders.WordPiece()
    backend.add_special_tokens(["[PAD]", "[CLS]", "[SEP]"])
    return PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="[UNK]", pad_token="[PAD]")


def word_ends() -> Any:
    """The first GPT's shape: a mark at the end of each word, which the last token of a text does not show."""
    names = ["<unk>", "mov", "ie</w>", "was</w>", "a", "a</w>", "你</w>", ".</w>", "<end>"]
    backend = Backend(models.BPE({n: i for i, n in enumerate(names)}, [], end_of_word_suffix="</w>"))
    backend.decoder = decoders.BPEDecoder()
    backend.add_special_tokens(["<end>"])
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<end>")


class Written:
    """The least a tokenizer can be: a list of strings, joined and then changed by a rule."""

    def __init__(self, names: list[str], rule: Callable[[list[str]], str]) -> None:
        self.names, self.rule, self.all_special_ids = names, rule, [0]

    def __len__(self) -> int:
        return len(self.names)

    def __call__(self, text: str) -> list[int]:
        return [self.names.index(char) for char in text if char in self.names]

    def decode(self, token_ids: Sequence[int], **options: Any) -> str:
        assert options == {"skip_special_tokens": True, "clean_up_tokenization_spaces": False}
        return self.rule([self.names[i] for i in token_ids if i not in self.all_special_ids])


def characters() -> Any:
    return Written(["<end>", *"abc .\n你好é👍\u0301"], "".join)


def joined_parts() -> Any:
    """A mark at the end of a token that goes on: the next token changes the end of the text."""
    names = ["<end>", "mov@@", "ie", "was", "a@@", "a", "你@@", "好", "."]
    return Written(names, lambda parts: " ".join(parts).replace("@@ ", ""))


def stripped() -> Any:
    """Leaves out white space at the start, and has a token without any character."""
    return Written(["<end>", "", " ", "a", " a", "\n"], lambda parts: "".join(parts).lstrip())


def hidden_bytes() -> Any:
    """A byte-level tokenizer of which nothing is known but its decoding."""
    made = byte_level()
    names = [made.convert_ids_to_tokens(i) for i in range(len(made))]
    return Written(
        ["<end>", *names], lambda parts: made.decode(made.convert_tokens_to_ids(parts), skip_special_tokens=True)
    )


MAKERS = {
    "smollm2": cache(lambda: AutoTokenizer.from_pretrained(locate("smollm2-135m"))),
    "byt5": cache(ByT5Tokenizer),
    **{
        made.__name__: cache(made)
        for made in (
            byte_level,
            byte_fallback,
            unigram,
            word_piece,
            word_ends,
            characters,
            joined_parts,
            stripped,
            hidden_bytes,
        )
    },
}
BYTE_LEVEL = ["smollm2", "byte_level"]


@cache
def decoder(name: str) -> TextDecoder:
    return TextDecoder(MAKERS[name]())


def decode(name: str, token_ids: Sequence[int]) -> str:
    return MAKERS[name]().decode(token_ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)


@cache
def chosen_ids(name: str) -> list[int]:
    """Ids that do harm: lone bytes, special tokens, added tokens."""
    tokenizer = MAKERS[name]()
    found = list(tokenizer.all_special_ids)
    if hasattr(tokenizer, "get_vocab"):
        names = [byte_alphabet()[byte] for byte in BYTES] + [f"<0x{byte:02X}>" for byte in BYTES]
        names += [chr(byte) for byte in BYTES] + ["日本", "<x> ", "é", "▁", "a", "</w>"]
        found += [i for n in names if (i := tokenizer.get_vocab().get(n)) is not None]
    return found


@st.composite
def ids_of(draw: st.DrawFn, name: str) -> list[int]:
    """Random ids, harmful ids and tokenized text in turns, cut anywhere."""
    tokenizer = MAKERS[name]()
    part = st.one_of(
        st.lists(st.sampled_from(chosen_ids(name)), max_size=6),
        st.lists(st.integers(0, len(tokenizer) - 1), max_size=12),
        st.lists(st.sampled_from(NASTY), max_size=8).map(lambda parts: encode(name, "".join(parts))),
    )
    ids = [i for ids in draw(st.lists(part, max_size=6)) for i in ids]
    return ids[: draw(st.integers(0, len(ids)))] if draw(st.booleans()) else ids


def encode(name: str, text: str) -> list[int]:
    made = MAKERS[name]()
    return made(text) if isinstance(made, Written) else made(text, add_special_tokens=False)["input_ids"]


@pytest.mark.parametrize("name", MAKERS)
@settings(max_examples=50, deadline=None)
@given(data=st.data())
def test_all_characters_together_are_the_tokenizers_text(name: str, data: st.DataObject) -> None:
    ids = data.draw(ids_of(name))
    text, ends = decoder(name).char_ends(ids)
    assert text == decode(name, ids)
    assert len(ends) == len(ids)
    assert ends == sorted(ends)
    assert (ends[-1] if ends else 0) == len(text)
    if name in BYTE_LEVEL:
        assert decoder(name)._table is not None  # the fast way is the one under test


@pytest.mark.parametrize("name", MAKERS)
@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_a_text_may_end_after_any_token(name: str, data: st.DataObject) -> None:
    """A copy flushed after each token shows that token's text; the stream itself is not disturbed."""
    ids = data.draw(ids_of(name))
    stream, shown = decoder(name).stream(), ""
    for t, token_id in enumerate(ids, start=1):
        new = stream.push(token_id)
        shown += new
        held = stream.copy().flush()
        stream.copy().push(ids[0])
        assert shown + held == decode(name, ids[:t])
        if name in BYTE_LEVEL:
            # Nothing is held back but one unfinished character (of half a surrogate pair, Python holds two bytes).
            assert held in ("", "\ufffd", "\ufffd\ufffd")
            assert token_id not in MAKERS[name]().all_special_ids or new == ""
    assert shown == decoder(name).char_ends(ids, done=False)[0]


@pytest.mark.parametrize("name", ["smollm2", "byte_level", "byt5"])
@settings(max_examples=60, deadline=None)
@given(text=st.lists(st.sampled_from([*{*NASTY} - {"Ġ", "é", "日本", "\ufffd"}]), max_size=12).map("".join))
def test_no_half_character_is_ever_shown(name: str, text: str) -> None:
    """Every prefix of a text's ids shows whole characters only, and all that are whole."""
    ids = encode(name, text)
    whole, ends = decoder(name).char_ends(ids)
    assert whole == text
    for t, end in enumerate(ends, start=1):
        assert text[:end] == decode(name, ids[:t]).rstrip("\ufffd")


def test_bytes_join_over_a_special_token_as_in_the_backend() -> None:
    made, special = MAKERS["smollm2"](), MAKERS["smollm2"]().eos_token_id
    first, *rest = encode("smollm2", "你好")
    assert len(rest) == 3
    assert decoder("smollm2").char_ends([first, special, *rest]) == ("你好", [0, 0, 1, 1, 2])
    assert decoder("smollm2").char_ends([first, special]) == ("\ufffd", [0, 1])
    assert decoder("smollm2").char_ends([first, special], done=False) == ("", [0, 0])
    assert decoder("smollm2").char_ends([]) == ("", [])
    assert (
        decoder("smollm2").char_ends([len(made) + 7, *rest[1:], rest[0]])[0].startswith("好")
    )  # an id without a token


def test_a_run_of_fallback_bytes_is_certain_when_it_is_over() -> None:
    """One bad byte makes the whole run unreadable, so nothing of it may be shown before."""
    made = MAKERS["byte_fallback"]()
    you = made.convert_tokens_to_ids(["<0xE4>", "<0xBD>", "<0xA0>"])
    bad, movie = made.convert_tokens_to_ids(["<0xFF>", "movie"])
    assert decoder("byte_fallback").char_ends([*you, movie]) == ("你movie", [0, 0, 0, 6])
    assert decoder("byte_fallback").char_ends([*you, bad, movie]) == ("\ufffd" * 4 + "movie", [0, 0, 0, 0, 9])


def test_a_joining_mark_shows_only_what_the_next_token_left_alone() -> None:
    made = MAKERS["joined_parts"]()
    ids = [made.names.index(name) for name in ("mov@@", "ie", "was", "a@@", "a")]
    stream = decoder("joined_parts").stream()
    assert [stream.push(i) for i in ids] == ["", "mov", "ie", " was", " a"]
    assert stream.flush() == "a"


def test_tokens_without_characters_do_not_use_up_the_context() -> None:
    made = MAKERS["stripped"]()
    letter, nothing, spaced = (made.names.index(name) for name in ("a", "", " a"))
    ids = [letter, *[nothing] * 60, spaced]
    assert decoder("stripped").char_ends(ids) == ("a a", [1] * 61 + [3])


def test_a_tokenizer_that_changes_its_backends_text_is_decoded_by_itself() -> None:
    made = byte_level()
    plain = made.decode
    made.decode = lambda ids, **options: plain(ids, **options).replace("A", "\u00e5")
    ids = made("A ABC").input_ids
    assert TextDecoder(made).char_ends(ids)[0] == "\u00e5 \u00e5BC"


@pytest.mark.parametrize("name", ["byte_fallback", "unigram", "word_piece", "word_ends", "characters", "joined_parts"])
def test_a_long_text_is_decoded_in_short_windows(name: str) -> None:
    fresh, seen = TextDecoder(MAKERS[name]()), []
    shared = fresh._windows
    assert shared is not None
    ids = [i for i in range(len(MAKERS[name]())) if i not in shared.special and not shared.holds(i)] * 30
    ids = [i for i in ids if decode(name, [i]) != "\ufffd"]
    stream, real = fresh.stream(), shared.decode
    shared.decode = lambda token_ids: seen.append(len(token_ids)) or real(token_ids)  # type: ignore[method-assign]
    shown = "".join(stream.push(i) for i in ids)
    assert len(ids) > 200
    assert max(seen) < 40
    assert shown + stream.flush() == decode(name, ids)


# --- tokens of characters -------------------------------------------------------------------------------------------


def carriers(char_ends: Sequence[int], first: int, start: int, end: int) -> list[int]:
    """The tokens that carry the characters, found one by one: a zero-width token carries the character after it."""
    found = []
    for t in range(first, len(char_ends)):
        low = char_ends[t - 1] if t > first else 0
        reached = next((count for count in char_ends[t:] if count > low), None)
        if reached is not None and (low < end and reached > start if char_ends[t] > low else start <= low < end):
            found.append(t)
    return found


@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_token_range_is_what_carries_the_characters(data: st.DataObject) -> None:
    widths = data.draw(st.lists(st.integers(0, 3), min_size=1, max_size=12).filter(any))
    first = data.draw(st.integers(0, 3))
    ends = [0] * first + [sum(widths[: i + 1]) for i in range(len(widths))]
    start = data.draw(st.integers(0, ends[-1] - 1))
    end = data.draw(st.integers(start + 1, ends[-1]))
    s, e = token_range(ends, first, start, end)
    assert list(range(s, e)) == carriers(ends, first, start, end)


@pytest.mark.parametrize(("start", "end"), [(0, 0), (2, 1), (-1, 1), (0, 4)])
def test_token_range_refuses_characters_that_are_not_there(start: int, end: int) -> None:
    with pytest.raises(ValueError, match="of 3 characters"):
        token_range([0, 0, 1, 3], 2, start, end)


@pytest.mark.parametrize("every", ["word", "sentence", "line"])
@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_pieces_of_real_tokens_cover_them_in_order(every: str, data: st.DataObject) -> None:
    """Each token that carries characters belongs to a piece; two pieces share at most the token between them."""
    ids = data.draw(ids_of("smollm2"))
    text, ends = decoder("smollm2").char_ends(ids)
    start, before, covered = 0, 0, set()
    for end in Pieces(every).ends(text, 0, done=True):
        s, e = token_range(ends, 0, start, end)
        assert s >= before - 1
        covered |= set(range(s, e))
        start, before = end, e
    carrying = [t for t, count in enumerate(ends) if count < len(text)]
    assert covered >= set(carrying)


def test_clusters_in_the_list_are_what_they_say() -> None:
    """The nasty strings keep their marks apart: a normalising editor would take the point of these tests away."""
    assert "e\u0301" in NASTY
    assert unicodedata.normalize("NFC", "e\u0301") == "é"
    assert len("👨\u200d👩\u200d👧") == 5
