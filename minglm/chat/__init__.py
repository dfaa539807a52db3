"""Conversations: messages to tokens and loss mask, and sampled tokens back to messages (paper section 3.1)."""

from minglm.chat.parser import FormatError, Parser, parse
from minglm.chat.stream import StreamDecoder
from minglm.chat.template import Rendered, continuation, render, render_text

__all__ = [
    "FormatError",
    "Parser",
    "Rendered",
    "StreamDecoder",
    "continuation",
    "parse",
    "render",
    "render_text",
]
