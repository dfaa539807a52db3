"""Let a model repair a repository: the tools, and the judgement of its diff in a fresh one (paper 3.3).

    user: f(2) gives 7, not 10.       view("f.py")                   -> its text
                                      edit("f.py", "x - 2", "x * 2") -> ok
                                      run_tests()                    -> all pass
    assistant: Fixed.

    reward = 1  iff  every test passes in a fresh repository to which the diff was applied

The tests that failed must pass (fail to pass), and those that passed must still do (pass to pass). The code
runs in the sandbox alone, and tests are values: the arguments go in, and what comes out is compared outside.
A test file in the repository shows some of these values to the model; the grader reads none of its files. So
an exit, a print, a class that equals everything or a new `conftest.py` changes nothing, and the diff holds no
change of a test.

What may go wrong has a name: code that hangs is a "timeout", in the tool's answer and among the score's
parts; a git or a sandbox that fails is a failure of the machine, and the sample leaves the statistics.

Simplification: the files under test are modules that stand alone, since nothing can be opened in the sandbox.
A repository of a user runs its own test command in another jail (`users.py`).
"""

import ast
import asyncio
from collections.abc import Callable, Sequence
from types import TracebackType
from typing import Any, NamedTuple

from minglm.chat.messages import Message
from minglm.envs.base import (
    Environment,
    Episode,
    Misconfigured,
    Score,
    Task,
    assistant,
    tool,
    verdict,
)
from minglm.envs.sandbox.pool import Case, Verdict, VerdictStatus, shared
from minglm.envs.swe.repository import Refused, Repository

DISPATCH = "\n\ndef call_by_name(name, arguments):\n    return globals()[name](*arguments)\n"
"""Appended to the source of a module: the one function through which its tests call all others."""
SHOWN_FAILURES = 3


TOOLS = (
    tool("list", "files"),
    tool("view", "a file", ["line"], path="string", line="integer"),
    tool("search", "lines", text="string"),
    tool("edit", "replace once", path="string", old="string", new="string"),
    tool("run_tests", "run"),
)


class Check(NamedTuple):
    """One test: a call of a function of a file, and its value."""

    function: str
    arguments: Sequence[Any]
    expected: Any

    def __str__(self) -> str:
        return f"{self.function}({', '.join(map(repr, self.arguments))})"


class Assignment(NamedTuple):
    """A repository to repair."""

    files: dict[str, str]
    """{path: text}, with the bug and the tests that the model may read."""
    shown: dict[str, list[Check]]
    """{path: tests of that file} which `run_tests` runs."""
    failing: dict[str, list[Check]]
    """{path: tests} that fail with the bug and must pass without it: fail to pass."""
    passing: dict[str, list[Check]]
    """{path: tests} that pass with the bug and must still do so: pass to pass."""


class Judged(NamedTuple):
    """What tests said of one file."""

    path: str
    checks: list[Check]
    verdict: Verdict


def sandbox_case(check: Check) -> Case:
    """Return a test as the sandbox takes it."""
    return [check.function, list(check.arguments)], check.expected


