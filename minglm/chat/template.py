"""The chat templates of GLM-4.5, 4.6 and 4.7: messages to text, ids and loss mask in one walk (paper 3.1, figure 4).

    text = [gMASK]<sop>  {<|system|> tools}  turn turn turn ...  {<|assistant|>}
    turn = <|role|> newline body           (several tool results in a row share one <|observation|>)
    assistant body = <think>reasoning</think> newline content newline <tool_call>...</tool_call> ...

`segments` walks the conversation once and yields pieces, each plain text or one special token, each marked as trained
or not. Ids, mask and text are three readings of the same pieces, so they cannot drift apart. The text is that of the
templates published with the models, character by character.

The dialects (`Dialect`): 4.5 and 4.6 render alike. 4.7 writes no newlines; its prompt opens the reasoning (`<think>`),
or with thinking off closes it at once (`</think>`), so user turns need no `/nothink`; and clear_thinking=False
preserves the reasoning of every turn.

What a reader should know:
- There is no end-of-turn token. The role token of the next turn ends an assistant turn, so it is trained with it:
  <|observation|> after a tool call, <|user|> otherwise. A model that never learns it never stops.
- Reasoning is kept only after the last user message, where it interleaves with tool calls; in older turns the think
  tags are empty. So adding a tool result extends the rendering, and adding a user message rewrites it. Preserved
  reasoning is never rewritten: each prefix of the conversation is a prefix of the text, and of a server's cache.
- Think tags that the model would not have written are no targets: those that the prompt already holds, and those that
  stand in an older turn where reasoning was cut.
- Tags become special tokens only where the template writes them. Message text that spells `<|user|>` stays plain
  text, so nobody can forge a turn. (Tokenizing the rendered string, as most servers do, would let them.)
- Argument values: strings are written as they are, everything else as JSON. Code needs no escaping.

Deviations, all on input that the published templates fail on or garble: content None is empty instead of "None",
arguments may be a JSON string or absent, text parts in a tool result are joined, and an unknown role or part raises.
"""

import json
import re
from itertools import groupby
from typing import NamedTuple

ROLES = {
    "system": "<|system|>",
    "user": "<|user|>",
    "assistant": "<|assistant|>",
    "tool": "<|observation|>",
}
STOPS = ("<|endoftext|>", "<|user|>", "<|observation|>")  # what ends a sampled turn
TAGS = tuple(
    f"<{slash}{name}>"
    for name in ("think", "tool_call", "arg_key", "arg_value")
    for slash in ("", "/")
)
NO_THINK = "/nothink"

# The wording the released model was trained on: data of the format, equal to the published one byte by byte.
TOOLS_BEFORE = """
# Tools

You may call one or more functions to assist with the user query.

You are provided with function signatures within <tools></tools> XML tags:
<tools>
"""
TOOLS_AFTER = """</tools>

For each function call, output the function name and arguments within the following XML format:
<tool_call>{function-name}
<arg_key>{arg-key-1}</arg_key>
<arg_value>{arg-value-1}</arg_value>
<arg_key>{arg-key-2}</arg_key>
<arg_value>{arg-value-2}</arg_value>
...
</tool_call>"""


class Dialect(NamedTuple):
    """What the published templates do differently."""

    line: str
    """Separates a role from its text, and the parts of an assistant turn."""
    opens: bool
    """The prompt holds the first think tag, and a turn without reasoning only the last; else both are in the turn."""
    preserves: bool
    """Whether clear_thinking=False can keep the reasoning of older turns."""


_LINES = Dialect("\n", opens=False, preserves=False)
DIALECTS = {
    "glm-4.5": _LINES,
    "glm-4.6": _LINES,
    "glm-4.7": Dialect("", opens=True, preserves=True),
}


class Segment(NamedTuple):
    """A piece of the rendering: plain text, or (special) the name of one special token; trained = a target."""

    text: str
    special: bool = False
    trained: bool = False


class Rendered(NamedTuple):
    """Token ids, a mask of the same length (True = the model must produce this token), and the text they spell."""

    ids: list
    mask: list
    text: str


def render(
    tokenizer, messages, tools=None, thinking=True, generation_prompt=False, close=True, **dialect
):
    """Conversation to `Rendered(ids, mask, text)`.

    messages: dicts {"role": system|user|assistant|tool, "content", "reasoning_content", "tool_calls"}; content is text
    or a list of text parts; a tool call is {"name", "arguments"} or OpenAI's {"function": {...}}. tools: JSON-schema
    function objects, written as given. thinking False adds `/nothink` to user turns (4.7: closes the reasoning in the
    prompt). generation_prompt asks for the next assistant turn. close adds the role token that ends a last assistant
    turn, as training needs it. dialect, clear_thinking: as in `segments`.
    mask[i] says that ids[i] is a target: everything the model writes after the prompt and the token that ends it.
    Raises ValueError for messages that the template cannot express.
    """
    close = close and not generation_prompt
    pieces = _joined(segments(messages, tools, thinking, generation_prompt, close, **dialect))
    ids, mask = [], []
    for piece in pieces:
        new = _ids(tokenizer, piece)
        ids += new
        mask += [piece.trained] * len(new)
    return Rendered(ids, mask, "".join(piece.text for piece in pieces))


