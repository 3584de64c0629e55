"""Texts that are scored while they are sampled: what every sampler does, whatever it decodes with.

A worker thread scores the tokens of one step while the next steps are decoded.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from hashlib import blake2b
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from instant_reward.rewards.base import as_rewards
from instant_reward.rewards.scope import held_back, of_groups
from instant_reward.rewards.watch import Watch
from instant_reward.sampling.draw import Settings, draw, uniforms
from instant_reward.sampling.sampler import Count
from instant_reward.text import TextStream
from instant_reward.types import Mark, Prompt, Rollout, StopReason, UserError

if TYPE_CHECKING:
    from instant_reward.policies.critic import Critic
    from instant_reward.policies.policy import Policy

Scored = list[tuple[list[Mark], int | None]]


@dataclass
class Text:
    """One text while it is written."""

    key: int
    prompt: Prompt
    group: int
    sibling: int
    uniforms: np.ndarray
    stream: TextStream | None
    tokens: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    tail: str = ""
    reason: StopReason | None = None
    active: bool = True
    settled: bool = False


class LiveSampler(ABC):
    """Samples from a policy and scores what it samples (``Sampler``).

    Args:
        policy: whose model is sampled from, with weights as they were at the last ``load``.
        settings: how texts are drawn.
        version: the policy version that is written into the rollouts.
    """

    def __init__(self, policy: Policy, settings: Settings, version: int = 0) -> None:
        self.settings = settings
        self.end_ids = policy.end_ids
        self.count = Count()
        self.version = version
        self.text_decoder = policy.decoder()
        self.over = policy.over
        self.guide = _guide(policy, settings)

    @abstractmethod
    def load(self, policy: Policy, version: int) -> None:
        """Takes over the policy's weights as they are now."""

    @abstractmethod
    def begin(self, watch: Watch, worker: ThreadPoolExecutor) -> LiveStream:
        """What runs one call of ``stream``."""

    def stream(
        self, prompts: Sequence[Prompt], per_prompt: int, rewards: Sequence[Any] = (), seed: int = 0, step: int = 0
    ) -> Iterator[Rollout]:
        """Samples ``per_prompt`` texts for each prompt and yields each when it is finished and scored.

        Args:
            seed, step: what the texts are drawn with; the same pair draws the same texts.

        Raises:
            RewardError: where a reward fails; the message names the reward, the prompt and the step.
        """
        if per_prompt < 1:
            raise UserError(f"per_prompt={per_prompt} must be at least 1")
        named = as_rewards(rewards)
        watch = Watch([one for one in named if one.scope != "group"], self.text_decoder, step)
        # Scoring runs on one thread of its own, so that marks come in order and rewards need no locks.
        worker = ThreadPoolExecutor(max_workers=1, thread_name_prefix="rewards")
        try:
            rollouts = self.begin(watch, worker).run(self._texts(prompts, per_prompt, seed, step))
            yield from held_back(rollouts, named, per_prompt, step) if of_groups(named) else rollouts
        finally:  # after an error, or where the caller wants no more texts, what waits to be scored is dropped
            worker.shutdown(cancel_futures=True)

    def _texts(self, prompts: Sequence[Prompt], per_prompt: int, seed: int, step: int) -> deque[list[Text]]:
        groups: deque[list[Text]] = deque()
        met: dict[str, int] = {}
        for group, prompt in enumerate(prompts):
            turn = met.get(prompt.id, 0)
            met[prompt.id] = turn + 1
            key = int.from_bytes(
                blake2b(f"{prompt.id}\n{turn}".encode(errors="replace"), digest_size=8).digest(), "little"
            )
            groups.append(
                [
                    Text(
                        key=group * per_prompt + sibling,
                        prompt=prompt,
                        group=group,
                        sibling=sibling,
                        uniforms=uniforms(seed, step, (key, sibling), self.settings.max_new_tokens),
                        stream=self.text_decoder.stream(prompt) if self.settings.stop else None,
                    )
                    for sibling in range(per_prompt)
                ]
            )
        return groups

    def guided(self, logits: Tensor, states: Tensor) -> Tensor:
        """The logits ``[R, V]``, guided by the critic of the states ``[R, D]`` where the settings ask for it."""
        if self.guide is None:
            return logits
        return logits + self.settings.guide * self.guide.least(states).to(logits.dtype)


def _guide(policy: Policy, settings: Settings) -> Critic | None:
    if not settings.guide:
        return None
    if policy.critic is None or policy.critic.base is not None or not policy.critic.need.tables:
        raise UserError(
            "sampling.guide: it takes a critic of next tokens on the policy's own trunk; train with "
            "algorithm.name=ilql and algorithm.critic.model=head, or leave it out"
        )
    return policy.critic


