"""The optimizer of a policy: AdamW, a learning-rate schedule with warm-up, a bound on the gradient's norm."""

from __future__ import annotations

import math
from collections.abc import Iterable
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
        schedule: "constant", "linear" or "cosine", both down to 0.
        warmup: steps of linear warm-up.
        weight_decay: AdamW's.
        max_grad_norm: the gradient's 2-norm is scaled down to this.
    """

    learning_rate: float = 1e-5
    steps: int = 1
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    warmup: int = 0
    weight_decay: float = 0.0
    max_grad_norm: float = 1.0


class Stepper:
    """Holds the optimizer and its schedule. ``step`` returns the gradient's norm before it was bounded."""

    def __init__(self, parameters: Iterable[Tensor], settings: Optimization) -> None:
        self.settings = settings
        self.parameters = [parameter for parameter in parameters if parameter.requires_grad]
        self.optimizer = torch.optim.AdamW(
            self.parameters, lr=settings.learning_rate, weight_decay=settings.weight_decay, fused=True
        )
        self.done = 0

    @property
    def learning_rate(self) -> float:
        """The rate of the next step."""
        settings, step = self.settings, self.done
        if step < settings.warmup:
            return settings.learning_rate * (step + 1) / settings.warmup
        progress = min(1.0, (step - settings.warmup) / max(1, settings.steps - settings.warmup))
        if settings.schedule == "linear":
            return settings.learning_rate * (1.0 - progress)
        if settings.schedule == "cosine":
            return settings.learning_rate * 0.5 * (1.0 + math.cos(math.pi * progress))
        return settings.learning_rate

    def step(self) -> float:
        """One step from the gradients that have gathered; they are cleared.

        Raises:
            RunError: where the gradient is not finite; the parameters and the optimizer stay as they were.
        """
        norm = float(torch.nn.utils.clip_grad_norm_(self.parameters, self.settings.max_grad_norm))
        if not math.isfinite(norm):  # such a step would destroy the policy, and to leave it out would hide that
            self.optimizer.zero_grad(set_to_none=True)
            raise RunError(
                f"the gradient of optimizer step {self.done + 1} is not finite, and the policy was left as it was; "
                "lower train.learning_rate, or look for extreme rewards in samples.jsonl"
            )
        for group in self.optimizer.param_groups:
            group["lr"] = self.learning_rate
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.done += 1
        return norm

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint has to hold."""
        return {"optimizer": self.optimizer.state_dict(), "done": self.done}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes on from a checkpoint."""
        self.optimizer.load_state_dict(state["optimizer"])
        self.done = state["done"]
