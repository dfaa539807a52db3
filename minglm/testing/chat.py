"""Contracts of the chat template and of the parser: what any implementation of paper section 3.1 must hold.

    from minglm.testing.chat import check_template, check_parser
    check_template(my_render)                          # or with dialect="glm-4.7"
    check_parser(my_parse, MyParser)

Conversations and texts are drawn by hypothesis; a failing property raises AssertionError. The strategies
`conversations` and `assistant_messages`, the tools they use, and a tokenizer of single bytes are there to be reused.
"""

import json
from functools import partial
from itertools import pairwise

from hypothesis import given
from hypothesis import strategies as st

from minglm.chat.template import STOPS, dialect_of
from minglm.data.tokenizer import SPECIAL_TOKENS
from minglm.testing.strategies import contract

TOOLS = [
    {
        "name": name,
        "description": "For tests.",
        "parameters": {
            "type": "object",
            "properties": {
                "text": {"type": "string"},
                "count": {"type": "integer"},
                "ratio": {"type": "number"},
                "sure": {"type": "boolean"},
                "items": {"type": "array"},
                "options": {"type": "object"},
                "note": {"type": ["string", "null"]},
            },
            "required": required,
        },
    }
    for name, required in (("act", []), ("look.up", ["text"]))
]


class ByteTokenizer:
    """One token for each byte and each special token: the plainest tokenizer with the interface the template needs."""

    special = {name: 256 + index for index, name in enumerate(SPECIAL_TOKENS)}

    def encode(self, text):
        """UTF-8 bytes."""
        return list(text.encode())

    def decode(self, ids):
        """Back to text."""
        return b"".join(
            bytes([i]) if i < 256 else SPECIAL_TOKENS[i - 256].encode() for i in ids
        ).decode()


# Pieces that make trouble: halves of tags, tags, blanks at the ends, characters of several bytes.
_PLAIN = [
    "a",
    "Bc",
    "7",
    " ",
    "\n",
    "é",
    "漢",
    "<",
    ">",
    "</",
    "<|",
    "|>",
    "{",
    '"',
    "\\",
    "arg_key ",
    "think ",
]
_TAGGED = [*_PLAIN, *SPECIAL_TOKENS]
_numbers = st.integers(-(10**9), 10**9)
_json = st.recursive(
    st.none() | st.booleans() | _numbers | st.sampled_from(["", "x", "</tool_call>", "é\n"]),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from("abc"), inner, max_size=3)
    ),
    max_leaves=5,
)


def _texts(pieces, size=8):
    return st.lists(st.sampled_from(pieces), max_size=size).map("".join)


@st.composite
def tool_calls(draw):
    """A call to one of TOOLS with arguments that fit its schema; string values may hold tags."""
    # A value that spells the end of a call is a call's end to every reader, so no closing value tag here.
    value = _texts([piece for piece in _TAGGED if piece != "</arg_value>"])
    values = {
        "text": value,
        "count": _numbers,
        "ratio": _numbers | st.floats(allow_nan=False, allow_infinity=False),
        "sure": st.booleans(),
        "items": st.lists(_json, max_size=3),
        "options": st.dictionaries(st.sampled_from(["a", "b c"]), _json, max_size=2),
        "note": st.none() | value.filter(lambda text: text.strip() != "null"),
    }
    name = draw(st.sampled_from(["act", "look.up"]))
    keys = draw(st.lists(st.sampled_from(sorted(values)), unique=True, max_size=4))
    if name == "look.up" and "text" not in keys:
        keys.append("text")
    return {"name": name, "arguments": {key: draw(values[key]) for key in keys}}


@st.composite
def assistant_messages(draw, calls=False, pieces=tuple(_PLAIN)):
    """An assistant turn: reasoning and content without tags (unless `pieces` has them), with tool calls if `calls`."""
    return {
        "role": "assistant",
        "reasoning_content": draw(_texts(pieces)).strip(),
        "content": draw(_texts(pieces)).strip(),
        "tool_calls": draw(st.lists(tool_calls(), min_size=1, max_size=2)) if calls else [],
    }


@st.composite
def conversations(draw, user_turns=3):
    """System text or none, then user turns, each with rounds of calls and results and a last answer."""
    text = _texts(_TAGGED)
    messages = [{"role": "system", "content": draw(text)}] if draw(st.booleans()) else []
    for _ in range(draw(st.integers(1, user_turns))):
        messages.append({"role": "user", "content": draw(text)})
        for _ in range(draw(st.integers(0, 2))):
            messages.append(draw(assistant_messages(calls=True, pieces=tuple(_TAGGED))))
            messages += [
                {"role": "tool", "content": draw(text)} for _ in messages[-1]["tool_calls"]
            ]
        messages.append(draw(assistant_messages(pieces=tuple(_TAGGED))))
    return messages


