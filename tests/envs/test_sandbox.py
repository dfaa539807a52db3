"""The sandbox: no program that does not compute the function passes, nothing gets out, and nothing is left behind."""

import dataclasses
import os
import pickle
import re
import resource
import secrets
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import tracemalloc
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import patch

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from minglm.envs.sandbox import library
from minglm.envs.sandbox import pool as module
from minglm.envs.sandbox.pool import LEVELS, Sandbox, Verdict, compare, shared
from minglm.envs.sandbox.values import encode, fits
from minglm.testing import strategies
from minglm.testing.envs import check_equalities, check_sandbox

JAIL = module.JAIL
ISOLATED = shared("rlimits-only").level != "rlimits-only"
needs_isolation = pytest.mark.skipif(
    not ISOLATED, reason="this machine offers resource limits only"
)


@pytest.fixture
def sandbox():
    """Yield a sandbox of one worker, so that every judgement of a test shares it."""
    with Sandbox(workers=1, floor="rlimits-only") as box:
        yield box


@pytest.fixture(scope="module")
def crew():
    """Yield a sandbox of two workers, for all tests of hostile answers."""
    with Sandbox(workers=2, floor="rlimits-only") as box:
        yield box


def only(layers, tmp_path, monkeypatch, change=""):
    """Make new sandboxes use these layers of the jail and no others; `change` is code that changes `jail`."""
    script = tmp_path / "thin_jail.py"
    script.write_text(
        "import importlib.util\n"
        f"spec = importlib.util.spec_from_file_location('jail', {str(JAIL)!r})\n"
        "jail = importlib.util.module_from_spec(spec)\nspec.loader.exec_module(jail)\n"
        f"jail.LAYERS = {{k: v for k, v in jail.LAYERS.items() if k in {layers!r}}}\n{change}\njail.main()\n",
        encoding="utf-8",
    )
    monkeypatch.setattr(module, "JAIL", script)


def test_contract_holds(sandbox):
    """Every cheat gets its status, and a right program passes between them."""
    check_sandbox(lambda *job: sandbox.judge(*job, seconds=1.5))


def test_contract_holds_with_resource_limits_alone(tmp_path, monkeypatch):
    """Where the kernel offers nothing the verdicts are the same; what the layers add is containment."""
    only([], tmp_path, monkeypatch)
    with Sandbox(workers=1, floor="rlimits-only") as thin:
        assert (thin.level, thin.layers) == ("rlimits-only", ("rlimits",))
        check_sandbox(lambda *job: thin.judge(*job, seconds=1.5))


def exit_code_judge(source, function, cases):
    """Broken: run the tests beside the program, where success is exit code 0."""
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
    """Trust in the exit code, one status for two faults, and credit for tests that did not run."""

    def confuses(source, function, cases):
        verdict = sandbox.judge(source, function, cases, 1.5)
        return dataclasses.replace(verdict, status=verdict.status.replace("timeout", "wrong"))

    def generous(source, function, cases):
        return sandbox.judge(source, function, cases[:1], 1.5)

    for judge in (exit_code_judge, confuses, generous):
        with pytest.raises(AssertionError):
            check_sandbox(judge)


def test_contract_refuses_wrong_equalities():
    """Equality of texts, of values whatever their types, of normal forms without types, and with the exact type."""

    def judge_by(equal):
        def judge(source, function, cases):
            value = eval(source.removeprefix("def f():\n    return "))
            right = all(equal(value, expected) for _, expected in cases)
            return Verdict("passed" if right else "wrong", int(right), 1)

        return judge

    check_equalities(judge_by(stands_for))
    for equal in (
        lambda given, expected: ascii([given]) == ascii([expected]),
        lambda given, expected: given == expected,
        lambda given, expected: encode(given).text == encode(expected).text,
        lambda given, expected: type(given) is type(expected) and given == expected,
    ):
        with pytest.raises(AssertionError):
            check_equalities(judge_by(equal))


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
    """Return a function (sandbox, name) -> Verdict of an attack; a Verdict that passed means that the attack succeeded."""
    folder = tmp_path / "outside"
    folder.mkdir()
    canary = folder / "canary"
    canary.write_text("alive", encoding="utf-8")
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]

        def run(sandbox, name):
            body = ATTACKS[name].format(canary=str(canary), folder=str(folder), port=port)
            return sandbox.judge(f"def f():\n    {body}", "f", [([], True)], seconds=3.0)

        yield run
    assert canary.read_text(encoding="utf-8") == "alive"
    assert canary.stat().st_mode & 0o777 != 0o777
    assert os.listdir(folder) == ["canary"]


