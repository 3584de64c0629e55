"""The config: everything wrong at once with its dotted path, overrides, and YAML text that reads back as it was."""

import math
import subprocess
import sys

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from instant_reward.config import AlgorithmConfig, Config, RewardConfig, resolve
from instant_reward.presets import PRESETS
from instant_reward.types import UserError
from instant_reward.yaml_values import parse_yaml, to_yaml

SMALL = """
data: {prompts: [a, b]}
rewards:
  - use: rules:polite
"""


def load(tmp_path, text=SMALL, *overrides):
    path = tmp_path / "config.yaml"
    path.write_text(text, encoding="utf-8")
    return Config.load(path, overrides)


def problems(tmp_path, text=SMALL, *overrides):
    """The lines of the error, without the first one and the indentation."""
    with pytest.raises(UserError) as caught:
        load(tmp_path, text, *overrides)
    header, *lines = str(caught.value).splitlines()
    count = f"{len(lines)} problem" + "s" * (len(lines) != 1)
    assert header == f"{tmp_path / 'config.yaml'} has {count}:"
    return [line.strip() for line in lines]


def test_defaults(tmp_path):
    config = load(tmp_path)
    assert config.model.name == "smollm2-135m"
    assert config.algorithm.name == "rloo"
    assert (config.train.steps, config.train.group_size, config.sampling.max_new_tokens) == (40, 8, 32)
    assert config.rewards[0].label == "polite"


def test_two_configs_share_nothing(tmp_path):
    one, two = load(tmp_path), load(tmp_path)
    one.train.steps = 7
    one.sampling.stop.append("x")
    one.rewards[0].args["k"] = 1
    assert two.train.steps == 40
    assert two.sampling.stop == []
    assert two.rewards[0].args == {}


def test_one_word_stands_for_a_section(tmp_path):
    config = load(tmp_path, "model: folder\ndata: prompts.jsonl\nalgorithm: grpo\nrewards: ['rules:polite']\n")
    assert (config.model.name, config.data.path, config.algorithm.name) == ("folder", "prompts.jsonl", "grpo")
    assert config.rewards[0].use == "rules:polite"
    assert Config.build({"data": "p.txt", "algorithm": "grpo"}).algorithm.name == "grpo"


def test_everything_wrong_is_reported_at_once(tmp_path):
    text = """
    model: {dtyp: float32, lora: {rnk: 3}}
    data: {path: a, use: "m:f"}
    steps: 40
    colour: blue
    rewards:
      - {use: polite, weight: .nan, every: wrod}
      - {every: 0}
      - {use: "a:b", at: piece}
    algorithm: pop
    sampling: {max_new_tokens: 4, min_new_tokens: 8, top_p: 0.9, top_k: 5}
    train: {learning_rate: -1e-5, stop_when: {metric: score}}
    evaluate: 3
    """
    found = dict(line.split(": ", 1) for line in problems(tmp_path, text))
    names = list(PRESETS)
    assert found["model.dtyp"] == "there is no such key; did you mean dtype?"
    assert found["model.lora.rnk"] == "there is no such key; did you mean rank?"
    assert found["data"] == "give exactly one of path, use, prompts and rollouts (there are path and use)"
    assert found["steps"] == "there is no such key here; did you mean train.steps?"
    assert "the keys here are model, data, rewards" in found["colour"]
    assert "module:name" in found["rewards.0.use"]
    assert found["rewards.0.weight"] == "must be a finite number, not nan"
    assert "token, word, sentence, line, end" in found["rewards.0.every"]
    assert found["rewards.1.use"] == "this is required"
    assert found["rewards.1.every"].endswith("not 0")
    assert found["rewards.2.at"] == "must be 'seen' or 'span', not 'piece'"
    assert found["algorithm.name"] == f"must be {', '.join(map(repr, names[:-1]))} or {names[-1]!r}, not 'pop'"
    assert "more than max_new_tokens (4)" in found["sampling.min_new_tokens"]
    assert "set it to 1" in found["sampling.top_p"]
    assert "set it to 0" in found["sampling.top_k"]
    assert found["train.learning_rate"] == "must be greater than or equal to 0, not -1e-05"
    assert found["train.stop_when"] == "give above, below or patience: without one it never ends the run"
    assert found["evaluate"] == "must be a mapping of keys to values, not 3"
    assert len(found) == 18


