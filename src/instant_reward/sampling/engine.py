"""The decoding engine: many texts side by side over the model's key-value cache, scored while they are written.

A prompt is prefilled once and shared by its siblings; finished and stopped texts leave, waiting ones take their place.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from instant_reward.rewards.watch import Watch
from instant_reward.sampling.decoder import decoder_of
from instant_reward.sampling.draw import Settings
from instant_reward.sampling.live import LiveSampler, LiveStream, Text
from instant_reward.sampling.slots import Slots
from instant_reward.types import Prompt, Rollout

if TYPE_CHECKING:
    from instant_reward.policies.policy import Policy

PREFILL_TOKENS = 2048  # prompts are prefilled together up to this many tokens, padding included


class Engine(LiveSampler):
    """Samples from a policy that has a key-value cache (``LiveSampler``)."""

    def __init__(self, policy: Policy, settings: Settings, version: int = 0) -> None:
        super().__init__(policy, settings, version)
        self.tokenizer = policy.tokenizer
        self.device = policy.device
        self.decoder = decoder_of(policy.model, policy.compute)
        self._pad = policy.pad_id

    def load(self, policy: Policy, version: int) -> None:
        """See ``Sampler``."""
        self.version = version
        self.decoder.load(policy.model)

    def begin(self, watch: Watch, worker: ThreadPoolExecutor) -> LiveStream:
        """See ``LiveSampler``."""
        return _Stream(self, watch, worker)

    def prefill(self, prompts: Sequence[Prompt]) -> tuple[Sequence[Any], Tensor]:
        """Reads prompts; returns what the cache keeps of each, and the logits ``[P, V]`` of what follows."""
        filled, states = self.decoder.prefill(prompts, self._pad)
        return filled, self._logits(states)

    def decode(self, tokens: list[int], cache: Slots) -> Tensor:
        """One token a row; returns the logits ``[R, V]`` of what follows."""
        return self._logits(self.decoder.decode(torch.tensor(tokens), cache))

    def new_cache(self, groups: Sequence[Sequence[Text]]) -> Slots:
        """Room for the longest prompt with a full text behind it, in every slot."""
        longest = max(len(texts[0].prompt.token_ids) for texts in groups)
        slots = min(self.settings.rows, sum(len(texts) for texts in groups))
        return self.decoder.new_cache(slots, longest + self.settings.max_new_tokens)

    @torch.inference_mode()
    def _logits(self, states: Tensor) -> Tensor:
        """``[R, V]``, guided by the critic where the settings ask for it."""
        logits = self.decoder.head(states)
        return self.guided(logits if logits.dtype == torch.float64 else logits.float(), states)


class _Stream(LiveStream):
    """Which texts hold a slot of the cache, and which wait for one."""

    def __init__(self, engine: Engine, watch: Watch, worker: ThreadPoolExecutor) -> None:
        super().__init__(engine, watch, worker)
        self.engine = engine
        self.split: tuple[Any, Tensor] | None = None  # the read prompt of a group that did not fit whole

    def run(self, waiting: deque[list[Text]]) -> Iterator[Rollout]:
        """See ``LiveStream``."""
        if not waiting:
            return
        cache = self.cache = self.engine.new_cache(waiting)
        while self.active or waiting or self.pending:
            logits = self.engine.decode([text.tokens[-1] for text in self.active], cache) if self.active else None
            logits = self._admit(waiting, logits)
            if logits is not None:
                self.take(logits)
            yield from self.settled(bool(self.active or waiting))

    def _admit(self, waiting: deque[list[Text]], logits: Tensor | None) -> Tensor | None:
        """Waiting texts take the free slots, several prompts prefilled together; siblings share one prefill."""
        free = self.cache.slots - len(self.active)
        chosen: list[list[Text]] = []
        longest = 0
        while waiting and free > 0:
            longest = max(longest, _to_read(waiting[0][0].prompt))
            if chosen and longest * (len(chosen) + 1) > PREFILL_TOKENS:
                break
            siblings = waiting.popleft()
            now, later = siblings[:free], siblings[free:]
            if later:
                waiting.appendleft(later)
            chosen.append(now)
            free -= len(now)
        if not chosen:
            return logits
        read = [] if self.split is None else [self.split]
        unread = [texts[0].prompt for texts in chosen[len(read) :]]
        if unread:
            prompts, first = self.engine.prefill(unread)
            read += list(zip(prompts, first, strict=True))
        parts = [] if logits is None else [logits]
        for texts, (filled, following) in zip(chosen, read, strict=True):
            self.cache.add(filled, len(texts))
            self.active += texts
            self.fresh += texts
            parts.append(following.expand(len(texts), -1))
        self.split = read[-1] if waiting and waiting[0][0].group == chosen[-1][0].group else None
        return torch.cat(parts)

    def leave(self, text: Text) -> None:
        """Frees a text's slot; the last active text moves into it, as it does in the cache."""
        slot = next(index for index, other in enumerate(self.active) if other is text)
        self.cache.remove(slot)
        last = self.active.pop()
        if slot < len(self.active):
            self.active[slot] = last


def _to_read(prompt: Prompt) -> int:
    """How many tokens a prefill reads: the prompt's, and its source's where an encoder reads one."""
    return len(prompt.token_ids) + len(prompt.context or ())
