"""Check a chat template and a parser of sampled text against their contracts (paper section 3.1).

    from minglm.testing.chat import check_template, check_parser
    check_template(my_render)                          # or with dialect="glm-4.7"
    check_parser(my_parse, MyParser)

Hypothesis draws conversations and texts; a property that fails raises AssertionError. The strategies
`conversations` and `assistant_messages`, the tools they use, and a tokenizer of single bytes can be reused.
"""

import json
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from itertools import pairwise
from typing import Any, Protocol

from hypothesis import strategies as st

from minglm.chat.messages import AssistantMessage, ChatTokenizer
from minglm.chat.parser import Delta
from minglm.chat.template import STOPS, Dialect, dialect_of
from minglm.data.tokenizer import SPECIAL_TOKENS
from minglm.testing.strategies import for_all

Messages = list[dict[str, Any]]
Tools = list[dict[str, Any]] | None

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
    """A tokenizer with one token for each byte and each special token: the simplest that the template accepts."""

    special = {name: 256 + index for index, name in enumerate(SPECIAL_TOKENS)}

    def encode(self, text: str) -> list[int]:
        """Return the UTF-8 bytes of a text."""
        return list(text.encode())

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of ids, special tokens spelled as their names."""
        pieces: list[bytes] = []
        for token in ids:
            pieces.append(bytes([token]) if token < 256 else SPECIAL_TOKENS[token - 256].encode())
        return b"".join(pieces).decode()


# Pieces that cause trouble: halves of tags, tags, whitespace at the ends, characters of several bytes.
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


def _texts(pieces: Sequence[str], size: int = 8) -> st.SearchStrategy[str]:
    return st.lists(st.sampled_from(pieces), max_size=size).map("".join)


@st.composite
def tool_calls(draw: st.DrawFn) -> dict[str, Any]:
    """Draw a call to one of TOOLS with arguments that fit its schema; string values may contain tags."""
    # No parser can tell a value that spells the end of a call from the end itself: no closing value tag.
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
def assistant_messages(
    draw: st.DrawFn, calls: bool = False, pieces: Sequence[str] = tuple(_PLAIN)
) -> dict[str, Any]:
    """Draw an assistant turn: reasoning and content without tags (unless `pieces` has them), with calls if `calls`."""
    return {
        "role": "assistant",
        "reasoning_content": draw(_texts(pieces)).strip(),
        "content": draw(_texts(pieces)).strip(),
        "tool_calls": draw(st.lists(tool_calls(), min_size=1, max_size=2)) if calls else [],
    }


@st.composite
def conversations(draw: st.DrawFn, user_turns: int = 3) -> list[dict[str, Any]]:
    """Draw a conversation: a system text or none, then user turns, each with rounds of calls and a last answer."""
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


def _produced(message: dict[str, Any], line: str = "\n", thought: bool = True) -> str:
    """Return the text the model writes after `<|assistant|>`, as in figure 4, or in 4.7 if the line is empty.

    thought: False leaves out the reasoning with its tags.
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


def _last_user(messages: list[dict[str, Any]]) -> int:
    return max(index for index, message in enumerate(messages) if message["role"] == "user")


