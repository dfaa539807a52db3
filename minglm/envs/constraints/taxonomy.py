"""Join the kinds to one taxonomy, and draw requests whose constraints can all be met (paper 3.4).

    request = language, one kind about the count, n other kinds of free slots, each with a value
    trained: 79 of 99 kinds       unseen: 20 of 99, which no training prompt has

A request is drawn together with numbers that obey it (`kind`), so it has an answer by construction: no table
of contradictions has to be kept, beside the slots. The unseen kinds are neighbours of trained ones, of all
seven majors (the smallest number beside the largest, semicolons beside commas), so that their sentences are
made of known words.
"""

import functools
import random
from collections.abc import Sequence
from typing import Any, NamedTuple

from minglm.envs.constraints import choice, count, frame, layout, meaning, order, spelling
from minglm.envs.constraints.answer import Form, read, write
from minglm.envs.constraints.kind import DIGITS, Kind, Numbers

MAJORS: dict[str, Sequence[Kind]] = {
    "count": count.KINDS,
    "choice": choice.KINDS,
    "meaning": meaning.KINDS,
    "order": order.KINDS,
    "spelling": spelling.KINDS,
    "layout": layout.KINDS,
    "frame": frame.KINDS,
}
KINDS = {kind.name: kind for kinds in MAJORS.values() for kind in kinds}
PLACE = {name: place for place, name in enumerate(KINDS)}
UNSEEN_OF_MAJOR = {
    "count": ("either",),
    "choice": ("neither", "last", "once"),
    "meaning": ("between", "no_threes", "sum_odd", "smallest"),
    "order": ("odd_first", "smallest_last", "count_down"),
    "spelling": ("last_letter", "least_letters"),
    "layout": ("semicolons", "stars", "blank_lines"),
    "frame": ("titles", "square", "each_quotes", "sign_off"),
}
UNSEEN = {name for names in UNSEEN_OF_MAJOR.values() for name in names}
DRAWS = 20
"""Numbers that are tried before other kinds are."""
MOST_NUMBERS = 5


class Request(NamedTuple):
    """What is asked for, and an answer."""

    constraints: dict[str, Any]
    """{kind: value}, in the order of the taxonomy."""
    witness: Numbers
    """Numbers that obey."""


def draw(rng: random.Random, language: str, others: int, unseen: bool) -> Request:
    """Return a request for an answer in a language.

    others: constraints beside that on the count. unseen: whether one of its kinds at least is unseen; otherwise none is.
    """
    while True:
        kinds = draw_kinds(rng, language, others, unseen)
        for _ in range(DRAWS if kinds else 0):
            request = draw_values(rng, language, kinds)
            if request is not None:
                return request


@functools.cache
def allowed_kinds(language: str, unseen: bool) -> tuple[list[Kind], list[Kind]]:
    """Return the kinds about the count, and the others, that a request for an answer in a language may have."""
    allowed = [
        kind
        for kind in KINDS.values()
        if language in kind.languages and (unseen or kind.name not in UNSEEN)
    ]
    counts = [kind for kind in allowed if "count" in kind.slots]
    return counts, [kind for kind in allowed if "count" not in kind.slots]


def draw_kinds(rng: random.Random, language: str, others: int, unseen: bool) -> list[Kind]:
    """Return one kind about the count and `others` other ones, in the order of the taxonomy; none if two share a slot."""
    about_count, rest = allowed_kinds(language, unseen)
    kinds = [rng.choice(about_count), *rng.sample(rest, others)]
    slots = [slot for kind in kinds for slot in kind.slots]
    if len(slots) != len({*slots}) or unseen > any(kind.name in UNSEEN for kind in kinds):
        return []
    return sorted(kinds, key=lambda kind: PLACE[kind.name])


def draw_values(rng: random.Random, language: str, kinds: Sequence[Kind]) -> Request | None:
    """Return a request of these kinds, or None where the numbers drawn do not fit one of them."""
    values = {
        kind.name: rng.choice(kind.choices(language))
        for kind in kinds
        if kind.each is not None or kind.form is not None
    }
    fitting = list(DIGITS)
    for kind in kinds:
        if kind.each is not None:
            fitting = [number for number in fitting if kind.each(number, values[kind.name])]
    if not fitting:
        return None
    length = rng.randint(2, MOST_NUMBERS)
    if rng.random() < 0.7 and length <= len(fitting):
        numbers = rng.sample(fitting, length)
    else:
        numbers = rng.choices(fitting, k=length)
    for kind in kinds:
        if kind.arrange is not None:
            numbers = kind.arrange(rng, numbers)
    if len(numbers) < 2 or not {*numbers} <= {*fitting}:
        return None

    answer = read(write(numbers, language, Form()))
    for kind in kinds:
        if kind.name in values:
            continue
        choices = [value for value in kind.choices(language) if kind.obeyed(answer, value)]
        if not choices:
            return None
        values[kind.name] = rng.choice(choices)
    return Request({kind.name: values[kind.name] for kind in kinds}, numbers)


def form_of(constraints: dict[str, Any], language: str) -> Form:
    """Return the form that the constraints ask for."""
    fields: dict[str, Any] = {}
    for name, value in constraints.items():
        form = KINDS[name].form
        if form is not None:
            fields |= form(value, language)
    return Form(**fields)


def counter_example(
    rng: random.Random, constraints: dict[str, Any], numbers: Numbers, language: str, broken: str
) -> str | None:
    """Return an answer that breaks one constraint and obeys the others; None where the draws find none.

    numbers: an answer that obeys them all.
    """
    kept = {name: value for name, value in constraints.items() if name != broken}
    kind = KINDS[broken]
    if kind.form is not None:
        # Without the form, or with another one of the same place.
        texts = [write(numbers, language, form_of(kept, language))]
        rivals = [r for r in KINDS.values() if r.form and {*r.slots} & {*kind.slots} and r != kind]
        for rival in rng.sample(rivals, len(rivals)):
            if language in rival.languages:
                value = rng.choice(rival.choices(language))
                texts.append(
                    write(numbers, language, form_of({**kept, rival.name: value}, language))
                )
    else:
        form = form_of(kept, language)
        texts = []
        for _ in range(DRAWS):
            changed = list(numbers)
            changed[rng.randrange(len(changed))] = rng.choice(DIGITS)
            lists = (
                changed,
                rng.sample(numbers, len(numbers)),
                numbers[:-1],
                [*numbers, numbers[0]],
            )
            texts.append(write(rng.choice(lists), language, form))
    for text in texts:
        if broken_by(text, constraints) == [broken]:
            return text
    return None


def broken_by(text: str, constraints: dict[str, Any]) -> list[str]:
    """Return the constraints that an answer breaks."""
    answer = read(text)
    return [name for name, value in constraints.items() if not KINDS[name].obeyed(answer, value)]
