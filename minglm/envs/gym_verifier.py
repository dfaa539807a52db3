"""Run the verifiers of reasoning-gym in a process of their own, which time and memory bound (paper 3.2).

    VERIFIER.credit(["coin_flip", {}, answer, entry])     a line of JSON  ->  process  ->  0.25

A verifier computes with what a model wrote, and some write out a number of any size: `Fraction("1e999999999")`
is a computation without end inside C, which nothing in Python interrupts. So both bounds are the system's: an
alarm ends the process after SECONDS, and it gets no more than MEMORY. The next answer starts a new process.

This file is both sides: `Verifier`, and, started as a program, the process.
"""

import atexit
import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
from typing import Any, TextIO

SECONDS = 5.0
"""For one answer, wall clock; a sound verifier takes less than a millisecond."""
MEMORY = 2**30
"""Bytes that verifiers may take beyond what the process has when it starts."""


class Verifier:
    """A process that scores answers, one at a time, started with the first one."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.process: subprocess.Popen[str] | None = None
        self.owner = 0
        atexit.register(self.close)

    def credit(self, request: list[Any]) -> float:
        """Return what a verifier gives for an answer, 0 for one that it cannot read.

        Raises RuntimeError where the process ended.

        request: generator, its options, the answer and the entry, as plain JSON values.
        """
        with self.lock:
            if self.process is None or self.owner != os.getpid():  # a fork may not share the pipes
                self.process = start()
                self.owner = os.getpid()
            process = self.process
            assert process.stdin and process.stdout
            try:
                process.stdin.write(json.dumps(request) + "\n")
                process.stdin.flush()
                said = process.stdout.readline()
            except BrokenPipeError:
                said = ""
            if said:
                return float(said)
            self.close()
        why = f"the verifier of {request[0]} ended with status {process.returncode}"
        if process.returncode == -signal.SIGALRM:
            why = f"the verifier of {request[0]} took more than {SECONDS:g} seconds for an answer"
        raise RuntimeError(why)

    def close(self) -> None:
        """End the process."""
        process, self.process = self.process, None
        if process is None or self.owner != os.getpid():
            return
        assert process.stdin and process.stdout
        process.stdout.close()
        with contextlib.suppress(BrokenPipeError):
            process.stdin.close()  # the process reads the end, and ends
        process.wait()


VERIFIER = Verifier()
"""That of this process."""


def start() -> "subprocess.Popen[str]":
    """Start this file as a program."""
    return subprocess.Popen(
        [sys.executable, "-P", __file__],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        encoding="ascii",
    )


def bound_memory() -> None:
    """Allow no more than MEMORY beyond what the process has."""
    if sys.platform != "linux":
        return
    import resource

    with open("/proc/self/statm", encoding="ascii") as file:
        pages = int(file.read().split()[0])
    most = pages * resource.getpagesize() + MEMORY
    resource.setrlimit(resource.RLIMIT_AS, (most, most))


def serve(requests: TextIO, replies: TextIO) -> None:
    """Score one answer a line, until there are no more."""
    from reasoning_gym.factory import create_dataset

    bound_memory()
    signal.signal(signal.SIGALRM, signal.SIG_DFL)  # ends the process
    verifiers: dict[str, Any] = {}
    for line in requests:
        generator, options, answer, entry = json.loads(line)
        name = json.dumps([generator, options])
        if name not in verifiers:
            verifiers[name] = create_dataset(generator, seed=0, size=1, **options)
        signal.setitimer(signal.ITIMER_REAL, SECONDS)
        try:
            credit = float(verifiers[name].score_answer(answer, entry))
        except Exception:  # it meets model-written text, and was sound on its own answer
            credit = 0.0
        signal.setitimer(signal.ITIMER_REAL, 0)
        print(credit, file=replies, flush=True)


if __name__ == "__main__":
    replies = sys.stdout
    sys.stdout = sys.stderr  # a verifier may print
    serve(sys.stdin, replies)
