"""Experiment 6: a classifier of texts as the reward, trained on few or many labels, and what stops before it is misled.

The true rule ("gold"): of the 100 pairs of neighbouring tokens 30 are good and 30 bad, and each counts once in a text,
however often it stands there. Random texts get noisy labels by it. A logistic regression on counts of pairs learns from
the labels: it is wrong about some pairs, and has hardly ever seen a text that repeats itself.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from distilling import crowd, gap, picked, ruler
from gru import Policy, Task
from lab import Arm, Course, learn
from matplotlib.figure import Figure
from report import asked, publish, ratio, say
from torch import Tensor

import instant_reward as ir
from instant_reward.batch import Batch

SIZE, LENGTH, WINDOW, PATIENCE, BUDGETS = 10, 10, 10, 20, (2.0, 5.0, 10.0)
RATES = (0.005, 0.01, 0.02)
ORDER = torch.randperm(SIZE * SIZE, generator=torch.Generator().manual_seed(0))
GOLD = torch.tensor([1.0] * 30 + [-1.0] * 30 + [0.0] * 40)[ORDER]
# Which of a seed's models pay (7 of them: on all labels, on either half, on 4 bootstrap samples), and the options.
ARMS: dict[str, tuple[slice, dict[str, Any]]] = {
    "no guard": (slice(0, 1), {"name": "rloo"}),
    "early stop": (slice(1, 2), {"name": "rloo"}),
    "ensemble minimum": (slice(3, 7), {"name": "rloo"}),
    **{f"KL penalty {kl:g}": (slice(0, 1), {"name": "rloo", "kl": kl}) for kl in (0.1, 0.5)},
}
Curves = dict[str, Tensor]  # smoothed: "gold", "kl" (nats per text), "held" (the other half's verdict), "paid" (in all)


def pairs(tokens: Tensor) -> Tensor:
    """How often each pair of neighbours stands in each text: ``[B, SIZE * SIZE]``."""
    where = tokens[:, :-1] * SIZE + tokens[:, 1:]
    return torch.zeros(len(tokens), SIZE * SIZE).scatter_add(1, where, torch.ones(where.shape))


def gold(tokens: Tensor) -> Tensor:
    """The true score, from -1 to 1: ``[B]``."""
    return (pairs(tokens) > 0).float() @ GOLD / (tokens.shape[1] - 1)


def fitted(counts: Tensor, labels: Tensor) -> Tensor:
    """Logistic regression with a ridge of 1, by Newton's steps: a weight for each pair."""
    weights, ridge = torch.zeros(counts.shape[1]), torch.eye(counts.shape[1])
    for _ in range(8):
        chance = (counts @ weights).sigmoid()
        slope = counts.T @ (chance - labels) + weights
        weights = weights - torch.linalg.solve((counts.T * (chance * (1 - chance))) @ counts + ridge, slope)
    return weights


def models(labelled: int, seed: int) -> Tensor:
    """What one seed's labels teach: ``[7, SIZE * SIZE]`` (see ``ARMS``)."""
    random = torch.Generator().manual_seed(seed)
    tokens = torch.randint(SIZE, (labelled, LENGTH), generator=random)
    counts = pairs(tokens)
    labels = (torch.rand(labelled, generator=random) < (gold(tokens) * (LENGTH - 1)).sigmoid()).float()
    again = [torch.randint(labelled, (labelled,), generator=random) for _ in range(4)]
    shares = [torch.arange(labelled), *torch.arange(labelled).chunk(2), *again]
    return torch.stack([fitted(counts[share], labels[share]) for share in shares])


def verdicts(tokens: Tensor, weights: Tensor) -> Tensor:
    """The least log-odds of each seed's models ``[S, M, SIZE * SIZE]`` for each of its texts: ``[B]``."""
    return (pairs(tokens).view(len(weights), -1, SIZE * SIZE) @ weights.mT).amin(-1).flatten()


