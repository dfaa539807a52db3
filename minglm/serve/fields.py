"""Name the fields of a request's body, and refuse what would be ignored (no section in the paper).

A field is honoured, or it cannot change the answer, or it has a value that asks for what happens anyway.
Everything else is refused by its name, an unknown field too: a field that is accepted and ignored is a wrong
answer that nobody notices. A field that is null counts as absent.
"""

from collections.abc import Mapping, Set
from typing import Any

from minglm.serve.errors import APIError

JSONObject = dict[str, Any]

WITHOUT_EFFECT = frozenset(
    {
        *("user", "metadata", "store", "service_tier", "safety_identifier"),
        *("prompt_cache_key", "prompt_cache_retention", "prompt_cache_options", "cache_salt"),
        *("request_id", "rid", "priority", "prediction"),
    }
)
"""They concern accounts, caches, logs and priorities, never the answer."""

COMMON = frozenset(
    {
        *("model", "stream", "stream_options", "return_token_ids"),
        *("temperature", "top_p", "top_k", "min_p", "seed", "n"),
        *("frequency_penalty", "presence_penalty", "repetition_penalty", "logit_bias"),
        *("stop", "stop_token_ids", "ignore_eos", "min_tokens", "allowed_token_ids"),
        *("max_tokens", "logprobs", "prompt_logprobs"),
        *("response_format", "structured_outputs"),
        *("guided_json", "guided_regex", "guided_choice"),
    }
)
"""Honoured by both OpenAI endpoints."""

CHAT = COMMON | {
    *("messages", "tools", "tool_choice", "parallel_tool_calls"),
    *("max_completion_tokens", "top_logprobs"),
    *("chat_template_kwargs", "thinking", "enable_thinking", "reasoning_effort", "reasoning"),
    "thinking_token_budget",
}
"""Honoured by `/v1/chat/completions`."""

TEXT = COMMON | {"prompt", "echo"}
"""Honoured by `/v1/completions`."""

NEUTRAL: Mapping[str, tuple[Any, ...]] = {
    # OpenAI
    "functions": ([],),
    "function_call": ("none", "auto"),
    "modalities": ([], ["text"]),
    "verbosity": ("medium",),
    "best_of": (1,),
    "suffix": ("",),
    # vLLM and SGLang
    "echo": (False,),
    "add_generation_prompt": (True,),
    "continue_final_message": (False,),
    "add_special_tokens": (False,),
    "documents": ([],),
    "use_beam_search": (False,),
    "length_penalty": (1, 1.0),
    "early_stopping": (False,),
    "include_stop_str_in_output": (False,),
    "no_stop_trim": (False,),
    "skip_special_tokens": (True,),
    "spaces_between_special_tokens": (True, False),
    "return_tokens_as_token_ids": (False,),
    "return_hidden_states": (False,),
    "include_reasoning": (True,),
    "separate_reasoning": (True,),
    "stream_reasoning": (True,),
    "bad_words": ([],),
    "stop_regex": ([], ""),
    "logits_processors": ([],),
    "truncate_prompt_tokens": (-1,),
    # Anthropic and Responses
    "background": (False,),
    "truncation": ("disabled",),
    "include": ([],),
    "mcp_servers": ([],),
}
"""Values of fields that are not supported which ask for nothing else than what happens anyway."""


def refuse_unknown(body: Mapping[str, Any], honoured: Set[str], where: str = "") -> None:
    """Raise `APIError` for the first field that is neither honoured nor without effect. where: the object's own name."""
    for name, value in body.items():
        if value is None or name in honoured or name in WITHOUT_EFFECT:
            continue
        if any(_same(value, neutral) for neutral in NEUTRAL.get(name, ())):
            continue
        path = f"{where}.{name}" if where else name
        values = " or ".join(map(repr, NEUTRAL.get(name, ())))
        remedy = f"leave it out, or give {values}" if values else "leave it out"
        message = f"{path:.80} is not supported by this server; {remedy}"
        raise APIError(message, path[:80], code="unsupported_parameter")


def _same(value: Any, neutral: Any) -> bool:
    """Return whether two JSON values are equal; 1 is not true."""
    return value == neutral and isinstance(value, bool) == isinstance(neutral, bool)
