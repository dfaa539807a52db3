"""The sandbox: no program that does not compute the function passes, nothing gets out, and nothing is left behind."""

import dataclasses
import json
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from minglm.envs.sandbox import pool as module
from minglm.envs.sandbox.pool import LEVELS, Sandbox, Verdict, compare, shared
from minglm.testing.envs import check_sandbox

JAIL = module.JAIL
ISOLATED = shared("rlimits-only").level != "rlimits-only"
needs_isolation = pytest.mark.skipif(
    not ISOLATED, reason="this machine offers resource limits only"
)


@pytest.fixture
def sandbox():
    """One worker, so that every judgement of a test shares it."""
    with Sandbox(workers=1, floor="rlimits-only") as box:
        yield box


def only(layers, tmp_path, monkeypatch):
    """Make new sandboxes use these layers of the jail and no others."""
    script = tmp_path / "thin_jail.py"
    script.write_text(
        "import importlib.util\n"
        f"spec = importlib.util.spec_from_file_location('jail', {str(JAIL)!r})\n"
        "jail = importlib.util.module_from_spec(spec)\nspec.loader.exec_module(jail)\n"
        f"jail.LAYERS = {{k: v for k, v in jail.LAYERS.items() if k in {layers!r}}}\njail.main()\n"
    )
    monkeypatch.setattr(module, "JAIL", script)


def test_contract_holds(sandbox):
    """Every cheat gets its status, and a right program passes between them."""
    check_sandbox(lambda *job: sandbox.judge(*job, seconds=0.6))


def test_contract_holds_with_resource_limits_alone(tmp_path, monkeypatch):
    """Where the kernel offers nothing the verdicts are the same; what the layers add is containment."""
    only([], tmp_path, monkeypatch)
    with Sandbox(workers=1, floor="rlimits-only") as thin:
        assert (thin.level, thin.layers) == ("rlimits-only", ("rlimits",))
        check_sandbox(lambda *job: thin.judge(*job, seconds=0.6))


def exit_code_judge(source, function, cases):
    """The tests run beside the program, and success is exit code 0."""
    tests = "\n".join(
        f"assert {function}(*{arguments!r}) == {expected!r}" for arguments, expected in cases
    )
    done = subprocess.run(
        [sys.executable, "-I", "-S", "-c", f"{source}\n{tests}"], capture_output=True, timeout=5
    )
    return Verdict(
        "passed" if done.returncode == 0 else "crash", 8 * (done.returncode == 0), len(cases)
    )


def test_contract_refuses_broken_judges(sandbox):
    """Trust in the exit code, one status for two faults, and credit for a program that did not run all tests."""

    def confuses(source, function, cases):
        verdict = sandbox.judge(source, function, cases, 0.6)
        return dataclasses.replace(verdict, status=verdict.status.replace("timeout", "wrong"))

    def generous(source, function, cases):
        return sandbox.judge(source, function, cases[:1], 0.6)

    for judge in (exit_code_judge, confuses, generous):
        with pytest.raises(AssertionError):
            check_sandbox(judge)


# Each attack returns True when it succeeds; {canary}, {folder} and {port} belong to the test.
ATTACKS = {
    "read a file": "return len(open('/etc/passwd').read()) > 0",
    "read the canary": "return len(open({canary!r}).read()) > 0",
    "list a folder": "import os; return len(os.listdir('/')) > 0",
    "write into the working folder": "open('leftover', 'w').write('x'); return True",
    "write outside": "open({folder!r} + '/leftover', 'w').write('x'); return True",
    "overwrite the canary": "open({canary!r}, 'w').write('x'); return True",
    "delete the canary": "import os; os.remove({canary!r}); return True",
    "make a folder": "import os; os.mkdir({folder!r} + '/leftover'); return True",
    "change its mode": "import os; os.chmod({canary!r}, 0o777); return True",
    "connect": "import _socket as s; s.socket().connect(('127.0.0.1', {port})); return True",
    "send a datagram": "import _socket as s; s.socket(s.AF_INET, s.SOCK_DGRAM).sendto(b'x', ('127.0.0.1', {port}));"
    " return True",
    "fork": "import os; pid = os.fork(); pid or os._exit(0); return True",
    "leave a daemon": "import os, time\n"
    "    if os.fork() == 0:\n        os.setsid()\n        time.sleep(60)\n    return True",
    "start a thread": "import _thread; _thread.start_new_thread(print, ()); return True",
    "start a shell": "import os; return os.system('true') == 0",
    "become another program": "import os, sys; os.execv(sys.executable, [sys.executable, '-c', ''])",
    "kill the parent": "import os; os.kill(os.getppid(), 9); return os.getppid() != 0",
    "kill everything": "import os; os.kill(-1, 9); return True",
    "read the parent's environment": "import os; return len(open(f'/proc/{{os.getppid()}}/environ').read()) > 0",
    "trace the parent": "import ctypes, os; return ctypes.CDLL(None).ptrace(16, os.getppid(), 0, 0) == 0",
    "mount": "import ctypes; return ctypes.CDLL(None).mount(b'none', b'/', b'tmpfs', 0, None) == 0",
    "leave the jail": "import os; os.chroot('/'); return True",
    "raise the limits": "import resource as r; r.setrlimit(r.RLIMIT_AS, (2**33, 2**33)); return True",
}
FILES = [name for name, source in ATTACKS.items() if "{canary" in source or "leftover" in source]


