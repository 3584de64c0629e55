"""Models with new weights: any Hugging Face config by plain values, and a tokenizer trained on the run's own texts."""

from __future__ import annotations

import difflib
import inspect
import tempfile
from collections.abc import Callable, Iterable, Sequence
from itertools import islice
from typing import Any, Literal

import torch
from huggingface_hub.errors import StrictDataclassError

from instant_reward.config_scratch import ScratchConfig, TokenizerConfig
from instant_reward.notice import without_bars
from instant_reward.policies.causal import CausalPolicy
from instant_reward.policies.classifier import ClassifierPolicy
from instant_reward.policies.extractive import new_extractive
from instant_reward.policies.load import Dtype, compute_dtype
from instant_reward.policies.masked import MaskedPolicy
from instant_reward.policies.policy import Policy
from instant_reward.policies.sentences import SentencesConfig
from instant_reward.policies.seq2seq import Seq2SeqPolicy
from instant_reward.policies.tokens import Form, train_tokenizer
from instant_reward.types import UserError

ModelKind = Literal["causal", "seq2seq", "classification", "masked"]

FORMS: dict[ModelKind, Form] = {
    "causal": "causal",
    "seq2seq": "seq2seq",
    "classification": "encoder",
    "masked": "encoder",
}
CLASSES = {
    "causal": "AutoModelForCausalLM",
    "seq2seq": "AutoModelForSeq2SeqLM",
    "classification": "AutoModelForSequenceClassification",
    "masked": "AutoModelForMaskedLM",
}
WHERE = "model.scratch.config"
# What the tokenizer fixes: its size, and the ids of its special tokens.
SIZES = ("vocab_size", "decoder_vocab_size")
IDS = ("pad", "bos", "eos", "unk", "sep", "cls", "mask", "decoder_start", "forced_bos", "forced_eos")
WRONG = (
    ValueError, TypeError, KeyError, AttributeError, RuntimeError, ImportError, ArithmeticError, StrictDataclassError
)  # fmt: skip


def build_model(
    scratch: ScratchConfig, texts: Iterable[str], kind: ModelKind = "causal", labels: Sequence[str] = ()
) -> tuple[Any, Any]:
    """A model with new weights, in float32 and on the processor, and its tokenizer.

    Args:
        texts: what the tokenizer is trained on, where it is not taken from a folder. The same texts, config and seed
            give the same tokenizer and the same weights.
        kind: which of the model type's classes is built.
        labels: of a classification, in the order of the model's outputs.

    Raises:
        UserError: the model type or one of its values is unknown or does not fit, or transformers would read this kind
            of tokenizer as another one when it loads the model; it names the key.
    """
    tokenizer = _tokenizer(scratch.tokenizer, texts, FORMS[kind])
    config = _config(scratch.config, tokenizer, kind, labels)
    model = _model(config, kind, scratch.seed)
    longest = getattr(config, "max_position_embeddings", None)
    if isinstance(longest, int):
        tokenizer.model_max_length = longest
    if FORMS[kind] == "encoder" and not getattr(config, "type_vocab_size", 0) > 1:
        tokenizer.model_input_names = ["input_ids", "attention_mask"]  # such a model knows no types of tokens
    if kind == "causal":
        _check_causal(model)
    return model, _as_loaded(tokenizer, config)


def new_policy(scratch: ScratchConfig, texts: Iterable[str], dtype: Dtype = "float32") -> Policy:
    """A model with new weights as a policy, on a GPU where there is one; ``build_model`` has the rest.

    With labels it is a classifier; of the kind "masked" it fills masks; of the model type "sentences" it chooses
    sentences; else it writes: an encoder-decoder where the model type is one, a causal model where not.
    """
    place = "cuda" if torch.cuda.is_available() else "cpu"
    compute = compute_dtype(dtype, place)
    kind: ModelKind = scratch.kind or ("classification" if scratch.labels else _writer(scratch.config["model_type"]))
    if scratch.config["model_type"] == SentencesConfig.model_type and kind != "masked":
        return new_extractive(scratch.config, scratch.seed, compute, place)
    model, tokenizer = build_model(scratch, texts, kind, scratch.labels)
    master = torch.float64 if compute == torch.float64 else torch.float32
    made: dict[ModelKind, Callable[..., Policy]] = {
        "causal": CausalPolicy,
        "seq2seq": Seq2SeqPolicy,
        "classification": ClassifierPolicy,
        "masked": MaskedPolicy,
    }
    return made[kind](model.to(place, master), tokenizer, compute)


def _writer(model_type: str) -> ModelKind:
    """Which kind of model writes text: "seq2seq" of an encoder-decoder; an unknown type is refused later."""
    from transformers import CONFIG_MAPPING

    known = model_type in CONFIG_MAPPING
    return "seq2seq" if known and CONFIG_MAPPING[model_type]().is_encoder_decoder else "causal"


def _tokenizer(settings: TokenizerConfig, texts: Iterable[str], form: Form) -> Any:
    if settings.folder is None:
        return train_tokenizer(
            texts,
            settings.kind,
            settings.vocabulary,
            minimum=settings.minimum,
            lower=settings.lower,
            stop_words=settings.stop_words,
            form=form,
        )
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(settings.folder, local_files_only=True)
    except (OSError, *WRONG) as error:
        raise UserError(
            f"model.scratch.tokenizer.folder: there is no tokenizer in {settings.folder} ({_said(error)}): name a "
            "folder that save_pretrained wrote."
        ) from error