@pytest.mark.parametrize(
    ("override", "path"),
    [
        ("rewards.0.weight=.inf", "rewards.0.weight"),
        ("rewards.0.discount=1.5", "rewards.0.discount"),
        ("model.lora.targets=3", "model.lora.targets"),
        ("algorithm.discount=0", "algorithm.discount"),
        ("algorithm.discount=1.01", "algorithm.discount"),
        ("algorithm.kl=-0.1", "algorithm.kl"),
        ("algorithm.epochs=0", "algorithm.epochs"),
        ("sampling.temperature=0", "sampling.temperature"),
        ("sampling.top_p=0", "sampling.top_p"),
        ("sampling.min_new_tokens=33", "sampling.min_new_tokens"),
        ("train.group_size=1", "train.group_size"),
        ("train.steps=0", "train.steps"),
        ("train.steps=", "train.steps"),
        ("train.schedule=cosin", "train.schedule"),
        ("data.prompts=[]", "data.prompts"),
        ("data.prompts=[3]", "data.prompts"),
        ("data={}", "data"),
        ("rewards.0.train=false", "rewards"),
        ("rewards=[]", "rewards"),
        ("out=", "out"),
        ("seed=-1", "seed"),
    ],
)
def test_a_bad_value_is_named_by_its_path(tmp_path, override, path):
    (line,) = problems(tmp_path, SMALL, override)
    assert line.split(": ")[0] == path


def test_bounds_that_are_allowed(tmp_path):
    load(tmp_path, SMALL, "algorithm=reinforce", "train.group_size=1", "algorithm.discount=0.5", "algorithm.kl=0")
    load(tmp_path, SMALL, "sampling.min_new_tokens=32", "rewards.0.discount=0", "rewards.0.every=3")


def test_checks_across_sections_come_with_the_others(tmp_path):
    found = problems(tmp_path, SMALL, "train.group_size=1", "seed=x")
    assert [line.split(": ")[0] for line in found] == ["train.group_size", "seed"]


def test_two_rewards_of_one_name(tmp_path):
    text = SMALL + "  - use: other:polite\n"
    (line,) = problems(tmp_path, text)
    assert line.startswith("rewards.1.name: 'polite' is also what rewards.0 is called")
    assert load(tmp_path, text, "rewards.1.name=second").rewards[1].label == "second"


def test_overrides(tmp_path):
    config = load(
        tmp_path,
        SMALL,
        "train.steps=7",
        "train.learning_rate=4e-5",
        "rewards.0.weight=2",
        "rewards.0.args={source: 'a=b'}",
        "model.lora.rank=4",
        "train.stop_when={metric: score, above: 0.8}",
        "model=other",
        "model.dtype=float32",
        'sampling.stop=["\\n"]',
    )
    assert (config.train.steps, config.train.learning_rate) == (7, 4e-5)
    assert (config.rewards[0].weight, config.rewards[0].args) == (2, {"source": "a=b"})
    assert config.model.lora is not None
    assert config.model.lora.rank == 4
    assert (config.model.name, config.model.dtype) == ("other", "float32")
    assert config.train.stop_when is not None
    assert config.train.stop_when.above == 0.8
    assert config.sampling.stop == ["\n"]


def test_an_algorithm_by_name_keeps_the_other_settings(tmp_path):
    text = SMALL + "algorithm: {name: rloo, discount: 0.8}\n"
    config = load(tmp_path, text, "algorithm=grpo")
    assert (config.algorithm.name, config.algorithm.discount) == ("grpo", 0.8)
    config = load(tmp_path, SMALL + "algorithm: grpo\n", "algorithm.discount=0.8")
    assert (config.algorithm.name, config.algorithm.discount) == ("grpo", 0.8)


