"""Ask for one of many statements in a long prompt, the long-context task of the twelve (paper 2.3, 4).

    The key of Ada is 4071. The key of Gus is 1398. ... Key of Gus?        answer: 1398

All other statements are distractors of the same form, so neither place nor wording gives the answer away. The
difficulty is the length: 4, 16, 64 and 256 statements, of about ten tokens each.

    reward = 1  iff  the stripped answer is the key

`eval/needles.py` measures the same by likelihood, in rows of any length, after a stage of pre-training; this
is asked in a chat, so what comes of it after post-training can be compared.
"""

import random
from collections.abc import Sequence
from itertools import product

from minglm.chat.messages import Message
from minglm.envs.base import Score, SingleTurn, Task, assistant, user, verdict

STATEMENTS = {1: 4, 2: 16, 3: 64, 4: 256}
"""Difficulty -> statements in the prompt."""
NAMES = tuple(
    map(
        "".join,
        product(
            ("B", "D", "F", "K", "L", "M", "N", "R", "T", "V"),
            "aeiou",
            ("l", "n", "r", "s", "t", "x"),
        ),
    )
)
"""Three hundred made-up names."""


class Needle(SingleTurn):
    """One key among many; the difficulty is how many."""

    name = "needle"
    group = "reasoning"
    chance = 0.01
    difficulties = tuple(STATEMENTS)
    default_difficulties = (1, 2)

    def draw(self, rng: random.Random, difficulty: int) -> tuple[list[Message], str]:
        """Return one random prompt as (messages, the key)."""
        names = rng.sample(NAMES, STATEMENTS[difficulty])
        keys = rng.sample(range(1000, 10_000), len(names))
        place = rng.randrange(len(names))
        facts = [f"The key of {name} is {key}." for name, key in zip(names, keys, strict=True)]
        return [user(" ".join([*facts, f"Key of {names[place]}?"]))], str(keys[place])

    def oracle(self, task: Task, conversation: Sequence[Message], rng: random.Random) -> Message:
        """Return the key, with the statement as reasoning."""
        facts = task.messages[-1]["content"].split(". ")
        statement = next(fact for fact in facts if fact.endswith(f"is {task.label}"))
        return assistant(task.label, statement)

    def judge(self, task: Task, message: Message) -> Score:
        """Return 1 if the stripped answer is the key."""
        return verdict(message["content"].strip() == task.label)

    def hack_probes(self, task: Task) -> list[Message]:
        """Return the whole prompt, two keys, and a key that is thought but never said."""
        texts = [f"{task.label} or 1000", f"{task.label}."]
        return [
            *super().hack_probes(task),
            *(assistant(text) for text in texts),
            assistant("", task.label),
        ]
