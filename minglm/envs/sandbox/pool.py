"""Judge functions written by a model in a sandbox: run hidden tests, report, leave nothing behind (paper 3.2, 3.5).

    Verdict.status = "passed" | "wrong" | "timeout" | "crash" | "infrastructure"

This is the outside of the sandbox; `jail.py` is the inside. Warm interpreters wait for requests and fork a
jailed child for each, so a judgement costs milliseconds. The child reads its job from a socket that only it
and this process use. The verdict is computed here, by comparing values as text:

- Exit codes and printed output count for nothing. An answer begins with a secret of its job and has one line per test.
- Expected values never leave this process; a candidate that reads all of its memory finds only the arguments,
  and nothing of another job.
- Values are plain types. Equality is Python's, and the types of numbers are those of the expected value
  (`values.py`): an int may stand for a float, True is not 1, and an object that claims to equal everything
  equals nothing. An expected value that cannot be compared, and an argument that cannot be sent, are errors
  of the task: ValueError, before it runs.
- What a candidate sends is cut at OUTPUT bytes and never parsed, so any answer is one verdict.
- Whole process groups die at the deadline, which grows with how slow the machine is at the moment.

The level of isolation has a name: `full` (namespaces and a system call filter), `no-namespaces` (only the
filter), `rlimits-only` (neither, for instance on macOS: enough against accidents, not against malice). A
sandbox refuses to start below its floor. A job whose interpreter dies is run once more, by a new one.
Infrastructure failures have a status of their own because they are not the model's fault.

Thousands of jobs may wait: what waits is what the caller has already, and is made ready when an interpreter is free.

Simplifications: pure functions only; nothing can be written or opened (`container.py` runs commands in
containers). The paper runs code in a sandbox too (3.2, 3.5) and does not describe it.
"""

import atexit
import contextlib
import io
import json
import os
import pickle
import queue
import secrets
import select
import socket
import struct
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
from typing import Any, NamedTuple, Self, TypedDict

from minglm.envs.sandbox.values import NOT_A_NUMBER, Encoded, encode, fits

Case = tuple[Sequence[Any], Any]
"""One test: the arguments and the expected value, all of Python's plain types."""

JAIL = Path(__file__).with_name("jail.py")

LEVELS = ("rlimits-only", "no-namespaces", "full")
"""Isolation, weakest first."""

GRACE = 10.0
"""Seconds beyond a job's deadline after which a silent worker counts as broken."""

OUTPUT = 2**20
"""Most bytes that a candidate may send back."""

READY = b"+"
"""The first byte from a candidate whose jail is closed."""

REQUEST = struct.Struct("d")
"""A request to a worker: the seconds of the job. The candidate's end of its socket comes with it."""


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


class Outcome(TypedDict):
    """What became of a job."""

    ready: bool
    """Whether the jail was closed; if not, the candidate did not run."""
    late: bool
    """Whether it ran out of time."""
    flood: bool
    """Whether it sent more than OUTPUT bytes."""
    answer: str
    """What it sent: the secret, then a line for each test. Nothing of it can be trusted."""


class Job(NamedTuple):
    """One candidate with its tests."""

    source: str
    function: str
    arguments: list[bytes]
    """A pickle for each test, so that tests share nothing."""
    expected: list[Any]
    """Stays in this process."""
    seconds: float


class WorkerError(Exception):
    """A worker died or did not answer in time."""


