"""Write and read checkpoints, so that a run killed at any moment resumes bit for bit (no section in the paper).

    RUN/checkpoints/STAGE/partial.pt     the last state of a stage that is still training
    RUN/checkpoints/STAGE/previous.pt    the one before it
    RUN/checkpoints/STAGE/final.pt       the result of a complete stage, which is not run again

Each file is written under a temporary name and moved into place, so a crash leaves the old or the new file, never half
of one. It holds model, optimizer, data cursor and counters. There is no random state to keep: data order, sampling and
initial values all come from counters and the run's seed.

The checksums inside a file are compared when it is read. If `partial.pt` is damaged (a bit flipped on the disk), the
run resumes from `previous.pt`, with a warning. The result is the same, because the steps since then are repeated.

The position of the log is in the checkpoint too. What was logged after it is cut off when the run resumes, because
those steps will be done, and logged, again.

`CheckpointStore` alone knows this layout. Simplified: one file holds a whole state, so a checkpoint is for models that
one machine holds.
"""

import time
import warnings
import zipfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch

from minglm.common.files import atomic_path
from minglm.common.log import Log
from minglm.common.mistakes import shown

State = dict[str, Any]
"""The content of a checkpoint: tensors and plain values by name."""


class CheckpointStore:
    """The checkpoints of a run folder.

    log: the run's log, whose position is stored with each state; None without one. seconds: time between two partial
    checkpoints of a stage.
    """

    def __init__(self, run_dir: str | Path, log: Log | None = None, seconds: float = 60.0) -> None:
        self.folder = Path(run_dir) / "checkpoints"
        self.log = log
        self.seconds = seconds

    def stage(self, name: str) -> "StageCheckpoints":
        """Return the checkpoints of one stage, to train it."""
        return StageCheckpoints(self.folder / name, self.log, self.seconds)

    def is_complete(self, stage: str) -> bool:
        """Return whether a stage has its final checkpoint."""
        return self.stage(stage).final.exists()

    def is_interrupted(self, stage: str) -> bool:
        """Return whether a stage has begun and has a partial checkpoint."""
        return self.stage(stage).partial.exists()

    def complete(self, stages: Iterable[str]) -> list[str]:
        """Return the stages among these that are complete, in the order given."""
        return [stage for stage in stages if self.is_complete(stage)]

    def load(self, stage: str) -> State:
        """Return the final state of a stage. Raises ValueError when it is missing or damaged."""
        return read(self.stage(stage).final)

    def restore(self, stage: str, model: torch.nn.Module) -> State:
        """Give `model` the weights of a complete stage, and return its final state.

        Raises ValueError when they are missing, damaged, or those of another model.
        """
        state = self.load(stage)
        try:
            model.load_state_dict(state["model"])
        except (KeyError, RuntimeError, TypeError, AttributeError) as error:
            path = self.stage(stage).final
            reason = shown(" ".join(str(error).split()))
            raise ValueError(
                f"{path} does not hold the weights of this model ({reason}); delete it to repeat its stage"
            ) from error
        return state

    def save(self, stage: str, state: State) -> None:
        """Write the final state of a stage, which is then complete."""
        self.stage(stage).save(state, final=True)

    def log_position(self) -> int:
        """Return the furthest position of the log, in bytes, that any checkpoint knows; 0 without a checkpoint."""
        position = 0
        for folder in sorted(self.folder.glob("*")):
            checkpoints = self.stage(folder.name)
            if checkpoints.final.exists():
                position = max(position, read(checkpoints.final)["log_position"])
            partial = checkpoints.newest()
            if partial is not None:
                position = max(position, partial["log_position"])
        return position


class StageCheckpoints:
    """The checkpoints of one stage, in a folder of its own; made by `CheckpointStore.stage`."""

    def __init__(self, folder: Path, log: Log | None, seconds: float) -> None:
        self.partial = folder / "partial.pt"
        self.previous = folder / "previous.pt"
        self.final = folder / "final.pt"
        self.log = log
        self.seconds = seconds
        self.saved_at = time.monotonic()

    def load(self) -> State | None:
        """Return the state of an unfinished stage, or None, and cut the log back to it."""
        state = self.newest()
        if state is not None and self.log is not None:
            self.log.cut(state["log_position"])
        return state

    def newest(self) -> State | None:
        """Return the state last saved of an unfinished stage, or None; replace a damaged one by the one before it.

        Raises ValueError when the last one is damaged and there is none before it.
        """
        if self.partial.exists():
            try:
                return read(self.partial)
            except ValueError as error:
                if not self.previous.exists():
                    raise
                warnings.warn(f"{error}. Resuming from the one before", stacklevel=2)
        elif not self.previous.exists():
            return None
        self.previous.replace(self.partial)
        return read(self.partial)

    def due(self) -> bool:
        """Return whether it is time for another partial checkpoint."""
        return time.monotonic() - self.saved_at >= self.seconds

    def save(self, state: State, final: bool = False) -> None:
        """Write a state. A final checkpoint replaces the partial one and the one before it."""
        state["log_position"] = self.log.position if self.log is not None else 0
        with atomic_path(self.final if final else self.partial) as temporary:
            with open(temporary, "wb") as file:
                try:
                    torch.save(state, file)
                except RuntimeError as error:  # torch hides a full disk behind its own error
                    raise error.__context__ or error from None
            if not final and self.partial.exists():
                self.partial.replace(self.previous)
        if final:
            self.partial.unlink(missing_ok=True)
            self.previous.unlink(missing_ok=True)
        self.saved_at = time.monotonic()


def read(path: Path) -> State:
    """Return the state in a checkpoint file. Raises ValueError when it is missing or damaged."""
    if not path.exists():
        raise ValueError(f"no checkpoint at {path}; run the stage that makes it first")
    try:
        # torch.load does not compare the checksums that torch.save wrote.
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()
        if damaged is not None:
            raise ValueError(f"{damaged} is not what was written")
        state = torch.load(path, map_location="cpu", weights_only=True)
        if not isinstance(state, dict) or not isinstance(state.get("log_position"), int):
            raise ValueError("it holds no state of a stage")
        return state
    except Exception as error:  # a damaged file raises almost anything
        reason = shown((str(error) or type(error).__name__).splitlines()[0])
        raise ValueError(
            f"cannot read checkpoint {path}: {reason}; delete it to repeat its stage"
        ) from error
