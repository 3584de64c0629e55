"""The far side of ``workers``: a process that holds one reward and rates what it is sent.

Both sides talk in pickles over a pair of sockets. What is sent by name (functions and classes) may also stand in a file
that no import finds, in the script that was started, or under ``@ir.reward``, where the module's name is the reward.
"""

from __future__ import annotations

import contextlib
import copy
import importlib
import importlib.machinery
import importlib.util
import inspect
import io
import os
import pickle
import signal
import sys
import traceback
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from multiprocessing.connection import Connection
from pathlib import Path
from types import FunctionType, ModuleType
from typing import Any

from instant_reward.rewards.base import Reward, as_reward
from instant_reward.types import UserError, View

inside = False  # whether this process is a worker


@dataclass(frozen=True)
class Source:
    """Where a worker takes its reward from: a pickle of it, or an import path and the arguments for what it names."""

    pickled: bytes | None
    path: str = ""
    args: Mapping[str, Any] | None = None


@dataclass(frozen=True)
class Loaded:
    """What a worker says of the reward it has: all but the function, and what the library asks of the function."""

    reward: Reward
    sees_end: bool
    remembers: bool


@dataclass(frozen=True)
class Past:
    """An earlier view of a text, without the text: its view is cut from the text as it is now."""

    end: int
    piece: int
    done: bool
    tokens: int
    sampled: int

    def view(self, now: View) -> View:
        """The view as it was."""
        text = now.text[: self.end]
        piece = text[self.end - self.piece :]
        return View(text, piece, now.prompt, now.info, self.done, self.tokens, self.sampled)


@dataclass(frozen=True)
class Asked:
    """A view to rate. For a reward with a state: the text's number, and what to begin it with where it is new here."""

    view: View
    text: int | None = None
    past: Sequence[Past] | None = None


def dumps(value: Any) -> bytes:
    """A pickle in which functions and classes are told by what a worker can find.

    Raises:
        pickle.PicklingError, AttributeError, TypeError: something in it cannot be told to another process.
    """
    buffer = io.BytesIO()
    _Pickler(buffer, protocol=pickle.HIGHEST_PROTOCOL).dump(value)
    return buffer.getvalue()


class _Pickler(pickle.Pickler):
    def reducer_override(self, value: Any) -> Any:
        if not isinstance(value, FunctionType | type) or "<locals>" in value.__qualname__:
            return NotImplemented
        module = sys.modules.get(value.__module__)
        if module is None:
            return NotImplemented
        where = _home(value.__module__)
        try:
            found = _attribute(module, value.__qualname__)
        except AttributeError:
            return NotImplemented
        decorated = isinstance(found, Reward) and found.function is value
        if decorated or (found is value and where is not None):
            return _find, (*(where or (value.__module__, None)), value.__qualname__)
        return NotImplemented


@cache
def _home(name: str) -> tuple[str, str | None] | None:
    """What a worker must load for a module that it cannot import by this name: another name, or a file."""
    module = sys.modules[name]
    file = getattr(module, "__file__", None)
    if name == "__main__":
        if module.__spec__ is not None:  # python -m package.module
            return module.__spec__.name, None
        return None if file is None else ("instant_reward_script", os.path.abspath(file))
    package, _, _ = name.rpartition(".")
    places = getattr(sys.modules.get(package), "__path__", None) if package else None
    found = next((spec for finder in sys.meta_path if (spec := finder.find_spec(name, places))), None)
    if file is None or (found is not None and found.origin == file):
        return None
    return name, os.path.abspath(file)


def _find(module_name: str, file: str | None, name: str) -> Any:
    module = importlib.import_module(module_name) if file is None else load_file(Path(file), module_name)
    found = _attribute(module, name)
    return found.function if isinstance(found, Reward) else found


def _attribute(found: Any, name: str) -> Any:
    for part in name.split("."):
        found = getattr(found, part)
    return found


def load_file(path: Path, name: str) -> ModuleType:
    """The module in a file, under this name; loaded once."""
    if name in sys.modules:
        return sys.modules[name]
    spec = importlib.util.spec_from_loader(name, importlib.machinery.SourceFileLoader(name, str(path)))
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    return module


