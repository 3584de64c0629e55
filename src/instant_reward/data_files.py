"""Rows from files, one after the other: JSONL, JSON, CSV, TSV, Parquet, plain text, and saved data sets.

Every row comes with where it was found ("prompts.jsonl, line 3"), so that what is wrong with it can be said. Nothing
but a JSON list is ever whole in memory.
"""

from __future__ import annotations

import codecs
import csv
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TextIO

from instant_reward.types import UserError

Located = tuple[str, Any]  # where something was found, and what

CELL = 2**27  # characters that a cell of a table may have; beyond, an open quote has swallowed the rest of the file

SUFFIXES = ".jsonl, .ndjson, .json, .csv, .tsv, .parquet, .txt"


def read_items(path: Path, encoding: str = "utf-8") -> Iterator[Located]:
    """Each item of a file by its suffix, or of a folder that ``datasets`` saved, with where it was found.

    A table's row, an object and a record are mappings of columns; a line of plain text is a string, empty lines left
    out; a line of JSONL and an item of a JSON list may be anything.

    Args:
        encoding: of a text file, by Python's name for it ("utf-8", "gb18030", "utf-16"); a mark at its beginning that
            says UTF-8 is passed over.

    Raises:
        UserError: the file is missing or unreadable, or a line of it; it names file and line.
    """
    readers = {".jsonl": _jsonl, ".ndjson": _jsonl, ".json": _json, ".txt": _lines, ".csv": _table, ".tsv": _table}
    if path.is_dir():
        yield from _data_set(path)
        return
    if not path.exists():
        raise UserError(f"there is no data file {path}: check the path (it is seen from {Path.cwd()}).")
    suffix = path.suffix.lower()
    if suffix != ".parquet" and suffix not in readers:
        raise UserError(f"the data file {path} has an unknown suffix {path.suffix!r}: use one of {SUFFIXES}.")
    name = _codec(encoding)
    try:
        yield from _parquet(path) if suffix == ".parquet" else readers[suffix](path, name)
    except UnicodeError as error:
        raise _undecodable(path, name, error) from error
    except OSError as error:
        raise UserError(f"the data file {path} cannot be read ({error.strerror or error}): check it.") from error


def _codec(encoding: str) -> str:
    """Python's name of an encoding, which for UTF-8 passes over the mark at a file's beginning."""
    try:
        name = codecs.lookup(encoding).name
        "".encode(name)  # some codecs, such as hex, make no text
    except LookupError:
        raise UserError(
            f"data.encoding: there is no encoding {encoding!r}: name one that Python knows, such as utf-8, gb18030, "
            "big5, cp1252 or utf-16."
        ) from None
    return "utf-8-sig" if name == "utf-8" else name


def _undecodable(path: Path, encoding: str, error: UnicodeError) -> UserError:
    """The error that names the first line that is not in the encoding. The file is read anew up to there."""
    shown = "UTF-8" if encoding == "utf-8-sig" else encoding
    advice = "save the whole file in one encoding, or name the one it is in by data.encoding (gb18030, cp1252, ...)."
    try:
        with path.open(encoding=encoding, errors="surrogateescape") as handle:
            for number, line in enumerate(handle, start=1):
                bad = next((index for index, one in enumerate(line) if "\udc80" <= one <= "\udcff"), None)
                if bad is not None:
                    place = len(line[:bad].encode(encoding.removesuffix("-sig"), "surrogateescape")) + 1
                    byte = f"byte {place} of the line is 0x{ord(line[bad]) - 0xDC00:02x}"
                    return UserError(f"{path}, line {number} is not {shown} text ({byte}): {advice}")
    except UnicodeError:  # UTF-16 and its like break off for good: no line can be named
        pass
    return UserError(f"the data file {path} is not {shown} text ({error}): {advice}")


def _open(path: Path, encoding: str, newline: str | None = None) -> TextIO:
    return path.open(encoding=encoding, newline=newline)


def _lines(path: Path, encoding: str) -> Iterator[Located]:
    with _open(path, encoding) as handle:
        for number, line in enumerate(handle, start=1):
            if line.strip():
                yield f"{path}, line {number}", line.rstrip("\r\n")


