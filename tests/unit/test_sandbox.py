"""Programs that nobody has read: what they try, what stops them, and the reward that runs them."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import instant_reward as ir
from instant_reward.rewards import sandbox
from instant_reward.rewards.base import as_reward
from instant_reward.rewards.programs import ProgramTests, program_in
from instant_reward.rewards.sandbox import Outcome, run_program, why_not
from instant_reward.types import Prompt, UserError, View

ROOT = Path(__file__).parents[2]


def run(source: str, **options: Any) -> Outcome:
    return run_program(textwrap.dedent(source), **{"seconds": 1.0, **options})


def said(source: str, **options: Any) -> str:
    """What a program printed that ended well."""
    outcome = run(source, **options)
    assert outcome.ok, outcome
    return outcome.stdout.strip()


def attempts(*statements: str) -> dict[str, str]:
    """What came of each statement in one program: "done", or the name of the error."""
    source = "import json, os, socket, sys\ncame = {}\n"
    for statement in statements:
        source += f"try:\n    {statement}\n    came[{statement!r}] = 'done'\n"
        source += f"except BaseException as error:\n    came[{statement!r}] = type(error).__name__\n"
    found = json.loads(said(source + "print(json.dumps(came))"))
    assert set(found) == set(statements)
    return found


def living(name: str) -> list[int]:
    """The processes of this machine that call themselves so."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            if (folder / "comm").read_text(errors="replace").strip() == name:
                found.append(int(folder.name))
        except OSError:
            continue
    return found


