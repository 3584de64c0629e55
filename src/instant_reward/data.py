"""Prompts: reading them from files, tokenising them, and handing them out step by step.

Files may be JSONL, JSON, CSV, TSV, Parquet, or plain text with a prompt a line. A prompt is a string, which is
continued as it stands, or a list of messages, which goes through the model's chat template.
"""

from __future__ import annotations

import csv
import itertools
import json
import random
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Generic, TypeVar

from instant_reward.reviews import movie_reviews as movie_reviews
from instant_reward.types import Message, Prompt, UserError

Item = TypeVar("Item")
_Located = tuple[str, Any]  # where something was found ("prompts.jsonl, line 3"), and what

_SUFFIXES = ".jsonl, .ndjson, .json, .csv, .tsv, .parquet, .txt"


class Row(dict[str, Any]):
    """One row of a data set; ``where`` says where it was found, for error messages."""

    def __init__(self, values: Mapping[str, Any], where: str) -> None:
        super().__init__(values)
        self.where = where


def load_rows(
    source: str | Path | Sequence[Any], column: str = "prompt", limit: int | None = None
) -> list[dict[str, Any]]:
    """The rows of a data set, each with its prompt under ``column`` and the other columns beside it.

    Args:
        source: a file (by its suffix: JSONL, JSON, CSV, TSV, Parquet, or plain text with a prompt a line, empty lines
            left out), or a sequence of strings, of message lists, or of mappings.
        column: where a row of several columns has its prompt.
        limit: the first ``limit`` rows only.

    Raises:
        UserError: the file is missing, unreadable or empty, or a row has no such column; it names file and line.
    """
    if limit is not None and limit < 1:
        raise UserError(f"the limit of the data is {limit}: give 1 or more, or leave it out.")
    if isinstance(source, str | Path):
        name, found = str(source), _read(Path(source).expanduser())
    else:
        name, found = "the list of prompts", ((f"prompt {index}", item) for index, item in enumerate(source))
    rows: list[dict[str, Any]] = [_row(item, where, column) for where, item in itertools.islice(found, limit)]
    if not rows:
        raise UserError(f"{name} holds no prompts: add at least one.")
    return rows


def _row(item: Any, where: str, column: str) -> Row:
    if isinstance(item, str | list):
        return Row({column: item}, where)
    if not isinstance(item, Mapping):
        raise UserError(f"{where} is a {type(item).__name__}: a row is a string, a list of messages, or an object.")
    if column not in item:
        there = ", ".join(str(key) for key in item) or "none"
        raise UserError(f"{where} has no column {column!r} (it has: {there}): name the column that holds the prompts.")
    return Row(item, where)


def _read(path: Path) -> Iterator[_Located]:
    readers = {".jsonl": _jsonl, ".ndjson": _jsonl, ".json": _json, ".parquet": _parquet, ".txt": _lines}
    readers |= {".csv": _table, ".tsv": _table}
    if path.is_dir():
        raise UserError(f"the data file {path} is a folder: name a file in it ({_SUFFIXES}).")
    if not path.exists():
        raise UserError(f"there is no data file {path}: check the path (it is seen from {Path.cwd()}).")
    if path.suffix.lower() not in readers:
        raise UserError(f"the data file {path} has an unknown suffix {path.suffix!r}: use one of {_SUFFIXES}.")
    try:
        yield from readers[path.suffix.lower()](path)
    except UnicodeDecodeError as error:
        raise UserError(f"the data file {path} is not UTF-8 text (byte {error.start}): save it as UTF-8.") from error
    except OSError as error:
        raise UserError(f"the data file {path} cannot be read ({error.strerror or error}): check it.") from error


def _lines(path: Path) -> Iterator[_Located]:
    with path.open(encoding="utf-8-sig") as handle:
        for number, line in enumerate(handle, start=1):
            if line.strip():
                yield f"{path}, line {number}", line.rstrip("\r\n")


def _jsonl(path: Path) -> Iterator[_Located]:
    for where, line in _lines(path):
        try:
            yield where, json.loads(line)
        except json.JSONDecodeError as error:
            raise UserError(f"{where} is not JSON ({error.msg} at column {error.colno}): mend that line.") from error


def _json(path: Path) -> Iterator[_Located]:
    try:
        found = json.loads(path.read_text(encoding="utf-8-sig"))
    except json.JSONDecodeError as error:
        where = f"line {error.lineno}, column {error.colno}"
        hint = "mend it, or name it .jsonl if it has one object a line"
        raise UserError(f"the data file {path} is not JSON ({error.msg} at {where}): {hint}.") from error
    if not isinstance(found, list):
        raise UserError(f"the data file {path} holds a JSON {type(found).__name__}: it must hold a list of rows.")
    for number, item in enumerate(found, start=1):
        yield f"{path}, row {number}", item


def _table(path: Path) -> Iterator[_Located]:
    delimiter = "\t" if path.suffix.lower() == ".tsv" else ","
    with path.open(encoding="utf-8-sig", newline="") as handle:
        reader = csv.DictReader(handle, delimiter=delimiter, strict=True)
        try:
            for row in reader:
                where = f"{path}, line {reader.line_num}"
                columns = len(reader.fieldnames or [])
                if None in row or None in row.values():
                    raise UserError(f"{where} has not the {columns} columns of the first line: quote its texts.")
                yield where, row
        except csv.Error as error:
            raise UserError(
                f"{path}, line {reader.line_num + 1} is no valid CSV ({error}): mend its quotes."
            ) from error


