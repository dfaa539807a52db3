"""OpenAI requests to engine requests: what the two completion endpoints accept (no section in the paper).

    body (parsed JSON) -> Job: prompts as token ids, sampler settings, and how to read and show the answers

Every value is checked here, before anything is queued. `Refused` carries the status and the error object that OpenAI
clients know. Fields that would change the answer and that this server cannot honour (penalties, a forced JSON format)
are refused; fields that change nothing (`user`, `metadata`) and unknown ones are ignored.

Beyond OpenAI: `chat_template_kwargs` {enable_thinking, clear_thinking} or `thinking` {type, clear_thinking}, `top_k`,
`min_p`, and `return_token_ids`, with which an agent trains on the very tokens that were sampled. A prompt of
`/v1/completions` may be token ids. `stop` strings are looked for in what the client sees as content, not in reasoning.

A forced call (`tool_choice` required, or a named function) is begun in the prompt, after an empty reasoning: the model
cannot but go on with a call.
"""

import math
import re
import secrets
import time
from dataclasses import dataclass, field

from minglm.chat import render
from minglm.chat.template import dialect_of
from minglm.inference import Request

MOST_STOPS, MOST_STOP_LETTERS, MOST_TOOLS = 16, 256, 256


class Refused(Exception):
    """A request that is not answered: an HTTP status and an OpenAI error object."""

    def __init__(self, message, param=None, status=400, code=None, kind="invalid_request_error"):
        super().__init__(message)
        self.status = status
        self.body = {"error": {"message": message, "type": kind, "param": param, "code": code}}


@dataclass(frozen=True)
class Served:
    """What is served: a tokenizer, the model's name and longest sequence, and the form of its conversations."""

    tokenizer: object
    name: str
    limit: int
    dialect: str = "glm-4.5"
    bare_tools: bool = False
    """Render {"name", ...} in place of {"type": "function", "function": {"name", ...}}: as in figure 4, and in runs."""
    most_answers: int = 64
    """Most answers to one request: n times prompts."""


@dataclass(frozen=True)
class Job:
    """A request that was accepted."""

    chat: bool
    requests: list
    """One engine request for each answer."""
    prompts: int = 1
    stream: bool = False
    include_usage: bool = False
    logprobs: int | None = None
    """How many alternatives to show with each token; None: no log-probabilities."""
    stops: tuple = ()
    tools: list | None = None
    """Offered to the model; calls to others are faults."""
    opened: bool = False
    """The prompt ends inside the reasoning."""
    prefix: str = ""
    """What a forced call begins with."""
    parallel: bool = True
    token_ids: bool = False
    created: int = field(default_factory=lambda: int(time.time()))
    id: str = field(default_factory=lambda: secrets.token_hex(12))


def chat_job(body, served):
    """The `Job` of a chat completion. Raises `Refused`."""
    common, settings = _common(body, served)
    kwargs = _thinking(body)
    tools, forced = _tools(body)
    messages = _messages(body)
    thinking = kwargs["thinking"] and forced is None
    shown = [tool["function"] for tool in tools] if served.bare_tools else tools
    form = {"dialect": served.dialect, "clear_thinking": kwargs["clear_thinking"]}
    try:
        prompt = render(
            served.tokenizer, messages, shown, thinking, generation_prompt=True, **form
        ).ids
        line, prefix = dialect_of(served.dialect).line, ""
        if forced is not None:
            prefix = f"<tool_call>{forced}{line if forced else ''}"
            prompt += [*served.tokenizer.encode(line), served.tokenizer.special["<tool_call>"]]
            prompt += served.tokenizer.encode(forced + line) if forced else []
    except ValueError as error:
        raise Refused(str(error), "messages") from None
    logprobs = None
    if _typed(body, "logprobs", bool, False):
        logprobs = _number(body, "top_logprobs", 0, 0, 20, whole=True)
    elif body.get("top_logprobs"):
        raise Refused("top_logprobs needs logprobs = true", "top_logprobs")
    most = (
        "max_completion_tokens" if body.get("max_completion_tokens") is not None else "max_tokens"
    )
    settings |= {
        "top_logprobs": logprobs or 0,
        "max_new_tokens": _number(body, most, served.limit, 1, whole=True),
    }
    return Job(
        chat=True,
        requests=_requests([prompt], settings, body, served),
        logprobs=logprobs,
        tools=tools or [],
        opened=thinking and dialect_of(served.dialect).opens,
        prefix=prefix,
        parallel=_typed(body, "parallel_tool_calls", bool, True),
        **common,
    )


