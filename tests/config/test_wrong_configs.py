"""Every field of a config refuses what is no value of it, and every file that is no config is one line.

The tables of wrong values are made from the fields. In each section the first field of a type and bounds gets every
fault that they can have; each other field gets one of them, in turn.
"""

import dataclasses
import json
from enum import StrEnum
from pathlib import Path
from typing import get_type_hints

import pytest
from hypothesis import given
from hypothesis import strategies as st

from minglm.common.mistakes import one_line, shown
from minglm.config import load_config
from minglm.config.options import about
from minglm.config.overrides import override
from minglm.config.run import from_dict, to_dict

ROOT = Path(__file__).parent.parent.parent
NANO = load_config(ROOT / "configs" / "nano.py")

DIGITS = "9" * 400
MANY_DIGITS = "9" * 5000  # more than Python converts


def fields(config, prefix=""):
    """Yield (dotted name, dataclass field, type) of every value of a config, elements of a mixture included."""
    types = get_type_hints(type(config))
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        name = prefix + field.name
        if dataclasses.is_dataclass(value):
            yield from fields(value, f"{name}.")
        elif isinstance(value, dict):
            for key in value:
                yield f"{name}.{key}", field, float
        else:
            yield name, field, types[field.name]


def wrong_words(field, kind):
    """Return words that are no value of a field, by what is wrong with them."""
    if kind is bool:
        return {"a number": "2", "empty": "", "a word": "maybe"}
    if kind is int or kind is float:
        words = {
            "a word": "many",
            "empty": "",
            "negative": "-1",
            "not finite": "inf",
            "not a number": "nan",
            "too large": "1" + "0" * 23,
            "400 digits": DIGITS,
            "5,000 digits": MANY_DIGITS,
        }
        if kind is int:
            words["a fraction"] = "1.5"
        if about(field).positive:
            words["zero"] = "0"
        return words
    if isinstance(kind, type) and issubclass(kind, StrEnum):
        return {"no such name": "sideways", "unprintable": "a\x00b"}
    return {"a line break": "a\nb", "a null character": "a\x00b", "half a character": "\ud800"}


def spread(faults_of):
    """Yield (field's name, fault): all faults of the first field of a type and bounds in a section, one of any other.

    faults_of(field, type): the faults, as a list.
    """
    seen = set()
    for number, (name, field, kind) in enumerate(fields(NANO)):
        faults = faults_of(field, kind)
        section = name.partition(".")[0]
        first = (section, kind, about(field)) not in seen
        seen.add((section, kind, about(field)))
        if not first:
            faults = [faults[number % len(faults)]]
        for fault in faults:
            yield name, fault


WRONG = list(spread(lambda field, kind: list(wrong_words(field, kind).values())))


def refusal(call, *arguments):
    """Return the message of the ValueError with which a call ends; it must be one readable line."""
    with pytest.raises(ValueError) as error:
        call(*arguments)
    message = str(error.value)
    assert message.isprintable()
    assert len(message) < 600
    return message


def overridden(word):
    """Return nano, checked, with one override."""
    return override(NANO, [word]).check()


def read_back(values):
    """Return the config, checked, that these plain values describe."""
    return from_dict(values).check()


def test_the_table_is_large():
    """The table has every field, and hundreds of wrong words."""
    assert len(WRONG) > 300
    assert {name for name, _ in WRONG} == {name for name, *_ in fields(NANO)}


@pytest.mark.parametrize("section", sorted({name.partition(".")[0] for name, _ in WRONG}))
def test_a_wrong_word_of_any_field_is_one_line_with_its_name(section):
    """The line names the field, and the part of the value that fits."""
    for name, word in WRONG:
        if name.partition(".")[0] == section:
            message = refusal(overridden, f"--{name}={word}")
            assert name in message


def wrong_values(_, kind):
    """Return values, of a config file or of JSON, that are not of a type."""
    values = [None, [], {"a": "b"}, object]
    if kind not in (int, float):
        values.append(3)
    if kind is int:
        values += [2.5, True, float("nan"), "3"]
    if kind is float:
        values += [True, "3"]
    if kind is bool:
        values += [0, "True"]
    if kind == tuple[str, ...]:
        values.remove([])
    return values


def changed(values, name, value):
    """Return the plain values of a config with one of them replaced."""
    first, _, rest = name.partition(".")
    if not rest:
        return {**values, first: value}
    if ":" in first or rest in values[first]:
        return {**values, first: {**values[first], rest: value}}
    return {**values, first: changed(values[first], rest, value)}


@pytest.mark.parametrize("section", sorted({name.partition(".")[0] for name, *_ in fields(NANO)}))
def test_a_value_of_another_type_is_one_line_with_its_name(section):
    """The line names the field; the value may come from Python or from JSON."""
    plain = to_dict(NANO)
    for name, value in spread(wrong_values):
        if name.partition(".")[0] == section:
            message = refusal(read_back, changed(plain, name, value))
            # A mixture with a wrong weight is named as a whole.
            assert name in message or name.partition(".mixture")[0] in message


SECTIONS = [
    field.name
    for field in dataclasses.fields(NANO)
    if dataclasses.is_dataclass(getattr(NANO, field.name))
]


@pytest.mark.parametrize("value", [None, 3, "nano", [], {"name": "x"}, {"fields": 1}])
@pytest.mark.parametrize("name", ["", *SECTIONS])
def test_a_section_of_another_type_is_one_line(name, value):
    """A whole section, or the whole config, may be wrong."""
    broken = {**to_dict(NANO), name: value} if name else value
    refusal(from_dict, broken)


