"""JSON held against a schema while it is written, and by the package ``jsonschema`` at its end."""

from __future__ import annotations

import importlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from instant_reward.rewards.format_pattern import Growth
from instant_reward.rewards.json_reader import JsonReader
from instant_reward.rewards.json_schema_nodes import Node, Nodes, Number, Schema
from instant_reward.types import UserError

DEEPEST = 64  # lists and objects inside each other: Python's json and jsonschema call themselves at each level
_DRAFTS = {
    "http://json-schema.org/draft-06/schema": "Draft6Validator",
    "http://json-schema.org/draft-07/schema": "Draft7Validator",
    "https://json-schema.org/draft/2019-09/schema": "Draft201909Validator",
    "https://json-schema.org/draft/2020-12/schema": "Draft202012Validator",
}
_LONE_REFS = ("Draft6Validator", "Draft7Validator")


class Compiled:
    """A schema, ready to judge documents and their beginnings.

    Raises UserError where it is no JSON Schema, or one that cannot be used; see ``Nodes``.
    """

    def __init__(self, schema: Mapping[str, Any] | bool | str) -> None:
        self.schema = _plain(schema)
        try:
            package: Any = importlib.import_module("jsonschema")
        except ImportError as error:
            raise UserError(
                "JSON Schemas need the package jsonschema; run: pip install 'instant-reward[format]'"
            ) from error
        draft = _draft(self.schema)
        validator = getattr(package, draft)
        try:
            validator.check_schema(self.schema)
        except package.SchemaError as error:
            raise UserError(
                f"JsonSchema: the schema is wrong at {error.json_path}: {error.message[:200]}; mend it"
            ) from error
        self.nodes = Nodes(self.schema, old_items=draft != "Draft202012Validator", lone_refs=draft in _LONE_REFS)
        self._validator = package.validators.extend(validator, self._keywords(package.ValidationError))(self.schema)

    def accepts(self, text: str) -> bool:
        """Whether a whole document, which is JSON, holds."""
        try:
            return bool(self._validator.is_valid(json.loads(text)))
        except (RecursionError, OverflowError):  # a schema that refers to itself deeply; 1e999 as a whole number
            return False

    def _keywords(self, wrong: type[Exception]) -> dict[str, Any]:
        """The keywords with patterns: with a time limit, and the same patterns that prefixes are held against."""
        pattern = self.nodes.pattern

        def has_pattern(validator: Any, one: str, value: Any, schema: Any) -> Iterator[Exception]:
            if isinstance(value, str) and not pattern(one).matches(value):
                yield wrong("the pattern does not match")

        def by_pattern(validator: Any, several: Mapping[str, Schema], value: Any, schema: Any) -> Iterator[Exception]:
            for key in value if isinstance(value, dict) else ():
                for one, inner in several.items():
                    if pattern(one).matches(key):
                        yield from validator.descend(value[key], inner, path=key, schema_path=one)

        def others(validator: Any, inner: Schema, value: Any, schema: Any) -> Iterator[Exception]:
            known, several = schema.get("properties", {}), schema.get("patternProperties", {})
            for key in value if isinstance(value, dict) else ():
                if key not in known and not any(pattern(one).matches(key) for one in several):
                    yield from validator.descend(value[key], inner, path=key)

        return {"pattern": has_pattern, "patternProperties": by_pattern, "additionalProperties": others}


class SchemaReader:
    """Reads a text that has to be a document of a schema."""

    def __init__(self, compiled: Compiled) -> None:
        self._compiled = compiled
        self._reader = JsonReader(listener=SchemaCheck(compiled.nodes.root))
        self._text = ""

    def push(self, characters: str) -> bool:
        """See ``Reader``."""
        self._text += characters
        return self._reader.push(characters)

    def valid(self) -> bool:
        """See ``Reader``."""
        return self._reader.valid() and self._compiled.accepts(self._text)