def render_text(messages, tools=None, thinking=True, generation_prompt=False, **dialect):
    """The text of the published template, nothing added: for people, logs, and engines that tokenize themselves."""
    return "".join(
        piece.text for piece in segments(messages, tools, thinking, generation_prompt, **dialect)
    )


def continuation(tokenizer, messages, thinking=True, dialect="glm-4.5"):
    """Ids to append after a *sampled* turn, whose last id is the stop token, when `messages` arrive.

    messages: the new tool results, or a user turn. Their first role token is left out, because the model has sampled
    it already; a generation prompt follows. Within one user turn, and where reasoning is preserved in all of them,
    prompt + sampled + continuation spells the rendering of the whole conversation, so sampled tokens are never
    tokenized again. (Not where a 4.7 model opened its reasoning and wrote none: its template renders that otherwise.)
    """
    if not messages or messages[0].get("role") not in ("user", "tool"):
        raise ValueError(
            "continuation: the first new message must have role user or tool, which a sampled stop opens"
        )
    _, _, opening, *rest = _joined(
        segments(messages, None, thinking, generation_prompt=True, dialect=dialect)
    )
    assert opening.text in STOPS
    return [token for piece in rest for token in _ids(tokenizer, piece)]


def segments(
    messages,
    tools=None,
    thinking=True,
    generation_prompt=False,
    close=False,
    dialect="glm-4.5",
    clear_thinking=True,
):
    """Walk the conversation and yield its `Segment`s in order; neighbouring text pieces are still to be joined.

    dialect: a name in DIALECTS. clear_thinking: False keeps the reasoning of all turns, where the dialect can.
    """
    form = dialect_of(dialect, clear_thinking)
    yield Segment("[gMASK]", True)
    yield Segment("<sop>", True)
    if tools:
        yield from _tools(tools, form)
    roles = [_role(message, index) for index, message in enumerate(messages)]
    last_user = max((index for index, role in enumerate(roles) if role == "user"), default=-1)
    for index, (role, message) in enumerate(zip(roles, messages, strict=True)):
        previous = roles[index - 1] if index else None
        if role != "tool" or previous != "tool" or _tool_outputs(message) is not None:
            # The token that opens a turn is what ended the assistant turn before it.
            yield Segment(
                ROLES[role], True, trained=previous == "assistant" and ROLES[role] in STOPS
            )
        if role == "system":
            yield Segment(form.line + _content(message, index))
        elif role == "user":
            yield from _user(_content(message, index), thinking, form)
        elif role == "tool":
            yield from _tool_results(message, index, form)
        else:
            yield from _assistant(
                message, index, index > last_user or not clear_thinking, thinking, form
            )
    if generation_prompt:
        yield Segment(ROLES["assistant"], True)
        if form.opens:
            yield Segment("<think>" if thinking else "</think>", True)
        elif not thinking:
            yield from _think("", False, form)
    elif close and roles and roles[-1] == "assistant":
        yield Segment(
            ROLES["tool" if messages[-1].get("tool_calls") else "user"], True, trained=True
        )


def dialect_of(name, clear_thinking=True):
    """The `Dialect` of this name. Raises ValueError for another name, and where it cannot keep all reasoning."""
    if name not in DIALECTS:
        raise ValueError(
            f"dialect {name!r}: there is no such template; choose one of {', '.join(DIALECTS)}"
        )
    if not (clear_thinking or DIALECTS[name].preserves):
        raise ValueError(
            f"clear_thinking = False: {name} drops the reasoning of older turns; use glm-4.7 to keep it"
        )
    return DIALECTS[name]


def _tools(tools, form):
    yield Segment(ROLES["system"], True)
    yield Segment(TOOLS_BEFORE)
    for tool in tools:
        yield Segment(_json(tool) + "\n")
    sentence, tag, example = TOOLS_AFTER.partition("<tool_call>")
    for piece in re.split(f"({'|'.join(TAGS)})", sentence + tag + example.replace("\n", form.line)):
        yield Segment(piece, special=piece in TAGS)


def _user(content, thinking, form):
    """In the dialects that switch in the turn, the switch is one special token, also where the user has typed it."""
    typed = content.endswith(NO_THINK) and not form.opens
    yield Segment(form.line + (content.removesuffix(NO_THINK) if typed else content))
    if typed or not (thinking or form.opens):
        yield Segment(NO_THINK, True)


