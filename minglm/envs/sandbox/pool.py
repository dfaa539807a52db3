"""Judge functions written by a model in a sandbox: run hidden tests, report, leave nothing behind (paper 3.2, 3.5).

    Verdict.status = "passed" | "wrong" | "timeout" | "crash" | "infrastructure"

This is the outside of the sandbox; `jail.py` is the inside. Warm interpreters wait for jobs and fork a jailed child for
each, so a judgement costs milliseconds. The verdict is computed here, by comparing values as text:

- Exit codes and printed output count for nothing. An answer begins with a secret of its job and has one value per test.
- Expected values never leave this process; a candidate that reads all of its memory finds only the arguments.
- Values are plain types, checked by exact type and compared as `repr`: an object that claims to equal everything equals
  nothing, and True is not 1.
- Whole process groups die at the deadline, which grows with how slow the machine is at the moment.

The level of isolation has a name: `full` (namespaces and a system call filter), `no-namespaces` (only the filter),
`rlimits-only` (neither, for instance on macOS: enough against accidents, not against malice). A sandbox refuses to
start below its floor. Infrastructure failures have a status of their own because they are not the model's fault.

Simplifications: pure functions only; nothing can be written or opened. A cluster puts containers in the place
of `Worker`. The paper runs code in a sandbox too (3.2, 3.5) and does not describe it.
"""

import atexit
import contextlib
import json
import os
import queue
import secrets
import select
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from enum import StrEnum
from functools import cache
from pathlib import Path
from typing import Any, Self

Case = tuple[Sequence[Any], Any]
"""One test: the arguments (JSON values) and the expected value (a plain Python one)."""

JAIL = Path(__file__).with_name("jail.py")

LEVELS = ("rlimits-only", "no-namespaces", "full")
"""Isolation, weakest first."""

GRACE = 10.0
"""Seconds beyond a job's deadline after which a silent worker counts as broken."""


class VerdictStatus(StrEnum):
    """The outcome of one candidate in one word."""

    PASSED = "passed"
    """All values are as expected."""
    WRONG = "wrong"
    """A value differs."""
    TIMEOUT = "timeout"
    """The candidate ran out of time."""
    CRASH = "crash"
    """An exception, a signal, or no answer."""
    INFRASTRUCTURE = "infrastructure"
    """The sandbox failed; this is not the candidate's fault."""


@dataclass(frozen=True)
class Verdict:
    """The outcome of one candidate."""

    status: VerdictStatus
    passed: int
    """Tests with the expected value."""
    total: int
    """Tests."""
    detail: str = ""
    """One line on the first failure."""


class WorkerError(Exception):
    """A worker died or did not answer in time."""


