"""An LSTM or GRU language model in plain PyTorch: its shape, its weights, and how it reads texts.

A group's prompt is read once and its siblings go on from the state behind it. There is no limit to a text's length.

**Products in bfloat16**: of the inputs, of the carried state and of the output head, where the policy computes in it;
states, gates and their gradients stay float32 (float64 in a float64 model), so that nothing that is carried from token
to token is rounded. torch's own recurrent layers have no bfloat16 with gradient on a processor; these do not use them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig
from transformers.modeling_outputs import BaseModelOutputWithPast

from instant_reward.batch import Batch
from instant_reward.policies.layout import sampled_span, sibling_rows
from instant_reward.policies.own import OwnModel, OwnTrunk, check_share
from instant_reward.policies.recurrence import GATES, PARTS, Recurrence, State, Steps, run
from instant_reward.policies.trunk import Products, Trained
from instant_reward.types import UserError


class RecurrentConfig(PretrainedConfig):  # type: ignore[no-untyped-call]
    """The shape of a ``RecurrentModel``.

    Args:
        vocab_size: V, of the tokenizer.
        cell: "lstm" or "gru".
        hidden_size: D, of the embeddings and of the states that the output head reads.
        cell_size: C, of the cells; without it ``hidden_size``. Where it differs, a projection lies behind the cells.
        num_hidden_layers: cells on top of each other.
        dropout: the share of values dropped behind the embeddings and behind each layer; in supervised training only,
            since a policy runs without.
        tie_word_embeddings: the output head is the embeddings' own matrix (Press and Wolf, 2017).
        initializer_range: the deviation of the first embeddings and of the head.

    Raises:
        UserError: where the cell is unknown or ``dropout`` is no share.
    """

    model_type = "recurrent"

    def __init__(
        self,
        vocab_size: int = 8192,
        cell: str = "lstm",
        hidden_size: int = 256,
        cell_size: int | None = None,
        num_hidden_layers: int = 2,
        dropout: float = 0.0,
        initializer_range: float = 0.05,
        tie_word_embeddings: bool = True,
        bos_token_id: int | None = None,
        eos_token_id: int | list[int] | None = None,
        pad_token_id: int | None = None,
        **others: Any,
    ) -> None:
        if cell not in GATES:
            raise UserError(f"recurrent: cell={cell!r} is unknown; use one of {', '.join(GATES)}")
        check_share("recurrent", dropout)
        self.vocab_size, self.cell, self.num_hidden_layers = vocab_size, cell, num_hidden_layers
        self.hidden_size, self.cell_size = hidden_size, cell_size or hidden_size
        self.dropout, self.initializer_range = dropout, initializer_range
        self.tie_word_embeddings = tie_word_embeddings
        self.bos_token_id, self.eos_token_id, self.pad_token_id = bos_token_id, eos_token_id, pad_token_id
        super().__init__(**others)


class Layer(nn.Module):
    """The weights of a layer: of its inputs, and of the state that it carries."""

    def __init__(self, cell: str, inputs: int, width: int) -> None:
        super().__init__()
        self.cell = cell
        self.inputs = nn.Linear(inputs, GATES[cell] * width)
        # A GRU's reset gate scales what the state says of the candidate, bias included; in an LSTM two would be one.
        self.carried = nn.Linear(width, GATES[cell] * width, bias=cell == "gru")

    @torch.no_grad()
    def begin(self) -> None:
        """The first weights, gate by gate: an LSTM begins by keeping what it carries (Jozefowicz et al., 2015)."""
        width = self.carried.in_features
        for weight in torch.split(self.inputs.weight, width):
            nn.init.xavier_uniform_(weight)
        for weight in torch.split(self.carried.weight, width):
            nn.init.orthogonal_(weight)
        if self.cell == "lstm":
            nn.init.ones_(self.inputs.bias[2 * width : 3 * width])


class RecurrentTrunk(OwnTrunk):  # type: ignore[no-untyped-call]
    """Layers on top of each other, then a projection where their width is not the embeddings'."""

    config_class = RecurrentConfig

    def __init__(self, config: RecurrentConfig) -> None:
        super().__init__(config)
        width, inner = config.hidden_size, config.cell_size
        self.layers = nn.ModuleList(
            [Layer(config.cell, inner if number else width, inner) for number in range(config.num_hidden_layers)]
        )
        self.projection = nn.Linear(inner, width) if inner != width else None
        self.post_init()  # type: ignore[no-untyped-call]
        # Not in transformers' hook for it, which passes over modules that have no weights but their parts'.
        for layer in self.layers:
            layer.begin()  # type: ignore[operator]

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        past_key_values: list[State] | None = None,
        use_cache: bool = False,
        **_: Any,
    ) -> BaseModelOutputWithPast:
        """The states ``[R, Q, D]`` of right-padded ``input_ids [R, Q]``.

        Args:
            attention_mask: 1 and 0 ``[R, Q]``; only looked at to refuse what is padded on the left.
            past_key_values: the states behind what was read before, by layer; with ``use_cache`` they come back.
        """
        if attention_mask is not None and bool((attention_mask.long().diff(dim=-1) > 0).any()):
            raise ValueError("a recurrent model reads what stands on the left first: pad on the right")
        rows, length = input_ids.shape
        reader = Recurrent(self, Trained(self.tokens.weight.dtype))
        start = reader.nothing(rows) if past_key_values is None else past_key_values
        states, carried = reader(input_ids.t().reshape(-1), start, [rows] * length)
        last = [tuple(part[-rows:] for part in layer) for layer in carried]
        return BaseModelOutputWithPast(
            last_hidden_state=states.view(length, rows, -1).transpose(0, 1),
            past_key_values=last if use_cache else None,  # type: ignore[arg-type]
        )


