"""Rollouts as plain values and back: one line of ``samples.jsonl`` is ``json.dumps(rollout_record(rollout))``.

Keep ``json.dumps``'s default of ASCII escapes: a sampled text may end inside a character and hold half of a surrogate
pair, which UTF-8 cannot carry.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any, get_args

from instant_reward.types import Mark, Prompt, Rollout, StopReason, UserError

PER_TOKEN = ("token_ids", "mask", "logprobs", "char_ends", "versions")


def rollout_record(rollout: Rollout) -> dict[str, Any]:
    """A rollout as values that JSON holds; ``rollout_from_record`` gives an equal rollout back.

    Only ``info`` may hold what JSON cannot: arrays become lists, numbers that are not finite become ``None``, and any
    other object its ``str``.
    """
    prompt = rollout.prompt
    return {
        "id": rollout.id,
        "group": rollout.group,
        "prompt": {
            "id": prompt.id,
            "text": prompt.text,
            "token_ids": list(prompt.token_ids),
            "messages": None if prompt.messages is None else [dict(message) for message in prompt.messages],
            "info": _plain(prompt.info),
            "context": prompt.context,
        },
        "token_ids": list(rollout.token_ids),
        "mask": [bool(sampled) for sampled in rollout.mask],
        "logprobs": list(rollout.logprobs),
        "char_ends": list(rollout.char_ends),
        "text": rollout.text,
        "marks": [asdict(mark) for mark in rollout.marks],
        "versions": list(rollout.versions),
        "stop": rollout.stop,
        "temperature": rollout.temperature,
        "forbidden_end": rollout.forbidden_end,
        "reshaped": rollout.reshaped,
        "at_limit": rollout.at_limit,
        "drafts": None if rollout.drafts is None else list(rollout.drafts),
        "info": _plain(rollout.info),
    }


def rollout_from_record(record: Mapping[str, Any]) -> Rollout:
    """The rollout that ``rollout_record`` wrote. Further keys (a step, say) are passed over.

    Raises:
        UserError: a key is missing, a value has the wrong type, or the lists per token differ in length.
    """
    if not isinstance(record, Mapping):
        raise UserError(f"this is no record of a sample: {str(record)[:60]!r}; each line must be one JSON object.")
    name = record.get("id", "without an id")
    try:
        rollout = _rebuild(record)
    except KeyError as error:
        raise UserError(f"the record of sample {name} has no {error}; was it written by another version?") from None
    except (TypeError, ValueError, AttributeError) as error:
        raise UserError(f"the record of sample {name} cannot be read: {error}; was the file changed?") from None
    _check(rollout)
    return rollout


def _rebuild(record: Mapping[str, Any]) -> Rollout:
    prompt = record["prompt"]
    messages = prompt.get("messages")
    return Rollout(
        id=str(record["id"]),
        group=int(record["group"]),
        prompt=Prompt(
            id=str(prompt["id"]),
            text=_string(prompt["text"]),
            token_ids=[int(token) for token in prompt["token_ids"]],
            messages=None if messages is None else [dict(message) for message in messages],
            info=dict(prompt.get("info") or {}),
            context=prompt.get("context"),
        ),
        token_ids=[int(token) for token in record["token_ids"]],
        mask=[bool(sampled) for sampled in record["mask"]],
        logprobs=[float(logprob) for logprob in record["logprobs"]],
        char_ends=[int(end) for end in record["char_ends"]],
        text=_string(record["text"]),
        marks=[_mark(mark) for mark in record["marks"]],
        versions=[int(version) for version in record["versions"]],
        stop=record["stop"],
        temperature=float(record.get("temperature", 1.0)),
        forbidden_end=int(record.get("forbidden_end", 0)),
        reshaped=bool(record.get("reshaped", False)),
        at_limit=bool(record.get("at_limit", False)),
        drafts=None if record.get("drafts") is None else [_string(draft) for draft in record["drafts"]],
        info=dict(record.get("info") or {}),
    )


def _mark(mark: Mapping[str, Any]) -> Mark:
    return Mark(float(mark["value"]), int(mark["start"]), int(mark["end"]), _string(mark["source"]), int(mark["seen"]))


def _string(value: object) -> str:
    if not isinstance(value, str):
        raise TypeError(f"expected text, got {type(value).__name__}")
    return value


def _check(rollout: Rollout) -> None:
    if rollout.stop not in get_args(StopReason):
        allowed = ", ".join(get_args(StopReason))
        raise UserError(f"the record of sample {rollout.id} has stop={rollout.stop!r}; it must be one of {allowed}.")
    lengths = {name: len(getattr(rollout, name)) for name in PER_TOKEN}
    if rollout.drafts is not None:
        lengths["drafts"] = len(rollout.drafts) + rollout.start
    if len(set(lengths.values())) > 1:
        listed = ", ".join(f"{name} {length}" for name, length in lengths.items())
        raise UserError(
            f"the record of sample {rollout.id} has lists of different lengths ({listed}); was the file changed?"
        )


def _plain(value: Any) -> Any:
    """``value`` as JSON holds it (see ``rollout_record``)."""
    if value is None or isinstance(value, (bool, int, str)):
        return value
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if hasattr(value, "tolist"):  # an array or one number of NumPy or torch
        return _plain(value.tolist())
    return str(value)
