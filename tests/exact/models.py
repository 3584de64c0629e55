"""Tiny models whose every operation is in float64, and texts sampled from them by the decoding engine."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from functools import cache
from typing import Any, Literal

import torch

from instant_reward.policies.causal import CausalPolicy
from instant_reward.sampling.draw import Settings
from instant_reward.sampling.engine import Engine
from instant_reward.sampling.sampler import in_order
from instant_reward.types import Prompt, Rollout
from tiny import shared_tokenizer, tiny_gpt2, tiny_llama, tiny_policy

Kind = Literal["llama", "gpt2"]


@cache
def _model(kind: Kind) -> Any:
    model: Any = tiny_gpt2() if kind == "gpt2" else tiny_llama()
    with torch.no_grad():  # the end token's chance swings more: where it is forbidden, that must matter
        model.get_output_embeddings().weight[shared_tokenizer().eos_token_id] *= 2.0
    for module in list(model.modules()):
        for name, child in module.named_children():
            if type(child).__name__ == "LlamaRMSNorm":  # it computes in float32: at 1e-10 that would be all one sees
                setattr(module, name, torch.nn.RMSNorm(child.weight.shape, eps=child.variance_epsilon).double())
    return model


def policy(kind: Kind = "llama", dtype: torch.dtype = torch.float64) -> CausalPolicy:
    """The same weights each time, in a model of its own."""
    return tiny_policy(copy.deepcopy(_model(kind)).to(dtype), dtype)


def prompts(*lengths: int) -> list[Prompt]:
    """Prompts of so many tokens."""
    made = []
    for number, length in enumerate(lengths):
        ids = [60 + (number * 17 + 5 * t) % 30 for t in range(length)]
        made.append(Prompt(f"p{number}", shared_tokenizer().decode(ids), ids))
    return made


def sample(
    of: CausalPolicy, prompts: Sequence[Prompt], settings: Settings, per_prompt: int, rewards: Sequence[Any] = ()
) -> list[Rollout]:
    """Rollouts in the order of their prompts."""
    return in_order(Engine(of, settings).stream(prompts, per_prompt, rewards, seed=3))
