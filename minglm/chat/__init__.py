"""Conversations (paper section 3.1): messages to tokens and loss mask, and sampled text back to messages."""

from minglm.chat.parser import Parser, parse
from minglm.chat.template import Rendered, continuation, render, render_text

__all__ = ["Parser", "Rendered", "continuation", "parse", "render", "render_text"]
