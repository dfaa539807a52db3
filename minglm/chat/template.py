"""Render messages with the chat templates of GLM-4.5, 4.6 and 4.7: text, ids and loss mask (paper 3.1, figure 4).

    text = [gMASK]<sop>  {<|system|> tools}  turn turn turn ...  {<|assistant|>}
    turn = <|role|> newline body           (several tool results in a row share one <|observation|>)
    assistant body = <think>reasoning</think> newline content newline <tool_call>...</tool_call> ...

`segments` walks the conversation once and yields segments, each plain text or one special token, each marked
as trained or not. Ids, mask and text are three readings of the same segments, so they cannot drift apart. The
text equals that of the templates published with the models, character by character.

The dialects (`Dialect`): 4.5 and 4.6 render alike. 4.7 writes no newlines; its prompt opens the reasoning
(`<think>`), or with thinking off closes it at once (`</think>`), so user turns need no `/nothink`; and
clear_thinking=False preserves the reasoning of every turn.

What a reader should know:
- There is no end-of-turn token. The role token of the next turn ends an assistant turn, so it is trained with it:
  <|observation|> after a tool call, <|user|> otherwise. A model that never learns it never stops.
- Reasoning is kept only after the last user message, where it interleaves with tool calls; in older turns the think
  tags are empty. Therefore adding a tool result extends the rendering, and adding a user message rewrites it. Preserved
  reasoning is never rewritten: each prefix of the conversation is a prefix of the text, and of a server's cache.
- Think tags that the model would not have written are not targets: those that the prompt already holds, and those in an
  older turn whose reasoning was cut.
- Tags become special tokens only where the template writes them. Message text that spells `<|user|>` stays plain
  text, so nobody can forge a turn. (Tokenizing the rendered string, as most servers do, would allow it.)
- Argument values: strings are written as they are, everything else as JSON. Code needs no escaping.

Deviations, all on input that the published templates reject or garble: content None is empty instead of
"None", arguments may be a JSON string or absent, text parts in a tool result are joined, outputs that are not
text are JSON, and an unknown role or part raises.
"""

import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from enum import StrEnum
from itertools import groupby
from typing import Any, NamedTuple

from minglm.chat.messages import ChatTokenizer, Message, Tool


class Role(StrEnum):
    """Who speaks a turn."""

    SYSTEM = "system"
    """Instructions for the whole conversation."""
    USER = "user"
    """The person, or the program that simulates one."""
    ASSISTANT = "assistant"
    """The model."""
    TOOL = "tool"
    """The result of a tool call."""


ROLES = {
    Role.SYSTEM: "<|system|>",
    Role.USER: "<|user|>",
    Role.ASSISTANT: "<|assistant|>",
    Role.TOOL: "<|observation|>",
}
"""The special token that opens a turn of each role."""

STOPS = ("<|endoftext|>", "<|user|>", "<|observation|>")
"""The special tokens that end a sampled turn."""

TAGS = (
    *("<think>", "</think>"),
    *("<tool_call>", "</tool_call>"),
    *("<arg_key>", "</arg_key>"),
    *("<arg_value>", "</arg_value>"),
)
"""The tags of an assistant turn, all of them special tokens."""

NO_THINK = "/nothink"

REASONING_FIELDS = ("reasoning_content", "reasoning", "thinking")
"""Where clients put the reasoning of earlier turns: first DeepSeek's name, then vLLM's and OpenRouter's, then Ollama's."""

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
    """The differences between the published templates."""

    line: str
    """Separates a role from its text, and the parts of an assistant turn."""
    opens: bool
    """True: the prompt holds the first think tag, and a turn without reasoning holds only the last. False:
    the turn holds both."""
    preserves: bool
    """Whether clear_thinking=False can keep the reasoning of older turns."""


_WITH_NEWLINES = Dialect("\n", opens=False, preserves=False)
DIALECTS = {
    "glm-4.5": _WITH_NEWLINES,
    "glm-4.6": _WITH_NEWLINES,
    "glm-4.7": Dialect("", opens=True, preserves=True),
}


class Segment(NamedTuple):
    """A piece of the rendering."""

    text: str
    """Plain text, or the name of one special token."""
    special: bool = False
    trained: bool = False
    """True for a target: the model must produce it."""


class Rendered(NamedTuple):
    """A rendered conversation."""

    ids: list[int]
    mask: list[bool]
    """Of the same length: True for targets, which the model must produce."""
    text: str
    """What the ids spell."""


