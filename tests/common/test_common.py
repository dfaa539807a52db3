"""Files survive a crash, logs can be cut and read at any byte, seeds repeat, devices and threads are what was asked."""

import os
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from minglm.common import device, threads
from minglm.common.files import atomic_path, read_jsonl, write_json
from minglm.common.log import Log, Record
from minglm.common.version import versions


class Event(Record):
    """A record with any fields."""

    kind = "event"

    def __init__(self, values):
        self.__dict__.update(content=values)

    def values(self):
        """Return the fields."""
        return self.content


values = st.dictionaries(
    st.text(max_size=8), st.text(max_size=12) | st.integers() | st.none(), max_size=3
)
records = st.lists(values.filter(lambda v: "kind" not in v and "self" not in v), max_size=6)


def write(path, content):
    """Append `content` to the log at `path`."""
    log = Log(path)
    for value in content:
        log.write(Event(value))
    log.file.close()


@given(records, st.data())
def test_a_log_torn_at_any_byte_is_a_prefix_and_can_be_continued(content, data):
    """Wherever a crash cuts the log, the complete records before it are read, and none is lost afterwards."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "log.jsonl"
        write(path, content)
        expected = [{"kind": "event", **value} for value in content]
        assert read_jsonl(path) == expected
        cut = data.draw(st.integers(0, path.stat().st_size))
        os.truncate(path, cut)
        left = read_jsonl(path)
        assert left == expected[: len(left)]
        whole = path.read_bytes().count(b"\n")
        assert len(left) in (whole, whole + 1)  # one more when only the line break was lost
        write(path, [{"after": "the crash"}])
        assert read_jsonl(path) == [*expected[:whole], {"kind": "event", "after": "the crash"}]


@given(records, records, records)
def test_a_log_cut_back_forgets_what_came_after(before, lost, after):
    """Cutting a log at a stored position removes exactly the records written since."""
    with tempfile.TemporaryDirectory() as folder:
        log = Log(Path(folder) / "log.jsonl")
        for value in before:
            log.write(Event(value))
        position = log.position
        for value in lost:
            log.write(Event(value))
        log.cut(position)
        assert log.position == position
        for value in after:
            log.write(Event(value))
        assert read_jsonl(log.path) == [{"kind": "event", **value} for value in before + after]
        log.file.close()


def test_a_missing_log_is_empty(tmp_path):
    """A run that has not begun has no records."""
    assert read_jsonl(tmp_path / "log.jsonl") == []


def test_atomic_path_replaces_or_leaves_alone(tmp_path):
    """A file is the new one or the old one, whole, and nothing is left beside it; folders are made."""
    path = tmp_path / "deep" / "file.json"
    write_json(path, {"text": "词 \u2028"})
    old = path.read_bytes()
    with pytest.raises(KeyError), atomic_path(path) as temporary:
        temporary.write_text("half")
        raise KeyError
    assert path.read_bytes() == old
    write_json(path, [1])
    assert path.read_text() == "[\n 1\n]\n"
    assert os.listdir(path.parent) == ["file.json"]


def test_atomic_path_survives_kill(tmp_path):
    """A process that dies while it writes leaves the old file as it was."""
    path = tmp_path / "file.json"
    write_json(path, {"old": 1})
    old = path.read_bytes()
    program = (
        "import os, sys\nfrom minglm.common.files import atomic_path\n"
        "with atomic_path(sys.argv[1]) as t:\n    t.write_text('half')\n    os.kill(os.getpid(), 9)"
    )
    root = Path(__file__).parent.parent.parent
    done = subprocess.run([sys.executable, "-c", program, path], cwd=root)
    assert done.returncode == -9
    assert path.read_bytes() == old


def test_a_full_disk_is_one_line(tmp_path):
    """No space left is a ValueError that names the file and the remedy, and the old file stays."""
    path = tmp_path / "file.json"
    write_json(path, 1)
    message = r"cannot write .*file\.json: No space left.*--out"
    with pytest.raises(ValueError, match=message) as error, atomic_path(path):
        raise OSError(28, "No space left on device")
    assert "\n" not in str(error.value)
    assert path.read_text() == "1\n"


@given(st.integers(0, 2**40))
def test_a_seed_repeats_every_generator(seed):
    """The same seed gives the same draws from Python, numpy and torch."""

    def draws():
        device.seed_everything(seed)
        import random

        return random.random(), np.random.rand(), torch.rand(()).item()

    assert draws() == draws()


def test_devices():
    """auto always exists; a device that does not is refused in one line with the remedy."""
    assert device.pick_device().type == ("cuda" if torch.cuda.is_available() else "cpu")
    assert device.pick_device("cpu").type == "cpu"
    with pytest.raises(ValueError, match="device = 'tpu': must be auto, cpu or cuda"):
        device.pick_device("tpu")
    if not torch.cuda.is_available():
        with pytest.raises(ValueError, match="no CUDA device; use --device cpu"):
            device.pick_device("cuda")


def test_the_measured_ceiling_is_a_speed():
    """The measured FLOP/s are those of a plausible machine, and are measured once per process."""
    found = device.measured_flops(torch.device("cpu"), torch.float32, 0.01)
    assert (
        1e8 < found < 1e16
        and device.measured_flops(torch.device("cpu"), torch.float32, 0.01) == found
    )


@pytest.mark.parametrize(
    ("environment", "argument", "threads"),
    [
        ({"OMP_NUM_THREADS": "3"}, 0, 3),
        ({"OMP_NUM_THREADS": "3"}, 2, 2),
        ({"OMP_NUM_THREADS": "3,2"}, 0, 3),
        ({"OMP_NUM_THREADS": " 3 "}, 0, 3),
        ({"LOCAL_WORLD_SIZE": "1000"}, 0, 1),
    ],
)
def test_threads_are_the_argument_the_variable_or_the_share_of_the_cores(
    environment, argument, threads
):
    """An argument wins over OMP_NUM_THREADS, which wins over cores divided by ranks; never less than one."""
    clean = {
        k: v for k, v in os.environ.items() if k not in ("OMP_NUM_THREADS", "LOCAL_WORLD_SIZE")
    } | environment
    program = f"from minglm.common.threads import use_threads; use_threads({argument}); import torch; print(torch.get_num_threads())"
    root = Path(__file__).parent.parent.parent
    done = subprocess.run(
        [sys.executable, "-c", program],
        cwd=root,
        env=clean,
        capture_output=True,
        text=True,
        check=True,
    )
    assert int(done.stdout) == threads


@pytest.mark.parametrize("value", ["abc", "0", "-1", "", ",", "2.5", "9" * 30, "100000", "³"])
@pytest.mark.parametrize("variable", ["OMP_NUM_THREADS", "LOCAL_WORLD_SIZE"])
def test_a_variable_that_makes_no_sense_is_ignored(variable, value, monkeypatch):
    """The number of threads is what it would be without the variable."""
    for name in ("OMP_NUM_THREADS", "LOCAL_WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    without = threads.thread_count()
    monkeypatch.setenv(variable, value)
    assert threads.thread_count() == without
    threads.prepare_threads()
    assert os.environ["OMP_NUM_THREADS"] == str(without)


def test_versions_name_what_decides_a_number():
    """A report can say which Python, torch, device and commit made it."""
    assert {"python", "torch", "numpy", "threads", "device", "commit", "time"} <= versions().keys()
