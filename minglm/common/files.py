"""Read and write files so that a crash loses nothing: atomic files and folders, JSON (lines) (no section in the paper)."""

import contextlib
import errno
import functools
import glob
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from minglm.common.mistakes import shown

LONGEST_NAME = 255
"""Bytes of a file's name, on the usual file systems."""


@contextlib.contextmanager
def atomic_path(path: str | Path) -> Iterator[Path]:
    """Yield a temporary path beside `path`; on success it replaces `path`, on any error it is removed."""
    path = Path(path)
    if not path.name:
        raise ValueError(f"cannot write {path}: it names no file; choose another path")
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield temporary
        with open(temporary, "rb") as written:
            os.fsync(written.fileno())
        os.replace(temporary, path)
    except OSError as error:
        raise ValueError(
            f"cannot write {path}: {error.strerror or error}; free space or choose another path"
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


def remove(path: Path | None) -> None:
    """Remove a file or a folder, if there is one.

    A folder has a temporary name, .NAME.tmp, while its files go.
    """
    if path is None or not path.exists():
        return
    if not path.is_dir():
        path.unlink()
        return
    if path.suffix != ".tmp":
        doomed = path.with_name(f".{path.name}.old.tmp")
        shutil.rmtree(doomed, ignore_errors=True)
        path = path.replace(doomed)
    shutil.rmtree(path)


def own_prefix(kind: str, parent: Path | None = None) -> str:
    """Return how the names of this process's temporary folders of a kind begin; remove those that killed processes left.

    The numbers of processes are those of one namespace, so folders of others, as of containers that share the disk, stay.

    kind: a word. parent: where the folders lie; None: where temporary files do.
    """
    return _swept(kind, str(parent or tempfile.gettempdir()), os.getpid())


@functools.cache
def _swept(kind: str, parent: str, pid: int) -> str:
    """Return the prefix of `own_prefix`; the folders of the dead are looked for once a process."""
    try:
        namespace = os.stat("/proc/self/ns/pid").st_ino
    except OSError:  # not Linux
        namespace = 0
    common = f"minglm-{kind}-{namespace}-"
    for folder in Path(parent).glob(f"{common}*"):
        if not _is_alive(folder.name.removeprefix(common).split("-")[0]):
            shutil.rmtree(folder, ignore_errors=True)
    return f"{common}{pid}-"


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
    """Write `value` as indented JSON, atomically; a list that holds no other is one line."""
    with atomic_path(path) as temporary:
        temporary.write_text(_indented(value) + "\n", encoding="utf-8")


def _indented(value: Any, depth: int = 0) -> str:
    """Return `value` as JSON, indented by one space for each of `depth` levels after its first line."""
    inner = "\n" + " " * (depth + 1)
    outer = "\n" + " " * depth
    if isinstance(value, dict) and value:
        # The key is written as json.dumps writes it, a number too.
        lines = [
            json.dumps({key: 0}, ensure_ascii=False)[1:-4] + ": " + _indented(item, depth + 1)
            for key, item in value.items()
        ]
        return "{" + inner + ("," + inner).join(lines) + outer + "}"
    if isinstance(value, list | tuple) and any(isinstance(v, dict | list | tuple) for v in value):
        lines = [_indented(item, depth + 1) for item in value]
        return "[" + inner + ("," + inner).join(lines) + outer + "]"
    return json.dumps(value, ensure_ascii=False)


def json_line(value: Any) -> bytes:
    """Return `value` as one line of JSON in UTF-8, with its line break.

    Half a surrogate pair, which strings may hold and UTF-8 may not, is written as an escape, and so is the line's other text.
    """
    try:
        return json.dumps(value, ensure_ascii=False).encode() + b"\n"
    except UnicodeEncodeError:
        return json.dumps(value).encode() + b"\n"


def read_text(path: str | Path) -> str:
    """Return the text of a file in UTF-8.

    Raises OSError where there is none, as for a pipe or a device, which may never end.
    """
    path = Path(path)
    if path.exists() and not path.is_file():
        raise OSError(errno.EINVAL, "it is no file but a folder, a pipe or a device", str(path))
    return path.read_text(encoding="utf-8")


def read_json(path: str | Path) -> Any:
    """Return the value in a JSON file. Raises ValueError, in one line, that names the file."""
    try:
        return json.loads(read_text(path))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not JSON: {error}; restore it, or write it again") from error


def read_object(path: str | Path, *names: str) -> dict[str, Any]:
    """Return the object in a JSON file, which must have these names. Raises ValueError, in one line."""
    value = read_json(path)
    if not isinstance(value, dict):
        raise ValueError(f"{path} holds {shown(value, quoted=True)}: must be an object of JSON")
    for name in names:
        if name not in value:
            raise ValueError(f"{path} has no {name!r}; restore it, or write it again")
    return value


def check_out(path: str | Path, option: str = "--out") -> None:
    """Raise ValueError, in one line, where no folder can be made or written at `path`. Writes nothing."""
    path = Path(path)
    folder = path.absolute()
    try:
        while not folder.exists():
            if len(os.fsencode(folder.name)) > LONGEST_NAME:
                raise OSError(None, "the name is too long")
            folder = folder.parent
        if not folder.is_dir():
            raise OSError(None, f"{folder} is not a folder")
        if not os.access(folder, os.W_OK | os.X_OK):
            raise OSError(None, f"no permission to write in {folder}")
    except OSError as error:
        raise ValueError(
            f"{option} {shown(str(path))}: {error.strerror}; choose another folder"
        ) from error


def read_jsonl(path: str | Path) -> list[Any]:
    """Return all records of a JSON-lines file, in order; a last line torn by a crash is left out.

    Raises ValueError, in one line, that names the file and the line which is no JSON.
    """
    path = Path(path)
    if not path.exists():
        return []
    if not path.is_file():
        raise ValueError(f"{path} is no file but a folder, a pipe or a device; restore the file")
    records = []
    lines = path.read_bytes().split(b"\n")  # splitlines would also split at U+2028 inside a text
    for number, line in enumerate(lines, 1):
        try:
            records.append(json.loads(line))
        except (ValueError, RecursionError) as error:
            if number < len(lines):  # no crash tears a line that has its line break
                raise ValueError(
                    f"{path}, line {number} is not JSON: {error}; restore the file"
                ) from error
    return records
