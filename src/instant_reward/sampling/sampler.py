"""What the loop asks of whatever samples from a policy."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from instant_reward.types import Prompt, Rollout

if TYPE_CHECKING:
    from instant_reward.policies.policy import Policy


@dataclass
class Count:
    """What an engine has decoded.

    Attributes:
        decoded: tokens drawn in all.
        kept: tokens that ended up in texts.
        saved: tokens that were never drawn because a reward stopped their text.
    """

    decoded: int = 0
    kept: int = 0
    saved: int = 0


class Sampler(Protocol):
    """Samples texts from a policy as it was at the last ``load``, and scores them while they are written.

    Attributes:
        count: what it has sampled; version: the policy's, written into the rollouts.
    """

    count: Count
    version: int

    def load(self, policy: Policy, version: int) -> None:
        """Takes over the policy's weights as they are now."""

    def stream(
        self, prompts: Sequence[Prompt], per_prompt: int, rewards: Sequence[Any] = (), seed: int = 0, step: int = 0
    ) -> Iterator[Rollout]:
        """Samples ``per_prompt`` texts for each prompt and yields each when it is finished and scored."""


def in_order(rollouts: Iterable[Rollout]) -> list[Rollout]:
    """Rollouts in the order of their prompts, siblings next to each other; a stream yields them as they finish."""
    return sorted(rollouts, key=lambda rollout: (rollout.group, int(rollout.id.rpartition("/")[2])))
