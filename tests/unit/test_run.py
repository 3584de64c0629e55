"""The run folder: strict JSON, checkpoints whole or not at all, and a resumed run that goes back to its checkpoint."""

import errno
import json
import os
import signal
import subprocess
import sys

import numpy as np
import pytest

from instant_reward.config import Config
from instant_reward.run import Run
from instant_reward.types import RunError, UserError


def config(**changed):
    return Config.build({"data": {"prompts": ["a"]}, "rewards": [{"use": "m:f"}], **changed})


def weights(text="weights"):
    """A writer of checkpoints."""

    def write(folder):
        (folder / "model").mkdir()
        (folder / "model" / "weights.bin").write_text(text)

    return write


def full_disk(folder):
    """A writer that meets a full disk after its first file."""
    (folder / "first.bin").write_text("x")
    raise OSError(errno.ENOSPC, "in the words of some other language")


def names(folder):
    return sorted(path.name for path in folder.iterdir())


@pytest.fixture
def run(tmp_path):
    return Run.create(tmp_path / "run", config(train={"keep": 2}))


def test_a_new_run_writes_its_config_and_versions(run):
    assert Config.load(run.path / "config.yaml") == run.config
    versions = json.loads((run.path / "versions.json").read_text())
    assert {"python", "torch", "transformers", "instant_reward", "platform", "threads", "seed"} <= set(versions)
    assert (run.step, run.metrics, run.policy, run.latest_checkpoint()) == (0, [], None, None)


def test_an_empty_folder_is_a_new_run(tmp_path):
    (tmp_path / ".config.yaml.partial").write_text("what a killed process left")
    assert Run.create(tmp_path, config()).step == 0
    assert names(tmp_path) == ["config.yaml", "versions.json"]


def test_resume_where_nothing_is_begins_anew(tmp_path):
    assert Run.create(tmp_path / "new", config(), resume=True).step == 0


def test_a_folder_that_is_not_to_be_touched(tmp_path, run):
    before = (run.path / "config.yaml").read_bytes()
    with pytest.raises(UserError, match=r"already holds a run; go on by --resume .*, or name another folder by --out"):
        Run.create(run.path, config(seed=1))
    assert (run.path / "config.yaml").read_bytes() == before
    (tmp_path / "thesis.txt").write_text("x")
    for resume in (False, True):
        with pytest.raises(UserError, match="is not empty and holds no run"):
            Run.create(tmp_path, config(), resume=resume)
    with pytest.raises(UserError, match="is a file"):
        Run.create(tmp_path / "thesis.txt", config())
    with pytest.raises(UserError, match="holds no run"):
        Run.open(tmp_path / "nothing")


def test_records_are_strict_json(run):
    run.record(1, {"loss": float("nan"), "kl": np.float32(0.5), "reward": {"a": float("inf")}, "n": np.int64(3)})
    run.record(2, {"loss": 1.5}, [{"text": "half a pair \ud83d", "marks": [{"value": 1.0}]}, {"text": "b"}])

    def refuse(word):
        raise AssertionError(f"{word} is no JSON")

    lines = (run.path / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line, parse_constant=refuse) for line in lines] == run.metrics
    assert run.metrics == [
        {"step": 1, "loss": None, "kl": 0.5, "reward": {"a": None}, "n": 3},
        {"step": 2, "loss": 1.5},
    ]
    assert Run.open(run.path).metrics == run.metrics
    assert run.samples() == [
        {"step": 2, "text": "half a pair \ud83d", "marks": [{"value": 1.0}]},
        {"step": 2, "text": "b"},
    ]


def test_a_step_can_be_read_by_others_at_once(run):
    run.record(1, {"loss": 1.0})
    assert Run.open(run.path).step == 1


def test_what_has_no_form_in_json_leaves_no_trace(run):
    with pytest.raises(TypeError, match="has no form in JSON"):
        run.record(1, {"loss": object()})
    with pytest.raises(TypeError):
        run.record(1, {"loss": 1.0}, [{"text": object()}])
    assert run.step == 0
    assert names(run.path) == ["config.yaml", "versions.json"]


