"""Cut a choice's deltas into blocks: reasoning, text, calls, one after the other (no section in the paper).

    {"reasoning_content"}, {"content"}, {"tool_calls"}  ->  begin, more, more, end; begin, more, end

OpenAI's chat API sends deltas; Anthropic's Messages and OpenAI's Responses send blocks, each with a beginning and an end.
What a stream has sent cannot be taken back, so a withdrawn block ends where it is; a response that is not streamed never
holds it.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, NamedTuple

from minglm.serve.stream import Delta

JSONObject = dict[str, Any]


class BlockKind(StrEnum):
    """What a block holds."""

    REASONING = "reasoning"
    TEXT = "text"
    CALL = "call"


@dataclass
class Block:
    """A part of an answer. number: its place, from 0. text: so far; of a call its arguments, as JSON."""

    kind: BlockKind
    number: int
    text: str = ""
    call_id: str = ""
    name: str = ""


class Happening(StrEnum):
    """What a delta does to a block."""

    BEGIN = "begin"
    MORE = "more"
    END = "end"


class BlockEvent(NamedTuple):
    """A step of a block."""

    happening: Happening
    block: Block
    text: str = ""
    """What has been added."""


class BlockReader:
    """Reads the deltas of one choice."""

    def __init__(self) -> None:
        self.blocks: list[Block] = []
        self._open: Block | None = None

    def read(self, delta: Delta) -> Iterator[BlockEvent]:
        """Yield what a delta does."""
        for field, kind in (
            ("reasoning_content", BlockKind.REASONING),
            ("content", BlockKind.TEXT),
        ):
            if delta.get(field):
                if self._open is None or self._open.kind is not kind:
                    yield from self._begin(kind)
                yield from self._more(delta[field])
        for fragment in delta.get("tool_calls") or ():
            function = fragment["function"]
            if "id" in fragment:
                yield from self._begin(BlockKind.CALL, fragment["id"], function["name"])
            if function.get("arguments"):
                yield from self._more(function["arguments"])
        if "withdrawn" in delta:
            yield from self.end()

    def end(self) -> Iterator[BlockEvent]:
        """End the block that is open."""
        if self._open is not None:
            yield BlockEvent(Happening.END, self._open)
            self._open = None

    def _begin(self, kind: BlockKind, call_id: str = "", name: str = "") -> Iterator[BlockEvent]:
        yield from self.end()
        self._open = Block(kind, len(self.blocks), call_id=call_id, name=name)
        self.blocks.append(self._open)
        yield BlockEvent(Happening.BEGIN, self._open)

    def _more(self, text: str) -> Iterator[BlockEvent]:
        if self._open is not None:
            self._open.text += text
            yield BlockEvent(Happening.MORE, self._open, text)


def blocks_of(message: JSONObject) -> list[Block]:
    """Return the blocks of a whole assistant message."""
    reader = BlockReader()
    for field in ("reasoning_content", "content"):
        list(reader.read({field: message.get(field)}))
    list(reader.read({"tool_calls": message.get("tool_calls")}))
    return reader.blocks
