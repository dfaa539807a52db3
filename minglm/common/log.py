"""Append records to the log of a run, one JSON object a line (no section in the paper)."""

import json
import os
from collections.abc import Callable
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, ClassVar

from minglm.common.files import atomic_path, json_line


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

    A run that is resumed repeats the steps since its last checkpoint. `position` is stored in the checkpoint
    and `cut` removes what came after it, so no step is in the log twice. watch(kind, values), if given, is
    called with every record after it is written (`minglm.common.trackers`). writes: False for the ranks that
    leave the log to another one: `write` and `cut` do nothing then.
    """

    def __init__(
        self,
        path: str | Path,
        watch: Callable[[str, dict[str, Any]], None] | None = None,
        writes: bool = True,
    ) -> None:
        self.path = Path(path)
        self.watch = watch
        self.writes = writes
        if not writes:
            return
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.file = open(self.path, "ab")
        self.file.truncate(complete_bytes(self.path))  # a torn line would swallow the next record
        self.file.seek(0, os.SEEK_END)

    def write(self, record: Record) -> None:
        """Append one record, `{"kind": kind, ...}`, and flush it."""
        if not self.writes:
            return
        values = record.values()
        self.file.write(json_line({"kind": record.kind, **values}))
        self.file.flush()
        if self.watch is not None:
            self.watch(record.kind, values)

    @property
    def position(self) -> int:
        """Return the bytes written so far."""
        return self.file.tell() if self.writes else 0

    def cut(self, position: int) -> None:
        """Remove everything after `position` bytes.

        Raises ValueError, in one line, for a log that is shorter.
        """
        if not self.writes:
            return
        check_length(self.path, position)
        self.file.truncate(position)
        self.file.seek(0, os.SEEK_END)


def complete_bytes(path: Path) -> int:
    """Return the bytes of the complete lines of a log; 0 without one."""
    return path.read_bytes().rfind(b"\n") + 1 if path.is_file() else 0


def check_length(path: Path, position: int) -> None:
    """Refuse a log that has lost lines which it held when a checkpoint was written at this position."""
    size = complete_bytes(path)
    if size < position:
        raise ValueError(
            f"{path} has {size:,} bytes, but held {position:,} when the last checkpoint was written: "
            "restore it from a copy, or start again with another --out"
        )


def forget_stage(path: Path, position: int, stage: str, make_note: Callable[[int], Record]) -> None:
    """Replace the records of a stage that will be trained again by a note, make_note(number of records).

    The records of a stage are contiguous, from one of kind "stage_begin" to one of kind "stage_end". The note
    is as long as what it replaces, so the positions in the checkpoints of other stages stay right. position:
    bytes of the log that count; what comes after them is removed.
    """
    content = path.read_bytes()[:position] if path.exists() else b""
    note_kind = make_note(0).kind
    spans: list[tuple[bool, list[bytes]]] = []
    current = None  # the stage that has begun
    for number, line in enumerate(content.splitlines(keepends=True), 1):
        try:
            record = json.loads(line)
            kind = record["kind"]
        except (ValueError, TypeError, KeyError) as error:
            raise ValueError(
                f"{path}, line {number} is no record: {error}; restore the file"
            ) from error
        if kind == "stage_begin":
            current = record.get("stage")
        is_forgotten = kind != note_kind and record.get("stage", current) == stage
        if not spans or spans[-1][0] != is_forgotten:
            spans.append((is_forgotten, []))
        spans[-1][1].append(line)
        if kind == "stage_end":
            current = None
    if not any(is_forgotten for is_forgotten, _ in spans):
        return

    with atomic_path(path) as temporary, open(temporary, "wb") as file:
        for is_forgotten, lines in spans:
            text = b"".join(lines)
            if is_forgotten:
                note = make_note(len(lines))
                short = json.dumps({"kind": note.kind, **note.values()}, ensure_ascii=False)
                text = short.encode().ljust(len(text) - 1) + b"\n"
            file.write(text)
