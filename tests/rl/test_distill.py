"""Rejection sampling: filters that commute and re-check, and a length rule that drops exactly its share."""

import itertools
from statistics import fmean
from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from minglm.chat.parser import Tag
from minglm.envs.base import Score, Task
from minglm.rl.distill import (
    Sample,
    accept,
    correct,
    drop_shortest,
    hard_prompts,
    obeys_protocol,
    reject,
    rewarded,
    well_formed,
)
from minglm.rl.episode import Segment, Trajectory

CALL = {"role": "assistant", "content": "", "tool_calls": [{"name": "f", "arguments": {}}]}
RESULT = {"role": "tool", "content": "1"}
TWO_CALLS = {**CALL, "tool_calls": CALL["tool_calls"] * 2}
REPLY = {"role": "assistant", "content": "done"}
USER = {"role": "user", "content": "go"}

texts = st.sampled_from(
    ["fine", "", "<think>open", "again and " * 30, "\n<think>yes</think>\nGood answer."]
)
conversations = st.sampled_from(
    [(), (USER, REPLY), (USER, CALL, RESULT, REPLY), (USER, CALL, REPLY), (USER, RESULT)]
)
samples = st.lists(
    st.builds(
        Sample,
        prompt=st.sampled_from("abcdefg"),
        text=texts,
        messages=conversations,
        score=st.none() | st.floats(0, 1),
        status=st.sampled_from(["ok", "wrong", "format", "infrastructure"]),
        truncated=st.booleans(),
        n_tokens=st.integers(0, 50),
    ),
    max_size=25,
)
FILTERS = {
    "form": well_formed(min_tokens=5, language="en"),
    "correct": correct(0.5),
    "reward": rewarded(lambda sample: sample.n_tokens / 50, 0.3),
    "protocol": obeys_protocol(),
}


@given(samples)
def test_filters_commute_and_recheck(drawn):
    """Any order of the filters, and any split into passes, keeps the same samples, which pass every filter again."""
    kept, report = reject(drawn, FILTERS)
    assert all(keep(sample) for sample in kept for keep in FILTERS.values())
    for order in itertools.permutations(FILTERS):
        rest = drawn
        for name in order:
            rest, _ = reject(rest, {name: FILTERS[name]})
        assert rest == kept
    assert reject(kept, FILTERS)[0] == kept
    assert report.samples == len(drawn) and report.kept == len(kept)
    assert report.rejected == {
        name: sum(not keep(s) for s in drawn) for name, keep in FILTERS.items()
    }


def test_commutation_test_would_find_a_filter_with_memory():
    """A filter that looks at its neighbours (first answer of each prompt) does not pass the test above."""
    drawn = [Sample("a", "no", n_tokens=1), Sample("a", "yes", n_tokens=9)]

    def first_only():
        seen = set()
        return lambda sample: not (sample.prompt in seen or seen.add(sample.prompt))

    long = well_formed(min_tokens=5)
    one_way = reject(reject(drawn, {"first": first_only()})[0], {"long": long})[0]
    other_way = reject(reject(drawn, {"long": long})[0], {"first": first_only()})[0]
    assert one_way != other_way


@pytest.mark.parametrize(
    "change, failed",
    [
        ({}, []),
        ({"truncated": True}, ["form"]),
        ({"n_tokens": 1}, ["form"]),
        ({"text": "again and " * 30}, ["form"]),
        ({"text": "<think>no end"}, ["form"]),
        ({"text": "这是 a 中文 answer"}, ["form"]),
        ({"score": 0.2}, ["correct"]),
        ({"score": None, "n_tokens": 9}, ["reward"]),
        ({"messages": (USER, CALL, REPLY)}, ["protocol"]),
        ({"messages": (USER, RESULT, REPLY)}, ["protocol"]),
        ({"messages": (USER, RESULT)}, ["protocol"]),
        ({"messages": (USER, CALL, RESULT, CALL)}, []),
        ({"messages": (USER, CALL, RESULT, REPLY), "status": "wrong"}, ["protocol"]),
        ({"status": "format"}, ["protocol"]),
        ({"n_tokens": 5}, []),  # at each bound
        ({"n_tokens": 4}, ["form"]),
        ({"score": 0.5}, []),
        ({"score": None, "n_tokens": 15}, []),
        ({"score": None, "n_tokens": 14}, ["reward"]),
        ({"messages": (USER, REPLY), "status": "wrong"}, []),  # no tools, no end to reach
        ({"messages": (USER, TWO_CALLS, RESULT, RESULT, REPLY)}, []),
        ({"messages": (USER, TWO_CALLS, RESULT, REPLY)}, ["protocol"]),
        ({"messages": (USER, CALL, RESULT, RESULT, REPLY)}, ["protocol"]),
        ({"messages": (USER, CALL, RESULT, CALL, RESULT, REPLY)}, []),
    ],
)
def test_each_fault_meets_its_filter(change, failed):
    """One fault, one filter; an act that ends the episode needs no answer."""
    sample = Sample(
        **({"prompt": "a", "text": "A fine answer.", "score": 1.0, "n_tokens": 20} | change)
    )
    assert [name for name, keep in FILTERS.items() if not keep(sample)] == failed


