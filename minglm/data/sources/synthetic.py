"""Text from small procedures: mathematics, science, questions and answers, long ledgers (paper 2.2, 2.3).

The paper up-samples pages of mathematics and science, and lengthens its context on up-sampled long documents. A toy
corpus has few such pages, so these are written by procedure, true by construction, in English and Chinese:

    math      worked sums, running totals, comparisons, sequences
    science   sentences over the tables of elements, planets, units and countries (`tables.py`)
    qa        short questions and answers over the same tables and over arithmetic, in English or Chinese
    long      a long ledger with one question at the end, whose answer stands far above: a needle to remember

Document n of a kind follows from (seed, kind, n) alone, so any document can be made without those before it.
Simplified: a few dozen templates; no claim to the variety of real pages.
"""

import random

from minglm.data.sources.facts import CONTINENTS, COUNTRIES, ELEMENTS, PLANETS, STATES, UNITS


def document(kind, index, seed, **options):
    """The text of one document. kind: math, science, qa or long; `long` takes `entries`, the length of its ledger.

    Returns (text, language), language "en" or "zh".
    """
    rng = random.Random(f"{seed}/{kind}/{index}")
    return KINDS[kind](rng, **options)


# Mathematics


def _sum(rng):
    a, b = rng.randint(0, 99), rng.randint(0, 99)
    if rng.random() < 0.5:
        return f"{a}+{b}={a + b}"
    return f"{max(a, b)}-{min(a, b)}={max(a, b) - min(a, b)}"


def _step(rng, total):
    """A signed single digit that keeps the running total within 0 to 99."""
    return rng.choice([term for term in range(-9, 10) if term and 0 <= total + term <= 99])


def _running(rng):
    total = rng.randint(10, 60)
    words = [f"Start with {total}."]
    for _ in range(rng.randint(2, 5)):
        term = _step(rng, total)
        words.append(
            f"{'Add' if term > 0 else 'Take away'} {abs(term)}: {total}{term:+d}={total + term}."
        )
        total += term
    return " ".join([*words, f"The result is {total}."])


def _chain(rng):
    total, steps = rng.randint(10, 60), []
    for _ in range(rng.randint(2, 5)):
        term = _step(rng, total)
        steps.append(f"{total}{term:+d}={total + term}")
        total += term
    return ";".join(steps)


def _product(rng):
    a, b = rng.randint(2, 9), rng.randint(2, 99)
    if b < 10:
        return f"{a}*{b}={a * b}"
    tens, ones = b // 10 * 10, b % 10
    return f"{a}*{b}={a}*{tens}+{a}*{ones}={a * tens}+{a * ones}={a * b}"


def _compare(rng):
    a, b = rng.randint(0, 999), rng.randint(0, 999)
    if a == b:
        return f"{a}={b}, they are equal."
    large, small = max(a, b), min(a, b)
    return rng.choice(
        (
            f"{a}{'<' if a < b else '>'}{b}",
            f"{large} is greater than {small}.",
            f"{small} is less than {large}, and the difference is {large - small}.",
        )
    )


def _sequence(rng):
    start, step = rng.randint(0, 50), rng.randint(1, 12)
    terms = [start + step * n for n in range(rng.randint(4, 8))]
    shown = ", ".join(map(str, terms[:-1]))
    return f"{shown}, ... Each term is {step} more than the last, so {terms[-2]}+{step}={terms[-1]} comes next."


def _parity(rng):
    n = rng.randint(0, 999)
    kind = "odd" if n % 2 else "even"
    return f"{n} is {kind}: its last digit is {n % 10}, and {n % 10} is {kind}."


def _mathematics(rng):
    statements = (_sum, _running, _chain, _product, _compare, _sequence, _parity)
    weights = (6, 3, 4, 2, 2, 1, 1)
    lines = [rng.choices(statements, weights)[0](rng) for _ in range(rng.randint(6, 16))]
    return "\n".join(lines) + "\n", "en"


# Science


def _element(rng):
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


