"""One thread that steps the engine, and the way from and to an event loop (no section in the paper).

    event loop: Following(worker, job) -> engine.submit ...        worker thread: engine.step() -> events
                async for ... <- asyncio.Queue <- call_soon_threadsafe <-'

The event loop never waits for the model, and the engine never waits for a client. Open answers are counted: what goes
beyond the limit is refused with 429 at once, so a flood costs the waiting clients nothing. A pass that fails (out of
memory, say) fails the answers that were under way, and the thread goes on with the next request.
"""

import asyncio
import contextlib
import sys
import threading
import traceback

from minglm.serve.requests import Refused
from minglm.serve.stream import Answer


class Worker:
    """Owns an engine. `start` and `close` it; submit through `Following`."""

    def __init__(self, engine, most_open=320):
        self.engine, self.most_open = engine, most_open
        self.tickets, self.failures, self.closing = set(), 0, False
        self.thread = threading.Thread(target=self._run, name="engine", daemon=True)

    def start(self):
        """Begin to step."""
        self.thread.start()

    def close(self):
        """Stop after the pass that is under way."""
        self.closing = True
        self.thread.join(timeout=10)

    @property
    def open(self):
        """Answers that have not ended."""
        return len(self.tickets)

    def full(self):
        """The `Refused` for one request too many."""
        message = f"{self.open} answers are under way or waiting, as many as this server takes; try again later"
        return Refused(message, status=429, code="rate_limit_exceeded", kind="rate_limit_error")

    def submit(self, requests, hear):
        """Queue requests; hear(i, event) is called in the worker's thread. Returns their tickets. Raises `Refused`.

        Only the event loop's thread may call this, so counting and queueing are one step.
        """
        if self.open + len(requests) > self.most_open:
            raise self.full()
        tickets = [Ticket(self, i, hear) for i in range(len(requests))]
        try:
            for ticket, request in zip(tickets, requests, strict=True):
                self.tickets.add(ticket)
                ticket.number = self.engine.submit(request, ticket.on_event)
        except ValueError as error:
            for ticket in tickets:
                ticket.cancel()
            raise Refused(str(error)) from None
        return tickets

    def _run(self):
        while not self.closing:
            if not self.engine.wait(0.2):
                continue
            try:
                self.engine.step()
            except Exception:  # whatever it was, the next request deserves an answer; the engine has told those under way
                self.failures += 1
                print(
                    "minglm serve: a pass of the engine failed; the answers under way are lost",
                    file=sys.stderr,
                )
                traceback.print_exc()


class Ticket:
    """One request in the engine."""

    def __init__(self, worker, index, hear):
        self.worker, self.index, self.hear, self.number = worker, index, hear, None

    def on_event(self, event):
        """Called by the engine for each token."""
        if event.finish_reason is not None:
            self.worker.tickets.discard(self)
        self.hear(self.index, event)

    def cancel(self):
        """The answer is not wanted any more; nothing happens if it has ended."""
        self.worker.tickets.discard(self)
        if self.number is not None:
            self.worker.engine.cancel(self.number)


class Following:
    """The answers to a `Job` as they grow: an async iterator of (index, answer, deltas), one for each token.

    Queued as soon as it is made, which raises `Refused` where that is too much. Close it, whatever happens.
    """

    def __init__(self, worker, job, tokenizer):
        self.answers = [Answer(job, tokenizer) for _ in job.requests]
        self.left, self.queue, loop = len(self.answers), asyncio.Queue(), asyncio.get_running_loop()

        def hear(index, event):
            with contextlib.suppress(
                RuntimeError
            ):  # the loop has been closed: nobody listens any more
                loop.call_soon_threadsafe(self.queue.put_nowait, (index, event))

        self.tickets = worker.submit(job.requests, hear)

    def __aiter__(self):
        return self

    async def __anext__(self):
        while self.left:
            index, event = await self.queue.get()
            answer = self.answers[index]
            if answer.reason is not None:
                continue  # drawn before the engine heard that a stop string had come
            if event.finish_reason in ("error", "cancelled"):
                raise Refused(
                    "the engine failed while it was answering", status=500, kind="server_error"
                )
            deltas = answer.take(event)
            if answer.reason is not None:
                self.left -= 1
                self.tickets[index].cancel()
            return index, answer, deltas
        raise StopAsyncIteration

    def close(self):
        """Cancel what has not ended."""
        for ticket in self.tickets:
            ticket.cancel()
