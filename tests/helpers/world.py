"""Worlds of a few ranks on the CPU, for tests: each rank is a process, all start in a tenth of a second."""

import datetime
import faulthandler
import multiprocessing
import pickle
import queue
import tempfile
import time
import traceback

import torch
import torch.distributed as dist

PRELOADED = [
    "torch.distributed.fsdp",
    "minglm.testing.parallel",
    "minglm.recipe.run",
    "matplotlib.figure",
    "matplotlib.backends.backend_agg",
]
SECONDS = 600
"""Most time of a world. Other programs may hold the cores."""


def _rank(function, rank, size, store, results, arguments):
    """Be one rank: call the function and send its result, or the traceback."""
    torch.set_num_threads(1)
    faulthandler.dump_traceback_later(SECONDS - 5)  # shows where each rank waits
    try:
        dist.init_process_group(
            "gloo",
            init_method=f"file://{store}",
            rank=rank,
            world_size=size,
            timeout=datetime.timedelta(seconds=SECONDS),
        )
        # As bytes: tensors would otherwise stay in the memory of this process until they are received.
        result = pickle.dumps(function(*arguments))
        results.put((rank, result, None))
        dist.barrier()  # nobody leaves while another one still needs it
        dist.destroy_process_group()
    except BaseException:
        results.put((rank, None, traceback.format_exc()))


def run_ranks(function, size, *arguments):
    """Call `function(*arguments)` on `size` ranks with a gloo process group; return the result of each, in order.

    The function is one of a module, since each process imports it, and its results are pickled: return plain values, or
    tensors that are no DTensors. The first error of a rank is raised, with its traceback.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    results = context.Queue()
    with tempfile.TemporaryDirectory() as folder:
        processes = [
            context.Process(
                target=_rank,
                args=(function, rank, size, f"{folder}/store", results, arguments),
                daemon=True,
            )
            for rank in range(size)
        ]
        for process in processes:
            process.start()
        try:
            found = _collect(processes, results)
            for process in processes:
                process.join(SECONDS)
        finally:
            for process in processes:
                process.kill()
    return found


def _collect(processes, results):
    """Return the result of each rank. Raise AssertionError for the first that fails or dies, or when time is over."""
    found = {}
    deadline = time.monotonic() + SECONDS
    while len(found) < len(processes):
        try:
            rank, result, error = results.get(timeout=1)
        except queue.Empty:
            missing = [rank for rank in range(len(processes)) if rank not in found]
            for rank in missing:
                status = processes[rank].exitcode
                assert not status, f"rank {rank} died with status {status}"
            assert time.monotonic() < deadline, f"no answer from ranks {missing} in {SECONDS} s"
            continue
        assert error is None, f"rank {rank} of {len(processes)}:\n{error}"
        found[rank] = pickle.loads(result)
    return [found[rank] for rank in range(len(processes))]
