"""Check OpenAI requests and turn them into engine requests (no section in the paper).

    body (parsed JSON) -> Job: prompts as token ids, sampler settings, and how to decode and send the choices

Every value is checked here, before anything is queued; what is wrong raises an `APIError` that names the field. Fields
that would change the answer and that this server does not support (penalties, a forced JSON format) are refused; fields
that change nothing (`user`, `metadata`) and unknown fields are ignored.

Beyond OpenAI: `chat_template_kwargs` {enable_thinking, clear_thinking} or `thinking` {type, clear_thinking}, `top_k`,
`min_p`, and `return_token_ids`, with which an agent trains on exactly the tokens that were sampled. A prompt of
`/v1/completions` may be token ids. `stop` strings are matched against visible content only, not against reasoning.

A forced call (`tool_choice` required, or a named function) is started in the prompt, after empty reasoning, so the model
can only complete the call.
"""

import math
import re
import secrets
import time
from dataclasses import dataclass, field
from typing import Any, NamedTuple, TypeVar

from minglm.chat.schema import schema_mistake
from minglm.chat.template import dialect_of, render
from minglm.data.tokenizer import Tokenizer
from minglm.inference.request import Request
from minglm.serve.errors import APIError

JSONObject = dict[str, Any]

MAX_STOP_STRINGS = 16
MAX_STOP_CHARS = 256
MAX_TOOLS = 256
MAX_TOP_LOGPROBS = 20
MIN_TEMPERATURE = 1e-3  # logits divided by less overflow
SEED_STEP = (
    0x9E3779B97F4A7C15  # 2^64 over the golden ratio: seeds of the choices that differ in every bit
)


@dataclass(frozen=True)
class ServedModel:
    """What is served: a tokenizer, the model's name and longest sequence, and its chat template."""

    tokenizer: Tokenizer
    name: str
    max_model_len: int
    """Most tokens of prompt and completion together."""
    dialect: str = "glm-4.5"
    bare_tools: bool = False
    """Render {"name", ...} in place of {"type": "function", "function": {"name", ...}}, as in figure 4 and in our runs."""
    max_choices: int = 64
    """Most choices of one request: n times prompts."""


@dataclass(frozen=True)
class Job:
    """A request that was accepted."""

    chat: bool
    requests: list[Request]
    """One engine request for each choice."""
    prompts: int = 1
    """How many prompts; each has the same number of choices."""
    stream: bool = False
    include_usage: bool = False
    """End a stream with the number of tokens."""
    logprobs: int | None = None
    """How many alternatives to report with each token; None: no log-probabilities."""
    stop_strings: tuple[str, ...] = ()
    tools: list[JSONObject] | None = None
    """Offered to the model; calls to other tools are faults."""
    opened: bool = False
    """The prompt ends inside the reasoning."""
    prefix: str = ""
    """The beginning of a forced call, which the prompt holds."""
    parallel_tool_calls: bool = True
    """False ends the message after its first call."""
    return_token_ids: bool = False
    created: int = field(default_factory=lambda: int(time.time()))
    """Unix time in seconds."""
    id: str = field(default_factory=lambda: secrets.token_hex(12))


class Thinking(NamedTuple):
    """The thinking switches of a request."""

    enabled: bool
    clear: bool
    """Drop the reasoning of older turns."""


class OfferedTools(NamedTuple):
    """The tools of a request."""

    tools: list[JSONObject]
    forced: str | None
    """The name of the function to call, "" for any, None if no call is forced."""


class ChatPrompt(NamedTuple):
    """A rendered conversation, ready for the engine."""

    ids: list[int]
    prefix: str
    """The beginning of the assistant's turn that `ids` already hold: a forced call."""


