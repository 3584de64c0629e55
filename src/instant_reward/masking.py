"""Texts with random masks in them, from which a masked model learns what stood there.

The targets of a text are its masked tokens, each as the policy's first fill: a place and a token, read in the text with
all its masks. One forward pass serves them all, and the likelihood of each is ``log p(place) + log p(token | place)``.
The second part is BERT's objective (Devlin et al., 2019, section 3.1). Where each text's share of masks is drawn evenly
from 0 to 1, the mean over its targets is the mean over the fills of the whole text in a random order (Hoogeboom et al.,
"Autoregressive Diffusion Models", 2022, equation 5). All places are targets alike, so a new model's own order of fills
stays a random one.
"""

from __future__ import annotations

import math
import random
from array import array
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

from instant_reward.collect import Group, written_rollout
from instant_reward.config import DataConfig
from instant_reward.data import text_in
from instant_reward.policies.masked import MaskedPolicy
from instant_reward.policies.policy import Policy
from instant_reward.stored import held, on_disk
from instant_reward.types import Prompt, UserError


class MaskedTexts:
    """Texts of the data's own whose masks are drawn when they are asked for (``fitting.GivenTexts``).

    Args:
        data: its ``completion`` names the column, ``masks`` says how many masks there are, ``too_long`` what becomes of
            a text longer than ``room``.
        room: so many tokens are read at once.

    Attributes:
        texts: the prompt and the tokens of each; on disk where the rows are.
        lengths: tokens of each, those that begin and end a text included.

    Raises:
        UserError: the policy fills no masks; a text is missing, empty or too long, or has no token that may be written.
    """

    stays = whole = False

    def __init__(self, rows: Sequence[Mapping[str, Any]], data: DataConfig, policy: Policy, room: int) -> None:
        assert data.completion is not None, "the config names no column of texts"
        assert data.masks is not None, "the config asks for no masks"
        if not isinstance(policy, MaskedPolicy) or policy.slots.edits:
            what = "one that edits learns from pairs of texts" if isinstance(policy, MaskedPolicy) else "this is none"
            raise UserError(f"data.masks: a model that fills masks learns from them, and {what}; leave it out")
        self.policy, self.slots, self.masks, self.decoder = policy, policy.slots, data.masks, policy.decoder()
        self.lengths = array("q")
        self.texts = held(self._read(rows, data.completion, data.too_long, room), on_disk(rows))

    def _read(
        self, rows: Sequence[Mapping[str, Any]], column: str, too_long: str, room: int
    ) -> Iterator[tuple[Prompt, list[int]]]:
        for number, row in enumerate(rows):
            info = {key: value for key, value in row.items() if key != "id"}
            prompt = Prompt(str(row.get("id", number)), "", [], info=info, where=getattr(row, "where", ""))
            for ids in self.slots.windows(text_in(prompt, column), prompt.place, room, too_long):
                self.lengths.append(len(ids))
                yield prompt, ids

    def __len__(self) -> int:
        return len(self.lengths)

    def group(self, number: int, turn: int = 0) -> Group:
        """The targets of a text, by masks that its number and ``turn`` alone decide.

        Their ``logprobs`` are those of the places: which one comes first is not the text's, but drawn.
        """
        bare, ids = self.texts[number]
        dice = random.Random(f"{self.masks.seed}/{number}/{turn}")
        masked, actions = self.slots.blanked(ids, dice.uniform(*self.masks.shares), dice)
        prompt = replace(bare, text=self.slots.show(masked), context=masked)
        group = [written_rollout(prompt, [one], k, self.policy, self.decoder) for k, one in enumerate(actions)]
        for rollout in group:
            rollout.logprobs = [-math.log(len(actions))]
        return group
