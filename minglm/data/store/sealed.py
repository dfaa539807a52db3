"""JSON files that know when they were damaged: a value beside the checksum of its text (no section in the paper).

    {"value": ..., "crc32": checksum of the value as compact JSON with sorted keys}

A changed letter of a file of JSON often leaves valid JSON, with another number or another name in it. With
the checksum such a file is as good as none.
"""

import json
import zlib
from pathlib import Path
from typing import Any

from minglm.common.files import write_json


def _checksum(value: Any) -> int:
    text = json.dumps(value, sort_keys=True, separators=(",", ":"))
    return zlib.crc32(text.encode())


def write_sealed(path: Path, value: Any) -> None:
    """Write a JSON value and its checksum, atomically."""
    plain = json.loads(json.dumps(value))  # as it will be read
    write_json(path, {"value": plain, "crc32": _checksum(plain)})


def read_sealed(path: Path) -> Any:
    """Return the value of a sealed file, or None if the file is missing, torn or changed."""
    try:
        sealed = json.loads(path.read_text(encoding="utf-8"))
        value = sealed["value"]
        return value if sealed["crc32"] == _checksum(value) else None
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return None


def file_checksum(path: Path) -> int | None:
    """Return the CRC-32 of a file, or None if it cannot be read."""
    checksum = 0
    try:
        with open(path, "rb") as file:
            while block := file.read(2**20):
                checksum = zlib.crc32(block, checksum)
    except OSError:
        return None
    return checksum
