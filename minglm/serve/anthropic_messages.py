"""Answer Anthropic's Messages API, as far as a chat with tools needs it (no section in the paper).

    POST /v1/messages    {"system", "messages": [{"role", "content": text or blocks}], "tools", ...}

A body becomes a chat request of `requests.py`; the answer becomes blocks: thinking, text, tool_use. As in the
original, thinking is off unless it is asked for, and `budget_tokens` bounds the reasoning's tokens. A block
of thinking has an empty signature: nothing is encrypted, and what comes back is taken as it is.
"""

import json
from collections.abc import AsyncIterator
from typing import Any

from minglm.serve.blocks import Block, BlockKind, BlockReader, Happening, blocks_of
from minglm.serve.errors import APIError, anthropic_body
from minglm.serve.fields import refuse_unknown
from minglm.serve.formats import as_json, sse
from minglm.serve.requests import ServedModel, chat_job
from minglm.serve.responses import whole_response
from minglm.serve.stream import Answer, AnswerStream, ChoiceEnd

JSONObject = dict[str, Any]

FIELDS = frozenset(
    {
        *("model", "messages", "max_tokens", "system", "stream", "tools", "tool_choice"),
        *("thinking", "temperature", "top_p", "top_k", "stop_sequences", "output_config"),
        "cache_control",  # of a cache, not of the answer
    }
)


class MessagesFormat:
    """One request of the Messages API. Raises `APIError`."""

    def __init__(self, body: Any, served: ServedModel, needs_limit: bool = True) -> None:
        self.served = served
        self.chat = chat_body(body, needs_limit)
        self.job = chat_job(self.chat, served)

    async def whole(self, stream: AnswerStream) -> JSONObject:
        """Return the message."""
        response = await whole_response(self.job, stream, self.served.name)
        (choice,) = response["choices"]
        content = [_block(block) for block in blocks_of(choice["message"])]
        message = self._message(content, response["usage"]["prompt_tokens"])
        message |= _end(stream.answers[0])
        message["usage"]["output_tokens"] = response["usage"]["completion_tokens"]
        return message

    async def events(self, stream: AnswerStream) -> AsyncIterator[bytes]:
        """Yield the events of a message."""
        yield _event("message_start", message=self._message([], stream.prompt_tokens))
        reader = BlockReader()
        async for _, answer, deltas in stream:
            for delta in deltas:
                for event in reader.read(delta):
                    yield _block_event(event.happening, event.block, event.text)
            if answer.finish_reason is not None:
                for event in reader.end():
                    yield _block_event(event.happening, event.block, event.text)
                usage = {"output_tokens": stream.completion_tokens}
                yield _event("message_delta", delta=_end(answer), usage=usage)
        yield _event("message_stop")

    def failure(self, error: APIError) -> bytes:
        """Return the error as an event."""
        return sse(as_json(anthropic_body(error)), "error")

    def _message(self, content: list[JSONObject], prompt_tokens: int) -> JSONObject:
        return {
            "id": f"msg_{self.job.id}",
            "type": "message",
            "role": "assistant",
            "model": self.served.name,
            "content": content,
            "stop_reason": None,
            "stop_sequence": None,
            "usage": {"input_tokens": prompt_tokens, "output_tokens": 0},
        }


def chat_body(body: Any, needs_limit: bool = True) -> JSONObject:
    """Return a body of the Messages API as one of chat completions. Raises `APIError`."""
    if not isinstance(body, dict):
        raise APIError("the body must be a JSON object")
    refuse_unknown(body, FIELDS)
    if needs_limit and body.get("max_tokens") is None:
        raise APIError("max_tokens is required", "max_tokens")
    chat: JSONObject = {"messages": _system(body.get("system")) + _messages(body.get("messages"))}
    for name in ("model", "stream", "max_tokens", "temperature", "top_p", "top_k"):
        chat[name] = body.get(name)
    chat["stop"] = body.get("stop_sequences")
    chat |= _thinking(body.get("thinking"))
    chat |= _output(body.get("output_config"))
    chat |= _tools(body.get("tools"), body.get("tool_choice"))
    return {name: value for name, value in chat.items() if value is not None}


