"""Rewards in worker processes: the same values, and what comes of failing calls, dying workers and ending parents."""

from __future__ import annotations

import contextlib
import ctypes
import math
import os
import pickle
import signal
import subprocess
import sys
import textwrap
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import instant_reward as ir
from instant_reward.imports import resolve
from instant_reward.rewards.base import as_reward
from instant_reward.rewards.shaping import potential
from instant_reward.rewards.watch import Watch, replay
from instant_reward.rewards.workers import InWorkers, in_workers
from instant_reward.types import Prompt, RewardError, Rollout, UserError, View

# --- rewards that the workers load from this file -------------------------------------------------------------------


def length(text: str) -> float:
    return len(text) / 10


@ir.reward(every="word", weight=0.5, at="span")
def varied(view: View) -> Any:
    kind = len(view.text) % 4
    if kind == 0:
        return view.span(1.0, 0, 1)
    if kind == 1:
        return [0.5] * view.tokens
    return None if kind == 2 else ir.stop(-1.0)


def agree(output: str, target: str) -> float:
    return float(output == target)


def columns(prompts: list[str], completions: list[str], target: list[str]) -> list[float]:
    return [float(len(one) + len(wanted)) for one, wanted in zip(completions, target, strict=True)]


class Words:
    """Counts the pieces it has seen, and remembers where it did so."""

    every = "word"

    def start(self, prompt: Prompt) -> list[str]:
        return [prompt.text]

    def extend(self, state: list[str], view: View) -> float:
        misbehave(view.piece)
        state.append(view.piece)
        return float(os.getpid()) if "pid" in view.piece else float(sum(map(len, state)))


class BatchedWords:
    every = "word"
    batched = True

    def start(self, prompt: Prompt) -> list[int]:
        return [0]

    def extend(self, states: list[list[int]], views: list[View]) -> list[float]:
        for state, view in zip(states, views, strict=True):
            state[0] += len(view.piece)
        return [float(state[0]) for state in states]


@ir.reward(scope="group")
def unlike(views: list[View]) -> list[float]:
    return [float(sum(other.text != view.text for other in views)) for view in views]


@ir.reward(batched=True)
def sizes(views: list[View]) -> list[float]:
    return [float(len(views))] * (2 if "short" in views[0].text else len(views))


def where(view: View) -> float:
    time.sleep(0.05)  # long enough that one worker does not take everything
    return float(os.getpid())


def fragile(view: View) -> float:
    misbehave(view.text)
    if isinstance(view.info.get("file"), str):
        Path(view.info["file"]).write_text(str(os.getpid()))
    while "loop" in view.text:
        pass
    return 1.0


def misbehave(text: str) -> None:
    if "exit" in text:
        os._exit(3)
    if "segfault" in text:
        ctypes.string_at(0)
    if "kill" in text:
        os.kill(os.getpid(), signal.SIGKILL)
    if "sys.quit" in text:
        sys.exit("enough")
    if "wrong" in text:
        raise ValueError("a bad\nthing")
    if "odd" in text:
        raise pickle.PicklingError(text)


def unsendable(text: str) -> Any:
    return threading.Lock()


def inherited(text: str) -> float:
    return float("hypothesis" in sys.modules or threading.active_count() > 1)


class Novelty:
    scope = "run"

    def __call__(self, view: View) -> float:
        return 0.0

    def observe(self, rollouts: list[Rollout]) -> None:
        raise NotImplementedError


# --- helpers --------------------------------------------------------------------------------------------------------


def view(text: str, number: int = 1, **info: Any) -> View:
    return View(text, text, Prompt(f"p{number}", f"prompt {number}", [1], info=info), info, done=True)


def rollout(text: str, tokens: int = 3, **info: Any) -> Rollout:
    """A text with a token for each few characters."""
    ends = [*range(tokens, len(text), tokens), len(text)]
    size = len(ends) + 1
    return Rollout(
        id="r/0",
        group=0,
        prompt=Prompt("p7", "Once", [1], info=info),
        token_ids=[1] * size,
        mask=[False] + [True] * len(ends),
        logprobs=[0.0] * size,
        char_ends=[0, *ends],
        text=text,
        marks=[],
        versions=[0] * size,
        stop="ended",
        info=info,
    )