@dataclass(slots=True)
class _Value:
    """A value that has begun.

    Attributes:
        first: its first character, as ``Listener.begin`` names it.
        wanted: the nodes that what is around it needs it to be.
        alive: all nodes that are asked about it, and whether each may hold, those it refers to aside.
        needs: for each node, the nodes of the value inside that is read now or next.
        count: how many keys or items have begun.
        text: the text so far, or the key.
    """

    first: str
    wanted: list[Node]
    alive: dict[Node, bool]
    needs: dict[Node, list[Node]] = field(default_factory=dict)
    count: int = 0
    keys: set[str] = field(default_factory=set)
    text: str = ""
    growths: list[tuple[Node, Growth]] = field(default_factory=list)


class SchemaCheck:
    """Holds a document that is being read against a node; see ``Listener``.

    Each open value has one entry for each node that is asked about it, whoever asks: so a schema that refers to itself
    in several ways costs no more than its nodes. Where a node is lost, those that need it are lost as well, outwards.
    An object that has a key twice is rejected.
    """

    def __init__(self, root: Node) -> None:
        self._root = root
        self._open: list[_Value] = []

    def begin(self, first: str) -> bool:
        """See ``Listener``."""
        wanted = [self._root]
        if self._open:
            outer = self._open[-1]
            if outer.first == "[":
                if not outer.count and not self._expect_item(outer):
                    return False
                outer.count += 1
            wanted = list({node: None for needed in outer.needs.values() for node in needed})
        if len(self._open) == DEEPEST and first in "[{":
            return False
        value = _Value(first, wanted, _all_asked(wanted, first))
        if first == '"':
            value.growths = [(node, Growth(pattern)) for node in _holding(value) for pattern in node.patterns]
        self._open.append(value)
        return all(value.alive.values()) or self._settle()

    def begin_key(self) -> bool:
        """See ``Listener``."""
        value = self._open[-1]
        value.text = ""
        value.count += 1
        return self._drop(value, lambda node: _exceeds(value.count, node.most_keys) or _no_key(node, value))

    def grow(self, characters: str) -> bool:
        """See ``Listener``."""
        value = self._open[-1]
        value.text += characters
        if value.first == "{":
            return self._drop(value, lambda node: _no_key(node, value))
        lost = {node for node, growth in value.growths if value.alive[node] and not growth.viable(value.text)}
        return self._drop(
            value,
            lambda node: (
                node in lost
                or _exceeds(len(value.text), node.most)
                or (node.words is not None and not any(word.startswith(value.text) for word in node.words))
            ),
        )

    def end_key(self) -> bool:
        """See ``Listener``."""
        value = self._open[-1]
        if value.text in value.keys:
            return False
        value.keys.add(value.text)
        value.needs = {node: node.of_key(value.text) for node in _holding(value)}
        return self._drop(value, lambda node: any(inner.never for inner in value.needs[node]))

    def end_text(self) -> bool:
        """See ``Listener``."""
        value = self._open[-1]
        text = value.text
        return self._end(
            lambda node: (
                len(text) < node.least
                or (node.words is not None and text not in node.words)
                or not all(pattern.matches(text) for pattern in node.patterns)
            )
        )

    def end_number(self, number: str) -> bool:
        """See ``Listener``."""
        try:
            read: Number = int(number) if number.removeprefix("-").isdigit() else float(number)
        except ValueError:  # more digits than Python's json reads
            return False
        return self._end(lambda node: not all(keeps(read) for keeps in node.numbers))

    def end_word(self) -> bool:
        """See ``Listener``."""
        return self._end(lambda node: False)

    def separate(self) -> bool:
        """See ``Listener``."""
        value = self._open[-1]
        if value.first == "{":
            value.text = ""
            return self._drop(value, lambda node: _exceeds(value.count + 1, node.most_keys) or _no_key(node, value))
        return self._expect_item(value)

    def close(self) -> bool:
        """See ``Listener``."""
        value = self._open[-1]
        if value.first == "[":
            return self._end(lambda node: value.count < node.fewest_items)
        return self._end(lambda node: not node.required <= value.keys or len(value.keys) < node.fewest_keys)

    def _expect_item(self, value: _Value) -> bool:
        """One more item follows."""
        value.needs = {node: node.of_item(value.count) for node in _holding(value)}
        return self._drop(
            value,
            lambda node: _exceeds(value.count + 1, node.most_items) or any(inner.never for inner in value.needs[node]),
        )

    def _end(self, lost: Callable[[Node], bool]) -> bool:
        """The innermost value has ended."""
        holds = self._drop(self._open[-1], lost)
        self._open.pop()
        return holds

    def _drop(self, value: _Value, lost: Callable[[Node], bool]) -> bool:
        """Gives up the innermost value's nodes that are lost; returns whether the document may still hold."""
        found = [node for node in _holding(value) if lost(node)]
        value.alive.update(dict.fromkeys(found, False))
        return not found or self._settle()

    def _settle(self) -> bool:
        """Tells the values around the innermost one what it has lost; returns whether the document may still hold."""
        for depth in range(len(self._open) - 1, -1, -1):
            value = self._open[depth]
            known: dict[Node, bool] = {}
            lost = {node for node in value.wanted if not _may_hold(node, value, known)}
            if not lost:
                return True
            if depth:
                outer = self._open[depth - 1]
                for node, needed in outer.needs.items():
                    outer.alive[node] = outer.alive[node] and lost.isdisjoint(needed)
        return False


