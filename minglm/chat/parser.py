"""Parse sampled text into an assistant message, incrementally (paper section 3.1, figure 4).

    text = <think>reasoning</think> content call call ... stop
    call = <tool_call>name <arg_key>key</arg_key> <arg_value>value</arg_value> ... </tool_call>

A small state machine looks for the next tag that matters in its state, and holds back text that may still become one.
Therefore any split of the stream gives the same message as the whole text. Nothing the model writes raises an
exception: a malformed message has a `FormatError` in message["error"] (the first one found), strict enough to be a
format reward.

Choices, and why:
- `tool_calls` holds every complete call, even one that breaks its schema (unknown tool, missing argument, a value that
  is not a valid number and is kept as text), because a client may want to answer it. Malformed markup gives no call.
- An argument is typed by the tool's schema: a string stays as it is written, anything else is JSON. Without a schema
  it is JSON if it parses, and text otherwise.
- Whitespace between tags does not matter, so the 4.7 dialect, which has no newlines, parses the same way. A 4.7 prompt
  already ends with `<think>`; pass `opened=True` for it.
- In an argument value only position tells a tag from data: `</arg_value>` closes the value if `<arg_key>` or
  `</tool_call>` comes next. A value may therefore contain any other tag, as it does when the model edits code about tags.
- A stop token ends the message wherever it occurs, except inside a value, where it is text that spells one: a real
  stop token would have ended generation.
- Reasoning and content are stripped at both ends, as the template strips them.

Simplified: schemas are read one level deep (the type of each argument, and which are required), not validated in full.
"""

import json
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from enum import StrEnum
from functools import lru_cache
from typing import Any, NamedTuple

from minglm.chat.messages import AssistantMessage, Tool, ToolCall
from minglm.chat.template import ROLES, STOPS, TAGS


class FormatError(StrEnum):
    """A fault in the format of a sampled turn."""

    UNCLOSED_THINK = "unclosed_think"
    """The reasoning has no end."""
    UNCLOSED_TOOL_CALL = "unclosed_tool_call"
    """The text ends inside a tool call."""
    BAD_TOOL_CALL = "bad_tool_call"
    """The tags or the name of a tool call are malformed."""
    UNKNOWN_TOOL = "unknown_tool"
    """A call to a tool that was not offered."""
    MISSING_ARGUMENT = "missing_argument"
    """A required argument is absent."""
    UNKNOWN_ARGUMENT = "unknown_argument"
    """An argument that the tool's schema does not list."""
    BAD_ARGUMENT = "bad_argument"
    """An argument given twice, or whose value does not fit its type."""
    STRAY_TAG = "stray_tag"
    """A tag where none belongs."""
    TEXT_AFTER_CALL = "text_after_call"
    """Content after a tool call."""


class DeltaKind(StrEnum):
    """What a piece of a parsed stream adds to the message."""

    REASONING = "reasoning"
    """Text of the reasoning."""
    CONTENT = "content"
    """Text of the content."""
    CALL = "call"
    """One complete tool call."""


class Delta(NamedTuple):
    """A piece of the message. The texts of one kind, joined, are the message's text of that kind."""

    kind: DeltaKind
    text: str = ""
    """Empty for a call."""
    call: ToolCall | None = None
    """None for text."""


class State(StrEnum):
    """Where the parser is in the message."""

    START = "start"
    """Only whitespace so far; `<think>` may still open the reasoning."""
    REASONING = "reasoning"
    """Between `<think>` and `</think>`."""
    CONTENT = "content"
    """Outside reasoning and calls."""
    CALL = "call"
    """Inside a tool call, between or in its tags; `CallPart` says where."""
    VALUE = "value"
    """Inside an argument value."""
    BROKEN = "broken"
    """Skipping the rest of a malformed tool call."""
    DONE = "done"
    """The message has ended."""


class CallPart(StrEnum):
    """What the parser expects next in a tool call."""

    NAME = "name"
    """The name of the function."""
    KEY = "key"
    """The name of an argument."""
    GAP = "gap"
    """Whitespace between a key and its value."""
    VALUE = "value"
    """The value of an argument."""
    AFTER = "after"
    """Whitespace after a value: another argument or the end of the call."""
    END = "end"
    """Nothing: the call is complete."""


