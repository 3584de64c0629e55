"""The optimizer of a policy: AdamW, a learning-rate schedule with warm-up, a bound on the gradient's norm."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from instant_reward.types import RunError


@dataclass(frozen=True)
class Optimization:
    """How a policy steps.

    Attributes:
        learning_rate: AdamW's, after warm-up.
        steps: optimizer steps in all, which the schedule runs over.
        schedule: "constant"; "linear" or "cosine", both down to 0; "follow", which ``Stepper.factor`` is moved for.
        warmup: steps of linear warm-up.
        weight_decay: AdamW's.
        max_grad_norm: the gradient's 2-norm is scaled down to this.
    """

    learning_rate: float = 1e-5
    steps: int = 1
    schedule: Literal["constant", "linear", "cosine", "follow"] = "constant"
    warmup: int = 0
    weight_decay: float = 0.0
    max_grad_norm: float = 1.0


@dataclass(frozen=True)
class Group:
    """Parameters that step at a rate of their own and whose gradient is bounded apart from the others'."""

    parameters: Sequence[Tensor]
    learning_rate: float


class Stepper:
    """Holds the optimizer and its schedule.

    Attributes:
        done: optimizer steps so far; factor: what the rates are multiplied by besides, by who follows a metric.
    """

    def __init__(self, groups: Sequence[Group], settings: Optimization) -> None:
        self.settings = settings
        self.groups = [
            Group([one for one in group.parameters if one.requires_grad], group.learning_rate) for group in groups
        ]
        self.optimizer = torch.optim.AdamW(
            [{"params": list(group.parameters), "lr": group.learning_rate} for group in self.groups],
            weight_decay=settings.weight_decay,
            fused=True,
        )
        self.done = 0
        self.factor = 1.0

    @property
    def learning_rate(self) -> float:
        """The rate of the next step, of the first group."""
        return self.groups[0].learning_rate * self._share()

    def _share(self) -> float:
        """What the schedule leaves of the rates."""
        return self.factor * self._scheduled()

    def _scheduled(self) -> float:
        settings, step = self.settings, self.done
        if step < settings.warmup:
            return (step + 1) / settings.warmup
        progress = min(1.0, (step - settings.warmup) / max(1, settings.steps - settings.warmup))
        if settings.schedule == "linear":
            return 1.0 - progress
        if settings.schedule == "cosine":
            return 0.5 * (1.0 + math.cos(math.pi * progress))
        return 1.0

    def step(self) -> list[float]:
        """One step from the gradients that have gathered; they are cleared.

        Returns:
            Each group's gradient norm before it was bounded.

        Raises:
            RunError: where the gradient is not finite; the parameters and the optimizer stay as they were.
        """
        bound = self.settings.max_grad_norm
        norms = [float(torch.nn.utils.clip_grad_norm_(group.parameters, bound)) for group in self.groups]
        if not all(
            map(math.isfinite, norms)
        ):  # such a step would destroy the policy, and to leave it out would hide that
            self.optimizer.zero_grad(set_to_none=True)
            raise RunError(
                f"the gradient of optimizer step {self.done + 1} is not finite, and the policy was left as it was; "
                "lower train.learning_rate, or look for extreme rewards in samples.jsonl"
            )
        for group, own in zip(self.optimizer.param_groups, self.groups, strict=True):
            group["lr"] = own.learning_rate * self._share()
        self.optimizer.step()
        # The fused step does not count as a change in place by itself; copies of the weights go by that count.
        torch.autograd.graph.increment_version([one for group in self.groups for one in group.parameters])
        self.optimizer.zero_grad(set_to_none=True)
        self.done += 1
        return norms

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint has to hold."""
        return {"optimizer": self.optimizer.state_dict(), "done": self.done, "factor": self.factor}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes on from a checkpoint."""
        self.optimizer.load_state_dict(state["optimizer"])
        self.done, self.factor = state["done"], state["factor"]
