"""Sampling of decisions: actions chosen step by step for a context, scored while they are chosen."""

from __future__ import annotations

import copy
from collections import deque
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from instant_reward.policies.decisions import Steps
from instant_reward.rewards.watch import Watch
from instant_reward.sampling.draw import Settings
from instant_reward.sampling.live import LiveSampler, LiveStream, Text
from instant_reward.types import Rollout

if TYPE_CHECKING:
    from instant_reward.policies.decisions import DecisionPolicy
    from instant_reward.policies.policy import Policy


class DecisionSampler(LiveSampler):
    """Samples from a policy that chooses actions for contexts (``LiveSampler``).

    ``settings.rows`` texts are written side by side; siblings share what the model makes of their context.
    """

    def __init__(self, policy: DecisionPolicy, settings: Settings, version: int = 0) -> None:
        super().__init__(policy, settings, version)
        self.policy = policy
        self.model = copy.deepcopy(policy.model)

    @torch.no_grad()
    def load(self, policy: Policy, version: int) -> None:
        """See ``Sampler``."""
        self.version = version
        for mine, theirs in zip(self.model.parameters(), policy.model.parameters(), strict=True):
            mine.copy_(theirs)

    def begin(self, watch: Watch, worker: ThreadPoolExecutor) -> LiveStream:
        """See ``LiveSampler``."""
        return _Stream(self, watch, worker)

    @torch.inference_mode()
    def logits(self, encoded: Any, rows: Tensor, before: list[list[int]]) -> Tensor:
        """The logits ``[R, A]`` of the next actions; minus infinity where one may not be taken."""
        free = torch.zeros(len(rows), dtype=torch.bool, device=rows.device)
        found = self.policy.choose(self.model, encoded, Steps(rows, before), free)
        logits = found.logits(slice(None))
        return self.guided(logits if logits.dtype == torch.float64 else logits.float(), found.hidden)


class _Stream(LiveStream):
    """Waves of texts: the contexts of a wave are read together, and its texts are written to their ends."""

    def __init__(self, sampler: DecisionSampler, watch: Watch, worker: ThreadPoolExecutor) -> None:
        super().__init__(sampler, watch, worker)
        self.chooser = sampler
        self.encoded: Any = None
        self.row: dict[int, int] = {}

    def run(self, waiting: deque[list[Text]]) -> Iterator[Rollout]:
        """See ``LiveStream``."""
        while self.active or waiting or self.pending:
            if waiting and not self.active:
                self._admit(waiting)
            if self.active:
                rows = torch.tensor([self.row[text.key] for text in self.active], device=self.chooser.policy.device)
                self.take(self.chooser.logits(self.encoded, rows, [list(text.tokens) for text in self.active]))
            yield from self.settled(bool(self.active or waiting))

    @torch.inference_mode()
    def _admit(self, waiting: deque[list[Text]]) -> None:
        """The next wave: whole groups while they fit, a part of one that alone is too large."""
        self.row = {}
        contexts: list[Any] = []
        free = self.settings.rows
        while waiting and free > 0:
            siblings = waiting.popleft()
            if len(siblings) > free and self.active:
                waiting.appendleft(siblings)
                break
            now, later = siblings[:free], siblings[free:]
            if later:
                waiting.appendleft(later)
            self.row |= {text.key: len(contexts) for text in now}
            contexts.append(now[0].prompt.context)
            self.active += now
            free -= len(now)
        self.fresh += self.active
        self.encoded = self.chooser.policy.read(self.chooser.model, contexts)

    def leave(self, text: Text) -> None:
        """See ``LiveStream``."""
        self.active = [other for other in self.active if other is not text]
