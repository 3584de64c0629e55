"""Functions named in a config: ``module:name`` or ``folder/file.py:name``."""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import os
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

from instant_reward.types import UserError


def resolve(path: str) -> Any:
    """What ``module:name`` or ``folder/file.py:name`` names; ``name`` may have dots, files are found from here.

    The current folder counts as a place of modules, after the installed ones.

    Raises:
        UserError: the module, file or name is missing, or importing it failed; the sentence says which.
    """
    module_path, _, name = path.rpartition(":")
    if not module_path or not name:
        raise UserError(f"{path!r} names no function; write module:name or folder/file.py:name.")
    found: Any = _from_file(Path(module_path)) if module_path.endswith(".py") else _from_module(module_path)
    for part in name.split("."):
        if not hasattr(found, part):
            raise UserError(f"{module_path} has no {name!r}; check the name after the colon in {path!r}.")
        found = getattr(found, part)
    return found


def _from_module(name: str) -> ModuleType:
    here = os.getcwd()
    if here not in sys.path:
        sys.path.append(here)  # stays, for what the module imports later
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name and (name == error.name or name.startswith(f"{error.name}.")):
            raise UserError(
                f"there is no module {error.name!r}; install it, or run from the folder that holds it, "
                f"or name a file as folder/file.py:name."
            ) from None
        raise _failed(name, error) from error
    except Exception as error:  # the user's own code may raise anything
        raise _failed(name, error) from error


def _from_file(path: Path) -> ModuleType:
    if not path.is_file():
        raise UserError(f"there is no file {path}; check the path, which counts from {os.getcwd()}.")
    resolved = path.resolve()
    digest = hashlib.sha256(str(resolved).encode()).hexdigest()[:12]
    name = f"instant_reward_file_{digest}_{resolved.stem}"
    if name in sys.modules:  # two rewards of one file share its state
        return sys.modules[name]
    spec = importlib.util.spec_from_file_location(name, resolved)
    if spec is None or spec.loader is None:
        raise UserError(f"{path} cannot be loaded as Python; give it a name that ends in .py.")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        del sys.modules[name]
        raise _failed(str(path), error) from error
    return module


def _failed(what: str, error: Exception) -> UserError:
    reason = " ".join(str(error).split())
    return UserError(f"importing {what} failed with {type(error).__name__}: {reason}; mend it there.")
