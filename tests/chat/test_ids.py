"""Turns are read by ids: a special token is a tag, text that spells one is text; what is sent back renders the same."""

import json
import sys

import pytest
from helpers.scripted import byte_tokenizer, word_tokenizer
from hypothesis import given
from hypothesis import strategies as st

from minglm.chat import Parser, parse, render
from minglm.chat.parser import CONTROL_TAGS, TEXT_TAGS, DeltaKind, Tag
from minglm.chat.stream import StreamDecoder, decode_turn, turn_pieces
from minglm.chat.template import DIALECTS, STOPS, TAGS
from minglm.data.tokenizer import SPECIAL_TOKENS
from minglm.rewards.pathology import detect
from minglm.testing.chat import (
    TOOLS,
    as_sent_by_a_client,
    assistant_messages,
    check_deltas,
    explain_difference,
)

BYTES = byte_tokenizer()
WORDS = word_tokenizer()
SINGLE = {WORDS.bytes([token])[0]: token for token in range(256)}
ASK = {"role": "user", "content": "?"}
SPELLED = ["a", " ", "\n", "é", "<", "5", *SPECIAL_TOKENS, "</arg_value></tool_call>"]
texts = st.lists(st.sampled_from(SPELLED), max_size=8).map("".join)


def ids_of(tokenizer, *pieces):
    """Return the ids of pieces: text in ordinary tokens, tags as special ones."""
    ids = []
    for piece in pieces:
        ids += (
            [tokenizer.special[piece.name]] if isinstance(piece, Tag) else tokenizer.encode(piece)
        )
    return ids


def one_by_one(piece):
    """Return the ids of a piece, text byte by byte, as `encode` would not write it."""
    return ids_of(WORDS, piece) if isinstance(piece, Tag) else [SINGLE[b] for b in piece.encode()]


def tags(text):
    """Return the pieces of a text, in which `{name}` stands for a special token and all else is ordinary."""
    pieces = []
    for part in text.split("{"):
        name, closed, rest = part.partition("}")
        pieces += [Tag(name), rest] if closed else [part]
    return [piece for piece in pieces if piece]


def test_every_special_token_is_known():
    """Each special token is a tag, a control token or part of a text; only the switch in the user's turn is none."""
    known = {*TAGS, *CONTROL_TAGS, *TEXT_TAGS, "/nothink"}
    assert known == set(SPECIAL_TOKENS)


@given(reasoning=texts, content=texts, value=texts, opened=st.booleans())
@pytest.mark.parametrize("strict", [True, False])
def test_text_that_spells_a_tag_is_text(strict, reasoning, content, value, opened):
    """Any text in ordinary tokens is read as it is: in the reasoning, in the content and in a value, and no fault."""
    pieces = [reasoning, Tag("</think>"), content, Tag("<tool_call>"), "act", Tag("<arg_key>")]
    pieces += ["text", Tag("</arg_key>"), Tag("<arg_value>"), value, Tag("</arg_value>")]
    pieces += [Tag("</tool_call>"), Tag("<|observation|>")]
    if not opened:
        pieces.insert(0, Tag("<think>"))
    message = decode_turn(WORDS, ids_of(WORDS, *pieces), TOOLS, opened, strict)
    assert message["reasoning_content"] == reasoning.strip()
    assert message["content"] == content.strip()
    assert message["tool_calls"] == [{"name": "act", "arguments": {"text": value}}]
    assert message["error"] is None


@pytest.mark.parametrize("letters", ["Use the <tool_call> tag.", "GLM ends with <|user|> here."])
def test_rewards_read_ids_too(letters):
    """The detector of broken format takes prose that names a tag for prose where it is given the pieces."""
    ids = ids_of(BYTES, letters, Tag("<|user|>"))
    assert not detect(BYTES.decode(ids), pieces=turn_pieces(BYTES, ids))["format"]
    special = ids_of(BYTES, "a", Tag("<tool_call>"), "b", Tag("<|user|>"))
    assert detect(BYTES.decode(special), pieces=turn_pieces(BYTES, special))["format"]


@given(st.lists(st.sampled_from([*SPELLED, *map(Tag, SPECIAL_TOKENS)]), max_size=14), st.booleans())
def test_any_split_of_any_turn(pieces, opened):
    """Random pieces never raise, and token by token give the message of the whole, with deltas that add up to it."""
    ids = ids_of(BYTES, *pieces)
    for strict in (True, False):
        whole = decode_turn(BYTES, ids, TOOLS, opened, strict)
        decoder = StreamDecoder(BYTES, TOOLS, opened, strict=strict)
        deltas = [delta for token in ids for delta in decoder.feed(token)] + decoder.flush()
        assert decoder.finish() == whole
        check_deltas(deltas, whole)