def text_job(body, served):
    """The `Job` of a plain completion. Raises `Refused`."""
    common, settings = _common(body, served)
    prompts = _prompts(body, served.tokenizer)
    if body.get("echo") or body.get("suffix"):
        raise Refused("echo and suffix are not supported", "echo" if body.get("echo") else "suffix")
    logprobs = (
        None if body.get("logprobs") is None else _number(body, "logprobs", 0, 0, 20, whole=True)
    )
    settings |= {
        "top_logprobs": logprobs or 0,
        "max_new_tokens": _number(body, "max_tokens", 16, 1, whole=True),
    }
    return Job(
        chat=False,
        requests=_requests(prompts, settings, body, served),
        prompts=len(prompts),
        logprobs=logprobs,
        **common,
    )


def _common(body, served):
    """(fields of a Job, fields of a Request) that both kinds share."""
    if not isinstance(body, dict):
        raise Refused("the body must be a JSON object")
    if not isinstance(body.get("model", served.name), str):
        raise Refused("model must be a string", "model")
    if body.get("model", served.name) != served.name:
        message = f"the model {body['model']!r:.80} is not served here; {served.name!r} is"
        raise Refused(message, "model", 404, "model_not_found")
    for name in (
        "frequency_penalty",
        "presence_penalty",
        "logit_bias",
        "functions",
        "function_call",
    ):
        if body.get(name):
            raise Refused(f"{name} is not supported", name, code="unsupported_parameter")
    form = body.get("response_format") or {"type": "text"}
    if not isinstance(form, dict) or form.get("type") != "text":
        raise Refused(
            "response_format: only text is supported",
            "response_format",
            code="unsupported_parameter",
        )
    stops = body.get("stop") or []
    stops = [stops] if isinstance(stops, str) else stops
    if not isinstance(stops, list) or not all(
        isinstance(s, str) and 0 < len(s) <= MOST_STOP_LETTERS for s in stops
    ):
        raise Refused(
            f"stop must be a string or a list of strings of 1 to {MOST_STOP_LETTERS} letters",
            "stop",
        )
    if len(stops) > MOST_STOPS:
        raise Refused(f"stop: at most {MOST_STOPS} strings", "stop")
    options = _typed(body, "stream_options", dict, {})
    common = {
        "stream": _typed(body, "stream", bool, False),
        "include_usage": bool(options.get("include_usage")),
        "stops": tuple(stops),
        "token_ids": _typed(body, "return_token_ids", bool, False),
    }
    temperature = _number(body, "temperature", 1.0, 0, 2)
    return common, {
        "temperature": temperature
        if temperature >= 1e-3
        else 0.0,  # divided by less, logits overflow
        "top_p": _number(body, "top_p", 1.0, 0, 1),
        "min_p": _number(body, "min_p", 0.0, 0, 1),
        "top_k": max(
            0, _number(body, "top_k", 0, -1, 2**31, whole=True)
        ),  # -1 is everything, in other servers
    }


def _typed(body, name, kind, default):
    value = body.get(name)
    if value is None:
        return default
    if not isinstance(value, kind):
        words = {bool: "true or false", dict: "an object", list: "a list", str: "a string"}
        raise Refused(f"{name} must be {words[kind]}", name)
    return value


def _number(body, name, default, low, high=math.inf, whole=False):
    value = body.get(name)
    if value is None:
        return default
    kind = int if whole else (int, float)
    if isinstance(value, bool) or not isinstance(value, kind) or not low <= value <= high:
        bounds = f"from {low} to {high}" if high < math.inf else f"of at least {low}"
        raise Refused(f"{name} must be {'an integer' if whole else 'a number'} {bounds}", name)
    return value


def _requests(prompts, settings, body, served):
    """n engine requests for each prompt, with seeds that differ and that `seed` decides."""
    n = _number(body, "n", 1, 1, whole=True)
    if n * len(prompts) > served.most_answers:
        message = (
            f"{n * len(prompts)} answers were asked for at once; at most {served.most_answers}"
        )
        raise Refused(message, "n" if n > 1 else "prompt")
    for prompt in prompts:
        if len(prompt) >= served.limit:
            message = (
                f"the prompt has {len(prompt)} tokens; this model takes at most {served.limit - 1}"
            )
            raise Refused(
                message,
                "messages" if "messages" in body else "prompt",
                code="context_length_exceeded",
            )
    seed = _number(body, "seed", secrets.randbits(62), -(2**63), 2**63 - 1, whole=True)
    most = settings.pop("max_new_tokens")
    return [
        Request(
            prompt,
            min(most, served.limit - len(prompt)),
            seed=(seed + i * 0x9E3779B97F4A7C15) % 2**63,
            **settings,
        )
        for i, prompt in enumerate(prompt for prompt in prompts for _ in range(n))
    ]