def main(connection: int, lifeline: int) -> None:
    """Loads the reward, then answers until the other side is gone."""
    global inside
    inside = True
    end_with(lifeline)
    os.dup2(2, 1)  # what a reward prints must not mix with what the command prints
    talk = Connection(connection)
    try:
        one = _load(pickle.loads(talk.recv_bytes()))
        shell = copy.copy(one)
        object.__setattr__(shell, "function", None)
        remembers = any(callable(getattr(one.function, name, None)) for name in ("observe", "state_dict"))
        _send(talk, "ready", Loaded(shell, one.sees_end, remembers))
    except (Exception, SystemExit) as error:
        _send(talk, "failed", _described(error))
        return
    with contextlib.suppress(EOFError):
        _serve(one, talk)


def _serve(one: Reward, talk: Connection[Any, Any]) -> None:
    states: dict[int, Any] = {}
    while True:
        forgotten, asked = pickle.loads(talk.recv_bytes())
        for text in forgotten:
            states.pop(text, None)
        try:
            _send(talk, "values", _rate(one, asked, states))
        except (Exception, SystemExit) as error:
            _send(talk, "error", _described(error))


def end_with(lifeline: int) -> None:
    """The kernel ends this process, and those it started, when the other end of the pipe closes.

    No code of ours has to run for it: a reward may never let go of the interpreter.
    """
    import fcntl

    signal.signal(signal.SIGIO, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGIO})
    fcntl.fcntl(lifeline, fcntl.F_SETOWN, -os.getpgrp())
    flags = fcntl.fcntl(lifeline, fcntl.F_GETFL)
    fcntl.fcntl(lifeline, fcntl.F_SETFL, flags | os.O_ASYNC | os.O_NONBLOCK)
    try:
        os.read(lifeline, 1)  # nothing is ever written: this is the end
    except BlockingIOError:
        return
    os._exit(1)


def _load(source: Source) -> Reward:
    if source.pickled is not None:
        return as_reward(pickle.loads(source.pickled))
    place, _, name = source.path.rpartition(":")
    if place.endswith(".py"):
        file = Path(place).resolve()
        if not file.is_file():
            raise UserError(f"there is no file {place}; check the path, which counts from {os.getcwd()}")
        module = load_file(file, f"instant_reward_worker_{file.stem}")
    else:
        if os.getcwd() not in sys.path:
            sys.path.append(os.getcwd())
        module = importlib.import_module(place)
    try:
        found = _attribute(module, name)
    except AttributeError:
        raise UserError(f"{place} has no {name!r}; check the name after the colon") from None
    return as_reward(found(**(source.args or {})) if inspect.isclass(found) or source.args else found)


def _rate(one: Reward, asked: Sequence[Asked], states: dict[int, Any]) -> list[Any]:
    for each in asked:
        if each.text is not None and each.past is not None:
            states[each.text] = one.start(each.view.prompt)
            for past in each.past:
                one.rate([past.view(each.view)], [states[each.text]])
    mine = [None if each.text is None else states[each.text] for each in asked]
    values = one.rate([each.view for each in asked], mine)
    if not isinstance(values, list) or len(values) != len(asked):
        count = f"{len(values)} values" if isinstance(values, list) else f"a {type(values).__name__}"
        raise UserError(f"it handed back {count} for {len(asked)} texts; return a list with one for each")
    return [value.tolist() if hasattr(value, "tolist") else value for value in values]


def _send(talk: Connection[Any, Any], kind: str, what: Any) -> None:
    talk.send_bytes(dumps((kind, what)))


def _described(error: BaseException) -> str:
    """One line: what was raised, and the last line of the user's own code that it passed through."""
    if isinstance(error, UserError):
        return str(error)
    own = [frame for frame in traceback.extract_tb(error.__traceback__) if frame.filename != __file__]
    where = f" ({os.path.basename(own[-1].filename)}, line {own[-1].lineno})" if own else ""
    return f"{type(error).__name__}: {' '.join(str(error).split())}{where}"
