"""Read what the folder of a run says of itself: its config, and how far its log must reach (no section).

RUN/config.json    the hash and the values of the config
RUN/log.jsonl      as long as its newest checkpoint says, or longer
"""

from pathlib import Path
from typing import NamedTuple

from minglm.common.files import read_object
from minglm.common.log import check_length
from minglm.config import RunConfig
from minglm.config.run import from_dict
from minglm.train.checkpoint import CheckpointStore


class StoredRun(NamedTuple):
    """What RUN/config.json holds."""

    hash: str
    config: RunConfig


def stored_run(folder: Path) -> StoredRun:
    """Return the config of a run folder.

    Raises ValueError, in one line that names the file, where it is damaged.
    """
    path = folder / "config.json"
    values = read_object(path, "hash", "config")
    try:
        return StoredRun(str(values["hash"]), from_dict(values["config"]).check())
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def check_folder(out: Path, run: RunConfig) -> None:
    """Raise ValueError when `out` holds a run of another config."""
    path = out / "config.json"
    if not path.exists():
        return
    stored = str(read_object(path, "hash")["hash"])
    if stored != run.hash():
        raise ValueError(
            f"{out} holds a run of another config (hash {stored}, this one is {run.hash()}); choose another --out"
        )


def check_log(out: Path) -> int:
    """Return the position of the log that the newest checkpoint knows.

    Raises ValueError where the log is shorter.
    """
    position = CheckpointStore(out).log_position()
    check_length(out / "log.jsonl", position)
    return position
