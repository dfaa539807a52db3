"""Cut a choice's deltas into blocks: reasoning, text, calls, one after the other (no section in the paper).

    {"reasoning_content"}, {"content"}, {"tool_calls"}  ->  begin, more, more, end; begin, more, end

OpenAI's chat API sends deltas; Anthropic's Messages and OpenAI's Responses send blocks, each with a beginning
and an end. What a stream has sent cannot be taken back, so a withdrawn block ends where it is, and its text
follows in a block of text. It is not among the blocks of the answer; a response that is not streamed never
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
    """A part of an answer. number: its place, from 0. text: so far; of a call its arguments, as JSON.

    withdrawn: it does not count.
    """

    kind: BlockKind
    number: int
    text: str = ""
    call_id: str = ""
    name: str = ""
    withdrawn: bool = False


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
        self._blocks: list[Block] = []
        self._open: Block | None = None

    @property
    def blocks(self) -> list[Block]:
        """Return the blocks of the answer so far."""
        return [block for block in self._blocks if not block.withdrawn]

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
            self._withdraw(delta["withdrawn"])
            yield from self.end()

    def end(self) -> Iterator[BlockEvent]:
        """End the block that is open."""
        if self._open is not None:
            yield BlockEvent(Happening.END, self._open)
            self._open = None

    def _withdraw(self, field: str) -> None:
        """Mark the blocks that no longer count: all of the reasoning, or the last call."""
        if field == "reasoning_content":
            kind = BlockKind.REASONING
            withdrawn = [block for block in self._blocks if block.kind is kind]
        else:
            calls = [block for block in self.blocks if block.kind is BlockKind.CALL]
            withdrawn = calls[-1:]
        for block in withdrawn:
            block.withdrawn = True

    def _begin(self, kind: BlockKind, call_id: str = "", name: str = "") -> Iterator[BlockEvent]:
        yield from self.end()
        self._open = Block(kind, len(self._blocks), call_id=call_id, name=name)
        self._blocks.append(self._open)
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
