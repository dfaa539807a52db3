"""Parse a sampled turn into an assistant message, piece by piece (paper section 3.1, figure 4).

    turn = <think>reasoning</think> content call call ... stop
    call = <tool_call>name <arg_key>key</arg_key> <arg_value>value</arg_value> ... </tool_call>

A turn is a sequence of pieces: text, and tags. A tag is a special token, so text that spells one is text; who
has the token ids (`minglm.chat.stream`) always knows which is which. `parse` is for those who have only
letters.

The parser is a coroutine that asks for the next piece, and looks ahead where only what follows decides.
Therefore any split of the stream gives the same message. Nothing the model writes raises an exception: what
is malformed has a `FormatError` in message["error"], the first that was found.

Choices, and why:
- A malformed call is read by the tags that are there: one missing or doubled is supplied. A reward must not pay for
  that, so strict reading (the default) takes no repaired call; lenient reading, for people who are served, does. Both
  name the fault, and both keep the text of a call that is not taken as content.
- A call inside the reasoning ends the reasoning. Reasoning that a stop token ends was the answer; if it is only cut
  off, it stays reasoning.
- A call to a tool that was not offered is not taken. A call whose arguments break the schema is, because a client may
  want to answer it; so `error` alone says whether a turn is well-formed.
- Inside a value only position tells a tag from data: `</arg_value>` closes the value if another argument or the end of
  the call follows. A tag elsewhere is data, and a fault if it is a special token and not letters.
- A string argument streams: its pieces are settled before the call is complete. If the call breaks later, a delta
  withdraws it. Other arguments wait for their end, because only a whole value can be typed.
- An argument that is given twice has its first value.
- White space between tags does not matter, so the 4.7 dialect, which has none, parses the same way. A 4.7 prompt
  already ends with `<think>`; pass `opened=True` for it. Reasoning and content are stripped at both ends, as the template
  strips them.
"""

import json
import re
from collections import deque
from collections.abc import Generator, Mapping, Sequence
from enum import StrEnum
from typing import Any, NamedTuple, TypeVar

from minglm.chat.messages import AssistantMessage, Tool, ToolCall
from minglm.chat.schema import Parameters, parameters_of
from minglm.chat.template import ROLES, STOPS, TAGS

T = TypeVar("T")
Reads = Generator[None, None, T]
"""A part of the parser: it yields when it needs another piece, and returns what it has read."""


class FormatError(StrEnum):
    """A fault in the format of a sampled turn."""

    UNCLOSED_THINK = "unclosed_think"
    """The reasoning has no end."""
    CALL_IN_THINK = "call_in_think"
    """A tool call inside the reasoning."""
    UNCLOSED_TOOL_CALL = "unclosed_tool_call"
    """The turn ends inside a tool call."""
    BAD_TOOL_CALL = "bad_tool_call"
    """The tags or the name of a tool call are malformed."""
    UNKNOWN_TOOL = "unknown_tool"
    """A call to a tool that was not offered."""
    MISSING_ARGUMENT = "missing_argument"
    """A required argument is absent."""
    UNKNOWN_ARGUMENT = "unknown_argument"
    """An argument that the tool's schema does not list."""
    BAD_ARGUMENT = "bad_argument"
    """An argument given twice, or whose value does not fit the schema."""
    STRAY_TAG = "stray_tag"
    """A tag where none belongs."""
    TEXT_AFTER_CALL = "text_after_call"
    """Content after a tool call."""


class DeltaKind(StrEnum):
    """What a piece of a parsed stream adds to the message."""

    REASONING = "reasoning"
    """Text of the reasoning."""
    CONTENT = "content"
    """Text of the content."""
    CALL_BEGINS = "call_begins"
    """The name of a tool call, in `text`."""
    ARGUMENTS = "arguments"
    """A fragment of the JSON text of the arguments of the call that has begun."""
    CALL = "call"
    """The tool call that had begun is complete; it repeats the whole."""
    CALL_WITHDRAWN = "call_withdrawn"
    """The call that had begun is none; its text follows as content."""
    REASONING_WITHDRAWN = "reasoning_withdrawn"
    """All reasoning was content, which follows."""


class Delta(NamedTuple):
    """A piece of the message.

    The texts of one kind, joined, are the message's text of that kind, unless withdrawn.
    """

    kind: DeltaKind
    text: str = ""
    call: ToolCall | None = None
    """The complete call, None for other kinds."""


