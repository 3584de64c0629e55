"""Models and tokenizers from where they lie, ready to be policies, critics and teachers."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from instant_reward import models
from instant_reward.notice import without_bars
from instant_reward.policies import recurrent, transformer  # noqa: F401  importing them makes their kinds known
from instant_reward.policies.encoder_decoder import check_parts
from instant_reward.policies.states import trunk
from instant_reward.types import UserError

Dtype = Literal["auto", "float32", "bfloat16", "float64"]
CAUSAL, SEQ2SEQ = "AutoModelForCausalLM", "AutoModelForSeq2SeqLM"


def load_model(name: str, compute: torch.dtype, place: str, kind: str = CAUSAL, **changed: Any) -> tuple[Any, Any]:
    """A model in its master dtype, and its tokenizer.

    Args:
        kind: the class of transformers that finds the model's own.
        changed: values of its config that replace the folder's.

    Raises:
        UserError: where the model is not there, cannot be read, or has no weights for a part of it (but for the labels
            that are given to an encoder, ``id2label``).
    """
    import transformers

    folder = models.locate(name)
    tokenizer = read_folder(folder, transformers.AutoTokenizer.from_pretrained)
    options = {"dtype": master(compute), **changed}
    if kind in (CAUSAL, SEQ2SEQ):  # whose masks say what each token may look at; encoders may attend as they like
        options["attn_implementation"] = "sdpa"
    model, found = read_folder(folder, getattr(transformers, kind).from_pretrained, output_loading_info=True, **options)
    if "id2label" not in changed:
        check_found(folder, found, type(model).__name__)
    return model.to(place), tokenizer


def master(compute: torch.dtype) -> torch.dtype:
    """The dtype of the weights where products run in ``compute``."""
    return torch.float64 if compute == torch.float64 else torch.float32


def read_folder(folder: Path, read: Callable[..., Any], **options: Any) -> Any:
    """What ``read(folder, **options)`` reads of a model's folder.

    Raises:
        UserError: where it cannot.
    """
    from safetensors import SafetensorError

    try:
        with without_bars():
            return read(folder, **options)
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
        raise UserError(f"the model in {folder} cannot be loaded: {_first_line(error)}; check the folder") from error


def check_found(folder: Path, found: Mapping[str, Any], kind: str) -> None:
    """Refuses a model of which transformers drew some weights anew, since the folder has none for them.

    Raises:
        UserError: names one of them.
    """
    if missing := sorted(found["missing_keys"]):
        raise UserError(
            f"the model in {folder} has no weights for {missing[0]} of {kind}, so it is a model of another kind; "
            "use one that was saved as this kind"
        )


def weights_in(folder: Path, model: Any, names: Iterable[str]) -> dict[str, Tensor]:
    """The weights of a model's folder by the model's own names.

    In the file some have other names: of tied weights it keeps one, and GPT-NeoX and mixtures of experts stand there
    as older versions of transformers had them. Such a folder is read as transformers reads it.

    Args:
        model: of the same class, as it is now.
        names: those that are needed.

    Raises:
        UserError: where one is not there.
    """
    from safetensors.torch import load_file

    stored = load_file(folder / "model.safetensors")
    if set(names) - stored.keys():
        dtype = next(model.parameters()).dtype
        read, found = read_folder(folder, type(model).from_pretrained, dtype=dtype, output_loading_info=True)
        there = {name: one.detach() for name, one in read.named_parameters() if name not in found["missing_keys"]}
        stored = there | stored
    if missing := sorted(set(names) - stored.keys()):
        raise UserError(f"the model in {folder} has no weights for {missing[0]}; take another checkpoint")
    return stored


def load_beside(name: str, compute: torch.dtype, place: str, tokenizer: Any, what: str, seq2seq: bool = False) -> Any:
    """Another model for the same tokens: a teacher or a critic's trunk.

    Args:
        tokenizer: the policy's.
        what: the option that named it, for the message.
        seq2seq: it must be an encoder-decoder, as the policy is; else causal.

    Raises:
        UserError: where its tokenizer is another one, or it is of another kind.
    """
    model, own = load_model(name, compute, place, SEQ2SEQ if seq2seq else CAUSAL)
    if own.get_vocab() != tokenizer.get_vocab():
        raise UserError(
            f"{what}: {name} has another tokenizer than the policy, so it cannot read its tokens; use another"
        )
    if seq2seq:
        check_parts(model)
    else:
        check_attention(model)
        check_head(model)
    return model.eval().requires_grad_(False)


def with_lora(
    model: Any,
    rank: int = 16,
    alpha: float = 32.0,
    dropout: float = 0.0,
    targets: str | list[str] = "all-linear",
    task: str | None = "CAUSAL_LM",
    whole: Sequence[str] = (),
) -> Any:
    """The model in its peft wrapper, with an adapter of low rank to train.

    Args:
        task: peft's name for the model's kind, where it has one that fits.
        whole: modules, by their place in the model, that get no adapter and are trained in full beside it.
    """
    try:
        import peft
    except ModuleNotFoundError as error:
        raise UserError("model.lora needs the package peft; run: pip install 'instant-reward[lora]'") from error
    if task == "CAUSAL_LM" and isinstance(trunk(model), recurrent.RecurrentTrunk):
        raise UserError("model.lora: a recurrent model takes no adapter; leave it out to train all weights")
    if dropout:
        raise UserError(
            "model.lora.dropout must be 0: dropout makes the trainer's log-probabilities differ from the sampler's"
        )
    scale: Any = alpha  # peft says that it must be an integer, and takes any number
    settings = peft.LoraConfig(
        r=rank,
        lora_alpha=scale,
        lora_dropout=0.0,
        target_modules=targets,
        exclude_modules=list(whole) or None,
        task_type=task,
    )
    try:
        wrapped = peft.get_peft_model(model, settings)
    except ValueError as error:
        raise UserError(
            f"model.lora.targets: {targets!r} fits no layer of the model that takes one; correct it"
        ) from error
    for name in whole:
        model.get_submodule(name).requires_grad_(True)
    if hasattr(model.get_output_embeddings(), "base_layer"):
        raise UserError(
            "model.lora.targets: an adapter on the output head would never be trained, since log-probabilities are "
            "computed from the head's own weight; leave the head out"
        )
    return wrapped


def compute_dtype(dtype: Dtype, place: str) -> torch.dtype:
    known = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float64": torch.float64}
    if dtype in known:
        return known[dtype]
    if dtype != "auto":
        raise UserError(f"dtype={dtype!r} is unknown; use one of auto, {', '.join(known)}")
    if place.startswith("cuda"):
        return torch.bfloat16 if torch.cuda.is_bf16_supported() else torch.float32
    # Without such instructions a processor emulates bfloat16, many times slower than float32.
    fast = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return torch.bfloat16 if fast else torch.float32


def end_ids(model: Any, tokenizer: Any) -> tuple[int, ...]:
    found: list[int] = []
    for source in (getattr(model, "generation_config", None), model.config, tokenizer):
        value = getattr(source, "eos_token_id", None)
        found += value if isinstance(value, list) else [] if value is None else [value]
    return tuple(sorted(set(found)))


def pad_id(tokenizer: Any, ends: Sequence[int]) -> int:
    """What pads rows: the tokenizer's padding token, else an end token, else 0."""
    return int(next(i for i in (tokenizer.pad_token_id, *ends, 0) if i is not None))


