"""Rewards for form: no prefix of a valid text is ever stopped, and one that nothing can mend is."""

from __future__ import annotations

import ast
import codeop
import inspect
import itertools
import json
import re
from collections.abc import Callable, Sequence
from functools import cache
from math import inf
from typing import Any

import jsonschema
import pytest
import regex
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st

import instant_reward as ir
from instant_reward.rewards import base, format_python, json_reader
from instant_reward.rewards.base import as_reward
from instant_reward.rewards.format import Json, JsonSchema, PythonCode, Regex
from instant_reward.rewards.format_base import Form
from instant_reward.rewards.watch import Watch
from instant_reward.text import TextDecoder
from instant_reward.types import Prompt, Rollout
from tiny import END, shared_tokenizer, tiny_policy


def stopped_at(form: Form, text: str, step: int = 1) -> int | None:
    """How many characters had been read, in steps, when the text was stopped; None where it never was."""
    reader = form.reader()
    for end in range(step, len(text) + step, step):
        if not reader.push(text[end - step : end]):
            return min(end, len(text))
    return None


def goes_on(form: Form, text: str) -> bool:
    return stopped_at(form, text) is None


# --- JSON ----------------------------------------------------------------------------------------------------------


def read_strictly(text: str) -> bool:
    def refuse(constant: str) -> None:
        raise ValueError(constant)

    try:
        json.loads(text, parse_constant=refuse)
    except ValueError:
        return False
    return True


def read(text: str) -> bool:
    try:
        json.loads(text)
    except ValueError:
        return False
    return True


def continuation(text: str, form: Form, accepts: Callable[[str], bool]) -> str | None:
    """One that makes the text valid, as ``accepts`` says; the form only says where to look."""
    for _ in range(len(text) + 12):
        if accepts(text):
            return text
        text += next((one for one in '"]}0:ruealsnfityN' if goes_on(form, text + one)), "")
    return None


