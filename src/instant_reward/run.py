"""The run folder: config, versions, metrics, samples, checkpoints.

::

    config.yaml  versions.json  metrics.jsonl  samples.jsonl  checkpoints/step-000040/  start/

``start`` is the model as the run began, where that one is nowhere else: of a model from scratch.

It can be killed at any moment: small files and checkpoints are there whole or not at all, and a resumed run cuts the
metrics and samples back to its checkpoint's step.
"""

from __future__ import annotations

import functools
import json
import math
import platform
import sys
from collections.abc import Callable, Collection, Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

from instant_reward import __version__
from instant_reward.config import Config
from instant_reward.models import checkpoints, step_of
from instant_reward.run_files import (
    append_lines,
    plain,
    read_lines,
    remove,
    remove_leftovers,
    reporting,
    sync,
    write_folder,
    write_whole,
)
from instant_reward.types import UserError
from instant_reward.yaml_values import read_mapping

# What a resumed run may change: how long it goes on, what it keeps, and where it lies.
MAY_CHANGE = ("train.steps", "train.epochs", "train.save_every", "train.keep", "train.stop_when", "out")
START = "start"


class Run:
    """One run's folder. ``Run.create`` writes, ``Run.open`` only reads.

    Attributes:
        path: the folder.
        config: what the run was made with.
        step: the last step that is recorded, 0 before the first.
        metrics: one dict per step, in order, "step" among its keys; a number that was not finite is None.
        policy: the trained policy, where the process that trained it set it.
    """

    def __init__(self, path: Path, config: Config, *, writes: bool) -> None:
        self.path = path
        self.config = config
        self.step = 0
        self.metrics: list[dict[str, Any]] = []
        self.policy: Any = None
        self._writes = writes

    @classmethod
    def create(cls, path: str | Path, config: Config, resume: bool = False) -> Run:
        """A new run in a folder that is empty or not there, or with ``resume`` the run in it from its last checkpoint.

        Raises:
            UserError: the folder is not empty and not to be resumed, holds no run, was begun with another config, or
                cannot be written.
            RunError: the disk is full.
        """
        path = Path(path)
        if not resume:
            cls.refuse_begun(path)
        begun = _begun(path)
        run = cls(path, config, writes=True)
        with reporting("the run's config", path):
            if begun:
                _check_same(path, config)
                run._go_back()
            try:
                path.mkdir(parents=True, exist_ok=True)
                write_whole(path / "config.yaml", config.dump())
            except PermissionError as error:
                raise UserError(f"{path} cannot be written ({error.strerror}); name another folder by --out.") from None
            write_whole(path / "versions.json", json.dumps(_versions(config), indent=2) + "\n")
        return run

    @classmethod
    def refuse_begun(cls, path: str | Path) -> None:
        """UserError where the folder holds a run already."""
        if _begun(Path(path)):
            raise UserError(f"{path} already holds a run; go on by --resume {path}, or name another folder by --out.")

    @classmethod
    def open(cls, path: str | Path) -> Run:
        """The run in a folder, to look at: also one that another process is still writing.

        Raises:
            UserError: there is no run, or its config cannot be read.
        """
        path = Path(path)
        if not (path / "config.yaml").is_file():
            raise UserError(f"{path} holds no run (there is no config.yaml in it); check the path.")
        run = cls(path, _config(path), writes=False)
        run.metrics = [record for record, _ in read_lines(path / "metrics.jsonl")]
        run.step = run.metrics[-1]["step"] if run.metrics else 0
        return run

    def save_start(self, writer: Callable[[Path], Any]) -> None:
        """The model as the run begins, written whole or not at all by ``writer(empty folder)``, once."""
        self._must_write()
        if not (self.path / START).is_dir():
            with reporting("the model as the run begins", self.path):
                write_folder(self.path / START, writer)

    def record(self, step: int, metrics: Mapping[str, Any], samples: Sequence[Mapping[str, Any]] = ()) -> None:
        """Append a step's metrics, and its samples (rollouts with their marks), to the run's files.

        Raises:
            ValueError: the step is not later than the last one, or the run is open for reading only.
            RunError: the disk is full.
        """
        self._must_write()
        if step <= self.step:
            raise ValueError(f"step {step} comes after step {self.step}; steps are recorded in order")
        line = plain({"step": step, **metrics})
        with reporting(f"the record of step {step}", self.path):
            append_lines(self.path / "samples.jsonl", [plain({"step": step, **sample}) for sample in samples])
            append_lines(self.path / "metrics.jsonl", [line])
        self.metrics.append(line)
        self.step = step

    def samples(self) -> list[dict[str, Any]]:
        """The recorded samples, in order; "step" tells each one's step."""
        return [record for record, _ in read_lines(self.path / "samples.jsonl")]

    def save_checkpoint(
        self, step: int, writer: Callable[[Path], None], score: float | None = None, best: Collection[int] = ()
    ) -> Path:
        """A checkpoint, written whole or not at all by ``writer(empty folder)``; older ones are removed.

        The last ``config.train.keep`` stay, the one with the highest ``score``, and those of the steps in ``best``. A
        step that is already saved is
        left as it is.

        Raises:
            RunError: the disk is full or cannot be written; earlier checkpoints are unharmed.
        """
        self._must_write()
        target = self.path / "checkpoints" / f"step-{step:06d}"
        if target.is_dir():
            return target
        if score is not None and not math.isfinite(score):
            score = None

        def fill(folder: Path) -> None:
            writer(folder)
            (folder / "checkpoint.json").write_text(json.dumps({"step": step, "score": score}) + "\n", encoding="utf-8")

        with reporting(f"the checkpoint of step {step}", self.path):
            for name in ("metrics.jsonl", "samples.jsonl"):  # a checkpoint never outlives the steps that led to it
                if (self.path / name).is_file():
                    sync(self.path / name)
            write_folder(target, fill)
            self._prune(best)
        return target

    def latest_checkpoint(self) -> Path | None:
        """The checkpoint of the latest step. What a killed process left half written is never one."""
        saved = checkpoints(self.path)
        return saved[-1] if saved else None

    def best_checkpoint(self) -> Path | None:
        """The kept checkpoint with the highest score; None where none has a score."""
        scored = [(score, path) for path in checkpoints(self.path) if (score := _score(path)) is not None]
        return max(scored)[1] if scored else None

    def checkpoint(self, step: int) -> Path | None:
        """The checkpoint of a step, where there is one."""
        path = self.path / "checkpoints" / f"step-{step:06d}"
        return path if path.is_dir() else None

    def _prune(self, kept: Collection[int]) -> None:
        best = self.best_checkpoint()
        for path in checkpoints(self.path)[: -self.config.train.keep]:
            if path != best and step_of(path) not in kept:
                remove(path)

    def _go_back(self) -> None:
        """Put the folder back to how it was at the last checkpoint."""
        remove_leftovers(self.path / "checkpoints")
        latest = self.latest_checkpoint()
        self.step = step_of(latest) if latest else 0
        self.metrics = _cut(self.path / "metrics.jsonl", self.step)
        _cut(self.path / "samples.jsonl", self.step)

    def _must_write(self) -> None:
        if not self._writes:
            raise ValueError(f"the run {self.path} is open for reading; Run.create(..., resume=True) goes on with it")