class Worker:
    """A warm interpreter that runs one job at a time; not thread-safe."""

    def __init__(self) -> None:
        # Some builds of Python need this variable to start.
        environment = {k: v for k, v in os.environ.items() if k == "LD_LIBRARY_PATH"}
        self.control, theirs = socket.socketpair()
        with theirs:
            self.process = subprocess.Popen(
                [sys.executable, "-I", "-S", str(JAIL), os.path.abspath(tempfile.gettempdir())],
                stdin=theirs.fileno(),
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                env=environment,
                start_new_session=True,
            )
        self.buffer = b""
        try:
            hello = None
            deadline = time.monotonic() + GRACE
            while hello is None:
                wait_for({self.control: select.POLLIN}, deadline)
                hello = self.receive()
            self.layers: tuple[str, ...] = tuple(hello["layers"])
            self.slowness: float = hello["slowness"]
        except (WorkerError, OSError, ValueError):
            self.close()
            raise

    def ask(self, job: bytes, seconds: float) -> Outcome:
        """Run a job, given as `jail.py` reads it, and return its Outcome. Raises WorkerError."""
        seconds *= self.slowness
        channel, theirs = socket.socketpair()
        with channel:
            channel.setblocking(False)
            with theirs:
                try:
                    socket.send_fds(self.control, [REQUEST.pack(seconds)], [theirs.fileno()])
                except OSError as error:
                    raise WorkerError(f"a sandbox worker is gone: {error}") from error
            return self.converse(channel, memoryview(job), time.monotonic() + seconds + GRACE)

    def converse(self, channel: socket.socket, unsent: memoryview, deadline: float) -> Outcome:
        """Send a job and read what comes back, until the worker reports that the candidate is dead."""
        received = bytearray()
        watched = {self.control: select.POLLIN, channel: select.POLLIN | select.POLLOUT}
        report = None
        while report is None:
            events = wait_for(watched, deadline)
            if events.get(channel, 0) & select.POLLOUT:
                unsent = send_some(channel, unsent)
                if not unsent:
                    watched[channel] = select.POLLIN
            elif channel in events and not read_some(channel, received):
                del watched[channel]  # the end, or too much; hang up, and wait for the report
                with contextlib.suppress(OSError):
                    channel.shutdown(socket.SHUT_RDWR)
            if self.control in events:
                report = self.receive()
        while channel in watched and read_some(channel, received):
            pass  # what it sent last
        flood = len(received) > OUTPUT
        silent = len(received) <= len(READY)
        return {
            "ready": received[:1] == READY,
            "late": not flood and (report["late"] or (silent and report["exhausted"])),
            "flood": flood,
            "answer": received[1:].decode("ascii", "replace"),
        }

    def receive(self) -> dict[str, Any] | None:
        """Read what the worker has sent; return it as soon as it is a whole line of JSON. Raises WorkerError."""
        chunk = self.control.recv(65536)
        if not chunk:
            raise WorkerError("a sandbox worker died")
        self.buffer += chunk
        if b"\n" not in self.buffer:
            return None
        line, self.buffer = self.buffer.split(b"\n", 1)
        return json.loads(line)

    def close(self) -> None:
        """End the interpreter; its children die with it."""
        self.process.kill()
        self.process.wait()
        self.control.close()


def wait_for(watched: dict[socket.socket, int], deadline: float) -> dict[socket.socket, int]:
    """Wait until something happens on a socket; return {socket: events}. Raises WorkerError at the deadline.

    `select.poll`, since `select.select` knows only the first 1,024 descriptors of a process.
    """
    poll = select.poll()
    by_number = {}
    for sock, events in watched.items():
        poll.register(sock, events)
        by_number[sock.fileno()] = sock
    found = poll.poll(1000 * max(0.0, deadline - time.monotonic()))
    if not found:
        raise WorkerError("a sandbox worker is silent")
    return {by_number[number]: events for number, events in found}


def send_some(channel: socket.socket, unsent: memoryview) -> memoryview:
    """Send as much as fits; return the rest.

    After the last byte, or when nobody reads, nothing more is sent.
    """
    try:
        unsent = unsent[channel.send(unsent) :]
        if not unsent:
            channel.shutdown(socket.SHUT_WR)
    except BlockingIOError:
        pass
    except OSError:
        return unsent[:0]  # the candidate is dead
    return unsent


def read_some(channel: socket.socket, received: bytearray) -> bool:
    """Append what has arrived; return False if nothing has, at the end, and after more than OUTPUT bytes."""
    try:
        chunk = channel.recv(65536)
    except OSError:
        return False
    received += chunk
    return bool(chunk) and len(received) <= OUTPUT


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
        self.threads = ThreadPoolExecutor(self.size, thread_name_prefix="sandbox")
        # Idle workers. None stands for one that is started when it is first needed.
        self.workers: queue.LifoQueue[Worker | None] = queue.LifoQueue()
        first = Worker()
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

        Arguments and errors are those of `judge`; the errors come with the future.
        """
        return self.threads.submit(self.judge, source, function, cases, seconds)

    def judge(
        self, source: str, function: str, cases: Sequence[Case], seconds: float = 2.0
    ) -> Verdict:
        """Return the Verdict of one candidate.

        Args:
            source: the program.
            function: name of the function in it that is called once for each case.
            cases: the tests; raises ValueError when there is none, or one that `check_cases` refuses.
            seconds: time for all cases, on a machine of nominal speed.
        """
        return self.run(prepare(source, function, cases, seconds))

    def run(self, job: Job) -> Verdict:
        """Return the Verdict of a prepared job."""
        verdict = self._run(job)
        if verdict.status == VerdictStatus.INFRASTRUCTURE:  # a new interpreter may do better
            verdict = self._run(job)
        return verdict

    def _run(self, job: Job) -> Verdict:
        """Run a job once."""
        secret = secrets.token_hex(16)
        message = {
            "source": job.source,
            "function": job.function,
            "arguments": job.arguments,
            "secret": secret,
        }
        worker = self.workers.get()
        try:
            worker = worker or Worker()
            outcome = worker.ask(pickle.dumps(message), job.seconds)
        except (WorkerError, OSError, ValueError, LookupError, TypeError) as error:
            if worker:
                worker.close()
            worker = None  # the next job starts a new one
            return Verdict(VerdictStatus.INFRASTRUCTURE, 0, len(job.expected), str(error))
        finally:
            self.workers.put(worker)
        return compare(outcome, secret, job.expected)

    def close(self) -> None:
        """End all workers and threads."""
        self.threads.shutdown(cancel_futures=True)
        while not self.workers.empty():
            worker = self.workers.get()
            if worker:
                worker.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def isolation_level(layers: Sequence[str]) -> str:
    """Return which of LEVELS the layers of a worker amount to."""
    if "seccomp" not in layers:
        return "rlimits-only"
    return "full" if "namespaces" in layers else "no-namespaces"


class PlainPickler(pickle.Pickler):
    """Writes values of Python's plain types, and refuses all others."""

    def reducer_override(self, value: Any) -> Any:
        """Refuse what has no notation of its own; of the plain types, that is only complex."""
        if type(value) is complex or value is complex:
            return NotImplemented  # as usual
        raise TypeError(f"{type(value).__name__} is not a plain type")


