"""Every config of the ladder goes through every dry run: nothing is started, nothing is written.

`run CONFIG --dry-run` is in tests/recipe/test_preflight.py.
"""

import re
import resource
import subprocess
import sys
from pathlib import Path

import pytest

from minglm import GLM
from minglm.__main__ import main
from minglm.config import load_config

ROOT = Path(__file__).parent.parent.parent
CONFIGS = ROOT / "configs"
LADDER = sorted(path.stem for path in CONFIGS.glob("*.py"))


def printed(capsys, *words):
    """What a command prints that succeeds."""
    assert main([str(word) for word in words]) == 0
    return capsys.readouterr().out


@pytest.mark.parametrize("name", LADDER)
def test_plan_and_data(name, capsys, tmp_path, monkeypatch):
    """Without a file of the user's, and with one."""
    config = CONFIGS / f"{name}.py"
    text = tmp_path / "notes.txt"
    text.write_text("a note\n")
    empty = tmp_path / "empty"
    empty.mkdir()
    monkeypatch.chdir(empty)
    assert "parameters" in printed(capsys, "plan", config)
    for words in ([], ["--data.files", text]):
        out = printed(capsys, "data", config, "--dry-run", *words)
        assert f"would be in runs/{name}/data" in out
    assert not list(empty.iterdir())


def test_import(capsys, tmp_path):
    """A released checkpoint of the config's model could be imported; one of another model is refused."""
    config = CONFIGS / "nano.py"
    GLM(load_config(config).model).save_pretrained(tmp_path / "released")
    words = ["import", config, tmp_path / "released", "--out", tmp_path / "run", "--dry-run"]
    assert "would be stage long_agent" in printed(capsys, *words)
    assert not (tmp_path / "run").exists()
    words[1] = CONFIGS / "toy.py"
    assert main([str(word) for word in words]) == 2


def test_launch(capsys):
    """The rehearsal of a small world: what each rank holds, its peak, and the collectives of a step."""
    words = ["--gpus", 4, "--gpus-per-node", 4, "--parallel.ep", 2, "--until", "general"]
    out = printed(capsys, "launch", CONFIGS / "nano.py", "--dry-run", *words)
    assert "159,168 parameters, on a rank 39,792 at most and 39,792 at least" in out
    assert re.search(r"micro-batch all-to-all over 2 ranks +\d", out)
    assert "usable" in out and "does not fit" not in out


def test_launch_of_a_pipeline(capsys):
    """Both ends of it: rank 0 has the embedding, the last one the head and the MTP layer, and both send and receive."""
    words = ["--gpus", 2, "--gpus-per-node", 2, "--parallel.pp", 2, "--until", "general"]
    out = printed(capsys, "launch", CONFIGS / "nano.py", "--dry-run", *words)
    first, last = out.split("rank 1 of the pipeline's 2")
    assert "rank 0 of the pipeline's 2" in first
    for end in (first, last):
        assert "send over 2 ranks" in end and "receive over 2 ranks" in end
    counts = [
        int(re.search(r"([\d,]+) parameters", end)[1].replace(",", "")) for end in (first, last)
    ]
    assert sum(counts) == 159_168 and counts[0] < counts[1]


FULL_SIZE = [
    ("mini.py", "general"),
    ("flash_30b.py:h100x8", "general"),
    ("air_106b.py:h100x32", "general"),
    ("air_106b.py:h100x64", "general"),
    *((f"glm45_355b.py:h100x{gpus}", "general") for gpus in (256, 512)),
    *((f"glm45_355b.py:h100x{gpus}_32k", "repository") for gpus in (256, 512)),
    *((f"glm45_355b.py:h100x{gpus}_128k", "long_agent") for gpus in (256, 512)),
    (
        "glm45_355b.py --gpus 256 --parallel.pp 4 --parallel.interleave 2 --parallel.fsdp 64 --parallel.ep 32",
        "general",
    ),
]


@pytest.mark.ci
@pytest.mark.parametrize(("name", "stage"), FULL_SIZE)
def test_launch_of_full_size(name, stage):
    """The stage that a layout is for is rehearsed within 16 GiB, and fits, as the plan says."""
    words = ["launch", *f"configs/{name}".split(), "--dry-run", "--stage", stage]
    done = subprocess.run(
        [sys.executable, "-m", "minglm", *words],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert done.returncode == 0 and "does not fit" not in done.stdout, done.stderr
    assert "peak of a micro-batch" in done.stdout
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert usage.ru_maxrss < 16 * 2**20  # KiB