def _assistant(message, index, shown, thinking, form):
    """shown: whether this turn keeps its reasoning."""
    reasoning, content = _reasoning_and_content(message, index)
    line = Segment(form.line, trained=True)
    if form.opens and not (shown and reasoning):
        yield Segment("</think>", True)  # the prompt's, or in place of what was cut
    else:
        cut = not shown and reasoning.strip()
        yield from _think(reasoning.strip() if shown else "", thinking and not cut, form)
    if content:
        yield line
        yield Segment(content, trained=True)
    for call in message.get("tool_calls") or ():
        name, arguments = _call(call, index)
        yield line
        yield Segment("<tool_call>", True, True)
        yield Segment(name + form.line, trained=True)
        for key, value in arguments.items():
            yield Segment("<arg_key>", True, True)
            yield Segment(key, trained=True)
            yield Segment("</arg_key>", True, True)
            yield line
            yield Segment("<arg_value>", True, True)
            yield Segment(value if isinstance(value, str) else _json(value), trained=True)
            yield Segment("</arg_value>", True, True)
            yield line
        yield Segment("</tool_call>", True, True)


def _think(reasoning, trained, form):
    yield Segment(form.line, trained=trained)
    yield Segment("<think>", True, trained and not form.opens)
    yield Segment(reasoning, trained=trained)
    yield Segment("</think>", True, trained)


def _tool_results(message, index, form):
    outputs = _tool_outputs(message)
    for output in [_content(message, index)] if outputs is None else outputs:
        yield Segment(form.line)
        yield Segment("<tool_response>", True)
        yield Segment(f"{form.line}{output}{form.line}")
        yield Segment("</tool_response>", True)


def _tool_outputs(message):
    """A tool message may carry a list of results, {"output": ...} or strings; None when it is one result."""
    content = message.get("content")
    if not isinstance(content, (list, tuple)) or all(
        isinstance(item, dict) and "text" in item for item in content
    ):
        return None
    return [item.get("output", item) if isinstance(item, dict) else item for item in content]


def _reasoning_and_content(message, index):
    """Reasoning from its own field, or else cut out of a content that still holds the think tags; content stripped.

    Reasoning keeps its blanks: 4.7 writes both tags around reasoning of blanks alone, and one where there is none.
    """
    reasoning, content = message.get("reasoning_content"), _content(message, index)
    if not isinstance(reasoning, str):
        reasoning = ""
        if "</think>" in content:
            parts = content.split("</think>")
            reasoning, content = parts[0].rstrip("\n").split("<think>")[-1].lstrip("\n"), parts[-1]
    return reasoning, content.strip()


def _content(message, index):
    content = message.get("content")
    if content is None:
        return ""
    if isinstance(content, str):
        return content
    if not isinstance(content, (list, tuple)):
        raise ValueError(
            f"messages[{index}]: content must be text or a list of parts, not {type(content).__name__}"
        )
    parts = [part.get("text") if isinstance(part, dict) else part for part in content]
    if not all(isinstance(part, str) for part in parts):
        raise ValueError(
            f"messages[{index}]: content has a part that is not text; these models read text only"
        )
    return "".join(parts)


def _call(call, index):
    """(name, arguments) of a tool call in either form; arguments may be a dict, a JSON object as text, or absent."""
    inner = (call.get("function") or call) if isinstance(call, dict) else {}
    inner = inner if isinstance(inner, dict) else {}
    name, arguments = inner.get("name"), inner.get("arguments") or {}
    if isinstance(arguments, str):
        try:
            arguments = json.loads(arguments)
        except ValueError as error:
            raise ValueError(
                f"messages[{index}]: arguments of {name!r} are not JSON: {error}"
            ) from error
    if not isinstance(name, str) or not isinstance(arguments, dict):
        raise ValueError(
            f"messages[{index}]: a tool call needs a name and an object of arguments, got {call!r:.80}"
        )
    return name, arguments


def _role(message, index):
    role = message.get("role") if isinstance(message, dict) else None
    if not isinstance(role, str) or role not in ROLES:
        raise ValueError(f"messages[{index}]: role must be one of {', '.join(ROLES)}, got {role!r}")
    return role


def _json(value):
    return json.dumps(value, ensure_ascii=False)


def _joined(pieces):
    """Join neighbouring text, because a tokenizer may merge across the seam; drop empty text.

    The mask never changes between two text pieces: a special token stands at every such border.
    """
    joined = []
    for special, run in groupby(
        (piece for piece in pieces if piece.text), key=lambda piece: piece.special
    ):
        run = list(run)
        if special:
            joined += run
        else:
            assert len({piece.trained for piece in run}) == 1, run
            joined.append(Segment("".join(piece.text for piece in run), False, run[0].trained))
    return joined


def _ids(tokenizer, piece):
    if not piece.special:
        return tokenizer.encode(piece.text)
    if piece.text not in tokenizer.special:
        raise ValueError(
            f"the tokenizer has no special token {piece.text}; train one with minglm or load GLM-4.5's"
        )
    return [tokenizer.special[piece.text]]
