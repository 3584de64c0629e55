"""Sequences on disk: the same items as in memory, by number, in slices, from several threads; a full disk is said."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from instant_reward.stored import Picked, Stored, held, on_disk, picked
from instant_reward.types import UserError


def test_items_come_back_by_number_and_in_slices() -> None:
    items = [{"text": "电影" * number, "number": number} for number in range(20)]
    stored = Stored(iter(items))
    assert list(stored) == items
    assert len(stored) == 20
    assert (stored[0], stored[7], stored[-1]) == (items[0], items[7], items[-1])
    assert list(stored[3:9:2]) == items[3:9:2]
    assert list(stored[5:][1:3]) == items[6:8]
    assert list(picked(stored, [4, 2, 4])) == [items[4], items[2], items[4]]
    assert picked(items, [4, 2]) == [items[4], items[2]]
    with pytest.raises(IndexError):
        stored[20]
    assert len(Stored(iter([]))) == 0
    assert [on_disk(one) for one in (stored, stored[1:], held(iter(items), True), held(iter(items), False))] == [
        True,
        True,
        True,
        False,
    ]
    assert isinstance(stored[2:4], Picked)


def test_threads_read_beside_each_other() -> None:
    stored = Stored(str(number) * (1 + number % 50) for number in range(500))
    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(stored.__getitem__, range(500))) == [str(n) * (1 + n % 50) for n in range(500)]


def test_a_full_disk_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    class Full:
        def write(self, content: bytes) -> int:
            raise OSError(28, "No space left on device")

    def temporary(**options: Any) -> Full:
        return Full()

    monkeypatch.setattr("tempfile.TemporaryFile", temporary)
    with pytest.raises(UserError, match=r"takes no more \(No space left on device\); make room there, or .* TMPDIR"):
        Stored(["a"])


def test_what_cannot_be_written_is_said() -> None:
    with pytest.raises(UserError, match=r"data\.stream: row 1 cannot be kept on disk \(.*\); leave stream out"):
        Stored(["a", lambda: 1])
