"""Supervised training's texts: the data's own, a step's worth at a time, as rollouts whose tokens are all targets."""

from __future__ import annotations

import bisect
import math
import random
from array import array
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

from instant_reward import assemble
from instant_reward.batch import Batch, collate
from instant_reward.collect import (
    Group,
    actions_for,
    check_fits,
    check_recorded,
    prompts_of,
    recorded_groups,
    spelt,
    written_rollout,
)
from instant_reward.config import Config, DataConfig
from instant_reward.data import Prompts, check_labels, labels_of
from instant_reward.masking import MaskedTexts
from instant_reward.policies.annotate import likeliest
from instant_reward.policies.policy import Policy
from instant_reward.rewards.base import Reward
from instant_reward.rewards.scope import remembering, replay_groups
from instant_reward.sampling.sampler import Sampler
from instant_reward.stored import held, on_disk
from instant_reward.types import Prompt, Rollout, UserError

WINDOW = 1024  # texts among which those of like length are put together: the order stays random beyond it


class GivenTexts(Protocol):
    """Texts to imitate, made when they are asked for."""

    @property
    def lengths(self) -> Sequence[int]:
        """Tokens of each, by which those of like length are put together."""

    @property
    def stays(self) -> bool:
        """Whether a text is the same each time and lies in memory, so that its marks may be kept."""

    @property
    def whole(self) -> bool:
        """Whether the targets are all of a text, and not what is masked in it."""

    def __len__(self) -> int: ...

    def group(self, number: int, turn: int = 0) -> Group:
        """A text's targets; ``turn`` draws them where they are drawn."""


class Recorded(list[Rollout]):
    """Texts that a run recorded (``GivenTexts``)."""

    stays = whole = True

    @property
    def lengths(self) -> list[int]:
        """See ``GivenTexts``."""
        return [len(one.token_ids) for one in self]

    def group(self, number: int, turn: int = 0) -> Group:
        """See ``GivenTexts``."""
        return [self[number]]


class Written(Sequence[Rollout]):
    """Texts of the data's own as rollouts (``GivenTexts``); what is wrong with them shows at once.

    Args:
        data: its ``completion`` names the column, ``too_long`` what becomes of a text longer than ``room``.
        room: so many tokens are read at once, the prompt's included.

    Attributes:
        texts: the prompt and the actions of each; on disk where the prompts are.
        lengths: tokens of each, its prompt included.

    Raises:
        UserError: a text is missing, empty or too long.
    """

    whole = True

    def __init__(self, prompts: Sequence[Prompt], data: DataConfig, policy: Policy, room: int) -> None:
        assert data.completion is not None, "the config names no column of texts"
        self.policy, self.decoder = policy, policy.decoder()
        self.lengths = array("q")
        self.texts = held(self._cut(prompts, data.completion, data.too_long, room), on_disk(prompts))
        self.stays = not on_disk(self.texts)

    def _cut(
        self, prompts: Sequence[Prompt], column: str, too_long: str, room: int
    ) -> Iterator[tuple[Prompt, list[int]]]:
        for prompt in prompts:
            ids = actions_for(prompt, column, self.policy)
            own = room - len(prompt.token_ids)
            if too_long == "refuse" or own < 1:
                check_fits(prompt, ids, room)
            starts = range(0, len(ids), own) if too_long == "split" else range(1)
            pieces = [ids[start : start + own] for start in starts]
            if len(pieces) > 1 and len(pieces[-1]) == 1 < own:  # an end alone would be an empty text to imitate
                pieces[-1].insert(0, pieces[-2].pop())
            for piece in pieces:
                self.lengths.append(len(prompt.token_ids) + len(piece))
                yield prompt, piece

    def __len__(self) -> int:
        return len(self.lengths)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return [self[one] for one in range(*index.indices(len(self)))]
        prompt, ids = self.texts[index]
        return written_rollout(prompt, ids, index, self.policy, self.decoder)

    def group(self, number: int, turn: int = 0) -> Group:
        """See ``GivenTexts``."""
        return [self[number]]


