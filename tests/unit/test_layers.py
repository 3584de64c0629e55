"""Imports go one way, torch stays out of the rooms that do without it, and files and functions stay short.

The imports are read from the source: those inside functions and under TYPE_CHECKING count as well.
"""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

SOURCE = Path(__file__).parents[2] / "src" / "instant_reward"

# A module imports from its own line and from the lines above it. A new module gets a place here.
LAYERS = [
    ["_callable", "types"],
    [
        "cache", "config_data", "config_scratch", "config_section", "config_split", "config_weight", "data_files",
        "data_rows", "fetch", "imports", "models", "notice", "records", "reviews", "stored", "text",
    ],
    ["batch", "credit", "importance", "losses", "rewards"],
    [
        "algorithms", "assemble", "carried", "checks", "config", "config_algorithm", "config_problems", "config_train",
        "crediting", "data", "objective", "policies", "presets",
        "progress", "run", "run_files", "sampling", "screen", "weights", "yaml_values",
    ],
    ["beside", "collect", "fitting", "masking", "start", "supervised", "train", "watching"],
    ["__main__", "cli", "evaluate", "studio"],
]  # fmt: skip
LAYER = {name: index for index, names in enumerate(LAYERS) for name in names}

# Who may import torch or transformers when imported; everyone else does so inside functions, if at all.
WITH_TORCH = {
    "algorithms", "batch", "beside", "checks", "collect", "credit", "crediting", "fitting", "importance", "losses",
    "masking", "objective", "policies", "progress", "sampling", "start", "train", "weights",
}  # fmt: skip


def room(path: Path, root: Path) -> str:
    """The file's name in the table: its own, or that of its folder below the package."""
    return path.relative_to(root).parts[0].removesuffix(".py")


def imported(tree: ast.AST, path: Path, root: Path) -> Iterator[tuple[int, str]]:
    """The line and the dotted name of everything that a file imports, relative imports made absolute."""
    package = ["instant_reward", *path.relative_to(root).parts[:-1]]
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = package[: len(package) - node.level + 1] if node.level else []
            base = ".".join([*above, *([node.module] if node.module else [])])
            yield from ((node.lineno, f"{base}.{alias.name}") for alias in node.names)


def violations(root: Path) -> list[str]:
    """Each import against the order, each module without a place, as ``file:line: what``."""
    found = []
    for path in sorted(root.rglob("*.py")):
        if path == root / "__init__.py":
            continue
        where, here = path.relative_to(root), room(path, root)
        if here not in LAYER:
            found.append(f"{where}: {here} has no place in LAYERS")
            continue
        for line, name in imported(ast.parse(path.read_text(encoding="utf-8")), path, root):
            parts = name.split(".")
            if parts[0] != "instant_reward" or parts[1:] == ["__version__"]:
                continue
            if len(parts) == 1:
                found.append(f"{where}:{line}: imports the package itself, and through it anything")
            elif parts[1] not in LAYER:
                found.append(f"{where}:{line}: imports {parts[1]}, which has no place in LAYERS")
            elif LAYER[parts[1]] > LAYER[here]:
                found.append(f"{where}:{line}: {here} imports {parts[1]}, which comes after it")
    return found


def early_torch(root: Path) -> list[str]:
    """Each import of torch or transformers that is carried out when its module is imported, outside WITH_TORCH."""
    found = []
    for path in sorted(root.rglob("*.py")):
        if room(path, root) in WITH_TORCH:
            continue
        tree = ast.parse(path.read_text(encoding="utf-8"))
        deferred = (ast.FunctionDef, ast.AsyncFunctionDef)
        later = {
            id(node) for function in ast.walk(tree) if isinstance(function, deferred) for node in ast.walk(function)
        }
        later |= {id(node) for block in ast.walk(tree) if _for_types(block) for node in ast.walk(block)}
        for node in ast.walk(tree):
            if isinstance(node, ast.Import | ast.ImportFrom) and id(node) not in later:
                names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else [node.module or ""]
                if any(name.split(".")[0] in ("torch", "transformers", "peft", "accelerate") for name in names):
                    found.append(f"{path.relative_to(root)}:{node.lineno}")
    return found


