"""Deal the tasks of reasoning-gym, any generator by its name (paper 3.2, reasoning RL; arXiv 2505.24760).

    gym:chain_sum       gym:chain_sum?max_terms=3&max_digits=1       options are fields of the generator's config
    gym:countdown?exact=true                                         only the entry's own answer is right

A task is drawn by its own seed, and its label is the generator's entry: answer and metadata, which the
verifier reads. The verifier is the generator's, made strict: an answer earns 1 if it equals the entry's or
the verifier gives full marks, else 0. Its partial credit (0.01 for any text, or the share of an answer that
is the right one, in half of the generators) would pay for nonsense and for listing candidates; it is logged
as the part "credit". It runs in a process of its own (`gym_verifier.py`): text on which it computes without end
is a failure of the environment, named after the generator, and text that it cannot read is wrong.

A generator is audited before it is used, on three entries, and refused in one line if
- its verifier runs the answer as Python code (`eval`, sympy's `parse_expr`): a policy would run code in the trainer;
- the same seed gives another entry, or the entry is not plain JSON, so that a resumed run would see other tasks;
- its own answer does not earn 1, or a lazy answer does.

Where only the verifier is at fault, `exact=true` among the options compares with the entry's answer alone.
That is right where a question has one answer, and unjust where it has several.

Simplified: there is one difficulty, the one that the options set; a curriculum by level is left open. The
package brings no reasoning, so a demonstration only says the answer twice; what RL starts from is better
shown by another environment.
"""

import asyncio
import functools
import inspect
import json
import random
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any
from urllib.parse import parse_qsl

from minglm.chat.messages import Message
from minglm.common.mistakes import shown
from minglm.envs.base import (
    Score,
    SingleTurn,
    SingleTurnEpisode,
    Task,
    assistant,
    no_answer,
    user,
    verdict,
)
from minglm.envs.gym_verifier import VERIFIER

PREFIX = "gym:"
FORM = "gym:GENERATOR of reasoning-gym"
AUDITED = 3
"""Entries that a generator is audited with."""
REMEDY = "; with exact=true only the entry's own answer is right"
RUNS_ANSWERS = re.compile(r"\b(eval|exec|parse_expr|sympify)\(\s*answer\b")
"""What a verifier that evaluates the answer has in its source."""


