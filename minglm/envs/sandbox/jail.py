"""The inside of the sandbox: a small server that runs one function written by a model per forked child.

`sandbox.py` starts this file as `python -I -S jail.py`, with an empty environment and an empty folder. It imports only
the standard library, and no file of minglm. For each job the server forks a warden, and the warden forks the
candidate; the candidate puts itself into a jail and only then looks at the source:

    server --fork--> warden (own session, new namespaces) --fork--> candidate (rlimits, Landlock, seccomp, then source)

| layer      | what it takes away                                                                          |
|------------|---------------------------------------------------------------------------------------------|
| rlimits    | memory, processor time, file size, open files, processes, core dumps                        |
| namespaces | network, other processes, shared memory, write access to any mount (a user namespace first) |
| landlock   | opening any file, and TCP                                                                   |
| seccomp    | every system call that computing does not need: sockets, fork, exec, kill, open, ptrace     |

Each layer is tried once in a child of its own when the server starts; what works is reported and used in every job. A
layer that worked and then fails is an infrastructure failure, and no source is read.

Choices: modules that solutions use are imported before the jail closes, because nothing can be opened inside. The
expected values of the tests never come here, so nothing that a candidate finds in this process, or sends, can make a
wrong answer right. Values go back as `repr` of plain types, which the parent compares as text and never evaluates.

This is the one place of the project where text written by a model runs as code. No counterpart in the paper, which
names its sandbox but does not describe it.
"""

import bisect  # noqa: F401  (solutions may import what is loaded here)
import collections  # noqa: F401
import contextlib
import ctypes
import datetime  # noqa: F401
import decimal  # noqa: F401
import fractions  # noqa: F401
import functools  # noqa: F401
import heapq  # noqa: F401
import itertools  # noqa: F401
import json
import math
import operator  # noqa: F401
import os
import platform
import random  # noqa: F401
import re  # noqa: F401
import resource
import select
import signal
import statistics  # noqa: F401
import string  # noqa: F401
import sys
import time
import types
import typing  # noqa: F401

MEMORY = 256 * 2**20
"""Address space of a candidate, bytes."""
OUTPUT = 2**20
"""Most bytes a candidate may send back."""
NOMINAL_SECONDS = 0.004
"""What `spin` takes on an idle core of 2024; time limits are multiplied by how much longer it takes here."""

PLAIN = (int, float, bool, str, type(None))
READY = b"+"

# System calls a pure computation needs, by architecture; all others fail with EPERM. Tables: linux/unistd.h.
ALLOWED = {  # read write close fstat lseek mmap mprotect munmap brk sigaction sigprocmask sigreturn mremap madvise
    # getpid gettid exit exit_group futex clock_gettime gettimeofday getrandom sched_yield nanosleep clock_nanosleep
    # sigaltstack restart_syscall
    "x86_64": (0xC000003E, (0, 1, 3, 5, 8, 9, 10, 11, 12, 13, 14, 15, 25, 28))
    + ((39, 186, 60, 231, 202, 228, 96, 318, 24, 35, 230, 131, 219),),
    "aarch64": (0xC00000B7, (63, 64, 57, 80, 62, 222, 226, 215, 214, 134, 135, 139, 216, 233))
    + ((172, 178, 93, 94, 98, 113, 169, 278, 124, 101, 115, 132, 128),),
}


def libc_call(name, *arguments):
    """Call a function of the C library; OSError when it fails or does not exist."""
    libc = ctypes.CDLL(None, use_errno=True)
    if not hasattr(libc, name):
        raise OSError(f"the C library has no {name}")
    result = getattr(libc, name)(*arguments)
    if result < 0:
        raise OSError(ctypes.get_errno(), f"{name}: {os.strerror(ctypes.get_errno())}")
    return result


def die_with_parent():
    """Ask Linux for SIGKILL when the parent dies, and never to gain privileges (needed by Landlock and seccomp)."""
    if sys.platform == "linux":
        libc_call("prctl", 1, signal.SIGKILL, 0, 0, 0)
        libc_call("prctl", 38, 1, 0, 0, 0)


