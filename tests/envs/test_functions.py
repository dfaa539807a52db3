"""Step-wise calls: only the annotated step pays, in every field and type, and the earlier steps follow the switch."""

import pytest
from helpers.scripted import ScriptedGenerator, byte_tokenizer, said
from hypothesis import assume, given
from hypothesis import strategies as st

from minglm.envs.base import assistant, prompt_of, verdict
from minglm.envs.functions import SETS, Functions
from minglm.rl.episode import Player, SamplingSettings
from minglm.rl.rollout import rollout
from minglm.testing.envs import check_lazy_answers, play
from minglm.testing.strategies import seeds

ENV = Functions()
steps = st.builds(
    lambda seed, difficulty: ENV.task(0, seed, difficulties=(difficulty,)),
    seeds,
    st.sampled_from(ENV.difficulties),
)


def value(task, *messages):
    """Return what these messages earn."""
    return play(ENV, task, messages).score.value


def changed(value):
    """Return values of other types that read alike, and other values of the same type."""
    if isinstance(value, int):
        return [str(value), float(value), value + 1, [value], value == 1]
    return [value.lower(), value + " ", value[:-1], [value], ""]


@given(steps, st.data())
def test_every_field_of_a_call_counts(task, data):
    """A call with one value changed, its type only included, one argument fewer or more, or another name, earns 0."""
    calls = task.label["step"].get("tool_calls", [])
    assume(calls)
    (call,) = calls
    name, arguments = call["name"], call["arguments"]
    key = data.draw(st.sampled_from(sorted(arguments)))
    wrong = [(name, arguments | {key: other}) for other in changed(arguments[key])]
    wrong += [(name, {k: v for k, v in arguments.items() if k != key})]
    wrong += [(name, arguments | {"more": 1})]
    wrong += [(other, arguments) for other in task.label["offered"] if other != name]
    assert value(task, task.label["step"]) == 1
    assert (
        value(task, assistant("Let me see.", None, [(name, dict(reversed(arguments.items())))]))
        == 1
    )
    for made in wrong:
        assert value(task, assistant("", None, [made])) == 0, made


@given(steps)
def test_a_reply_and_a_call_never_stand_for_each_other(task):
    """Where a reply is right no call pays, and where a call is right no reply does, whatever it says."""
    step = task.label["step"]
    if step.get("tool_calls"):
        assert value(task, assistant(step["content"])) == 0
        return
    world = SETS[task.label["set"]].specification
    look = (world.look_up.name, {world.key: 482})
    assert value(task, step) == 1
    assert value(task, assistant(step["content"], None, [look])) == 0


@pytest.mark.parametrize(
    ("reply", "right"),
    [
        ("Which book?", 1),
        ("I need to know: what is the number of your book?", 1),
        ("Which book, and until which day?", 0),
        ("Your book.", 0),
        ("Which account?", 0),
        ("Which?", 0),
        ("Which book? It is lent.", 0),
    ],
)
def test_a_question_asks_for_what_is_missing(reply, right):
    """In words of its own, for nothing else, and claiming nothing."""
    tasks = ENV.tasks(60, 0, difficulties=(1,))
    task = next(task for task in tasks if task.label["step"]["content"] == "Which book?")
    assert value(task, assistant(reply)) == right


@pytest.mark.parametrize(
    ("change", "right"),
    [
        (lambda text: text, 1),
        (lambda text: "It is done: " + text.lower(), 1),
        (lambda text: text.replace(" is ", " is not "), 0),
        (lambda text: text.replace(".", "?"), 0),
        (lambda text: text + " Account 999 too.", 0),
        (lambda text: "Done.", 0),
    ],
)
def test_last_words_name_the_outcomes(change, right):
    """All of them, and no other."""
    for task in ENV.tasks(60, 1, difficulties=(2,)):
        if task.label["outcomes"] and " not " not in task.label["step"]["content"]:
            assert value(task, assistant(change(task.label["step"]["content"]))) == right


@given(seeds)
def test_the_tools_on_offer(seed):
    """The right call is on offer, with the set's others; the third difficulty adds those of one other set."""
    for difficulty, sets in ((1, 1), (2, 1), (3, 2)):
        task = ENV.task(0, seed, difficulties=(difficulty,))
        names = {tool["name"] for tool in task.tools}
        offering = [s for s in SETS.values() if {t["name"] for t in s.tools()} <= names]
        assert len(offering) == sets and SETS[task.label["set"]] in offering
        assert len(names) == len(task.tools) == sum(len(s.tools()) for s in offering)
        assert {c["name"] for c in task.label["step"].get("tool_calls", [])} <= names


class Loose(Functions):
    """The name of the function is enough."""

    def judge(self, task, message):
        right = task.label["step"].get("tool_calls", [])
        calls = message.get("tool_calls") or []
        return verdict([c["name"] for c in calls[:1]] == [c["name"] for c in right])


def test_the_contract_refuses_a_loose_judge():
    """A near miss of the right call is among the lazy answers."""
    with pytest.raises(AssertionError, match="earns"):
        check_lazy_answers(Loose())


@pytest.mark.parametrize("thinking", [True, False])
def test_earlier_steps_follow_the_thinking_switch(thinking):
    """A rollout shows the reasoning of earlier steps with thinking on, and none of it with thinking off."""
    tasks = [t for t in ENV.tasks(40, 0, difficulties=(2,)) if t.messages[-1]["role"] == "tool"]
    task = tasks[0]
    assert any(m.get("reasoning_content") for m in task.messages)
    shown = [m.get("reasoning_content") for m in prompt_of(task, thinking)]
    assert any(shown) == thinking
    tokenizer = byte_tokenizer()
    generator = ScriptedGenerator(
        tokenizer, lambda prompt: said(tokenizer, ENV.demonstrate(task, thinking)[-1], thinking)
    )
    player = Player(generator, tokenizer, SamplingSettings(200))
    ((played,),) = rollout(player, {ENV.name: ENV}, [task], 1, [thinking])
    assert played.score.value == 1
    prompt = tokenizer.decode(generator.asked[0].prompt)
    thought = next(m["reasoning_content"] for m in task.messages if m.get("reasoning_content"))
    assert (f"<think>{thought}</think>" in prompt) == thinking