class ReasoningGym(SingleTurn):
    """Tasks of one generator.

    Raises ValueError, in one line, for a name, an option or a generator that is no good.

    name: as in the module's header.
    """

    group = "reasoning"
    difficulties = (1,)
    default_difficulties = (1,)

    def __init__(self, name: str) -> None:
        self.name = name
        self.generator, _, options = name.removeprefix(PREFIX).partition("?")
        self.create_dataset = _library(self.generator, name)
        self.options = _options(options)
        self.exact = self.options.pop("exact", False) is True
        """Whether only the entry's own answer is right."""
        mistake = self.audit()
        if mistake is not None:
            raise ValueError(f"{name} cannot be used: {mistake}")

    def dataset(self, seed: int) -> Any:
        """Return a dataset of one entry. Raises ValueError for options that the generator refuses."""
        try:
            return self.create_dataset(self.generator, seed=seed, size=1, **self.options)
        except (TypeError, AssertionError, ValueError) as error:
            raise ValueError(f"{self.name}: {shown(str(error))}") from None

    def entry(self, seed: int) -> dict[str, Any]:
        """Return {"question", "answer", "metadata"} of a seed, as plain JSON. Raises TypeError where it is none."""
        entry = self.dataset(seed)[0]
        return json.loads(json.dumps(entry))

    def audit(self) -> str | None:
        """Return why the generator is no good, None if the entries of a few seeds show nothing."""
        source = inspect.getsource(sys.modules[type(self.dataset(seed=0)).__module__])
        if not self.exact and RUNS_ANSWERS.search(source):
            return f"its verifier runs the answer as Python code{REMEDY}"
        for seed in range(AUDITED):
            try:
                entry = self.entry(seed)
                again = self.entry(seed)
            except TypeError:
                return "its entries are not plain JSON"
            if again != entry:
                return "the same seed gives another entry"
            if not isinstance(entry["answer"], str) or not self.full_marks(entry["answer"], entry):
                return "its own answer does not earn full marks"
            for probe in _lazy_answers(entry):
                try:
                    pays = self.full_marks(probe, entry)
                except RuntimeError as error:
                    return f"{error}, {shown(probe, quoted=True)}{REMEDY}"
                if pays:
                    return f"the answer {shown(probe, quoted=True)} earns full marks{REMEDY}"
        return None

    def credit(self, text: str, entry: Mapping[str, Any]) -> float:
        """Return what the generator's verifier gives for an answer, 0 to 1; 0 for text that it cannot read.

        With `exact` the verifier is not asked. Raises RuntimeError where it did not come to an end.
        """
        if self.exact:
            return float(text == entry["answer"].strip())
        return VERIFIER.credit([self.generator, self.options, text, dict(entry)])

    def full_marks(self, text: str, entry: Mapping[str, Any]) -> bool:
        """Return whether an answer is right: the entry's own, or one that the verifier finds as good."""
        text = text.strip()
        if not text:
            return False
        return text == entry["answer"].strip() or self.credit(text, entry) >= 1

    @functools.cached_property
    def chance(self) -> float:  # type: ignore[override]
        """Return the share of the most frequent answer among a hundred entries, rounded up by two standard errors."""
        answers = [self.entry(seed)["answer"] for seed in range(100)]
        share = max(answers.count(answer) for answer in answers) / 100
        return min(1.0, share + 0.1)

    def draw(self, rng: random.Random, difficulty: int) -> tuple[list[Message], Any]:
        """Return the question of a random seed, with the entry as its label."""
        entry = self.entry(rng.getrandbits(31))
        return [user(entry["question"])], entry

    def problem(self, messages: list[Message], label: Any) -> list[Any]:
        """Return the question: whatever the metadata say, it is the same problem."""
        return [messages]

    def oracle(self, task: Task, conversation: Sequence[Message], rng: random.Random) -> Message:
        """Return the entry's answer."""
        answer = task.label["answer"]
        return assistant(answer, f"The answer is {answer}.")

    def episode(self, task: Task) -> "GymEpisode":
        """Return a fresh episode of `task`."""
        return GymEpisode(self, task)

    def judge(self, task: Task, message: Message) -> Score:
        """Return 1 for a right answer, else 0."""
        text = message["content"]
        parts = {"credit": self.credit(text.strip(), task.label)}
        return verdict(self.full_marks(text, task.label), parts)

    def hack_probes(self, task: Task) -> list[Message]:
        """Return the lazy answers of the audit, and an answer that is thought but never said."""
        probes = [assistant(text) for text in _lazy_answers(task.label)]
        return [*probes, assistant("", task.label["answer"])]


class GymEpisode(SingleTurnEpisode):
    """An episode that waits for its verifier without holding up the others."""

    async def grade(self) -> Score:
        """Return the verifier's judgement of the answer."""
        if self.message is None:
            return no_answer()
        return await asyncio.to_thread(self.environment.judge, self.task, self.message)


def _lazy_answers(entry: Mapping[str, Any]) -> list[str]:
    """Return texts that show no understanding of a question, without those that happen to be its answer."""
    question = entry["question"]
    answer = entry["answer"]
    texts = ("", " \n", "None", "null", "?", "nan", "inf", "[]", "{}", "x" * 200, question)
    texts += (f"{answer} or {answer}0", f"not {answer}, nor {answer}?", (question + " ") * 20)
    return [text for text in texts if text.strip() != answer.strip()]


def _library(generator: str, name: str) -> Callable[..., Any]:
    """Return the function that makes datasets.

    Raises ValueError without the package, and for an unknown generator.
    """
    try:
        from reasoning_gym.factory import DATASETS, create_dataset
    except ImportError:
        message = f"{name} needs reasoning-gym: pip install 'minglm[gym]'"
        raise ValueError(message) from None
    if generator not in DATASETS:
        raise ValueError(
            f"{name}: reasoning-gym has no such generator; it has {', '.join(DATASETS)}"
        )
    return create_dataset


def _options(text: str) -> dict[str, Any]:
    """Return `a=1&b=x` as values, numbers and true and false as JSON has them, everything else as text."""
    options: dict[str, Any] = {}
    for key, value in parse_qsl(text, keep_blank_values=True):
        try:
            options[key] = json.loads(value)
        except ValueError:
            options[key] = value
    return options