def run(arm: str, known: Tensor, seeds: list[int], rates: list[float], updates: int) -> Curves:
    """Trains all sizes, rates and seeds side by side: curves ``[S, points]``, each the mean of ``WINDOW`` updates."""
    paying, options = ARMS[arm]
    proxy = ir.reward(every="end", name="proxy")(lambda texts: verdicts(texts.tokens, known[:, paying]))
    policy = Policy(Task(SIZE, LENGTH, torch.zeros(1, 1).long(), lambda texts: gold(texts.tokens)), seeds, rates)
    measure, seen = ruler(policy, policy.snapshot()), {"kl": [], "held": [], "paid": []}

    def watch(step: int, batch: Batch) -> None:
        assert batch.returns is not None
        held = verdicts(batch.token_ids[:, 1:], known[:, 2:3])
        for key, value in (("kl", gap(measure(batch))), ("held", held), ("paid", batch.returns[:, 1])):
            seen[key].append(value.view(len(seeds), -1).mean(1))

    seen["gold"] = list(learn(policy, Arm(arm, options, [proxy]), Course(updates, 1), watch).unbind(1))
    return {key: torch.stack(value, 1).unfold(1, WINDOW, 1).mean(2) for key, value in seen.items()}


def guarded(found: Mapping[str, tuple[float, Curves]]) -> list[dict[str, Any]]:
    """One row for each guard: where it stops, and what is left there of the unguarded run's peak, seed by seed."""
    free, held = found["no guard"][1], found["early stop"][1]["held"]
    points, best = torch.arange(held.shape[1]), held.cummax(1).indices
    last = torch.full((len(held),), len(points) - 1)
    stops = {"the peak": ("no guard", free["gold"].argmax(1)), "no guard": ("no guard", last)}
    for most in BUDGETS:
        over = (free["kl"] >= most) | (points == last[0])
        stops[f"stop at a KL of {most:g}"] = ("no guard", over.int().argmax(1))
    waited = ((points - best >= PATIENCE) | (points == last[0])).int().argmax(1, keepdim=True)
    stops["early stop, other half"] = ("early stop", best.gather(1, waited)[:, 0])
    stops |= {arm: (arm, last) for arm in found if arm not in ("no guard", "early stop")}
    rows = []
    for guard, (arm, stop) in stops.items():
        here = {key: value.gather(1, stop[:, None])[:, 0] for key, value in found[arm][1].items()}
        shares = (here["gold"] / free["gold"].amax(1)).tolist()
        point, low, high = ratio(shares, [1.0] * len(shares))
        middle = {"gold": float(here["gold"].median()), "KL": float(here["kl"].median())}
        row = {"arm": guard, "learning rate": found[arm][0], **middle, "update": int(stop.median()) + WINDOW - 1}
        rows.append({**row, "ratio to the peak": point, "low": low, "high": high, "shares": shares})
    return rows


def draw(results: Mapping[str, Mapping[str, tuple[float, Curves]]], path: Path) -> None:
    """Gold against the square root of the KL: medians of the seeds, one panel for each number of labels."""
    figure = Figure(figsize=(4.0 * len(results), 3.4), layout="constrained", facecolor="white")
    for axes, (title, found) in zip(figure.subplots(1, len(results), sharey=True), results.items(), strict=True):
        for arm, (_, at) in found.items():
            axes.plot(at["kl"].median(0).values.sqrt(), at["gold"].median(0).values, label=arm)
        axes.set(title=title, xlabel="square root of the KL to the start, per text", ylabel="gold")
        axes.legend(frameon=False, fontsize="small")
    figure.savefig(path, dpi=110)


def main(arguments: Sequence[str] | None = None) -> None:
    """Trains every arm on all three proxies and publishes one table for each."""
    told = asked(__doc__, arguments)
    sizes = (50, 100) if told.quick else (200, 2000, 20000)
    (seeds, rates), once = crowd(told.seeds, RATES), crowd(told.seeds, [0.0])[0]
    known = torch.cat([torch.stack([models(size, seed) for seed in once]).repeat(len(RATES), 1, 1) for size in sizes])
    results: dict[str, dict[str, tuple[float, Curves]]] = {f"{size} labels": {} for size in sizes}
    for arm in ARMS:
        curves = run(arm, known, seeds * len(sizes), rates * len(sizes), 10 if told.quick else 130)
        for number, title in enumerate(results):
            own = {key: value.chunk(len(sizes))[number] for key, value in curves.items()}
            end = own["paid"][:, -1:]  # the rate that ends with the highest pay, of the proxy and not of the gold
            kept = {key: picked(value, RATES, end)[1] for key, value in own.items()}
            results[title][arm] = RATES[picked(end, RATES)[0]], kept
        say(arm)
    golds = {title: {arm: curves["gold"] for arm, (_, curves) in found.items()} for title, found in results.items()}
    publish("overoptimisation", told, {title: guarded(found) for title, found in results.items()}, golds)
    if told.out is not None:
        draw(results, told.out / "overoptimisation.png")  # over the KL, not over updates


if __name__ == "__main__":
    main()