def prepare(source: str, function: str, cases: Sequence[Case], seconds: float) -> Job:
    """Return the Job of one candidate. Raises ValueError as `check_cases` does, and when there is no case."""
    if not cases:
        raise ValueError(f"no tests for {function!r}: a candidate would pass by doing nothing")
    check_cases(cases)
    expected = [value for _, value in cases]
    return Job(source, function, [dump(arguments) for arguments, _ in cases], expected, seconds)


def check_cases(cases: Sequence[Case]) -> None:
    """Check that every argument can be sent and every expected value compared, whatever the candidate.

    Call it where tests are made. Raises ValueError with the number of the case, the value and the remedy.
    """
    for i, (arguments, expected) in enumerate(cases):
        try:
            dump(arguments)
            equals_something = NOT_A_NUMBER not in encode(expected).types
        except (TypeError, RecursionError) as error:
            raise ValueError(
                f"test {i}, {short((arguments, expected))}: {error}; arguments and expected values consist of "
                "None, bool, int, float, complex, str, bytes, list, tuple, dict and set, nested less than 300 deep"
            ) from error
        if not equals_something:
            raise ValueError(
                f"test {i}: the expected value {short(expected)} contains a NaN, which equals nothing; "
                "let the function say so in another way, for example by None"
            )


def dump(arguments: Sequence[Any]) -> bytes:
    """Return the pickle of the arguments of one test. Raises TypeError for a value that is not plain."""
    stream = io.BytesIO()
    PlainPickler(stream).dump(list(arguments))
    return stream.getvalue()


def short(value: Any) -> str:
    """Return a value as at most 80 letters."""
    try:
        text = ascii(value)
    except (RecursionError, ValueError):  # nested too deeply; an int of more than 4,300 digits
        text = f"a {type(value).__name__}"
    return text if len(text) <= 80 else f"{text[:77]}..."


def compare(outcome: Outcome, secret: str, expected: Sequence[Any]) -> Verdict:
    """Return the Verdict of a job's outcome, which is read without trust."""
    total = len(expected)
    if not outcome["ready"]:
        return Verdict(VerdictStatus.INFRASTRUCTURE, 0, total, "the jail could not be closed")
    if outcome["late"]:
        return Verdict(VerdictStatus.TIMEOUT, 0, total, "out of time")
    if outcome["flood"]:
        return Verdict(VerdictStatus.CRASH, 0, total, "too much output")
    signature, *lines = outcome["answer"].split("\n", total + 1)
    if signature != secret:
        return Verdict(VerdictStatus.CRASH, 0, total, "ended without an answer")
    if lines and lines[0].startswith("failed "):
        return Verdict(VerdictStatus.CRASH, 0, total, short(lines[0].removeprefix("failed ")))
    if len(lines) != total:
        return Verdict(VerdictStatus.CRASH, 0, total, "not every test was run")

    right = [is_right(line, encode(value)) for line, value in zip(lines, expected, strict=True)]
    if all(right):
        return Verdict(VerdictStatus.PASSED, total, total)
    raised = any(line.startswith("raised ") for line in lines)
    first_wrong = right.index(False)
    return Verdict(
        VerdictStatus.CRASH if raised else VerdictStatus.WRONG,
        sum(right),
        total,
        f"test {first_wrong}: {short(lines[first_wrong])}",
    )


def is_right(line: str, expected: Encoded) -> bool:
    """Return whether a line of an answer, "value TYPES TEXT", tells the expected value."""
    kind, _, rest = line.partition(" ")
    types, _, text = rest.partition(" ")
    return kind == "value" and fits(Encoded(text, types), expected)


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
