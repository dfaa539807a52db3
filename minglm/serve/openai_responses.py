"""Answer OpenAI's Responses API, as far as a chat with tools needs it (no section in the paper).

    POST /v1/responses    {"input": text or items, "instructions", "tools", "text": {"format"}, "reasoning": {"effort"}}

A body becomes a chat request of `requests.py`; the answer becomes items: reasoning, message, function_call.
Nothing is stored, so `previous_response_id` is refused: a client sends the items back.
"""

from collections.abc import AsyncIterator
from typing import Any

from minglm.serve.blocks import Block, BlockKind, BlockReader, Happening, blocks_of
from minglm.serve.errors import APIError
from minglm.serve.fields import refuse_unknown
from minglm.serve.formats import as_json, sse
from minglm.serve.requests import ServedModel, chat_job
from minglm.serve.responses import whole_response
from minglm.serve.stream import AnswerStream, ChoiceEnd

JSONObject = dict[str, Any]

FIELDS = frozenset(
    {
        *("model", "input", "instructions", "stream", "stream_options", "max_output_tokens"),
        *("tools", "tool_choice", "parallel_tool_calls", "text", "reasoning"),
        *("temperature", "top_p", "include"),
    }
)
INCLUDABLE = ("reasoning.encrypted_content",)
"""What a client may ask to be included: the reasoning is there, as text."""