@given(samples, st.integers(0, 100))
def test_length_rule_drops_exactly_its_share(drawn, percent):
    """floor(share * prompts) prompts go, with all samples; none that goes is longer than one that stays."""
    kept = drop_shortest(drawn, percent / 100)
    prompts, staying = {s.prompt for s in drawn}, {s.prompt for s in kept}
    assert len(prompts) - len(staying) == percent * len(prompts) // 100
    assert kept == [s for s in drawn if s.prompt in staying]
    length = {p: fmean(s.n_tokens for s in drawn if s.prompt == p) for p in prompts}
    assert max((length[p] for p in prompts - staying), default=0) <= min(
        (length[p] for p in staying), default=50
    )


def test_the_defaults():
    """An answer of one token, entirely right, is kept; half of the prompts go, and of equally long ones the later."""
    assert well_formed()(Sample("a", "yes", n_tokens=1))
    assert not well_formed()(Sample("a", "yes", n_tokens=0))
    assert not well_formed()(Sample("a", "yes"))  # nobody has counted its tokens
    assert correct()(Sample("a", "yes", score=1.0))
    assert not correct()(Sample("a", "yes", score=0.99))
    some = [Sample(name, "yes", n_tokens=7) for name in "abcd"]
    assert drop_shortest(some) == some[:2]
    assert drop_shortest(some, 0.0) == some
    assert drop_shortest(some, 1.0) == []


def played(environment, prompt, text="yes", score=1.0, status="ok", tokens=3, messages=()):
    """Return a scored trajectory of a prompt."""
    task = Task(prompt, environment, (), (), None, 1)
    segment = Segment([0] * tokens, [True] * tokens, [0.0] * tokens)
    return Trajectory(task, True, list(messages), [segment], [text], Score(score, status))


def environments(**objective):
    """Return environments of these names, with or without right answers."""
    return {name: SimpleNamespace(objective=value) for name, value in objective.items()}


def test_an_answer_that_speaks_of_a_tag_is_well_formed():
    """Letters that spell a tag are text in rejection sampling as they are in rewards; the tag itself is a fault."""
    said = "Use the <tool_call> tag."
    for pieces, kept in (([said], 1), (["Use the ", Tag("<tool_call>"), " tag."], 0)):
        drawn = played("sums", "a", text=said)
        drawn.last_pieces = pieces
        assert any(drawn.faults().values()) == (not kept)
        assert accept([drawn], environments(sums=True)).counts["kept"] == kept


def test_every_answer_meets_the_four_filters():
    """The counts name each filter; an environment without right answers is judged, and not asked for the right one."""
    drawn = [
        played("sums", "a"),
        played("sums", "a"),  # the same answer again
        played("sums", "b", score=0.5, status="wrong"),
        played("sums", "c", text="again and " * 30),
        played("sums", "d", status="format"),
        played("taste", "e", score=0.6, status="wrong"),
        played("taste", "f", score=0.4, status="wrong"),
    ]
    accepted = accept(drawn, environments(sums=True, taste=False))
    assert [task.id for task, _ in accepted.conversations] == ["a", "e"]
    assert accepted.counts == {
        "answers": 7,
        "form": 1,
        "correct": 1,
        "reward": 1,
        "protocol": 1,
        "kept": 3,
        "kept, different": 2,
    }


def test_conversations_that_end_alike_are_different_answers():
    """All that the model said is compared, not its last words alone."""
    drawn = [played("sums", "a") for _ in range(3)]
    for trajectory, first in zip(drawn, ("search x", "search y", "search x"), strict=True):
        trajectory.texts.insert(0, first)
    counts = accept(drawn, environments(sums=True)).counts
    assert (counts["kept"], counts["kept, different"]) == (3, 2)


@given(
    lengths=st.lists(st.lists(st.integers(1, 30), min_size=1, max_size=8), min_size=1, max_size=3),
    percent=st.integers(0, 90),
)
def test_hard_prompts_are_chosen_within_each_environment(lengths, percent):
    """Of each environment its share goes, however short its conversations are beside those of another."""
    drawn = []
    for number, tokens in enumerate(lengths):
        for i, count in enumerate(tokens):
            drawn.append(played(f"env{number}", f"{number}/{i}", tokens=100 * number + count))
    failed = played("env0", "failed", status="infrastructure")
    hard = hard_prompts([*drawn, failed], percent / 100)
    assert "failed" not in hard
    for number, tokens in enumerate(lengths):
        kept = [count for i, count in enumerate(tokens) if f"{number}/{i}" in hard]
        assert len(kept) == len(tokens) - percent * len(tokens) // 100
        assert sorted(tokens)[-len(kept) :] == sorted(kept)


def test_share_outside_the_unit_interval_is_one_line():
    """A share is between 0 and 1."""
    with pytest.raises(ValueError, match="between 0 and 1"):
        drop_shortest([], 50)
