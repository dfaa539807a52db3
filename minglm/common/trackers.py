"""Send the log's numbers to TensorBoard or Weights & Biases, for those who watch a run there (no section).

Reports and figures are made from the JSON-lines log alone. A tracker is called with the same records as they
are written, and passes on their numbers under STAGE/.../NAME, at the step of the record. Its packages are
optional: `pip install 'minglm[log]'`.

Simplified: what a resumed run does again is sent again, since the services cannot cut a log back. TensorBoard
shows it as a second line of the same stage, Weights & Biases as a second run.
"""

from collections.abc import Callable, Mapping
from enum import StrEnum
from pathlib import Path
from typing import Any


class Tracker(StrEnum):
    """Service that receives the numbers of the log, beside log.jsonl."""

    NONE = ""
    """None."""
    TENSORBOARD = "tensorboard"
    """TensorBoard, in RUN/watch."""
    WANDB = "wandb"
    """Weights & Biases."""


LABELS = ("stage", "source", "env", "thinking", "when")
"""Fields that say which of several records of a kind this is; they begin a number's name."""
NUMBER_LABELS = {"needle": ("length", "depth")}
"""Numbers that do the same, by kind of record; they come after the kind."""


def scalars(kind: str, record: Mapping[str, Any]) -> dict[str, float]:
    """Return the numbers of a record by name, STAGE/.../kind/.../name; a list gives one number for each element."""
    number_labels = NUMBER_LABELS.get(kind, ())
    labels = [*map(record.get, LABELS), kind, *map(record.get, number_labels)]
    path = "/".join(str(label) for label in labels if label is not None)

    numbers = {}
    for field, value in record.items():
        if field in LABELS or field in number_labels or field == "step":
            continue
        if isinstance(value, list):
            named = {f"{path}/{field}/{i}": element for i, element in enumerate(value)}
        else:
            named = {f"{path}/{field}": value}
        for name, element in named.items():
            if isinstance(element, int | float) and not isinstance(element, bool):
                numbers[name] = element
    return numbers


def writer(
    tracker: Tracker, folder: str | Path, config: Mapping[str, Any]
) -> Callable[[str, dict[str, Any]], None] | None:
    """Return a function (kind, record) that passes numbers on to a tracker, or None where there is none.

    folder: where TensorBoard's files go. config: the resolved config as plain values. Raises ValueError where
    the package is missing.
    """
    if tracker == Tracker.NONE:
        return None
    try:
        if tracker == Tracker.TENSORBOARD:
            send = _tensorboard(folder)
        else:
            send = _wandb(folder, config)
    except ImportError:
        raise ValueError(
            f"watch = {tracker.value!r} needs a package: pip install 'minglm[log]'"
        ) from None

    def write(kind: str, record: dict[str, Any]) -> None:
        numbers = scalars(kind, record)
        if numbers:
            send(numbers, record.get("step", 0))

    return write


Send = Callable[[dict[str, float], int], None]
"""A function (numbers by name, step)."""


def _tensorboard(folder: str | Path) -> Send:
    from torch.utils.tensorboard import SummaryWriter

    board = SummaryWriter(str(folder))

    def send(numbers: dict[str, float], step: int) -> None:
        for name, value in numbers.items():
            board.add_scalar(name, value, step)
        board.flush()

    return send


def _wandb(folder: str | Path, config: Mapping[str, Any]) -> Send:
    import wandb

    run = wandb.init(project="minglm", name=config["name"], dir=str(folder), config=dict(config))

    def send(numbers: dict[str, float], step: int) -> None:
        run.log(numbers | {"step": step})

    return send