def leftovers():
    """Return what sandboxes have left in the temporary folder."""
    return list(Path(tempfile.gettempdir()).glob("minglm-sandbox-*"))


def children(pid):
    """Return the process ids whose parent is `pid`; none where there is no /proc."""
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            stat = path.read_text(encoding="utf-8")
        except OSError:
            continue  # it ended meanwhile
        if int(stat.rpartition(")")[2].split()[1]) == pid:
            found.append(int(path.parent.name))
    return found


@needs_isolation
def test_attacks_fail_and_leave_nothing(sandbox, attack):
    """No attack succeeds; the worker lives on; no process and no file remains."""
    worker = sandbox.workers.get()
    sandbox.workers.put(worker)
    for name in ATTACKS:
        verdict = attack(sandbox, name)
        assert verdict.status in ("crash", "wrong"), f"{name}: {verdict}"
        assert not children(worker.process.pid), f"{name} leaves a process"
        assert not leftovers(), f"{name} leaves a file"
    assert worker.process.poll() is None, "an attack killed the worker"


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
            # Two of them may succeed inside the process namespace.
            if name not in ("leave a daemon", "kill everything"):
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
    honest_ask, worker.ask = worker.ask, lambda *job: jobs.append(job) or honest_ask(*job)
    sandbox.workers.put(worker)
    verdict = sandbox.judge(source, "f", [([271828182], 314159265)])
    assert verdict.status == "wrong", verdict
    job = pickle.loads(jobs[0][0])
    assert "314159265" not in repr((job, [pickle.loads(a) for a in job["arguments"]]))
    answer = honest_ask(*jobs[0])["answer"]
    assert "271828182" in answer and "314159265" not in answer


def test_many_candidates_at_once(sandbox):
    """Verdicts come in the order of the candidates, and a slow one does not take the others down."""
    candidates = [(f"def f(x):\n    return x + {i}", "f", [([1], 1 + i % 3)]) for i in range(12)]
    candidates = [(*candidate, 10.0) for candidate in candidates]
    candidates.insert(5, ("while True:\n    pass", "f", [([1], 1)], 0.5))
    futures = [sandbox.submit(*candidate) for candidate in candidates]
    statuses = [future.result().status for future in futures]
    assert statuses.pop(5) == "timeout"
    assert statuses == ["passed"] * 3 + ["wrong"] * 9


def test_a_dead_worker_costs_nothing(sandbox):
    """A killed worker is replaced, and its job is run again; where every one dies the verdict is named as what it is."""
    job = ("def f():\n    return 1", "f", [([], 1)])
    assert sandbox.judge(*job).status == "passed"
    worker = sandbox.workers.get()
    sandbox.workers.put(worker)
    os.kill(worker.process.pid, signal.SIGKILL)
    worker.process.wait()
    assert sandbox.judge(*job).status == "passed"
    with patch.object(module.Worker, "ask", side_effect=module.WorkerError("died")) as asked:
        verdict = sandbox.judge(*job)
    assert (verdict.status, verdict.detail, asked.call_count) == ("infrastructure", "died", 2)
    assert sandbox.judge(*job).status == "passed"


