"""Supervised training: the loop of ``train``, over given texts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from instant_reward.config import Config, as_supervised
from instant_reward.presets import preset_of
from instant_reward.run import Run
from instant_reward.train import run_to_its_end
from instant_reward.types import UserError


def fit(
    config: Config | None = None,
    *,
    model: str = "smollm2-135m",
    texts: Sequence[Any] | str | Path | None = None,
    prompt: str | None = None,
    completion: str = "text",
    rewards: Sequence[Any] = (),
    algorithm: Mapping[str, Any] | None = None,
    held_out: Sequence[Any] | str | Path | None = None,
    every: int | None = None,
    epochs: float | None = None,
    steps: int = 40,
    texts_per_step: int = 4,
    tokens_per_step: int | None = None,
    learning_rate: float = 1e-5,
    dtype: str = "auto",
    save_every: int | None = None,
    seed: int = 0,
    out: str | Path = "runs/fit",
    resume: bool = False,
) -> Run:
    """Trains a language model on given texts: by maximum likelihood, which rewards on them may weigh.

    Either from a whole ``Config`` (its algorithm is "likelihood"), or from the arguments. The loop is ``train``'s.

    Args:
        config: everything; the other arguments but ``rewards`` and ``resume`` are then not looked at.
        texts: strings, or mappings of columns; or the path of a file with them.
        prompt: the column with what stands before each text; without it, texts begin from the opening token.
        completion: the column with the texts; of plain strings, any name.
        rewards: weigh the target tokens that they rate.
        algorithm: further options, ``{"by_error": "harder"}``.
        held_out: texts by which the model is judged every ``every`` steps and at the end (``held_out/perplexity``).
        epochs: passes over the texts, in place of ``steps``; tokens_per_step: in place of ``texts_per_step``.

    Returns:
        The run: ``run.path``, ``run.metrics`` (one dict a step), ``run.policy``.

    Raises:
        UserError: bad settings, texts, model or folder; RewardError: a reward that failed.
    """
    if config is None:
        if texts is None:
            raise UserError("fit: give texts=[...], or a Config")

        def section(source: Sequence[Any] | str | Path) -> dict[str, Any]:
            where = {"path": str(source)} if isinstance(source, str | Path) else {"prompts": list(source)}
            return {**where, "column": prompt, "completion": completion}

        length = {"steps": steps} if epochs is None else {"epochs": epochs}
        values = {
            "model": {"name": str(model), "dtype": dtype},
            "data": section(texts),
            "algorithm": dict(algorithm or {}),
            "train": {
                **length,
                "prompts_per_step": texts_per_step,
                "tokens_per_step": tokens_per_step,
                "learning_rate": learning_rate,
                "save_every": save_every,
            },
            "evaluate": {"every": every, "texts": None if held_out is None else section(held_out)},
            "seed": seed,
            "out": str(out),
        }
        config = Config.build(as_supervised(values), where="fit")
    check_supervised(config)
    return run_to_its_end(config, rewards or None, resume)


def check_supervised(config: Config) -> None:
    """Refuses a config that is not of supervised training.

    Raises:
        UserError: names the algorithm.
    """
    if preset_of(config.algorithm).loss != "likelihood":
        raise UserError(
            f"algorithm.name: fit learns by likelihood, and this is {config.algorithm.name}; leave it out, or use train"
        )
