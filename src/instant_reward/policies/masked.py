"""A masked language model as a policy: it fills masks, or edits a text, in an order that it chooses itself.

Action ``t`` is a place and a token, drawn together: ``log p(place | text) + log p(token | place, text)``, where the
text is the context with the ``t`` fills before it. The places' scores come from a linear layer on the model's states,
which begins at 0: a model that was only pre-trained fills in random order, and learns a better one. The tokens' scores
come from the model's own head. It reads the whole text anew for each action: nothing can be kept from fill to fill.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from instant_reward import models
from instant_reward.batch import Batch
from instant_reward.policies.decisions import PLAIN, DecisionPolicy, Steps, cell, check_company, decided
from instant_reward.policies.drafts import STOP, DraftDecoder, Slots
from instant_reward.policies.fills import Fills, reading, states_of
from instant_reward.policies.head import Softmax
from instant_reward.policies.load import (
    Dtype,
    check_words,
    compute_dtype,
    load_model,
    master,
    read_folder,
    weights_in,
    with_lora,
)
from instant_reward.text import Decoder
from instant_reward.types import Prompt, UserError

if TYPE_CHECKING:
    from instant_reward.sampling.decisions import DecisionSampler
    from instant_reward.sampling.draw import Settings

DTYPES: dict[torch.dtype, Dtype] = {
    torch.float32: "float32",
    torch.float64: "float64",
    torch.bfloat16: "bfloat16",
}
PROBE = 4  # tokens more has the longer text of two
ORDER = "order"  # the layer that scores places, under this name among the model's own


class Drafts:
    """Reads texts that are being filled with the trunks of masked models (``Reader``)."""

    def __init__(self, slots: Slots, pad_id: int, compute: torch.dtype) -> None:
        self.slots, self.pad_id, self.compute = slots, pad_id, compute

    def trunk(self, model: Any) -> Any:
        """See ``Reader``."""
        return model.base_model

    def width(self, base: Any) -> int:
        """See ``Reader``."""
        return int(base.config.hidden_size)

    def of_sampled(self, base: Any, batch: Batch) -> Tensor:
        """See ``Reader``: the state of the first token."""
        contexts, steps = decided(batch, base.device)
        texts = [contexts[row] for row in steps.rows.tolist()]
        read = reading(self.slots, texts, steps.before, self.pad_id, base.device)
        with torch.autocast(base.device.type, torch.bfloat16, enabled=self.compute == torch.bfloat16):
            states: Tensor = base(input_ids=read.ids, attention_mask=read.there)[0]
        return states[read.texts, 0]


class MaskedPolicy(DecisionPolicy):
    """A masked language model that fills or edits texts.

    Args:
        model: a transformers masked model, BERT's shape or another's; a layer for the places joins it.
        tokenizer: its tokenizer, with a mask token.
        compute: the dtype of the matrix products.
        adapter: the peft wrapper around ``model`` where only an adapter and the layer for the places are trained.
        edits: whether every token of a text may be changed, and changed again, until the model stops; else each mask is
            filled once. Without it, what the model's config says (``edits``), or false.
    """

    same_actions = False

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        compute: torch.dtype = torch.float32,
        adapter: Any = None,
        name: str = "",
        edits: bool | None = None,
    ) -> None:
        self.pads = int(next((i for i in (tokenizer.pad_token_id, tokenizer.mask_token_id) if i is not None), 0))
        check(model.eval(), tokenizer, self.pads)
        if not hasattr(model, ORDER):
            add_order(model)
        edits = bool(getattr(model.config, "edits", False)) if edits is None else edits
        model.config.edits = edits  # a saved model is loaded as the same policy
        self.slots = Slots(tokenizer, len(model.get_output_embeddings().weight), edits)
        self.end_ids = (STOP,) if edits else ()
        super().__init__(model, tokenizer, compute, adapter, name)

    @property
    def context(self) -> int:
        """How many tokens the model can read at once."""
        config = self.model.config
        taken = 1 + config.pad_token_id if config.model_type in ("roberta", "xlm-roberta", "camembert") else 0
        return int(config.max_position_embeddings) - taken  # RoBERTa counts positions from behind the pad token's id

    def actions_in(self, model: Any) -> int:
        """See ``Learning``: stopping, and every token at every place of the longest text."""
        return 1 + self.context * len(model.get_output_embeddings().weight)

    def new_states(self) -> Drafts:
        """See ``Learning``."""
        return Drafts(self.slots, self.pads, self.compute)

    def engine(self, settings: Settings, version: int = 0) -> DecisionSampler:
        """See ``Policy``."""
        if settings.stop:
            raise UserError(
                "sampling.stop: a masked model fills a text in no fixed order, so no string ends it; leave it out"
            )
        return super().engine(settings, version)

    def load_beside(self, name: str, what: str) -> Any:
        """See ``Learning``: another masked model with the same tokens."""
        other = load_masked(name, DTYPES[self.compute], None, str(self.device))
        if other.tokenizer.get_vocab() != self.tokenizer.get_vocab():
            raise UserError(
                f"{what}: {name} has another tokenizer than the policy, so it cannot read its tokens; use another"
            )
        return other.model.requires_grad_(False)

    def read(self, model: Any, contexts: Sequence[Any]) -> Sequence[Any]:
        """See ``DecisionPolicy``: nothing, a fill changes what is read of all of a text."""
        return contexts

    def choose(
        self, model: Any, encoded: Sequence[Any], steps: Steps, no_end: Tensor, softmax: Softmax = PLAIN
    ) -> Fills:
        """See ``DecisionPolicy``."""
        texts = [encoded[row] for row in steps.rows.tolist()]
        read = reading(self.slots, texts, steps.before, self.pads, self.device)
        with self.autocast():
            hidden, ready = states_of(model, read.ids, read.there)
            scores = model.order(hidden)
        wide = scores if scores.dtype == torch.float64 else scores.float()
        rows = torch.arange(len(read.ids), device=self.device)[:, None]
        stop = wide[:, 0, 1:].masked_fill(torch.tensor(not self.slots.edits, device=self.device), -torch.inf)
        places = wide[rows, read.index, 0].masked_fill(~read.free, -torch.inf)
        head = model.get_output_embeddings()
        return Fills(
            hidden=hidden[read.texts, 0],
            texts=read.texts,
            places=torch.cat([stop, places], 1),
            states=ready[rows, read.index],
            weight=head.weight,
            bias=getattr(head, "bias", None),
            no_end=no_end,
            temperature=softmax.temperature,
            forbidden=self.slots.forbidden,
        )

    def over(self, actions: Sequence[int], prompt: Prompt) -> bool:
        """See ``Policy``: all masks are filled, or the editor stopped."""
        assert prompt.context is not None, "the prompt is none of this policy's"
        return self.slots.over(prompt.context, actions)

    def decoder(self) -> Decoder:
        """See ``Policy``: the whole text after each fill."""
        return DraftDecoder(self.slots)

    def prompts(
        self, rows: Sequence[Mapping[str, Any]], column: str, room: int, most: int | None = None
    ) -> list[Prompt]:
        """See ``Policy``: a row's text has the tokenizer's mask token where something is missing."""
        limit = min(self.context, most or self.context)
        return [self._prompt(row, column, number, limit, room) for number, row in enumerate(rows)]

    def unprompted(self, rows: Sequence[Mapping[str, Any]]) -> list[Prompt]:
        """See ``Policy``: there is nothing to fill."""
        raise UserError(
            "data.column: a masked model fills the masks of a text; name the column of such texts, or have masks put "
            "into the texts of data.completion by data.masks"
        )

    def _prompt(self, row: Mapping[str, Any], column: str, number: int, limit: int, room: int) -> Prompt:
        where, text = cell(row, column, number)
        if not isinstance(text, str):
            raise UserError(f"{where} has a {type(text).__name__} for a text: give text.")
        ids = list(self.tokenizer(text, verbose=False)["input_ids"])
        places = self.slots.places(ids)
        if not places:
            what = "no token" if self.slots.edits else f"no {self.tokenizer.mask_token}"
            raise UserError(f"{where} has a text with {what} to be written at: add one, or leave that row out.")
        if len(ids) > limit:
            raise UserError(f"{where} has a text of {len(ids)} tokens, and the model reads {limit}: shorten it.")
        if room and not self.slots.edits and len(places) > room:
            raise UserError(
                f"{where} has a text with {len(places)} masks, and {room} fills are allowed: raise "
                "sampling.max_new_tokens, or leave that row out."
            )
        info = {key: value for key, value in row.items() if key not in (column, "id")}
        return Prompt(id=str(row.get("id", number)), text=text, token_ids=[], info=info, context=ids)

    def actions_of(self, text: str, prompt: Prompt) -> list[int]:
        """See ``Policy``: the fills that make this text of the prompt's, from left to right.

        Raises:
            UserError: where it has other tokens than the prompt at places that stay.
        """
        assert prompt.context is not None, "the prompt is none of this policy's"
        return self.slots.fills(prompt.context, self.tokenizer(text)["input_ids"], f"prompt {prompt.id}: its text")


def check(model: Any, tokenizer: Any, pad: int) -> None:
    """Refuses a model whose tokens' logits are not its output head's or that does not read texts side by side, and a
    tokenizer that knows no mask or that does not fit.

    Raises:
        UserError: says which.
    """
    if tokenizer.mask_token_id is None:
        raise UserError("the tokenizer of this masked model has no mask token; give it one (mask_token)")
    check_words(model, tokenizer)
    head, device = model.get_output_embeddings(), model.device
    ids = torch.full((1, 2), tokenizer.mask_token_id, device=device)
    longer = torch.full((2, 2 + PROBE), tokenizer.mask_token_id, device=device)
    longer[0, 2:] = pad
    there = torch.ones_like(longer)
    there[0, 2:] = 0
    with torch.no_grad():
        whole = model(input_ids=ids).logits
        states = states_of(model, ids, torch.ones_like(ids))[1]
        plain = nn.functional.linear(states, head.weight, getattr(head, "bias", None))
        beside = states_of(model, longer, there)[1][:1, :2]
    if not torch.allclose(whole, plain, atol=1e-3, rtol=1e-3):
        raise UserError(
            f"{type(model).__name__} changes its logits after the output head, which is not supported; use another "
            "model"
        )
    check_company(model, states, beside)


def add_order(model: Any) -> None:
    """Gives a masked model the layer that scores places and stopping; it begins at 0: all alike."""
    layer = nn.Linear(model.config.hidden_size, 2, dtype=next(model.parameters()).dtype, device=model.device)
    nn.init.zeros_(layer.weight)
    nn.init.zeros_(layer.bias)
    model.add_module(ORDER, layer)


def load_masked(name: str, dtype: Dtype, lora: Mapping[str, Any] | None, place: str) -> MaskedPolicy:
    """See ``kinds.load_policy``: a folder that this library wrote also holds the layer for the places."""
    from safetensors.torch import load_file
    from transformers import AutoConfig, AutoModelForMaskedLM, AutoTokenizer

    compute, folder = compute_dtype(dtype, place), models.locate(name)
    weights = folder / "model.safetensors"
    stored = read_folder(weights, load_file) if weights.is_file() else {}

    def own(_: Any) -> Any:
        config = AutoConfig.from_pretrained(folder)
        made = AutoModelForMaskedLM.from_config(config, dtype=master(compute))  # type: ignore[no-untyped-call]
        add_order(made)
        read = weights_in(folder, made, dict(made.named_parameters()))
        made.load_state_dict(read, strict=False)  # of weights that are tied the second name is missing
        return made

    if f"{ORDER}.weight" in stored:
        tokenizer = read_folder(folder, AutoTokenizer.from_pretrained)
        model = read_folder(folder, own).to(place)
    else:
        model, tokenizer = load_model(name, compute, place, "AutoModelForMaskedLM")
        add_order(model)
    adapter = None if lora is None else masked_with_lora(model, lora)
    return MaskedPolicy(model, tokenizer, compute, adapter, name)


def masked_with_lora(model: Any, options: Mapping[str, Any]) -> Any:
    """The model in a peft wrapper that adapts it; the layer for the places, which begins at 0, is trained in full."""
    return with_lora(model, task=None, whole=[ORDER], **options)