def test_bad_overrides_are_reported_at_once(tmp_path):
    overrides = ["train.steps", "=3", "rewards.1.weight=1", "seed.deep=1", "train.step=3", "data.path=["]
    found = problems(tmp_path, SMALL, *overrides)
    assert found[0] == "train.steps: write an override as path.to.key=value, for example train.steps=40"
    assert found[1].startswith("=3: write an override")
    assert found[2] == "rewards.1.weight: rewards has 1, counted from 0, so it has no item '1'"
    assert found[3].startswith("override data.path=[, line 1: this is no valid YAML")
    assert found[4] == "train.step: there is no such key; did you mean steps?"
    assert found[5] == "seed: must be a valid integer, not {'deep': 1}"


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("", "is empty"),
        ("- a\n- b\n", "holds a list"),
        ("hello", "holds a single value"),
        ("a: 1\nb: [1,\nc: 2\n", "line 4: this is no valid YAML"),
        ("a: 1\n\tb: 2\n", "line 2: this is no valid YAML"),
        ("seed: 1\nseed: 2\n", "line 2: this is no valid YAML (the key 'seed' is there twice)"),
        ("a: \x07", "this is no valid YAML"),
        ("a: 2024-13-45", "this is no valid YAML"),
    ],
)
def test_a_file_that_is_no_mapping(tmp_path, text, sentence):
    with pytest.raises(UserError, match=r"config\.yaml") as caught:
        load(tmp_path, text)
    assert sentence in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_file_that_cannot_be_read(tmp_path):
    with pytest.raises(UserError, match=r"there is no config file .*missing\.yaml"):
        Config.load(tmp_path / "missing.yaml")
    with pytest.raises(UserError, match="is a folder"):
        Config.load(tmp_path)
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe\x00\x81")
    with pytest.raises(UserError, match="is not text in UTF-8"):
        Config.load(tmp_path / "binary.yaml")
    (tmp_path / "loop.yaml").symlink_to("loop.yaml")
    with pytest.raises(UserError, match="cannot read the config file"):
        Config.load(tmp_path / "loop.yaml")


def test_dump_reads_back_as_it_was(tmp_path):
    config = load(
        tmp_path,
        SMALL,
        "model.lora={}",
        "train.learning_rate=1e-5",
        'rewards.0.args={word: "1e-5", empty: "", none: null, n: 3, "yes": "no", text: "zwei: drei\\n"}',
        'data.prompts=["Ünïcode 。", "\\ud83d\\ude00", [{role: user, content: hi}], {prompt: a, source: b}]',
    )
    path = tmp_path / "dumped.yaml"
    path.write_text(config.dump(), encoding="utf-8")
    assert Config.load(path) == config
    assert Config.load(path).dump() == config.dump()


values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False)
    | st.text(st.characters(exclude_categories=["Cs"])),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(st.characters(codec="utf-8")), inner, max_size=3)
    ),
    max_leaves=8,
)


@example({"next\x85line": "line\u2028separator", "mark": "\ufeff", "number": "1e5"})
@given(st.dictionaries(st.text(st.characters(codec="utf-8")), values, min_size=1, max_size=4))
def test_yaml_reads_back_any_values(mapping):
    back = parse_yaml(to_yaml(mapping), "text")
    assert back == mapping
    assert to_yaml(back) == to_yaml(mapping)


@given(st.floats(allow_nan=False, allow_infinity=False))
def test_numbers_as_people_write_them(number):
    assert parse_yaml(repr(number), "text") == number
    for text in (f"{number:e}", f"{number:.0e}"):
        assert parse_yaml(text, "text") == pytest.approx(float(text)), text


def test_words_stay_words():
    words = ["1e", "e5", "1.2.3", ".", "1e5x", "+", "word"]
    assert [parse_yaml(word, "text") for word in words] == words
    assert math.isinf(parse_yaml(".inf", "text"))


def test_built_from_values_reports_where():
    with pytest.raises(UserError, match="the arguments of train has 1 problem:\n  seed: "):
        Config.build({"data": "a.txt", "seed": "x"}, "the arguments of train")


