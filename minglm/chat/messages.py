"""Types of a conversation: messages, tool calls, and what a tokenizer must offer (no section in the paper).

Messages are plain dicts, as in OpenAI's API. What the parser returns is an `AssistantMessage`, whose keys are
all present; what the template reads is any mapping with a "role", whose other keys may be absent.
"""

from collections.abc import Mapping, Sequence
from typing import Any, Literal, Protocol, TypedDict

Message = Mapping[str, Any]
"""A message: {"role", "content", "reasoning_content", "tool_calls", "error"}; only "role" is required."""

Tool = Mapping[str, Any]
"""The JSON schema of a function, bare or as {"type": "function", "function": {...}}."""


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
