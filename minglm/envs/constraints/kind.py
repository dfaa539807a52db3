"""Define what a kind of constraint is: its words, its checker, and how a request gets one that can be met (paper 3.4).

    even:  "Only even."   each number n: n % 2 == 0              right: two four      wrong: two three
    up:    "Smallest first."   numbers == sorted(numbers)        right: two four      wrong: four two

A kind is about each number by itself (`each`), about all of them (`holds`), or about the form (`holds` and
`form`). A request is drawn together with an answer that obeys it: values of `each` first, then numbers that
pass them, arranged; then values that these numbers fit. So no two constraints of a request contradict each
other. Kinds that claim the same place (a separator, the end) have a slot in common, and a request has at most
one kind of a slot.
"""

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from minglm.envs.constraints.answer import Answer
from minglm.envs.instructions import WORDS

Numbers = list[int]
BOTH = ("en", "zh")
ENGLISH = ("en",)
DIGITS = range(1, 10)


@dataclass(frozen=True)
class Kind:
    """One minor kind of constraint."""

    name: str
    english: str
    """The request; {} is its value."""
    chinese: str
    right: str
    """An answer that obeys, with the value `example`."""
    wrong: str
    """A counter-example, with the same value."""
    holds: Callable[[Answer, Any], bool] | None = None
    """(answer, value) -> whether the answer obeys; None for a kind about each number."""
    each: Callable[[int, Any], bool] | None = None
    """(number, value) -> whether a number obeys."""
    values: Sequence[Any] | Mapping[str, Sequence[Any]] = (None,)
    """What may be asked for, as plain JSON values, or that for each language; a list has one item for each {}."""
    example: Any = None
    slots: tuple[str, ...] = ()
    """Places that it claims."""
    languages: tuple[str, ...] = BOTH
    """Languages of the answer in which it has a meaning."""
    arrange: Callable[[random.Random, Numbers], Numbers] | None = None
    """Changes numbers so that the constraint is likely to hold."""
    form: Callable[[Any, str], dict[str, Any]] | None = None
    """(value, language) -> fields of `Form`; None for a kind about numbers."""
    spelled: bool = False
    """Whether its values are numbers that a request spells in the language of the answer."""

    def choices(self, language: str) -> Sequence[Any]:
        """Return the values that a request for an answer in a language may have."""
        return self.values[language] if isinstance(self.values, Mapping) else self.values

    def obeyed(self, answer: Answer, value: Any) -> bool:
        """Return whether an answer obeys."""
        if not any(answer.words):  # a piece may be all decoration
            return False
        if self.each is not None:
            return all(number and self.each(number, value) for number in answer.numbers)
        assert self.holds is not None, "a kind has a checker"
        return self.holds(answer, value)

    def sentence(self, value: Any, asked: str, language: str) -> str:
        """Return the request in the language `asked`, for an answer in `language`."""
        values = value if isinstance(value, list | tuple) else [value]
        if self.spelled:
            values = [WORDS[language][number - 1] for number in values]
        return (self.chinese if asked == "zh" else self.english).format(*values)


def pairs(values: Sequence[int] = DIGITS) -> list[list[int]]:
    """Return all ordered pairs of different values."""
    return [[one, other] for one in values for other in values if one != other]
