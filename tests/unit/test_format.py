"""Rewards for form: where texts are stopped and what they are paid, and what is said of bad arguments."""

from __future__ import annotations

import json
import pickle
import re
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

import instant_reward as ir
from instant_reward.assemble import build_rewards
from instant_reward.config import RewardConfig
from instant_reward.rewards import format_pattern, format_python
from instant_reward.rewards.base import as_reward
from instant_reward.rewards.format import Json, JsonSchema, PythonCode, Regex
from instant_reward.rewards.format_base import Form
from instant_reward.rewards.format_pattern import as_in_re, prefix_pattern
from instant_reward.rewards.watch import Watch
from instant_reward.text import TextDecoder
from instant_reward.types import Prompt, Stop, UserError, View
from tiny import shared_tokenizer

ABOUT = Prompt("p3", "So:", [1, 2])


def kept(form: Form, text: str) -> str | None:
    """What a text that is written character by character is stopped at; None where it is not stopped."""
    reader = form.reader()
    for end, character in enumerate(text, start=1):
        if not reader.push(character):
            return text[:end]
    return None


def paid(form: Form, pieces: Sequence[str], done: bool = True) -> list[Any]:
    """What each piece is paid, up to the one that stops the text."""
    state, text, values = form.start(ABOUT), "", []
    for number, piece in enumerate(pieces, start=1):
        text += piece
        values.append(form.extend(state, View(text, piece, ABOUT, {}, done=done and number == len(pieces))))
        if isinstance(values[-1], Stop):
            break
    return values


class TestPay:
    def test_the_end_is_paid_by_whether_the_form_is_right(self) -> None:
        assert paid(Json(), ["[1", ", 2", "]"]) == [None, None, 1.0]
        assert paid(Json(), ["[1", ", 2"]) == [None, 0.0]
        assert paid(Json(valid=2, invalid=-3), ["[1", "]"]) == [None, 2.0]
        assert paid(Json(valid=2, invalid=-3), ["[1", "}"]) == [None, -3.0]

    def test_a_text_is_stopped_at_the_piece_that_cannot_be_mended(self) -> None:
        assert paid(Json(invalid=-3), ["[1", "}", "]"]) == [None, Stop(-3.0)]

    def test_pieces_are_paid_while_the_text_may_become_valid_and_the_last_one_is_not(self) -> None:
        assert paid(Json(viable=0.125), ["[", "1", "]"]) == [0.125, 0.125, 1.0]
        assert paid(Json(viable=0.0), ["[", "]", "]"]) == [0.0, 0.0, 0.0]
        assert paid(Json(viable=0.125), ["[", ")"], done=False) == [0.125, Stop(0.0)]

    def test_a_text_that_cannot_be_mended_is_wrong_even_where_its_end_comes_with_it(self) -> None:
        assert paid(PythonCode(fence=True), ["```python\n", "x\n```", "\nDone."]) == [None, None, 0.0]

    def test_an_empty_text_is_judged_too(self) -> None:
        assert paid(Json(), [""]) == [0.0]
        assert paid(Regex("a*"), [""]) == [1.0]

    @pytest.mark.parametrize("form", [Regex("a|b"), Json(), JsonSchema(True), PythonCode()])
    def test_pieces_are_tokens_unless_the_config_says_otherwise(self, form: Form) -> None:
        assert as_reward(form).every == "token"
        assert as_reward(form).name == form.name

    def test_a_config_names_them(self) -> None:
        config = [
            RewardConfig(use="instant_reward.rewards.format:Regex", args={"pattern": r"\d+", "viable": 0.5}),
            RewardConfig(use="instant_reward.rewards.format:JsonSchema", args={"schema": {"type": "object"}}),
        ]
        regex, schema = build_rewards(config)
        assert (regex.name, regex.every, regex.function.viable) == ("Regex", "token", 0.5)
        assert schema.function.score("{}") == 1.0

    @pytest.mark.parametrize("form", [Regex("a|b", 2, -1), Json(2, -1), JsonSchema({"minLength": 1}, 2, -1)])
    def test_they_can_be_sent_to_another_process(self, form: Form) -> None:
        twin = pickle.loads(pickle.dumps(form))
        for text in ("a", '"a"', '""'):
            assert twin.score(text) == form.score(text)
        assert (twin.valid, twin.invalid, twin.viable) == (2.0, -1.0, None)


