"""Run one command of a repository in a jail: tests that open files and start processes (paper 3.3).

    run_command(["python", "-m", "pytest"], folder, 60)  ->  CommandResult("ended", 0, "... 12 passed")

`pool.py` judges functions that stand alone, and never believes the process that it judges. A repository of a
user has tests of its own, in files, run by a program of its own; so this jail lets a command read the
machine, and write nothing but a copy of its folder, which is in memory and gone with it. There is no network and no
other process in it, and at the deadline everything in it dies.

The memory of all its processes together is looked at every `LOOK_SECONDS`, and beyond `MEMORY` everything dies too. What
comes and goes between two looks is not seen, nor what the kernel holds for them: pipes, and files without a name.

What it cannot give: the code under test runs in the process that says which tests passed, so a program
written to forge this report would be believed. It is for repositories of one's own; `swe/episode.py` judges
by values.

Namespaces are needed; without them nothing is run.
"""

import contextlib
import os
import re
import subprocess
import sys
import tempfile
import time
from enum import StrEnum
from pathlib import Path
from typing import NamedTuple

from minglm.common.files import own_prefix

JAIL = Path(__file__).with_name("command_jail.py")
READY = b"+"
MEMORY = 8 * 2**30
"""Bytes that all processes of a command may hold together; pages that a fork shares count for both."""
LOOK_SECONDS = 0.2
OUTPUT = 2**18
"""Bytes of the output that are kept, the last ones."""


class CommandStatus(StrEnum):
    """How a command came to its end."""

    ENDED = "ended"
    """It ended by itself, whatever its exit status."""
    TIMEOUT = "timeout"
    """It was killed at the deadline."""
    INFRASTRUCTURE = "infrastructure"
    """The jail could not be closed, and nothing was run."""


class CommandResult(NamedTuple):
    """The outcome of one command."""

    status: CommandStatus
    exit_code: int
    output: str
    """What it printed, standard output and error together; of a failure of the jail, why."""


def memory_of(pid: int) -> int:
    """Return the bytes of memory, swapped ones too, that a process and all that it started hold beside mapped files."""
    held = 0
    pids = [pid]
    while pids:
        process = Path("/proc", str(pids.pop()))
        try:
            status = (process / "status").read_text(encoding="utf-8")
            children = " ".join(
                file.read_text(encoding="utf-8") for file in process.glob("task/*/children")
            )
        except OSError:  # it has ended
            continue
        pids += map(int, children.split())
        held += sum(map(int, re.findall(r"(?:RssAnon|RssShmem|VmSwap):\s*(\d+) kB", status)))
    return 1024 * held


def run_command(command: list[str], folder: Path, seconds: float) -> CommandResult:
    """Run a command in a copy of a folder, where it may write, as in a temporary folder of its own.

    seconds: wall clock, after which all of its processes are killed.
    """
    reader, writer = os.pipe()
    with (
        tempfile.TemporaryFile() as output,
        open(reader, "rb") as status,
        tempfile.TemporaryDirectory(prefix=own_prefix("command")) as temporary,
    ):
        words = [
            sys.executable,
            "-I",
            "-S",
            str(JAIL),
            str(writer),
            str(folder.resolve()),
            temporary,
            str(seconds),
        ]
        try:
            process = subprocess.Popen(
                [*words, *command],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                pass_fds=[writer],
                start_new_session=True,
            )
        finally:
            os.close(writer)
        late, large = False, False
        deadline = time.monotonic() + seconds
        try:
            while process.poll() is None and not (late or large):
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(min(LOOK_SECONDS, max(0.0, deadline - time.monotonic())))
                late = time.monotonic() >= deadline
                large = memory_of(process.pid) > MEMORY
        finally:
            process.kill()  # and with it, by the jail, everything that it started
            process.wait()
        said = status.read()
        size = output.seek(0, os.SEEK_END)
        output.seek(max(0, size - OUTPUT))
        text = output.read().decode("utf-8", "replace")
    if large:
        text += (
            f"\nkilled: all processes together held more than {MEMORY / 2**30:g} GiB of memory\n"
        )
    if late:
        return CommandResult(CommandStatus.TIMEOUT, -1, text)
    if said[:1] != READY:
        why = said.decode("utf-8", "replace") or "the jail ended before the command began"
        return CommandResult(CommandStatus.INFRASTRUCTURE, -1, why)
    return CommandResult(CommandStatus.ENDED, process.returncode, text)
