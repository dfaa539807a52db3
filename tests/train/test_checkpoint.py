"""Checkpoints: a run that is stopped anywhere resumes bit for bit, and a damaged file is refused in one line."""

import errno
import multiprocessing
import os
import random
import signal
from pathlib import Path

import pytest
import torch
from helpers.tiny import constant_phase
from hypothesis import given, settings
from hypothesis import strategies as st

from minglm.common.files import read_jsonl
from minglm.common.log import Log
from minglm.common.signals import Stopped
from minglm.config import OptimizerConfig
from minglm.data.mixture import Mixture
from minglm.model.glm import GLM
from minglm.optim.muon import Muon
from minglm.testing.model import tiny_model
from minglm.testing.strategies import numbers
from minglm.train.checkpoint import CheckpointStore, read
from minglm.train.loop import LoopOptions, Trainer

STEPS, ROWS, S = 6, 2, 8
UNREPEATABLE = ("tokens_per_second", "seconds")  # the clock


class Run:
    """One process of a run: everything is built anew, and only the folder carries state over."""

    def __init__(self, folder, packing="best_fit", seconds=1e9, stop_after=None, steps=STEPS):
        documents = [
            torch.randint(0, 24, (n,), generator=numbers(n)).numpy()
            for n in (5, 9, 3, 8, 13, 4, 6, 21)
        ]
        self.stream = Mixture(
            {"a": documents[:5], "b": documents[5:]}, {"a": 2.0, "b": 1.0}, S, packing, seed=3
        )
        self.model = GLM(tiny_model(1).config, seed=2)
        self.optimizer = Muon(self.model.named_parameters(), OptimizerConfig())
        self.log = Log(folder / "log.jsonl")
        self.checkpoints = CheckpointStore(folder, self.log, seconds).stage("general")
        self.phase = constant_phase(
            tokens=steps * ROWS * S, batch_tokens=ROWS * S, sequence_length=S
        )
        # rates that change, so that a resumed run would show it if it had forgotten where it was
        object.__setattr__(self.phase, "learning_rate", lambda seen: 1e-2 / (1 + seen / 40))
        self.stop_after, self.steps = stop_after, 0

    def next(self, rows):
        """The stream's next batch; sends Ctrl-C during the step it was told to stop after."""
        self.steps += 1
        if self.steps == self.stop_after:
            signal.raise_signal(signal.SIGINT)
        return self.stream.next(rows)

    def state_dict(self):
        """The stream's."""
        return self.stream.state_dict()

    def load_state_dict(self, state):
        """The stream's."""
        self.stream.load_state_dict(state)

    def go(self):
        """Train to the end, or until stopped."""
        options = LoopOptions(quiet=True)
        Trainer(
            self.model, self.optimizer, self, self.phase, self.checkpoints, self.log, options
        ).run()
        return self


def steps_logged(folder):
    """Return the log without the fields that depend on the clock."""
    return [
        {k: v for k, v in r.items() if k not in UNREPEATABLE}
        for r in read_jsonl(folder / "log.jsonl")
    ]


def assert_equal_states(a, b):
    """Assert that weights, selection biases, optimizer and stream are equal, bit for bit."""
    for mine, other in zip(a.model.state_dict().values(), b.model.state_dict().values()):
        assert torch.equal(mine, other)
    mine, other = (x.optimizer.state_dict()["state"] for x in (a, b))
    assert mine.keys() == other.keys()
    for key in mine:
        for name, value in mine[key].items():
            assert torch.equal(torch.as_tensor(value), torch.as_tensor(other[key][name]))
    assert a.stream.state_dict() == b.stream.state_dict()


@pytest.fixture(scope="module", params=["best_fit", "truncate"])
def straight(request, tmp_path_factory):
    """Return (packing, folder, run) of a run that was never stopped."""
    folder = tmp_path_factory.mktemp("straight")
    return request.param, folder, Run(folder, request.param).go()


@settings(max_examples=6)
@given(stops=st.lists(st.integers(1, 3), max_size=3))
def test_stopped_and_resumed_equals_straight(straight, tmp_path_factory, stops):
    """Ctrl-C after any steps, a new process each time: weights, optimizer, stream and log are those of one run."""
    packing, whole, run = straight
    folder, left = tmp_path_factory.mktemp("stopped"), STEPS
    for stop in stops:
        if stop > left:
            break
        with pytest.raises(Stopped):
            Run(folder, packing, stop_after=stop).go()
        left -= stop
    resumed = Run(folder, packing).go()
    assert_equal_states(resumed, run)
    assert steps_logged(folder) == steps_logged(whole)


