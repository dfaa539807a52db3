"""The parser: any split, any text, typed arguments, and a name for everything that is malformed."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from minglm.chat import Parser, parse, render
from minglm.chat.parser import FormatError
from minglm.data.tokenizer import Tokenizer
from minglm.testing.chat import TOOLS, WRONG, assistant_messages, check_parser


@pytest.fixture(scope="module")
def tokenizer():
    """Return a trained tokenizer, to parse what the template renders as a model would sample it."""
    return Tokenizer.train(
        ["the tool says <tool_call>act\n<arg_key>text</arg_key>\n"], vocab_size=320
    )


def test_contract():
    """The parser holds its contract."""
    check_parser(parse, Parser)


def leave_values_as_text(text, tools=None):
    """Broken: give every argument back as a string."""
    message = parse(text, tools)
    for call in message["tool_calls"]:
        for key, value in call["arguments"].items():
            call["arguments"][key] = value if isinstance(value, str) else json.dumps(value)
    return message


def close_what_is_open(text, tools=None):
    """Broken: repair an unfinished call."""
    message = parse(text, tools)
    return (
        parse(text + "</arg_value></tool_call>", tools)
        if message["error"] == "unclosed_tool_call"
        else message
    )


def raise_on_nonsense(text, tools=None):
    """Broken: raise an exception where the text is malformed."""
    message = parse(text, tools)
    if message["error"] == "bad_tool_call":
        raise KeyError("name")
    return message


def end_values_at_the_first_tag(text, tools=None):
    """Broken: end a call at the first closing tag, also inside a value."""
    head, end, _ = text.partition("</tool_call>")
    return parse(head + end, tools)


@pytest.mark.parametrize(
    "twin",
    [leave_values_as_text, close_what_is_open, raise_on_nonsense, end_values_at_the_first_tag],
)
def test_contract_rejects_broken_twins(twin):
    """The contract sees each of the usual mistakes."""
    with pytest.raises(AssertionError):
        check_parser(twin)


class NoMemory(Parser):
    """A stream that looks for tags in each piece alone, and so misses one that is cut in two."""

    def feed(self, text):
        """Pass on what would have been held back."""
        deltas = super().feed(text)
        self._pieces.append(self._held)
        self._held = ""
        return deltas + super().feed("")


class Silent(Parser):
    """A stream that gives the right message and forgets the last deltas."""

    def flush(self):
        """End the text, and return nothing."""
        super().flush()
        return []


@pytest.mark.parametrize("twin", [NoMemory, Silent])
def test_contract_rejects_broken_streams(twin):
    """The contract sees a stream that depends on the split, and one that swallows its end."""
    with pytest.raises(AssertionError):
        check_parser(parse, twin)


@given(st.booleans().flatmap(lambda calls: assistant_messages(calls=calls)), st.booleans())
def test_reads_back_what_the_template_renders(tokenizer, message, thinking):
    """What follows the generation prompt in a rendered turn parses to the same message."""
    if not thinking:
        message = {**message, "reasoning_content": ""}
    question = [{"role": "user", "content": "hi"}]
    prompt = render(tokenizer, question, TOOLS, thinking, generation_prompt=True)
    whole = render(tokenizer, [*question, message], TOOLS, thinking)
    sampled = tokenizer.decode(whole.ids[len(prompt.ids) :])
    assert parse(sampled, TOOLS) == {**message, "error": None}


@given(assistant_messages(calls=True), st.integers(0, 200))
def test_a_prompt_that_opened_the_reasoning(message, cut):
    """Text after `<think>` in the prompt reads as if the model had written the tag itself, whole or cut off."""
    text = f"{message['reasoning_content']}</think>{message['content']}<tool_call>act</tool_call>"[
        :cut
    ]
    assert parse(text, TOOLS, opened=True) == parse("<think>" + text, TOOLS)


def test_every_error_has_a_meaning_and_an_example():
    """The named errors are exactly those that the examples of the contract show."""
    assert {error for _, error in WRONG} == set(FormatError)


def call(name, **values):
    """Return a tool call as a model writes it, from raw argument texts."""
    pairs = "".join(
        f"<arg_key>{key}</arg_key>\n<arg_value>{value}</arg_value>\n"
        for key, value in values.items()
    )
    return f"\n<tool_call>{name}\n{pairs}</tool_call>"


@pytest.mark.parametrize(
    "schema, text, value, error",
    [
        ({"type": "string"}, "12", "12", None),
        ({"type": "string"}, " two\nlines ", " two\nlines ", None),
        ({"type": "string"}, '{"a": 1}', '{"a": 1}', None),
        ({"type": "integer"}, "12", 12, None),
        ({"type": "integer"}, "12.0", 12, None),
        ({"type": "integer"}, "12.5", "12.5", "bad_argument"),
        # More digits than Python converts.
        ({"type": "integer"}, "9" * 5000, "9" * 5000, "bad_argument"),
        ({"type": "number"}, "1e3", 1000.0, None),
        ({"type": "number"}, "1e999", "1e999", "bad_argument"),
        ({"type": "number"}, "", "", "bad_argument"),
        ({"type": "boolean"}, "true", True, None),
        ({"type": "boolean"}, "True", "True", "bad_argument"),
        ({"type": "array"}, "[1, [2]]", [1, [2]], None),
        # Half a surrogate pair is no text.
        ({"type": "array"}, '["\\ud800"]', '["\\ud800"]', "bad_argument"),
        ({"type": "object"}, '{"a": {"b": null}}', {"a": {"b": None}}, None),
        ({"type": "object"}, "[1]", "[1]", "bad_argument"),
        ({"type": "null"}, "null", None, None),
        ({"type": ["string", "null"]}, "null", None, None),
        ({"type": ["string", "null"]}, "nil", "nil", None),
        ({"type": ["integer", "null"]}, "nil", "nil", "bad_argument"),
        ({"anyOf": [{"type": "integer"}, {"type": "string"}]}, "7", 7, None),
        ({"anyOf": [{"type": "integer"}, {"type": "string"}]}, "[7]", "[7]", None),
        ({"enum": ["1", "2"]}, "1", "1", None),
        ({}, "7", 7, None),
        ({}, "seven", "seven", None),
    ],
)
def test_arguments_take_the_type_of_the_schema(schema, text, value, error):
    """Strings stay as they are written; anything else is JSON of its type, or a named error with the text kept."""
    tools = [
        {"type": "function", "function": {"name": "f", "parameters": {"properties": {"x": schema}}}}
    ]
    message = parse(call("f", x=text), tools)
    assert message["error"] == error
    found = message["tool_calls"][0]["arguments"]["x"]
    assert found == value and type(found) is type(value)


def test_tags_inside_a_value_are_data():
    """Only a closing tag in the place of one ends a value."""
    code = 'if "</arg_value>" in text: # </tool_call> <|user|> <arg_value>\n    x = a <'
    message = parse(call("f", code=code, n="1") + "<|observation|>")
    assert message["tool_calls"] == [{"name": "f", "arguments": {"code": code, "n": 1}}]
    assert message["error"] is None


def test_white_space_between_tags_does_not_matter():
    """A call on one line reads as one on many, as the later dialect writes it."""
    text = "<think>a</think>b<tool_call>f<arg_key>x</arg_key><arg_value>1</arg_value></tool_call><tool_call>g</tool_call>"
    message = parse(text)
    assert (message["reasoning_content"], message["content"], message["error"]) == ("a", "b", None)
    assert message["tool_calls"] == [
        {"name": "f", "arguments": {"x": 1}},
        {"name": "g", "arguments": {}},
    ]


def test_stop_tokens_end_the_message():
    """A stop token is no part of the message, and nothing after it is."""
    for stop in ("<|user|>", "<|observation|>", "<|endoftext|>"):
        for tail in ("", "\nmore", call("f")):
            message = parse(f"\n<think></think>\nyes{stop}{tail}")
            assert (message["content"], message["tool_calls"], message["error"]) == (
                "yes",
                [],
                None,
            )
        parser = Parser()
        parser.feed("yes" + stop)
        assert parser.done
        assert parser.feed("more") == []
        assert parser.finish()["content"] == "yes"


def test_no_tools_and_unknown_tools_differ():
    """With an empty list of tools every call is wrong; without a list nothing is known, so nothing is."""
    assert parse(call("f"), [])["error"] == "unknown_tool"
    assert parse(call("f"))["error"] is None
    with pytest.raises(ValueError, match="needs a name"):
        parse("", [{"parameters": {}}])


def test_extra_and_repeated_arguments():
    """An argument outside the schema is an error unless the schema welcomes more; a repeated one always is."""
    tool = {"name": "f", "parameters": {"properties": {"x": {"type": "string"}}}}
    assert parse(call("f", y="1"), [tool])["error"] == "unknown_argument"
    tool["parameters"]["additionalProperties"] = True
    assert parse(call("f", y="1"), [tool])["error"] is None
    twice = "<arg_key>x</arg_key>\n<arg_value>1</arg_value>\n"
    assert parse(f"<tool_call>f\n{twice}{twice}</tool_call>", [tool])["error"] == "bad_argument"


def test_a_broken_call_is_skipped():
    """A malformed call is content, what follows it is read, and the first error is the one named."""
    broken = "<tool_call>f\n<arg_key>x</arg_key>\n1</arg_value>\n</tool_call>"
    tools = [
        {"name": "g", "parameters": {"properties": {"x": {}}}},
        {"name": "h"},
    ]
    message = parse(broken + call("g", x="1") + call("h"), tools)
    assert (message["content"], message["error"]) == (broken, "bad_tool_call")
    assert message["tool_calls"] == [
        {"name": "g", "arguments": {"x": 1}},
        {"name": "h", "arguments": {}},
    ]
    assert parse("<tool_call>f<tool_call>g</tool_call>")["tool_calls"] == [
        {"name": "g", "arguments": {}}
    ]
