"""Repair a repository of a user: its own files, its own tests, an issue in a text file (paper 3.3).

    swe:PATH?issue=FILE                                  python -m pytest -rA
    swe:PATH?issue=FILE&tests=python -m unittest -v      another command that names each test and its outcome
    swe:PATH?issue=FILE&container=IMAGE                  the command runs in a container of Docker or Podman

An environment of one task. The last commit is copied for each episode; the repository itself is only read.
Before anything else its tests are run as they are: those that fail must pass at the end, and those that pass
must still do so. They run in the jail of `sandbox/command.py`, or in containers (`sandbox/container.py`), and
from the diff, in a fresh copy each time: code that runs never meets the copy in which git is asked.

    reward = 1  iff  every test that was named at the beginning passes

A path that is no git repository, an issue that cannot be read, tests that name nothing or that already pass:
each is one line, before anything is started. `python` in the command is the Python of this process.

Choices: the one task belongs to every split, because there is nothing to hold out. It has no oracle, so it
can be scored and reinforced and not demonstrated. A program that forges a report is believed
(`sandbox/command.py` says why); a change of a test, or of the settings of its runner, is not possible.
"""

import asyncio
import random
import re
import shlex
import sys
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl

from minglm.chat.messages import Message
from minglm.common.files import read_text
from minglm.config import Split
from minglm.envs.base import Environment, Misconfigured, Score, Task, fingerprint, user, verdict
from minglm.envs.sandbox.command import CommandResult, CommandStatus, run_command
from minglm.envs.sandbox.container import Container
from minglm.envs.swe.episode import TOOLS, RepositoryEpisode
from minglm.envs.swe.repository import Refused, Repository

PREFIX = "swe:"
FORM = "swe:REPOSITORY?issue=FILE"
COMMAND = "python -m pytest -rA -q -p no:cacheprovider"
OUTCOMES = re.compile(
    r"^(?:(?P<result>PASSED|FAILED|ERROR) (?P<pytest>[^\s(]\S*)"
    r"|(?P<unittest>\w+ \([\w.]+\))(?:\n.*)? \.\.\. (?P<word>ok|FAIL|ERROR))",
    re.MULTILINE,
)
"""A test and its outcome, as `pytest -rA` and `unittest -v` print them."""
SHOWN = 1500
"""Characters of the output of the tests that the model reads, the last ones."""


class UserRepository(Environment):
    """One issue of one repository.

    Raises ValueError, in one line, where there is nothing to repair or to judge by.

    name: as in the module's header.
    """

    group = "coding"
    waits = True
    chance = 0.0
    max_turns = 50
    difficulties = (1,)
    default_difficulties = (1,)
    seconds = 300.0
    """Time for one run of the tests."""

    def __init__(self, name: str) -> None:
        self.name = name
        place, _, options = name.removeprefix(PREFIX).partition("?")
        found = dict(parse_qsl(options))
        unknown = found.keys() - {"issue", "tests", "container"}
        if unknown or "issue" not in found:
            raise ValueError(
                f"{name}: must be {FORM}, &tests=COMMAND where it is not pytest, and &container=IMAGE to run it in one"
            )
        self.path = Path(place).expanduser().resolve()
        self.command = shlex.split(found.get("tests", COMMAND))
        self.container = Container(found["container"]) if "container" in found else None
        if self.command[:1] == ["python"] and self.container is None:
            self.command[0] = sys.executable
        self.issue = read_issue(name, Path(found["issue"]).expanduser())
        self.failing, self.passing = self.first_run()

    def first_run(self) -> tuple[set[str], set[str]]:
        """Return the names of the tests that fail and of those that pass, before any repair."""
        if not (self.path / ".git").exists():
            raise ValueError(
                f"{self.name}: {self.path} is not a git repository; run git init and commit"
            )
        try:
            repository = Repository.clone(self.path)
        except RuntimeError as error:
            raise ValueError(f"{self.name}: {self.path} cannot be copied: {error}") from None
        try:
            result = self.run(repository)
        except RuntimeError as error:
            raise ValueError(f"{self.name}: {error}") from None
        finally:
            repository.close()
        if result.status == CommandStatus.TIMEOUT:
            raise ValueError(f"{self.name}: the tests take more than {self.seconds:g} seconds")
        found = outcomes(result.output)
        failing = {test for test, passed in found.items() if not passed}
        words = shlex.join(self.command)
        if not found:
            last = (result.output.strip().splitlines() or ["nothing"])[-1]
            raise ValueError(
                f"{self.name}: no tests: `{words}` names none and ends with: {last:.120}"
            )
        if not failing:
            raise ValueError(f"{self.name}: all {len(found)} tests already pass: nothing to repair")
        return failing, found.keys() - failing

    def run(self, repository: Repository) -> CommandResult:
        """Run the tests of a repository, in the jail or in a container.

        Raises Misconfigured where that cannot be had, RuntimeError where the daemon of the containers fails.
        """
        if self.container is not None:
            try:
                result = self.container.run(self.command, repository.folder.path, self.seconds)
            except ValueError as error:
                raise Misconfigured(f"{self.name}: {error}") from None
            if result.status == CommandStatus.INFRASTRUCTURE:
                raise RuntimeError(result.output)
            return result
        result = run_command(self.command, repository.folder.path, self.seconds)
        if result.status == CommandStatus.INFRASTRUCTURE:
            raise Misconfigured(
                f"{self.name}: the jail for its tests cannot be closed: {result.output}"
            )
        return result

    def task(
        self,
        index: int,
        seed: int,
        split: str = Split.TRAIN,
        difficulties: Iterable[int] | None = None,
    ) -> Task:
        """Return the one task, whatever is asked for."""
        label = {"failing": sorted(self.failing), "passing": sorted(self.passing)}
        messages = (user(self.issue),)
        task_id = fingerprint([self.name, self.issue, label])
        return Task(task_id, self.name, messages, TOOLS, label, difficulty=1)

    def tools(self) -> tuple[dict[str, Any], ...]:
        """Return the schemas of the five tools."""
        return TOOLS

    def episode(self, task: Task) -> "UserEpisode":
        """Return a fresh episode of the task."""
        return UserEpisode(self, task)

    def oracle(self, task: Task, conversation: Sequence[Message], rng: random.Random) -> Message:
        """Raise Misconfigured: nobody knows the repair."""
        raise Misconfigured(
            f"{self.name} has no solution to show; train on it without a cold start"
        )


