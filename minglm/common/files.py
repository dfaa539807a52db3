"""Read and write files so that a crash loses nothing: atomic replacement, JSON, JSON lines (no section in the paper)."""

import contextlib
import json
import os
from pathlib import Path


@contextlib.contextmanager
def atomic_path(path):
    """Yield a temporary path beside `path`; on success it replaces `path`, on any error it is removed."""
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield temporary
        with open(temporary, "rb") as written:
            os.fsync(written.fileno())
        os.replace(temporary, path)
    except OSError as error:
        raise ValueError(
            f"cannot write {path}: {error.strerror or error}; free space or choose another --out"
        ) from error
    finally:
        with contextlib.suppress(OSError):  # not there, nor its folder
            temporary.unlink()


def write_json(path, value):
    """Write `value` as indented JSON, atomically."""
    with atomic_path(path) as temporary:
        temporary.write_text(
            json.dumps(value, indent=1, ensure_ascii=False) + "\n", encoding="utf-8"
        )


def read_jsonl(path):
    """All complete records of a JSON-lines file, in order; a last line torn by a crash is left out."""
    if not Path(path).exists():
        return []
    records = []
    for line in (
        Path(path).read_bytes().split(b"\n")
    ):  # splitlines would also split at U+2028 inside a text
        with contextlib.suppress(ValueError):  # torn inside a number, a string, or a character
            records.append(json.loads(line))
    return records
