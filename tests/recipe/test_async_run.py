"""A run of the nano config whose rollouts come from other processes, a server or another run ends with the same weights."""

import re
import shutil
import signal
import time
from pathlib import Path

import pytest
import torch
from helpers.command import Started, minglm, torchrun
from helpers.nano_run import CONFIG, OVERRIDES, records, weights

from minglm.bench.rl import Noise
from minglm.cli.main import main
from minglm.common.files import read_jsonl
from minglm.common.log import Log
from minglm.config import load_config
from minglm.envs import ENVIRONMENTS
from minglm.model.glm import GLM
from minglm.report.records import RLRecord
from minglm.train.checkpoint import CheckpointStore
from minglm.train.checkpoint_files import weights_of

STAGE = "reasoning.rl"
STEPS = 5
WORDS = [*OVERRIDES, "--posttraining.reasoning.rl.environments", "noise"]
WORDS += ["--evaluation.problems", "1", "--threads", "1"]
WORDS += ["--posttraining.reasoning.rl.steps", str(STEPS)]
WORDS += ["--posttraining.reasoning.rl.prompts", "6", "--posttraining.reasoning.rl.samples", "3"]
WORDS += ["--data.corpus_megabytes", "0.02", "--data.synthetic_documents", "4"]
WORDS += ["--posttraining.reasoning.rl.reward.rubric", "0.5"]  # the trainer's process grades
WORDS += ["--data.trajectories", "4", "--device", "cpu"]


def prepared(out, *words, first=None):
    """Return the command that runs the stage alone, from fresh weights, with the data of another run if there is one."""
    model = GLM(load_config(CONFIG, WORDS).model, seed=1)
    CheckpointStore(out).save("reasoning.sft", weights_of(model), {"tokens": 0})
    if first is not None:
        shutil.copytree(first / "data", out / "data")
    return ["run", CONFIG, "--out", str(out), "--only", STAGE, *WORDS, *words]


def ran(out, *words, first=None):
    """Run the stage as `prepared` says. Return the exit status."""
    return main(prepared(out, *words, first=first))


@pytest.fixture(scope="module")
def synchronous(tmp_path_factory):
    """Return the folder of the run whose own process rolls out.

    Fresh weights write noise, of which no environment but this one likes some more.
    """
    ENVIRONMENTS["noise"] = Noise()
    folder = tmp_path_factory.mktemp("runs") / "synchronous"
    assert ran(folder) == 0
    assert not all(record["skipped"] for record in records(folder, "rl")), "nothing was learned"
    yield folder
    del ENVIRONMENTS["noise"]


def test_workers_by_config_alone(synchronous, tmp_path):
    """`--posttraining.X.rl.asynchronous.workers 1`, staleness 0: the same log, samples and weights."""
    words = ["--posttraining.reasoning.rl.asynchronous.workers", "1"]
    words += ["--posttraining.reasoning.rl.asynchronous.max_staleness", "0"]
    assert ran(tmp_path, *words, first=synchronous) == 0
    assert records(tmp_path, "rl") == records(synchronous, "rl")
    name = f"samples/{STAGE}.jsonl"
    assert read_jsonl(tmp_path / name) == read_jsonl(synchronous / name)
    ours, theirs = weights(tmp_path, STAGE), weights(synchronous, STAGE)
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    assert all("rubric" in record["reward_parts"] for record in records(tmp_path, "rl"))
    assert "rollout 0" in (tmp_path / "report.md").read_text(encoding="utf-8")
    assert (tmp_path / "figures" / "time_line.png").exists()


def with_noise(*words):
    """Be the command line of a process that knows the environment of noise."""
    ENVIRONMENTS["noise"] = Noise()
    minglm(*words)


def with_noise_until(step, *words):
    """Be such a command line, which stands still after this step of RL."""
    write = Log.write

    def write_and_stand_still(log, record):
        write(log, record)
        if isinstance(record, RLRecord) and record.step == step:
            time.sleep(600)

    Log.write = write_and_stand_still
    with_noise(*words)


def descendants(pid):
    """Return the processes that a process has started, and those that these have."""
    found = []
    for folder in Path(f"/proc/{pid}/task").glob("*/children"):
        for child in folder.read_text().split():
            found += [int(child), *descendants(child)]
    return found


def living(pids):
    """Return those of some processes that have not ended; one that nobody has waited for has."""
    alive = []
    for pid in pids:
        try:
            state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
        except OSError:
            continue
        if state != "Z":
            alive.append(pid)
    return alive


@pytest.fixture(params=[0, 2], ids="staleness {}".format)
def killed(request, synchronous, tmp_path):
    """Return (bound on staleness, folder) of a run whose trainer is killed in the stage, and started again."""
    words = ["--posttraining.reasoning.rl.asynchronous.workers", "1"]
    words += ["--posttraining.reasoning.rl.asynchronous.max_staleness", str(request.param)]
    if request.param:
        words += ["--posttraining.reasoning.rl.loss.importance_cap", "2"]
    words += ["--checkpoint_seconds", "0.001"]
    command = prepared(tmp_path, *words, first=synchronous)
    process = Started(with_noise_until, STEPS - 1, *command)
    workers = []

    def reached():
        workers[:] = descendants(process.process.pid)
        log = tmp_path / "log.jsonl"
        return log.exists() and len(records(tmp_path, "rl")) >= 2

    status, errors = process.stop(reached, signal.SIGKILL)
    assert status == -signal.SIGKILL and len(records(tmp_path, "rl")) < STEPS, errors
    deadline = time.monotonic() + 300
    while living(workers):
        assert time.monotonic() < deadline, "a worker has outlived its trainer"
        time.sleep(0.02)
    assert workers, "there was no worker"
    status, _, errors = Started(with_noise, *command).end()
    assert status == 0, errors
    return request.param, tmp_path


