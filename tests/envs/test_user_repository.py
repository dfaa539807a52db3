"""A user's own repository: its tests decide, they run in a jail, and what cannot be judged is refused in one line."""

import contextlib
import copy
import errno
import inspect
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest

from minglm.envs import ENVIRONMENTS
from minglm.envs.base import Misconfigured, assistant
from minglm.envs.sandbox import command
from minglm.envs.sandbox.command import run_command
from minglm.envs.sandbox.command_jail import KERNEL, OWN_NUMBERS, may_have_a_name
from minglm.envs.swe.repository import PLAIN_GIT
from minglm.envs.swe.users import outcomes
from minglm.testing.envs import play

TESTS = """
import unittest
from area import area, name

class Area(unittest.TestCase):
    def test_area(self):
        self.assertEqual(area(2, 3), 6)

    def test_name(self):
        self.assertEqual(name(), "area")
"""
BROKEN = "def area(a, b):\n    return a + b\n\n\ndef name():\n    return 'area'\n"
UNITTEST = "&tests=python -m unittest -v"


def make(folder, source=BROKEN, tests=TESTS, commit=True):
    """Write a repository and an issue; return the name of its environment."""
    folder.mkdir()
    (folder / "area.py").write_text(source, encoding="utf-8")
    (folder / "test_area.py").write_text(tests, encoding="utf-8")
    issue = folder.with_suffix(".txt")
    issue.write_text("The area of 2 and 3 is 5.\n", encoding="utf-8")
    if commit:
        for words in (["init", "-q"], ["add", "-A"], ["commit", "-qm", "x"]):
            subprocess.run(["git", *words], cwd=folder, env=PLAIN_GIT, check=True)
    return f"swe:{folder}?issue={issue}{UNITTEST}"


def edit(old, new, path="area.py"):
    return assistant("", None, [("edit", {"path": path, "old": old, "new": new})])


RUN = assistant("", None, [("run_tests", {})])
DONE = assistant("Repaired.")


def test_a_repair_is_found_by_the_users_tests(tmp_path):
    """The issue is the prompt; the right edit earns 1, a wrong one and edits of tests nothing; nothing of the user changes."""
    name = make(tmp_path / "mine")
    env = ENVIRONMENTS[name]
    assert ENVIRONMENTS[name] is env
    task = env.task(0, 0, "test")
    assert task.messages[0]["content"] == "The area of 2 and 3 is 5."
    assert [len(task.label[kind]) for kind in ("failing", "passing")] == [1, 1]
    played = play(env, task, [RUN, edit("a + b", "a * b"), RUN, DONE])
    assert "FAIL" in played.replies[0][0]["content"] and "OK" in played.replies[2][0]["content"]
    assert played.score.value == 1, played
    breaks_another = [edit("a + b", "a * b"), edit("'area'", "'a'"), DONE]
    score = play(env, task, breaks_another).score
    assert (score.value, score.parts["fail_to_pass"], score.parts["pass_to_pass"]) == (0, 1, 0)
    for cheat in (
        [edit("6", "5", "test_area.py"), DONE],
        [edit("", "import os; os._exit(0)", "conftest.py"), DONE],
        [edit("def area", "import os\nos._exit(0)\ndef area"), DONE],
        [DONE],
    ):
        assert play(env, task, cheat).score.value == 0, cheat
    assert (tmp_path / "mine" / "area.py").read_text(encoding="utf-8") == BROKEN
    with pytest.raises(Misconfigured, match="no solution to show"):
        env.demonstrate(task)


ESCAPES = """
import pathlib
git = pathlib.Path(__file__).parent / ".git"
command = "touch {outside}; cat"
with open(git / "config", "a") as file:
    file.write('[core]\\n\\tfsmonitor = "%s"\\n[filter "f"]\\n\\tclean = "%s"\\n' % (command, command))
(git / "info").mkdir(exist_ok=True)
(git / "info" / "attributes").write_text("* filter=f\\n")
pathlib.Path(__file__).with_name("left.txt").write_text("a file that the tests made")
"""
"""Code that runs in the jail, and asks git to start a program outside it."""