def render(
    tokenizer: ChatTokenizer,
    messages: Sequence[Message],
    tools: Sequence[Tool] | None = None,
    thinking: bool = True,
    generation_prompt: bool = False,
    close: bool = True,
    dialect: str = "glm-4.5",
    clear_thinking: bool = True,
) -> Rendered:
    """Render a conversation to ids, loss mask and text.

    messages: dicts {"role": system|user|assistant|tool, "content", "reasoning_content", "tool_calls"};
    content is text or a list of text parts; a tool call is {"name", "arguments"} or OpenAI's {"function":
    {...}}.
    tools: JSON-schema function objects, written as given.
    thinking: False adds `/nothink` to user turns (4.7: closes the reasoning in the prompt).
    generation_prompt: ask for the next assistant turn.
    close: add the role token that ends a last assistant turn, as training needs it.
    dialect, clear_thinking: as in `segments`.
    The targets are everything the model writes after the prompt, and the token that ends its turn. Raises
    ValueError for messages that the template cannot express.
    """
    close = close and not generation_prompt
    walk = segments(messages, tools, thinking, generation_prompt, close, dialect, clear_thinking)
    joined = _joined(walk)
    ids: list[int] = []
    mask: list[bool] = []
    for segment in joined:
        new_ids = _ids(tokenizer, segment)
        ids += new_ids
        mask += [segment.trained] * len(new_ids)
    return Rendered(ids, mask, "".join(segment.text for segment in joined))


def render_text(
    messages: Sequence[Message],
    tools: Sequence[Tool] | None = None,
    thinking: bool = True,
    generation_prompt: bool = False,
    dialect: str = "glm-4.5",
    clear_thinking: bool = True,
) -> str:
    """Return the text of the published template: for people, logs, and engines that tokenize themselves.

    Arguments as in `render`, without the token that ends a last assistant turn.
    """
    walk = segments(
        messages,
        tools,
        thinking,
        generation_prompt,
        dialect=dialect,
        clear_thinking=clear_thinking,
    )
    return "".join(segment.text for segment in walk)


def continuation(
    tokenizer: ChatTokenizer,
    messages: Sequence[Message],
    thinking: bool = True,
    dialect: str = "glm-4.5",
) -> list[int]:
    """Return the ids to append after a *sampled* turn, whose last id is the stop token, when `messages` arrive.

    messages: the new tool results, or a user turn. Their first role token is left out, because the model has
    sampled it already; a generation prompt follows. Within one user turn, and where reasoning is preserved in
    all of them, prompt + sampled + continuation spells the rendering of the whole conversation, so sampled
    tokens are never tokenized again. (Not if a 4.7 model opened its reasoning and wrote none: its template
    renders that differently.)
    """
    if not messages or messages[0].get("role") not in (Role.USER, Role.TOOL):
        raise ValueError(
            "continuation: the first new message must have role user or tool, which a sampled stop opens"
        )
    walk = segments(messages, None, thinking, generation_prompt=True, dialect=dialect)
    _, _, opening, *rest = _joined(walk)  # without [gMASK] and <sop>
    assert opening.text in STOPS, opening
    return [token for segment in rest for token in _ids(tokenizer, segment)]


def segments(
    messages: Sequence[Message],
    tools: Sequence[Tool] | None = None,
    thinking: bool = True,
    generation_prompt: bool = False,
    close: bool = False,
    dialect: str = "glm-4.5",
    clear_thinking: bool = True,
) -> Iterator[Segment]:
    """Walk the conversation and yield its segments in order; neighbouring text segments are not joined yet.

    dialect: a name in DIALECTS. clear_thinking: False keeps the reasoning of all turns, where the dialect can.
    """
    form = dialect_of(dialect, clear_thinking)
    yield Segment("[gMASK]", special=True)
    yield Segment("<sop>", special=True)
    if tools:
        yield from _tools(tools, form)
    roles = [_role(message, index) for index, message in enumerate(messages)]
    last_user = _last_index(roles, Role.USER)
    previous: Role | None = None
    for index, (role, message) in enumerate(zip(roles, messages, strict=True)):
        # Several tool results in a row share one role token.
        shares_role = role == previous == Role.TOOL and _tool_outputs(message) is None
        if not shares_role:
            # The token that opens this turn is what ended the assistant turn before it.
            ends_assistant = previous == Role.ASSISTANT and ROLES[role] in STOPS
            yield Segment(ROLES[role], special=True, trained=ends_assistant)
        if role == Role.SYSTEM:
            yield Segment(form.line + _content(message, index))
        elif role == Role.USER:
            yield from _user(_content(message, index), thinking, form)
        elif role == Role.TOOL:
            yield from _tool_results(message, index, form)
        else:
            keeps_reasoning = index > last_user or not clear_thinking
            yield from _assistant(message, index, keeps_reasoning, thinking, form)
        previous = role
    if generation_prompt:
        yield from _generation_prompt(thinking, form)
    elif close and previous == Role.ASSISTANT:
        next_role = Role.TOOL if messages[-1].get("tool_calls") else Role.USER
        yield Segment(ROLES[next_role], special=True, trained=True)


