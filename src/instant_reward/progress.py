"""The metrics of one step, gathered while the loop goes."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import replace

import torch

from instant_reward.batch import Batch
from instant_reward.importance import effective_sample_size
from instant_reward.rewards.base import Reward
from instant_reward.sampling.sampler import Count
from instant_reward.types import LossOutput, Needs, PolicyOutput, Rollout


class Metrics:
    """Gathers one step's metrics.

    ``reward`` is the mean over texts of the weighted sum of the learned sources, shaping left out;
    ``reward/<source>`` is the mean raw sum of one source, ``weight/<source>`` its weight at this step and
    ``weighted/<source>`` the product of both; ``kl`` and ``entropy`` are nats per sampled token;
    ``length`` counts sampled tokens a text. A reward that counts what it costs (``summary()``: a judge's requests,
    tokens and money, the failures of worker processes) has what it counted in this step under its name. Keys that
    begin with ``time/`` are seconds; they and ``tokens_per_second`` alone depend on the machine.
    """

    def __init__(self, rewards: Sequence[Reward], count: Count | None, needs: Needs) -> None:
        self._rewards, self._needs = rewards, needs
        self._samples = count is not None
        self._totals: dict[str, float] = {}
        self._before = replace(count) if count else Count()
        self._costs = _costs(rewards)
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
        self._totals = {one.name: sum(rollout.total(one.name) for rollout in rollouts) / count for one in self._rewards}
        self._rows = {
            **({"reward": 0.0} if self._rewards or self._samples else {}),  # the first column; see ``_weighted``
            **{f"reward/{name}": total for name, total in self._totals.items()},
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

    def row(self, batch: Batch, count: Count | None) -> dict[str, float]:
        """The finished row.

        Args:
            count: the sampler's; None where the texts were given, whose target tokens are then counted.
        """
        count = count or Count(batch.token_count, batch.token_count)
        now = time.perf_counter()
        updates = max(1, len(self._steps) + self._stopped_early)
        row = dict(self._rows)
        row |= _divergences(batch)
        tables = self._needs.critic is not None and self._needs.critic.tables > 0
        imitates = "target_weight" in self._sums  # given texts: ratios to whoever wrote them mean nothing
        row |= ({} if imitates else _off_policy(batch)) | _critic(batch, tables)
        row |= self._weighted(batch)
        if self._stopped_early:
            row["stopped_early"] = 1.0
        row["entropy"] = self._entropy / max(1.0, self._passes)
        row |= {key: value / updates for key, value in self._sums.items()}
        if imitates:
            row["effective_targets"] = _effective_targets(batch)
        for key in self._steps[-1] if self._steps else ():
            row[key] = sum(values[key] for values in self._steps) / len(self._steps)
        if not self._steps:  # the texts were too old for a first step
            row |= {"grad_norm": 0.0, "learning_rate": 0.0}
        decoded = count.decoded - self._before.decoded
        row["tokens"] = float(count.kept - self._before.kept)
        row["tokens_saved"] = float(count.saved - self._before.saved)
        row |= {key: total - self._costs[key] for key, total in _costs(self._rewards).items()}
        row["tokens_per_second"] = decoded / (now - self._begun)
        row["time/sampling"] = self._sampled_at - self._begun
        row["time/learning"] = now - self._sampled_at
        return row

    def _weighted(self, batch: Batch) -> dict[str, float]:
        """Every source's weight and weighed value, their sum, and the coefficients that follow a target."""
        carried = {"kl": batch.carried.kl, "entropy": batch.carried.entropy}
        found = {f"weight/{key}": value for key, value in carried.items() if value is not None}
        found |= {f"weight/{source.name}": source.weight for source in batch.sources}
        learned = [source for source in batch.sources if source.name in self._totals]
        products = {source.name: source.weight * self._totals[source.name] for source in learned}
        earned = sum(products[source.name] for source in learned if source.earned)
        total = {"reward": earned} if "reward" in self._rows else {}
        return {**total, **found, **{f"weighted/{name}": value for name, value in products.items()}}


def _effective_targets(batch: Batch) -> float:
    """The share of the target tokens that a mean weighed so rests on, Kish (1965): ``(sum w)**2 / (n * sum w**2)``."""
    assert batch.advantages is not None, "credit the batch first: it has no weights"
    weights = batch.advantages[batch.mask].double()
    squares = float((weights**2).sum())
    return float(weights.sum()) ** 2 / (len(weights) * squares) if squares > 0 else 0.0


def _costs(rewards: Sequence[Reward]) -> dict[str, float]:
    """What the rewards that count their cost have counted so far."""
    counting = [(one.name, getattr(one.function, "summary", None)) for one in rewards]
    return {
        f"{name}/{key}": float(value)
        for name, summary in counting
        if callable(summary)
        for key, value in summary().items()
    }


def _divergences(batch: Batch) -> dict[str, float]:
    """The log-ratio to the reference and to the teacher per token: a KL on the policy's own texts, and on no others."""
    own = batch.old_logprobs if batch.proximal_logprobs is None else batch.proximal_logprobs
    others = {"kl": batch.ref_logprobs, "teacher_kl": batch.teacher_logprobs}
    count = int(batch.own.sum())
    if not count:
        return {}
    return {key: float((own - other)[batch.own].sum()) / count for key, other in others.items() if other is not None}


def _off_policy(batch: Batch) -> dict[str, float]:
    """How old the texts are, and how many of them count."""
    if batch.proximal_logprobs is None:
        return {}
    newest = int(batch.versions.max())
    age = (newest - batch.versions)[batch.mask].double()
    size = effective_sample_size(batch.proximal_logprobs - batch.old_logprobs, batch.mask)
    return {"effective_sample_size": size, "staleness": float(age.mean())}


def _critic(batch: Batch, tables: bool) -> dict[str, float]:
    """How well the critic foresaw its targets: ``1 - Var(target - V) / Var(target)`` of the weighted sum of sources.

    Args:
        tables: whether it is one of next tokens, whose one value is that sum already.
    """
    if batch.values is None or batch.targets is None:
        return {}
    weights = torch.tensor([source.weight for source in batch.sources], dtype=batch.targets.dtype)
    weights = torch.ones(1, dtype=batch.targets.dtype) if tables else weights
    target = torch.einsum("bkl,k->bl", batch.targets, weights)[batch.mask]
    error = target - torch.einsum("bkl,k->bl", batch.values.to(weights.dtype), weights)[batch.mask]
    spread = float(target.var(correction=0))
    explained = 1.0 - float(error.var(correction=0)) / spread if spread > 0 else 0.0
    return {"explained_variance": explained, "value": float((target - error).mean())}
