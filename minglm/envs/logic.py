"""Put people in order from what is said of pairs of them, the logic task of the twelve (paper 4, reasoning).

    Cy is after Bo. Ada is before Bo. Order?        thought: Ada Bo; Ada Bo Cy      answer: Ada Bo Cy

Each statement is of two neighbours, and the statements come in random order and in either direction, so the
order follows from all of them together and from no part. The difficulty is the number of statements; with 4
and more one of them says what follows from the others, which must not mislead.

    reward = 1  iff  the answer is the names in their order

Choices: a whole order, and not one position, because a guess then earns next to nothing. A thought that
begins with the first person and adds one at a time is short and leaves no search to the answer.
"""

import random
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

from minglm.chat.messages import Message
from minglm.envs.base import Score, SingleTurn, Task, assistant, user, verdict

NAMES: tuple[str, ...] = (
    "Ada",
    "Bo",
    "Cy",
    "Dee",
    "Eli",
    "Fay",
    "Gus",
    "Hal",
    "Ivy",
    "Jo",
    "Kit",
    "Lea",
)


class Logic(SingleTurn):
    """Orders of a few people; the difficulty is the number of statements that are needed."""

    name = "logic"
    group = "reasoning"
    chance = 0.02
    difficulties = (2, 3, 4, 5)
    default_difficulties = (2, 3, 4)
    shown_difficulties = (2, 3)

    def draw(self, rng: random.Random, difficulty: int) -> tuple[list[Message], list[str]]:
        """Return one random puzzle as (messages, the names in their order)."""
        order = rng.sample(NAMES, difficulty + 1)
        pairs = list(pairwise(order))
        if difficulty >= 4:
            first, last = sorted(rng.sample(range(len(order)), 2))
            pairs.append((order[first], order[last]))
        rng.shuffle(pairs)
        statements = []
        for before, after in pairs:
            forward = rng.random() < 0.5
            statements.append(
                f"{before} is before {after}." if forward else f"{after} is after {before}."
            )
        return [user(" ".join([*statements, "Order?"]))], order

    def problem(self, messages: list[Message], label: Any) -> list[Any]:
        """Return the order, in whatever words it is told."""
        return [label]

    def oracle(self, task: Task, conversation: Sequence[Message], rng: random.Random) -> Message:
        """Return the names in order, with the order so far as reasoning."""
        order = task.label
        steps = [" ".join(order[:count]) for count in range(2, len(order) + 1)]
        return assistant(" ".join(order), "; ".join(steps))

    def judge(self, task: Task, message: Message) -> Score:
        """Return 1 if the answer is the names in order, with spaces, commas or arrows between them."""
        words = message["content"].replace(",", " ").replace("->", " ").split()
        return verdict(words == task.label)

    def hack_probes(self, task: Task) -> list[Message]:
        """Return all names, the reverse, several orders at once, and an order that is thought but never said."""
        right = " ".join(task.label)
        reverse = " ".join(reversed(task.label))
        texts = [" ".join(NAMES), reverse, f"{right} or {reverse}", f"{right}\n{right}"]
        return [
            *super().hack_probes(task),
            *(assistant(text) for text in texts),
            assistant("", right),
        ]
