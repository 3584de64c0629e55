"""The far side of ``sandbox``: it builds the room that a program runs in, locks it, and becomes the program.

It is run as a script by an interpreter of its own and uses nothing but the standard library. Three processes:

- the keeper, outside the room: makes the namespaces, waits for the room to end, and ends it when told to;
- the first process of the room: sees that all of the room's processes keep to the memory. When it ends, by itself or
  because the keeper did, the kernel kills every other process of the room;
- the program.

What happens is told to the caller as lines of JSON on a pipe that the program does not hold.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import math
import os
import platform
import resource
import select
import signal
import struct
import sys
import time
from typing import Any, NoReturn

NOBODY = 65534
INSIDE = 1000  # the user's and the group's number inside
SHELVES = ("/usr/lib", "/usr/lib64", "/usr/lib32", "/lib", "/lib64", "/lib32", "/etc/ld.so.cache", "/nix/store")
DEVICES = ("null", "random", "urandom")
LOOK_EVERY = 0.02  # seconds between two looks at the memory of all processes
OPEN_FILES = 64
FILES = 4096  # how many files and folders its temporary folder holds

_LIBC = ctypes.CDLL(None, use_errno=True)
_NEW = {
    "time": 0x80, "mount": 0x20000, "cgroup": 0x2000000, "uts": 0x4000000, "ipc": 0x8000000, "user": 0x10000000,
    "pid": 0x20000000, "net": 0x40000000,
}  # fmt: skip
_MS_NOSUID, _MS_NODEV, _MS_NOEXEC, _MS_BIND, _MS_REC, _MS_PRIVATE = 2, 4, 8, 0x1000, 0x4000, 0x40000
_ATTR_RDONLY, _ATTR_NOSUID, _ATTR_NODEV, _ATTR_NOEXEC = 1, 2, 4, 8
_PDEATHSIG, _DUMPABLE, _SECCOMP, _CAPBSET_DROP, _NO_NEW_PRIVS, _CAP_AMBIENT = 1, 4, 22, 24, 38, 47

# System calls by number on x86_64 and aarch64.
_PIVOT_ROOT = {"x86_64": 155, "aarch64": 41}
_MOUNT_SETATTR = 442
_CLONE, _CLONE3 = {"x86_64": 56, "aarch64": 220}, 435
_SOCKET = {"x86_64": 41, "aarch64": 198}
_PRLIMIT = {"x86_64": 302, "aarch64": 261}
_MMAP, _MAP_SHARED, _MAP_ANONYMOUS = {"x86_64": 9, "aarch64": 222}, 0x01, 0x20
_ARCHITECTURE = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}
# What no program needs, and what has been the way out of such rooms, or holds memory that no limit counts.
_REFUSED = {
    "mount": (165, 40), "umount2": (166, 39), "pivot_root": (155, 41), "chroot": (161, 51), "unshare": (272, 97),
    "setns": (308, 268), "open_tree": (428, 428), "move_mount": (429, 429), "fsopen": (430, 430),
    "fsconfig": (431, 431), "fsmount": (432, 432), "fspick": (433, 433), "mount_setattr": (442, 442),
    "ptrace": (101, 117), "process_vm_readv": (310, 270), "process_vm_writev": (311, 271), "pidfd_getfd": (438, 438),
    "kcmp": (312, 272), "bpf": (321, 280), "perf_event_open": (298, 241), "userfaultfd": (323, 282),
    "io_uring_setup": (425, 425), "io_uring_enter": (426, 426), "io_uring_register": (427, 427),
    "add_key": (248, 217), "request_key": (249, 218), "keyctl": (250, 219), "fanotify_init": (300, 262),
    "open_by_handle_at": (304, 265), "name_to_handle_at": (303, 264), "memfd_create": (319, 279),
    "memfd_secret": (447, 447), "shmget": (29, 194), "semget": (64, 190), "msgget": (68, 186), "mq_open": (240, 180),
    "vmsplice": (278, 75), "setpriority": (141, 140), "sched_setscheduler": (144, 119), "sched_setattr": (314, 274),
    "personality": (135, 92),
}  # fmt: skip


def main() -> None:
    """The keeper. Arguments: the pipe to tell on, the caller's process; standard input: the request as JSON."""
    report, caller = int(sys.argv[1]), int(sys.argv[2])
    os.set_inheritable(report, False)
    try:
        with open(0, encoding="ascii", closefd=False) as handle:
            request = json.load(handle)
        _keep(request, report, caller)
    except OSError as error:
        _tell(report, error=f"{error.filename or 'the start'} failed: {error.strerror}", errno=error.errno)
    except BaseException as error:  # nothing may be printed: standard error belongs to the program
        _tell(report, error=f"{type(error).__name__}: {error}")
    os._exit(1)