def dialect_of(name: str, clear_thinking: bool = True) -> Dialect:
    """Return the `Dialect` of this name.

    Raises ValueError for an unknown name, or if it cannot keep all reasoning.
    """
    if name not in DIALECTS:
        raise ValueError(
            f"dialect {name!r}: there is no such template; choose one of {', '.join(DIALECTS)}"
        )
    if not (clear_thinking or DIALECTS[name].preserves):
        raise ValueError(
            f"clear_thinking = False: {name} drops the reasoning of older turns; use glm-4.7 to keep it"
        )
    return DIALECTS[name]


def _last_index(roles: Sequence[Role], role: Role) -> int:
    """Return the index of the last turn of a role, -1 if there is none."""
    for index in reversed(range(len(roles))):
        if roles[index] == role:
            return index
    return -1


def _tools(tools: Sequence[Tool], form: Dialect) -> Iterator[Segment]:
    yield Segment(ROLES[Role.SYSTEM], special=True)
    yield Segment(TOOLS_BEFORE)
    for index, tool in enumerate(tools):
        yield Segment(_json(tool, f"tools[{index}]") + "\n")
    # Only the example of a call, which begins at the first <tool_call>, follows the dialect's newlines.
    sentence, tag, example = TOOLS_AFTER.partition("<tool_call>")
    text = sentence + tag + example.replace("\n", form.line)
    for piece in re.split(f"({'|'.join(TAGS)})", text):
        yield Segment(piece, special=piece in TAGS)


def _user(content: str, thinking: bool, form: Dialect) -> Iterator[Segment]:
    """Yield a user turn.

    Where the dialect has a switch in the turn it is one special token, even if the user typed it.
    """
    typed = content.endswith(NO_THINK) and not form.opens
    if typed:
        content = content.removesuffix(NO_THINK)
    yield Segment(form.line + content)
    if typed or not (thinking or form.opens):
        yield Segment(NO_THINK, special=True)


def _assistant(
    message: Message, index: int, keeps_reasoning: bool, thinking: bool, form: Dialect
) -> Iterator[Segment]:
    reasoning, content = _reasoning_and_content(message, index)
    line = Segment(form.line, trained=True)
    if form.opens and not (keeps_reasoning and reasoning):
        # The prompt's tag (thinking off), or what is left of reasoning that was cut.
        yield Segment("</think>", special=True)
    else:
        was_cut = not keeps_reasoning and reasoning.strip() != ""
        shown = reasoning.strip() if keeps_reasoning else ""
        yield from _think(shown, thinking and not was_cut, form)
    if content:
        yield line
        yield Segment(content, trained=True)
    for call in message.get("tool_calls") or ():
        name, arguments = _call(call, index)
        yield line
        yield Segment("<tool_call>", special=True, trained=True)
        yield Segment(name + form.line, trained=True)
        for key, value in arguments.items():
            yield Segment("<arg_key>", special=True, trained=True)
            yield Segment(key, trained=True)
            yield Segment("</arg_key>", special=True, trained=True)
            yield line
            yield Segment("<arg_value>", special=True, trained=True)
            text = value if isinstance(value, str) else _json(value, f"messages[{index}]: {key}")
            yield Segment(text, trained=True)
            yield Segment("</arg_value>", special=True, trained=True)
            yield line
        yield Segment("</tool_call>", special=True, trained=True)


def _think(reasoning: str, trained: bool, form: Dialect) -> Iterator[Segment]:
    yield Segment(form.line, trained=trained)
    # In 4.7 the prompt holds the opening tag, so it is not a target.
    yield Segment("<think>", special=True, trained=trained and not form.opens)
    yield Segment(reasoning, trained=trained)
    yield Segment("</think>", special=True, trained=trained)


def _generation_prompt(thinking: bool, form: Dialect) -> Iterator[Segment]:
    yield Segment(ROLES[Role.ASSISTANT], special=True)
    if form.opens:
        yield Segment("<think>" if thinking else "</think>", special=True)
    elif not thinking:
        yield from _think("", False, form)


def _tool_results(message: Message, index: int, form: Dialect) -> Iterator[Segment]:
    outputs = _tool_outputs(message)
    if outputs is None:
        texts = [_content(message, index)]
    else:
        texts = [_tool_output(output, index) for output in outputs]
    for output in texts:
        yield Segment(form.line)
        yield Segment("<tool_response>", special=True)
        yield Segment(f"{form.line}{output}{form.line}")
        yield Segment("</tool_response>", special=True)