def _system(system: Any) -> list[JSONObject]:
    if not system:
        return []
    return [{"role": "system", "content": _text(system, "system")}]


def _messages(messages: Any) -> list[JSONObject]:
    if not isinstance(messages, list) or not messages:
        raise APIError("messages must be a list of at least one message", "messages")
    chat: list[JSONObject] = []
    for i, message in enumerate(messages):
        where = f"messages[{i}]"
        role = message.get("role") if isinstance(message, dict) else None
        if role == "user":
            chat += _user(message.get("content"), where)
        elif role == "assistant":
            chat.append(_assistant(message.get("content"), where))
        elif role == "system":
            chat += _system(message.get("content"))
        else:
            raise APIError(f"{where}.role must be user or assistant", "messages")
    if chat[-1]["role"] == "assistant":
        message = "the last message must be the user's: an answer cannot be continued"
        raise APIError(message, "messages")
    return chat


def _user(content: Any, where: str) -> list[JSONObject]:
    """Return a user's message: the results of tools first, as the template has them, then the text."""
    if isinstance(content, str):
        return [{"role": "user", "content": content}]
    results: list[JSONObject] = []
    texts: list[Any] = []
    for block in _blocks(content, where):
        if block["type"] == "tool_result":
            output = block.get("content")
            text = _text(output, where) if output else ""
            call = block.get("tool_use_id")
            results.append({"role": "tool", "tool_call_id": call, "content": text})
        else:
            texts.append(block)
    if texts:
        results.append({"role": "user", "content": _text(texts, where)})
    return results


def _assistant(content: Any, where: str) -> JSONObject:
    if isinstance(content, str):
        return {"role": "assistant", "content": content}
    message: JSONObject = {"role": "assistant", "content": "", "tool_calls": []}
    for block in _blocks(content, where):
        if block["type"] == "thinking":
            so_far = message.get("reasoning_content", "")
            message["reasoning_content"] = so_far + str(block.get("thinking") or "")
        elif block["type"] == "tool_use":
            name = block.get("name")
            arguments = block.get("input") or {}
            if not isinstance(name, str) or not isinstance(arguments, dict):
                message_ = f"{where}: a tool_use needs a name and an object as input"
                raise APIError(message_, "messages")
            function = {"name": name, "arguments": arguments}
            call = {"id": block.get("id"), "type": "function", "function": function}
            message["tool_calls"].append(call)
        else:
            message["content"] += _text([block], where)
    return message


def _blocks(content: Any, where: str) -> list[JSONObject]:
    if not isinstance(content, list):
        raise APIError(f"{where}.content must be text or a list of blocks", "messages")
    for block in content:
        if not isinstance(block, dict) or not isinstance(block.get("type"), str):
            raise APIError(f"{where}.content: a block must be an object with a type", "messages")
    return content


def _text(content: Any, where: str) -> str:
    """Return the text of a content that may be blocks of text."""
    if isinstance(content, str):
        return content
    texts: list[str] = []
    for block in _blocks(content, where):
        if block["type"] != "text" or not isinstance(block.get("text"), str):
            message = f"{where}: a block of type {block['type']!r:.40}; this model reads text only"
            raise APIError(message, "system" if where == "system" else "messages")
        texts.append(block["text"])
    return "".join(texts)


def _thinking(thinking: Any) -> JSONObject:
    if thinking is None:
        return {"enable_thinking": False}
    kind = thinking.get("type") if isinstance(thinking, dict) else None
    if kind not in ("enabled", "adaptive", "disabled"):
        raise APIError("thinking.type must be enabled, adaptive or disabled", "thinking")
    refuse_unknown(thinking, {"type", "budget_tokens", "display"}, "thinking")
    if thinking.get("display") not in (None, "summarized"):
        raise APIError("thinking.display: the reasoning is always shown", "thinking")
    switches: JSONObject = {"enable_thinking": kind != "disabled"}
    if thinking.get("budget_tokens") is not None and kind == "enabled":
        switches["thinking_token_budget"] = thinking["budget_tokens"]
    return switches