def test_steps_are_recorded_in_order(run):
    run.record(3, {})
    for step in (2, 3):
        with pytest.raises(ValueError, match="steps are recorded in order"):
            run.record(step, {})


def test_an_opened_run_is_only_read(run):
    (run.path / "checkpoints").mkdir()
    (run.path / "checkpoints" / ".step-000001.partial").mkdir()
    other = Run.open(run.path)
    assert other.latest_checkpoint() is None
    assert names(run.path / "checkpoints") == [".step-000001.partial"]  # another process may be writing it
    with pytest.raises(ValueError, match="open for reading"):
        other.record(1, {})
    with pytest.raises(ValueError, match="open for reading"):
        other.save_checkpoint(1, weights())


def test_a_checkpoint(run):
    path = run.save_checkpoint(40, weights(), score=0.5)
    assert path == run.latest_checkpoint() == run.path / "checkpoints" / "step-000040"
    assert (path / "model" / "weights.bin").read_text() == "weights"
    assert json.loads((path / "checkpoint.json").read_text()) == {"step": 40, "score": 0.5}
    assert run.save_checkpoint(40, full_disk) == path  # it is saved already


def test_the_last_ones_and_the_best_stay(run):
    for step, score in [(1, float("nan")), (2, 0.9), (3, None), (4, 0.1), (5, 0.2), (999_999, 0.3)]:
        run.save_checkpoint(step, weights(), score)
    assert names(run.path / "checkpoints") == ["step-000002", "step-000005", "step-999999"]
    assert run.best_checkpoint().name == "step-000002"
    run.save_checkpoint(1_000_000, weights(), 1.0)
    assert names(run.path / "checkpoints") == ["step-1000000", "step-999999"]
    assert run.latest_checkpoint().name == "step-1000000"


def test_a_checkpoint_is_on_the_disk_before_it_has_its_name(run, monkeypatch):
    synced, renamed = [], []
    fsync, rename = os.fsync, type(run.path).rename
    monkeypatch.setattr(os, "fsync", lambda handle: (synced.append(os.fstat(handle).st_ino), fsync(handle)))

    def note(path, target):
        inside = {item.stat().st_ino for item in [path, *path.rglob("*")]}
        renamed.append((target.name, inside - set(synced)))
        return rename(path, target)

    monkeypatch.setattr(type(run.path), "rename", note)
    run.record(1, {}, [{"text": "a"}])
    run.save_checkpoint(1, weights())
    assert renamed == [("step-000001", set())]
    for name in ("checkpoints", "metrics.jsonl", "samples.jsonl"):
        assert (run.path / name).stat().st_ino in synced, name


def test_a_full_disk_leaves_what_is_saved(run):
    run.record(1, {"loss": 1.0})
    first = run.save_checkpoint(1, weights())
    with pytest.raises(
        RunError, match=r"the checkpoint of step 2 could not be written to .*run .*the disk is full"
    ) as caught:
        run.save_checkpoint(2, full_disk)
    assert isinstance(caught.value, UserError)
    assert caught.value.exit_code == 1
    assert "unharmed" in str(caught.value)
    assert "\n" not in str(caught.value)
    assert names(run.path / "checkpoints") == ["step-000001"]
    assert run.latest_checkpoint() == first
    assert run.save_checkpoint(2, weights()).is_dir()


def test_a_full_disk_in_other_words(run, monkeypatch):
    def wrapped(folder):
        try:
            full_disk(folder)
        except OSError as error:
            raise RuntimeError("could not write the model") from error

    def as_text(folder):
        raise ValueError("I/O error: No space left on device (os error 28)")

    def bare(folder):
        raise RuntimeError("PytorchStreamWriter failed writing file data/0: file write failed")

    for writer in (wrapped, as_text):
        with pytest.raises(RunError, match="the disk is full"):
            run.save_checkpoint(1, writer)
    with pytest.raises(RuntimeError, match="PytorchStreamWriter"):  # there is room: something else is wrong
        run.save_checkpoint(1, bare)
    import shutil

    usage = shutil.disk_usage(run.path)
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: usage._replace(free=100))
    with pytest.raises(RunError, match="the disk is full"):
        run.save_checkpoint(1, bare)
    assert names(run.path / "checkpoints") == []