class ResponsesFormat:
    """One request of the Responses API. Raises `APIError`."""

    def __init__(self, body: Any, served: ServedModel) -> None:
        self.served = served
        self.chat = chat_body(body)
        self.job = chat_job(self.chat, served)
        self.body: JSONObject = body
        self.number = 0  # of the next event

    async def whole(self, stream: AnswerStream) -> JSONObject:
        """Return the response."""
        response = await whole_response(self.job, stream, self.served.name)
        (choice,) = response["choices"]
        output = [self._item(block) for block in blocks_of(choice["message"])]
        return self._response(output, stream)

    async def events(self, stream: AnswerStream) -> AsyncIterator[bytes]:
        """Yield the events of a response."""
        yield self._event("response.created", response=self._response([], None))
        yield self._event("response.in_progress", response=self._response([], None))
        reader = BlockReader()
        async for _, answer, deltas in stream:
            for delta in deltas:
                for event in reader.read(delta):
                    for data in self._block_events(event.happening, event.block, event.text):
                        yield data
            if answer.finish_reason is not None:
                for event in reader.end():
                    for data in self._block_events(event.happening, event.block, event.text):
                        yield data
        response = self._response([self._item(block) for block in reader.blocks], stream)
        yield self._event(f"response.{response['status']}", response=response)

    def failure(self, error: APIError) -> bytes:
        """Return the failed response as an event."""
        response = self._response([], None) | {
            "status": "failed",
            "error": {"code": "server_error", "message": error.body["error"]["message"]},
        }
        return self._event("response.failed", response=response)

    def _response(self, output: list[JSONObject], stream: AnswerStream | None) -> JSONObject:
        """Return the response's object. stream: when it has ended."""
        body = self.body
        response: JSONObject = {
            "id": f"resp_{self.job.id}",
            "object": "response",
            "created_at": self.job.created,
            "status": "in_progress",
            "error": None,
            "incomplete_details": None,
            "instructions": body.get("instructions"),
            "max_output_tokens": body.get("max_output_tokens"),
            "model": self.served.name,
            "output": output,
            "parallel_tool_calls": self.job.parallel_tool_calls,
            "previous_response_id": None,
            "reasoning": body.get("reasoning") or {"effort": None, "summary": None},
            "store": False,
            "temperature": self.job.requests[0].temperature,
            "text": body.get("text") or {"format": {"type": "text"}},
            "tool_choice": body.get("tool_choice") or "auto",
            "tools": body.get("tools") or [],
            "top_p": self.job.requests[0].top_p,
            "truncation": "disabled",
            "metadata": body.get("metadata") or {},
            "usage": None,
        }
        if stream is None:
            return response
        (answer,) = stream.answers
        cut = answer.finish_reason is ChoiceEnd.LENGTH
        response["status"] = "incomplete" if cut else "completed"
        if cut:
            response["incomplete_details"] = {"reason": "max_output_tokens"}
        if answer.format_error:
            response["format_error"] = answer.format_error
        response["usage"] = {
            "input_tokens": stream.prompt_tokens,
            "input_tokens_details": {"cached_tokens": 0, "cache_write_tokens": 0},
            "output_tokens": stream.completion_tokens,
            "output_tokens_details": {"reasoning_tokens": answer.reasoning_tokens},
            "total_tokens": stream.prompt_tokens + stream.completion_tokens,
        }
        return response

    def _item(self, block: Block, status: str = "completed") -> JSONObject:
        """Return a block as an item."""
        name = f"{self.job.id}_{block.number}"
        if block.kind is BlockKind.REASONING:
            content = [{"type": "reasoning_text", "text": block.text}]
            return {"type": "reasoning", "id": f"rs_{name}", "summary": [], "content": content}
        if block.kind is BlockKind.TEXT:
            return {
                "type": "message",
                "id": f"msg_{name}",
                "role": "assistant",
                "status": status,
                "content": [_text_part(block.text)],
            }
        return {
            "type": "function_call",
            "id": f"fc_{name}",
            "call_id": block.call_id,
            "name": block.name,
            "arguments": block.text,
            "status": status,
        }

    def _block_events(self, happening: Happening, block: Block, text: str) -> list[bytes]:
        """Return the events of what happens to a block."""
        status = "incomplete" if block.withdrawn else "completed"
        item = self._item(block, "in_progress" if happening is Happening.BEGIN else status)
        at: JSONObject = {"item_id": item["id"], "output_index": block.number}
        if happening is Happening.BEGIN:
            empty = item | ({"content": []} if "content" in item else {})
            events = [
                self._event("response.output_item.added", item=empty, output_index=block.number)
            ]
            if "content" in item:
                part = item["content"][0]
                events.append(
                    self._event("response.content_part.added", **at, content_index=0, part=part)
                )
            return events
        kind = {
            BlockKind.REASONING: "response.reasoning_text",
            BlockKind.TEXT: "response.output_text",
            BlockKind.CALL: "response.function_call_arguments",
        }[block.kind]
        if block.kind is not BlockKind.CALL:
            at["content_index"] = 0
        more: JSONObject = {"logprobs": []} if block.kind is BlockKind.TEXT else {}
        if happening is Happening.MORE:
            return [self._event(f"{kind}.delta", **at, delta=text, **more)]
        if block.kind is BlockKind.CALL and block.withdrawn:
            events = []  # a client that is told the arguments would run the call
        elif block.kind is BlockKind.CALL:
            done = self._event(f"{kind}.done", **at, arguments=block.text, name=block.name)
            events = [done]
        else:
            part = item["content"][0]
            events = [
                self._event(f"{kind}.done", **at, text=block.text, **more),
                self._event("response.content_part.done", **at, part=part),
            ]
        events.append(
            self._event("response.output_item.done", item=item, output_index=block.number)
        )
        return events

    def _event(self, name: str, /, **fields: Any) -> bytes:
        number = self.number
        self.number += 1
        return sse(as_json({"type": name, "sequence_number": number, **fields}), name)


def _text_part(text: str) -> JSONObject:
    return {"type": "output_text", "text": text, "annotations": [], "logprobs": []}


def chat_body(body: Any) -> JSONObject:
    """Return a body of the Responses API as one of chat completions. Raises `APIError`."""
    if not isinstance(body, dict):
        raise APIError("the body must be a JSON object")
    included = body.get("include") or []
    if not isinstance(included, list) or any(name not in INCLUDABLE for name in included):
        raise APIError(f"include: only {', '.join(INCLUDABLE)} is known", "include")
    refuse_unknown(body, FIELDS)
    messages: list[JSONObject] = []
    instructions = body.get("instructions")
    if instructions is not None:
        if not isinstance(instructions, str):
            raise APIError("instructions must be a string", "instructions")
        messages.append({"role": "system", "content": instructions})
    chat: JSONObject = {"messages": messages + _items(body.get("input"))}
    for name in ("model", "stream", "temperature", "top_p", "parallel_tool_calls", "reasoning"):
        chat[name] = body.get(name)
    chat["max_completion_tokens"] = body.get("max_output_tokens")
    text = body.get("text") or {}
    if not isinstance(text, dict):
        raise APIError("text must be an object", "text")
    refuse_unknown(text, {"format"}, "text")
    chat["response_format"] = text.get("format")
    chat |= _tools(body.get("tools"), body.get("tool_choice"))
    options = body.get("stream_options") or {}
    if not isinstance(options, dict):
        raise APIError("stream_options must be an object", "stream_options")
    refuse_unknown(options, {"include_obfuscation"}, "stream_options")
    return {name: value for name, value in chat.items() if value is not None}


