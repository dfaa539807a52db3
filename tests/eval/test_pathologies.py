"""Pathologies are counted by two sets of detectors and by content: clean answers pass all, each kind of bad one fails its own."""

import dataclasses

import pytest

from minglm.envs.base import ScoreStatus, assistant
from minglm.envs.constraints.environment import Constraints
from minglm.envs.pathology import PathologyPrompts
from minglm.eval.pathologies import Auditor, content, judged, measure
from minglm.rl.episode import Trajectory

PROMPTS, REQUESTS = PathologyPrompts(), Constraints()
KINDS = {each.name: each for each in (PROMPTS, REQUESTS)}


@pytest.fixture(scope="module")
def auditor():
    """Return an auditor of sentences and of lists."""
    return Auditor(KINDS.values(), 0)


def answered(task, text):
    """Return the episode in which a model said this."""
    score = KINDS[task.environment].judge(task, assistant(text))
    raw = f"{text}<|user|>"
    return Trajectory(task, False, [*task.messages, assistant(text)], texts=[raw], score=score)


def oracle(task):
    """Return the oracle's answer."""
    return KINDS[task.environment].demonstrate(task)[-1]["content"]


def tasks(name, count, seed=5):
    """Return tasks that no auditor has seen."""
    return KINDS[name].tasks(count, seed)


@pytest.mark.parametrize("name", KINDS)
def test_the_oracle_is_right_and_hardly_flagged(auditor, name):
    """No fault, all of the content, and at most 5% flags: one text in a hundred is strange by definition."""
    found = measure([answered(task, oracle(task)) for task in tasks(name, 200)], auditor)
    assert (
        found["incidence"]["any"] == 0 and found["content"] == 1 and found["audit"]["any"] <= 0.05
    )


@pytest.mark.parametrize("name", KINDS)
def test_each_bad_answer_fails_its_own_detector(auditor, name):
    """Five times the same is squeezed, other characters are strange, half a sentence and words of another language unfinished."""
    for task in tasks(name, 20):
        clean = oracle(task)
        foreign = {"en": " 铁是", "zh": " iron is"}[task.expected_language]
        assert judged(answered(task, "; ".join([clean] * 9)), auditor)["squeezed"]
        assert judged(answered(task, "Ж".join(clean + "....")), auditor)["strange"]
        assert judged(answered(task, clean + foreign), auditor)["unfinished"]
        assert judged(answered(task, clean + "</think>"), auditor)["unfinished"]
        assert judged(answered(task, clean + "</think>"), auditor)["format"] or name != PROMPTS.name


def test_saying_little_loses_content():
    """A clean sentence about something else has no fact; one number has not all constraints, but may have some."""
    for task in tasks(PROMPTS.name, 20):
        said = {"en": "Nothing is a thing.", "zh": "没有什么好说。"}[task.label]
        assert content(answered(task, said)) == 0
    shares = [content(answered(task, "one")) for task in tasks(REQUESTS.name, 50)]
    assert all(0 <= share < 1 for share in shares) and any(shares)


def test_answers_are_counted_by_prompt_and_by_kind(auditor):
    """Means over answers, over those to a prompt, and over those of a kind; samples whose environment failed are left out."""
    first, second = tasks(PROMPTS.name, 2)
    (third,) = tasks(REQUESTS.name, 1)
    loop = "so we go on " * 30
    played = [
        answered(first, oracle(first)),
        answered(first, loop),
        answered(second, loop),
        answered(second, loop),
        answered(third, oracle(third)),
    ]
    failed = dataclasses.replace(played[0].score, status=ScoreStatus.INFRASTRUCTURE)
    played.append(dataclasses.replace(played[0], score=failed))
    found = measure(played, auditor)
    assert found["n"] == 5
    assert found["incidence"]["repetition"] == found["incidence"]["any"] == 0.6
    assert 0 <= found["low"] < 0.5 < found["high"] <= 1
    assert found["by_prompt"]["fault"] == [0.5, 1, 0]
    assert found["by_prompt"]["content"] == [0.5, 0, 1]
    assert found["by_kind"] == {
        PROMPTS.name: {"fault": 0.75, "flag": 0.75, "content": 0.25},
        REQUESTS.name: {"fault": 0, "flag": 0, "content": 1},
    }