class StubWorker:
    """A worker without a process, which says that every value is as expected; it dies the first time it meets some jobs."""

    layers = ("seccomp", "namespaces")
    made = 0
    deadly = set()
    """Sources of these jobs."""
    gate = threading.Event()

    def __init__(self):
        StubWorker.made += 1

    def ask(self, job, seconds):
        """Wait until the gate is open, then answer."""
        self.gate.wait()
        job = pickle.loads(job)
        if job["source"] in self.deadly:
            self.deadly.remove(job["source"])
            raise module.WorkerError("a sandbox worker died")
        answer = f"{job['secret']}\nvalue {encode(1).types} {encode(1).text}"
        return {"ready": True, "late": False, "flood": False, "answer": answer}

    def close(self):
        """There is nothing to close."""


JOBS = 2000
ARGUMENTS = [list(range(2000))]
"""Of every job, 4 KB each when they are made ready."""


@pytest.mark.parametrize("eager", [False, True])
def test_thousands_of_jobs_wait_in_little_memory(monkeypatch, eager):
    """2,000 queued jobs take less than 6 MB and no more workers than there are places; all are judged, though some die.

    A twin that makes every job ready when it is queued takes more.
    """
    monkeypatch.setattr(module, "Worker", StubWorker)
    StubWorker.made = 0
    StubWorker.gate.clear()
    sources = [f"# {number}\ndef f(x):\n    return 1" for number in range(JOBS)]
    StubWorker.deadly = set(sources[::50])
    cases = [(ARGUMENTS, 1)]
    with Sandbox(workers=4) as box:
        tracemalloc.start()
        if eager:
            jobs = [module.prepare(source, "f", cases, 2.0) for source in sources]
            futures = [box.threads.submit(box.run, job) for job in jobs]
        else:
            futures = [box.submit(source, "f", cases) for source in sources]
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        StubWorker.gate.set()
        assert {future.result(60).status for future in futures} == {"passed"}
    assert (peak > 6e6) == eager, f"{peak / 1e6:.1f} MB"
    assert not StubWorker.deadly and StubWorker.made <= 4 + JOBS // 50


@pytest.mark.parametrize(
    "script",
    [
        "import time; time.sleep(60)",  # silent
        "control.recv(9)",  # ends at the first job
        "control.recv(9); control.send(b'garbage\\n'); time.sleep(60)",
        "control.recv(9); control.send(b'[]\\n'); time.sleep(60)",
        """control.recv(9); control.send(b'{"late": false, "exhausted": false}\\n'); time.sleep(60)""",
    ],
)
def test_broken_jail_is_an_infrastructure_failure(script, tmp_path, monkeypatch):
    """Whatever a worker does instead of its work, the caller gets a Verdict in time, and no exception."""
    broken = tmp_path / "broken.py"
    hello = '{"layers": ["rlimits"], "slowness": 1}\n'
    broken.write_text(
        "import socket, time\ncontrol = socket.socket(fileno=0)\n"
        f"control.send({hello.encode()!r})\n{script}\n",
        encoding="utf-8",
    )
    monkeypatch.setattr(module, "JAIL", broken)
    with Sandbox(workers=1, floor="rlimits-only") as box:
        monkeypatch.setattr(module, "GRACE", 0.3)
        verdict = box.judge("def f():\n    return 1", "f", [([], 1)], seconds=0.2)
        assert verdict.status == "infrastructure"


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


RIGHT = "s3cret\nvalue i 1"


def outcome(**changes):
    """Return the outcome of a right answer to one test, changed."""
    return {"ready": True, "late": False, "flood": False, "answer": RIGHT} | changes


@pytest.mark.parametrize(
    ("changes", "status"),
    [
        ({}, "passed"),
        ({"ready": False}, "infrastructure"),
        ({"late": True}, "timeout"),
        ({"flood": True}, "crash"),
        ({"answer": "value i 1"}, "crash"),  # no secret
        ({"answer": "s3cretvalue i 1"}, "crash"),
        ({"answer": "s3cret"}, "crash"),
        ({"answer": "s3cret\n"}, "wrong"),
        ({"answer": f"{RIGHT}\nvalue i 1"}, "crash"),
        ({"answer": "s3cret\nvalue b 1"}, "wrong"),
        ({"answer": "s3cret\nvalue  1"}, "wrong"),
        ({"answer": "s3cret\nvalue"}, "wrong"),
        ({"answer": "s3cret\nodd list"}, "wrong"),
        ({"answer": "s3cret\nraised ValueError"}, "crash"),
        ({"answer": "s3cret\nfailed SystemExit"}, "crash"),
    ],
)
def test_verdict_of_every_outcome(changes, status):
    """What the worker brings is read without trust: only the secret and the right text pass."""
    assert compare(outcome(**changes), "s3cret", [1]).status == status


