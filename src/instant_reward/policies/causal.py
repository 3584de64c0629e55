"""A causal language model as a policy."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch

from instant_reward.batch import Batch
from instant_reward.data import to_prompts
from instant_reward.policies import terms
from instant_reward.policies.head import Softmax
from instant_reward.policies.load import (
    Dtype,
    check_attention,
    check_head,
    check_words,
    compute_dtype,
    end_ids,
    load_beside,
    load_model,
    pad_id,
    with_lora,
)
from instant_reward.policies.memory import keep_freed_memory
from instant_reward.policies.policy import Policy
from instant_reward.policies.states import States
from instant_reward.types import Prompt

if TYPE_CHECKING:
    from instant_reward.sampling.draw import Settings
    from instant_reward.sampling.engine import Engine


class CausalPolicy(Policy):
    """A causal language model that can be sampled from and trained.

    On a processor it has the C library keep freed memory, for the whole process (``keep_freed_memory``).

    Args:
        model: a transformers causal model; its weights are the master weights.
        tokenizer: its tokenizer.
        compute: the dtype the matrix products run in; "bfloat16" keeps float32 master weights.
        adapter: the peft wrapper around ``model`` where only an adapter is trained.
    """

    states: States

    def __init__(
        self, model: Any, tokenizer: Any, compute: torch.dtype = torch.float32, adapter: Any = None, name: str = ""
    ) -> None:
        super().__init__(model, tokenizer, compute, adapter, name)
        check_words(model, tokenizer)
        self.end_ids = end_ids(model, tokenizer)
        self.pad_id = pad_id(tokenizer, self.end_ids)
        check_head(model)
        check_attention(model)
        if self.device.type == "cpu":
            keep_freed_memory()

    @property
    def context(self) -> int:
        """How many tokens the model can read at once; where its attention slides, what one window holds."""
        config = self.model.config
        slides = getattr(config, "use_sliding_window", True)
        limits = [config.sliding_window] if slides and getattr(config, "sliding_window", None) else []
        limits += [getattr(config, name, None) for name in ("max_position_embeddings", "n_positions")]
        return min((int(limit) for limit in limits if limit), default=2**31)

    def new_states(self) -> States:
        """See ``Learning``."""
        return States(self.compute)

    def engine(self, settings: Settings, version: int = 0) -> Engine:
        """See ``Policy``."""
        from instant_reward.sampling.engine import Engine

        return Engine(self, settings, version)

    def prompts(
        self, rows: Sequence[Mapping[str, Any]], column: str, room: int, most: int | None = None
    ) -> list[Prompt]:
        """See ``Policy``."""
        limit = min(self.context, most or self.context) - room
        return to_prompts(rows, self.tokenizer, column=column, max_tokens=limit)

    def actions_of(self, text: str, prompt: Prompt) -> list[int]:
        """See ``Policy``: the text's tokens and an end token, where there is one."""
        own = self.tokenizer.eos_token_id  # a model may know several ends: the tokenizer's is the one of a turn
        end = [own] if own is not None else list(self.end_ids[:1])
        return [*self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"], *end]

    def load_beside(self, name: str, what: str) -> Any:
        """See ``Learning``."""
        return load_beside(name, self.compute, str(self.device), self.tokenizer, what)

    def head(self, model: Any, batch: Batch, read: Batch | None = None) -> terms.Head:
        """See ``Learning``."""
        hidden = self.states.of_sampled(self.states.trunk(model), batch if read is None else read)
        head = self.output_head(model)
        softmax = Softmax(batch.temperature, self.end_ids if bool(batch.no_end.any()) else ())
        no_end = batch.no_end[batch.mask.bool()].to(hidden.device)
        shadow = self.states.products.shadow(head.weight)
        return terms.Head(hidden, head.weight, getattr(head, "bias", None), no_end, softmax, shadow)


def load_causal(name: str, dtype: Dtype, lora: Mapping[str, Any] | None, place: str) -> CausalPolicy:
    """See ``kinds.load_policy``."""
    compute = compute_dtype(dtype, place)
    model, tokenizer = load_model(name, compute, place)
    adapter = None
    if lora is not None:
        adapter = with_lora(model, **lora)
        model = adapter.base_model.model
    return CausalPolicy(model, tokenizer, compute, adapter, name)
