"""A policy on prompts it was never trained on: what it writes, how that scores, how the reference model finds it."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from instant_reward import assemble
from instant_reward.batch import collate
from instant_reward.collect import prompts_of
from instant_reward.config import Config
from instant_reward.evaluate.metrics import evaluate_texts
from instant_reward.policies.kinds import load_policy
from instant_reward.policies.policy import Policy
from instant_reward.records import rollout_from_record, rollout_record
from instant_reward.rewards.base import Reward
from instant_reward.rewards.compose import Change
from instant_reward.sampling.sampler import in_order
from instant_reward.start import start_name
from instant_reward.train import sampling_settings
from instant_reward.types import Prompt, Rollout


@dataclass
class Measurement:
    """The figures of ``evaluate_texts`` and the texts they are of."""

    figures: dict[str, float]
    rollouts: list[Rollout]

    def write(self, path: Path) -> None:
        """Keeps it as JSON, so that a resumed run still knows how it began."""
        record = {"figures": self.figures, "rollouts": [rollout_record(rollout) for rollout in self.rollouts]}
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(record))

    @classmethod
    def read(cls, path: Path) -> Measurement:
        """What ``write`` kept."""
        record = json.loads(path.read_text())
        return cls(record["figures"], [rollout_from_record(one) for one in record["rollouts"]])


class HeldOut:
    """Measures policies on the held-out prompts of a config, always with the same prompts and random numbers.

    Attributes:
        labels: what the score of each reward is called in a table: which were trained on, which were held out.
    """

    def __init__(self, config: Config, rewards: Sequence[Reward], policy: Policy) -> None:
        assert config.evaluate.prompts is not None, "the config names no held-out prompts"
        self.config = config
        self.rewards = [one for one in rewards if one.takes != "pair"]  # those compare given texts
        self.held_out = [one.but(train=False) for one in assemble.build_rewards(config.evaluate.held_out)]
        rows = assemble.load_prompt_rows(config.evaluate.prompts)
        room = config.sampling.max_new_tokens
        self.prompts: Sequence[Prompt] = prompts_of(
            config.evaluate.prompts, rows, policy, room, config.model.max_context
        )
        self.reference = load_policy(start_name(config, config.out), config.model.dtype)
        self.labels = {f"score/{one.name}": f"{one.name} (trained on)" for one in self.rewards if one.train}
        watched = [one for one in [*self.rewards, *self.held_out] if not one.train]
        self.labels |= {f"score/{one.name}": f"{one.name} (held out)" for one in watched}

    def measure(self, policy: Policy) -> Measurement:
        """Samples from the policy and scores what it wrote."""
        every = [*self.rewards, *self.held_out]
        settings = sampling_settings(self.config)
        if policy.critic is None:  # the model before training has none that could guide it
            settings = replace(settings, guide=0.0)
        stream = policy.engine(settings).stream(
            self.prompts, self.config.evaluate.texts_per_prompt, every, seed=self.config.seed
        )
        rollouts = in_order(stream)
        scores = {one.name: _score(one, rollouts) for one in every}
        return Measurement(evaluate_texts(rollouts, scores, self._reference_logprobs), rollouts)

    def _reference_logprobs(self, rollouts: Sequence[Rollout]) -> list[list[float]]:
        batch = collate(rollouts, pad_id=self.reference.pad_id)
        values = self.reference.score(batch, self.config.train.tokens_per_part)
        return [row[mask].tolist() for row, mask in zip(values, batch.mask, strict=True)]


def _score(one: Reward, rollouts: Sequence[Rollout]) -> Callable[[Sequence[str]], list[float]]:
    """The final score of each text: of a change, the score that changes; of other rewards, the sum of the marks."""
    if isinstance(one.function, Change):
        score, batched = one.function.score, one.function.batched
        return lambda texts: list(score(list(texts))) if batched else [score(text) for text in texts]
    totals = [rollout.total(one.name) for rollout in rollouts]
    return lambda texts: totals