def chat_job(body: Any, served: ServedModel) -> Job:
    """Return the `Job` of a chat completion. Raises `APIError`."""
    common = _common_fields(body, served)
    sampler = _sampler_settings(body)
    switches = _thinking(body)
    offered = _offered_tools(body)
    messages = _messages(body)
    thinking = switches.enabled and offered.forced is None
    prompt = _chat_prompt(messages, offered, thinking, switches.clear, served)
    logprobs = None
    if _typed(body, "logprobs", bool, False):
        logprobs = _integer(body, "top_logprobs", 0, 0, MAX_TOP_LOGPROBS)
    elif body.get("top_logprobs"):
        raise APIError("top_logprobs needs logprobs = true", "top_logprobs")
    limit_field = "max_completion_tokens"  # OpenAI's newer name for max_tokens
    if body.get(limit_field) is None:
        limit_field = "max_tokens"
    max_new_tokens = _integer(body, limit_field, served.max_model_len, 1)
    sampler["top_logprobs"] = logprobs or 0
    return Job(
        chat=True,
        requests=_requests([prompt.ids], max_new_tokens, sampler, body, served),
        logprobs=logprobs,
        tools=offered.tools,
        opened=thinking and dialect_of(served.dialect).opens,
        prefix=prompt.prefix,
        parallel_tool_calls=_typed(body, "parallel_tool_calls", bool, True),
        **common,
    )


def text_job(body: Any, served: ServedModel) -> Job:
    """Return the `Job` of a plain completion. Raises `APIError`."""
    common = _common_fields(body, served)
    sampler = _sampler_settings(body)
    prompts = _prompts(body, served.tokenizer)
    for name in ("echo", "suffix"):
        if body.get(name):
            raise APIError("echo and suffix are not supported", name)
    logprobs = None
    if body.get("logprobs") is not None:
        logprobs = _integer(body, "logprobs", 0, 0, MAX_TOP_LOGPROBS)
    max_new_tokens = _integer(body, "max_tokens", 16, 1)
    sampler["top_logprobs"] = logprobs or 0
    return Job(
        chat=False,
        requests=_requests(prompts, max_new_tokens, sampler, body, served),
        prompts=len(prompts),
        logprobs=logprobs,
        **common,
    )


def _common_fields(body: Any, served: ServedModel) -> JSONObject:
    """Return the fields of a `Job` that both endpoints share."""
    if not isinstance(body, dict):
        raise APIError("the body must be a JSON object")
    model = body.get("model", served.name)
    if not isinstance(model, str):
        raise APIError("model must be a string", "model")
    if model != served.name:
        message = f"the model {model!r:.80} is not served here; {served.name!r} is"
        raise APIError(message, "model", 404, "model_not_found")
    _refuse_unsupported(body)
    options = _typed(body, "stream_options", dict, {})
    return {
        "stream": _typed(body, "stream", bool, False),
        "include_usage": bool(options.get("include_usage")),
        "stop_strings": _stop_strings(body),
        "return_token_ids": _typed(body, "return_token_ids", bool, False),
    }


def _refuse_unsupported(body: JSONObject) -> None:
    """Refuse fields that would change the answer and that this server cannot honour."""
    penalties = ("frequency_penalty", "presence_penalty", "logit_bias")
    for name in (*penalties, "functions", "function_call"):
        if body.get(name):
            raise APIError(f"{name} is not supported", name, code="unsupported_parameter")
    response_format = body.get("response_format") or {"type": "text"}
    if not isinstance(response_format, dict) or response_format.get("type") != "text":
        message = "response_format: only text is supported"
        raise APIError(message, "response_format", code="unsupported_parameter")


def _stop_strings(body: JSONObject) -> tuple[str, ...]:
    stops = body.get("stop") or []
    if isinstance(stops, str):
        stops = [stops]
    if not isinstance(stops, list) or not all(
        isinstance(stop, str) and 0 < len(stop) <= MAX_STOP_CHARS for stop in stops
    ):
        message = f"stop must be a string or a list of strings of 1 to {MAX_STOP_CHARS} characters"
        raise APIError(message, "stop")
    if len(stops) > MAX_STOP_STRINGS:
        raise APIError(f"stop: at most {MAX_STOP_STRINGS} strings", "stop")
    return tuple(stops)


def _sampler_settings(body: JSONObject) -> JSONObject:
    """Return the sampler's fields of a `Request`."""
    temperature = _number(body, "temperature", 1.0, 0, 2)
    return {
        "temperature": temperature if temperature >= MIN_TEMPERATURE else 0.0,
        "top_p": _number(body, "top_p", 1.0, 0, 1),
        "min_p": _number(body, "min_p", 0.0, 0, 1),
        "top_k": max(0, _integer(body, "top_k", 0, -1, 2**31)),  # other servers: -1 is everything
    }