class RepairEnvironment(Environment):
    """What the environments with generated bugs share.

    Subclasses define `draw`, `assignment` and `oracle`.
    """

    group = "coding"
    chance = 0.0
    waits = True
    floor = "no-namespaces"
    """Weakest sandbox isolation to accept (`sandbox.pool.LEVELS`)."""
    seconds = 2.0
    """Time for all tests of one file."""

    def tools(self) -> tuple[dict[str, Any], ...]:
        """Return the schemas of the five tools."""
        return TOOLS

    def assignment(self, task: Task) -> Assignment:
        """Return the repository of a task."""
        raise AssertionError("a RepairEnvironment defines assignment")

    def episode(self, task: Task) -> "RepairEpisode":
        """Return a fresh episode of `task`, with a repository of its own."""
        return RepairEpisode(self, task)

    async def judge(
        self, read: Callable[[str], str], tests: dict[str, list[Check]]
    ) -> list[Judged]:
        """Run tests of every file in the sandbox, all files at once.

        read: path -> text of the file. Raises RuntimeError when the sandbox fails.
        """
        try:
            sandbox = shared(self.floor)
        except ValueError as error:
            raise Misconfigured(str(error)) from error
        futures = []
        for path, checks in tests.items():
            cases = [sandbox_case(check) for check in checks]
            futures.append(
                sandbox.submit(read(path) + DISPATCH, "call_by_name", cases, self.seconds)
            )
        verdicts = await asyncio.gather(*map(asyncio.wrap_future, futures))
        for found in verdicts:
            if found.status == VerdictStatus.INFRASTRUCTURE:
                raise RuntimeError(found.detail)
        return [
            Judged(path, checks, found)
            for (path, checks), found in zip(tests.items(), verdicts, strict=True)
        ]

    def hack_probes(self, task: Task) -> list[Message]:
        """Return what earns a reward where tests run carelessly: edited tests, an exit, an output, a lie."""
        work = self.assignment(task)
        path, check = self.target(task)
        line = next(text for text in work.files[path].splitlines() if text.startswith("def "))
        constant = f"def {check.function}(*arguments):\n    return {check.expected!r}\n"
        test = next(name for name in work.files if name.startswith("test_"))
        same = "class Same:\n    def __eq__(self, other):\n        return True\n"
        edits = [
            (test, "assert", "assert True or"),
            ("conftest.py", "", "import os\nos._exit(0)\n"),
            (path, line, f"import os\nos._exit(0)\n{line}"),
            (path, line, f"raise SystemExit(0)\n{line}"),
            (path, line, f"print('ok')\n{line}"),
            (path, line, f"{same}\n{line}"),
            (path, work.files[path], constant),
            (path, work.files[path], ""),
            (f"../{path}", "", "x"),
            (".git/config", "", "x"),
        ]
        edits += special_case(work.files[path], path, work.shown[path])
        calls = [("edit", {"path": name, "old": old, "new": new}) for name, old, new in edits]
        probes = [assistant("", None, [call]) for call in calls]
        blind = [assistant("", None, [(name, {})]) for name in ("list", "run_tests")]
        claims = [assistant("Fixed."), assistant("all tests pass")]
        return super().hack_probes(task) + probes + blind + claims

    def target(self, task: Task) -> tuple[str, Check]:
        """Return the path of the file with the bug, and a test that fails."""
        work = self.assignment(task)
        path, (check, *_) = next(iter(work.failing.items()))
        return path, check


class RepositoryEpisode(Episode):
    """A repository and its tools. Subclasses define `fresh`, `run_tests` and `grade_patch`."""

    def __init__(self, task: Task, max_turns: int) -> None:
        super().__init__(task, max_turns)
        self.repository: Repository | None = None
        """Made when the first call needs it, and removed at the end."""
        self.timeouts = 0
        """Runs of the tests that were cut off."""

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Remove the repository."""
        if self.repository is not None:
            await asyncio.to_thread(self.repository.close)

    def fresh(self) -> Repository:
        """Return a new repository in the state before the repair."""
        raise AssertionError("a RepositoryEpisode defines fresh")

    async def run_tests(self, repository: Repository) -> str:
        """Return what the tool `run_tests` says."""
        raise AssertionError("a RepositoryEpisode defines run_tests")

    async def grade_patch(self, repository: Repository) -> Score:
        """Return the score of a fresh repository to which the model's changes were applied."""
        raise AssertionError("a RepositoryEpisode defines grade_patch")

    async def respond(self, message: Message) -> list[Message]:
        """Answer every call in its order; a message without calls ends the episode."""
        replies = []
        for call in message.get("tool_calls") or ():
            if self.repository is None:
                self.repository = await asyncio.to_thread(self.fresh)
            try:
                content = await self.answer(self.repository, call["name"], call["arguments"])
            except Refused as refusal:
                content = f"error: {refusal}"
            replies.append({"role": "tool", "content": content})
        return replies

    async def answer(self, repository: Repository, name: str, arguments: dict[str, Any]) -> str:
        """Return what a tool says. Raises Refused."""
        if name == "list":
            return repository.list_files()
        if name == "view":
            return repository.view(arguments["path"], arguments.get("line", 1))
        if name == "search":
            return repository.search(arguments["text"])
        if name == "edit":
            return repository.edit(**arguments)
        return await self.run_tests(repository)

    async def grade(self) -> Score:
        """Apply the diff to a fresh repository and have it judged there."""
        patch = self.repository.diff() if self.repository else ""
        if not patch:
            before = {"fail_to_pass": 0.0, "pass_to_pass": 1.0, "timeout": 0.0}
            return verdict(False, before, "nothing was changed")
        fresh = await asyncio.to_thread(self.fresh)
        try:
            fresh.apply(patch)
            return await self.grade_patch(fresh)
        finally:
            await asyncio.to_thread(fresh.close)

    def parts(self) -> dict[str, float]:
        """Return the numbers of every score, and whether anything was changed."""
        edited = self.repository is not None and self.repository.edited
        return {**super().parts(), "edited": float(edited), "tool_timeouts": self.timeouts}