class UserEpisode(RepositoryEpisode):
    """A copy of the user's repository."""

    def __init__(self, environment: UserRepository, task: Task) -> None:
        super().__init__(task, environment.max_turns)
        self.environment = environment
        self.deadline = 0.0
        """`time.monotonic` after which a turn starts no more tests: one without end would count as a failed machine."""

    async def respond(self, message: Message) -> list[Message]:
        """Answer every call, and run tests for as long as one run may take."""
        self.deadline = time.monotonic() + self.environment.seconds
        return await super().respond(message)

    def fresh(self) -> Repository:
        """Return a copy of the last commit."""
        return Repository.clone(self.environment.path)

    async def run_tests(self, repository: Repository) -> str:
        """Return the end of what the tests print, of a copy that has the model's changes. Raises Refused."""
        if time.monotonic() > self.deadline:
            raise Refused("the tests have used up the time of this turn; run them in another one")
        result = await asyncio.to_thread(self._try, repository.diff())
        if result.status == CommandStatus.TIMEOUT:
            self.timeouts += 1
            return "timeout"
        return result.output[-SHOWN:]

    def _try(self, patch: str) -> CommandResult:
        """Run the tests of a fresh copy with a patch.

        Whatever they run may write into the copy, also where git reads which programs to start outside the jail.
        """
        copy = self.fresh()
        try:
            if patch:
                copy.apply(patch)
            return self.environment.run(copy)
        finally:
            copy.close()

    async def grade_patch(self, repository: Repository) -> Score:
        """Run all tests; those that were named at the beginning must pass."""
        result = await asyncio.to_thread(self.environment.run, repository)
        found = outcomes(result.output)
        failing, passing = self.task.label["failing"], self.task.label["passing"]
        repaired = [found.get(test, False) for test in failing]
        kept = [found.get(test, False) for test in passing]
        late = result.status == CommandStatus.TIMEOUT
        parts = {
            "fail_to_pass": sum(repaired) / len(repaired),
            "pass_to_pass": sum(kept) / len(kept) if kept else 1.0,
            "timeout": float(late),
        }
        wrong = [test for test in [*failing, *passing] if not found.get(test)]
        return verdict(not late and not wrong, parts, ", ".join(wrong)[:200])


def read_issue(name: str, path: Path) -> str:
    """Return the text of an issue. Raises ValueError if there is none."""
    try:
        text = read_text(path).strip()
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise ValueError(f"{name}: the issue {path} cannot be read: {reason}") from None
    if not text:
        raise ValueError(f"{name}: the issue {path} is empty")
    return text


def outcomes(output: str) -> dict[str, bool]:
    """Return {test: whether it passed}, from what pytest or unittest printed; a test named twice passes if both did."""
    found: dict[str, bool] = {}
    for match in OUTCOMES.finditer(output):
        test = match["pytest"] or match["unittest"]
        passed = (match["result"] or match["word"]) in ("PASSED", "ok")
        found[test] = found.get(test, True) and passed
    return found