pieces = st.sampled_from(
    ["value", "failed", "raised", "odd", " ", "\n", "i", "1", "[", "{", '"', "\\", "\0"]
)
answers = st.lists(
    st.tuples(pieces | st.text(max_size=3), st.sampled_from([1, 2, 20_000])), max_size=6
)


@settings(strategies.contract, max_examples=60)
@given(answers, st.booleans(), st.sampled_from([1, [1], {}, "x", 2.5, {1: {2}}]))
def test_any_answer_is_one_verdict(parts, signed, expected):
    """Text of any depth, length and form gives a Verdict with one short line, and it never passes."""
    answer = ("s3cret\n" if signed else "") + "".join(piece * n for piece, n in parts)
    verdict = compare(outcome(answer=answer), "s3cret", [expected, expected])
    assert verdict.status in ("crash", "wrong") and verdict.passed < 2 and verdict.total == 2
    assert len(verdict.detail) < 120 and verdict.detail.isprintable() and verdict.detail.isascii()


FORGE = (
    "import os, sys\nsecret = next(f for f in (sys._getframe(1), sys._getframe(2)) if 'job' in f.f_locals)"
    ".f_locals['job']['secret']\nos.write(3, (secret + {text}).encode('utf-8', 'surrogatepass'))\nos._exit(0)"
)
HOSTILE_ANSWERS = {
    "a deep list as JSON": FORGE.format(text="'[' * 100_000"),
    "a deep list, line by line": FORGE.format(text="'\\n' + 'value  ' + '[' * 100_000"),
    "a deep dict": FORGE.format(text="'\\nvalue  ' + '{1:' * 100_000"),
    "a long number": FORGE.format(text="'\\nvalue i ' + '9' * 100_000"),
    "many lines": FORGE.format(text="'\\nvalue i 1' * 50_000"),
    "not ASCII": FORGE.format(text="'\\nvalue  \\ud800\\0\u4e00'"),
    "nothing": FORGE.format(text="''"),
    "a deep value": "def f():\n    x = []\n    for i in range(100_000):\n        x = [x]\n    return x",
    "itself": "def f():\n    x = []\n    x.append(x)\n    return x",
    "a wide value": "def f():\n    x = 1\n    for i in range(60):\n        x = [x, x]\n    return x",
    "a key of many numbers": "def f():\n    return {tuple(range(10**5)): 1}",
    "a long int": "def f():\n    return 1 << 10**6",
    "deep source": "x = " + "(" * 10_000,
    "many operators": "x = " + "-" * 100_000 + "1",
    "a name of its own": "class \u540d(Exception): pass\nraise \u540d",
    "an exception without a name": "E = type('\\n' * 10**5, (Exception,), {})\nraise E",
    "an exception that is one": "class E(Exception):\n    def __str__(self): raise self\nraise E",
    "a class that lies": "class V:\n    __class__ = int\ndef f():\n    return V()",
    "no more memory": "x = []\nwhile True:\n    x.append(bytearray(10**6))",
    "no more descriptors": "import os\nfor d in range(64):\n    try: os.close(d)\n    except OSError: pass",
    "noise": "import os\nwhile True:\n    os.write(3, bytes(99_999))",
    "a drip": "import os, time\nwhile True:\n    os.write(3, b'x')\n    time.sleep(0.01)",
    "its own signal": "import signal\nsignal.raise_signal(9)",
    "a signal to itself in C": "import ctypes\nctypes.CDLL(None).abort()",
}