def _parquet(path: Path) -> Iterator[_Located]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise UserError(f"reading {path} needs the package pyarrow: run `pip install pyarrow`.") from error
    try:
        batches = pyarrow.parquet.ParquetFile(path).iter_batches()
        for number, row in enumerate((row for batch in batches for row in batch.to_pylist()), start=1):
            yield f"{path}, row {number}", row
    except pyarrow.ArrowException as error:
        raise UserError(f"the data file {path} is no valid Parquet ({error}): write it again.") from error


def to_prompts(
    rows: Sequence[Mapping[str, Any]], tokenizer: Any, column: str = "prompt", max_tokens: int | None = None
) -> list[Prompt]:
    """Tokenised prompts, in the order of the rows.

    Args:
        rows: each with a string or a list of messages under ``column``. Its ``id``, or else its number ("0", "1",
            ...), becomes the prompt's id; the columns besides ``column`` become its info.
        tokenizer: a transformers tokenizer. A string is tokenised as the tokenizer does by itself (it may put its
            beginning-of-text token before it); messages are written by its chat template, the answer's opening
            included.
        max_tokens: how long a prompt may be: the model's context less the new tokens.

    Raises:
        UserError: a prompt is empty or too long, is neither string nor messages, or the tokenizer has no chat template.
    """
    return [_prompt(row, index, tokenizer, column, max_tokens) for index, row in enumerate(rows)]


def _prompt(row: Mapping[str, Any], index: int, tokenizer: Any, column: str, max_tokens: int | None) -> Prompt:
    where = getattr(row, "where", f"prompt {index}")
    content = _row(dict(row), where, column)[column]
    messages: list[Message] | None = None
    if isinstance(content, str):
        text, token_ids = content, list(tokenizer(content)["input_ids"])
    else:
        messages = _messages(content, where)
        text = _rendered(messages, tokenizer, where)
        # The template writes the special tokens itself: the tokenizer must not add a second beginning of text.
        token_ids = list(tokenizer(text, add_special_tokens=False)["input_ids"])
    if not token_ids:
        raise UserError(f"{where} has an empty prompt: give it at least one character, or leave that row out.")
    if max_tokens is not None and len(token_ids) > max_tokens:
        raise UserError(
            f"{where} has a prompt of {len(token_ids)} tokens, and only {max(0, max_tokens)} fit beside the new ones: "
            "shorten it, or ask for fewer new tokens."
        )
    info = {key: value for key, value in row.items() if key not in (column, "id")}
    return Prompt(id=str(row.get("id", index)), text=text, token_ids=token_ids, messages=messages, info=info)


def _messages(content: Any, where: str) -> list[Message]:
    if not isinstance(content, Sequence) or not content:
        kind = "an empty list" if content == [] else f"a {type(content).__name__}"
        raise UserError(f"{where} has {kind} for a prompt: give text or a list of messages.")
    for message in content:
        named = isinstance(message, Mapping) and isinstance(message.get("role"), str)
        if not named or not isinstance(message.get("content"), str):
            raise UserError(f"{where} has a message {message!r}: each needs a 'role' and a 'content' that are text.")
    return [dict(message) for message in content]


def _rendered(messages: list[Message], tokenizer: Any, where: str) -> str:
    if not getattr(tokenizer, "chat_template", None):
        raise UserError(f"{where} is a list of messages, but the model has no chat template: give plain text.")
    try:
        return str(tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True))
    except Exception as error:  # templates are programs of the model's authors: they refuse with all kinds of errors
        raise UserError(f"the model's chat template refuses {where} ({error}): change its messages.") from error


class Prompts(Generic[Item]):
    """An endless stream of batches in an order that the seed and the step alone decide.

    Each epoch goes through all items once, in an order of its own; a batch that an epoch cannot fill goes on with the
    next one. Nothing is remembered between calls: a resumed run asks for its next step and gets what it would have got.
    """

    def __init__(self, items: Sequence[Item], per_step: int, seed: int = 0) -> None:
        if not items:
            raise UserError("there are no prompts to train on: give at least one.")
        if per_step < 1:
            raise UserError(f"prompts per step is {per_step}: give 1 or more.")
        self.items, self.per_step, self.seed = items, per_step, seed
        self._epoch, self._order = -1, list[int]()

    def __len__(self) -> int:
        """How many items an epoch has."""
        return len(self.items)

    def batch(self, step: int) -> list[Item]:
        """The ``per_step`` items of ``step``; the first step is 1."""
        if step < 1:
            raise ValueError(f"steps count from 1, not {step}")
        first = (step - 1) * self.per_step
        return [self._item(position) for position in range(first, first + self.per_step)]

    def epoch(self, step: int) -> float:
        """How many times all items were seen once ``step`` is over."""
        return step * self.per_step / len(self.items)

    def __iter__(self) -> Iterator[list[Item]]:
        """The batches of steps 1, 2, ... without end."""
        return (self.batch(step) for step in itertools.count(1))

    def _item(self, position: int) -> Item:
        epoch, index = divmod(position, len(self.items))
        if epoch != self._epoch:
            self._epoch, self._order = epoch, list(range(len(self.items)))
            random.Random(f"{self.seed}/{epoch}").shuffle(self._order)
        return self.items[self._order[index]]