@pytest.mark.parametrize("dialect", DIALECTS)
@given(data=st.data(), thinking=st.booleans(), calls=st.booleans())
def test_an_answer_that_is_sent_back(dialect, data, thinking, calls):
    """A canonical turn renders to the very ids; one with its own white space, tokens or numbers has a reason not to."""
    message = data.draw(assistant_messages(calls=calls, pieces=tuple(SPELLED)))
    if not thinking:
        message["reasoning_content"] = ""
    own = data.draw(st.sampled_from(["nothing", "tokens", "white space", "numbers", "reasoning"]))
    if dialect == "glm-4.7" and thinking and own != "reasoning":
        message["reasoning_content"] = message["reasoning_content"] or "r"
    options = {"tools": TOOLS, "thinking": thinking, "dialect": dialect}
    prompt = render(WORDS, [ASK], generation_prompt=True, **options).ids
    turn = render(WORDS, [ASK, message], **options).ids[len(prompt) :]
    pieces = turn_pieces(WORDS, turn)
    if own == "tokens":
        turn = [token for piece in pieces for token in one_by_one(piece)]
    elif own == "white space":
        turn = ids_of(WORDS, *[f" {p}\n" if p == message["content"] else p for p in pieces])
    elif own == "numbers":
        pieces = [f"{p}.0" if isinstance(p, str) and p.isdecimal() else p for p in pieces]
        turn = ids_of(WORDS, *pieces)
    opened = prompt[-1] == WORDS.special["<think>"]
    read = decode_turn(WORDS, turn, TOOLS, opened)
    again = render(WORDS, [ASK, as_sent_by_a_client(read)], **options).ids
    why = explain_difference(WORDS, prompt + turn, again, read)
    if own == "nothing":
        assert why is None and read["error"] is None


def test_differences_are_explained():
    """Each reason is found, and a difference without one is a fault of the template or the parser."""
    message = {**parse("x"), "content": "ab"}
    two = BYTES.encode("ab")
    assert explain_difference(BYTES, two, two, message) is None
    merged = next(t for t in range(256, WORDS.vocab_size) if len(WORDS.bytes([t])) == 2)
    single = [SINGLE[byte] for byte in WORDS.bytes([merged])]
    assert "other tokens" in explain_difference(WORDS, single, [merged], message)
    assert "white space" in explain_difference(BYTES, BYTES.encode("a \nb"), two, message)
    faulty = message | {"error": "stray_tag"}
    assert "stray_tag" in explain_difference(BYTES, BYTES.encode("xy"), two, faulty)
    with pytest.raises(AssertionError, match="no reason"):
        explain_difference(BYTES, BYTES.encode("xy"), two, message)


# A call whose tags are left out, said twice, or replaced by `<tool_call>`, one at a time.
CALL = tags(
    "{<tool_call>}act\n{<arg_key>}text{</arg_key>}{<arg_value>}cats{</arg_value>}"
    "{<arg_key>}count{</arg_key>}{<arg_value>}5{</arg_value>}{</tool_call>}{<|observation|>}"
)
MEANT = [{"name": "act", "arguments": {"text": "cats", "count": 5}}]
PLACES = [i for i, piece in enumerate(CALL) if isinstance(piece, Tag) and 0 < i < len(CALL) - 1]
MUTATIONS = {
    "missing": lambda tag: [],
    "twice": lambda tag: [tag, tag],
    "replaced": lambda tag: [Tag("<tool_call>")],
}


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("mutation", MUTATIONS)
def test_a_tag_that_is_missing_doubled_or_wrong(place, mutation):
    """No single wrong tag passes in silence: a reward takes no call; a client gets what was meant, or the text."""
    tag = CALL[place]
    pieces = [*CALL[:place], *MUTATIONS[mutation](tag), *CALL[place + 1 :]]
    ids = ids_of(BYTES, *pieces)
    if mutation == "twice" and tag.name == "</tool_call>":
        assert decode_turn(BYTES, ids, TOOLS)["error"] == "stray_tag"
        return
    strict = decode_turn(BYTES, ids, TOOLS)
    assert strict["error"] is not None and strict["tool_calls"] == []
    served = decode_turn(BYTES, ids, TOOLS, strict=False)
    assert served["error"] is not None
    repaired = served["tool_calls"] == MEANT
    assert repaired or "<tool_call>" in served["content"], served
    opening = tag.name in ("<arg_key>", "<arg_value>")
    first_key = place == PLACES[0]  # name and key are on one line in the dialect without newlines
    if mutation == "missing" and not first_key:
        assert repaired, served
    if mutation == "replaced" and opening:
        assert repaired, served


def test_a_call_inside_the_reasoning():
    """The reasoning ends at the call, which is read and named; what follows is content."""
    for end, content in (
        ([], ""),
        ([Tag("<|observation|>")], ""),
        ([Tag("</think>")], ""),
        ([Tag("</think>"), "b"], "b"),
    ):
        ids = ids_of(BYTES, Tag("<think>"), "a", *CALL[:-1], *end)
        message = decode_turn(BYTES, ids, TOOLS)
        assert (message["reasoning_content"], message["error"]) == ("a", "call_in_think")
        assert (message["tool_calls"], message["content"]) == (MEANT, content)