def _for_types(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and ast.unparse(node.test) in ("TYPE_CHECKING", "typing.TYPE_CHECKING")


def too_long(root: Path, lines: int, function_lines: int) -> list[str]:
    """Each file and each function with more lines than that, the function's docstring not counted."""
    found = []
    for path in sorted(root.rglob("*.py")):
        text = path.read_text(encoding="utf-8")
        if len(text.splitlines()) > lines:
            found.append(f"{path.relative_to(root)}: {len(text.splitlines())} lines")
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                length = (node.end_lineno or 0) - node.lineno + 1 - _docstring_lines(node)
                if length > function_lines:
                    found.append(f"{path.relative_to(root)}:{node.lineno}: {node.name} has {length} lines")
    return found


def _docstring_lines(function: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    first = function.body[0]
    return (first.end_lineno or 0) - first.lineno + 1 if ast.get_docstring(function) else 0


def test_imports_go_one_way():
    assert violations(SOURCE) == []


def test_torch_is_imported_only_where_it_belongs():
    assert early_torch(SOURCE) == []


def test_files_and_functions_are_short():
    assert too_long(SOURCE, lines=500, function_lines=60) == []


@pytest.mark.parametrize(
    ("place", "code", "complaint"),
    [
        ("rewards/rules.py", "from instant_reward.policies.causal import CausalPolicy", "rewards imports policies"),
        ("rewards/rules.py", "import instant_reward.policies", "rewards imports policies"),
        ("rewards/rules.py", "from ..policies import causal", "rewards imports policies"),
        ("rewards/rules.py", "from instant_reward import policies", "rewards imports policies"),
        ("types.py", "def f():\n    from instant_reward.text import Pieces", "types imports text"),
        ("text.py", "if TYPE_CHECKING:\n    from instant_reward.batch import Batch", "text imports batch"),
        ("run.py", "from .train import train", "run imports train"),
        ("train.py", "import instant_reward.cli as cli", "train imports cli"),
        ("cli.py", "import instant_reward as ir", "imports the package itself"),
        ("credit.py", "from instant_reward import load_policy", "imports load_policy, which has no place"),
        ("helpers.py", "", "helpers has no place in LAYERS"),
    ],
)
def test_a_violation_is_found(tmp_path, place, code, complaint):
    (tmp_path / place).parent.mkdir(exist_ok=True)
    (tmp_path / place).write_text(code)
    (found,) = violations(tmp_path)
    assert complaint in found


def test_what_is_allowed(tmp_path):
    (tmp_path / "__init__.py").write_text("from instant_reward.train import train")
    (tmp_path / "sampling").mkdir()
    (tmp_path / "sampling" / "engine.py").write_text(
        "import torch\nfrom instant_reward import __version__\nfrom . import draw\nfrom ..types import Mark\n"
        "from instant_reward.policies.causal import CausalPolicy\n"
    )
    assert violations(tmp_path) == []


def test_early_torch_is_found(tmp_path):
    (tmp_path / "models.py").write_text("try:\n    import transformers.utils\nexcept ImportError:\n    pass\n")
    (tmp_path / "run.py").write_text("class A:\n    from torch import Tensor\n")
    (tmp_path / "data.py").write_text("if TYPE_CHECKING:\n    import torch\ndef f():\n    import torch\n")
    (tmp_path / "losses.py").write_text("import torch\n")
    assert early_torch(tmp_path) == ["models.py:2", "run.py:2"]


def test_long_ones_are_found(tmp_path):
    (tmp_path / "a.py").write_text('def f():\n    """One\n    and two."""\n' + "    pass\n" * 4 + "x = 1\n")
    assert too_long(tmp_path, lines=8, function_lines=5) == []
    assert too_long(tmp_path, lines=7, function_lines=4) == ["a.py: 8 lines", "a.py:1: f has 5 lines"]
