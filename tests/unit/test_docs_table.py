"""docs/algorithms.md says what the code does: its tables against the presets, the checks, the defaults, the metrics."""

from __future__ import annotations

import re
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import yaml

import instant_reward as ir
from instant_reward import algorithms
from instant_reward.algorithms import PRESETS
from instant_reward.config import AlgorithmConfig
from instant_reward.rewards.base import as_rewards

PAGE = (Path(__file__).parents[2] / "docs" / "algorithms.md").read_text(encoding="utf-8")
TAKEN = "as it comes"
SUMMED = "summed over time: raises, `algorithm.timing=ignore` allows it"
BIASED = "biased: raises, `algorithm.biased_placement=allow` allows it"


def score(text: str) -> float:
    return float(len(text))


def paid(**options: Any) -> ir.Reward:
    return ir.reward(name="paid", **options)(lambda view: 1.0)


# Each row of the table by how it begins: the rewards it speaks of, and the options they need.
CASES: dict[str, tuple[list[list[Any]], dict[str, Any]]] = {
    "a final score": ([[score], [paid()], [ir.change(score, every="end")]], {}),
    "per token, word, sentence": (
        [[paid(every=every)] for every in ("token", "word", "sentence", "line", 8, lambda characters: None)],
        {},
    ),
    "the change of a score": ([[ir.change(score)], [score, ir.change(score, every="token")]], {}),
    "the KL": ([[score]], {"kl": 0.1}),
    "a discount below 1": ([[score], [paid()]], {"discount": 0.9}),
    "paid on its span": ([[paid(at="span")], [score, paid(at="span")]], {}),
}


def table(title: str, first: str) -> dict[str, dict[str, str]]:
    """The table under a heading as its rows by their first cell: ``{column: cell}``."""
    section = PAGE.split(f"\n## {title}\n")[1].split("\n## ")[0]
    found = re.search(rf"^\| {re.escape(first)} \|.*(?:\n\|.*)+", section, re.MULTILINE)
    assert found, f"no table that begins with {first!r} under {title!r}"
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in found[0].split("\n")]
    assert all(len(row) == len(rows[0]) for row in rows), f"a broken row under {title!r}"
    return {row[0]: dict(zip(rows[0][1:], row[1:], strict=True)) for row in rows[2:]}


def plain(cell: str) -> str:
    return cell.strip("`")


def test_presets_are_the_documented_ones() -> None:
    rows = table("The presets", "preset")
    found = {plain(name): {key: plain(cell) for key, cell in row.items()} for name, row in rows.items()}
    assert found == {name: asdict(preset) for name, preset in PRESETS.items()}
    for name in PRESETS:
        assert f"\n### {name}\n" in PAGE


def test_defaults_are_the_documented_ones() -> None:
    rows = table("The presets", "option")
    found = {plain(name): plain(row["default"]) for name, row in rows.items()}
    of_preset = {"name", "scale", "loss", "normalise"}
    assert found == {
        name: str(value) for name, value in AlgorithmConfig().model_dump().items() if name not in of_preset
    }
    assert f"`{AlgorithmConfig().name}` is the default" in PAGE


@pytest.mark.parametrize("name", PRESETS)
@pytest.mark.parametrize("case", CASES)
def test_what_each_preset_takes(case: str, name: str) -> None:
    """The cell says what ``build`` does: takes it, or raises and names the option that allows it."""
    rows = table("Which rewards each preset takes", "reward")
    matching = [row for reward, row in rows.items() if reward.startswith(case)]
    assert len(matching) == 1, f"{case!r} must begin one row"
    assert len(rows) == len(CASES)
    cell = matching[0][f"`{name}`"]
    assert cell in (TAKEN, SUMMED, BIASED)

    chosen, options = CASES[case]
    for rewards in chosen:
        assert outcome(name, rewards, options) == cell
        if cell != TAKEN:
            option = {SUMMED: {"timing": "ignore"}, BIASED: {"biased_placement": "allow"}}[cell]
            assert outcome(name, rewards, {**options, **option}) == TAKEN


def outcome(name: str, rewards: list[Any], options: dict[str, Any]) -> str:
    try:
        algorithms.build(AlgorithmConfig(name=name, **options), as_rewards(rewards), max_new_tokens=8)
    except ir.UserError as error:
        for cell, option in ((SUMMED, "algorithm.timing=ignore"), (BIASED, "algorithm.biased_placement=allow")):
            if option in str(error):
                return cell
        raise
    return TAKEN


def test_rewards_that_are_only_watched_are_not_checked() -> None:
    watched = paid(every="word", at="span").but(train=False)
    assert outcome("grpo", [score, watched], {"discount": 1.0}) == TAKEN


def test_kl_as_a_loss_is_refused_as_documented() -> None:
    assert "`kl_as: loss` is therefore refused" in PAGE
    with pytest.raises(ir.UserError, match=r"algorithm\.kl_as"):
        algorithms.build(AlgorithmConfig(kl=0.1, kl_as="loss"), as_rewards([score]), max_new_tokens=8)


def test_normalise_names_every_choice() -> None:
    field = AlgorithmConfig.model_fields["normalise"].annotation
    choices = set(re.findall(r"'(\w+)'", str(field)))
    assert {plain(name) for name in table("What `normalise` weighs", "`normalise`")} == choices


def test_examples_are_configs() -> None:
    examples = [yaml.safe_load(block) for block in re.findall(r"```yaml\n(.*?)```", PAGE, re.DOTALL)]
    assert examples
    for example in examples:
        algorithms.build(AlgorithmConfig(**example["algorithm"]), as_rewards([score]), max_new_tokens=8)


def test_metrics_are_the_documented_ones() -> None:
    """Every metric of a real step has a row in the table, and the table has no other."""
    from exact import models
    from instant_reward.batch import collate
    from instant_reward.policies.optimizer import Optimization
    from instant_reward.progress import Metrics
    from instant_reward.sampling.draw import Settings
    from instant_reward.sampling.engine import Engine, in_order

    policy, rewards = models.policy(), as_rewards([score])
    policy.prepare(Optimization(), reference=True)
    algorithm = algorithms.build(AlgorithmConfig(kl=0.1, loss="clipped"), rewards, max_new_tokens=4)
    engine = Engine(policy, Settings(max_new_tokens=4))
    metrics = Metrics(rewards, algorithm.sources, engine.count)
    rollouts = in_order(engine.stream(models.prompts(3), 2, rewards))
    metrics.sampled(rollouts)
    batch = algorithm.credit(policy.annotate(collate(rollouts, algorithm.sources)))
    output = policy(batch)
    loss = algorithm.loss(output.logprobs, batch)
    policy.backward(loss.loss)
    metrics.learned(output, loss, batch)
    metrics.stepped(policy.step())
    found = {"reward/<source>" if key == "reward/score" else key for key in metrics.row(batch, engine.count)}
    assert found == {plain(name) for name in table("Metrics, and how to read them", "metric")}
