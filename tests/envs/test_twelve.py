"""The small tasks among the twelve: puzzles have one solution, keys are unique, programs are judged by what they do."""

import itertools
import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from minglm.config import Split
from minglm.envs import ENVIRONMENTS
from minglm.envs.base import assistant
from minglm.envs.code import Code
from minglm.envs.safety import CATEGORIES, SITUATIONS
from minglm.envs.twelve import GROUPS, TWELVE, averages
from minglm.testing.envs import play

indices = st.integers(0, 10**6)


@given(indices, st.sampled_from(ENVIRONMENTS["logic"].difficulties))
def test_a_puzzle_has_one_solution(index, difficulty):
    """Of all orders of the people that are named, the label is the only one that every statement allows."""
    task = ENVIRONMENTS["logic"].task(index, 0, difficulties=(difficulty,))
    text = task.messages[-1]["content"]
    said = [
        (a, b) if word == "before" else (b, a)
        for a, word, b in re.findall(r"(\w+) is (before|after) (\w+)\.", text)
    ]
    people = sorted({name for pair in said for name in pair})
    allowed = [
        order
        for order in itertools.permutations(people)
        if all(order.index(a) < order.index(b) for a, b in said)
    ]
    assert allowed == [tuple(task.label)]
    assert len(said) == difficulty + (difficulty >= 4)


@given(indices, st.sampled_from(ENVIRONMENTS["needle"].difficulties))
def test_a_key_is_asked_once(index, difficulty):
    """One statement names the person who is asked for, and no other has the same key."""
    task = ENVIRONMENTS["needle"].task(index, 0, difficulties=(difficulty,))
    text = task.messages[-1]["content"]
    (name,) = re.findall(r"Key of (\w+)\?", text)
    keys = dict(re.findall(r"key of (\w+) is (\d{4})\.", text))
    assert keys[name] == task.label
    assert text.count(task.label) == 1 and len(keys) == 4**difficulty


@pytest.mark.parametrize("name", ["completion", "repair"])
@settings(max_examples=4)
@given(index=indices)
def test_a_program_is_judged_by_what_it_does(name, index):
    """A whole function of another form is right; the function with the bug, or one step less, is wrong."""
    env = ENVIRONMENTS[name]
    assert isinstance(env, Code)
    task = env.task(index, 0)
    argument = task.label["argument"]
    right = env.demonstrate(task)[-1]["content"]
    whole = right if name == "repair" else env.program(task, right)
    other = whole.replace(f"return {argument}", f"y = {argument}\n    return y")
    assert play(env, task, [assistant(f"```python\n{other}\n```")]).score.value == 1
    lines = whole.splitlines()
    shorter = "\n".join(lines[:-2] + lines[-1:])
    if name == "completion":  # every step of it is known to matter
        assert play(env, task, [assistant(shorter)]).score.value == 0


def test_safety_has_all_categories_and_an_eighth_of_the_questions():
    """Seven categories in every split, at least 11,435 / 8 questions, and the longest option is right in about a quarter."""
    env = ENVIRONMENTS["safety"]
    assert len(CATEGORIES) == 7
    for split in Split:
        tasks = env.tasks(200, 0, split)
        assert {task.label["category"] for task in tasks} == set(CATEGORIES)
    options = [len(s.right) * len(list(itertools.combinations(s.wrong, 3))) for s in SITUATIONS]
    questions = sum(len(s.fillers) * count for s, count in zip(SITUATIONS, options, strict=True))
    assert questions >= 11_435 / 8
    longest = [
        max(task.label["options"], key=len)
        == task.label["options"]["ABCD".index(task.label["key"])]
        for task in env.tasks(1000, 1)
    ]
    assert sum(longest) / 1000 < 0.34  # 0.25 without any cue


def test_averages_are_of_whole_groups():
    """Twelve known environments, four in each group of its name; a group with a task missing has no average."""
    for group, names in GROUPS.items():
        assert len(names) == 4
        assert {ENVIRONMENTS[name].group for name in names} == {group}
    scores = {name: place / 100 for place, name in enumerate(TWELVE)}
    assert averages(scores) == pytest.approx(
        {"agentic": 0.015, "reasoning": 0.055, "coding": 0.095, "twelve": 0.055}
    )
    del scores[TWELVE[0]]
    assert averages(scores).keys() == {"reasoning", "coding"}
    assert averages({}) == {}