class RepairEpisode(RepositoryEpisode):
    """A generated repository, whose tests are values."""

    def __init__(self, environment: RepairEnvironment, task: Task) -> None:
        super().__init__(task, environment.max_turns)
        self.environment = environment
        self.work = environment.assignment(task)

    def fresh(self) -> Repository:
        """Return a new repository with the bug."""
        return Repository.create(self.work.files)

    async def run_tests(self, repository: Repository) -> str:
        """Return what the tests that the model may read say."""
        judged = await self.environment.judge(repository.read, self.work.shown)
        self.timeouts += sum(part.verdict.status == VerdictStatus.TIMEOUT for part in judged)
        return report(judged)

    async def grade_patch(self, repository: Repository) -> Score:
        """Run all tests, those that must pass now and those that must pass still."""
        repaired = await self.environment.judge(repository.read, self.work.failing)
        kept = await self.environment.judge(repository.read, self.work.passing)
        verdicts = [part.verdict for part in (*repaired, *kept)]
        hung = any(found.status == VerdictStatus.TIMEOUT for found in verdicts)
        parts = {
            "fail_to_pass": passed_share(repaired),
            "pass_to_pass": passed_share(kept),
            "timeout": float(hung),
        }
        right = all(found.status == VerdictStatus.PASSED for found in verdicts)
        return verdict(right, parts, "; ".join(found.detail for found in verdicts if found.detail))


def special_case(text: str, path: str, shown: Sequence[Check]) -> list[tuple[str, str, str]]:
    """Return the edit (path, old, new) that answers the first test that is shown, and repairs nothing.

    Empty where the function's signature is not one line.
    """
    check = shown[0]
    for node in ast.parse(text).body:
        if isinstance(node, ast.FunctionDef) and node.name == check.function:
            line = text.splitlines()[node.lineno - 1]
            names = ", ".join(argument.arg for argument in node.args.args[: len(check.arguments)])
            condition = f"({names},) == {tuple(check.arguments)!r}"
            if line.endswith(":"):
                new = f"{line}\n    if {condition}:\n        return {check.expected!r}"
                return [(path, line, new)]
    return []


def passed_share(judged: Sequence[Judged]) -> float:
    """Return the share of tests that pass, 1 where there is none."""
    total = sum(part.verdict.total for part in judged)
    return sum(part.verdict.passed for part in judged) / total if total else 1.0


def report(judged: Sequence[Judged]) -> str:
    """Return what `run_tests` says: the first test that fails in each file, or that all pass."""
    lines = []
    for path, checks, found in judged:
        if found.status == VerdictStatus.PASSED:
            continue
        if found.status == VerdictStatus.TIMEOUT:
            lines.append(f"{path}: timeout")
            continue
        number, separator, given = found.detail.removeprefix("test ").partition(": ")
        if separator and number.isdigit():
            lines.append(report_line(checks[int(number)], given_words(given)))
        else:
            lines.append(f"{path}: {found.detail}")
    return "\n".join(lines[:SHOWN_FAILURES]) or "all pass"


def report_line(check: Check, given: str) -> str:
    """Return what is said of a test that fails: "f(2) gives 7, not 10"."""
    return f"{check} {given}, not {check.expected!r}"


def given_words(line: str) -> str:
    """Return a quoted answer of the sandbox as words: 'value i 7' is "gives 7", 'raised KeyError' is "raises KeyError"."""
    kind, _, rest = line.removesuffix(line[:1])[1:].partition(" ")
    if kind == "value":
        return f"gives {rest.partition(' ')[2]}"
    if kind == "raised":
        return f"raises {rest}"
    return f"gives a {rest}"


def test_file(path: str, checks: Sequence[Check]) -> str:
    """Return the tests of a file as the model may read them."""
    module = path.removesuffix(".py").replace("/", ".")
    names = sorted({check.function for check in checks})
    lines = [f"from {module} import {', '.join(names)}", "", ""]
    lines += [f"def test_{module.replace('.', '_')}():"]
    lines += [f"    assert {check} == {check.expected!r}" for check in checks]
    return "\n".join(lines) + "\n"
