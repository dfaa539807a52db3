"""One function over many parts of the corpus: in this process, in several, or as a Ray Data stage.

    map_parts(function, tasks) = [function(task) for task in tasks]

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

ENGINES = ("local", "ray")


ONE_THREAD = {"OMP_NUM_THREADS": "1", "RAYON_NUM_THREADS": "1"}
WORTH = 4
"""Tasks for which a new process is started: loading its packages takes as long as a task or two."""


def map_parts(function, tasks, engine="local", workers=1, label="", sizes=None):
    """[function(task) for task in tasks], with a progress bar.

    function: importable by its name; tasks and results can be pickled. engine: local or ray. workers: processes at
    most; the local engine starts one for every WORTH tasks. sizes: of the tasks, in bytes, for the bar.
    Raises what the function raises, and ValueError for an engine that does not exist or is not installed.
    """
    from tqdm import tqdm

    if engine not in ENGINES:
        raise ValueError(f"--engine {engine}: must be one of {', '.join(ENGINES)}")
    sizes, results = sizes or [1] * len(tasks), []
    unit = {"unit": "B", "unit_scale": True} if max(sizes, default=0) > 1 else {}
    with tqdm(total=sum(sizes), desc=label, disable=None, **unit) as bar:
        for size, result in zip(sizes, _results(function, tasks, engine, workers), strict=True):
            results.append(result)
            bar.update(size)
    return results


def _results(function, tasks, engine, workers):
    if engine == "ray":
        yield from _ray(function, tasks, workers)
    elif min(workers, len(tasks) // WORTH) <= 1:
        yield from map(function, tasks)
    else:
        context = multiprocessing.get_context("spawn")
        before = {name: os.environ.get(name) for name in ONE_THREAD}
        os.environ |= ONE_THREAD  # inherited: the new processes read it before they import anything
        try:
            with ProcessPoolExecutor(min(workers, len(tasks) // WORTH), context) as pool:
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
        raise ValueError("--engine ray needs ray; pip install 'minglm[ray]'") from None
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
