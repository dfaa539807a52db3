"""One function over many parts of the corpus: in this process, in several, or as a Ray Data stage.

    map_tasks(function, tasks) = [function(task) for task in tasks]

in whatever way it is computed: the functions are pure, a task is a small dictionary with paths, results come back in
order. So the shards of one laptop and of a cluster are the same files. No counterpart in the paper.

Choices: new processes are spawned, not forked, because torch and the tokenizer keep threads, which a fork would lose.
Each gets one thread. Ray starts embedded in this process, or joins the cluster that RAY_ADDRESS names; there, the run's
folder must be on a file system that all nodes share.
"""

import multiprocessing
import os
import pickle
from concurrent.futures import ProcessPoolExecutor
from enum import StrEnum


class Executor(StrEnum):
    """Where the tasks of a build are computed."""

    LOCAL = "local"
    """In this process, or in several processes of this machine."""
    RAY = "ray"
    """As stages of Ray Data, on this machine or on a cluster."""


ONE_THREAD = {"OMP_NUM_THREADS": "1", "RAYON_NUM_THREADS": "1"}
MIN_TASKS_PER_WORKER = 4
"""Tasks for which a new process is started: loading its packages takes as long as a task or two."""


def map_tasks(function, tasks, executor=Executor.LOCAL, workers=1, label="", sizes=None):
    """[function(task) for task in tasks], with a progress bar.

    function: importable by its name; tasks and results can be pickled. executor: an Executor or its name. workers: processes at
    most; the local executor starts one for every MIN_TASKS_PER_WORKER tasks. sizes: of the tasks, in bytes, for the bar.
    Raises what the function raises, and ValueError for an executor that does not exist or is not installed.
    """
    from tqdm import tqdm

    if executor not in list(Executor):
        raise ValueError(f"--executor {executor}: must be one of {', '.join(Executor)}")
    sizes, results = sizes or [1] * len(tasks), []
    unit = {"unit": "B", "unit_scale": True} if max(sizes, default=0) > 1 else {}
    with tqdm(total=sum(sizes), desc=label, disable=None, **unit) as bar:
        for size, result in zip(sizes, _results(function, tasks, executor, workers), strict=True):
            results.append(result)
            bar.update(size)
    return results


def _results(function, tasks, executor, workers):
    if executor == Executor.RAY:
        yield from _ray(function, tasks, workers)
    elif min(workers, len(tasks) // MIN_TASKS_PER_WORKER) <= 1:
        yield from map(function, tasks)
    else:
        context = multiprocessing.get_context("spawn")
        before = {name: os.environ.get(name) for name in ONE_THREAD}
        os.environ |= ONE_THREAD  # inherited: the new processes read it before they import anything
        try:
            with ProcessPoolExecutor(
                min(workers, len(tasks) // MIN_TASKS_PER_WORKER), context
            ) as pool:
                try:
                    yield from pool.map(function, tasks)
                except BaseException:
                    pool.shutdown(cancel_futures=True)
                    raise
        finally:
            for name, value in before.items():
                os.environ.pop(name)
                if value is not None:
                    os.environ[name] = value


def _ray(function, tasks, workers):
    try:
        import ray
        import ray.data
    except ImportError:
        raise ValueError("--executor ray needs ray; pip install 'minglm[ray]'") from None
    if not ray.is_initialized():
        address = os.environ.get("RAY_ADDRESS")
        embedded = {} if address else {"num_cpus": max(1, workers), "include_dashboard": False}
        ray.init(address, log_to_driver=False, logging_level="error", **embedded)
    ray.data.DataContext.get_current().enable_progress_bars = False

    def stage(row):  # rows are columns of simple values: results travel pickled
        try:
            return {
                "number": row["number"],
                "result": pickle.dumps(function(pickle.loads(row["task"]))),
            }
        except ValueError as error:  # a user's mistake keeps its one line
            return {"number": row["number"], "result": pickle.dumps(error)}

    rows = [{"number": number, "task": pickle.dumps(task)} for number, task in enumerate(tasks)]
    if rows:
        found = ray.data.from_items(rows, override_num_blocks=len(rows)).map(stage).take_all()
        for row in sorted(found, key=lambda row: row["number"]):
            result = pickle.loads(row["result"])
            if isinstance(result, ValueError):
                raise result
            yield result
