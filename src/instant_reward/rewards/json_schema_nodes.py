"""A JSON Schema as nodes that an unfinished document can be held against.

A node knows what shows before a document is over: the kind of a value by its first character, keys that are not
allowed, lengths and counts that are exceeded, numbers and texts once they have ended. Every other keyword is left to
the end, hence a node may accept what its schema does not, and never the reverse.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any
from urllib.parse import unquote

from instant_reward.rewards.format_pattern import Pattern
from instant_reward.types import UserError

Schema = bool | dict[str, Any]
Number = int | float

# The first characters of each type's values; 0 stands for any digit.
_FIRST = {"object": "{", "array": "[", "string": '"', "number": "-0", "integer": "-0", "boolean": "tf", "null": "n"}
_ANY_FIRST = frozenset('{["-0tfn')
_BOUNDS: dict[str, Callable[[Any, Any], bool]] = {
    "minimum": operator.ge,
    "exclusiveMinimum": operator.gt,
    "maximum": operator.le,
    "exclusiveMaximum": operator.lt,
}
# Where schemas stand in a schema: one, several in a list, or one for each name.
_ONE = (
    "additionalItems", "additionalProperties", "contains", "else", "if", "items", "not", "propertyNames", "then",
    "unevaluatedItems", "unevaluatedProperties",
)  # fmt: skip
_SEVERAL = ("allOf", "anyOf", "items", "oneOf", "prefixItems")
_BY_NAME = ("$defs", "definitions", "dependencies", "dependentSchemas", "patternProperties", "properties")
_SAME_VALUE = ("allOf", "anyOf", "dependencies", "dependentSchemas", "else", "if", "not", "oneOf", "then")


@dataclass(eq=False, slots=True)
class Node:
    """What must hold for one value; the fields of a kind count only where the value is of that kind.

    Attributes:
        first: which characters the value may begin with, as ``Listener.begin`` names them.
        numbers: what a number must be.
        words: the texts that are allowed; None for any.
        least, most: how many characters a text has.
        properties, by_pattern, others: the node of a key's value: by its name, by patterns its name has, or else.
        fewest_keys, most_keys, required: the keys of an object.
        places, rest: the node of an item: by its place, and of those after them.
        fewest_items, most_items: the items of a list.
        all_of: nodes for the same value, all of which must hold.
        any_of: lists of nodes for the same value: of each list one must hold.
    """

    first: frozenset[str] = _ANY_FIRST
    numbers: list[Callable[[Number], bool]] = field(default_factory=list)
    words: frozenset[str] | None = None
    least: Number = 0
    most: Number | None = None
    patterns: list[Pattern] = field(default_factory=list)
    properties: dict[str, Node] = field(default_factory=dict)
    by_pattern: list[tuple[Pattern, Node]] = field(default_factory=list)
    others: Node | None = None
    required: frozenset[str] = frozenset()
    fewest_keys: Number = 0
    most_keys: Number | None = None
    places: list[Node] = field(default_factory=list)
    rest: Node | None = None
    fewest_items: Number = 0
    most_items: Number | None = None
    all_of: list[Node] = field(default_factory=list)
    any_of: list[list[Node]] = field(default_factory=list)

    @property
    def never(self) -> bool:
        """Whether no value holds, whatever it is."""
        return not self.first

    @property
    def reads_texts(self) -> bool:
        """Whether it asks anything of a text."""
        return self.words is not None or self.most is not None or bool(self.patterns) or self.least > 0

    def of_key(self, key: str) -> list[Node]:
        """The nodes of a key's value."""
        found = [self.properties[key]] if key in self.properties else []
        found += [node for pattern, node in self.by_pattern if pattern.matches(key)]
        return found if found or self.others is None else [self.others]

    def of_item(self, place: int) -> list[Node]:
        """The node of the item at this place, counted from 0."""
        if place < len(self.places):
            return [self.places[place]]
        return [] if self.rest is None else [self.rest]