def test_code_under_test_cannot_have_git_start_a_program(tmp_path):
    """What runs with the tests may write what git reads, and files: neither starts anything, nor is part of the diff."""
    name = make(tmp_path / "mine")
    env = ENVIRONMENTS[name]
    task = env.task(0, 0)
    outside = tmp_path / "outside"
    hack = edit("def area", ESCAPES.replace("{outside}", str(outside)) + "def area")
    listing = assistant("", None, [("list", {})])
    played = play(env, task, [hack, RUN, listing, edit("a + b", "a * b"), RUN, listing, DONE])
    assert (
        played.replies[2][0]["content"]
        == played.replies[5][0]["content"]
        == "area.py\ntest_area.py"
    )
    assert not outside.exists()


def test_code_that_hangs_is_no_failure_of_the_machine(tmp_path):
    """However often a turn asks for tests, it ends soon: the sample is wrong, and does not leave the statistics."""
    env = copy.copy(ENVIRONMENTS[make(tmp_path / "mine")])
    env.seconds = 2.0
    hang = edit("def area", "while True:\n    pass\ndef area")
    often = assistant("", None, [("run_tests", {})] * 20)
    played = play(env, env.task(0, 0), [hang, often, DONE])
    said = [reply["content"] for reply in played.replies[1]]
    assert said[0] == "timeout" and len(said) == 20
    assert all("used up the time of this turn" in content for content in said[1:])
    assert (played.score.value, played.score.status) == (0, "wrong")


def test_what_cannot_be_judged_is_refused(tmp_path):
    """One line each: no repository, no commit, no issue, no tests, nothing to repair, an unknown option."""
    plain = make(tmp_path / "plain", commit=False)
    right = make(tmp_path / "right", source=BROKEN.replace("a + b", "a * b"))
    empty = make(tmp_path / "empty", tests="")
    issue = plain.replace("plain.txt", "none.txt")
    for name, why in (
        (plain, "is not a git repository"),
        (issue, "the issue .*none.txt cannot be read"),
        (right, "all 2 tests already pass"),
        (empty, "no tests: "),
        (plain + "&x=1", "must be swe:REPOSITORY"),
        (f"swe:{tmp_path}", "must be swe:REPOSITORY"),
    ):
        with pytest.raises(ValueError, match=why) as error:
            ENVIRONMENTS[name]
        assert "\n" not in str(error.value)


def test_reports_of_both_runners_are_read():
    """Names and outcomes of pytest and of unittest; a name that appears twice passes only if it did so twice."""
    said = (
        "PASSED test_a.py::test_x[1]\nFAILED test_a.py::test_y - assert 1\nERROR test_b.py\n"
        "test_z (test_c.C) ... ok\ntest_w (test_c.C.test_w)\nIts docstring. ... FAIL\n"
        "PASSED test_a.py::test_y\nFAILED (failures=1)\nSKIPPED [1] test_a.py:3: no\n"
    )
    assert outcomes(said) == {
        "test_a.py::test_x[1]": True,
        "test_a.py::test_y": False,
        "test_b.py": False,
        "test_z (test_c.C)": True,
        "test_w (test_c.C.test_w)": False,
    }


HOSTILE = {
    "writes outside": "open('{outside}/x', 'w')",
    "makes a folder": "import os; os.mkdir('{outside}/d')",
    "opens a connection": "import socket; socket.create_connection(('127.0.0.1', {port}), 2)",
    "sees processes": "import os; os.kill({pid}, 0)",
    "opens a device": "open('/dev/ptmx', 'rb')",
    "mounts": "import ctypes; assert ctypes.CDLL(None).mount(b'x', b'/tmp', b'tmpfs', 0, None) == 0",
}