@pytest.mark.parametrize("alphabet", ['[]{}",:1 ', "-01.eE+[", '"\\u0dn\x1f[', "truefalsn", "-InfityNa"])
def test_json_is_stopped_where_no_continuation_is_json_of_all_short_texts(alphabet: str) -> None:
    for form, accepts in ((Json(), read_strictly), (Json(constants=True), read)):
        viable = [""]
        for _ in range(5):
            grown = [text + character for text in viable for character in alphabet]
            stops = {text: stopped_at(form, text) for text in grown}
            assert all(stop in (None, len(text)) for text, stop in stops.items())
            lost = [text for text in grown if stops[text]]
            ends = [*alphabet, *map("".join, itertools.product(alphabet, repeat=2))] if len(grown) < 600 else []
            assert not [text + end for text in lost for end in ["", *ends] if accepts(text + end)]
            viable = [text for text in grown if stops[text] is None]
            assert [text for text in viable if continuation(text, form, accepts) is None] == []
            assert all((form.score(text) == 1.0) == accepts(text) for text in grown)
            viable = viable[:: max(1, len(viable) // 300)]


PARTS = ["{", "}", "[", "]", ",", ":", '"', '"a"', '"\\', "\\u", "00e9", "d83d", "\\ude00", "é", "\\n", "\n", "\t"]
PARTS += ["0", "12", "-", ".5", "e", "E+3", "true", "tr", "null", "fal", "se", " ", "\r", "\u2028", "\ufeff", "\ud83d"]
PARTS += ['{"k": 1', '"k": [', '"x",', '""', "]}", "1,", "NaN", "-Infinity", "\x00"]


@given(st.lists(st.sampled_from(PARTS), max_size=14).map("".join), st.integers(1, 5), st.booleans())
@settings(max_examples=150)
def test_json_of_random_parts_goes_on_exactly_while_json_loads_may_accept_it(
    text: str, step: int, constants: bool
) -> None:
    form, accepts = Json(constants=constants), read if constants else read_strictly
    stop = stopped_at(form, text)
    assert (form.score(text) == 1.0) == accepts(text)
    kept = text if stop is None else text[: stop - 1]
    assert continuation(kept, form, accepts) is not None
    if stop is not None:
        for end in ("", '"', "}", "]", "0", '":0}', '"]', "rue", "0]"):
            assert not accepts(text[:stop] + end)
    in_steps = stopped_at(form, text, step)
    assert in_steps == (None if stop is None else min(len(text), -(-stop // step) * step))


PLAIN_JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=8,
)


@st.composite
def written(draw: st.DrawFn, document: Any) -> str:
    """A document as text, in any of the ways there are to write it."""
    space = draw(st.sampled_from(["", "", " ", "\n\t\r "]))
    if isinstance(document, bool) or document is None:
        made = json.dumps(document)
    elif isinstance(document, int):
        tenfold = f"{document}0e-1" if document else "0.0e9"  # no number begins with two zeros
        forms = [str(document), f"{document}.0", tenfold, f"{document}E+0"]
        made = draw(st.sampled_from(forms if abs(document) < 2**40 else forms[:1]))
    elif isinstance(document, float):
        made = repr(document)
    elif isinstance(document, str):
        made = draw(written_text(document))
    elif isinstance(document, dict):
        pairs = [(draw(written_text(key)), draw(written(value))) for key, value in document.items()]
        made = "{" + space + f"{space},".join(f"{key}{space}:{value}" for key, value in pairs) + "}"
    else:
        made = "[" + ",".join(draw(written(one)) for one in document) + space + "]"
    return space + made + space


@st.composite
def written_text(draw: st.DrawFn, text: str) -> str:
    escaped = draw(st.sampled_from([0.0, 0.3, 1.0]))
    parts = []
    for character in text:
        plain = character >= " " and character not in '"\\' and draw(st.floats(0, 1)) >= escaped
        parts.append(character if plain else json.dumps(character)[1:-1])
    return '"' + "".join(parts) + '"'


@given(PLAIN_JSON.flatmap(written))
@settings(max_examples=50)
def test_json_that_is_written_in_any_way_is_never_stopped(text: str) -> None:
    assert goes_on(Json(), text)
    assert Json().score(text) == 1.0


# --- JSON Schema ---------------------------------------------------------------------------------------------------

KEYS = ["a", "ab", "b", "a b", "é", ""]
PATTERNS = [
    "^a+$",
    "^[ab]{2,3}",
    "b$",
    "^(?:x|ab)*$",
    r"^\w+$",
    r"^\d{2}-\d\Z",
    "a.c",
    r"\bab\b",
    r"^[^\s]+$",
    "(?!)",
    "",
]
SCALARS = st.none() | st.booleans() | st.integers(-3, 12) | st.sampled_from([0.5, -1.5, 2.0, 1e3, -0.0])
WORDS = st.text("ab x-1é😀", max_size=4) | st.sampled_from(["ab", "abc", "a", "", "12-3", "aaa", "x\n", "ab\n", "²_"])
DOCUMENTS = st.recursive(
    SCALARS | WORDS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(KEYS), inner, max_size=3),
    max_leaves=6,
)
ONE = {"anyOf": [{"type": ["string", "integer"]}, {"type": "array", "items": {"$ref": "#/$defs/one"}}]}
DEFINITIONS = {"$defs": {"one": ONE}}


@st.composite
def schemas(draw: st.DrawFn, depth: int = 2) -> Any:
    """Any schema of the keywords that are judged early, and some of the others."""
    if draw(st.integers(0, 11)) == 0:
        return draw(st.booleans())
    inner = schemas(depth - 1) if depth else st.just(True)
    count = st.integers(0, 3)
    keywords: dict[str, st.SearchStrategy[Any]] = {
        "type": st.sampled_from(["object", "array", "string", "number", "integer", "boolean", "null"])
        | st.lists(st.sampled_from(["object", "array", "string", "integer", "null"]), min_size=1, unique=True),
        "enum": st.lists(DOCUMENTS, min_size=1, max_size=4),
        "const": DOCUMENTS,
        "minimum": st.integers(-2, 3),
        "maximum": st.integers(-3, 10),
        "exclusiveMinimum": st.sampled_from([-1, 0, 2.5]),
        "exclusiveMaximum": st.sampled_from([-1, 0, 2.5]),
        "multipleOf": st.sampled_from([2, 0.5]),
        "minLength": count,
        "maxLength": count,
        "pattern": st.sampled_from(PATTERNS),
        "minItems": count,
        "maxItems": count,
        "uniqueItems": st.booleans(),
        "items": inner,
        "prefixItems": st.lists(inner, min_size=1, max_size=2),
        "contains": inner,
        "properties": st.dictionaries(st.sampled_from(KEYS), inner, max_size=3),
        "patternProperties": st.dictionaries(st.sampled_from(PATTERNS), inner, max_size=2),
        "additionalProperties": inner | st.just(False),
        "propertyNames": inner,
        "required": st.lists(st.sampled_from(KEYS), max_size=2, unique=True),
        "minProperties": count,
        "maxProperties": count,
        "allOf": st.lists(inner, min_size=1, max_size=2),
        "anyOf": st.lists(inner, min_size=1, max_size=3),
        "oneOf": st.lists(inner, min_size=1, max_size=3),
        "not": inner,
        "$ref": st.just("#/$defs/one"),
    }
    chosen = draw(st.lists(st.sampled_from(sorted(keywords)), max_size=4, unique=True))
    return {key: draw(keywords[key]) for key in chosen}


@st.composite
def fitting(draw: st.DrawFn, depth: int = 2) -> tuple[Any, Any]:
    """A schema, and a document that it accepts (but for ``oneOf``, which may be met twice)."""
    kind = draw(st.sampled_from(["text", "number", "word", *(["array", "object", "several", "exactly"] * bool(depth))]))
    if kind == "text":
        pattern = draw(st.sampled_from(["^a+$", "^[ab]{2,3}", "b$", r"^\w+$", r"\d-\d", r"^[^\s]+$", "^é|😀$"]))
        text = draw(st.from_regex(pattern))
        return {"type": "string", "pattern": pattern, "minLength": len(text) // 2, "maxLength": len(text)}, text
    if kind == "number":
        number = draw(st.integers(-20, 20) | st.floats(-20, 20))
        bounds = {"minimum": draw(st.sampled_from([-20, number])), "maximum": draw(st.sampled_from([20, number]))}
        return {"type": "integer" if isinstance(number, int) else "number", **bounds}, number
    if kind == "word":
        words = draw(st.lists(SCALARS | WORDS, min_size=1, max_size=4))
        return {"enum": words}, draw(st.sampled_from(words))
    if kind == "exactly":
        document = draw(DOCUMENTS)
        return {"const": document}, document
    if kind == "several":
        schema, document = draw(fitting(depth - 1))
        others = [*draw(st.lists(schemas(1), max_size=2)), schema]
        return {draw(st.sampled_from(["anyOf", "oneOf"])): draw(st.permutations(others))}, document
    pairs = draw(st.lists(fitting(depth - 1), max_size=3))
    if kind == "array":
        items = [schema for schema, _ in pairs]
        lengths = {"minItems": len(pairs), "maxItems": len(pairs)}
        placed = {"prefixItems": items, "items": False} if items else {"items": False}
        return {"type": "array", **draw(st.sampled_from([placed, lengths, {**placed, **lengths}]))}, [
            d for _, d in pairs
        ]
    keys = KEYS[: len(pairs)]
    schema = {"type": "object", "properties": dict(zip(keys, [one for one, _ in pairs], strict=True)), "required": keys}
    return {**schema, "additionalProperties": False}, dict(zip(keys, [one for _, one in pairs], strict=True))


@given(fitting(), st.data())
@settings(max_examples=60)
def test_no_document_that_its_schema_accepts_is_ever_stopped(pair: tuple[Any, Any], data: st.DataObject) -> None:
    schema, document = {**pair[0], **DEFINITIONS}, pair[1]
    text = data.draw(written(document))
    assume(jsonschema.Draft202012Validator(schema).is_valid(json.loads(text)))
    assert goes_on(JsonSchema(schema), text)
    assert JsonSchema(schema).score(text) == 1.0


@given(schemas(), DOCUMENTS, st.data())
@settings(max_examples=120)
@example({"maximum": 0, "type": "number"}, -0.0, None)
def test_the_verdict_is_that_of_jsonschema_and_what_is_stopped_is_wrong(
    schema: Any, document: Any, data: st.DataObject | None
) -> None:
    schema = {**schema, **DEFINITIONS} if isinstance(schema, dict) else schema
    text = json.dumps(document) if data is None else data.draw(written(document))
    accepted = jsonschema.Draft202012Validator(schema).is_valid(json.loads(text))
    form = JsonSchema(schema)
    assert form.score(text) == float(accepted)
    if accepted:
        assert goes_on(form, text)


# --- regular expressions -------------------------------------------------------------------------------------------

SHORT_TEXTS = ["".join(letters) for length in range(6) for letters in itertools.product("ab\n", repeat=length)]
# Patterns, and how long a text may be that matches.
Sized = tuple[str, float]
ATOMS = st.sampled_from(["a", "b", "ab", ".", "[ab]", "[^a]", r"\n", r"\w", r"\W", r"[\s]", r"[^\w]"])
REPEATS = {"*": inf, "+": inf, "?": 1, "{2}": 2, "{1,3}": 3, "{2,}": inf, "*?": inf, "+?": inf, "??": 1, "{1,2}?": 2}
LOOKS = [r"\b{}", r"{}\b", r"\B{}", "(?={})", "(?!{})", "(?<={})", "(?<!{})", "(?>{})", "(?:{})*+", "^{}", "{}$"]
LOOKS += [r"(?!{}\b)", r"(?<=\b{})", r"{}\Z", "(?m:^{}$)", "(?i:{})", "(?s:.{})", r"({})\1"]


def patterns(looks: Sequence[str] = ()) -> st.SearchStrategy[Sized]:
    def repeated(pair: tuple[Sized, str]) -> Sized:
        (pattern, size), times = pair
        return f"(?:{pattern}){times}", size * REPEATS[times]

    def grow(inner: st.SearchStrategy[Sized]) -> st.SearchStrategy[Sized]:
        pairs = st.tuples(inner, inner)
        made = [
            pairs.map(lambda pair: (pair[0][0] + pair[1][0], pair[0][1] + pair[1][1])),
            pairs.map(lambda pair: (f"(?:{pair[0][0]}|{pair[1][0]})", max(pair[0][1], pair[1][1]))),
            st.tuples(inner, st.sampled_from(list(REPEATS))).map(repeated),
        ]
        if looks:
            look = st.sampled_from(looks)
            made.append(st.tuples(look, inner).map(lambda pair: (pair[0].replace("{}", pair[1][0]), inf)))
        return st.one_of(made)

    return st.recursive(ATOMS.map(lambda atom: (atom, 2 if atom == "ab" else 1)), grow, max_leaves=5)


def compiled(pattern: str) -> Any:
    try:
        return regex.compile(pattern)
    except regex.error:
        return None


@given(patterns(LOOKS))
@settings(max_examples=50)
def test_no_text_that_matches_is_ever_stopped(sized: Sized) -> None:
    assume(compiled(sized[0]) is not None)
    form = Regex(sized[0])
    for text in SHORT_TEXTS:
        if form.score(text) == 1.0:
            assert goes_on(form, text)


@given(patterns())
@settings(max_examples=40)
def test_a_plain_pattern_matches_what_it_does_in_re_and_stops_what_cannot(sized: Sized) -> None:
    pattern, longest = sized
    form, expected = Regex(pattern), re.compile(pattern)
    matching = {text for text in SHORT_TEXTS if expected.fullmatch(text)}
    assert {text for text in SHORT_TEXTS if form.score(text) == 1.0} == matching
    if longest <= 5 and matching:  # all that matches is here
        viable = {text[:end] for text in matching for end in range(len(text) + 1)}
        for text, following in itertools.product(viable, "ab\n"):
            assert goes_on(form, text + following) == (text + following in viable)


@given(
    st.data(),
    st.sampled_from(
        [
            r"(?s)<think>.*?</think>\s*<answer>\d+</answer>",
            r"(- [^\n]+\n){1,4}",
            r"\w+\b, \w+\.",
            r"(?i)yes|no",
            r"\$\d{1,3}(,\d{3})*(\.\d\d)?",
            r"(?P<q>['\"]).*?(?P=q)",
        ]
    ),
)
@settings(max_examples=40)
def test_everyday_patterns_let_what_matches_through(data: st.DataObject, pattern: str) -> None:
    text = data.draw(st.from_regex(pattern, fullmatch=True))
    assert goes_on(Regex(pattern), text)


# --- Python --------------------------------------------------------------------------------------------------------

SNIPPETS = [
    'x = f"""{\na\n}{b!r:>{\nw}}"""\n',
    'x = """a\\\n"""\ny = "a\\\nb" \\\n  \'c\'\n',
    "if x:\n\tpass\n\tif y:\n\t\tpass\n\n\telse: pass\nz\n",
    "@a\n@b(\n)\n\ndef f():\n  '''d\n o\n'''\n  return\n\n\nx\n",
    "try:\n  pass\nexcept* A:\n  pass\nelse:\n  pass\nfinally:\n  for a in b: pass\n  else:\n    c\n",
    "match x:\n  case [1, *_]:\n    pass\n  # c\n  case {'a': b} if c: pass\nmatch = case = 1\n",
    "async def f():\n  async with a as b, c:\n    await x\n  x = (yield)\n  async for i in y: pass\n",
    "if x:\n\f  a\n  b\n  c\nd\n",
    "if a:\n  pass\n\f\nelse:\n  pass\nif 1: x; y\nelif 2: pass\n",
    "class A(\n  B,\n  metaclass=C):\n\n  # c\n# d\n  x: int = 1\n \n  def g(self): return [i for i in\n (1, 2)]\n",
    "x = {\n  'a': [1,\n\n  # c }\n  2], **b}\r\ny = lambda *a, **k: (a,\rk)\r\n",
    "print('é', \"😀\", r'\\\\', b'\\'', '''\"\"\"''', '#')  # '''\nx = 1",
    "with (open(a) as b,\n      c):\n  global d\n  del e; assert f, g\n",
]


@cache
def sources() -> list[str]:
    return SNIPPETS + [inspect.getsource(module) for module in (codeop, base, format_python, json_reader)]


@pytest.mark.parametrize("source", sources(), ids=lambda source: repr(source[:20]))
@pytest.mark.parametrize("step", [1, 4])
def test_no_program_is_ever_stopped_nor_read_again_as_a_whole(
    source: str, step: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    lengths: list[int] = []
    refused = format_python._is_refused
    monkeypatch.setattr(format_python, "_is_refused", lambda text: lengths.append(len(text)) or refused(text))
    reader = PythonCode().reader()
    assert all(reader.push(source[at : at + step]) for at in range(0, len(source), step))
    assert reader.valid()
    if len(source) > 3000:
        assert sum(lengths) < 12 * len(source)
    fenced = f"\n```python\n{source}\n```\n "
    assert goes_on(PythonCode(fence=True), fenced)
    assert PythonCode(fence=True).score(fenced) == 1.0


def is_beginning(lines: str) -> bool:
    """What Python's parser says of all the lines."""
    try:
        compile(lines, "x", "exec", ast.PyCF_ONLY_AST | codeop.PyCF_ALLOW_INCOMPLETE_INPUT)
    except SyntaxError as error:
        return "incomplete input" in str(error) or "unterminated triple" in str(error)
    except (ValueError, MemoryError):
        return False
    return True


SHORT_SOURCES = [snippet for snippet in SNIPPETS if not re.search(r"[\r\f]", snippet)]


@given(
    st.sampled_from(SHORT_SOURCES),
    st.sampled_from(SHORT_SOURCES),
    st.integers(0, 200),
    st.sampled_from([*"()[]{}:'\"\\ =,.\t@\n$#x", "", "  ", "'''", "else:\n", "\x00", "\ud83d"]),
    st.integers(0, 2),
)
@settings(max_examples=120)
@pytest.mark.filterwarnings("ignore::SyntaxWarning", "ignore::DeprecationWarning")
def test_a_broken_program_is_stopped_at_the_first_line_that_nothing_can_mend(
    one: str, other: str, at: int, put: str, cut: int
) -> None:
    text = one + other + "\nprint(1)\n"
    text = text[:at] + put + text[at + cut :]
    ends = [found.end() for found in re.finditer("\n", text)]
    expected = next((end for end in ends if not is_beginning(text[:end])), None)
    assert stopped_at(PythonCode(), text) == expected
    try:
        parses = bool(ast.parse(text).body)
    except (SyntaxError, ValueError):
        parses = False
    assert PythonCode().score(text) == float(parses)


# --- all of them ---------------------------------------------------------------------------------------------------

PERSON = {
    "type": "object",
    "properties": {"name": {"type": "string", "maxLength": 6}, "age": {"type": "integer", "minimum": 0}},
    "required": ["name"],
    "additionalProperties": False,
}
FORMS: dict[str, Callable[..., Form]] = {
    "regex": lambda **values: Regex(r'[a-z {}":,0-9\n]+\b[.\]]?', **values),
    "json": Json,
    "json schema": lambda **values: JsonSchema(PERSON, **values),
    "python": PythonCode,
    "fenced python": lambda **values: PythonCode(fence=True, **values),
}
TEXTS = [
    '{"name": "the", "age": 3}',
    '{"name": "é👍🏽"}',
    '{"age": 1.5e1, ',
    "[1, 2",
    "```python\nthe = 1\n\n```",
    "you",
]
TEXTS += ["if the:\n bad\n\nelse:\n", "x y\n", '{"name": "not a movie"}', "你. ", "\n\n", '"\\ud83d\\ude00"']


def live(rewards: Sequence[Any], ids: list[int], about: Prompt, chunk: int) -> Rollout:
    watch = Watch(rewards, TextDecoder(shared_tokenizer()))
    watch.open(0, about)
    stop = None
    for start in range(0, len(ids), chunk):
        stop = watch.feed(0, ids[start : start + chunk], done=start + chunk >= len(ids))[1]
        if stop:
            break
    text, char_ends, marks = watch.close(0)
    first, length = len(about.token_ids), len(char_ends)
    early = stop is not None and length < first + len(ids)
    return Rollout(
        id="r",
        group=0,
        prompt=about,
        token_ids=[*about.token_ids, *ids][:length],
        mask=[False] * first + [True] * (length - first),
        logprobs=[0.0] * length,
        char_ends=char_ends,
        text=text,
        marks=marks,
        versions=[0] * length,
        stop="stopped" if early else "ended",
    )


@given(
    st.lists(st.sampled_from(TEXTS), min_size=1, max_size=3).map("".join),
    st.integers(1, 4),
    st.sampled_from(list(FORMS)),
    st.sampled_from([None, 0.125]),
    st.sampled_from(["token", "word", "line", 3]),
)
@settings(max_examples=50)
def test_live_equals_replay_and_every_text_gets_one_verdict(
    text: str, chunk: int, name: str, viable: float | None, every: str | int
) -> None:
    form = FORMS[name](viable=viable, invalid=-1.0)
    rewards = [as_reward(form).but(every=every)]
    ids = list(shared_tokenizer()(text + END)["input_ids"])
    rollout = live(rewards, ids, Prompt("p", "So:", [1, 2]), chunk)
    assert ir.replay(rewards, rollout) == rollout.marks
    *before, last = [mark.value for mark in rollout.marks]
    assert before == ([0.125] * len(before) if viable else [])
    assert last == form.score(text)  # what is stopped is wrong
    for length in range(1, len(rollout.token_ids) - 2):  # of each beginning: what was known then
        begun = live(rewards, ids[:length], rollout.prompt, chunk)
        known = [mark for mark in rollout.marks if mark.seen <= 2 + length and mark.end < 2 + length]
        assert begun.marks[: len(known)] == known


def test_a_model_that_writes_no_json_is_stopped_early() -> None:
    forms = [Json(invalid=-1.0, viable=0.25)]
    policy = tiny_policy()
    free = policy.sample(["the movie was"], per_prompt=8, max_new_tokens=20, seed=0)
    rollouts = policy.sample(["the movie was"], per_prompt=8, max_new_tokens=20, seed=0, rewards=forms)
    early = [one for one in rollouts if one.stop == "stopped"]
    assert len(early) >= 6
    assert sum(map(len, (one.text for one in rollouts))) < sum(map(len, (one.text for one in free))) / 2
    for rollout in rollouts:
        assert ir.replay(forms, rollout) == rollout.marks
        assert rollout.marks[-1].value == forms[0].score(rollout.text)
    for rollout in early:
        assert rollout.marks[-1].value == -1.0
        assert rollout.marks[-1].seen == len(rollout.token_ids)
        assert goes_on(forms[0], rollout.text[: rollout.char_ends[-2]])
        assert not goes_on(forms[0], rollout.text)


WEIRD = {
    "empty": "",
    "one token": "cat",
    "spaces": " \n\t\u3000 ",
    "10,000 characters": "the cat sat on a mat, 42 times.\n" * 313,
    "10,000 brackets": "[" * 10_000,
    "10,000 digits": "1" * 10_000,
    "10,000 characters of a text": '"' + "ab " * 3333,
    "10,000 spaces": " " * 10_000,
    "10,000 minus signs": "x = " + "-" * 10_000 + "1\n",
    "an open fence": "```python\n" + "x = 1\n" * 1600,
    "only emoji": "👍🏽👨‍👩‍👧🇫🇷❤️" * 20,
    "right to left": "مرحبا، كيف الحال؟ ٤٢ שלום " * 10,
    "control characters": "\x00\x07\x1b[31m\x7f\x85\u200e\u202e\ufeff42" * 10,
    "a lone surrogate": "x = '\ud83d'\ny",
    "a lone surrogate in JSON": '"\ud83d\\ud83d\\ude00\\ud83d"',
    "Chinese": "今天天气很好。一共42个。" * 20,
}


@pytest.mark.parametrize("name", FORMS)
@pytest.mark.parametrize("text", WEIRD.values(), ids=WEIRD)
def test_weird_texts_are_judged_and_the_same_however_they_are_cut(name: str, text: str) -> None:
    form = FORMS[name](invalid=-1.0)
    assert form.score(text) in (1.0, -1.0)
    by_character, in_steps = stopped_at(form, text), stopped_at(form, text, 7)
    if name != "regex":  # a long text is looked at now and then
        assert in_steps == (None if by_character is None else min(len(text), -(-by_character // 7) * 7))
    if by_character is not None:
        assert form.score(text) == -1.0
