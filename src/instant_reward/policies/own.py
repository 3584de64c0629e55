"""What the library's own language models share: embeddings, an output head, and how transformers finds them."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast

from instant_reward.types import UserError


def check_share(model: str, dropout: float) -> None:
    """Refuses a dropout that is no share of all values."""
    if not 0.0 <= dropout < 1.0:
        raise UserError(f"{model}: dropout={dropout!r} must be at least 0 and below 1")


class OwnTrunk(PreTrainedModel):  # type: ignore[no-untyped-call]
    """Token ids to the states that the output head reads; ``forward`` returns them as ``last_hidden_state``."""

    base_model_prefix = "trunk"
    _supports_sdpa = True

    def __init__(self, config: PretrainedConfig) -> None:
        super().__init__(config)
        self.tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.dropout = nn.Dropout(config.dropout)

    def get_input_embeddings(self) -> nn.Module:
        """The table of the tokens."""
        return self.tokens

    def set_input_embeddings(self, value: Any) -> None:
        """Puts another table in its place."""
        self.tokens = value


class OwnModel(PreTrainedModel):  # type: ignore[no-untyped-call]
    """A trunk and its output head, with nothing behind the head.

    Attributes:
        trunk_class: the kind of trunk.
    """

    base_model_prefix = "trunk"
    trunk_class: type[OwnTrunk]
    _supports_sdpa = True
    _tied_weights_keys = {"head.weight": "trunk.tokens.weight"}  # noqa: RUF012

    def __init__(self, config: PretrainedConfig) -> None:
        super().__init__(config)
        self.trunk = self.trunk_class(config)
        self.head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()  # type: ignore[no-untyped-call]

    def get_output_embeddings(self) -> nn.Module:
        """The head."""
        return self.head

    def set_output_embeddings(self, new_embeddings: Any) -> None:
        """Puts another head in its place."""
        self.head = new_embeddings

    def forward(self, input_ids: Tensor, **options: Any) -> CausalLMOutputWithPast:
        """The logits ``[R, Q, V]`` of what follows each token; the options are the trunk's."""
        out = self.trunk(input_ids, **options)
        return CausalLMOutputWithPast(logits=self.head(out.last_hidden_state), past_key_values=out.past_key_values)
