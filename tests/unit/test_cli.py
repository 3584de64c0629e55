"""The commands; on bad input: one sentence, exit code 2 (1 where the run itself failed), nothing saved is harmed."""

from __future__ import annotations

import errno
import json
from pathlib import Path
from typing import Any

import pytest

from instant_reward import cli
from tiny import tiny_folder

REWARDS = """
import math
import instant_reward as ir

def length(text):
    return len(text) / 100

def nan(text):
    return math.nan

def raises(text):
    raise KeyError("score")

@ir.reward(every="word")
def short(view):
    return [0.0] * (view.tokens + 1)
"""


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_folder(tmp_path_factory.mktemp("model"))


@pytest.fixture
def write(tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "rewards.py").write_text(REWARDS)

    def config(**changes: Any) -> str:
        values: dict[str, Any] = {
            "model": str(model),
            "data": {"prompts": ["it was", "the movie"]},
            "rewards": ["rewards.py:length"],
            "sampling": {"max_new_tokens": 4},
            "train": {"steps": 2, "prompts_per_step": 1, "group_size": 2},
            "out": "run",
        }
        values.update(changes)
        (tmp_path / "config.yaml").write_text(json.dumps(values))
        return "config.yaml"

    return config


def said(capsys: pytest.CaptureFixture[str]) -> str:
    text = capsys.readouterr().err
    assert "Traceback" not in text
    return text


def test_train_trains_and_leaves_a_run_with_a_report(write: Any, tmp_path: Path) -> None:
    assert cli.main(["train", write()]) == 0
    run = tmp_path / "run"
    for name in ("config.yaml", "metrics.jsonl", "samples.jsonl", "versions.json", "report.html", "curve.png"):
        assert (run / name).is_file(), name


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"rewards": ["rewards.py:nan"]}, ["'nan'", "prompt 0", "step 1", "finite"]),
        ({"rewards": ["rewards.py:raises"]}, ["'raises'", "KeyError", "step 1"]),
        ({"rewards": ["rewards.py:short"]}, ["'short'", "one for each token"]),
        ({"rewards": ["rewards.py:missing"]}, ["missing"]),
        ({"rewards": ["nowhere.py:missing"]}, ["nowhere.py"]),
        ({"model": "no-such-model"}, ["no-such-model", "smollm2-135m"]),
        ({"data": "missing.jsonl"}, ["missing.jsonl"]),
        ({"data": {"prompts": ["word " * 200]}}, ["prompt 0", "shorten"]),
        ({"train": {"stepz": 2}}, ["train.stepz", "steps"]),
        ({"algorithm": {"kl_as": "loss"}}, ["zero expected gradient", "reward"]),
    ],
)
def test_bad_input_is_said_in_words(
    changes: dict[str, Any], words: list[str], write: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["train", write(**changes)]) == 2
    text = said(capsys)
    assert all(word in text for word in words), text


def test_an_empty_prompt_file_is_named(write: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "empty.txt").write_text("")
    assert cli.main(["train", write(data="empty.txt")]) == 2
    assert "empty.txt" in said(capsys)


def test_three_mistakes_are_reported_at_once(write: Any, capsys: pytest.CaptureFixture[str]) -> None:
    path = write(train={"steps": 0, "learning_rate": "fast"}, sampling={"top_p": 0.5})
    assert cli.main(["train", path]) == 2
    text = said(capsys)
    assert all(word in text for word in ("train.steps", "train.learning_rate", "sampling.top_p"))


def test_a_missing_config_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["train", "nothing.yaml"]) == 2
    assert "nothing.yaml" in said(capsys)


def test_a_begun_folder_is_not_written_over(write: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write()
    assert cli.main(["train", path]) == 0
    before = (tmp_path / "run" / "metrics.jsonl").read_bytes()
    assert cli.main(["train", path]) == 2
    assert "--resume" in said(capsys)
    assert (tmp_path / "run" / "metrics.jsonl").read_bytes() == before


def test_a_full_disk_harms_no_saved_checkpoint(
    write: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from instant_reward.policies.causal import CausalPolicy

    assert cli.main(["train", write()]) == 0
    saved = tmp_path / "run" / "checkpoints" / "step-000002"
    content = {path.name: path.read_bytes() for path in saved.rglob("*") if path.is_file()}

    def full(self: CausalPolicy, folder: Path) -> None:
        (folder / "half.safetensors").write_bytes(b"half")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(CausalPolicy, "save_state", full)
    assert cli.main(["train", "--resume", "run", "train.steps=3"]) == 1
    assert "the disk is full" in said(capsys)
    assert {path.name: path.read_bytes() for path in saved.rglob("*") if path.is_file()} == content
    assert not list((tmp_path / "run" / "checkpoints").glob("**/half.safetensors"))


def test_print_config_prints_what_load_reads_back(
    write: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["train", write(), "train.steps=7", "--print-config"]) == 0
    (tmp_path / "printed.yaml").write_text(capsys.readouterr().out)
    assert cli.main(["train", "printed.yaml", "--print-config"]) == 0
    assert capsys.readouterr().out == (tmp_path / "printed.yaml").read_text()
    assert not (tmp_path / "run").exists()


def test_score_gives_marks_with_their_characters(
    write: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "words.py").write_text(
        "import instant_reward as ir\n@ir.reward(every='word')\ndef size(view):\n    return len(view.piece.strip())\n"
    )
    (tmp_path / "texts.txt").write_text("a warm film\n\n好的电影\n")
    assert cli.main(["score", "--reward", "words.py:size", "texts.txt"]) == 0
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [mark["text"] for mark in rows[0]["marks"]] == ["a", " warm", " film"]
    assert rows[0]["totals"] == {"size": 9.0}
    assert len(rows[1]["marks"]) == 4
    assert cli.main(["score", "--reward", "words.py:size", "--coloured", "texts.txt"]) == 0
    assert "a warm film" in capsys.readouterr().out


def test_sample_shows_texts_and_what_they_earned(write: Any, model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write()
    command = ["sample", str(model), "it was", "-n", "2", "--max-new-tokens", "4", "--reward", "rewards.py:length"]
    assert cli.main(command) == 0
    assert capsys.readouterr().out.count("length +") == 2
    assert cli.main(["train", "config.yaml"]) == 0
    capsys.readouterr()
    assert cli.main(["sample", "run", "it was", "--jsonl", "--max-new-tokens", "4"]) == 0
    assert json.loads(capsys.readouterr().out)["marks"][0]["source"] == "length"


def test_models_lists_what_has_a_short_name(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["models"]) == 0
    assert "smollm2-135m" in capsys.readouterr().out
