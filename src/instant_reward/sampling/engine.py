"""The decoding engine: many texts side by side over the model's key-value cache, scored while they are written.

A prompt is prefilled once and shared by its siblings; finished and stopped texts leave, waiting ones take their place.
A worker thread scores the tokens of one step while the next steps are decoded.
"""

from __future__ import annotations

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
from instant_reward.sampling.decoder import decoder_of
from instant_reward.sampling.draw import Settings, draw, uniforms
from instant_reward.sampling.sampler import Count
from instant_reward.sampling.slots import Slots
from instant_reward.text import TextDecoder, TextStream
from instant_reward.types import Mark, Prompt, Rollout, StopReason, UserError

if TYPE_CHECKING:
    from instant_reward.policies.policy import Policy

PREFILL_TOKENS = 2048  # prompts are prefilled together up to this many tokens, padding included

Scored = list[tuple[list[Mark], int | None]]


@dataclass
class _Text:
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


class Engine:
    """Samples from a policy.

    Args:
        policy: whose model is decoded, with weights as they were at the last ``load``.
        settings: how texts are drawn.
        version: the policy version that is written into the rollouts.
    """

    def __init__(self, policy: Policy, settings: Settings, version: int = 0) -> None:
        self.settings = settings
        self.tokenizer = policy.tokenizer
        self.end_ids = policy.end_ids
        self.device = policy.device
        self.count = Count()
        self.decoder = decoder_of(policy.model, policy.compute)
        self._text_decoder = TextDecoder(policy.tokenizer)
        self._pad = policy.pad_id
        self._critic = policy.critic
        if settings.guide and (
            policy.critic is None or policy.critic.base is not None or not policy.critic.need.tables
        ):
            raise UserError(
                "sampling.guide: it takes a critic of next tokens on the policy's own trunk; train with "
                "algorithm.name=ilql and algorithm.critic.model=head, or leave it out"
            )
        self.version = version

    def load(self, policy: Policy, version: int) -> None:
        """Takes over the policy's weights as they are now."""
        self.version = version
        self.decoder.load(policy.model)

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
        watch = Watch([one for one in named if one.scope != "group"], self._text_decoder, step)
        # Scoring runs on one thread of its own, so that marks come in order and rewards need no locks.
        worker = ThreadPoolExecutor(max_workers=1, thread_name_prefix="rewards")
        try:
            rollouts = _Stream(self, watch, worker).run(self._texts(prompts, per_prompt, seed, step))
            yield from held_back(rollouts, named, per_prompt, step) if of_groups(named) else rollouts
        finally:  # after an error, or where the caller wants no more texts, what waits to be scored is dropped
            worker.shutdown(cancel_futures=True)

    def _texts(self, prompts: Sequence[Prompt], per_prompt: int, seed: int, step: int) -> deque[list[_Text]]:
        groups: deque[list[_Text]] = deque()
        met: dict[str, int] = {}
        for group, prompt in enumerate(prompts):
            turn = met.get(prompt.id, 0)
            met[prompt.id] = turn + 1
            key = int.from_bytes(
                blake2b(f"{prompt.id}\n{turn}".encode(errors="replace"), digest_size=8).digest(), "little"
            )
            groups.append(
                [
                    _Text(
                        key=group * per_prompt + sibling,
                        prompt=prompt,
                        group=group,
                        sibling=sibling,
                        uniforms=uniforms(seed, step, (key, sibling), self.settings.max_new_tokens),
                        stream=self._text_decoder.stream() if self.settings.stop else None,
                    )
                    for sibling in range(per_prompt)
                ]
            )
        return groups

    def prefill(self, prompts: Sequence[Prompt]) -> tuple[Sequence[Any], Tensor]:
        """Reads prompts; returns what the cache keeps of each, and the logits ``[P, V]`` of what follows."""
        filled, states = self.decoder.prefill(prompts, self._pad)
        return filled, self._logits(states)

    def decode(self, tokens: list[int], cache: Slots) -> Tensor:
        """One token a row; returns the logits ``[R, V]`` of what follows."""
        return self._logits(self.decoder.decode(torch.tensor(tokens), cache))

    def new_cache(self, groups: Sequence[Sequence[_Text]]) -> Slots:
        """Room for the longest prompt with a full text behind it, in every slot."""
        longest = max(len(texts[0].prompt.token_ids) for texts in groups)
        slots = min(self.settings.rows, sum(len(texts) for texts in groups))
        return self.decoder.new_cache(slots, longest + self.settings.max_new_tokens)

    @torch.inference_mode()
    def _logits(self, states: Tensor) -> Tensor:
        """``[R, V]``, guided by the critic where the settings ask for it."""
        logits = self.decoder.head(states)
        logits = logits if logits.dtype == torch.float64 else logits.float()
        if self.settings.guide and self._critic is not None:
            logits = logits + self.settings.guide * self._critic.least(states).to(logits.dtype)
        return logits


