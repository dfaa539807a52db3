"""Write and read checkpoints, so that a run killed at any moment resumes bit for bit (no section in the paper).

    RUN/checkpoints/STAGE/partial/     the last state of a stage that is still training
    RUN/checkpoints/STAGE/previous/    the one before it
    RUN/checkpoints/STAGE/final/       the result of a complete stage, which is not run again

Each is a folder (`minglm.train.checkpoint_files`), written under a temporary name and moved into place when
all ranks have written their parts. A crash leaves the old one or the new one, never half of one. It holds
model, optimizer, data cursor and counters. There is no random state to keep: data order, sampling and initial
values all come from counters and the run's seed.

Checksums are compared when a checkpoint is read. If `partial` is damaged (a bit flipped on the disk), the run
resumes from `previous`, with a warning. The result is the same, because the steps since then are repeated.

The position of the log is in the checkpoint too. What was logged after it is cut off when the run resumes,
because those steps will be done, and logged, again.

A checkpoint on the way is written in the background: the tensors are copied, and a thread writes the copies
while the training goes on. There is one such thread; the next checkpoint waits for it.

`CheckpointStore` alone knows this layout. A run of one process or of many, in any layout, resumes a run of any other.
"""

import time
import warnings
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import cached_property
from pathlib import Path

from minglm.common.files import remove
from minglm.common.log import Log
from minglm.common.mistakes import shown
from minglm.common.ranks import Ranks
from minglm.train.checkpoint_files import (
    State,
    StoredTensors,
    Tensors,
    read_tensors,
    read_values,
    reason_of,
    verify,
    write,
    write_parts,
)


class CheckpointStore:
    """The checkpoints of a run folder.

    log: the run's log, whose position is stored with each state; None without one, and on all ranks but the
    one that writes it. seconds: time between two partial checkpoints of a stage.
    """

    def __init__(self, run_dir: str | Path, log: Log | None = None, seconds: float = 60.0) -> None:
        self.folder = Path(run_dir) / "checkpoints"
        self.log = log
        self.seconds = seconds
        self.writer = Writer()

    def stage(self, name: str) -> "StageCheckpoints":
        """Return the checkpoints of one stage, to train it."""
        return StageCheckpoints(self.folder / name, self.log, self.seconds, self.writer)

    def is_complete(self, stage: str) -> bool:
        """Return whether a stage has its final checkpoint."""
        return existing(self.stage(stage).final) is not None

    def is_interrupted(self, stage: str) -> bool:
        """Return whether a stage has begun and has a partial checkpoint."""
        return self.stage(stage).newest() is not None

    def complete(self, stages: Iterable[str]) -> list[str]:
        """Return the stages among these that are complete, in the order given."""
        return [stage for stage in stages if self.is_complete(stage)]

    def restore(self, stage: str, tensors: Tensors) -> State:
        """Fill tensors, whole ones or shards, from the final checkpoint of a stage. Return its plain values.

        Raises ValueError when it is missing or damaged, or where the tensors are those of another model.
        """
        path = self._verified(stage)
        fill(path, tensors, self.writer.ranks)
        return read_values(path)

    def stored(self, stage: str) -> StoredTensors:
        """Return the weights of a complete stage, to read them one by one.

        Raises ValueError as `restore` does.
        """
        return StoredTensors(self._verified(stage))

    def _verified(self, stage: str) -> Path:
        """Return the final checkpoint of a stage, whose checksums are right."""
        path = existing(self.stage(stage).final)
        if path is None:
            missing = self.stage(stage).final
            raise ValueError(f"no checkpoint at {missing}; run the stage that makes it first")
        verify(path, self.writer.ranks)
        return path

    def save(self, stage: str, tensors: Tensors, values: State) -> None:
        """Write the final state of a stage, which is then complete."""
        self.stage(stage).save(tensors, values, final=True)

    def save_parts(self, stage: str, parts: Sequence[Callable[[], Tensors]], values: State) -> None:
        """Write the final state of a stage from whole tensors that are made a file at a time; ranks divide the files."""
        self.stage(stage).save_parts(parts, values)

    def log_position(self) -> int:
        """Return the furthest position of the log, in bytes, that any checkpoint knows; 0 without a checkpoint."""
        position = 0
        for folder in sorted(self.folder.glob("*")):
            stage = self.stage(folder.name)
            final = existing(stage.final)
            if final is not None:
                position = max(position, read_values(final)["log_position"])
            position = max(position, stage.log_position())
        return position