@pytest.mark.parametrize("after", [1, 3, 5])
def test_killed_between_checkpoints_equals_straight(straight, tmp_path, after):
    """Killed some steps after the last checkpoint: those steps are repeated, and in the end logged once."""
    packing, whole, run = straight
    with pytest.raises(Stopped):
        Run(tmp_path, packing, stop_after=2).go()
    kept = (tmp_path / "checkpoints" / "general" / "partial.pt").read_bytes()
    with pytest.raises(Stopped):
        Run(tmp_path, packing, stop_after=min(after, STEPS - 2)).go()
    (tmp_path / "checkpoints" / "general" / "partial.pt").write_bytes(
        kept
    )  # as if the process had died before saving
    with open(tmp_path / "log.jsonl", "a", encoding="utf-8") as log:
        log.write('{"kind": "step", "sta')  # and in the middle of a line
    resumed = Run(tmp_path, packing).go()
    assert_equal_states(resumed, run)
    assert steps_logged(tmp_path) == steps_logged(whole)


def train_on(folder):
    """Train up to 60 steps from the last checkpoint in the folder, saving one after each step."""
    torch.set_num_threads(1)
    Run(Path(folder), seconds=0, steps=60).go()


def test_twenty_kills_equal_straight(tmp_path):
    """Killed twenty times at random moments, also while saving: weights and log equal those of one straight run."""
    whole = Run(tmp_path / "whole", steps=60).go()
    processes, draw = multiprocessing.get_context("forkserver"), random.Random(0)
    processes.set_forkserver_preload(["torch", "minglm.train.loop", "test_checkpoint"])
    kills = 0
    while kills < 20:
        process = processes.Process(target=train_on, args=(str(tmp_path / "killed"),))
        process.start()
        process.join(draw.uniform(0.05, 0.4))
        process.kill()  # SIGKILL; without effect on one that is done
        process.join()
        kills += process.exitcode == -signal.SIGKILL
        if process.exitcode == 0:
            break
    assert kills >= 10, "the machine is too fast for this test: give it more steps"
    assert_equal_states(Run(tmp_path / "killed", seconds=0, steps=60).go(), whole)
    assert steps_logged(tmp_path / "killed") == steps_logged(tmp_path / "whole")