class DecodingTokenizer(ChatTokenizer, Protocol):
    """A chat tokenizer that also returns the text of ids."""

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of ids, special tokens spelled as their names."""
        ...


Render = Callable[..., tuple[list[int], list[bool], str]]


def check_template(
    render: Render, tokenizer: DecodingTokenizer | None = None, dialect: str = "glm-4.5"
) -> None:
    """Check a chat template.

    render: (tokenizer, messages, tools=None, thinking=True, generation_prompt=False, close=True) -> (ids,
    mask, text); dialect=... is passed on unless it is glm-4.5, and clear_thinking=False where that dialect
    preserves reasoning.
    tokenizer: encode, decode and special; single bytes by default. Raises AssertionError for a property that fails.
    """
    if tokenizer is None:
        tokenizer = ByteTokenizer()
    if dialect != "glm-4.5":
        render = partial(render, dialect=dialect)
    contract = _TemplateContract(render, tokenizer, dialect_of(dialect))
    contract.run(contract.ids_spell_the_text)
    contract.run(contract.targets_are_what_the_model_writes)
    contract.run(contract.adding_within_a_user_turn_extends)
    if contract.form.preserves:
        contract.run(contract.preserved_reasoning_extends_everywhere)
    contract.run(contract.role_tokens_only_open_turns)


class _TemplateContract:
    """The properties of a chat template, one method each: (messages, the thinking switch, tools or None)."""

    def __init__(self, render: Render, tokenizer: DecodingTokenizer, form: Dialect) -> None:
        self.render = partial(render, tokenizer)
        self.tokenizer = tokenizer
        self.form = form

    def run(self, check: Callable[..., None]) -> None:
        """Check one property on drawn conversations."""
        tools = st.sampled_from([None, TOOLS])
        for_all(messages=conversations(), thinking=st.booleans(), tools=tools)(
            lambda messages, thinking, tools: check(messages, thinking, tools)
        )

    def ids_spell_the_text(self, messages: Messages, thinking: bool, tools: Tools) -> None:
        ids, mask, text = self.render(messages, tools=tools, thinking=thinking)
        assert len(ids) == len(mask), "ids and mask differ in length"
        assert self.tokenizer.decode(ids) == text, "the ids do not spell the text"

    def targets_are_what_the_model_writes(
        self, messages: Messages, thinking: bool, tools: Tools
    ) -> None:
        ids, mask, _ = self.render(messages, tools=tools, thinking=thinking)
        expected = ""
        for index, message in enumerate(messages):
            if message["role"] == "assistant":
                expected += self._targets(message, index < _last_user(messages), thinking)
        trained_ids = [token for token, trained in zip(ids, mask, strict=True) if trained]
        assert self.tokenizer.decode(trained_ids) == expected, (
            "the targets are not the assistant's text with the role tokens that end its turns"
        )

    def _targets(self, message: dict[str, Any], older_turn: bool, thinking: bool) -> str:
        """Return what the model writes in one turn, and the role token that ends it."""
        form = self.form
        reasoning = message["reasoning_content"]
        was_cut = older_turn and reasoning != ""
        thought = thinking and not was_cut and bool(reasoning or not form.opens)
        text = _produced(message, form.line, thought)
        if thought and form.opens:
            text = text.removeprefix("<think>")  # the prompt holds it
        return text + ("<|observation|>" if message["tool_calls"] else "<|user|>")

    def adding_within_a_user_turn_extends(
        self, messages: Messages, thinking: bool, tools: Tools
    ) -> None:
        self._prefixes_extend(
            messages, range(_last_user(messages) + 1, len(messages)), thinking, tools
        )

    def preserved_reasoning_extends_everywhere(
        self, messages: Messages, thinking: bool, tools: Tools
    ) -> None:
        ends = range(1, len(messages))
        text = self._prefixes_extend(messages, ends, thinking, tools, clear_thinking=False)
        for message in messages:
            assert (message.get("reasoning_content") or "") in text, "reasoning was dropped"

    def _prefixes_extend(
        self, messages: Messages, ends: range, thinking: bool, tools: Tools, **options: bool
    ) -> str:
        """Check that the first `end` messages render to a prefix of the whole; return the text of the whole."""
        switches = {"tools": tools, "thinking": thinking, "close": False, **options}
        whole_ids, _, text = self.render(messages, **switches)
        for end in ends:
            ids, _, _ = self.render(messages[:end], **switches)
            assert whole_ids[: len(ids)] == ids, (
                f"the first {end} messages are not a prefix of the whole"
            )
        return text

    def role_tokens_only_open_turns(self, messages: Messages, thinking: bool, tools: Tools) -> None:
        ids, _, _ = self.render(messages, tools=tools, thinking=thinking, close=False)
        # Several tool results in a row share one turn.
        turns: list[str] = []
        previous = None
        for message in messages:
            role = message["role"]
            if not (role == "tool" and previous == "tool"):
                turns.append(role)
            previous = role
        names = {"user": "<|user|>", "assistant": "<|assistant|>", "tool": "<|observation|>"}
        for role, name in names.items():
            count = ids.count(self.tokenizer.special[name])
            expected = turns.count(role)
            assert count == expected, f"{count} {name} for {expected} turns"


def _act(key: str, value: str) -> str:
    return f"<tool_call>act\n<arg_key>{key}</arg_key>\n<arg_value>{value}</arg_value>\n</tool_call>"


WRONG: list[tuple[str, str]] = [
    ("<think>never closed", "unclosed_think"),
    ("<think>ended by a role<|user|>", "unclosed_think"),
    ("answer</think>", "stray_tag"),
    ("answer <think>late</think>", "stray_tag"),
    ("<think>a<tool_call>act</tool_call></think>", "call_in_think"),
    ("<think>a<tool_call>act</tool_call>", "call_in_think"),
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
"""(text after the prompt, error): calls that models have been seen to write, or that a careless parser misreads."""


Parse = Callable[[str, list[dict[str, Any]]], AssistantMessage]


def as_sent_by_a_client(message: AssistantMessage) -> dict[str, Any]:
    """Return a message as a client of the server sends it back: OpenAI's form, arguments as JSON text."""
    calls = [
        {
            "id": f"call_{number}",
            "type": "function",
            "function": {"name": call["name"], "arguments": json.dumps(call["arguments"])},
        }
        for number, call in enumerate(message["tool_calls"])
    ]
    sent = {"role": "assistant", "content": message["content"], "tool_calls": calls}
    return sent | {"reasoning_content": message["reasoning_content"]}


