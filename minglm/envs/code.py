"""Ask for a tiny function to a specification, the coding task of the toy (paper 3.2, code RL).

    Write f(x): add 3, then times 2.       think: x + 3          answer: def f(x):
                                                  (x + 3) * 2                return (x + 3) * 2

The difficulty is the number of steps, 1 to 4. The reward is 1 when hidden tests pass in the sandbox, so every
program that computes the function is right, however it is written. The source is never run, or even compiled,
in this process.

Choices: tests are drawn with the task, and a task is dealt only if leaving out any step, or answering a
constant, fails one. Train and test are divided by what is computed, and not by how it is said. Each operation
has a table row with its words, its expression, and a Python function that gives the expected values, so the
oracle's program and the tests come from different columns and check each other.

Grading waits in a thread of the sandbox, so answers are judged in parallel and other episodes continue
meanwhile. Equal answers to one task that wait at the same time are judged once.

Simplification: one function of one argument; the paper's tasks are competitive programming and repositories.
"""

import asyncio
import random
import re
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from functools import cache
from typing import Any, NamedTuple

from minglm.chat.messages import Message
from minglm.envs.base import (
    Misconfigured,
    Score,
    SingleTurn,
    SingleTurnEpisode,
    Task,
    assistant,
    fingerprint,
    no_answer,
    user,
    verdict,
)
from minglm.envs.sandbox.pool import Case, Sandbox, Verdict, VerdictStatus, check_cases, shared


class Operation(NamedTuple):
    """One step that a function may consist of."""

    words: str
    """In the prompt; {c} is the constant, if there is one."""
    expression: str
    """In Python: {e} is the expression so far, {a} the same in brackets if it needs them, {c} the constant."""
    meaning: Callable[[Any, Any], Any]
    """The value after the step, from the value before it and the constant."""


NUMBER_STEPS = {
    "add": Operation("add {c}", "{a} + {c}", lambda x, c: x + c),
    "subtract": Operation("subtract {c}", "{a} - {c}", lambda x, c: x - c),
    "times": Operation("times {c}", "{a} * {c}", lambda x, c: x * c),
    "remainder": Operation("remainder by {c}", "{a} % {c}", lambda x, c: x % c),
    "abs": Operation("abs", "abs({e})", lambda x, c: abs(x)),
    "at_least": Operation("at least {c}", "max({e}, {c})", lambda x, c: max(x, c)),
    "at_most": Operation("at most {c}", "min({e}, {c})", lambda x, c: min(x, c)),
}
LIST_STEPS = {
    "even": Operation(
        "keep even",
        "[x for x in {e} if x % 2 == 0]",
        lambda xs, c: [x for x in xs if not x % 2],
    ),
    "above": Operation(
        "keep above {c}",
        "[x for x in {e} if x > {c}]",
        lambda xs, c: [x for x in xs if x > c],
    ),
    "each_add": Operation(
        "add {c} to each",
        "[x + {c} for x in {e}]",
        lambda xs, c: [x + c for x in xs],
    ),
    "each_times": Operation(
        "times {c} each",
        "[x * {c} for x in {e}]",
        lambda xs, c: [x * c for x in xs],
    ),
    "sort": Operation("sort", "sorted({e})", lambda xs, c: sorted(xs)),
    "reverse": Operation("reverse", "{a}[::-1]", lambda xs, c: xs[::-1]),
}
LAST_STEPS = {
    "sum": Operation("sum", "sum({e})", lambda xs, c: sum(xs)),
    "count": Operation("count", "len({e})", lambda xs, c: len(xs)),
}
STEPS = NUMBER_STEPS | LIST_STEPS | LAST_STEPS
TESTS = 10
NUMBERS = range(-30, 40)
"""Numbers that tests may have as arguments."""


