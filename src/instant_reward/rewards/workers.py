"""Rewards in processes of their own: for pure-Python ones, which would hold the interpreter while texts are sampled.

from instant_reward.rewards.workers import in_workers
reward = in_workers(slow_rules, workers=2, time_limit=5.0)
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import json
import math
import os
import pickle
import signal
import subprocess
import sys
import threading
import time
import warnings
import weakref
from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from multiprocessing import Pipe
from multiprocessing.connection import Connection, wait
from typing import Any, Literal

from instant_reward.rewards import worker_main
from instant_reward.rewards.base import Reward, as_reward
from instant_reward.rewards.shaping import Shaping
from instant_reward.rewards.worker_main import Asked, Loaded, Past, Source, dumps
from instant_reward.types import Prompt, RewardError, UserError, View

OnError = Literal["raise", "none"]
_LOADING = 600.0  # seconds that a reward may take to load: it may train a classifier or read a model
_LOOK_EVERY = 0.25  # seconds between two looks at whether a silent worker is still there
_BOOT = """
import json, sys
sys.path[:], arguments, sockets = json.loads(sys.argv[1])
sys.argv[:] = arguments
from instant_reward.rewards.worker_main import main
main(*sockets)
"""


@dataclass(frozen=True)
class InWorkers(Reward):
    """A reward whose calls run in worker processes; made by ``in_workers``."""

    @property
    def failures(self) -> int:
        """How many texts or pieces went without a value because a call failed (``on_error="none"``)."""
        return int(self.function.failures)

    def close(self) -> None:
        """Ends the workers; they also end with this process."""
        self.function.close()


@dataclass(frozen=True)
class ShapingInWorkers(InWorkers, Shaping):
    """The same for potential shaping, whose discount stays what it is."""


def in_workers(
    reward: Any,
    workers: int = 2,
    time_limit: float = 5.0,
    on_error: OnError = "raise",
    *,
    args: Mapping[str, Any] | None = None,
) -> InWorkers:
    """The same reward, rated in worker processes: same name, pieces, weight and all, and the same values.

    The calls of one step are spread over the workers: each view on its own, or, for a batched reward, a list in as many
    parts as there are workers (the siblings of ``scope="group"`` stay together). The state of a text, for a reward with
    ``start`` and ``extend``, lives in one worker. A worker that died is replaced, and the states it held are built
    again, each when its text goes on, from the views it had seen.

    Workers are fresh interpreters, never forks. They end with this process, however it ends.

    Args:
        reward: anything ``as_reward`` takes that can be imported or pickled, or an import path ``module:name`` or
            ``folder/file.py:name``, which the worker resolves: this process then never loads it.
        workers: how many processes.
        time_limit: seconds that a call may take (building a state again: as many times that as views). A worker that
            takes longer is killed.
        on_error: what becomes of a call that raises, takes too long or ends its worker: "raise" a RewardError that
            names reward and prompt; or "none", which gives None for what the call rated, warns and counts in
            ``failures``. A text with a state then earns None from there on, since its state is unknown.
        args: for an import path: the arguments of the class or function that makes the reward.

    Raises:
        UserError: the reward cannot be sent to a worker or loaded there, remembers the run (``scope="run"``), or an
            argument is out of range.
    """
    if os.name != "posix":
        raise UserError("worker processes need Linux or macOS; leave workers out")
    if worker_main.inside:
        raise UserError(
            "loading the reward's file started workers again; put what the file runs under `if __name__ == '__main__':`"
        )
    if isinstance(workers, bool) or not isinstance(workers, int) or workers < 1:
        raise UserError(f"in_workers: workers={workers!r} is not a whole number above 0; give one")
    number = isinstance(time_limit, int | float) and not isinstance(time_limit, bool)
    if not number or not math.isfinite(time_limit) or time_limit <= 0:
        raise UserError(f"in_workers: time_limit={time_limit!r} is not a number of seconds above 0; give one")
    if on_error not in ("raise", "none"):
        raise UserError(f"in_workers: on_error={on_error!r} is unknown; use 'raise' or 'none'")
    if isinstance(reward, str):
        one, source = None, Source(None, _checked(reward), dict(args or {}))
    elif args is not None:
        raise UserError("in_workers: args are for an import path; call what makes the reward, and hand in its result")
    else:
        one = as_reward(reward)
        if isinstance(one, InWorkers):
            raise UserError(f"reward '{one.name}' is in workers already; hand in the one it was made of")
        source = Source(_pickled(one))
    pool = Workers(source, one, workers, float(time_limit), on_error)
    return _shaped(pool.reward, pool)


def _checked(path: str) -> str:
    module, _, name = path.rpartition(":")
    if not module or not name:
        raise UserError(f"{path!r} names no reward; write module:name or folder/file.py:name")
    return path


def _pickled(one: Reward) -> bytes:
    try:
        return dumps(one)
    except (pickle.PicklingError, AttributeError, TypeError, ValueError, RecursionError) as error:
        raise UserError(
            f"reward '{one.name}' cannot be sent to a worker process ({error}); define it at the top level of a "
            "module, or give its import path (module:name) instead of the object"
        ) from error


def _shaped(one: Reward, pool: Workers) -> InWorkers:
    """``one`` with the pool in its function's place; every field it has stays."""
    if one.takes == "pair":
        pool.close()
        raise UserError(
            f"reward '{one.name}' compares a text with the policy's output, not in workers; leave workers out"
        )
    kind: type[InWorkers] = ShapingInWorkers if isinstance(one, Shaping) else InWorkers
    known = {entry.name: getattr(one, entry.name) for entry in dataclasses.fields(one)}
    takes = "state" if one.takes == "state" else "view"
    return kind(**{**known, "function": pool, "batched": True, "takes": takes})


