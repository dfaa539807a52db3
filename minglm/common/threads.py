"""Decide how many CPU threads this process may use (no section in the paper)."""

import os

MOST_THREADS = 1024
"""More threads than any machine has cores for; a larger number is a mistake."""

_threads = 1  # threads of this process that may be busy at once; set by the functions below


def thread_count(asked: int = 0) -> int:
    """Return `asked`, or OMP_NUM_THREADS, or the cores of this machine divided by the ranks on it.

    OMP_NUM_THREADS may be a list, "4,2": threads of the outer level first. A variable that makes no sense is ignored.
    """
    if asked:
        return asked
    from_environment = _number("OMP_NUM_THREADS")
    if from_environment:
        return from_environment
    if hasattr(os, "sched_getaffinity"):
        cores = len(os.sched_getaffinity(0))
    else:
        cores = os.cpu_count() or 1
    return max(1, cores // (_number("LOCAL_WORLD_SIZE") or 1))


def _number(variable: str) -> int | None:
    """Return the first number of an environment variable; None where it has none from 1 to `MOST_THREADS`."""
    first = os.environ.get(variable, "").partition(",")[0].strip()
    if not (first.isascii() and first.isdigit() and len(first) < 10):
        return None
    return int(first) if 1 <= int(first) <= MOST_THREADS else None


def prepare_threads() -> None:
    """Set the environment from which PyTorch starts its thread pool; it must be called before torch is imported.

    OpenMP threads that wait by spinning starve each other on a busy machine (a 2-thread product was measured
    up to 30 times slower), and threads that never spin must be woken for each of thousands of small
    operations (a training step of the toy took 1.6 times as long). With these settings they spin for some
    microseconds.
    """
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    os.environ.setdefault("GOMP_SPINCOUNT", "1000")
    global _threads
    _threads = thread_count()
    if _number("OMP_NUM_THREADS") is None:  # OpenMP would complain of a value that makes no sense
        os.environ["OMP_NUM_THREADS"] = str(_threads)


def use_threads(count: int = 0, inside: bool = True) -> int:
    """Give this process `thread_count(count)` threads.

    Return how many of them are left for shares of a batch.

    inside: True: all of them share each PyTorch operation, and the batch has one. False: each operation has one.
    """
    import torch

    global _threads
    _threads = thread_count(count)
    torch.set_num_threads(_threads if inside else 1)
    return 1 if inside else _threads


def threads_in_use() -> int:
    """Return how many threads of this process may be busy at once: what was last set here."""
    return _threads
