"""Checkpoints: a run that is stopped anywhere resumes bit for bit, and a damaged file is refused in one line."""

import errno
import multiprocessing
import os
import random
import shutil
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
from minglm.train.checkpoint import CheckpointStore
from minglm.train.checkpoint_files import weights_of
from minglm.train.loop import LoopOptions, Trainer

STEPS = 6
ROWS = 2
S = 8
SHARD = "shard-00001-model-00001-of-00001.safetensors"
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
        self.stop_after = stop_after
        self.steps = 0

    def next(self, rows):
        """Return the stream's next batch; send Ctrl-C during the step it was told to stop after."""
        self.steps += 1
        if self.steps == self.stop_after:
            signal.raise_signal(signal.SIGINT)
        return self.stream.next(rows)

    def state_dict(self):
        """Return the stream's state."""
        return self.stream.state_dict()

    def load_state_dict(self, state):
        """Restore the stream's state."""
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
    folder = tmp_path_factory.mktemp("stopped")
    left = STEPS
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
    partial = tmp_path / "checkpoints" / "general" / "partial"
    shutil.copytree(partial, tmp_path / "kept")
    with pytest.raises(Stopped):
        Run(tmp_path, packing, stop_after=min(after, STEPS - 2)).go()
    shutil.rmtree(partial)
    shutil.copytree(tmp_path / "kept", partial)  # as if the process had died before saving
    with open(tmp_path / "log.jsonl", "a", encoding="utf-8") as log:
        log.write('{"kind": "step", "sta')  # and in the middle of a line
    resumed = Run(tmp_path, packing).go()
    assert_equal_states(resumed, run)
    assert steps_logged(tmp_path) == steps_logged(whole)


def train_on(folder):
    """Train up to 100 steps from the last checkpoint in the folder, saving one after each step."""
    torch.set_num_threads(1)
    Run(Path(folder), seconds=0, steps=100).go()


def test_twenty_kills_equal_straight(tmp_path):
    """Killed twenty times at random moments, also while saving: weights and log equal those of one straight run."""
    whole = Run(tmp_path / "whole", steps=100).go()
    processes = multiprocessing.get_context("forkserver")
    draw = random.Random(0)
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
    assert_equal_states(Run(tmp_path / "killed", seconds=0, steps=100).go(), whole)
    assert steps_logged(tmp_path / "killed") == steps_logged(tmp_path / "whole")


def flip_a_bit(path):
    """Flip one bit in the middle of a file."""
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize("damage", [SHARD, "state.json", "gone"])
def test_the_checkpoint_before_takes_over(straight, tmp_path, damage):
    """If the last checkpoint has a flipped bit or is missing, the one before it leads to the same result."""
    packing, whole, run = straight
    with pytest.raises(Stopped):
        Run(tmp_path, packing, seconds=0, stop_after=4).go()
    path = tmp_path / "checkpoints" / "general" / "partial"
    if damage == "gone":
        shutil.rmtree(path)
        resumed = Run(tmp_path, packing).go()
    else:
        flip_a_bit(path / damage)
        with pytest.warns(UserWarning, match="Resuming from the one before"):
            resumed = Run(tmp_path, packing).go()
    assert_equal_states(resumed, run)
    assert steps_logged(tmp_path) == steps_logged(whole)


def test_schedules_see_the_tokens_since_training_began(tmp_path):
    """The rate of a step follows from the tokens seen before it, earlier stages included; the log counts its own too."""
    run = Run(tmp_path)
    object.__setattr__(run.phase, "start", 1000)
    run.go()
    records = read_jsonl(tmp_path / "log.jsonl")
    for number, record in enumerate(records):
        assert record["step"] == number + 1
        assert record["tokens"] == 1000 + (number + 1) * ROWS * S
        assert record["learning_rate"] == run.phase.learning_rate(1000 + number * ROWS * S)
    assert len(records) == STEPS


def test_checkpoints_on_the_way_change_nothing(straight, tmp_path):
    """A checkpoint after every step gives the same run."""
    packing, _, run = straight
    assert_equal_states(Run(tmp_path, packing, seconds=0).go(), run)


