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
    """Broken: count any letter that is not Latin, in every language, code and calls included."""
    return detect(text, language) | {"language_mixing": not text.isascii()}


def counts_tags_only(text, language=None):
    """Broken: accept balanced tags in any order."""
    return detect(text, language) | {"format": text.count("<think>") != text.count("</think>")}


def whole_text_only(text, language=None):
    """Broken: find a loop only where it is the whole text."""
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
        assert 0 <= longest_run(text).share <= 1
        assert 0 <= distinctness(text)[0] <= 1
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
    assert longest_run(" ".join(order)).share < 0.2
    assert distinctness(" ".join(order)) == (1.0, 57)


def test_sentences_that_return_without_touching_are_found():
    """Two sentences in ever different order have no adjacent copies, and few distinct 4-grams."""
    import random

    pieces = random.Random(0).choices(
        ["we go to the left side now.", "then we go to the right side."], k=60
    )
    assert detect(" ".join(pieces))["repetition"]


@pytest.mark.parametrize(
    ("foreign", "own", "language", "mixes"),
    [
        (2, 198, "en", False),  # one in a hundred is allowed
        (2, 197, "en", True),
        (1, 1, "en", False),  # one is a quotation
        (2, 0, "en", True),
        (3, 7, "zh", False),  # three in ten are allowed
        (4, 9, "zh", True),
        (1, 2, "zh", False),
        (2, 4, "zh", True),
    ],
)
def test_languages_mix_above_their_bounds(foreign, own, language, mixes):
    """More than 1% of the words in English, more than 30% in Chinese, and at least two."""
    latin, han = (own, foreign) if language == "en" else (foreign, own)
    text = " ".join([*(["ab"] * latin), *("词" * han)])
    assert count_words(text, language) == (foreign, own)
    assert detect(text, language)["language_mixing"] == mixes


def test_a_single_letter_of_another_script_is_a_symbol():
    """A lone pi or a choice B is no word; a single Han, kana or Hangul character is one."""
    assert count_words("π β x y", "en") == (0, 2)
    assert count_words("词 B x", "zh") == (0, 1)
    assert count_words("あ カ 한 词 πβ", "en") == (5, 0)


DIFFERENT = "".join(chr(0x4E00 + number) for number in range(300))
"""Characters of which none returns, so that no part of them is a loop."""


@pytest.mark.parametrize(
    ("run", "others", "loops"),
    [(40, 0, False), (41, 0, True), (60, 239, False), (60, 238, True), (50, 199, False)],
)
def test_a_loop_has_more_than_40_characters_and_more_than_a_fifth_of_the_text(run, others, loops):
    """The text ends in a space, which counts: 60 of 300 characters are exactly a fifth."""
    text = DIFFERENT[:others] + "w" * run
    assert longest_run(text) == (run, others + run + 1)
    assert detect(text)["repetition"] == loops


@pytest.mark.parametrize("size", [1, 2, 255, 256, 257])
def test_three_copies_of_up_to_256_characters_are_a_run(size):
    """Two copies are none, nor are three of which the last lacks a character."""
    piece = DIFFERENT[:size]
    assert longest_run(piece * 3).characters == (3 * size if size <= 256 else 0)
    assert longest_run(piece * 2).characters == 0
    assert longest_run((piece * 3)[:-1]).characters == 0
    assert longest_run(piece).share == 0


def unlike(words, fresh=0):
    """Two words in the order of Thue and Morse, which repeats no piece three times in a row; then words of their own."""
    order = [["left", "right"][number.bit_count() % 2] for number in range(words)]
    return " ".join([*order, *DIFFERENT[:fresh]])


@pytest.mark.parametrize(
    ("words", "fresh", "grams", "different", "monotonous"),
    [
        (66, 0, 63, 10, False),  # too few to judge
        (67, 0, 64, 10, True),
        (65, 3, 65, 13, False),  # exactly a fifth
        (66, 3, 66, 13, True),
    ],
)
def test_variety_is_judged_from_64_runs_of_four_words(words, fresh, grams, different, monotonous):
    """Fewer different ones than a fifth are a fault, although no piece is a loop."""
    text = unlike(words, fresh)
    assert longest_run(text).characters == 0
    assert distinctness(text) == (different / grams, grams)
    assert detect(text)["repetition"] == monotonous


def test_three_words_have_no_run_of_four():
    """Nothing to compare is full variety."""
    assert distinctness("one two three") == (1.0, 0)
    assert distinctness("one two three four") == (1.0, 1)
    assert distinctness("a b a b", n=2) == (2 / 3, 3)


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