def _keep(request: dict[str, Any], report: int, caller: int) -> NoReturn:
    privileged = os.geteuid() == 0 and _may_administer() and _may_be_nobody()
    flags = sum(_NEW[kind] for kind in ("mount", "pid", "net", "ipc", "uts", "cgroup"))
    user, group = os.geteuid(), os.getegid()
    _unshare(flags if privileged else flags | _NEW["user"])
    if not privileged:
        _map_user(os.open("/proc", os.O_PATH), user, group)
    _end_with_parent()
    if os.getppid() != caller:
        os._exit(1)
    watched, held = os.pipe()  # the keeper alone holds `held`: it closes when the keeper ends
    first = os.fork()
    if first == 0:
        os.close(held)
        _be_first(request, report, watched, privileged)
    signal.signal(signal.SIGTERM, lambda *_: os.kill(first, signal.SIGKILL))
    os.waitpid(first, 0)  # returns when every process of the room is gone
    os._exit(0)


def _be_first(request: dict[str, Any], report: int, watched: int, privileged: bool) -> NoReturn:
    try:
        proc, lines = _build(request)
        if privileged:
            _drop_root(proc)
        _lock(proc)
        _end_with_parent()
        if select.select([watched], [], [], 0)[0]:  # the keeper ended before the line above
            os._exit(1)
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGCHLD})
        program = os.fork()
        if program == 0:
            _be_program(request, report, lines)
        _watch(program, report, request["memory"])
    except OSError as error:
        _tell(report, error=f"{error.filename or 'the start'} failed: {error.strerror}", errno=error.errno)
    except BaseException as error:
        _tell(report, error=f"{type(error).__name__}: {error}")
    os._exit(1)


def _watch(program: int, report: int, memory: int) -> None:
    """Reaps whatever ends; returns when the program has, or when all processes together hold too much memory."""
    looked = time.monotonic()
    while True:
        signal.sigtimedwait({signal.SIGCHLD}, LOOK_EVERY)
        if time.monotonic() - looked >= LOOK_EVERY:
            looked = time.monotonic()
            if _memory() > memory:
                _tell(report, end="memory")
                return
        while True:
            pid, status, used = os.wait4(-1, os.WNOHANG)
            if pid == program:
                _tell(report, end="exit", code=os.waitstatus_to_exitcode(status), used=used.ru_utime + used.ru_stime)
                return
            if pid == 0:
                break


def _memory() -> int:
    """The bytes that all processes of the room hold, shared ones counted for each."""
    total = 0
    for name in os.listdir("/proc"):
        if name.isdigit() and name != "1":
            try:
                with open(f"/proc/{name}/status", encoding="ascii", errors="replace") as handle:
                    lines = handle.read().splitlines()
            except (FileNotFoundError, ProcessLookupError):  # it has just ended
                continue
            total += sum(int(line.split()[1]) for line in lines if line.startswith(("RssAnon:", "RssShmem:")))
    return total * 1024


