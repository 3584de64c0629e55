"""Weights that change with the run: schedules, rules that read the metrics, scaling by the running deviation."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import TypeAdapter

import instant_reward as ir
from instant_reward.batch import Batch
from instant_reward.carried import adapt
from instant_reward.config import AlgorithmConfig, Config
from instant_reward.config_weight import WeightRule
from instant_reward.credit import Marks, Source
from instant_reward.types import Carried
from instant_reward.weights import as_they_are, deviations, followed, weight_now
from tiny import tiny_folder

RULE = TypeAdapter(WeightRule)


def rule(**values: Any) -> Any:
    return RULE.validate_python(values)


def course(made: Any, steps: int) -> list[float]:
    """The weights of the first steps."""
    return [weight_now(made, "one", Carried(step=step)) for step in range(steps)]


def batch(totals: list[list[float]], sources: list[Source], carried: Carried | None = None) -> Batch:
    """Texts of one token, each paid once by each source: ``totals[text][source]``."""
    rows, columns = len(totals), len(sources)
    on = torch.ones(rows, 1, dtype=torch.bool)
    number = torch.arange(rows).repeat_interleave(columns)
    one = torch.ones(rows * columns, dtype=torch.long)
    values = torch.tensor(totals, dtype=torch.float64).flatten()
    marks = Marks(number, torch.arange(columns).repeat(rows), 0 * one, one, one, values)
    zeros, counts = torch.zeros(rows, 1, dtype=torch.float64), torch.ones(rows, dtype=torch.long)
    return Batch(
        0 * on.long(), on, 0 * on.long(), zeros, ~on, counts, 0 * counts, counts, ~on[:, 0], sources, marks, 1.0, rows,
        rows, carried or Carried(),
    )  # fmt: skip


def test_a_line_from_start_to_end() -> None:
    assert course(rule(rule="linear", start=1.0, end=0.0, steps=4), 6) == [1.0, 0.75, 0.5, 0.25, 0.0, 0.0]
    assert course(rule(rule="linear", start=0.0, end=1.0, steps=2, wait=2), 5) == [0.0, 0.0, 0.0, 0.5, 1.0]


def test_half_a_cosine_is_slow_at_both_ends() -> None:
    found = course(rule(rule="cosine", start=0.0, end=2.0, steps=4), 5)
    assert found == pytest.approx([0.0, 1 - 2**-0.5, 1.0, 1 + 2**-0.5, 2.0])


def test_steps_count_from_one() -> None:
    assert course(rule(rule="steps", start=1.0, at={3: 0.5, 5: 0.1}), 6) == [1.0, 1.0, 0.5, 0.5, 0.1, 0.1]


def test_a_constraints_weight_rises_until_it_holds_and_falls_after() -> None:
    made = rule(rule="constraint", metric="reward/one", target=0.5, rate=2.0, most=1.5)
    source, carried, found = Source("one", rule=made), Carried(), []
    for value in (0.0, 0.25, 0.0, 0.5, 1.0, 1.0):
        weight = weight_now(made, "one", carried)
        found.append(weight)
        now = batch([[0.0], [1.0]], [source], carried)
        carried = replace(carried, step=carried.step + 1, **followed(now, {"reward/one": value}, 0.1))
    assert found == [0.0, 1.0, 1.5, 1.5, 1.5, 0.5]  # it stops at the most, and at 0
    below = rule(rule="constraint", metric="length", target=10.0, above=False, start=1.0, rate=0.1)
    moved = followed(batch([[0.0]], [Source("one", rule=below)]), {"length": 14.0}, 1.0)
    assert moved["weights"] == {"one": pytest.approx(1.4)}


def test_a_term_fades_as_a_metric_grows() -> None:
    made = rule(rule="fade", metric="reward/final", low=0.2, high=0.6, start=2.0, end=0.0)
    found = [weight_now(made, "one", Carried(metrics={"reward/final": value})) for value in (0.0, 0.2, 0.4, 0.6, 1.0)]
    assert found == pytest.approx([2.0, 2.0, 1.0, 0.0, 0.0])
    assert weight_now(made, "one", Carried()) == 2.0
    before = batch([[0.0]], [Source("one", rule=made)], Carried(metrics={"reward/final": 0.4}))
    assert followed(before, {"reward/final": 0.8}, 0.25)["metrics"] == {"reward/final": pytest.approx(0.5)}


def test_two_terms_that_fade_by_one_metric_move_its_mean_once() -> None:
    made = rule(rule="fade", metric="reward/final", low=0.2, high=0.6)
    sources = [Source("one", rule=made), Source("two", rule=made)]
    before = batch([[0.0, 0.0]], sources, Carried(metrics={"reward/final": 0.4}))
    assert followed(before, {"reward/final": 0.8}, 0.25)["metrics"] == {"reward/final": pytest.approx(0.5)}


def test_a_constraint_waits_for_a_critic_that_learns_alone() -> None:
    """Until the policy learns, nothing it does can make the constraint hold: its weight would only pile up."""
    made = rule(rule="constraint", metric="reward/one", target=1.0, start=0.5, rate=1.0)
    found = []
    for step in range(3):
        now = batch([[0.0], [1.0]], [Source("one", rule=made)], Carried(step=step))
        now.returns = torch.zeros(2, 1)
        found.append(weight_now(made, "one", adapt(now, {"reward/one": 0.0}, AlgorithmConfig(), warming=2)))
    assert found == [0.5, 0.5, 1.5]


def test_sources_are_equalised_by_their_deviations() -> None:
    made = rule(rule="equalise", to="two", start=0.5, most=100.0)
    sources = [Source("one", rule=made), Source("two")]
    now = batch([[0.0, 0.0], [2.0, 20.0]], sources)
    assert deviations(now) == {"one": 1.0, "two": 10.0}
    carried = replace(Carried(), **followed(now, {}, 1.0))
    assert weight_now(made, "one", carried) == pytest.approx(5.0)
    assert weight_now(made, "one", Carried(deviations={"one": 1e-3, "two": 1e3})) == 50.0


def test_scaling_divides_by_the_deviation_and_keeps_the_mean() -> None:
    """Sources of any scale weigh alike; the mean is not taken away, which would pay texts for their length."""
    sources = [Source("one", weight=2.0, scaled=True), Source("two")]
    now = batch([[0.0, 0.0], [8.0, 1.0]], sources)
    assert [one.weight for one in as_they_are(sources, now)] == [0.5, 1.0]
    later = replace(now, carried=Carried(deviations={"one": 2.0, "two": 1.0}))
    assert [one.weight for one in as_they_are(sources, later)] == [1.0, 1.0], "known ones go before the batch's own"
    equals = batch([[3.0, 0.0], [3.0, 1.0]], sources)
    assert [one.weight for one in as_they_are(sources, equals)] == [2.0, 1.0], "never NaN"


def test_variances_are_averaged_and_not_deviations() -> None:
    now = batch([[0.0], [8.0]], [Source("one")], Carried(deviations={"one": 2.0}))
    assert followed(now, {}, 0.5)["deviations"]["one"] == pytest.approx(10.0**0.5)


def run(path: Path, rewards: list[Any], resume: bool = False, **train: Any) -> ir.Run:
    folder = path / "model"
    if not folder.exists():
        tiny_folder(folder)
    values = {
        "model": {"name": str(folder), "dtype": "float32"},
        "data": {"prompts": ["it was", "a film of"]},
        "sampling": {"max_new_tokens": 4},
        "train": {"prompts_per_step": 2, "group_size": 2, "learning_rate": 1e-2, **train},
        "out": str(path / "run"),
    }
    return ir.train(Config.build(values), rewards=rewards, resume=resume)


@ir.reward(every="token")
def writes_o(view: ir.View) -> float:
    return 1.0 if "o" in view.piece else 0.0


@ir.reward(every="end")
def length(view: ir.View) -> float:
    return float(len(view.text))


def test_raw_value_weight_and_weighted_value_are_logged_apart(tmp_path: Path) -> None:
    faded = ir.weighted(writes_o, {"rule": "linear", "start": 1.0, "end": 0.0, "steps": 2})
    rows = run(tmp_path, [faded, ir.weighted(length, 0.1), length.but(name="watched", train=False)], steps=3).metrics
    assert [row["weight/writes_o"] for row in rows] == [1.0, 0.5, 0.0]
    for row in rows:
        assert row["weighted/length"] == pytest.approx(0.1 * row["reward/length"])
        assert row["reward"] == pytest.approx(row["weighted/writes_o"] + row["weighted/length"])
        assert row["reward/watched"] == row["reward/length"]
        assert "weight/watched" not in row


def test_the_state_of_the_rules_is_in_the_checkpoint(tmp_path: Path) -> None:
    constraint = {"rule": "constraint", "metric": "reward/writes_o", "target": 3.0, "rate": 0.5}
    rewards = [ir.weighted(writes_o, constraint), length.but(scaled=True, clip=9.0)]
    whole = run(tmp_path / "whole", rewards, steps=4, save_every=2).metrics
    run(tmp_path / "apart", rewards, steps=2, save_every=2)
    resumed = run(tmp_path / "apart", rewards, resume=True, steps=4, save_every=2).metrics
    keys = ("weight/writes_o", "weight/length", "reward", "loss")
    assert [[row[key] for key in keys] for row in resumed] == [[row[key] for key in keys] for row in whole]
    assert whole[-1]["weight/writes_o"] > whole[0]["weight/writes_o"] == 0.0


def test_a_rule_over_a_metric_that_there_is_not_names_the_ones_there_are(tmp_path: Path) -> None:
    fade = {"rule": "fade", "metric": "reward/gold", "low": 0, "high": 1}
    with pytest.raises(
        ir.UserError, match=r"'writes_o' hangs on the metric 'reward/gold'.*use one of .*reward/writes_o"
    ):
        run(tmp_path, [ir.weighted(writes_o, fade)], steps=2)


def test_a_source_to_equalise_must_be_another_learned_one(tmp_path: Path) -> None:
    for other in ("gold", "writes_o"):
        with pytest.raises(ir.UserError, match=r"'writes_o' follows the source .* which is not another one"):
            run(tmp_path, [ir.weighted(writes_o, {"rule": "equalise", "to": other}), length], steps=1)


def test_shaping_is_neither_cut_nor_scaled_nor_equalised(tmp_path: Path) -> None:
    """Cut marks do not pay back what they paid, and what a text earns of shaping in all has no deviation."""
    shaping = ir.potential(lambda text: float(len(text)), 1.0, name="shaping")
    with pytest.raises(ir.UserError, match=r"'shaping': .*clip=2\.0 would bias the gradient; leave it out"):
        shaping.but(clip=2.0)
    with pytest.raises(ir.UserError, match=r"'shaping': .* no deviation to scale it by; leave scaled out"):
        shaping.but(scaled=True)
    with pytest.raises(ir.UserError, match=r"equalises its deviation, and 'shaping' is shaping, which has none"):
        run(tmp_path, [ir.weighted(shaping, {"rule": "equalise", "to": "length"}), length], steps=1)
    with pytest.raises(ir.UserError, match=r"'length' follows the source 'shaping', which is not another one"):
        run(tmp_path, [shaping, ir.weighted(length, {"rule": "equalise", "to": "shaping"})], steps=1)


def test_a_source_is_scaled_or_equalised(tmp_path: Path) -> None:
    twice = ir.weighted(writes_o, {"rule": "equalise", "to": "length"}).but(scaled=True)
    with pytest.raises(ir.UserError, match="'writes_o' is scaled, which divides it by its deviation already"):
        run(tmp_path, [twice, length], steps=1)


def test_a_bad_rule_is_said_in_words() -> None:
    with pytest.raises(ir.UserError, match=r"reward 'writes_o': weight=.*steps.* correct it"):
        ir.weighted(writes_o, {"rule": "linear", "steps": 0})
    with pytest.raises(ir.UserError, match=r"clip=-1\.0 is not above 0"):
        writes_o.but(clip=-1.0)


def test_marks_are_cut_before_they_are_summed_or_placed() -> None:
    from instant_reward.crediting import credit_batch
    from instant_reward.presets import PRESETS

    now = batch([[9.0], [-9.0], [1.0]], [Source("one", clip=2.0)])
    credited = credit_batch(now, PRESETS["reinforce"])
    assert credited.rewards is not None
    assert credited.rewards[:, 0, 0].tolist() == [2.0, -2.0, 1.0]
