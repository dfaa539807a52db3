"""The stream decoder: tokens to deltas and a message, for any text and any tokens."""

from helpers.scripted import byte_tokenizer, spelled, word_tokenizer
from hypothesis import given
from hypothesis import strategies as st

from minglm.chat.parser import DeltaKind, parse
from minglm.chat.stream import StreamDecoder, TextDecoder, decode_turn
from minglm.testing.chat import TOOLS, check_deltas

BYTES = byte_tokenizer()
WORDS = word_tokenizer()

PIECES = [
    "a",
    "é",
    "漢",
    " ",
    "<",
    "<think>",
    "</think>",
    "<tool_call>act\n</tool_call>",
    "<|user|>",
]


@given(st.lists(st.sampled_from(PIECES), max_size=12).map("".join), st.booleans())
def test_the_deltas_add_up_to_the_message(text, opened):
    """Token by token, the deltas joined are the message, which is that of the whole text."""
    decoder = StreamDecoder(BYTES, TOOLS, opened)
    deltas = []
    for token in spelled(BYTES, text):
        deltas += decoder.feed(token)
    deltas += decoder.flush()
    message = decoder.finish()
    assert message == parse(text, TOOLS, opened)
    assert message == decode_turn(BYTES, spelled(BYTES, text), TOOLS, opened)
    check_deltas(deltas, message)


@given(st.lists(st.integers(0, WORDS.vocab_size - 1), max_size=30))
def test_any_tokens_read_as_their_text(ids):
    """Random ids, half characters among them, give the message of the decoded text, and never raise."""
    assert decode_turn(WORDS, ids, TOOLS) == parse(WORDS.decode(ids), TOOLS)
    decoder = TextDecoder(WORDS)
    deltas = [delta for token in ids for delta in decoder.feed(token)] + decoder.flush()
    assert "".join(delta.text for delta in deltas) == WORDS.decode(ids)
    assert all(delta.kind is DeltaKind.CONTENT and delta.text for delta in deltas)


def test_a_character_of_several_tokens_comes_whole():
    """The first bytes of a character are held back; at the end half a character becomes U+FFFD."""
    decoder = StreamDecoder(BYTES)
    first, second, third = spelled(BYTES, "漢")
    assert decoder.feed(first) == decoder.feed(second) == []
    assert [delta.text for delta in decoder.feed(third)] == ["漢"]
    assert decoder.feed(first) == []
    assert decoder.finish()["content"] == "漢\ufffd"


def test_a_forced_call_begins_in_the_prompt():
    """The prefix is part of the message, and no delta repeats it."""
    decoder = StreamDecoder(BYTES, TOOLS, prefix="<tool_call>act\n")
    deltas = [delta for token in spelled(BYTES, "</tool_call>") for delta in decoder.feed(token)]
    begins, arguments, whole = deltas
    assert (begins.text, arguments.text) == ("act", "{}")
    assert whole.call == {"name": "act", "arguments": {}}
    assert decoder.finish()["tool_calls"] == [{"name": "act", "arguments": {}}]