def test_a_stored_config_is_read_back():
    """The checks refuse nothing that was written."""
    for path in sorted((ROOT / "configs").glob("*.py")):
        run = load_config(path)
        assert from_dict(json.loads(json.dumps(to_dict(run)))).check() == run


FILES = {
    "raises": ("def mine():\n    raise RuntimeError('no luck')\n", "line 2: RuntimeError: no luck"),
    "raises without a word": ("def mine():\n    raise KeyError\n", "line 2: KeyError"),
    "raises in many lines": ("def mine():\n    raise ValueError('a\\nb')\n", "ValueError: a\\nb"),
    "raises at the top": ("x = 1\n1 / 0\n", "line 2: ZeroDivisionError"),
    "exits": ("import sys\nsys.exit(0)\n", "line 2: SystemExit"),
    "a syntax error": ("def mine(:\n", "line 1: SyntaxError"),
    "bad indentation": ("def mine():\nreturn 1\n", "line 2: IndentationError"),
    "null bytes": ("x = 1\x00\n", "SyntaxError"),
    "a missing import": ("import nothing_of_this_name\n", "line 1: ModuleNotFoundError"),
    "a wrong import": ("from minglm.config import Nothing\n", "line 1: ImportError"),
    "recursion": ("def mine():\n    return mine()\n", "line 2: RecursionError"),
    "no function": ("x = 1\n", "has no function mine()"),
    "a value in place of a function": ("mine = 3\n", "has no function mine()"),
    "returns nothing": ("def mine():\n    pass\n", "mine() returns None; it must return"),
    "returns a dictionary": ("def mine():\n    return {}\n", "mine() returns {}; it must return"),
    "returns a class": (
        "from minglm.config import RunConfig as mine_\ndef mine():\n    return mine_\n",
        "it must return a minglm.config.RunConfig",
    ),
    "returns another config": (
        "from minglm.config import ModelConfig\ndef mine():\n    return ModelConfig()\n",
        "it must return a minglm.config.RunConfig",
    ),
    "a coroutine": ("async def mine():\n    pass\n", "it must return a minglm.config.RunConfig"),
    "a generator": ("def mine():\n    yield 1\n", "it must return a minglm.config.RunConfig"),
    "wants an argument": ("def mine(size):\n    pass\n", "TypeError: mine() missing 1 required"),
    "an unknown field": (
        "from minglm.config import *\ndef mine():\n    return RunConfig('x', ModelConfig(hiden=1))\n",
        "line 3: TypeError",
    ),
    "a missing field": (
        "from minglm.config import *\ndef mine():\n    return RunConfig('x')\n",
        "line 3: TypeError",
    ),
    "no section": (
        "from minglm.config import *\ndef mine():\n    return RunConfig('x', None)\n",
        "mine.py: model = None: must be a ModelConfig",
    ),
    "a field that cannot be copied": (
        "from minglm.config import *\ndef mine():\n"
        "    return RunConfig('x', ModelConfig(), seed=iter([]).__next__)\n",
        "seed = <method-wrapper",
    ),
    "an empty name": (
        "from minglm.config import *\ndef mine():\n    return RunConfig('', ModelConfig())\n",
        "name = ''",
    ),
    "a name with a folder": (
        "from minglm.config import *\ndef mine():\n    return RunConfig('../x', ModelConfig())\n",
        "name = '../x'",
    ),
}


@pytest.mark.parametrize("fault", FILES)
def test_a_file_that_is_no_config_is_one_line(fault, tmp_path, recwarn):
    """The line names the file and, where there is one, the line in it."""
    text, expected = FILES[fault]
    path = tmp_path / "mine.py"
    path.write_text(text, encoding="utf-8")
    message = refusal(load_config, path)
    assert expected in message
    assert str(path) in message or "name = " in message or fault.startswith("a field")
    assert not recwarn.list


@pytest.mark.parametrize("content", [b"\xff\xfe\x00", b"# coding: nothing\n", b"\x80abc\n"])
def test_a_file_that_is_no_text_is_one_line(content, tmp_path):
    """Bytes that are no Python."""
    path = tmp_path / "mine.py"
    path.write_bytes(content)
    assert str(path) in refusal(load_config, path)


@pytest.mark.parametrize("path", ["", ".", ":", ":mine", "nowhere.py", "x" * 5000, "a\x00b"])
def test_a_path_that_is_no_file_is_one_line(path):
    """The line says where configs are."""
    assert "no config file at" in refusal(load_config, path)


def test_an_interrupted_config_is_an_interrupt(tmp_path):
    """Ctrl-C while a config runs is no mistake of the config."""
    path = tmp_path / "mine.py"
    path.write_text("raise KeyboardInterrupt\n", encoding="utf-8")
    with pytest.raises(KeyboardInterrupt):
        load_config(path)


@given(st.text() | st.integers() | st.binary() | st.floats(), st.booleans())
def test_any_value_is_shown_in_a_short_printable_text(value, quoted):
    """Line breaks, control characters and half characters are escaped; long values are cut."""
    text = shown(value, quoted)
    assert text.isprintable()
    assert len(text) < 900


@given(st.text())
def test_any_message_is_one_line(text):
    """What is printable and short stays as it is, apart from the kind of its spaces."""
    line = one_line(text)
    assert line.isprintable()
    if text.isprintable() and len(text) <= 600:
        assert line.split() == text.split()


def test_a_number_of_any_length_is_shown():
    """Python refuses to print a number of 4,300 digits; its length says enough."""
    assert shown(10**400) == "a number of about 401 digits"
    assert shown(-(10**5000)) == "a number of about 5001 digits"
    assert shown(12) == "12"
