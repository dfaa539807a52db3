"""Run one function written by a model per forked child, in a jail: the inside of the sandbox (paper 3.2, 3.5).

`pool.py` starts this file as `python -I -S jail.py TEMPORARY_FOLDER`, with an empty environment. It imports
only the standard library and the two files beside it. For each job the server gets one end of a socket, which
it never reads. It forks a warden, and the warden forks the candidate. The candidate puts itself into a jail,
and only then reads the job:

    server --fork--> warden (own session, new namespaces) --fork--> candidate (rlimits, Landlock, seccomp, then the job)
      ^ seconds, socket                                                ^ source, arguments, secret   v answer
      +------------------------------ pool.py ---------------------------------------------------+

So the memory that a candidate inherits has never held another job's source, arguments, answers or secret.

| layer      | what it takes away                                                                          |
|------------|---------------------------------------------------------------------------------------------|
| rlimits    | memory, processor time, file size, open files, processes, core dumps                        |
| namespaces | network, other processes, shared memory, write access to any mount (a user namespace first) |
| landlock   | opening any file, and TCP                                                                   |
| seccomp    | every system call that computing does not need: sockets, fork, exec, kill, open, ptrace     |

When the server starts, each layer is tried once in a child; what works is reported and used in every job. A
layer that worked and then fails is an infrastructure failure, and no source is read.

Choices: the standard library is in memory (`library.py`), because nothing can be opened inside. The folder
that the server works in is removed at once, so nothing can be made in it and nothing is left of it. The
expected values of the tests never come here, so nothing that a candidate finds in this process, or sends, can
make a wrong answer right. Values go back as text (`values.py`), which the parent compares and never evaluates
or parses.

This is the only place of the project where text written by a model runs as code. No counterpart in the paper,
which names its sandbox but does not describe it.
"""

import bisect  # noqa: F401  (what is loaded here costs a solution nothing to import)
import collections  # noqa: F401
import contextlib
import ctypes
import datetime  # noqa: F401
import decimal  # noqa: F401
import fractions  # noqa: F401
import functools  # noqa: F401
import gc
import heapq  # noqa: F401
import importlib.util
import itertools  # noqa: F401
import json
import math
import operator  # noqa: F401
import os
import pathlib
import pickle
import platform
import random  # noqa: F401
import re  # noqa: F401
import resource
import select
import signal
import socket
import statistics  # noqa: F401
import string  # noqa: F401
import struct
import sys
import tempfile
import time
import types
import typing

MEMORY = 256 * 2**20
"""Address space of a candidate, bytes."""
NOMINAL_SECONDS = 0.004
"""Time of `spin` on an idle core of 2024; time limits are multiplied by how much longer it takes here."""

READY = b"+"
"""What a candidate sends when its jail is closed."""

CONTROL = 3
"""Descriptor of the server's socket to `pool.py`."""
CHANNEL = 3
"""Descriptor of a candidate's socket to `pool.py`; it has no other but 0, 1 and 2, which lead nowhere."""
REQUEST = struct.Struct("d")
"""A request for a job: its seconds. The socket comes with it."""

Job = dict[str, typing.Any]
"""{"source", "function", "arguments": a pickle for each test, "secret"}."""


def load_neighbour(name: str) -> types.ModuleType:
    """Return a module of this folder, without the package that it belongs to."""
    spec = importlib.util.spec_from_file_location(
        name, pathlib.Path(__file__).with_name(f"{name}.py")
    )
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


library = load_neighbour("library")
values = load_neighbour("values")


class SystemCalls(typing.NamedTuple):
    """What a pure computation needs of Linux on one architecture; all other calls fail with EPERM."""

    audit_architecture: int
    """Its AUDIT_ARCH constant, linux/audit.h."""
    numbers: tuple[int, ...]
    """Numbers of the system calls, linux/unistd.h."""