def test_a_real_full_device(run):
    if not os.path.exists("/dev/full"):
        pytest.skip("no /dev/full here")

    def write(folder):
        (folder / "weights.bin").symlink_to("/dev/full")
        (folder / "weights.bin").write_text("x")

    with pytest.raises(RunError, match="the disk is full"):
        run.save_checkpoint(1, write)
    assert names(run.path / "checkpoints") == []
    (run.path / "samples.jsonl").symlink_to("/dev/full")
    with pytest.raises(RunError, match="the record of step 1 could not be written"):
        run.record(1, {"loss": 1.0}, [{"text": "a"}])
    assert run.step == 0


def test_a_line_that_did_not_fit_is_taken_back(run, monkeypatch):
    run.record(1, {"loss": 1.0})
    before = (run.path / "metrics.jsonl").read_bytes()
    real_open = type(run.path).open

    class Half:
        """A file whose disk is full after ten bytes."""

        def __init__(self, file):
            self.file = file

        def __enter__(self):
            return self

        def __exit__(self, *exception):
            self.file.close()

        def __getattr__(self, name):
            return getattr(self.file, name)

        def write(self, data):
            if self.file.tell() >= len(before) + 10:
                raise OSError(errno.ENOSPC, "No space left on device")
            return self.file.write(bytes(data)[:10])

    def opened(path, mode="r", *arguments, **options):
        file = real_open(path, mode, *arguments, **options)
        return Half(file) if mode == "ab" else file

    monkeypatch.setattr(type(run.path), "open", opened)
    with pytest.raises(RunError, match="the record of step 2"):
        run.record(2, {"loss": 2.0})
    assert (run.path / "metrics.jsonl").read_bytes() == before
    monkeypatch.undo()
    run.record(2, {"loss": 2.0})
    assert [line["step"] for line in Run.open(run.path).metrics] == [1, 2]


def test_other_errors_of_the_disk_and_of_the_writer(run):
    def not_allowed(folder):
        raise PermissionError(errno.EACCES, "Permission denied")

    def mistaken(folder):
        raise KeyError("a mistake in the program")

    with pytest.raises(RunError, match="Permission denied"):
        run.save_checkpoint(1, not_allowed)
    with pytest.raises(KeyError):
        run.save_checkpoint(1, mistaken)
    assert names(run.path / "checkpoints") == []


def test_a_full_disk_at_the_start(tmp_path, monkeypatch):
    def full(handle):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(RunError, match="the run's config could not be written"):
        Run.create(tmp_path / "run", config())
    monkeypatch.undo()
    assert names(tmp_path / "run") == []
    assert Run.create(tmp_path / "run", config()).step == 0


