"""Repair tiny functions in a repository, the software engineering task of the toy (paper 3.3).

    user: f(2) gives -4, not 10.                    # f.py
                                                    def f(x):
                                                        # add 3, times 2
                                                        x = x + 3
                                                        x = x - 2       the bug: one line is not what the comment says
                                                        return x

The steps are those of the environment `code`. Difficulty 1 has two steps, 2 has three. In difficulty 3 the
user only says that a test fails, and one of three files has the bug: the tests must be run to find it.

The tests that the model may read are a few; another one that fails stays hidden, so that a special case for
what is shown earns nothing.

Choices: each file comes with a comment that says in words what its function does, so a repair needs no guess.
The other files hold training functions, also in tasks of the test split, and a task belongs to the split of
the function with the
bug: no test problem is ever shown, right or wrong, in training.
"""

import functools
import json
import random
from collections.abc import Sequence
from typing import Any

from minglm.chat.messages import Message
from minglm.config import Split
from minglm.envs.base import Task, assistant, fingerprint, split_of, user
from minglm.envs.code import (
    LIST_STEPS,
    NUMBER_STEPS,
    STEPS,
    cases,
    every_step_matters,
    meaning,
    values_everywhere,
)
from minglm.envs.swe.bugs import Bug, edit_that_repairs
from minglm.envs.swe.episode import Assignment, Check, RepairEnvironment, report_line, test_file

NAMES = ("f", "g", "h")
SHOWN_TESTS = 3
BYSTANDERS = 64
"""Functions that the files without a bug are drawn from."""
Step = list[Any]
"""[name, constant or None], as in a label of `code`."""


class RepairFunctions(RepairEnvironment):
    """One wrong step among files of a few lines; the difficulty is as in the module's header."""

    name = "swe"
    max_turns = 8
    shown_difficulties = (1, 2)

    def draw(self, rng: random.Random, difficulty: int) -> tuple[list[Message], dict[str, Any]]:
        """Return (messages, label).

        Label: {"functions": {name: {"argument", "steps"}}, "wrong": [name of the function, number of the step, step]}.
        """
        steps = 2 if difficulty == 1 else 3
        while True:
            program = draw_program(rng, steps)
            number = rng.randrange(steps)
            wrong = draw_step(rng, program["argument"])
            if is_bug(program, number, wrong):
                break
        names = list(NAMES[: 3 if difficulty == 3 else 2])
        broken = rng.choice(names)
        functions = {name: rng.choice(bystanders(steps)) for name in names}
        functions[broken] = program
        label = {"functions": functions, "wrong": [broken, number, wrong]}
        if difficulty == 3:
            return [user("A test fails. Repair it.")], label
        check = first_failing(label)
        given = meaning(wrong_steps(label), check.arguments[0])
        return [user(f"{report_line(check, f'gives {given!r}')}. Repair it.")], label

    def problem(self, messages: list[Message], label: dict[str, Any]) -> list[Any]:
        """Return what the function with the bug should compute."""
        return program_problem(label["functions"][label["wrong"][0]])

    def assignment(self, task: Task) -> Assignment:
        """Return the repository of a task."""
        return assign(json.dumps(task.label))

    def oracle(self, task: Task, conversation: Sequence[Message], rng: random.Random) -> Message:
        """Find the file, view it, edit the wrong line, run the tests."""
        name, number, wrong = task.label["wrong"]
        path = f"{name}.py"
        called = [
            call["name"] for message in conversation for call in message.get("tool_calls", ())
        ]
        if task.difficulty == 3 and not called:
            return assistant("", "which test?", [("run_tests", {})])
        if "view" not in called:
            return assistant("", f"see {name}", [("view", {"path": path})])
        program = task.label["functions"][name]
        argument = program["argument"]
        if "edit" not in called:
            right = program["steps"][number]
            bug = Bug(2 + number, line_of(right, argument), line_of(wrong, argument))
            old, new = edit_that_repairs(self.assignment(task).files[path], bug)
            thought = f"{words_of(right)}: not {bug.wrong.strip()} but {bug.right.strip()}"
            return assistant("", thought, [("edit", {"path": path, "old": old, "new": new})])
        if called[-1] != "run_tests":
            return assistant("", "test", [("run_tests", {})])
        return assistant("Repaired.", "all pass")