class Tag(NamedTuple):
    """A special token in a turn."""

    name: str
    letters: bool = False
    """Whether it is only spelled, so that it may be text that speaks of the tag."""


Piece = str | Tag
END = Tag("")
"""Follows the last piece of a turn that has no stop token."""

CONTROL_TAGS = (
    *("<|endoftext|>", "[MASK]", "[gMASK]", "[sMASK]", "<sop>", "<eop>"),
    *ROLES.values(),
    *("<|begin_of_image|>", "<|end_of_image|>", "<|image|>"),
    *("<|begin_of_video|>", "<|end_of_video|>", "<|video|>"),
    *("<|begin_of_audio|>", "<|end_of_audio|>"),
    *("<|begin_of_transcription|>", "<|end_of_transcription|>"),
    *("<|code_prefix|>", "<|code_middle|>", "<|code_suffix|>"),
    *("<tool_response>", "</tool_response>"),
)
"""Special tokens that have no place in an assistant turn, but for the stops."""

TEXT_TAGS = ("<|begin_of_box|>", "<|end_of_box|>")
"""Special tokens that are part of a text: they mark the final answer in it."""

_SPELLED = re.compile("|".join(map(re.escape, (*TAGS, *CONTROL_TAGS))))
_NAME = re.compile(r"[\w.:/-]+")
_END_VALUES = ("<tool_call>", *STOPS)  # special tokens that no value holds
_MAX_KEY = 200  # characters of a key whose opening tag is missing


def parse(
    text: str,
    tools: Sequence[Tool] | None = None,
    opened: bool = False,
    strict: bool = True,
) -> AssistantMessage:
    """Parse sampled text (after the generation prompt) into a message, for those who have no token ids.

    text: whatever spells a special token (`TAGS` and `CONTROL_TAGS`) is read as one, except inside a value,
    where anything but the end of the value is data. Everything from the first stop token on is dropped.
    tools: the JSON-schema function objects that were offered. An empty list means that every call is an
    error; None means that nothing is known about the tools.
    opened: the prompt ended with `<think>`, so the text begins with reasoning (4.7 with thinking on).
    strict: take no call that had to be repaired, as a reward must.
    The message's error is None or a `FormatError`. No text raises an exception.
    """
    parser = Parser(tools, opened, strict)
    parser.feed(text)
    return parser.finish()


