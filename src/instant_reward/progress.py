"""The metrics of one step, gathered while the loop goes."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import replace

import torch

from instant_reward.batch import Batch
from instant_reward.credit import Source
from instant_reward.importance import effective_sample_size
from instant_reward.rewards.base import Reward
from instant_reward.sampling.engine import Count
from instant_reward.types import LossOutput, PolicyOutput, Rollout


class Metrics:
    """Gathers one step's metrics.

    ``reward`` is the mean over texts of the weighted sum of the learned sources, shaping left out;
    ``reward/<source>`` is the mean raw sum of one source; ``kl`` and ``entropy`` are nats per sampled token;
    ``length`` counts sampled tokens a text. Keys that begin with ``time/`` are seconds; they and ``tokens_per_second``
    alone depend on the machine.
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
        self._stopped_early = False

    def sampled(self, rollouts: Sequence[Rollout], skipped: int = 0) -> None:
        """Takes in the step's fresh texts, and how many groups were left out as equals."""
        self._sampled_at = time.perf_counter()
        count = len(rollouts)
        lengths = [sum(rollout.mask) for rollout in rollouts]
        names = {one.name for one in self._rewards}
        learned = {source.name: source.weight for source in self._sources if source.earned and source.name in names}
        totals = {one.name: sum(rollout.total(one.name) for rollout in rollouts) / count for one in self._rewards}
        self._rows = {
            "reward": sum(weight * totals[name] for name, weight in learned.items()),
            **{f"reward/{name}": total for name, total in totals.items()},
            "length": sum(lengths) / count,
            "ended": sum(rollout.stop == "ended" for rollout in rollouts) / count,
            "stopped": sum(rollout.stop == "stopped" for rollout in rollouts) / count,
        }
        if skipped:
            self._rows["skipped_groups"] = float(skipped)

    def learned(self, output: PolicyOutput, loss: LossOutput, part: Batch) -> None:
        """Takes in one part's forward and backward pass."""
        share = {"loss": float(loss.loss.detach()), **loss.metrics}
        for key, value in share.items():
            self._sums[key] = self._sums.get(key, 0.0) + value
        if output.entropy is not None:
            self._entropy += float(output.entropy.detach().sum())
            self._passes += float(part.mask.sum())

    def stopped_early(self) -> None:
        """Takes in that the policy was too far from its sampler for another optimizer step."""
        self._stopped_early = True

    def stepped(self, values: dict[str, float]) -> None:
        """Takes in what an optimizer step said."""
        self._steps.append(values)

    def row(self, batch: Batch, count: Count) -> dict[str, float]:
        """The finished row."""
        now = time.perf_counter()
        updates = max(1, len(self._steps) + self._stopped_early)
        row = dict(self._rows)
        if batch.ref_logprobs is not None:
            own = batch.old_logprobs if batch.proximal_logprobs is None else batch.proximal_logprobs
            gap = (own - batch.ref_logprobs) * batch.mask
            row["kl"] = float(gap.sum()) / max(1, batch.token_count)
        if batch.teacher_logprobs is not None:
            own = batch.old_logprobs if batch.proximal_logprobs is None else batch.proximal_logprobs
            gap = (own - batch.teacher_logprobs) * batch.mask
            row["teacher_kl"] = float(gap.sum()) / max(1, batch.token_count)
        row |= _off_policy(batch) | _critic(batch)
        row |= {f"weight/{key}": value for key, value in self._followed(batch).items()}
        if self._stopped_early:
            row["stopped_early"] = 1.0
        row["entropy"] = self._entropy / max(1.0, self._passes)
        row |= {key: value / updates for key, value in self._sums.items()}
        for key in self._steps[-1] if self._steps else ():
            row[key] = sum(values[key] for values in self._steps) / len(self._steps)
        if not self._steps:  # the texts were too old for a first step
            row |= {"grad_norm": 0.0, "learning_rate": 0.0}
        decoded = count.decoded - self._before.decoded
        row["tokens"] = float(count.kept - self._before.kept)
        row["tokens_saved"] = float(count.saved - self._before.saved)
        row["tokens_per_second"] = decoded / (now - self._begun)
        row["time/sampling"] = self._sampled_at - self._begun
        row["time/learning"] = now - self._sampled_at
        return row

    @staticmethod
    def _followed(batch: Batch) -> dict[str, float]:
        """The coefficients that follow a target."""
        carried = {"kl": batch.carried.kl, "entropy": batch.carried.entropy}
        return {key: value for key, value in carried.items() if value is not None}


def _off_policy(batch: Batch) -> dict[str, float]:
    """How old the texts are, and how many of them count."""
    if batch.proximal_logprobs is None:
        return {}
    newest = int(batch.versions.max())
    age = (newest - batch.versions)[batch.mask].double()
    size = effective_sample_size(batch.proximal_logprobs - batch.old_logprobs, batch.mask)
    return {"effective_sample_size": size, "staleness": float(age.mean())}


def _critic(batch: Batch) -> dict[str, float]:
    """How well the critic foresaw its targets: ``1 - Var(target - V) / Var(target)`` of the weighted sum of sources."""
    if batch.values is None or batch.targets is None:
        return {}
    weights = torch.tensor([source.weight for source in batch.sources], dtype=batch.targets.dtype)
    weights = weights if batch.targets.shape[1] == len(weights) else torch.ones(1, dtype=batch.targets.dtype)
    target = torch.einsum("bkl,k->bl", batch.targets, weights)[batch.mask]
    error = target - torch.einsum("bkl,k->bl", batch.values.to(weights.dtype), weights)[batch.mask]
    spread = float(target.var(correction=0))
    explained = 1.0 - float(error.var(correction=0)) / spread if spread > 0 else 0.0
    return {"explained_variance": explained, "value": float((target - error).mean())}