class Worker:
    """A warm interpreter that takes one job at a time; not thread-safe."""

    def __init__(self, folder: str) -> None:
        # Some builds of Python need this variable to start.
        environment = {k: v for k, v in os.environ.items() if k == "LD_LIBRARY_PATH"}
        self.process = subprocess.Popen(
            [sys.executable, "-I", "-S", str(JAIL)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            cwd=folder,
            env=environment,
            start_new_session=True,
        )
        assert self.process.stdin is not None and self.process.stdout is not None
        self.input = self.process.stdin
        self.output = self.process.stdout
        self.buffer = b""
        try:
            hello = self.receive(GRACE)
        except (WorkerError, ValueError):
            self.close()
            raise
        self.layers: tuple[str, ...] = tuple(hello["layers"])
        self.slowness: float = hello["slowness"]

    def ask(self, job: dict[str, Any]) -> dict[str, Any]:
        """Send a job and wait for its outcome. Raises WorkerError."""
        job = job | {"seconds": job["seconds"] * self.slowness}
        try:
            self.input.write(json.dumps(job).encode() + b"\n")
            self.input.flush()
        except OSError as error:
            raise WorkerError(f"a sandbox worker is gone: {error}") from error
        return self.receive(job["seconds"] + GRACE)

    def receive(self, seconds: float) -> dict[str, Any]:
        """Return the next line as JSON. Raises WorkerError at the end of the stream and after `seconds`."""
        deadline = time.monotonic() + seconds
        while b"\n" not in self.buffer:
            left = max(0.0, deadline - time.monotonic())
            ready = select.select([self.output], [], [], left)[0]
            if not ready:
                raise WorkerError("a sandbox worker is silent")
            chunk = os.read(self.output.fileno(), 65536)
            if not chunk:
                raise WorkerError("a sandbox worker died")
            self.buffer += chunk
        line, self.buffer = self.buffer.split(b"\n", 1)
        return json.loads(line)

    def close(self) -> None:
        """End the interpreter; its children die with it."""
        self.process.kill()
        self.process.wait()
        self.output.close()
        with contextlib.suppress(OSError):  # part of a job may still be in the buffer
            self.input.close()


class Sandbox:
    """A pool of workers. Use it as a context manager, or call `close`.

    Args:
        workers: interpreters, by default one per core that this process may use.
        floor: the weakest of LEVELS to accept.

    Raises ValueError below the floor and where processes cannot fork.
    """

    def __init__(self, workers: int | None = None, floor: str = "no-namespaces") -> None:
        if floor not in LEVELS:
            raise ValueError(f"floor = {floor!r}: must be one of {', '.join(LEVELS)}")
        if not hasattr(os, "fork"):
            raise ValueError(
                "the sandbox needs a POSIX system; run minglm under Linux, or in WSL on Windows"
            )
        if hasattr(os, "sched_getaffinity"):
            cores = len(os.sched_getaffinity(0))
        else:
            cores = os.cpu_count() or 1
        self.size = workers or cores
        self.folder = tempfile.TemporaryDirectory(prefix="minglm-sandbox-")
        self.threads = ThreadPoolExecutor(self.size, thread_name_prefix="sandbox")
        # Idle workers. None stands for one that is started when it is first needed.
        self.workers: queue.LifoQueue[Worker | None] = queue.LifoQueue()
        first = Worker(self.folder.name)
        self.layers = first.layers
        self.level = isolation_level(self.layers)
        for _ in range(self.size - 1):
            self.workers.put(None)
        self.workers.put(first)
        if LEVELS.index(self.level) < LEVELS.index(floor):
            self.close()
            raise ValueError(
                f"sandbox isolation here is {self.level!r}, below the floor {floor!r}: "
                "allow seccomp and user namespaces, or accept the risk with floor='rlimits-only'"
            )

    def submit(
        self, source: str, function: str, cases: Sequence[Case], seconds: float = 2.0
    ) -> Future[Verdict]:
        """Judge one candidate in a thread, at most `workers` at a time; return the future Verdict.

        Arguments are those of `judge`.
        """
        return self.threads.submit(self.judge, source, function, cases, seconds)

    def judge(
        self, source: str, function: str, cases: Sequence[Case], seconds: float = 2.0
    ) -> Verdict:
        """Return the Verdict of one candidate.

        Args:
            source: the program.
            function: name of the function in it that is called once for each case.
            cases: the tests; raises ValueError when there is none.
            seconds: time for all cases, on a machine of nominal speed.
        """
        if not cases:
            raise ValueError(f"no tests for {function!r}: a candidate would pass by doing nothing")
        job = {
            "source": source.encode("utf-8", "replace").decode(),  # lone surrogates cannot be sent
            "function": function,
            "arguments": [list(arguments) for arguments, _ in cases],
            "secret": secrets.token_hex(16),
            "seconds": seconds,
        }
        worker = self.workers.get()
        try:
            worker = worker or Worker(self.folder.name)
            outcome = worker.ask(job)
        except (WorkerError, OSError, ValueError) as error:
            if worker:
                worker.close()
            worker = None  # the next job starts a new one
            return Verdict(VerdictStatus.INFRASTRUCTURE, 0, len(cases), str(error))
        finally:
            self.workers.put(worker)
        return compare(outcome, job["secret"], [expected for _, expected in cases])

    def close(self) -> None:
        """End all workers and threads, and remove the folder."""
        self.threads.shutdown(cancel_futures=True)
        while not self.workers.empty():
            worker = self.workers.get()
            if worker:
                worker.close()
        self.folder.cleanup()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def isolation_level(layers: Sequence[str]) -> str:
    """Return which of LEVELS the layers of a worker amount to."""
    if "seccomp" not in layers:
        return "rlimits-only"
    return "full" if "namespaces" in layers else "no-namespaces"


def compare(outcome: dict[str, Any], secret: str, expected: Sequence[Any]) -> Verdict:
    """Return the Verdict of a worker's outcome, {"ready", "late", "flood", "answer"}."""
    total = len(expected)
    if not outcome["ready"]:
        return Verdict(VerdictStatus.INFRASTRUCTURE, 0, total, "the jail could not be closed")
    if outcome["late"]:
        return Verdict(VerdictStatus.TIMEOUT, 0, total, "out of time")
    if outcome["flood"]:
        return Verdict(VerdictStatus.CRASH, 0, total, "too much output")
    if not outcome["answer"].startswith(secret):
        return Verdict(VerdictStatus.CRASH, 0, total, "ended without an answer")
    try:
        answers = json.loads(outcome["answer"].removeprefix(secret))
    except ValueError:
        return Verdict(VerdictStatus.CRASH, 0, total, "ended without an answer")
    if isinstance(answers, list) and answers[:1] == ["raised"]:  # the source itself raised
        return Verdict(VerdictStatus.CRASH, 0, total, str(answers[-1])[:80])
    if not isinstance(answers, list) or len(answers) != total:
        return Verdict(VerdictStatus.CRASH, 0, total, "not every test was run")

    right = [
        answer == ["value", repr(value)] for answer, value in zip(answers, expected, strict=True)
    ]
    if all(right):
        return Verdict(VerdictStatus.PASSED, total, total)
    raised = any(isinstance(answer, list) and answer[:1] == ["raised"] for answer in answers)
    first_wrong = right.index(False)
    return Verdict(
        VerdictStatus.CRASH if raised else VerdictStatus.WRONG,
        sum(right),
        total,
        f"test {first_wrong}: {str(answers[first_wrong])[:80]}",
    )


_LOCK = threading.Lock()


@cache
def _open_shared(floor: str, pid: int) -> Sandbox:
    sandbox = Sandbox(floor=floor)
    atexit.register(sandbox.close)
    return sandbox


def shared(floor: str = "no-namespaces") -> Sandbox:
    """Return the sandbox of this process, started on first use and closed at exit."""
    with _LOCK:
        return _open_shared(floor, os.getpid())  # a fork of this process gets its own workers