class RecurrentModel(OwnModel):  # type: ignore[no-untyped-call]
    """The trunk and its output head."""

    config_class = RecurrentConfig
    trunk_class = RecurrentTrunk


class Recurrent:
    """Reads tokens with a trunk's weights, for training and for decoding alike.

    Args:
        trunk: its weights are read at every call, through ``products``.
    """

    def __init__(self, trunk: RecurrentTrunk, products: Products) -> None:
        self.trunk, self.dtype = trunk, products.dtype
        self.layers: list[Any] = list(trunk.layers)
        self.inputs = [products.of([layer.inputs]) for layer in self.layers]
        self.carried = [products.of([layer.carried]) for layer in self.layers]
        self.projection = None if trunk.projection is None else products.of([trunk.projection])
        self.wide = torch.float64 if trunk.tokens.weight.dtype == torch.float64 else torch.float32

    def __call__(self, ids: Tensor, start: Sequence[State], counts: Sequence[int]) -> tuple[Tensor, list[State]]:
        """The states ``[N, D]`` behind ``ids [N]`` (in the order of ``Steps``), and each layer's own, ``[N, C]``.

        Args:
            start: each layer's states ``[R, C]`` before, in the rows' order of ``Steps``.
        """
        drop = self.trunk.dropout
        x = drop(functional.embedding(ids, self.trunk.tokens.weight))
        states: list[State] = []
        for number, layer in enumerate(self.layers):
            gates = self.inputs[number](x.to(self.dtype))
            states.append(self._recur(number, layer, gates, start[number], counts))
            x = drop(states[-1][0])
        return x.to(self.dtype) if self.projection is None else self.projection(x.to(self.dtype)), states

    def _recur(self, number: int, layer: Any, gates: Tensor, start: State, counts: Sequence[int]) -> State:
        product = self.carried[number]

        def carry(state: Tensor) -> Tensor:
            return product(state.to(self.dtype))

        if not torch.is_grad_enabled():
            return run(layer.cell, carry, gates, start, counts)[0]
        weights = layer.carried.weight, layer.carried.bias
        made: State = Recurrence.apply(layer.cell, carry, counts, gates, *weights, *start)  # type: ignore[no-untyped-call]
        return made

    def nothing(self, rows: int) -> list[State]:
        """Each layer's states before anything was read."""
        config, weight = self.trunk.config, self.trunk.tokens.weight
        empty = torch.zeros(rows, config.cell_size, dtype=self.wide, device=weight.device)
        return [(empty,) * PARTS[config.cell] for _ in self.layers]


def of_sampled(trunk: RecurrentTrunk, batch: Batch, products: Products) -> Tensor:
    """The state that predicts each sampled token, ``[N, D]``, in the order of ``mask.nonzero()``.

    A group's prompt is read once; its siblings go on from the state behind it.
    """
    device = trunk.tokens.weight.device
    reader = Recurrent(trunk, products)
    groups = sibling_rows(batch)
    firsts = torch.tensor([rows[0] for rows in groups])
    group_of = torch.zeros(len(batch), dtype=torch.long)
    for number, rows in enumerate(groups):
        group_of[rows] = number
    lengths = batch.prompt_length[firsts]
    prompts = Steps.of(lengths)
    ids = prompts.pack(batch.token_ids[firsts, : int(lengths.max())])
    states, carried = reader(ids.to(device), reader.nothing(len(groups)), prompts.counts)
    texts, at = batch.mask.bool().nonzero(as_tuple=True)
    behind = at - 1 - batch.prompt_length[texts]  # the place of the token that predicts, behind the prompt
    found = prompts.at(group_of[texts], (at - 1).clamp(max=int(lengths.max()) - 1))
    spans = torch.tensor([sampled_span(batch, row) for row in range(len(batch))])
    going_on = spans.nonzero().squeeze(1)
    if len(going_on):
        steps = Steps.of(spans[going_on])
        places = batch.prompt_length[going_on][:, None] + torch.arange(int(spans.max()))
        own = batch.token_ids[going_on].gather(1, places.clamp(max=batch.token_ids.shape[1] - 1))
        of = group_of[going_on][steps.order]
        ends = prompts.at(of, lengths[of] - 1).to(device)
        start = [tuple(part[ends] for part in layer) for layer in carried]
        more, _ = reader(steps.pack(own).to(device), start, steps.counts)
        number_of = torch.zeros(len(batch), dtype=torch.long)
        number_of[going_on] = torch.arange(len(going_on))
        later = behind >= 0
        found[later] = len(states) + steps.at(number_of[texts[later]], behind[later])
        states = torch.cat([states, more])
    return states[found.to(device)]


AutoConfig.register("recurrent", RecurrentConfig)
AutoModelForCausalLM.register(RecurrentConfig, RecurrentModel)
