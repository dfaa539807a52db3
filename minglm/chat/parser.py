"""Sampled text back to an assistant message, while it streams (paper section 3.1, figure 4).

    text = <think>reasoning</think> content call call ... stop
    call = <tool_call>name <arg_key>key</arg_key> <arg_value>value</arg_value> ... </tool_call>

A small state machine reads the next tag that matters in its state, and holds back what may still become one. So any
split of the stream gives the same message as the whole text. Nothing the model writes raises: what is not a proper
message has a name from ERRORS in message["error"] (the first one met), strict enough to be a format reward.

Choices, and why:
- `tool_calls` holds every call that is complete, also one that breaks its schema (unknown tool, missing argument, a
  number that is none: its value stays text), because a client may want to answer it. Broken markup gives no call.
- An argument is typed by the tool's schema: a string stays as it is written, anything else is JSON. Without a schema
  it is JSON when it parses, else text.
- White space between tags does not matter, so the 4.7 dialect, which has no newlines, reads the same. Its prompt
  already holds `<think>`, which `opened` says.
- In an argument value only position tells a tag from data: `</arg_value>` closes when `<arg_key>` or `</tool_call>`
  comes next. A value may so hold any other tag, as it does when the model edits code about tags.
- A stop token ends the message wherever it stands, except inside a value, where it is text that spells one: a real
  one would have stopped the engine.
- Reasoning, and content, are stripped at both ends, as the template strips them.

Simplified: schemas are read one level deep (the type of each argument, which are required), not validated in full.
"""

import json
import math
import re
from functools import lru_cache

from minglm.chat.template import ROLES, STOPS, TAGS

ERRORS = {
    "unclosed_think": "reasoning has no end",
    "unclosed_tool_call": "the text ends inside a tool call",
    "bad_tool_call": "a tool call whose tags or name are malformed",
    "unknown_tool": "a call to a tool that was not offered",
    "missing_argument": "a required argument is absent",
    "unknown_argument": "an argument that the tool's schema does not list",
    "bad_argument": "an argument given twice, or whose value does not fit its type",
    "stray_tag": "a tag where none belongs",
    "text_after_call": "content after a tool call",
}

_TYPES = {
    "integer": int,
    "number": (int, float),
    "boolean": bool,
    "array": list,
    "object": dict,
    "string": str,
}
_NAME = re.compile(r"[\w.:/-]+")
_ALL_TAGS = (*TAGS, "<tool_response>", "</tool_response>", *ROLES.values(), "<|endoftext|>")

# Inside a call: (part, the tag that ends it) to the part that follows.
_NEXT = {
    ("name", "<arg_key>"): "key",
    ("name", "</tool_call>"): "end",
    ("key", "</arg_key>"): "gap",
    ("gap", "<arg_value>"): "value",
    ("after", "<arg_key>"): "key",
    ("after", "</tool_call>"): "end",
}


def parse(text, tools=None, opened=False):
    """Sampled text (after the generation prompt) to {"role", "content", "reasoning_content", "tool_calls", "error"}.

    Special tokens stand in `text` literally; a stop token at its end is dropped. tools: the JSON-schema function
    objects that were offered; an empty list means that no call is right, None that nothing is known about them.
    opened: the prompt ended with `<think>`, so the text begins with reasoning (4.7 with thinking on).
    error: None, or a key of ERRORS. Never raises.
    """
    parser = Parser(tools, opened)
    parser.feed(text)
    return parser.close()


