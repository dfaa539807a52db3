"""Keep two processes from writing into one folder (no section in the paper).

The lock is on the file FOLDER/.lock and ends with the process, however it ends. It holds between machines too
where the file system passes locks on, as NFS does. The file itself stays; it says who holds the lock, or held
it last.
"""

import contextlib
import errno
import os
import socket
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import IO

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

NAME = ".lock"


@contextlib.contextmanager
def locked(folder: str | Path) -> Iterator[None]:
    """Hold the lock of a folder, which is made where it is missing.

    Raises ValueError, in one line, where another process holds it. A lock of POSIX (`lockf`), because a child
    that outlives a killed process does not inherit it.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / NAME, "a+", encoding="utf-8") as file:
        _acquire(folder, file)
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
        file.flush()
        yield


def _acquire(folder: Path, file: IO[str]) -> None:
    """Take the lock, or say who has it."""
    if fcntl is None:
        return
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno not in (errno.EACCES, errno.EAGAIN):
            print(
                f"minglm: {folder}: this file system has no locks ({error.strerror}); "
                "start no second process there",
                file=sys.stderr,
            )
            return
        holder = (folder / NAME).read_text(encoding="utf-8", errors="replace").strip()
        raise ValueError(
            f"{folder} is in use by {holder or 'another process'}; "
            "wait until it has ended, or choose another --out"
        ) from None