@pytest.mark.slow
def test_killed_with_its_workers_and_started_again(killed, synchronous):
    """Every step and every sample is there once, of the tasks of the schedule, no token is older than the bound, and
    without staleness the run is the one that was never killed, to the bit."""
    bound, out = killed
    name = f"samples/{STAGE}.jsonl"
    found, wanted = ([*read_jsonl(folder / name)][1:] for folder in (out, synchronous))
    assert [record["step"] for record in records(out, "rl")] == list(range(1, STEPS + 1))
    keys = [
        [(s["step"], s["refill"], s["place"], s["sample"], s["task"]) for s in samples]
        for samples in (found, wanted)
    ]
    assert keys[0] == keys[1]
    for sample in found:
        for segment in sample["segments"]:
            ages = {sample["step"] - version for version, _ in segment["versions"]}
            assert ages <= set(range(bound + 1))
    if not bound:
        assert records(out, "rl") == records(synchronous, "rl") and found == wanted
        ours, theirs = weights(out, STAGE), weights(synchronous, STAGE)
        assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


@pytest.mark.ci
def test_a_trainer_on_two_ranks_has_workers(synchronous, tmp_path):
    """The first rank has the worker, both gather the weights for it, and the first grades: the same samples and records,
    but for the rounding of sums over ranks (float32, five steps)."""
    words = ["--posttraining.reasoning.rl.asynchronous.workers", "1", "--parallel.ep", "2"]
    words += ["--posttraining.reasoning.rl.asynchronous.max_staleness", "0"]
    command = prepared(tmp_path, *words, first=synchronous)
    status, _, errors = Started(torchrun, 2, 0, with_noise, *command).end()
    assert status == 0, errors
    ours, theirs = records(tmp_path, "rl"), records(synchronous, "rl")
    for name in ("step", "reward", "reward_parts", "length", "live_groups"):
        assert [r[name] for r in ours] == [r[name] for r in theirs], name
    name = f"samples/{STAGE}.jsonl"
    found, wanted = ([*read_jsonl(folder / name)][1:] for folder in (tmp_path, synchronous))
    assert [[g["tokens"] for g in s["segments"]] for s in found] == [
        [g["tokens"] for g in s["segments"]] for s in wanted
    ]
    ours, theirs = weights(tmp_path, STAGE), weights(synchronous, STAGE)
    assert all(torch.allclose(ours[name], theirs[name], atol=1e-4) for name in theirs)


@pytest.fixture
def engine_url(synchronous, tmp_path):
    """Yield the URL of `minglm serve` in a process of its own, which reads weights from a run's folder."""
    words = ["--port", "0", "--device", "cpu"]
    words += ["--weights-from", str(tmp_path / "rollout_weights"), "--accept-weights"]
    server = Started(with_noise, "serve", str(synchronous), *words)
    try:
        deadline = time.monotonic() + 300
        found = None
        while found is None:
            assert time.monotonic() < deadline and not server.has_ended(), server.end()
            time.sleep(0.02)
            said = server.printed.read_text("utf-8") if server.printed.exists() else ""
            found = re.search(r"^API (http://.*)/v1$", said, re.MULTILINE)
        yield found[1]
    finally:
        server.stop(lambda: True, signal.SIGTERM)


@pytest.mark.parametrize("way", ["disk", "tensors"])
def test_a_server_of_ones_own_answers_by_config_alone(synchronous, engine_url, tmp_path, way):
    """`--rollout_engine URL`: the same log, samples and weights, through new weights after every step, and a report."""
    words = ["--rollout_engine", engine_url, "--rollout_weights", way]
    assert ran(tmp_path, *words, first=synchronous) == 0
    assert records(tmp_path, "rl") == records(synchronous, "rl")
    name = f"samples/{STAGE}.jsonl"
    assert read_jsonl(tmp_path / name) == read_jsonl(synchronous / name)
    ours, theirs = weights(tmp_path, STAGE), weights(synchronous, STAGE)
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    assert (tmp_path / "report.md").exists() and not (tmp_path / "rollout_weights").exists()


def test_each_half_alone(synchronous, tmp_path, capsys):
    """Trained on its recorded samples, a stage ends with the same weights; rollouts alone train nothing."""
    samples = synchronous / "samples" / f"{STAGE}.jsonl"
    assert ran(tmp_path / "a", "--from-rollouts", str(samples), first=synchronous) == 0
    ours, theirs = weights(tmp_path / "a", STAGE), weights(synchronous, STAGE)
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)

    assert ran(tmp_path / "b", "--rollout-only", first=synchronous) == 0
    assert not CheckpointStore(tmp_path / "b").is_complete(STAGE)
    found = read_jsonl(tmp_path / "b" / "rollouts" / f"{STAGE}.jsonl")
    first = [line["segments"][0]["tokens"] for line in found if line.get("step") == 0]
    wanted = [
        line["segments"][0]["tokens"] for line in read_jsonl(samples) if line.get("step") == 0
    ]
    assert first == wanted, "the first step has the same weights"

    other = ["--posttraining.reasoning.rl.samples", "4", "--from-rollouts", str(samples)]
    assert ran(tmp_path / "c", *other, first=synchronous) != 0
    assert "is of another config: samples is 3, and 4 is asked for" in capsys.readouterr().err
    for words, line in (
        (["--rollout-only", "--until", STAGE], "--rollout-only is for one stage of RL: add --only"),
        (["--from-rollouts", "no.jsonl", "--only", STAGE], "no.jsonl: there is no such file"),
    ):
        assert main(["run", CONFIG, "--out", str(tmp_path / "a"), *WORDS, *words]) != 0
        assert line in capsys.readouterr().err
