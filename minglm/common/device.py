"""Small things every floor uses: threads, seeds, devices, atomic files, JSON-lines log. No counterpart in the paper."""

import contextlib
import functools
import json
import os
import random
import subprocess
import sys
import time
from pathlib import Path

threads = 1
"""How many threads of this process may be busy at once; `use_threads` sets it."""


def thread_count(asked=0):
    """`asked`, or OMP_NUM_THREADS, or the cores of this machine divided by the ranks on it."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    shared = max(1, cores // int(os.environ.get("LOCAL_WORLD_SIZE", 1)))
    return asked or int(os.environ.get("OMP_NUM_THREADS") or shared)


def use_threads(count=0, inside=True):
    """Give this process `thread_count(count)` threads. Returns how many of them are left for shares of a batch.

    inside: all of them share each PyTorch operation, and the batch has one; else each operation has one. OpenMP threads
    that wait by spinning starve each other on a busy machine (a 2-thread product was measured up to 30 times slower),
    and threads that never spin must be woken for each of thousands of small operations (a training step of the toy took
    1.6 times as long). So they spin for some microseconds; this is set before torch is imported.
    """
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    os.environ.setdefault("GOMP_SPINCOUNT", "1000")
    import torch

    global threads
    threads = thread_count(count)
    torch.set_num_threads(threads if inside else 1)
    return 1 if inside else threads


def pick_device(name="auto"):
    """`auto` is the GPU where there is one. Raises ValueError for another name, and when cuda is absent."""
    import torch

    if name.partition(":")[0] not in ("auto", "cpu", "cuda"):
        raise ValueError(f"device = {name!r}: must be auto, cpu or cuda")
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if name.startswith("cuda") and not torch.cuda.is_available():
        raise ValueError(f"device = {name!r}: this machine has no CUDA device; use --device cpu")
    return torch.device(name)


def pick_dtype(name, device):
    """The precision of matrix products on a device: `name`, or float32 on a CPU that has no bfloat16 products.

    There (no AVX512-BF16, no AMX) bfloat16 is unpacked number by number and takes about six times as long as float32.
    """
    import torch

    if name == "bfloat16" and device.type == "cpu":
        have = torch.cpu.get_capabilities()
        name = name if have.get("avx512_bf16") or have.get("amx_bf16") else "float32"
    return getattr(torch, name)


@functools.cache
def measured_flops(device, dtype, seconds=0.1):
    """FLOP/s of a device in one large matrix product of this dtype, the best of those done in about `seconds`.

    What a model-FLOPs utilisation is measured against: not a data sheet's number, but what this machine reaches.
    Measured once in a process.
    """
    import torch

    size = 1024 if device.type == "cpu" else 8192
    a, b = (torch.ones(size, size, dtype=dtype, device=device) for _ in range(2))
    best, began = float("inf"), time.perf_counter()
    while best == float("inf") or time.perf_counter() - began < seconds:
        for _ in range(3):  # also the first rounds, whose buffers and clocks are cold; the best is kept
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            at = time.perf_counter()
            a @ b
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            best = min(best, time.perf_counter() - at)
    return 2 * size**3 / best


def peak_bytes(function, *values):
    """The most bytes that PyTorch had allocated at one time on the CPU during a call, beyond what was there before."""
    from torch.profiler import profile

    with profile(profile_memory=True) as found:
        function(*values)
    held = highest = 0
    for event in found.profiler.kineto_results.events():
        if event.name() == "[memory]":
            held += event.nbytes()
            highest = max(highest, held)
    return highest


def seed_everything(seed):
    """Seed Python, numpy and torch. Data order and sampling use generators of their own and do not depend on this."""
    import numpy as np
    import torch

    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


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
        temporary.write_text(json.dumps(value, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def read_jsonl(path):
    """All complete records of a JSON-lines file, in order; a last line torn by a crash is left out."""
    if not Path(path).exists():
        return []
    records = []
    for line in Path(path).read_bytes().split(b"\n"):  # splitlines would also split at U+2028 inside a text
        with contextlib.suppress(ValueError):  # torn inside a number, a string, or a character
            records.append(json.loads(line))
    return records


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


def versions():
    """Versions, device and commit, for the head of a log or report."""
    import numpy as np
    import torch

    return {
        "python": sys.version.split()[0],
        "torch": torch.__version__,
        "numpy": np.__version__,
        "threads": threads,
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
        "commit": commit(),
        "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }


def commit():
    """The git commit of this source tree, with a plus when it has changes; 'unknown' outside a checkout."""
    here = Path(__file__).parent
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        run = {"cwd": here, "capture_output": True, "text": True, "timeout": 10, "check": True}
        head = subprocess.run(["git", "rev-parse", "--short=12", "HEAD"], **run).stdout.strip()
        changed = subprocess.run(["git", "status", "--porcelain", "-uno"], **run).stdout.strip()
        return head + ("+" if changed else "")
    return "unknown"
