"""Synthetic text: repeatable one document at a time, and true, as read back by other code than wrote it."""

import itertools
import re
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from minglm.data.sources.facts import CONTINENTS, COUNTRIES, ELEMENTS, PLANETS, STATES
from minglm.data.sources.synthetic import WRITERS, document

seeds, indices = st.integers(0, 2**31), st.integers(0, 10**6)


@given(st.sampled_from(sorted(WRITERS)), indices, seeds)
def test_a_document_follows_from_seed_kind_and_index(kind, index, seed):
    """The same three give the same text; another index or seed gives another."""
    text, language = document(kind, index, seed)
    assert (text, language) == document(kind, index, seed)
    assert language in ("en", "zh")
    assert text.endswith("\n")
    assert text != document(kind, index + 1, seed)[0]
    assert text != document(kind, index, seed + 1)[0]


def value(expression):
    """Compute sums of products of whole numbers, such as 8*40+8*2, from left to right."""
    total = 0
    for term in re.findall(r"[+-]?[^+-]+", expression):
        sign = -1 if term[0] == "-" else 1
        total += sign * product(term.strip("+-"))
    return total


def product(term):
    result = 1
    for factor in term.split("*"):
        result *= int(factor)
    return result


@given(indices, seeds)
def test_every_equation_holds(index, seed):
    """All sides of every equation have the same value, and every comparison is true."""
    text = document("math", index, seed)[0] + document("science", index, seed)[0]
    for equation in re.findall(r"[\d+*-]+(?:=[\d+*-]+)+", text):
        values = {value(side) for side in equation.split("=")}
        assert len(values) == 1, equation
    for a, sign, b in re.findall(r"^(\d+)([<>])(\d+)$", text, re.M):
        assert (int(a) < int(b)) == (sign == "<") and a != b
    for a, b in re.findall(r"(\d+) is greater than (\d+)\.", text):
        assert int(a) > int(b)
    for small, large, difference in re.findall(
        r"(\d+) is less than (\d+), and the difference is (\d+)", text
    ):
        assert int(large) - int(small) == int(difference) > 0
    for start, end in re.findall(r"Start with (\d+)\..*?The result is (\d+)\.", text):
        line = next(
            line
            for line in text.splitlines()
            if line.startswith(f"Start with {start}.") and end in line
        )
        terms = re.findall(r"(Add|Take away) (\d+):", line)
        assert int(start) + sum(int(n) if word == "Add" else -int(n) for word, n in terms) == int(
            end
        )


@given(indices, seeds)
def test_every_comparison_of_things_is_true(index, seed):
    """What is called heavier, larger or nearer is so by the numbers of the tables."""
    mass = {e.name: e.mass for e in ELEMENTS}
    planet = {p.name: p for p in PLANETS}
    text = document("science", index, seed)[0]
    for a, b in re.findall(r"An atom of (\w+) is heavier than an atom of (\w+)", text):
        assert mass[a] > mass[b]
    for a, x, y, b in re.findall(
        r"The radius of (\w+) is (\d+) km, more than the (\d+) km of (\w+)", text
    ):
        assert planet[a].radius == int(x) > int(y) == planet[b].radius
    for a, b in re.findall(r"(\w+) is nearer to the sun than (\w+)", text):
        assert planet[a].distance < planet[b].distance


def answers():
    """Return {question: answer} over the tables, built the other way round from `synthetic`."""
    known = {}
    for c in COUNTRIES:
        known[f"What is the capital of {c.name}?"] = c.capital
        known[f"Which country has the capital {c.capital}?"] = c.name
        known[f"On which continent is {c.name}?"] = c.continent
        known[f"{c.chinese}的首都是哪里？"] = c.chinese_capital
        known[f"{c.chinese_capital}是哪个国家的首都？"] = c.chinese
        known[f"{c.chinese}在哪个大洲？"] = CONTINENTS[c.continent]
    for e in ELEMENTS:
        known[f"What is the symbol of {e.name}?"] = known[f"{e.chinese}的元素符号是什么？"] = (
            e.symbol
        )
        known[f"What is the atomic number of {e.name}?"] = known[
            f"{e.chinese}的原子序数是多少？"
        ] = str(e.number)
        known[f"Is {e.name} a solid, a liquid or a gas at room temperature?"] = f"a {e.state}"
        known[f"{e.chinese}在室温下是什么状态？"] = STATES[e.state]
    for p in PLANETS:
        known[f"Which planet is number {p.order} from the sun?"] = p.name
        known[f"离太阳第{p.order}近的行星是哪一颗？"] = p.chinese
    return known


