"""Read and write files so that a crash loses nothing: atomic files and folders, JSON (lines) (no section in the paper)."""

import contextlib
import glob
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any


@contextlib.contextmanager
def atomic_path(path: str | Path) -> Iterator[Path]:
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
        with contextlib.suppress(OSError):  # already moved, or its folder does not exist
            temporary.unlink()


def refuse_used(folder: str | Path) -> None:
    """Raise ValueError for a folder that holds something, or a path that is not a folder."""
    folder = Path(folder)
    if folder.is_symlink() or (folder.exists() and not folder.is_dir()):
        raise ValueError(f"{folder} exists and is not a folder; choose another one")
    if folder.exists() and any(folder.iterdir()):
        raise ValueError(f"{folder} already holds files; choose another folder")
    if os.path.ismount(folder):
        raise ValueError(f"{folder} is where a disk begins; choose a folder in it")


@contextlib.contextmanager
def new_folder(folder: str | Path) -> Iterator[Path]:
    """Yield a temporary folder beside `folder`, which takes its name on success and is removed on any error.

    What a killed process left there is removed first. Raises ValueError for a folder that already holds something.
    """
    refuse_used(folder)
    final = Path(os.path.abspath(folder))
    temporary = final.with_name(f".{final.name}.{os.getpid()}.tmp")
    try:
        for abandoned in final.parent.glob(f".{glob.escape(final.name)}.*.tmp"):
            if abandoned.is_dir() and not _is_alive(abandoned.name.split(".")[-2]):
                shutil.rmtree(abandoned, ignore_errors=True)
        temporary.mkdir(parents=True)
        yield temporary
        os.replace(temporary, final)  # onto an empty folder, or none
    except OSError as error:
        raise ValueError(
            f"cannot write {folder}: {error.strerror or error}; free space or choose another folder"
        ) from error
    except ValueError as error:
        raise ValueError(str(error).replace(str(temporary), str(folder))) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _is_alive(pid: str) -> bool:
    """Return True for the number of a running process."""
    try:
        os.kill(int(pid), 0)
    except ProcessLookupError:
        return False
    except (ValueError, OverflowError, OSError):
        return True
    return True


def write_json(path: str | Path, value: Any) -> None:
    """Write `value` as indented JSON, atomically."""
    text = json.dumps(value, indent=1, ensure_ascii=False)
    with atomic_path(path) as temporary:
        temporary.write_text(text + "\n", encoding="utf-8")


def read_jsonl(path: str | Path) -> list[Any]:
    """Return all complete records of a JSON-lines file, in order; a last line torn by a crash is left out."""
    path = Path(path)
    if not path.exists():
        return []
    records = []
    lines = path.read_bytes().split(b"\n")  # splitlines would also split at U+2028 inside a text
    for line in lines:
        with contextlib.suppress(ValueError):  # torn inside a number, a string, or a character
            records.append(json.loads(line))
    return records
