"""Tiny language models, made on the spot: a few thousand random weights and a byte-level tokenizer.

``from tiny import tiny_folder, tiny_llama, tiny_policy, tiny_tokenizer``. Importing this sets torch to one thread.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

from instant_reward.policies.causal import CausalPolicy

torch.set_num_threads(1)

CONTEXT = 128
END, PAD, STEP = "<end>", "<pad>", "<step>"
WORDS = ["", "the", "movie", "was", "good", "bad", "fine", "slow", "long", "and", "but", "not", "a", "of", "it!"]
CHAT = (
    "{% for message in messages %}{{ message['role'] }}: {{ message['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant:{% endif %}"
)


def tiny_tokenizer(pad: bool = True) -> PreTrainedTokenizerFast:
    """Bytes, a few words with the space before them, ". " and "\\n\\n", and special tokens for the end and a step."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {character: number for number, character in enumerate(alphabet)}
    merges: dict[tuple[str, str], None] = {}
    for word in [*(f"Ġ{word}" for word in WORDS), ".Ġ", "ĊĊ", "ä½ł"]:  # the last is a Chinese character: 3 bytes
        grown = word[0]
        for character in word[1:]:
            merges[grown, character] = None
            grown += character
            vocabulary.setdefault(grown, len(vocabulary))
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=list(merges)))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([END, STEP, *([PAD] if pad else [])])
    options: dict[str, Any] = {"pad_token": PAD} if pad else {}
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token=END, chat_template=CHAT, **options)


@cache
def shared_tokenizer() -> PreTrainedTokenizerFast:
    """One tokenizer for all tests that do not change it."""
    return tiny_tokenizer()


def tiny_config(**changes: Any) -> dict[str, Any]:
    """What the configs of many Llama-like models take."""
    tokenizer = shared_tokenizer()
    fields: dict[str, Any] = {
        "vocab_size": len(tokenizer),
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "max_position_embeddings": CONTEXT,
        "bos_token_id": None,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
        "initializer_range": 0.3,  # large enough that the next tokens differ much in probability
    }
    return fields | changes


def tiny_llama(seed: int = 0, dtype: torch.dtype = torch.float64, **changes: Any) -> LlamaForCausalLM:
    """Grouped key heads, rotary positions, an output head of its own; biased towards words that can be read."""
    torch.manual_seed(seed)
    model = LlamaForCausalLM(LlamaConfig(**tiny_config(tie_word_embeddings=False, **changes))).to(dtype)
    return _readable(exact(model))


def exact(model: Any) -> Any:
    """Norms that compute in the weights' dtype: transformers' own round to float32, also in a float64 model."""
    for parent in list(model.modules()):
        for name, norm in parent.named_children():
            if type(norm).__name__.endswith("RMSNorm") and not isinstance(norm, torch.nn.RMSNorm):
                replacement = torch.nn.RMSNorm(norm.weight.shape, eps=norm.variance_epsilon)
                replacement.weight = norm.weight
                setattr(parent, name, replacement)
    return model


def tiny_gpt2(seed: int = 0, dtype: torch.dtype = torch.float64) -> GPT2LMHeadModel:
    """Learned positions, biases, the output head tied to the embeddings."""
    torch.manual_seed(seed)
    tokenizer = shared_tokenizer()
    config = GPT2Config(
        vocab_size=len(tokenizer),
        n_embd=32,
        n_layer=2,
        n_head=4,
        n_positions=CONTEXT,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        initializer_range=0.3,
        **{f"{part}_pdrop": 0.0 for part in ("attn", "embd", "resid")},
    )
    return _readable(GPT2LMHeadModel(config).to(dtype))


def tiny_own(kind: str, seed: int = 0, dtype: torch.dtype = torch.float64, **changes: Any) -> Any:
    """A model of the library's own ("recurrent", "transformer"): a projection behind LSTM cells, the head tied."""
    torch.manual_seed(seed)
    tokenizer = shared_tokenizer()
    shape: dict[str, Any] = {"cell_size": 40, "initializer_range": 0.6}
    if kind == "transformer":
        shape = {"num_hidden_layers": 2, "max_position_embeddings": CONTEXT, "initializer_range": 0.3}
    config = AutoConfig.for_model(
        kind,
        **{"vocab_size": len(tokenizer), "hidden_size": 32, **shape, **changes},
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return _readable(AutoModelForCausalLM.from_config(config).to(dtype))


def _readable(model: Any) -> Any:
    """Bytes that are no letters become unlikely, the end token likely enough that some texts end by themselves."""
    tokenizer = shared_tokenizer()
    weight = model.get_output_embeddings().weight
    alphabet = {character for character in pre_tokenizers.ByteLevel.alphabet() if ord(character) > 126} - {"Ġ", "Ċ"}
    unreadable = tokenizer.convert_tokens_to_ids(sorted(alphabet))
    with torch.no_grad():
        weight[unreadable] *= 0.1  # not 0: no two tokens may be equally likely
        weight[tokenizer.eos_token_id] *= 1.4
    return model.eval()


def tiny_policy(
    model: Any = None, compute: torch.dtype = torch.float64, tokenizer: Any = None, **changes: Any
) -> CausalPolicy:
    """A policy around a tiny model: in float64, where rounding is far below what tests compare."""
    master = torch.float64 if compute == torch.float64 else torch.float32
    made = tiny_llama(dtype=master, **changes) if model is None else model
    return CausalPolicy(made, shared_tokenizer() if tokenizer is None else tokenizer, compute)


def tiny_folder(path: Path, model: Any = None, tokenizer: Any = None) -> Path:
    """A folder that ``load_policy`` and ``from_pretrained`` load, in float32 where no model is given."""
    (tiny_llama(dtype=torch.float32) if model is None else model).save_pretrained(path)
    (shared_tokenizer() if tokenizer is None else tokenizer).save_pretrained(path)
    return path
