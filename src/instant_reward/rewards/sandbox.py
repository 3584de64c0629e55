"""Running a program that nobody has read, apart from everything else: what ``docs/sandbox.md`` says it stops.

Code that a model wrote runs through ``run_program`` and in no other way. Where the machine offers no way to keep it
apart, nothing is run and an error says why.
"""

from __future__ import annotations

import contextlib
import functools
import json
import math
import os
import platform
import selectors
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from instant_reward.types import UserError

_START = 60.0  # seconds that building the room may take on a busy machine
_GRACE = 5.0  # seconds until a room that was told to end is given up
_OPTIONS = ("-s", "-S", "-B", "-X", "utf8")  # no packages, no files of compiled code
_ENVIRONMENT = {
    "HOME": "/tmp",
    "LANG": "C.UTF-8",
    "PATH": "/usr/bin",
    "PYTHONHASHSEED": "0",  # the same program says the same
    "MALLOC_ARENA_MAX": "2",  # else each thread reserves 64 MB of the address space
}


@dataclass(frozen=True)
class Outcome:
    """What became of a program.

    Attributes:
        ended: "exit" by itself or by a signal; or it was killed because it used up its "time", "memory" or "output".
        code: the exit status, or the signal's number below 0; None where it was killed for another reason.
        stdout, stderr: what it wrote; bytes that are no UTF-8 become U+FFFD.
        seconds: how long it ran, by the clock.
    """

    ended: Literal["exit", "time", "memory", "output"]
    code: int | None
    stdout: str
    stderr: str
    seconds: float

    @property
    def ok(self) -> bool:
        """Whether it ended by itself and without an error."""
        return self.ended == "exit" and self.code == 0


def run_program(
    source: str,
    stdin: str = "",
    *,
    seconds: float = 5.0,
    memory_mb: int = 256,
    output_kb: int = 64,
    processes: int = 8,
    files_mb: int = 16,
    wall_seconds: float | None = None,
) -> Outcome:
    """Runs a Python program with the standard library, no network, and files only in a temporary folder.

    Args:
        source: the program. It is not even compiled in this process.
        stdin: what it reads on standard input.
        seconds: of processor time, for each of its processes, rounded up to whole ones.
        memory_mb: of memory: the address space of each process, and what all of them hold together.
        output_kb: of output, for standard output and standard error each.
        processes: how many processes and threads it may have at once.
        files_mb: how much its files (in ``/tmp``) may hold, together and each.
        wall_seconds: by the clock; twice ``seconds`` where it is not given.

    Raises:
        UserError: this machine offers no way to keep a program apart (nothing was run), or an argument is out of range.
    """
    limits = {
        "seconds": seconds,
        "memory_mb": memory_mb,
        "output_kb": output_kb,
        "processes": processes,
        "files_mb": files_mb,
        "wall_seconds": 2.0 * seconds if wall_seconds is None else wall_seconds,
    }
    check_limits("run_program", **limits)
    reason = why_not()
    if reason is not None:
        raise UserError(f"no program was run: {reason}")
    return _run(source, stdin, limits)


def check_limits(where: str, **limits: Any) -> None:
    """UserError where a limit is no number above 0, or the memory is too small for an interpreter."""
    for name, value in limits.items():
        whole = name not in ("seconds", "wall_seconds")
        fits = isinstance(value, int if whole else int | float) and not isinstance(value, bool)
        if not fits or not math.isfinite(value) or value <= 0:
            kind = "a whole number" if whole else "a number"
            raise UserError(f"{where}: {name}={value!r} is not {kind} above 0; give one")
    if limits.get("memory_mb", 64) < 64:
        raise UserError(f"{where}: memory_mb={limits['memory_mb']} is too little for Python; give 64 or more")


def why_not() -> str | None:
    """Why this machine cannot keep a program apart, with what to do; None where it can."""
    try:
        _try_out()
    except UserError as error:
        return str(error)
    return None


@functools.cache  # a success: errors are not kept
def _try_out() -> None:
    if sys.platform != "linux" or platform.machine() not in ("x86_64", "aarch64"):
        kind = f"{platform.machine()} {sys.platform}"
        raise UserError(
            f"it takes the namespaces of Linux on x86_64 or aarch64, and this is {kind}; use such a machine."
        )
    limits = {"seconds": 10.0, "memory_mb": 256, "output_kb": 64, "processes": 8, "files_mb": 1, "wall_seconds": 30.0}
    outcome = _run("print('ready')", "", limits)
    if outcome.stdout != "ready\n":
        said = (outcome.stderr.strip() or f"it ended with {outcome.code}").splitlines()[-1]
        raise UserError(
            f"the interpreter {_python()} does not start when it is kept apart ({said}); install it for all users."
        )


def _python() -> str:
    """The interpreter itself, not the link to it in a virtual environment."""
    return os.path.realpath(getattr(sys, "_base_executable", None) or sys.executable)


def _request(source: str, stdin: str, limits: dict[str, Any]) -> dict[str, Any]:
    libraries = [os.path.realpath(os.path.join(sys.base_prefix, name)) for name in ("lib", "lib64")]
    return {
        "source": source,
        "stdin": stdin,
        "python": _python(),
        "options": _OPTIONS,
        "environment": _ENVIRONMENT,
        "paths": [*libraries, _python()],
        "seconds": limits["seconds"],
        "memory": limits["memory_mb"] << 20,
        "files": limits["files_mb"] << 20,
        "processes": limits["processes"],
    }


