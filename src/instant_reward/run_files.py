"""Files that survive a crash: written whole or not at all, or line by line with a torn end that readers drop."""

from __future__ import annotations

import contextlib
import errno
import json
import math
import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from instant_reward.types import RunError

PARTIAL = ".partial"  # the end of the hidden names of what is still being written
SMALLEST_ROOM = 1 << 20  # bytes; a writer that fails with less left has run out of room, whatever it calls that


@contextlib.contextmanager
def reporting(what: str, folder: Path) -> Iterator[None]:
    """Turns errors of the disk into RunError: ``what`` could not be written, where, why and what to do."""
    try:
        yield
    except Exception as error:
        if _is_full(error, folder):
            reason, act = "the disk is full", "free some room"
        elif isinstance(error, OSError) and error.errno:
            reason, act = os.strerror(error.errno), "mend that"
        else:
            raise
        raise RunError(
            f"{what} could not be written to {folder} ({reason}); what was saved before is unharmed: "
            f"{act}, then go on with --resume {folder}."
        ) from error


def _is_full(error: BaseException, folder: Path) -> bool:
    """Whether the disk is full, also where a library wrapped or swallowed the system's error."""
    link: BaseException | None = error
    while link is not None:
        if isinstance(link, OSError) and link.errno in (errno.ENOSPC, errno.EDQUOT):
            return True
        if "No space left on device" in str(link):  # safetensors hands on only the text
            return True
        link = link.__cause__ or link.__context__
    if not isinstance(error, OSError | RuntimeError):
        return False
    with contextlib.suppress(OSError):  # torch.save says only that a write failed
        return shutil.disk_usage(folder).free < SMALLEST_ROOM
    return False


def write_whole(path: Path, text: str) -> None:
    """Write a text file: readers find the old one or the new one, whenever the process is killed."""
    partial = path.with_name(f".{path.name}{PARTIAL}")
    try:
        with partial.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
        sync(path.parent)
    finally:
        partial.unlink(missing_ok=True)


def write_folder(target: Path, fill: Callable[[Path], None]) -> None:
    """Make the folder ``target``, filled by ``fill(empty folder beside it)``: it is there whole or not at all."""
    partial = target.with_name(f".{target.name}{PARTIAL}")
    remove(partial)
    try:
        partial.mkdir(parents=True)
        fill(partial)
        for file in sorted(partial.rglob("*")):
            sync(file)
        sync(partial)
        partial.rename(target)
        sync(target.parent)
    finally:
        remove(partial)


def remove(folder: Path) -> None:
    """Remove a folder where there is one; under its name it is there whole or not at all."""
    if folder.is_dir():
        hidden = folder if folder.name.endswith(PARTIAL) else folder.with_name(f".{folder.name}.old{PARTIAL}")
        if hidden != folder:
            folder.rename(hidden)
        shutil.rmtree(hidden)


def remove_leftovers(folder: Path) -> None:
    """Remove what a killed process was writing. Only for the one process that writes here."""
    for left in folder.glob(f".*{PARTIAL}"):
        if left.is_dir():
            shutil.rmtree(left)
        else:
            left.unlink()


def sync(path: Path) -> None:
    """Wait until a file, or the names in a folder, are on the disk."""
    if path.is_dir() and os.name == "nt":
        return  # Windows cannot
    handle = os.open(path, os.O_RDWR if os.name == "nt" else os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def append_lines(path: Path, records: Sequence[Mapping[str, Any]]) -> None:
    """Append one line of strict JSON for each record; all of them or, where the disk is full, none."""
    if not records:
        return
    data = "".join(json.dumps(record, allow_nan=False) + "\n" for record in records).encode()
    with path.open("ab", buffering=0) as file:  # unbuffered: after a failure nothing is left to be flushed later
        before = file.seek(0, os.SEEK_END)
        try:
            view = memoryview(data)
            while view:
                view = view[file.write(view) :]
        except OSError:
            with contextlib.suppress(OSError):
                file.truncate(before)
            raise


def read_lines(path: Path) -> Iterator[tuple[dict[str, Any], int]]:
    """Each record of a file of JSON lines, and where its line ends in bytes. A torn end is passed over.

    Raises:
        RunError: a line that others follow is damaged.
    """
    if not path.is_file():
        return
    torn = None
    end = 0
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            record = _record(line)
            if record is None:
                torn = torn or number
                continue
            if torn:
                raise RunError(f"line {torn} of {path} is damaged; remove it, or begin anew in another --out.")
            end += len(line)
            yield record, end


def _record(line: bytes) -> dict[str, Any] | None:
    """The record of one line, which tells its step, or None where the line is not whole."""
    if not line.endswith(b"\n"):
        return None
    try:
        record = json.loads(line)
    except ValueError:
        return None
    return record if isinstance(record, dict) and isinstance(record.get("step"), int) else None


def plain(value: Any) -> Any:
    """``value`` as strict JSON holds it: numbers that are not finite become None, numbers of NumPy and torch plain.

    Raises:
        TypeError: there is something that JSON has no form for.
    """
    if value is None or isinstance(value, bool | str):
        return value
    if isinstance(value, int):
        return int(value)
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    if hasattr(value, "tolist"):  # an array or a single number of NumPy or torch
        return plain(value.tolist())
    raise TypeError(f"{type(value).__name__} has no form in JSON: {value!r}")
