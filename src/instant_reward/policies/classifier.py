"""A classifier as a policy: the labels are its actions, and a text of its is one label."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from instant_reward import models
from instant_reward.batch import Batch
from instant_reward.policies import terms
from instant_reward.policies.decisions import PLAIN, DecisionPolicy, Names, Steps, cell, check_company, decided
from instant_reward.policies.head import Softmax
from instant_reward.policies.kinds import kind_of
from instant_reward.policies.load import Dtype, check_words, compute_dtype, load_model, with_lora
from instant_reward.text import Decoder
from instant_reward.types import Prompt, UserError

AUTO = "AutoModelForSequenceClassification"
PROBES = ("a", "a a a a")
PART_TOKENS = 4096  # texts are read together up to so many tokens, padding included


class ClassifierPolicy(DecisionPolicy):
    """An encoder with labels (``AutoModelForSequenceClassification``) that decides once for each text or pair of texts.

    Args:
        model: a transformers model whose logits are a linear layer's.
        tokenizer: its tokenizer; it reads the texts.

    Attributes:
        labels: their names, by the config's ``id2label``.
    """

    def __init__(
        self, model: Any, tokenizer: Any, compute: torch.dtype = torch.float32, adapter: Any = None, name: str = ""
    ) -> None:
        self.heads = {type(model): _head_name(model, tokenizer)}
        super().__init__(model, tokenizer, compute, adapter, name)
        self.labels = _labels(model)
        short, long = (prompt.context for prompt in self.prompts([{"text": one} for one in PROBES], "text", 1))
        with torch.no_grad():
            alone, beside = (
                _before(self.output_head(model), model, self._given(some))[0] for some in ([short], [short, long])
            )
        check_company(model, alone, beside[:1])

    @property
    def context(self) -> int:
        """How many tokens of a text the model can read, those that begin and end it included."""
        limits = [getattr(self.model.config, "max_position_embeddings", None), self.tokenizer.model_max_length]
        positions = [one for name, one in self.model.named_modules() if name.endswith("position_embeddings")]
        if positions and getattr(positions[0], "padding_idx", None) is not None:  # RoBERTa's count from behind it
            limits[0] = positions[0].num_embeddings - positions[0].padding_idx - 1
        return min(int(limit) for limit in limits if limit and limit > 0)  # of XLNet's any, it says -1

    def output_head(self, model: Any) -> Any:  # type: ignore[override]
        """See ``Learning``."""
        return model.get_submodule(self.heads[type(model)])

    def new_states(self) -> Features:
        """See ``Learning``."""
        return Features(self)

    def over(self, actions: Sequence[int], prompt: Prompt) -> bool:
        """See ``Policy``: a decision is a whole text."""
        return True

    def decoder(self) -> Decoder:
        """See ``Policy``: the label."""
        return Names(lambda prompt: self.labels)

    def actions_of(self, text: str, prompt: Prompt) -> list[int]:
        """See ``Policy``: the label."""
        if text not in self.labels:
            known = ", ".join(repr(label) for label in self.labels)
            raise UserError(f"prompt {prompt.id} has the label {text!r}, which the model does not know; use {known}")
        return [self.labels.index(text)]

    def prompts(
        self, rows: Sequence[Mapping[str, Any]], column: str, room: int, most: int | None = None
    ) -> list[Prompt]:
        """See ``Policy``; a row has a text, or a list of two texts.

        Args:
            most: texts are cut off behind so many tokens (of a pair, its longer text); without it, a text longer than
                the model reads is an error.
        """
        return [self._prompt(row, index, column, most) for index, row in enumerate(rows)]

    def _prompt(self, row: Mapping[str, Any], index: int, column: str, most: int | None) -> Prompt:
        where, content = cell(row, column, index)
        texts = [content] if isinstance(content, str) else content
        pair = isinstance(texts, list) and len(texts) in (1, 2) and all(isinstance(one, str) for one in texts)
        if not pair:
            raise UserError(f"{where} has {content!r} in {column!r}; give a text, or a list of two texts")
        if not all(one.strip() for one in texts):
            raise UserError(f"{where} has an empty text in {column!r}; give it at least one character, or leave it out")
        cut = {} if most is None else {"truncation": True, "max_length": min(most, self.context)}
        read = self.tokenizer(*texts, verbose=False, **cut)
        ids = list(read["input_ids"])
        if len(ids) > self.context:
            raise UserError(
                f"{where} has a text of {len(ids)} tokens, and the model reads {self.context}; shorten it, or have "
                f"texts cut off by setting model.max_context to {self.context} or less"
            )
        info = {key: value for key, value in row.items() if key not in (column, "id")}
        context = [ids, *([list(read["token_type_ids"])] if "token_type_ids" in read else [])]
        return Prompt(str(row.get("id", index)), "\n".join(texts), [], info=info, context=context)

    def load_beside(self, name: str, what: str) -> Any:
        """See ``Learning``: another classifier with the same tokens and labels."""
        model, own = load_model(name, self.compute, str(self.device), AUTO)
        if own.get_vocab() != self.tokenizer.get_vocab() or _labels(model) != self.labels:
            raise UserError(
                f"{what}: {name} has another tokenizer or other labels than the policy, so the two cannot be compared; "
                "use another"
            )
        self.heads[type(model)] = _head_name(model, own)
        return model.eval().requires_grad_(False)

    def read(self, model: Any, contexts: Sequence[Any]) -> Tensor:
        """See ``DecisionPolicy``: what the output layer reads of each text, ``[C, D]``."""
        order = sorted(range(len(contexts)), key=lambda number: len(contexts[number][0]))
        parts, some = [], list[int]()
        for number in order:
            if some and len(contexts[number][0]) * (len(some) + 1) > PART_TOKENS:
                parts.append(self._read(model, [contexts[one] for one in some]))
                some = []
            some.append(number)
        parts.append(self._read(model, [contexts[one] for one in some]))
        back = torch.tensor(order, device=self.device).argsort()
        return torch.cat(parts)[back]

    def _read(self, model: Any, contexts: Sequence[Any]) -> Tensor:
        with self.autocast():
            states = _before(self.output_head(model), model, self._given(contexts))[0]
        return states.to(torch.bfloat16) if self.compute == torch.bfloat16 else states

    def _given(self, contexts: Sequence[Any]) -> dict[str, Tensor]:
        """What a model reads of contexts, right-padded."""
        longest = max(len(context[0]) for context in contexts)
        pads = [self.tokenizer.pad_token_id or 0, 0]
        columns = [
            torch.tensor(
                [context[column] + [pads[column]] * (longest - len(context[column])) for context in contexts],
                device=self.device,
            )
            for column in range(len(contexts[0]))
        ]
        lengths = torch.tensor([len(context[0]) for context in contexts], device=self.device)
        given = {
            "input_ids": columns[0],
            "attention_mask": (torch.arange(longest, device=self.device) < lengths[:, None]).long(),
        }
        if len(columns) > 1:
            given["token_type_ids"] = columns[1]
        return given

    def choose(
        self, model: Any, encoded: Any, steps: Steps, no_end: Tensor, softmax: Softmax = PLAIN
    ) -> terms.Distribution:
        """See ``DecisionPolicy``."""
        head = self.output_head(model)
        return terms.Head(encoded[steps.rows], head.weight, head.bias, no_end, softmax)


class Features:
    """What a classifier's output layer reads, for critics (``Reader``)."""

    def __init__(self, policy: ClassifierPolicy) -> None:
        self.policy = policy

    def trunk(self, model: Any) -> Any:
        """See ``Reader``: the whole model; its output layer is passed over."""
        return model

    def width(self, base: Any) -> int:
        """See ``Reader``."""
        return int(self.policy.output_head(base).in_features)

    def of_sampled(self, base: Any, batch: Batch) -> Tensor:
        """See ``Reader``."""
        contexts, steps = decided(batch, self.policy.device)
        return self.policy.read(base, contexts)[steps.rows]