class Parser:
    """Incremental `parse`: `feed` text as it comes, `close` for the message. `done` once a stop token has come.

    feed returns events: ("reasoning", text), ("content", text), ("call", {"name", "arguments"}); the texts of a kind
    joined are the message's. A last piece may be held back until `finish`, which returns the events that remain.
    Raises ValueError for a tool without a name.
    """

    def __init__(self, tools=None, opened=False):
        self.schemas = None if tools is None else dict(_schema(tool) for tool in tools)
        self.texts, self.calls, self.error, self.done = (
            {"reasoning": [], "content": []},
            [],
            None,
            False,
        )
        self._state, self._buffer, self._events = self._reasoning if opened else self._start, "", []
        self._blank = ""  # white space that counts only if text follows
        self._part, self._piece, self._name, self._pairs = (
            None,
            [],
            None,
            [],
        )  # of the call that is being read

    def feed(self, text):
        """Read more text; returns the events it settles."""
        self._buffer += text
        while not self.done and self._state():
            pass
        events, self._events = self._events, []
        return events

    def finish(self):
        """The text has ended: settle what was held back, and return its events."""
        if self._state == self._start:
            self._state = self._content
        if not self.done and self._state == self._reasoning:
            self._say("reasoning", self._buffer)
            self._fail("unclosed_think")
        elif not self.done and self._state == self._content:
            self._say("content", self._buffer)
        elif not self.done:
            self._fail("unclosed_tool_call")
        self.done = True
        return self.feed("")

    def close(self):
        """Finish, and return the message."""
        self.finish()
        return {
            "role": "assistant",
            "content": "".join(self.texts["content"]),
            "reasoning_content": "".join(self.texts["reasoning"]),
            "tool_calls": self.calls,
            "error": self.error,
        }

    # Each state takes one step through the buffer and returns whether another step may be possible.

    def _start(self):
        rest = self._buffer.lstrip()
        if len(rest) < len("<think>") and "<think>".startswith(rest):
            return False  # only blanks yet, or the first letters of the tag
        self._state = self._content
        if rest.startswith("<think>"):
            self._state, self._buffer = self._reasoning, rest.removeprefix("<think>")
        return True

    def _reasoning(self):
        text, tag = self._take(("<think>", "</think>", *STOPS))
        self._say("reasoning", text)
        if tag == "</think>":
            self._state = self._content
        elif tag == "<think>":
            self._fail("stray_tag")
            self._say("reasoning", tag)
        elif tag:
            self._fail("unclosed_think")
            self.done = True
        return tag

    def _content(self):
        text, tag = self._take(_ALL_TAGS)
        self._say("content", text)
        if tag == "<tool_call>":
            self._open_call()
        elif tag in STOPS:
            self.done = True
        elif tag:
            self._fail("stray_tag")
            self._say("content", tag)
        return tag

    def _call(self):
        """Name, keys and what stands between the tags; values are read by `_value`."""
        text, tag = self._take(_ALL_TAGS)
        self._piece.append(text)
        if tag is None:
            return False
        if tag in STOPS:
            self._fail("unclosed_tool_call")
            self.done = True
            return False
        text, part = "".join(self._piece).strip(), self._part
        proper = {"name": _NAME.fullmatch(text), "key": text}.get(part, not text)
        if not proper or (part, tag) not in _NEXT:
            self._fail("bad_tool_call")
            self._state, self._buffer = self._broken, tag + self._buffer
            return True
        self._part, self._piece = _NEXT[part, tag], []
        if part == "name":
            self._name = text
        elif part == "key":
            self._pairs.append((text, ""))
        if self._part == "value":
            self._state = self._value
        elif self._part == "end":
            self._close_call()
        return True

    def _value(self):
        text, tag = self._take(("</arg_value>",))
        self._piece.append(text)
        if tag is None:
            return False
        rest = self._buffer.lstrip()
        if rest.startswith(("<arg_key>", "</tool_call>")):
            self._pairs[-1] = (self._pairs[-1][0], "".join(self._piece))
            self._state, self._part, self._piece = self._call, "after", []
        elif "<arg_key>".startswith(rest) or "</tool_call>".startswith(rest):
            self._buffer = (
                tag + self._buffer
            )  # what follows decides whether this tag ends the value
            return False
        else:
            self._piece.append(tag)
        return True

    def _broken(self):
        """Skip the rest of a malformed call."""
        _, tag = self._take(("<tool_call>", "</tool_call>", *STOPS))
        if tag == "<tool_call>":
            self._open_call()
        elif tag == "</tool_call>":
            self._state = self._content
        elif tag:
            self.done = True
        return tag

    def _open_call(self):
        self._state, self._part, self._piece, self._pairs = self._call, "name", [], []

    def _close_call(self):
        arguments, error = _typed_arguments(self._name, self._pairs, self.schemas)
        if error:
            self._fail(error)
        self._state = self._content
        self.calls.append({"name": self._name, "arguments": arguments})
        self._events.append(("call", self.calls[-1]))

    def _take(self, tags):
        """Take (text, tag) off the buffer: up to the first of `tags`, or else all that can be no tag, and None."""
        found = _pattern(tags).search(self._buffer)
        if found:
            text, tag, end = self._buffer[: found.start()], found.group(), found.end()
        else:
            end = self._buffer.rfind("<")
            if end < 0 or not any(tag.startswith(self._buffer[end:]) for tag in tags):
                end = len(self._buffer)
            text, tag = self._buffer[:end], None
        self._buffer = self._buffer[end:]
        return text, tag

    def _say(self, kind, text):
        text = self._blank + text
        if not self.texts[kind]:
            text = text.lstrip()
        said = text.rstrip()
        self._blank = text[len(said) :]
        if said:
            if kind == "content" and self._part:
                self._fail("text_after_call")
            self.texts[kind].append(said)
            self._events.append((kind, said))

    def _fail(self, error):
        self.error = self.error or error


