"""The audit of answers: silent on clean texts, sure of what RL's own detectors may have taught a model to avoid."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from minglm.envs.pathology import PathologyPrompts
from minglm.rewards.audit import FLAGS, CharacterModel, audit, compression_ratio

ENVIRONMENT = PathologyPrompts()


def replies(count, seed):
    """Return clean replies to prompts that provoke faults."""
    tasks = ENVIRONMENT.tasks(count, seed)
    return [ENVIRONMENT.oracle(task, (), None)["content"] for task in tasks]


@pytest.fixture(scope="module")
def model():
    """Return a model of the characters of clean replies."""
    return CharacterModel(replies(400, 0), replies(200, 1))


def test_clean_replies_pass(model):
    """At most 5% of others have a flag: one in a hundred is strange by definition, and 300 are a sample."""
    flagged = [any(audit(text, model).values()) for text in replies(300, 2)]
    assert sum(flagged) <= 15


@given(text=st.sampled_from(replies(100, 3)))
def test_every_flag_has_its_fault(model, text):
    """A text said five times is squeezed, one with other characters strange, one that breaks off unfinished."""
    assert set(audit(text, model)) == set(FLAGS)
    assert audit(" ".join([text] * 5), model)["squeezed"]
    assert audit("Ж".join(text), model)["strange"]
    assert audit(text[:-1], model)["unfinished"]
    assert audit(text + "<think>", model)["unfinished"]


@given(text=st.text(min_size=1))
def test_any_text_is_judged(model, text):
    """No text, of whatever characters, raises; and more of the same is never harder to compress."""
    audit(text, model)
    assert compression_ratio(text * 100) <= compression_ratio(text) + 1e-9


def test_a_model_without_calibration_finds_nothing_strange():
    """Its bound is infinite."""
    assert not audit("anything?!", CharacterModel(["a."], []))["strange"]
