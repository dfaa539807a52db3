"""Simulate the user of a task with tools by a program that follows the rules of the paper's Figure 11.

    assistant: Which booking?            user: 482.                         only what the question is about
    assistant: And your phone number?    user: I don't remember.            it was never told
    assistant: 14C is taken.             user: Then 15A, please.            an alternative, if there is one
    assistant: You have seat 15A.        user: ###STOP###                   and nothing more

The rules: give away only what the current step needs; what the task does not tell, the user does not
remember; when something is refused, offer the alternative that the task names; never ask for more than the
task; end with ###STOP###.

Choices
- The program reads a question by the words that name a fact, and a refusal by a few words ("not", "taken", ...). It
  answers one thing at a time: of several facts that a question asks for it gives the first that was not given yet.
- A statement ends the conversation, unless it refuses and there is an alternative. An assistant that says "let me look"
  without a call has therefore given up: strict, and the same for every policy.

Simplified: the paper's user is a language model (`model_user` plays one); this one has no other words than its facts.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

STOP = "###STOP###"
"""What a user says when there is nothing left to say."""
UNKNOWN = "I don't remember."
REFUSALS = re.compile(r"\b(not|no|cannot|can't|unable|taken|refused|another|other|instead|sorry)\b")
OFFERS = re.compile(r"\b(anything|something) else\b|\belse\b.*\bhelp\b")
"""An invitation to extend the task."""


class UserFailed(RuntimeError):
    """The simulated user gave no answer that a user could give."""

    def __init__(self, fault: str) -> None:
        super().__init__(f"the simulated user {fault}")


class User(Protocol):
    """Whoever wants something of the assistant."""

    async def answer(self, said: str) -> str:
        """Return the next words to the assistant, with STOP in them at the end. Raises UserFailed."""
        ...


@dataclass(frozen=True)
class Fact:
    """Something that the user of a task knows and has not said yet."""

    names: tuple[str, ...]
    """Words, in lower case, one of which a question about it has."""
    values: tuple[str, ...]
    """What the user wants, and what to offer when that is refused, in this order."""


class ProgramUser:
    """A user who follows the rules above exactly."""

    def __init__(self, facts: Sequence[Fact], told: Sequence[Fact] = ()) -> None:
        """Begin after the user's first message. facts: still to be given. told: those in the first message."""
        self.facts = [*told, *facts]
        self.given = {fact: 1 for fact in told}
        """How many of its values the user has given, by fact."""

    async def answer(self, said: str) -> str:
        """Answer a question about one fact, offer an alternative to what is refused, or stop."""
        text = said.lower()
        asked = [fact for fact in self.facts if any(name in text for name in fact.names)]
        is_question = "?" in said and not OFFERS.search(text)
        is_refusal = bool(REFUSALS.search(text))
        if is_question:
            for fact in asked:
                if fact not in self.given:
                    return self._give(fact, "{}.")
        if is_refusal:
            for fact in [*asked, *self.facts]:
                if 0 < self.given.get(fact, 0) < len(fact.values):
                    return self._give(fact, "Then {}, please.")
        if is_question and not asked:
            return UNKNOWN
        if is_question and not is_refusal:
            return f"{asked[0].values[self.given[asked[0]] - 1]}."
        return STOP

    def _give(self, fact: Fact, form: str) -> str:
        """Return the fact's next value, and remember that it was given."""
        given = self.given.get(fact, 0)
        self.given[fact] = given + 1
        return form.format(fact.values[given])