def enter_namespaces():
    """New user, mount, network, ipc and pid namespaces; every mount becomes read-only. The next fork is process 1."""
    user, mounts, network, ipc, pids = 0x10000000, 0x00020000, 0x40000000, 0x08000000, 0x20000000
    libc_call("unshare", user | mounts | network | ipc | pids)
    read_only = (ctypes.c_uint64 * 4)(1, 0, 0, 0)  # struct mount_attr: attr_set = MOUNT_ATTR_RDONLY
    recursive = 0x8000
    libc_call(
        "syscall", 442, -100, b"/", recursive, read_only, ctypes.sizeof(read_only)
    )  # mount_setattr


def deny_files():
    """Landlock with no rule: no file can be opened, made, removed or executed, and no TCP socket bound or connected."""
    version = libc_call("syscall", 444, None, 0, 1)
    files = (1 << (13 if version == 1 else 14 if version == 2 else 15 if version < 5 else 16)) - 1
    network, scopes = (3 if version >= 4 else 0), (3 if version >= 6 else 0)
    ruleset = (ctypes.c_uint64 * 3)(files, network, scopes)
    size = 8 if version < 4 else 16 if version < 6 else 24
    descriptor = libc_call("syscall", 444, ruleset, size, 0)
    libc_call("syscall", 446, descriptor, 0)
    os.close(descriptor)


def filter_system_calls():
    """Seccomp: system calls outside ALLOWED fail with EPERM."""
    if platform.machine() not in ALLOWED:
        raise OSError(f"no table of system calls for {platform.machine()}")
    architecture, first, second = ALLOWED[platform.machine()]
    numbers = first + second
    load, equal, give = 0x20, 0x15, 0x06
    kill, refuse, allow = 0x80000000, 0x00050001, 0x7FFF0000
    program = [(load, 0, 0, 4), (equal, 1, 0, architecture), (give, 0, 0, kill), (load, 0, 0, 0)]
    for i, number in enumerate(numbers):
        program.append((equal, len(numbers) - i, 0, number))  # jump over the rest and the refusal
    program += [(give, 0, 0, refuse), (give, 0, 0, allow)]

    class Instruction(ctypes.Structure):
        _fields_ = [
            ("code", ctypes.c_uint16),
            ("yes", ctypes.c_uint8),
            ("no", ctypes.c_uint8),
            ("k", ctypes.c_uint32),
        ]

    class Program(ctypes.Structure):
        _fields_ = [("length", ctypes.c_uint16), ("instructions", ctypes.POINTER(Instruction))]

    instructions = (Instruction * len(program))(*program)
    libc_call("prctl", 22, 2, ctypes.byref(Program(len(program), instructions)), 0, 0)


def limit_resources(seconds):
    """Bounds of the process itself. They hold on every POSIX system; the bound on processes does not hold for root."""
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


LAYERS = {"namespaces": enter_namespaces, "landlock": deny_files, "seccomp": filter_system_calls}


def works(layer):
    """Whether a layer can be entered on this machine, tried in a child."""
    pid = os.fork()
    if pid == 0:
        try:
            die_with_parent()
            LAYERS[layer]()
            os._exit(0)
        except (OSError, AttributeError):
            os._exit(1)
    return os.waitpid(pid, 0)[1] == 0


def is_plain(value):
    """Whether a value is made of exactly Python's own plain types; subclasses could pretend to be equal."""
    if type(value) in (list, tuple):
        return all(is_plain(item) for item in value)
    if type(value) is dict:
        return all(is_plain(item) for pair in value.items() for item in pair)
    return type(value) in PLAIN


def run_candidate(job):
    """[["value", repr] | ["odd", type] | ["raised", type]] for each test, or ["raised", type] for the source itself."""
    outcomes, namespace = [], {"__name__": "candidate"}
    try:
        types.FunctionType(compile(job["source"], "candidate", "exec"), namespace)()
        function = namespace[job["function"]]
    except BaseException as error:  # SystemExit is one of the things a candidate may raise
        return ["raised", type(error).__name__]
    for arguments in job["arguments"]:
        try:
            value = function(*arguments)
            outcomes.append(
                ["value", repr(value)] if is_plain(value) else ["odd", type(value).__name__]
            )
        except BaseException as error:
            outcomes.append(["raised", type(error).__name__])
    return outcomes