def test_a_finished_stage_is_not_trained_again(tmp_path):
    """Resuming after the last token does nothing; the final checkpoint takes the place of the partial one."""
    run, again = Run(tmp_path).go(), Run(tmp_path).go()
    assert again.steps == 0
    assert_equal_states(again, run)
    again.checkpoints.save(weights_of(again.model), {}, final=True)
    assert again.checkpoints.final.exists() and not again.checkpoints.partial.exists()
    assert again.checkpoints.load({}) is None
    other = GLM(again.model.config, seed=4)
    CheckpointStore(tmp_path).restore("general", weights_of(other))
    for name, tensor in other.state_dict().items():
        assert torch.equal(tensor, again.model.state_dict()[name])


def test_ctrl_c_means_what_it_did_before(tmp_path):
    """The previous handler is restored when the loop ends or is interrupted."""
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(Stopped):
        Run(tmp_path, stop_after=1).go()
    assert signal.getsignal(signal.SIGINT) is before


def saved(folder, *counts):
    """Return a store in which a stage has a final checkpoint (counts empty), or partial ones with these counts."""
    checkpoints = CheckpointStore(folder).stage("general")
    for count in counts:
        checkpoints.save({"model.a": torch.full((3,), float(count))}, {"tokens": count})
    if not counts:
        checkpoints.save(weights_of(tiny_model(1)), {"tokens": 3}, final=True)
    return checkpoints