class _Stream:
    """One call of ``Engine.stream``: which texts are active, which wait, and what is being scored."""

    def __init__(self, engine: Engine, watch: Watch, worker: ThreadPoolExecutor) -> None:
        self.engine, self.watch, self.worker = engine, watch, worker
        self.settings = engine.settings
        self.active: list[_Text] = []
        self.fresh: list[_Text] = []
        self.pending: deque[tuple[list[tuple[_Text, bool]], Future[Scored]]] = deque()
        self.split: tuple[Any, Tensor] | None = None  # the read prompt of a group that did not fit whole

    def run(self, waiting: deque[list[_Text]]) -> Iterator[Rollout]:
        if not waiting:
            return
        cache = self.cache = self.engine.new_cache(waiting)
        while self.active or waiting or self.pending:
            logits = self.engine.decode([text.tokens[-1] for text in self.active], cache) if self.active else None
            logits = self._admit(waiting, logits)
            if logits is not None:
                self._take(logits)
            while self.pending and self._due(bool(self.active or waiting)):
                yield from self._settle(*self.pending.popleft())

    def _due(self, goes_on: bool) -> bool:
        """Whether the oldest step that is being scored is to be acted on now.

        Only the stops of a token so many steps old are acted on: timing never changes a batch's shape. Where no reward
        stops a text there is nothing to wait for; the order in which texts are yielded is the same either way.
        """
        if not self.watch.may_stop:
            return self.pending[0][1].done() or not goes_on
        return len(self.pending) > self.settings.stop_lag or not goes_on

    def _admit(self, waiting: deque[list[_Text]], logits: Tensor | None) -> Tensor | None:
        """Waiting texts take the free slots, several prompts prefilled together; siblings share one prefill."""
        free = self.cache.slots - len(self.active)
        chosen: list[list[_Text]] = []
        longest = 0
        while waiting and free > 0:
            longest = max(longest, len(waiting[0][0].prompt.token_ids))
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

    def _take(self, logits: Tensor) -> None:
        """Draws a token for every active text, sends them to be scored, and frees the slots of finished texts."""
        settings, engine = self.settings, self.engine
        drawn = torch.tensor([text.uniforms[len(text.tokens)] for text in self.active], dtype=torch.float64)
        forbid = torch.tensor([len(text.tokens) < settings.min_new_tokens for text in self.active])
        with torch.inference_mode():
            tokens, logprobs = draw(logits, drawn.to(logits.device), forbid.to(logits.device), engine.end_ids, settings)
        step = []
        for text, token, logprob in zip(self.active, tokens.tolist(), logprobs.tolist(), strict=True):
            text.tokens.append(token)
            text.logprobs.append(logprob)
            text.reason = self._ending(text, token)
            step.append((text, text.reason is not None))
        engine.count.decoded += len(step)
        items = [(text.key, [text.tokens[-1]], done) for text, done in step]
        self.pending.append((step, self.worker.submit(self._score, self.fresh, items)))
        self.fresh = []
        for text, done in step:
            if done:
                self._leave(text)

    def _score(self, fresh: Sequence[_Text], items: Sequence[tuple[int, list[int], bool]]) -> Scored:
        """Runs on the worker, where the rewards live."""
        for text in fresh:
            self.watch.open(text.key, text.prompt)
        return self.watch.feed_many(items)

    def _ending(self, text: _Text, token: int) -> StopReason | None:
        if token in self.engine.end_ids:
            return "ended"
        if text.stream is not None:
            text.tail += text.stream.push(token)
            if any(stop in text.tail for stop in self.settings.stop):
                return "ended"
            text.tail = text.tail[-max(map(len, self.settings.stop)) :]
        return "length" if len(text.tokens) >= self.settings.max_new_tokens else None

    def _leave(self, text: _Text) -> None:
        """Frees a text's slot; the last active text moves into it, as it does in the cache."""
        slot = next(index for index, other in enumerate(self.active) if other is text)
        self.cache.remove(slot)
        last = self.active.pop()
        if slot < len(self.active):
            self.active[slot] = last
        text.active = False

    def _settle(self, step: Sequence[tuple[_Text, bool]], scored: Future[Scored]) -> Iterator[Rollout]:
        """Acts on what the rewards said about one step: finished texts are yielded, stopped ones taken out."""
        for (text, done), (_, stopped_at) in zip(step, scored.result(), strict=True):
            if text.settled or (stopped_at is None and not done):
                continue
            text.settled = True
            if text.active:
                self._leave(text)
            # A text that ended by itself with the token at which a reward stops it has ended. One that would have been
            # cut off there is stopped: it is finished, and nothing is expected beyond it.
            ended = done and text.reason is not None and (text.reason == "ended" or stopped_at is None)
            yield self._finish(text, text.reason if ended and text.reason else "stopped")

    def _finish(self, text: _Text, reason: StopReason) -> Rollout:
        characters, char_ends, marks = self.watch.close(text.key)
        first = len(text.prompt.token_ids)
        kept = len(char_ends) - first
        count, settings = self.engine.count, self.settings
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
            versions=[-1] * first + [self.engine.version] * kept,
            stop=reason,
            temperature=settings.temperature,
            forbidden_end=settings.min_new_tokens,
            at_limit=kept >= settings.max_new_tokens,
            reshaped=settings.top_p < 1.0 or settings.top_k > 0 or settings.guide != 0.0,
            info=text.prompt.info,
        )
