"""Repairing repositories: the contract, cheats, files that nobody may edit, bugs that tests notice, failures by name."""

import asyncio
import dataclasses

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from minglm.config import Split
from minglm.envs import ENVIRONMENTS
from minglm.envs.base import assistant
from minglm.envs.swe import library, repository
from minglm.envs.swe.bugs import Raised, behaviour, edit_that_repairs, find_function, mutations
from minglm.envs.swe.bugs import with_bug as broken
from minglm.envs.swe.functions import RepairFunctions
from minglm.envs.swe.library import RepairLibrary
from minglm.envs.swe.repository import Refused, Repository, is_protected
from minglm.testing.envs import check_chance, check_oracle, play

FILES = {"a.py": "x = 1\ny = 1\n", "pkg/b.py": "z = 2\n", "test_a.py": "assert True\n"}


@pytest.fixture
def repo():
    """A repository of FILES."""
    made = Repository.create(FILES)
    yield made
    made.close()


def test_a_repository_is_real_and_fresh(repo):
    """It has one commit of these files; what one copy changes no other copy sees, and its folder goes away."""
    log = repository.git(repo.folder.path, "log", "--oneline")
    assert len(log.splitlines()) == 1
    assert repo.list_files().split() == sorted(FILES)
    assert repo.diff() == ""
    repo.edit("a.py", "y = 1", "y = 2")
    other = Repository.create(FILES)
    assert other.read("a.py") == FILES["a.py"]
    other.apply(repo.diff())
    assert other.read("a.py") == repo.read("a.py") == "x = 1\ny = 2\n"
    other.close()
    assert not other.folder.path.exists()


@settings(max_examples=8)
@given(
    text=st.text(
        st.sampled_from("a\n\r\0\t \x0c\ufeff猫") | st.characters(codec="utf-8"), max_size=9
    )
)
@example(text="\0")
def test_whatever_was_written_reaches_the_grader(text):
    """The diff of any text, of what git takes for binary too, makes the same files in a fresh copy."""
    ours, theirs = Repository.create(FILES), Repository.create(FILES)
    ours.edit("a.py", "y = 1", text)
    ours.edit("new.py", "", text)
    theirs.apply(ours.diff())
    for name in ("a.py", "new.py"):
        files = [(each.folder.path / name).read_bytes() for each in (ours, theirs)]
        assert files[0] == files[1]
    for each in (ours, theirs):
        each.close()


@pytest.mark.parametrize(
    ("path", "old", "why"),
    [
        ("a.py", "= 1", "occurs 2 times"),
        ("a.py", "q", "occurs 0 times"),
        ("a.py", "", "exists"),
        ("b.py", "x", "no such text file"),
        ("../a.py", "", "not a path"),
        ("/etc/passwd", "", "not a path"),
        ("link/passwd", "", "not a path"),
        ("pkg", "x", "no such text file"),
        ("a.py/c", "", "no file can be made|not a path"),
        ("test_a.py", "True", "cannot be edited"),
        ("pkg/TEST_b.py", "", "cannot be edited"),
        ("pkg/conftest.py", "", "cannot be edited"),
        ("tests/data.txt", "", "cannot be edited"),
        (".git/config", "", "cannot be edited"),
        (".gitattributes", "", "cannot be edited"),
        ("sitecustomize.py", "", "cannot be edited"),
        ("x" * 300, "", "cannot be written"),
        ("x" * 300, "x", "no such text file"),
        ("x/" * 3000 + "x", "", "no file can be made|not a path"),
        ("\ud800", "", "not a path|cannot be written"),
        ("loop", "", "not a path"),
        ("loop/a.py", "x", "not a path"),
    ],
)
def test_edits_are_refused(repo, path, old, why):
    """Each refusal says why, and changes nothing."""
    (repo.folder.path / "link").symlink_to("/etc")
    (repo.folder.path / "loop").symlink_to("loop")
    with pytest.raises(Refused, match=why):
        repo.edit(path, old, "new")
    assert repo.diff() == ""


