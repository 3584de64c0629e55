"""The public names: all there, loaded when first used, and nothing heavy before."""

import inspect
import json
import subprocess
import sys

import pytest

import instant_reward as ir

HEAVY = ["torch", "transformers", "numpy", "pydantic", "yaml", "rich", "sklearn", "matplotlib", "pandas"]


def loaded_by(code):
    """Which of the heavy packages a new interpreter has loaded after the code."""
    code += f"\nimport json, sys; print(json.dumps([name for name in {HEAVY} if name in sys.modules]))"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout.splitlines()[-1])


def test_importing_the_package_loads_nothing_heavy():
    assert loaded_by("import instant_reward") == []


def test_the_words_of_a_reward_load_nothing_heavy():
    assert loaded_by("import instant_reward as ir; ir.View, ir.Mark, ir.Prompt, ir.UserError") == []


@pytest.mark.parametrize("arguments", [["--help"], ["train", "--help"], ["--version"]])
def test_the_help_of_the_command_loads_nothing_heavy(arguments):
    code = f"""
import sys
sys.argv = ["instant-reward", *{arguments}]
from instant_reward.cli import main
try:
    code = main()
except SystemExit as exit:
    code = exit.code
assert not code, code
"""
    assert loaded_by(code) == []


def test_the_check_can_fail():
    assert loaded_by("import instant_reward, pydantic") == ["pydantic"]


@pytest.mark.parametrize("name", ir.__all__)
def test_every_public_name_is_there(name):
    assert getattr(ir, name) is not None
    assert name in dir(ir)


def test_names_are_the_ones_of_their_modules():
    from instant_reward import credit, types
    from instant_reward.policies.causal import CausalPolicy
    from instant_reward.policies.policy import Policy

    assert ir.Mark is types.Mark
    assert ir.credit is credit
    assert ir.Policy is Policy
    assert ir.CausalPolicy is CausalPolicy


def test_a_name_that_is_not_there():
    with pytest.raises(AttributeError, match="module 'instant_reward' has no attribute 'trian'"):
        _ = ir.trian


WAYS_TO_TRAIN = [
    "import instant_reward; call = instant_reward.train",
    "import instant_reward.train; call = instant_reward.train",
    "from instant_reward import train as call",
    "from instant_reward.train import train as call",
    "import instant_reward.train as call",
    "import instant_reward as ir; first = ir.train; import instant_reward.train; call = ir.train; assert call is first",
    "from instant_reward.train import train; import instant_reward as ir; call = ir.train",
]


def test_train_can_be_called_however_it_was_imported():
    """In an interpreter of its own, which forgets the package between the ways but not torch: that takes seconds."""
    code = f"""
import inspect, sys
for way in {WAYS_TO_TRAIN}:
    names = {{}}
    exec(way, names)
    assert callable(names["call"]), way
    assert "prompts_per_step" in inspect.signature(names["call"]).parameters, way
    for module in [name for name in sys.modules if name.split(".")[0] == "instant_reward"]:
        del sys.modules[module]
"""
    loaded_by(code)


def test_calling_the_module_calls_the_function(monkeypatch):
    from instant_reward.train import train

    assert inspect.signature(ir.train) == inspect.signature(train)
    with pytest.raises(TypeError, match="unexpected keyword argument 'no_such_argument'"):
        ir.train(no_such_argument=1)
    monkeypatch.setattr("instant_reward.train.learn", None)  # tools find the module by attribute


def test_the_type_checker_sees_the_same_names():
    source = inspect.getsource(ir)
    block = source[source.index("if TYPE_CHECKING:") : source.index("__version__ =")]
    for name in ir.__all__:
        assert name == "__version__" or f" as {name}\n" in block or f"    {name} = " in block, name
