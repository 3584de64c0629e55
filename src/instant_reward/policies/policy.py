"""What every policy is: something that samples, and learns from what it sampled.

A kind of policy says how its model reads a batch (``head``), what samples from it (``engine``), and how rows of data
become prompts; the rest is here and in ``Learning``, once.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from instant_reward.batch import Batch
from instant_reward.credit import Marks
from instant_reward.policies.learning import Learning
from instant_reward.text import Decoder, TextDecoder
from instant_reward.types import Message, Prompt, Rollout, UserError

if TYPE_CHECKING:
    from instant_reward.sampling.draw import Settings
    from instant_reward.sampling.sampler import Sampler


class Policy(Learning):
    """A model that writes or decides, to be sampled from and trained.

    Attributes:
        labels: what it decides among, where that is the same for all prompts.
    """

    labels: Sequence[str] = ()

    @property
    @abstractmethod
    def context(self) -> int:
        """How many tokens the model can read at once, those that it writes included."""

    @abstractmethod
    def engine(self, settings: Settings, version: int = 0) -> Sampler:
        """What samples from this policy as it is now."""

    @abstractmethod
    def prompts(
        self, rows: Sequence[Mapping[str, Any]], column: str, room: int, most: int | None = None
    ) -> list[Prompt]:
        """The prompts of rows of data.

        Args:
            column: where a row has its prompt.
            room: so many tokens will be written behind it.
            most: a bound on what may be read, below ``context``.

        Raises:
            UserError: names the row where a prompt cannot be used.
        """

    def unprompted(self, rows: Sequence[Mapping[str, Any]]) -> list[Prompt]:
        """Prompts for texts that begin from nothing: the opening token alone, with the row's columns as info.

        Raises:
            UserError: where the tokenizer has no token to begin with.
        """
        opening = [getattr(self.tokenizer, name, None) for name in ("bos_token_id", "eos_token_id")]
        first = next((token for token in (*opening, *self.end_ids) if token is not None), None)
        if first is None:
            raise UserError(
                "data.column: the model has neither a beginning nor an end token to start a text from; name a column "
                "with prompts"
            )
        return [
            Prompt(str(row.get("id", number)), "", [int(first)], info={k: v for k, v in row.items() if k != "id"})
            for number, row in enumerate(rows)
        ]

    @abstractmethod
    def actions_of(self, text: str, prompt: Prompt) -> list[int]:
        """The actions that write a text behind a prompt, the end's included.

        Raises:
            UserError: where the policy cannot write it.
        """

    def over(self, actions: Sequence[int], prompt: Prompt) -> bool:
        """Whether a text has ended by itself with the last of its actions (at least one)."""
        return actions[-1] in self.end_ids

    def decoder(self) -> Decoder:
        """What makes text of the actions."""
        return TextDecoder(self.tokenizer)

    def sample(
        self,
        prompts: Sequence[str | list[Message] | Mapping[str, Any]],
        per_prompt: int = 1,
        max_new_tokens: int = 32,
        temperature: float = 1.0,
        top_p: float = 1.0,
        rewards: Sequence[Any] = (),
        seed: int = 0,
        *,
        top_k: int = 0,
        min_new_tokens: int = 0,
        stop: Sequence[str] = (),
        rows: int = 64,
        guide: float = 0.0,
    ) -> list[Rollout]:
        """Samples texts and scores them while they are written.

        Args:
            prompts: a string is continued as it stands, a list of messages goes through the chat template, a mapping
                has its prompt under "prompt" and other columns beside it.
            per_prompt: siblings of each prompt; they share ``group``.
            temperature: 0 takes the likeliest token.
            rewards: what scores the texts.
            seed: the same seed draws the same texts.
            rows: texts decoded side by side.
            guide: adds so many times the critic's Q - V to the logits, for a policy trained by "ilql".

        Returns:
            ``len(prompts) * per_prompt`` rollouts, siblings next to each other.

        Raises:
            UserError: where a prompt is empty or too long, or a setting is out of range.
            RewardError: where a reward fails.
        """
        from instant_reward.sampling.draw import Settings
        from instant_reward.sampling.sampler import in_order

        if isinstance(prompts, str | Mapping):
            raise UserError(f"sample: prompts must be a list, not one {type(prompts).__name__}; wrap it in [ ]")
        settings = Settings(
            max_new_tokens=max_new_tokens,
            min_new_tokens=min_new_tokens,
            temperature=temperature,
            top_p=top_p,
            top_k=top_k,
            stop=(stop,) if isinstance(stop, str) else tuple(stop),
            rows=rows,
            guide=guide,
        )
        table = [dict(prompt) if isinstance(prompt, Mapping) else {"prompt": prompt} for prompt in prompts]
        ready = self.prompts(table, "prompt", max_new_tokens)
        return in_order(self.engine(settings).stream(ready, per_prompt, rewards=rewards, seed=seed))

    def logprobs(
        self,
        token_ids: Any,
        mask: Any,
        length: Any = None,
        temperature: float = 1.0,
        *,
        contexts: Sequence[list[Any]] | None = None,
    ) -> Tensor:
        """``log p(x_t | x_<t)`` of the tokens under the mask.

        Args:
            token_ids: int ``[B, L]``, right-padded.
            mask: bool or 0/1 ``[B, L]``; off at each row's first token, which nothing precedes (but for decisions).
            length: ``[B]``, the rows' lengths; without it, rows end with their last masked token.
            temperature: the logits are divided by it.
            contexts: what the policy reads besides, one a row (``Prompt.context``).

        Returns:
            ``[B, L]`` with gradient; 0 where the mask is off.
        """
        ids, on = torch.as_tensor(token_ids).cpu().long(), torch.as_tensor(mask).cpu().bool()
        if not 0.0 < temperature < math.inf:
            raise UserError(f"logprobs: temperature={temperature!r} must be above 0")
        if ids.dim() != 2 or ids.shape != on.shape:
            raise UserError(f"logprobs: token_ids {tuple(ids.shape)} and mask {tuple(on.shape)} must both be [B, L]")
        if bool(on[:, 0].any()) and not self.begins_empty:
            raise UserError(
                "logprobs: the mask is on at a row's first token, which nothing precedes; switch it off there"
            )
        last = torch.arange(1, ids.shape[1] + 1).expand_as(ids)
        ends = torch.where(on, last, torch.ones_like(last)).amax(1)
        lengths = ends if length is None else torch.as_tensor(length).cpu().long()
        if bool((lengths < ends).any()):
            raise UserError("logprobs: the mask is on beyond a row's length; shorten the mask or correct the length")
        if contexts is not None and len(contexts) != len(ids):
            raise UserError(f"logprobs: contexts has {len(contexts)} entries for {len(ids)} rows; give one a row")
        batch = replace(_bare_batch(ids, on, lengths, temperature), contexts=None if contexts is None else [*contexts])
        return self.token_logprobs(self.head(self.model, batch), batch).logprobs


def _bare_batch(ids: Tensor, on: Tensor, lengths: Tensor, temperature: float) -> Batch:
    rows = ids.shape[0]
    none = torch.zeros(0, dtype=torch.long)
    return Batch(
        token_ids=ids,
        mask=on,
        versions=torch.zeros_like(ids),
        old_logprobs=torch.zeros(ids.shape),
        no_end=torch.zeros_like(on),
        length=lengths,
        prompt_length=torch.ones(rows, dtype=torch.long),
        group=torch.arange(rows),
        cut_off=torch.zeros(rows, dtype=torch.bool),
        sources=[],
        marks=Marks(none, none, none, none, none, torch.zeros(0)),
        temperature=temperature,
        text_count=rows,
        token_count=int(on.sum()),
    )