def test_the_diff_leaves_protected_files_out(repo):
    """A way around the refusal earns nothing; a new file of the model's own is part of the diff."""
    for path in (
        *("test_a.py", "testa.py", "pkg/tests.py", "pkg/a_tests.py", "tests/t.py"),
        *("conftest.py", "pkg/conftest.py", "pyproject.toml", ".pytest.ini", "pytest.toml"),
    ):
        assert is_protected(path)
        place = repo.folder.path / path
        place.parent.mkdir(exist_ok=True)
        place.write_text("assert 1\n")
    repo.edit("new.py", "", "n = 1\n")
    named = [line for line in repo.diff().splitlines() if line.startswith("+++")]
    assert named == ["+++ b/new.py"]


def test_lines_are_those_of_a_compiler(repo):
    """A form feed or another separator inside a line ends none, whatever the file's line ends are; links are passed over."""
    (repo.folder.path / "loop").symlink_to("loop")
    repo.edit("c.py", "", "a = 1\r\n\x0cb = '\u2028'\rc = 3")
    assert repo.view("c.py", 2) == "\x0cb = '\u2028'\nc = 3"
    assert repo.search("c = 3") == "c.py:3: c = 3"
    assert repo.view("a.py") == "x = 1\ny = 1"


# Bugs

SOURCE = '''
def f(x, y=0):
    """Is x < 2 and y > 1?"""
    if x < 2 and not y:  # < and 1
        return [x + 1]
    return x
'''


def test_a_bug_is_one_token_of_the_body():
    """Docstring, signature and comments stay; each mutation changes one line and still compiles."""
    wrong = [bug.wrong.strip() for bug in mutations(find_function(SOURCE, "f"))]
    assert wrong == [
        "if x <= 2 and not y:  # < and 1",
        "if x > 2 and not y:  # < and 1",
        "if x < 1 and not y:  # < and 1",
        "if x < 3 and not y:  # < and 1",
        "if x < 2 or not y:  # < and 1",
        "if x < 2 and  y:  # < and 1",
        "return [x - 1]",
        "return [x + 0]",
        "return [x + 2]",
    ]
    with pytest.raises(ValueError, match="no function g"):
        find_function(SOURCE, "g")


def test_behaviour_is_measured_without_hanging():
    """Values, exceptions and endless loops each have their own answer."""
    source = "def f(x):\n    while x > 3:\n        pass\n    return 1 // x\n"
    assert behaviour(source, "f", {}, [(2,), (0,), (9,)]) == [
        0,
        Raised("ZeroDivisionError"),
        Raised("endless"),
    ]


@given(
    st.lists(st.sampled_from(["a = 1", "b = a + 2", "  c = 3"]), min_size=1, max_size=6), st.data()
)
def test_an_edit_repairs(lines, data):
    """The old text occurs once, however often the line is repeated, and its replacement gives the right file back."""
    right = "\n".join(["def f():", *(f"    {line}" for line in lines)]) + "\n"
    where = data.draw(st.integers(1, len(lines)))
    before = right.splitlines()[where]
    bug = mutations(find_function("def f():\n    a = 1\n", "f"))[0]
    bug = bug._replace(line=where, right=before, wrong=before.replace("=", "=="))
    wrong = broken(right, bug)
    old, new = edit_that_repairs(wrong, bug)
    assert wrong.count(old) == 1
    assert wrong.replace(old, new) == right


# The standard library


def test_contract_of_the_library():
    """The oracle earns everything from searching to the last test, and no answer earns anything everywhere."""
    env = ENVIRONMENTS["swe:library"]
    check_oracle(env)
    check_chance(env)
    probes = env.hack_probes(task := env.task(1, 0))
    for probe in probes:
        if probe.get("tool_calls"):
            assert play(env, task, [probe]).score.value == 0, probe


def test_modules_belong_to_one_split():
    """Each split has modules of both difficulties; a module of a test task is in no other split."""
    env = RepairLibrary()
    found = {}
    for split in Split:
        for difficulty in env.difficulties:
            tasks = [env.task(index, 0, split, [difficulty]) for index in range(15)]
            assert tasks
            found.setdefault(split, set()).update(task.label["module"] for task in tasks)
    assert not found["train"] & found["test"]
    assert not found["train"] & found["development"]
    assert not found["test"] & found["development"]


