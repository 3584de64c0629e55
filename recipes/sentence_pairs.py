"""Chinese-English sentence pairs of the HSK levels, and a small encoder-decoder trained on them on the spot.

    data: {use: "recipes/sentence_pairs.py:pairs", args: {split: train}}

The pairs are those of the package hsk-sentences-audio (CC-BY-SA 4.0): loaded, never copied.
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

from instant_reward.types import UserError

HELD_OUT = 12  # one pair in so many, by the hash of its source


def pairs(split: str = "train", limit: int | None = None) -> list[dict[str, Any]]:
    """Rows with ``prompt`` (Chinese) and ``reference`` (English); equal sources stand on one side only.

    Args:
        split: "train" or "held_out".
    """
    if split not in ("train", "held_out"):
        raise UserError(f"pairs: split is {split!r}: give train or held_out")
    try:
        from hsk_sentences_audio import load_sentences  # type: ignore[import-not-found, unused-ignore]
    except ModuleNotFoundError as error:
        raise UserError("pairs: the sentences are in a package; run: pip install hsk-sentences-audio") from error
    found = {row["chinese"]: row["translation"]["en"] for row in load_sentences()}
    order = sorted(found.items(), key=lambda pair: hashlib.sha256(pair[0].encode()).digest())
    chosen = [pair for number, pair in enumerate(order) if (number % HELD_OUT == 0) == (split == "held_out")]
    return [{"prompt": source, "reference": target} for source, target in chosen][:limit]


def tokenizer(vocabulary: int = 2500) -> Any:
    """Byte-level BPE, trained on the training pairs."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=["<pad>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator((text for row in pairs() for text in row.values()), trainer)
    end = backend.token_to_id("</s>")
    backend.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", end)])
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>", pad_token="<pad>")


def untrained(folder: Path, seed: int = 0, width: int = 128, layers: int = 2) -> Path:
    """Writes a T5-shaped model with random weights, and its tokenizer."""
    import torch
    from transformers import T5Config, T5ForConditionalGeneration

    torch.manual_seed(seed)
    words = tokenizer()
    config = T5Config(
        vocab_size=len(words),
        d_model=width,
        d_kv=width // 4,
        d_ff=3 * width,
        num_layers=layers,
        num_heads=4,
        dropout_rate=0.2,
        pad_token_id=words.pad_token_id,
        eos_token_id=words.eos_token_id,
        decoder_start_token_id=words.pad_token_id,
    )
    T5ForConditionalGeneration(config).save_pretrained(folder)
    words.save_pretrained(folder)
    return folder
