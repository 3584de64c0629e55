"""A reward for programs: the share of their tests that they pass, run in the sandbox.

rewards:
  - use: instant_reward.rewards.programs:ProgramTests
    args: {tests_column: tests, seconds: 2}
"""

from __future__ import annotations

import ast
import json
import math
import os
import re
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from instant_reward.rewards.sandbox import check_limits, run_program, why_not
from instant_reward.types import Prompt, UserError, View

# A fence may be left open: the text has just begun. The info string is what follows the three marks.
_FENCE = re.compile(r"^[ ]{0,3}```[ ]*(\w*)[^\n`]*\n(.*?)(?:^[ ]{0,3}```[ ]*\r?$|\Z)", re.DOTALL | re.MULTILINE)
_PYTHON = ("python", "python3", "py")
_COMPARED = (str, bool, int, float, list, tuple, dict, set, frozenset, type(None))
_CODE = ("auto", "fence", "whole")


@dataclass(frozen=True)
class _Test:
    """What the sandbox is asked, under ``kind``, and what it should say; of a ``run`` nothing but to come through."""

    kind: str
    asked: str
    expected: Any = None


class ProgramTests:
    """The share of a prompt's tests that the Python program in the text passes. In [0, 1]; 0 where there is no program.

    The program is the last block fenced as Python (or else the last unmarked block), or the whole text where it has no
    fence. It runs with the standard library alone in the sandbox of ``docs/sandbox.md``, each test in a process of its
    own; where the machine offers no sandbox, making this reward raises UserError. The tests are a list (or the JSON of
    one) in the prompt's column ``tests_column``; each is one of

    - ``{"input": "2 3", "output": "5"}``: what the program reads and prints, white space at the ends of lines aside;
    - ``{"call": "add(2, 3)", "output": 5}``: the value of an expression; floats within a millionth, tuples like lists;
    - ``"assert add(2, 3) == 5"``, or other statements, which must come through. Where the assertion compares with a
      constant it is taken for the second form.

    Cost: some 0.1 s a text, and the time that its tests take. After ``time_outs`` tests that ran out of time the others
    count as failed. What is close to a limit of time may pass once and fail once.

    What games it: answers to known tests written out one by one, so keep some tests back. Of the first two forms the
    expected values never enter the sandbox; statements are judged where the program runs, and one that redefines
    ``assert``'s operands or ends the process in the right way passes them.
    Source: Chen et al., "Evaluating Large Language Models Trained on Code" (2021).
    """

    name = "program_tests"
    stops = False
    batched = True

    def __init__(
        self,
        tests_column: str = "tests",
        *,
        seconds: float = 2.0,
        memory_mb: int = 256,
        output_kb: int = 64,
        processes: int = 8,
        code: str = "auto",
        time_outs: int = 2,
        parallel: int | None = None,
    ) -> None:
        """Makes sure that programs can be kept apart here.

        Args:
            tests_column: the column of the data set with the tests.
            seconds: of processor time for each test; by the clock twice as many.
            memory_mb: of memory for each text.
            output_kb: of output for each test.
            processes: how many processes and threads a program may have at once.
            code: where the program is: "fence" (a text without one has none), "whole" (all of the text) or "auto".
            time_outs: after so many tests of a text that took too long, its others count as failed.
            parallel: how many texts are tested at once; the number of processors where it is not given.

        Raises:
            UserError: an argument is out of range, or this machine has no sandbox.
        """
        if not isinstance(tests_column, str) or not tests_column:
            raise UserError(
                f"program_tests: tests_column={tests_column!r} must be the name of the column with the tests"
            )
        if code not in _CODE:
            raise UserError(f"program_tests: code={code!r} is unknown; use one of {', '.join(_CODE)}")
        self.parallel = (os.cpu_count() or 1) if parallel is None else parallel
        check_limits("program_tests", seconds=seconds, memory_mb=memory_mb, output_kb=output_kb, processes=processes)
        check_limits("program_tests", time_outs=time_outs, parallel=self.parallel)
        if reason := why_not():
            raise UserError(f"program_tests runs programs that a model wrote, and {reason}")
        self.tests_column, self.code, self.time_outs = tests_column, code, time_outs
        self.seconds, self.memory_mb, self.output_kb, self.processes = seconds, memory_mb, output_kb, processes
        self._harness = Path(__file__).with_name("program_child.py").read_text(encoding="utf-8")

    def __call__(self, views: Sequence[View]) -> list[float]:
        """The share of passed tests for each text so far."""
        jobs = [(program_in(view.text, self.code), self._tests(view.prompt)) for view in views]
        if len(jobs) < 2 or self.parallel == 1:
            return [self.score(*job) for job in jobs]
        with ThreadPoolExecutor(min(self.parallel, len(jobs))) as pool:
            return list(pool.map(lambda job: self.score(*job), jobs))

    def score(self, program: str, tests: Sequence[Any]) -> float:
        """The share of ``tests`` that one program passes."""
        known = [one if isinstance(one, _Test) else _test(one, "the argument tests") for one in tests]
        if not program.strip():
            return 0.0
        return sum(self._passed(program, known)) / len(known)

    def _passed(self, program: str, tests: Sequence[_Test]) -> list[bool]:
        most = self.output_kb << 10
        request = {
            "program": program,
            "seconds": self.seconds,
            "output": most,
            "time_outs": self.time_outs,
            "tests": [{one.kind: one.asked} for one in tests],
        }
        outcome = run_program(
            self._harness,
            json.dumps(request),
            seconds=10.0 + self.seconds + 0.1 * len(tests),  # what runs the tests takes time as well
            memory_mb=self.memory_mb,
            output_kb=64 + 8 * self.output_kb * len(tests),  # JSON may write one byte as six
            processes=self.processes + 1,
            wall_seconds=10.0 + 2.0 * self.seconds * len(tests),
        )
        lines = outcome.stdout.split("\n")
        return [number < len(lines) and _passes(test, lines[number]) for number, test in enumerate(tests)]

    def _tests(self, prompt: Prompt) -> list[_Test]:
        """The tests of a prompt, checked."""
        where = f"column {self.tests_column!r} of prompt {prompt.id}"
        if self.tests_column not in prompt.info:
            there = ", ".join(map(str, prompt.info)) or "none"
            raise UserError(
                f"program_tests: prompt {prompt.id} has no column {self.tests_column!r} (it has: {there}); add it, or "
                "name the column with the tests as tests_column=..."
            )
        value = prompt.info[self.tests_column]
        value = value.tolist() if hasattr(value, "tolist") else value
        if isinstance(value, str):
            try:
                value = json.loads(value)
            except ValueError as error:
                raise UserError(f"program_tests: {where} is text but no JSON ({error}); give a list of tests") from None
        if not isinstance(value, list | tuple) or not value:
            raise UserError(f"program_tests: {where} is no list with a test in it; give one")
        return [_test(one, where) for one in value]


