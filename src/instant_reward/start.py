"""The policy that a run begins with, and the one that a run has come to."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from instant_reward import algorithms
from instant_reward.config import Config
from instant_reward.data import TextsIn
from instant_reward.policies.kinds import load_policy
from instant_reward.policies.policy import Policy
from instant_reward.policies.scratch import new_policy
from instant_reward.presets import preset_of
from instant_reward.run import START, Run
from instant_reward.types import UserError


def load_run_policy(path: str | Path) -> tuple[Policy, Config]:
    """The policy of a run folder, from its newest checkpoint, and the run's config.

    Raises:
        UserError: where there is no run or it has no checkpoint yet.
    """
    run = Run.open(path)
    checkpoint = run.latest_checkpoint()
    if checkpoint is None:
        raise UserError(f"{path} has no checkpoint yet; let it train to its first one (train.save_every) or its end")
    policy = start_policy(run.config, path)
    policy.load_weights(checkpoint)
    preset = preset_of(run.config.algorithm)
    critic = algorithms.needs(run.config.algorithm, preset, 1).critic
    if preset.loss == "ilql" and critic is not None and critic.model == "head":  # it may guide the decoding
        policy.load_critic(checkpoint, critic)
    return policy, run.config


def start_policy(config: Config, folder: str | Path, rows: Sequence[Mapping[str, Any]] = ()) -> Policy:
    """The policy as a run begins: the model that the config names, or one with new weights.

    Args:
        folder: the run's, where new weights are kept from the start on.
        rows: the run's data, on which a new tokenizer is trained.
    """
    scratch, name = config.model.scratch, start_name(config, folder)
    if scratch is not None and not Path(name).is_dir():
        given = [column for column in (config.data.prompt_column, config.data.completion) if column]
        return new_policy(scratch, TextsIn(rows, scratch.tokenizer.columns or given), config.model.dtype)
    lora = config.model.lora.model_dump() if config.model.lora else None
    labels = config.model.labels if name == config.model.name else []  # the start in the run's folder has them
    return load_policy(name, config.model.dtype, lora=lora, labels=labels, seed=config.seed)


def start_name(config: Config, folder: str | Path) -> str:
    """What ``load_policy`` takes for the model that the run in ``folder`` began with."""
    kept = Path(folder) / START
    return str(kept) if kept.is_dir() or config.model.scratch is not None else config.model.name