@pytest.mark.parametrize("name", HOSTILE_ANSWERS)
def test_a_hostile_answer_is_the_verdict_of_its_candidate_alone(name, crew):
    """It fails, on its own account; the right program beside it and the one after it pass."""
    right = ("def f():\n    return 1", "f", [([], 1)])
    hostile = crew.submit(HOSTILE_ANSWERS[name], "f", [([], 1)], seconds=0.5)
    beside = crew.submit(*right)
    assert hostile.result().status in ("crash", "wrong", "timeout"), hostile.result()
    assert beside.result().status == crew.judge(*right).status == "passed"


# Equality, and what may be used


def scalars():
    """Return a strategy of plain values without parts."""
    numbers = st.sampled_from(
        [0, 1, 2, 0.0, -0.0, 1.0, 2.5, 2**60, 2.0**60, 1e300, 1j, 2 + 0j, True, False]
    )
    return numbers | st.none() | st.text(max_size=3) | st.binary(max_size=3) | st.integers()


values_of_all_kinds = st.recursive(
    scalars(),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.lists(inner, max_size=3).map(tuple)
        | st.sets(scalars(), max_size=3)
        | st.frozensets(scalars(), max_size=3)
        | st.dictionaries(scalars(), inner, max_size=3)
    ),
    max_leaves=8,
)


def with_other_numbers(value, rng):
    """Return the same value with some numbers in another type, and other orders inside."""
    if isinstance(value, (bool, int, float)) and rng.random() < 0.5:
        kinds = [kind for kind in (int, float, complex, bool) if same_number(kind, value)]
        return rng.choice(kinds)(value)
    if isinstance(value, dict):
        items = [(with_other_numbers(k, rng), with_other_numbers(v, rng)) for k, v in value.items()]
        return dict(rng.sample(items, len(items)))
    if isinstance(value, (list, tuple, set, frozenset)):
        return type(value)(with_other_numbers(item, rng) for item in value)
    return value


def same_number(kind, value):
    """Tell whether a number can be written in another type without a change."""
    try:
        return kind(value) == value
    except OverflowError:
        return False


def stands_for(given, expected):
    """Tell whether one plain value may be given for another: the definition, slow and simple."""
    ranks = {int: 0, float: 1, complex: 2}
    if type(given) in ranks and type(expected) in ranks:
        return given == expected and ranks[type(given)] <= ranks[type(expected)]
    if not isinstance(given, type(expected)) or isinstance(given, bool) != isinstance(
        expected, bool
    ):
        return False
    if given != expected:
        return False
    if isinstance(expected, (list, tuple)):
        return all(stands_for(g, e) for g, e in zip(given, expected, strict=True))
    if isinstance(expected, (set, frozenset)):
        return all(any(stands_for(g, e) for g in given) for e in expected)
    if isinstance(expected, dict):
        return all(
            any(stands_for(k, key) and stands_for(given[k], value) for k in given)
            for key, value in expected.items()
        )
    return True


@given(values_of_all_kinds, values_of_all_kinds, st.randoms(use_true_random=False))
def test_equality_is_pythons_with_the_types_of_the_task(value, other, rng):
    """`fits` agrees with the definition, on values that are near each other and on any two."""
    for answer in (value, with_other_numbers(value, rng), other):
        assert fits(encode(answer), encode(value)) == stands_for(answer, value), (answer, value)
    assert "\n" not in encode(value).text and encode(value).text.isascii()


@settings(strategies.contract, max_examples=5)
@given(st.lists(values_of_all_kinds, min_size=30, max_size=60))
def test_arguments_arrive_as_they_are(values):
    """Tuples, sets, bytes and keys that are numbers too: a function that returns its argument passes."""
    verdict = shared("rlimits-only").judge(
        "def f(x):\n    return x", "f", [([v], v) for v in values]
    )
    assert verdict.status == "passed", verdict