def candidate(job, writer, layers):
    """Close every other descriptor, enter the jail, say READY, run, answer, end."""
    null = os.open(os.devnull, os.O_RDWR)
    for descriptor in (0, 1, 2):
        os.dup2(null, descriptor)
    os.closerange(3, writer)
    os.closerange(writer + 1, 256)
    die_with_parent()
    limit_resources(job["seconds"])
    for layer in ("landlock", "seccomp"):
        if layer in layers:
            LAYERS[layer]()
    os.write(writer, READY)
    answer = (job["secret"] + json.dumps(run_candidate(job))).encode()
    while answer:
        answer = answer[os.write(writer, answer) :]


def warden(job, writer, layers):
    """Hold the writer until the candidate is dead, so that the server reads the end of the pipe only then."""
    os.setsid()
    die_with_parent()
    if "namespaces" in layers:
        enter_namespaces()
    pid = os.fork()
    if pid == 0:
        try:
            candidate(job, writer, layers)
        finally:
            os._exit(0)
    os.waitpid(pid, 0)


def serve_job(job, layers):
    """Run one job to its end or its deadline; {"ready", "late", "flood", "answer"} for the parent."""
    reader, writer = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            os.close(reader)
            warden(job, writer, layers)
        finally:
            os._exit(0)
    os.close(writer)
    received, deadline, ended = b"", time.monotonic() + job["seconds"], False
    while not ended and len(received) <= OUTPUT:
        left = deadline - time.monotonic()
        if left <= 0 or not select.select([reader], [], [], left)[0]:
            break
        chunk = os.read(reader, 65536)
        received, ended = received + chunk, not chunk
    os.close(reader)
    for kill in (os.killpg, os.kill):  # the session may not have its own group yet
        with contextlib.suppress(ProcessLookupError):
            kill(pid, signal.SIGKILL)
    usage = os.wait4(pid, 0)[2]
    reap_orphans()
    flood = len(received) > OUTPUT
    late = not ended and not flood
    if ended and len(received) <= len(
        READY
    ):  # silent: killed for its processor time, or for another reason
        late = usage.ru_utime + usage.ru_stime > 0.9 * math.ceil(job["seconds"])
    return {
        "ready": received[:1] == READY,
        "late": late,
        "flood": flood,
        "answer": received[1:].decode(errors="replace") if ended else "",
    }


def reap_orphans():
    """Collect what a killed warden left behind; this process adopts it."""
    deadline = time.monotonic() + 1.0
    try:
        while time.monotonic() < deadline:
            if os.waitpid(-1, os.WNOHANG)[0] == 0:
                time.sleep(0.001)
    except ChildProcessError:
        return


def spin():
    """Seconds for a fixed piece of work, the best of three: how fast this machine is at the moment."""
    times = []
    for _ in range(3):
        start = time.perf_counter()
        sum(i & 1 for i in range(100_000))
        times.append(time.perf_counter() - start)
    return min(times)


def main():
    """Say hello, then answer one line of JSON per line of JSON, until standard input ends."""
    if sys.platform == "linux":
        libc_call("prctl", 36, 1, 0, 0, 0)  # adopt orphans (PR_SET_CHILD_SUBREAPER)
        libc_call("prctl", 4, 0, 0, 0, 0)  # nobody may read this process's memory (PR_SET_DUMPABLE)
    layers = [layer for layer in LAYERS if works(layer)]
    slowness = min(20.0, max(1.0, spin() / NOMINAL_SECONDS))
    print(json.dumps({"layers": ["rlimits", *layers], "slowness": slowness}), flush=True)
    for line in sys.stdin:
        print(json.dumps(serve_job(json.loads(line), layers)), flush=True)


if __name__ == "__main__":
    main()