def test_every_module_passes_its_own_tests():
    """What this Python's modules give outside the sandbox they give inside, whole files included."""
    env = RepairLibrary()
    modules = [library.load(name) for level in env.difficulties for name in library.names_of(level)]
    sources = {module.path: module.source for module in modules}
    tests = {
        module.path: [check for made in module.checks.values() for check in made]
        for module in modules
    }
    judged = asyncio.run(env.judge(sources.__getitem__, tests))
    assert {part.path: part.verdict for part in judged if part.verdict.status != "passed"} == {}
    assert len(judged) > 20


@settings(max_examples=4)
@given(st.integers(0, 10**6))
def test_a_bug_of_the_library_is_what_the_tests_say(index):
    """Before the repair the tests that should fail do so, the others pass, and the file differs by one line."""
    env = RepairLibrary()
    task = env.task(index, 0)
    work = env.assignment(task)
    (path,) = work.shown
    before = asyncio.run(env.judge(work.files.__getitem__, {path: work.failing[path]}))
    assert before[0].verdict.passed == 0
    kept = asyncio.run(env.judge(work.files.__getitem__, {path: work.passing[path]}))
    assert kept[0].verdict.status == "passed", kept
    module = library.load(task.label["module"])
    pairs = zip(module.source.splitlines(), work.files[path].splitlines(), strict=True)
    assert sum(right != wrong for right, wrong in pairs) == 1
    compile(work.files[f"test_{path.rpartition('/')[2]}"], "tests", "exec")


# Failures by name


def edit(old, new, path="f.py"):
    return assistant("", None, [("edit", {"path": path, "old": old, "new": new})])


RUN = assistant("", None, [("run_tests", {})])


def simple_task():
    """Return a task of f(x) = (x + 3) * 2, whose second line subtracts."""
    functions = {
        "f": {"argument": "x", "steps": [["add", 3], ["times", 2]]},
        "g": {"argument": "x", "steps": [["add", 1], ["abs", None]]},
    }
    task = ENVIRONMENTS["swe"].task(0, 0)
    return dataclasses.replace(
        task, label={"functions": functions, "wrong": ["f", 1, ["subtract", 2]]}
    )


def test_hanging_code_is_a_timeout():
    """The tool says so, the score has it among its parts, and the sample counts as wrong."""
    env = RepairFunctions()
    env.seconds = 1.0
    hang = edit("x = x - 2", "while True: pass")
    score, replies, _ = play(env, simple_task(), [hang, RUN, assistant("Done.")])
    assert replies[1][0]["content"] == "f.py: timeout"
    assert (score.value, score.status) == (0, "wrong")
    assert (score.parts["timeout"], score.parts["tool_timeouts"]) == (1, 1)


def test_a_repair_may_be_written_in_any_way():
    """The tests decide, and say what is wrong until they pass; breaking another function costs the reward."""
    env = RepairFunctions()
    other = edit("x = x - 2", "x += x")
    played = play(env, simple_task(), [RUN, other, RUN, assistant("Done.")])
    assert "gives" in played.replies[0][0]["content"]
    assert played.replies[2][0]["content"] == "all pass"
    assert (played.score.value, played.score.parts["fail_to_pass"]) == (1, 1)
    worse = edit("x = x + 1", "x = x + 2", "g.py")
    score = play(env, simple_task(), [other, worse, assistant("Done.")]).score
    assert score.value == 0 and score.parts["fail_to_pass"] == 1 > score.parts["pass_to_pass"] > 0


def test_failures_of_the_machine_leave_the_statistics(monkeypatch):
    """A git that hangs is nobody's wrong answer."""
    env = RepairFunctions()

    def hangs(*words, **options):
        raise RuntimeError("git diff took more than 60 seconds")

    async def graded():
        async with env.episode(simple_task()) as episode:
            await episode.step(edit("x = x - 2", "x = x * 2"))
            monkeypatch.setattr(repository, "git", hangs)
            return await episode.score()

    with pytest.warns(UserWarning, match="leaves the statistics"):
        score = asyncio.run(graded())
    assert score.status == "infrastructure" and "60 seconds" in score.detail
