"""Check OpenAI requests and turn them into engine requests (no section in the paper).

    body (parsed JSON) -> Job: prompts as token ids, sampler settings, and how to decode and send the choices

Every value is checked here, before anything is queued; what is wrong raises an `APIError` that names the
field. No field is ignored that could change the answer (`fields.py`).

Beyond OpenAI, in the words of vLLM: `chat_template_kwargs` {enable_thinking, clear_thinking}, `top_k`,
`min_p`, `repetition_penalty`, `min_tokens`, `ignore_eos`, `stop_token_ids`, `allowed_token_ids`,
`prompt_logprobs`, `structured_outputs` and `guided_*`, and `return_token_ids`, with which an agent trains on
exactly the tokens that were sampled. A prompt of `/v1/completions` may be token ids. `stop` strings are
matched against visible content only, not against reasoning.

The model has two settings of thinking, on and off. `reasoning_effort` none or minimal switches it off, any
other on. `thinking` {type, budget_tokens} or `thinking_token_budget` bounds the tokens of reasoning; the
engine closes a thought that has had as many (`minglm.inference.thinking`), and `forced_places` tells an agent
where.

A forced call (`tool_choice` required, or a named function) is started in the prompt, after empty reasoning,
and a grammar on the logits completes it; so it does what `response_format` asks for, and calls of strict
tools (`grammars.py`).
"""

import json
import math
import re
import secrets
import time
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, NamedTuple, TypeVar

from minglm.chat.messages import in_order_of_calls
from minglm.chat.schema import schema_mistake
from minglm.chat.template import dialect_of, render, segments
from minglm.config.posttraining import LEAST_TEMPERATURE
from minglm.data.tokenizer import Tokenizer
from minglm.inference.grammar import json_rule, quoted
from minglm.inference.request import Request
from minglm.serve.errors import APIError
from minglm.serve.fields import CHAT, TEXT, refuse_unknown
from minglm.serve.grammars import (
    forced_call_grammar,
    pattern_terminal,
    plain_grammar,
    turn_grammar,
)

JSONObject = dict[str, Any]

MAX_STOP_STRINGS = 16
MAX_STOP_CHARS = 256
MAX_TOOLS = 256
MAX_TOP_LOGPROBS = 20
MAX_STOP_IDS = 1024
MAX_BIASES = 1024
MAX_GUIDED_CHOICES = 4096
EFFORTS = {
    "none": False,
    "minimal": False,
    "low": True,
    "medium": True,
    "high": True,
    "xhigh": True,
    "max": True,
}
"""Whether the model thinks, for each `reasoning_effort`."""
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
    environments: tuple[str, ...] = ()
    """Those that the model was trained on; empty if not known."""

    def check_length(self, texts: Iterable[str], field: str) -> None:
        """Raise `APIError` for a prompt with so much text that it is too long, however few tokens the text has.

        This is found without the tokenizer, which takes seconds for megabytes.
        """
        size = sum(len(text.encode("utf-8", "replace")) for text in texts)
        longest = self.tokenizer.longest_token
        if size > (self.max_model_len - 1) * longest:
            message = (
                f"the prompt has {size} bytes; this model takes at most {self.max_model_len - 1}"
                f" tokens of at most {longest} bytes"
            )
            raise APIError(message, field, code="context_length_exceeded")


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
    echo: bool = False
    """The text begins with the prompt, and so do the log-probabilities."""
    prompt_logprobs: bool = False
    """Report the log-probabilities of the prompt's tokens, in vLLM's form."""
    named_call: bool = False
    """A named function was asked for: the answer's end is "stop", as OpenAI's is."""
    grammar_field: str = ""
    """The field that asked for a grammar."""
    created: int = field(default_factory=lambda: int(time.time()))
    """Unix time in seconds."""
    id: str = field(default_factory=lambda: secrets.token_hex(12))


class Thinking(NamedTuple):
    """The thinking switches of a request."""

    enabled: bool
    clear: bool
    """Drop the reasoning of older turns."""
    budget: int | None
    """Most tokens of reasoning; None: no bound."""


class OfferedTools(NamedTuple):
    """The tools of a request."""

    tools: list[JSONObject]
    forced: str | None
    """The name of the function to call, "" for any, None if no call is forced."""
    named: bool = False
    """Whether the request names the function."""


