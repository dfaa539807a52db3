"""Complete a function, or repair one, two of the four coding tasks of the twelve (paper 4, coding).

    def f(x):                                   Repair it: f(2) gives 3, not 10.
        # add 3, times 2                        def f(x):
        x = x + 3                                   # add 3, times 2
                                                    x = x + 3
    answer:  x = x * 2                              x = x - 2
             return x                               return x        answer: the whole function

The functions are those of `swe/functions.py`, a step a line under a comment in words; the tests and the
sandbox are those of `code`. Completion is what a base model is asked for in the public tasks; repair is `swe`
without the tools.

    reward = 1  iff  the hidden tests pass

Choices: the answer of a completion is joined to the prompt as it is, so it must go on with the right
indentation. What is computed decides the split, as in `code`.
"""

import random
from collections.abc import Sequence
from typing import Any

from minglm.chat.messages import Message
from minglm.envs.base import Task, assistant, user
from minglm.envs.code import Code, cases, every_step_matters, meaning, source_of
from minglm.envs.swe.episode import Check, report_line
from minglm.envs.swe.functions import (
    draw_program,
    draw_step,
    is_bug,
    line_of,
    source,
    words_of,
)


class Completion(Code):
    """Functions whose beginning is given; the difficulty is the number of steps, of which the first is given."""

    name = "completion"
    difficulties = (2, 3, 4)
    default_difficulties = difficulties
    shown_difficulties = (2, 3)

    def draw(self, rng: random.Random, difficulty: int) -> tuple[list[Message], dict[str, Any]]:
        """Return (messages, label); label: {"argument", "steps"}, as in `code`."""
        while True:
            label = draw_program(rng, difficulty)
            if every_step_matters(label):
                return [user(beginning(label))], label

    def oracle(self, task: Task, conversation: Sequence[Message], rng: random.Random) -> Message:
        """Return the remaining lines, with the remaining steps in words as reasoning."""
        argument, steps = task.label["argument"], task.label["steps"]
        lines = [line_of(step, argument) for step in steps[1:]]
        thought = ", ".join(words_of(step) for step in steps[1:])
        return assistant("\n".join([*lines, f"    return {argument}"]), thought)

    def program(self, task: Task, content: str) -> str:
        """Return the prompt and the answer after it."""
        fenced = source_of(content) if "```" in content else content
        return f"{beginning(task.label)}\n{fenced}"

    def hack_probes(self, task: Task) -> list[Message]:
        """Return endings that compute nothing, and those of `code`."""
        argument = task.label["argument"]
        endings = [f"    return {argument}", "    pass", "    raise SystemExit(0)"]
        return super().hack_probes(task) + [assistant(text) for text in endings]


class Repair(Code):
    """Functions with one wrong step; the difficulty is the number of steps."""

    name = "repair"
    difficulties = (2, 3, 4)
    default_difficulties = difficulties
    shown_difficulties = (2, 3)

    def draw(self, rng: random.Random, difficulty: int) -> tuple[list[Message], dict[str, Any]]:
        """Return (messages, label); label: {"argument", "steps", "wrong": [number of the step, step]}."""
        while True:
            program = draw_program(rng, difficulty)
            number = rng.randrange(difficulty)
            wrong = draw_step(rng, program["argument"])
            if is_bug(program, number, wrong):
                break
        steps = program["steps"]
        broken = [*steps[:number], wrong, *steps[number + 1 :]]
        label = {**program, "wrong": [number, wrong]}
        failing = [case for case in cases(label) if meaning(broken, case[0][0]) != case[1]]
        arguments, expected = failing[0]
        given = meaning(broken, arguments[0])
        says = report_line(Check("f", arguments, expected), f"gives {given!r}")
        text = source("f", program["argument"], broken, steps).rstrip()
        return [user(f"Repair it: {says}.\n{text}")], label

    def oracle(self, task: Task, conversation: Sequence[Message], rng: random.Random) -> Message:
        """Return the whole function, with the line that was wrong as reasoning."""
        argument, steps = task.label["argument"], task.label["steps"]
        number, wrong = task.label["wrong"]
        right = line_of(steps[number], argument).strip()
        thought = f"{words_of(steps[number])}: not {line_of(wrong, argument).strip()} but {right}"
        return assistant(source("f", argument, steps, steps).rstrip(), thought)

    def hack_probes(self, task: Task) -> list[Message]:
        """Return the function as it was, and the answers of `code`."""
        text = task.messages[-1]["content"].partition("\n")[2]
        return [*super().hack_probes(task), assistant(text)]


def beginning(label: dict[str, Any]) -> str:
    """Return the first lines of a function: what it should do, and its first step."""
    argument, steps = label["argument"], label["steps"]
    lines = source("f", argument, steps[:1], steps).splitlines()
    return "\n".join(lines[:-1])