def program_in(text: str, code: str = "auto") -> str:
    """The program in a text; empty where it has none."""
    if code == "whole":
        return text
    found = [(match.group(1).lower(), match.group(2)) for match in _FENCE.finditer(text)]
    for languages in (_PYTHON, ("",)):
        bodies = [body for language, body in found if language in languages]
        if bodies:
            return bodies[-1]
    return text if code == "auto" and not found else ""


def _test(value: Any, where: str) -> _Test:
    if isinstance(value, str) and value.strip():
        return _statement(value, where)
    if isinstance(value, Mapping) and isinstance(value.get("output"), _COMPARED):
        if set(value) == {"input", "output"} and isinstance(value["input"], str) and isinstance(value["output"], str):
            return _Test("input", value["input"], _lines(value["output"]))
        if set(value) == {"call", "output"} and isinstance(value["call"], str):
            return _Test("call", value["call"], value["output"])
    raise UserError(
        f"program_tests: {where} holds {repr(value)[:60]}, which is no test; give {{input, output}} as texts, "
        "{call, output} or an assertion"
    )


def _statement(text: str, where: str) -> _Test:
    """An assertion that compares with a constant as a call, so that the constant stays outside; else what it is."""
    try:
        body = ast.parse(text).body
    except (SyntaxError, ValueError) as error:
        raise UserError(f"program_tests: {where} holds {text[:60]!r}, which is no Python ({error}); mend it") from None
    if len(body) == 1 and isinstance(body[0], ast.Assert) and isinstance(body[0].test, ast.Compare):
        compared = body[0].test
        if len(compared.ops) == 1 and isinstance(compared.ops[0], ast.Eq):
            try:
                expected = ast.literal_eval(compared.comparators[0])
            except (ValueError, TypeError):
                expected = b""
            if isinstance(expected, _COMPARED):
                return _Test("call", ast.unparse(compared.left), expected)
    return _Test("run", text)


def _passes(test: _Test, line: str) -> bool:
    """Whether what the sandbox said of a test, which nobody vouches for, is what was expected."""
    try:
        said = json.loads(line)
        if not isinstance(said, str):
            return False
        if test.kind == "call":
            return _same(test.expected, json.loads(said))
        return test.kind == "run" or _lines(said) == test.expected
    except (ValueError, TypeError, OverflowError, RecursionError):
        return False


def _lines(text: str) -> list[str]:
    """The lines of an output without the white space at their ends, and without empty lines at its end."""
    return [line.rstrip() for line in text.rstrip().split("\n")]


def _same(expected: Any, got: Any) -> bool:
    """Whether a value, written as ``program_child`` does, is the expected one."""
    if isinstance(expected, int | float) and isinstance(got, int | float):
        near = isinstance(expected, float) or isinstance(got, float)
        both_nan = expected != expected and got != got
        return expected == got or both_nan or (near and math.isclose(expected, got, rel_tol=1e-6, abs_tol=1e-9))
    if expected is None or isinstance(expected, int | float | str):
        return bool(expected == got)
    if not isinstance(got, dict) or len(got) != 1:
        return False
    ((kind, items),) = got.items()
    if isinstance(expected, list | tuple):
        return kind == "list" and len(items) == len(expected) and all(map(_same, expected, items))
    unordered = "dict" if isinstance(expected, dict) else "set"
    if kind != unordered or not isinstance(expected, dict | set | frozenset) or len(items) != len(expected):
        return False
    left = list(items)
    return all(_taken(one, left) for one in (expected.items() if isinstance(expected, dict) else expected))


def _taken(expected: Any, left: list[Any]) -> bool:
    """Takes one that is the same out of ``left``."""
    for number, one in enumerate(left):
        if _same(expected, one):
            del left[number]
            return True
    return False