class StageCheckpoints:
    """The checkpoints of one stage, in a folder of its own; made by `CheckpointStore.stage`."""

    def __init__(self, folder: Path, log: Log | None, seconds: float, writer: "Writer") -> None:
        self.partial = folder / "partial"
        self.previous = folder / "previous"
        self.final = folder / "final"
        self.log = log
        self.seconds = seconds
        self.writer = writer
        self.saved_at = time.monotonic()

    def load(self, tensors: Tensors) -> State | None:
        """Fill tensors from the last checkpoint of an unfinished stage, and cut the log back to it.

        Returns the plain values, or None where there is no checkpoint.
        """
        values = self.read(tensors)
        if values is not None and self.log is not None:
            self.log.cut(values["log_position"])
        return values

    def read(self, tensors: Tensors) -> State | None:
        """Fill tensors from the last checkpoint of an unfinished stage.

        Return the plain values, or None without one.

        A damaged checkpoint is replaced by the one before it. Raises ValueError where there is none before it.
        """
        self.writer.wait()
        path = self.newest()
        if path is None:
            return None
        ranks = self.writer.ranks
        try:
            verify(path, ranks)
        except ValueError as error:
            previous = existing(self.previous)
            if path == previous or previous is None:
                raise
            warnings.warn(f"{error}. Resuming from the one before", stacklevel=2)
            ranks.first(lambda: remove(path))
            path = previous
            verify(path, ranks)
        fill(path, tensors, ranks)
        return read_values(path)

    def newest(self) -> Path | None:
        """Return the last checkpoint of an unfinished stage, or None."""
        return existing(self.partial) or existing(self.previous)

    def log_position(self) -> int:
        """Return the position of the log that the last checkpoint on the way knows; 0 without one."""
        path = self.newest()
        if path is None:
            return 0
        try:
            return read_values(path)["log_position"]
        except ValueError:
            previous = existing(self.previous)
            if path == previous or previous is None:
                raise
            return read_values(previous)["log_position"]  # `read` will take that one, and say so

    def due(self) -> bool:
        """Return whether it is time for another partial checkpoint.

        The clocks of ranks differ, so they must agree.
        """
        return time.monotonic() - self.saved_at >= self.seconds

    def save(
        self, tensors: Tensors, values: State, final: bool = False, background: bool = False
    ) -> None:
        """Write a state. A final checkpoint replaces the partial one and the one before it.

        background: return when the tensors are copied. Raises ValueError, in one line, where this checkpoint,
        or the last one in the background, cannot be written; the checkpoints before it are then as they were.
        """
        self.writer.wait()
        values = self._with_position(values)
        ranks = self.writer.ranks
        copies = {name: tensor.detach().to("cpu", copy=True) for name, tensor in tensors.items()}
        self.writer.start(
            lambda: self._write(lambda folder: write(folder, copies, values, ranks), final)
        )
        if not background:
            self.writer.wait()
        self.saved_at = time.monotonic()

    def save_parts(self, parts: Sequence[Callable[[], Tensors]], values: State) -> None:
        """Write a final checkpoint from whole tensors that are made a file at a time."""
        values = self._with_position(values)
        ranks = self.writer.ranks
        self._write(lambda folder: write_parts(folder, parts, values, ranks), final=True)

    def _with_position(self, values: State) -> State:
        position = self.log.position if self.log is not None else 0
        return {**values, "log_position": position}

    def _write(self, write_files: Callable[[Path], None], final: bool) -> None:
        """Write a checkpoint under a temporary name, and move it into place."""
        ranks = self.writer.ranks
        path = self.final if final else self.partial
        temporary = path.with_name(f".{path.name}.tmp")

        def prepare() -> None:
            remove(temporary)
            temporary.mkdir(parents=True)

        def move_into_place() -> None:
            if final:
                remove(existing(self.final))
                temporary.replace(self.final)
                remove(existing(self.partial))
                remove(existing(self.previous))
                return
            current = existing(self.partial)
            if current is not None:
                remove(existing(self.previous))
                current.replace(self.previous.with_suffix(current.suffix))
            temporary.replace(self.partial)

        try:
            ranks.first(prepare)
            write_files(temporary)
            ranks.first(move_into_place)
        except (OSError, ValueError) as error:
            reason = reason_of(error)
            raise ValueError(
                f"cannot write {path}: {reason}; free space or choose another --out"
            ) from error
        finally:
            if ranks.rank == 0:
                remove(temporary)


class Writer:
    """Writes one checkpoint at a time, in a thread; shared by the stages of a run.

    The ranks are asked for when the first checkpoint is written or read, which all of them do at the same time.
    """

    def __init__(self) -> None:
        self.pending: Future[None] | None = None

    @cached_property
    def ranks(self) -> Ranks:
        """Return the ranks that write together."""
        return Ranks.of_the_world()

    @cached_property
    def thread(self) -> ThreadPoolExecutor:
        """Return the thread, which the end of the process waits for."""
        return ThreadPoolExecutor(1, "checkpoint")

    def start(self, work: Callable[[], None]) -> None:
        """Start to write a checkpoint; the last one is written."""
        assert (
            self.ranks.size
        )  # made here, not in the thread: making a process group is a collective too
        self.pending = self.thread.submit(work)

    def wait(self) -> None:
        """Wait until the last checkpoint is written. Raises its error, once."""
        pending = self.pending
        self.pending = None
        if pending is not None:
            pending.result()


def existing(path: Path) -> Path | None:
    """Return a checkpoint by its name, which earlier runs ended in .pt; None where it is missing."""
    for candidate in (path, path.with_suffix(".pt")):
        if candidate.exists():
            return candidate
    return None


def fill(path: Path, tensors: Tensors, ranks: Ranks) -> None:
    """Fill tensors from a checkpoint.

    Raises ValueError, on all ranks, where they are those of another model.
    """
    try:
        read_tensors(path, tensors, ranks)
    except (ValueError, KeyError, RuntimeError) as error:
        raise ValueError(
            f"{path} does not hold the weights of this model ({shown(str(error))}); delete it to repeat its stage"
        ) from error