@lru_cache
def _pattern(tags):
    return re.compile("|".join(re.escape(tag) for tag in tags))


def _schema(tool):
    """(name, schema of the arguments) of a function object, bare or inside {"function": ...}."""
    function = tool.get("function") or tool
    if not isinstance(function.get("name"), str):
        raise ValueError(f"a tool needs a name, got {tool!r:.80}")
    return function["name"], function.get("parameters") or {}


def _typed_arguments(name, pairs, schemas):
    """The arguments of a call as Python values, and the first error or None; what does not fit its type stays text."""
    if schemas is None:
        return {key: _typed(text, {})[0] for key, text in pairs}, None
    schema = schemas.get(name, {})
    listed = schema.get("properties") or {}
    arguments, errors = {}, [] if name in schemas else ["unknown_tool"]
    for key, text in pairs:
        value, fits = _typed(text, listed.get(key, {}))
        if key not in listed and name in schemas and not schema.get("additionalProperties"):
            errors.append("unknown_argument")
        elif not fits or key in arguments:
            errors.append("bad_argument")
        arguments[key] = value
    if not set(schema.get("required") or ()) <= set(arguments):
        errors.append("missing_argument")
    return arguments, errors[0] if errors else None


def _typed(text, spec):
    """(value, does it fit) of an argument written as `text`, by the `type` or the alternatives of its schema."""
    types = {
        kind
        for option in (spec, *spec.get("anyOf", ()), *spec.get("oneOf", ()))
        for kind in _listed(option)
    }
    if types == {"string"} or text in spec.get("enum", ()):
        return text, True
    try:
        value = json.loads(text, parse_float=_finite, parse_constant=_finite)
        json.dumps(
            value, ensure_ascii=False
        ).encode()  # an escaped half of a surrogate pair could never be written
    except (ValueError, RecursionError):  # RecursionError: brackets nested thousands deep
        return text, not types or "string" in types
    if (
        isinstance(value, float)
        and value.is_integer()
        and "integer" in types
        and "number" not in types
    ):
        value = int(value)
    if not types or any(_is(value, kind) for kind in types - {"string"}):
        return value, True
    return text, "string" in types


def _listed(spec):
    kinds = spec.get("type") or ()
    return (kinds,) if isinstance(kinds, str) else kinds


def _is(value, kind):
    if kind == "null":
        return value is None
    if isinstance(value, bool):
        return kind == "boolean"
    return isinstance(value, _TYPES.get(kind, object))


def _finite(text):
    """JSON has no NaN and no infinity; Python reads both, and 1e999 too."""
    if not math.isfinite(float(text)):
        raise ValueError(f"{text} is not a finite number")
    return float(text)