class TestRegex:
    @pytest.mark.parametrize(
        ("pattern", "text", "left"),
        [
            ("yes|no", "yep", "yep"),
            ("yes|no", "yes", None),
            ("yes|no", "yes, it is", "yes,"),
            (r"\d{3}-\d{4}", "555-12a4", "555-12a"),
            (r"<think>[^<]*</think>\d+", "<think>so</thank>42", "<think>so</tha"),
            (r"<think>.*?</think>", "<think>so\nwhat</think>", "<think>so\n"),
            (r"(?s)<think>.*?</think>", "<think>so\nwhat</think>", None),
            (r"(?i)answer: \w+", "ANSWER: oui!", "ANSWER: oui!"),
            (r"(\w)\1", "ab", "ab"),
            (r"a\bb", "abc", "ab"),
            (r"a\B b", "a bc", "a "),
            (r"(?a)\w+", "né", "né"),
            (r"\bone\b two", "one two", None),
            (r"(?!the)\w+ \d", "they 1", "the"),
            (r"(?!a).*", "ab", "a"),
            ("[^\n]{1,3}\n", "你好吗。\n", "你好吗。"),
            (r"\p{Han}+", "你x", "你x"),
            ("a++b", "aac", "aac"),
            (r"[]a]+\]", "a]b", "a]b"),
            (r"a{,2}", "aaa", "aaa"),
        ],
    )
    def test_by_hand(self, pattern: str, text: str, left: str | None) -> None:
        assert kept(Regex(pattern), text) == left

    @pytest.mark.parametrize(
        "pattern", [r"\s", r"\S", r"[\s]", r"\w", r"[^\w]", r"\d", r"\b.", r".\b", r"\B.", r"(?a)\w", r"(?a)\s|\b."]
    )
    def test_classes_are_those_of_re(self, pattern: str) -> None:
        expected, form = re.compile(pattern), Regex(pattern)
        for text in "\x1c\x1f \xa0\u3000ax_²½٣é你ß-\ud83d":
            assert (form.score(text) == 1.0) == bool(expected.fullmatch(text)), text

    @pytest.mark.parametrize(
        ("pattern", "text"),
        [(r"(?x) a [#] # no \b 'tis", "a#"), ("(?:abc){e<=1}", "abd"), (r"(a(?1)?b)", "aabb"), (r"\X", "e\u0301")],
    )
    def test_what_partial_matching_cannot_be_trusted_with_is_judged_at_the_end_only(
        self, pattern: str, text: str
    ) -> None:
        assert prefix_pattern(pattern) is None
        assert Regex(pattern).score(text) == 1.0
        assert kept(Regex(pattern), "zzz") is None
        assert Regex(pattern).score("zzz") == 0.0

    def test_patterns_are_rewritten_for_prefixes(self) -> None:
        assert prefix_pattern(r"a*?b??[*?]\?c") == r"a*b?[*?]\?c"
        assert prefix_pattern(r"(?>a*?)b") == r"(?>a*?)b"
        assert prefix_pattern(r"[\b]\\b\d+?") == r"[\b]\\b\d+"
        assert as_in_re(r"(?a)\w\s") == prefix_pattern(r"(?a)\w\s") == r"(?a)\w\s"
        assert prefix_pattern(r"(?a)\w\b") is None
        assert as_in_re(r"[[:alpha:]\s]\\s") == r"[[:alpha:]\s\x1c-\x1f]\\s"

    def test_a_pattern_that_backtracks_without_end_hangs_nothing(self, capsys: pytest.CaptureFixture[str]) -> None:
        form = Regex(r"(?:(?:a|aa|a)+)+\d", timeout=0.05)
        text = "a" * 60 + "!"
        assert len(kept(form, text) or text) > 20  # how long it is looked at depends on the machine
        assert form.score(text + "?") == 0.0
        said = capsys.readouterr().err.splitlines()
        assert len(said) == 1, "it is said once"
        assert "takes over 0.05 s" in said[0]

    def test_a_long_text_is_looked_at_now_and_then_and_stopped_at_once_while_it_is_short(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        looks: list[int] = []
        viable = format_pattern.Pattern.viable
        monkeypatch.setattr(
            format_pattern.Pattern, "viable", lambda self, text: looks.append(len(text)) or viable(self, text)
        )
        assert kept(Regex("[a ]+"), "a " * 5000) is None
        assert looks[:127] == list(range(1, 128))
        assert sum(looks) < 70 * 10_000
        stopped = kept(Regex("[a ]+"), "a " * 1000 + "b" * 100)
        assert stopped is not None
        assert 2000 < len(stopped) <= 2001 + 2000 // 64

    def test_looks_that_are_slow_together_end(
        self, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        seconds = iter(range(10**6))
        monkeypatch.setattr(format_pattern.time, "thread_time", lambda: next(seconds) / 10)  # each look takes 0.1 s
        form = Regex("a+", timeout=0.55)
        assert kept(form, "a" * 5 + "b") == "a" * 5 + "b"
        assert kept(form, "a" * 6 + "b") is None
        assert "such a text is not stopped" in capsys.readouterr().err


class TestJson:
    @pytest.mark.parametrize(
        ("text", "left"),
        [
            ('{"a": [1, 2.5e-3, true, null]}', None),
            (" \n[ ]\t ", None),
            ("Sure! {", "S"),
            ("{'a'", "{'"),
            ('{"a": 01}', '{"a": 01'),
            ('{"a": 1,}', '{"a": 1,}'),
            ("[1,]", "[1,]"),
            ('{"a" 1}', '{"a" 1'),
            ("[1 2]", "[1 2"),
            ("{} {}", "{} {"),
            ("tree", "tre"),
            ("[1.]", "[1.]"),
            ("-x", "-x"),
            ("1.5e+x", "1.5e+x"),
            ('"a\nb"', '"a\n'),
            ('"\\x"', '"\\x'),
            ('"\\u12g4"', '"\\u12g'),
            ("[1}", "[1}"),
            ("NaN", "N"),
            ("\ufeff{}", "\ufeff"),
            ("1\u00a0", "1\u00a0"),
            ("```json", "`"),
        ],
    )
    def test_by_hand(self, text: str, left: str | None) -> None:
        assert kept(Json(), text) == left

    def test_constants_are_values_where_they_are_asked_for(self) -> None:
        form = Json(constants=True)
        assert [form.score(text) for text in ("NaN", "[-Infinity, Infinity]", "-I", "Inf")] == [1.0, 1.0, 0.0, 0.0]
        assert kept(form, "-Inb") == "-Inb"

    def test_nesting_has_no_end(self) -> None:
        assert Json().score("[" * 100_000 + "]" * 100_000) == 1.0


PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "minLength": 2, "maxLength": 5},
        "age": {"type": "integer", "minimum": 0, "maximum": 150},
        "kind": {"enum": ["cat", "cow", 3, None]},
        "tags": {"type": "array", "items": {"type": "string", "pattern": "^[a-z]+$"}, "minItems": 1, "maxItems": 2},
        "pair": {"prefixItems": [{"const": 1}, {"type": "boolean"}], "items": False, "minItems": 2},
        "id": {"anyOf": [{"type": "string", "pattern": r"^\d+$"}, {"type": "number", "exclusiveMinimum": 0}]},
        "child": {"$ref": "#"},
    },
    "required": ["name"],
    "additionalProperties": False,
}
TREE = {
    "$defs": {"tree": {"oneOf": [{"type": "null"}, {"type": "array", "prefixItems": [{"$ref": "#/$defs/tree"}] * 2}]}},
    "$ref": "#/$defs/tree",
}


