"""Tiny policies that decide: a classifier made on the spot, and one that picks numbers off a list, each once."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from torch import Tensor, nn
from transformers import BertConfig, BertForSequenceClassification, PreTrainedTokenizerFast

from instant_reward.batch import Batch
from instant_reward.policies import terms
from instant_reward.policies.classifier import ClassifierPolicy, classifier_with_lora
from instant_reward.policies.decisions import PLAIN, DecisionPolicy, Names, Steps, decided
from instant_reward.policies.head import Softmax
from instant_reward.text import Decoder
from instant_reward.types import Prompt

torch.set_num_threads(1)

LABELS = ["bad", "fine", "good"]
WORDS = ["[PAD]", "[CLS]", "[SEP]", "[UNK]", "the", "film", "was", "slow", "long", "great", "not", "a", "joy", "dull"]
LONGEST = 16


@cache
def word_tokenizer() -> PreTrainedTokenizerFast:
    """Words between [CLS] and [SEP], as BERT has them; a pair's second text is of type 1."""
    backend = Tokenizer(models.WordLevel({word: number for number, word in enumerate(WORDS)}, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    backend.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=[("[CLS]", 1), ("[SEP]", 2)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token="[PAD]",
        unk_token="[UNK]",
        cls_token="[CLS]",
        sep_token="[SEP]",
        model_input_names=["input_ids", "token_type_ids", "attention_mask"],
        model_max_length=LONGEST,
    )


def tiny_bert(dtype: torch.dtype = torch.float64, labels: Sequence[str] = LABELS, **changes: Any) -> Any:
    """A BERT with labels and a few thousand weights."""
    torch.manual_seed(0)
    fields: dict[str, Any] = {
        "vocab_size": len(WORDS),
        "hidden_size": 16,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "intermediate_size": 32,
        "max_position_embeddings": LONGEST,
        "id2label": dict(enumerate(labels)),
        "label2id": {label: number for number, label in enumerate(labels)},
        "initializer_range": 0.3,
    }
    return BertForSequenceClassification(BertConfig(**(fields | changes))).to(dtype)


def tiny_classifier(
    dtype: torch.dtype = torch.float64, lora: dict[str, Any] | None = None, **changes: Any
) -> ClassifierPolicy:
    """The same weights each time, in a model of its own; with an adapter, one that does something."""
    model = tiny_bert(dtype, **changes)
    if lora is None:
        return ClassifierPolicy(model, word_tokenizer(), dtype)
    adapter = classifier_with_lora(model, lora)
    for name, weight in model.named_parameters():
        if "lora_B" in name:  # which a new adapter has at 0
            nn.init.normal_(weight, std=0.3)
    return ClassifierPolicy(model, word_tokenizer(), dtype, adapter)


def classifier_folder(path: Path, **changes: Any) -> Path:
    """A folder that ``load_policy`` loads, in float32."""
    tiny_bert(torch.float32, **changes).save_pretrained(path)
    word_tokenizer().save_pretrained(path)
    return path


class _Picking(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(3, 5)
        self.stop = nn.Linear(5, 1)
        self.match = nn.Linear(5, 1)


class Picker(DecisionPolicy):
    """Picks numbers off a list, each at most once; action 0 stops, action i picks the i-th number."""

    same_actions = False
    end_ids = (0,)

    def __init__(self) -> None:
        torch.manual_seed(1)
        super().__init__(_Picking().double(), None, torch.float64)

    context = 99

    def actions_in(self, model: Any) -> int:
        return 9

    def new_states(self) -> _Picked:
        return _Picked(self)

    def load_beside(self, name: str, what: str) -> Any:
        raise AssertionError(what)

    def over(self, actions: Sequence[int], prompt: Prompt) -> bool:
        assert prompt.context is not None
        return actions[-1] == 0 or len(actions) == len(prompt.context)

    def decoder(self) -> Decoder:
        return Names(self.names)

    def names(self, prompt: Prompt) -> list[str]:
        assert prompt.context is not None
        return ["", *(f"{number:g}" for number in prompt.context)]

    def prompts(
        self, rows: Sequence[Mapping[str, Any]], column: str, room: int, most: int | None = None
    ) -> list[Prompt]:
        return [
            Prompt(str(number), str(row[column]), [], info=row, context=list(row[column]))
            for number, row in enumerate(rows)
        ]

    def actions_of(self, text: str, prompt: Prompt) -> list[int]:
        assert prompt.context is not None
        return [prompt.context.index(float(word)) + 1 for word in text.split()]

    def read(self, model: Any, contexts: Sequence[Any]) -> list[list[float]]:
        return [list(context) for context in contexts]

    def hidden(self, model: Any, encoded: list[list[float]], steps: Steps) -> Tensor:
        features = []
        for row, before in zip(steps.rows.tolist(), steps.before, strict=True):
            picked = [encoded[row][action - 1] for action in before]
            features.append([sum(picked), len(picked), picked[-1] if picked else 0.0])
        states: Tensor = torch.tanh(model.inner(torch.tensor(features, dtype=torch.float64)))
        return states

    def choose(self, model: Any, encoded: Any, steps: Steps, no_end: Tensor, softmax: Softmax = PLAIN) -> terms.Choices:
        states = self.hidden(model, encoded, steps)
        longest = max(len(encoded[row]) for row in steps.rows.tolist())
        scores = torch.full((len(steps), longest + 1), -torch.inf, dtype=torch.float64)
        place, values = [], []
        slope = model.match(states)[:, 0]
        for number, (row, before) in enumerate(zip(steps.rows.tolist(), steps.before, strict=True)):
            for action, item in enumerate(encoded[row], start=1):
                if action not in before:
                    place.append((number, action))
                    values.append(slope[number] * item)
        scores = scores.index_put((torch.arange(len(steps)), torch.tensor(0)), model.stop(states)[:, 0])
        if place:
            at = torch.tensor(place)
            scores = scores.index_put((at[:, 0], at[:, 1]), torch.stack(values))
        return terms.Choices(states, scores, no_end, softmax)


class _Picked:
    def __init__(self, policy: Picker) -> None:
        self.policy = policy

    def trunk(self, model: Any) -> Any:
        return model

    def width(self, base: Any) -> int:
        return 5

    def of_sampled(self, base: Any, batch: Batch) -> Tensor:
        contexts, steps = decided(batch, torch.device("cpu"))
        return self.policy.hidden(base, self.policy.read(base, contexts), steps)