def test_config_and_its_errors_need_no_torch():
    code = (
        "import sys, instant_reward.config; print([m for m in ('torch', 'transformers', 'numpy') if m in sys.modules])"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"


def test_resolve_a_module(tmp_path, monkeypatch):
    (tmp_path / "their_rules.py").write_text("import their_missing_library\n")
    (tmp_path / "their_words.py").write_text("class Scores:\n    def polite(text): return 1.0\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    assert resolve("math:sqrt") is math.sqrt
    assert resolve("their_words:Scores.polite")("x") == 1.0
    with pytest.raises(UserError, match="there is no module 'nowhere_at_all'"):
        resolve("nowhere_at_all.rules:polite")
    with pytest.raises(UserError, match=r"there is no module 'math\.rules'|there is no module"):
        resolve("math.rules:polite")
    with pytest.raises(UserError, match="math has no 'polite'"):
        resolve("math:polite")
    with pytest.raises(
        UserError, match=r"importing their_rules failed with ModuleNotFoundError: .*their_missing_library"
    ):
        resolve("their_rules:polite")


def test_resolve_a_file(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "rules.py").write_text("calls = []\ndef polite(text): calls.append(text)\n")
    (tmp_path / "broken.py").write_text("1 / 0\n")
    resolve("rules.py:polite")("a")
    assert resolve(f"{tmp_path}/rules.py:calls") == ["a"]  # one file is one module
    with pytest.raises(UserError, match=r"there is no file nothing\.py"):
        resolve("nothing.py:polite")
    with pytest.raises(UserError, match=r"rules\.py has no 'rude'"):
        resolve("rules.py:rude")
    for _ in range(2):  # a failure is not remembered as a module
        with pytest.raises(UserError, match=r"importing broken\.py failed with ZeroDivisionError"):
            resolve("broken.py:polite")
    with pytest.raises(UserError, match="names no function"):
        resolve("polite")


def test_sections_are_plain_python():
    assert RewardConfig(use="a:b", every=3).every == 3
    assert AlgorithmConfig(name="grpo", scale="none").scale == "none"


@pytest.mark.parametrize(
    ("override", "section", "name"),
    [
        ("algorithm.critic=head", "critic", "model"),
        ("algorithm.importance=token", "importance", "level"),
        ("algorithm.teacher=other", "teacher", "model"),
    ],
)
def test_a_section_given_by_one_word_takes_further_overrides(tmp_path, override, section, name):
    key = {"critic": "warmup=3", "importance": "most=5", "teacher": "weight=0.5"}[section]
    config = load(tmp_path, SMALL, "algorithm=reinforce", override, f"algorithm.{section}.{key}")
    found = getattr(config.algorithm, section)
    assert getattr(found, name) == override.partition("=")[2]
    assert getattr(found, key.partition("=")[0]) == float(key.partition("=")[2])


def test_a_weight_may_be_a_rule(tmp_path):
    text = "data: {prompts: [a]}\nrewards:\n  - {use: 'm:f', weight: {rule: linear, start: 1, end: 0, steps: 5}}\n"
    config = load(tmp_path, text)
    assert (config.rewards[0].weight.start, config.rewards[0].weight.steps) == (1.0, 5)
    assert Config.build(parse_yaml(config.dump(), "")) == config


@pytest.mark.parametrize(
    ("weight", "sentence"),
    [
        ("{rule: linaer, steps: 3}", "rewards.0.weight: must be a number, or a mapping with rule: linear, cosine,"),
        ("{rule: linear, steps: 0}", "rewards.0.weight.steps: must be greater than or equal to 1"),
        ("{rule: fade, metric: kl, low: 2, high: 1}", "rewards.0.weight: high (1) must be above low (2)"),
        ("{rule: cosine, steps: 3, stopp: 1}", "rewards.0.weight.stopp: there is no such key; did you mean"),
        ("heavy", "rewards.0.weight: must be a valid number"),
    ],
)
def test_a_bad_weight_is_said_in_words(tmp_path, weight, sentence):
    text = f"data: {{prompts: [a]}}\nrewards:\n  - {{use: 'm:f', weight: {weight}}}\n"
    (line,) = problems(tmp_path, text)
    assert line.startswith(sentence)


@pytest.mark.parametrize(
    ("overrides", "sentence"),
    [
        (["evaluate.prompts={rollouts: x.jsonl}"], "evaluate.prompts: texts are sampled for these prompts"),
        (["algorithm=raft", "algorithm.keep=9"], "train.group_size: is 8, and algorithm.keep would keep 9"),
        (["algorithm.minibatches=33"], "train.prompts_per_step: times group_size is 32 texts, too few"),
        (["algorithm=ppo", "algorithm.lam_length=1", "algorithm.lam=0.9"], "algorithm: lam_length sets the policy's"),
        (
            ["algorithm.kl_target=1", "algorithm.entropy_target=1"],
            "algorithm: kl_target adapts the weight kl; set kl above 0 to begin with; and entropy_target adapts",
        ),
    ],
)
def test_options_that_do_not_go_together_are_refused(tmp_path, overrides, sentence):
    (line,) = problems(tmp_path, SMALL, *overrides)
    assert line.startswith(sentence)


def test_the_sizes_of_given_groups_are_the_files(tmp_path):
    load(tmp_path, SMALL.replace("prompts: [a, b]", "rollouts: x.jsonl"), "algorithm=raft", "train.group_size=1")
