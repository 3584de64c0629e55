"""Dense against final rewards on a real model: the job of recipes/sentiment.yaml, the same texts and steps in each arm.

    python experiments/real_model.py --jobs 2             (every run that is not there yet, then the tables)
    python experiments/real_model.py --only-tables        (of the runs that are there)

Each arm first chooses its learning rate by shorter runs with a seed of their own: that which scores most in the last
three steps. Writes `experiments/results/real_model.json`, `.md` and `.png`.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import report
import torch
from real_runs import Plan, compared, make, options_of, row, scores

import instant_reward as ir

FINAL = "final score only"
AT_END = ["rewards.0.change=false", "rewards.0.every=end", "rewards.0.discount=1.0"]
CRITIC = ["algorithm.name=a2c", "algorithm.lam=0.95", "algorithm.critic.model=head", "rewards.0.discount=1.0"]
CRITIC += ["algorithm.critic.learning_rate=1e-3", "algorithm.critic.bootstrap=false"]
ARMS = {
    FINAL: AT_END,
    "change per word, discount 1": ["rewards.0.discount=1.0"],
    "change per word, discount 0.8": [],
    "change per word, critic, lambda 0.95": CRITIC,
    "uniform shares of the final score": [
        *AT_END, f"rewards.0.use={Path(__file__)}:uniform", "rewards.0.at=span", "algorithm.biased_placement=allow",
    ],
}  # fmt: skip
KINDS = {
    "tune": ["train.steps=12", "evaluate.prompts=null"],
    "32": ["train.steps=14", "evaluate.prompts.args.limit=48"],
    "96": ["sampling.max_new_tokens=96", "train.steps=8", "evaluate.prompts.args.limit=24"],
}
COMPARED = {"32": list(ARMS), "96": [FINAL, "change per word, discount 0.8"]}
RATES, TUNING_SEED, SEEDS = ("3.0e-5", "6.0e-5", "1.2e-4"), 9, (0, 1, 2)
LEVELS = (0.70, 0.75)


@cache
def sentiment() -> Any:
    from instant_reward.rewards.sentiment import ReviewSentiment

    return ReviewSentiment()


@ir.reward(every="end", at="span", name="sentiment")
def uniform(view: ir.View) -> list[float]:
    """The final score in equal shares on all tokens of the text, which knew nothing of it: the control."""
    return [sentiment()(view.text) / view.tokens] * view.tokens


def overrides(plan: Plan) -> list[str]:
    return [*ARMS[plan.arm], *KINDS[plan.kind]]


def base(arm: str) -> float:
    """The changes add up to the final score less that of the empty text: with it, all arms are on one scale."""
    return float(sentiment()("")) if arm.startswith("change") else 0.0


def main() -> None:
    options = options_of(__doc__)
    make([Plan("tune", arm, rate, TUNING_SEED) for arm in ARMS for rate in RATES], overrides, options)
    tuned: list[dict[str, Any]] = []
    for arm in ARMS:
        plans = [Plan("tune", arm, rate, TUNING_SEED) for rate in RATES]
        last = [sum(scores(plan, options, base(arm))[-3:]) / 3 for plan in plans]
        best = max(zip(last, RATES, strict=True))[1]
        tuned.append({"arm": arm, **dict(zip((f"rate {rate}" for rate in RATES), last, strict=True)), "chosen": best})
    rates = {one["arm"]: one["chosen"] for one in tuned}

    plans = [Plan(kind, arm, rates[arm], seed) for kind in COMPARED for seed in SEEDS for arm in COMPARED[kind]]
    make(sorted(plans, key=lambda plan: plan.arm.startswith("uniform")), overrides, options)  # the control comes last
    tables: dict[str, list[dict[str, Any]]] = {}
    for kind, arms in COMPARED.items():
        of_arms = {arm: [plan for plan in plans if (plan.kind, plan.arm) == (kind, arm)] for arm in arms}
        lines = [
            row(of_arm, LEVELS, options, base(arm))
            for arm, of_arm in of_arms.items()
            if any(plan.finished(options) for plan in of_arm)
        ]
        if lines:
            tables[f"{kind} new tokens"] = compared(lines, LEVELS[0], FINAL)
    panels = {title: {one["arm"]: torch.tensor(one["curves"]) for one in lines} for title, lines in tables.items()}
    tables["tuning: mean score of the last three of 12 steps"] = tuned
    report.publish("real_model", report.Asked(len(SEEDS), False, report.RESULTS), tables, panels, LEVELS[0])


if __name__ == "__main__":
    main()