def explain_difference(
    tokenizer: DecodingTokenizer,
    sampled: Sequence[int],
    rendered: Sequence[int],
    message: AssistantMessage,
) -> str | None:
    """Explain why a turn that is sent back renders to other ids than were sampled; None if it does not.

    sampled: prompt and sampled turn. rendered: the conversation with the message that was read. Raises
    AssertionError for a difference that has no reason.
    """
    if list(sampled) == list(rendered):
        return None
    pairs = enumerate(zip(sampled, rendered, strict=False))
    at = next((i for i, (a, b) in pairs if a != b), min(len(sampled), len(rendered)))
    text = tokenizer.decode(sampled)
    again = tokenizer.decode(rendered)
    same = len(tokenizer.decode(sampled[:at]))
    if text == again:
        reason = "the same text in other tokens"
    elif message["error"]:
        reason = f"the turn was malformed: {message['error']}"
    elif "".join(text.split()) == "".join(again.split()):
        reason = "white space between the parts of a turn is the template's"
    elif text.replace("<think></think>", "</think>") == again:
        reason = "reasoning that was opened and left empty is rendered as none"
    elif "<arg_value>" in text[:same] and "</arg_value>" in text[same:]:
        reason = "a value that is no text is written as JSON, in one way"
    else:
        raise AssertionError(f"no reason: {text[same:][:80]!r} became {again[same:][:80]!r}")
    return f"token {at}: {text[same:][:20]!r} became {again[same:][:20]!r}: {reason}"


class StreamParser(Protocol):
    """An incremental parser, as `minglm.chat.parser.Parser`."""

    def feed(self, text: str) -> list[Delta]:
        """Read more text, and return the deltas that it settles."""
        ...

    def flush(self) -> list[Delta]:
        """End the text, and return the remaining deltas."""
        ...

    def finish(self) -> AssistantMessage:
        """Return the message."""
        ...


