"""The table of short names: each leads to a reward whose docstring says what a user has to know."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

import pytest

import instant_reward as ir
from instant_reward.assemble import build_rewards
from instant_reward.config import RewardConfig
from instant_reward.imports import resolve
from instant_reward.rewards.format_base import Form
from instant_reward.rewards.names import NAMES, import_path
from tiny import tiny_policy


@pytest.mark.parametrize("name", NAMES)
def test_a_name_leads_to_a_reward_that_is_described(name: str) -> None:
    found = resolve(import_path(name))
    assert inspect.isclass(found)
    about = inspect.getdoc(found) or ""
    for part in ("Cost:", "What games it:", "Source:"):
        assert part in " ".join(about.split()), f"{name}: its docstring has no {part!r}"


def test_names_are_the_rewards_own() -> None:
    own = {name: getattr(resolve(path), "name", name) for name, path in NAMES.items()}
    assert {name for name, said in own.items() if said != name} <= {"rouge"}  # its variant is part of its own name


def test_a_name_that_is_none_says_what_is_near() -> None:
    with pytest.raises(ValueError, match="did you mean grammar"):
        import_path("gramar")
    assert import_path("my/rules.py:polite") == "my/rules.py:polite"


@pytest.mark.parametrize("options", [{}, {"change": True, "every": "word"}], ids=["plain", "change"])
def test_a_config_may_send_a_reward_to_workers(options: dict[str, Any]) -> None:
    config = RewardConfig(use="vader", workers=1, time_limit=60.0, weight=0.5, **options)
    (made,) = build_rewards([config])
    (here,) = build_rewards([RewardConfig(use="vader", weight=0.5, **options)])
    (rollout,) = tiny_policy().sample(["it was"], max_new_tokens=6, seed=1)
    assert ir.replay([made], rollout) == ir.replay([here], rollout)
    assert (made.name, made.weight, made.every) == (here.name, here.weight, here.every)


def test_limits_of_workers_without_workers_are_refused() -> None:
    with pytest.raises(ValueError, match="are about worker processes; set workers"):
        RewardConfig(use="vader", time_limit=1.0)


def test_a_potential_comes_from_a_config() -> None:
    (made,) = build_rewards([RewardConfig(use="vader", potential=True, discount=0.9)])
    assert made.discount == 0.9
    with pytest.raises(ValueError, match="leave out change or potential"):
        RewardConfig(use="vader", potential=True, change=True)


def test_rules_score_a_file_by_name(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from instant_reward.cli import main

    file = tmp_path / "texts.txt"
    file.write_text("This are a bad sentence. It has two two words.\n他们很好。\n")
    assert main(["score", "--reward", "grammar,repetition,full_sentence,distinct", str(file)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2
    assert '"grammar": -' in lines[0]
    assert main(["score", "--reward", "grammar", "--coloured", str(file)]) == 0


@pytest.mark.parametrize("name", NAMES)
def test_only_a_form_may_stop_a_text(name: str) -> None:
    found = resolve(import_path(name))
    form = issubclass(found, Form)
    takes_a_text = name in ("review_sentiment", "vader")  # their change, or their value at the end, never stops one
    whole = getattr(found, "every", None) == "end"  # a text that is over cannot be stopped
    assert getattr(found, "stops", True) == (form or takes_a_text) or (whole and not form)
