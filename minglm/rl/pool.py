"""Start the processes that roll out, talk to them, and start them again when they die (paper 3.5).

    pool.send(worker, kind, value)        ->  the messages of `minglm.rl.worker`
    pool.receive()                        ->  [(worker, kind, value)], where kind "died" is the pool's own
    pool.restart(worker)

`LocalPool` starts processes of this machine. Ray (`minglm.rl.ray_pool`) starts the same workers on a cluster.

Choices: the processes are forked from a server that has imported PyTorch once, so a worker starts in a
fraction of a second, also again; it inherits nothing of the trainer, neither threads nor a GPU.
"""

import contextlib
import multiprocessing
import pickle
import threading
from collections.abc import Mapping
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from typing import Any, NamedTuple, Protocol

from minglm.rl.worker import WorkerSetup, run_worker

SECONDS_TO_END = 5.0
"""Most seconds that a worker gets to end by itself."""


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


class LocalPool:
    """Worker processes of this machine."""

    host = "127.0.0.1"
    """The trainer's address, as the workers reach it."""

    def __init__(self, setup: WorkerSetup, workers: int) -> None:
        self.setup = setup
        self.workers = workers
        self.context = multiprocessing.get_context("forkserver")
        self.context.set_forkserver_preload(["minglm.rl.worker"])
        self.processes: dict[int, BaseProcess] = {}
        self.connections: dict[int, Connection] = {}
        self.sending = threading.Lock()
        self.bell, self.button = multiprocessing.Pipe(duplex=False)
        for worker in range(workers):
            self.restart(worker)

    def restart(self, worker: int) -> None:
        """Start a worker, or start it again."""
        ours, theirs = self.context.Pipe()
        arguments = (theirs, self.setup, worker)
        process = self.context.Process(target=run_worker, args=arguments, name=f"rollout {worker}")
        process.start()
        theirs.close()
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
            messages.append(Message(worker, kind, value))
        return messages

    def _end(self, worker: int) -> str:
        """Reap a process whose connection is closed. Return how it ended."""
        self.connections.pop(worker).close()
        process = self.processes.pop(worker)
        process.join(SECONDS_TO_END)
        if process.is_alive():
            process.kill()
            process.join()
        return f"process {process.pid} ended with status {process.exitcode}"

    def wake(self) -> None:
        """Let `receive` return, from another thread."""
        self.button.send_bytes(b"")

    def close(self) -> None:
        """End all workers: they stop when their connection closes."""
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
