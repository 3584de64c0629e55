"""Sequences whose items lie on disk: data may be larger than memory, and any item is there when it is asked for."""

from __future__ import annotations

import pickle
import tempfile
import threading
from array import array
from collections.abc import Iterable, Sequence
from typing import Any, TypeVar

from instant_reward.types import UserError

Item = TypeVar("Item")


class Stored(Sequence[Item]):
    """Items in a temporary file that has no name and goes with the process; 8 bytes of memory each.

    Args:
        items: each is written as it comes, so that no two of them are in memory together.

    Raises:
        UserError: the disk is full, or an item is nothing that can be written (an open file, a function of a function).
    """

    def __init__(self, items: Iterable[Item]) -> None:
        self._file = tempfile.TemporaryFile(prefix="instant-reward-")  # noqa: SIM115 (it is open as long as this is)
        self._ends = array("Q", [0])
        self._reading = threading.Lock()  # a place in the file is sought and read in one go
        for item in items:
            self._write(item)
        self._written(self._file.flush)

    def __len__(self) -> int:
        return len(self._ends) - 1

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return Picked(self, range(*index.indices(len(self))))
        number = range(len(self))[index]
        with self._reading:
            self._file.seek(self._ends[number])
            found = self._file.read(self._ends[number + 1] - self._ends[number])
        return pickle.loads(found)

    def _write(self, item: Item) -> None:
        try:
            kept = pickle.dumps(item, pickle.HIGHEST_PROTOCOL)
        except (pickle.PicklingError, TypeError, AttributeError) as error:
            where = getattr(item, "where", f"row {len(self)}")
            raise UserError(f"data.stream: {where} cannot be kept on disk ({error}); leave stream out") from error
        self._written(lambda: self._file.write(kept))
        self._ends.append(self._ends[-1] + len(kept))

    def _written(self, write: Any) -> None:
        try:
            write()
        except OSError as error:
            raise UserError(
                f"data.stream: the folder for temporary files, {tempfile.gettempdir()}, takes no more "
                f"({error.strerror or error}); make room there, or name another by the variable TMPDIR"
            ) from error


class Picked(Sequence[Item]):
    """Some of the items of a sequence, by their numbers; nothing is copied."""

    def __init__(self, items: Sequence[Item], numbers: Sequence[int]) -> None:
        self.items, self.numbers = items, numbers

    def __len__(self) -> int:
        return len(self.numbers)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return Picked(self.items, self.numbers[index])
        return self.items[self.numbers[index]]


def on_disk(items: object) -> bool:
    """Whether these are items that are read when they are asked for, so that nobody should keep them all."""
    return isinstance(items, Stored | Picked)


def held(items: Iterable[Item], stream: bool) -> Sequence[Item]:
    """The items in a sequence: on disk where ``stream`` says so, else in memory."""
    return Stored(items) if stream else list(items)


def picked(items: Sequence[Item], numbers: Sequence[int]) -> Sequence[Item]:
    """The items of these numbers: a list of them, or where they lie on disk, no copy."""
    return Picked(items, numbers) if on_disk(items) else [items[number] for number in numbers]
