"""The rank that is wrong is named: other code, slow, stuck; a run whose rank was killed goes on by itself."""

import dataclasses
import os
import signal
import subprocess
import sys
import time

import pytest
import torch
from helpers.command import Started, minglm, torchrun
from helpers.nano_run import CONFIG, OVERRIDES
from helpers.world import run_ranks

from minglm.config import load_config
from minglm.launch.scripts import RESTARTS, SETTINGS
from minglm.parallel import faults
from minglm.report.records import StepRecord, read_records, select
from minglm.train.checkpoint import CheckpointStore
from minglm.train.loop import Trainer


def handshake(difference):
    """Compare code on ranks of which the last is different. Return what it said, or None."""
    run = load_config(CONFIG)
    ranks = faults.Ranks.of_the_world()
    if ranks.rank == ranks.size - 1:
        if difference == "sources of minglm":
            faults.fingerprint_of_sources = lambda: "0123456789ab"
        elif difference == "torch":
            torch.__version__ = "1.0"
        elif difference == "config":
            run = dataclasses.replace(run, seed=run.seed + 1)
    try:
        faults.check_same_code(run, ranks)
    except ValueError as error:
        return str(error)


@pytest.mark.parametrize("difference", ["sources of minglm", "torch", "config"])
def test_a_rank_with_something_else_is_named_by_all(difference):
    """All ranks refuse in the same line, which names the rank and what differs."""
    first, *others = run_ranks(handshake, 3, difference)
    assert first.startswith("rank 2 on ") and f"has {difference} " in first and "\n" not in first
    assert others == [first, first]


def test_equal_ranks_pass():
    """Nothing is refused where nothing differs."""
    assert run_ranks(handshake, 2, None) == [None, None]


def pace(seconds):
    """Compare the speed of ranks whose product takes these seconds."""
    ranks = faults.Ranks.of_the_world()
    faults.seconds_of_a_product = lambda device: seconds[ranks.rank]
    return faults.slowest_rank(torch.device("cpu"), ranks)


@pytest.mark.parametrize(
    ("seconds", "slow"),
    [
        ((0.1, 0.1, 0.2), (2, 2.0)),
        ((0.3, 0.1, 0.1), (0, 3.0)),
        ((0.2, 0.1), (0, 2.0)),
        ((0.1, 0.14, 0.1), None),
    ],
)
def test_the_slow_rank_is_named(seconds, slow):
    """All ranks agree which one is 1.5 times as slow as the median, or that none is."""
    for answer in run_ranks(pace, len(seconds), seconds):
        assert (answer and (answer.rank, answer.times_the_median)) == slow


def test_the_seconds_are_those_of_the_product_alone(monkeypatch):
    """By a clock that only the products move: the median of those after the one that warms up."""
    clock = 0.0
    seconds = [100.0, 5.0, 1.0, 4.0, 2.0, 3.0]

    class Square:
        def __matmul__(self, other):
            nonlocal clock
            clock += seconds.pop(0)
            return torch.zeros(1, 1)

    monkeypatch.setattr(faults.time, "perf_counter", lambda: clock)
    monkeypatch.setattr(faults.torch, "ones", lambda *shape, device: Square())
    assert faults.seconds_of_a_product(torch.device("cpu")) == 3.0
    assert seconds == []


HANGS = """
import sys, time
from minglm.parallel.faults import Watchdog

def exchange():
    time.sleep(600)

watchdog = Watchdog(float(sys.argv[1]), rank=3)
for step in range(4):
    with watchdog.during(f"stage general, step {step}"):
        time.sleep(0.2)
time.sleep(2.5)  # between steps nothing is watched
with watchdog.during("stage general, step 4"):
    exchange()
"""


def test_a_step_that_hangs_ends_in_one_line():
    """Rank, stage, step and place in one line, the stack below it, within the time; steps that end are left alone."""
    done = subprocess.run(
        [sys.executable, "-c", HANGS, "2"], capture_output=True, text=True, timeout=300
    )
    line, *stack = done.stderr.splitlines()
    assert done.returncode == faults.STUCK
    assert line.startswith("minglm: rank 3 on ")
    assert "stage general, step 4 has not ended in 2 s; it is in exchange (" in line
    assert stack[0].lstrip().startswith("File ") and any("exchange" in text for text in stack)


def wrong_rank(what, *words):
    """Be a rank of the command; rank 1 goes wrong before its fourth step, the first time that it is started."""
    first_try = os.environ["TORCHELASTIC_RESTART_COUNT"] == "0"
    step = Trainer.step

    def step_of_a_wrong_rank(trainer):
        if trainer.state.step == 3 and os.environ["RANK"] == "1" and first_try:
            os.kill(os.getpid(), signal.SIGKILL) if what == "killed" else time.sleep(600)
        return step(trainer)

    Trainer.step = step_of_a_wrong_rank
    minglm(*words)


def run_with_a_wrong_rank(folder, what, restarts, *overrides):
    """Train nano's first stage on two ranks under torchrun, of which one goes wrong. Return (status, errors)."""
    words = ["run", CONFIG, "--out", str(folder / "run"), *OVERRIDES, "--until", "general"]
    words += ["--threads=1", "--checkpoint_seconds=0.001", *overrides]
    ranks = Started(torchrun, 2, restarts, wrong_rank, what, *words, environment=SETTINGS)
    status, _, errors = ranks.end()
    return status, errors


@pytest.mark.slow
def test_a_run_goes_on_by_itself_after_a_rank_was_killed(tmp_path):
    """torchrun, as a script starts it, starts all ranks again; they continue from the last checkpoint, each step once."""
    status, errors = run_with_a_wrong_rank(tmp_path, "killed", RESTARTS)
    assert status == 0, errors
    records = read_records(tmp_path / "run" / "log.jsonl")
    steps = [record.step for record in select(records, StepRecord, stage="general")]
    assert steps == list(range(1, len(steps) + 1)) and len(steps) > 5
    assert CheckpointStore(tmp_path / "run").is_complete("general")


def test_restarts_that_cannot_work_are_refused():
    """torchrun that shares its store with the ranks, as it does unless told otherwise, is told how; else nothing is said."""
    shares = {"TORCHELASTIC_MAX_RESTARTS": "3", "TORCHELASTIC_USE_AGENT_STORE": "True"}
    with pytest.raises(ValueError, match="set TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1"):
        faults.check_restarts(shares)
    for works in ({"TORCHELASTIC_MAX_RESTARTS": "0"}, {"TORCHELASTIC_USE_AGENT_STORE": "False"}):
        faults.check_restarts(shares | works)


@pytest.mark.slow
@pytest.mark.ci
def test_a_rank_that_others_wait_for_ends_the_run(tmp_path):
    """The rank that waits says where, within the configured time; what was saved is there to go on from."""
    status, errors = run_with_a_wrong_rank(tmp_path, "stuck", 0, "--parallel.timeout_seconds=20")
    assert status != 0
    assert "stage general, step 4 has not ended in 20 s; it is in " in errors
    assert CheckpointStore(tmp_path / "run").is_interrupted("general")
