"""Files survive a crash, logs can be cut and read at any byte, seeds repeat, devices and threads are what was asked."""

import itertools
import json
import os
import signal
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from minglm.common import device, signals, threads
from minglm.common.files import (
    atomic_path,
    check_out,
    own_prefix,
    read_jsonl,
    read_object,
    write_json,
)
from minglm.common.lock import locked
from minglm.common.log import Log, Record, check_length, forget_stage
from minglm.common.types import has_type
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
    st.text(max_size=8),
    st.text(st.characters(), max_size=12) | st.integers() | st.none(),
    max_size=3,
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


@given(records, st.data())
def test_a_log_shorter_than_its_checkpoint_says_is_refused(content, data):
    """Deleted, emptied or cut: one line with the file, and nothing is changed or made."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "log.jsonl"
        write(path, [*content, {"last": "record"}])
        position = path.stat().st_size
        check_length(path, position)
        left = data.draw(st.integers(-1, position - 1))
        path.unlink() if left < 0 else os.truncate(path, left)
        with pytest.raises(ValueError, match=r"log\.jsonl has .* bytes, but held") as error:
            check_length(path, position)
        assert "\n" not in str(error.value)
        assert (path.stat().st_size if path.exists() else -1) == left


class Note(Event):
    """What stands in place of forgotten records."""

    kind = "note"

    def __init__(self, count):
        super().__init__({"count": count})


stage_names = st.sampled_from(["a", "b", "c"])


@given(st.lists(stage_names, unique=True), stage_names, st.integers(0, 3), st.text(max_size=9))
def test_a_forgotten_stage_leaves_a_note_of_the_same_length(stages, gone, count, torn):
    """Its records go, also those that do not name it; every other record keeps its place in bytes."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "log.jsonl"
        expected = [{"kind": "start"}]
        lines = [{"kind": "start"}]
        for stage in stages:
            own = [
                {"kind": "stage_begin", "stage": stage},
                *[{"kind": "step", "stage": stage, "step": number} for number in range(count)],
                {"kind": "rejection"},
                {"kind": "stage_end", "stage": stage},
            ]
            lines += own
            expected += own if stage != gone else [{"kind": "note", "count": len(own)}]
        content = "".join(json.dumps(line) + "\n" for line in lines).encode()
        path.write_bytes(content + torn.encode())
        forget_stage(path, len(content), gone, Note)
        if gone in stages:
            assert path.stat().st_size == len(content)
            assert read_jsonl(path) == expected
            before = content.splitlines()
            after = path.read_bytes().splitlines()
            for line in after:
                assert line in before or json.loads(line)["kind"] == "note"
        else:
            assert path.read_bytes() == content + torn.encode()


def test_a_damaged_line_is_named(tmp_path):
    """A line that is no JSON, but has its line break, is no crash's."""
    path = tmp_path / "log.jsonl"
    path.write_text('{"kind": "event"}\n{"kind": "ev\n{"kind": "event"}\n', encoding="utf-8")
    with pytest.raises(ValueError, match=r"log\.jsonl, line 2 is not JSON"):
        read_jsonl(path)


@pytest.mark.parametrize(
    "content", [b"", b"{", b"[" * 100_000, b"\xff", b"[]", b"3", b"null", b"{}", b'"hash"']
)
def test_a_file_that_holds_no_such_object_is_one_line(content, tmp_path):
    """The line names the file."""
    path = tmp_path / "config.json"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"config\.json ") as error:
        read_object(path, "hash")
    assert str(error.value).isprintable()


def test_a_folder_that_cannot_be_is_refused_before_anything_is_made(tmp_path):
    """Under a file, with a name that is too long; one that can be made is accepted, and not made."""
    (tmp_path / "file").write_text("", encoding="utf-8")
    for wrong in (tmp_path / "file", tmp_path / "file" / "run", tmp_path / ("x" * 300)):
        with pytest.raises(ValueError, match="choose another folder"):
            check_out(wrong)
    check_out(tmp_path / "a" / "b")
    assert os.listdir(tmp_path) == ["file"]


HOLD = """
import sys
from minglm.common.lock import locked
with locked(sys.argv[1]):
    print("held", flush=True)
    sys.stdin.read()
"""


def test_a_folder_has_one_process_at_a_time(tmp_path):
    """A second process is refused in one line; a lock ends with its process, also when it is killed."""
    folder = tmp_path / "run"
    root = Path(__file__).parent.parent.parent
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLD, folder],
        cwd=root,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert holder.stdout.readline() == "held\n"
    with pytest.raises(ValueError, match=rf"is in use by process {holder.pid} on"), locked(folder):
        pass
    holder.kill()
    holder.communicate()
    with locked(folder):
        pass


@pytest.mark.parametrize("number", signals.SIGNALS)
def test_a_signal_stops_between_steps_or_anywhere(number):
    """Held back during a step, raised between two; without steps raised at once; the handler before is restored."""
    before = signal.getsignal(number)
    with signals.stop_between_steps() as stop:
        stop()
        signal.raise_signal(number)  # nothing happens yet
        with pytest.raises(signals.Stopped) as stopped:
            stop()
    assert stopped.value.status == 128 + number
    assert signal.getsignal(number) is before
    with signals.stoppable() as received:
        with pytest.raises(signals.Stopped):
            signal.raise_signal(number)
        assert received == [number]
    assert signal.getsignal(number) is before


def test_a_signal_that_is_ignored_stays_ignored():
    """As nohup asks for SIGHUP."""
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with signals.stoppable() as received:
            signal.raise_signal(signal.SIGHUP)
        assert not received
    finally:
        signal.signal(signal.SIGHUP, before)


def test_a_missing_log_is_empty(tmp_path):
    """A run that has not begun has no records."""
    assert read_jsonl(tmp_path / "log.jsonl") == []


