"""What a policy keeps: its weights in folders and checkpoints, and what it was, to be compared with."""

from __future__ import annotations

import copy
import pickle
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from instant_reward.notice import without_bars
from instant_reward.policies.critic import Critic
from instant_reward.policies.load import weights_in
from instant_reward.policies.optimizer import Stepper
from instant_reward.types import UserError

CRITIC, REFERENCE = "critic.safetensors", "reference.safetensors"


class Kept(ABC):
    """The weights of a policy; ``Learning`` has what is done with them.

    Attributes:
        reference: the model as it was, frozen, where there is no adapter to switch off.
        begun: what was trained in full beside an adapter, as it was in the beginning.
        reference_moved: the reference's weights once it was reset.
    """

    model: Any
    tokenizer: Any
    adapter: Any
    reference: Any
    begun: dict[str, Tensor]
    reference_moved: dict[str, Tensor]
    teacher: Any
    critic: Critic | None
    stepper: Stepper | None

    @property
    @abstractmethod
    def device(self) -> torch.device:
        """Where the model lies."""

    def save(self, folder: str | Path) -> Path:
        """Writes what transformers' ``from_pretrained`` loads, tokenizer included; an adapter is merged in."""
        target = Path(folder)
        model = self.model
        if self.adapter is not None:
            model = copy.deepcopy(self.adapter).merge_and_unload()
        with without_bars():
            model.save_pretrained(target)
        if self.tokenizer is not None:
            self.tokenizer.save_pretrained(target)
        return target

    def save_state(self, folder: Path) -> None:
        """Writes weights, optimizer and schedule for a checkpoint."""
        from safetensors.torch import save_file

        if self.adapter is None:
            self.save(folder / "policy")
        else:
            save_file({k: v.detach().contiguous() for k, v in self._trained()}, folder / "adapter.safetensors")
        assert self.stepper is not None, "prepare the policy before it is saved in a checkpoint"
        if self.critic is not None:
            # Copies, since a trunk's tied weights are two names of one tensor, which the format refuses.
            save_file(
                {
                    key: value.clone(memory_format=torch.contiguous_format)
                    for key, value in self.critic.state_dict().items()
                },
                folder / CRITIC,
            )
        if self.reference_moved:
            save_file({key: value.contiguous() for key, value in self.reference_moved.items()}, folder / REFERENCE)
        torch.save(self.stepper.state_dict(), folder / "optimizer.pt")

    def load_weights(self, folder: Path) -> None:
        """Takes the weights of a checkpoint.

        Raises:
            UserError: it is damaged, or of another model.
        """
        from safetensors.torch import load_file

        trained = dict(self._trained())
        with reading(folder):
            if self.adapter is not None:
                stored = load_file(folder / "adapter.safetensors")
            else:
                stored = weights_in(folder / "policy", self.model, trained)
            with torch.no_grad():
                for name, parameter in trained.items():
                    parameter.copy_(stored[name])

    def load_state(self, folder: Path) -> None:
        """Goes on from a checkpoint, bit for bit.

        Raises:
            UserError: it is damaged, or of another model or algorithm.
        """
        assert self.stepper is not None, "prepare the policy before it is loaded from a checkpoint"
        from safetensors.torch import load_file

        self.load_weights(folder)
        with reading(folder):
            if self.critic is not None:
                self.critic.load_state_dict(load_file(folder / CRITIC))
            if (folder / REFERENCE).is_file():
                self._take_reference(load_file(folder / REFERENCE))
            self.stepper.load_state_dict(torch.load(folder / "optimizer.pt", weights_only=True))

    def load_best(self, folder: Path) -> None:
        """Goes back to a checkpoint of this run; its schedule goes on from where it is."""
        assert self.stepper is not None, "prepare the policy before it is loaded from a checkpoint"
        done = self.stepper.done
        self.load_state(folder)
        self.stepper.done = done

    def reset_reference(self) -> None:
        """From here on the reference is the policy as it is now."""
        self._take_reference({name: parameter.detach().clone() for name, parameter in self._trained()})

    def _take_reference(self, weights: dict[str, Tensor]) -> None:
        self.reference_moved = {name: values.to(self.device) for name, values in weights.items()}
        if self.adapter is None:
            with torch.no_grad():
                for name, parameter in self.reference.named_parameters():
                    parameter.copy_(self.reference_moved.get(name, parameter))

    def _trained(self) -> Iterator[tuple[str, nn.Parameter]]:
        return ((name, p) for name, p in self.model.named_parameters() if p.requires_grad)

    def _trained_in_full(self) -> Iterator[tuple[str, nn.Parameter]]:
        """What is trained beside an adapter, such as a classifier's output layer."""
        return ((name, p) for name, p in self._trained() if self.adapter is not None and "lora_" not in name)

    @contextmanager
    def as_reference(self) -> Iterator[Any]:
        """The model as it was: the frozen copy, or the adapter switched off, or as it was when last reset."""
        if self.adapter is None:
            yield self.reference
        elif self.reference_moved:
            with self._swapped(self.reference_moved):
                yield self.model
        else:
            with self.adapter.disable_adapter(), self._swapped(self.begun):
                yield self.model

    @contextmanager
    def as_teacher(self) -> Iterator[Any]:
        """The teacher: another model, or this one as it was."""
        if self.teacher is not None:
            yield self.teacher
        else:
            with self.as_reference() as model:
                yield model

    @contextmanager
    def _swapped(self, weights: Mapping[str, Tensor]) -> Iterator[None]:
        swapped = {name: parameter for name, parameter in self._trained() if name in weights}
        now = {name: parameter.data for name, parameter in swapped.items()}
        try:
            for name, parameter in swapped.items():
                parameter.data = weights[name]
            yield
        finally:
            for name, parameter in swapped.items():
                parameter.data = now[name]


@contextmanager
def reading(checkpoint: Path) -> Iterator[None]:
    """Says in one sentence that a checkpoint is damaged, or of another model than it is read into."""
    from safetensors import SafetensorError

    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except (SafetensorError, OSError, EOFError, pickle.UnpicklingError, RuntimeError, ValueError, KeyError) as error:
        reason = str(error).strip().partition("\n")[0] or type(error).__name__
        raise UserError(
            f"the checkpoint {checkpoint} cannot be read ({reason}): it is damaged or of another model; remove it, and "
            "the run resumes from the one before, or begins anew"
        ) from error