def test_resume_goes_back_to_the_checkpoint(run):
    for step in range(1, 6):
        run.record(step, {"loss": float(step)}, [{"text": f"{step}a"}, {"text": f"{step}b"}])
        if step in (2, 3):
            run.save_checkpoint(step, weights(str(step)))
    with (run.path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 6, "lo')
    resumed = Run.create(run.path, run.config, resume=True)
    assert resumed.step == 3
    assert [line["step"] for line in resumed.metrics] == [1, 2, 3]
    assert [sample["text"] for sample in resumed.samples()] == ["1a", "1b", "2a", "2b", "3a", "3b"]
    resumed.record(4, {"loss": 4.5})
    assert [line["loss"] for line in Run.open(run.path).metrics] == [1, 2, 3, 4.5]


def test_resume_before_the_first_checkpoint(run):
    run.record(1, {"loss": 1.0}, [{"text": "a"}])
    resumed = Run.create(run.path, run.config, resume=True)
    assert (resumed.step, resumed.metrics, resumed.samples()) == (0, [], [])


def test_a_torn_last_line_is_passed_over(run):
    run.record(1, {"loss": 1.0})
    run.save_checkpoint(1, weights())
    for torn in (b'{"step": 2', b'{"step": 2}', b"\x00\x00\x00\n\x00", b"\xff\n"):
        with (run.path / "metrics.jsonl").open("ab") as file:
            file.write(torn)
        assert [line["step"] for line in Run.open(run.path).metrics] == [1]
        assert Run.create(run.path, run.config, resume=True).metrics == [{"step": 1, "loss": 1.0}]


def test_a_damaged_line_in_the_middle_is_an_error(run):
    run.record(1, {})
    with (run.path / "metrics.jsonl").open("ab") as file:
        file.write(b"damaged\n")
    run.record(2, {})
    with pytest.raises(RunError, match=r"line 2 of .*metrics\.jsonl is damaged"):
        Run.open(run.path)


def test_what_a_killed_process_left_is_no_checkpoint(run):
    run.record(1, {})
    saved = run.save_checkpoint(1, weights())
    folder = run.path / "checkpoints"
    (folder / ".step-000002.partial").mkdir()
    (folder / ".step-000002.partial" / "weights.bin").write_text("half")
    (folder / ".step-000000.old.partial").mkdir()
    (run.path / ".config.yaml.partial").write_text("half")
    assert run.latest_checkpoint() == saved
    resumed = Run.create(run.path, run.config, resume=True)
    assert resumed.latest_checkpoint() == saved
    assert names(folder) == ["step-000001"]
    assert names(run.path) == ["checkpoints", "config.yaml", "metrics.jsonl", "versions.json"]


@pytest.mark.parametrize("moment", ["fill", "rename", "prune"])
def test_killed_while_it_saves(tmp_path, moment):
    """SIGKILL in a child process: the checkpoint is there whole or not at all, and the run goes on."""
    code = f"""
import os, signal, shutil
from pathlib import Path
from instant_reward.config import Config
from instant_reward.run import Run

def kill(*arguments): os.kill(os.getpid(), signal.SIGKILL)
def write(folder): (folder / "weights.bin").write_text("weights")
def half(folder):
    (folder / "weights.bin").write_text("wei")
    kill()

run = Run.create({str(tmp_path / "run")!r}, Config.build({{"data": {{"prompts": ["a"]}}, "train": {{"keep": 1}}}}))
run.record(1, {{}})
run.save_checkpoint(1, write)
run.record(2, {{}})
if {moment!r} == "rename": os.rename = kill
if {moment!r} == "prune": shutil.rmtree = kill
run.save_checkpoint(2, half if {moment!r} == "fill" else write)
"""
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == -signal.SIGKILL
    resumed = Run.create(
        tmp_path / "run", Config.build({"data": {"prompts": ["a"]}, "train": {"keep": 1}}), resume=True
    )
    assert resumed.step == (2 if moment == "prune" else 1)
    assert names(tmp_path / "run" / "checkpoints") == [f"step-{resumed.step:06d}"]
    assert (resumed.latest_checkpoint() / "weights.bin").read_text() == "weights"
    assert [line["step"] for line in resumed.metrics] == list(range(1, resumed.step + 1))


def test_resume_with_a_changed_config(run):
    run.record(1, {})
    before = (run.path / "metrics.jsonl").read_bytes(), (run.path / "config.yaml").read_bytes()
    changed = config(
        train={"keep": 2, "learning_rate": 0.1, "group_size": 4}, seed=1, rewards=[{"use": "m:f", "args": {"a": 1}}]
    )
    with pytest.raises(
        UserError,
        match=r"it differs in rewards\.0\.args\.a, seed, train\.group_size, train\.learning_rate;",
    ):
        Run.create(run.path, changed, resume=True)
    assert before == ((run.path / "metrics.jsonl").read_bytes(), (run.path / "config.yaml").read_bytes())


def test_resume_with_what_may_change(run):
    changed = config(
        train={"keep": 5, "steps": 80, "save_every": 3, "stop_when": {"metric": "reward", "above": 1}}, out="elsewhere"
    )
    assert Run.create(run.path, changed, resume=True).config == changed
    assert Run.open(run.path).config == changed
    assert Run.create(run.path, run.config, resume=True).config == run.config  # stop_when taken away again


def test_a_config_of_a_run_that_cannot_be_read(run):
    (run.path / "config.yaml").write_text("seed: x\n")
    with pytest.raises(UserError, match=r"config\.yaml has 2 problems"):
        Run.open(run.path)


def test_run_needs_no_torch():
    code = "import sys, instant_reward.run; print([m for m in ('torch', 'transformers', 'numpy') if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"
