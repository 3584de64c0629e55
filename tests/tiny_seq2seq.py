"""Tiny encoder-decoder models, made on the spot: T5-, BART- and Marian-shaped, and two BERTs of different widths."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    BertConfig,
    BertLMHeadModel,
    BertModel,
    EncoderDecoderModel,
    MarianConfig,
    MarianMTModel,
    PreTrainedTokenizerFast,
    T5Config,
    T5ForConditionalGeneration,
)

from instant_reward.policies.seq2seq import Seq2SeqPolicy
from tiny import CONTEXT, END, PAD, STEP


def letters_tokenizer(letters: str = "abcde") -> PreTrainedTokenizerFast:
    """A few letters, a blank, and special tokens: so few that a random model's texts end at all lengths."""
    vocabulary = {letter: number for number, letter in enumerate([*letters, "Ġ"])}
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([END, STEP, PAD])
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token=END, pad_token=PAD)


TOKENIZER = letters_tokenizer()
IDS: dict[str, Any] = {
    "vocab_size": len(TOKENIZER),
    "eos_token_id": TOKENIZER.eos_token_id,
    "pad_token_id": TOKENIZER.pad_token_id,
    "bos_token_id": None,
}
STEP_ID: int = TOKENIZER.convert_tokens_to_ids(STEP)
SHAPE: dict[str, Any] = {
    "d_model": 16,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 2,
    "decoder_attention_heads": 2,
    "encoder_ffn_dim": 24,
    "decoder_ffn_dim": 24,
    "max_position_embeddings": CONTEXT,
    "init_std": 0.5,
}


def t5() -> Any:
    """Relative positions, tied and scaled embeddings; the padding token begins the texts."""
    config = T5Config(
        **IDS, d_model=16, d_kv=8, d_ff=24, num_layers=2, num_decoder_layers=3, num_heads=2,
        decoder_start_token_id=IDS["pad_token_id"], initializer_factor=0.8, relative_attention_num_buckets=8,
        relative_attention_max_distance=20,
    )  # fmt: skip
    return _norms(T5ForConditionalGeneration(config))


def t5_gated() -> Any:
    """As T5 1.1 has it: gated layers, an output head of its own, nothing scaled."""
    config = T5Config(
        **IDS, d_model=16, d_kv=8, d_ff=24, num_layers=2, num_decoder_layers=2, num_heads=2,
        decoder_start_token_id=IDS["pad_token_id"], initializer_factor=0.6, feed_forward_proj="gated-gelu",
        tie_word_embeddings=False, scale_decoder_outputs=False,
    )  # fmt: skip
    return _norms(T5ForConditionalGeneration(config))


def bart() -> Any:
    """Learned positions, a bias on the logits, a token that is forced behind the start."""
    config = BartConfig(**IDS, **SHAPE, decoder_start_token_id=IDS["eos_token_id"])
    model = BartForConditionalGeneration(config)
    model.generation_config.forced_bos_token_id = STEP_ID
    torch.nn.init.normal_(model.final_logits_bias)
    return model


def marian() -> Any:
    """Sinusoidal positions, a bias on the logits; the padding token begins the texts and is never written."""
    config = MarianConfig(**IDS, **SHAPE, decoder_start_token_id=IDS["pad_token_id"], scale_embedding=True)
    model = MarianMTModel(config)
    torch.nn.init.normal_(model.final_logits_bias)
    model.generation_config.bad_words_ids = [[IDS["pad_token_id"]]]
    return model


def berts() -> Any:
    """Two BERTs of different widths, a projection between them, BERT's transform before the head."""
    common = {"num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24, "initializer_range": 0.4}
    common |= {"vocab_size": IDS["vocab_size"], "pad_token_id": IDS["pad_token_id"]}
    encoder = BertConfig(**common, hidden_size=24, max_position_embeddings=CONTEXT)
    decoder = BertConfig(
        **common, hidden_size=16, max_position_embeddings=CONTEXT // 2, is_decoder=True, add_cross_attention=True
    )
    model = EncoderDecoderModel(encoder=BertModel(encoder), decoder=BertLMHeadModel(decoder))
    model.config.decoder_start_token_id = STEP_ID
    model.config.eos_token_id, model.config.pad_token_id = IDS["eos_token_id"], IDS["pad_token_id"]
    return model


KINDS: dict[str, Callable[[], Any]] = {"t5": t5, "t5-gated": t5_gated, "bart": bart, "marian": marian, "berts": berts}


def tiny_model(kind: str = "t5", seed: int = 0, dtype: torch.dtype = torch.float64) -> Any:
    """The same weights for the same seed."""
    torch.manual_seed(seed)
    model = KINDS[kind]().to(dtype).eval()
    return model


def tiny_seq2seq(kind: str = "t5", compute: torch.dtype = torch.float64, model: Any = None) -> Seq2SeqPolicy:
    """A policy around a tiny model: in float64, where rounding is far below what tests compare."""
    master = torch.float64 if compute == torch.float64 else torch.float32
    return Seq2SeqPolicy(tiny_model(kind, dtype=master) if model is None else model, TOKENIZER, compute)


def seq2seq_folder(path: Path, kind: str = "t5") -> Path:
    """A folder that ``load_policy`` loads, in float32."""
    tiny_model(kind, dtype=torch.float32).save_pretrained(path)
    TOKENIZER.save_pretrained(path)
    return path


def _norms(model: Any) -> Any:
    """Norms that compute in the weights' dtype: T5's own round to float32, also in a float64 model."""
    for parent in list(model.modules()):
        for name, norm in parent.named_children():
            if type(norm).__name__ == "T5LayerNorm":
                replacement = torch.nn.RMSNorm(norm.weight.shape, eps=norm.variance_epsilon)
                replacement.weight = norm.weight
                setattr(parent, name, replacement)
    return model