def _items(items: Any) -> list[JSONObject]:
    """Return the messages of an input; the items of one assistant turn become one message."""
    if isinstance(items, str):
        return [{"role": "user", "content": items}]
    if not isinstance(items, list) or not items:
        raise APIError("input must be text or a list of at least one item", "input")
    messages: list[JSONObject] = []
    turn: JSONObject | None = None  # the assistant's, while its items last
    for i, item in enumerate(items):
        where = f"input[{i}]"
        if not isinstance(item, dict):
            raise APIError(f"{where} must be an object", "input")
        kind = item.get("type", "message")
        role = item.get("role") if kind == "message" else None
        if kind in ("reasoning", "function_call") or role == "assistant":
            if turn is None or (kind == "reasoning" and (turn["content"] or turn["tool_calls"])):
                turn = {"role": "assistant", "content": "", "tool_calls": []}
                messages.append(turn)
            _add_to_turn(turn, item, kind, where)
            continue
        turn = None
        if kind == "message":
            messages.append({"role": role, "content": _text(item.get("content"), where)})
        elif kind == "function_call_output":
            text = _text(item.get("output"), where)
            call = item.get("call_id")
            messages.append({"role": "tool", "tool_call_id": call, "content": text})
        else:
            raise APIError(f"{where}: items of type {kind!r:.40} are not supported", "input")
    return messages


def _add_to_turn(turn: JSONObject, item: JSONObject, kind: Any, where: str) -> None:
    """Add an item of the assistant to its message."""
    if kind == "function_call":
        function = {"name": item.get("name"), "arguments": item.get("arguments") or "{}"}
        call = {"id": item.get("call_id"), "type": "function", "function": function}
        turn["tool_calls"].append(call)
    elif kind == "reasoning":
        text = _text(item.get("content") or [], where)
        turn["reasoning_content"] = turn.get("reasoning_content", "") + text
    else:
        turn["content"] += _text(item.get("content"), where)


def _text(content: Any, where: str) -> str:
    """Return the text of a content that may be parts of text."""
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise APIError(f"{where}: the content must be text or a list of parts", "input")
    texts: list[str] = []
    for part in content:
        text = part.get("text") if isinstance(part, dict) else None
        if not isinstance(text, str):
            raise APIError(
                f"{where} has a part that is not text; this model reads text only", "input"
            )
        texts.append(text)
    return "".join(texts)


def _tools(tools: Any, choice: Any) -> JSONObject:
    """Return tools and the choice among them in the words of chat completions."""
    if tools is not None and not isinstance(tools, list):
        raise APIError("tools must be a list", "tools")
    functions: list[JSONObject] = []
    for i, tool in enumerate(tools or ()):
        where = f"tools[{i}]"
        if not isinstance(tool, dict) or tool.get("type") != "function":
            raise APIError(f"{where}: only tools of type function can be called", where)
        # In this order: the prompt shows the object as it is here. strict = False asks for nothing.
        known = ("name", "description", "parameters", "strict")
        refuse_unknown(tool, {"type", *known}, where)
        function = {name: tool[name] for name in known if tool.get(name) not in (None, False)}
        functions.append({"type": "function", "function": function})
    chat: JSONObject = {"tools": functions or None, "tool_choice": choice}
    if isinstance(choice, dict):
        if choice.get("type") != "function":
            raise APIError(
                "tool_choice must be none, auto, required, or name a function", "tool_choice"
            )
        chat["tool_choice"] = {"type": "function", "function": {"name": choice.get("name")}}
    return chat