class Parser:
    """An incremental parser: give it pieces with `read`, or letters with `feed`, then `finish` it for the message.

    Both return the deltas that are settled. Some may be held back until `flush`, which returns those that
    remain. `done` becomes True at a stop token. Raises ValueError for a tool without a name.
    """

    def __init__(
        self, tools: Sequence[Tool] | None = None, opened: bool = False, strict: bool = True
    ) -> None:
        self.schemas = None if tools is None else dict(_named_parameters(tool) for tool in tools)
        self.strict = strict
        self.texts: dict[DeltaKind, list[str]] = {DeltaKind.REASONING: [], DeltaKind.CONTENT: []}
        self.calls: list[ToolCall] = []
        self.error: FormatError | None = None
        self.done = False
        self._held = ""  # letters that may become a tag
        self._pieces: deque[Piece] = deque()  # not read yet
        self._deltas: list[Delta] = []  # settled since the last piece
        self._blanks: list[
            str
        ] = []  # white space that counts only if text of the same kind follows
        self._call_seen = False  # whether any call has begun
        self._cut_thought = False  # whether a call has ended the reasoning
        self._turn = self._read_turn(opened)
        self._go_on()

    def feed(self, text: str) -> list[Delta]:
        """Read letters, in which tags are spelled, and return the deltas that they settle."""
        text = self._held + text
        at = 0
        for match in _SPELLED.finditer(text):
            self._pieces.append(text[at : match.start()])
            self._pieces.append(Tag(match.group(), letters=True))
            at = match.end()
        end = (
            text.rfind("<", at)
            if text.rfind("<", at) > text.rfind("[", at)
            else text.rfind("[", at)
        )
        if end < 0 or not _begins_a_tag(text[end:]):
            end = len(text)
        self._pieces.append(text[at:end])
        self._held = text[end:]
        return self._go_on()

    def read(self, piece: Piece) -> list[Delta]:
        """Read one piece, and return the deltas that it settles."""
        self._pieces.append(piece)
        return self._go_on()

    def flush(self) -> list[Delta]:
        """End the turn: settle what was held back, and return its deltas."""
        self._pieces += [self._held, END]
        self._held = ""
        return self._go_on()

    def finish(self) -> AssistantMessage:
        """End the turn, and return the message."""
        self.flush()
        return {
            "role": "assistant",
            "content": "".join(self.texts[DeltaKind.CONTENT]),
            "reasoning_content": "".join(self.texts[DeltaKind.REASONING]),
            "tool_calls": self.calls,
            "error": self.error,
        }

    def _go_on(self) -> list[Delta]:
        """Read the pieces that have come, and return the deltas that they settle."""
        if self.done:
            self._pieces.clear()
            return []
        try:
            self._turn.send(None)
        except StopIteration:
            self.done = True
        deltas = self._deltas
        self._deltas = []
        return deltas

    def _next(self) -> Reads[Piece]:
        """Take the next piece."""
        while not self._pieces:
            yield
        return self._pieces.popleft()

    def _peek(self, index: int) -> Reads[Piece]:
        """Return the piece that comes `index` after the next one."""
        while len(self._pieces) <= index:
            yield
        return self._pieces[index]

    def _until_tag(self) -> Reads[tuple[str, Tag]]:
        """Take all text up to the next tag, and the tag."""
        texts: list[str] = []
        while True:
            piece = yield from self._next()
            if isinstance(piece, Tag):
                return "".join(texts), piece
            texts.append(piece)

    def _tag_ahead(self, index: int = 0) -> Reads["_Ahead"]:
        """Look ahead, from piece `index` on, for the next tag; None if the text before it is too long for a key."""
        texts: list[str] = []
        length = 0  # without the white space that it begins with
        while True:
            piece = yield from self._peek(index)
            index += 1
            if isinstance(piece, Tag):
                return _Ahead("".join(texts).strip(), piece, index)
            texts.append(piece)
            length += len(piece) if length else len(piece.lstrip())
            if length > _MAX_KEY:
                return _Ahead("", None, index)

    # The parts of a turn.

    def _read_turn(self, opened: bool) -> Reads[None]:
        if not opened:
            ahead = yield from self._first_tag()
            opened = ahead == "<think>"
            if opened:
                yield from self._until_tag()
        if opened:
            ended = yield from self._read_reasoning()
            if ended:
                return
        yield from self._read_content()

    def _first_tag(self) -> Reads[str]:
        """Look ahead for a tag that begins the turn, "" if text does."""
        index = 0
        while True:
            piece = yield from self._peek(index)
            index += 1
            if isinstance(piece, Tag):
                return piece.name
            if piece.strip():
                return ""

    def _read_reasoning(self) -> Reads[bool]:
        """Read up to the end of the reasoning; return whether it is the end of the turn."""
        kind = DeltaKind.REASONING
        while True:
            piece = yield from self._next()
            if isinstance(piece, str):
                self._say(kind, piece)
            elif piece.name == "</think>":
                self._blanks = []
                return False
            elif piece.name == "<tool_call>":
                self._fail(FormatError.CALL_IN_THINK)
                raw = yield from self._read_call()
                self._say(kind, raw)
                if self.calls:
                    self._blanks = []
                    self._cut_thought = True
                    return False
            elif piece is END:
                self._fail(FormatError.UNCLOSED_THINK)
                return True
            elif piece.name in STOPS:
                self._fail(FormatError.UNCLOSED_THINK)
                self._withdraw_reasoning()
                return True
            else:
                self._fail(FormatError.STRAY_TAG)
                if piece.name != "<think>":  # said twice, it still only opens the reasoning
                    self._say(kind, piece.name)

    def _read_content(self) -> Reads[None]:
        """Read up to the end of the turn."""
        while True:
            piece = yield from self._next()
            if isinstance(piece, str):
                self._say(DeltaKind.CONTENT, piece)
            elif piece.name == "<tool_call>":
                raw = yield from self._read_call()
                self._say(DeltaKind.CONTENT, raw)
            elif piece is END or piece.name in STOPS:
                return
            else:
                self._fail(FormatError.STRAY_TAG)
                if piece.name != "</think>" or not self._cut_thought:
                    self._say(DeltaKind.CONTENT, piece.name)

    def _read_call(self) -> Reads[str]:
        """Read a call, and return its text, empty if it was taken."""
        self._call_seen = True
        call = _Call(self)
        try:
            yield from call.read()
        except _Malformed as fault:
            self._fail(fault.error)
            call.withdraw()
            yield from call.skip()
            return "".join(call.raw)
        if call.take():
            return ""
        call.withdraw()
        return "".join(call.raw)

    # What the parts say.

    def _say(self, kind: DeltaKind, text: str) -> None:
        """Add text to the message, without whitespace at its beginning and, for now, at its end."""
        if not text or text.isspace():
            if self.texts[kind]:
                self._blanks.append(text)
            return
        text = "".join(self._blanks) + text
        if not self.texts[kind]:
            text = text.lstrip()
        stripped = text.rstrip()
        self._blanks = [text[len(stripped) :]]
        if kind is DeltaKind.CONTENT and self._call_seen:
            self._fail(FormatError.TEXT_AFTER_CALL)
        self.texts[kind].append(stripped)
        self._deltas.append(Delta(kind, stripped))

    def _withdraw_reasoning(self) -> None:
        text = "".join(self.texts[DeltaKind.REASONING])
        self.texts[DeltaKind.REASONING] = []
        self._blanks = []
        if text:
            self._deltas.append(Delta(DeltaKind.REASONING_WITHDRAWN))
            self._say(DeltaKind.CONTENT, text)

    def _fail(self, error: FormatError) -> None:
        if self.error is None:
            self.error = error


