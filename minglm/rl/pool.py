"""Start the processes that roll out, talk to them, and start them again when they die (paper 3.5).

    pool.send(worker, kind, value)        ->  the messages of `minglm.rl.worker`
    pool.receive()                        ->  [(worker, kind, value)], where kind "died" is the pool's own
    pool.restart(worker)

`LocalPool` starts processes of this machine. Ray (`minglm.rl.ray_pool`) starts the same workers on a cluster.

Choices
- A worker that hangs dies too: one that has said nothing for `asynchronous.idle_seconds` is killed. A thread of its own looks
  for it, because a trainer that sends to such a worker waits until the worker is gone.
- The processes are forked from a server that has imported PyTorch once, so a worker starts in a fraction of a
  second, also again; it inherits nothing of the trainer, neither threads nor a GPU.
"""

import contextlib
import math
import multiprocessing
import pickle
import sys
import threading
import time
from collections.abc import Mapping
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from typing import Any, NamedTuple, Protocol

from minglm.config.posttraining import AsynchronousConfig
from minglm.rl.worker import WorkerSetup, run_worker

SECONDS_TO_END = 5.0
"""Most seconds that a worker gets to end by itself."""
LOOK_SECONDS = 1.0
"""Most seconds between two looks for silence."""


class Message(NamedTuple):
    """What a worker says, or with kind "died" what became of it."""

    worker: int
    kind: str
    value: Any


class Pool(Protocol):
    """Processes that roll out, numbered from 0."""

    workers: int

    def send(self, worker: int, kind: str, value: Any) -> None:
        """Send a message; nothing happens where the worker has died, which `receive` will tell."""
        ...

    def receive(self) -> list[Message]:
        """Wait for messages, and return them; an empty list after `wake`."""
        ...

    def restart(self, worker: int) -> None:
        """Start a worker that has died again; it has no weights."""
        ...

    def wake(self) -> None:
        """Let `receive` return, from another thread."""
        ...

    def close(self) -> None:
        """End all workers."""
        ...


def say_silent(worker: int, seconds: float) -> None:
    """Say that a worker is killed because it hangs."""
    print(
        f"minglm: rollout worker {worker} was silent for {seconds:g} s: it is started again, and its groups are played "
        "again; raise asynchronous.idle_seconds if a step of the engine takes this long",
        file=sys.stderr,
        flush=True,
    )


def forgive(last_heard: dict[int, float], looked: float) -> float:
    """Leave out of every silence the time since the last look, at `looked`, that this process did not run. Return the time.

    Ctrl-Z stops the workers with their trainer: whoever looks first when all go on must not take them for hanging.
    """
    now = time.monotonic()
    stopped = max(0.0, now - looked - LOOK_SECONDS)
    for worker, heard in list(last_heard.items()):
        if heard < now:
            last_heard[worker] = min(heard + stopped, now)
    return now


class LocalPool:
    """Worker processes of this machine.

    idle_seconds: silence after which one is killed.
    """

    host = "127.0.0.1"
    """The trainer's address, as the workers reach it."""

    def __init__(
        self,
        setup: WorkerSetup,
        workers: int,
        idle_seconds: float = AsynchronousConfig.idle_seconds,
    ) -> None:
        self.setup = setup
        self.workers = workers
        self.idle_seconds = idle_seconds
        self.context = multiprocessing.get_context("forkserver")
        self.context.set_forkserver_preload(["minglm.rl.worker"])
        self.processes: dict[int, BaseProcess] = {}
        self.connections: dict[int, Connection] = {}
        self.last_heard: dict[int, float] = {}
        """`time.monotonic` of the last message of each worker; infinite for one that was killed."""
        self.sending = threading.Lock()
        self.closing = threading.Event()
        self.bell, self.button = multiprocessing.Pipe(duplex=False)
        for worker in range(workers):
            self.restart(worker)
        threading.Thread(target=self._watch, name="silence", daemon=True).start()

    def restart(self, worker: int) -> None:
        """Start a worker, or start it again."""
        ours, theirs = self.context.Pipe()
        arguments = (theirs, self.setup, worker)
        process = self.context.Process(target=run_worker, args=arguments, name=f"rollout {worker}")
        process.start()
        theirs.close()
        self.last_heard[worker] = time.monotonic()
        self.processes[worker] = process
        self.connections[worker] = ours

    def send(self, worker: int, kind: str, value: Any) -> None:
        """Send a message; nothing happens where the worker has died, which `receive` will tell."""
        with self.sending, contextlib.suppress(OSError, KeyError):
            self.connections[worker].send_bytes(pickle.dumps((kind, value)))

    def receive(self) -> list[Message]:
        """Wait for messages, and return them; an empty list after `wake`."""
        numbers: Mapping[Any, int] = {c: worker for worker, c in self.connections.items()}
        messages = []
        for ready in wait([*numbers, self.bell]):
            if ready is self.bell:
                self.bell.recv_bytes()
                continue
            worker = numbers[ready]
            try:
                kind, value = pickle.loads(self.connections[worker].recv_bytes())
            except (EOFError, OSError):
                kind, value = "died", self._end(worker)
            else:
                self.last_heard[worker] = time.monotonic()
            if kind != "alive":
                messages.append(Message(worker, kind, value))
        return messages

    def _watch(self) -> None:
        """Kill workers that have gone silent, until the end; `receive` tells of their death."""
        looked = time.monotonic()
        while not self.closing.wait(min(LOOK_SECONDS, self.idle_seconds / 4)):
            looked = forgive(self.last_heard, looked)
            for worker, process in list(self.processes.items()):
                silent = looked - self.last_heard[worker] > self.idle_seconds
                if silent and not self._has_spoken(worker):
                    say_silent(worker, self.idle_seconds)
                    self.last_heard[worker] = math.inf
                    process.kill()

    def _has_spoken(self, worker: int) -> bool:
        """Return whether a worker's message or death has not been received yet."""
        try:
            return self.connections[worker].poll()
        except (OSError, KeyError):
            return True

    def _end(self, worker: int) -> str:
        """Reap a process whose connection is closed. Return how it ended."""
        self.connections.pop(worker).close()
        process = self.processes.pop(worker)
        process.join(SECONDS_TO_END)
        if process.is_alive():
            process.kill()
            process.join()
        if self.last_heard[worker] == math.inf:
            return f"it was silent for {self.idle_seconds:g} s"
        return f"process {process.pid} ended with status {process.exitcode}"

    def wake(self) -> None:
        """Let `receive` return, from another thread."""
        self.button.send_bytes(b"")

    def close(self) -> None:
        """End all workers: they stop when their connection closes."""
        self.closing.set()
        for connection in self.connections.values():
            connection.close()
        for process in self.processes.values():
            process.join(SECONDS_TO_END)
            if process.is_alive():
                process.kill()
                process.join()
        self.bell.close()
        self.button.close()
        self.connections = {}
        self.processes = {}