class Nodes:
    """Makes the nodes of one schema.

    Args:
        schema: a JSON Schema, of draft 6 or later, that its meta-schema accepts.
        old_items: a list in ``items`` says what stands at each place (drafts before 2020-12).
        lone_refs: ``$ref`` stands for the whole schema it is in (drafts before 2019-09).

    Raises UserError where a reference leads nowhere or out of the schema, where a schema refers to itself for the same
    value, and where a pattern cannot be read.
    """

    def __init__(self, schema: Schema, old_items: bool, lone_refs: bool) -> None:
        self._schema, self._old_items, self._lone_refs = schema, old_items, lone_refs
        self._referred: dict[str, Node] = {}
        self._patterns: dict[str, Pattern] = {}
        self._check()
        self.root = self.refer("#")

    def pattern(self, pattern: str) -> Pattern:
        """A pattern that any part of a text may match; each is compiled once."""
        if pattern not in self._patterns:
            self._patterns[pattern] = Pattern(pattern, "JsonSchema", whole=False)
        return self._patterns[pattern]

    def refer(self, reference: str) -> Node:
        """The node that a reference such as "#/$defs/name" leads to; the same one each time."""
        if reference not in self._referred:
            node = self._referred[reference] = Node()
            self._fill(node, self._at(reference))
        return self._referred[reference]

    def _node(self, schema: Schema) -> Node:
        node = Node()
        self._fill(node, schema)
        return node

    def _fill(self, node: Node, schema: Schema) -> None:
        if isinstance(schema, bool):
            node.first = node.first if schema else frozenset()
            return
        reference = schema.get("$ref")
        if reference is not None:
            if _is_pointer(reference):
                node.all_of.append(self.refer(reference))
            if self._lone_refs:
                return
        types = schema.get("type", list(_FIRST))
        types = [types] if isinstance(types, str) else types
        node.first = frozenset("".join(_FIRST[kind] for kind in types))
        if "integer" in types and "number" not in types:
            node.numbers.append(_is_integer)
        self._fill_scalars(node, schema)
        self._fill_object(node, schema)
        self._fill_array(node, schema)
        node.all_of += [self._node(one) for one in schema.get("allOf", [])]
        node.any_of += [[self._node(one) for one in schema[key]] for key in ("anyOf", "oneOf") if key in schema]
        if "const" in schema:
            node.all_of.append(_exactly(schema["const"]))
        if "enum" in schema:
            node.any_of.append(_one_of(schema["enum"]))

    def _fill_scalars(self, node: Node, schema: dict[str, Any]) -> None:
        for key, compare in _BOUNDS.items():
            if key in schema:
                node.numbers.append(partial(_keeps, compare, schema[key]))
                if not compare(0, schema[key]):  # a number with a minus is 0 at most, one without 0 at least
                    node.first -= {"-" if "inimum" in key else "0"}
        node.least, node.most = schema.get("minLength", 0), schema.get("maxLength")
        if "pattern" in schema:
            node.patterns.append(self.pattern(schema["pattern"]))

    def _fill_object(self, node: Node, schema: dict[str, Any]) -> None:
        node.properties = {key: self._node(one) for key, one in schema.get("properties", {}).items()}
        node.by_pattern = [
            (self.pattern(key), self._node(one)) for key, one in schema.get("patternProperties", {}).items()
        ]
        if "additionalProperties" in schema:
            node.others = self._node(schema["additionalProperties"])
        node.required = frozenset(schema.get("required", []))
        node.fewest_keys, node.most_keys = schema.get("minProperties", 0), schema.get("maxProperties")

    def _fill_array(self, node: Node, schema: dict[str, Any]) -> None:
        places, rest = schema.get("prefixItems", []), schema.get("items")
        if self._old_items:
            listed = isinstance(rest, list)
            places, rest = (rest, schema.get("additionalItems")) if listed else ([], rest)
        node.places = [self._node(one) for one in places or []]
        node.rest = None if rest is None else self._node(rest)
        node.fewest_items, node.most_items = schema.get("minItems", 0), schema.get("maxItems")

    def _check(self) -> None:
        """Looks at every schema in the schema, those that are referred to included."""
        met: dict[int, dict[str, Any]] = {}
        waiting: list[Any] = [self._schema]
        while waiting:
            schema = waiting.pop()
            if isinstance(schema, dict) and id(schema) not in met:
                met[id(schema)] = schema
                self._check_address(schema)
                waiting += [inner for inner, _ in self._inside(schema)]
        anchors = {schema[key] for schema in met.values() for key in ("$anchor", "$dynamicAnchor") if key in schema}
        for schema in met.values():
            for reference in _references(schema):
                if not _is_pointer(reference) and reference[1:] not in anchors:
                    raise UserError(f"JsonSchema: {reference!r} leads to no part of the schema; mend it")
        self._check_loops(list(met.values()))

    def _check_address(self, schema: dict[str, Any]) -> None:
        if "$id" in schema and schema is not self._schema:
            raise UserError(
                f"JsonSchema: a part of the schema has an address of its own, {schema['$id']!r}; "
                "move it to $defs without $id, and refer to it as #/$defs/name"
            )
        for reference in _references(schema):
            if not reference.startswith("#"):
                raise UserError(
                    f"JsonSchema: {reference!r} lies outside the schema; copy it into $defs, and refer to it as "
                    "#/$defs/name"
                )

    def _check_loops(self, schemas: Sequence[dict[str, Any]]) -> None:
        """A schema that asks itself about the same value would never come to an end."""
        ended: set[int] = set()

        def follow(schema: Any, above: tuple[int, ...]) -> None:
            if id(schema) in above:
                raise UserError(
                    f"JsonSchema: the schema {str(schema)[:60]} refers to itself for the same value without end; put "
                    "properties or items in between"
                )
            if isinstance(schema, dict) and id(schema) not in ended:
                for inner, same in self._inside(schema):
                    if same:
                        follow(inner, (*above, id(schema)))
                ended.add(id(schema))

        for schema in schemas:
            follow(schema, ())

    def _inside(self, schema: dict[str, Any]) -> Iterator[tuple[Any, bool]]:
        """The schemas in a schema and those it refers to, and whether each is for the same value."""
        if _is_pointer(schema.get("$ref", "")):
            yield self._at(schema["$ref"]), True
        for key in _ONE:
            if key in schema and not isinstance(schema[key], list):
                yield schema[key], key in _SAME_VALUE
        for key in _SEVERAL:
            if isinstance(schema.get(key), list):
                yield from ((one, key in _SAME_VALUE) for one in schema[key])
        for key in _BY_NAME:
            yield from ((one, key in _SAME_VALUE) for one in schema.get(key, {}).values())

    def _at(self, reference: str) -> Schema:
        """What stands at a pointer into the schema."""
        found: Any = self._schema
        for part in unquote(reference[1:]).split("/")[1:]:
            name = part.replace("~1", "/").replace("~0", "~")
            if isinstance(found, dict) and name in found:
                found = found[name]
            elif isinstance(found, list) and name.isdecimal() and int(name) < len(found):
                found = found[int(name)]
            else:
                found = None
                break
        if not isinstance(found, bool | dict):
            raise UserError(f"JsonSchema: {reference!r} leads to no part of the schema; mend it")
        return found