def _be_program(request: dict[str, Any], report: int, lines: int) -> NoReturn:
    try:
        os.setsid()
        os.dup2(lines, 0)
        os.chdir("/tmp")
        seconds = math.ceil(request["seconds"])
        limits = {
            resource.RLIMIT_AS: request["memory"],
            resource.RLIMIT_FSIZE: request["files"],
            resource.RLIMIT_NOFILE: OPEN_FILES,
            resource.RLIMIT_NPROC: request["processes"] + 2,  # the keeper and the first process may count as well
            resource.RLIMIT_CORE: 0,
            resource.RLIMIT_MEMLOCK: 0,
            resource.RLIMIT_MSGQUEUE: 0,
        }
        resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds + 1))  # the signal of the first one can be ignored
        for limit, value in limits.items():
            resource.setrlimit(limit, (value, value))
        signal.pthread_sigmask(signal.SIG_SETMASK, set())
        _tell(report, started=True)
        os.execve(request["python"], [request["python"], *request["options"], "/program.py"], request["environment"])
    except OSError as error:
        _tell(report, error=f"starting {request['python']} failed: {error.strerror}", errno=error.errno)
    os._exit(1)


def _build(request: dict[str, Any]) -> tuple[int, int]:
    """Puts a new, empty root in place of the file system, with what the interpreter needs, read-only.

    Returns:
        A way to write to /proc that the program will not have, and the program's standard input.
    """
    _mount(None, "/", None, _MS_REC | _MS_PRIVATE)
    base = next((path for path in ("/tmp", "/mnt", "/var/tmp", "/home") if os.path.isdir(path)), "/dev")
    _mount("tmpfs", base, "tmpfs", _MS_NOSUID | _MS_NODEV, "mode=755")
    for name in ("old", "new"):
        os.mkdir(f"{base}/{name}")
    _pivot_root(base, f"{base}/old")
    os.chdir("/")
    _mount("tmpfs", "/new", "tmpfs", _MS_NOSUID | _MS_NODEV, "mode=755")
    _write("/new/program.py", request["source"])
    _write("/new/stdin", request["stdin"])
    lines = os.open("/new/stdin", os.O_RDONLY)
    os.unlink("/new/stdin")
    _shelve([*SHELVES, *request["paths"]])
    for name in DEVICES:
        if os.path.exists(f"/old/dev/{name}"):
            _bind(f"/old/dev/{name}", f"/new/dev/{name}", _ATTR_NOSUID | _ATTR_NOEXEC)
    own = _MS_NOSUID | _MS_NODEV | _MS_NOEXEC
    for folder, size in (("/new/tmp", request["files"]), ("/new/dev/shm", 1 << 20)):
        os.makedirs(folder)
        _mount("tmpfs", folder, "tmpfs", own, f"size={size},nr_inodes={FILES},mode=1777")
    proc = _show_processes(own)
    os.chdir("/new")
    _pivot_root(".", ".")
    _check("leaving the old root", _LIBC.umount2(b".", 2))
    os.chdir("/")
    _set_attributes("/", _ATTR_RDONLY | _ATTR_NOSUID | _ATTR_NODEV, recursive=False)
    _check("naming the machine", _LIBC.sethostname(b"sandbox", 7))
    return proc, lines


def _show_processes(flags: int) -> int:
    """Mounts /proc of the room's own processes, read-only; returns a way to write to it."""
    os.mkdir("/new/proc")
    try:
        _mount("proc", "/new/proc", "proc", flags)
    except PermissionError:  # a container that hides a part of /proc from itself forbids it: then there is none
        return os.open("/old/proc", os.O_PATH | os.O_DIRECTORY)
    proc = os.open("/new/proc", os.O_PATH | os.O_DIRECTORY)
    _bind("/new/proc", "/new/proc", _ATTR_RDONLY)  # lies over the one that `proc` leads to
    return proc


def _shelve(paths: list[str]) -> None:
    """Shows these files and folders of the old root, read-only, where they were."""
    shown: list[str] = []
    for path in paths:
        old, new = f"/old{path}", f"/new{path}"
        if not os.path.lexists(old) or any(f"{path}/".startswith(f"{one}/") for one in shown):
            continue
        os.makedirs(os.path.dirname(new), exist_ok=True)
        if os.path.islink(old) and path in SHELVES:  # /lib leads to usr/lib
            os.symlink(os.readlink(old), new)
        else:
            _bind(old, new, _ATTR_RDONLY | _ATTR_NOSUID | _ATTR_NODEV)
            shown.append(path)


