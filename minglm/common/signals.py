"""Stop on a signal as on Ctrl-C: SIGTERM and SIGHUP too, and between steps where there are any (no section).

SIGINT, SIGTERM, SIGHUP  ->  Stopped, a KeyboardInterrupt that knows its signal  ->  exit status 128 + signal
"""

import contextlib
import signal
from collections.abc import Callable, Iterator
from types import FrameType

SIGNALS = tuple(
    getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)
)
"""The signals that ask a process to end; Windows has no SIGHUP."""


class Stopped(KeyboardInterrupt):
    """The process was asked to end."""

    def __init__(self, number: int = signal.SIGINT) -> None:
        super().__init__(number)
        self.number = number

    @property
    def status(self) -> int:
        """Return the exit status that shells expect."""
        return 128 + self.number


Handler = Callable[[int, FrameType | None], None]


@contextlib.contextmanager
def handled(handler: Handler) -> Iterator[None]:
    """Handle the signals that ask to end, and afterwards as before.

    Only the main thread can; others handle nothing.

    A signal that is ignored stays so: nohup ignores SIGHUP.
    """
    before = {}
    try:
        for number in SIGNALS:
            if signal.getsignal(number) != signal.SIG_IGN:
                before[number] = signal.signal(number, handler)
    except ValueError:  # not the main thread
        yield
        return
    try:
        yield
    finally:
        for number, previous in before.items():
            # None: a handler that was not installed from Python
            signal.signal(number, signal.SIG_DFL if previous is None else previous)


@contextlib.contextmanager
def stoppable() -> Iterator[list[int]]:
    """Raise `Stopped` wherever the process is; yield the list of signals received.

    The list tells an interrupt even where a library turned it into another error, as imports of C modules do.
    """
    received: list[int] = []

    def stop(number: int, frame: FrameType | None) -> None:
        received.append(number)
        raise Stopped(number)

    with handled(stop):
        yield received


def _alone(number: int) -> int:
    """Return the signal of a process that asks nobody else."""
    return number


@contextlib.contextmanager
def stop_between_steps(agree: Callable[[int], int] = _alone) -> Iterator[Callable[[], None]]:
    """Hold back a request to end during a step: the yielded function raises `Stopped` if there was one since.

    agree: makes the signal that one of many processes got known to all, so that they stop after the same step.
    """
    received: list[int] = []
    with handled(lambda number, frame: received.append(number)):

        def check() -> None:
            number = agree(received[0] if received else 0)
            if number:
                raise Stopped(number)

        yield check