@pytest.mark.parametrize("name", HOSTILE)
def test_the_jail_takes_away(name, tmp_path):
    """What a test of a repository could do to the machine fails in the jail; ordinary work succeeds."""
    inside = tmp_path / "inside"
    inside.mkdir()
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        source = HOSTILE[name].format(outside=tmp_path, port=port, pid=os.getpid())
        result = run_command([sys.executable, "-S", "-c", source], inside, 30)
    assert (result.status, result.exit_code) == ("ended", 1), result
    assert "Error" in result.output
    work = "import os; open('/dev/null', 'w'); open('/dev/urandom', 'rb').read(1)\n"
    work += "open('x', 'w').write('1'); open(os.environ['TMPDIR'] + '/y', 'w'); print('fine')"
    result = run_command([sys.executable, "-S", "-c", work], inside, 30)
    assert (result.status, result.exit_code, result.output) == ("ended", 0, "fine\n")
    assert [path.name for path in tmp_path.rglob("*")] == ["inside"]


@pytest.mark.parametrize("family", ["AF_UNIX", "AF_VSOCK"])
def test_no_daemon_of_the_machine_can_be_spoken_to(tmp_path, family):
    """A socket in the file system, as Docker's, is refused in the jail, and so is one of the host; pairs are not."""
    with tempfile.TemporaryDirectory() as folder, socket.socket(socket.AF_UNIX) as daemon:
        place = f"{folder}/daemon"
        daemon.bind(place)
        daemon.listen()
        address = repr(place) if family == "AF_UNIX" else "(2, 1)"
        speak = f"import socket; socket.socket(socket.{family}).connect({address})"
        result = run_command([sys.executable, "-S", "-c", speak], tmp_path, 30)
        assert (result.status, result.exit_code) == ("ended", 1)
        assert "Operation not permitted" in result.output
        daemon.settimeout(0.1)
        with pytest.raises(TimeoutError):
            daemon.accept()
    work = (
        "import socket; a, b = socket.socketpair(); a.send(b'1'); socket.socket(); print(b.recv(1))"
    )
    result = run_command([sys.executable, "-S", "-c", work], tmp_path, 30)
    assert (result.exit_code, result.output) == (0, "b'1'\n")


ROOT_IS_BOUND = tuple(map(int, re.findall(r"\d+", os.uname().release)[:2])) >= OWN_NUMBERS
BOMB = """
import os, time
made = 0
try:
    while made < 5000:
        if os.fork() == 0:
            time.sleep(60)
            os._exit(0)
        made += 1
except OSError as error:
    print(made < 1024, error.strerror)
"""


@pytest.mark.skipif(
    os.getuid() == 0 and not (ROOT_IS_BOUND and os.access(f"{KERNEL}/pid_max", os.W_OK)),
    reason="this system cannot bound the processes of root",
)
def test_a_fork_bomb_ends_at_a_number_of_processes(tmp_path):
    """Also where the command is root's; the machine's own bound stays as it was."""
    machine = Path(f"{KERNEL}/pid_max").read_text()
    result = run_command([sys.executable, "-S", "-c", BOMB], tmp_path, 60)
    assert (result.status, result.output) == ("ended", f"True {os.strerror(errno.EAGAIN)}\n")
    assert Path(f"{KERNEL}/pid_max").read_text() == machine


@pytest.mark.parametrize("word", ["no-such-program", "./text"])
def test_a_command_that_cannot_be_run_says_why(word, tmp_path):
    """A program that is not there, or is no program: its name and the reason are what it prints."""
    (tmp_path / "text").write_text("text", encoding="utf-8")
    result = run_command([word], tmp_path, 30)
    reason = os.strerror(errno.ENOENT if word == "no-such-program" else errno.EACCES)
    assert (result.status, result.exit_code) == ("ended", 127)
    assert result.output == f"{word}: {reason}\n"


