"""Hidden states that predict the sampled tokens, out of a model's trunk; and values per token back on the batch."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, Protocol

import torch
from torch import Tensor

from instant_reward.batch import Batch
from instant_reward.policies import recurrent
from instant_reward.policies.layout import lay_out
from instant_reward.policies.packed import pack
from instant_reward.policies.trunk import Trained, Trunk, trunk_of


class Reader(Protocol):
    """Reads batches with the trunks of models: a policy's, its reference's, a critic's."""

    def trunk(self, model: Any) -> Any:
        """The model without its output head."""

    def width(self, base: Any) -> int:
        """How wide the states of a trunk are."""

    def of_sampled(self, base: Any, batch: Batch) -> Tensor:
        """The state that each sampled action is chosen from, ``[N, D]``, in the order of ``mask.nonzero()``."""


def trunk(model: Any) -> Any:
    """The model without its output head."""
    return getattr(model, model.base_model_prefix)


class States:
    """Reads batches with the trunks of models: by this library's own functions where these say the same (``trunk_of``),
    else by the models' forward pass.

    Args:
        compute: the dtype of the matrix products.
    """

    def __init__(self, compute: torch.dtype) -> None:
        self.compute = compute
        self.products = Trained(compute)
        self._trunks: dict[int, tuple[Any, Trunk | None]] = {}

    def trunk(self, model: Any) -> Any:
        """See ``Reader``."""
        return trunk(model)

    def width(self, base: Any) -> int:
        """See ``Reader``."""
        return int(base.config.hidden_size)

    def of_sampled(self, base: Any, batch: Batch) -> Tensor:
        """See ``Reader``: the states that predict the sampled tokens."""
        if isinstance(base, recurrent.RecurrentTrunk):
            return recurrent.of_sampled(base, batch, self.products)
        if _drops_out(base):  # first: a probe would draw random numbers and differ
            return _by_forward_pass(base, batch, self.compute)
        known = self._trunks.get(id(base))
        if known is None:  # the model is kept beside its trunk, so that its id stays its own
            known = self._trunks[id(base)] = (base, trunk_of(base, self.products))
        if known[1] is None:
            return _by_forward_pass(base, batch, self.compute)
        device = next(base.parameters()).device
        packed = pack(batch)
        rows = [one.to(device) for one in packed.rows]
        states = known[1].causal(packed.ids.to(device), packed.positions.to(device), rows)
        return states[packed.states.to(device)]


def _drops_out(base: Any) -> bool:
    """Whether the model drops out states, which this library's own functions do not."""
    if not base.training:
        return False
    attention = getattr(base.config, "attention_dropout", 0.0) or 0.0  # Llama's is no module
    return attention > 0 or any(isinstance(one, torch.nn.Dropout) and one.p > 0 for one in base.modules())


def _by_forward_pass(base: Any, batch: Batch, compute: torch.dtype) -> Tensor:
    device = next(base.parameters()).device
    layout = lay_out(batch)
    attention = None if layout.attention_mask is None else layout.attention_mask.to(device)
    with torch.autocast(device.type, torch.bfloat16, enabled=compute == torch.bfloat16):
        states = base(
            input_ids=layout.input_ids.to(device),
            position_ids=layout.position_ids.to(device),
            attention_mask=attention,
            use_cache=False,
        ).last_hidden_state
    hidden: Tensor = states[layout.rows.to(device), layout.columns.to(device)]
    return hidden.to(torch.bfloat16) if compute == torch.bfloat16 else hidden


def on_tokens(values: Tensor, mask: Tensor) -> Tensor:
    """Values of the sampled tokens, ``[N]`` or ``[N, K]``, as ``[B, L]`` or ``[B, K, L]``; 0 elsewhere."""
    on = mask.bool()
    at = on.nonzero(as_tuple=True)
    values = values.to(on.device)
    empty = torch.zeros(*on.shape, *values.shape[1:], dtype=values.dtype, device=on.device)
    filled = empty.index_put(at, values)
    return filled if values.dim() == 1 else filled.permute(0, 2, 1)


def after_the_end(batch: Batch, pad_id: int) -> Batch:
    """The texts that were cut off, each with one token more, the only one under the mask: its state has read it all."""
    cut = batch.select(batch.cut_off.nonzero().flatten().tolist())
    rows, longest = cut.token_ids.shape
    column = torch.arange(longest + 1).expand(rows, -1)
    last = column == cut.length[:, None]
    padded = torch.nn.functional.pad(cut.token_ids, (0, 1), value=pad_id)
    return replace(
        cut,
        token_ids=torch.where(last, pad_id, padded),
        mask=last,
        versions=torch.zeros_like(padded),
        old_logprobs=torch.zeros(rows, longest + 1, dtype=cut.old_logprobs.dtype),
        no_end=torch.zeros_like(last),
        length=cut.length + 1,
        shown=None,
    )