class Format(NamedTuple):
    """What the answer has to look like."""

    rule: str | None
    """The right-hand side of a grammar's rule, None for any text."""
    asked_by: str
    """The field of the request."""


class ChatPrompt(NamedTuple):
    """A rendered conversation, ready for the engine."""

    ids: list[int]
    prefix: str
    """The beginning of the assistant's turn that `ids` already hold: a forced call."""


def chat_job(body: Any, served: ServedModel) -> Job:
    """Return the `Job` of a chat completion. Raises `APIError`."""
    common = _common_fields(body, served, CHAT)
    sampler = _sampler_settings(body, served.tokenizer)
    switches = _thinking(body)
    offered = _offered_tools(body)
    messages = _messages(body)
    thinking = switches.enabled and offered.forced is None
    _check_choices(_integer(body, "n", 1, 1), 1, served)
    prompt = _chat_prompt(messages, offered, thinking, switches.clear, served)
    _check_tokens(len(prompt.ids), "messages", served)
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
    several = _typed(body, "parallel_tool_calls", bool, True)
    form = _chat_grammar(_format(body), offered, thinking, several, served)
    sampler["grammar"] = form.rule
    sampler["thinking_budget"] = switches.budget
    return Job(
        chat=True,
        requests=_requests([prompt.ids], max_new_tokens, sampler, body, served),
        logprobs=logprobs,
        tools=offered.tools,
        opened=thinking and dialect_of(served.dialect).opens,
        prefix=prompt.prefix,
        parallel_tool_calls=several,
        named_call=offered.named,
        grammar_field=form.asked_by,
        **common,
    )


def text_job(body: Any, served: ServedModel) -> Job:
    """Return the `Job` of a plain completion. Raises `APIError`."""
    common = _common_fields(body, served, TEXT)
    sampler = _sampler_settings(body, served.tokenizer)
    prompts = _prompts(body, served)
    logprobs = None
    if body.get("logprobs") is not None:
        logprobs = _integer(body, "logprobs", 0, 0, MAX_TOP_LOGPROBS)
    max_new_tokens = _integer(body, "max_tokens", 16, 0)
    sampler["top_logprobs"] = logprobs or 0
    echo = _typed(body, "echo", bool, False)
    if echo and logprobs is not None:
        sampler["prompt_logprobs"] = max(logprobs, sampler["prompt_logprobs"] or 0)
    form = _format(body)
    if form.rule is not None:
        sampler["grammar"] = plain_grammar(form.rule)
    return Job(
        chat=False,
        requests=_requests(prompts, max_new_tokens, sampler, body, served),
        prompts=len(prompts),
        logprobs=logprobs,
        echo=echo,
        grammar_field=form.asked_by,
        **common,
    )


def _common_fields(body: Any, served: ServedModel, honoured: frozenset[str]) -> JSONObject:
    """Return the fields of a `Job` that both endpoints share; refuse what the endpoint does not honour."""
    if not isinstance(body, dict):
        raise APIError("the body must be a JSON object")
    model = body.get("model", served.name)
    if not isinstance(model, str):
        raise APIError("model must be a string", "model")
    if model != served.name:
        message = f"the model {model!r:.80} is not served here; {served.name!r} is"
        raise APIError(message, "model", 404, "model_not_found")
    refuse_unknown(body, honoured)
    stream = _typed(body, "stream", bool, False)
    options = _typed(body, "stream_options", dict, {})
    refuse_unknown(options, {"include_usage", "include_obfuscation"}, "stream_options")
    if options.get("continuous_usage_stats"):
        raise APIError("stream_options.continuous_usage_stats is not supported", "stream_options")
    if stream and body.get("prompt_logprobs") is not None:
        message = "prompt_logprobs is not supported with stream; echo and logprobs are"
        raise APIError(message, "prompt_logprobs")
    return {
        "stream": stream,
        "include_usage": _typed(options, "include_usage", bool, False),
        "prompt_logprobs": body.get("prompt_logprobs") is not None,
        "stop_strings": _stop_strings(body),
        "return_token_ids": _typed(body, "return_token_ids", bool, False),
    }