def test_reasoning_without_an_end():
    """What a stop token ends was the answer; what was cut off stays reasoning."""
    for stop in STOPS:
        ids = ids_of(BYTES, "The answer is 42.", Tag(stop))
        message = decode_turn(BYTES, ids, opened=True)
        assert (message["reasoning_content"], message["content"]) == ("", "The answer is 42.")
        cut = decode_turn(BYTES, ids[:-1], opened=True)
        assert (cut["reasoning_content"], cut["content"]) == ("The answer is 42.", "")
        assert message["error"] == cut["error"] == "unclosed_think"


def test_a_second_opening_tag_is_dropped():
    """`<think>` after a prompt that already opened the reasoning is no part of it."""
    message = decode_turn(BYTES, ids_of(BYTES, *tags("{<think>}a{</think>}b")), opened=True)
    assert (message["reasoning_content"], message["content"]) == ("a", "b")
    assert message["error"] == "stray_tag"


@pytest.mark.parametrize("name", sorted(set(CONTROL_TAGS) - set(STOPS)))
def test_control_tokens_have_no_place_in_an_answer(name):
    """Each is named."""
    assert decode_turn(BYTES, ids_of(BYTES, "hi", Tag(name)))["error"] == "stray_tag"


@given(st.integers(1, len(CALL) - 2))
def test_the_text_of_a_call_that_is_cut_is_kept(end):
    """A call without its end is content, letter by letter, beside the error."""
    ids = ids_of(BYTES, "so ", *CALL[:end])
    message = decode_turn(BYTES, ids, TOOLS, strict=False)
    assert message["content"] == BYTES.decode(ids).strip()
    assert (message["tool_calls"], message["error"]) == ([], "unclosed_tool_call")


def test_a_tool_that_was_not_offered_is_not_served():
    """Its text is content."""
    ids = ids_of(BYTES, *tags("{<tool_call>}fly\n{</tool_call>}"))
    for strict in (True, False):
        message = decode_turn(BYTES, ids, TOOLS, strict=strict)
        assert message["tool_calls"] == [] and message["error"] == "unknown_tool"
        assert message["content"] == BYTES.decode(ids)


@given(st.text(st.sampled_from('aé"\\\n漢<'), min_size=20, max_size=60), st.booleans())
def test_a_string_argument_streams(text, optional):
    """The fragments come while the value does, one for nearly every character, and join to the whole."""
    text = "a" + text
    key = "note" if optional else "text"
    pieces = tags("{<tool_call>}act{<arg_key>}" + key + "{</arg_key>}{<arg_value>}")
    decoder = StreamDecoder(BYTES, TOOLS)
    before = decoder.feed_all(ids_of(BYTES, *pieces))
    during = [delta for token in BYTES.encode(text) for delta in decoder.feed(token)]
    assert len(during) >= len(text)
    after = decoder.feed_all(ids_of(BYTES, *tags("{</arg_value>}{</tool_call>}")))
    joined = [d.text for d in before + during + after if d.kind is DeltaKind.ARGUMENTS]
    assert json.loads("".join(joined)) == {key: text}


PIECES = (
    *("<tool_call>f</tool_call>", "<tool_call>f", "<arg_key>a", "<arg_key>a</arg_key>"),
    *("</arg_value>", "</arg_value> ", "</tool_call>", "<think>", " ", "ab <"),
)


LONGEST_TAG = max(map(len, (*TAGS, *CONTROL_TAGS)))


def lines_of(parser, opening, piece, count):
    """Return how many lines of Python a parser runs for many pieces; check that it keeps few letters to read again."""
    lines = 0

    def trace(frame, event, argument):
        nonlocal lines
        lines += event == "line"
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        parser.feed(opening)
        for _ in range(count):
            parser.feed(piece)
            assert len(parser._held) < LONGEST_TAG
        parser.finish()
    finally:
        sys.settrace(before)
    return lines


@pytest.mark.parametrize("piece", PIECES)
@pytest.mark.parametrize("opening", ["", "<think>", "<tool_call>f<arg_key>x</arg_key><arg_value>"])
def test_the_cost_is_linear(opening, piece):
    """Eight times the pieces run eight times the lines, within a tenth, never sixty-four."""
    few, many = (lines_of(Parser(strict=False), opening, piece, count) for count in (100, 800))
    assert many < 1.1 * 8 * few


class Forgetful(Parser):
    """A twin that reads the whole turn again for every piece."""

    def __init__(self, strict):
        super().__init__(strict=strict)
        self.text = ""

    def feed(self, text):
        self.text += text
        super().__init__(strict=self.strict)
        for letter in self.text:
            super().feed(letter)


class Waiting(Parser):
    """A twin that keeps all letters until the end."""

    def feed(self, text):
        self._held += text


@pytest.mark.parametrize("twin", [Forgetful, Waiting])
def test_twins_whose_cost_is_not_linear_are_found(twin):
    """By the lines that they run, or by the letters that they keep."""
    with pytest.raises(AssertionError):
        few, many = (lines_of(twin(strict=False), "", "ab <", count) for count in (10, 80))
        assert many < 1.1 * 8 * few
