"""How an encoder-decoder model reads a batch: each source once, the texts written from it side by side."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from instant_reward.batch import Batch
from instant_reward.policies.encoder_decoder import EncoderDecoder
from instant_reward.types import UserError


class SourceStates:
    """See ``states.Reader``. The encoder runs once for each source, and siblings share what it says.

    Args:
        compute: the dtype of the matrix products.
    """

    def __init__(self, compute: torch.dtype) -> None:
        self.compute = compute

    def trunk(self, model: Any) -> EncoderDecoder:
        """See ``Reader``."""
        return EncoderDecoder(model)

    def width(self, base: EncoderDecoder) -> int:
        """See ``Reader``."""
        return base.width

    def of_sampled(self, base: EncoderDecoder, batch: Batch) -> Tensor:
        """See ``Reader``: the states that predict the sampled tokens.

        Rows are padded on the right, where the decoder's causal attention never looks from the left: which tokens are
        padding is told by lengths alone (the padding token may also begin a text, as T5's does).
        """
        if batch.contexts is None or any(context is None for context in batch.contexts):
            raise UserError(
                "these texts have no sources for the encoder to read; name their column by data.column, give logprobs "
                "contexts= (a list of token ids a row), or take texts that a policy of this kind wrote"
            )
        device = next(base.parameters()).device
        sources, source_of = distinct(batch.contexts)
        ids, look = padded(sources, device)
        length = max(1, batch.token_ids.shape[1] - 1)  # the last token predicts nothing that was sampled
        at = torch.tensor(source_of, device=device)
        rows, columns = batch.mask.bool().nonzero(as_tuple=True)
        with torch.autocast(device.type, torch.bfloat16, enabled=self.compute == torch.bfloat16):
            encoded = base.read(ids, look)[at]
            heard = None if look is None else look[at]
            states = base.write(batch.token_ids[:, :length].to(device), encoded, heard, use_cache=False)[0]
        hidden: Tensor = states[rows.to(device), columns.to(device) - 1]
        return hidden.to(torch.bfloat16) if self.compute == torch.bfloat16 else hidden


def distinct(contexts: Sequence[Sequence[int]]) -> tuple[list[Sequence[int]], list[int]]:
    """The sources that differ, and which of them each row has."""
    number: dict[tuple[int, ...], int] = {}
    rows = [number.setdefault(tuple(context), len(number)) for context in contexts]
    return list(number), rows


def padded(sources: Sequence[Sequence[int]], device: torch.device) -> tuple[Tensor, Tensor | None]:
    """Sources as ``[S, E]``, right-padded, and a mask of what they hold; no mask where all are of one length."""
    lengths = torch.tensor([len(source) for source in sources])
    longest = int(lengths.max())
    ids = torch.zeros(len(sources), longest, dtype=torch.long)
    for row, source in enumerate(sources):
        ids[row, : len(source)] = torch.tensor(source)
    look = torch.arange(longest) < lengths[:, None]
    return ids.to(device), None if bool(look.all()) else look.to(device)