@pytest.fixture
def attack(tmp_path):
    """Function (sandbox, name) -> Verdict of an attack; a Verdict that passed means that the attack succeeded."""
    folder = tmp_path / "outside"
    folder.mkdir()
    canary = folder / "canary"
    canary.write_text("alive")
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]

        def run(sandbox, name):
            body = ATTACKS[name].format(canary=str(canary), folder=str(folder), port=port)
            return sandbox.judge(f"def f():\n    {body}", "f", [([], True)], seconds=1.0)

        yield run
    assert canary.read_text() == "alive" and canary.stat().st_mode & 0o777 != 0o777
    assert os.listdir(folder) == ["canary"]


def children(pid):
    """Process ids whose parent is `pid`; none where there is no /proc."""
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            stat = path.read_text()
        except OSError:
            continue  # it ended meanwhile
        if int(stat.rpartition(")")[2].split()[1]) == pid:
            found.append(int(path.parent.name))
    return found


@needs_isolation
def test_attacks_fail_and_leave_nothing(sandbox, attack):
    """No attack succeeds; the worker lives on; no process and no file remains; closing removes the folder."""
    worker = sandbox.workers.get()
    sandbox.workers.put(worker)
    for name in ATTACKS:
        verdict = attack(sandbox, name)
        assert verdict.status in ("crash", "wrong"), f"{name}: {verdict}"
        assert not children(worker.process.pid), f"{name} leaves a process"
        assert not os.listdir(sandbox.folder.name), f"{name} leaves a file"
    assert worker.process.poll() is None, "an attack killed the worker"
    sandbox.close()
    assert not os.path.exists(sandbox.folder.name)


@needs_isolation
@pytest.mark.parametrize(
    ("layer", "names"),
    [
        ("seccomp", list(ATTACKS)),
        ("landlock", ["read a file", "list a folder", "connect", *FILES]),
        (
            "namespaces",
            ["connect", "kill everything", "leave a daemon", "make a folder", *FILES[1:]],
        ),
    ],
)
def test_each_layer_holds_by_itself(layer, names, tmp_path, monkeypatch, attack):
    """The layers overlap: with any one alone, the attacks it is there for fail."""
    only([layer], tmp_path, monkeypatch)
    with Sandbox(workers=1, floor="rlimits-only") as thin:
        if layer not in thin.layers:
            pytest.skip(f"this machine has no {layer}")
        for name in names:
            if layer == "landlock" and name == "change its mode":
                continue  # Landlock does not cover file modes
            worker = thin.workers.get()
            thin.workers.put(worker)
            verdict = attack(thin, name)
            assert not children(worker.process.pid), f"{name} leaves a process"
            if name not in (
                "leave a daemon",
                "kill everything",
            ):  # may succeed inside the process namespace
                assert verdict.status in ("crash", "wrong", "timeout"), f"{name}: {verdict}"


def test_expected_values_stay_outside(sandbox):
    """A program that sends back all it can reach sends the arguments, and never an expected value."""
    source = (
        "import gc, sys\ndef f(x):\n    frame, seen = sys._getframe(0), []\n    while frame:\n"
        "        seen += [repr(v)[:9999] for v in list(frame.f_locals.values()) + list(frame.f_globals.values())]\n"
        "        frame = frame.f_back\n"
        "    return ' '.join(seen + [repr(o)[:500] for o in gc.get_objects()[-3000:]])[:300000]"
    )
    worker = sandbox.workers.get()
    jobs = []
    honest_ask, worker.ask = worker.ask, lambda job: jobs.append(job) or honest_ask(job)
    sandbox.workers.put(worker)
    verdict = sandbox.judge(source, "f", [([271828182], 314159265)])
    assert verdict.status == "wrong", verdict
    assert "314159265" not in json.dumps(jobs), "the job names the expected value"
    answer = honest_ask(jobs[0])["answer"]
    assert "271828182" in answer and "314159265" not in answer


