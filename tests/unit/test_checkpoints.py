"""Checkpoints of models whose weights stand in transformers' files under other names than their own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    PegasusConfig,
    PegasusForConditionalGeneration,
)

import choosing
from deciding import classifier_folder
from instant_reward.policies.causal import CausalPolicy
from instant_reward.policies.kinds import load_policy
from instant_reward.policies.masked import MaskedPolicy
from instant_reward.policies.optimizer import Optimization
from instant_reward.policies.policy import Policy
from instant_reward.types import UserError
from tiny import shared_tokenizer, tiny_config, tiny_llama, tiny_policy
from tiny_seq2seq import IDS, SHAPE, tiny_seq2seq


def causal(kind: str, **changes: Any) -> Policy:
    config = AutoConfig.for_model(kind, **{**tiny_config(), **changes})
    return CausalPolicy(AutoModelForCausalLM.from_config(config), shared_tokenizer())


def masked(kind: str = "xlm-roberta") -> MaskedPolicy:
    """Its output head is tied, and the file keeps the embeddings' name alone."""
    tokenizer = choosing.tiny_masked().tokenizer
    size = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 8}
    ids = {"vocab_size": len(tokenizer), "max_position_embeddings": 24, "pad_token_id": tokenizer.pad_token_id}
    config = AutoConfig.for_model(kind, **size, **ids, mask_token_id=tokenizer.mask_token_id)
    return MaskedPolicy(AutoModelForMaskedLM.from_config(config), tokenizer)


def test_positions_that_are_computed_are_never_learned(tmp_path: Path) -> None:
    """Pegasus builds them fixed, and transformers loads them as parameters: a resumed run had more of them."""
    config = PegasusConfig(**IDS, **SHAPE, decoder_start_token_id=IDS["pad_token_id"])
    policy = tiny_seq2seq(model=PegasusForConditionalGeneration(config).eval(), compute=torch.float32)
    policy.prepare(Optimization(learning_rate=0.1))
    policy.save_state(tmp_path)
    again = load_policy(str(tmp_path / "policy"))
    again.prepare(Optimization(learning_rate=0.1))
    fixed = {name for name, weight in again.model.named_parameters() if not weight.requires_grad}
    assert fixed == {f"model.{part}.embed_positions.weight" for part in ("encoder", "decoder")}
    again.load_state(tmp_path)


@pytest.mark.parametrize(
    "make",
    [
        lambda: causal("gpt_neox"),
        lambda: causal("mixtral", num_local_experts=2),
        lambda: causal("qwen3_moe", num_experts=2, num_experts_per_tok=1, moe_intermediate_size=8),
        masked,
    ],
    ids=["gpt_neox", "mixtral", "qwen3_moe", "xlm-roberta"],
)
def test_a_checkpoint_gives_back_every_weight(make: Any, tmp_path: Path) -> None:
    policy = make()
    policy.prepare(Optimization(learning_rate=0.1))
    with torch.no_grad():
        for weight in policy.model.parameters():
            weight.add_(torch.randn_like(weight))
    saved = {name: weight.detach().clone() for name, weight in policy.model.named_parameters()}
    policy.save_state(tmp_path)
    again = make()
    again.prepare(Optimization(learning_rate=0.1))
    again.load_state(tmp_path)
    found = dict(again.model.named_parameters())
    assert found.keys() == saved.keys()
    assert all(torch.equal(found[name], weight) for name, weight in saved.items())


def test_a_checkpoint_without_a_weight_is_refused(tmp_path: Path) -> None:
    """What transformers makes up for a weight that is not there is not taken for it."""
    policy = tiny_policy(tiny_llama(dtype=torch.float32, num_hidden_layers=1), torch.float32)
    policy.prepare(Optimization(learning_rate=0.1))
    policy.save_state(tmp_path)
    larger = tiny_policy(tiny_llama(dtype=torch.float32), torch.float32)
    with pytest.raises(UserError, match=r"has no weights for model\.layers\.1"):
        larger.load_weights(tmp_path)


def test_no_weight_of_a_masked_model_is_left_as_it_was_drawn(tmp_path: Path) -> None:
    """ESM's file has other names than its model, and ``load_state_dict`` would pass over them."""
    policy = masked("esm")
    with torch.no_grad():
        for name, weight in policy.model.named_parameters():
            if name != "lm_head.bias":  # which it adds behind the head: where that is not 0 the model is refused
                weight.add_(torch.randn_like(weight))
    policy.save(tmp_path)
    again = load_policy(str(tmp_path))
    found = dict(again.model.named_parameters())
    assert all(torch.equal(found[name], weight) for name, weight in policy.model.named_parameters())


@pytest.mark.parametrize("kind", ["causal", "masked", "extractive"])
def test_a_model_of_another_kind_is_not_completed_by_chance(kind: str, tmp_path: Path) -> None:
    """transformers draws what a folder has no weights for, and says no more than a warning."""
    folder = classifier_folder(tmp_path)
    with pytest.raises(UserError, match="it is a model of another kind"):
        load_policy(str(folder), kind=kind)


def test_a_trunk_without_an_output_head_is_no_language_model(tmp_path: Path) -> None:
    """As models that embed texts are saved: their head would be drawn by chance."""
    model = tiny_llama(dtype=torch.float32)
    model.model.save_pretrained(tmp_path)
    shared_tokenizer().save_pretrained(tmp_path)
    with pytest.raises(UserError, match=r"no weights for lm_head\.weight"):
        load_policy(str(tmp_path))


def test_a_critic_of_another_kind_is_refused(tmp_path: Path) -> None:
    """Its sizes are a new config's, which may be the policy's."""
    policy = choosing.tiny_extractive(buckets=8192, max_sentences=32)
    policy.compute = torch.float32
    with pytest.raises(UserError, match="it is a model of another kind"):
        policy.load_beside(str(classifier_folder(tmp_path)), "algorithm.critic.model")
