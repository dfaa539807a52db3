"""Decode sampled tokens into reasoning, content and tool calls, one token at a time (paper section 3.1).

    token -> bytes -> whole UTF-8 characters -> parser -> deltas

There is one decoder for the server, the terminal and rollouts, so they read every turn the same way. A character may span
several tokens; it is passed on when its last byte has come. Bytes that are not valid UTF-8, including half a character
at the end, become U+FFFD, as in `Tokenizer.decode`. `TextDecoder` is the same for text without chat markup.
"""

import codecs
from collections.abc import Sequence

from minglm.chat.messages import AssistantMessage, ByteDecoder, Tool
from minglm.chat.parser import Delta, DeltaKind, Parser


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

    tools, opened: as in `parse`. prefix: text of the turn that the prompt already holds (a forced call).
    """

    def __init__(
        self,
        tokenizer: ByteDecoder,
        tools: Sequence[Tool] | None = None,
        opened: bool = False,
        prefix: str = "",
    ) -> None:
        super().__init__(tokenizer)
        self.parser = Parser(tools, opened)
        self.parser.feed(prefix)

    def flush(self) -> list[Delta]:
        """End the turn, and return the deltas that were held back."""
        return super().flush() + self.parser.flush()

    def finish(self) -> AssistantMessage:
        """End the turn, and return its message."""
        self.flush()
        return self.parser.finish()

    def _read(self, text: str) -> list[Delta]:
        return self.parser.feed(text)


def decode_turn(
    tokenizer: ByteDecoder,
    tokens: Sequence[int],
    tools: Sequence[Tool] | None = None,
    opened: bool = False,
) -> AssistantMessage:
    """Return the message of a whole sampled turn, its stop token included."""
    decoder = StreamDecoder(tokenizer, tools, opened)
    decoder.feed_all(tokens)
    return decoder.finish()