# Inside a call: (part, the tag that ends it) -> the part that follows.
_NEXT_PART = {
    (CallPart.NAME, "<arg_key>"): CallPart.KEY,
    (CallPart.NAME, "</tool_call>"): CallPart.END,
    (CallPart.KEY, "</arg_key>"): CallPart.GAP,
    (CallPart.GAP, "<arg_value>"): CallPart.VALUE,
    (CallPart.AFTER, "<arg_key>"): CallPart.KEY,
    (CallPart.AFTER, "</tool_call>"): CallPart.END,
}

_NAME = re.compile(r"[\w.:/-]+")
_ALL_TAGS = (*TAGS, "<tool_response>", "</tool_response>", *ROLES.values(), "<|endoftext|>")
_AFTER_VALUE = ("<arg_key>", "</tool_call>")  # the tags that may follow a value

_JSON_TYPES: dict[str, type | tuple[type, ...]] = {
    "integer": int,
    "number": (int, float),
    "boolean": bool,
    "array": list,
    "object": dict,
    "string": str,
}


def parse(text: str, tools: Sequence[Tool] | None = None, opened: bool = False) -> AssistantMessage:
    """Parse sampled text (after the generation prompt) into a message.

    text: special tokens are spelled literally; everything from the first stop token on is dropped.
    tools: the JSON-schema function objects that were offered. An empty list means that every call is an error; None
    means that nothing is known about the tools.
    opened: the prompt ended with `<think>`, so the text begins with reasoning (4.7 with thinking on).
    The message's error is None or a `FormatError`. No text raises an exception.
    """
    parser = Parser(tools, opened)
    parser.feed(text)
    return parser.finish()


