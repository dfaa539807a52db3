"""Checkpoints: a run that is killed at any moment goes on from the last one, bit for bit (no section in the paper).

A stage writes `checkpoints/STAGE/partial.pt` while it trains and `final.pt` when it is complete; a stage with a
`final.pt` is not run again. Each file is written beside its place and moved there, so a crash leaves the old or the new
one, never half of one. It holds model, optimizer, data cursor and counters. There is no random state to keep: data
order, sampling and initial values all come from counters and the run's seed.

The checkpoint before the last one stays beside it as `previous.pt`. The checksums inside a file are compared when it is
read; in place of a damaged `partial.pt` (a bit that a disk has turned) the run goes on, with a warning, from the
previous one, to the same result, because the steps since then are done again.

The position of the log is in the checkpoint too. What was logged after it is cut off when the run resumes, because
those steps will be done, and logged, again.
"""

import signal
import time
import warnings
import zipfile
from contextlib import contextmanager

import torch

from minglm.common.files import atomic_path


class Checkpoints:
    """The checkpoints of one stage under `folder`. `log` is the run's `minglm.common.device.Log`, or None."""

    def __init__(self, folder, log=None, seconds=60.0):
        self.partial, self.previous, self.final = (
            folder / f"{n}.pt" for n in ("partial", "previous", "final")
        )
        self.log, self.seconds, self.saved_at = log, seconds, time.monotonic()

    def load(self):
        """The state of an unfinished stage, or None; cuts the log back to it."""
        state = self.newest()
        if state is not None and self.log is not None:
            self.log.cut(state["log_position"])
        return state

    def newest(self):
        """The state last saved of an unfinished stage, or None; a damaged one is replaced by the one before it.

        Raises ValueError when there is none before it.
        """
        if self.partial.exists():
            try:
                return read(self.partial)
            except ValueError as error:
                if not self.previous.exists():
                    raise
                warnings.warn(f"{error}. Going on from the one before", stacklevel=2)
        elif not self.previous.exists():
            return None
        self.previous.replace(self.partial)
        return read(self.partial)

    def due(self):
        """Whether it is time for another partial checkpoint."""
        return time.monotonic() - self.saved_at >= self.seconds

    def save(self, state, final=False):
        """Write a dictionary of tensors and plain values. A final checkpoint replaces the partial one."""
        state["log_position"] = self.log.position if self.log is not None else 0
        with atomic_path(self.final if final else self.partial) as temporary:
            with open(temporary, "wb") as file:
                try:
                    torch.save(state, file)
                except RuntimeError as error:  # torch hides a full disk behind an error of its own
                    raise error.__context__ or error from None
            if not final and self.partial.exists():
                self.partial.replace(self.previous)
        if final:
            self.partial.unlink(missing_ok=True)
            self.previous.unlink(missing_ok=True)
        self.saved_at = time.monotonic()


def read(path):
    """The dictionary of a checkpoint file. Raises ValueError when it is missing or damaged."""
    if not path.exists():
        raise ValueError(f"no checkpoint at {path}; run the stage that makes it first")
    try:
        with zipfile.ZipFile(
            path
        ) as archive:  # torch.load does not compare the checksums that torch.save wrote
            if (part := archive.testzip()) is not None:
                raise ValueError(f"{part} is not what was written")
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged file raises almost anything
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise ValueError(
            f"cannot read checkpoint {path}: {reason}; delete it to repeat its stage"
        ) from error


class Interrupted(KeyboardInterrupt):
    """Ctrl-C, raised between two steps so that the state can be saved."""


@contextmanager
def stop_between_steps():
    """Within, Ctrl-C does not break a step: the yielded function raises `Interrupted` once a step is done."""
    asked = []
    try:
        previous = signal.signal(signal.SIGINT, lambda *_: asked.append(True))
    except ValueError:  # not the main thread: somebody else handles signals
        yield lambda: None
        return

    def check():
        if asked:
            raise Interrupted

    try:
        yield check
    finally:
        signal.signal(signal.SIGINT, previous)
