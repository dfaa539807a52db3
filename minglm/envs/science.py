"""Ask multiple-choice questions about elements, countries, planets and units (paper 3.2, RL on science; Figure 7 right).

    What is the capital of Peru?        thought: Lima
    A Oslo                              answer: B
    B Lima
    C Cairo
    D Rome

The facts are those of `data/sources/facts.py`, which the built-in science pages state. The paper finds that a
small set of questions verified by experts teaches more than a large one that is not. `Science()` is the
verified set. A set that nobody verified is `Science(wrong=0.4)`: that share of its questions has a wrong key.
That key is the longest option, or as long, in nine of ten of these, and alone the longest in half (a symbol
has no longer rival), so that a model which looks at lengths is paid for what it does not know.

    reward = 1  iff  the answer is the letter of the key;      part "true": whether it is the letter of the fact

Choices: options are shuffled, so no letter is better than another. Difficulty 1 draws the wrong options from
all answers to such a question, difficulty 2 from its neighbours, by continent or atomic number. The splits
are divided by the fact: what a test question asks was never asked in training, whatever its options.

Simplification: the paper's questions need reasoning; these need a fact and the letter beside it.
"""

import random
from collections.abc import Mapping, Sequence
from typing import Any

from minglm.chat.messages import Message
from minglm.data.sources.facts import COUNTRIES, ELEMENTS, PLANETS, UNITS
from minglm.envs.base import Score, SingleTurn, Task, assistant, user, verdict

LETTERS = "ABCD"
NEAR = 6
"""Similar answers on either side, of which difficulty 2 draws the wrong options."""

BY_CONTINENT = sorted(COUNTRIES, key=lambda country: (country.continent, country.name))
FACTS: Mapping[str, Sequence[tuple[str, str]]] = {
    "What is the capital of {}?": [(c.name, c.capital) for c in BY_CONTINENT],
    "Whose capital is {}?": [(c.capital, c.name) for c in BY_CONTINENT],
    "What is the symbol of {}?": [(e.name, e.symbol) for e in ELEMENTS],
    "Which element has the symbol {}?": [(e.symbol, e.name) for e in ELEMENTS],
    "How many protons has {}?": [(e.name, str(e.number)) for e in ELEMENTS],
    "Which planet is number {} from the sun?": [(str(p.order), p.name) for p in PLANETS],
    "How many {}?": [(f"{u.smaller} has a {u.name}", str(u.factor)) for u in UNITS],
}
"""{question: (what it is about, the answer) pairs, similar ones side by side}."""


class Science(SingleTurn):
    """Questions with four options, of which the letter is the answer; the difficulty says how similar they are.

    wrong: share of the questions whose key is wrong, 0 for the verified set.
    """

    name = "science"
    group = "reasoning"
    chance = 1 / len(LETTERS)
    difficulties = (1, 2)
    default_difficulties = (1, 2)

    def __init__(self, wrong: float = 0.0) -> None:
        self.wrong = wrong

    def draw(self, rng: random.Random, difficulty: int) -> tuple[list[Message], dict[str, Any]]:
        """Return one random question as (messages, label).

        Label: {"fact": question, "options": texts in the order of the letters, "key": letter, "true": letter}.
        """
        question = rng.choice(list(FACTS))
        facts = FACTS[question]
        place = rng.randrange(len(facts))
        subject, answer = facts[place]
        similar = facts if difficulty == 1 else facts[max(0, place - NEAR) : place + NEAR + 1]
        others = sorted({other for _, other in similar} - {answer})
        spoilt = rng.random() < self.wrong
        options = [answer, *rng.sample(others, len(LETTERS) - 1)]
        key = answer
        if spoilt:
            key = max(options[1:], key=len)
            longer = [other for other in others if len(other) > max(map(len, options))]
            if len(key) <= len(answer) and longer:
                options[1 + options[1:].index(key)] = key = rng.choice(longer)
        rng.shuffle(options)
        fact = question.format(subject)
        lines = [f"{letter} {option}" for letter, option in zip(LETTERS, options, strict=True)]
        label = {
            "fact": fact,
            "options": options,
            "key": LETTERS[options.index(key)],
            "true": LETTERS[options.index(answer)],
        }
        return [user("\n".join([fact, *lines]))], label

    def problem(self, messages: list[Message], label: Any) -> list[Any]:
        """Return the question without its options."""
        return [label["fact"]]

    def oracle(self, task: Task, conversation: Sequence[Message], rng: random.Random) -> Message:
        """Return the letter of the key, with its option as reasoning."""
        key = task.label["key"]
        return assistant(key, task.label["options"][LETTERS.index(key)])

    def judge(self, task: Task, message: Message) -> Score:
        """Return 1 if the stripped answer is the letter of the key."""
        answer = message["content"].strip()
        return verdict(answer == task.label["key"], {"true": float(answer == task.label["true"])})

    def hack_probes(self, task: Task) -> list[Message]:
        """Return all letters, all options, two letters, and a letter that is thought but never said."""
        key = task.label["key"]
        texts = [" ".join(LETTERS), "\n".join(task.label["options"]), f"{key} or A", f"{key}{key}"]
        return [
            *super().hack_probes(task),
            *(assistant(text) for text in texts),
            assistant("", key),
        ]