class _Ahead(NamedTuple):
    """What a look ahead has found."""

    text: str
    """Stripped, before the tag."""
    tag: Tag | None
    behind: int
    """Index of the piece after the tag."""

    def is_blank_before(self, *names: str) -> bool:
        """Return whether one of these tags comes, after nothing but white space."""
        return not self.text and self.tag is not None and self.tag.name in names


class _Malformed(Exception):
    """A call that cannot be read."""

    def __init__(self, error: FormatError = FormatError.BAD_TOOL_CALL) -> None:
        super().__init__(error)
        self.error = error


class _Call:
    """The call that is being read, from behind its `<tool_call>`."""

    def __init__(self, parser: Parser) -> None:
        self.parser = parser
        self.raw = ["<tool_call>"]
        self.name = ""
        self.arguments: dict[str, Any] = {}
        self.faults: list[FormatError] = []  # of the arguments
        self.repaired = False
        self.parameters: Parameters | None = None
        self.begun = False  # whether a delta has named it

    def read(self) -> Reads[None]:
        """Read the call up to its end. Raises _Malformed."""
        text, tag = yield from self._until_tag()
        name = text.strip()
        key = None
        if tag.name == "</arg_key>" and len(text.split(maxsplit=1)) == 2:
            name, key = text.split(maxsplit=1)
            self._repair()
        if not _NAME.fullmatch(name):
            self._break(tag)
        self._begin(name)
        while True:
            if key is None:
                if tag.name == "</tool_call>":
                    return
                if tag.name == "<tool_call>" and not (yield from self._stands_for("</arg_key>")):
                    # The next call begins: this one lacks its last tag.
                    if not self.arguments:
                        self._break(tag)
                    self._repair()
                    self._unread(tag)
                    return
                if tag.name == "<|observation|>" and self.arguments:
                    self._repair(FormatError.UNCLOSED_TOOL_CALL)
                    self._unread(tag)
                    return
                key, tag = yield from self._read_key(tag)
            yield from self._read_argument(key.strip(), tag)
            text, tag = yield from self._until_tag()
            while tag.name == "</arg_value>" and not text.strip():
                self._repair()
                text, tag = yield from self._until_tag()
            key = None
            if text.strip():
                if tag.name != "</arg_key>":
                    self._break(tag)
                self._repair()
                key = text

    def skip(self) -> Reads[None]:
        """Skip the rest of a malformed call."""
        stops = ("<tool_call>", "<think>", "</think>", END.name, *STOPS)
        while True:
            piece = yield from self.parser._next()
            if isinstance(piece, str):
                self.raw.append(piece)
            elif piece.name in stops:
                self.parser._pieces.appendleft(piece)
                return
            else:
                self.raw.append(piece.name)
                if piece.name == "</tool_call>":
                    return

    def take(self) -> bool:
        """Add the call to the message, and return whether it is one that may be taken."""
        parser = self.parser
        if parser.schemas is not None and self.parameters is None:
            parser._fail(FormatError.UNKNOWN_TOOL)
            return False
        if self.repaired and parser.strict:
            return False
        if self.parameters is not None and self.parameters.lacks(self.arguments):
            self.faults.append(FormatError.MISSING_ARGUMENT)
        if self.faults:
            parser._fail(self.faults[0])
        self._write("}" if self.arguments else "{}")
        call: ToolCall = {"name": self.name, "arguments": self.arguments}
        parser.calls.append(call)
        parser._deltas.append(Delta(DeltaKind.CALL, call=call))
        return True

    def withdraw(self) -> None:
        """Withdraw the call if a delta has named it."""
        if self.begun:
            self.parser._deltas.append(Delta(DeltaKind.CALL_WITHDRAWN))
        self.begun = False

    def _begin(self, name: str) -> None:
        self.name = name
        schemas = self.parser.schemas
        if schemas is not None:
            self.parameters = schemas.get(name)
        self.begun = schemas is None or self.parameters is not None
        if self.begun:
            self.parser._deltas.append(Delta(DeltaKind.CALL_BEGINS, name))

    def _write(self, text: str) -> None:
        if self.begun:
            self.parser._deltas.append(Delta(DeltaKind.ARGUMENTS, text))

    def _read_key(self, tag: Tag) -> Reads[tuple[str, Tag]]:
        """Read a key after the tag that opens it; return it with the tag that follows."""
        if tag.name == "<tool_call>":
            self._repair()
        elif tag.name != "<arg_key>":
            self._break(tag)
        text, tag = yield from self._until_tag()
        while tag.name == "<arg_key>" and not text.strip():
            self._repair()
            text, tag = yield from self._until_tag()
        if tag.name not in ("</arg_key>", "<arg_value>") or not text.strip():
            self._break(tag)
        return text, tag

    def _read_argument(self, key: str, tag: Tag) -> Reads[None]:
        """Read the value of a key. tag: the one that ended the key."""
        argument = _Argument(self, key)
        if tag.name == "<arg_value>":
            self._repair()  # the end of the key is missing
        else:
            text, tag = yield from self._until_tag()
            while tag.name == "</arg_key>" and not text.strip():
                self._repair()
                text, tag = yield from self._until_tag()
            if tag.name == "</arg_value>" or (
                tag.name in ("<arg_key>", "</tool_call>") and text.strip()
            ):
                self._repair()  # the value has no opening tag
                if tag.name != "</arg_value>":
                    text = text.strip()
                    self._unread(tag)
                argument.add(text)
                argument.end()
                return
            if text.strip():
                self._break(tag)
            if tag.name == "<tool_call>" and (yield from self._stands_for("</arg_value>")):
                self._repair()
            elif tag.name != "<arg_value>":
                self._break(tag)
        while True:
            piece = yield from self.parser._next()
            self.raw.append(piece if isinstance(piece, str) else piece.name)
            if isinstance(piece, str):
                argument.add(piece)
            elif (yield from self._ends_value(piece)):
                argument.end()
                return
            elif piece is END or (piece.name in _END_VALUES and not piece.letters):
                self._break(piece)
            elif piece.name == "<arg_value>" and not piece.letters and not argument.texts:
                self._repair()
            else:
                argument.add(piece.name)
                if not piece.letters:
                    self._repair(FormatError.STRAY_TAG)

    def _ends_value(self, tag: Tag) -> Reads[bool]:
        """Return whether a tag inside a value ends it, by what comes next; take it if so, or put back what it opens."""
        parser = self.parser
        if tag.name == "</arg_value>":
            ahead = yield from parser._tag_ahead()
            if ahead.text:  # a key whose opening tag is missing
                return ahead.tag is not None and ahead.tag.name == "</arg_key>"
            followers = ("<arg_key>", "</tool_call>", "<tool_call>", "</arg_value>", END.name)
            ends = ahead.is_blank_before(*followers)
            return ends or (yield from self._stops(ahead))
        if tag.name == "<arg_key>":
            key = yield from parser._tag_ahead()
            if not key.text or key.tag is None or key.tag.name != "</arg_key>":
                return False
            ahead = yield from parser._tag_ahead(key.behind)
            ends = ahead.is_blank_before("<arg_value>")
        elif tag.name == "</tool_call>":
            ahead = yield from parser._tag_ahead()
            ends = ahead.is_blank_before("<tool_call>") or (yield from self._stops(ahead))
        else:
            ends = False
        if ends:
            self._repair()
            self._unread(tag)
        return ends

    def _stops(self, ahead: _Ahead) -> Reads[bool]:
        """Return whether what comes next ends the turn: a stop token, or letters that spell one at the end of the text."""
        if not ahead.is_blank_before(*STOPS):
            return False
        if ahead.tag is not None and ahead.tag.letters:
            behind = yield from self.parser._tag_ahead(ahead.behind)
            return behind.is_blank_before(END.name)
        return True

    def _stands_for(self, closing: str) -> Reads[bool]:
        """Return whether a `<tool_call>` stands where another tag belongs, because `closing` follows its text."""
        ahead = yield from self.parser._tag_ahead()
        return ahead.tag is not None and ahead.tag.name == closing

    def _until_tag(self) -> Reads[tuple[str, Tag]]:
        text, tag = yield from self.parser._until_tag()
        self.raw += [text, tag.name]
        return text, tag

    def _unread(self, tag: Tag) -> None:
        """Put back the tag that was read last."""
        self.raw.pop()
        self.parser._pieces.appendleft(tag)

    def _repair(self, fault: FormatError = FormatError.BAD_TOOL_CALL) -> None:
        self.repaired = True
        self.parser._fail(fault)

    def _break(self, tag: Tag) -> None:
        """Raise _Malformed at a tag, which `skip` reads again."""
        self._unread(tag)
        is_end = tag is END or tag.name in STOPS
        raise _Malformed(FormatError.UNCLOSED_TOOL_CALL if is_end else FormatError.BAD_TOOL_CALL)


