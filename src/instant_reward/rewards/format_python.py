"""Python code read while it is written: stopped at the end of the first line that nothing can mend.

Python's own parser decides. Asked to allow unfinished input, it tells a beginning from an error: where it fails before
it has read the last token, no continuation helps. Parsing all lines anew at each line would cost the square of their
number, so each line is parsed in a short stand-in for what is above it, in which every block that is over is a
``pass``; only what fails there is parsed as a whole, and only that stops a text.
"""

from __future__ import annotations

import ast
import codeop
import re
import warnings
from dataclasses import dataclass, field

_FILE = "<code that is being written>"
_FLAGS = ast.PyCF_ONLY_AST | int(vars(codeop)["PyCF_ALLOW_INCOMPLETE_INPUT"])
_UNFINISHED = ("incomplete input", "unterminated triple-quoted")  # the latter: Python 3.12 on f-strings
_INDENT = re.compile(r"[ \t\f]*")
_NOTHING = re.compile(r"[ \t\f]*(?:#[^\n\x00\ud800-\udfff]*)?\n")
_CLAUSE = re.compile(r"\s*(?:elif|else|except|finally)\b")
_MARK = re.compile(r"""#|'{3}|"{3}|['"]|[()\[\]{}]|\\\n""")
_ENDS = {quote: re.compile(rf"(?:[^\\]|\\.)*?{quote}", re.DOTALL) for quote in ("'''", '"""')}
_ENDS |= {quote: re.compile(rf"(?:[^\\\n{quote}]|\\.)*{quote}", re.DOTALL) for quote in "'\""}
_SHORT = 256  # characters of a statement over several lines that is parsed at each of them
_GROWTH = 1.25  # and a longer one, once it has grown by this factor
_OPENINGS = ("```python", "```py")


@dataclass
class _Block:
    """A block that is being written: its indent, and the lines of its last statement that are needed to go on."""

    indent: str
    lines: list[str] = field(default_factory=list)


class CodeReader:
    """Reads a Python program.

    Args:
        statements: how many statements it must have, outside and inside blocks together.
    """

    def __init__(self, statements: int = 1) -> None:
        self._statements = statements
        self._lines: list[str] = []
        self._line = ""  # the line that is being written
        self._held = ""  # a carriage return: what follows decides what it is
        self._blocks = [_Block("")]
        self._statement = ""  # the lines of a statement that goes on
        self._checked = 0  # how long it was when it was parsed
        self._brackets = 0
        self._quote = ""  # of the text that goes on over lines
        self._joined = False  # the line ends with a backslash
        self._lost = False  # where the stand-in is no help any more: all is left to the end

    def push(self, characters: str) -> bool:
        """See ``Reader``."""
        characters = self._held + characters
        self._held = "\r" if characters.endswith("\r") else ""
        characters = characters.removesuffix(self._held).replace("\r\n", "\n").replace("\r", "\n")
        *whole, self._line = (self._line + characters).split("\n")
        for line in whole:
            self._lines.append(line + "\n")
            if not self._lost and not self._accepts(line + "\n"):
                if _is_refused("".join(self._lines)):
                    return False
                self._lost = True
        return True

    def valid(self) -> bool:
        """See ``Reader``."""
        try:
            tree = ast.parse("".join([*self._lines, self._line, self._held]), _FILE)
        except (SyntaxError, ValueError, MemoryError, RecursionError):  # ValueError: a null, or a lone surrogate
            return False
        return sum(isinstance(node, ast.stmt) for node in ast.walk(tree)) >= self._statements

    def _accepts(self, line: str) -> bool:
        """Reads a whole line; False where its stand-in is refused."""
        if not self._statement and _NOTHING.fullmatch(line):
            return True
        self._statement += line
        self._scan(line)
        ended = not (self._brackets > 0 or self._quote or self._joined)
        if not ended and _SHORT < len(self._statement) < _GROWTH * self._checked:
            return True
        self._checked = len(self._statement)
        if _is_refused("".join([*(line for block in self._blocks for line in block.lines), self._statement])):
            return False
        if ended:
            self._end_statement()
        return True

    def _end_statement(self) -> None:
        """Closes the blocks that are deeper than this statement, and keeps what is needed to go on behind it."""
        found = _INDENT.match(self._statement)
        assert found is not None  # it matches nothing, too
        while len(self._blocks[-1].indent) > len(found[0]):
            self._blocks.pop()
            outer = self._blocks[-1]
            outer.lines.append(f"{outer.indent} pass\n")
        if self._blocks[-1].indent != found[0]:
            self._blocks.append(_Block(found[0]))
        lines = self._blocks[-1].lines
        follows = _CLAUSE.match(self._statement) or (lines and lines[-1].lstrip().startswith("@"))
        self._blocks[-1].lines = [*(lines if follows else []), self._statement]
        self._statement, self._checked, self._brackets = "", 0, 0

    def _scan(self, line: str) -> None:
        """Keeps track of brackets and of texts that go on over lines."""
        at, self._joined = 0, False
        while at < len(line):
            if self._quote:
                end = _ENDS[self._quote].match(line, at)
                if end is None:
                    goes_on = len(self._quote) == 3 or line.endswith("\\\n")
                    self._quote = self._quote if goes_on else ""
                    return
                at, self._quote = end.end(), ""
                continue
            mark = _MARK.search(line, at)
            if mark is None or mark[0] == "#":
                return
            at = mark.end()
            if mark[0] in "([{":
                self._brackets += 1
            elif mark[0] in ")]}":
                self._brackets -= 1
            elif mark[0] == "\\\n":
                self._joined = True
            else:
                self._quote = mark[0]


class FencedCodeReader:
    """Reads a program between a line with three backticks and the word python (or py) and a line with three backticks.

    White space may stand around it and nothing else. The first line that is nothing but three backticks ends it, also
    within a text of the program.
    """

    def __init__(self, statements: int = 1) -> None:
        self._statements = statements
        self._code: CodeReader | None = None
        self._opening = ""
        self._body = ""  # the line of the body that is being written
        self._closed = False

    def push(self, characters: str) -> bool:
        """See ``Reader``."""
        if self._code is None:
            self._opening = (self._opening + characters).lstrip()
            line, newline, characters = self._opening.partition("\n")
            if not newline:
                word = line.rstrip()
                return word in _OPENINGS or any(opening.startswith(line) for opening in _OPENINGS)
            if line.rstrip() not in _OPENINGS:
                return False
            self._code = CodeReader(self._statements)
        while not self._closed and characters:
            line, newline, characters = characters.partition("\n")
            self._body += line
            if newline and not self._end_line(self._code):
                return False
        return not self._closed or not characters.strip()

    def valid(self) -> bool:
        """See ``Reader``."""
        return self._closed or (self._code is not None and self._body.strip() == "```" and self._code.valid())

    def _end_line(self, code: CodeReader) -> bool:
        line, self._body = self._body, ""
        self._closed = line.strip() == "```"
        return code.valid() if self._closed else code.push(line + "\n")


def quiet() -> None:
    """Keeps what Python says of code that a model wrote, such as an invalid escape, off the screen."""
    warnings.filterwarnings("ignore", module=re.escape(_FILE))


def _is_refused(source: str) -> bool:
    """Whether whole lines are no beginning of any program."""
    try:
        compile(source, _FILE, "exec", _FLAGS, dont_inherit=True)
    except SyntaxError as error:
        return not any(words in str(error) for words in _UNFINISHED)
    except RecursionError:  # how deep is too deep hangs on the caller as well: no ground to stop a text
        return False
    except (ValueError, MemoryError):
        return True
    return False