T = TypeVar("T")


def _typed(body: JSONObject, name: str, of_type: type[T], default: T) -> T:
    """Return a field of the body, or the default if it is absent or null."""
    value = body.get(name)
    if value is None:
        return default
    if not isinstance(value, of_type):
        words = {bool: "true or false", dict: "an object", list: "a list", str: "a string"}
        raise APIError(f"{name} must be {words[of_type]}", name)
    return value


def _number(
    body: JSONObject, name: str, default: float, low: float, high: float = math.inf
) -> float:
    value = body.get(name)
    if value is None:
        return default
    if isinstance(value, bool) or not isinstance(value, int | float) or not low <= value <= high:
        raise APIError(f"{name} must be a number {_bounds(low, high)}", name)
    return value


def _integer(body: JSONObject, name: str, default: int, low: float, high: float = math.inf) -> int:
    value = body.get(name)
    if value is None:
        return default
    if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
        raise APIError(f"{name} must be an integer {_bounds(low, high)}", name)
    return value


def _bounds(low: float, high: float) -> str:
    return f"from {low} to {high}" if high < math.inf else f"of at least {low}"


def _requests(
    prompts: list[list[int]],
    max_new_tokens: int,
    sampler: JSONObject,
    body: JSONObject,
    served: ServedModel,
) -> list[Request]:
    """Return n engine requests for each prompt, with seeds that differ and that `seed` decides."""
    n = _integer(body, "n", 1, 1)
    choices = n * len(prompts)
    if choices > served.max_choices:
        message = f"{choices} choices were asked for at once; at most {served.max_choices}"
        raise APIError(message, "n" if n > 1 else "prompt")
    for prompt in prompts:
        if len(prompt) >= served.max_model_len:
            most = served.max_model_len - 1
            message = f"the prompt has {len(prompt)} tokens; this model takes at most {most}"
            param = "messages" if "messages" in body else "prompt"
            raise APIError(message, param, code="context_length_exceeded")
    seed = _integer(body, "seed", secrets.randbits(62), -(2**63), 2**63 - 1)
    requests: list[Request] = []
    for prompt in prompts:
        room = served.max_model_len - len(prompt)
        for _ in range(n):
            choice_seed = (seed + len(requests) * SEED_STEP) % 2**63
            requests.append(Request(prompt, min(max_new_tokens, room), seed=choice_seed, **sampler))
    return requests


def _chat_prompt(
    messages: list[JSONObject],
    offered: OfferedTools,
    thinking: bool,
    clear_thinking: bool,
    served: ServedModel,
) -> ChatPrompt:
    """Render the conversation, and begin the forced call if there is one."""
    tools = offered.tools
    if served.bare_tools:
        tools = [tool["function"] for tool in tools]
    try:
        ids = render(
            served.tokenizer,
            messages,
            tools,
            thinking,
            generation_prompt=True,
            dialect=served.dialect,
            clear_thinking=clear_thinking,
        ).ids
        name = offered.forced
        if name is None:
            return ChatPrompt(ids, "")
        newline = dialect_of(served.dialect).line  # empty in the 4.7 dialect
        name_line = name + newline if name else ""
        ids += served.tokenizer.encode(newline)
        ids.append(served.tokenizer.special["<tool_call>"])
        ids += served.tokenizer.encode(name_line)
        return ChatPrompt(ids, f"<tool_call>{name_line}")
    except ValueError as error:
        raise APIError(str(error), "messages") from None


def _thinking(body: JSONObject) -> Thinking:
    """Return the switches, in the two spellings that clients use; `chat_template_kwargs` wins."""
    kwargs = _typed(body, "chat_template_kwargs", dict, {})
    spelled = _typed(body, "thinking", dict, {})
    if spelled.get("type", "enabled") not in ("enabled", "disabled"):
        raise APIError("thinking.type must be enabled or disabled", "thinking")
    enabled = kwargs.get("enable_thinking", spelled.get("type") != "disabled")
    clear = kwargs.get("clear_thinking", spelled.get("clear_thinking", True))
    if not isinstance(enabled, bool) or not isinstance(clear, bool):
        message = "enable_thinking and clear_thinking must be true or false"
        raise APIError(message, "chat_template_kwargs")
    return Thinking(enabled, clear)