def _tool_outputs(message: Message) -> list[Any] | None:
    """Return the results of a tool message that carries a list, {"output": ...} or strings; None for a single result."""
    content = message.get("content")
    if not isinstance(content, list | tuple):
        return None
    if all(isinstance(item, dict) and "text" in item for item in content):
        return None  # text parts of one result
    return list(content)


def _tool_output(item: Any, index: int) -> str:
    """Return the text of one of several results: a string, {"output": ...}, or a part of text."""
    output = item
    if isinstance(item, dict):
        output = item.get("output", item.get("text"))
    if isinstance(output, str):
        return output
    parts = output if isinstance(output, list) else [output]
    if output is None or any(isinstance(part, dict) and "type" in part for part in parts):
        return _content({"content": [item if output is None else part for part in parts]}, index)
    return _json(output, f"messages[{index}]: a tool's output")


def _reasoning_and_content(message: Message, index: int) -> tuple[str, str]:
    """Return reasoning and content; reasoning from a field of its own, or cut out of content that still holds the tags.

    Content is stripped. Whitespace in reasoning is preserved: for whitespace-only reasoning 4.7 writes both
    tags, for empty reasoning only the closing one.
    """
    content = _content(message, index)
    fields = [message.get(name) for name in REASONING_FIELDS]
    texts = [field for field in fields if isinstance(field, str)]
    reasoning = next(filter(None, texts), "")
    if not texts and "</think>" in content:
        pieces = content.split("</think>")
        reasoning = pieces[0].rstrip("\n").split("<think>")[-1].lstrip("\n")
        content = pieces[-1]
    return reasoning, content.strip()


def _content(message: Message, index: int) -> str:
    content = message.get("content")
    if content is None:
        return ""
    if isinstance(content, str):
        return content
    if not isinstance(content, list | tuple):
        raise ValueError(
            f"messages[{index}]: content must be text or a list of parts, not {type(content).__name__}"
        )
    texts: list[str] = []
    for part in content:
        text = part.get("text") if isinstance(part, dict) else part
        if not isinstance(text, str):
            raise ValueError(
                f"messages[{index}]: content has a part that is not text; these models read text only"
            )
        texts.append(text)
    return "".join(texts)


def _call(call: Any, index: int) -> tuple[str, dict[str, Any]]:
    """Return (name, arguments) of a tool call in either form; arguments are a dict, a JSON object as text, or absent."""
    function = call.get("function") or call if isinstance(call, dict) else None
    if not isinstance(function, dict):
        function = {}
    name = function.get("name")
    arguments = function.get("arguments") or {}
    if isinstance(arguments, str):
        try:
            arguments = json.loads(arguments)
        except ValueError as error:
            raise ValueError(
                f"messages[{index}]: arguments of {name!r} are not JSON: {error}"
            ) from error
    named = isinstance(arguments, dict) and all(isinstance(key, str) for key in arguments)
    if not isinstance(name, str) or not named:
        raise ValueError(
            f"messages[{index}]: a tool call needs a name and an object of arguments with names, got {call!r:.80}"
        )
    return name, arguments


def _role(message: Any, index: int) -> Role:
    role = message.get("role") if isinstance(message, Mapping) else None
    if not isinstance(role, str) or role not in ROLES:
        raise ValueError(f"messages[{index}]: role must be one of {', '.join(ROLES)}, got {role!r}")
    return Role(role)


def _json(value: Any, what: str) -> str:
    """Return a value as JSON. Raises ValueError that names `what` if it is none."""
    try:
        return json.dumps(value, ensure_ascii=False, allow_nan=False)
    except (TypeError, ValueError, RecursionError) as error:
        raise ValueError(f"{what} is not JSON: {error}") from None


def _joined(walk: Iterable[Segment]) -> list[Segment]:
    """Join neighbouring text, because a tokenizer may merge across the border; drop empty text.

    The mask never changes between two text segments: there is a special token at every such border.
    """
    joined: list[Segment] = []
    non_empty = (segment for segment in walk if segment.text)
    for special, group in groupby(non_empty, key=lambda segment: segment.special):
        neighbours = list(group)
        if special:
            joined += neighbours
            continue
        trained = neighbours[0].trained
        assert all(segment.trained == trained for segment in neighbours), neighbours
        text = "".join(segment.text for segment in neighbours)
        joined.append(Segment(text, special=False, trained=trained))
    return joined


def _ids(tokenizer: ChatTokenizer, segment: Segment) -> list[int]:
    if not segment.special:
        return tokenizer.encode(segment.text)
    if segment.text not in tokenizer.special:
        raise ValueError(
            f"the tokenizer has no special token {segment.text}; train one with minglm or load GLM-4.5's"
        )
    return [tokenizer.special[segment.text]]