def rate(reward: InWorkers, *texts: str) -> list[Any]:
    return reward.rate([view(text, number) for number, text in enumerate(texts, 1)], [None] * len(texts))


def alive(pid: int) -> bool:
    try:
        return "State:\tZ" not in Path(f"/proc/{pid}/status").read_text()
    except FileNotFoundError:
        return False


def wait_until(true: Callable[[], bool], seconds: float = 10.0) -> bool:
    limit = time.monotonic() + seconds
    while not true() and time.monotonic() < limit:
        time.sleep(0.02)
    return true()


def end(pids: list[int]) -> None:
    """For tests that fail: what hangs must not hang on."""
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


@contextlib.contextmanager
def working(reward: Any, **options: Any) -> Iterator[InWorkers]:
    made = in_workers(reward, **{"workers": 1, **options})
    try:
        yield made
    finally:
        made.close()


@pytest.fixture(scope="module")
def careful() -> Iterator[InWorkers]:
    """One worker, whose failures are raised."""
    with working(fragile, time_limit=1.0) as made:
        yield made


class TestTheSameValues:
    @pytest.mark.parametrize("made", [length, varied, columns, Words(), BatchedWords(), ir.change(length)])
    def test_of_every_kind_of_reward(self, made: Any) -> None:
        texts = [rollout(text, target="x" * 3) for text in ("one two three four", "你好。你好吗? \ud83d", "a", "\n\n")]
        with working(made) as apart:
            for text in texts:
                assert replay([apart], text) == replay([made], text)

    def test_its_name_pieces_and_weight_stay(self) -> None:
        with working(varied) as apart:
            assert (apart.name, apart.every, apart.weight, apart.at) == ("varied", "word", 0.5, "span")
            half = apart.but(weight=0.25)
            assert isinstance(half, InWorkers)
            assert (half.weight, half.every, half.failures) == (0.25, "word", 0)

    def test_shaping_keeps_its_discount(self) -> None:
        made = potential(length, 0.9)
        text = rollout("one two three")
        with working(made) as apart:
            assert replay([apart], text) == replay([made], text)
            assert apart.sees_end
            with pytest.raises(UserError, match=r"shaped for discount=0\.9"):
                apart.but(discount=1.0)

    def test_siblings_stay_together(self) -> None:
        with working(unlike, workers=2) as apart:  # with two there is something to keep together
            assert rate(apart, "a", "b", "a", "c") == [2.0, 3.0, 2.0, 3.0]

    def test_a_worker_is_no_fork_of_this_process(self) -> None:
        assert "hypothesis" in sys.modules
        with working(inherited) as apart:
            assert rate(apart, "x") == [0.0]


class TestSpreading:
    def test_single_calls_go_to_all_workers_and_none_runs_here(self) -> None:
        with working(where, workers=2) as apart:
            pids = rate(apart, *"abcdef")
            assert len(set(pids)) == 2
            assert os.getpid() not in pids

    def test_a_batch_is_split(self) -> None:
        with working(sizes, workers=2) as apart:
            assert rate(apart, *"abcde") == [3.0, 3.0, 3.0, 2.0, 2.0]
            assert rate(apart) == []
            with pytest.raises(RewardError, match="handed back 2 values for 3 texts"):
                rate(apart, "short", "b", "c", "d", "e")

    def test_a_text_stays_with_its_worker(self) -> None:
        with working(Words(), workers=2) as apart:
            states = [apart.start(view("").prompt) for _ in range(4)]
            first = apart.rate([view("pid") for _ in states], states)
            for _ in range(3):
                assert apart.rate([view("pid") for _ in states[::-1]], states[::-1]) == first[::-1]
            assert len(set(first)) == 2


