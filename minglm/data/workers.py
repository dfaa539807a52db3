"""Run one function over many tasks: in this process, in several processes, or as a Ray Data stage.

    map_tasks(function, tasks) = [function(task) for task in tasks]

The result does not depend on the executor: the functions are pure, a task is a small value with paths in it,
and results come back in order. So a laptop and a cluster write the same files. No counterpart in the paper.

Choices: new processes are spawned, not forked, because torch and the tokenizer keep threads, which do not
survive a fork. Each process gets one thread. It lives as long as its lifeline, a pipe whose other end this
process holds: if this process is killed or interrupted, the pipe closes and the others end with it. Ray is
started inside this process, or joins the cluster that RAY_ADDRESS names; on a cluster the run's folder must
be on a file system that all nodes share.
"""

import logging
import multiprocessing
import os
import pickle
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from enum import StrEnum
from multiprocessing.connection import Connection
from typing import Any, TypeVar

Task = TypeVar("Task")
Result = TypeVar("Result")


class Executor(StrEnum):
    """Where the tasks of a build run."""

    LOCAL = "local"
    """In this process, or in several processes on this machine."""
    RAY = "ray"
    """As stages of Ray Data, on this machine or on a cluster."""


ONE_THREAD = {"OMP_NUM_THREADS": "1", "RAYON_NUM_THREADS": "1"}
MIN_TASKS_PER_WORKER = 4
"""A new process is started for every so many tasks: loading its packages takes as long as one or two tasks."""


def map_tasks(
    function: Callable[[Task], Result],
    tasks: Sequence[Task],
    executor: Executor | str = Executor.LOCAL,
    workers: int = 1,
    label: str = "",
    sizes: Sequence[int] | None = None,
) -> list[Result]:
    """Return [function(task) for task in tasks], and show a progress bar.

    Args:
        function: importable by its name; tasks and results can be pickled.
        executor: an `Executor` or its value.
        workers: the maximum number of processes; the local executor starts one for MIN_TASKS_PER_WORKER tasks.
        label: text before the progress bar.
        sizes: bytes of each task, for the progress bar.

    Raises:
        ValueError: if the function raises it, or the executor does not exist or is not installed.
    """
    from tqdm import tqdm

    if executor not in list(Executor):
        raise ValueError(f"--executor {executor}: must be one of {', '.join(Executor)}")
    if sizes is None:
        sizes = [1] * len(tasks)
    unit: dict[str, Any] = {}
    if max(sizes, default=0) > 1:
        unit = {"unit": "B", "unit_scale": True}

    results = []
    with tqdm(total=sum(sizes), desc=label, disable=None, **unit) as bar:
        stream = _results(function, tasks, Executor(executor), workers)
        for size, result in zip(sizes, stream, strict=True):
            results.append(result)
            bar.update(size)
    return results


def _results(
    function: Callable[[Task], Result], tasks: Sequence[Task], executor: Executor, workers: int
) -> Iterator[Result]:
    processes = min(workers, len(tasks) // MIN_TASKS_PER_WORKER)
    if executor == Executor.RAY:
        yield from _ray(function, tasks, workers)
    elif processes <= 1:
        yield from map(function, tasks)
    else:
        yield from _processes(function, tasks, processes)


@contextmanager
def _one_thread() -> Iterator[None]:
    """Limit new processes to one thread: they read these variables before they import anything."""
    before = {name: os.environ.get(name) for name in ONE_THREAD}
    os.environ.update(ONE_THREAD)
    try:
        yield
    finally:
        for name, value in before.items():
            os.environ.pop(name)
            if value is not None:
                os.environ[name] = value


def _end_with_parent(lifeline: Connection) -> None:
    """End this process once the other end of its lifeline is closed; called first in every worker."""
    # Ctrl-C reaches all processes of a terminal. The parent answers it, and closes the lifelines.
    signal.signal(signal.SIGINT, signal.SIG_IGN)

    def watch() -> None:
        lifeline.poll(None)  # nothing is ever sent, so this returns at the end of the pipe
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def _processes(
    function: Callable[[Task], Result], tasks: Sequence[Task], processes: int
) -> Iterator[Result]:
    context = multiprocessing.get_context("spawn")
    lifeline, held = context.Pipe(duplex=False)
    with (
        _one_thread(),
        held,
        lifeline,
        ProcessPoolExecutor(
            processes, context, initializer=_end_with_parent, initargs=(lifeline,)
        ) as pool,
    ):
        try:
            yield from pool.map(function, tasks)
        except BaseException:
            held.close()
            pool.shutdown(cancel_futures=True)
            raise


def _ray(
    function: Callable[[Task], Result], tasks: Sequence[Task], workers: int
) -> Iterator[Result]:
    try:
        import ray  # pyright: ignore[reportMissingImports]  # optional: the extra "ray"
        import ray.data  # pyright: ignore[reportMissingImports]
    except ImportError:
        raise ValueError("--executor ray needs ray; pip install 'minglm[ray]'") from None
    if not ray.is_initialized():
        address = os.environ.get("RAY_ADDRESS")
        embedded = {} if address else {"num_cpus": max(1, workers), "include_dashboard": False}
        ray.init(address, log_to_driver=False, logging_level=logging.ERROR, **embedded)
    ray.data.DataContext.get_current().enable_progress_bars = False

    def stage(row: dict) -> dict:
        # The columns of a row must be simple values, so tasks and results travel pickled.
        try:
            result = function(pickle.loads(row["task"]))
        except ValueError as error:
            # A ValueError is a user's mistake. It is raised again below, without Ray's traceback around it.
            result = error
        return {"number": row["number"], "result": pickle.dumps(result)}

    if not tasks:
        return
    rows = [{"number": number, "task": pickle.dumps(task)} for number, task in enumerate(tasks)]
    finished = ray.data.from_items(rows, override_num_blocks=len(rows)).map(stage).take_all()
    for row in sorted(finished, key=lambda row: row["number"]):
        result = pickle.loads(row["result"])
        if isinstance(result, ValueError):
            raise result
        yield result
