"""What a judge answered, kept on disk: one small file for each request, written whole or not at all."""

from __future__ import annotations

import contextlib
import json
import os
import tempfile
import time
import warnings
from dataclasses import asdict, dataclass
from pathlib import Path

from instant_reward.types import UserError

_LEFT_OVER = 3600.0  # seconds after which a file that was never finished belongs to nobody any more


@dataclass(frozen=True, slots=True)
class Reply:
    """One answer of a judge.

    Attributes:
        text: what it said.
        finish: why it ended, in the server's word ("stop", "length"); empty where the server does not say.
        prompt_tokens, completion_tokens: what the server counted; None where it does not say.
    """

    text: str
    finish: str = ""
    prompt_tokens: int | None = None
    completion_tokens: int | None = None


class ReplyCache:
    """Replies by the key of their request.

    Several processes may share the folder: of two that answer one request, the first one's reply stands for both. A
    file that cannot be read counts as none. Replies that cannot be written are kept in memory, with one warning.

    Args:
        folder: where the files are; None keeps the replies in memory only, for as long as this object lives.

    Raises:
        UserError: where the folder cannot be made.
    """

    def __init__(self, folder: Path | None) -> None:
        self.folder = folder
        self._memory: dict[str, Reply] = {}
        self._warned = False
        if folder is not None:
            try:
                self._partial(folder).mkdir(parents=True, exist_ok=True)
                self._sweep(folder)
            except OSError as error:
                raise UserError(
                    f"judge: the cache folder {folder} cannot be made ({error.strerror or error}); name another one "
                    "as cache=..."
                ) from error

    def get(self, key: str) -> Reply | None:
        """The reply to a request; None where there is none yet."""
        if key in self._memory or self.folder is None:
            return self._memory.get(key)
        return _read(self._path(self.folder, key))

    def put(self, key: str, reply: Reply) -> Reply:
        """Keeps a reply; returns the one that stands, which is another process's where that was first."""
        if self.folder is not None:
            try:
                return self._write(self.folder, key, reply)
            except OSError as error:
                self._warn(error)
        return self._memory.setdefault(key, reply)

    def _write(self, folder: Path, key: str, reply: Reply) -> Reply:
        path = self._path(folder, key)
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(dir=self._partial(folder))
        try:
            with os.fdopen(handle, "w", encoding="utf-8") as file:
                json.dump(asdict(reply), file)
            try:
                os.link(name, path)  # unlike a rename, this fails where another process was first
            except FileExistsError:
                standing = _read(path)
                if standing is not None:
                    return standing
                os.replace(name, path)
            except OSError:  # a file system without links
                os.replace(name, path)
            return reply
        finally:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(name)

    def _warn(self, error: OSError) -> None:
        if not self._warned:
            self._warned = True
            warnings.warn(
                f"judge: the cache folder {self.folder} cannot be written ({error.strerror or error}); answers are "
                "kept in memory until this run ends",
                stacklevel=2,
            )

    @staticmethod
    def _path(folder: Path, key: str) -> Path:
        return folder / key[:2] / f"{key[2:]}.json"

    @staticmethod
    def _partial(folder: Path) -> Path:
        return folder / ".partial"

    def _sweep(self, folder: Path) -> None:
        """Removes what killed processes left behind."""
        for left in self._partial(folder).iterdir():
            with contextlib.suppress(FileNotFoundError):  # another process sweeps as well
                if time.time() - left.stat().st_mtime > _LEFT_OVER:
                    left.unlink()


def _read(path: Path) -> Reply | None:
    try:
        found = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError):
        return None
    if not isinstance(found, dict) or not isinstance(found.get("text"), str):
        return None
    finish = found.get("finish")
    return Reply(
        text=found["text"],
        finish=finish if isinstance(finish, str) else "",
        prompt_tokens=whole(found.get("prompt_tokens")),
        completion_tokens=whole(found.get("completion_tokens")),
    )


def whole(value: object) -> int | None:
    """A count as it came; None where it is none."""
    return value if isinstance(value, int) and not isinstance(value, bool) and value >= 0 else None
