"""Plain values from YAML text, and back: what pydantic's models are made from (no torch, no pydantic)."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from instant_reward.types import UserError

# YAML 1.1 takes 1e-5 for a word, since it has no dot. To everyone who writes learning rates it is a number.
_FLOAT = re.compile(
    r"""^(?:[-+]?(?:[0-9][0-9_]*)\.[0-9_]*(?:[eE][-+]?[0-9]+)?
    |[-+]?[0-9][0-9_]*[eE][-+]?[0-9]+
    |[-+]?\.[0-9_]+(?:[eE][-+]?[0-9]+)?
    |[-+]?\.(?:inf|Inf|INF)
    |\.(?:nan|NaN|NAN))$""",
    re.VERBOSE,
)


def _resolvers(inherited: Mapping[str, Any]) -> dict[str, Any]:
    """The inherited ways of telling plain words from numbers, with ``_FLOAT`` as the one for floats."""
    tag = "tag:yaml.org,2002:float"
    table = {first: [pair for pair in pairs if pair[0] != tag] for first, pairs in inherited.items()}
    for first in "-+.0123456789":
        table.setdefault(first, []).append((tag, _FLOAT))
    return table


class _Loader(yaml.SafeLoader):  # type: ignore[misc]  # PyYAML has no type hints
    """Safe, with numbers such as 1e-5, and no key twice in one mapping (the first would be lost in silence)."""

    yaml_implicit_resolvers = _resolvers(yaml.SafeLoader.yaml_implicit_resolvers)

    def construct_mapping(self, node: Any, deep: bool = False) -> Any:
        seen: set[str] = set()
        for key, _ in node.value:
            if key.tag != "tag:yaml.org,2002:merge" and key.value in seen and isinstance(key.value, str):
                raise yaml.constructor.ConstructorError(
                    None, None, f"the key {key.value!r} is there twice", key.start_mark
                )
            if isinstance(key.value, str):
                seen.add(key.value)
        return super().construct_mapping(node, deep=deep)


class _Dumper(yaml.SafeDumper):  # type: ignore[misc]
    """Quotes the words that ``_Loader`` would take for numbers; writes no aliases."""

    yaml_implicit_resolvers = _resolvers(yaml.SafeDumper.yaml_implicit_resolvers)

    def ignore_aliases(self, data: Any) -> bool:
        return True


def _string(dumper: _Dumper, text: str) -> Any:
    """Double quotes, which escape odd line breaks, where plain text would not read back as it was."""
    style = '"' if any(mark in text for mark in "\x85\u2028\u2029\ufeff") else None
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style=style)


_Dumper.add_representer(str, _string)


def to_yaml(values: Mapping[str, Any]) -> str:
    """``values`` as YAML text, keys in their order; ``parse_yaml`` gives equal values back."""
    return str(yaml.dump(dict(values), Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=120))


def parse_yaml(text: str, where: str) -> Any:
    """The values of a YAML text. ``where`` names it in errors.

    Raises:
        UserError: the text is no YAML; the sentence names the line.
    """
    try:
        return yaml.load(text, Loader=_Loader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        line = f", line {mark.line + 1}" if mark else ""
        raise UserError(f"{where}{line}: this is no valid YAML ({error.problem}); mend it there.") from error
    except (yaml.YAMLError, ValueError) as error:  # a forbidden character; a date such as 2024-13-45
        reason = " ".join(str(error).split())
        raise UserError(f"{where}: this is no valid YAML ({reason}); mend it there.") from error


def read_mapping(path: Path, what: str = "config") -> dict[str, Any]:
    """The mapping in a YAML file.

    Raises:
        UserError: the file is missing, unreadable, empty, no YAML, or holds something else than a mapping.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        raise UserError(f"there is no {what} file {path}; check the path.") from None
    except IsADirectoryError:
        raise UserError(f"{path} is a folder; name the {what} file in it.") from None
    except UnicodeDecodeError:
        raise UserError(f"the {what} file {path} is not text in UTF-8; is it the right file?") from None
    except OSError as error:
        raise UserError(f"cannot read the {what} file {path}: {error.strerror}; check its permissions.") from error
    values = parse_yaml(text, str(path))
    if values is None:
        raise UserError(f"the {what} file {path} is empty; it must hold a mapping of sections.")
    if not isinstance(values, dict):
        kind = "a list" if isinstance(values, list) else "a single value"
        raise UserError(
            f"the {what} file {path} holds {kind}; it must hold a mapping of sections (model:, data:, ...)."
        )
    return values


def apply_overrides(values: dict[str, Any], overrides: Sequence[str], short: Mapping[str, str]) -> list[str]:
    """Set each ``path.to.key=value`` in ``values``, in order, the value read as YAML; the problems, a sentence each.

    ``short`` names the sections that one word may stand for, and the key it then sets: ``algorithm=grpo`` changes
    the name and leaves the section's other keys alone.
    """
    problems = []
    for override in overrides:
        path, equals, text = override.partition("=")
        if not equals or not path.strip():
            problems.append(f"{override}: write an override as path.to.key=value, for example train.steps=40")
            continue
        try:
            value = parse_yaml(text, f"override {override}")
            keys = path.strip().split(".")
            if isinstance(value, str) and path.strip() in short:
                keys.append(short[path.strip()])
            _expand(values, keys, short)
            _set(values, keys, value)
        except UserError as error:
            problems.append(str(error))
    return problems


def _expand(values: dict[str, Any], keys: Sequence[str], short: Mapping[str, str]) -> None:
    """Makes mappings of sections given by one word on the way to ``keys``, so that an override can reach into them."""
    here: Any = values
    for depth, key in enumerate(keys[:-1]):
        path = ".".join(keys[: depth + 1])
        if not isinstance(here, dict):
            return
        if isinstance(here.get(key), str) and path in short:
            here[key] = {short[path]: here[key]}
        here = here.get(key)


def _set(values: dict[str, Any], keys: list[str], value: Any) -> None:
    """Set one value in nested mappings and lists; mappings that are not there yet are made."""
    here: Any = values
    for depth, key in enumerate(keys):
        last = depth == len(keys) - 1
        at = ".".join(keys[:depth])
        if isinstance(here, list):
            if not key.isdigit() or int(key) >= len(here):
                have = f"has {len(here)}, counted from 0" if here else "is empty"
                raise UserError(f"{'.'.join(keys)}: {at} {have}, so it has no item {key!r}")
            place: Any = int(key)
        elif isinstance(here, dict):
            place = key
            if not last and here.get(key) is None:
                here[key] = {}
        else:
            raise UserError(f"{'.'.join(keys)}: {at} is {here!r}, so there is no {key!r} in it")
        if last:
            here[place] = value
        else:
            here = here[place]