@pytest.mark.parametrize(
    "value",
    [
        object(),
        print,
        float("nan"),
        [1, {2: float("-nan")}],
        complex("nan"),
        range(3),
        ...,
        (1).__add__,
    ],
)
def test_a_value_that_cannot_be_compared_is_an_error_of_the_task(value, sandbox):
    """It is said before a program runs, by judge and by submit, with the number of the test and the remedy."""

    def submit(*job):
        return sandbox.submit(*job).result()

    for judge in (sandbox.judge, submit):
        with pytest.raises(ValueError, match=r"test 1.*(consist of|equals nothing; let)"):
            judge("def f(x):\n    return 1", "f", [([1], 1), ([1], value)])
    if value == value and not isinstance(value, list):
        with pytest.raises(ValueError, match=r"test 0.*consist of"):
            sandbox.judge("def f(x):\n    return 1", "f", [([value], 1)])


def test_values_that_contain_themselves_are_an_error_of_the_task(sandbox):
    """Endless and very deep values too."""
    endless = []
    endless.append(endless)
    deep = []
    for _ in range(100_000):
        deep = [deep]
    for value in (endless, deep):
        with pytest.raises(ValueError, match=r"test 0.*consist of"):
            sandbox.judge("def f():\n    return 1", "f", [([], value)])


NEEDS_A_MACHINE = {
    *(
        "asyncio",
        "crypt",
        "curses",
        "dbm",
        "nis",
        "ossaudiodev",
        "pty",
        "readline",
        "rlcompleter",
        "spwd",
        "sqlite3",
    ),
    *(
        "ssl",
        "sunau",
        "syslog",
        "termios",
        "tty",
        "audioop",
        "chunk",
        "aifc",
        "getpass",
        "msilib",
        "winreg",
        "winsound",
    ),
    *(
        "msvcrt",
        "nt",
        "_winapi",
        "_msi",
        "_overlapped",
        "_scproxy",
        "_osx_support",
        "ntpath",
        "imghdr",
        "nturl2path",
    ),
}
"""Modules that may fail: those of terminals, devices, databases and other systems."""


def test_the_standard_library_can_be_imported(sandbox):
    """Every public module that imports here imports in the jail, but those that need a machine."""
    public = {name for name in sys.stdlib_module_names if not name.startswith("_")}
    wanted = sorted(public - library.SKIPPED - library.SKIPPED_IN_C - NEEDS_A_MACHINE)
    source = (
        "def f(names):\n    failed = []\n    for name in names:\n        try:\n            __import__(name)\n"
        "        except BaseException as error:\n            failed.append(name + ': ' + repr(error))\n    return failed"
    )
    assert len(wanted) > 150
    verdict = sandbox.judge(source, "f", [([wanted], [])], seconds=20)
    assert verdict.status == "passed", verdict


@pytest.mark.parametrize(
    ("body", "value"),
    [
        (
            "import hashlib; return hashlib.md5(b'x').hexdigest()",
            "9dd4e461268c8034f5c8564e155c67a6",
        ),
        ("import copy; return copy.deepcopy([[1]])", [[1]]),
        ("from array import array; return list(array('i', [1, 2]))", [1, 2]),
        ("import base64; return base64.b64encode(b'x')", b"eA=="),
        ("import queue; q = queue.Queue(); q.put(1); return q.get()", 1),
        ("import threading\n    with threading.Lock(): return 1", 1),
        ("import unicodedata; return unicodedata.name('a')", "LATIN SMALL LETTER A"),
        ("import zlib; return zlib.decompress(zlib.compress(b'x'))", b"x"),
        ("return 'x'.encode('utf-16-le')", b"x\0"),
        (
            "import json, logging, enum, uuid, textwrap, secrets, zoneinfo; return json.loads('[1]')",
            [1],
        ),
        ("import numpy", None),  # not of the standard library
    ],
)
def test_pure_modules_work(body, value, sandbox):
    """What a module computes is right; a module that is not there is an ordinary exception."""
    status = "crash" if value is None else "passed"
    assert sandbox.judge(f"def f():\n    {body}", "f", [([], value)]).status == status