def _format(body: JSONObject) -> Format:
    """Return what the answer has to look like, in any of the spellings that clients use."""
    formats = [
        _response_format(body),
        *_guided(body, {"json": "guided_json", "regex": "guided_regex", "choice": "guided_choice"}),
    ]
    outputs = _typed(body, "structured_outputs", dict, {})
    known = {"json", "regex", "choice", "json_object"}
    refuse_unknown(outputs, known, "structured_outputs")
    for name, value in outputs.items():
        if value is None or name not in known or value is False:
            continue
        if name == "json_object":
            formats.append(Format(json_rule({"type": "object"}), "structured_outputs"))
        else:
            formats.append(
                Format(_guided_rule(name, value, "structured_outputs"), "structured_outputs")
            )
    asked = [form for form in formats if form.rule is not None]
    if len(asked) > 1:
        message = f"{asked[0].asked_by} and {asked[1].asked_by} both ask for a format; give one"
        raise APIError(message, asked[1].asked_by)
    return asked[0] if asked else Format(None, "")


def _response_format(body: JSONObject) -> Format:
    name = "response_format"
    form = _typed(body, name, dict, {"type": "text"})
    kind = form.get("type")
    if kind == "text":
        return Format(None, name)
    if kind == "json_object":
        return Format(json_rule({"type": "object"}), name)
    if kind != "json_schema":
        raise APIError(f"{name}.type must be text, json_object or json_schema", name)
    described = form.get("json_schema", form)  # the Responses API has no inner object
    if not isinstance(described, dict) or not isinstance(described.get("schema"), dict):
        raise APIError(f"{name}.json_schema.schema must be a JSON schema, an object", name)
    lenient = described.get("strict") is False
    return Format(json_rule(described["schema"], lenient), name)


def _guided(body: JSONObject, names: dict[str, str]) -> list[Format]:
    """Return the formats of vLLM's older fields, {kind: field}."""
    return [
        Format(_guided_rule(kind, body[name], name), name)
        for kind, name in names.items()
        if body.get(name) is not None
    ]


def _guided_rule(kind: str, value: Any, name: str) -> str:
    """Return the rule of a format in vLLM's words: a JSON schema, a regular expression, or a list of texts."""
    if kind == "json":
        if isinstance(value, str):
            try:
                value = json.loads(value)
            except (ValueError, RecursionError):
                value = None
        if not isinstance(value, dict):
            raise APIError(f"{name} must be a JSON schema, an object", name)
        return json_rule(value)
    if kind == "regex":
        if not isinstance(value, str) or not value:
            raise APIError(f"{name} must be a regular expression", name)
        return pattern_terminal(value)
    if not isinstance(value, list) or not value or not all(isinstance(one, str) for one in value):
        raise APIError(f"{name} must be a list of at least one text", name)
    if len(value) > MAX_GUIDED_CHOICES:
        raise APIError(f"{name}: at most {MAX_GUIDED_CHOICES} texts", name)
    return " | ".join(map(quoted, value))


def _chat_grammar(
    form: Format,
    offered: OfferedTools,
    thinking: bool,
    several: bool,
    served: ServedModel,
) -> Format:
    """Return the grammar of an assistant's turn as the rule, None if any turn will do, and the field that asks for it."""
    special = served.tokenizer.special
    dialect = dialect_of(served.dialect)
    strict = any(tool["function"].get("strict") is True for tool in offered.tools)
    try:
        if offered.forced is not None:
            grammar = forced_call_grammar(special, dialect, offered.tools, offered.forced, several)
            return Format(grammar, "tools")
        if form.rule is None and not strict:
            return form
        tools = offered.tools
        grammar = turn_grammar(special, dialect, thinking, form.rule, tools, several)
        return Format(grammar, form.asked_by or "tools")
    except ValueError as error:
        raise APIError(str(error), "tools") from None


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


def _sampler_settings(body: JSONObject, tokenizer: Tokenizer) -> JSONObject:
    """Return the sampler's fields of a `Request`."""
    temperature = _number(body, "temperature", 1.0, 0, 2)
    more_stops = _ids(body, "stop_token_ids", tokenizer, MAX_STOP_IDS) or ()
    stops = () if _typed(body, "ignore_eos", bool, False) else tokenizer.stop_ids
    prompt_logprobs = None
    if body.get("prompt_logprobs") is not None:
        prompt_logprobs = _integer(body, "prompt_logprobs", 0, 0, MAX_TOP_LOGPROBS)
    return {
        "stop_ids": (*stops, *more_stops),
        "min_new_tokens": _integer(body, "min_tokens", 0, 0),
        "allowed_ids": _ids(body, "allowed_token_ids", tokenizer, tokenizer.vocab_size),
        "logit_bias": _logit_bias(body, tokenizer),
        "presence_penalty": _number(body, "presence_penalty", 0.0, -2, 2),
        "frequency_penalty": _number(body, "frequency_penalty", 0.0, -2, 2),
        "repetition_penalty": _number(body, "repetition_penalty", 1.0, 0.01, 100),
        "prompt_logprobs": prompt_logprobs,
        "temperature": temperature if temperature >= LEAST_TEMPERATURE else 0.0,
        "top_p": _number(body, "top_p", 1.0, 0, 1),
        "min_p": _number(body, "min_p", 0.0, 0, 1),
        "top_k": max(0, _integer(body, "top_k", 0, -1, 2**31)),  # other servers: -1 is everything
    }


