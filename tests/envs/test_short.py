"""Worlds in single characters: the list says all that a call needs, no two worlds share a name, and states are shown."""

import itertools
import json

import pytest
from helpers.incurious import Incurious
from hypothesis import given
from hypothesis import strategies as st

from minglm.envs import ENVIRONMENTS, SINGLE_CHARACTERS
from minglm.envs.worlds.short import (
    AIRLINE,
    FIXED,
    KNOWN,
    ListedWorld,
    ShortWorld,
    drawn,
    line,
)
from minglm.testing.envs import check_environment, check_lazy_answers, play
from minglm.testing.strategies import seeds

WORLDS = ENVIRONMENTS["worlds:short"]
PLAYED = [ENVIRONMENTS[name] for name in ("worlds:short", "shop:short", "airline:short")]


@pytest.mark.parametrize("name", [name for name in SINGLE_CHARACTERS if name != "search:short"])
def test_contract_holds(name):
    """Each is an environment like any other: its oracle is paid, lazy and malformed answers are not."""
    check_environment(ENVIRONMENTS[name])


def names_of(spec):
    """Return the names of the tools of a world, and those of their arguments."""
    tools = list(spec.rules)
    arguments = {name for rule in spec.rules.values() for name in rule.parameters["properties"]}
    return [*tools, *arguments]


@given(seeds)
def test_a_drawn_world_has_names_of_its_own(seed):
    """None of a fixed world, and no letter twice, in names, in what users say, or in states: what stands before a letter is unique."""
    spec = drawn(seed).specification
    names = names_of(spec)
    assert not KNOWN & set(names)
    assert all(len(name) == 2 and name.isupper() for name in names)
    assert len(set("".join(names))) == 2 * len(names)
    said = [rule.done for rule in spec.rules.values() if rule.done]
    small = [spec.noun, *said, *spec.fields["s"], *"".join(map("".join, spec.arguments.values()))]
    assert len(set(small)) == len(small) and all(letter.islower() for letter in small)


def test_fixed_worlds_share_no_name():
    """A tool that is tested is none of those that are reinforced."""
    for one, other in itertools.combinations(FIXED, 2):
        assert not set(names_of(one)) & set(names_of(other))


@given(st.sampled_from(PLAYED), seeds, st.sampled_from((1, 2, 3)))
def test_a_call_can_be_read_from_the_list(env, seed, difficulty):
    """Each thought before a call ends with a line of the list, which names the tool and all of its arguments, in order."""
    task = env.task(0, seed, difficulties=(difficulty,))
    lines = task.messages[0]["content"].split(" ")
    assert lines == [line(schema) for schema in task.tools]
    state = ""
    for said in env.demonstrate(task):
        for call in said.get("tool_calls", ()):
            written = f"{call['name']}{''.join(call['arguments'])}"
            (read,) = [one for one in lines if written in one]
            sign = "" if read.startswith("?") else f"{state}+"
            assert said["reasoning_content"].endswith(f"{read}{sign}")
            assert not sign or read[-1] == state, "the policy allows it in this state"
        if said["role"] == "tool":
            state = json.loads(said["content"])["s"]


@given(st.sampled_from(PLAYED), seeds)
def test_a_call_returns_the_record_as_it_left_it(env, seed):
    """The last result of every conversation is the record of the goal, wherever something was done."""
    task = env.task(0, seed)
    results = [m["content"] for m in env.demonstrate(task) if m["role"] == "tool"]
    inner = WORLDS.within(task.label) if env is WORLDS else env
    goal, _ = inner.solved(task.label)
    shown = json.loads(results[-1])
    assert shown == goal[task.label["number"]]


class IncuriousListedWorld(Incurious, ListedWorld):
    """The right words are enough where nothing had to change."""


def test_the_contract_refuses_a_world_that_pays_for_guesses():
    """The right words without a look-up are found by the contract."""
    with pytest.raises(AssertionError, match="earns"):
        check_lazy_answers(IncuriousListedWorld(AIRLINE))


@given(seeds)
def test_a_user_in_capitals_understands_the_question(seed):
    """Whoever is asked for an argument by its name says its value, and is not asked again."""
    env = ENVIRONMENTS["airline:short"]
    task = env.task(0, seed, difficulties=(2,))
    said = [m["content"] for m in env.demonstrate(task)]
    asked = [text for text in said if text.startswith("Which")]
    assert len(set(asked)) == len(asked) == 1 + len(task.label["values"])


@given(seeds, st.data())
def test_a_letter_changed_in_the_list_changes_the_call(seed, data):
    """The name of the tool is nowhere but in the list: with other names the calls of the first world are malformed."""
    spec = drawn(seed).specification
    env = ListedWorld(spec)
    task = env.task(0, 0)
    turns = [m for m in env.demonstrate(task) if m["role"] == "assistant"]
    assert play(env, task, turns).score.value == 1
    other = ListedWorld(drawn(data.draw(seeds.filter(lambda s: s != seed))).specification)
    if not set(spec.rules) & set(other.specification.rules):
        played = play(other, other.task(0, 0), turns)
        assert played.score.value == 0


def test_short_worlds_are_worlds():
    """A drawn world differs from seed to seed, and is the same for the same seed."""
    texts = {str(drawn(seed).specification.tools) for seed in range(50)}
    assert len(texts) == 50
    assert isinstance(drawn(3), ShortWorld) and drawn(3).tools() == drawn(3).tools()