KNOWN = answers()


@given(indices, seeds)
def test_every_answer_is_right(index, seed):
    """A question has one answer: that of the tables, or of the sum it asks for."""
    text, language = document("qa", index, seed)
    pairs = re.findall(r"(?:Question: |问：)(.*)\n(?:Answer: |答：)(.*)\n", text)
    assert 3 <= len(pairs) <= 8
    assert ("问" in text) == (language == "zh")
    for question, answer in pairs:
        if sum_asked := re.search(r"(\d+[+-]\d+)", question):
            assert value(sum_asked[1]) == int(answer)
        elif "How many" not in question:
            assert KNOWN[question] == answer


@given(st.sampled_from(["copies", "digit_copies"]), indices, seeds)
def test_a_row_comes_again_from_another_place(kind, index, seed):
    """All lines are rotations of the first, no two entries of it are the same, and no line begins where it does."""
    row, *others = document(kind, index, seed)[0].splitlines()
    width = 2 if kind == "copies" else 1
    entries = [row[place : place + width] for place in range(0, len(row), width)]
    assert len({entry[0] for entry in entries}) == len(entries) >= 4
    assert len(others) == 2
    for other in others:
        assert other != row
        assert len(other) == len(row)
        assert other in row + row
        assert other[:width] in entries


def test_both_languages_come_equally_often():
    """Of 400 question documents 160 to 240 are Chinese: four standard deviations about one half."""
    languages = Counter(document("qa", index, 0)[1] for index in range(400))
    assert 160 <= languages["zh"] <= 240


@given(indices, seeds, st.integers(1, 300))
def test_the_needle_stands_once_in_the_ledger(index, seed, entries):
    """The question's answer is the number of exactly one line above, and the ledger has the length asked for."""
    lines = document("long", index, seed, entries=entries)[0].splitlines()
    assert len(lines) == entries + 2
    thing, name = re.fullmatch(r"Question: How many (\w+) does (\w+) have\?", lines[-2]).groups()
    found = [
        line for line in lines if line.startswith(f"{name} has ") and line.endswith(f" {thing}.")
    ]
    assert len(found) == 1
    assert lines[-1] == f"Answer: {found[0].split()[2]}"


@pytest.mark.parametrize("field", ["number", "symbol", "name", "chinese"])
def test_elements_are_distinct(field):
    """No two elements share a number, symbol or name, or a question would have two answers."""
    assert len({getattr(e, field) for e in ELEMENTS}) == len(ELEMENTS) >= 40


@pytest.mark.parametrize("field", ["name", "capital", "chinese", "chinese_capital"])
def test_countries_are_distinct(field):
    """No two countries share a name or a capital, and each continent has at least two countries."""
    assert len({getattr(c, field) for c in COUNTRIES}) == len(COUNTRIES) >= 60
    assert min(Counter(c.continent for c in COUNTRIES).values()) >= 2


def test_tables_agree_with_physics():
    """Heavier elements have higher numbers but for the two known exceptions; planets obey Kepler's third law."""
    swaps = [(a.symbol, b.symbol) for a, b in itertools.pairwise(ELEMENTS) if a.mass >= b.mass]
    assert swaps == [("Ar", "K"), ("Co", "Ni")]
    # Period² / distance³ is the same for all; the table's rounding leaves less than 0.5 %.
    for p in PLANETS:
        assert (p.period / 365.26) ** 2 / (p.distance / 149.6) ** 3 == pytest.approx(1, abs=0.005)