def _all_asked(wanted: Sequence[Node], first: str) -> dict[Node, bool]:
    """These nodes and all they refer to for the same value, and whether each may begin so."""
    found: dict[Node, bool] = {}
    waiting = list(wanted)
    while waiting:
        node = waiting.pop()
        if node not in found:
            found[node] = first in node.first
            waiting += node.all_of
            waiting += [one for group in node.any_of for one in group]
    return found


def _may_hold(node: Node, value: _Value, known: dict[Node, bool]) -> bool:
    if node not in known:
        known[node] = (
            value.alive[node]
            and all(_may_hold(one, value, known) for one in node.all_of)
            and all(any(_may_hold(one, value, known) for one in group) for group in node.any_of)
        )
    return known[node]


def _holding(value: _Value) -> list[Node]:
    return [node for node, alive in value.alive.items() if alive]


def _exceeds(count: int, most: Number | None) -> bool:
    return most is not None and count > most


def _no_key(node: Node, value: _Value) -> bool:
    """Whether no key that begins with the object's current text is allowed and new."""
    if node.others is None or not node.others.never or node.by_pattern:
        return False
    return not any(
        key.startswith(value.text) and key not in value.keys and not inner.never
        for key, inner in node.properties.items()
    )


def _plain(schema: Mapping[str, Any] | bool | str) -> Schema:
    """The schema as JSON has it; read from a file where it is a path."""
    try:
        found = json.loads(Path(schema).read_text(encoding="utf-8")) if isinstance(schema, str) else schema
        plain = json.loads(json.dumps(found, allow_nan=False))
    except OSError as error:
        raise UserError(
            f"JsonSchema: the schema {schema!r} cannot be opened ({error.strerror}); mend the path"
        ) from error
    except (TypeError, ValueError) as error:
        raise UserError(f"JsonSchema: the schema is no JSON: {error}; mend it") from error
    if not isinstance(plain, dict | bool):
        raise UserError(f"JsonSchema: the schema is a {type(found).__name__}; give a mapping, or the path of a file")
    return plain


def _draft(schema: Schema) -> str:
    named = schema.get("$schema") if isinstance(schema, dict) else None
    if named is None:
        return "Draft202012Validator"
    draft = _DRAFTS.get(str(named).rstrip("#"))
    if draft is None:
        raise UserError(f"JsonSchema: $schema {named!r} is unknown; use one of {', '.join(_DRAFTS)}, or leave it out")
    return draft