def _references(schema: dict[str, Any]) -> list[str]:
    return [schema[key] for key in ("$ref", "$dynamicRef", "$recursiveRef") if key in schema]


def _is_pointer(reference: str) -> bool:
    return reference == "#" or reference.startswith("#/")


def _is_integer(number: Number) -> bool:
    return isinstance(number, int) or number.is_integer()


def _keeps(compare: Callable[[Any, Any], bool], bound: Number, number: Number) -> bool:
    return compare(number, bound)


def _exactly(value: Any) -> Node:
    """The node of one value."""
    if isinstance(value, str):
        return _texts([value])
    if value is None or isinstance(value, bool):
        return Node(first=frozenset("n" if value is None else "t" if value else "f"))
    if isinstance(value, list):
        places = [_exactly(one) for one in value]
        return Node(first=frozenset("["), places=places, rest=_never(), fewest_items=len(value), most_items=len(value))
    if isinstance(value, dict):
        properties = {key: _exactly(one) for key, one in value.items()}
        return Node(first=frozenset("{"), properties=properties, others=_never(), required=frozenset(value))
    sides = ("-" if value <= 0 else "") + ("0" if value >= 0 else "")
    return Node(first=frozenset(sides), numbers=[partial(operator.eq, value)])


def _one_of(values: Sequence[Any]) -> list[Node]:
    """The nodes of several values; the texts among them share one."""
    texts = [value for value in values if isinstance(value, str)]
    others = [_exactly(value) for value in values if not isinstance(value, str)]
    return [*others, _texts(texts)] if texts else others


def _texts(words: Sequence[str]) -> Node:
    return Node(first=frozenset('"'), words=frozenset(words))


def _never() -> Node:
    return Node(first=frozenset())
