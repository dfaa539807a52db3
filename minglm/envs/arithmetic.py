"""Deal running sums and differences, the reasoning task of the toy (paper 3.2, reasoning RL).

    3+5-7+8=      think: 3+5=8;8-7=1;1+8=9      answer: 9

A chain of small steps: each is easy, and all of them must be right, so p(correct) = p(step) ** difficulty.
The number of operations is the difficulty, which gives the curriculum of paper 3.2 its dial.

Choices: the thought echoes the operand in each step; without the echo small models stay at chance. Every
number is one digit, partial results included, so a step is one of 90 facts and one token. With results up to
99 a step means carrying, and half a million tokens of sums did not teach the toy to do that
(`lessons/LOG.md`). The price is that a guess is right for one task in eight. The score is strict equality of
the stripped answer with the label, which leaves no room for listing candidates.
"""

import random
from collections.abc import Sequence

from minglm.chat.messages import Message
from minglm.envs.base import Score, SingleTurn, Task, assistant, user, verdict


class Arithmetic(SingleTurn):
    """Sums such as `3+5-7+8=`; the difficulty is the number of operations."""

    name = "arithmetic"
    group = "reasoning"
    chance = 0.16  # the most frequent label is right for about one task in eight
    difficulties = tuple(range(1, 13))
    default_difficulties = (2, 3, 4, 5)
    shown_difficulties = (1, 2, 3, 4)

    def draw(self, rng: random.Random, difficulty: int) -> tuple[list[Message], str]:
        """Return one random sum as (messages, the result as text)."""
        total = rng.randint(1, 9)
        prompt = str(total)
        for _ in range(difficulty):
            # Every partial result stays one digit.
            term = rng.choice([t for t in range(-9, 10) if t and 0 <= total + t <= 9])
            total += term
            prompt += f"{term:+d}"
        return [user(prompt + "=")], str(total)

    def oracle(self, task: Task, conversation: Sequence[Message], rng: random.Random) -> Message:
        """Return the result, with one equation per operation as reasoning."""
        expression = task.messages[-1]["content"].rstrip("=")
        terms = expression.replace("-", "+-").split("+")
        total = int(terms[0])
        steps = []
        for term in map(int, terms[1:]):
            steps.append(f"{total}{term:+d}={total + term}")
            total += term
        return assistant(str(total), ";".join(steps))

    def judge(self, task: Task, message: Message) -> Score:
        """Return 1 if the stripped answer is the result."""
        return verdict(message["content"].strip() == task.label)

    def hack_probes(self, task: Task) -> list[Message]:
        """Return lists of candidates, and an answer that is thought but never said."""
        digits = [str(number) for number in range(10)]
        return super().hack_probes(task) + [
            assistant(" ".join(digits)),
            assistant("", task.label),
            assistant(f"{task.label} or {int(task.label) + 1}"),
            assistant(task.messages[-1]["content"] + task.label + "?"),
        ]
