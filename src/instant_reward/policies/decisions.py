"""Policies that choose among actions which are no tokens: labels, sentences, positions.

The flat sequence holds the actions alone, in their order; what they are chosen for is the prompt's ``context``. A kind
of such policies says how it reads contexts (``read``) and what the next action is drawn from (``choose``); sampling
(``sampling/decisions.py``) and learning go through these two, so that both see the same probabilities.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from instant_reward.batch import Batch
from instant_reward.policies import terms
from instant_reward.policies.head import Softmax
from instant_reward.policies.policy import Policy
from instant_reward.policies.states import Reader
from instant_reward.text import Decoder
from instant_reward.types import Prompt, UserError

if TYPE_CHECKING:
    from instant_reward.sampling.decisions import DecisionSampler
    from instant_reward.sampling.draw import Settings

PLAIN = Softmax()


@dataclass(frozen=True)
class Steps:
    """``N`` decisions that are made side by side.

    Attributes:
        rows: int64 ``[N]``, which of the contexts each is about.
        before: the actions that were chosen before each, in their order.
    """

    rows: Tensor
    before: list[list[int]]

    def __len__(self) -> int:
        return len(self.before)


class DecisionPolicy(Policy):
    """A policy whose actions are chosen step by step for a context."""

    begins_empty = True

    @abstractmethod
    def read(self, model: Any, contexts: Sequence[Any]) -> Any:
        """What a model makes of contexts, once for all decisions about them.

        Args:
            model: this policy's, or another one for the same actions.
            contexts: ``Prompt.context`` of some prompts.
        """

    @abstractmethod
    def choose(
        self, model: Any, encoded: Any, steps: Steps, no_end: Tensor, softmax: Softmax = PLAIN
    ) -> terms.Distribution:
        """What the next actions are drawn from, with gradient where it is on.

        Args:
            encoded: what ``read`` made of the contexts.
            no_end: bool ``[N]``, where the ends are forbidden.
        """

    @abstractmethod
    def new_states(self) -> Reader:
        """See ``Learning``: what a critic of its own reads batches with."""

    @abstractmethod
    def decoder(self) -> Decoder:
        """See ``Policy``."""

    def engine(self, settings: Settings, version: int = 0) -> DecisionSampler:
        """See ``Policy``."""
        from instant_reward.sampling.decisions import DecisionSampler

        return DecisionSampler(self, settings, version)

    def unprompted(self, rows: Sequence[Mapping[str, Any]]) -> list[Prompt]:
        """See ``Policy``: there is nothing to decide about."""
        raise UserError("data.column: a decision is about something; name the column that holds it, such as prompt")

    def head(self, model: Any, batch: Batch, read: Batch | None = None) -> terms.Distribution:
        """See ``Learning``."""
        contexts, steps = decided(batch if read is None else read, self.device)
        softmax = Softmax(batch.temperature, self.end_ids if bool(batch.no_end.any()) else ())
        no_end = batch.no_end[batch.mask].to(self.device)
        return self.choose(model, self.read(model, contexts), steps, no_end, softmax)

    def autocast(self) -> AbstractContextManager[Any]:
        """The dtype that the products of a forward pass run in."""
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.compute == torch.bfloat16)


def decided(batch: Batch, device: torch.device) -> tuple[list[Any], Steps]:
    """The contexts of a batch, those of siblings once, and its decisions in the order of ``mask.nonzero()``."""
    if batch.contexts is None:
        raise UserError("decisions are made for contexts, and there are none here; give contexts=[...], one a row")
    contexts: list[Any] = []
    known: dict[int, int] = {}
    of_row = []
    for group, context in zip(batch.group.tolist(), batch.contexts, strict=True):
        if group not in known or contexts[known[group]] != context:
            known[group] = len(contexts)
            contexts.append(context)
        of_row.append(known[group])
    rows, at = batch.mask.bool().nonzero(as_tuple=True)
    ids = batch.token_ids.tolist()
    before = [ids[row][:t] for row, t in zip(rows.tolist(), at.tolist(), strict=True)]
    return contexts, Steps(torch.tensor(of_row, device=device)[rows.to(device)], before)


def cell(row: Mapping[str, Any], column: str, number: int) -> tuple[str, Any]:
    """What a row is called in messages, and what stands in its column.

    Raises:
        UserError: where it has no such column.
    """
    where = getattr(row, "where", f"prompt {number}")
    if column not in row:
        raise UserError(f"{where} has no column {column!r} (it has: {', '.join(row)}): name the one to decide about.")
    return where, row[column]


def check_company(model: Any, alone: Tensor, beside: Tensor) -> None:
    """Refuses a model that makes something else of a text where a longer one stands beside it.

    Args:
        alone, beside: the same states, made of the text alone and of the two, right-padded.

    Raises:
        UserError: names the model.
    """
    if not float((alone - beside).norm()) <= 1e-4 * float(alone.norm()):
        raise UserError(
            f"{type(model).__name__} reads a text in another way where a longer one stands beside it, so texts cannot "
            "be read side by side; use another model, such as BERT"
        )


class Names:
    """Actions by their names, one behind the other, as a text (``Decoder``).

    Args:
        of: the names of a prompt's actions; an empty one shows nothing.
        between: what stands between two of them, by the prompt.
    """

    def __init__(
        self, of: Callable[[Prompt], Sequence[str]], between: Callable[[Prompt], str] = lambda prompt: " "
    ) -> None:
        self.of, self.between = of, between

    def stream(self, prompt: Prompt | None = None) -> _Named:
        """See ``Decoder``."""
        assert prompt is not None, "the names of actions are a prompt's"
        return _Named(self.of(prompt), self.between(prompt))


class _Named:
    """See ``TextStream``."""

    def __init__(self, names: Sequence[str], between: str, begun: bool = False) -> None:
        self.names, self.between, self.begun = names, between, begun

    def push(self, token_id: int) -> str:
        """The name of an action, behind what separates it from the one before."""
        name = self.names[token_id]
        found = self.between + name if self.begun and name else name
        self.begun = self.begun or bool(name)
        return found

    def flush(self) -> str:
        """Nothing is held back."""
        return ""

    def copy(self) -> _Named:
        """See ``TextStream``."""
        return _Named(self.names, self.between, self.begun)