def _planet(rng):
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


def _unit(rng):
    one, many, factor = rng.choice(UNITS)
    n = rng.randint(2, 9)
    return rng.choice(
        (f"One {one} is {factor} {many}.", f"{n} {one}s are {n}*{factor}={n * factor} {many}.")
    )


def _country(rng):
    c = rng.choice(COUNTRIES)
    same = rng.choice([d for d in COUNTRIES if d.continent == c.continent and d is not c])
    return rng.choice(
        (
            f"The capital of {c.name} is {c.capital}.",
            f"{c.capital} is the capital of {c.name}, a country in {c.continent}.",
            f"{c.name} lies in {c.continent}, and so does {same.name}.",
        )
    )


def _science(rng):
    facts = (_element, _planet, _unit, _country)
    subject = rng.choice(facts)  # a page has a subject, with a few other sentences among it
    lines = [
        (subject if rng.random() < 0.7 else rng.choice(facts))(rng)
        for _ in range(rng.randint(4, 10))
    ]
    return " ".join(lines) + "\n", "en"


# Questions and answers


def _pair_en(rng):
    e, c = rng.choice(ELEMENTS), rng.choice(COUNTRIES)
    planet, (one, many, factor) = rng.choice(PLANETS), rng.choice(UNITS)
    a, b = rng.randint(0, 99), rng.randint(0, 99)
    return rng.choice(
        (
            (f"What is the capital of {c.name}?", c.capital),
            (f"Which country has the capital {c.capital}?", c.name),
            (f"On which continent is {c.name}?", c.continent),
            (f"What is the symbol of {e.name}?", e.symbol),
            (f"What is the atomic number of {e.name}?", f"{e.number}"),
            (f"Is {e.name} a solid, a liquid or a gas at room temperature?", f"a {e.state}"),
            (f"Which planet is number {planet.order} from the sun?", planet.name),
            (f"How many {many} are in one {one}?", f"{factor}"),
            (f"What is {a}+{b}?", f"{a + b}"),
            (f"What is {max(a, b)}-{min(a, b)}?", f"{max(a, b) - min(a, b)}"),
        )
    )


def _pair_zh(rng):
    e, c, planet = rng.choice(ELEMENTS), rng.choice(COUNTRIES), rng.choice(PLANETS)
    a, b = rng.randint(0, 99), rng.randint(0, 99)
    return rng.choice(
        (
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
    )


def _questions(rng):
    chinese = rng.random() < 0.5
    pair, question, answer = (
        (_pair_zh, "问：", "答：") if chinese else (_pair_en, "Question: ", "Answer: ")
    )
    pairs = [pair(rng) for _ in range(rng.randint(3, 8))]
    return "".join(f"{question}{q}\n{answer}{a}\n" for q, a in pairs), "zh" if chinese else "en"


# Long documents

PEOPLE = """
Ada Ben Carla Dan Eva Finn Gina Hugo Ida Jan Kira Leo Mona Nils Olga Paul Rosa Sven Tina Uwe Vera Will Yara Zoe
"""
THINGS = "apples books coins doors eggs flags gloves hats jars keys lamps maps nails pens rings shoes tools urns"


def _ledger(rng, entries=None):
    pairs = [(name, thing) for name in PEOPLE.split() for thing in THINGS.split()]
    entries = min(
        entries or round(8 * 50 ** rng.random()), len(pairs)
    )  # 8 to 400, each length scale equally often
    pairs = rng.sample(pairs, entries)
    counts = [rng.randint(2, 99) for _ in pairs]
    lines = [
        f"{name} has {count} {thing}." for (name, thing), count in zip(pairs, counts, strict=True)
    ]
    asked = rng.randrange(entries)
    name, thing = pairs[asked]
    lines.append(f"Question: How many {thing} does {name} have?\nAnswer: {counts[asked]}\n")
    return "\n".join(lines), "en"


KINDS = {"math": _mathematics, "science": _science, "qa": _questions, "long": _ledger}