class TestFailures:
    @pytest.mark.parametrize(
        ("text", "said"),
        [
            ("exit", "ended its worker process (exit status 3)"),
            ("segfault", "ended its worker process (SIGSEGV)"),
            ("kill", "ended its worker process (SIGKILL)"),
            ("loop", "took longer than 1 s; raise time_limit"),
            ("wrong", "raised ValueError: a bad thing (test_workers.py, line"),
            ("sys.quit", "raised SystemExit: enough (test_workers.py, line"),
            ("odd", "raised PicklingError: odd"),
        ],
    )
    def test_an_error_names_reward_and_prompt_and_the_next_call_works(
        self, careful: InWorkers, text: str, said: str
    ) -> None:
        with pytest.raises(RewardError) as caught:
            rate(careful, "fine", text)
        assert str(caught.value).startswith("reward 'fragile' on prompt p2 ('prompt 2') ")
        assert said in str(caught.value)
        assert rate(careful, "fine") == [1.0]

    def test_live_the_watcher_hands_it_on(self, careful: InWorkers) -> None:
        with pytest.raises(RewardError, match=r"'fragile' on prompt p7 .*SIGKILL"):
            replay([careful], rollout("kill"))

    def test_none_and_a_count_where_it_was_asked_for(self) -> None:
        with working(fragile, on_error="none", workers=2, time_limit=1.0) as apart:
            with pytest.warns(RuntimeWarning, match="'fragile' on prompt p2 .* gives None there") as told:
                assert rate(apart, "a", "wrong", "b", "exit", "loop", "c") == [1.0, None, 1.0, None, None, 1.0]
            assert apart.failures == 3
            assert len(told) == 2  # the 1st, 2nd, 4th, 8th, ... are told
            assert rate(apart, "fine") == [1.0]

    def test_a_worker_that_took_too_long_is_gone(self, careful: InWorkers, tmp_path: Path) -> None:
        file = tmp_path / "pid"
        with pytest.raises(RewardError, match="took longer"):
            careful.rate([view("loop", file=str(file))], [None])
        assert not alive(int(file.read_text()))

    def test_what_the_others_are_busy_with_ends_as_well(self, tmp_path: Path) -> None:
        file = tmp_path / "pid"
        with working(fragile, workers=2, time_limit=60.0) as apart:
            with pytest.raises(RewardError, match=r"p2 .* raised ValueError"):
                apart.rate([view("loop", 1, file=str(file)), view("later wrong", 2)], [None, None])
            assert not file.exists() or not alive(int(file.read_text() or 0))
            assert rate(apart, "fine", "fine", "fine") == [1.0] * 3

    def test_a_worker_killed_between_calls_costs_nothing(self) -> None:
        with working(where) as apart:
            (pid,) = rate(apart, "a")
            os.kill(int(pid), signal.SIGKILL)
            assert wait_until(lambda: not alive(int(pid)))
            (other,) = rate(apart, "a")
            assert other != pid

    def test_a_worker_killed_from_outside_while_it_is_busy(self, careful: InWorkers, tmp_path: Path) -> None:
        file = tmp_path / "pid"

        def kill() -> None:
            assert wait_until(lambda: file.exists() and file.read_text() != "")
            os.kill(int(file.read_text()), signal.SIGKILL)

        killer = threading.Thread(target=kill)
        killer.start()
        with pytest.raises(RewardError, match=r"p1 .*ended its worker process \(SIGKILL\)"):
            careful.rate([view("loop", file=str(file))], [None])
        killer.join()

    def test_values_and_columns_that_cannot_be_sent(self, careful: InWorkers) -> None:
        with (
            working(unsendable) as apart,
            pytest.raises(RewardError, match=r"cannot pickle '_thread\.lock' object"),
        ):
            rate(apart, "a")
        with pytest.raises(RewardError, match=r"p1 .* a column of the data cannot be sent"):
            careful.rate([view("a", lock=threading.Lock())], [None])
        assert rate(careful, "fine") == [1.0]

    def test_threads_may_share_it(self, careful: InWorkers) -> None:
        answers: list[Any] = []
        threads = [threading.Thread(target=lambda: answers.append(rate(careful, "a", "b"))) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert answers == [[1.0, 1.0]] * 4


class TestStates:
    def test_a_state_whose_worker_died_is_built_again_and_the_text_that_killed_it_is_lost(self) -> None:
        with working(Words(), on_error="none") as apart, warnings.catch_warnings():
            warnings.simplefilter("ignore")
            texts = {name: rollout(text) for name, text in {"good": "one two three", "bad": "one exit three"}.items()}
            watch = Watch([apart])
            for name, text in texts.items():
                watch.open(name, text.prompt)
            rows = watch._rows
            for place in range(max(len(text.token_ids) for text in texts.values())):
                for name, text in texts.items():
                    if 1 <= place < len(text.token_ids):
                        characters = text.text[text.char_ends[place - 1] : text.char_ends[place]]
                        watch._advance([(rows[name], characters, place == len(text.token_ids) - 1)])
            assert watch.close("good")[2] == replay([Words()], texts["good"])
            assert watch.close("bad")[2] == replay([Words()], texts["good"])[:1]  # of "one", and None from there on
            assert apart.failures == 1

    def test_forgotten_texts_are_forgotten_there(self) -> None:
        with working(Words()) as apart:
            for _ in range(3):
                state = apart.start(view("").prompt)
                apart.rate([view("a")], [state])
                del state
            pool: Any = apart.function
            assert list(pool._forgotten[0]) == [2]  # the others went with the call after them


class TestWhereItComesFrom:
    def test_an_import_path_is_loaded_in_the_worker_only(self, tmp_path: Path) -> None:
        file = tmp_path / "rules_of_mine.py"
        file.write_text(
            "import os\n"
            "class Long:\n"
            "    name = 'long'\n"
            "    every = 'word'\n"
            "    def __init__(self, factor): self.factor = factor\n"
            "    def __call__(self, view): return len(view.text) * self.factor\n"
            f"open({str(tmp_path / 'pid')!r}, 'w').write(str(os.getpid()))\n"
        )
        with working(f"{file}:Long", args={"factor": 2.0}) as apart:
            assert (apart.name, apart.every) == ("long", "word")
            assert rate(apart, "abc") == [6.0]
        assert (tmp_path / "pid").read_text() != str(os.getpid())

    def test_a_module_path(self) -> None:
        with working("instant_reward.rewards.base:stop", on_error="none") as apart:
            assert rate(apart, "x") == [ir.stop("x")]  # type: ignore[arg-type]

    def test_an_object_from_a_file_that_was_named_in_a_config(self, tmp_path: Path) -> None:
        file = tmp_path / "mine.py"
        file.write_text(
            "import instant_reward as ir\n@ir.reward(every='line')\ndef first(view): return float(view.text[:1])\n"
        )
        with working(resolve(f"{file}:first")) as apart:
            assert apart.every == "line"
            assert rate(apart, "7 up") == [7.0]

    @pytest.mark.parametrize(
        ("reward", "said"),
        [
            (lambda text: 1.0, "reward '<lambda>' cannot be sent to a worker process"),
            ("nothing", "'nothing' names no reward"),
            ("no_such_module:f", "could not be loaded in a worker process: ModuleNotFoundError: No module named"),
            ("instant_reward.text:nothing", "instant_reward.text has no 'nothing'"),
            ("no/such/file.py:f", "there is no file no/such/file.py"),
            ("instant_reward.rewards.metrics:Rouge.nothing", "has no 'Rouge.nothing'"),
            (Novelty(), "learns from the run"),
        ],
    )
    def test_what_a_worker_cannot_load(self, reward: Any, said: str) -> None:
        with pytest.raises(UserError) as caught:
            in_workers(reward, workers=1)
        assert said in str(caught.value)

    def test_a_file_that_fails(self, tmp_path: Path) -> None:
        file = tmp_path / "bad.py"
        file.write_text("x = 1 / 0\n")
        with pytest.raises(UserError, match=r"ZeroDivisionError: division by zero \(bad.py, line 1\)"):
            in_workers(f"{file}:f")
        file.write_text("import os\nos._exit(5)\n")
        with pytest.raises(UserError, match=r"loading it ended its worker process \(exit status 5\)"):
            in_workers(f"{file}:f")

    @pytest.mark.parametrize(
        ("options", "said"),
        [
            ({"workers": 0}, "workers=0"),
            ({"workers": True}, "workers=True"),
            ({"time_limit": 0}, "time_limit=0"),
            ({"time_limit": math.inf}, "time_limit=inf"),
            ({"on_error": "skip"}, "on_error='skip' is unknown"),
            ({"args": {}}, "args are for an import path"),
        ],
    )
    def test_bad_arguments(self, options: dict[str, Any], said: str) -> None:
        with pytest.raises(UserError, match=said):
            in_workers(length, **options)

    def test_twice_and_after_the_end(self) -> None:
        with pytest.raises(UserError, match="'agree' compares a text with the policy's output, not in workers"):
            in_workers(agree)
        with working(length) as apart, pytest.raises(UserError, match="is in workers already"):
            in_workers(apart)
        with pytest.raises(UserError, match="the workers of reward 'length' are closed"):
            rate(apart, "a")
        assert as_reward(apart) is apart


SCRIPT = """
import os, subprocess, sys, time
import instant_reward as ir
from instant_reward.rewards.workers import in_workers

@ir.reward(every="word")
def busy(view):
    print("a line that must not mix with the command's")
    child = subprocess.Popen(["sleep", "1000"])
    with open(view.info["file"], "a") as handle:
        handle.write(f"{os.getpid()} {child.pid}\\n")
    while view.text == "loop":
        pass
    child.kill()
    return 2.5

def main(text, file):
    prompt = ir.Prompt("p", "", [1], info={"file": file})
    views = [ir.View(text, text, prompt, prompt.info, True)] * 2
    print(in_workers(busy, time_limit=1000.0).rate(views, [None, None]), flush=True)
"""
GUARDED = SCRIPT + "\nif __name__ == '__main__':\n    main(*sys.argv[1:])\n"
UNGUARDED = SCRIPT + "\nmain(*sys.argv[1:])\n"


class TestTheParent:
    def script(self, tmp_path: Path, text: str, *arguments: str) -> subprocess.Popen[str]:
        file = tmp_path / "script.py"
        # Where the tests themselves run as a job in the background, what they start would ignore Ctrl-C.
        heard = "import signal\nsignal.signal(signal.SIGINT, signal.default_int_handler)\n"
        file.write_text(heard + textwrap.dedent(text))
        return subprocess.Popen(
            [sys.executable, str(file), *arguments, str(tmp_path / "pids")],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )

    def busy(self, tmp_path: Path) -> list[int]:
        """The processes of both workers once they hang."""
        file = tmp_path / "pids"
        assert wait_until(lambda: file.exists() and file.read_text().count("\n") == 2, 30.0)
        return [int(pid) for pid in file.read_text().split()]

    def test_a_reward_in_the_script_itself(self, tmp_path: Path) -> None:
        said, complaints = self.script(tmp_path, GUARDED, "go").communicate(timeout=60)
        assert said == "[2.5, 2.5]\n"
        assert complaints.count("a line that must not mix") == 2

    def test_a_script_without_a_guard_is_told_so(self, tmp_path: Path) -> None:
        parent = self.script(tmp_path, UNGUARDED, "go")
        assert "if __name__ == '__main__':" in parent.communicate(timeout=60)[1].splitlines()[-1]

    def test_workers_end_when_the_parent_is_killed(self, tmp_path: Path) -> None:
        parent = self.script(tmp_path, GUARDED, "loop")
        pids = self.busy(tmp_path)
        try:
            assert len(pids) == 4
            assert all(map(alive, pids))
            parent.kill()
            parent.wait()
            assert wait_until(lambda: not any(map(alive, pids)))
        finally:
            end(pids)

    def test_ctrl_c_leaves_no_orphans(self, tmp_path: Path) -> None:
        parent = self.script(tmp_path, GUARDED, "loop")
        pids = self.busy(tmp_path)
        try:
            os.killpg(parent.pid, signal.SIGINT)
            parent.wait(timeout=60)
            assert wait_until(lambda: not any(map(alive, pids)), 1.0)
        finally:
            end(pids)
        assert "KeyboardInterrupt" in parent.communicate(timeout=60)[1]
