"""`python -m minglm ...` in a process of its own that has imported the package already: it saves seconds each time.

The process is forked from the server that starts ranks too (`helpers.world`), and so are the ranks of `torchrun`. That
a command also starts from nothing is shown by `.ci/run`, and by the tests of README and of the server.
"""

import multiprocessing
import os
import resource
import signal
import sys
import tempfile
import time
from pathlib import Path

from helpers.world import PRELOADED

ROOT = Path(__file__).parent.parent.parent
SECONDS = 900
"""Most time of a command. Other programs may hold the cores."""


def minglm(*words):
    """Be the command line; a status other than 0 ends the process."""
    from minglm.__main__ import main

    if status := main(words):
        sys.exit(status)


def torchrun(ranks, restarts, function, *arguments):
    """Call a function on ranks that torchrun starts on this machine, and again after a failure, so many times."""
    from torch.distributed.launcher.api import elastic_launch
    from torch.distributed.run import config_from_args, parse_args

    words = ["--rdzv-backend=c10d", "--rdzv-endpoint=localhost:0"]  # what --standalone stands for
    words += [f"--nproc-per-node={ranks}", f"--max-restarts={restarts}"]
    config, *_ = config_from_args(parse_args([*words, "none.py"]))
    config.start_method = "fork"
    elastic_launch(config, function)(*arguments)


class Started:
    """A function that runs in a process of its own."""

    def __init__(self, function, *arguments, file_bytes=None, environment=None):
        """Start it; none of its files may be larger than `file_bytes`."""
        self.folder = tempfile.TemporaryDirectory()
        self.printed, self.errors = (Path(self.folder.name) / name for name in ("out", "err"))
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(PRELOADED)
        call = (function, arguments, str(self.printed), str(self.errors), file_bytes, environment)
        self.process = context.Process(target=_be, args=call)
        self.process.start()

    def has_ended(self):
        """Whether it has."""
        return self.process.exitcode is not None

    def end(self):
        """Wait for its end. Return (exit status, standard output, standard error)."""
        self.process.join(SECONDS)
        status = self.process.exitcode
        self.process.kill()
        texts = [
            path.read_text("utf-8") if path.exists() else "" for path in (self.printed, self.errors)
        ]
        assert status is not None, f"no end within {SECONDS} s:\n{texts[1][-3000:]}"
        self.folder.cleanup()
        return status, *texts

    def stop(self, reached, how):
        """Send a signal once `reached()` is true. Return (exit status, standard error)."""
        deadline = time.monotonic() + SECONDS
        while not self.has_ended() and not reached():
            assert time.monotonic() < deadline
            time.sleep(0.01)
        if not self.has_ended():
            os.kill(self.process.pid, how)
        status, _, errors = self.end()
        return status, errors


def _be(function, arguments, printed, errors, file_bytes, environment):
    """Be the process: what is printed goes into files, and it starts in the root of the project."""
    for number, path in ((1, printed), (2, errors)):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT), number)
    os.chdir(ROOT)
    os.environ |= environment or {}
    # A test suite in the background has Ctrl-C switched off.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    if file_bytes is not None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (file_bytes, file_bytes))
    function(*arguments)