class TokenBatches:
    """Steps of about so many tokens, texts of like length together, in an order that seed and step alone decide.

    Each epoch goes through all texts once. Nothing is remembered between calls that a resumed run would lack.

    Args:
        lengths: tokens of each text; one that is longer than ``tokens`` is a step of its own.
    """

    def __init__(self, lengths: Sequence[int], tokens: int, seed: int) -> None:
        self.lengths, self.tokens, self.seed = lengths, tokens, seed
        self._ends: list[int] = []  # after how many steps each epoch is over
        self._epoch, self._batches = -1, list[Sequence[int]]()

    def batch(self, step: int) -> Sequence[int]:
        """The numbers of the texts of a step; the first step is 1."""
        while not self._ends or self._ends[-1] < step:
            self._ends.append((self._ends[-1] if self._ends else 0) + len(self._of_epoch(len(self._ends))))
        epoch = bisect.bisect_left(self._ends, step)
        return self._of_epoch(epoch)[step - 1 - (self._ends[epoch - 1] if epoch else 0)]

    def steps(self, epochs: float) -> int:
        """How many steps so many epochs take."""
        whole = sum(len(self._of_epoch(epoch)) for epoch in range(int(epochs)))
        rest = epochs - int(epochs)
        return whole + (_rounded_up(rest * len(self._of_epoch(int(epochs)))) if rest else 0)

    def _of_epoch(self, epoch: int) -> list[Sequence[int]]:
        if epoch != self._epoch:
            dice = random.Random(f"{self.seed}/{epoch}")
            order = array("q", range(len(self.lengths)))
            dice.shuffle(order)
            windows = [order[start : start + WINDOW] for start in range(0, len(order), WINDOW)]
            self._batches = [batch for window in windows for batch in self._cut(window)]
            dice.shuffle(self._batches)
            self._epoch = epoch
        return self._batches

    def _cut(self, window: Sequence[int]) -> Iterator[Sequence[int]]:
        batch, used = array("q"), 0
        for number in sorted(window, key=lambda one: self.lengths[one]):
            if batch and used + self.lengths[number] > self.tokens:
                yield batch
                batch, used = array("q"), 0
            batch.append(number)
            used += self.lengths[number]
        if batch:
            yield batch


def _rounded_up(steps: float) -> int:
    """1.1 times 10 is 11 and not, as floats have it, a little more."""
    return math.ceil(round(steps, 6))


@dataclass
class Texts:
    """A step's texts out of all, each a group of its own, rated by the rewards.

    Attributes:
        rollouts: all texts; order: which of them a step gets.
        skipped, drawn: see ``collect.Sampled``; nothing is ever left out.
    """

    rollouts: GivenTexts
    order: TokenBatches | Prompts[int]
    policy: Policy
    rewards: Sequence[Reward]
    tokens_per_part: int = 1280
    skipped: int = 0
    drawn: list[Rollout] = field(default_factory=list)
    _marked: dict[int, Group] = field(default_factory=dict)

    def steps(self, epochs: float) -> int:
        """How many steps so many epochs take."""
        if isinstance(self.order, TokenBatches):
            return self.order.steps(epochs)
        return _rounded_up(epochs * len(self.order) / self.order.per_step)

    def groups(self, sampler: Sampler | None, step: int) -> list[Group]:
        """The texts of a step, rated."""
        del sampler  # the policy that is trained wrote none of them
        chosen = self.order.batch(step)
        groups = [self._marked.get(number) or self.rollouts.group(number, step) for number in chosen]
        self.drawn = [rollout for group in groups for rollout in group]
        # Texts that come again keep their marks, unless a reward looks at what changes in the meantime.
        again = self._compared or bool(remembering(self.rewards)) or not self.rollouts.stays
        new = [one for number, group in zip(chosen, groups, strict=True) if number not in self._marked for one in group]
        self._rate(self.drawn if again else new)
        if not again and self.rewards:
            self._marked |= dict(zip(chosen, groups, strict=True))
        return groups

    @property
    def _compared(self) -> bool:
        return any(one.takes == "pair" for one in self.rewards)

    def _rate(self, some: Sequence[Rollout]) -> None:
        if not some or not self.rewards:
            return
        if self._compared:
            predict(some, self.policy, self.tokens_per_part)
        replay_groups(self.rewards, list(some))


def predict(rollouts: Sequence[Rollout], policy: Policy, tokens_per_part: int) -> None:
    """Puts what the policy finds likeliest at each target token, read as text, under each prompt's ``output``."""
    numbered = [replace(rollout, group=number) for number, rollout in enumerate(rollouts)]
    batch = collate(numbered, pad_id=policy.pad_id)
    found = likeliest(policy, batch, tokens_per_part)[0]
    decoder = policy.decoder()
    for row, rollout in enumerate(rollouts):
        output = spelt(decoder.stream(rollout.prompt), found[row, batch.mask[row]].tolist())
        rollout.prompt = replace(rollout.prompt, info={**rollout.prompt.info, "output": output})


def texts_to_fit(config: Config, rows: Sequence[Mapping[str, Any]], policy: Policy, rewards: Sequence[Reward]) -> Texts:
    """The texts that a run imitates: a column of the data, or recorded ones.

    Args:
        rows: the data's; none where whole rollouts are given.
    """
    rollouts: GivenTexts
    if config.data.rollouts is not None:
        recorded = recorded_groups(config.data.rollouts)
        check_recorded(recorded, policy, config.model.max_context)
        rollouts = Recorded(rollout for group in recorded for rollout in group)
    else:
        rollouts = written(config.data, rows, policy, config.model.max_context)
        _check_new_labels(config, rows)
    shares = config.algorithm.minibatches
    if config.train.tokens_per_step is None and shares > config.train.prompts_per_step:
        raise UserError(
            f"train.prompts_per_step: {config.train.prompts_per_step} texts are too few for "
            f"algorithm.minibatches={shares}; give more, or lower that"
        )
    order = ordered(rollouts, config.train.prompts_per_step, config.train.tokens_per_step, config.seed)
    return Texts(rollouts, order, policy, rewards, config.train.tokens_per_part)