def _produced(message, line="\n", thought=True):
    """What the model writes after `<|assistant|>`, spelled plainly: figure 4, or 4.7's where the line is empty.

    thought False leaves out the reasoning with its tags.
    """
    text = f"{line}<think>{message['reasoning_content']}</think>" if thought else ""
    if message["content"]:
        text += f"{line}{message['content']}"
    for call in message["tool_calls"]:
        text += f"{line}<tool_call>{call['name']}{line}"
        for key, value in call["arguments"].items():
            value = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
            text += f"<arg_key>{key}</arg_key>{line}<arg_value>{value}</arg_value>{line}"
        text += "</tool_call>"
    return text


def _last_user(messages):
    return max(index for index, message in enumerate(messages) if message["role"] == "user")


def check_template(render, tokenizer=None, dialect="glm-4.5"):
    """Hold a chat template to its contract.

    render: (tokenizer, messages, tools=None, thinking=True, generation_prompt=False, close=True) -> (ids, mask, text);
    dialect=... is passed on unless it is glm-4.5, and clear_thinking=False where that dialect preserves reasoning.
    tokenizer: encode, decode and special; single bytes by default. Raises AssertionError for a property that fails.
    """
    tokenizer, form = tokenizer or ByteTokenizer(), dialect_of(dialect)
    render = render if dialect == "glm-4.5" else partial(render, dialect=dialect)
    switches = (conversations(), st.booleans(), st.booleans())

    @contract
    @given(*switches)
    def spells_its_text(messages, thinking, tools):
        ids, mask, text = render(
            tokenizer, messages, tools=TOOLS if tools else None, thinking=thinking
        )
        assert len(ids) == len(mask), "ids and mask differ in length"
        assert tokenizer.decode(ids) == text, "the ids do not spell the text"

    @contract
    @given(*switches)
    def targets_are_what_the_model_writes(messages, thinking, tools):
        ids, mask, _ = render(
            tokenizer, messages, tools=TOOLS if tools else None, thinking=thinking
        )
        expected = ""
        for index, message in enumerate(messages):
            if message["role"] == "assistant":
                reasoning = message["reasoning_content"]
                cut = index < _last_user(messages) and reasoning
                thought = thinking and not cut and bool(reasoning or not form.opens)
                text = _produced(message, form.line, thought)
                expected += text.removeprefix("<think>") if thought and form.opens else text
                expected += "<|observation|>" if message["tool_calls"] else "<|user|>"
        targets = tokenizer.decode(
            [token for token, trained in zip(ids, mask, strict=True) if trained]
        )
        assert targets == expected, (
            "the targets are not the assistant's text with the role tokens that end its turns"
        )

    @contract
    @given(*switches)
    def adding_within_a_user_turn_extends(messages, thinking, tools):
        switch = {"tools": TOOLS if tools else None, "thinking": thinking, "close": False}
        whole = render(tokenizer, messages, **switch)[0]
        for end in range(_last_user(messages) + 1, len(messages)):
            part = render(tokenizer, messages[:end], **switch)[0]
            assert whole[: len(part)] == part, (
                f"the first {end} messages are no prefix of the whole"
            )

    @contract
    @given(*switches)
    def preserved_reasoning_extends_everywhere(messages, thinking, tools):
        switch = {
            "tools": TOOLS if tools else None,
            "thinking": thinking,
            "close": False,
            "clear_thinking": False,
        }
        whole = render(tokenizer, messages, **switch)
        for end in range(1, len(messages)):
            part = render(tokenizer, messages[:end], **switch)[0]
            assert whole[0][: len(part)] == part, (
                f"the first {end} messages are no prefix of the whole"
            )
        for message in messages:
            assert (message.get("reasoning_content") or "") in whole[2], "reasoning was dropped"

    @contract
    @given(*switches)
    def role_tokens_open_turns_and_nothing_else(messages, thinking, tools):
        ids = render(
            tokenizer, messages, tools=TOOLS if tools else None, thinking=thinking, close=False
        )[0]
        roles = [message["role"] for message in messages]
        runs = [
            role
            for role, before in zip(roles, [None, *roles[:-1]], strict=True)
            if not role == before == "tool"
        ]
        for role, name in {
            "user": "<|user|>",
            "assistant": "<|assistant|>",
            "tool": "<|observation|>",
        }.items():
            count = ids.count(tokenizer.special[name])
            assert count == runs.count(role), f"{count} {name} for {runs.count(role)} turns"

    spells_its_text()
    targets_are_what_the_model_writes()
    adding_within_a_user_turn_extends()
    if form.preserves:
        preserved_reasoning_extends_everywhere()
    role_tokens_open_turns_and_nothing_else()


def _act(key, value):
    return f"<tool_call>act\n<arg_key>{key}</arg_key>\n<arg_value>{value}</arg_value>\n</tool_call>"


