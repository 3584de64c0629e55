"""Train language models from rewards that arrive while the text is being written.

Every public name is loaded when it is first used: importing the package loads no torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from instant_reward import credit as credit
    from instant_reward import losses as losses
    from instant_reward.config import Config as Config
    from instant_reward.policies.causal import CausalPolicy as CausalPolicy
    from instant_reward.policies.kinds import load_policy as load_policy
    from instant_reward.policies.policy import Policy as Policy
    from instant_reward.rewards.base import Reward as Reward
    from instant_reward.rewards.base import reward as reward
    from instant_reward.rewards.base import stop as stop
    from instant_reward.rewards.compose import change as change
    from instant_reward.rewards.compose import weighted as weighted
    from instant_reward.rewards.scope import replay_groups as replay_groups
    from instant_reward.rewards.shaping import potential as potential
    from instant_reward.rewards.watch import Watch as Watch
    from instant_reward.rewards.watch import replay as replay
    from instant_reward.rewards.workers import in_workers as in_workers
    from instant_reward.run import Run as Run
    from instant_reward.supervised import fit as fit
    from instant_reward.train import train as train
    from instant_reward.types import LossOutput as LossOutput
    from instant_reward.types import Mark as Mark
    from instant_reward.types import PolicyOutput as PolicyOutput
    from instant_reward.types import Prompt as Prompt
    from instant_reward.types import RewardError as RewardError
    from instant_reward.types import Rollout as Rollout
    from instant_reward.types import RunError as RunError
    from instant_reward.types import Span as Span
    from instant_reward.types import Stop as Stop
    from instant_reward.types import UserError as UserError
    from instant_reward.types import View as View

__version__ = "0.1.0"

# Public name -> "module:name" below this package, or only "module" where the name is the module itself. `train` is a
# module that can be called (see _callable.py): the import system would put it in a function's place anyway.
_PUBLIC = {
    "CausalPolicy": "policies.causal:CausalPolicy",
    "Config": "config:Config",
    "LossOutput": "types:LossOutput",
    "Mark": "types:Mark",
    "Policy": "policies.policy:Policy",
    "PolicyOutput": "types:PolicyOutput",
    "Prompt": "types:Prompt",
    "Reward": "rewards.base:Reward",
    "RewardError": "types:RewardError",
    "Rollout": "types:Rollout",
    "Run": "run:Run",
    "RunError": "types:RunError",
    "Span": "types:Span",
    "Stop": "types:Stop",
    "UserError": "types:UserError",
    "View": "types:View",
    "Watch": "rewards.watch:Watch",
    "change": "rewards.compose:change",
    "credit": "credit",
    "fit": "supervised:fit",
    "in_workers": "rewards.workers:in_workers",
    "load_policy": "policies.kinds:load_policy",
    "losses": "losses",
    "potential": "rewards.shaping:potential",
    "replay": "rewards.watch:replay",
    "replay_groups": "rewards.scope:replay_groups",
    "reward": "rewards.base:reward",
    "stop": "rewards.base:stop",
    "train": "train",
    "weighted": "rewards.compose:weighted",
}

__all__ = [  # noqa: PLE0604 (every one a string)
    *_PUBLIC,
    "__version__",
]


def __getattr__(name: str) -> Any:
    """The public name ``name``, from the module that has it."""
    if name not in _PUBLIC:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module_name, _, attribute = _PUBLIC[name].partition(":")
    module = import_module(f"{__name__}.{module_name}")
    found = getattr(module, attribute) if attribute else module
    globals()[name] = found
    return found


def __dir__() -> list[str]:
    """The names that are there, the ones not yet loaded included."""
    return sorted({*globals(), *_PUBLIC})
