"""Tiny policies that choose sentences and that fill masks, made on the spot, and all texts that they can make."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from torch import Tensor
from transformers import BertConfig, BertForMaskedLM, PreTrainedTokenizerFast

from instant_reward.policies.decisions import DecisionPolicy
from instant_reward.policies.extractive import ExtractivePolicy, new_extractive
from instant_reward.policies.masked import MaskedPolicy, add_order, masked_with_lora
from instant_reward.policies.sentences import SentencesConfig, SentencesModel
from instant_reward.policies.tokens import train_tokenizer
from instant_reward.types import Prompt, Rollout

torch.set_num_threads(1)

SPECIAL = ["[PAD]", "[CLS]", "[SEP]", "[MASK]", "[UNK]"]
WORDS = [*SPECIAL, "a", "b", "c"]
DOCUMENTS = ["One cat sat. Two dogs ran away! Three birds.", "A b c. D e.", "这是一句。那是两句。还有一句。", "Alone."]
BLANKS = ["[MASK] b [MASK]", "c [MASK]", "[MASK] [MASK] [MASK] a"]


def tiny_extractive(dtype: torch.dtype = torch.float64, seed: int = 0, **changes: Any) -> ExtractivePolicy:
    """A policy that chooses sentences, with a few thousand random weights."""
    torch.manual_seed(seed)
    sizes: dict[str, Any] = {"buckets": 64, "hidden_size": 16, "layers": 2, "heads": 2, "max_sentences": 6}
    model = SentencesModel(SentencesConfig(**{**sizes, **changes})).to(dtype)
    for head in (model.choose, model.stop):  # which a new model has at 0
        torch.nn.init.normal_(head.weight, std=0.25)
    return ExtractivePolicy(model, dtype)


def encoder_folder(path: Path) -> Path:
    """A folder with an encoder that reads characters, as masked models have it."""
    tokenizer = train_tokenizer(DOCUMENTS, "character", minimum=1, form="encoder")
    torch.manual_seed(2)
    sizes = {"hidden_size": 12, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    config = BertConfig(vocab_size=len(tokenizer), max_position_embeddings=40, initializer_range=0.3, **sizes)
    BertForMaskedLM(config).save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


def tiny_reading(dtype: torch.dtype = torch.float64, frozen: bool = False) -> ExtractivePolicy:
    """A policy that chooses sentences, which such an encoder reads."""
    with TemporaryDirectory() as folder:
        values = {"encoder": str(encoder_folder(Path(folder))), "frozen": frozen, "max_words": 30, "max_sentences": 6}
        policy = new_extractive({**values, "hidden_size": 16, "layers": 1, "heads": 2}, 0, dtype, "cpu")
    torch.manual_seed(3)
    for head in (policy.model.choose, policy.model.stop):  # which a new model has at 0
        torch.nn.init.normal_(head.weight, std=0.25)
    return policy


@cache
def blank_tokenizer() -> PreTrainedTokenizerFast:
    """Three words and BERT's special tokens."""
    backend = Tokenizer(models.WordLevel({word: number for number, word in enumerate(WORDS)}, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    backend.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B [SEP]", special_tokens=[("[CLS]", 1), ("[SEP]", 2)]
    )
    backend.add_special_tokens(SPECIAL)
    names = {f"{name}_token": f"[{name.upper()}]" for name in ("pad", "cls", "sep", "mask", "unk")}
    return PreTrainedTokenizerFast(tokenizer_object=backend, **names)


def tiny_masked(
    dtype: torch.dtype = torch.float64, edits: bool = False, seed: int = 0, lora: dict[str, Any] | None = None
) -> MaskedPolicy:
    """A BERT that fills masks, its layer for the places not at 0; its head knows two tokens that no text has.

    With an adapter, one that does something.
    """
    torch.manual_seed(seed)
    config = BertConfig(
        vocab_size=len(WORDS) + 2,
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=24,
        max_position_embeddings=16,
        initializer_range=0.5,
        pad_token_id=0,
    )
    model: Any = BertForMaskedLM(config).to(dtype)
    add_order(model)
    torch.nn.init.normal_(model.order.weight, std=0.2)
    adapter = None if lora is None else masked_with_lora(model, lora)
    for name, weight in model.named_parameters():
        if "lora_B" in name:  # which a new adapter has at 0
            torch.nn.init.normal_(weight, std=0.3)
    return MaskedPolicy(model, blank_tokenizer(), dtype, adapter, edits=edits)


def every_text(policy: DecisionPolicy, prompt: Prompt, longest: int) -> list[list[int]]:
    """All sequences of actions that a policy may take for a prompt, cut off after ``longest``."""
    assert prompt.context is not None
    found: list[list[int]] = []
    open_ends: list[list[int]] = [[]]
    while open_ends:
        now = open_ends.pop()
        for action in allowed(policy, prompt, now):
            longer = [*now, action]
            ended = policy.over(longer, prompt) or len(longer) == longest
            (found if ended else open_ends).append(longer)
    return found


def allowed(policy: DecisionPolicy, prompt: Prompt, now: Sequence[int]) -> list[int]:
    """The actions that may come next."""
    assert prompt.context is not None
    if isinstance(policy, ExtractivePolicy):
        return [k for k in range(len(prompt.context) + 1) if k == 0 or k not in now]
    assert isinstance(policy, MaskedPolicy)
    size, ids = policy.slots.vocabulary, list(prompt.context)
    places = [i for i, one in enumerate(ids) if one == 3 or (policy.slots.edits and one > 4)]
    free = [k for k in range(len(places)) if policy.slots.edits or k not in [(one - 1) // size for one in now]]
    fills = [1 + k * size + token for k, token in itertools.product(free, range(5, len(WORDS)))]
    return [0, *fills] if policy.slots.edits else fills


def chances(policy: DecisionPolicy, rollouts: Sequence[Rollout]) -> Tensor:
    """The chances of texts ``[N]`` with gradient, by the model alone, one action at a time."""
    each = _of_sentences if isinstance(policy, ExtractivePolicy) else _of_fills
    return torch.stack(
        [
            torch.stack(
                [each(policy, rollout, rollout.token_ids[:t])[a] for t, a in enumerate(rollout.token_ids)]
            ).prod()
            for rollout in rollouts
        ]
    )


def _of_sentences(policy: Any, rollout: Rollout, now: Sequence[int]) -> dict[int, Tensor]:
    model, context = policy.model, rollout.context
    vectors, there = model.encoder.read([context])
    state, sentences, _ = model.encoder(vectors, there, torch.tensor([0]), [[one - 1 for one in now]])
    scores = torch.cat([model.stop(state)[0], model.choose(sentences)[0, :, 0]])
    open_ones = allowed(policy, rollout.prompt, now)
    return dict(zip(open_ones, scores[open_ones].softmax(0), strict=True))


def _of_fills(policy: Any, rollout: Rollout, now: Sequence[int]) -> dict[int, Tensor]:
    model, size, ids = policy.model, policy.slots.vocabulary, list(rollout.context or [])
    places = [i for i, one in enumerate(ids) if one == 3 or (policy.slots.edits and one > 4)]
    for action in now:
        ids[places[(action - 1) // size]] = (action - 1) % size
    output = model(input_ids=torch.tensor([ids]), output_hidden_states=True)
    scores = model.order(output.hidden_states[-1])[0]
    options = allowed(policy, rollout.prompt, now)
    open_places = sorted({(one - 1) // size for one in options if one})
    stop = [scores[0, 1]] if policy.slots.edits else []
    of_place = torch.stack([*(scores[places[k], 0] for k in open_places), *stop]).softmax(0)
    found = {0: of_place[-1]}
    for number, k in enumerate(open_places):
        words = output.logits[0, places[k], 5 : len(WORDS)].softmax(0)
        found |= {1 + k * size + 5 + word: of_place[number] * words[word] for word in range(len(words))}
    return {action: found[action] for action in options}