def _ids(body: JSONObject, name: str, tokenizer: Tokenizer, most: int) -> tuple[int, ...] | None:
    """Return a list of token ids, None if the field is absent."""
    ids = body.get(name)
    if ids is None:
        return None
    if not _are_ids(ids, tokenizer.vocab_size) or not 0 < len(ids) <= most:
        message = f"{name} must be a list of 1 to {most} ids from 0 to {tokenizer.vocab_size - 1}"
        if ids == [] and name != "allowed_token_ids":
            return None
        raise APIError(message, name)
    return tuple(ids)


def _logit_bias(body: JSONObject, tokenizer: Tokenizer) -> tuple[tuple[int, float], ...]:
    """Return OpenAI's {"id": bias}."""
    biases = _typed(body, "logit_bias", dict, {})
    message = (
        f"logit_bias must be an object of at most {MAX_BIASES} biases from -100 to 100,"
        f" by ids from 0 to {tokenizer.vocab_size - 1}"
    )
    if len(biases) > MAX_BIASES:
        raise APIError(message, "logit_bias")
    checked: list[tuple[int, float]] = []
    for key, bias in biases.items():
        is_id = key.isascii() and key.isdecimal() and int(key[:12]) < tokenizer.vocab_size
        is_number = isinstance(bias, int | float) and not isinstance(bias, bool)
        if not is_id or not is_number or not -100 <= bias <= 100:
            raise APIError(message, "logit_bias")
        checked.append((int(key), float(bias)))
    return tuple(checked)


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
    template: dict[str, Any] = {
        "tools": tools,
        "thinking": thinking,
        "generation_prompt": True,
        "dialect": served.dialect,
        "clear_thinking": clear_thinking,
    }
    try:
        walk = segments(messages, **template)
        served.check_length((part.text for part in walk if not part.special), "messages")
        ids = render(served.tokenizer, messages, **template).ids
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
    """Return the switches, in any of the spellings that clients use; two that disagree are a mistake."""
    kwargs = _typed(body, "chat_template_kwargs", dict, {})
    known = {"enable_thinking", "thinking", "clear_thinking", "reasoning_effort"}
    refuse_unknown(kwargs, known, "chat_template_kwargs")
    asked: list[tuple[str, Any]] = []  # (field, true or false)
    clear: list[tuple[str, Any]] = []
    budgets = [("thinking_token_budget", body.get("thinking_token_budget"))]
    for source, where in ((kwargs, "chat_template_kwargs"), (body, "")):
        for name in ("enable_thinking", "thinking", "reasoning_effort", "clear_thinking"):
            value = source.get(name)
            path = f"{where}.{name}" if where else name
            if value is None or (name == "clear_thinking" and not where):
                continue
            if name == "clear_thinking":
                clear.append((path, value))
            elif name == "reasoning_effort":
                asked.append((path, _effort(value, path)))
            elif name == "thinking" and isinstance(value, dict):
                refuse_unknown(value, {"type", "clear_thinking", "budget_tokens"}, path)
                budgets.append((f"{path}.budget_tokens", value.get("budget_tokens")))
                kind = value.get("type", "enabled")
                if kind not in ("enabled", "disabled"):
                    raise APIError(f"{path}.type must be enabled or disabled", path)
                asked.append((path, kind == "enabled"))
                if value.get("clear_thinking") is not None:
                    clear.append((path, value["clear_thinking"]))
            else:
                asked.append((path, value))
    reasoning = _typed(body, "reasoning", dict, {})
    refuse_unknown(reasoning, {"effort", "enabled", "summary"}, "reasoning")
    if reasoning.get("effort") is not None:
        asked.append(("reasoning", _effort(reasoning["effort"], "reasoning")))
    if reasoning.get("enabled") is not None:
        asked.append(("reasoning", reasoning["enabled"]))
    return Thinking(_agreed(asked, True), _agreed(clear, True), _budget(budgets))


