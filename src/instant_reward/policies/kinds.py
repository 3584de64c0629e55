"""The kinds of policies, and how a folder shows which one it holds."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

import torch

from instant_reward import models
from instant_reward.policies.load import Dtype
from instant_reward.policies.policy import Policy
from instant_reward.types import UserError

# Kind -> the function that loads it: (name, dtype, lora, place) -> Policy.
KINDS = {
    "causal": "causal:load_causal",
    "classifier": "classifier:load_classifier",
    "seq2seq": "seq2seq:load_seq2seq",
    "extractive": "extractive:load_extractive",
    "masked": "masked:load_masked",
}


def load_policy(
    name: str,
    dtype: Dtype = "float32",
    *,
    lora: Mapping[str, Any] | None = None,
    device: str | None = None,
    kind: str | None = None,
    labels: Sequence[str] = (),
    seed: int = 0,
) -> Policy:
    """Loads a model as a policy, with its tokenizer.

    Args:
        name: a short name ("smollm2-135m"), a local folder, a GGUF file, or a hub id.
        dtype: "float32", "bfloat16" (its matrix products; the weights stay float32), "float64", or "auto": bfloat16
            where the machine multiplies it fast, float32 elsewhere.
        lora: train an adapter of low rank instead of all weights: ``{"rank": 16, "alpha": 32, ...}``.
        device: "cpu", "cuda", ...; without it a GPU where there is one.
        kind: which kind of policy it is; without it, what the model's config says.
        labels: makes a classifier of an encoder that has no labels yet: a new layer, drawn by ``seed``, scores them.

    Raises:
        UserError: where the model is not there or cannot be read, or ``labels`` are missing or too many.
    """
    place = device or ("cuda" if torch.cuda.is_available() else "cpu")
    kind = kind or ("classifier" if labels else kind_of(models.locate(name)))
    if kind not in KINDS:
        raise UserError(f"load_policy: there is no kind {kind!r}; use one of {', '.join(KINDS)}")
    if labels and kind != "classifier":
        raise UserError(f"load_policy: labels are of a classifier, and kind is {kind!r}; leave one of them out")
    new: dict[str, Any] = {"labels": labels, "seed": seed} if labels else {}
    module, _, function = KINDS[kind].partition(":")
    load = getattr(import_module(f"instant_reward.policies.{module}"), function)
    policy: Policy = load(name, dtype, lora, place, **new)
    return policy


def kind_of(folder: Path) -> str:
    """The kind of policy that a model's folder holds, by its config; "causal" where that says nothing else."""
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return "causal"  # a GGUF file, or a folder whose loading says better what is wrong
    if any(str(name).endswith("ForSequenceClassification") for name in config.get("architectures") or ()):
        return "classifier"
    if config.get("model_type") == "sentences":
        return "extractive"
    if any(str(name).endswith("ForMaskedLM") for name in config.get("architectures") or ()):
        return "masked"
    return "seq2seq" if config.get("is_encoder_decoder") else "causal"