def test_atomic_path_replaces_or_leaves_alone(tmp_path):
    """A file is the new one or the old one, whole, and nothing is left beside it; folders are made."""
    path = tmp_path / "deep" / "file.json"
    write_json(path, {"text": "词 \u2028"})
    old = path.read_bytes()
    with pytest.raises(KeyError), atomic_path(path) as temporary:
        temporary.write_text("half", encoding="utf-8")
        raise KeyError
    assert path.read_bytes() == old
    write_json(path, [1])
    assert path.read_text(encoding="utf-8") == "[1]\n"
    assert os.listdir(path.parent) == ["file.json"]


@given(
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
        lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    )
)
def test_json_is_read_as_it_was_written(value):
    """Whatever the values, and no line of a list of lists holds more than one of them."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "file.json"
        write_json(path, value)
        assert json.loads(path.read_text(encoding="utf-8")) == value
        write_json(path, {"rows": [[value], [1, 2]]})
        text = path.read_text(encoding="utf-8")
    assert json.loads(text) == {"rows": [[value], [1, 2]]}
    assert text.endswith("\n  [1, 2]\n ]\n}\n")


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


def test_folders_of_killed_processes_are_removed(tmp_path):
    """What a process that was killed left in a temporary folder goes when the next one makes its own; others' stay."""
    program = (
        "import os, sys, tempfile\nfrom pathlib import Path\nfrom minglm.common.files import own_prefix\n"
        "parent = Path(sys.argv[1])\nprint(tempfile.mkdtemp(prefix=own_prefix('test', parent), dir=parent), flush=True)\n"
        "sys.stdin.read()"
    )
    root = Path(__file__).parent.parent.parent
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True, "cwd": root}
    folders = []
    processes = []
    for _ in range(2):
        processes.append(subprocess.Popen([sys.executable, "-c", program, tmp_path], **pipes))
        folders.append(Path(processes[-1].stdout.readline().strip()))
    killed, living = processes
    killed.kill()
    killed.wait()
    assert all(folder.is_dir() for folder in folders)
    own = tempfile.mkdtemp(prefix=own_prefix("test", tmp_path), dir=tmp_path)
    assert sorted(tmp_path.iterdir()) == sorted([folders[1], Path(own)])
    living.communicate("")


def test_a_full_disk_is_one_line(tmp_path):
    """No space left is a ValueError that names the file and the remedy, and the old file stays."""
    path = tmp_path / "file.json"
    write_json(path, 1)
    message = r"cannot write .*file\.json: No space left.*another path"
    with pytest.raises(ValueError, match=message) as error, atomic_path(path):
        raise OSError(28, "No space left on device")
    assert "\n" not in str(error.value)
    assert path.read_text(encoding="utf-8") == "1\n"


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


CPU = torch.device("cpu")


def test_the_measured_ceiling_is_a_speed():
    """The measured FLOP/s are those of a plausible machine, once per process, and n cores have n times those of one."""
    found = device.measured_flops(CPU, torch.float32, 1)
    assert 1e8 < found < 1e15
    assert device.measured_flops(CPU, torch.float32, 3) == 3 * found


def test_a_busy_machine_does_not_lower_the_ceiling(monkeypatch):
    """Of the clock other programs take most; of the thread's own time a product takes 2 ms, and 1 ms at its best."""
    thread = itertools.accumulate(itertools.cycle([0.002, 0.002, 0.001]))
    clock = itertools.accumulate(itertools.repeat(0.05))
    monkeypatch.setattr(device.time, "thread_time", lambda: next(thread))
    monkeypatch.setattr(device.time, "perf_counter", lambda: next(clock))
    monkeypatch.setattr(torch, "mm", lambda a, b: None)
    assert device._product_seconds.__wrapped__(CPU, torch.float32, 8) == pytest.approx(0.001)


@pytest.mark.parametrize(
    ("value", "kind", "expected"),
    [
        (1, float, True),
        (1.0, int, False),
        (True, int, False),
        (True, float, False),
        (True, bool, True),
        (None, float, False),
        (None, float | None, True),
        ("1", float | None, False),
        ([1, None], list[float | None], True),
        ([1, None], list[float], False),
        ((1,), list[int], False),
        (("a",), tuple[str, ...], True),
        ({"a": 1}, dict[str, int], True),
        ({"a": "1"}, dict[str, int], False),
        ({1: 1}, dict[str, int], False),
        ({"a": []}, dict[str, Any], True),
        ([["a", 1]], list[list[Any]], True),
        (["a"], list[list[Any]], False),
    ],
)
def test_a_value_has_a_type(value, kind, expected):
    """A whole number is a float, True is no number, and what is inside counts."""
    assert has_type(value, kind) is expected


@pytest.mark.parametrize(
    ("environment", "argument", "expected"),
    [
        ({"OMP_NUM_THREADS": "3"}, 0, 3),
        ({"OMP_NUM_THREADS": "3"}, 2, 2),
        ({"OMP_NUM_THREADS": "3,2"}, 0, 3),
        ({"OMP_NUM_THREADS": " 3 "}, 0, 3),
        ({"LOCAL_WORLD_SIZE": "1000"}, 0, 1),
    ],
)
def test_threads_are_the_argument_the_variable_or_the_share_of_the_cores(
    environment, argument, expected, monkeypatch
):
    """An argument wins over OMP_NUM_THREADS, which wins over cores divided by ranks; never less than one."""
    for name in ("OMP_NUM_THREADS", "LOCAL_WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    try:
        assert threads.use_threads(argument) == 1
        assert torch.get_num_threads() == threads.threads_in_use() == expected
    finally:
        threads.use_threads(1)  # as in every worker of the suite


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
