"""docs/algorithms.md says what the code does: its tables against the presets, the checks, the defaults, the metrics."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any, get_args

import pytest
import yaml

import instant_reward as ir
from instant_reward import algorithms
from instant_reward.collect import check_source
from instant_reward.config import AlgorithmConfig, Config, ReplayConfig, SamplingConfig
from instant_reward.config_algorithm import CriticConfig, ErrorConfig, ImportanceConfig, TeacherConfig
from instant_reward.presets import PRESETS, Preset, preset_of
from instant_reward.rewards.base import as_rewards
from tiny import tiny_folder

PAGE = (Path(__file__).parents[2] / "docs" / "algorithms.md").read_text(encoding="utf-8")
TEXT = " ".join(PAGE.split())
TAKEN, SUMMED, BIASED, REFUSED = "as it comes", "summed", "biased", "refused"
ALLOW = {"timing": "ignore", "biased_placement": "allow"}
ALLOWED_BY = {SUMMED: "algorithm.timing=ignore", BIASED: "algorithm.biased_placement=allow"}
SECTIONS = {"critic": CriticConfig, "importance": ImportanceConfig, "teacher": TeacherConfig, "by_error": ErrorConfig}
TEACHER = {"sees": "{prompt} well"}
Case = tuple[list[Any], dict[str, Any]]


def score(text: str) -> float:
    return text.count("o") / 4


def paid(**options: Any) -> ir.Reward:
    return ir.reward(name="paid", **options)(lambda view: 1.0)


def phi(discount: float) -> ir.Reward:
    return ir.potential(score, discount, name="phi")


# Each row of the table by how it begins: the rewards it speaks of, and the options they come with.
CASES: dict[str, list[Case]] = {
    "a final score": [([score], {}), ([paid()], {}), ([ir.change(score, every="end")], {})],
    "per token, word, sentence": [
        ([paid(every=every)], {}) for every in ("token", "word", "sentence", "line", 8, lambda characters: None)
    ],
    "the change of a score": [([ir.change(score)], {}), ([score, ir.change(score, every="token")], {})],
    "the KL to the reference": [([score], {"kl": 0.1}), ([score], {"entropy": 0.1, "entropy_as": "reward"})],
    "the KL as a loss": [
        ([score], {"kl": 0.1, "kl_as": "loss", "kl_estimator": "k2"}),
        ([score], {"kl": 0.1, "kl_as": "loss", "kl_estimator": "k3"}),
        ([score], {"entropy": 0.1}),
    ],
    "`soft_length`": [([score], {"soft_length": 4})],
    "a discount below 1": [([score], {"discount": 0.9}), ([paid()], {"discount": 0.9})],
    "discounts that differ": [([score, paid(every="word", discount=0.9)], {}), ([score], {"discount": 0.9, "kl": 0.1})],
    "paid on its span": [([paid(at="span")], {}), ([score, paid(at="span", every="word")], {})],
    "`ir.potential` with discount 1": [([score, phi(1.0)], {})],
    "`ir.potential` with less": [([score, phi(0.9)], {"discount": 0.9})],
    "a teacher's log-ratio alone": [([], {"teacher": TEACHER}), ([], {"teacher": {**TEACHER, "discount": 1.0}})],
    "a teacher's log-ratio with its discount 0": [([score], {"teacher": TEACHER})],
    "pieces as actions, a final score": [([score], {"pieces": "word"}), ([score], {"pieces": "line"})],
    "pieces as actions, a reward": [([paid(every="word")], {"pieces": "word"})],
}


def tables(title: str, first: str) -> list[dict[str, dict[str, str]]]:
    """The tables under a heading that begin with a column, as rows by their first cell: ``{column: cell}``."""
    section = PAGE.split(f"\n## {title}\n")[1].split("\n## ")[0]
    found = re.findall(rf"^\| {re.escape(first)} \|.*(?:\n\|.*)+", section, re.MULTILINE)
    assert found, f"no table that begins with {first!r} under {title!r}"
    made = []
    for one in found:
        rows = [
            [cell.strip() for cell in line.removeprefix("|").removesuffix("|").split("|")] for line in one.split("\n")
        ]
        assert all(len(row) == len(rows[0]) for row in rows), f"a broken row under {title!r}"
        assert len({row[0] for row in rows}) == len(rows), f"a row twice under {title!r}"
        made.append({row[0]: dict(zip(rows[0][1:], row[1:], strict=True)) for row in rows[2:]})
    return made


def table(title: str, first: str) -> dict[str, dict[str, str]]:
    """The only such table."""
    (found,) = tables(title, first)
    return found


def plain(cell: str) -> str:
    return cell.strip("`")


def quoted(cell: str) -> list[str]:
    """What stands in backticks."""
    return re.findall(r"`([^`]+)`", cell)


def outcome(name: str, rewards: list[Any], options: dict[str, Any]) -> str:
    if name == "distill":
        options = {"teacher": {**TEACHER, "discount": options.get("discount", 1.0)}, **options}
    try:
        algorithms.build(AlgorithmConfig(name=name, **options), as_rewards(rewards), max_new_tokens=8)
    except ir.UserError as error:
        if ALLOW.items() <= options.items():
            return REFUSED
        # All that is wrong is said at once: what an option allows may stand beside what none does.
        allowed = outcome(name, rewards, {**options, **ALLOW}) == TAKEN
        return next((cell for cell, option in ALLOWED_BY.items() if allowed and option in str(error)), REFUSED)
    return TAKEN


def test_presets_are_the_documented_ones() -> None:
    """An empty cell stands for the field's default, which the page names below the table."""
    defaults = {field.name: str(field.default) for field in fields(Preset)}
    rows = table("The presets", "preset")
    found = {plain(name): {key: cell or defaults[key] for key, cell in row.items()} for name, row in rows.items()}
    assert found == {
        name: {key: str(value) for key, value in asdict(preset).items()} for name, preset in PRESETS.items()
    }
    named = [f"{key} {defaults[key]}" for key in ("weigh", "ratio", "clip_low", "clip_high", "skip_equal")]
    assert f"An empty cell is the default: {', '.join(named)}." in TEXT
    for name in PRESETS:
        assert PAGE.count(f"\n### {name}\n") == 1