def check_parser(
    parse: Parse, parser: Callable[[list[dict[str, Any]]], StreamParser] | None = None
) -> None:
    """Check a parser of sampled text.

    parse: (text, tools) -> {"role", "content", "reasoning_content", "tool_calls", "error"}.
    parser: tools -> an object with feed(text) -> deltas, flush() -> deltas and finish() -> message; without
    it these checks are left out. A delta has `kind`, `text` and `call`, as in `minglm.chat.parser`.
    Raises AssertionError for a property that fails.
    """

    @for_all(
        message=st.booleans().flatmap(lambda calls: assistant_messages(calls=calls)),
        line=st.sampled_from(["\n", ""]),
        stop=st.sampled_from(["", *STOPS]),
    )
    def reads_what_was_written(message: dict[str, Any], line: str, stop: str) -> None:
        parsed = parse(_produced(message, line) + stop, TOOLS)
        assert parsed == {**message, "error": None}, "not the message that was written"

    @for_all(text=_texts(_TAGGED, 20))
    def answers_any_text(text: str) -> None:
        message = _without_exception(parse, text)
        assert message["error"] is None or isinstance(message["error"], str)
        message = _without_exception(parse, "<tool_call>" + text)
        assert message["tool_calls"] or message["error"], (
            "a call that was begun is neither a call nor an error"
        )

    @for_all(message=assistant_messages(calls=True), data=st.data())
    def half_a_message_is_an_error(message: dict[str, Any], data: st.DataObject) -> None:
        text = _produced(message)
        inside_last_call = range(text.rindex("<tool_call>") + len("<tool_call>"), len(text))
        end = data.draw(st.sampled_from(inside_last_call))
        error = parse(text[:end], TOOLS)["error"]
        assert error == "unclosed_tool_call", f"a call that has no end: error is {error}"

    for text, expected in WRONG:
        for stop in ("", "<|user|>"):
            error = _without_exception(parse, text + stop)["error"]
            assert error == expected, f"{text[:80]!r}: error is {error}, expected {expected}"

    if parser is None:
        return

    @for_all(
        text=_texts(_TAGGED, 20) | assistant_messages(calls=True).map(_produced),
        tail=st.sampled_from(["", " ", "<", "</th", "<|user"]),
        cuts=st.lists(st.integers(0, 200), max_size=12),
    )
    def any_split_gives_the_same(text: str, tail: str, cuts: list[int]) -> None:
        text += tail  # the beginning of a tag that never comes
        places = sorted({0, len(text), *(cut % (len(text) + 1) for cut in cuts)})
        every_character = range(len(text) + 1)
        for ends in (places, every_character):
            pieces = [text[start:end] for start, end in pairwise(ends)]
            _check_pieces(parser(TOOLS), pieces, parse(text, TOOLS))


def _check_pieces(stream: StreamParser, pieces: list[str], expected: AssistantMessage) -> None:
    """Check that a stream of pieces gives the message of the whole text, and deltas that add up to it."""
    deltas: list[Delta] = []
    for piece in pieces:
        deltas += stream.feed(piece)
    deltas += stream.flush()
    message = stream.finish()
    assert message == expected, "the split changes the message"
    check_deltas(deltas, message)


def check_deltas(deltas: Iterable[Delta], message: AssistantMessage) -> None:
    """Check that deltas add up to a message, less what they withdraw, and fragments of arguments to those of the call."""
    texts = {"reasoning": "", "content": ""}
    calls: list[Any] = []
    fragments: list[str] = []
    for delta in deltas:
        if delta.kind in texts:
            texts[delta.kind] += delta.text
        elif delta.kind == "reasoning_withdrawn":
            texts["reasoning"] = ""
        elif delta.kind == "call_begins":
            fragments = []
            calls.append({"name": delta.text})
        elif delta.kind == "arguments":
            fragments.append(delta.text)
        elif delta.kind == "call_withdrawn":
            calls.pop()
        else:
            assert delta.kind == "call" and delta.call is not None, delta
            assert "".join(fragments) == json.dumps(delta.call["arguments"], ensure_ascii=False), (
                "the fragments are not the arguments"
            )
            calls[-1]["arguments"] = delta.call["arguments"]
    assert texts["reasoning"] == message["reasoning_content"], "the deltas miss some reasoning"
    assert texts["content"] == message["content"], "the deltas miss some content"
    assert calls == message["tool_calls"], "the deltas miss a call"


def _without_exception(parse: Parse, text: str) -> AssistantMessage:
    try:
        return parse(text, TOOLS)
    except Exception as error:
        raise AssertionError(f"{text[:80]!r} raises {error!r}") from error