def test_many_candidates_at_once(sandbox):
    """Verdicts come in the order of the candidates, and a slow one does not take the others down."""
    candidates = [(f"def f(x):\n    return x + {i}", "f", [([1], 1 + i % 3)]) for i in range(12)]
    candidates.insert(5, ("while True:\n    pass", "f", [([1], 1)]))
    futures = [sandbox.submit(*candidate, seconds=0.5) for candidate in candidates]
    statuses = [future.result().status for future in futures]
    assert statuses.pop(5) == "timeout"
    assert statuses == ["passed"] * 3 + ["wrong"] * 9


def test_dead_worker_is_an_infrastructure_failure(sandbox):
    """A killed worker costs one verdict, named as what it is, and is replaced."""
    job = ("def f():\n    return 1", "f", [([], 1)])
    assert sandbox.judge(*job).status == "passed"
    worker = sandbox.workers.get()
    sandbox.workers.put(worker)
    os.kill(worker.process.pid, signal.SIGKILL)
    worker.process.wait()
    assert sandbox.judge(*job).status == "infrastructure"
    assert sandbox.judge(*job).status == "passed"


@pytest.mark.parametrize(
    "script",
    [
        "import time; time.sleep(60)",  # silent
        "input()",  # ends at the first job
        "input(); print('garbage', flush=True); input()",
        """input(); print('{"ready": false, "late": false, "flood": false, "answer": ""}', flush=True); input()""",
    ],
)
def test_broken_jail_is_an_infrastructure_failure(script, tmp_path, monkeypatch):
    """Whatever a worker does instead of its work, the caller gets a Verdict in time, and no exception."""
    broken = tmp_path / "broken.py"
    broken.write_text("""print('{"layers": ["rlimits"], "slowness": 1}', flush=True)\n""" + script)
    monkeypatch.setattr(module, "JAIL", broken)
    with Sandbox(workers=1, floor="rlimits-only") as box:
        monkeypatch.setattr(module, "GRACE", 0.3)
        assert (
            box.judge("def f():\n    return 1", "f", [([], 1)], seconds=0.2).status
            == "infrastructure"
        )


def test_floor_is_held(tmp_path, monkeypatch):
    """Below the floor a sandbox does not start, and the message names the level, the floor and the remedy."""
    only([], tmp_path, monkeypatch)
    with pytest.raises(ValueError, match=r"'rlimits-only'.*'full'.*seccomp"):
        Sandbox(workers=1, floor="full")
    with pytest.raises(ValueError, match="must be one of rlimits-only, no-namespaces, full"):
        Sandbox(workers=1, floor="bunker")


@needs_isolation
def test_levels_follow_from_the_layers(tmp_path, monkeypatch):
    """The filter alone is `no-namespaces`; namespaces without the filter do not count as isolation."""
    for layers, level in ((["seccomp"], 1), (["namespaces"], 0), (["seccomp", "namespaces"], 2)):
        only(layers, tmp_path, monkeypatch)
        with Sandbox(workers=1, floor="rlimits-only") as box:
            if set(layers) <= set(box.layers):
                assert box.level == LEVELS[level]


@pytest.mark.parametrize(
    ("changes", "status"),
    [
        ({}, "passed"),
        ({"ready": False}, "infrastructure"),
        ({"late": True}, "timeout"),
        ({"flood": True}, "crash"),
        ({"answer": '[["value", "1"]]'}, "crash"),  # no secret
        ({"answer": "s3cret"}, "crash"),
        ({"answer": "s3cret[]"}, "crash"),  # no test was run
        ({"answer": 's3cret[["value", "1"], ["value", "1"]]'}, "crash"),
        ({"answer": 's3cret[["value", 1]]'}, "wrong"),
        ({"answer": 's3cret{"value": "1"}'}, "crash"),
        ({"answer": "s3cret[[]]"}, "wrong"),
        ({"answer": "s3cret[null]"}, "wrong"),
        ({"answer": 's3cret["raised", "SystemExit"]'}, "crash"),
        ({"answer": 's3cret["raised"]'}, "crash"),
    ],
)
def test_verdict_of_every_outcome(changes, status):
    """What the worker brings is read without trust: only the secret and the right text pass."""
    outcome = {
        "ready": True,
        "late": False,
        "flood": False,
        "answer": 's3cret[["value", "1"]]',
    } | changes
    assert compare(outcome, "s3cret", [1]).status == status


def test_no_tests_is_an_error_and_not_a_pass():
    """Without tests there is nothing to pass."""
    with pytest.raises(ValueError, match="no tests"):
        shared().judge("def f():\n    return 1", "f", [])