def test_options_of_the_presets_are_the_documented_ones() -> None:
    """What a config may set of a preset, and what it may not."""
    may, may_not = TEXT.split("A config may set ")[1].split(" are what the name stands for")[0].split("; ")
    own = {field.name for field in fields(Preset)}
    assert set(quoted(may)) == own & set(AlgorithmConfig.model_fields)
    assert set(quoted(may_not)) == own - set(AlgorithmConfig.model_fields)


def test_defaults_are_the_documented_ones() -> None:
    rows = table("Options", "option")
    found = {name: plain(row["default"]) for cell, row in rows.items() for name in quoted(cell)}
    assert sum(len(quoted(cell)) for cell in rows) == len(found), "an option twice"
    assert found == documented_defaults()
    assert f"`{AlgorithmConfig().name}` is the default preset" in TEXT
    kept, sampling = ReplayConfig(), SamplingConfig()
    beside = f"`train.replay` (`groups` {kept.groups}, `staleness` {kept.staleness})"
    assert beside in TEXT
    assert f"`sampling.guide` ({sampling.guide:g})" in TEXT


def documented_defaults() -> dict[str, str]:
    """Every option of the algorithm with its default, sections written with a dot."""
    of_preset = {field.name for field in fields(Preset)}
    found = {}
    for name, field in AlgorithmConfig.model_fields.items():
        if name in SECTIONS:
            if field.default is None:
                found[name] = "not set"
            for key, inner in SECTIONS[name].model_fields.items():
                unset = "required" if inner.is_required() else "not set" if inner.default is None else ""
                found[f"{name}.{key}"] = unset or str(inner.default)
        elif name != "name":
            unset = "the preset's" if name in of_preset else "not set"
            found[name] = unset if field.default is None else str(field.default)
    return found


def test_choices_are_all_named() -> None:
    """Where an option takes one of some words, its row has all of them."""
    rows = {name: row for cell, row in table("Options", "option").items() for name in quoted(cell)}
    models = {"": AlgorithmConfig, **{f"{name}.": model for name, model in SECTIONS.items()}}
    for prefix, model in models.items():
        for name, field in model.model_fields.items():
            choices = {one for part in (field.annotation, *get_args(field.annotation)) for one in get_args(part)}
            words = {one for one in choices if isinstance(one, str)}
            if words and name != "name":
                assert words <= set(quoted(rows[f"{prefix}{name}"]["meaning"])), f"{prefix}{name}"