def _offered_tools(body: JSONObject) -> OfferedTools:
    """Return the tools to offer, and the call that `tool_choice` forces."""
    tools: list[JSONObject] = _typed(body, "tools", list, [])
    if len(tools) > MAX_TOOLS:
        raise APIError(f"tools: at most {MAX_TOOLS}", "tools")
    for i, tool in enumerate(tools):
        _check_tool(tool, f"tools[{i}]")
    names = [tool["function"]["name"] for tool in tools]
    choice = body.get("tool_choice")
    if choice is None or choice == "auto":
        return OfferedTools(tools, None)
    if choice == "none":
        return OfferedTools([], None)
    if choice == "required":
        if not tools:
            raise APIError("tool_choice is required, but there are no tools", "tool_choice")
        return OfferedTools(tools, names[0] if len(names) == 1 else "")
    function = choice.get("function") if isinstance(choice, dict) else None
    name = function.get("name") if isinstance(function, dict) else None
    if name not in names:
        message = "tool_choice must be none, auto, required, or name a function of tools"
        raise APIError(message, "tool_choice")
    return OfferedTools(tools, name)


def _check_tool(tool: Any, where: str) -> None:
    """Refuse a tool whose schema the parser could not read an argument's type from."""
    function = tool.get("function") if isinstance(tool, dict) else None
    name = function.get("name") if isinstance(function, dict) else None
    if not isinstance(function, dict) or not isinstance(name, str) or not name:
        form = '{"type": "function", "function": {"name": ..., "parameters": ...}}'
        raise APIError(f"{where} must be {form}", where)
    if not re.fullmatch(r"[\w.:/-]{1,64}", name):
        message = f"{where}.function.name must be 1 to 64 letters, digits, or any of _ . : / -"
        raise APIError(message, where)
    mistake = schema_mistake(function.get("parameters") or {})
    if mistake is not None:
        raise APIError(f"{where}.function.parameters: {mistake}", where)


def _messages(body: JSONObject) -> list[JSONObject]:
    """Return the messages in the template's words: the role developer is system."""
    messages: list[Any] = _typed(body, "messages", list, [])
    if not messages:
        raise APIError("messages must be a list of at least one message", "messages")
    checked: list[JSONObject] = []
    for i, message in enumerate(messages):
        if not isinstance(message, dict):
            raise APIError(f"messages[{i}] must be an object", "messages")
        if not isinstance(message.get("tool_calls") or [], list):
            raise APIError(f"messages[{i}].tool_calls must be a list", "messages")
        if message.get("role") == "developer":
            message = {**message, "role": "system"}
        checked.append(message)
    return checked


def _prompts(body: JSONObject, tokenizer: Tokenizer) -> list[list[int]]:
    """Return `prompt` as lists of ids. It may be one text, one list of ids, or a list of either."""
    prompts = body.get("prompt")
    if isinstance(prompts, str) or (
        isinstance(prompts, list) and prompts and isinstance(prompts[0], int)
    ):
        prompts = [prompts]
    if not isinstance(prompts, list) or not prompts:
        raise APIError("prompt must be text, token ids, or a list of these", "prompt")
    checked: list[list[int]] = []
    for prompt in prompts:
        ids = tokenizer.encode(prompt) if isinstance(prompt, str) else prompt
        if not _are_ids(ids, tokenizer.vocab_size):
            message = f"prompt must be text, or token ids from 0 to {tokenizer.vocab_size - 1}"
            raise APIError(message, "prompt")
        if not ids:
            raise APIError("prompt is empty", "prompt")
        checked.append(ids)
    return checked


def _are_ids(ids: Any, vocab_size: int) -> bool:
    if not isinstance(ids, list):
        return False
    for token in ids:
        if not isinstance(token, int) or isinstance(token, bool) or not 0 <= token < vocab_size:
            return False
    return True
