"""Write synthetic pages: mathematics, science, questions and answers, long ledgers (paper 2.2, 2.3).

The paper up-samples pages of mathematics and science, and extends its context on up-sampled long documents. A
toy corpus has few such pages, so these are written by procedure, true by construction, in English and
Chinese:

    math      worked sums, running totals, comparisons, sequences
    science   sentences about the tables of elements, planets, units and countries (`facts.py`)
    qa        short questions and answers about the same tables and about arithmetic, in English or Chinese
    long      a long ledger with one question at the end, whose answer is far above: a needle to remember
    copies, digit_copies
              a row of letters with digits, or of digits alone, and twice the same row from another place on

Whoever calls a tool copies names and numbers. A large model learns this from text; a small one learns it much sooner from
rows in which nothing else can be learned, and from ten digits sooner than from all letters. Documents with copies must
not see each other (best-fit packing), or the same digit stands before other digits there.

Document n of a source depends on (seed, source, n) alone, so any document can be made without those before
it. Simplified: a few dozen templates; real pages are far more varied.
"""

import random
import string
from collections.abc import Callable
from typing import NamedTuple

from minglm.data.sources.facts import CONTINENTS, COUNTRIES, ELEMENTS, PLANETS, STATES, UNITS


class Page(NamedTuple):
    """One synthetic document."""

    text: str
    language: str
    """en or zh."""


class QuestionAnswer(NamedTuple):
    """A question and its answer."""

    question: str
    answer: str


def document(source: str, index: int, seed: int, entries: int | None = None) -> Page:
    """Write one document.

    Args:
        source: one of `WRITERS`.
        entries: the length of the ledger of `long`; None: drawn.
    """
    rng = random.Random(f"{seed}/{source}/{index}")
    if source == "long":
        return _ledger(rng, entries)
    return WRITERS[source](rng)


# Mathematics


def _sum(rng: random.Random) -> str:
    a = rng.randint(0, 99)
    b = rng.randint(0, 99)
    if rng.random() < 0.5:
        return f"{a}+{b}={a + b}"
    return f"{max(a, b)}-{min(a, b)}={max(a, b) - min(a, b)}"


def _term(rng: random.Random, total: int) -> int:
    """Draw a signed single digit that keeps the running total within 0 to 99."""
    terms = [term for term in range(-9, 10) if term != 0 and 0 <= total + term <= 99]
    return rng.choice(terms)


def _running(rng: random.Random) -> str:
    total = rng.randint(10, 60)
    sentences = [f"Start with {total}."]
    for _ in range(rng.randint(2, 5)):
        term = _term(rng, total)
        verb = "Add" if term > 0 else "Take away"
        sentences.append(f"{verb} {abs(term)}: {total}{term:+d}={total + term}.")
        total += term
    sentences.append(f"The result is {total}.")
    return " ".join(sentences)


def _chain(rng: random.Random) -> str:
    total = rng.randint(10, 60)
    steps = []
    for _ in range(rng.randint(2, 5)):
        term = _term(rng, total)
        steps.append(f"{total}{term:+d}={total + term}")
        total += term
    return ";".join(steps)


def _product(rng: random.Random) -> str:
    a = rng.randint(2, 9)
    b = rng.randint(2, 99)
    if b < 10:
        return f"{a}*{b}={a * b}"
    tens = b // 10 * 10
    ones = b % 10
    return f"{a}*{b}={a}*{tens}+{a}*{ones}={a * tens}+{a * ones}={a * b}"


def _compare(rng: random.Random) -> str:
    a = rng.randint(0, 999)
    b = rng.randint(0, 999)
    if a == b:
        return f"{a}={b}, they are equal."
    large = max(a, b)
    small = min(a, b)
    return rng.choice(
        (
            f"{a}{'<' if a < b else '>'}{b}",
            f"{large} is greater than {small}.",
            f"{small} is less than {large}, and the difference is {large - small}.",
        )
    )


def _sequence(rng: random.Random) -> str:
    start = rng.randint(0, 50)
    step = rng.randint(1, 12)
    terms = [start + step * n for n in range(rng.randint(4, 8))]
    shown = ", ".join(map(str, terms[:-1]))
    return f"{shown}, ... Each term is {step} more than the last, so {terms[-2]}+{step}={terms[-1]} comes next."


