"""`torchrun -m minglm run`: the numbers of one process, one line for a mistake, and a stop that loses nothing.

Its ranks are forked; tests/bench/test_collectives.py starts some from nothing.
"""

import math
import signal

import pytest
from helpers.command import Started, minglm, torchrun
from helpers.nano_run import CONFIG, OVERRIDES, complete, finished, records

__all__ = ["finished"]  # a fixture


def ranks(count, out, *words):
    """Start the command on so many ranks."""
    words = ["run", CONFIG, "--out", str(out), *OVERRIDES, *words]
    return Started(torchrun, count, 0, minglm, *words)


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


def test_a_mistake_on_many_ranks_is_one_line(tmp_path):
    """All ranks find the layout impossible; the user reads it once, and nothing is written."""
    status, _, errors = ranks(2, tmp_path / "run", "--parallel.fsdp", "8").end()
    assert status
    (line,) = own_lines(errors)
    assert "parallel.fsdp = 8" in line and "start 8 ranks with torchrun" in line
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_the_whole_recipe_on_two_ranks(finished, tmp_path):
    """Pre-training, fine-tuning, RL, distillation and evaluation, with the experts divided: the log of one process,
    sampled answers included."""
    status, printed, errors = ranks(2, tmp_path / "two", "--parallel.ep", "2").end()
    assert status == 0, errors
    assert printed.count("talk to it") == 1  # one rank speaks
    assert (tmp_path / "two" / "report.md").exists()
    assert_same_records(records(tmp_path / "two"), records(finished), 1e-4)


@pytest.mark.slow
def test_ranks_stop_together_and_another_number_continues(finished, tmp_path):
    """A request to end saves after the same step on all ranks; one process goes on from there to the same log."""
    out = tmp_path / "run"
    process = ranks(2, out, "--parallel.ep", "2")

    def has_trained():
        return (out / "log.jsonl").exists() and len(records(out, "step")) > 3

    status, errors = process.stop(has_trained, signal.SIGTERM)
    assert status and "Traceback" not in "".join(own_lines(errors))
    steps = len(records(out, "step"))
    status, _, errors = complete(out, "--until", "general")
    assert status == 0, errors
    wanted = [record for record in records(finished, "step") if record["stage"] == "general"]
    assert len(wanted) > steps
    assert_same_records(records(out, "step"), wanted, 1e-4)