class TestJsonSchema:
    @pytest.mark.parametrize(
        ("schema", "text", "left"),
        [
            (PERSON, '{"name": "Ada", "age": 36}', None),
            (PERSON, "[", "["),
            (PERSON, "{}", "{}"),
            (PERSON, '{"nome": 1', '{"no'),
            (PERSON, '{"name": 1', '{"name": 1'),
            (PERSON, '{"name": "A"', '{"name": "A"'),
            (PERSON, '{"name": "Countess"', '{"name": "Counte'),
            (PERSON, '{"name": "\\ud83d\\ude00\\ud83d\\ude00"', None),
            (PERSON, '{"name": "Ada", "name": "Bob"}', '{"name": "Ada", "n'),
            (PERSON, '{"age": -', None),  # -0 would do
            (PERSON, '{"age": -1, ', '{"age": -1,'),
            (PERSON, '{"age": 1.5e0 ', '{"age": 1.5e0 '),
            (PERSON, '{"age": 15e-1}', '{"age": 15e-1}'),
            (PERSON, '{"age": 200}', '{"age": 200}'),
            (PERSON, '{"age": 2000e-1, "name": "Ada"}', '{"age": 2000e-1,'),
            (PERSON, '{"age": 20e0, "name": "Ada"}', None),
            (PERSON, '{"kind": "cup"', '{"kind": "cu'),
            (PERSON, '{"kind": "co"', '{"kind": "co"'),
            (PERSON, '{"kind": 3.0, "ag', None),
            (PERSON, '{"kind": 31,', '{"kind": 31,'),
            (PERSON, '{"kind": t', '{"kind": t'),
            (PERSON, '{"tags": []', '{"tags": []'),
            (PERSON, '{"tags": ["ab1', '{"tags": ["ab1'),
            (PERSON, '{"tags": ["a", "b", ', '{"tags": ["a", "b",'),
            (PERSON, '{"pair": [2, ', '{"pair": [2,'),
            (PERSON, '{"pair": [1, "', '{"pair": [1, "'),
            (PERSON, '{"pair": [1, true, ', '{"pair": [1, true,'),
            (PERSON, '{"pair": [1]', '{"pair": [1]'),
            (PERSON, '{"id": "12a', '{"id": "12a'),
            (PERSON, '{"id": -', '{"id": -'),
            (PERSON, '{"id": true', '{"id": t'),
            (PERSON, '{"child": {"child": {"name": "Ada", "age": "', '{"child": {"child": {"name": "Ada", "age": "'),
            (PERSON, '{"child": {"child": {}', '{"child": {"child": {}'),
            (TREE, "[[null, [null, []]], 1", "[[null, [null, []]], 1"),
            (TREE, "[[[[[[[[null, null], true", "[[[[[[[[null, null], t"),
            ({"maxProperties": 1}, '{"a": 1, ', '{"a": 1,'),
            ({"properties": {"a": True}, "additionalProperties": False}, '{"a": 1, ', '{"a": 1,'),
            ({"properties": {"a": False}}, '{"a": ', '{"a"'),
            ({"patternProperties": {"^n_": {"type": "number"}}}, '{"n_x": "', '{"n_x": "'),
            ({"patternProperties": {"^n_": True}, "additionalProperties": False}, '{"x": ', '{"x"'),
            ({"additionalProperties": {"type": "null"}}, '{"x": 1', '{"x": 1'),
            ({"const": {"a": [1, "x"]}}, '{"a": [1.0, "y"', '{"a": [1.0, "y'),
            ({"const": True}, "1", "1"),
            ({"exclusiveMaximum": 0}, "1", "1"),
            ({"maxItems": 0}, "[1", "[1"),
            ({"items": False}, "[]", None),
            ({"items": False}, "[1", "[1"),
            (False, "1", "1"),
            (True, "[1, {}]", None),
            ({"allOf": [{"minLength": 2}, {"maxLength": 2}]}, '"abc', '"abc'),
            ({"not": {"type": "string"}}, '"abc"', None),
            ({}, '{"a": 1, "a": 2}', '{"a": 1, "a"'),
            ({}, '{"a": 1 "b"', '{"a": 1 "'),
            ({}, "[" * 70, "[" * 65),
            ({"type": "number"}, "1" * 5000 + " ", "1" * 5000 + " "),
        ],
    )
    def test_by_hand(self, schema: Any, text: str, left: str | None) -> None:
        assert kept(JsonSchema(schema), text) == left

    def test_what_shows_at_the_end_only_is_judged_there(self) -> None:
        unique = JsonSchema({"uniqueItems": True, "items": {"multipleOf": 2}})
        assert [unique.score(text) for text in ("[2, 4]", "[2, 2]", "[2, 3]", "[2")] == [1.0, 0.0, 0.0, 0.0]
        once = JsonSchema({"oneOf": [{"type": "integer"}, {"minimum": 5}]})
        assert [once.score(text) for text in ("3", "5.5", "7", "1.5")] == [1.0, 1.0, 0.0, 0.0]

    def test_drafts_before_2020_12_are_read_as_they_were_meant(self) -> None:
        listed = {"items": [{"type": "string"}], "additionalItems": False, "prefixItems": [False]}
        for draft in ("http://json-schema.org/draft-07/schema#", "https://json-schema.org/draft/2019-09/schema"):
            form = JsonSchema({"$schema": draft, **listed})
            assert kept(form, '["a"]') is None
            assert form.score('["a"]') == 1.0
            assert kept(form, "[1") == "[1"
            assert kept(form, '["a",') == '["a",'
        alone = {"$ref": "#/definitions/text", "maxLength": 1, "definitions": {"text": {"type": "string"}}}
        old = JsonSchema({"$schema": "http://json-schema.org/draft-07/schema", **alone})
        assert (old.score('"abc"'), kept(old, '"abc"')) == (1.0, None)
        assert kept(JsonSchema(alone), '"abc"') == '"ab'

    def test_a_schema_that_branches_at_each_level_costs_no_more_than_its_nodes(self) -> None:
        inner = {"properties": {"a": {"$ref": "#"}}}
        form = JsonSchema({"anyOf": [{"type": "object", **inner}, {"type": ["object", "null"], **inner}]})
        text = '{"a": ' * 60 + "null" + "}" * 60
        assert kept(form, text) is None
        assert kept(form, '{"a": ' * 60 + "1") == '{"a": ' * 60 + "1"

    def test_patterns_have_a_time_limit_wherever_they_stand(self, capsys: pytest.CaptureFixture[str]) -> None:
        hard, text = "^(?:(?:a|aa|a)+)+$", "a" * 60 + "!"
        for schema, document in (
            ({"pattern": hard}, text),
            ({"patternProperties": {hard: True}, "additionalProperties": False}, {text: 1}),
        ):
            form = JsonSchema(schema)
            form._compiled.nodes.pattern(hard).timeout = 0.02
            assert form.score(json.dumps(document)) == 0.0
        assert "takes over 0.02 s" in capsys.readouterr().err

    def test_a_schema_may_stand_in_a_file(self, tmp_path: Path) -> None:
        (tmp_path / "schema.json").write_text(json.dumps(PERSON))
        assert JsonSchema(str(tmp_path / "schema.json")).score('{"name": "Ada"}') == 1.0

    @pytest.mark.parametrize(
        ("schema", "said"),
        [
            ({"type": "text"}, "the schema is wrong at $.type"),
            ({"minLength": -1}, "the schema is wrong at $.minLength"),
            ([], "the schema is a list"),
            ({"const": float("nan")}, "the schema is no JSON"),
            ({"const": {1, 2}}, "the schema is no JSON"),
            ("no/such.json", "'no/such.json' cannot be opened"),
            ({"$ref": "#/$defs/none"}, "'#/$defs/none' leads to no part of the schema"),
            ({"$ref": "#none"}, "'#none' leads to no part of the schema"),
            ({"items": {"$ref": "https://example.org/schema"}}, "'https://example.org/schema' lies outside the schema"),
            ({"items": {"$id": "https://example.org/x"}}, "an address of its own, 'https://example.org/x'"),
            ({"anyOf": [{"type": "null"}, {"$ref": "#"}]}, "refers to itself for the same value without end"),
            (
                {"$schema": "http://json-schema.org/draft-03/schema#"},
                "$schema 'http://json-schema.org/draft-03/schema#'",
            ),
            ({"pattern": "(?<n>a)(?P=m)"}, "wrong at $.pattern"),
            ({"additionalProperties": {"pattern": "a(?"}}, "wrong at $.additionalProperties.pattern"),
        ],
    )
    def test_schemas_that_cannot_be_used(self, schema: Any, said: str) -> None:
        with pytest.raises(UserError) as caught:
            JsonSchema(schema)
        assert said in str(caught.value)
        assert "\n" not in str(caught.value)

    def test_a_missing_package_is_named(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setitem(sys.modules, "jsonschema", None)
        with pytest.raises(UserError, match=r"pip install 'instant-reward\[format\]'"):
            JsonSchema({})


class TestPythonCode:
    @pytest.mark.parametrize(
        ("text", "left"),
        [
            ("x = 1\ny = x +\n", "x = 1\ny = x +\n"),
            ("Here is the code:\nx = 1\n", "Here is the code:\n"),
            ("if x:\ny\nz\n", "if x:\ny\n"),
            ("def f():\n  if x:\ny = 1\nz\n", "def f():\n  if x:\ny = 1\n"),
            ("try:\n  x\ny\nz\n", "try:\n  x\ny\n"),
            ("else:\n  x\n", "else:\n"),
            ("if x:\n    y\n  z\nw\n", "if x:\n    y\n  z\n"),
            ("f(1 2,\n3)\n", "f(1 2,\n"),
            ("f(]\n1\n", "f(]\n"),
            ("x = 'abc\ny\n", "x = 'abc\n"),
            ("print 'x'\ny\n", "print 'x'\n"),
            ("@a\nx\ny\n", "@a\nx\n"),
            ("match x:\n  y\nz\n", "match x:\n  y\n"),
            ("x\r\n y\r\nz", "x\r\n y\r\n"),
            ("x = '\x00'\ny\n", "x = '\x00'\n"),
            ("# \ud83d\ny\n", "# \ud83d\n"),
            ("return\nbreak\nawait x\n", None),
            ("x = '''\n1 2 3\n", None),
            ("class A:\n  x = [\n\n  1,\n", None),
        ],
    )
    def test_by_hand(self, text: str, left: str | None) -> None:
        assert kept(PythonCode(), text) == left

    def test_the_line_that_is_being_written_is_not_looked_at(self) -> None:
        assert kept(PythonCode(), "x = 1\n)))") is None
        assert PythonCode().score("x = 1\n)))") == 0.0

    def test_a_long_statement_is_not_parsed_at_each_of_its_lines(self, monkeypatch: pytest.MonkeyPatch) -> None:
        lengths: list[int] = []
        refused = format_python._is_refused
        monkeypatch.setattr(format_python, "_is_refused", lambda text: lengths.append(len(text)) or refused(text))
        text = "x = [\n" + "  'a word', \n" * 500 + "]\n"
        assert kept(PythonCode(), text) is None
        assert sum(lengths) < 12 * len(text)
        assert len(kept(PythonCode(), text[:4000] + "1 2\n" + text[4000:]) or text) < 5100

    def test_a_program_has_statements(self) -> None:
        assert [PythonCode().score(text) for text in ("", "# nothing\n", "x")] == [0.0, 0.0, 1.0]
        assert [PythonCode(statements=0).score(text) for text in ("", "# nothing\n", ")")] == [1.0, 1.0, 0.0]
        assert PythonCode(statements=3).score("if x:\n  y\n  z") == 1.0
        assert PythonCode(statements=4).score("if x:\n  y\n  z") == 0.0

    @pytest.mark.parametrize(
        ("text", "left", "value"),
        [
            ("```python\nx = 1\n```", None, 1.0),
            (" \n```py \nx = 1\n```\n ", None, 1.0),
            ("```python\nx = 1\n", None, 0.0),
            ("```python\nx = 1```", None, 0.0),
            ("```python\n```", None, 0.0),
            ("```pyx", "```pyx", 0.0),
            ("```\nx = 1\n```", "```\n", 0.0),
            ("x = 1", "x", 0.0),
            ("```python\nx = (\n```\n", "```python\nx = (\n```\n", 0.0),
            ("```python\nx x\ny\n```", "```python\nx x\n", 0.0),
            ("```python\nx\n```\nDone.", "```python\nx\n```\nD", 0.0),
            ("```python\nx = '''\n```\n'''\n```", "```python\nx = '''\n```\n", 0.0),
        ],
    )
    def test_fences(self, text: str, left: str | None, value: float) -> None:
        form = PythonCode(fence=True)
        assert kept(form, text) == left
        assert form.score(text) == value

    def test_what_python_warns_of_is_not_said(self) -> None:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            assert paid(PythonCode(), ["x = '\\d'\n", "y = x is 1\n"]) == [None, 1.0]
        assert caught == []


@pytest.mark.parametrize(
    ("kind", "args", "said"),
    [
        (Regex, {"pattern": "a("}, "the pattern 'a(' cannot be read"),
        (Regex, {"pattern": 3}, "pattern=3 must be"),
        (Regex, {"pattern": "a", "timeout": 0}, "timeout=0 must be"),
        (Regex, {"pattern": "a", "timeout": True}, "timeout=True must be"),
        (Json, {"valid": float("inf")}, "valid=inf must be"),
        (Json, {"invalid": "no"}, "invalid='no' must be"),
        (Json, {"viable": True}, "viable=True must be"),
        (Json, {"constants": "yes"}, "constants='yes' must be"),
        (JsonSchema, {"schema": {}, "valid": None}, "valid=None must be"),
        (PythonCode, {"fence": 1}, "fence=1 must be"),
        (PythonCode, {"statements": -1}, "statements=-1 must be"),
        (PythonCode, {"statements": 1.0}, "statements=1.0 must be"),
    ],
)
def test_arguments_that_are_none(kind: Any, args: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError) as caught:
        kind(**args)
    assert said in str(caught.value)
    assert str(caught.value).startswith(kind.name)


@pytest.mark.parametrize("every", ["token", "line", "end"])
def test_a_text_that_another_reward_stops_is_judged_as_it_is_then(every: str) -> None:
    stops = ir.reward(every="token", name="stops")(lambda view: ir.stop(-1) if "]" in view.piece else None)
    watch = Watch([as_reward(Json(invalid=-2)).but(every=every), stops], TextDecoder(shared_tokenizer()))
    for text, verdict in (("[1]", 1.0), ("[\n1\n]", 1.0), ("[[1]", -2.0)):
        watch.open(0, ABOUT)
        watch.feed(0, shared_tokenizer()(text)["input_ids"] + [0], done=False)
        marks = watch.close(0)[2]
        assert [mark.value for mark in marks if mark.source == "json"] == [verdict]