def _budget(budgets: list[tuple[str, Any]]) -> int | None:
    """Return the one budget of reasoning that all spellings give; None if there is none."""
    given = [(path, value) for path, value in budgets if value is not None]
    for path, value in given:
        if isinstance(value, bool) or not isinstance(value, int) or value < 0:
            raise APIError(f"{path} must be an integer of at least 0", path.partition(".")[0])
        if value != given[0][1]:
            raise APIError(f"{given[0][0]} and {path} disagree; give one", path.partition(".")[0])
    return given[0][1] if given else None


def _effort(value: Any, path: str) -> bool:
    """Return whether the model thinks with this `reasoning_effort`."""
    if not isinstance(value, str) or value not in EFFORTS:
        raise APIError(f"{path} must be one of {', '.join(EFFORTS)}", path)
    return EFFORTS[value]


def _agreed(asked: list[tuple[str, Any]], default: bool) -> bool:
    """Return the one value that all spellings of a switch have."""
    for path, value in asked:
        if not isinstance(value, bool):
            raise APIError(f"{path} must be true or false", path.partition(".")[0])
        if value != asked[0][1]:
            raise APIError(f"{asked[0][0]} and {path} disagree; give one", path.partition(".")[0])
    return asked[0][1] if asked else default


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
    return OfferedTools(tools, name, named=True)


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
    """Return the messages in the template's words: the role developer is system, and results are in the order of the calls."""
    messages: list[Any] = _typed(body, "messages", list, [])
    if not messages:
        raise APIError("messages must be a list of at least one message", "messages")
    checked: list[JSONObject] = []
    for i, message in enumerate(messages):
        if not isinstance(message, dict):
            raise APIError(f"messages[{i}] must be an object", "messages")
        calls = message.get("tool_calls") or []
        if not (isinstance(calls, list) and all(isinstance(call, dict) for call in calls)):
            raise APIError(f"messages[{i}].tool_calls must be a list of objects", "messages")
        if message.get("role") == "developer":
            message = {**message, "role": "system"}
        checked.append(message)
    return in_order_of_calls(checked)


def _prompts(body: JSONObject, served: ServedModel) -> list[list[int]]:
    """Return `prompt` as lists of ids. It may be one text, one list of ids, or a list of either."""
    prompts = body.get("prompt")
    if isinstance(prompts, str) or (
        isinstance(prompts, list) and prompts and isinstance(prompts[0], int)
    ):
        prompts = [prompts]
    if not isinstance(prompts, list) or not prompts:
        raise APIError("prompt must be text, token ids, or a list of these", "prompt")
    _check_choices(_integer(body, "n", 1, 1), len(prompts), served)
    checked: list[list[int]] = []
    for prompt in prompts:
        if isinstance(prompt, str):
            served.check_length([prompt], "prompt")
            prompt = served.tokenizer.encode(prompt)
        if isinstance(prompt, list):
            _check_tokens(len(prompt), "prompt", served)
        if not _are_ids(prompt, served.tokenizer.vocab_size):
            message = (
                f"prompt must be text, or token ids from 0 to {served.tokenizer.vocab_size - 1}"
            )
            raise APIError(message, "prompt")
        if not prompt:
            raise APIError("prompt is empty", "prompt")
        checked.append(prompt)
    return checked


def _check_choices(n: int, prompts: int, served: ServedModel) -> None:
    """Refuse more choices than one request may have."""
    choices = n * prompts
    if choices > served.max_choices:
        message = f"{choices} choices were asked for at once; at most {served.max_choices}"
        raise APIError(message, "n" if n > 1 else "prompt")


def _check_tokens(tokens: int, param: str, served: ServedModel) -> None:
    """Refuse a prompt that leaves the model no room for an answer."""
    if tokens >= served.max_model_len:
        most = served.max_model_len - 1
        message = f"the prompt has {tokens} tokens; this model takes at most {most}"
        raise APIError(message, param, code="context_length_exceeded")


def _are_ids(ids: Any, vocab_size: int) -> bool:
    if not isinstance(ids, list):
        return False
    for token in ids:
        if not isinstance(token, int) or isinstance(token, bool) or not 0 <= token < vocab_size:
            return False
    return True