@pytest.mark.parametrize("damage", ["a bit flipped", "gone"])
def test_the_checkpoint_before_takes_over(straight, tmp_path, damage):
    """If the last checkpoint has a flipped bit or is missing, the one before it leads to the same result."""
    packing, whole, run = straight
    with pytest.raises(Stopped):
        Run(tmp_path, packing, seconds=0, stop_after=4).go()
    path = tmp_path / "checkpoints" / "general" / "partial.pt"
    if damage == "gone":
        path.unlink()
        resumed = Run(tmp_path, packing).go()
    else:
        content = bytearray(path.read_bytes())
        content[len(content) // 2] ^= 1
        path.write_bytes(content)
        with pytest.warns(UserWarning, match="Resuming from the one before"):
            resumed = Run(tmp_path, packing).go()
    assert_equal_states(resumed, run)
    assert steps_logged(tmp_path) == steps_logged(whole)


def test_schedules_see_the_tokens_since_training_began(tmp_path):
    """The rate of a step follows from the tokens seen before it, earlier stages included; the log counts its own too."""
    run = Run(tmp_path)
    object.__setattr__(run.phase, "start", 1000)
    run.go()
    for number, record in enumerate(read_jsonl(tmp_path / "log.jsonl")):
        assert record["step"] == number + 1 and record["tokens"] == 1000 + (number + 1) * ROWS * S
        assert record["learning_rate"] == run.phase.learning_rate(1000 + number * ROWS * S)
    assert number + 1 == STEPS


def test_checkpoints_on_the_way_change_nothing(straight, tmp_path):
    """A checkpoint after every step gives the same run."""
    packing, _, run = straight
    assert_equal_states(Run(tmp_path, packing, seconds=0).go(), run)


def test_a_finished_stage_is_not_trained_again(tmp_path):
    """Resuming after the last token does nothing; the final checkpoint takes the place of the partial one."""
    run, again = Run(tmp_path).go(), Run(tmp_path).go()
    assert again.steps == 0
    assert_equal_states(again, run)
    again.checkpoints.save({"model": again.model.state_dict()}, final=True)
    assert again.checkpoints.final.exists() and not again.checkpoints.partial.exists()
    assert again.checkpoints.load() is None
    assert read(again.checkpoints.final)["model"].keys() == again.model.state_dict().keys()


def test_ctrl_c_means_what_it_did_before(tmp_path):
    """The previous handler is restored when the loop ends or is interrupted."""
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(Stopped):
        Run(tmp_path, stop_after=1).go()
    assert signal.getsignal(signal.SIGINT) is before


@pytest.mark.parametrize(
    "damage", ["cut short", "empty", "a bit flipped", "another format", "missing"]
)
def test_damaged_checkpoint_is_refused_in_one_line(tmp_path, damage):
    """Any damage to the file gives one line that names it and says what to do, never a traceback of unpickling."""
    path = tmp_path / "partial.pt"
    model = tiny_model(1)
    torch.save({"model": model.state_dict(), "tokens": 3, "log_position": 0}, path)
    whole, weight = path.read_bytes(), model.lm_head.weight.detach().numpy().tobytes()
    broken = {
        "cut short": whole[: len(whole) // 2],
        "empty": b"",
        "a bit flipped": whole[: (at := whole.index(weight))]
        + bytes([weight[0] ^ 1])
        + whole[at + 1 :],
        "another format": b"not a checkpoint at all",
    }
    path.unlink() if damage == "missing" else path.write_bytes(broken[damage])
    with pytest.raises(ValueError, match="checkpoint") as error:
        read(path)
    assert str(path) in str(error.value) and "\n" not in str(error.value)


def test_a_failed_save_leaves_the_old_checkpoint(tmp_path):
    """A state that cannot be written leaves the old checkpoint in place, and no other file behind."""
    checkpoints = CheckpointStore(tmp_path).stage("general")
    checkpoints.save({"tokens": 1})
    with pytest.raises(Exception):  # noqa: B017
        checkpoints.save({"tokens": lambda: 2})
    assert read(checkpoints.partial)["tokens"] == 1 and [
        p.name for p in checkpoints.partial.parent.iterdir()
    ] == ["partial.pt"]


def test_a_full_disk_keeps_both_checkpoints(tmp_path, monkeypatch):
    """A disk that fills up while saving gives one line; the last checkpoint and the one before stay intact."""
    checkpoints = CheckpointStore(tmp_path).stage("general")
    for number in (1, 2):
        checkpoints.save({"tokens": number})

    def full(state, file):
        file.write(b"half of it")
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(ValueError, match=r"cannot write .*partial\.pt: No space left"):
        checkpoints.save({"tokens": 3})
    assert sorted(p.name for p in checkpoints.partial.parent.iterdir()) == [
        "partial.pt",
        "previous.pt",
    ]
    assert [read(p)["tokens"] for p in (checkpoints.partial, checkpoints.previous)] == [2, 1]


def test_a_checkpoint_runs_no_code(tmp_path):
    """A file that would execute code when unpickled is refused."""

    class Evil:
        def __reduce__(self):
            return (print, ("executed",))

    torch.save({"model": Evil()}, tmp_path / "partial.pt")
    with pytest.raises(ValueError, match="cannot read checkpoint"):
        read(tmp_path / "partial.pt")


def test_a_store_knows_which_stages_are_complete(tmp_path):
    """A stage is interrupted with a partial checkpoint and complete with a final one; the log position is the furthest."""
    log = Log(tmp_path / "log.jsonl")
    store = CheckpointStore(tmp_path, log)
    assert store.complete(["a", "b"]) == [] and store.log_position() == 0
    log.file.write(b"12345\n")
    store.stage("a").save({"tokens": 1})
    assert store.is_interrupted("a") and not store.is_complete("a") and store.log_position() == 6
    store.save("a", {"tokens": 2})
    log.file.write(b"12345\n")
    store.stage("b").save({"tokens": 3})
    assert not store.is_interrupted("a") and store.complete(["b", "a"]) == ["a"]
    assert store.load("a")["tokens"] == 2 and store.log_position() == 12
    with pytest.raises(ValueError, match=r"no checkpoint at .*b.final\.pt"):
        store.load("b")
