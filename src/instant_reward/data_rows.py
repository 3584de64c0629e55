"""What is done to rows once they are read: columns, empty cells, duplicates, parts, labels."""

from __future__ import annotations

import hashlib
import json
import math
import random
from array import array
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, TypeVar

from instant_reward.data_files import Located
from instant_reward.stored import picked
from instant_reward.types import UserError

Item = TypeVar("Item")


class Row(dict[str, Any]):
    """One row of a data set; ``where`` says where it was found, for error messages."""

    def __init__(self, values: Mapping[str, Any], where: str) -> None:
        super().__init__(values)
        self.where = where


def as_rows(
    found: Iterable[Located],
    column: str = "prompt",
    columns: Mapping[str, str] | None = None,
    needed: Sequence[str] = (),
) -> Iterator[Row]:
    """Rows of what was read, one by one.

    Args:
        found: strings and lists of messages, which get the only column ``column``; and mappings.
        columns: new names of columns, each with the file's own.
        needed: columns, by their new names, that hold a text or a value in every row.

    Raises:
        UserError: a row has no such column or an empty cell there; it names file and line.
    """
    for where, item in found:
        row = as_row(item, where, column, columns)
        empty(row, column, allow_text=True)
        for name in needed:
            empty(row, name)
        for name in {column, *needed}:
            _whole(row, name)
        yield row


def as_row(item: Any, where: str, column: str = "prompt", columns: Mapping[str, str] | None = None) -> Row:
    """One row; ``as_rows`` has the arguments and errors."""
    if isinstance(item, str | list):
        return Row({column: item}, where)
    if not isinstance(item, Mapping):
        raise UserError(f"{where} is a {type(item).__name__}: a row is a string, a list of messages, or an object.")
    row = Row(item, where) if not columns else _renamed(item, columns, where)
    if column not in row:
        raise UserError(
            f"{where} has no column {column!r} ({_has(row)}): name the one that holds the prompts or texts."
        )
    return row


def _renamed(item: Mapping[str, Any], columns: Mapping[str, str], where: str) -> Row:
    for new, old in columns.items():
        if old not in item:
            raise UserError(f"{where} has no column {old!r} ({_has(item)}): correct data.columns.{new}.")
        if new in item and new not in columns.values():
            raise UserError(
                f"{where} has a column {new!r} already, which data.columns would lose: rename that one as well, or "
                f"choose another name for {old!r}."
            )
    kept = {key: value for key, value in item.items() if key not in columns.values()}
    return Row(kept | {new: item[old] for new, old in columns.items()}, where)


def _has(row: Mapping[str, Any]) -> str:
    return f"it has: {', '.join(str(key) for key in row) or 'none'}"


def empty(row: Row, column: str, allow_text: bool = False) -> None:
    """Refuses a missing column and an empty cell in it: None, NaN and, unless ``allow_text``, a text without a letter.

    Raises:
        UserError: names the row's file and line.
    """
    advice = "fill it in, or leave that row out."
    if column not in row:
        raise UserError(f"{row.where} has no column {column!r} ({_has(row)}): correct the column's name.")
    value = row[column]
    if value is None or (isinstance(value, float) and math.isnan(value)):
        raise UserError(f"{row.where} has an empty cell ({value}) in the column {column!r}: {advice}")
    if isinstance(value, str) and not value.strip() and not allow_text:
        raise UserError(f"{row.where} has an empty text in the column {column!r}: {advice}")


def _whole(row: Row, column: str) -> None:
    """Refuses half a surrogate pair, which JSON can write: it is no character, and no tokenizer reads it."""
    value = row[column]
    for one in value if isinstance(value, list) else [value]:
        text = one.get("content") if isinstance(one, Mapping) else one
        try:
            if isinstance(text, str):
                text.encode()
        except UnicodeEncodeError as error:
            half = ascii(error.object[error.start])
            advice = "mend it, or leave that row out."
            raise UserError(f"{row.where} has half a character ({half}) in the column {column!r}: {advice}") from error


def unique_rows(rows: Iterable[Row], column: str) -> Iterator[Row]:
    """The rows whose value in ``column`` did not come before. 16 bytes a value are kept in memory, not the values."""
    seen: set[bytes] = set()
    for row in rows:
        empty(row, column, allow_text=True)
        text = json.dumps(row[column], ensure_ascii=False, sort_keys=True, default=str)
        key = hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=16).digest()
        if key not in seen:
            seen.add(key)
            yield row


