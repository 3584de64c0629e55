"""Mistakes of grammar."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import Any

from instant_reward.rewards.repetition import positive
from instant_reward.text import Pieces
from instant_reward.types import Span, UserError, View

KINDS = (
    "Agreement", "BoundaryError", "Capitalization", "Eggcorn", "Enhancement", "Formatting", "Grammar", "Malapropism",
    "Miscellaneous", "Nonstandard", "Punctuation", "Readability", "Redundancy", "Regionalism", "Repetition", "Spelling",
    "Style", "Typo", "Usage", "WordChoice",
)  # fmt: skip
STYLE = ("Enhancement", "Formatting", "Readability", "Redundancy", "Regionalism", "Style", "WordChoice")
DIALECTS = ("american", "british", "australian", "canadian", "indian")
_LEAD = 1000  # so much of the prompt's unfinished sentence is read at most
_SENTENCES = Pieces("sentence")


class Grammar:
    """A penalty on the characters that Harper, a grammar checker for English, marks as a mistake. In (-inf, 0].

    Each mark is a span of ``-penalty`` on its characters, sentence by sentence. ``ignore`` names Harper's kinds of
    marks that do not count: by default those of style (Enhancement, Formatting, Readability, Redundancy, Regionalism,
    Style, WordChoice); add Spelling beside the reward ``spelling``. An unknown word with a capital letter is taken for
    a name and never marked as misspelt. ``dialect``: american, british, australian, canadian or indian. The first
    sentence is read together with what the prompt's last sentence began (unless the prompt is a chat), and only marks
    on the text itself count. English only: other languages are marked nearly word by word.

    Cost: a few milliseconds for a new sentence, less for one like those before; the dictionary takes about a second and
    150 MB, once. Needs the package harper-py. What games it: writing nothing, short stock phrases, one endless sentence
    (a passage is marked once, however long it is), and mistakes that no rule knows, which are many. Source: Harper
    (https://writewithharper.com), rules and a dictionary; nothing is trained.
    """

    name = "grammar"
    stops = False
    every = "sentence"

    def __init__(self, penalty: float = 1.0, ignore: Sequence[str] = STYLE, dialect: str = "american") -> None:
        """Raises UserError where an argument is none of those, or harper-py is missing."""
        self.penalty = positive(penalty, "Grammar: penalty")
        unknown = [kind for kind in ignore if kind not in KINDS] if isinstance(ignore, list | tuple) else [ignore]
        if unknown:
            raise UserError(f"Grammar: ignore has {unknown[0]!r}, which is no kind of mark; use {', '.join(KINDS)}")
        if dialect not in DIALECTS:
            raise UserError(f"Grammar: dialect={dialect!r} is unknown; use {', '.join(DIALECTS)}")
        self.ignore = frozenset(ignore)
        self.dialect = dialect
        _linter(dialect)

    def __call__(self, view: View) -> list[Span] | None:
        """A negative span for each mark on the sentence that has just ended."""
        begin = len(view.text) - len(view.piece)
        lead = "" if begin or view.prompt.messages is not None else _unfinished(view.prompt.text)
        shift = begin - len(lead)
        marks = []
        for mark in _linter(self.dialect).lint(lead + view.piece, language="plaintext"):
            start, end = max(mark.span.start + shift, begin), mark.span.end + shift
            if start < end and self._counts(mark):
                visible = view.text[start:end].lstrip()
                marks.append((end - len(visible) if visible else start, end))
        return [view.span(-self.penalty, start, end) for start, end in sorted(marks)] or None

    def _counts(self, mark: Any) -> bool:
        name = mark.lint_kind == "Spelling" and mark.problem_text != mark.problem_text.lower()
        return not name and mark.lint_kind not in self.ignore


def _unfinished(prompt: str) -> str:
    """The sentence of the prompt that the text goes on with; at most its last characters."""
    ends = _SENTENCES.ends(prompt, 0, False)
    return prompt[ends[-1] if ends else 0 :][-_LEAD:]


_linters = threading.local()  # a linter cannot be used by two threads at a time


def _linter(dialect: str) -> Any:
    """This thread's linter for a dialect."""
    made: dict[str, Any] = _linters.__dict__
    if dialect not in made:
        try:
            import harper
        except ImportError as error:
            message = "the grammar reward needs the package harper-py; run: pip install 'instant-reward[rules]'"
            raise UserError(message) from error
        made[dialect] = harper.Linter(harper.Dialect[dialect.upper()])
    return made[dialect]