def test_a_command_that_hangs_is_cut_off_with_its_children(tmp_path):
    """The deadline has a name, and nothing that the command started goes on."""
    child = f"import time; print('{tmp_path}', flush=True); time.sleep(60)"
    source = f"import subprocess, sys, time; subprocess.Popen([sys.executable, '-S', '-c', {child!r}]); time.sleep(60)"
    result = run_command([sys.executable, "-S", "-c", source], tmp_path, 6)
    assert (result.status, result.output) == ("timeout", f"{tmp_path}\n")
    deadline = time.monotonic() + 20  # the child sleeps longer
    while str(tmp_path) in command_lines() and time.monotonic() < deadline:
        time.sleep(0.05)
    assert str(tmp_path) not in command_lines()


def test_an_interrupt_ends_the_command_too(tmp_path, monkeypatch):
    """Ctrl-C while a command runs: nothing that it started goes on."""
    monkeypatch.setattr(command, "memory_of", lambda _: signal.raise_signal(signal.SIGINT))
    source = f"import time; '{tmp_path}'; time.sleep(60)"
    with pytest.raises(KeyboardInterrupt):
        run_command([sys.executable, "-S", "-c", source], tmp_path, 60)
    assert f"'{tmp_path}'; time" not in command_lines()


def test_a_long_chain_of_processes_is_watched(tmp_path):
    """Each the child of the one before, more than Python may nest calls: the command runs to its end."""
    source = (
        "import os, time\nfor _ in range(100):\n    if os.fork():\n        os.wait(); os._exit(0)\n"
    )
    source += "print('deep', flush=True); time.sleep(1)"
    limit = sys.getrecursionlimit()
    sys.setrecursionlimit(len(inspect.stack()) + 90)
    try:
        result = run_command([sys.executable, "-S", "-c", source], tmp_path, 60)
    finally:
        sys.setrecursionlimit(limit)
    assert (result.status, result.exit_code, result.output) == ("ended", 0, "deep\n")


def command_lines():
    """Return the command lines of all processes of the machine, in one text."""
    found = []
    for file in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):
            found.append(file.read_text(encoding="utf-8", errors="replace"))
    return "\n".join(found)


FILL = """
import os, sys
os.chdir(sys.argv[1] or os.environ['TMPDIR'])
print(open('a').read() if sys.argv[1] else '', end='')
try:
    for number in range(100):
        with open(str(number), 'wb') as file:
            file.write(bytes(2**20))
except OSError as error:
    print(number < 50, error.strerror)
"""


@pytest.mark.skipif(
    not may_have_a_name(), reason="this root has no CAP_SETFCAP: nothing bounds its files"
)
@pytest.mark.parametrize("place", [".", ""], ids=["folder", "temporary"])
def test_files_end_at_a_number_of_bytes(place, tmp_path, monkeypatch):
    """A command reads the files of its folder, and what it writes there, or in a temporary one, fills no disk."""
    jail = tmp_path / "jail"
    shutil.copytree(command.JAIL.parent, jail)
    source = (jail / command.JAIL.name).read_text(encoding="utf-8")
    smaller = source.replace("FOLDER = 2 * 2**30", "FOLDER = 2**25")
    (jail / command.JAIL.name).write_text(smaller, encoding="utf-8")
    monkeypatch.setattr(command, "JAIL", jail / command.JAIL.name)
    inside = tmp_path / "inside"
    inside.mkdir()
    (inside / "a").write_text("read ", encoding="utf-8")
    result = run_command([sys.executable, "-S", "-c", FILL, place], inside, 60)
    said = "read " if place else ""
    assert (result.status, result.output) == ("ended", f"{said}True {os.strerror(errno.ENOSPC)}\n")
    assert [path.name for path in inside.iterdir()] == ["a"]


def test_memory_of_all_processes_together_is_bounded(tmp_path, monkeypatch):
    """Processes that are small alone and large together die, before their time, and the output says why."""
    monkeypatch.setattr(command, "MEMORY", 2**28)
    source = "import os, time; os.fork(); os.fork(); kept = b'1' * (100 * 2**20); time.sleep(60)"
    result = run_command([sys.executable, "-S", "-c", source], tmp_path, 60)
    assert (result.status, result.exit_code) == ("ended", -9)
    assert "killed: all processes together held more than 0.25 GiB of memory" in result.output