def _config(given: dict[str, Any], tokenizer: Any, kind: ModelKind, labels: Sequence[str]) -> Any:
    """The Hugging Face config of plain values, with what the tokenizer and the labels fix."""
    from transformers import CONFIG_MAPPING, AutoConfig

    values = dict(given)
    model_type = values.pop("model_type")
    edits = values.pop("edits", False) if kind == "masked" else None  # this library's own key: see ``MaskedPolicy``
    if not isinstance(edits, bool | None):
        raise UserError(f"{WHERE}.edits: {edits!r} must be true or false")
    if model_type not in CONFIG_MAPPING:
        close = difflib.get_close_matches(model_type, list(CONFIG_MAPPING.keys()), n=1)
        hint = f"did you mean {close[0]}?" if close else "name one of its own, such as gpt2, llama, bert or t5."
        raise UserError(f"{WHERE}.model_type: transformers knows no {model_type!r}: {hint}")
    default = CONFIG_MAPPING[model_type]()
    _check_keys(values, default, model_type)
    values |= {name: len(tokenizer) for name in SIZES if hasattr(default, name)}
    values |= _ids(default, tokenizer) | ({} if edits is None else {"edits": edits})
    if kind == "causal" and not default.is_encoder_decoder and hasattr(default, "is_decoder"):
        values["is_decoder"] = True  # BERT and its like read both ways without it
    if labels:
        values["id2label"] = dict(enumerate(labels))
        values["label2id"] = {label: index for index, label in enumerate(labels)}
    try:
        return AutoConfig.for_model(model_type, **values)
    except WRONG as error:
        raise UserError(f"{WHERE}: these values make no {model_type} config ({_said(error)}): correct them.") from error


def _check_keys(values: dict[str, Any], default: Any, model_type: str) -> None:
    named = inspect.signature(type(default)).parameters.values()
    own = {*vars(default), *default.attribute_map, *(one.name for one in named if one.kind is not one.VAR_KEYWORD)}
    filled = {*SIZES, *(f"{name}_token_id" for name in IDS)}
    known = sorted(key for key in own - filled if not key.startswith("_"))
    for key in values:
        if key in filled:
            raise UserError(f"{WHERE}.{key}: the tokenizer says what it is: leave it out.")
        if key not in known:
            close = difflib.get_close_matches(key, known, n=1)
            hint = f"did you mean {close[0]}?" if close else f"it has {', '.join(known)}."
            raise UserError(f"{WHERE}.{key}: the config of {model_type} has no such key: {hint}")


def _ids(default: Any, tokenizer: Any) -> dict[str, Any]:
    """The ids of the special tokens that the config asks for, None for those that the tokenizer has not."""
    found = {name: getattr(tokenizer, f"{name}_token_id", None) for name in IDS}
    begin = found["pad"] if found["bos"] is None else found["bos"]
    found |= {"decoder_start": begin if default.is_encoder_decoder else None, "forced_eos": found["eos"]}
    wanted = {f"{name}_token_id": value for name, value in found.items() if hasattr(default, f"{name}_token_id")}
    if default.is_encoder_decoder:
        wanted["decoder_start_token_id"] = begin
    return wanted


def _model(config: Any, kind: ModelKind, seed: int) -> Any:
    import transformers

    auto = getattr(transformers, CLASSES[kind])
    if type(config) not in auto._model_mapping:
        raise UserError(
            f"{WHERE}.model_type: {config.model_type} has no model of the kind {kind}: choose a type that "
            f"transformers' {CLASSES[kind]} knows."
        )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        try:
            return auto.from_config(config, dtype=torch.float32).eval()
        except WRONG as error:
            raise UserError(
                f"{WHERE}: no {config.model_type} model can be built of these values ({_said(error)}): correct them."
            ) from error


def _check_causal(model: Any) -> None:
    """A model that reads both ways would be told each next token before it predicts it."""
    ids = torch.tensor([[1, 2, 1], [1, 2, 3]])
    try:
        with torch.no_grad():
            logits = model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits
    except WRONG as error:
        raise UserError(
            f"{WHERE}: the {model.config.model_type} model of these values does not run ({_said(error)}): correct them "
            "(heads must share the hidden size, and num_key_value_heads the heads)."
        ) from error
    if not torch.allclose(logits[0, :2], logits[1, :2], atol=1e-5):
        raise UserError(
            f"{WHERE}.model_type: a {model.config.model_type} model reads the tokens that follow, so it cannot write "
            "text: choose a causal one, such as gpt2 or llama."
        )


def _as_loaded(tokenizer: Any, config: Any) -> Any:
    """The tokenizer as it will come back from a folder beside such a model.

    For some types of models transformers rebuilds the tokenizer in a class of its own, which cuts texts by other rules.
    """
    from transformers import AutoTokenizer

    with tempfile.TemporaryDirectory() as folder, without_bars():
        config.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        loaded = AutoTokenizer.from_pretrained(folder)
    sample = "A Film, 2 films; ein schöner Film. 一部好看的电影！\n"
    same = loaded.get_vocab() == tokenizer.get_vocab()
    for text in (sample, *islice((token.lstrip() for token in sorted(tokenizer.get_vocab())), 0, None, 97)):
        same = same and _text(loaded, text) == _text(tokenizer, text)
    if not same:
        raise UserError(
            f"model.scratch: transformers reads the tokenizer of every {config.model_type} model as its own "
            f"{type(loaded).__name__}, which does not understand this one: take tokenizer.kind bpe without lower, or a "
            "related model_type (llama for qwen2)."
        )
    return loaded


def _text(tokenizer: Any, text: str) -> str:
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    return str(tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False))


def _said(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__
