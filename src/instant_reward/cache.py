"""Where things made once are kept: one folder per user, filled whole or not at all."""

from __future__ import annotations

import hashlib
import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

from instant_reward.types import UserError


def root() -> Path:
    """The folder ``INSTANT_REWARD_CACHE``, else ``$XDG_CACHE_HOME/instant-reward``, else ``~/.cache/...``."""
    own = os.environ.get("INSTANT_REWARD_CACHE")
    if own:
        return Path(own).expanduser()
    shared = os.environ.get("XDG_CACHE_HOME")
    return (Path(shared) if shared else Path.home() / ".cache") / "instant-reward"


def folder(name: str, build: Callable[[Path], None]) -> Path:
    """The folder ``root() / name``, filled by ``build(empty folder)`` where it is not there yet.

    ``build`` works in a folder beside it that is renamed at the end: what is there is whole, whenever a process was
    killed. A lock lets a second process wait for the first one's work. Raises UserError where the disk does not
    let us write; other errors of ``build`` pass through, and leave nothing behind.
    """
    target = root() / name
    if target.is_dir():
        return target
    try:
        return _fill(target, build)
    except OSError as error:
        # transformers reports a missing file as a bare OSError: only errors of the system carry a number.
        if error.errno is None:
            raise
        reason = error.strerror or str(error)
        raise UserError(
            f"the cache folder {target.parent} cannot be written ({reason}): free some space or name another one "
            "in INSTANT_REWARD_CACHE."
        ) from error


def _fill(target: Path, build: Callable[[Path], None]) -> Path:
    import filelock

    target.parent.mkdir(parents=True, exist_ok=True)
    with filelock.FileLock(target.parent / f".{target.name}.lock"):
        if target.is_dir():
            return target
        prefix = f".{target.name}.partial-"
        # We hold the lock: whatever is left of earlier tries belongs to a process that was killed.
        for left in target.parent.glob(f"{prefix}*"):
            shutil.rmtree(left, ignore_errors=True)
        partial = Path(tempfile.mkdtemp(prefix=prefix, dir=target.parent))
        try:
            build(partial)
            partial.chmod(0o755)
            _to_disk(partial)
            partial.rename(target)
        finally:
            shutil.rmtree(partial, ignore_errors=True)
    return target


def _to_disk(path: Path) -> None:
    """Waits until the files are on the disk, so that a power cut after the rename leaves no empty ones."""
    for file in path.rglob("*"):
        if file.is_file():
            with file.open("rb+") as handle:
                os.fsync(handle.fileno())


def checksum(path: Path) -> str:
    """The file's sha256, in hexadecimal."""
    digest = hashlib.sha256()
    with path.open("rb") as handle:
        while block := handle.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