@dataclass(eq=False)
class _Text:
    """This side of a text's state: which worker has it, and what would build it again."""

    number: int
    prompt: Prompt
    slot: int
    serial: int = -1  # of the worker process that holds the state
    past: list[Past] = field(default_factory=list)
    lost: bool = False


@dataclass
class _Job:
    """One call: the places in the list of answers, and what is asked."""

    places: list[int]
    views: list[View]
    texts: list[_Text]
    slot: int | None = None


class _Worker:
    """One process, and the call it is busy with."""

    serials = itertools.count()

    def __init__(self, source: bytes) -> None:
        self.serial = next(self.serials)
        self.ready: Loaded | None = None
        self.job: _Job | None = None
        self.deadline = time.monotonic() + _LOADING
        ours, theirs = Pipe()
        lifeline, self._held = os.pipe()
        places = [os.path.abspath(entry) for entry in sys.path]
        fds = (theirs.fileno(), lifeline)
        environment = {
            "OMP_NUM_THREADS": "1",  # workers share the processors
            "PYTHONHASHSEED": "0",  # a set has the same order in every worker
            **os.environ,
        }
        try:
            self.process = subprocess.Popen(
                [sys.executable, "-c", _BOOT, json.dumps([places, sys.argv, fds])],
                pass_fds=fds,
                stdin=subprocess.DEVNULL,
                env=environment,
                start_new_session=True,  # Ctrl-C is for this process, which then ends the workers
            )
        finally:
            theirs.close()
            os.close(lifeline)
        self.talk: Connection[Any, Any] = ours
        self.send(source)

    def send(self, message: bytes) -> None:
        """What a worker that is gone was sent shows when its answer is waited for."""
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            self.talk.send_bytes(message)

    def end(self) -> None:
        """Kills the process and those it started."""
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.kill()
        self.process.wait()
        self.talk.close()
        if self._held >= 0:
            os.close(self._held)
            self._held = -1