class _Argument:
    """The value that is being read, and its JSON text as far as it is settled."""

    def __init__(self, call: _Call, key: str) -> None:
        self.call = call
        self.key = key
        self.schema = (call.parameters or _ANYTHING).argument(key)
        self.repeated = key in call.arguments
        self.texts: list[str] = []
        self.streams = False  # whether it is a string, whatever comes

    def add(self, text: str) -> None:
        """Add text to the value."""
        self.texts.append(text)
        if self.repeated or not text:
            return
        if self.streams:
            self.call._write(json.dumps(text, ensure_ascii=False)[1:-1])
        elif len(self.texts) < _UNDECIDED and self.schema.is_text("".join(self.texts)):
            self.streams = True
            self._write_key()
            self.call._write('"' + json.dumps("".join(self.texts), ensure_ascii=False)[1:-1])

    def end(self) -> None:
        """End the value: type it, and add it to the call."""
        call = self.call
        text = "".join(self.texts)
        value, fits = self.schema.read(text, call.parser.strict)
        if self.streams:
            value = text
        taken = self.schema.declared or (self.schema.welcome and not call.parser.strict)
        if not taken:
            call.faults.append(FormatError.UNKNOWN_ARGUMENT)
        elif not fits or self.repeated:
            call.faults.append(FormatError.BAD_ARGUMENT)
        if self.repeated:
            return
        if self.streams:
            call._write('"')
        else:
            self._write_key()
            call._write(json.dumps(value, ensure_ascii=False))
        call.arguments[self.key] = value

    def _write_key(self) -> None:
        separator = ", " if self.call.arguments else "{"
        self.call._write(f"{separator}{json.dumps(self.key, ensure_ascii=False)}: ")


_ANYTHING = Parameters({})  # of a call about whose tool nothing is known
_UNDECIDED = (
    64  # pieces after which a value that may be something else than a string waits for its end
)


def _begins_a_tag(text: str) -> bool:
    return any(tag.startswith(text) for tag in (*TAGS, *CONTROL_TAGS))


def _named_parameters(tool: Tool) -> tuple[str, Parameters]:
    """Return (name, schema of the arguments) of a function object, bare or inside {"function": ...}."""
    function: Mapping[str, Any] = tool.get("function") or tool
    if not isinstance(function.get("name"), str):
        raise ValueError(f"a tool needs a name, got {tool!r:.80}")
    return function["name"], parameters_of(function.get("parameters"))
