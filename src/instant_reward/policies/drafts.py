"""The text of a masked model: it is changed in its middle, so each action makes a draft of the whole of it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from random import Random
from typing import Any

from instant_reward.types import Prompt, UserError

STOP = 0  # the action that ends an edited text; fills count from 1


class Slots:
    """Where a masked model may write, and what its actions are.

    Action ``1 + place * vocabulary + token`` writes a token at a place; places are numbered among those of the text
    that may be written at, from left to right.

    Args:
        tokenizer: the model's.
        vocabulary: how many tokens its head knows.
        edits: whether every token of a text may be changed, and changed again; else each mask is filled once.

    Attributes:
        forbidden: tokens that are never written: special ones, and those that only the head knows.
    """

    def __init__(self, tokenizer: Any, vocabulary: int, edits: bool) -> None:
        self.tokenizer, self.vocabulary, self.edits = tokenizer, vocabulary, edits
        self.mask: int = tokenizer.mask_token_id
        self.special = frozenset(tokenizer.all_special_ids) - {self.mask}
        self.forbidden = tuple(sorted({*self.special, self.mask, *range(len(tokenizer), vocabulary)}))

    def places(self, ids: Sequence[int]) -> list[int]:
        """The indices of a text's tokens that may be written at."""
        return [i for i, one in enumerate(ids) if one == self.mask or (self.edits and one not in self.special)]

    def action(self, place: int, token: int) -> int:
        """The action that writes a token at a place."""
        return 1 + place * self.vocabulary + token

    def written(self, ids: Sequence[int], actions: Sequence[int]) -> tuple[list[int], list[bool]]:
        """A text's tokens after these actions, and which of its places may be written at next."""
        now, places = list(ids), self.places(ids)
        free = [True] * len(places)
        for action in actions:
            if action != STOP:
                place, token = divmod(action - 1, self.vocabulary)
                now[places[place]] = token
                free[place] = self.edits
        return now, free

    def over(self, ids: Sequence[int], actions: Sequence[int]) -> bool:
        """Whether a text is finished: all masks are filled, or its editor stopped."""
        return actions[-1] == STOP if self.edits else len(actions) >= len(self.places(ids))

    def show(self, ids: Sequence[int]) -> str:
        """The characters of a text; a mask is shown as the tokenizer writes it, other special tokens are not."""
        shown: str = self.tokenizer.decode(
            [one for one in ids if one not in self.special],
            skip_special_tokens=False,
            clean_up_tokenization_spaces=False,
        )
        return shown

    def fills(self, ids: Sequence[int], target: Sequence[int], where: str) -> list[int]:
        """The actions that make ``target`` of a text, from left to right, with the stop of an editor.

        Raises:
            UserError: where it cannot be made.
        """
        places = self.places(ids)
        fixed = set(range(len(ids))) - set(places)
        if len(ids) != len(target) or any(ids[i] != target[i] for i in fixed):
            raise UserError(f"{where} cannot be written into its prompt, whose other tokens stay; correct the row")
        if any(target[i] in self.forbidden for i in places):
            raise UserError(f"{where} has special or unknown tokens, which are never written; correct the row")
        changed = [(k, target[i]) for k, i in enumerate(places) if not self.edits or target[i] != ids[i]]
        actions = [self.action(k, token) for k, token in changed]
        return [*actions, STOP] if self.edits else actions

    def windows(self, text: str, where: str, room: int, too_long: str = "refuse") -> list[list[int]]:
        """The tokens of a text; in several parts where it is longer than ``room`` and is to be split.

        Args:
            too_long: "refuse", "cut" or "split".

        Raises:
            UserError: it is too long, or none of its tokens is ever written.
        """
        cut = {"truncation": True, "max_length": room, "return_overflowing_tokens": too_long == "split"}
        found = self.tokenizer(text, verbose=False, **({} if too_long == "refuse" else cut))["input_ids"]
        parts = [list(ids) for ids in (found if too_long == "split" else [found])]
        if len(parts[0]) > room:
            raise UserError(
                f"{where} has a text of {len(parts[0])} tokens, and the model reads {room}: shorten it, or set "
                "data.too_long to cut or split"
            )
        kept = [ids for ids in parts if any(one not in self.forbidden for one in ids)]
        if not kept:
            raise UserError(f"{where} has a text without a token that is ever written: leave that row out.")
        return kept

    def blanked(self, ids: Sequence[int], share: float, dice: Random) -> tuple[list[int], list[int]]:
        """A text with this share of its tokens masked, rounded up, and the actions that write what stood there."""
        known = [i for i, one in enumerate(ids) if one not in self.forbidden]
        chosen = set(dice.sample(known, max(1, math.ceil(share * len(known) - 1e-9))))
        masked = [self.mask if i in chosen else one for i, one in enumerate(ids)]
        places = enumerate(self.places(masked))
        return masked, [self.action(place, ids[i]) for place, i in places if i in chosen]


class Draft:
    """A text that is written at any place (``watch.DraftStream``)."""

    def __init__(self, slots: Slots, ids: Sequence[int]) -> None:
        self.slots, self.ids = slots, list(ids)
        self.places = slots.places(ids)

    @property
    def draft(self) -> str:
        """The text as it stands, masks shown."""
        return self.slots.show(self.ids)

    def push(self, action: int) -> str:
        """Writes a token; no character is certain before the end."""
        if action != STOP:
            place, token = divmod(action - 1, self.slots.vocabulary)
            self.ids[self.places[place]] = token
        return ""

    def flush(self) -> str:
        """The whole text."""
        return self.draft

    def copy(self) -> Draft:
        """See ``TextStream``."""
        twin = Draft(self.slots, self.ids)
        twin.places = self.places
        return twin


class DraftDecoder:
    """Drafts of the texts of a masked model (``Decoder``)."""

    def __init__(self, slots: Slots) -> None:
        self.slots = slots

    def stream(self, prompt: Prompt | None = None) -> Draft:
        """The text of a prompt, to be written into."""
        context = None if prompt is None else prompt.context
        assert context is not None, "a masked model writes into its prompt"
        return Draft(self.slots, context)
