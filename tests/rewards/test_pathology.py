"""Detectors of language mixing, repetition and broken format: silent on clean turns, sure to find an inserted fault."""

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from minglm.chat.template import segments
from minglm.envs import ENVIRONMENTS
from minglm.rewards.pathology import (
    FAULTS,
    broken_format,
    count_words,
    detect,
    distinctness,
    incidence,
    longest_run,
)
from minglm.testing.rl import check_detectors


def test_contract_holds():
    """Clean turns in two languages, and each fault put into them."""
    check_detectors(detect)


def counts_letters(text, language=None):
    """Any letter that is not Latin counts, in every language, code and calls included."""
    return detect(text, language) | {"language_mixing": not text.isascii()}


def counts_tags_only(text, language=None):
    """Balanced tags in any order pass."""
    return detect(text, language) | {"format": text.count("<think>") != text.count("</think>")}


def whole_text_only(text, language=None):
    """Finds a loop only where it is the whole text."""
    return detect(text, language) | {"repetition": longest_run(text).share > 0.99}


@pytest.mark.parametrize("broken", [counts_letters, counts_tags_only, whole_text_only])
def test_contract_finds_the_broken_twin(broken):
    """Each shortcut is found."""
    with pytest.raises(AssertionError):
        check_detectors(broken)


CLEAN = [
    ("en", "42"),
    ("en", "Yes."),
    (
        "en",
        "2, 3, 5, 7, 11, 13, 17, 19, 23, 29, 31, 37, 41, 43, 47, 53, 59, 61, 67, 71, 73, 79, 83, 89, 97",
    ),
    ("en", "1. one\n2. two\n3. three\n4. four"),
    ("en", "| a | b |\n| --- | --- |\n| 1 | 2 |\n" + "-" * 100),
    (
        "en",
        "```python\nfor i in range(3):\n        print('你好', '世界')\n```\nIt prints a greeting.",
    ),
    ("en", "Area is $\\pi r^2$, so α = 3 and Δx ≈ 0.5 m²."),
    ("en", "\n<think>3+4=7, 7+5=2</think>\n<|begin_of_box|>2<|end_of_box|>"),
    ("en", "\n<think></think>\n<tool_call>now\n</tool_call>"),
    ("zh", "我们用 Python 和 PyTorch 训练模型，然后在 GPU 上评估。"),
    ("zh", "B"),
    ("zh", "Paris"),
]
BROKEN = [
    "",
    "<think>only thoughts</think>",
    "<think>never closed",
    "not opened</think>yes",
    "text first<think>then thoughts</think>more",
    "<think>a</think><think>b</think>c",
    "<tool_call>f",
    "<tool_call>f</tool_call> and more text",
    "<tool_call></tool_call>",
    "<tool_call>f\n<arg_key>a</arg_key>\n</tool_call>",
    "<tool_call>f\n<arg_key>a</arg_key> = <arg_value>1</arg_value>\n</tool_call>",
    "hello <|assistant|> hello",
    "fine<|user|>and on<|user|>",
    "<tool_response>made up</tool_response>",
]


@pytest.mark.parametrize("language, text", CLEAN)
def test_ordinary_answers_are_clean(language, text):
    """Numbers, tables, code, formulas, boxes, calls without arguments and Latin names raise nothing."""
    assert not any(detect(text, language).values())


@pytest.mark.parametrize("text", BROKEN)
def test_broken_templates_are_found(text):
    """Everything the template cannot have produced is broken."""
    assert broken_format(text)


@given(
    piece=st.text(min_size=1, max_size=30),
    copies=st.integers(3, 400),
    language=st.sampled_from(["en", "zh", None]),
)
def test_any_text_is_judged(piece, copies, language):
    """No text whatever makes a detector fail, and shares are shares."""
    for text in (piece, piece * copies):
        assert set(detect(text, language)) == set(FAULTS)
        assert 0 <= longest_run(text).share <= 1 and 0 <= distinctness(text)[0] <= 1
        assert min(count_words(text, "en")) >= 0


@given(
    words=st.lists(st.from_regex(r"[a-z]{1,9}", fullmatch=True), min_size=1, max_size=12),
    copies=st.integers(3, 30),
)
def test_a_loop_covers_its_text(words, copies):
    """A text that is nothing but a loop is all repetition, whatever the piece."""
    assert longest_run(" ".join(words * copies)).share > 0.99


@given(order=st.permutations([f"word{i}" for i in range(60)]))
def test_distinct_words_do_not_repeat(order):
    """Different words are no loop."""
    assert longest_run(" ".join(order)).share < 0.2 and distinctness(" ".join(order)) == (1.0, 57)


def test_sentences_that_return_without_touching_are_found():
    """Two sentences in ever different order have no adjacent copies, and few distinct 4-grams."""
    import random

    pieces = random.Random(0).choices(
        ["we go to the left side now.", "then we go to the right side."], k=60
    )
    assert detect(" ".join(pieces))["repetition"]


def test_message_with_an_error_is_broken():
    """A parsed message speaks for itself, and `detect` believes it over the text."""
    message = {
        "role": "assistant",
        "content": "fine",
        "reasoning_content": "",
        "tool_calls": [],
        "error": None,
    }
    assert not broken_format(message)
    assert broken_format(message | {"error": "unknown tool"})
    assert broken_format(message | {"content": " "})
    assert not broken_format(
        message | {"content": "", "tool_calls": [{"name": "f", "arguments": {}}]}
    )
    assert broken_format(message | {"content": "a <tool_call>"})
    assert detect("fine", "en", message | {"error": "unknown tool"})["format"]


@given(st.lists(st.fixed_dictionaries({fault: st.booleans() for fault in FAULTS}), max_size=20))
def test_incidence(flags_list):
    """The share of turns with any fault lies between the largest share of a fault and the sum of all."""
    shares = incidence(flags_list)
    parts = [shares[fault] for fault in FAULTS]
    assert max(parts) <= shares["any"] <= sum(parts) + 1e-9


def test_unknown_language_is_one_line():
    """Two languages are known."""
    with pytest.raises(ValueError, match="must be one of en, zh"):
        count_words("bonjour", "fr")


@given(
    name=st.sampled_from(sorted(ENVIRONMENTS)), index=st.integers(0, 10**6), thinking=st.booleans()
)
def test_demonstrations_in_the_template_are_clean(name, index, thinking):
    """What the oracles say, rendered by the template, raises no flag: the detectors and the template agree."""
    environment = ENVIRONMENTS[name]
    task = environment.task(index, seed=0)
    messages = environment.demonstrate(task, thinking=thinking)
    text = "".join(
        piece.text for piece in segments(messages, list(task.tools), thinking, close=True)
    )
    turns = [
        turn
        for turn in re.split(r"<\|(?:user|observation|system)\|>", text)
        if "<|assistant|>" in turn
    ]
    assert len(turns) == sum(message["role"] == "assistant" for message in messages)
    # instructions may ask in one language for words of the other
    language = None if name == "instructions" else task.expected_language or "en"
    for turn in turns:
        flags = detect(turn.split("<|assistant|>")[1], language)
        assert not any(flags.values()), (turn, flags)
