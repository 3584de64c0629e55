"""What a masked model draws: a place and a token together, and how its texts are read before each fill."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from instant_reward.policies import terms
from instant_reward.policies.drafts import STOP, Slots
from instant_reward.policies.head import Softmax, as_drawn, chunks, logits_of, token_logprobs
from instant_reward.types import UserError


@dataclass(frozen=True)
class Fills(terms.Distribution):
    """A place and a token for each of ``N`` actions: ``log p(place) + log p(token | place)``.

    The temperature divides the log-probability of the pair, as it does where the pair is drawn. Actions that are drawn
    from the same text as it stands share one reading of it, ``M`` of them.

    Attributes:
        hidden: ``[N, D]``, the state of the text's first token: what a critic reads.
        texts: int64 ``[N]``, which reading each action is drawn from.
        places: ``[M, 1 + P]``, the logits of stopping and of each place; minus infinity where it may not be taken.
        states: ``[M, P, D]``, what the output head makes the tokens' logits of; weight, bias: that head, ``[V, D]`` and
            ``[V]``.
        no_end: bool ``[N]``, where stopping is forbidden.
        forbidden: tokens that are never written.
    """

    hidden: Tensor
    texts: Tensor
    places: Tensor
    states: Tensor
    weight: Tensor
    bias: Tensor | None
    no_end: Tensor
    temperature: float
    forbidden: tuple[int, ...]

    @property
    def width(self) -> int:
        """See ``Distribution``: stopping, then the tokens of the first place, of the second, ..."""
        return 1 + self.states.shape[1] * len(self.weight)

    def logits(self, rows: slice) -> Tensor:
        """See ``Distribution``: here the log-probabilities themselves."""
        places = self._of_places(rows)
        some = self.states[self.texts[rows]]
        tokens = self._of_tokens(some.reshape(-1, some.shape[-1])).view(*some.shape[:2], len(self.weight))
        return torch.cat([places[:, :1], (places[:, 1:, None] + tokens).flatten(1)], 1)

    def of(self, targets: Tensor) -> tuple[Tensor, Tensor]:
        """See ``Distribution``: tokens at the places that were chosen, so that no table of all pairs is kept."""
        fill, place, token = self._parts(targets)
        places = self._of_places(slice(None))
        chosen = places.gather(1, (place + 1)[:, None]).squeeze(1)
        states, token = self.states[self.texts[fill], place[fill]], token[fill]
        softmax, always = self._softmax(self.temperature), _all(states)
        written, _ = token_logprobs(states, self.weight, self.bias, token, always, softmax)
        both = chosen.index_put((fill.nonzero().squeeze(1),), written.to(chosen), accumulate=True)
        return both, self._entropies(places.detach())

    def likeliest(self, targets: Tensor) -> Tensor:
        """See ``Distribution``: where a target is a fill, the likeliest token at the same place."""
        fill, place, token = self._parts(targets)
        states = self.states[self.texts[fill], place[fill]]
        parts = [self._of_tokens(states[some]).argmax(-1) for some in chunks(len(states), len(self.weight))]
        found = targets.clone()
        found[fill] += torch.cat([*parts, token[:0]]) - token[fill]
        if not bool(fill.all()):
            found[~fill] = super().likeliest(targets)[~fill]
        return found

    def _parts(self, targets: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Whether each action is a fill (bool), its place (-1 for stopping), and its token, each ``[N]``."""
        place = (targets - 1).div(len(self.weight), rounding_mode="floor")
        return targets != STOP, place, (targets - 1) % len(self.weight)

    @torch.no_grad()
    def _entropies(self, places: Tensor) -> Tensor:
        """Of the place, and of the token on average over the places, ``[N]``."""

        def some(states: Tensor) -> Tensor:
            tokens = self._of_tokens(states)
            return -(tokens.exp() * tokens.clamp(min=torch.finfo(tokens.dtype).min)).sum(-1)

        written = self._at_places(some, self.states)[self.texts]
        chances = places.exp()
        of_place = -(chances * places.clamp(min=torch.finfo(places.dtype).min)).sum(1)
        return of_place + (chances[:, 1:] * written.to(chances)).sum(1)

    def _of_places(self, rows: slice) -> Tensor:
        """The log-probabilities ``[n, 1 + P]`` of stopping and of each place."""
        texts, of = self.texts[rows].unique(return_inverse=True)  # type: ignore[no-untyped-call]
        places = self.places[texts].log_softmax(-1)
        if self.temperature != 1.0:
            places = places / self.temperature
            places = places + torch.nn.functional.pad(
                self._at_places(self._sharpened, self.states[texts]).to(places), (1, 0)
            )
        # In place, where the ends are forbidden: what the index gives is a copy, which no gradient needs.
        return as_drawn(places[of], self.no_end[rows], Softmax(1.0, (STOP,))).log_softmax(-1)

    def _sharpened(self, states: Tensor) -> Tensor:
        """``log sum over tokens of p(token)**(1 / temperature)``: what a place weighs by its tokens, ``[n]``."""
        cold = logits_of(states, self.weight, self.bias, _all(states), self._softmax(self.temperature))
        warm = logits_of(states, self.weight, self.bias, _all(states), self._softmax(1.0))
        return cold.logsumexp(-1) - warm.logsumexp(-1) / self.temperature

    def _at_places(self, some: Any, states: Tensor) -> Tensor:
        """``some`` of the places' states, in chunks that are computed again for the backward pass: ``[n, P]``."""
        flat = states.reshape(-1, states.shape[-1])
        parts = [checkpoint(some, flat[rows], use_reentrant=False) for rows in chunks(len(flat), len(self.weight))]
        return torch.cat([*parts, flat.new_zeros(0)]).view(states.shape[:2])

    def _of_tokens(self, states: Tensor) -> Tensor:
        softmax = self._softmax(self.temperature)
        return logits_of(states, self.weight, self.bias, _all(states), softmax).log_softmax(-1)

    def _softmax(self, temperature: float) -> Softmax:
        return Softmax(temperature, self.forbidden)