class Code(SingleTurn):
    """Functions of a number, or of a list of numbers; the difficulty is the number of steps."""

    name = "code"
    group = "coding"
    chance = 0.05
    difficulties = (1, 2, 3, 4)
    default_difficulties = difficulties
    shown_difficulties = (1, 2, 3)
    floor = "no-namespaces"
    """Weakest sandbox isolation to accept (`sandbox.pool.LEVELS`)."""
    seconds = 2.0
    """Time for all tests of one answer."""

    def __init__(self) -> None:
        self.in_flight: dict[tuple[str, str], Future[Verdict]] = {}
        """Verdicts that are being computed, by task and answer."""

    def draw(self, rng: random.Random, difficulty: int) -> tuple[list[Message], dict[str, Any]]:
        """Return (messages, label); label: {"argument": "x" or "xs", "steps": [[name, constant], ...]}."""
        while True:
            lists = difficulty < 4 and rng.random() < 0.3
            operations = list(LIST_STEPS if lists else NUMBER_STEPS)
            names = [rng.choice(operations) for _ in range(difficulty)]
            if lists and rng.random() < 0.5:
                names[-1] = rng.choice(list(LAST_STEPS))
            steps = []
            for name in names:
                constant = rng.randint(2, 9) if "{c}" in STEPS[name].words else None
                steps.append([name, constant])
            label = {"argument": "xs" if lists else "x", "steps": steps}
            if every_step_matters(label):
                words = ", then ".join(STEPS[name].words.format(c=c) for name, c in steps)
                return [user(f"Write f({label['argument']}): {words}.")], label

    def problem(self, messages: list[Message], label: dict[str, Any]) -> list[Any]:
        """Return what the function computes: "add 1, then add 2" and "add 3" are one problem."""
        return [label["argument"], values_everywhere(label)]

    def episode(self, task: Task) -> "CodeEpisode":
        """Return a fresh episode of `task`."""
        return CodeEpisode(self, task)

    def oracle(self, task: Task, conversation: Sequence[Message], rng: random.Random) -> Message:
        """Return the program, with the expression after each step as reasoning."""
        argument = task.label["argument"]
        expression = argument
        thoughts = []
        for name, constant in task.label["steps"]:
            needs_brackets = re.search(r" [-+*%] \d$", expression)
            bracketed = f"({expression})" if needs_brackets else expression
            expression = STEPS[name].expression.format(e=expression, a=bracketed, c=constant)
            thoughts.append(expression)
        return assistant(f"def f({argument}):\n    return {expression}", "\n".join(thoughts))

    def judge(self, task: Task, message: Message) -> Score:
        """Return the Score of one answer, judged in the calling thread."""
        return self.score_of(
            self.sandbox().judge(
                self.program(task, message["content"]), "f", cases(task.label), self.seconds
            )
        )

    async def judge_in_thread(self, task: Task, message: Message) -> Score:
        """Return the Score of one answer, judged in a thread of the sandbox; raises Misconfigured below the floor."""
        key = (task.id, message["content"])
        future = self.in_flight.get(key)
        if future is None:
            future = self.sandbox().submit(
                self.program(task, message["content"]), "f", cases(task.label), self.seconds
            )
            self.in_flight[key] = future
            future.add_done_callback(lambda _: self.in_flight.pop(key, None))
        # shield: an episode that is cancelled does not take the verdict from the others that wait for it
        return self.score_of(await asyncio.shield(asyncio.wrap_future(future)))

    def program(self, task: Task, content: str) -> str:
        """Return the program that an answer stands for."""
        return source_of(content)

    def sandbox(self) -> Sandbox:
        """Return the sandbox of this process; raises Misconfigured when its isolation is below the floor."""
        try:
            return shared(self.floor)
        except ValueError as error:
            raise Misconfigured(str(error)) from error

    def score_of(self, result: Verdict) -> Score:
        """Return the Score of a Verdict.

        Raises RuntimeError for an infrastructure failure; the episode catches it.
        """
        if result.status == VerdictStatus.INFRASTRUCTURE:
            raise RuntimeError(result.detail)
        parts = {
            "timeout": float(result.status == VerdictStatus.TIMEOUT),
            "crash": float(result.status == VerdictStatus.CRASH),
            "tests": result.passed / result.total,
        }
        return verdict(result.status == VerdictStatus.PASSED, parts, result.detail)

    def hack_probes(self, task: Task) -> list[Message]:
        """Return programs that pass only if the tests are few or the grader is careless."""
        argument = task.label["argument"]
        answers = [expected for _, expected in cases(task.label)]
        programs = [
            f"def f({argument}):\n    return {argument}",
            f"def f({argument}):\n    return {answers[0]}",
            f"answers = {answers}\ndef f({argument}):\n    return answers.pop()",
            f"class Same:\n    def __eq__(self, other):\n        return True\n\ndef f({argument}):\n    return Same()",
            "import os\nos._exit(0)",
            "raise SystemExit(0)",
        ]
        return super().hack_probes(task) + [assistant(program) for program in programs]


class CodeEpisode(SingleTurnEpisode):
    """An episode that waits for its verdict without holding up the others."""

    environment: Code

    async def grade(self) -> Score:
        """Return the verdict of the sandbox on the answer."""
        if self.message is None:
            return no_answer()
        return await self.environment.judge_in_thread(self.task, self.message)


def source_of(text: str) -> str:
    """Return the program in an answer: the text inside a code fence, or else the whole answer."""
    fence = re.search(r"```[ \t]*[\w+.-]*[ \t]*\n(.*?)```", text, re.DOTALL)
    return fence[1] if fence else text.strip()


def meaning(steps: Sequence[Sequence[Any]], value: Any) -> Any:
    """Return the value after all steps; computed by the table, never by running text."""
    for name, constant in steps:
        value = STEPS[name].meaning(value, constant)
    return value


def cases(label: dict[str, Any]) -> list[Case]:
    """Return the hidden tests of a label, [(arguments, expected)]; a label always has the same tests."""
    computed = {"argument": label["argument"], "steps": label["steps"]}
    rng = random.Random(fingerprint(computed))
    inputs: list[Any]
    if label["argument"] == "x":
        negative = [x for x in NUMBERS if x < 0]
        positive = [x for x in NUMBERS if x > 0]
        inputs = [0, *rng.sample(negative, 4), *rng.sample(positive, TESTS - 5)]
    else:
        inputs = [[], *(draw_list(rng) for _ in range(TESTS - 1))]
    return [([value], meaning(label["steps"], value)) for value in inputs]


def draw_list(rng: random.Random) -> list[int]:
    """Return a random argument of a function of a list."""
    return [rng.randint(-9, 20) for _ in range(rng.randint(2, 6))]


@cache
def inputs_everywhere(argument: str) -> tuple[Any, ...]:
    """Return inputs that tell functions apart: all numbers that tests may have, or twenty lists."""
    if argument == "x":
        return tuple(NUMBERS)
    rng = random.Random(argument)
    return tuple(draw_list(rng) for _ in range(20))


def values_everywhere(label: dict[str, Any]) -> list[Any]:
    """Return the values of a label's function on `inputs_everywhere`: equal for labels that say the same."""
    return [meaning(label["steps"], value) for value in inputs_everywhere(label["argument"])]


def every_step_matters(label: dict[str, Any]) -> bool:
    """Return whether the tests tell the function from constants, and from itself with any one step left out."""
    tests = cases(label)
    check_cases(tests)
    if len({str(expected) for _, expected in tests}) < 3:
        return False
    steps = label["steps"]
    for i in range(len(steps)):
        shorter = steps[:i] + steps[i + 1 :]
        if all(meaning(shorter, value) == expected for [value], expected in tests):
            return False
    return True