def test_dataclasses_work(sandbox):
    """With annotations that are text, which dataclasses looks up in the module of the class."""
    source = (
        "from __future__ import annotations\nfrom dataclasses import dataclass, asdict\nfrom typing import ClassVar\n"
        "@dataclass(order=True)\nclass P:\n    x: int\n    k: ClassVar[int] = 3\n"
        "def f():\n    import pickle\n    return asdict(pickle.loads(pickle.dumps(max(P(1), P(2)))))"
    )
    verdict = sandbox.judge(source, "f", [([], {"x": 2})])
    assert verdict.status == "passed", verdict


# Jobs know nothing of each other

SHOW_MAPS = (
    "def show(seconds, limit=jail.limit_resources):\n"
    "    import sys\n    sys.maps = open('/proc/self/maps').read()\n    limit(seconds)\n"
    "jail.limit_resources = show"
)
READS_JOBS = (  # a server that looks at the job before it forks
    "def curious(channel, *rest, serve=jail.serve_job):\n"
    "    import os, socket\n    peek = socket.socket(fileno=os.dup(channel))\n"
    "    kept.append(peek.recv(2**20, socket.MSG_PEEK))\n    return serve(channel, *rest)\n"
    "kept = []\njail.serve_job = curious\n"
)
SEARCH = """
import ctypes, sys
def f(keys):
    found = [False] * len(keys)
    halves = [bytes(c ^ 1 for c in key[:16]) for key in keys]
    for line in sys.maps.splitlines():
        span, rights, *_, name = line.split()
        if rights[0] != "r" or name in ("[vvar]", "[vsyscall]", "[vvar_vclock]"):
            continue
        start, end = (int(x, 16) for x in span.split("-"))
        memory = ctypes.string_at(start, end - start)
        for i, key in enumerate(keys):
            at = memory.find(halves[i])
            while at >= 0 and not found[i]:
                found[i] = bytes(c ^ 1 for c in memory[at + 16 : at + 32]) == key[16:]
                at = memory.find(halves[i], at + 1)
    return found
"""


def found_by_the_next_job(tmp_path, monkeypatch, layers, change):
    """Return the names that the second job of a worker finds in its memory of the first, and of itself."""
    only(layers, tmp_path, monkeypatch, SHOW_MAPS + "\n" + change)
    plants = {
        name: secrets.token_hex(16) for name in ("source", "argument", "answer", "secret", "own")
    }
    tokens = iter([plants["secret"], secrets.token_hex(16)])
    monkeypatch.setattr(module, "secrets", SimpleNamespace(token_hex=lambda n: next(tokens)))
    with Sandbox(workers=1, floor="rlimits-only") as box:
        backwards = plants["answer"][::-1]
        source = f"# {plants['source']}\ndef f(a, b):\n    return b[::-1]"
        first = box.judge(source, "f", [([plants["argument"], backwards], plants["answer"])])
        assert first.status == "passed", first
        keys = [bytes(c ^ 1 for c in plant.encode()) for plant in plants.values()]
        outcomes = []
        honest = module.compare
        monkeypatch.setattr(
            module,
            "compare",
            lambda result, *rest: outcomes.append(result) or honest(result, *rest),
        )
        box.judge(f"# {plants['own']}{SEARCH}", "f", [([keys], [])], seconds=10)
    flags = re.fullmatch(r"\w+\nvalue b+ \[(.*)\]", outcomes[0]["answer"])[1].split(", ")
    return {name for name, flag in zip(plants, flags, strict=True) if flag == "1"}


@pytest.mark.skipif(sys.platform != "linux", reason="the search needs Linux's list of mappings")
@pytest.mark.parametrize(
    "layers", [[], ["seccomp"], ["namespaces", "landlock", "seccomp"]], ids=len
)
def test_no_memory_of_another_job(layers, tmp_path, monkeypatch):
    """A program that searches all of its memory finds its own source, and nothing of the job before it."""
    assert found_by_the_next_job(tmp_path, monkeypatch, layers, "") == {"own"}