@dataclass
class _Room:
    """A room while it is watched: what was read of its pipes, and what the room told."""

    keeper: subprocess.Popen[bytes]
    report: int
    most: int
    read: dict[str, bytearray] = field(
        default_factory=lambda: {"report": bytearray(), "1": bytearray(), "2": bytearray()}
    )
    started: float | None = None
    ended: Literal["time", "memory", "output"] | None = None

    def told(self) -> dict[str, Any]:
        """All that the room has told so far."""
        lines = self.read["report"].split(b"\n")[:-1]
        return {key: value for line in lines for key, value in json.loads(line).items()}


def _run(source: str, stdin: str, limits: dict[str, Any]) -> Outcome:
    with tempfile.TemporaryFile() as request:
        request.write(json.dumps(_request(source, stdin, limits)).encode("ascii"))
        request.seek(0)
        with _room(request, limits["output_kb"] << 10) as room:
            _follow(room, limits["wall_seconds"])
    return _outcome(room, limits["seconds"])


@contextlib.contextmanager
def _room(request: Any, most: int) -> Iterator[_Room]:
    """A keeper and its room; when the block is left, nothing of them runs any more."""
    report, write = os.pipe()
    child = Path(__file__).with_name("sandbox_child.py")
    command = [_python(), "-I", "-S", "-B", str(child), str(write), str(os.getpid())]
    try:
        keeper = subprocess.Popen(
            command,
            stdin=request,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env={},
            cwd="/",
            pass_fds=[write],
            start_new_session=True,  # Ctrl-C is for this process, which then ends the room
        )
    except OSError as error:
        os.close(report)
        raise UserError(f"{command[0]} cannot be started ({error.strerror}); check that it is there.") from error
    finally:
        os.close(write)
    try:
        yield _Room(keeper, report, most)
    finally:
        _end(keeper)
        os.close(report)
        assert keeper.stdout is not None
        assert keeper.stderr is not None
        keeper.stdout.close()
        keeper.stderr.close()


def _end(keeper: subprocess.Popen[bytes]) -> None:
    """Waits for the keeper, which ends after all of its room has; what does not end is killed."""
    if keeper.poll() is None:
        keeper.send_signal(signal.SIGTERM)
    try:
        keeper.wait(_GRACE)
    except subprocess.TimeoutExpired:
        keeper.kill()  # and the kernel kills the room
        keeper.wait()


def _follow(room: _Room, wall_seconds: float) -> None:
    """Reads what the room writes until all of its pipes are closed, or until it has gone too far."""
    assert room.keeper.stdout is not None
    assert room.keeper.stderr is not None
    begun = time.monotonic()
    with selectors.DefaultSelector() as selector:
        for pipe, name in ((room.report, "report"), (room.keeper.stdout, "1"), (room.keeper.stderr, "2")):
            selector.register(pipe, selectors.EVENT_READ, name)
        while selector.get_map():
            limit = begun + _START if room.started is None else room.started + wall_seconds
            ready = selector.select(max(0.0, limit - time.monotonic()))
            for key, _ in ready:
                block = os.read(key.fd, 1 << 16)
                room.read[key.data] += block
                if not block:
                    selector.unregister(key.fileobj)
            if room.started is None and "started" in room.told():
                room.started = time.monotonic()
            if max(len(room.read["1"]), len(room.read["2"])) > room.most:
                room.ended = "output"
            elif not ready and "end" not in room.told():
                room.ended = "time"
            if room.ended is not None or not ready:
                return


def _outcome(room: _Room, seconds: float) -> Outcome:
    told = room.told()
    if "error" in told:
        raise UserError(f"it cannot be kept apart here, {told['error']}{_advice(told.get('errno'))}")
    if room.started is None:
        reason = "took longer than a minute" if room.ended == "time" else "ended before the program began"
        raise UserError(f"building a place for the program {reason}; is the machine short of memory or processes?")
    ended: Any = room.ended or ("memory" if told.get("end") == "memory" else "exit")
    code = told.get("code") if ended == "exit" else None
    # The kernel's signal for too much processor time can be ignored, and the kill that follows looks like any other.
    if code in (-signal.SIGXCPU, -signal.SIGKILL) and told.get("used", 0.0) >= 0.9 * math.ceil(seconds):
        ended, code = "time", None
    texts = [room.read[name][: room.most].decode("utf-8", errors="replace") for name in ("1", "2")]
    return Outcome(ended, code, texts[0], texts[1], time.monotonic() - room.started)


def _advice(number: int | None) -> str:
    advice = {
        1: "allow unprivileged user namespaces (sysctl kernel.unprivileged_userns_clone=1, on Ubuntu "
        "kernel.apparmor_restrict_unprivileged_userns=0; in a container, a seccomp profile with unshare and mount)",
        13: "let other users read the interpreter's folder",
        28: "raise the sysctl user.max_user_namespaces, which is at its limit",
        38: "use a newer kernel",
    }
    return f"; {advice.get(number or 0, 'see docs/sandbox.md for what it takes')}."
