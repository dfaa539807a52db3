"""Let Ray start the workers, on any machine of its cluster: the extra `ray` (paper 3.5: "scheduled through Ray").

A worker is an actor of the same class that a local process runs (`minglm.rl.worker`), whose event loop is
Ray's. Without a cluster (`ray start`, RAY_ADDRESS) Ray makes one of this machine.

Choices: a worker takes one CPU, and one GPU where the run has some. Weights travel by `file` or `broadcast`
between machines, because the memory of one is not that of another. An actor that does not answer for
`asynchronous.idle_seconds` is killed.
"""

import contextlib
import threading
import time
from typing import Any

from minglm.config.posttraining import AsynchronousConfig, WeightTransport
from minglm.rl.pool import Message, forgive, say_silent
from minglm.rl.worker import RolloutWorker, WorkerSetup, reason_of

POLL_SECONDS = 0.05
MOST_GROUPS = 10_000
"""Groups that a worker plays at once, at most."""


class RayPool:
    """Workers as actors of Ray. idle_seconds: silence after which one is killed.

    Raises ValueError, in one line, without the package or with a transport that cannot work.
    """

    def __init__(
        self,
        setup: WorkerSetup,
        workers: int,
        transport: WeightTransport,
        gpus: int = 0,
        idle_seconds: float = AsynchronousConfig.idle_seconds,
    ) -> None:
        try:
            import ray  # pyright: ignore[reportMissingImports]  # optional: the extra "ray"
        except ImportError as error:
            raise ValueError(
                f"asynchronous.scheduler = ray needs the package: pip install 'minglm[ray]' ({error})"
            ) from None
        self.ray: Any = ray
        self.setup = setup
        self.workers = workers
        self.idle_seconds = idle_seconds
        self.started = not ray.is_initialized()
        if self.started:
            ray.init(include_dashboard=False, log_to_driver=False)
        if transport == WeightTransport.SHARED_MEMORY and len(ray.nodes()) > 1:
            raise ValueError(
                "asynchronous.transport = shared_memory: Ray has several machines; use file or broadcast"
            )
        actor = ray.remote(RolloutWorker)
        self.actor: Any = actor.options(num_cpus=1, num_gpus=gpus, max_concurrency=MOST_GROUPS)
        self.actors: dict[int, Any] = {}
        self.calls: dict[Any, tuple[int, str, Any]] = {}
        """{reference: (worker, kind, value)} of what has not been answered."""
        self.last_heard: dict[int, float] = {}
        """`time.monotonic` of the last answer of each worker that Ray has found room for."""
        self.looked = time.monotonic()
        """The last look for silence."""
        self.sending = threading.Lock()
        self.woken = threading.Event()
        for worker in range(workers):
            self.restart(worker)

    @property
    def host(self) -> str:
        """The address of this machine in the cluster."""
        return self.ray.util.get_node_ip_address()

    def restart(self, worker: int) -> None:
        """Start a worker, or start it again."""
        with self.sending:
            self.actors[worker] = self.actor.remote(self.setup, worker)
        self.last_heard.pop(worker, None)
        self._listen(worker)

    def _listen(self, worker: int) -> None:
        with self.sending:
            self.calls[self.actors[worker].alive.remote()] = (worker, "alive", None)

    def send(self, worker: int, kind: str, value: Any) -> None:
        """Send a message; nothing happens where the worker has died, which `receive` will tell."""
        with self.sending:
            method = getattr(self.actors[worker], kind)
            self.calls[method.remote(value)] = (worker, kind, value)

    def receive(self) -> list[Message]:
        """Wait for messages, and return them; an empty list after `wake`."""
        messages: list[Message] = []
        while not messages and not self.woken.is_set():
            self._end_silent()
            with self.sending:
                calls = list(self.calls)
            ready, _ = self.ray.wait(calls, timeout=POLL_SECONDS)
            for reference in ready:
                with self.sending:
                    call = self.calls.pop(reference, None)
                if call is None:  # its worker has died, and that has been told
                    continue
                message = self._answer(reference, *call)
                self.last_heard[message.worker] = time.monotonic()
                if message.kind == "alive":
                    self._listen(message.worker)
                else:
                    messages.append(message)
        return messages

    def _end_silent(self) -> None:
        """Kill workers that have gone silent, whose calls then tell of their death."""
        self.looked = forgive(self.last_heard, self.looked)
        for worker, heard in list(self.last_heard.items()):
            if self.looked - heard <= self.idle_seconds:
                continue
            with self.sending:
                calls = [reference for reference, call in self.calls.items() if call[0] == worker]
            answered, _ = self.ray.wait(calls, timeout=0)
            if not answered:
                say_silent(worker, self.idle_seconds)
                self.last_heard.pop(worker)
                self.ray.kill(self.actors[worker])

    def _answer(self, reference: Any, worker: int, kind: str, value: Any) -> Message:
        """Return what a worker has answered, or how it died."""
        errors = self.ray.exceptions
        try:
            result = self.ray.get(reference)
        except errors.RayTaskError as error:
            cause = error.cause
            fetching = kind == "update" and isinstance(cause, ValueError | RuntimeError | OSError)
            return Message(worker, "stale" if fetching else "failed", reason_of(cause))
        except errors.RayError as error:
            with self.sending:
                self.calls = {r: call for r, call in self.calls.items() if call[0] != worker}
            return Message(worker, "died", str(error).splitlines()[0])
        if kind == "alive":
            return Message(worker, "alive", None)
        if kind == "update":
            return Message(worker, "updated", value.version)
        return Message(worker, "played", (value.key, result))

    def wake(self) -> None:
        """Let `receive` return, from another thread."""
        self.woken.set()

    def close(self) -> None:
        """End all workers, and Ray where this object started it."""
        for actor in self.actors.values():
            with contextlib.suppress(Exception):  # one that has died
                self.ray.kill(actor)
        if self.started:
            self.ray.shutdown()