def _check_new_labels(config: Config, rows: Sequence[Mapping[str, Any]]) -> None:
    """Refuses a label that is new with this run and that no row would teach."""
    new = config.model.scratch.labels if config.model.scratch is not None else config.model.labels
    if new and config.data.completion is not None:
        unseen = set(new) - set(labels_of(rows, config.data.completion))
        if unseen:
            raise UserError(
                f"the labels of the model name {', '.join(sorted(unseen))}, which no row of the data has in its column "
                f"{config.data.completion!r}: leave that label out, or add such rows"
            )


def ordered(rollouts: GivenTexts, texts: int, tokens: int | None, seed: int) -> TokenBatches | Prompts[int]:
    """Which texts each step gets: so many, or where ``tokens`` is given, those of about so many tokens."""
    if tokens is None:
        return Prompts(range(len(rollouts)), texts, seed)
    return TokenBatches(rollouts.lengths, tokens, seed)


def written(
    data: DataConfig, rows: Sequence[Mapping[str, Any]], policy: Policy, most: int | None = None, section: str = "data"
) -> GivenTexts:
    """The texts in the data's column ``completion``, each behind its prompt or the opening token, or with masks.

    Args:
        section: where the config names this data, for messages.
    """
    if data.completion is None:
        raise UserError("data.completion: name the column with the texts to learn from")
    if data.prompt_column == data.completion:
        raise UserError(
            f"{section}.column: {data.completion!r} has the texts to learn from; leave it out (null) where they have "
            "no prompt, or name another column for them by completion"
        )
    room = min(policy.context, most or policy.context)
    try:
        if data.masks is not None:
            return MaskedTexts(rows, data, policy, room)
        return Written(prompts_of(data, rows, policy, 0, most), data, policy, room)
    except UserError as error:
        if section == "data":
            raise
        raise UserError(f"{section}: {error}") from error


class HeldOutTexts:
    """Texts that are never learned from, by which a policy is judged.

    Args:
        data: the config's ``evaluate.texts``.
        learned: the rows that are learned from and their column, where the labels of both must be the same.
    """

    def __init__(
        self,
        data: DataConfig,
        policy: Policy,
        most: int | None = None,
        tokens_per_part: int = 1280,
        learned: tuple[Sequence[Mapping[str, Any]], str] | None = None,
    ) -> None:
        rows = assemble.load_prompt_rows(data)
        self.texts = written(data, rows, policy, most, "evaluate.texts")
        self.tokens_per_part = tokens_per_part
        if policy.labels and learned is not None and data.completion is not None:
            columns = {"train": learned[1], "evaluate.texts": data.completion}
            check_labels({"train": learned[0], "evaluate.texts": rows}, columns)

    def measure(self, policy: Policy) -> dict[str, float]:
        """How well a policy foresees them.

        Returns:
            ``nll`` in nats per target (the end token is one), ``perplexity``, ``bits_per_character`` (of all the
            characters, the end tokens' bits included; not of masks, which are parts of texts), ``accuracy`` (the share
            of targets that the policy finds likeliest; where a text is one label, that of the labels). Of masks it is
            the tokens that count, each given its place.
        """
        total, right, count, characters = 0.0, 0, 0, 0
        order = sorted(range(len(self.texts)), key=lambda number: self.texts.lengths[number])
        for start in range(0, len(order), 64):
            some = [
                replace(one, group=number) for number in order[start : start + 64] for one in self.texts.group(number)
            ]
            batch: Batch = collate(some, pad_id=policy.pad_id)
            guesses, logprobs = likeliest(policy, batch, self.tokens_per_part)
            # What was drawn and is no part of the text, as a mask's place is, has its chance in the old ones; else 0.
            total -= float((logprobs - batch.old_logprobs.double())[batch.mask].sum())
            right += int((guesses == batch.token_ids)[batch.mask].sum())
            count += batch.token_count
            characters += sum(len(one.text) for one in some)
        nll = total / count
        found = {"nll": nll, "perplexity": math.exp(min(nll, 700.0))}
        if self.texts.whole:
            found["bits_per_character"] = total / math.log(2.0) / max(1, characters)
        return {**found, "accuracy": right / count}


def held_out_texts(config: Config, rows: Sequence[Mapping[str, Any]], policy: Policy) -> HeldOutTexts | None:
    """The texts of ``evaluate.texts``, where there are any.

    Args:
        rows: those that are learned from.
    """
    if config.evaluate.texts is None:
        return None
    learned = (rows, config.data.completion) if config.data.completion is not None else None
    return HeldOutTexts(config.evaluate.texts, policy, config.model.max_context, config.train.tokens_per_part, learned)
