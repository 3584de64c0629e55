"""What pydantic found wrong in a config, as sentences with dotted paths."""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Sequence
from typing import Any, get_args

from pydantic import BaseModel, ValidationError

from instant_reward.config_weight import RULES
from instant_reward.types import UserError


def report(where: str, problems: Sequence[str]) -> UserError:
    """One error for all the problems: a line that says where, then one line each."""
    count = "1 problem" if len(problems) == 1 else f"{len(problems)} problems"
    return UserError("\n  ".join([f"{where} has {count}:", *problems]))


def sentences(error: ValidationError, model: type[BaseModel]) -> list[str]:
    """Each problem once, as ``path: what is wrong``. ``model`` is the class that refused the values."""
    found: dict[str, str] = {}
    for problem in error.errors(include_url=False):
        path, sentence = _sentence(problem, model)
        found.setdefault(path, sentence)
    return [f"{path}: {sentence}" if path else sentence for path, sentence in found.items()]


def _sentence(problem: Any, model: type[BaseModel]) -> tuple[str, str]:
    location, rule = _without_tags(problem["loc"])
    kind, value = problem["type"], problem["input"]
    if kind == "extra_forbidden":
        return ".".join(map(str, location)), _unknown(location, model, rule)
    within = _known_part(location, model)
    path = ".".join(map(str, within)) + problem.get("ctx", {}).get("below", "")
    if kind == "missing":
        return path, "this is required"
    if kind in ("model_type", "model_attributes_type", "dict_type"):
        return path, f"must be a mapping of keys to values, not {_shown(value)}"
    if kind in ("union_tag_invalid", "union_tag_not_found"):
        return path, f"must be a number, or a mapping with rule: {', '.join(RULES)}; it is {_shown(value)}"
    message = problem["msg"].removeprefix("Value error, ").replace("Input should be", "must be", 1)
    if kind in ("value_error", "cross_check"):
        return path, message
    return path, f"{message[:1].lower()}{message[1:]}, not {_shown(value)}"


def _without_tags(location: Sequence[Any]) -> tuple[list[Any], type[BaseModel] | None]:
    """A location without the names that pydantic gives to the branches of a weight, and the rule's class, if any."""
    kept: list[Any] = []
    rule = None
    for part in location:
        if kept[-1:] in (["weight"], ["strength"]) and rule is None and part in ("number", "rule", *RULES):
            rule = RULES.get(part)
        else:
            kept.append(part)
    return kept, rule


def _unknown(location: list[Any], model: type[BaseModel], rule: type[BaseModel] | None) -> str:
    """Why a key is refused, with the name that was probably meant."""
    key, section = str(location[-1]), rule or _section(location[:-1], model)
    known = list(section.model_fields) if section else []
    close = difflib.get_close_matches(key, known, n=1, cutoff=0.6)
    if close:
        return f"there is no such key; did you mean {close[0]}?"
    elsewhere = [path for path in all_paths(model) if path.rpartition(".")[2] == key]
    if elsewhere:
        return f"there is no such key here; did you mean {min(elsewhere, key=lambda path: path.count('.'))}?"
    return f"there is no such key; the keys here are {', '.join(known)}"


def all_paths(model: type[BaseModel], before: str = "") -> Iterator[str]:
    """The dotted path of every key; an item of a list is written ``0``."""
    for name, field in model.model_fields.items():
        yield f"{before}{name}"
        inner, many = _model_in(field.annotation)
        if inner:
            yield from all_paths(inner, f"{before}{name}.0." if many else f"{before}{name}.")


def _section(location: Sequence[Any], model: type[BaseModel]) -> type[BaseModel] | None:
    """The class of the section at a location."""
    here: type[BaseModel] | None = model
    for part in location:
        if isinstance(part, int):
            continue
        if here is None or part not in here.model_fields:
            return None
        here, _ = _model_in(here.model_fields[part].annotation)
    return here


def _known_part(location: list[Any], model: type[BaseModel]) -> list[Any]:
    """The location without what pydantic adds to it inside a value (the branch of a union, for example)."""
    for length in range(len(location)):
        part, section = location[length], _section(location[:length], model)
        if not isinstance(part, int) and (section is None or part not in section.model_fields):
            return location[:length]
    return location


def _model_in(annotation: Any) -> tuple[type[BaseModel] | None, bool]:
    """The section class inside ``X``, ``X | None`` or ``list[X]``, and whether it is a list's."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation, False
    many = getattr(annotation, "__origin__", None) is list
    for inner in get_args(annotation):
        found, within = _model_in(inner)
        if found:
            return found, many or within
    return None, False


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
