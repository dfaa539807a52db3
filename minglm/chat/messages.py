"""Types of a conversation: messages, tool calls, and what a tokenizer must offer (no section in the paper).

Messages are plain dicts, as in OpenAI's API. What the parser returns is an `AssistantMessage`, whose keys are
all present; what the template reads is any mapping with a "role", whose other keys may be absent.
"""

import itertools
from collections.abc import Mapping, Sequence
from typing import Any, Literal, Protocol, TypedDict, TypeVar

Message = Mapping[str, Any]
"""A message: {"role", "content", "reasoning_content", "tool_calls", "error"}; only "role" is required."""

Tool = Mapping[str, Any]
"""The JSON schema of a function, bare or as {"type": "function", "function": {...}}."""


AnyMessage = TypeVar("AnyMessage", bound=Message)


def in_order_of_calls(messages: Sequence[AnyMessage]) -> list[AnyMessage]:
    """Return the messages with the results of each turn's calls in the order of the calls, by their ids.

    Clients tell a result by its tool_call_id, and may send what came first, first. The template has no ids: there the
    first result is that of the first call. Results stay as they came where an id is missing or of no call.
    """
    ordered: list[AnyMessage] = []
    calls: list[Any] = []
    for is_result, run in itertools.groupby(
        messages, lambda message: message.get("role") == "tool"
    ):
        found = list(run)
        if is_result and all(message.get("tool_call_id") in calls for message in found):
            found.sort(key=lambda message: calls.index(message.get("tool_call_id")))
        ordered += found
        calls = [call.get("id") for call in found[-1].get("tool_calls") or () if "id" in call]
    return ordered


class ToolCall(TypedDict):
    """A call that the model has written, with its arguments as Python values."""

    name: str
    arguments: dict[str, Any]


class AssistantMessage(TypedDict):
    """A sampled turn. `error` is None, or the name of the first format fault."""

    role: Literal["assistant"]
    content: str
    reasoning_content: str
    tool_calls: list[ToolCall]
    error: str | None


class ChatTokenizer(Protocol):
    """The part of `minglm.data.tokenizer.Tokenizer` that turns a conversation into ids."""

    @property
    def special(self) -> Mapping[str, int]:
        """Return {name: id} of the special tokens."""
        ...

    def encode(self, text: str) -> list[int]:
        """Return the ids of plain text; they never contain a special token."""
        ...


class ByteDecoder(Protocol):
    """The part of `minglm.data.tokenizer.Tokenizer` that turns ids into bytes."""

    @property
    def special(self) -> Mapping[str, int]:
        """Return {name: id} of the special tokens."""
        ...

    def bytes(self, ids: Sequence[int]) -> bytes:
        """Return the bytes that the ids spell; special tokens are spelled as their names."""
        ...