# read write close fstat lseek mmap mprotect munmap brk sigaction sigprocmask sigreturn mremap madvise
# getpid gettid exit exit_group futex clock_gettime gettimeofday getrandom sched_yield nanosleep clock_nanosleep
# sigaltstack restart_syscall
ALLOWED = {
    "x86_64": SystemCalls(
        0xC000003E,
        (0, 1, 3, 5, 8, 9, 10, 11, 12, 13, 14, 15, 25, 28)
        + (39, 186, 60, 231, 202, 228, 96, 318, 24, 35, 230, 131, 219),
    ),
    "aarch64": SystemCalls(
        0xC00000B7,
        (63, 64, 57, 80, 62, 222, 226, 215, 214, 134, 135, 139, 216, 233)
        + (172, 178, 93, 94, 98, 113, 169, 278, 124, 101, 115, 132, 128),
    ),
}

# Numbers of the system calls that the C library has no function for; equal on both architectures.
LANDLOCK_CREATE_RULESET = 444
LANDLOCK_RESTRICT_SELF = 446
MOUNT_SETATTR = 442

# Options of prctl, linux/prctl.h.
PR_SET_PDEATHSIG = 1
PR_SET_DUMPABLE = 4
PR_SET_SECCOMP = 22
PR_SET_CHILD_SUBREAPER = 36
PR_SET_NO_NEW_PRIVS = 38


LIBC = ctypes.CDLL(None, use_errno=True)
"""The C library, loaded once: loading it makes a class, which costs a forked child a copy of many pages."""


def libc_call(name: str, *arguments: typing.Any) -> int:
    """Call a function of the C library; raise OSError when it fails or does not exist."""
    if not hasattr(LIBC, name):
        raise OSError(f"the C library has no {name}")
    result = getattr(LIBC, name)(*arguments)
    if result < 0:
        error = ctypes.get_errno()
        raise OSError(error, f"{name}: {os.strerror(error)}")
    return result