class LiveStream(ABC):
    """One call of ``stream``: which texts are active, and what is being scored."""

    def __init__(self, sampler: LiveSampler, watch: Watch, worker: ThreadPoolExecutor) -> None:
        self.sampler, self.watch, self.worker = sampler, watch, worker
        self.settings = sampler.settings
        self.active: list[Text] = []
        self.fresh: list[Text] = []
        self.pending: deque[tuple[list[tuple[Text, bool]], Future[Scored]]] = deque()

    @abstractmethod
    def run(self, waiting: deque[list[Text]]) -> Iterator[Rollout]:
        """Samples the waiting texts, those of a prompt together, and yields them as they finish."""

    @abstractmethod
    def leave(self, text: Text) -> None:
        """Takes a text out of the active ones."""

    def settled(self, goes_on: bool) -> Iterator[Rollout]:
        """Acts on what has been scored and is due; finished texts are yielded.

        Args:
            goes_on: whether more will be decoded.
        """
        while self.pending and self._due(goes_on):
            yield from self._settle(*self.pending.popleft())

    def _due(self, goes_on: bool) -> bool:
        """Whether the oldest step that is being scored is to be acted on now.

        Only the stops of a token so many steps old are acted on: timing never changes a batch's shape. Where no reward
        stops a text there is nothing to wait for; the order in which texts are yielded is the same either way.
        """
        if not self.watch.may_stop:
            return self.pending[0][1].done() or not goes_on
        return len(self.pending) > self.settings.stop_lag or not goes_on

    def take(self, logits: Tensor) -> None:
        """Draws a token for every active text, sends them to be scored, and takes the finished texts out.

        Args:
            logits: ``[R, V]``, overwritten.
        """
        settings, sampler = self.settings, self.sampler
        drawn = torch.tensor([text.uniforms[len(text.tokens)] for text in self.active], dtype=torch.float64)
        forbid = torch.tensor([len(text.tokens) < settings.min_new_tokens for text in self.active])
        with torch.inference_mode():
            tokens, logprobs = draw(
                logits, drawn.to(logits.device), forbid.to(logits.device), sampler.end_ids, settings
            )
        step = []
        for text, token, logprob in zip(self.active, tokens.tolist(), logprobs.tolist(), strict=True):
            text.tokens.append(token)
            text.logprobs.append(logprob)
            text.reason = self._ending(text, token)
            step.append((text, text.reason is not None))
        sampler.count.decoded += len(step)
        items = [(text.key, [text.tokens[-1]], done) for text, done in step]
        self.pending.append((step, self.worker.submit(self._score, self.fresh, items)))
        self.fresh = []
        for text, done in step:
            if done:
                self._out(text)

    def _score(self, fresh: Sequence[Text], items: Sequence[tuple[int, list[int], bool]]) -> Scored:
        """Runs on the worker, where the rewards live."""
        for text in fresh:
            self.watch.open(text.key, text.prompt)
        return self.watch.feed_many(items)

    def _ending(self, text: Text, token: int) -> StopReason | None:
        if self.sampler.over(text.tokens, text.prompt):
            return "ended"
        if text.stream is not None:
            text.tail += text.stream.push(token)
            if any(stop in text.tail for stop in self.settings.stop):
                return "ended"
            text.tail = text.tail[-max(map(len, self.settings.stop)) :]
        return "length" if len(text.tokens) >= self.settings.max_new_tokens else None

    def _out(self, text: Text) -> None:
        self.leave(text)
        text.active = False

    def _settle(self, step: Sequence[tuple[Text, bool]], scored: Future[Scored]) -> Iterator[Rollout]:
        """Acts on what the rewards said about one step: finished texts are yielded, stopped ones taken out."""
        for (text, done), (_, stopped_at) in zip(step, scored.result(), strict=True):
            if text.settled or (stopped_at is None and not done):
                continue
            text.settled = True
            if text.active:
                self._out(text)
            # A text that ended by itself with the token at which a reward stops it has ended. One that would have been
            # cut off there is stopped: it is finished, and nothing is expected beyond it.
            ended = done and text.reason is not None and (text.reason == "ended" or stopped_at is None)
            yield self._finish(text, text.reason if ended and text.reason else "stopped")

    def _finish(self, text: Text, reason: StopReason) -> Rollout:
        drafts = self.watch.drafts(text.key)
        characters, char_ends, marks = self.watch.close(text.key)
        first = len(text.prompt.token_ids)
        kept = len(char_ends) - first
        count, settings = self.sampler.count, self.settings
        count.kept += kept
        if reason == "stopped" and text.reason is None:  # else it had come to its own end before the stop was known
            count.saved += settings.max_new_tokens - len(text.tokens)
        return Rollout(
            id=f"{text.prompt.id}/{text.sibling}",
            group=text.group,
            prompt=text.prompt,
            token_ids=[*text.prompt.token_ids, *text.tokens[:kept]],
            mask=[False] * first + [True] * kept,
            logprobs=[0.0] * first + text.logprobs[:kept],
            char_ends=char_ends,
            text=characters,
            marks=marks,
            versions=[-1] * first + [self.sampler.version] * kept,
            stop=reason,
            temperature=settings.temperature,
            forbidden_end=settings.min_new_tokens,
            at_limit=kept >= settings.max_new_tokens,
            drafts=drafts,
            reshaped=settings.top_p < 1.0 or settings.top_k > 0 or settings.guide != 0.0,
            info=text.prompt.info,
        )
