"""Rewards for a text's form, judged while it is written: a text that can no longer become valid is stopped.

    rewards:
      - use: instant_reward.rewards.format:JsonSchema
        args: {schema: {type: object, properties: {age: {type: integer, minimum: 0}}, required: [age]}, invalid: -1.0}
      - use: instant_reward.rewards.format:Regex
        args: {pattern: '\\d+ apples?\\.', valid: 1.0, viable: 0.01}

A text is paid ``valid`` at its end where its form is right, and ``invalid`` where it is stopped, or at its end where it
is wrong or unfinished (a text that is cut off by length included). No text is stopped that could still become valid.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from instant_reward.rewards.format_base import Form, Reader, flag
from instant_reward.rewards.format_pattern import Pattern, PatternReader
from instant_reward.rewards.format_python import CodeReader, FencedCodeReader, quiet
from instant_reward.rewards.json_reader import JsonReader
from instant_reward.rewards.json_schema import Compiled, SchemaReader
from instant_reward.types import UserError


class Regex(Form):
    """Whether the whole text matches a regular expression: ``valid`` or ``invalid``, and ``viable`` at pieces before.

    The pattern is read as by Python's ``re``; what the package ``regex`` adds (\\p{L}, possessive quantifiers) may be
    used. To let a point match line ends too, begin it with (?s). A text is stopped where the package's partial matching
    finds that no continuation matches: exact for plain patterns; with lookarounds, word boundaries or anchors inside,
    some lost texts go on for a while. Patterns with (?x), fuzzy matching, recursion or \\X are judged at the end only.

    Args:
        timeout: seconds of processor time that the looks at one text may take together while it is written, and the
            look at its end. Where they take longer, as with (a+)+b, the text is not stopped any more, and counts as
            wrong if its end takes too long as well; this is said once, and the reward then depends on the machine.

    Cost: 0.3 to 2 microseconds a character, 5 to 12 for repeated groups such as a list of numbers. Texts of over 128
    characters are looked at whenever they have grown by a 64th, so that none costs more than 70 passes on top of that:
    a long one may be stopped that much later. What games it: the shortest text that matches, and parts such as .* that
    anything fills; with ``viable``, a text that goes on and on. Source: the package regex.
    """

    name = "regex"

    def __init__(
        self,
        pattern: str,
        valid: float = 1.0,
        invalid: float = 0.0,
        viable: float | None = None,
        timeout: float = 1.0,
    ) -> None:
        """Raises UserError where ``pattern`` cannot be read, or another argument is none of those."""
        super().__init__(valid, invalid, viable)
        if not isinstance(pattern, str):
            raise UserError(f"{self.name}: pattern={pattern!r} must be a regular expression, as text")
        if isinstance(timeout, bool) or not isinstance(timeout, int | float) or not 0.0 < timeout <= 3600.0:
            raise UserError(f"{self.name}: timeout={timeout!r} must be a number of seconds above 0, an hour at most")
        self._pattern = Pattern(pattern, self.name, timeout=timeout)

    def reader(self) -> Reader:
        """See ``Form``."""
        return PatternReader(self._pattern)


class Json(Form):
    """Whether the text is JSON, with white space around it or without: ``valid`` or ``invalid``, and ``viable`` before.

    Any value of RFC 8259, not only an object or a list, nested as deep as it may be. A text is stopped at the end of
    the first piece with a character that cannot stand there: exactly where no continuation is JSON.

    Args:
        constants: whether NaN, Infinity and -Infinity are values too, as for Python's ``json``.

    Cost: 0.4 to 2 microseconds a character, each of which is read once. What games it: a number, or an empty list,
    is JSON: ask for more with ``JsonSchema``; with ``viable``, white space or a text without an end. Source: RFC 8259,
    "The JavaScript Object Notation (JSON) Data Interchange Format" (2017).
    """

    name = "json"

    def __init__(
        self,
        valid: float = 1.0,
        invalid: float = 0.0,
        viable: float | None = None,
        constants: bool = False,
    ) -> None:
        """Raises UserError where an argument is none of those."""
        super().__init__(valid, invalid, viable)
        self.constants = flag(constants, self.name, "constants")

    def reader(self) -> Reader:
        """See ``Form``."""
        return JsonReader(self.constants)


class JsonSchema(Form):
    """Whether the text is JSON that a JSON Schema accepts: ``valid`` or ``invalid``, and ``viable`` at pieces before.

    While a text is written it is held against type, enum, const, properties, patternProperties, additionalProperties,
    required, items, prefixItems, the bounds of numbers, of lengths and of counts of items and keys, pattern, allOf,
    anyOf, oneOf and $ref, and stopped where they show that no continuation is accepted: at a brace where a text should
    stand, within a key that is not allowed, at the end of a number that is too large. Everything else (not, if,
    uniqueItems, multipleOf, one only of oneOf ...) is judged at the end. format is not judged. An object with the same
    key twice, and more than 64 levels of nesting, count as wrong. Patterns are read as by ``Regex``.

    Args:
        schema: a mapping, or the path of a JSON file that holds it; drafts 2020-12 (where it has no $schema), 2019-09,
            7 and 6. References lead to its own parts (#/$defs/name).

    Cost: 1 to 4 microseconds a character, more where many schemas of an anyOf are open, and one validation at the end
    (0.5 ms). Needs the package jsonschema. What games it: the shortest document that is accepted, with empty texts and
    lists: set minLength, minItems and required; with ``viable``, white space, or a text without maxLength. Source: JSON
    Schema, draft 2020-12; the package jsonschema. Raises UserError where it is missing.
    """

    name = "json_schema"

    def __init__(
        self,
        schema: Mapping[str, Any] | bool | str,
        valid: float = 1.0,
        invalid: float = 0.0,
        viable: float | None = None,
    ) -> None:
        """Raises UserError where the schema or another argument cannot be used, or jsonschema is missing."""
        super().__init__(valid, invalid, viable)
        self._compiled = Compiled(schema)

    def reader(self) -> Reader:
        """See ``Form``."""
        return SchemaReader(self._compiled)

    def __reduce__(self) -> tuple[Any, ...]:
        """What is compiled holds functions, which cannot be sent to another process: it is made anew there."""
        return JsonSchema, (self._compiled.schema, self.valid, self.invalid, self.viable)


class PythonCode(Form):
    """Whether the text is a Python program that parses: ``valid`` or ``invalid``, and ``viable`` at pieces before.

    A text is stopped at the end of a line when Python's parser finds that no continuation of the lines so far parses;
    the line that is being written is not looked at. Nothing is run. The parser is that of the Python which runs this.

    Args:
        fence: whether the program stands between a line ```python (or ```py) and a line ```, with nothing but white
            space around them; the first line that is only ``` ends it. Otherwise the text is the program.
        statements: how many statements it must have, outside and inside blocks together: 0 lets an empty text and one
            of comments count as a program.

    Cost: about 1 microsecond a character; one parse of the whole at the end, and where a text is stopped. What games
    it: a word, a number or a quoted essay parses, and so does ``pass``: it says nothing of what the program does.
    Source: Python's own parser (``ast.parse``).
    """

    name = "python_code"

    def __init__(
        self,
        fence: bool = False,
        valid: float = 1.0,
        invalid: float = 0.0,
        viable: float | None = None,
        statements: int = 1,
    ) -> None:
        """Raises UserError where an argument is none of those."""
        super().__init__(valid, invalid, viable)
        self.fence = flag(fence, self.name, "fence")
        if type(statements) is not int or statements < 0:
            raise UserError(f"{self.name}: statements={statements!r} must be a whole number from 0")
        self.statements = statements

    def reader(self) -> Reader:
        """See ``Form``."""
        quiet()
        return FencedCodeReader(self.statements) if self.fence else CodeReader(self.statements)