class Parser:
    """An incremental `parse`: `feed` it text as it comes, then `finish` it for the message.

    `feed` returns the deltas that the text settles. A last piece may be held back until `flush`, which returns the
    deltas that remain. `done` becomes True at a stop token. Raises ValueError for a tool without a name.
    """

    def __init__(self, tools: Sequence[Tool] | None = None, opened: bool = False) -> None:
        self.schemas = None if tools is None else dict(_named_schema(tool) for tool in tools)
        self.texts: dict[DeltaKind, list[str]] = {DeltaKind.REASONING: [], DeltaKind.CONTENT: []}
        self.calls: list[ToolCall] = []
        self.error: FormatError | None = None

        self._state = State.REASONING if opened else State.START
        self._buffer = ""  # text that is not settled yet
        self._deltas: list[Delta] = []  # settled since the last feed
        self._whitespace = ""  # counts only if text of the same kind follows

        # The call that is being read.
        self._call_seen = False  # whether any call has begun
        self._part = CallPart.NAME
        self._pieces: list[str] = []  # text of the part so far
        self._name = ""
        self._pairs: list[tuple[str, str]] = []  # (key, value as text)

    @property
    def done(self) -> bool:
        """Return whether the message has ended."""
        return self._state is State.DONE

    def feed(self, text: str) -> list[Delta]:
        """Read more text, and return the deltas that it settles."""
        self._buffer += text
        while self._step():
            pass
        return self._settled()

    def flush(self) -> list[Delta]:
        """End the text: settle what was held back, and return its deltas."""
        if self._state in (State.START, State.CONTENT):
            self._say(DeltaKind.CONTENT, self._buffer)
        elif self._state is State.REASONING:
            self._say(DeltaKind.REASONING, self._buffer)
            self._fail(FormatError.UNCLOSED_THINK)
        elif not self.done:
            self._fail(FormatError.UNCLOSED_TOOL_CALL)
        self._state = State.DONE
        return self._settled()

    def finish(self) -> AssistantMessage:
        """End the text, and return the message."""
        self.flush()
        return {
            "role": "assistant",
            "content": "".join(self.texts[DeltaKind.CONTENT]),
            "reasoning_content": "".join(self.texts[DeltaKind.REASONING]),
            "tool_calls": self.calls,
            "error": self.error,
        }

    def _step(self) -> bool:
        """Take one step through the buffer, and return whether another step may be possible."""
        match self._state:
            case State.START:
                return self._start()
            case State.REASONING:
                return self._reasoning()
            case State.CONTENT:
                return self._content()
            case State.CALL:
                return self._call()
            case State.VALUE:
                return self._value()
            case State.BROKEN:
                return self._broken()
            case State.DONE:
                return False

    def _start(self) -> bool:
        rest = self._buffer.lstrip()
        if len(rest) < len("<think>") and "<think>".startswith(rest):
            return False  # only whitespace, or a prefix of the tag
        if rest.startswith("<think>"):
            self._buffer = rest.removeprefix("<think>")
            self._state = State.REASONING
        else:
            self._state = State.CONTENT
        return True

    def _reasoning(self) -> bool:
        text, tag = self._take(("<think>", "</think>", *STOPS))
        self._say(DeltaKind.REASONING, text)
        if tag == "</think>":
            self._state = State.CONTENT
        elif tag == "<think>":
            self._fail(FormatError.STRAY_TAG)
            self._say(DeltaKind.REASONING, tag)
        elif tag is not None:
            self._fail(FormatError.UNCLOSED_THINK)
            self._state = State.DONE
        return tag is not None

    def _content(self) -> bool:
        text, tag = self._take(_ALL_TAGS)
        self._say(DeltaKind.CONTENT, text)
        if tag == "<tool_call>":
            self._open_call()
        elif tag in STOPS:
            self._state = State.DONE
        elif tag is not None:
            self._fail(FormatError.STRAY_TAG)
            self._say(DeltaKind.CONTENT, tag)
        return tag is not None

    def _call(self) -> bool:
        """Read the name, a key, or the whitespace between tags. Values are read by `_value`."""
        text, tag = self._take(_ALL_TAGS)
        self._pieces.append(text)
        if tag is None:
            return False
        if tag in STOPS:
            self._fail(FormatError.UNCLOSED_TOOL_CALL)
            self._state = State.DONE
            return False

        # The part is complete: check its text and the tag that ends it.
        text = "".join(self._pieces).strip()
        next_part = _NEXT_PART.get((self._part, tag))
        if next_part is None or not self._part_is_well_formed(text):
            self._fail(FormatError.BAD_TOOL_CALL)
            self._buffer = tag + self._buffer
            self._state = State.BROKEN
            return True

        if self._part is CallPart.NAME:
            self._name = text
        elif self._part is CallPart.KEY:
            self._pairs.append((text, ""))
        self._part = next_part
        self._pieces = []
        if next_part is CallPart.VALUE:
            self._state = State.VALUE
        elif next_part is CallPart.END:
            self._close_call()
        return True

    def _part_is_well_formed(self, text: str) -> bool:
        if self._part is CallPart.NAME:
            return _NAME.fullmatch(text) is not None
        if self._part is CallPart.KEY:
            return text != ""
        return text == ""  # only whitespace between tags

    def _value(self) -> bool:
        text, tag = self._take(("</arg_value>",))
        self._pieces.append(text)
        if tag is None:
            return False
        rest = self._buffer.lstrip()
        if rest.startswith(_AFTER_VALUE):
            key, _ = self._pairs[-1]
            self._pairs[-1] = (key, "".join(self._pieces))
            self._part = CallPart.AFTER
            self._pieces = []
            self._state = State.CALL
        elif any(follower.startswith(rest) for follower in _AFTER_VALUE):
            # What comes next decides whether this tag ends the value: put it back.
            self._buffer = tag + self._buffer
            return False
        else:
            self._pieces.append(tag)  # the tag is data
        return True

    def _broken(self) -> bool:
        """Skip the rest of a malformed call."""
        _, tag = self._take(("<tool_call>", "</tool_call>", *STOPS))
        if tag == "<tool_call>":
            self._open_call()
        elif tag == "</tool_call>":
            self._state = State.CONTENT
        elif tag is not None:
            self._state = State.DONE
        return tag is not None

    def _open_call(self) -> None:
        self._call_seen = True
        self._part = CallPart.NAME
        self._pieces = []
        self._pairs = []
        self._state = State.CALL

    def _close_call(self) -> None:
        arguments, error = _typed_arguments(self._name, self._pairs, self.schemas)
        if error is not None:
            self._fail(error)
        call: ToolCall = {"name": self._name, "arguments": arguments}
        self.calls.append(call)
        self._deltas.append(Delta(DeltaKind.CALL, call=call))
        self._state = State.CONTENT

    def _take(self, tags: tuple[str, ...]) -> tuple[str, str | None]:
        """Remove (text, tag) from the buffer: up to the first of `tags`, or all text that cannot begin one, and None."""
        match = _any_of(tags).search(self._buffer)
        if match is not None:
            text = self._buffer[: match.start()]
            self._buffer = self._buffer[match.end() :]
            return text, match.group()
        end = self._buffer.rfind("<")
        if end < 0 or not any(tag.startswith(self._buffer[end:]) for tag in tags):
            end = len(self._buffer)
        text = self._buffer[:end]
        self._buffer = self._buffer[end:]
        return text, None

    def _say(self, kind: DeltaKind, text: str) -> None:
        """Add text to the message, without whitespace at its beginning and, for now, at its end."""
        text = self._whitespace + text
        if not self.texts[kind]:
            text = text.lstrip()
        stripped = text.rstrip()
        self._whitespace = text[len(stripped) :]
        if not stripped:
            return
        if kind is DeltaKind.CONTENT and self._call_seen:
            self._fail(FormatError.TEXT_AFTER_CALL)
        self.texts[kind].append(stripped)
        self._deltas.append(Delta(kind, stripped))

    def _fail(self, error: FormatError) -> None:
        if self.error is None:
            self.error = error

    def _settled(self) -> list[Delta]:
        deltas = self._deltas
        self._deltas = []
        return deltas


