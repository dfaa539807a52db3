"""A sandbox for functions written by a model: run hidden tests, tell what happened, leave nothing behind.

    Verdict.status = "passed" | "wrong" | "timeout" | "crash" | "infrastructure"

The outside of the sandbox (`jail.py` is the inside). Warm interpreters wait for jobs and fork a jailed child for each,
so a judgement costs milliseconds. The verdict is computed here, by comparing values as text:

- Exit codes and printed output count for nothing. An answer begins with a secret of its job and has one value per test.
- Expected values never leave this process; a candidate that reads all of its memory finds the questions only.
- Values are plain types, checked by exact type and compared as `repr`: an object that says it equals everything is not
  equal to anything, and True is not 1.
- Whole process groups die at the deadline, which grows with how slow the machine is at the moment.

The isolation found is named: `full` (namespaces and a system call filter), `no-namespaces` (the filter alone),
`rlimits-only` (neither, for instance on macOS: enough against accidents, not against malice). A sandbox refuses to
start below its floor. Infrastructure failures are told apart because they are not the model's fault.

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
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache
from pathlib import Path

JAIL = Path(__file__).with_name("jail.py")

LEVELS = ("rlimits-only", "no-namespaces", "full")
"""Isolation, weakest first."""

GRACE = 10.0
"""Seconds beyond a job's deadline after which a silent worker counts as broken."""


@dataclass(frozen=True)
class Verdict:
    """What came of one candidate."""

    status: str
    """passed, wrong (a value differs), timeout, crash (an exception, a signal, no answer) or infrastructure."""
    passed: int
    """Tests with the expected value."""
    total: int
    """Tests."""
    detail: str = ""
    """One line on the first failure."""


class WorkerError(Exception):
    """A worker died or fell silent."""


