"""An encoder-decoder model as a policy: it reads a source, and writes a text from it.

The source is the prompt's ``context``; the flat sequence holds what the decoder reads and writes: its start token (and
the token that a config forces behind it), then the sampled ones.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch

from instant_reward.batch import Batch
from instant_reward.data import to_prompts
from instant_reward.policies import terms
from instant_reward.policies.encoder_decoder import EncoderDecoder, check_parts, output_bias, start_ids
from instant_reward.policies.head import Softmax
from instant_reward.policies.load import (
    SEQ2SEQ,
    Dtype,
    check_words,
    compute_dtype,
    end_ids,
    load_beside,
    load_model,
    pad_id,
    with_lora,
)
from instant_reward.policies.policy import Policy
from instant_reward.policies.sources import SourceStates
from instant_reward.types import Prompt, UserError

if TYPE_CHECKING:
    from instant_reward.sampling.draw import Settings
    from instant_reward.sampling.engine import Engine


class Seq2SeqPolicy(Policy):
    """An encoder-decoder model that can be sampled from and trained.

    Args:
        model: a transformers encoder-decoder model with a language-model head; its weights are the master weights.
        tokenizer: its tokenizer, of sources and of texts.
        compute: the dtype the matrix products run in; "bfloat16" keeps float32 master weights under autocast.
        adapter: the peft wrapper around ``model`` where only an adapter is trained.
    """

    states: SourceStates

    def __init__(
        self, model: Any, tokenizer: Any, compute: torch.dtype = torch.float32, adapter: Any = None, name: str = ""
    ) -> None:
        from instant_reward.sampling.seq2seq import check_decoding

        super().__init__(model, tokenizer, compute, adapter, name)
        check_parts(model)
        check_words(model, tokenizer)
        check_decoding(model)
        ends = end_ids(model, tokenizer)
        separator = getattr(tokenizer, "sep_token_id", None)  # what ends a text of a BERT
        self.end_ids = ends or (() if separator is None else (int(separator),))
        self.pad_id = pad_id(tokenizer, self.end_ids)
        self.starts = start_ids(model)

    @property
    def context(self) -> int:
        """How many tokens a source may have, and as many may be written; 2**31 where positions are relative."""
        return EncoderDecoder(self.model).limit

    def new_states(self) -> SourceStates:
        """See ``Learning``."""
        return SourceStates(self.compute)

    def engine(self, settings: Settings, version: int = 0) -> Engine:
        """See ``Policy``."""
        from instant_reward.sampling.engine import Engine

        return Engine(self, settings, version)

    def prompts(
        self, rows: Sequence[Mapping[str, Any]], column: str, room: int, most: int | None = None
    ) -> list[Prompt]:
        """See ``Policy``: the row's prompt is the source."""
        written = len(self.starts) + room
        if written > self.context:
            raise UserError(
                f"sampling.max_new_tokens: the decoder would have to read {written} tokens, its start included, and "
                f"reads {self.context}; ask for fewer"
            )
        limit = min(self.context, most or self.context)
        found = to_prompts(rows, self.tokenizer, column=column)
        for number, (prompt, row) in enumerate(zip(found, rows, strict=True)):
            if len(prompt.token_ids) > limit:
                where = getattr(row, "where", f"prompt {number}")
                raise UserError(
                    f"{where} has a source of {len(prompt.token_ids)} tokens, and the encoder may read {limit}: "
                    "shorten it, or leave that row out."
                )
        return [replace(prompt, token_ids=list(self.starts), context=prompt.token_ids) for prompt in found]

    def unprompted(self, rows: Sequence[Mapping[str, Any]]) -> list[Prompt]:
        """See ``Policy``: there is no source to write from."""
        raise UserError("data.column: an encoder-decoder writes from a source; name the column that holds it")

    def actions_of(self, text: str, prompt: Prompt) -> list[int]:
        """See ``Policy``: the text's tokens, as the tokenizer writes targets, and an end token, where there is one."""
        own = self.tokenizer.eos_token_id
        end = [own] if own is not None else list(self.end_ids[:1])
        return [*self.tokenizer(text_target=text, add_special_tokens=False, verbose=False)["input_ids"], *end]

    def load_beside(self, name: str, what: str) -> Any:
        """See ``Learning``."""
        model = load_beside(name, self.compute, str(self.device), self.tokenizer, what, seq2seq=True)
        starts = start_ids(model)
        if starts != self.starts:
            raise UserError(
                f"{what}: {name} begins its texts with the tokens {starts} and the policy with {self.starts}, so it "
                "cannot read the policy's; use another"
            )
        return model

    def head(self, model: Any, batch: Batch, read: Batch | None = None) -> terms.Head:
        """See ``Learning``."""
        hidden = self.states.of_sampled(self.states.trunk(model), batch if read is None else read)
        softmax = Softmax(batch.temperature, self.end_ids if bool(batch.no_end.any()) else ())
        no_end = batch.no_end[batch.mask.bool()].to(hidden.device)
        return terms.Head(hidden, self.output_head(model).weight, output_bias(model), no_end, softmax)


def load_seq2seq(name: str, dtype: Dtype, lora: Mapping[str, Any] | None, place: str) -> Seq2SeqPolicy:
    """See ``kinds.load_policy``."""
    compute = compute_dtype(dtype, place)
    model, tokenizer = load_model(name, compute, place, SEQ2SEQ)
    adapter = None
    if lora is not None:
        adapter = with_lora(model, task="SEQ_2_SEQ_LM", **lora)
        model = adapter.base_model.model
    return Seq2SeqPolicy(model, tokenizer, compute, adapter, name)