def _all(states: Tensor) -> Tensor:
    return torch.ones(len(states), dtype=torch.bool, device=states.device)


@dataclass(frozen=True)
class Reading:
    """What a masked model reads before ``N`` actions: ``M`` texts as they stand, each once.

    Attributes:
        ids, there: ``[M, L]``, the text's tokens, and 1 where there is one.
        index: ``[M, P]``, where the places that may be written at are; free: bool ``[M, P]``, those open to be taken.
        texts: int64 ``[N]``, which of the texts each action is drawn from.
    """

    ids: Tensor
    there: Tensor
    index: Tensor
    free: Tensor
    texts: Tensor


def reading(
    slots: Slots, texts: Sequence[Sequence[int]], before: Sequence[Sequence[int]], pad_id: int, device: torch.device
) -> Reading:
    """What is read before actions.

    Args:
        texts: of each action the text as it was at first; before: the actions that were taken on it.
    """
    number: dict[tuple[tuple[int, ...], tuple[int, ...]], int] = {}
    both = zip(texts, before, strict=True)
    of = [number.setdefault((tuple(text), tuple(actions)), len(number)) for text, actions in both]
    found = [(*slots.written(text, actions), slots.places(text)) for text, actions in number]
    longest = max((len(now) for now, _, _ in found), default=1)
    widest = max((len(places) for _, _, places in found), default=1)
    ids = torch.full((len(found), longest), pad_id, dtype=torch.long)
    there = torch.zeros(len(found), longest, dtype=torch.long)
    index = torch.zeros(len(found), widest, dtype=torch.long)
    free = torch.zeros(len(found), widest, dtype=torch.bool)
    for row, (now, may, places) in enumerate(found):
        ids[row, : len(now)] = torch.tensor(now)
        there[row, : len(now)] = 1
        index[row, : len(places)] = torch.tensor(places)
        free[row, : len(may)] = torch.tensor(may)
    return Reading(*(one.to(device) for one in (ids, there, index, free, torch.tensor(of, dtype=torch.long))))


def states_of(model: Any, ids: Tensor, there: Tensor) -> tuple[Tensor, Tensor]:
    """The states of a masked model's trunk, and what its output head reads, each ``[N, L, D]``.

    Between the two a model may do more, so it is run whole; but for the head, which would make ``[N, L, V]``.

    Raises:
        UserError: where the head is not called.
    """
    found: list[Tensor] = []

    def keep(_: Any, given: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        found.append(given[0])
        return (given[0][:, :0], *given[1:])

    hooks = [
        model.base_model.register_forward_hook(lambda _, __, made: found.append(made[0])),
        model.get_output_embeddings().register_forward_pre_hook(keep),
    ]
    try:
        model(input_ids=ids, attention_mask=there)
    finally:
        for hook in hooks:
            hook.remove()
    if len(found) < 2:
        raise UserError(
            f"{type(model).__name__} makes its logits without calling its output head, which is not supported; use "
            "another model, such as BERT"
        )
    return found[0], found[1]