class Worker:
    """One warm interpreter. Not thread-safe: one job at a time."""

    def __init__(self, folder):
        environment = {
            k: v for k, v in os.environ.items() if k == "LD_LIBRARY_PATH"
        }  # some builds of Python need it
        self.process = subprocess.Popen(
            [sys.executable, "-I", "-S", str(JAIL)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            cwd=folder,
            env=environment,
            start_new_session=True,
        )
        self.buffer = b""
        try:
            hello = self.receive(GRACE)
        except (WorkerError, ValueError):
            self.close()
            raise
        self.layers, self.slowness = tuple(hello["layers"]), hello["slowness"]

    def ask(self, job):
        """Send a job, and wait for its outcome. Raises WorkerError."""
        job = job | {"seconds": job["seconds"] * self.slowness}
        try:
            self.process.stdin.write(json.dumps(job).encode() + b"\n")
            self.process.stdin.flush()
        except OSError as error:
            raise WorkerError(f"a sandbox worker is gone: {error}") from error
        return self.receive(job["seconds"] + GRACE)

    def receive(self, seconds):
        """The next line as JSON. Raises WorkerError at the end of the stream, after `seconds`, and for garbage."""
        deadline = time.monotonic() + seconds
        while b"\n" not in self.buffer:
            ready = select.select(
                [self.process.stdout], [], [], max(0.0, deadline - time.monotonic())
            )[0]
            chunk = os.read(self.process.stdout.fileno(), 65536) if ready else b""
            if not chunk:
                raise WorkerError(
                    "a sandbox worker died" if ready else "a sandbox worker is silent"
                )
            self.buffer += chunk
        line, self.buffer = self.buffer.split(b"\n", 1)
        return json.loads(line)

    def close(self):
        """End the interpreter; its children die with it."""
        self.process.kill()
        self.process.wait()
        self.process.stdout.close()
        with contextlib.suppress(OSError):  # part of a job may still be in the buffer
            self.process.stdin.close()


class Sandbox:
    """A pool of workers. Use it as a context manager, or call `close`.

    workers: interpreters, by default one per core this process may use. floor: the weakest of LEVELS to accept.
    Raises ValueError below the floor and where processes cannot fork.
    """

    def __init__(self, workers=None, floor="no-namespaces"):
        if floor not in LEVELS:
            raise ValueError(f"floor = {floor!r}: must be one of {', '.join(LEVELS)}")
        if not hasattr(os, "fork"):
            raise ValueError(
                "the sandbox needs a POSIX system; run minglm under Linux, or in WSL on Windows"
            )
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
        self.folder = tempfile.TemporaryDirectory(prefix="minglm-sandbox-")
        self.size = workers or cores
        self.workers = queue.LifoQueue()
        first = Worker(self.folder.name)
        self.layers = first.layers
        self.level = LEVELS[
            ("seccomp" in self.layers) + ({"seccomp", "namespaces"} <= set(self.layers))
        ]
        self.workers.put(first)
        for _ in range(self.size - 1):
            self.workers.put(None)  # started when it is first needed
        if LEVELS.index(self.level) < LEVELS.index(floor):
            self.close()
            raise ValueError(
                f"sandbox isolation here is {self.level!r}, below the floor {floor!r}: "
                "allow seccomp and user namespaces, or accept the risk with floor='rlimits-only'"
            )

    def judge(self, candidates, seconds=2.0):
        """One Verdict per candidate (source, function name, cases), in order; a case is (arguments, expected).

        Arguments are JSON values, expected values plain Python ones. seconds: time for all cases of one candidate, on
        a machine of nominal speed. At most `workers` candidates run at a time.
        """
        with ThreadPoolExecutor(self.size) as threads:
            return list(threads.map(lambda c: self.judge_one(*c, seconds), candidates))

    def judge_one(self, source, function, cases, seconds=2.0):
        """The Verdict of one candidate."""
        cases = list(cases)
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
            return Verdict("infrastructure", 0, len(cases), str(error))
        finally:
            self.workers.put(worker)
        return compare(outcome, job["secret"], [expected for _, expected in cases])

    def close(self):
        """End all workers and remove the folder."""
        while not self.workers.empty():
            worker = self.workers.get()
            if worker:
                worker.close()
        self.folder.cleanup()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()


def compare(outcome, secret, expected):
    """The Verdict of a worker's outcome, {"ready", "late", "flood", "answer"}."""
    total = len(expected)
    if not outcome["ready"]:
        return Verdict("infrastructure", 0, total, "the jail could not be closed")
    if outcome["late"]:
        return Verdict("timeout", 0, total, "out of time")
    if outcome["flood"]:
        return Verdict("crash", 0, total, "too much output")
    if not outcome["answer"].startswith(secret):
        return Verdict("crash", 0, total, "ended without an answer")
    try:
        answers = json.loads(outcome["answer"].removeprefix(secret))
    except ValueError:
        return Verdict("crash", 0, total, "ended without an answer")
    if isinstance(answers, list) and answers[:1] == ["raised"]:
        return Verdict("crash", 0, total, str(answers[-1])[:80])
    if not isinstance(answers, list) or len(answers) != total:
        return Verdict("crash", 0, total, "not every test was run")
    right = [answer == ["value", repr(value)] for answer, value in zip(answers, expected)]
    if all(right):
        return Verdict("passed", total, total)
    raised = [answer for answer in answers if isinstance(answer, list) and answer[:1] == ["raised"]]
    first = answers[right.index(False)]
    detail = f"test {right.index(False)}: {str(first)[:80]}"
    return Verdict("crash" if raised else "wrong", sum(right), total, detail)


_LOCK = threading.Lock()


@cache
def _open_shared(floor, pid):
    sandbox = Sandbox(floor=floor)
    atexit.register(sandbox.close)
    return sandbox


def shared(floor="no-namespaces"):
    """The sandbox of this process, started on first use and closed at exit."""
    with _LOCK:
        return _open_shared(floor, os.getpid())  # a fork of this process gets workers of its own


def run_function_tests(source, function, cases, seconds=2.0):
    """Judge one candidate in the shared sandbox. cases: [(arguments, expected)]; returns a Verdict."""
    return shared().judge_one(source, function, cases, seconds)