class TextsIn(Iterable[str]):
    """The texts in these columns, row by row; of messages, what each says; of numbers, their digits. They can be gone
    through as often as the rows.

    Raises:
        UserError: a row has no such column, or neither text nor messages in it; it names the row.
    """

    def __init__(self, rows: Iterable[Mapping[str, Any]], columns: Sequence[str]) -> None:
        self.rows, self.columns = rows, columns

    def __iter__(self) -> Iterator[str]:
        return _texts_in(self.rows, self.columns)


def _texts_in(rows: Iterable[Mapping[str, Any]], columns: Sequence[str]) -> Iterator[str]:
    for row in rows:
        found = row if isinstance(row, Row) else Row(row, "a row")
        for column in columns:
            empty(found, column, allow_text=True)
            value = found[column]
            if isinstance(value, int | float):  # a label, or an answer
                value = label_of(found, column)
            several = value if isinstance(value, list) else [value]
            for one in several:
                text = one.get("content") if isinstance(one, Mapping) else one
                if not isinstance(text, str):
                    raise UserError(f"{found.where} has no text in the column {column!r}: name columns of texts.")
                yield text


def split(rows: Sequence[Item], fractions: Mapping[str, float], seed: int = 0) -> dict[str, Sequence[Item]]:
    """The rows in parts, drawn by ``seed`` and the number of rows alone: what stands in a row plays no part.

    Args:
        fractions: of the rows, by the part's name; they add up to 1 or less, and the rows that they do not reach are
            left out.

    Returns:
        The rows of each part, in the order they came in. Sizes are rounded so that no row is lost between two parts.

    Raises:
        UserError: a fraction is not above 0, they add up to more than 1, or a part would have no row.
    """
    _check_fractions(fractions)
    order = array("q", range(len(rows)))
    random.Random(f"{seed}/split").shuffle(order)
    parts: dict[str, Sequence[Item]] = {}
    reached, begin = 0.0, 0
    for name, fraction in fractions.items():
        reached += fraction
        end = round(reached * len(rows))
        if end == begin:
            raise UserError(f"split: {len(rows)} rows are too few for {name}={fraction:g}: it would have none.")
        parts[name] = picked(rows, array("q", sorted(order[begin:end])))
        begin = end
    return parts


def _check_fractions(fractions: Mapping[str, float]) -> None:
    if not fractions or min(fractions.values()) <= 0 or sum(fractions.values()) > 1 + 1e-9:
        raise UserError(
            f"split: the fractions {dict(fractions)} must be above 0 and add up to 1 or less: correct them."
        )


def label_of(row: Mapping[str, Any], column: str = "label") -> str:
    """A row's label as text: 1, "1", True and the 1.0 that a column with empty cells makes of it are the same label.

    Raises:
        UserError: there is none; it names the row.
    """
    found = row if isinstance(row, Row) else Row(row, "a row")
    empty(found, column)
    value = found[column]
    if isinstance(value, bool) or (isinstance(value, float) and value.is_integer()):
        return str(int(value))
    return str(value).strip()


def labels_of(rows: Iterable[Mapping[str, Any]], column: str = "label") -> list[str]:
    """The different labels of the rows, each once: numbers by size, then the others by letter.

    Raises:
        UserError: a row has none; it names the row.
    """
    return sorted({label_of(row, column) for row in rows}, key=_by_size)


def _by_size(label: str) -> tuple[bool, float, str]:
    number = label.lstrip("-").isdecimal()
    return (not number, float(label) if number else 0.0, label)


def check_labels(
    parts: Mapping[str, Sequence[Mapping[str, Any]]], column: str | Mapping[str, str] = "label"
) -> list[str]:
    """The labels of the part ``train``, once every part is known to have all of them and no others.

    Args:
        column: where the labels are, in all parts or in each by its name.

    Raises:
        UserError: there is but one label, a part has one that training never sees (it names the row), or lacks one.
    """
    columns = {name: column if isinstance(column, str) else column[name] for name in parts}
    known = labels_of(parts["train"], columns["train"])
    if len(known) < 2:
        raise UserError(
            f"train has the one label {known[0]!r} in the column {columns['train']!r}: there is nothing to tell apart."
        )
    for name, rows in parts.items():
        found = set[str]()
        for row in rows:
            label = label_of(row, columns[name])
            found.add(label)
            if label not in known:
                where = getattr(row, "where", f"a row of {name}")
                raise UserError(
                    f"{where} ({name}) has the label {label!r}, which training never sees (it has: "
                    f"{', '.join(known)}): add such rows to the training part, or leave that row out."
                )
        missing = [label for label in known if label not in found]
        if missing:
            raise UserError(f"{name} has no row with the label {', '.join(missing)}: give it more rows, or split anew.")
    return known