def check_words(model: Any, tokenizer: Any) -> None:
    """Refuses a tokenizer that writes tokens which the model does not know.

    Raises:
        UserError: says how many each knows.
    """
    head = model.get_output_embeddings()
    tables = [model.get_input_embeddings().weight, *([] if head is None else [head.weight])]
    words = min(map(len, tables))
    if len(tokenizer) > words:
        raise UserError(
            f"{type(model).__name__} knows {words} tokens and its tokenizer {len(tokenizer)}, so the two do not belong "
            "together; save the tokenizer that the model was made with into its folder"
        )


def check_attention(model: Any) -> None:
    """Both the sampler and the shared layout say by a mask of their own what each token may look at."""
    kind = model.config._attn_implementation
    if kind != "sdpa":
        raise UserError(
            f"{type(model).__name__} runs the attention {kind!r}, and only 'sdpa' is supported; load it with "
            "attn_implementation='sdpa', or use another model"
        )


def check_head(model: Any) -> None:
    """The log-probabilities are computed from the head's weight: a model that does more to its logits is refused."""
    head = model.get_output_embeddings()
    shown = int(model.config.pad_token_id == 0)  # transformers warns of padding where it sees the pad token
    ids = torch.full((1, 2), shown, device=next(model.parameters()).device)
    with torch.no_grad():
        whole = model(input_ids=ids, use_cache=False).logits
        states = trunk(model)(input_ids=ids, use_cache=False).last_hidden_state
        plain = torch.nn.functional.linear(states, head.weight, getattr(head, "bias", None))
    # A cap does next to nothing to the small logits of a young model, hence the look at the config.
    capped = getattr(model.config, "final_logit_softcapping", None)
    if capped or not torch.allclose(whole, plain, atol=1e-3, rtol=1e-3):
        raise UserError(
            f"{type(model).__name__} changes its logits after the output head (scaling or capping), which is not "
            "supported; use another model"
        )


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
