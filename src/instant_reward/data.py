"""Prompts: reading them from files, tokenising them, and handing them out step by step.

A prompt is a string, which is continued as it stands, or a list of messages, which goes through the model's chat
template.
"""

from __future__ import annotations

import itertools
import random
from array import array
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Generic, TypeVar

from instant_reward.data_files import Located, read_items
from instant_reward.data_rows import Row as Row
from instant_reward.data_rows import TextsIn as TextsIn
from instant_reward.data_rows import as_row, as_rows, unique_rows
from instant_reward.data_rows import check_labels as check_labels
from instant_reward.data_rows import label_of as label_of
from instant_reward.data_rows import labels_of as labels_of
from instant_reward.data_rows import split as split
from instant_reward.reviews import movie_reviews as movie_reviews
from instant_reward.stored import held
from instant_reward.types import Message, Prompt, UserError

Item = TypeVar("Item")


def load_rows(
    source: str | Path | Iterable[Any],
    column: str = "prompt",
    limit: int | None = None,
    *,
    columns: Mapping[str, str] | None = None,
    needed: Sequence[str] = (),
    encoding: str = "utf-8",
    unique: str | None = None,
    pair: Sequence[str] = (),
    stream: bool = False,
) -> Sequence[dict[str, Any]]:
    """The rows of a data set, each with its prompt under ``column`` and the other columns beside it.

    Args:
        source: a file (by its suffix: JSONL, JSON, CSV, TSV, Parquet, or plain text with a prompt a line, empty lines
            left out), a folder that ``datasets`` saved, or a sequence of strings, of message lists, or of mappings.
        column: where a row of several columns has its prompt.
        limit: the first ``limit`` rows only.
        columns: new names of columns, each with the file's own: ``{"prompt": "question"}``. The other arguments mean
            the new names.
        needed: columns that must hold something in every row.
        encoding: of a text file.
        unique: leaves out rows whose value in this column came before.
        pair: two columns that are put together, as a list under "prompt".
        stream: the rows are kept on disk and read one by one when they are asked for (``stored.Stored``).

    Raises:
        UserError: the file is missing, unreadable or empty, or a row has no such column or an empty cell (None, NaN)
            there; it names file and line.
    """
    if limit is not None and limit < 1:
        raise UserError(f"the limit of the data is {limit}: give 1 or more, or leave it out.")
    found: Iterator[Located]
    if isinstance(source, str | Path):
        name, found = str(source), read_items(Path(source).expanduser(), encoding)
    else:
        located = ((getattr(item, "where", f"prompt {index}"), item) for index, item in enumerate(source))
        name, found = "the list of prompts", located
    rows: Iterator[Row] = as_rows(found, column, columns, needed)
    if unique is not None:
        rows = unique_rows(rows, unique)
    paired: Iterable[dict[str, Any]] = (_paired(row, pair) for row in rows) if pair else rows
    kept = held(itertools.islice(paired, limit), stream)
    if not kept:
        raise UserError(f"{name} holds no prompts: add at least one.")
    return kept


def _paired(row: Row, pair: Sequence[str]) -> Row:
    row["prompt"] = [row[name] for name in pair]
    return row


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
    content = as_row(dict(row), where, column)[column]
    messages: list[Message] | None = None
    if isinstance(content, str):
        # Not verbose: what is too long is said below, with its place.
        text, token_ids = content, list(tokenizer(content, verbose=False)["input_ids"])
    else:
        messages = _messages(content, where)
        text = _rendered(messages, tokenizer, where)
        # The template writes the special tokens itself: the tokenizer must not add a second beginning of text.
        token_ids = list(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])
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
        self._epoch, self._order = -1, array("q")

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
            self._epoch, self._order = epoch, array("q", range(len(self.items)))
            random.Random(f"{self.seed}/{epoch}").shuffle(self._order)
        return self.items[self._order[index]]


def text_in(prompt: Prompt, column: str, option: str = "data.completion") -> str:
    """The text in a prompt's column.

    Raises:
        UserError: there is no such column, or its text is empty.
    """
    text = prompt.info.get(column)
    if isinstance(text, int | float) and text == text:  # labels are often numbers; NaN is none
        text = label_of(prompt.info, column)
    if not isinstance(text, str) or not text:
        raise UserError(f"{option}: {prompt.place} has no text in its column {column!r}; correct the row")
    return text
