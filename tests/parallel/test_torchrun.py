"""`torchrun -m minglm run`: the numbers of one process, one line for a mistake, and a stop that loses nothing."""

import math
import signal
import subprocess
import sys

import pytest
from helpers.nano_run import CONFIG, OVERRIDES, ROOT, complete, environment, finished, records, stop

__all__ = ["finished"]  # a fixture

FEW = ["--stages.general.tokens", "4000", "--until", "general"]


def ranks(count, out, *words):
    """Start the command on so many ranks."""
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(count)]
    command = ["-m", "minglm", "run", CONFIG, "--out", str(out), *OVERRIDES, *words]
    return subprocess.Popen(
        [sys.executable, *launcher, *command],
        cwd=ROOT,
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def own_lines(errors):
    """Return what minglm says; torchrun adds a report of its own."""
    return [line for line in errors.splitlines() if line.startswith("minglm:")]


def assert_same_records(found, wanted, close):
    """Compare two logs: the same records in the same order, numbers within `close` of their size."""
    assert [record["kind"] for record in found] == [record["kind"] for record in wanted]
    for ours, theirs in zip(found, wanted, strict=True):
        ours = {name: value for name, value in ours.items() if not name.startswith("rank_")}
        assert ours.keys() == theirs.keys()
        for name, value in theirs.items():
            if isinstance(value, float):
                same = math.isclose(ours[name], value, rel_tol=close, abs_tol=close)
                assert same, (theirs["kind"], name, ours[name], value)
            elif name != "bits":  # a list of such floats
                assert ours[name] == value, (theirs["kind"], name)


def test_two_ranks_log_what_one_process_logs(tmp_path):
    """Losses, norms, loads and the evaluation of a stage, with the experts divided over two ranks."""
    process = ranks(2, tmp_path / "two", "--parallel.ep", "2", *FEW)
    printed, errors = process.communicate(timeout=500)
    assert process.returncode == 0, errors
    assert printed.count("continue with:") == 1  # one rank speaks
    status, _, errors = complete(tmp_path / "one", *FEW)
    assert status == 0, errors
    # float32 sums in another order, after a few steps
    assert_same_records(records(tmp_path / "two"), records(tmp_path / "one"), 1e-5)


def test_a_mistake_on_many_ranks_is_one_line(tmp_path):
    """All ranks find the layout impossible; the user reads it once, and nothing is written."""
    process = ranks(2, tmp_path / "run", "--parallel.fsdp", "8")
    _, errors = process.communicate(timeout=500)
    assert process.returncode
    (line,) = own_lines(errors)
    assert "parallel.fsdp = 8" in line and "start 8 ranks with torchrun" in line
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_the_whole_recipe_on_two_ranks(finished, tmp_path):
    """Pre-training, fine-tuning, RL, distillation and evaluation: the log of one process, sampled answers included."""
    process = ranks(2, tmp_path / "two")
    printed, errors = process.communicate(timeout=900)
    assert process.returncode == 0, errors
    assert "talk to it" in printed and (tmp_path / "two" / "report.md").exists()
    assert_same_records(records(tmp_path / "two"), records(finished), 1e-4)


@pytest.mark.slow
def test_ranks_stop_together_and_another_number_continues(finished, tmp_path):
    """A request to end saves after the same step on all ranks; one process goes on from there to the same log."""
    out = tmp_path / "run"
    process = ranks(2, out, "--parallel.ep", "2")

    def has_trained():
        return (out / "log.jsonl").exists() and len(records(out, "step")) > 3

    status, errors = stop(process, has_trained, signal.SIGTERM)
    assert status and "Traceback" not in "".join(own_lines(errors))
    steps = len(records(out, "step"))
    status, _, errors = complete(out, "--until", "general")
    assert status == 0, errors
    wanted = [record for record in records(finished, "step") if record["stage"] == "general"]
    assert len(wanted) > steps
    assert_same_records(records(out, "step"), wanted, 1e-4)
