"""`python -m minglm run configs/nano.py`, made small, in processes of its own; and one finished run to share."""

import fcntl
import os
import shutil
from pathlib import Path

import pytest
from helpers.command import ROOT, Started, minglm

from minglm.common.files import read_jsonl
from minglm.config import load_config
from minglm.model.glm import GLM
from minglm.recipe.folder import stored_run
from minglm.train.checkpoint import CheckpointStore
from minglm.train.checkpoint_files import weights_of

SMALL = {
    "stages.general.tokens": 12_000,
    "stages.code_reasoning.tokens": 6_000,
    "stages.repository.tokens": 4_000,
    "stages.reasoning.tokens": 4_000,
    "stages.long_agent.tokens": 5_000,
    "data.corpus_megabytes": 0.2,
    "data.synthetic_documents": 60,
    "data.trajectories": 40,
    "evaluation.problems": 2,
    "evaluation.provoking_problems": 2,
    "evaluation.max_new_tokens": 16,
    "evaluation.needles": 1,
    "posttraining.prompts_per_environment": 3,
    "posttraining.drop_shortest": 0.4,
    "posttraining.chat.rl.refill": 1,
    "posttraining.pathology_rl.prompts": 8,  # so that two groups have a signal, and something is learned
    "posttraining.pathology_rl.samples": 4,
}
OVERRIDES = [word for name, value in SMALL.items() for word in (f"--{name}", str(value))]
CONFIG = str(ROOT / "configs" / "nano.py")
CLOCK = ("spans", "seconds", "evaluation_seconds", "tokens_per_second", "mfu")


def small():
    """Return the config of the shared run."""
    return load_config(CONFIG, OVERRIDES)


def start(out, *words, **options):
    """Start the command in a process of its own."""
    return Started(minglm, "run", CONFIG, "--out", str(out), *OVERRIDES, *words, **options)


def complete(out, *words, **options):
    """Run the command to its end. Return (exit status, standard output, standard error)."""
    return start(out, *words, **options).end()


def records(folder, kind=None):
    """Return the records of the log without its head and without wall-clock times."""
    found = read_jsonl(folder / "log.jsonl")
    found = [{k: v for k, v in r.items() if k not in CLOCK} for r in found if r["kind"] != "start"]
    return [r for r in found if kind in (None, r["kind"])]


def weights(folder, stage):
    """Return the weights that a stage left."""
    model = GLM(stored_run(Path(folder)).config.model)
    CheckpointStore(folder).restore(stage, weights_of(model))
    return model.state_dict()


@pytest.fixture(scope="session")
def finished(tmp_path_factory):
    """Return the folder of a run that was never stopped. Only read it: `copied` is for changing.

    The first worker of pytest-xdist that needs it makes it for all of them.
    """
    shared = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        shared = shared.parent
    folder = shared / "finished" / "run"
    folder.parent.mkdir(exist_ok=True)
    with open(folder.parent / "lock", "w", encoding="utf-8") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # until the file is closed
        printed = folder / "printed.txt"
        if not printed.exists():
            shutil.rmtree(folder, ignore_errors=True)  # of a worker that failed
            status, said, errors = complete(folder)
            assert status == 0, f"{said}\n{errors}"
            printed.write_text(said, encoding="utf-8")
    return folder


@pytest.fixture
def copied(finished, tmp_path):
    """Return a copy of the finished run."""
    return Path(shutil.copytree(finished, tmp_path / "copy"))
