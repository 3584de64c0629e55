"""From a config to what it names: rewards and prompts."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from contextlib import nullcontext
from typing import Any

from instant_reward import data
from instant_reward.config import DataConfig, RewardConfig
from instant_reward.imports import resolve
from instant_reward.notice import status
from instant_reward.rewards.base import Reward, as_reward
from instant_reward.rewards.compose import change
from instant_reward.rewards.names import import_path, make
from instant_reward.rewards.shaping import potential
from instant_reward.rewards.workers import in_workers
from instant_reward.types import UserError


def build_rewards(configs: Sequence[RewardConfig]) -> list[Reward]:
    """The rewards of a config, in its order.

    Raises:
        UserError: where one cannot be imported or made.
    """
    return [_reward(config) for config in configs]


def _reward(config: RewardConfig) -> Reward:
    plain = not (config.change or config.potential)
    # What goes to a worker as it is is loaded there alone.
    found: Any = None if config.workers and plain else make(config.use, config.args, "rewards")
    every = resolve(config.every) if isinstance(config.every, str) and ":" in config.every else config.every
    if config.change:
        made = change(found, every=every or "word", name=config.label)
    elif config.potential:
        shaped_for = 1.0 if config.discount is None else config.discount
        made = potential(found, shaped_for, every=every or "word", name=config.label)
    elif config.workers:
        path = import_path(config.use)
        made = in_workers(path, config.workers, config.time_limit, config.on_error, args=config.args)
    else:
        made = as_reward(found)
    if config.workers and not plain:
        made = in_workers(made, config.workers, config.time_limit, config.on_error)
    if plain and every is not None:
        made = made.but(every=every)
    changes: dict[str, Any] = {"name": config.label, "train": config.train}
    changes |= {"scaled": config.scaled, "clip": config.clip}
    changes |= {"weight": config.weight} if isinstance(config.weight, float) else {"rule": config.weight}
    if config.discount is not None:
        changes["discount"] = config.discount
    if config.at != "seen":
        changes["at"] = config.at
    return made.but(**changes)


def load_prompt_rows(config: DataConfig) -> Sequence[dict[str, Any]]:
    """The rows of a data config: one mapping a prompt, its other columns beside it; of a split, its ``part``.

    Raises:
        UserError: where the file, the function or a row cannot be used.
    """
    return load_parts(config, [config.part])[config.part]


def load_parts(config: DataConfig, names: Sequence[str] | None = None) -> dict[str, Sequence[dict[str, Any]]]:
    """The rows of the parts of a data config, by name; without a split there is one, "train".

    Args:
        names: the parts that are wanted; all without it.

    Raises:
        UserError: where a file, the function or a row cannot be used.
    """
    split = config.split
    if split is not None and split.files:
        wanted = {name: path for name, path in split.files.items() if names is None or name in names}
        return {name: _load(config, path, config.limit) for name, path in wanted.items()}
    source: Any = config.prompts if config.path is None else config.path
    if config.use is not None:
        source = _called(config)
    if split is None:
        return {"train": _load(config, source, config.limit)}
    parts = data.split(_load(config, source, None), split.fractions, split.seed)
    return {name: rows[: config.limit] for name, rows in parts.items() if names is None or name in names}


def _called(config: DataConfig) -> Iterable[Any]:
    """The rows that the function of a data config hands out, none of them in memory before it is needed."""
    assert config.use is not None, "the config names no function"
    function = resolve(config.use)
    try:
        found: Iterable[Any] = iter(function(**config.args))
    except TypeError as error:
        raise UserError(f"data.use: {config.use} does not take args {config.args}: {error}; correct them") from error
    return found


def _load(config: DataConfig, source: Any, limit: int | None) -> Sequence[dict[str, Any]]:
    pair = config.column if isinstance(config.column, list) else []
    logged = [] if config.logged is None else list(config.logged.model_dump().values())
    with status(f"reading {config.path or config.use or 'the data'} to disk") if config.stream else nullcontext():
        return data.load_rows(
            source,
            column=pair[0] if pair else config.prompt_column or config.completion or "prompt",
            limit=limit,
            columns=config.columns,
            needed=[*pair[1:], *([config.completion] if config.completion else []), *logged],
            encoding=config.encoding,
            unique=config.unique,
            pair=pair,
            stream=config.stream,
        )
