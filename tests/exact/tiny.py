"""Tiny models made on the spot, with a tokenizer of characters: real trunks, caches and heads in milliseconds."""

from __future__ import annotations

import string
from collections.abc import Sequence
from functools import cache
from typing import Any, Literal

import torch
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from instant_reward.policies.causal import CausalPolicy
from instant_reward.sampling.draw import Settings
from instant_reward.sampling.engine import Engine, in_order
from instant_reward.types import Prompt, Rollout

Kind = Literal["llama", "gpt2"]


class Characters:
    """A tokenizer with one token a character, some of two, and an end token that shows nothing."""

    eos_token_id = 0
    pad_token_id = 0
    all_special_ids = (0,)

    def __init__(self) -> None:
        self._tokens = ["", *string.ascii_letters, " ", ".", " t", " a", "\n"]

    def decode(self, token_ids: Sequence[int], **_: Any) -> str:
        return "".join(self._tokens[token] for token in token_ids)

    def __len__(self) -> int:
        return len(self._tokens)


@cache
def _model(kind: Kind) -> Any:
    torch.manual_seed(7)
    vocabulary = len(Characters())
    if kind == "llama":
        model: Any = LlamaForCausalLM(
            LlamaConfig(
                vocab_size=vocabulary,
                hidden_size=32,
                intermediate_size=48,
                num_hidden_layers=2,
                num_attention_heads=4,
                num_key_value_heads=2,
                max_position_embeddings=128,
                bos_token_id=None,
                eos_token_id=0,
                pad_token_id=0,
            )
        )
    else:
        model = GPT2LMHeadModel(
            GPT2Config(
                vocab_size=vocabulary, n_embd=32, n_layer=2, n_head=4, n_positions=128, bos_token_id=0, eos_token_id=0
            )
        )
    with torch.no_grad():
        for parameter in model.parameters():  # far from uniform, as a trained model is
            parameter.add_(torch.randn_like(parameter) * 0.15)
    return model


def policy(kind: Kind, dtype: torch.dtype = torch.float64) -> CausalPolicy:
    """The same weights each time, in a model of its own."""
    import copy

    return CausalPolicy(copy.deepcopy(_model(kind)).to(dtype), Characters(), compute=dtype)


def prompts(*lengths: int) -> list[Prompt]:
    """Prompts of so many tokens."""
    made = []
    for number, length in enumerate(lengths):
        ids = [1 + (number * 17 + 5 * t) % 55 for t in range(length)]
        made.append(Prompt(f"p{number}", Characters().decode(ids), ids))
    return made


def sample(
    of: CausalPolicy, prompts: Sequence[Prompt], settings: Settings, per_prompt: int, rewards: Sequence[Any] = ()
) -> list[Rollout]:
    """Rollouts in the order of their prompts."""
    return in_order(Engine(of, settings).stream(prompts, per_prompt, rewards, seed=3))
