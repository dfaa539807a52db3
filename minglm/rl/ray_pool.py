"""Let Ray start the workers, on any machine of its cluster: the extra `ray` (paper 3.5: "scheduled through Ray").

A worker is an actor of the same class that a local process runs (`minglm.rl.worker`), whose event loop is
Ray's. Without a cluster (`ray start`, RAY_ADDRESS) Ray makes one of this machine.

Choices: a worker takes one CPU, and one GPU where the run has some. Weights travel by `file` or `broadcast`
between machines, because the memory of one is not that of another.
"""

import contextlib
import threading
from typing import Any

from minglm.config.posttraining import WeightTransport
from minglm.rl.pool import Message
from minglm.rl.worker import RolloutWorker, WorkerSetup, reason_of

POLL_SECONDS = 0.05
MOST_GROUPS = 10_000
"""Groups that a worker plays at once, at most."""


class RayPool:
    """Workers as actors of Ray.

    Raises ValueError, in one line, without the package or with a transport that cannot work.
    """

    def __init__(
        self, setup: WorkerSetup, workers: int, transport: WeightTransport, gpus: int = 0
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

    def send(self, worker: int, kind: str, value: Any) -> None:
        """Send a message; nothing happens where the worker has died, which `receive` will tell."""
        with self.sending:
            method = getattr(self.actors[worker], kind)
            self.calls[method.remote(value)] = (worker, kind, value)

    def receive(self) -> list[Message]:
        """Wait for messages, and return them; an empty list after `wake`."""
        messages: list[Message] = []
        while not messages and not self.woken.is_set():
            with self.sending:
                calls = list(self.calls)
            if not calls:
                self.woken.wait(POLL_SECONDS)
                continue
            ready, _ = self.ray.wait(calls, timeout=POLL_SECONDS)
            for reference in ready:
                with self.sending:
                    call = self.calls.pop(reference, None)
                if call is not None:  # else its worker has died, and that has been told
                    messages.append(self._answer(reference, *call))
        return messages

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