def _thinking(body):
    """The switches, in the two spellings that clients use; the first wins."""
    kwargs = _typed(body, "chat_template_kwargs", dict, {})
    spelled = _typed(body, "thinking", dict, {})
    if spelled.get("type", "enabled") not in ("enabled", "disabled"):
        raise Refused("thinking.type must be enabled or disabled", "thinking")
    thinking = kwargs.get("enable_thinking", spelled.get("type") != "disabled")
    clear = kwargs.get("clear_thinking", spelled.get("clear_thinking", True))
    if not isinstance(thinking, bool) or not isinstance(clear, bool):
        raise Refused(
            "enable_thinking and clear_thinking must be true or false", "chat_template_kwargs"
        )
    return {"thinking": thinking, "clear_thinking": clear}


def _tools(body):
    """(tools to offer, None or the name of the function to call, "" for any)."""
    tools = _typed(body, "tools", list, [])
    if len(tools) > MOST_TOOLS:
        raise Refused(f"tools: at most {MOST_TOOLS}", "tools")
    for i, tool in enumerate(tools):
        _check_tool(tool, f"tools[{i}]")
    names = [tool["function"]["name"] for tool in tools]
    choice = body.get("tool_choice")
    if choice is None or choice == "auto":
        return tools, None
    if choice == "none":
        return [], None
    if choice == "required":
        if not tools:
            raise Refused("tool_choice is required, but there are no tools", "tool_choice")
        return tools, names[0] if len(names) == 1 else ""
    function = choice.get("function") if isinstance(choice, dict) else None
    name = function.get("name") if isinstance(function, dict) else None
    if name not in names:
        raise Refused(
            "tool_choice must be none, auto, required, or name a function of tools", "tool_choice"
        )
    return tools, name


def _check_tool(tool, at):
    """Refuse what the parser could not read an argument's type from."""

    def is_schema(spec):
        options = (
            [spec.get("anyOf", []), spec.get("oneOf", [])] if isinstance(spec, dict) else [None]
        )
        kinds = spec.get("type", []) if isinstance(spec, dict) else []
        kinds = [kinds] if isinstance(kinds, str) else kinds
        return (
            all(isinstance(o, list) and all(isinstance(s, dict) for s in o) for o in options)
            and (isinstance(kinds, list) and all(isinstance(kind, str) for kind in kinds))
            and isinstance(spec.get("enum", []), list)
            and all(is_schema(s) for o in options for s in o)
        )

    function = tool.get("function") if isinstance(tool, dict) else None
    if (
        not isinstance(function, dict)
        or not isinstance(function.get("name"), str)
        or not function["name"]
    ):
        raise Refused(
            f'{at} must be {{"type": "function", "function": {{"name": ..., "parameters": ...}}}}',
            at,
        )
    if not re.fullmatch(r"[\w.:/-]{1,64}", function["name"]):
        raise Refused(
            f"{at}.function.name must be 1 to 64 letters, digits, or any of _ . : / -", at
        )
    parameters = function.get("parameters") or {}
    properties = parameters.get("properties") or {} if isinstance(parameters, dict) else None
    required = parameters.get("required") or [] if isinstance(parameters, dict) else None
    if not isinstance(properties, dict) or not all(is_schema(spec) for spec in properties.values()):
        raise Refused(f"{at}.function.parameters must be a JSON schema of an object", at)
    if not isinstance(required, list) or not all(isinstance(name, str) for name in required):
        raise Refused(f"{at}.function.parameters.required must be a list of names", at)


def _messages(body):
    """Messages in the template's words: a developer is a system, and only the last may be from anyone."""
    messages = _typed(body, "messages", list, None)
    if not messages:
        raise Refused("messages must be a list of at least one message", "messages")
    found = []
    for i, message in enumerate(messages):
        if not isinstance(message, dict):
            raise Refused(f"messages[{i}] must be an object", "messages")
        if not isinstance(message.get("tool_calls") or [], list):
            raise Refused(f"messages[{i}].tool_calls must be a list", "messages")
        found.append(
            {**message, "role": "system"} if message.get("role") == "developer" else message
        )
    return found


def _prompts(body, tokenizer):
    """`prompt` as lists of ids: one text, one list of ids, or a list of either."""
    prompt = body.get("prompt")
    if isinstance(prompt, str) or (
        isinstance(prompt, list) and prompt and isinstance(prompt[0], int)
    ):
        prompt = [prompt]
    if not isinstance(prompt, list) or not prompt:
        raise Refused("prompt must be text, token ids, or a list of these", "prompt")
    found = []
    for one in prompt:
        ids = tokenizer.encode(one) if isinstance(one, str) else one
        good = isinstance(ids, list) and all(
            isinstance(t, int) and not isinstance(t, bool) for t in ids
        )
        if not good or not all(0 <= t < tokenizer.vocab_size for t in ids):
            raise Refused(
                f"prompt must be text, or token ids from 0 to {tokenizer.vocab_size - 1}", "prompt"
            )
        if not ids:
            raise Refused("prompt is empty", "prompt")
        found.append(ids)
    return found
