"""Append records to the log of a run, one JSON object a line (no section in the paper)."""

import json
import os
from collections.abc import Callable
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, ClassVar


@dataclass(frozen=True, kw_only=True)
class Record:
    """A record of a log. Each kind is a dataclass that inherits from it and declares its fields."""

    kind: ClassVar[str]
    """Name of the kind; the field "kind" of the JSON object."""

    def values(self) -> dict[str, Any]:
        """Return the fields by name, without those that are None by default."""
        present = {}
        for field in fields(self):
            value = getattr(self, field.name)
            if value is None and field.default is None:
                continue
            present[field.name] = value
        return present


class Log:
    """An append-only JSON-lines log that can be cut back to a checkpoint.

    A run that is resumed repeats the steps since its last checkpoint. `position` is stored in the checkpoint and
    `cut` removes what came after it, so no step is in the log twice. watch(kind, values), if given, is called with
    every record after it is written (`minglm.common.trackers`).
    """

    def __init__(
        self, path: str | Path, watch: Callable[[str, dict[str, Any]], None] | None = None
    ) -> None:
        self.path = Path(path)
        self.watch = watch
        self.path.parent.mkdir(parents=True, exist_ok=True)
        end_of_last_line = self.path.read_bytes().rfind(b"\n") + 1 if self.path.exists() else 0
        self.file = open(self.path, "ab")
        self.cut(end_of_last_line)  # a line torn by a crash would swallow the next record

    def write(self, record: Record) -> None:
        """Append one record, `{"kind": kind, ...}`, and flush it."""
        values = record.values()
        line = json.dumps({"kind": record.kind, **values}, ensure_ascii=False)
        self.file.write(line.encode() + b"\n")
        self.file.flush()
        if self.watch is not None:
            self.watch(record.kind, values)

    @property
    def position(self) -> int:
        """Return the bytes written so far."""
        return self.file.tell()

    def cut(self, position: int) -> None:
        """Remove everything after `position` bytes; a shorter log stays as it is."""
        size = self.file.seek(0, os.SEEK_END)
        self.file.truncate(min(position, size))
        self.file.seek(0, os.SEEK_END)