@pytest.mark.parametrize(
    ("title", "first", "choices"),
    [
        ("Policy gradient", "`baseline`", AlgorithmConfig.model_fields["baseline"]),
        ("Off-policy", "`importance.level`", ImportanceConfig.model_fields["level"]),
        ("What `normalise` weighs", "`normalise`", AlgorithmConfig.model_fields["normalise"]),
    ],
)
def test_tables_of_choices_are_whole(title: str, first: str, choices: Any) -> None:
    wanted = set(re.findall(r"'(\w+)'", str(choices.annotation)))
    assert {plain(name) for name in table(title, first)} == wanted


def kinds() -> dict[str, list[str]]:
    found = {kind: quoted(row["presets"]) for kind, row in table("Which rewards each preset takes", "kind").items()}
    assert sorted(name for names in found.values() for name in names) == sorted(PRESETS)
    return found


def test_outcomes_are_the_documented_ones() -> None:
    rows = table("Which rewards each preset takes", "outcome")
    assert list(rows) == [TAKEN, SUMMED, BIASED, REFUSED]
    assert {name: plain(rows[name]["what allows it"]) for name in ALLOWED_BY} == ALLOWED_BY


@pytest.mark.parametrize("name", PRESETS)
@pytest.mark.parametrize("case", CASES)
def test_what_each_preset_takes(case: str, name: str) -> None:
    """The cell says what ``build`` does: takes it, raises and names the option that allows it, or raises whatever one
    allows; and the presets that it names instead take it."""
    rows = table("Which rewards each preset takes", "reward")
    matching = [row for reward, row in rows.items() if reward.startswith(case)]
    assert len(matching) == 1, f"{case!r} must begin one row"
    assert len(rows) == len(CASES)
    (kind,) = [kind for kind, names in kinds().items() if name in names]
    cell, _, instead = matching[0][kind].partition("; use ")
    assert cell in (TAKEN, SUMMED, BIASED, REFUSED)
    assert bool(instead) == (cell == REFUSED)

    for rewards, options in CASES[case]:
        assert outcome(name, rewards, options) == cell
        if cell in ALLOWED_BY:
            key, value = ALLOWED_BY[cell].removeprefix("algorithm.").split("=")
            assert outcome(name, rewards, {**options, key: value}) == TAKEN
        if cell == REFUSED:
            assert outcome(name, rewards, {**options, **ALLOW}) == REFUSED
            assert [outcome(other, rewards, options) for other in quoted(instead)] == [TAKEN] * len(quoted(instead))


@pytest.mark.parametrize("name", PRESETS)
def test_rewards_that_compare_siblings_are_refused_where_siblings_are_the_baseline(name: str) -> None:
    compared = ir.reward(name="compared", scope="group")(lambda views: [0.0 for _ in views])
    sentence = TEXT.split("`algorithm.biased_baseline=allow`, by ")[1].split(";")[0]
    options = {"teacher": TEACHER} if name == "distill" else {}
    if name in quoted(sentence):
        with pytest.raises(ir.UserError, match=r"'compared' compares siblings.*biased_baseline=allow"):
            algorithms.build(AlgorithmConfig(name=name), [compared], max_new_tokens=8)
        options["biased_baseline"] = "allow"
    algorithms.build(AlgorithmConfig(name=name, **options), [compared], max_new_tokens=8)


@pytest.mark.parametrize("name", PRESETS)
def test_a_discounted_potential_for_pieces_is_refused(name: str) -> None:
    """As the page says under pieces: it is shaped per token."""
    assert outcome(name, [score, phi(0.9)], {"discount": 0.9, "pieces": "word"}) == REFUSED


def test_rewards_that_are_only_watched_are_not_checked() -> None:
    watched = paid(every="word", at="span").but(train=False)
    assert outcome("grpo", [score, watched], {"discount": 1.0}) == TAKEN