def _begun(path: Path) -> bool:
    """Whether the folder holds a run."""
    if path.exists() and not path.is_dir():
        raise UserError(f"{path} is a file; name a folder by --out.")
    if (path / "config.yaml").is_file():
        return True
    # Hidden names are no content: what a process killed at its start left, or the system's own.
    if path.is_dir() and any(not item.name.startswith(".") for item in path.iterdir()):
        raise UserError(f"{path} is not empty and holds no run; name another folder by --out.")
    return False


def _config(path: Path) -> Config:
    return Config.build(read_mapping(path / "config.yaml"), str(path / "config.yaml"))


def _check_same(path: Path, config: Config) -> None:
    old, new = (_flat(each.model_dump(mode="json")) for each in (_config(path), config))
    differ = [key for key in sorted({*old, *new}) if old.get(key, ...) != new.get(key, ...)]
    # The other schedules run over the number of steps: with more of them, the steps so far would have been others.
    free = MAY_CHANGE if config.train.schedule in ("constant", "follow") else MAY_CHANGE[2:]
    differ = [key for key in differ if not any(f"{key}.".startswith(f"{one}.") for one in free)]
    differ = [key for key in differ if not any(other.startswith(f"{key}.") for other in differ)]
    if differ:
        raise UserError(
            f"{path} was begun with another config: it differs in {', '.join(differ)}; put that back to go on with "
            f"--resume, or begin anew in another --out."
        )


def _flat(value: Any, path: str = "") -> dict[str, Any]:
    """Nested values by dotted path; an empty mapping or list is a value."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    flat = {}
    for key, item in items:
        flat.update(_flat(item, f"{path}.{key}" if path else str(key)))
    return flat or {path: value}


def _cut(path: Path, step: int) -> list[dict[str, Any]]:
    """Cut a file of JSON lines back to a step and return what stays."""
    kept, end = [], 0
    for record, line_end in read_lines(path):
        if record["step"] > step:
            break
        kept.append(record)
        end = line_end
    if path.is_file():
        with path.open("rb+") as file:
            file.truncate(end)
        sync(path)
    return kept


def _score(checkpoint: Path) -> float | None:
    try:
        score = json.loads((checkpoint / "checkpoint.json").read_text(encoding="utf-8"))["score"]
    except FileNotFoundError:  # removed by another process since it was listed
        return None
    return None if score is None else float(score)


def _versions(config: Config) -> dict[str, Any]:
    torch = sys.modules.get("torch")
    return {
        "instant_reward": __version__,
        "python": platform.python_version(),
        "torch": _version("torch"),
        "transformers": _version("transformers"),
        "platform": platform.platform(),
        "machine": platform.machine(),
        "threads": config.train.threads or (torch.get_num_threads() if torch else None),
        "seed": config.seed,
    }


@functools.cache
def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None