def _parity(rng: random.Random) -> str:
    n = rng.randint(0, 999)
    parity = "odd" if n % 2 else "even"
    return f"{n} is {parity}: its last digit is {n % 10}, and {n % 10} is {parity}."


def _mathematics(rng: random.Random) -> Page:
    statements = (_sum, _running, _chain, _product, _compare, _sequence, _parity)
    weights = (6, 3, 4, 2, 2, 1, 1)
    lines = []
    for _ in range(rng.randint(6, 16)):
        (statement,) = rng.choices(statements, weights)
        lines.append(statement(rng))
    return Page("\n".join(lines) + "\n", "en")


# Science


def _element(rng: random.Random) -> str:
    e, other = rng.sample(ELEMENTS, 2)
    heavy, light = (e, other) if e.mass > other.mass else (other, e)
    return rng.choice(
        (
            f"{e.name.capitalize()} has the symbol {e.symbol} and the atomic number {e.number}.",
            f"The symbol {e.symbol} stands for {e.name}.",
            f"An atom of {e.name} has {e.number} protons.",
            f"At room temperature {e.name} is a {e.state}.",
            f"The atomic mass of {e.name} is about {e.mass:g}.",
            f"An atom of {heavy.name} is heavier than an atom of {light.name}: {heavy.mass:g} against {light.mass:g}.",
            f"Element {e.number} of the periodic table is {e.name} ({e.symbol}), a {e.state}.",
        )
    )


def _planet(rng: random.Random) -> str:
    a, b = sorted(rng.sample(PLANETS, 2), key=lambda planet: planet.order)
    large, small = (a, b) if a.radius > b.radius else (b, a)
    return rng.choice(
        (
            f"{a.name} is planet number {a.order}, counted from the sun.",
            f"{a.name} is nearer to the sun than {b.name}.",
            f"{b.name} is about {b.distance:g} million kilometres from the sun.",
            f"The radius of {large.name} is {large.radius} km, more than the {small.radius} km of {small.name}.",
            f"{a.name} goes round the sun in {a.period:g} days, {b.name} in {b.period:g} days.",
        )
    )


def _unit(rng: random.Random) -> str:
    unit = rng.choice(UNITS)
    n = rng.randint(2, 9)
    return rng.choice(
        (
            f"One {unit.name} is {unit.factor} {unit.smaller}.",
            f"{n} {unit.name}s are {n}*{unit.factor}={n * unit.factor} {unit.smaller}.",
        )
    )


def _country(rng: random.Random) -> str:
    c = rng.choice(COUNTRIES)
    same = rng.choice([d for d in COUNTRIES if d.continent == c.continent and d is not c])
    return rng.choice(
        (
            f"The capital of {c.name} is {c.capital}.",
            f"{c.capital} is the capital of {c.name}, a country in {c.continent}.",
            f"{c.name} lies in {c.continent}, and so does {same.name}.",
        )
    )


def _science(rng: random.Random) -> Page:
    facts = (_element, _planet, _unit, _country)
    subject = rng.choice(facts)  # about seven sentences in ten are about the subject of the page
    sentences = []
    for _ in range(rng.randint(4, 10)):
        fact = subject if rng.random() < 0.7 else rng.choice(facts)
        sentences.append(fact(rng))
    return Page(" ".join(sentences) + "\n", "en")


# Questions and answers


def _pair_en(rng: random.Random) -> QuestionAnswer:
    e = rng.choice(ELEMENTS)
    c = rng.choice(COUNTRIES)
    planet = rng.choice(PLANETS)
    unit = rng.choice(UNITS)
    a = rng.randint(0, 99)
    b = rng.randint(0, 99)
    pairs = (
        (f"What is the capital of {c.name}?", c.capital),
        (f"Which country has the capital {c.capital}?", c.name),
        (f"On which continent is {c.name}?", c.continent),
        (f"What is the symbol of {e.name}?", e.symbol),
        (f"What is the atomic number of {e.name}?", f"{e.number}"),
        (f"Is {e.name} a solid, a liquid or a gas at room temperature?", f"a {e.state}"),
        (f"Which planet is number {planet.order} from the sun?", planet.name),
        (f"How many {unit.smaller} are in one {unit.name}?", f"{unit.factor}"),
        (f"What is {a}+{b}?", f"{a + b}"),
        (f"What is {max(a, b)}-{min(a, b)}?", f"{max(a, b) - min(a, b)}"),
    )
    return QuestionAnswer(*rng.choice(pairs))