def _output(config: Any) -> JSONObject:
    if config is None:
        return {}
    if not isinstance(config, dict):
        raise APIError("output_config must be an object", "output_config")
    refuse_unknown(config, {"format", "effort"}, "output_config")
    if config.get("effort") not in (None, "high"):
        message = "output_config.effort: this model has no levels; leave it out"
        raise APIError(message, "output_config")
    return {"response_format": config.get("format")}


def _tools(tools: Any, choice: Any) -> JSONObject:
    """Return tools and the choice among them in OpenAI's words."""
    if tools is not None and not isinstance(tools, list):
        raise APIError("tools must be a list", "tools")
    functions: list[JSONObject] = []
    for i, tool in enumerate(tools or ()):
        where = f"tools[{i}]"
        if not isinstance(tool, dict) or tool.get("type") not in (None, "custom"):
            raise APIError(f"{where}: only tools of type custom can be called", where)
        refuse_unknown(
            tool, {"name", "description", "input_schema", "type", "strict", "cache_control"}, where
        )
        function = {
            "name": tool.get("name"),
            "description": tool.get("description"),
            "parameters": tool.get("input_schema"),
            "strict": tool.get("strict"),
        }
        function = {name: value for name, value in function.items() if value is not None}
        functions.append({"type": "function", "function": function})
    chat: JSONObject = {"tools": functions or None}
    if choice is None:
        return chat
    if not isinstance(choice, dict):
        raise APIError("tool_choice must be an object", "tool_choice")
    refuse_unknown(choice, {"type", "name", "disable_parallel_tool_use"}, "tool_choice")
    if choice.get("disable_parallel_tool_use"):
        chat["parallel_tool_calls"] = False
    kinds = {"auto": "auto", "any": "required", "none": "none"}
    kind = choice.get("type")
    if kind == "tool":
        named = {"type": "function", "function": {"name": choice.get("name")}}
        chat["tool_choice"] = named
    elif isinstance(kind, str) and kind in kinds:
        chat["tool_choice"] = kinds[kind]
    else:
        raise APIError("tool_choice.type must be auto, any, tool or none", "tool_choice")
    return chat


def _end(answer: Answer) -> JSONObject:
    """Return why a message ended, and the fault in its format if it has one, which is no field of the original."""
    end: JSONObject = {"stop_reason": "end_turn", "stop_sequence": None}
    if answer.finish_reason is ChoiceEnd.LENGTH:
        end["stop_reason"] = "max_tokens"
    elif answer.calls:
        end["stop_reason"] = "tool_use"
    elif answer.stop_strings.hit:
        end |= {"stop_reason": "stop_sequence", "stop_sequence": answer.stop_strings.found}
    if answer.format_error:
        end["format_error"] = answer.format_error
    return end


def _block(block: Block) -> JSONObject:
    """Return a block of a whole message."""
    if block.kind is BlockKind.REASONING:
        return {"type": "thinking", "thinking": block.text, "signature": ""}
    if block.kind is BlockKind.TEXT:
        return {"type": "text", "text": block.text}
    arguments = json.loads(block.text or "{}")
    return {"type": "tool_use", "id": block.call_id, "name": block.name, "input": arguments}


def _block_event(happening: Happening, block: Block, text: str) -> bytes:
    """Return what happens to a block as an event."""
    if happening is Happening.BEGIN:
        empty = Block(block.kind, block.number, call_id=block.call_id, name=block.name)
        return _event("content_block_start", index=block.number, content_block=_block(empty))
    if happening is Happening.END:
        return _event("content_block_stop", index=block.number)
    deltas = {
        BlockKind.REASONING: {"type": "thinking_delta", "thinking": text},
        BlockKind.TEXT: {"type": "text_delta", "text": text},
        BlockKind.CALL: {"type": "input_json_delta", "partial_json": text},
    }
    return _event("content_block_delta", index=block.number, delta=deltas[block.kind])


def _event(name: str, /, **fields: Any) -> bytes:
    return sse(as_json({"type": name, **fields}), name)
