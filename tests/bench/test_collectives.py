"""The measurement of links: every axis with every collective, in numbers that are possible."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers.world import run_ranks

from minglm.__main__ import main
from minglm.bench.collectives import measure, table
from minglm.config import Layout
from minglm.parallel.world import World

ROOT = Path(__file__).parent.parent.parent


def links_of(layout):
    """Measure with two rounds, on one rank of the layout."""
    return measure(World(torch.device("cpu")), layout, [1000, 4096], rounds=2)


def test_every_axis_is_measured_on_every_rank():
    """Axes of one rank have no links; all ranks agree on the slowest of them; sizes are whole parts."""
    results = run_ranks(links_of, 4, Layout(1, 1, 4, 2, 2))
    assert results[0] == results[1] == results[2] == results[3]
    links = results[0]
    assert {(link.axis, link.ranks) for link in links} == {
        ("fsdp", 4),
        ("efsdp", 2),
        ("ep", 2),
        ("cp", 2),
    }
    for axis in ("fsdp", "efsdp", "ep", "cp"):
        assert [link.operation for link in links if link.axis == axis] == 2 * [
            "gather",
            "reduce",
            "exchange",
        ]
    for link in links:
        assert link.bytes in (1000, 1008, 4096) and link.seconds > 0
        travelled = link.bytes * (link.ranks - 1) / link.ranks
        assert link.gigabytes_per_second == pytest.approx(travelled / link.seconds / 1e9)
    assert len(table(links).splitlines()) == 1 + len(links)


def test_one_process_has_no_links(capsys):
    """The line says how to start several."""
    assert main(["bench", "collectives", str(ROOT / "configs" / "nano.py")]) == 2
    assert re.search(r"one rank has no links.*torchrun", capsys.readouterr().err)


@pytest.mark.slow
def test_the_command_under_torchrun(tmp_path):
    """Two processes; one of them prints the table and writes the record."""
    words = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    words += ["-m", "minglm", "bench", "collectives", "configs/nano.py", "--megabytes", "0.01"]
    words += ["--rounds", "1", "--out", str(tmp_path / "links.json"), "--parallel.ep", "2"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(words, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("GB/s") == 1 and "exchange" in done.stdout
    found = json.loads((tmp_path / "links.json").read_text())
    assert found["layout"]["ep"] == 2 and {link["axis"] for link in found["links"]} == {
        "fsdp",
        "ep",
    }