def _pair_zh(rng: random.Random) -> QuestionAnswer:
    e = rng.choice(ELEMENTS)
    c = rng.choice(COUNTRIES)
    planet = rng.choice(PLANETS)
    a = rng.randint(0, 99)
    b = rng.randint(0, 99)
    pairs = (
        (f"{c.chinese}的首都是哪里？", c.chinese_capital),
        (f"{c.chinese_capital}是哪个国家的首都？", c.chinese),
        (f"{c.chinese}在哪个大洲？", CONTINENTS[c.continent]),
        (f"{e.chinese}的元素符号是什么？", e.symbol),
        (f"{e.chinese}的原子序数是多少？", f"{e.number}"),
        (f"{e.chinese}在室温下是什么状态？", STATES[e.state]),
        (f"离太阳第{planet.order}近的行星是哪一颗？", planet.chinese),
        (f"{a}+{b}等于多少？", f"{a + b}"),
        (f"{max(a, b)}-{min(a, b)}等于多少？", f"{max(a, b) - min(a, b)}"),
    )
    return QuestionAnswer(*rng.choice(pairs))


def _questions(rng: random.Random) -> Page:
    is_chinese = rng.random() < 0.5
    count = rng.randint(3, 8)
    if is_chinese:
        pairs = [_pair_zh(rng) for _ in range(count)]
        lines = [f"问：{pair.question}\n答：{pair.answer}\n" for pair in pairs]
        return Page("".join(lines), "zh")
    pairs = [_pair_en(rng) for _ in range(count)]
    lines = [f"Question: {pair.question}\nAnswer: {pair.answer}\n" for pair in pairs]
    return Page("".join(lines), "en")


# Copies

MIN_ROW = 4
MAX_ROW = 12


def _digit_copies(rng: random.Random) -> Page:
    return _copied(rng, rng.sample(string.digits, rng.randint(MIN_ROW, 9)))


def _copies(rng: random.Random) -> Page:
    letters = rng.sample(string.ascii_letters, rng.randint(MIN_ROW, MAX_ROW))
    # No tokenizer makes one token of a letter and a digit.
    return _copied(rng, [letter + rng.choice(string.digits) for letter in letters])


def _copied(rng: random.Random, row: list[str]) -> Page:
    lines = ["".join(row)]
    for _ in range(2):
        place = rng.randrange(1, len(row))
        lines.append("".join(row[place:] + row[:place]))
    return Page("\n".join(lines) + "\n", "en")


# Long documents

PEOPLE = """
Ada Ben Carla Dan Eva Finn Gina Hugo Ida Jan Kira Leo Mona Nils Olga Paul Rosa Sven Tina Uwe Vera Will Yara Zoe
"""
THINGS = "apples books coins doors eggs flags gloves hats jars keys lamps maps nails pens rings shoes tools urns"


MIN_ENTRIES = 8
MAX_ENTRIES = 400


def _ledger(rng: random.Random, entries: int | None = None) -> Page:
    pairs = [(name, thing) for name in PEOPLE.split() for thing in THINGS.split()]
    if not entries:
        # Each length scale from MIN_ENTRIES to MAX_ENTRIES is equally likely.
        entries = round(MIN_ENTRIES * (MAX_ENTRIES // MIN_ENTRIES) ** rng.random())
    entries = min(entries, len(pairs))
    pairs = rng.sample(pairs, entries)
    counts = [rng.randint(2, 99) for _ in pairs]
    lines = []
    for (name, thing), count in zip(pairs, counts, strict=True):
        lines.append(f"{name} has {count} {thing}.")
    asked = rng.randrange(entries)
    name, thing = pairs[asked]
    lines.append(f"Question: How many {thing} does {name} have?\nAnswer: {counts[asked]}\n")
    return Page("\n".join(lines), "en")


WRITERS: dict[str, Callable[[random.Random], Page]] = {
    "math": _mathematics,
    "science": _science,
    "qa": _questions,
    "long": _ledger,
    "copies": _copies,
    "digit_copies": _digit_copies,
}
"""The function that writes each source."""