# (text after the prompt, error): calls that models have been seen to write, or that a careless parser gets wrong.
WRONG = [
    ("<think>never closed", "unclosed_think"),
    ("<think>ended by a role<|user|>", "unclosed_think"),
    ("answer</think>", "stray_tag"),
    ("answer <think>late</think>", "stray_tag"),
    ("<tool_call>act", "unclosed_tool_call"),
    (
        "<tool_call>act\n<arg_key>text</arg_key>\n<arg_value>half<|observation|>",
        "unclosed_tool_call",
    ),
    ("<tool_call></tool_call>", "bad_tool_call"),
    ('<tool_call>{"name": "act", "arguments": {}}</tool_call>', "bad_tool_call"),
    (
        "<tool_call>act\n<arg_key>text</arg_key></arg_key>\n<arg_value>x</arg_value>\n</tool_call>",
        "bad_tool_call",
    ),
    (
        "<tool_call>act\n<arg_key><arg_key>text</arg_key>\n<arg_value>x</arg_value>\n</tool_call>",
        "bad_tool_call",
    ),
    ("<tool_call>act\n<arg_key>text</arg_key>\nx</arg_value>\n</tool_call>", "bad_tool_call"),
    ("<tool_call>act\ntext</arg_key>\n<arg_value>x</arg_value>\n</tool_call>", "bad_tool_call"),
    ("<tool_call>fly\n</tool_call>", "unknown_tool"),
    ("<tool_call>look.up\n</tool_call>", "missing_argument"),
    (_act("speed", "1"), "unknown_argument"),
    (_act("count", "many"), "bad_argument"),
    (_act("ratio", "NaN"), "bad_argument"),
    (_act("count", "true"), "bad_argument"),
    (_act("items", "[" * 100_000), "bad_argument"),
    ("<tool_call>act\n</tool_call>\nand then", "text_after_call"),
]


def check_parser(parse, parser=None):
    """Hold a parser to its contract.

    parse: (text, tools) -> {"role", "content", "reasoning_content", "tool_calls", "error"}. parser: tools -> an object
    with feed(text) -> deltas, flush() -> deltas and finish() -> message; without it these checks are left out.
    A delta has `kind` (reasoning, content or call), `text` and `call`, as in `minglm.chat.parser`.
    Raises AssertionError for a property that fails.
    """

    @contract
    @given(
        st.booleans().flatmap(lambda calls: assistant_messages(calls=calls)),
        st.sampled_from(["\n", ""]),
        st.sampled_from(["", *STOPS]),
    )
    def reads_what_was_written(message, line, stop):
        found = parse(_produced(message, line) + stop, TOOLS)
        assert found == {**message, "error": None}, "not the message that was written"

    @contract
    @given(_texts(_TAGGED, 20))
    def answers_any_text(text):
        message = _without_exception(parse, text)
        assert message["error"] is None or isinstance(message["error"], str)
        message = _without_exception(parse, "<tool_call>" + text)
        assert message["tool_calls"] or message["error"], (
            "a call that was begun is neither a call nor an error"
        )

    @contract
    @given(assistant_messages(calls=True), st.data())
    def half_a_message_is_an_error(message, data):
        text = _produced(message)
        inside = range(text.rindex("<tool_call>") + len("<tool_call>"), len(text))
        error = parse(text[: data.draw(st.sampled_from(inside))], TOOLS)["error"]
        assert error == "unclosed_tool_call", f"a call that has no end: error is {error}"

    def names_what_is_wrong():
        for text, error in WRONG:
            for stop in ("", "<|user|>"):
                found = _without_exception(parse, text + stop)["error"]
                assert found == error, f"{text[:80]!r}: error is {found}, expected {error}"

    @contract
    @given(
        _texts(_TAGGED, 20) | assistant_messages(calls=True).map(_produced),
        st.sampled_from(["", " ", "<", "</th", "<|user"]),
        st.lists(st.integers(0, 200), max_size=12),
    )
    def any_split_gives_the_same(text, tail, cuts):
        text += tail  # the beginning of a tag that never comes
        cuts = sorted({0, len(text), *(cut % (len(text) + 1) for cut in cuts)})
        for ends in (cuts, range(len(text) + 1)):
            stream = parser(TOOLS)
            deltas = [delta for a, b in pairwise(ends) for delta in stream.feed(text[a:b])]
            deltas += stream.flush()
            message = stream.finish()
            assert message == parse(text, TOOLS), "the split changes the message"
            joined = {
                kind: "".join(delta.text for delta in deltas if delta.kind == kind)
                for kind in ("reasoning", "content")
            }
            assert joined["reasoning"] == message["reasoning_content"], (
                "the deltas miss some reasoning"
            )
            assert joined["content"] == message["content"], "the deltas miss some content"
            calls = [delta.call for delta in deltas if delta.kind == "call"]
            assert calls == message["tool_calls"], "the deltas miss a call"

    reads_what_was_written()
    answers_any_text()
    half_a_message_is_an_error()
    names_what_is_wrong()
    if parser:
        any_split_gives_the_same()


def _without_exception(parse, text):
    try:
        return parse(text, TOOLS)
    except Exception as error:
        raise AssertionError(f"{text[:80]!r} raises {error!r}") from error