def _bind(source: str, target: str, attributes: int) -> None:
    if os.path.isdir(source):
        os.makedirs(target, exist_ok=True)
    else:
        os.makedirs(os.path.dirname(target), exist_ok=True)
        with open(target, "xb"):
            pass
    _mount(source, target, None, _MS_BIND | _MS_REC)
    _set_attributes(target, attributes, recursive=True)


def _drop_root(proc: int) -> None:
    """From root to a user that owns nothing, and into a user namespace of its own."""
    os.setgroups([])
    os.setresgid(NOBODY, NOBODY, NOBODY)
    os.setresuid(NOBODY, NOBODY, NOBODY)
    _prctl(_DUMPABLE, 1)  # else the files of /proc/self are still root's
    _unshare(_NEW["user"])
    _map_user(proc, NOBODY, NOBODY)


def _map_user(proc: int, user: int, group: int) -> None:
    for name, text in (("setgroups", "deny"), ("uid_map", f"{INSIDE} {user} 1"), ("gid_map", f"{INSIDE} {group} 1")):
        _put(proc, f"self/{name}", text)


def _lock(proc: int) -> None:
    """Gives up every right and the way to get any back."""
    with contextlib.suppress(OSError):  # the filter below forbids them as well, and the last lines here try it
        _put(proc, "sys/user/max_user_namespaces", "0")  # in a namespace of its own the program would be root
    os.close(proc)
    with contextlib.suppress(OSError):  # the kernel has no more of them
        for capability in range(64):
            _prctl(_CAPBSET_DROP, capability)
    _prctl(_CAP_AMBIENT, 4)
    header, nothing = struct.pack("=Ii", 0x20080522, 0), bytes(24)
    _check("dropping capabilities", _LIBC.capset(header, nothing))
    _prctl(_NO_NEW_PRIVS, 1)
    _prctl(_DUMPABLE, 0)  # nobody reads or changes the first process through /proc
    _filter_calls()
    if _LIBC.unshare(_NEW["user"]) == 0:
        raise PermissionError(1, "they are still possible", "forbidding user namespaces")


def _filter_calls() -> None:
    """A seccomp filter: refused calls fail with EPERM; sockets are local ones, and no process makes namespaces.

    Nor does any share memory without a file. Such pages stay until the last page of their mapping goes, and no limit
    counts the ones that are not mapped: one process could hold all memory. Hence there is no /dev/zero either.
    """
    machine = platform.machine()
    number, argument, flags = 0, 16, 40  # offsets in struct seccomp_data; of an argument, the lower half
    allow, refuse, missing, kill = 0x7FFF0000, 0x50001, 0x50026, 0x80000000
    load, equal, above, any_bit, give = 0x20, 0x15, 0x35, 0x45, 0x06
    code = [(load, 0, 0, 4), (equal, 1, 0, _ARCHITECTURE[machine]), (give, 0, 0, kill), (load, 0, 0, number)]
    code += [(above, 0, 1, 0x40000000), (give, 0, 0, refuse)]  # the x32 calls
    for numbers in _REFUSED.values():
        code += [(equal, 0, 1, numbers[machine == "aarch64"]), (give, 0, 0, refuse)]
    code += [(equal, 0, 1, _CLONE3), (give, 0, 0, missing)]  # hides its flags: libraries fall back to clone
    namespaces = sum(_NEW.values())
    for call, test in (
        (_CLONE[machine], (any_bit, 0, 1, namespaces)),
        (_SOCKET[machine], (equal, 1, 0, 1)),  # AF_UNIX
        (_PRLIMIT[machine], (equal, 1, 0, 0)),  # its own limits
    ):
        code += [(equal, 0, 4, call), (load, 0, 0, argument), test, (give, 0, 0, refuse), (give, 0, 0, allow)]
    code += [(equal, 0, 5, _MMAP[machine]), (load, 0, 0, flags), (any_bit, 0, 2, _MAP_ANONYMOUS)]
    code += [(any_bit, 0, 1, _MAP_SHARED), (give, 0, 0, refuse), (give, 0, 0, allow)]
    code += [(give, 0, 0, allow)]
    packed = b"".join(struct.pack("=HBBI", *one) for one in code)
    buffer = ctypes.create_string_buffer(packed, len(packed))
    program = ctypes.create_string_buffer(struct.pack("@HP", len(code), ctypes.addressof(buffer)))
    _prctl(_SECCOMP, 2, ctypes.addressof(program))