def draw_program(rng: random.Random, steps: int) -> dict[str, Any]:
    """Return {"argument", "steps"} of a random function."""
    argument = "xs" if rng.random() < 0.3 else "x"
    return {"argument": argument, "steps": [draw_step(rng, argument) for _ in range(steps)]}


@functools.cache
def bystanders(steps: int) -> list[dict[str, Any]]:
    """Return functions that belong to the training split, for the files without a bug."""
    rng = random.Random(f"bystanders/{steps}")
    found = []
    while len(found) < BYSTANDERS:
        program = draw_program(rng, steps)
        problem = fingerprint([RepairFunctions.name, *program_problem(program)])
        if split_of(problem) == Split.TRAIN and every_step_matters(program):
            found.append(program)
    return found


def draw_step(rng: random.Random, argument: str) -> Step:
    """Return a random step on a number or on a list."""
    name = rng.choice(list(LIST_STEPS if argument == "xs" else NUMBER_STEPS))
    return [name, rng.randint(2, 9) if "{c}" in STEPS[name].words else None]


def program_problem(program: dict[str, Any]) -> list[Any]:
    """Return what a function computes."""
    return [program["argument"], values_everywhere(program)]


def is_bug(program: dict[str, Any], number: int, wrong: Step) -> bool:
    """Return whether this step in place of the right one fails some tests and not all, and no constant passes them."""
    steps = program["steps"]
    broken = [*steps[:number], wrong, *steps[number + 1 :]]
    tests = cases(program)
    fails = [meaning(broken, value) != expected for [value], expected in tests]
    return 2 <= sum(fails) < len(fails) and len({str(expected) for _, expected in tests}) > 2


def wrong_steps(label: dict[str, Any]) -> list[Step]:
    """Return the steps of the function with the bug, as they are."""
    name, number, wrong = label["wrong"]
    steps = list(label["functions"][name]["steps"])
    steps[number] = wrong
    return steps


def first_failing(label: dict[str, Any]) -> Check:
    """Return the first test that fails."""
    failing, _ = divided(label)
    return failing[0]


def divided(label: dict[str, Any]) -> tuple[list[Check], list[Check]]:
    """Return the tests of the function with the bug: those that fail, and those that pass."""
    name = label["wrong"][0]
    steps = wrong_steps(label)
    failing, passing = [], []
    for [value], expected in cases(label["functions"][name]):
        fails = meaning(steps, value) != expected
        (failing if fails else passing).append(Check(name, [value], expected))
    return failing, passing


def words_of(step: Step) -> str:
    """Return a step in words: "times 2"."""
    name, constant = step
    return STEPS[name].words.format(c=constant)


def line_of(step: Step, argument: str) -> str:
    """Return a step as a line of the program: "    x = x * 2"."""
    name, constant = step
    return f"    {argument} = {STEPS[name].expression.format(e=argument, a=argument, c=constant)}"


def source(name: str, argument: str, steps: Sequence[Step], documented: Sequence[Step]) -> str:
    """Return the text of a file: a function of these steps, with a comment that tells the documented ones."""
    comment = ", ".join(words_of(step) for step in documented)
    lines = [f"def {name}({argument}):", f"    # {comment}"]
    lines += [line_of(step, argument) for step in steps]
    return "\n".join([*lines, f"    return {argument}"]) + "\n"


@functools.lru_cache(maxsize=512)
def assign(label_text: str) -> Assignment:
    """Return the repository of a label, given as JSON."""
    label = json.loads(label_text)
    broken = label["wrong"][0]
    failing, passing = divided(label)
    files, shown = {}, {}
    passing_of = {f"{broken}.py": passing}
    for name, program in label["functions"].items():
        path = f"{name}.py"
        right = program["steps"]
        steps = wrong_steps(label) if name == broken else right
        files[path] = source(name, program["argument"], steps, right)
        if name == broken:
            checks = [failing[0], *passing]  # the others that fail stay hidden
        else:
            checks = [Check(name, arguments, value) for arguments, value in cases(program)]
            passing_of[path] = checks
        shown[path] = checks[:SHOWN_TESTS]
        files[f"test_{path}"] = test_file(path, shown[path])
    return Assignment(files, shown, {f"{broken}.py": failing}, passing_of)
