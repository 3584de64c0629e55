"""Inside the sandbox: runs one program against its tests, each in a process of its own; see ``programs``.

Standard input is JSON: ``program``, ``seconds`` (of processor time for each test), ``output`` (bytes), ``time_outs``
(after so many the other tests are left out) and ``tests``, each with one of ``input`` (what the program reads),
``call`` (an expression whose value is asked for) and ``run`` (statements that must come through). Standard output has a
line of JSON for each test: what it said, or null where it failed. What was expected is not known here, so that no
program can read it.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import math
import os
import resource
import select
import signal
import sys
import time
import types
from typing import Any, NoReturn


def main() -> None:
    request = json.load(sys.stdin)
    ctypes.CDLL(None).prctl(4, 0, 0, 0, 0)  # no test changes this process through /proc
    late = 0
    for test in request["tests"]:
        said, was_late = _one(request, test)
        print(json.dumps(said), flush=True)
        late += was_late
        if late == request["time_outs"]:
            break


def _one(request: dict[str, Any], test: dict[str, str]) -> tuple[str | None, bool]:
    """What a test said, None where it failed; and whether it ran out of time."""
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(read)
        _become(request, test, write)
    os.close(write)
    said, late = _read(read, time.monotonic() + 2.0 * request["seconds"], request["output"])
    with contextlib.suppress(ProcessLookupError):
        os.killpg(child, signal.SIGKILL)
    with contextlib.suppress(ProcessLookupError):  # it may have left its group
        os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    os.close(read)
    return said, late or os.waitstatus_to_exitcode(status) == -signal.SIGXCPU


def _read(pipe: int, deadline: float, most: int) -> tuple[str | None, bool]:
    """What a test said, if it said its last word in time; and whether it was late."""
    said = bytearray()
    while True:
        left = deadline - time.monotonic()
        if left <= 0 or not select.select([pipe], [], [], left)[0]:
            return None, True
        block = os.read(pipe, 1 << 16)
        said += block
        if len(said) > most:
            return None, False
        if not block:
            break
    # The last byte is written behind everything else: without it the program ended early.
    return (said[:-1].decode("utf-8", errors="replace") if said.endswith(b"\x04") else None), False


def _become(request: dict[str, Any], test: dict[str, str], write: int) -> NoReturn:
    """The child: becomes the program, answers the test and ends."""
    os.setpgid(0, 0)
    seconds = math.ceil(request["seconds"])
    resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds + 1))
    answer = os.dup(write)
    try:
        _wire(test, write)
        _answer(request["program"], test, answer)
    except SystemExit as error:
        if "input" in test and error.code in (None, 0):
            _finish(answer, "")
    except BaseException:
        os._exit(1)  # a test that fails says nothing; the reason is the program's own affair
    os._exit(1)


def _wire(test: dict[str, str], write: int) -> None:
    """Standard input holds the test's input; standard output is what is compared, or nothing."""
    with open(f"/tmp/{os.getpid()}", "w+b") as handle:
        os.unlink(handle.name)
        handle.write(test.get("input", "").encode("utf-8", errors="surrogatepass"))
        handle.seek(0)
        os.dup2(handle.fileno(), 0)
    nowhere = os.open("/dev/null", os.O_WRONLY)
    os.dup2(write if "input" in test else nowhere, 1)
    os.dup2(nowhere, 2)
    sys.stdin = os.fdopen(0, encoding="utf-8", errors="surrogateescape", closefd=False)
    sys.stdout = os.fdopen(1, "w", encoding="utf-8", errors="surrogateescape", closefd=False)


def _answer(program: str, test: dict[str, str], answer: int) -> None:
    name = "__main__" if "input" in test else "program"
    module = types.ModuleType(name)
    sys.modules[name] = module  # dataclasses and pickle look their module up
    sys.argv = ["program.py"]
    exec(compile(program, "program.py", "exec", dont_inherit=True), module.__dict__)
    if "call" in test:
        value = eval(compile(test["call"], "test", "eval", dont_inherit=True), module.__dict__)
        _finish(answer, json.dumps(_plain(value)))
    if "run" in test:
        exec(compile(test["run"], "test", "exec", dont_inherit=True), module.__dict__)
    _finish(answer, "")


def _finish(answer: int, text: str) -> NoReturn:
    if "threading" in sys.modules:
        import threading

        for thread in threading.enumerate():
            if thread is not threading.current_thread() and not thread.daemon:
                thread.join()
    sys.stdout.flush()
    rest = memoryview(text.encode() + b"\x04")
    while rest:
        rest = rest[os.write(answer, rest) :]
    os._exit(0)


def _plain(value: Any) -> Any:
    """A value as JSON holds it: numbers and texts as they are, what holds others under the name of its kind."""
    if value is None or isinstance(value, bool | int | float | str):
        return value
    for kind in (list, tuple, set, frozenset):
        if isinstance(value, kind):
            return {"set" if kind in (set, frozenset) else "list": [_plain(one) for one in value]}
    if isinstance(value, dict):
        return {"dict": [_plain(pair) for pair in value.items()]}
    return {"other": type(value).__name__}


if __name__ == "__main__":
    main()
