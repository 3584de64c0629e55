"""What every policy does to learn: log-probabilities, what algorithms need besides, steps."""

from __future__ import annotations

import copy
from abc import abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from instant_reward.batch import Batch
from instant_reward.policies import terms
from instant_reward.policies.annotate import annotated, ask, beyond_the_end
from instant_reward.policies.critic import Critic
from instant_reward.policies.kept import CRITIC, Kept
from instant_reward.policies.optimizer import Group, Optimization, Stepper
from instant_reward.policies.states import Reader, on_tokens
from instant_reward.types import CriticNeed, Needs, PolicyOutput, UserError


class Learning(Kept):
    """A model that learns; ``Policy`` adds what samples from it.

    Args:
        model: its weights are the master weights.
        tokenizer: its model's; None where that reads no tokens.
        compute: the dtype the matrix products run in; "bfloat16" keeps float32 master weights.
        adapter: the peft wrapper around ``model`` where only an adapter is trained.
        name: what it was loaded by.

    Attributes:
        same_actions: whether all prompts have the same actions to choose from.
        begins_empty: whether the flat sequence may begin with a sampled action.
        end_ids: the actions that end a text; pad_id: what pads rows.
        states: reads batches with a trunk, the policy's or a critic's.
        needs: what the algorithm asks for (``prepare``).
    """

    same_actions: bool = True
    begins_empty: bool = False
    end_ids: tuple[int, ...] = ()
    pad_id: int = 0

    def __init__(
        self, model: Any, tokenizer: Any, compute: torch.dtype = torch.float32, adapter: Any = None, name: str = ""
    ) -> None:
        self.model = model.eval()  # dropout would make the trainer's log-probabilities differ from the sampler's
        for one in model.modules():  # positions that are computed, not learned: loading them makes parameters of them
            if "Sinusoidal" in type(one).__name__:
                one.requires_grad_(False)
        self.tokenizer = tokenizer
        self.compute = compute
        self.adapter = adapter
        self.name = name
        self.needs = Needs()
        self.states = self.new_states()
        self.reference: Any = None
        self.begun: dict[str, Tensor] = {}
        self.reference_moved: dict[str, Tensor] = {}
        self.teacher: Any = None
        self.critic: Critic | None = None
        self.stepper: Stepper | None = None

    @abstractmethod
    def new_states(self) -> Reader:
        """A fresh reader of batches, which knows no model yet."""

    @abstractmethod
    def head(self, model: Any, batch: Batch, read: Batch | None = None) -> terms.Distribution:
        """What the sampled actions were drawn from, by a model.

        Args:
            model: this policy's, or another one for the same actions.
            read: the same texts as the model reads them, where that is not ``batch``.
        """

    @abstractmethod
    def load_beside(self, name: str, what: str) -> Any:
        """Another model for the same actions, frozen: a teacher or a critic's trunk.

        Args:
            what: the option that named it, for messages.
        """

    @property
    def device(self) -> torch.device:
        """Where the model lies."""
        return next(self.model.parameters()).device  # type: ignore[no-any-return]

    @staticmethod
    def output_head(model: Any) -> Any:
        """The linear layer that makes logits of the states."""
        return model.get_output_embeddings()

    def actions_in(self, model: Any) -> int:
        """How many actions a model chooses among."""
        return len(self.output_head(model).weight)

    @property
    def actions(self) -> int:
        """How many actions it chooses among."""
        return self.actions_in(self.model)

    def __call__(self, batch: Batch) -> PolicyOutput:
        """What the policy says of the sampled tokens, as the sampler drew them; more where ``prepare`` asked for it."""
        # A policy without a loss of its own needs no graph, unless the critic's gradient goes through its trunk.
        with torch.set_grad_enabled(torch.is_grad_enabled() and (self.needs.learns or not self._detached())):
            head = self.head(self.model, batch)
            output = self.token_logprobs(head, batch)
        ask(self, output, head, batch)
        return output

    def _detached(self) -> bool:
        """Whether the critic sends no gradient into the policy's trunk."""
        return self.critic is None or self.critic.base is not None or self.critic.need.detach

    def score(self, batch: Batch, tokens_per_part: int = 2048) -> Tensor:
        """Log-probabilities of the sampled tokens, ``[B, L]``, without gradient and in parts that fit in memory."""
        return self._score(self.model, batch, tokens_per_part)

    def annotate(self, batch: Batch, tokens_per_part: int = 2048) -> Batch:
        """Adds what ``prepare`` was asked for and the credit needs: ``Batch`` names it. No gradient."""
        if self.critic is not None:
            self.critic.begin(batch)
        found: dict[str, Tensor] = {}
        with torch.no_grad():
            for rows in batch.shares(tokens_per_part):
                for name, values in annotated(self, batch.select(rows)).items():
                    if name not in found:
                        shape = [*values.shape[1:-1], batch.token_ids.shape[1]]
                        found[name] = torch.zeros(len(batch), *shape, dtype=batch.old_logprobs.dtype)
                    found[name][rows, ..., : values.shape[-1]] = values.to(found[name])
            if self.critic is not None:
                found["bootstrap"] = beyond_the_end(self, self.critic, batch, tokens_per_part)
        return replace(batch, **found) if found else batch  # type: ignore[arg-type]

    def _score(self, model: Any, batch: Batch, tokens_per_part: int) -> Tensor:
        filled = torch.zeros_like(batch.old_logprobs)
        with torch.no_grad():
            for rows in batch.shares(tokens_per_part):
                part = batch.select(rows)
                values = self.token_logprobs(self.head(model, part), part).logprobs
                filled[rows, : values.shape[1]] = values.to(filled.dtype)
        return filled

    def prepare(self, settings: Optimization, needs: Needs | None = None) -> None:
        """Makes the optimizer and what an algorithm needs besides: reference, critic, teacher."""
        self.needs = needs or Needs()
        self.critic = self.teacher = self.reference = None
        self.states = self.new_states()  # which knows none of the models that are no more
        self.reference_moved = {}
        self.begun = {name: one.detach().clone() for name, one in self._trained_in_full()}
        groups = [Group(list(self.model.parameters()), settings.learning_rate)]
        teacher = self.needs.teacher
        if teacher is not None and teacher.model is not None:
            self.teacher = self.load_beside(teacher.model, "algorithm.teacher.model")
            widths = [self.actions_in(one) for one in (self.model, self.teacher)]
            if widths[0] != widths[1] and (teacher.whole or teacher.baseline):
                raise UserError(
                    f"algorithm.teacher.model: its output head has {widths[1]} rows and the policy's {widths[0]}, so "
                    "whole vocabularies cannot be compared; leave out teacher.whole and teacher.baseline"
                )
        if self.adapter is None and (self.needs.reference or (teacher is not None and teacher.model is None)):
            self.reference = copy.deepcopy(self.model).requires_grad_(False)
        if self.needs.critic is not None:
            self.critic = self._new_critic()
            rate = self.needs.critic.learning_rate or settings.learning_rate
            groups.append(Group(list(self.critic.parameters()), rate))
        self.stepper = Stepper(groups, settings)

    def _new_critic(self) -> Critic:
        need = self.needs.critic
        assert need is not None, "nobody asked for a critic"
        base = None
        if need.model == "copy":
            base = copy.deepcopy(self.states.trunk(self.model))
        elif need.model != "head":
            whole = self.load_beside(need.model, "algorithm.critic.model")
            base = self.states.trunk(whole.requires_grad_(True))
        width = self.states.width(base if base is not None else self.states.trunk(self.model))
        if need.tables and not self.same_actions:
            raise UserError(
                "algorithm.name: a critic of next actions needs the same actions for every prompt, and this policy's "
                "differ from prompt to prompt; use rloo, a2c or ppo"
            )
        dtype = next(self.model.parameters()).dtype
        return Critic(need, base, width, self.actions if need.tables else 0, dtype, self.device)

    @contextmanager
    def dropping_out(self) -> Iterator[None]:
        """The model's dropout is on: for given texts. Of sampled ones the log-probabilities must be the sampler's."""
        self.model.train()
        try:
            yield
        finally:
            self.model.eval()

    def backward(self, loss: Tensor) -> None:
        """Adds a part's gradient to the step's."""
        loss.backward()  # type: ignore[no-untyped-call]

    def forget(self) -> None:
        """Drops the gradients that have gathered."""
        assert self.stepper is not None, "prepare the policy before it learns"
        self.stepper.optimizer.zero_grad(set_to_none=True)

    def step(self) -> dict[str, float]:
        """One optimizer step from the gathered gradients; returns its gradient norm and learning rate."""
        assert self.stepper is not None, "prepare the policy before it steps"
        rate = self.stepper.learning_rate
        norms = self.stepper.step()
        row = {"grad_norm": norms[0], "learning_rate": rate}
        if self.critic is not None:
            self.critic.follow()
            row["critic_grad_norm"] = norms[1]
        return row

    def load_critic(self, folder: Path, need: CriticNeed) -> None:
        """Takes the critic of a checkpoint, for decoding that it guides."""
        from safetensors.torch import load_file

        self.needs = replace(self.needs, critic=need)
        self.critic = self._new_critic()
        self.critic.load_state_dict(load_file(folder / CRITIC))

    def rate_factor(self, factor: float) -> None:
        """From here on the learning rates are so many times what their schedule says."""
        assert self.stepper is not None, "prepare the policy before it learns"
        self.stepper.factor = factor

    @staticmethod
    def token_logprobs(head: terms.Distribution, batch: Batch) -> PolicyOutput:
        """Log-probabilities ``[B, L]`` of the sampled tokens with gradient, and entropies without."""
        targets = batch.token_ids[batch.mask.bool()].to(head.hidden.device)
        logprobs, entropies = head.of(targets)
        return PolicyOutput(on_tokens(logprobs, batch.mask), on_tokens(entropies, batch.mask))
