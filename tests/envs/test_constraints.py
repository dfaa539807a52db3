"""The taxonomy of constraints: every kind has a checker and a counter-example, and what is asked for together can be met."""

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from minglm.envs.base import assistant
from minglm.envs.constraints.answer import read, write
from minglm.envs.constraints.environment import Constraints, UnseenConstraints
from minglm.envs.constraints.taxonomy import (
    KINDS,
    MAJORS,
    UNSEEN,
    broken_by,
    draw_values,
    form_of,
)
from minglm.testing.strategies import seeds

ENVIRONMENTS = {env.name: env for env in (Constraints(), UnseenConstraints())}


def drawn(name, seed, difficulty):
    """Return an environment and one of its tasks."""
    env = ENVIRONMENTS[name]
    return env, env.task(0, seed, difficulties=(difficulty,))


def test_the_taxonomy_has_seven_majors():
    """At least 60 different kinds in seven majors; some of each major are never trained."""
    assert len(MAJORS) == 7 and len(KINDS) == sum(map(len, MAJORS.values())) >= 60
    for kinds in MAJORS.values():
        unseen = [kind.name in UNSEEN for kind in kinds]
        assert any(unseen) and not all(unseen)


@pytest.mark.parametrize("name", KINDS)
def test_a_kind_has_a_checker_and_a_counter_example(name):
    """The example obeys, the counter-example does not, nor does an empty answer; each value has its place in both requests."""
    kind = KINDS[name]
    assert kind.obeyed(read(kind.right), kind.example)
    assert not kind.obeyed(read(kind.wrong), kind.example)
    assert not kind.obeyed(read(""), kind.example)
    for language in kind.languages:
        for value in kind.choices(language):
            arity = len(value) if isinstance(value, list) else int(value is not None)
            assert kind.english.count("{}") == kind.chinese.count("{}") == arity


@given(seeds, st.sampled_from(sorted(ENVIRONMENTS)), st.integers(1, 5))
def test_what_is_asked_for_together_can_be_met(seed, name, difficulty):
    """The oracle obeys all constraints, no two claim the same slot, and the sentences of the request are its criteria."""
    env, task = drawn(name, seed, difficulty)
    constraints = task.label["constraints"]
    assert len(constraints) == difficulty + 1
    slots = [slot for kind in constraints for slot in KINDS[kind].slots]
    assert len(slots) == len({*slots})
    score = env.judge(task, env.demonstrate(task)[-1])
    assert score.value == 1 and {*score.parts} == {*constraints, "language"}
    assert {*constraints} <= {*task.criteria} <= {*score.parts}
    assert all(sentence in task.messages[-1]["content"] for sentence in task.criteria.values())
    assert bool(UNSEEN & {*constraints}) == (name == "unseen_constraints")


@given(seeds, st.sampled_from(sorted(ENVIRONMENTS)), st.integers(1, 5))
def test_a_spoilt_answer_breaks_one_constraint(seed, name, difficulty):
    """One part of the score is 0, the reward too; and the checkers of the others do not care."""
    env, task = drawn(name, seed, difficulty)
    spoilt = env.spoilt(task, random.Random(seed))
    if spoilt is None:
        return
    score = env.judge(task, spoilt)
    assert score.value == 0
    broken = broken_by(spoilt["content"], task.label["constraints"])
    assert len(broken) == 1 and broken == [n for n, held in score.parts.items() if not held]


@given(seeds, st.integers(1, 5))
def test_an_answer_is_read_as_it_was_written(seed, difficulty):
    """Whatever form is asked for, the numbers are found in it, in their order."""
    _, task = drawn("constraints", seed, difficulty)
    label = task.label
    text = write(
        label["witness"], label["language"], form_of(label["constraints"], label["language"])
    )
    assert read(text).numbers == label["witness"]


@pytest.mark.parametrize(
    ("name", "right", "wrong"),
    [
        ("brackets", "（二 六）", "（二 六"),
        ("quotes", "“二 六”", "“二 六"),
        ("each_brackets", "（二） （六）", "（二） (六)"),
        ("each_quotes", "“二”，“六”", "“二”，六"),
    ],
)
def test_chinese_signs_are_as_good(name, right, wrong):
    """Brackets and quotes of Chinese text count where they are asked for, and close as they opened."""
    assert read(right).numbers == read(wrong).numbers == [2, 6]
    assert KINDS[name].obeyed(read(right), None)
    assert not KINDS[name].obeyed(read(wrong), None)


def test_words_that_were_not_asked_for_are_refused():
    """An opening pays where it is asked for and nowhere else."""
    env = ENVIRONMENTS["constraints"]
    for task in env.tasks(200, 0):
        if task.label["language"] == "en" and "heading" not in task.label["constraints"]:
            content = env.demonstrate(task)[-1]["content"]
            added = assistant(f"Answer:\n{content}")
            score = env.judge(task, added)
            assert score.value == 0 or "begin" in task.label["constraints"]


@pytest.mark.parametrize(
    "pair", [("even", "odd"), ("up", "down"), ("dashes", "commas"), ("first", "up")]
)
def test_contradictions_share_a_slot(pair):
    """Kinds that exclude one another, or that say the same, are never asked for together."""
    one, other = (KINDS[name] for name in pair)
    assert {*one.slots} & {*other.slots}


def test_a_contradiction_has_no_answer():
    """The broken twin: constraints that nothing meets, put together by hand, find no numbers."""
    kinds = [KINDS[name] for name in ("different", "squares", "primes")]
    assert all(draw_values(random.Random(seed), "en", kinds) is None for seed in range(50))
    far = [KINDS[name] for name in ("count", "near", "in_turn", "mirror")]  # these can be met
    assert any(draw_values(random.Random(seed), "en", far) for seed in range(200))


def test_every_kind_is_asked_for():
    """Training meets each trained kind, and the other environment each of all kinds."""
    for name, expected in zip(ENVIRONMENTS, ({*KINDS} - UNSEEN, {*KINDS}), strict=True):
        tasks = ENVIRONMENTS[name].tasks(500, 0, difficulties=(4, 5))
        assert {kind for task in tasks for kind in task.label["constraints"]} == expected


@given(st.text("(){}[]<>*#`\"“”（）'.,!?-_ \n\tonetwsix一二", max_size=20))
def test_every_checker_reads_any_answer(text):
    """A word of which nothing is left without its decoration is read too; a checker that fails would leave its sample out."""
    answer = read(text)
    for kind in KINDS.values():
        kind.obeyed(answer, kind.example)