def test_kl_estimates_are_the_documented_ones() -> None:
    """k1 as a loss is refused, and what the table lists is taken as a loss and refused as a reward."""
    estimators = {plain(name) for name in table("Regularisation", "`kl_estimator`")}
    assert estimators == set(get_args(AlgorithmConfig.model_fields["kl_estimator"].annotation)) - {"k1"}
    for name in estimators:
        assert outcome("rloo", [score], {"kl": 0.1, "kl_as": "loss", "kl_estimator": name}) == TAKEN
        assert outcome("rloo", [score], {"kl": 0.1, "kl_estimator": name}) == REFUSED
    assert "`kl_as: loss` with `k1` is therefore refused" in TEXT
    with pytest.raises(ir.UserError, match=r"algorithm\.kl_as"):
        algorithms.build(AlgorithmConfig(kl=0.1, kl_as="loss"), as_rewards([score]), max_new_tokens=8)


def given(name: str, **options: Any) -> bool:
    """Whether a preset takes texts that were given or kept."""
    config = Config.build({"data": {"prompts": ["a"]}, "algorithm": name, **options})
    try:
        check_source(config, preset_of(config.algorithm))
    except ir.UserError:
        return False
    return True


def test_texts_that_are_given_are_taken_as_documented() -> None:
    """The page's sentences on given texts and on replay."""
    column = {"data": {"prompts": [{"prompt": "a", "answer": "b"}], "completion": "answer"}}
    recorded, replay = {"data": {"rollouts": "samples.jsonl"}}, {"train": {"replay": {}}}
    sentence = TEXT.split("plays no part. ")[1].split(" are made for that")[0]
    assert len(quoted(sentence)) == 5
    for name in quoted(sentence):
        assert given(name, **column)
        assert given(name, **recorded)
    assert not given("vtrace", **column)
    assert given("vtrace", **recorded)
    weighed = {"name": "reinforce", "importance": "token"}
    assert not given("reinforce", **{**column, "algorithm": weighed})
    for source in (recorded, replay):
        assert given("reinforce", **{**source, "algorithm": weighed})
        for name in ("reinforce", "rloo", "instant", "a2c", "distill"):
            assert not given(name, **source)


def examples() -> list[dict[str, Any]]:
    """The page's configs: blocks, and lines of code that begin as one does."""
    blocks = re.findall(r"```yaml\n(.*?)```", PAGE, re.DOTALL)
    lines = re.findall(r"(?<!`)`(algorithm: \{[^`]*\})`", PAGE)
    assert blocks, "no example stands in a block"
    assert lines, "no example stands in a line"
    return [yaml.safe_load(text) for text in [*blocks, *lines]]


@pytest.mark.parametrize("example", examples(), ids=lambda example: str(example["algorithm"]["name"]))
def test_examples_are_configs(example: dict[str, Any]) -> None:
    config = Config.build({"data": {"prompts": ["a"]}, **example})
    algorithm = algorithms.build(config.algorithm, as_rewards([score]), max_new_tokens=8)
    check_source(config, algorithm.preset)


def test_links_lead_somewhere() -> None:
    titles = re.findall(r"^#+ (.*)$", PAGE, re.MULTILINE)
    anchors = {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}
    links = re.findall(r"\(#([^)]+)\)", PAGE)
    assert len(links) > 10
    assert [link for link in links if link not in anchors] == []


# When a row of the metrics' table says that a metric is logged.
_RATIOS = "`importance`, `doubly_robust`, `vtrace`, `decoupled_ppo`, `gspo`, replay, `data.rollouts`, `data.logged`"
LOGGED: dict[str, Callable[[AlgorithmConfig, Preset], bool]] = {
    "always": lambda config, preset: True,
    "`kl` above 0, texts of its own": lambda config, preset: config.kl > 0 and preset.loss != "likelihood",
    "a teacher, texts of its own": lambda config, preset: config.teacher is not None,
    "`entropy_target`, from the second step": lambda config, preset: config.entropy_target is not None,
    "tokens are learned from": lambda config, preset: preset.loss not in ("all_actions", "ilql", "likelihood", "none"),
    "loss `clipped` or `cispo`": lambda config, preset: preset.loss in ("clipped", "cispo"),
    _RATIOS: lambda config, preset: (
        config.importance is not None or config.name in ("doubly_robust", "vtrace", "decoupled_ppo", "gspo")
    ),
    "a critic": lambda config, preset: preset.critic,
    "`likelihood`": lambda config, preset: preset.loss == "likelihood",
    "a section `supervised`": lambda config, preset: False,
    "`evaluate.texts`, every so often": lambda config, preset: False,
    "`ilql`": lambda config, preset: config.name == "ilql",
    "when it happened": lambda config, preset: False,
}
METRICS = {
    name: row["logged"]
    for cell, row in table("Metrics, and how to read them", "metric").items()
    for name in quoted(cell)
}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_folder(tmp_path_factory.mktemp("model"))