class TestOrdinaryPrograms:
    def test_input_output_and_status(self) -> None:
        outcome = run("import sys; print(input()[::-1]); print('no', file=sys.stderr); sys.exit(3)", stdin="\u00e4bc\n")
        assert (outcome.ended, outcome.code, outcome.stdout, outcome.stderr) == ("exit", 3, "cb\u00e4\n", "no\n")
        assert not outcome.ok
        assert 0 < outcome.seconds < 30

    def test_a_signal_and_an_exception(self) -> None:
        assert run("import ctypes; ctypes.string_at(0)").code == -signal.SIGSEGV
        failed = run("1 / 0")
        assert failed.code == 1
        assert "ZeroDivisionError" in failed.stderr

    @pytest.mark.parametrize("source", ["", "\ud83d", "\x00", "(" * 3000, "def", "\u202etnirp", "'\ud83d'"])
    def test_what_is_no_program_just_fails(self, source: str) -> None:
        assert run(source).ended == "exit"

    def test_the_library_threads_processes_and_files(self) -> None:
        assert said("import hashlib, decimal, sqlite3, json; print(hashlib.md5(b'').hexdigest()[:4])") == "d41d"
        threads = "import threading; t = threading.Thread(target=print, args=[1]); t.start(); t.join()"
        assert said(threads) == "1"
        assert said("import os, multiprocessing as m; m.Lock(); print(os.fork() and os.wait()[1])") == "0\n0"
        assert said("import tempfile; f = tempfile.TemporaryFile(); f.write(b'x' * 1000); print(f.tell())") == "1000"

    def test_the_same_program_says_the_same(self) -> None:
        program = "print(hash('a'), {'a', 'b', 'c', 'd'})"
        assert said(program) == said(program)

    def test_several_at_once(self) -> None:
        outcomes: list[str] = []
        threads = [threading.Thread(target=lambda n=n: outcomes.append(said(f"print({n})"))) for n in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert sorted(outcomes) == ["0", "1", "2", "3"]


class TestNetwork:
    @pytest.fixture
    def server(self) -> Iterator[socket.socket]:
        with socket.create_server(("127.0.0.1", 0)) as listening:
            listening.setblocking(False)
            yield listening

    def test_no_connection_no_names_and_no_other_family(self, server: socket.socket) -> None:
        port = server.getsockname()[1]
        came = attempts(
            f"socket.create_connection(('127.0.0.1', {port}), 1)",
            "socket.getaddrinfo('localhost.', 80)",
            "socket.getaddrinfo('example.org', 80)",
            "socket.socket(socket.AF_INET, socket.SOCK_DGRAM).sendto(b'x', ('127.0.0.1', 53))",
            "socket.socket(socket.AF_INET6)",
            "socket.socket(socket.AF_NETLINK, socket.SOCK_RAW)",
            "socket.socket(socket.AF_PACKET, socket.SOCK_RAW)",
            "socket.socket(40)",  # AF_VSOCK: to the machine that this virtual one runs on
        )
        assert "done" not in came.values()
        with pytest.raises(BlockingIOError):
            server.accept()

    def test_the_network_it_would_have_without_the_filter_is_empty(self) -> None:
        lines = said("print(open('/proc/net/dev').read())").splitlines()
        assert [line.split(":")[0].strip() for line in lines[2:]] == ["lo"]
        assert len(said("print(open('/proc/net/route').read())").splitlines()) <= 1

    def test_no_socket_of_this_machine_by_name(self, tmp_path: Path) -> None:
        with socket.socket(socket.AF_UNIX) as hidden, socket.socket(socket.AF_UNIX) as filed:
            hidden.bind("\0of-the-test")
            hidden.listen()
            filed.bind(str(tmp_path / "s"))
            filed.listen()
            connect = "socket.socket(socket.AF_UNIX).connect"
            came = attempts(f"{connect}('\\0of-the-test')", f"{connect}({str(tmp_path / 's')!r})")
        assert set(came.values()) == {"ConnectionRefusedError", "FileNotFoundError"}


class TestFiles:
    def test_secrets_are_not_there(self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
        (tmp_path / "secret").write_text("s3cret")
        monkeypatch.setenv("API_KEY", "s3cret")
        places = ["/etc/shadow", "/etc/passwd", "/root", "/home", str(ROOT), str(tmp_path / "secret"), "/sys", "/run"]
        came = attempts(*(f"os.stat({place!r})" for place in places if place != "/root"))
        assert set(came.values()) == {"FileNotFoundError"}
        everything = said(
            """
            import os
            print(os.environ, open("/proc/self/environ").read(), os.listdir("/"))
            for folder, _, names in os.walk("/proc"):
                if folder.count("/") < 4:
                    for name in names:
                        try:
                            data = open(f"{folder}/{name}", "rb").read(100000) if name == "environ" else b""
                        except OSError:
                            continue
                        print(data)
            """,
            output_kb=1000,
        )
        assert "s3cret" not in everything
        assert "API_KEY" not in everything

    def test_nothing_outside_can_be_written(self) -> None:
        prefix = os.path.realpath(sys.base_prefix)
        came = attempts(
            "open('/new', 'w')",
            "open('/usr/lib/new', 'w')",
            f"open({prefix + '/lib/new'!r}, 'w')",
            f"os.remove({os.__file__!r})",
            f"os.chmod({os.__file__!r}, 0o666)",
            "os.rename('/program.py', '/tmp/program.py')",
            "os.mknod('/tmp/disk', 0o60666, os.makedev(254, 0))",
            "open('/proc/sys/kernel/core_pattern', 'w')",
            "open('/proc/sysrq-trigger', 'w')",
            "open('/proc/self/oom_score_adj', 'w').write('-1000')",
            "os.chroot('/tmp')",
            "os.setuid(0)",
            "os.mkdir('/proc/x')",
        )
        assert "done" not in came.values()
        assert not Path(prefix, "lib", "new").exists()

    def test_its_temporary_folder_is_its_own_and_small(self) -> None:
        before = set(os.listdir("/tmp"))
        assert said("import os; print(os.listdir('/tmp')); open('/tmp/x-of-the-program', 'w')") == "[]"
        assert "x-of-the-program" not in set(os.listdir("/tmp")) - before
        fill = "\n".join(
            [
                "total = 0",
                "try:",
                "    for number in range(100):",
                "        total += open(f'{folder}/{number}', 'wb').write(bytes(1 << 19))",
                "except OSError as error:",
                "    print(error.errno, total >> 20)",
            ]
        )
        assert said("folder = '/tmp'\n" + fill, files_mb=4) == "28 4"  # no space left
        assert said("folder = '/dev/shm'\n" + fill, files_mb=4) in ("28 0", "28 1")
        assert (
            said("import os\ntry:\n  for n in range(9999): os.mkdir(f'/tmp/{n}')\nexcept OSError as e: print(e.errno)")
            == "28"
        )
        big = "try: open('/tmp/x', 'wb').truncate(1 << 40)\nexcept OSError as error: print(error.errno)"
        assert said(big) == "27"  # file too large


class TestProcesses:
    def test_only_its_own_are_seen(self) -> None:
        numbers = said("import os; print(*(name for name in os.listdir('/proc') if name.isdigit()))")
        assert numbers.split() == ["1", "2"]
        assert (
            said("import os; print(os.getsid(0), os.getpgrp(), os.listdir('/proc/self/fd'))")
            == "2 2 ['0', '1', '2', '3']"
        )
        came = attempts(
            "open('/proc/1/environ').read()",
            "open('/proc/1/mem', 'rb+')",
            "os.listdir('/proc/1/fd')",
            "os.listdir('/proc/1/root/')",
            f"os.kill({os.getpid()}, 9)",
        )
        assert set(came.values()) <= {"PermissionError", "ProcessLookupError"}

    def test_killing_all_it_can_reach_ends_itself_alone(self) -> None:
        outcome = run(
            """
            import os, signal
            for pid in (os.getppid(), 1, -1, 0):
                try:
                    os.kill(pid, signal.SIGKILL)
                except OSError:
                    pass
            print("still here")
            """
        )
        assert (outcome.ended, outcome.code) == ("exit", -signal.SIGKILL)  # by its own kill(0)
        assert said("print('and so are we')") == "and so are we"

    def test_a_fork_bomb(self) -> None:
        bomb = """
            import os
            while True:
                try: os.fork()
                except OSError: pass
            """
        assert run(bomb, wall_seconds=1.0).ended == "time"
        count = """
            import os, time
            for number in range(99):
                try:
                    if os.fork() == 0: time.sleep(9)
                except OSError:
                    print(number)
                    break
            """
        assert int(said(count, processes=5)) <= 6
        threads = """
            import threading, time
            for number in range(99):
                try: threading.Thread(target=time.sleep, args=[9], daemon=True).start()
                except RuntimeError:
                    print(number)
                    break
            """
        assert int(said(threads, processes=5)) <= 6

    def test_ignoring_signals_and_leaving_daemons_is_of_no_use(self) -> None:
        marker = f"daemon-{os.getpid()}"
        outcome = run(
            f"""
            import ctypes, os, signal, time
            for number in set(signal.Signals) - {{signal.SIGKILL, signal.SIGSTOP}}:
                signal.signal(number, signal.SIG_IGN)
            for _ in range(2):
                if os.fork() == 0:
                    os.setsid()
                    if os.fork() == 0:
                        ctypes.CDLL(None).prctl(15, b"{marker}"[:15], 0, 0, 0)
                        for handle in range(10):
                            try: os.close(handle)
                            except OSError: pass
                        time.sleep(1000)
                    os._exit(0)
            while True:
                time.sleep(1)
            """,
            wall_seconds=0.7,
        )
        assert outcome.ended == "time"
        assert living(marker[:15]) == []

    def test_a_daemon_does_not_outlive_a_program_that_ends(self) -> None:
        start = time.monotonic()
        assert said("import os, time\nif os.fork() == 0:\n    os.setsid()\n    time.sleep(1000)\nprint('bye')") == "bye"
        assert time.monotonic() - start < 60

    def test_ignoring_the_limit_of_processor_time(self) -> None:
        source = "import signal\nsignal.signal(signal.SIGXCPU, signal.SIG_IGN)\nwhile True: pass"
        outcome = run(source, wall_seconds=40.0)
        assert outcome.ended == "time"
        assert outcome.seconds < 35

    def test_sleeping_is_limited_by_the_clock(self) -> None:
        outcome = run("import time; time.sleep(1000)", wall_seconds=0.3)
        assert outcome.ended == "time"
        assert outcome.seconds < 20


class TestMemoryAndOutput:
    def test_one_process_has_so_much(self) -> None:
        assert run("x = bytearray(300 << 20)", memory_mb=200).stderr.endswith("MemoryError\n")
        assert run("x = bytearray(80 << 20)", memory_mb=200).ok

    def test_and_all_of_them_together(self) -> None:
        source = """
            import os, time
            for _ in range(5):
                if os.fork() == 0: break
            x = bytearray(b'x') * (60 << 20)
            time.sleep(30)
            """
        assert run(source, memory_mb=200, wall_seconds=30.0).ended == "memory"

    def test_no_memory_is_shared_without_a_file(self) -> None:
        """Of such a mapping one page keeps all the others, which no limit counts once they are not mapped."""
        source = """
            import mmap, os
            for flags in (mmap.MAP_SHARED, mmap.MAP_PRIVATE):
                try:
                    print(len(mmap.mmap(-1, 8192, flags | mmap.MAP_ANONYMOUS)))
                except OSError as error:
                    print(error.errno)
            print(os.path.exists("/dev/zero"))
            with open("/dev/shm/file", "w+b") as file:
                file.truncate(8192)
                print(len(mmap.mmap(file.fileno(), 8192)))
            """
        assert run(source).stdout.split() == ["1", "8192", "False", "8192"]

    def test_endless_output_is_cut(self) -> None:
        for stream in ("stdout", "stderr"):
            outcome = run(f"import sys\nwhile True: sys.{stream}.write('x' * 1000)", output_kb=8, seconds=20)
            assert outcome.ended == "output"
            assert len(getattr(outcome, stream)) == 8192
        assert run("print('\\x80' * 4)", output_kb=8).ok

    def test_calls_that_lead_out_are_refused(self) -> None:
        keyctl, clone, prlimit = (250, 56, 302) if os.uname().machine == "x86_64" else (219, 220, 261)
        calls = [
            "unshare(0x10000000)", "unshare(0x20000)", "mount(b'x', b'/tmp', b'tmpfs', 0, 0)", "setns(0, 0)",
            "ptrace(0, 0, 0, 0)", "shmget(0, 1 << 20, 0o1777)", "memfd_create(b'x', 0)", "setpriority(0, 1, 19)",
            "syscall(425, 1, 0)", "syscall(321, 0, 0, 0)", f"syscall({keyctl}, 0, -3, 0)",
            f"syscall({clone}, 0x10000011, 0, 0, 0, 0)", f"syscall({prlimit}, 1, 7, 0, 0)", "syscall(0x40000027)",
        ]  # fmt: skip
        source = "import ctypes\nlibrary = ctypes.CDLL(None, use_errno=True)\n"
        found = said(source + "".join(f"print(library.{call}, ctypes.get_errno())\n" for call in calls)).splitlines()
        assert dict(zip(calls, found, strict=True)) == dict.fromkeys(calls, "-1 1")
        assert said(source + "print(library.syscall(435, 0, 0), ctypes.get_errno())") == "-1 38"  # clone3: use clone
        status = said("print(open('/proc/self/status').read())")
        held = [line.split()[1] for line in status.splitlines() if line.startswith("Cap")]
        assert set(held) == {"0" * 16}
        assert "NoNewPrivs:\t1" in status

    def test_it_cannot_be_root_in_a_namespace_of_its_own_even_without_the_filter(self) -> None:
        assert said("print(open('/proc/sys/user/max_user_namespaces').read())") == "0"


class TestTheParent:
    def test_the_room_ends_when_the_caller_is_killed(self) -> None:
        marker = f"orphan-{os.getpid()}"[:15]
        program = f"import ctypes, time; ctypes.CDLL(None).prctl(15, b'{marker}', 0, 0, 0); time.sleep(1000)"
        caller = (
            f"from instant_reward.rewards.sandbox import run_program; run_program({program!r}, wall_seconds=1000.0)"
        )
        parent = subprocess.Popen([sys.executable, "-c", caller])
        limit = time.monotonic() + 30
        while not living(marker) and time.monotonic() < limit:
            time.sleep(0.02)
        assert living(marker)
        parent.kill()
        parent.wait()
        while living(marker) and time.monotonic() < limit:
            time.sleep(0.02)
        assert not living(marker)

    def test_it_holds_nothing_afterwards(self) -> None:
        run("print(1)")
        before = len(os.listdir("/proc/self/fd"))
        for source in ("print(1)", "while True: print(1)", "1 / 0"):
            run(source, output_kb=1)
        assert len(os.listdir("/proc/self/fd")) == before


def elsewhere(source: str, *command: str) -> str:
    """What a program of ours prints that another user, or one with fewer rights, starts."""
    environment = {"PYTHONPATH": str(ROOT / "src"), "PATH": os.environ["PATH"], "PYTHONDONTWRITEBYTECODE": "1"}
    found = subprocess.run(
        [*command, "-c", source], env=environment, capture_output=True, text=True, timeout=60, cwd="/", check=False
    )
    assert found.returncode == 0, found.stderr
    return found.stdout.strip()


def interpreter_of_all() -> str | None:
    """An interpreter that other users may start, and that is new enough."""
    for path in (os.path.realpath(sys.executable), "/usr/bin/python3", "/usr/local/bin/python3"):
        newest = "import sys; sys.exit(sys.version_info < (3, 11))"
        if subprocess.run([*NOBODY, path, "-c", newest], capture_output=True, check=False, cwd="/").returncode == 0:
            return path
    return None


# The shell between them has none of the rights that setpriv itself still starts its program with.
NOBODY = ["setpriv", "--reuid=65534", "--regid=65534", "--clear-groups", "sh", "-c", 'exec "$0" "$@"']
ASK = "from instant_reward.rewards.sandbox import *\nprint(why_not())\n"
LOOK = """
import os
print(os.getuid(), [path for path in ("/", "/usr/lib", os.path.dirname(os.__file__)) if os.access(path, os.W_OK)])
"""
TRY = ASK + f"print(run_program({LOOK!r}).stdout)"
root_only = pytest.mark.skipif(os.geteuid() != 0, reason="becomes another user, which only root can")


class TestWhoMayRunIt:
    def test_here(self) -> None:
        assert why_not() is None

    def test_the_program_is_nobody_in_the_eyes_of_this_machine(self) -> None:
        source = (
            "import os, time; print(os.getuid(), os.getgid(), os.getgroups()); print(open('/proc/self/uid_map').read())"
        )
        ids, table = said(source).split("\n")
        assert ids.startswith("1000 1000 ")
        outside = int(table.split()[1])
        assert outside == (65534 if os.geteuid() == 0 else os.geteuid())

    @root_only
    def test_an_ordinary_user(self) -> None:
        python = interpreter_of_all()
        if python is None:
            pytest.skip("no interpreter here that other users may start")
        assert elsewhere(TRY, *NOBODY, python).split("\n") == ["None", "1000 []"]

    @root_only
    def test_root_that_may_not_mount(self) -> None:
        less = ["setpriv", "--bounding-set=-sys_admin", "--inh-caps=-sys_admin"]
        assert elsewhere(TRY, *less, sys.executable).split("\n") == ["None", "1000 []"]

    def test_without_user_namespaces_nothing_is_run_and_the_reason_is_given(self, tmp_path: Path) -> None:
        # In a user namespace of its own, which forbids further ones: as on a machine that forbids them.
        forbid = 'echo 0 > /proc/sys/user/max_user_namespaces && exec "$0" "$@"'
        ran = tmp_path / "ran"
        source = ASK + textwrap.dedent(
            f"""
            from instant_reward.rewards.programs import ProgramTests
            from instant_reward.types import UserError
            for make in (ProgramTests, lambda: run_program("open({str(ran)!r}, 'w')")):
                try:
                    print(make())
                except UserError as error:
                    print(error)
            """
        )
        reasons = elsewhere(source, "unshare", "--user", "--map-root-user", "sh", "-c", forbid, sys.executable).split(
            "\n"
        )
        assert len(reasons) == 3
        assert all(
            "it cannot be kept apart here, unshare (making namespaces) failed: No space left" in one for one in reasons
        )
        assert all("raise the sysctl user.max_user_namespaces" in one for one in reasons)
        assert reasons[1].startswith("program_tests runs programs that a model wrote, and it cannot be kept apart here")
        assert reasons[2].startswith("no program was run: ")
        assert not ran.exists()

    def test_on_another_system_nothing_is_run(self, monkeypatch: pytest.MonkeyPatch) -> None:
        sandbox._try_out.cache_clear()
        monkeypatch.setattr(sandbox.sys, "platform", "darwin")
        monkeypatch.setattr(sandbox.subprocess, "Popen", None)
        with pytest.raises(UserError, match=r"no program was run: it takes the namespaces of Linux .* darwin"):
            run_program("print(1)")

    def test_an_interpreter_that_does_not_start_there(self, monkeypatch: pytest.MonkeyPatch) -> None:
        sandbox._try_out.cache_clear()
        monkeypatch.setattr(sandbox, "_OPTIONS", ("--no-such-option",))
        assert "does not start when it is kept apart" in (why_not() or "")

    @pytest.mark.parametrize(
        "options",
        [{"seconds": 0}, {"memory_mb": 8}, {"output_kb": 1.5}, {"processes": True}, {"wall_seconds": float("nan")}],
    )
    def test_limits_out_of_range(self, options: dict[str, Any]) -> None:
        with pytest.raises(UserError, match=f"run_program: {next(iter(options))}="):
            run_program("print(1)", **options)


SHOUT = """
import os
for number in range(3, 60):
    try: os.write(number, b'WORDS')
    except OSError: pass
os._exit(0)
"""
ADD = "def add(a, b):\n    return a + b\n"


def view(text: str, **info: Any) -> View:
    return View(text, text, Prompt("p4", "Write it.", [1], info=info), info, done=True)


@pytest.fixture(scope="module")
def judge() -> ProgramTests:
    return ProgramTests(seconds=1.0)


class TestProgramTests:
    def test_the_share_of_tests_passed(self, judge: ProgramTests) -> None:
        tests = [
            "assert add(2, 3) == 5",
            {"call": "add('a', 'b')", "output": "ab"},
            "assert add(1, 1) == 3",
            "assert add(1, 1) > 1",
        ]
        assert (
            judge([view(f"Here:\n```python\n{ADD}```\nDone.", tests=tests), view(ADD, tests=json.dumps(tests))])
            == [0.75] * 2
        )

    def test_what_it_reads_and_prints(self, judge: ProgramTests) -> None:
        tests = [{"input": "2 3\n", "output": "5\n"}, {"input": "1 1", "output": "3"}, {"input": "x", "output": ""}]
        program = (
            "import sys\nif __name__ == '__main__':\n    print(sum(map(int, input().split())), ' ')\n    sys.exit()\n"
        )
        assert judge.score(program, tests) == pytest.approx(1 / 3)
        assert judge.score("print(5); raise ValueError", tests) == 0.0

    @pytest.mark.parametrize(
        ("value", "output", "same"),
        [
            ("[1, (2.0000000001, None)]", [1, [2.0, None]], True),
            ("(1, 2)", [1, 2], True),
            ("[1, 2]", [1, 2, 3], False),
            ("{'b': {1, 2}, 'a': []}", {"a": [], "b": {2, 1}}, True),
            ("{}", {"a": []}, False),
            ("{'a': [], 'b': 1}", {"a": []}, False),
            ("True", True, True),
            ("'1'", 1, False),
            ("1", "1", False),
            ("0.1 + 0.2", 0.3, True),
            ("float('nan')", float("nan"), True),
            ("10 ** 400", 1.0, False),
            ("10 ** 5000", 1, False),
            ("object()", None, False),
            ("type('Any', (), {'__eq__': lambda self, other: True})()", 7, False),
            ("type('Text', (str,), {'__eq__': lambda self, other: True})('b')", "a", False),
        ],
    )
    def test_values_are_compared_outside(self, judge: ProgramTests, value: str, output: Any, same: bool) -> None:
        assert judge.score(f"x = {value}", [{"call": "x", "output": output}]) == float(same)

    @pytest.mark.parametrize(
        "program",
        [
            "import os; os._exit(0)",
            "raise SystemExit",
            SHOUT.replace("WORDS", r'{"dict": [[]]}\x04'),
            SHOUT.replace("WORDS", r'"5"\n"5"\n'),
            "import os, signal\nos.kill(os.getppid(), signal.SIGKILL)",
            "print('5\\n' * 10**7)",
            "[" * 10**4,
            "def add(*_):\n  x = []\n  for _ in range(10**5): x = [x]\n  return x",
        ],
    )
    def test_tricks_earn_nothing(self, judge: ProgramTests, program: str) -> None:
        tests = [{"call": "add(2, 3)", "output": 5}, {"call": "{1: add(1, 1)}", "output": {1: 2}}]
        assert judge.score(program, tests) == 0.0

    def test_an_assertion_is_judged_outside_where_it_can_be(self, judge: ProgramTests) -> None:
        program = (
            "class Any:\n    def __eq__(self, other): return True\n    def __gt__(self, other): return True\nx = Any()"
        )
        assert judge.score(program, ["assert x == 7"]) == 0.0
        assert judge.score(program, ["assert x > 7"]) == 1.0  # what the docs say can be cheated

    def test_no_program_reaches_what_runs_its_tests(self, judge: ProgramTests) -> None:
        program = """
import os
def reached(name):
    try: open(f"/proc/{os.getppid()}/{name}", "rb+")
    except OSError as error: return type(error).__name__
"""
        tests = [{"call": f"reached({name!r})", "output": "PermissionError"} for name in ("mem", "fd/1", "environ")]
        assert judge.score(program, tests) == 1.0

    def test_too_much_output_fails_one_test(self, judge: ProgramTests) -> None:
        tests = [{"input": "10000000", "output": ""}, {"input": "3", "output": "xxx"}]
        assert judge.score("print('x' * int(input()))", tests) == 0.5

    def test_one_test_does_not_spoil_another(self, judge: ProgramTests) -> None:
        program = "n = 0\ndef f(x):\n    global n\n    n += 1\n    import os\n    if x == 1: os.abort()\n    return n"
        assert judge.score(program, [{"call": f"f({x})", "output": 1} for x in range(3)]) == pytest.approx(2 / 3)

    def test_tests_that_take_too_long(self) -> None:
        judge = ProgramTests(seconds=0.2, time_outs=1)
        program = "import time\ndef f(x):\n    if x == 1: time.sleep(100)\n    return x"
        assert judge.score(program, [{"call": f"f({x})", "output": x} for x in range(3)]) == pytest.approx(1 / 3)

    def test_unfinished_and_odd_texts(self, judge: ProgramTests) -> None:
        texts = [
            "",
            " ",
            "\ud83d",
            "😀" * 50,
            "猫",
            "مرحبا",
            "\x00\x1b",
            "x" * 10_000,
            "```python\n" + ADD[:20],
            "```py",
        ]
        assert judge([view(text, tests=["assert add(2, 3) == 5"]) for text in texts]) == [0.0] * len(texts)
        assert judge([]) == []

    def test_as_a_reward(self, judge: ProgramTests) -> None:
        one = as_reward(judge)
        assert (one.name, one.every, one.batched, one.takes) == ("program_tests", "end", True, "view")
        assert one.rate([view(ADD, tests=["assert add(2, 3) == 5"])], [None]) == [1.0]
        assert isinstance(ir.Reward, type)

    @pytest.mark.parametrize(
        ("text", "program"),
        [
            ("a = 1", "a = 1"),
            ("```python\na = 1\n```\nor\n```py\nb = 2\n```\n```sh\nls\n```", "b = 2\n"),
            ("```\na = 1\n```", "a = 1\n"),
            ("so:\n```Python title\na = '```'\n", "a = '```'\n"),
            ("```sh\nls\n```", ""),
        ],
    )
    def test_where_the_program_is(self, text: str, program: str) -> None:
        assert program_in(text) == program
        assert program_in(text, "whole") == text
        assert program_in(text, "fence") == ("" if text == "a = 1" else program)

    @pytest.mark.parametrize(
        ("info", "reason"),
        [
            ({}, r"prompt p4 has no column 'tests' \(it has: none\)"),
            ({"tests": "not json"}, "is text but no JSON"),
            ({"tests": []}, "is no list with a test in it"),
            ({"tests": [3]}, "holds 3, which is no test"),
            ({"tests": [{"input": "a"}]}, "which is no test"),
            ({"tests": [{"call": "f()", "output": object}]}, "which is no test"),
            ({"tests": ["assert ("]}, "which is no Python"),
        ],
    )
    def test_bad_tests(self, judge: ProgramTests, info: dict[str, Any], reason: str) -> None:
        with pytest.raises(UserError, match=reason):
            judge([view("x", **info)])

    @pytest.mark.parametrize(
        "options",
        [{"tests_column": ""}, {"code": "none"}, {"seconds": -1}, {"time_outs": 0}, {"parallel": 0}, {"memory_mb": 1}],
    )
    def test_bad_arguments(self, options: dict[str, Any]) -> None:
        with pytest.raises(UserError, match=f"program_tests: {next(iter(options))}="):
            ProgramTests(**options)
