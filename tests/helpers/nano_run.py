"""`python -m minglm run configs/nano.py`, made small, in processes of its own; and one finished run to share."""

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from minglm.common.files import read_jsonl
from minglm.config import load_config
from minglm.model.glm import GLM
from minglm.recipe.folder import stored_run
from minglm.train.checkpoint import CheckpointStore
from minglm.train.checkpoint_files import weights_of

ROOT = Path(__file__).parent.parent.parent
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
    "evaluation.max_new_tokens": 16,
    "evaluation.needles": 1,
    "posttraining.prompts_per_environment": 3,
}
OVERRIDES = [word for name, value in SMALL.items() for word in (f"--{name}", str(value))]
CONFIG = str(ROOT / "configs" / "nano.py")
CLOCK = ("seconds", "evaluation_seconds", "tokens_per_second", "mfu")
finished_folder = []


def small():
    """Return the config of the shared run."""
    return load_config(CONFIG, OVERRIDES)


def environment():
    """Return the environment of a process that runs this checkout."""
    return {**os.environ, "PYTHONPATH": str(ROOT)}


def start(out, *words, before=None):
    """Start the command in its own process; `before` is called in it first."""

    def prepare():
        # A test suite in the background has Ctrl-C switched off.
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        if before is not None:
            before()

    command = [sys.executable, "-m", "minglm", "run", CONFIG, "--out", str(out), *OVERRIDES, *words]
    return subprocess.Popen(
        command,
        cwd=ROOT,
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=prepare,
    )


def complete(out, *words, before=None):
    """Run the command to its end. Return (exit status, standard output, standard error)."""
    process = start(out, *words, before=before)
    printed, errors = process.communicate(timeout=900)
    return process.returncode, printed, errors


def stop(process, reached, how):
    """Send a signal once `reached()` is true. Return (exit status, standard error)."""
    deadline = time.monotonic() + 900
    while process.poll() is None and not reached():
        assert time.monotonic() < deadline
        time.sleep(0.01)
    process.send_signal(how)
    _, errors = process.communicate(timeout=900)
    return process.returncode, errors


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
    """Return the folder of a run that was never stopped. Only read it: `copied` is for changing."""
    if not finished_folder:  # a fixture that two modules import is set up for each of them
        finished_folder.append(tmp_path_factory.mktemp("nano") / "run")
        status, printed, errors = complete(finished_folder[0])
        assert status == 0, f"{printed}\n{errors}"
        (finished_folder[0] / "printed.txt").write_text(printed, encoding="utf-8")
    return finished_folder[0]


@pytest.fixture
def copied(finished, tmp_path):
    """Return a copy of the finished run."""
    return Path(shutil.copytree(finished, tmp_path / "copy"))
