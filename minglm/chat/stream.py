"""Decode sampled tokens into reasoning, content and tool calls, one token at a time (paper section 3.1).

    token -> a tag, if it is special -> parser -> deltas
    token -> bytes -> whole UTF-8 characters -> text -> parser -> deltas

There is one decoder for the server, the terminal and rollouts, so they read every turn the same way, by ids:
text that spells a tag is text. A character may span several tokens; it is passed on when its last byte has
come. Bytes that are not valid UTF-8, including half a character at the end, become U+FFFD, as in
`Tokenizer.decode`. `TextDecoder` is the same for text without chat markup.
"""

import codecs
from collections.abc import Iterator, Sequence

from minglm.chat.messages import AssistantMessage, ByteDecoder, Tool
from minglm.chat.parser import TEXT_TAGS, Delta, DeltaKind, Parser, Piece, Tag


class TextDecoder:
    """Tokens to content, for text without chat markup."""

    def __init__(self, tokenizer: ByteDecoder) -> None:
        self.tokenizer = tokenizer
        self._utf8_decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def feed(self, token: int) -> list[Delta]:
        """Read one token, and return the deltas that it settles."""
        return self.feed_all([token])

    def feed_all(self, tokens: Sequence[int]) -> list[Delta]:
        """Read several tokens at once; the deltas joined are those of `feed`, token by token."""
        return self._read(self._utf8_decoder.decode(self.tokenizer.bytes(tokens)))

    def flush(self) -> list[Delta]:
        """End the text, and return the deltas that were held back."""
        return self._read(self._utf8_decoder.decode(b"", final=True))

    def _read(self, text: str) -> list[Delta]:
        return [Delta(DeltaKind.CONTENT, text)] if text else []


class StreamDecoder(TextDecoder):
    """Tokens of an assistant turn to deltas, and to the message that they add up to.

    tools, opened, strict: as in `parse`. prefix: the turn's beginning that the prompt already holds, spelled
    (a forced call). The stop token belongs to the turn: feed it too, because it tells an end from a cut.
    """

    def __init__(
        self,
        tokenizer: ByteDecoder,
        tools: Sequence[Tool] | None = None,
        opened: bool = False,
        prefix: str = "",
        strict: bool = True,
    ) -> None:
        super().__init__(tokenizer)
        self.parser = Parser(tools, opened, strict)
        self._prefix_deltas = self.parser.feed(prefix) if prefix else []
        self._tags = {token: name for name, token in tokenizer.special.items()}

    def feed_all(self, tokens: Sequence[int]) -> list[Delta]:
        """Read several tokens at once; the deltas joined are those of `feed`, token by token."""
        deltas = self._taken_prefix()
        for piece in self.pieces(tokens):
            if isinstance(piece, Tag) and piece.name in TEXT_TAGS:
                piece = piece.name
            deltas += self.parser.read(piece)
        return deltas

    def flush(self) -> list[Delta]:
        """End the turn, and return the deltas that were held back."""
        return self._taken_prefix() + super().flush() + self.parser.flush()

    def finish(self) -> AssistantMessage:
        """End the turn, and return its message."""
        self.flush()
        return self.parser.finish()

    def pieces(self, tokens: Sequence[int]) -> Iterator[Piece]:
        """Yield the text and the tags of some tokens."""
        start = 0
        for index, token in enumerate(tokens):
            if token not in self._tags:
                continue
            # A tag ends whatever character had begun.
            data = self.tokenizer.bytes(tokens[start:index])
            text = self._utf8_decoder.decode(data, final=True)
            if text:
                yield text
            yield Tag(self._tags[token])
            start = index + 1
        text = self._utf8_decoder.decode(self.tokenizer.bytes(tokens[start:]))
        if text:
            yield text

    def _taken_prefix(self) -> list[Delta]:
        """Return the deltas of the prefix once."""
        deltas = self._prefix_deltas
        self._prefix_deltas = []
        return deltas

    def _read(self, text: str) -> list[Delta]:
        return self.parser.read(text) if text else []


def turn_pieces(tokenizer: ByteDecoder, tokens: Sequence[int]) -> list[Piece]:
    """Return the text and the tags of a whole sampled turn."""
    return list(StreamDecoder(tokenizer).pieces(tokens))


def decode_turn(
    tokenizer: ByteDecoder,
    tokens: Sequence[int],
    tools: Sequence[Tool] | None = None,
    opened: bool = False,
    strict: bool = True,
) -> AssistantMessage:
    """Return the message of a whole sampled turn, its stop token included."""
    decoder = StreamDecoder(tokenizer, tools, opened, strict=strict)
    decoder.feed_all(tokens)
    return decoder.finish()
