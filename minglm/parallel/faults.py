"""Name the rank that is wrong: one with other code, one that is slow, one that is stuck (no section in the paper).

    check_same_code     before anything is built: all ranks have the same sources, torch and config
    slowest_rank        now and then: every rank times the same small product, and the slowest is named
    Watchdog            a step that does not end: one line with rank and place, the stack, and the process ends

In a sharded step all ranks wait for one another many times, so all steps are as slow as the slowest rank and
their times tell nothing of it. Therefore a product is timed that no rank needs another one for. A rank that
waits for a collective which another one never joins would wait forever; when it ends instead, torchrun ends
the others.

    TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 torchrun --max-restarts 3 ...

starts all of them again, and they go on from the last checkpoint. Without the variable torchrun's own store
serves every try, so ranks of the second look for those of the first, whose addresses are still in it. With it
rank 0 opens a store for each try, on a port of its own. `check_restarts` refuses the one without the other;
the scripts of `minglm launch` have both.
"""

import contextlib
import hashlib
import json
import os
import socket
import statistics
import sys
import threading
import time
import traceback
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

import torch

import minglm
from minglm.common.ranks import Ranks
from minglm.config import RunConfig
from minglm.config.run import to_dict

STUCK = 75
"""Exit status of a process that its watchdog ended: EX_TEMPFAIL, try again."""
SLOW = 1.5
"""A rank is slow when its product takes this many times the median."""
WIDTH = 512
"""Rows and columns of the matrices that are timed."""
REPETITIONS = 5


def fingerprint_of_sources() -> str:
    """Return a short hash of the package's Python files, which tells two versions of the code apart."""
    root = Path(minglm.__file__).parent
    digest = hashlib.sha256()
    for path in sorted(root.rglob("*.py")):
        digest.update(str(path.relative_to(root)).encode())
        digest.update(path.read_bytes())
    return digest.hexdigest()[:12]


def check_same_code(run: RunConfig, ranks: Ranks) -> None:
    """Raise ValueError, in one line and on all ranks, where a rank has other code, another torch or another config."""
    if ranks.size == 1:
        return
    config = json.dumps(to_dict(run), sort_keys=True)
    mine = {
        "sources of minglm": fingerprint_of_sources(),
        "torch": torch.__version__,
        "config": hashlib.sha256(config.encode()).hexdigest()[:12],
    }
    answers = ranks.together(lambda: (socket.gethostname(), mine))
    first_host, first = answers[0]
    for rank, (host, theirs) in enumerate(answers):
        for name, value in theirs.items():
            if value != first[name]:
                raise ValueError(
                    f"rank {rank} on {host} has {name} {value}, rank 0 on {first_host} has {first[name]}; "
                    "give all nodes the same code, packages and command"
                )


def check_restarts(environment: Mapping[str, str]) -> None:
    """Raise ValueError, in one line, where torchrun would start ranks again that could not find one another."""
    restarts = environment.get("TORCHELASTIC_MAX_RESTARTS", "0")
    if restarts != "0" and environment.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
        raise ValueError(
            f"torchrun --max-restarts {restarts}: ranks that are started again would look for those before them; "
            "set TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 in its environment"
        )


class SlowRank(NamedTuple):
    """The slowest rank, where it is much slower than the others."""

    rank: int
    host: str
    times_the_median: float


@torch.no_grad()
def seconds_of_a_product(device: torch.device) -> float:
    """Return the seconds of a matrix product on this rank alone: the median of a few, after one that warms up."""
    square = torch.ones(WIDTH, WIDTH, device=device)
    seconds = []
    for _ in range(1 + REPETITIONS):
        began = time.perf_counter()
        (square @ square)[0, 0].item()  # waits for the device
        seconds.append(time.perf_counter() - began)
    return statistics.median(seconds[1:])


def slowest_rank(device: torch.device, ranks: Ranks) -> SlowRank | None:
    """Time the same product on all ranks.

    Return the slowest one if it is slow, else None; the same on all ranks.
    """
    answers = ranks.together(lambda: (seconds_of_a_product(device), socket.gethostname()))
    median = statistics.median_low(seconds for seconds, _ in answers)
    rank = max(range(len(answers)), key=lambda rank: answers[rank][0])
    seconds, host = answers[rank]
    if seconds < SLOW * median:
        return None
    return SlowRank(rank, host, round(seconds / median, 2))


class Watchdog:
    """Ends this process where a step does not end in time.

    seconds: time for one step; 0 watches nothing, as for one process, which waits for nobody. rank: for the message.
    """

    def __init__(self, seconds: float, rank: int = 0) -> None:
        self.seconds = seconds
        self.rank = rank
        self.watched = threading.main_thread()
        self._step: tuple[float, str] | None = None  # when it must have ended, and what it is
        if seconds:
            threading.Thread(target=self._watch, name="watchdog", daemon=True).start()

    @contextlib.contextmanager
    def during(self, what: str) -> Iterator[None]:
        """Watch a step, or a part of one. what: for the message, such as "stage general, step 3"."""
        outer = self._step
        self._step = (time.monotonic() + self.seconds, what)
        try:
            yield
        finally:
            self._step = outer

    def _watch(self) -> None:
        while True:
            time.sleep(min(1.0, self.seconds / 4))
            step = self._step
            if step is not None and time.monotonic() > step[0]:
                self._give_up(step[1])

    def _give_up(self, what: str) -> None:
        """Say where the main thread is, and end the process: a collective that hangs cannot be interrupted."""
        frame = sys._current_frames()[self.watched.ident or 0]
        stack = traceback.extract_stack(frame)
        root = str(Path(minglm.__file__).parent)
        ours = [place for place in stack if place.filename.startswith(root)] or list(stack)
        place = ours[-1]
        print(
            f"minglm: rank {self.rank} on {socket.gethostname()}: {what} has not ended in {self.seconds:g} s; it is in "
            f"{place.name} ({place.filename}:{place.lineno}). A rank that is elsewhere, or gone, keeps the others waiting; "
            "raise parallel.timeout_seconds if a step takes this long",
            file=sys.stderr,
        )
        print("".join(traceback.format_list(stack)), file=sys.stderr, flush=True)
        os._exit(STUCK)