@pytest.mark.parametrize("damage", ["cut short", "empty", "a bit flipped", "missing"])
@pytest.mark.parametrize("file", [SHARD, "state.json"])
def test_damaged_checkpoint_is_refused_in_one_line(tmp_path, file, damage):
    """Any damage to any file gives one line that names the checkpoint and says what to do, and nothing is loaded."""
    path = saved(tmp_path).final / file
    whole = path.read_bytes()
    if damage == "a bit flipped":
        flip_a_bit(path)
    elif damage == "missing":
        path.unlink()
    else:
        path.write_bytes(whole[: len(whole) // 2] if damage == "cut short" else b"")
    model = tiny_model(2)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(ValueError, match="cannot read checkpoint") as error:
        CheckpointStore(tmp_path).restore("general", weights_of(model))
    assert str(path.parent) in str(error.value) and "\n" not in str(error.value)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize("change", ["another shape", "a layer more", "a layer less"])
def test_another_model_is_refused_in_one_line(tmp_path, change):
    """Weights of another shape, missing ones, and ones that the model has not."""
    saved(tmp_path)
    tensors = weights_of(tiny_model(1))
    if change == "another shape":
        tensors["model.lm_head.weight"] = torch.zeros(3, 4)
    elif change == "a layer more":
        tensors["model.model.layers.9.weight"] = torch.zeros(3)
    else:
        tensors = {name: t for name, t in tensors.items() if ".layers.1." not in name}
    with pytest.raises(ValueError, match="does not hold the weights of this model") as error:
        CheckpointStore(tmp_path).restore("general", tensors)
    assert "\n" not in str(error.value)


def tokens_of(checkpoints, tensors):
    """Load a checkpoint into the tensors and return the number of tokens in it."""
    state = checkpoints.load(tensors)
    assert state is not None
    return state["tokens"]


@pytest.mark.parametrize("background", [False, True])
def test_a_failed_save_leaves_the_old_checkpoint(tmp_path, background):
    """A state that cannot be written leaves the old checkpoint in place, and no other file behind."""
    checkpoints = saved(tmp_path, 1)
    with pytest.raises(TypeError):
        checkpoints.save({}, {"tokens": lambda: 2}, background=background)
        checkpoints.writer.wait()
    assert tokens_of(checkpoints, {"model.a": torch.zeros(3)}) == 1
    assert [path.name for path in checkpoints.partial.parent.iterdir()] == ["partial"]


def test_a_full_disk_keeps_both_checkpoints(tmp_path, monkeypatch):
    """A disk that fills up while saving gives one line; the last checkpoint and the one before stay intact."""
    checkpoints = saved(tmp_path, 1, 2)

    def full(file):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patched:
        patched.setattr(os, "fsync", full)
        with pytest.raises(ValueError, match=r"cannot write .*partial: No space left"):
            checkpoints.save({"model.a": torch.zeros(3)}, {"tokens": 3})
    names = sorted(path.name for path in checkpoints.partial.parent.iterdir())
    assert names == ["partial", "previous"]
    tensors = {"model.a": torch.zeros(3)}
    assert tokens_of(checkpoints, tensors) == tensors["model.a"][0] == 2
    flip_a_bit(checkpoints.partial / SHARD)
    with pytest.warns(UserWarning, match="Resuming from the one before"):
        assert tokens_of(checkpoints, tensors) == tensors["model.a"][0] == 1


def test_a_background_save_is_of_its_moment(tmp_path):
    """What changes while a checkpoint is written in the background is not in it."""
    checkpoints = CheckpointStore(tmp_path).stage("general")
    tensors = {"model.a": torch.ones(1000, 1000)}
    checkpoints.save(tensors, {"tokens": 1}, background=True)
    tensors["model.a"].fill_(7)
    assert tokens_of(checkpoints, tensors) == 1 and (tensors["model.a"] == 1).all()


def as_earlier_runs_did(run):
    """Write the state of a run as minglm wrote it when a checkpoint was one file, with numbers for parameters."""
    torch.save(
        {
            "model": run.model.state_dict(),
            "optimizer": run.optimizer.state_dict(),
            "guard": {"norms": [], "in_a_row": 0, "left_out": 0},
            "tokens": 2 * ROWS * S,
            "step": 2,
            "stream": run.stream.state_dict(),
            "log_position": run.log.position,
        },
        run.checkpoints.partial.with_suffix(".pt"),
    )


def test_a_checkpoint_of_an_earlier_run_resumes(straight, tmp_path):
    """One file of torch.save: the run continues from it bit for bit, and replaces it by a folder."""
    packing, whole, straight_run = straight
    stopped = Run(tmp_path, packing, stop_after=2)
    with pytest.raises(Stopped):
        stopped.go()
    shutil.rmtree(stopped.checkpoints.partial)
    as_earlier_runs_did(stopped)
    assert CheckpointStore(tmp_path).log_position() == stopped.log.position
    resumed = Run(tmp_path, packing).go()
    assert_equal_states(resumed, straight_run)
    assert steps_logged(tmp_path) == steps_logged(whole)
    names = sorted(path.name for path in resumed.checkpoints.partial.parent.iterdir())
    assert names == ["partial", "previous.pt"]


def test_a_final_file_of_an_earlier_run_is_loaded(tmp_path):
    """The weights of final.pt; a flipped bit in it, and one that would run code, are refused in one line."""

    class Evil:
        def __reduce__(self):
            return (print, ("executed",))

    path = tmp_path / "checkpoints" / "general" / "final.pt"
    path.parent.mkdir(parents=True)
    old = tiny_model(1)
    model = tiny_model(2)
    store = CheckpointStore(tmp_path)
    torch.save({"model": old.state_dict(), "tokens": 5, "log_position": 0}, path)
    assert store.restore("general", weights_of(model))["tokens"] == 5
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, old.state_dict()[name])
    content = path.read_bytes()
    place = content.index(old.lm_head.weight.detach().numpy().tobytes())
    path.write_bytes(content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :])
    with pytest.raises(ValueError, match="cannot read checkpoint"):
        store.restore("general", weights_of(model))
    torch.save({"model": Evil()}, path)
    with pytest.raises(ValueError, match="cannot read checkpoint"):
        store.restore("general", weights_of(model))


def test_a_store_knows_which_stages_are_complete(tmp_path):
    """A stage is interrupted with a partial checkpoint and complete with a final one; the log position is the furthest."""
    log = Log(tmp_path / "log.jsonl")
    store = CheckpointStore(tmp_path, log)
    assert store.complete(["a", "b"]) == [] and store.log_position() == 0
    log.file.write(b"12345\n")
    store.stage("a").save({}, {"tokens": 1})
    assert store.is_interrupted("a") and not store.is_complete("a") and store.log_position() == 6
    store.save("a", {}, {"tokens": 2})
    log.file.write(b"12345\n")
    store.stage("b").save({}, {"tokens": 3})
    assert not store.is_interrupted("a") and store.complete(["b", "a"]) == ["a"]
    assert store.restore("a", {})["tokens"] == 2 and store.log_position() == 12
    with pytest.raises(ValueError, match=r"no checkpoint at .*b.final"):
        store.restore("b", {})