@lru_cache
def _any_of(tags: tuple[str, ...]) -> re.Pattern[str]:
    return re.compile("|".join(re.escape(tag) for tag in tags))


def _named_schema(tool: Tool) -> tuple[str, dict[str, Any]]:
    """Return (name, schema of the arguments) of a function object, bare or inside {"function": ...}."""
    function = tool.get("function") or tool
    if not isinstance(function.get("name"), str):
        raise ValueError(f"a tool needs a name, got {tool!r:.80}")
    return function["name"], function.get("parameters") or {}


def _typed_arguments(
    name: str, pairs: list[tuple[str, str]], schemas: Mapping[str, dict[str, Any]] | None
) -> tuple[dict[str, Any], FormatError | None]:
    """Convert the arguments of a call to Python values; also return the first error, or None.

    A value that does not fit its type stays text.
    """
    if schemas is None:
        return {key: _typed_value(text, {})[0] for key, text in pairs}, None
    known = name in schemas
    schema = schemas.get(name, {})
    properties = schema.get("properties") or {}
    errors = [] if known else [FormatError.UNKNOWN_TOOL]
    arguments = {}
    for key, text in pairs:
        value, fits = _typed_value(text, properties.get(key, {}))
        if key not in properties and known and not schema.get("additionalProperties"):
            errors.append(FormatError.UNKNOWN_ARGUMENT)
        elif not fits or key in arguments:
            errors.append(FormatError.BAD_ARGUMENT)
        arguments[key] = value
    if not set(schema.get("required") or ()) <= set(arguments):
        errors.append(FormatError.MISSING_ARGUMENT)
    return arguments, errors[0] if errors else None


def _typed_value(text: str, schema: Mapping[str, Any]) -> tuple[Any, bool]:
    """Return (value, whether it fits) of an argument written as `text`, by the types that its schema allows."""
    types = set(_allowed_types(schema))
    if types == {"string"} or text in schema.get("enum", ()):
        return text, True
    try:
        value = json.loads(text, parse_float=_finite, parse_constant=_finite)
        # An escaped half of a surrogate pair could never be written as UTF-8.
        json.dumps(value, ensure_ascii=False).encode()
    except (ValueError, RecursionError):  # RecursionError: brackets nested thousands deep
        return text, not types or "string" in types
    only_integer = "integer" in types and "number" not in types
    if only_integer and isinstance(value, float) and value.is_integer():
        value = int(value)
    if not types or any(_has_type(value, name) for name in types - {"string"}):
        return value, True
    return text, "string" in types


def _allowed_types(schema: Mapping[str, Any]) -> Iterator[str]:
    """Yield the JSON types that a schema names, itself or in its alternatives."""
    for option in (schema, *schema.get("anyOf", ()), *schema.get("oneOf", ())):
        names = option.get("type") or ()
        yield from (names,) if isinstance(names, str) else names


def _has_type(value: Any, name: str) -> bool:
    if name == "null":
        return value is None
    if isinstance(value, bool):  # in Python a bool is an int
        return name == "boolean"
    return isinstance(value, _JSON_TYPES.get(name, object))


def _finite(text: str) -> float:
    """Convert a JSON number; refuse NaN, infinity and 1e999, which Python would read and JSON does not have."""
    if not math.isfinite(float(text)):
        raise ValueError(f"{text} is not a finite number")
    return float(text)
