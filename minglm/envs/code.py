"""Write a tiny function to a specification: the coding task of the toy (paper 3.2, code RL).

    Write f(x): add 3, then times 2.       think: x + 3          answer: def f(x):
                                                  (x + 3) * 2                return (x + 3) * 2

The tier is the number of steps, 1 to 4. The reward is 1 when hidden tests pass in the sandbox, so every program that
computes the function is right, however it is written. The source is never run, or even compiled, in this process.

Choices: tests are drawn with the task, and a task is dealt only if leaving out any step, or answering a constant, fails
one. Each operation has a table row with its words, its expression, and a Python function that gives the expected
values, so the oracle's program and the tests come from different columns and check each other.

Simplification: one function of one argument; the paper's tasks are competitive programming and repositories.
"""

import random
import re

from minglm.envs.base import SingleTurn, SingleTurnEpisode, assistant, fingerprint, user, verdict
from minglm.envs.sandbox.pool import shared

# name: (words, expression, meaning). {e} is the expression so far, {a} the same in brackets if it needs them, {c} the
# constant, if there is one.
NUMBER_STEPS = {
    "add": ("add {c}", "{a} + {c}", lambda x, c: x + c),
    "subtract": ("subtract {c}", "{a} - {c}", lambda x, c: x - c),
    "times": ("times {c}", "{a} * {c}", lambda x, c: x * c),
    "remainder": ("remainder by {c}", "{a} % {c}", lambda x, c: x % c),
    "abs": ("abs", "abs({e})", lambda x, c: abs(x)),
    "at_least": ("at least {c}", "max({e}, {c})", lambda x, c: max(x, c)),
    "at_most": ("at most {c}", "min({e}, {c})", lambda x, c: min(x, c)),
}
LIST_STEPS = {
    "even": (
        "keep even",
        "[x for x in {e} if x % 2 == 0]",
        lambda xs, c: [x for x in xs if not x % 2],
    ),
    "above": (
        "keep above {c}",
        "[x for x in {e} if x > {c}]",
        lambda xs, c: [x for x in xs if x > c],
    ),
    "each_add": ("add {c} to each", "[x + {c} for x in {e}]", lambda xs, c: [x + c for x in xs]),
    "each_times": ("times {c} each", "[x * {c} for x in {e}]", lambda xs, c: [x * c for x in xs]),
    "sort": ("sort", "sorted({e})", lambda xs, c: sorted(xs)),
    "reverse": ("reverse", "{a}[::-1]", lambda xs, c: xs[::-1]),
}
LAST_STEPS = {
    "sum": ("sum", "sum({e})", lambda xs, c: sum(xs)),
    "count": ("count", "len({e})", lambda xs, c: len(xs)),
}
STEPS = NUMBER_STEPS | LIST_STEPS | LAST_STEPS
TESTS = 10


class Code(SingleTurn):
    """Functions of a number, or of a list of numbers; the tier is the number of steps."""

    name = "code"
    group = "coding"
    chance = 0.05
    tiers = (1, 2, 3, 4)
    default_tiers = tiers
    floor = "no-namespaces"
    """Weakest sandbox isolation to accept (`sandbox.LEVELS`)."""
    seconds = 2.0
    """Time for all tests of one answer."""

    def draw(self, rng, tier):
        """Label: {"argument": "x" or "xs", "steps": [[name, constant], ...]}."""
        while True:
            lists = tier < 4 and rng.random() < 0.3
            names = [rng.choice(list(LIST_STEPS if lists else NUMBER_STEPS)) for _ in range(tier)]
            if lists and rng.random() < 0.5:
                names[-1] = rng.choice(list(LAST_STEPS))
            steps = [
                [name, rng.randint(2, 9) if "{c}" in STEPS[name][0] else None] for name in names
            ]
            label = {"argument": "xs" if lists else "x", "steps": steps}
            if every_step_matters(label):
                words = ", then ".join(STEPS[name][0].format(c=c) for name, c in steps)
                return [user(f"Write f({label['argument']}): {words}.")], label

    def episode(self, task):
        return CodeEpisode(self, task)

    def oracle(self, task, conversation, rng):
        argument = task.label["argument"]
        expression, thoughts = argument, []
        for name, constant in task.label["steps"]:
            bracketed = f"({expression})" if re.search(r" [-+*%] \d$", expression) else expression
            expression = STEPS[name][1].format(e=expression, a=bracketed, c=constant)
            thoughts.append(expression)
        return assistant(f"def f({argument}):\n    return {expression}", "\n".join(thoughts))

    def judge(self, task, message):
        return self.score_of(shared(self.floor).judge_one(*self.job(task, message), self.seconds))

    def job(self, task, message):
        """What the sandbox needs: source, function name, cases."""
        return source_of(message["content"]), "f", cases(task.label)

    def score_of(self, result):
        """The Score of a sandbox Verdict."""
        if result.status == "infrastructure":
            raise RuntimeError(
                result.detail
            )  # the episode turns it into a Score that leaves the statistics
        parts = {status: float(result.status == status) for status in ("timeout", "crash")}
        return verdict(
            result.status == "passed",
            parts | {"tests": result.passed / result.total},
            result.detail,
        )

    def score_all(self, episodes):
        """Judge all answers in parallel; equal answers to one task once. Raises ValueError below the floor."""
        jobs = {}
        for episode in episodes:
            if episode.message is not None:
                jobs.setdefault(episode.key(), self.job(episode.task, episode.message))
        results = dict(zip(jobs, shared(self.floor).judge(jobs.values(), self.seconds)))
        for episode in episodes:
            if episode.message is not None:
                episode.result = results[episode.key()]
        return [episode.score() for episode in episodes]

    def hack_probes(self, task):
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
    """Uses the Verdict of a batch when `score_all` has brought one."""

    result = None

    def key(self):
        """What decides the verdict: the task and the answer."""
        return self.task.id, self.message["content"]

    def grade(self):
        return self.environment.score_of(self.result) if self.result else super().grade()


def source_of(text):
    """The program in an answer: all of it, or what stands inside a code fence."""
    fence = re.search(r"```(?:python)?\n(.*?)```", text, re.DOTALL)
    return fence[1] if fence else text.strip()


def meaning(steps, value):
    """The value after all steps; computed by the table, never by running text."""
    for name, constant in steps:
        value = STEPS[name][2](value, constant)
    return value


def cases(label):
    """The hidden tests of a label, [(arguments, expected)], always the same ones."""
    rng = random.Random(fingerprint(label))
    if label["argument"] == "x":
        inputs = [0, *rng.sample(range(-30, 0), 4), *rng.sample(range(1, 40), TESTS - 5)]
    else:
        inputs = [
            [],
            *([rng.randint(-9, 20) for _ in range(rng.randint(2, 6))] for _ in range(TESTS - 1)),
        ]
    return [([value], meaning(label["steps"], value)) for value in inputs]


def every_step_matters(label):
    """Whether the tests tell the function from constants, and from itself with any one step left out."""
    tests, steps = cases(label), label["steps"]
    if len({str(expected) for _, expected in tests}) < 3:
        return False
    shorter = [steps[:i] + steps[i + 1 :] for i in range(len(steps))]
    return all(any(meaning(s, value) != expected for [value], expected in tests) for s in shorter)
