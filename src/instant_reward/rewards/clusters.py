"""Clustering without labels: a classifier's labels are the clusters, and a reward says how well a text sits in its own.

    rewards:
      - use: instant_reward.rewards.clusters:Clusters
        args: {labels: [one, two, three]}

How good an assignment is hangs on where the other texts went. A view shows one text, so the others are those of
earlier steps: the reward remembers the run (``scope="run"``). While a step is sampled it reads the clusters as they
were when the step began, and it takes in what the step assigned when that is over.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from instant_reward.types import Rollout, UserError, View

Embed = Callable[[Sequence[str]], Any]


class Clusters:
    """How much nearer a text is to its own cluster's centre than to the nearest other one, plus what keeps all in use.

    ``cos(x, own centre) - max over others of cos(x, centre) - balance * log(share of the label * number of labels)``,
    seen from the mean of all texts; the first part lies in [-2, 2]. It is the silhouette with centres in place of all
    pairs of points (Rousseeuw, 1987, for the silhouette): cohesion less separation. Without ``balance`` one cluster
    that holds everything is as good as none; the last term is the gradient of the labels' entropy over texts (Krause,
    Perona and Gomes, 2010).

    Cost: one embedding a text. What games it: nothing in the text, which is given; but as with k-means, which clusters
    are found hangs on the first, random assignments.

    Args:
        labels: of the classifier.
        embed: makes vectors ``[N, D]`` of the texts that are assigned; without it, MiniLM.
        decay: a step's assignments count so much less with each step after it.
        balance: the weight of the last term.
    """

    name = "clusters"
    stops = False
    every: Any = "end"
    batched = True
    scope = "run"

    def __init__(
        self, labels: Sequence[str], embed: Embed | None = None, decay: float = 0.9, balance: float = 0.5
    ) -> None:
        if isinstance(labels, str) or len(set(labels)) < 2:
            raise UserError(f"{self.name}: labels={labels!r} must name at least two clusters")
        if not 0.0 < decay <= 1.0:
            raise UserError(f"{self.name}: decay={decay!r} must be above 0 and at most 1")
        if not 0.0 <= balance < math.inf:
            raise UserError(f"{self.name}: balance={balance!r} must be 0 or more")
        if embed is None:
            from instant_reward.rewards.embedding import Embedder

            embed = Embedder(self.name)
        self.labels, self.embed, self.decay, self.balance = list(labels), embed, decay, balance
        self._known: dict[str, np.ndarray] = {}
        self._sums: np.ndarray | None = None  # [labels, D]
        self._counts = np.zeros(len(self.labels))

    def __call__(self, views: list[View]) -> list[float | None]:
        """Nothing while no step has been assigned yet: there are no clusters to sit in."""
        vectors = self._vectors([view.prompt.text for view in views])
        if self._sums is None:
            return [None] * len(views)
        mean = self._sums.sum(0) / self._counts.sum()
        used = self._counts > 0
        centres = _directions(self._sums / np.maximum(self._counts, 1e-12)[:, None] - mean) * used[:, None]
        near = _directions(vectors - mean) @ centres.T
        shares = (self._counts + 1.0) / (self._counts.sum() + len(self.labels))
        return [self._value(near[row], self._number(view.text), shares) for row, view in enumerate(views)]

    def _value(self, near: np.ndarray, label: int, shares: np.ndarray) -> float:
        apart = near[label] - np.delete(near, label).max()
        return float(apart - self.balance * math.log(shares[label] * len(self.labels)))

    def observe(self, rollouts: Sequence[Rollout]) -> None:
        """Takes in where a step's texts went; earlier ones fade."""
        vectors = self._vectors([rollout.prompt.text for rollout in rollouts])
        if self._sums is None:
            self._sums = np.zeros((len(self.labels), vectors.shape[1]))
        self._sums *= self.decay
        self._counts *= self.decay
        numbers = [self._number(rollout.text) for rollout in rollouts]
        np.add.at(self._sums, numbers, vectors)
        np.add.at(self._counts, numbers, 1.0)

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint keeps."""
        return {"counts": self._counts.tolist(), "sums": None if self._sums is None else self._sums.tolist()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Takes back what ``state_dict`` gave."""
        self._counts = np.array(state["counts"])
        self._sums = None if state["sums"] is None else np.array(state["sums"])

    def _number(self, text: str) -> int:
        if text not in self.labels:
            raise UserError(f"{self.name}: the label {text!r} is none of {', '.join(map(repr, self.labels))}")
        return self.labels.index(text)

    def _vectors(self, texts: Sequence[str]) -> np.ndarray:
        fresh = [text for text in dict.fromkeys(texts) if text not in self._known]
        if fresh:
            self._known |= zip(fresh, np.asarray(self.embed(fresh), dtype=float), strict=True)
        return np.stack([self._known[text] for text in texts])


def _directions(vectors: np.ndarray) -> np.ndarray:
    """Rows of length 1; a row of zeros stays one."""
    lengths = np.linalg.norm(vectors, axis=1, keepdims=True)
    found: np.ndarray = np.divide(vectors, lengths, out=np.zeros_like(vectors), where=lengths > 1e-12)
    return found
