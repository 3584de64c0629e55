"""Rewards that look beyond their own text: at the siblings of its group, or at what the run wrote before."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from instant_reward.rewards.base import Reward, as_rewards
from instant_reward.rewards.watch import Watch, replay_to_stop
from instant_reward.types import Rollout


def of_groups(rewards: Sequence[Reward]) -> list[Reward]:
    """Those that look at siblings."""
    return [one for one in rewards if one.scope == "group"]


def rate_groups(rewards: Sequence[Any], rollouts: Sequence[Rollout], step: int | None = None) -> None:
    """Adds the marks of rewards with ``scope="group"`` to finished texts, those of one ``group`` together.

    Raises:
        RewardError: where a reward fails; the message names the reward, the prompt and the step.
    """
    together: dict[int, list[Rollout]] = {}
    for rollout in rollouts:
        together.setdefault(rollout.group, []).append(rollout)
    for siblings in together.values():
        watch = Watch(of_groups(as_rewards(rewards)), step=step)
        for rollout, marks in zip(siblings, watch.rate_finished(siblings), strict=True):
            rollout.marks += marks


def replay_groups(rewards: Sequence[Any], rollouts: Sequence[Rollout]) -> None:
    """Scores finished texts again, as live scoring saw them, and puts the marks in place of the ones they have.

    A text that a reward stops ends there, as it would have if it had been stopped while it was written.
    """
    named = as_rewards(rewards)
    own = [one for one in named if one.scope != "group"]
    for rollout in rollouts:
        rollout.marks, stopped = replay_to_stop(own, rollout)
        if stopped is not None:
            _cut(rollout, stopped)
    rate_groups(named, rollouts)


def _cut(rollout: Rollout, length: int) -> None:
    """Ends a text after so many tokens of its flat sequence; one that had ended by itself right there has ended."""
    whole = length == len(rollout.token_ids)
    ended = rollout.stop == "ended" and whole
    for name in ("token_ids", "mask", "logprobs", "char_ends", "versions"):
        setattr(rollout, name, getattr(rollout, name)[:length])
    if rollout.drafts is None:
        rollout.text = rollout.text[: rollout.char_ends[-1]]
    else:
        rollout.drafts = rollout.drafts[: length - rollout.start]
        rollout.text = rollout.drafts[-1]
        rollout.char_ends[-1] = len(rollout.text)
    rollout.stop = "ended" if ended else "stopped"
    rollout.at_limit = rollout.at_limit and whole


def held_back(rollouts: Iterable[Rollout], rewards: Sequence[Reward], siblings: int, step: int) -> Iterator[Rollout]:
    """Texts as they finish, each group only when all its ``siblings`` have finished and were compared."""
    waiting: dict[int, list[Rollout]] = {}
    for rollout in rollouts:
        group = waiting.setdefault(rollout.group, [])
        group.append(rollout)
        if len(group) == siblings:
            # In the order of siblings, so that what a reward says does not hang on who finished first.
            ready = sorted(waiting.pop(rollout.group), key=lambda one: int(one.id.rpartition("/")[2]))
            rate_groups(rewards, ready, step)
            yield from ready


def remembering(rewards: Sequence[Reward]) -> list[Reward]:
    """Those that look at what the run wrote before."""
    return [one for one in rewards if one.scope == "run"]


def observe(rewards: Sequence[Reward], rollouts: Sequence[Rollout]) -> None:
    """Tells the rewards that remember the run what a step wrote; until then they read what they knew before it."""
    for one in remembering(rewards):
        one.function.observe(rollouts)


def states_of(rewards: Sequence[Reward]) -> dict[str, Mapping[str, Any]]:
    """What rewards that remember the run want kept in a checkpoint, by name."""
    kept = {one.name: one.function for one in rewards if callable(getattr(one.function, "state_dict", None))}
    return {name: function.state_dict() for name, function in kept.items()}


def load_states(rewards: Sequence[Reward], states: Mapping[str, Mapping[str, Any]]) -> None:
    """Gives them back what ``states_of`` took."""
    for one in rewards:
        if one.name in states:
            one.function.load_state_dict(states[one.name])