def rows_of(algorithm: Any, reward: Any, model: Path, out: Path, **train: Any) -> list[dict[str, float]]:
    """The metrics of two steps on a tiny model, by the public loop."""
    data: dict[str, Any] = {"prompts": ["it was", "a film of"]}
    if algorithm["name"] == "likelihood":
        data = {"prompts": [{"text": "it was good"}, {"text": "a film of"}], "column": None, "completion": "text"}
    values = {
        "model": str(model),
        "data": data,
        "algorithm": algorithm,
        "sampling": {"max_new_tokens": 4},
        "train": {"steps": 2, "prompts_per_step": 2, "group_size": 2, "learning_rate": 1e-3, **train},
        "out": str(out),
    }
    return ir.train(Config.build(values), rewards=[reward]).metrics


ADAPTIVE = {"name": "rloo", "kl": 0.1, "kl_target": 0.1, "entropy": 0.01, "entropy_target": 1.0}


@pytest.mark.parametrize(
    "algorithm",
    [
        *({"name": name} for name in PRESETS if name not in ("distill", "doubly_robust")),  # a teacher: below; one step
        ADAPTIVE,
        {"name": "grpo", "kl": 0.1, "kl_as": "loss", "kl_estimator": "k3"},
        {"name": "reinforce", "importance": "token", "baseline": "value"},
        {"name": "decoupled_ppo", "importance": "sequence"},
        {"name": "distill", "teacher": TEACHER},
        {"name": "a2c", "teacher": {**TEACHER, "whole": True}},
        {"name": "value", "critic": {"table": True}},
        {"name": "likelihood", "by_error": "easier", "kl": 0.1, "kl_as": "loss", "kl_estimator": "k2"},
    ],
    ids=str,
)
def test_metrics_are_the_documented_ones(algorithm: dict[str, Any], model: Path, tmp_path: Path) -> None:
    """Every metric of a real step has a row in the table, which says when it is logged."""
    config = AlgorithmConfig(**algorithm)
    wanted = {name for name, when in METRICS.items() if LOGGED[when](config, preset_of(config))}
    first, second = rows_of(algorithm, score, model, tmp_path / "run")
    found = {re.sub("/(score|kl|teacher)$", "/<source>", key) for key in second}
    happened = {name for name, when in METRICS.items() if when == "when it happened"}
    assert found - happened == wanted
    late = {name for name, when in METRICS.items() if "second step" in when}
    assert not late & set(first)


def test_metrics_of_what_happens_now_and_then(model: Path, tmp_path: Path) -> None:
    ppo = {"name": "ppo", "epochs": 4, "minibatches": 2, "stop_kl": 1e-9}
    length = ir.reward(every="end", name="length_of")(lambda view: float(len(view.text)))
    rows = rows_of(ppo, length, model, tmp_path / "stopped", learning_rate=1e-2)
    assert any("stopped_early" in row for row in rows)
    assert not any("stopped_early" in row for row in rows_of({"name": "ppo"}, length, model, tmp_path / "whole"))
    equals = rows_of({"name": "dapo", "refill": 1}, lambda text: 1.0, model, tmp_path / "equal")
    assert all(row["skipped_groups"] == 4 for row in equals)


def test_metrics_of_a_warming_critic(model: Path, tmp_path: Path) -> None:
    """While the critic learns alone, no tokens are learned from."""
    rows = rows_of({"name": "ppo", "critic": {"warmup": 1}}, score, model, tmp_path / "run")
    learned = {name for name, when in METRICS.items() if when == "tokens are learned from"}
    assert learned == {"ratio_kl", "sampler_gap"}
    assert not learned & set(rows[0])
    assert learned <= set(rows[1])