def die_with_parent() -> None:
    """Ask Linux for SIGKILL when the parent dies, and give up gaining privileges (Landlock and seccomp need this)."""
    if sys.platform == "linux":
        libc_call("prctl", PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
        libc_call("prctl", PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)


READ_ONLY = (ctypes.c_uint64 * 4)(1, 0, 0, 0)  # struct mount_attr with attr_set = MOUNT_ATTR_RDONLY


def enter_namespaces() -> None:
    """Enter new user, mount, network, ipc and pid namespaces, and make every mount read-only.

    The next fork becomes process 1 of the pid namespace.
    """
    new_user = 0x10000000
    new_mounts = 0x00020000
    new_network = 0x40000000
    new_ipc = 0x08000000
    new_pids = 0x20000000
    libc_call("unshare", new_user | new_mounts | new_network | new_ipc | new_pids)
    here = -100  # AT_FDCWD
    recursive = 0x8000
    size = ctypes.sizeof(READ_ONLY)
    libc_call("syscall", MOUNT_SETATTR, here, b"/", recursive, READ_ONLY, size)


Ruleset = ctypes.c_uint64 * 3  # struct landlock_ruleset_attr


def deny_files() -> None:
    """Enter Landlock with no rule: no file can be opened, made, removed or executed, and no TCP socket used."""
    version = libc_call("syscall", LANDLOCK_CREATE_RULESET, None, 0, 1)
    # Each version of the interface knows more rights; all that it knows are denied.
    if version == 1:
        file_rights = 13
    elif version == 2:
        file_rights = 14
    elif version < 5:
        file_rights = 15
    else:
        file_rights = 16
    network_rights = 2 if version >= 4 else 0
    scopes = 2 if version >= 6 else 0
    ruleset = Ruleset((1 << file_rights) - 1, (1 << network_rights) - 1, (1 << scopes) - 1)
    if version < 4:
        size = 8
    elif version < 6:
        size = 16
    else:
        size = 24
    descriptor = libc_call("syscall", LANDLOCK_CREATE_RULESET, ruleset, size, 0)
    libc_call("syscall", LANDLOCK_RESTRICT_SELF, descriptor, 0)
    os.close(descriptor)


class Instruction(ctypes.Structure):
    """One instruction of a system call filter (struct sock_filter)."""

    _fields_ = [
        ("code", ctypes.c_uint16),
        ("jump_if_true", ctypes.c_uint8),
        ("jump_if_false", ctypes.c_uint8),
        ("operand", ctypes.c_uint32),
    ]


class Program(ctypes.Structure):
    """A system call filter (struct sock_fprog)."""

    _fields_ = [("length", ctypes.c_uint16), ("instructions", ctypes.POINTER(Instruction))]


def filter_program(calls: SystemCalls) -> Program:
    """Return the filter by which all other system calls fail with EPERM."""
    load, equal, give = 0x20, 0x15, 0x06  # opcodes: load a word, jump if equal, return
    kill, refuse, allow = 0x80000000, 0x00050001, 0x7FFF0000  # verdicts
    program = [
        (load, 0, 0, 4),  # the architecture
        (equal, 1, 0, calls.audit_architecture),
        (give, 0, 0, kill),
        (load, 0, 0, 0),  # the number of the system call
    ]
    for i, number in enumerate(calls.numbers):
        # If equal, jump over the remaining comparisons and the refusal.
        program.append((equal, len(calls.numbers) - i, 0, number))
    program += [(give, 0, 0, refuse), (give, 0, 0, allow)]
    instructions = (Instruction * len(program))(*program)
    return Program(len(program), instructions)


MACHINE = platform.machine()
FILTERS = {machine: filter_program(calls) for machine, calls in ALLOWED.items()}


def filter_system_calls() -> None:
    """Enter seccomp: system calls outside ALLOWED fail with EPERM."""
    if MACHINE not in FILTERS:
        raise OSError(f"no table of system calls for {MACHINE}")
    mode_filter = 2
    libc_call("prctl", PR_SET_SECCOMP, mode_filter, ctypes.byref(FILTERS[MACHINE]), 0, 0)


def limit_resources(seconds: float) -> None:
    """Set bounds on this process.

    They hold on every POSIX system; the bound on processes does not hold for root.
    """
    limits = {
        "RLIMIT_AS": MEMORY,
        "RLIMIT_CPU": math.ceil(seconds),
        "RLIMIT_FSIZE": 0,
        "RLIMIT_NOFILE": 16,
        "RLIMIT_NPROC": 0,
        "RLIMIT_CORE": 0,
    }
    for name, value in limits.items():
        if hasattr(resource, name) and (name != "RLIMIT_AS" or sys.platform == "linux"):
            resource.setrlimit(getattr(resource, name), (value, value))


LAYERS: dict[str, typing.Callable[[], None]] = {
    "namespaces": enter_namespaces,
    "landlock": deny_files,
    "seccomp": filter_system_calls,
}


def works(layer: str) -> bool:
    """Return whether a layer can be entered on this machine, by trying it in a child."""
    pid = os.fork()
    if pid == 0:
        try:
            die_with_parent()
            LAYERS[layer]()
            os._exit(0)
        except (OSError, AttributeError):
            os._exit(1)
    return os.waitpid(pid, 0)[1] == 0


def run_candidate(job: Job) -> list[str]:
    """Run every test; return a line for each: "value TYPES TEXT", "odd TYPE" or "raised TYPE".

    If the source itself raises, return the one line "failed TYPE".
    """
    module = types.ModuleType("candidate")
    sys.modules["candidate"] = module  # where dataclasses and pickle look for its classes
    tests = [pickle.loads(arguments) for arguments in job["arguments"]]
    try:
        code = compile(job["source"], "candidate", "exec", dont_inherit=True)
        types.FunctionType(code, module.__dict__)()
        function = module.__dict__[job["function"]]
    except BaseException as error:  # SystemExit is one of the things that a candidate may raise
        return [f"failed {type(error).__name__}"]
    lines = []
    for arguments in tests:
        try:
            lines.append(describe(function(*arguments)))
        except BaseException as error:
            lines.append(f"raised {type(error).__name__}")
    return lines


def describe(value: typing.Any) -> str:
    """Return the line of a test that returned a value."""
    try:
        encoded = values.encode(value)
    except (TypeError, RecursionError):
        return f"odd {type(value).__name__}"
    return f"value {encoded.types} {encoded.text}"


def receive_job() -> Job:
    """Read the whole job, up to where the parent stops sending."""
    chunks = []
    while chunk := os.read(CHANNEL, 2**20):
        chunks.append(chunk)
    return pickle.loads(b"".join(chunks))


def candidate(channel: int, seconds: float, layers: list[str]) -> None:
    """Close every other descriptor, enter the jail, say READY, read the job, run it, answer, end."""
    os.dup2(channel, CHANNEL)
    os.closerange(CHANNEL + 1, 256)
    die_with_parent()
    limit_resources(seconds)
    for layer in ("landlock", "seccomp"):
        if layer in layers:
            LAYERS[layer]()
    os.write(CHANNEL, READY)
    job = receive_job()
    lines = [job["secret"], *run_candidate(job)]
    answer = "\n".join(lines).encode("ascii", "backslashreplace")
    while answer:
        written = os.write(CHANNEL, answer)
        answer = answer[written:]


def warden(channel: int, seconds: float, layers: list[str]) -> None:
    """Live as long as the candidate, so that the server can wait for both."""
    os.setsid()
    die_with_parent()
    if "namespaces" in layers:
        enter_namespaces()
    pid = os.fork()
    if pid == 0:
        try:
            candidate(channel, seconds, layers)
        finally:
            os._exit(0)
    os.waitpid(pid, 0)


def serve_job(channel: int, seconds: float, layers: list[str]) -> dict[str, bool]:
    """Run one job until it ends, its time is over, or the parent hangs up; return {"late", "exhausted"}.

    `late`: the deadline came first. `exhausted`: it ran until its limit of processor time.
    """
    alive, writer = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            os.close(alive)
            warden(channel, seconds, layers)  # which holds the writer
        finally:
            os._exit(0)
    os.close(writer)
    events = select.poll()
    events.register(alive, select.POLLIN)
    events.register(channel, 0)  # to hear that the parent hung up, and nothing else
    ended = events.poll(1000 * seconds)
    os.close(alive)
    os.close(channel)

    for kill in (os.killpg, os.kill):  # the session may not have its own group yet
        with contextlib.suppress(ProcessLookupError):
            kill(pid, signal.SIGKILL)
    usage = os.wait4(pid, 0)[2]
    reap_orphans()
    processor_seconds = usage.ru_utime + usage.ru_stime
    return {"late": not ended, "exhausted": processor_seconds > 0.9 * math.ceil(seconds)}


def reap_orphans() -> None:
    """Collect what a killed warden left behind; this process adopts it."""
    deadline = time.monotonic() + 1.0
    try:
        while time.monotonic() < deadline:
            if os.waitpid(-1, os.WNOHANG)[0] == 0:
                time.sleep(0.001)
    except ChildProcessError:
        return


def spin() -> float:
    """Return the seconds of a fixed piece of work, the best of three: how fast this machine is at the moment."""
    times = []
    for _ in range(3):
        start = time.perf_counter()
        sum(i & 1 for i in range(100_000))
        times.append(time.perf_counter() - start)
    return min(times)


def settle(temporary_folder: str) -> socket.socket:
    """Leave the files and descriptors of whoever started this process; return the socket to it."""
    tempfile.tempdir = temporary_folder
    folder = tempfile.mkdtemp(prefix="minglm-sandbox-")
    os.chdir(folder)
    os.rmdir(folder)
    os.dup2(0, CONTROL, inheritable=False)
    null = os.open(os.devnull, os.O_RDWR)
    for descriptor in (0, 1, 2):
        os.dup2(null, descriptor)
    os.closerange(CONTROL + 1, 256)
    return socket.socket(fileno=CONTROL)


def main() -> None:
    """Say hello, then run a job for each request, until the parent hangs up."""
    control = settle(sys.argv[1])
    if sys.platform == "linux":
        libc_call("prctl", PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)  # adopt orphans
        libc_call("prctl", PR_SET_DUMPABLE, 0, 0, 0, 0)  # nobody may read this process's memory
    library.import_modules_in_c()
    sys.meta_path.insert(-1, library.Library())  # before the finder that looks at files
    layers = [layer for layer in LAYERS if works(layer)]
    slowness = min(20.0, max(1.0, spin() / NOMINAL_SECONDS))
    gc.freeze()  # the collector leaves what is here alone, and forks go on sharing it

    def say(message: dict[str, typing.Any]) -> None:
        control.sendall(json.dumps(message).encode() + b"\n")

    say({"layers": ["rlimits", *layers], "slowness": slowness})
    while True:
        request, channels, _, _ = socket.recv_fds(control, REQUEST.size, 1)
        if not request:
            return
        say(serve_job(channels[0], REQUEST.unpack(request)[0], layers))


if __name__ == "__main__":
    main()
