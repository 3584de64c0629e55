"""The metrics of one step, gathered while the loop goes."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import replace

from instant_reward.batch import Batch
from instant_reward.credit import Source
from instant_reward.rewards.base import Reward
from instant_reward.sampling.engine import Count
from instant_reward.types import LossOutput, PolicyOutput, Rollout


class Metrics:
    """Gathers one step's metrics.

    ``reward`` is the mean over texts of the weighted sum of the learned sources, ``reward/<source>`` the mean raw sum
    of one source; ``kl`` and ``entropy`` are nats per sampled token; ``length`` counts sampled tokens a text. Keys that
    begin with ``time/`` are seconds; they and ``tokens_per_second`` alone depend on the machine.
    """

    def __init__(self, rewards: Sequence[Reward], sources: Sequence[Source], count: Count) -> None:
        self._rewards, self._sources = rewards, sources
        self._before = replace(count)
        self._begun = time.perf_counter()
        self._sampled_at = self._begun
        self._sums: dict[str, float] = {}
        self._steps: list[dict[str, float]] = []
        self._entropy, self._passes = 0.0, 0.0
        self._rows: dict[str, float] = {}

    def sampled(self, rollouts: Sequence[Rollout]) -> None:
        """Takes in the step's texts."""
        self._sampled_at = time.perf_counter()
        count = len(rollouts)
        lengths = [sum(rollout.mask) for rollout in rollouts]
        weights = {source.name: source.weight for source in self._sources}
        totals = {one.name: sum(rollout.total(one.name) for rollout in rollouts) / count for one in self._rewards}
        self._rows = {
            "reward": sum(weight * totals[name] for name, weight in weights.items()),
            **{f"reward/{name}": total for name, total in totals.items()},
            "length": sum(lengths) / count,
            "ended": sum(rollout.stop == "ended" for rollout in rollouts) / count,
            "stopped": sum(rollout.stop == "stopped" for rollout in rollouts) / count,
        }

    def learned(self, output: PolicyOutput, loss: LossOutput, part: Batch) -> None:
        """Takes in one part's forward and backward pass."""
        share = {"loss": float(loss.loss.detach()), **loss.metrics}
        for key, value in share.items():
            self._sums[key] = self._sums.get(key, 0.0) + value
        if output.entropy is not None:
            self._entropy += float(output.entropy.sum())
            self._passes += float(part.mask.sum())

    def stepped(self, values: dict[str, float]) -> None:
        """Takes in what an optimizer step said."""
        self._steps.append(values)

    def row(self, batch: Batch, count: Count) -> dict[str, float]:
        """The finished row."""
        now = time.perf_counter()
        updates = max(1, len(self._steps))
        row = dict(self._rows)
        if batch.ref_logprobs is not None:
            gap = (batch.old_logprobs - batch.ref_logprobs) * batch.mask
            row["kl"] = float(gap.sum()) / max(1, batch.token_count)
        row["entropy"] = self._entropy / max(1.0, self._passes)
        row |= {key: value / updates for key, value in self._sums.items()}
        for key in self._steps[-1] if self._steps else ():
            row[key] = sum(values[key] for values in self._steps) / updates
        decoded = count.decoded - self._before.decoded
        row["tokens"] = float(count.kept - self._before.kept)
        row["tokens_saved"] = float(count.saved - self._before.saved)
        row["tokens_per_second"] = decoded / (now - self._begun)
        row["time/sampling"] = self._sampled_at - self._begun
        row["time/learning"] = now - self._sampled_at
        return row