@pytest.mark.skipif(sys.platform != "linux", reason="the search needs Linux's list of mappings")
def test_the_search_finds_what_a_server_has_read(tmp_path, monkeypatch):
    """With a server that looks at its jobs, the same program finds what they said."""
    found = found_by_the_next_job(tmp_path, monkeypatch, [], READS_JOBS)
    assert found >= {"own", "source", "argument", "secret"}


def test_what_a_program_changes_is_gone_with_it(sandbox):
    """Modules, and the mapping of the library made writable and overwritten: the next program sees neither."""
    source = (
        "import ctypes, sys, json\njson.loads = lambda text: 'forged'\nlibrary = sys.meta_path[-2]\n"
        "size = len(library.bytes)\nlibc = ctypes.CDLL(None, use_errno=True)\n"
        "view = (ctypes.c_char * 1).from_buffer_copy(b'x')\n"
        "buffer = ctypes.py_object(library.bytes)\n"
        "class Buffer(ctypes.Structure):\n    _fields_ = [('buf', ctypes.c_void_p), ('rest', ctypes.c_byte * 200)]\n"
        "b = Buffer()\nctypes.pythonapi.PyObject_GetBuffer(buffer, ctypes.byref(b), 0)\n"
        "def f():\n"
        "    done = libc.mprotect(ctypes.c_void_p(b.buf), ctypes.c_size_t(size), 3)\n"
        "    ctypes.memset(ctypes.c_void_p(b.buf), 0, size)\n"
        "    return done, library.bytes[:100] == bytes(100), json.loads('[1]')"
    )
    verdict = sandbox.judge(source, "f", [([], (0, True, "forged"))])
    assert verdict.status == "passed", f"the attack itself is broken: {verdict}"
    next_one = "import dataclasses, json\ndef f():\n    return json.loads('[1]'), dataclasses.MISSING is None"
    assert sandbox.judge(next_one, "f", [([], ([1], False))]).status == "passed"


def test_a_killed_process_leaves_nothing(tmp_path):
    """kill -9, while jobs wait and run: neither a folder nor a worker remains."""
    script = (
        "from minglm.envs.sandbox.pool import Sandbox\nimport time\nbox = Sandbox(2, 'rlimits-only')\n"
        "for i in range(2): box.submit('while True: pass', 'f', [([], 1)], seconds=30)\n"
        "time.sleep(0.3)\nprint('running', flush=True)\n"
        "time.sleep(60)"
    )
    environment = os.environ | {"TMPDIR": str(tmp_path), "PYTHONPATH": os.pathsep.join(sys.path)}
    process = subprocess.Popen(
        [sys.executable, "-c", script], stdout=subprocess.PIPE, env=environment
    )
    process.stdout.readline()
    workers = children(process.pid)
    below = [grandchild for worker in workers for grandchild in children(worker)]
    process.kill()
    process.wait()
    process.stdout.close()
    assert os.listdir(tmp_path) == []
    deadline = time.monotonic() + 60
    while any(Path(f"/proc/{pid}/stat").exists() for pid in workers + below):
        assert time.monotonic() < deadline, "a worker lives on"
        time.sleep(0.02)


def test_more_than_a_thousand_open_files(sandbox):
    """A process with descriptors beyond 1,024 judges as any other."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard != resource.RLIM_INFINITY and hard < 1300:
        pytest.skip("this machine allows too few open files")
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, 1300), hard))
    held = []
    try:
        held = [os.open(os.devnull, os.O_RDONLY) for _ in range(1100)]
        verdict = sandbox.judge("def f():\n    return 1", "f", [([], 1)])
    finally:
        for descriptor in held:
            os.close(descriptor)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert verdict.status == "passed", verdict


def test_no_tests_is_an_error_and_not_a_pass():
    """Without tests there is nothing to pass."""
    with pytest.raises(ValueError, match="no tests"):
        shared().judge("def f():\n    return 1", "f", [])
