"""The metrics of a step: what they are of."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import instant_reward as ir
from exact.chosen import Chosen
from exact.world import World, chance
from instant_reward.config import Config
from instant_reward.progress import Metrics
from instant_reward.sampling.sampler import Count
from tiny import tiny_folder

FINAL = ir.reward(every="end", name="final", weight=-2.0)(lambda view: chance(view.text))
WORDS = ir.reward(every="word", name="words", weight=3.0)(lambda view: chance(f"{view.text} word"))


def row_of(chosen: Chosen) -> dict[str, float]:
    """The metrics of every text of the small world once."""
    metrics = Metrics(chosen.rewards, Count(), chosen.algorithm.needs)
    metrics.sampled(chosen.world.rollouts(chosen.rewards))
    return metrics.row(chosen.batch(), Count())


def explained(value: torch.Tensor, target: torch.Tensor) -> float:
    return 1.0 - float((target - value).var(correction=0) / target.var(correction=0))


@pytest.mark.parametrize("name", ["qac", "ilql"])
def test_the_one_value_of_all_sources_is_their_weighted_sum_already(name: str) -> None:
    """A critic of next tokens learns the weighted sum: its value is reported as it is, not weighed once more."""
    world = World()
    values = {prefix: chance(f"value of {prefix}") for prefix in world.row_of}
    table = torch.tensor([[chance(f"{prefix} {token}") for token in range(3)] for prefix in world.row_of]).double()
    source = {"values": [values]} if name == "ilql" else {"table": table}
    for rewards in ([FINAL], [FINAL, WORDS]):
        chosen = Chosen(world, rewards, name=name, **source)
        batch, row = chosen.batch(), row_of(chosen)
        said, target = batch.values[:, 0][batch.mask], batch.targets[:, 0][batch.mask]
        assert row["value"] == pytest.approx(float(said.mean()), abs=1e-12)
        assert row["value"] != pytest.approx(-2.0 * float(said.mean()), abs=1e-3), "the weight of the first source"
        assert row["explained_variance"] == pytest.approx(explained(said, target), abs=1e-12)


def test_a_value_for_each_source_is_weighed_and_summed() -> None:
    """A critic of prefixes has a value a source: reported is what they mean together, by the sources' weights."""
    world = World()
    values = [{prefix: chance(f"{source} {prefix}") for prefix in world.row_of} for source in range(2)]
    chosen = Chosen(world, [FINAL, WORDS], name="a2c", values=values)
    batch, row = chosen.batch(), row_of(chosen)
    said, target = ((-2.0 * one[:, 0] + 3.0 * one[:, 1])[batch.mask] for one in (batch.values, batch.targets))
    assert row["value"] == pytest.approx(float(said.mean()), abs=1e-12)
    assert row["explained_variance"] == pytest.approx(explained(said, target), abs=1e-12)


def test_groups_that_are_left_out_are_measured_all_the_same(tmp_path: Path) -> None:
    """What DAPO leaves out was sampled too: were it not counted, ``reward`` would say that nothing is ever solved.

    reward, length = means over all texts that the step sampled, those of the groups that it does not learn from too
    """
    scored: list[tuple[float, int]] = []

    @ir.reward(every="end", name="solved")
    def solved(view: ir.View) -> float:
        value = 1.0 if view.prompt.text == "it was" else float(len(view.text) % 2)
        scored.append((value, len(view.text)))
        return value

    @ir.reward(every="token", name="tokens")
    def tokens(view: ir.View) -> float:
        return 1.0

    steps: list[dict[str, Any]] = []
    values = {
        "model": {"name": str(tiny_folder(tmp_path / "model")), "dtype": "float32"},
        "data": {"prompts": ["it was", "a film of", "the movie"]},
        "algorithm": {"name": "dapo", "refill": 1},
        "sampling": {"max_new_tokens": 4},
        "train": {"prompts_per_step": 3, "group_size": 4, "learning_rate": 1e-3, "samples": "all"},
        "out": str(tmp_path / "run"),
    }
    for step in (1, 2):  # a step at a time, so that the scores of each are known apart
        scored.clear()
        values["train"]["steps"] = step
        run = ir.train(Config.build(values), rewards=[solved, tokens.but(train=False)], resume=step > 1)
        steps.append({"row": run.metrics[-1], "scored": list(scored)})
    for step in steps:
        row, found = step["row"], step["scored"]
        assert row["skipped_groups"] >= 1
        assert len(found) == 4 * (3 + 3), "the second round filled what the first left out"
        assert row["reward"] == pytest.approx(sum(value for value, _ in found) / len(found))
        assert row["reward/solved"] == pytest.approx(row["reward"])
        assert row["tokens"] == pytest.approx(row["length"] * len(found))
        assert row["reward/tokens"] > 0.0
        learned = [value for value, _ in found if value != 1.0]
        assert learned, "some were not solved"


def test_what_rewards_say_they_cost_is_reported_for_the_step() -> None:
    class Counting:
        name = "counting"
        cost = 5.0  # of earlier steps

        def __call__(self, view: ir.View) -> float:
            self.cost += 2.0
            return 0.0

        def summary(self) -> dict[str, float]:
            return {"money": self.cost}

    counting = ir.reward(every="end")(Counting())
    world = World()
    chosen = Chosen(world, [FINAL], name="reinforce")
    metrics = Metrics([FINAL, counting], Count(), chosen.algorithm.needs)
    texts = world.rollouts([FINAL, counting])
    metrics.sampled(texts)
    assert metrics.row(chosen.batch(), Count())["counting/money"] == 2.0 * len(texts)
