"""Step the engine in a thread, and carry its tokens to an event loop (no section in the paper).

    event loop: TokenStream(thread, requests) -> engine.submit ...     engine thread: engine.step() -> events
                async for ... <- asyncio.Queue <- call_soon_threadsafe <-'

The event loop never waits for the model, and the engine never waits for a client. Open requests are counted:
a request beyond the limit raises `QueueFull` at once, so a flood costs the waiting clients nothing. A forward
pass that fails (out of memory, for example) fails the requests that were open, and the thread continues with
the next request.

Nothing here knows HTTP or text: `minglm.serve.stream` and `minglm.serve.errors` translate.
"""

import asyncio
import contextlib
import sys
import threading
import traceback
from collections.abc import Callable, Sequence
from typing import Protocol, Self

from minglm.inference.request import Event, FinishReason, Request

WAIT_SECONDS = 0.2  # how often an idle thread looks whether it should end
JOIN_SECONDS = 3  # a forward pass that takes longer is left behind when the process ends


class QueueFull(Exception):
    """As many requests are open as the server accepts."""


class EngineFailed(Exception):
    """A forward pass failed while the request was open."""


class Stopping(Exception):
    """The server is about to end."""

    def __init__(self) -> None:
        super().__init__("the server is stopping")


class SteppedEngine(Protocol):
    """The part of `minglm.inference.Engine` that the thread uses."""

    def submit(self, request: Request, on_event: Callable[[Event], None] | None = None) -> int:
        """Queue a request, and return its number."""
        ...

    def prepare(self, request: Request) -> None:
        """Do the slow part of `submit` ahead, in any thread."""
        ...

    def cancel(self, number: int) -> bool:
        """End a request at the next step."""
        ...

    def wait(self, timeout: float | None = None) -> bool:
        """Wait until a request is open; return whether one is."""
        ...

    def step(self) -> object:
        """Run one forward pass."""
        ...


class EngineThread:
    """Owns an engine. `start` and `close` it; submit requests through `TokenStream`."""

    def __init__(self, engine: SteppedEngine, max_open_requests: int = 320) -> None:
        self.engine = engine
        self.max_open_requests = max_open_requests
        self.pending: set[PendingRequest] = set()
        self.failures = 0  # forward passes that raised
        self.closing = False
        self.thread = threading.Thread(target=self._run, name="engine", daemon=True)

    def start(self) -> None:
        """Start the thread."""
        self.thread.start()

    def end_requests(self) -> None:
        """End the open requests with an event for each, and accept no more."""
        self.closing = True
        for one in list(self.pending):
            one.end()

    def close(self) -> None:
        """Stop after the current forward pass."""
        self.closing = True
        self.thread.join(timeout=JOIN_SECONDS)

    @property
    def alive(self) -> bool:
        """Return whether the thread is running."""
        return self.thread.is_alive()

    @property
    def open_requests(self) -> int:
        """Return how many requests have not ended."""
        return len(self.pending)

    def queue_full(self) -> QueueFull:
        """Return the exception for one request too many."""
        return QueueFull(
            f"{self.open_requests} requests are open, as many as this server accepts; try again later"
        )

    def submit(
        self, requests: Sequence[Request], on_event: Callable[[int, Event], None]
    ) -> list["PendingRequest"]:
        """Queue requests; on_event(index, event) is called in the engine's thread.

        Only the event loop's thread may call this, so that counting and queueing are one step. Raises
        `QueueFull`, or ValueError for a request that the engine cannot answer, or `Stopping`; then none of
        the requests is queued.
        """
        if self.closing:
            raise Stopping
        if self.open_requests + len(requests) > self.max_open_requests:
            raise self.queue_full()
        pending = [PendingRequest(self, index, on_event) for index in range(len(requests))]
        try:
            for one, request in zip(pending, requests, strict=True):
                self.pending.add(one)
                one.number = self.engine.submit(request, one.on_event)
        except ValueError:
            for one in pending:
                one.cancel()
            raise
        return pending

    def _run(self) -> None:
        while not self.closing:
            if not self.engine.wait(WAIT_SECONDS):
                continue
            try:
                self.engine.step()
            except Exception:
                # The engine has reported the failure to the open requests; the next request deserves an answer.
                self.failures += 1
                message = "minglm serve: a forward pass failed; the open requests are lost"
                print(message, file=sys.stderr)
                traceback.print_exc()


class PendingRequest:
    """One request in the engine. `number` is the engine's, None until it is queued."""

    def __init__(
        self, owner: EngineThread, index: int, listener: Callable[[int, Event], None]
    ) -> None:
        self.owner = owner
        self.index = index
        self.listener = listener
        self.number: int | None = None

    def on_event(self, event: Event) -> None:
        """Pass on an event of the engine. Called by the engine for each token."""
        if event.finish_reason is not None:
            self.owner.pending.discard(self)
        self.listener(self.index, event)

    def end(self) -> None:
        """Tell the listener that the request is cancelled, and take it out of the engine."""
        self.listener(
            self.index, Event(self.number or 0, None, finish_reason=FinishReason.CANCELLED)
        )
        self.cancel()

    def cancel(self) -> None:
        """Take the request out of the engine; do nothing if it has ended."""
        self.owner.pending.discard(self)
        if self.number is not None:
            self.owner.engine.cancel(self.number)


class TokenStream:
    """The tokens of several requests as they are sampled: an async iterator of (index, event).

    The requests are queued at once; raises what `EngineThread.submit` raises. Close the stream, whatever happens.
    """

    def __init__(self, engine_thread: EngineThread, requests: Sequence[Request]) -> None:
        self.queue: asyncio.Queue[tuple[int, Event]] = asyncio.Queue()
        self.unfinished = set(range(len(requests)))
        loop = asyncio.get_running_loop()

        def on_event(index: int, event: Event) -> None:
            # RuntimeError: the loop has been closed, nobody listens any more
            with contextlib.suppress(RuntimeError):
                loop.call_soon_threadsafe(self.queue.put_nowait, (index, event))

        self.pending = engine_thread.submit(requests, on_event)

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> tuple[int, Event]:
        while self.unfinished:
            index, event = await self.queue.get()
            if index not in self.unfinished:
                continue  # sampled before the engine saw the cancellation
            if event.finish_reason is FinishReason.CANCELLED:
                raise Stopping
            if event.finish_reason is FinishReason.ERROR:
                reason = f": {event.error}" if event.error else ""
                raise EngineFailed(f"the engine failed while it was answering{reason}")
            if event.finish_reason is not None:
                self.unfinished.discard(index)
            return index, event
        raise StopAsyncIteration

    def cancel(self, index: int) -> None:
        """End one request; its later events are dropped."""
        self.unfinished.discard(index)
        self.pending[index].cancel()

    def close(self) -> None:
        """Cancel the requests that have not ended."""
        for one in self.pending:
            one.cancel()
