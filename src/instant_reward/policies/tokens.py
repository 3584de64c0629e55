"""Tokenizers trained on a user's own texts: byte-level BPE, WordPiece, characters, words; the same texts, the same one.

What ``decode(encode(text))`` gives back, special tokens skipped:

=========== ===========================================================================================================
bpe         the text, whatever is in it: every byte is a token, so that nothing is unknown
character   the text, without the characters that came up too seldom in training
wordpiece   the text, without the words that hold such a character, or that have more than 100 characters
word        the text, without the words that came up too seldom, and without the stop words
=========== ===========================================================================================================

With ``lower`` everything comes back in lower case. Spaces are part of the tokens ("the", " film"): nothing is put
between Chinese characters, and a text comes back with the spaces and line breaks it had. In scripts without spaces
between words (Chinese, Japanese, Thai, ...) a character is a word.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Sequence
from itertools import chain
from typing import Any, Literal

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from instant_reward.types import UserError

Kind = Literal["bpe", "wordpiece", "character", "word"]
Form = Literal["causal", "seq2seq", "encoder"]

PAD, END, BEGIN, UNKNOWN, SEPARATOR, CLASS, MASK = "<pad>", "<eos>", "<bos>", "<unk>", "<sep>", "<cls>", "<mask>"
CONTINUED = "##"  # begins a WordPiece token that does not begin a word

_LETTER = r"\p{L}\p{M}\p{N}"
_SPACELESS = r"\p{Han}\p{Hiragana}\p{Katakana}\p{Thai}\p{Lao}\p{Khmer}\p{Myanmar}"
# A character of a script without spaces; a word or a sign with the space before it; any other white space.
_WORD = rf"[{_SPACELESS}]| ?[{_LETTER}&&[^{_SPACELESS}]]+| ?[^\s{_LETTER}{_SPACELESS}]|\s"
_CHARACTER = r"[\s\S]"


def train_tokenizer(
    texts: Iterable[str],
    kind: Kind = "bpe",
    vocabulary: int = 4000,
    *,
    minimum: int = 2,
    lower: bool = False,
    stop_words: Sequence[str] = (),
    form: Form = "causal",
) -> PreTrainedTokenizerFast:
    """A tokenizer for these texts.

    Args:
        texts: read once or twice; an iterator is kept in memory, a list or an object that begins anew is not copied.
        vocabulary: how many tokens it has at most, the special ones included.
        minimum: how often a pair of pieces (bpe), a piece, a word or a character must come up to become a token.
        lower: everything in lower case.
        stop_words: words that are left out wherever they stand alone, in any case; of kind "word".
        form: "causal" puts <bos> before a text, "seq2seq" <eos> behind it, "encoder" puts <cls> before and <sep>
            behind it and between two texts, and knows <mask>. All know <pad>, <eos>, <bos> and <unk>.

    Raises:
        UserError: there is no text, or the vocabulary is too small to hold anything but special tokens.
    """
    names = [PAD, END, BEGIN, UNKNOWN, *((SEPARATOR, CLASS, MASK) if form == "encoder" else ())]
    # A space is part of the word behind it, so it is part of a mask as well: "was <mask>" is a mask right behind "was".
    special = [AddedToken(one, lstrip=one == MASK and kind != "character", special=True) for one in names]
    least = len(special) + (256 if kind == "bpe" else 1)
    if vocabulary < least:
        bytes_too = "256 bytes and " if kind == "bpe" else ""
        raise UserError(
            f"tokenizer.vocabulary is {vocabulary}: {bytes_too}{len(special)} special tokens need {least} or more."
        )
    if stop_words and kind != "word":
        raise UserError(f"tokenizer.stop_words are left out by kind word alone, not by {kind}: leave them out.")
    texts = texts if isinstance(texts, Sequence) or iter(texts) is not texts else list(texts)
    backend = _trained(texts, kind, vocabulary, minimum, lower, stop_words, special)
    if backend.get_vocab_size() == len(special):
        raise UserError(
            f"tokenizer: nothing came up {minimum} times in the texts: give more texts, or lower tokenizer.minimum."
        )
    backend.post_processor = _template(form, backend)
    options: dict[str, Any] = {}
    if form == "encoder":
        options = {"sep_token": SEPARATOR, "cls_token": CLASS, "mask_token": special[-1]}
    inputs = ["input_ids", *(["token_type_ids"] if form == "encoder" else []), "attention_mask"]
    fast: Any = PreTrainedTokenizerFast  # which is not typed
    made: PreTrainedTokenizerFast = fast(
        tokenizer_object=backend,
        pad_token=PAD,
        eos_token=END,
        bos_token=BEGIN,
        unk_token=UNKNOWN,
        clean_up_tokenization_spaces=False,
        model_input_names=inputs,
        **options,
    )
    return made


def _trained(
    texts: Iterable[str],
    kind: Kind,
    vocabulary: int,
    minimum: int,
    lower: bool,
    stop_words: Sequence[str],
    special: list[AddedToken],
) -> Tokenizer:
    settings: dict[str, Any] = {"special_tokens": special, "show_progress": False}
    if kind == "bpe":
        backend = Tokenizer(models.BPE())
        backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        backend.decoder = decoders.ByteLevel()
        settings |= {"initial_alphabet": pre_tokenizers.ByteLevel.alphabet()}
        trainer: Any = trainers.BpeTrainer(vocab_size=vocabulary, min_frequency=minimum, **settings)
    else:
        backend = Tokenizer(models.WordLevel(unk_token=UNKNOWN))
        backend.pre_tokenizer = _cuts(_CHARACTER if kind == "character" else _WORD, stop_words)
        backend.decoder = decoders.Fuse()
        trainer = trainers.WordLevelTrainer(vocab_size=vocabulary, min_frequency=minimum, **settings)
    if lower:
        backend.normalizer = normalizers.Lowercase()
    if kind == "wordpiece":
        return _word_pieces(texts, backend, vocabulary, minimum, special)
    backend.train_from_iterator(texts, trainer)
    return backend


def _cuts(pattern: str, stop_words: Sequence[str]) -> Any:
    """Cuts a text at each match, once the stop words are out."""
    cut = pre_tokenizers.Split(Regex(pattern), "isolated")
    if not stop_words:
        return cut
    # A word of letters is left out only where no other letter touches it; between Chinese ones there are no borders.
    words = sorted(set(stop_words), key=lambda word: (-len(word), word))
    bare = "|".join(re.escape(word) for word in words if _stands_alone(cut, word[0]))
    lettered = "|".join(re.escape(word) for word in words if not _stands_alone(cut, word[0]))
    bordered = rf" ?(?<![{_LETTER}])(?:{lettered})(?![{_LETTER}])"
    either = "|".join([*([bordered] if lettered else []), *([f"(?:{bare})"] if bare else [])])
    return pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(f"(?i:{either})"), "removed"), cut])


def _word_pieces(
    texts: Iterable[str], backend: Tokenizer, vocabulary: int, minimum: int, special: list[AddedToken]
) -> Tokenizer:
    """WordPiece whose tokens are the commonest pieces that BPE cuts the words into.

    The library's own trainer numbers its pieces by the order of a hash table, and another run gives other ones.
    """
    words: Counter[str] = Counter()
    for text in texts:
        shown = text if backend.normalizer is None else backend.normalizer.normalize_str(text)
        words.update(word for word, _ in backend.pre_tokenizer.pre_tokenize_str(shown))
    pairs = Tokenizer(models.BPE())
    pairs.pre_tokenizer = pre_tokenizers.Split(Regex(_WORD), "isolated")
    pairs.train_from_iterator(
        chain.from_iterable([word] * count for word, count in sorted(words.items())),
        trainers.BpeTrainer(vocab_size=vocabulary, min_frequency=minimum, show_progress=False),
    )
    pieces: Counter[str] = Counter()
    listed = sorted(words)
    for word, found in zip(listed, pairs.encode_batch(listed), strict=True):
        for piece, (start, _) in zip(found.tokens, found.offsets, strict=True):
            pieces[CONTINUED + piece if start else piece] += words[word]
    # Every character begins words and goes on with them, so that each word of known characters can be spelled.
    characters: Counter[str] = Counter()
    for word, count in words.items():
        for character in word:
            characters[character] += count
    for character, count in characters.items():
        pieces[character] = count
        if not _stands_alone(backend.pre_tokenizer, character):
            pieces[CONTINUED + character] = count
    ranked = sorted(pieces, key=lambda piece: (not _one(piece), -pieces[piece], piece))
    kept = [piece for piece in ranked if pieces[piece] >= minimum][: vocabulary - len(special)]
    vocab = {token: number for number, token in enumerate([*(one.content for one in special), *kept])}
    made = Tokenizer(models.WordPiece(vocab=vocab, unk_token=UNKNOWN, continuing_subword_prefix=CONTINUED))
    made.normalizer, made.pre_tokenizer = backend.normalizer, backend.pre_tokenizer
    made.decoder = decoders.Sequence([decoders.Replace(Regex(f"^{CONTINUED}"), ""), decoders.Fuse()])
    made.add_special_tokens(special)
    return made


def _stands_alone(cut: Any, character: str) -> bool:
    """Whether a character is never a part of a longer word: one of a script without spaces, or white space."""
    return len(cut.pre_tokenize_str(f" {character}")) > 1


def _one(piece: str) -> bool:
    """Whether a piece is one character."""
    return len(piece.removeprefix(CONTINUED)) == 1


def _template(form: Form, backend: Tokenizer) -> Any:
    """What a text gets around it."""
    single, pair = {
        "causal": (f"{BEGIN} $A", f"{BEGIN} $A $B"),
        "seq2seq": (f"$A {END}", f"$A $B {END}"),
        "encoder": (f"{CLASS} $A {SEPARATOR}", f"{CLASS} $A {SEPARATOR} $B:1 {SEPARATOR}:1"),
    }[form]
    around = [token for token in (BEGIN, END, CLASS, SEPARATOR) if backend.token_to_id(token) is not None]
    numbers = [(token, backend.token_to_id(token)) for token in around]
    return processors.TemplateProcessing(single=single, pair=pair, special_tokens=numbers)
