"""Worker processes: results in order, and no process outlives the one that started it."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time

import psutil
import pytest

from minglm.data.workers import map_tasks

PARENT = """
import time
from minglm.data import workers

if __name__ == "__main__":
    workers.MIN_TASKS_PER_WORKER = 1
    workers.map_tasks(time.sleep, [SECONDS] * 4, workers=2)
"""


def fail(task):
    raise ValueError("a mistake")


def test_executors_keep_order_and_mistakes():
    """Results come in the order of the tasks; a ValueError of a task is one here; other executors are refused."""
    tasks = [f"{n}" for n in range(5)]
    assert map_tasks(json.loads, tasks) == [0, 1, 2, 3, 4]
    assert map_tasks(json.loads, []) == []
    with pytest.raises(ValueError, match="a mistake"):
        map_tasks(fail, [1])
    with pytest.raises(ValueError, match=r"--executor spark: must be one of local, ray"):
        map_tasks(fail, [1], "spark")


def start_parent(tmp_path, seconds):
    """Start a process that maps tasks of so many seconds on two workers; return it and its descendants."""
    script = tmp_path / "parent.py"
    script.write_text(PARENT.replace("SECONDS", f"{seconds}"), encoding="utf-8")
    environment = {**os.environ, "PYTHONPATH": os.getcwd()}
    parent = subprocess.Popen([sys.executable, script], env=environment, stderr=subprocess.PIPE)
    inside = psutil.Process(parent.pid)
    deadline = time.monotonic() + 300
    while time.monotonic() < deadline:
        descendants = inside.children(recursive=True)
        with contextlib.suppress(psutil.NoSuchProcess):
            # Two workers, beside the resource tracker of multiprocessing, which sleep inside their first task.
            workers = [p for p in descendants if "spawn_main" in " ".join(p.cmdline())]
            if len(workers) == 2 and all(p.num_threads() > 1 for p in workers):
                return parent, descendants
        time.sleep(0.05)
    parent.kill()
    raise AssertionError("the workers did not start")


@pytest.mark.parametrize("sent", [signal.SIGKILL, signal.SIGINT])
def test_workers_end_with_their_parent(tmp_path, sent):
    """However the parent ends, no process of it is left soon after, though each is in a long task."""
    parent, descendants = start_parent(tmp_path, seconds=600)
    parent.send_signal(sent)
    parent.wait(timeout=120)
    gone, alive = psutil.wait_procs(descendants, timeout=120)
    for process in alive:
        process.kill()
    assert not alive
    assert len(gone) >= 2