def _before(head: nn.Module, model: Any, given: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
    """What a layer reads while the model reads its input, and the model's logits."""
    kept: list[Tensor] = []
    hook = head.register_forward_pre_hook(lambda _, inputs: kept.append(inputs[0]))
    try:
        logits = model(**given).logits
    finally:
        hook.remove()
    return kept[-1], logits


@torch.no_grad()
def _head_name(model: Any, tokenizer: Any) -> str:
    """The linear layer whose output the logits are, by its place in the model.

    Raises:
        UserError: where no layer is that, the tokenizer has more words than the model, or its texts cannot be read.
    """
    check_words(model, tokenizer)
    ids = tokenizer(PROBES[1])["input_ids"]
    given = {"input_ids": torch.tensor([ids], device=next(model.parameters()).device)}
    last: list[str] = []
    hooks = [
        one.register_forward_hook(lambda *_, name=name: last.append(name))
        for name, one in model.named_modules()
        if isinstance(one, nn.Linear)
    ]
    try:
        model.eval()(**given)
    except ValueError as error:  # of BART's and T5's a text must have an end
        raise UserError(
            f"{type(model).__name__} does not read the texts of its tokenizer ({error}); use a tokenizer that ends "
            "texts as this model wants it, or a BERT-shaped model"
        ) from error
    finally:
        for hook in hooks:
            hook.remove()
    if last:
        head = model.get_submodule(last[-1])
        states, logits = _before(head, model, given)
        plain = nn.functional.linear(states, head.weight, head.bias)
        if plain.shape == logits.shape and torch.allclose(plain, logits, atol=1e-5, rtol=1e-4):
            return last[-1]
    raise UserError(
        f"the logits of {type(model).__name__} are not the output of its last linear layer for each text, which is "
        "what a classifier needs; use a BERT-, DistilBERT- or RoBERTa-shaped one"
    )


def _labels(model: Any) -> list[str]:
    config = model.config
    labels = [str(config.id2label[number]) for number in range(config.num_labels)]
    kind = getattr(config, "problem_type", None)
    if len(set(labels)) < len(labels) or len(labels) < 2 or kind in ("regression", "multi_label_classification"):
        raise UserError(
            f"the classifier has the labels {', '.join(map(repr, labels))} (problem_type {kind}), and one of at least "
            "two must be chosen, each with a name of its own; correct id2label in its config.json"
        )
    return labels


def load_classifier(
    name: str,
    dtype: Dtype,
    lora: Mapping[str, Any] | None,
    place: str,
    labels: Sequence[str] = (),
    seed: int = 0,
) -> ClassifierPolicy:
    """See ``kinds.load_policy``."""
    if (kind_of(models.locate(name)) == "classifier") == bool(labels):
        wrong = "has labels of its own; leave out" if labels else "has no labels to choose from; name them by"
        raise UserError(f"the model {name} {wrong} labels (in a config, model.labels)")
    compute = compute_dtype(dtype, place)
    changed: dict[str, Any] = {}
    if labels:
        changed["id2label"] = dict(enumerate(labels))
        changed["label2id"] = {label: number for number, label in enumerate(labels)}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)  # draws what the folder has no weights for
        model, tokenizer = load_model(name, compute, place, AUTO, **changed)
    adapter = None
    if lora is not None:
        adapter = classifier_with_lora(model, lora)
    return ClassifierPolicy(model, tokenizer, compute, adapter, name)


def classifier_with_lora(model: Any, options: Mapping[str, Any]) -> Any:
    """The model in a peft wrapper that adapts its encoder; all of what lies behind that is trained.

    Those layers score the labels, and are new where the labels are.
    """
    encoder = f"{model.base_model_prefix}."
    linear = [name for name, one in model.named_modules() if isinstance(one, nn.Linear)]
    behind = [name for name in linear if not name.startswith(encoder)]
    return with_lora(model, task=None, whole=behind, **options)