def _jsonl(path: Path, encoding: str) -> Iterator[Located]:
    for where, line in _lines(path, encoding):
        try:
            found = json.loads(line)
        except json.JSONDecodeError as error:
            raise UserError(f"{where} is not JSON ({error.msg} at column {error.colno}): mend that line.") from error
        except (ValueError, RecursionError) as error:
            raise UserError(f"{where} cannot be read as JSON ({_too_much(error)}): mend that line.") from error
        yield where, found


def _json(path: Path, encoding: str) -> Iterator[Located]:
    text = path.read_text(encoding=encoding)
    try:
        found = json.loads(text)
    except json.JSONDecodeError as error:
        where = f"line {error.lineno}, column {error.colno}"
        hint = "mend it, or name it .jsonl if it has one object a line"
        raise UserError(f"the data file {path} is not JSON ({error.msg} at {where}): {hint}.") from error
    except (ValueError, RecursionError) as error:
        raise UserError(f"the data file {path} cannot be read as JSON ({_too_much(error)}): mend it.") from error
    if not isinstance(found, list):
        raise UserError(f"the data file {path} holds a JSON {type(found).__name__}: it must hold a list of rows.")
    for number, item in enumerate(found, start=1):
        yield f"{path}, row {number}", item


def _too_much(error: Exception) -> str:
    """Why JSON that is well formed cannot be read."""
    return "brackets within brackets, too deep" if isinstance(error, RecursionError) else "a number is too long"


def _table(path: Path, encoding: str) -> Iterator[Located]:
    """The rows below the first line, which names the columns; a row's line is the one it begins in."""
    csv.field_size_limit(max(CELL, csv.field_size_limit()))  # one for the whole process, and by itself 131,072
    delimiter = "\t" if path.suffix.lower() == ".tsv" else ","
    with _open(path, encoding, newline="") as handle:
        reader = csv.reader(handle, delimiter=delimiter, strict=True)
        columns: list[str] = []
        line = 1
        try:
            for cells in reader:
                where, line = f"{path}, line {line}", reader.line_num + 1
                if not cells:
                    continue
                if not columns:
                    columns = cells
                    _check_columns(columns, where)
                elif len(cells) != len(columns):
                    has = f"{len(cells)} cells, not the {len(columns)} columns of the first line"
                    raise UserError(f"{where} has {has}: put texts with a comma or a line break in quotes.")
                else:
                    yield where, dict(zip(columns, cells, strict=True))
        except csv.Error as error:
            raise UserError(f"{path}, line {line} is no valid CSV ({error}): mend its quotes.") from error


def _check_columns(columns: list[str], where: str) -> None:
    twice = next((name for index, name in enumerate(columns) if name in columns[:index]), None)
    if twice is not None:
        raise UserError(f"{where} names the column {twice!r} twice: give each column a name of its own.")


def _parquet(path: Path) -> Iterator[Located]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise UserError(f"reading {path} needs the package pyarrow: run `pip install pyarrow`.") from error
    try:
        batches = pyarrow.parquet.ParquetFile(path).iter_batches(batch_size=1024)
        for number, row in enumerate((row for batch in batches for row in batch.to_pylist()), start=1):
            yield f"{path}, row {number}", row
    except pyarrow.ArrowException as error:
        raise UserError(f"the data file {path} is no valid Parquet ({error}): write it again.") from error


def _data_set(path: Path) -> Iterator[Located]:
    """The rows of a folder that ``datasets.Dataset.save_to_disk`` wrote."""
    parts = path / "dataset_dict.json"
    if parts.is_file():
        names = ", ".join(str(path / name) for name in json.loads(parts.read_text(encoding="utf-8"))["splits"])
        raise UserError(f"the data set {path} has several parts: name one of them ({names}).")
    if not (path / "dataset_info.json").is_file():
        raise UserError(
            f"the data file {path} is a folder: name a file in it ({SUFFIXES}), or a folder that datasets.save_to_disk "
            "wrote."
        )
    try:
        import datasets
    except ImportError as error:
        raise UserError(
            f"reading the data set {path} needs the package datasets: run `pip install datasets`."
        ) from error
    try:
        found: Any = datasets.load_from_disk(str(path))
    except (OSError, ValueError, KeyError, TypeError) as error:
        reason = " ".join(str(error).split())
        raise UserError(f"the data set {path} cannot be read ({reason}): save it again by save_to_disk.") from error
    for number, row in enumerate(found, start=1):
        yield f"{path}, row {number}", row
