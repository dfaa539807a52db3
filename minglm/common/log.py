"""Append records to the log of a run, one JSON object a line (no section in the paper)."""

import json
import os
from pathlib import Path


class Log:
    """An append-only JSON-lines log that can be cut back to a checkpoint.

    A run that is resumed repeats the steps since its last checkpoint. `position` is stored in the checkpoint and
    `cut` removes what came after it, so no step stands twice in the log. watch(kind, values), if given, is called
    with every record after it is written (`minglm.common.trackers`).
    """

    def __init__(self, path, watch=None):
        self.path, self.watch = Path(path), watch
        self.path.parent.mkdir(parents=True, exist_ok=True)
        whole = self.path.read_bytes().rfind(b"\n") + 1 if self.path.exists() else 0
        self.file = open(self.path, "ab")
        self.cut(whole)  # a line torn by a crash would swallow the next record

    def write(self, kind, **values):
        """Append one record, `{"kind": kind, ...}`, and flush it."""
        self.file.write(json.dumps({"kind": kind, **values}, ensure_ascii=False).encode() + b"\n")
        self.file.flush()
        if self.watch is not None:
            self.watch(kind, values)

    @property
    def position(self):
        """Bytes written so far."""
        return self.file.tell()

    def cut(self, position):
        """Remove everything after `position` bytes; a shorter log stays as it is."""
        self.file.truncate(min(position, self.file.seek(0, os.SEEK_END)))
        self.file.seek(0, os.SEEK_END)