class Workers:
    """The function of a reward in workers: it takes lists of views, with states where the reward keeps them.

    Attributes:
        failures: how many views went without a value because their call failed.
        reward: the reward as it was; of an import path without its function, which only the workers have.
    """

    def __init__(self, source: Source, one: Reward | None, count: int, time_limit: float, on_error: OnError) -> None:
        self._name = source.path if one is None else one.name
        self._time_limit, self._on_error = time_limit, on_error
        self._source = pickle.dumps(source)
        self._lock = threading.Lock()
        self._numbers = itertools.count()
        self._forgotten: list[deque[int]] = [deque() for _ in range(count)]
        self._workers: list[_Worker] = []
        self._close = weakref.finalize(self, _end_all, self._workers, os.getpid())
        self.failures = self._failed_calls = 0
        try:
            for _ in range(count):
                self._workers.append(_Worker(self._source))
            for slot in range(count):
                self._wait_until_loaded(slot)
            loaded = self._workers[0].ready
            assert loaded is not None
            self.reward: Reward = loaded.reward if one is None else one
            self._name = self.reward.name
            if self.reward.scope == "run" or loaded.remembers:
                raise UserError(
                    f"reward '{self._name}' learns from the run, and each worker would learn for itself; leave it out "
                    "of the workers"
                )
        except BaseException:
            self.close()
            raise
        self.sees_end = loaded.sees_end
        self.discount = self.reward.discount  # what shaping was made for
        self._slots = itertools.cycle(range(count))

    def summary(self) -> dict[str, float]:
        """What went wrong so far, for the metrics of a step."""
        return {"failures": float(self.failures)}

    def __call__(self, views: Sequence[View]) -> list[Any]:
        """The value of each view."""
        places = list(range(len(views)))
        if self.reward.scope == "group":
            parts = [places]
        elif self.reward.batched:
            size = math.ceil(len(places) / len(self._workers))
            parts = [places[start : start + size] for start in range(0, len(places), size)] if places else []
        else:
            parts = [[place] for place in places]
        return self._rate([_Job(part, [views[place] for place in part], []) for part in parts], len(views))

    def start(self, prompt: Prompt) -> _Text:
        """A text that has just begun; its worker begins the state with its first view."""
        text = _Text(next(self._numbers), prompt, next(self._slots))
        weakref.finalize(text, self._forgotten[text.slot].append, text.number).atexit = False
        return text

    def extend(self, states: Sequence[_Text], views: Sequence[View]) -> list[Any]:
        """The value of each view, in the worker that has its text."""
        jobs: list[_Job] = []
        together: dict[int, _Job] = {}
        for place, (text, view) in enumerate(zip(states, views, strict=True)):
            if text.lost:
                continue
            job = together.get(text.slot) if self.reward.batched else None
            if job is None:
                job = together[text.slot] = _Job([], [], [], text.slot)
                jobs.append(job)
            job.places.append(place)
            job.views.append(view)
            job.texts.append(text)
        return self._rate(jobs, len(views))

    def close(self) -> None:
        """Ends the workers; they also end with this process."""
        self._close()

    def _rate(self, jobs: Iterable[_Job], count: int) -> list[Any]:
        answers: list[Any] = [None] * count
        waiting = list(jobs)
        with self._lock:
            if not self._close.alive:
                raise UserError(f"the workers of reward '{self._name}' are closed; make the reward again")
            try:
                while waiting or any(worker.job is not None for worker in self._workers):
                    self._hand_out(waiting)
                    self._collect(answers)
            except BaseException:  # what the others are busy with is wanted no more
                for slot, worker in enumerate(self._workers):
                    if worker.job is not None:
                        self._replace(slot)
                raise
        return answers

    def _hand_out(self, waiting: list[_Job]) -> None:
        for slot, worker in enumerate(self._workers):
            if worker.job is not None or worker.ready is None:
                continue
            if worker.process.poll() is not None:  # it died between two calls, which is no fault of this one
                self._replace(slot)
                continue
            job = next((job for job in waiting if job.slot in (None, slot)), None)
            if job is None:
                continue
            waiting.remove(job)
            forgotten = self._forgotten[slot]
            asked, again = self._asked(job, worker)
            message = ([forgotten.popleft() for _ in range(len(forgotten))], asked)
            try:
                packed = dumps(message)
            except (pickle.PicklingError, AttributeError, TypeError, ValueError) as error:
                raise RewardError(
                    f"reward '{self._name}' on {_where(job)} cannot be asked: a column of the data cannot be sent to a "
                    f"worker process ({error}); leave it out, or run the reward without workers"
                ) from error
            worker.job, worker.deadline = job, time.monotonic() + self._time_limit * (1 + again)
            worker.send(packed)

    @staticmethod
    def _asked(job: _Job, worker: _Worker) -> tuple[list[Asked], int]:
        """What the worker is sent, and how many earlier views it has to rate again."""
        if not job.texts:
            return [Asked(view) for view in job.views], 0
        asked, again = [], 0
        for text, view in zip(job.texts, job.views, strict=True):
            known = text.serial == worker.serial
            again += 0 if known else len(text.past)
            asked.append(Asked(view, text.number, None if known else tuple(text.past)))
        return asked, again

    def _collect(self, answers: list[Any]) -> None:
        """Waits for the next news of a worker, and takes it."""
        now = time.monotonic()
        busy = {worker.talk: slot for slot, worker in enumerate(self._workers) if worker.job or worker.ready is None}
        limit = min(self._workers[slot].deadline for slot in busy.values())
        news = wait(list(busy), timeout=max(0.0, min(limit - now, _LOOK_EVERY)))
        for talk, slot in busy.items():
            worker = self._workers[slot]
            if talk in news or worker.process.poll() is not None:
                self._take(slot, answers)
            elif time.monotonic() > worker.deadline:
                limit_now = f"{self._time_limit:g} s" if worker.job else f"{_LOADING:g} s to load"
                self._lost(slot, answers, f"took longer than {limit_now}; raise time_limit or make it faster")

    def _take(self, slot: int, answers: list[Any]) -> None:
        worker = self._workers[slot]
        try:
            kind, what = pickle.loads(worker.talk.recv_bytes())
        except (EOFError, ConnectionResetError):
            self._lost(slot, answers, f"ended its worker process ({_ending(worker.process)}); mend it")
            return
        job = worker.job
        if kind == "ready":
            worker.ready = what
        elif kind == "failed":
            raise UserError(f"reward '{self._name}' could not be loaded in a worker process: {what}")
        elif kind == "error":
            assert job is not None
            worker.job = None
            self._failed(job, f"raised {what}")
        else:
            assert job is not None
            worker.job = None
            for place, value in zip(job.places, what, strict=True):
                answers[place] = value
            for text, view in zip(job.texts, job.views, strict=False):
                text.serial = worker.serial
                text.past.append(Past(len(view.text), len(view.piece), view.done, view.tokens, view.sampled))

    def _lost(self, slot: int, answers: list[Any], reason: str) -> None:
        """A worker has ended or must: another takes its place."""
        worker = self._workers[slot]
        job = worker.job
        if job is None:
            raise UserError(f"reward '{self._name}': loading it {reason}")
        worker.job = None
        self._replace(slot)
        self._failed(job, reason)

    def _failed(self, job: _Job, reason: str) -> None:
        message = f"reward '{self._name}' on {_where(job)} {reason}"
        if self._on_error == "raise":
            raise RewardError(message)
        self.failures += len(job.views)
        self._failed_calls += 1
        for text in job.texts:
            text.lost = True
        if self._failed_calls & (self._failed_calls - 1) == 0:  # the 1st, 2nd, 4th, 8th, ... of them is told
            warnings.warn(f"{message}. It gives None there ({self.failures} so far).", RuntimeWarning, stacklevel=2)

    def _replace(self, slot: int) -> None:
        self._workers[slot].end()
        self._workers[slot] = _Worker(self._source)

    def _wait_until_loaded(self, slot: int) -> None:
        while self._workers[slot].ready is None:
            self._collect([])


def _end_all(workers: list[_Worker], owner: int) -> None:
    if os.getpid() == owner:  # a fork of this process must leave them alone
        for worker in workers:
            worker.end()


def _where(job: _Job) -> str:
    prompt = job.views[0].prompt
    others = f" and {len(job.views) - 1} more in the same call" if len(job.views) > 1 else ""
    return f"prompt {prompt.id} ({prompt.text[:40]!r}){others}"


def _ending(process: subprocess.Popen[bytes]) -> str:
    try:
        code = process.wait(5.0)
    except subprocess.TimeoutExpired:
        return "it closed its connection"
    if code >= 0:
        return f"exit status {code}"
    try:
        return signal.Signals(-code).name
    except ValueError:
        return f"signal {-code}"