def _may_administer() -> bool:
    """Whether root has CAP_SYS_ADMIN; in many containers it has not, and goes the way of an ordinary user."""
    with open("/proc/self/status", encoding="ascii", errors="replace") as handle:
        held = next(line.split()[1] for line in handle if line.startswith("CapEff:"))
    return bool(int(held, 16) >> 21 & 1)


def _may_be_nobody() -> bool:
    """Whether root can become the user that owns nothing; in a user namespace there may be no such user."""
    known = []
    for name in ("uid_map", "gid_map"):
        with open(f"/proc/self/{name}", encoding="ascii") as handle:
            ranges = [[int(number) for number in line.split()] for line in handle]
        known.append(any(first <= NOBODY < first + count for first, _, count in ranges))
    with open("/proc/self/setgroups", encoding="ascii") as handle:
        return all(known) and handle.read().strip() == "allow"


def _end_with_parent() -> None:
    """The kernel kills this process when its parent ends. Changing users undoes it."""
    _prctl(_PDEATHSIG, signal.SIGKILL)


def _unshare(flags: int) -> None:
    _check("unshare (making namespaces)", _LIBC.unshare(flags))


def _mount(source: str | None, target: str, kind: str | None, flags: int, data: str | None = None) -> None:
    encoded = [None if one is None else os.fsencode(one) for one in (source, target, kind, data)]
    result = _LIBC.mount(encoded[0], encoded[1], encoded[2], ctypes.c_ulong(flags), encoded[3])
    _check(f"mount {target}", result)


def _pivot_root(new: str, old: str) -> None:
    _check("pivot_root", _LIBC.syscall(ctypes.c_long(_PIVOT_ROOT[platform.machine()]), new.encode(), old.encode()))


def _set_attributes(path: str, attributes: int, recursive: bool) -> None:
    wanted = struct.pack("=QQQQ", attributes, 0, 0, 0)
    at, flags, size = ctypes.c_long(-100), ctypes.c_long(0x8000 if recursive else 0), ctypes.c_long(len(wanted))
    result = _LIBC.syscall(ctypes.c_long(_MOUNT_SETATTR), at, os.fsencode(path), flags, wanted, size)
    _check("mount_setattr (it needs Linux 5.14)", result)


def _prctl(option: int, value: int, more: int = 0) -> None:
    arguments = [ctypes.c_ulong(one) for one in (value, more, 0, 0)]
    _check(f"prctl {option}", _LIBC.prctl(option, *arguments))


def _check(what: str, result: int) -> None:
    if result != 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number), what)


def _put(folder: int, path: str, text: str) -> None:
    handle = os.open(path, os.O_WRONLY, dir_fd=folder)
    try:
        os.write(handle, text.encode())
    except OSError as error:
        raise OSError(error.errno, error.strerror, f"writing {path}") from error
    finally:
        os.close(handle)


def _write(path: str, text: str) -> None:
    with open(path, "x", encoding="utf-8", errors="surrogatepass", newline="") as handle:
        handle.write(text)
    os.chmod(path, 0o444)


def _tell(report: int, **what: Any) -> None:
    os.write(report, json.dumps(what).encode() + b"\n")


if __name__ == "__main__":
    main()
