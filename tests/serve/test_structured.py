"""Test answers that are held to a form: JSON, strict tools, required calls, a budget of reasoning, on a random model.

A random model writes noise, so that whatever has the form has it because of the grammar.
"""

import json
import re

import jsonschema
import pytest
from helpers.serving import TOKENIZER, running
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from minglm.inference import Engine
from minglm.testing.model import tiny_model

HI = [{"role": "user", "content": "hi"}]
LIMIT = 4096


@pytest.fixture(scope="module", params=["glm-4.5", "glm-4.7"])
def noise(request):
    """Return (http, openai client) of a server with a random model that takes long prompts."""
    model = tiny_model(0, vocab_size=TOKENIZER.vocab_size, max_position_embeddings=LIMIT)
    engine = Engine(model, TOKENIZER, max_batch=8)
    with running(engine, limit=LIMIT, dialect=request.param) as (http, client, _):
        yield http, client


def ask(http, path="/v1/chat/completions", **body):
    """Return the parsed answer of a POST that succeeds."""
    answer = http.post(path, json={"messages": HI, "max_tokens": 150, **body})
    assert answer.status_code == 200, answer.text
    return answer.json()


def function(name, properties, strict=True, required=None, **more):
    """Return a tool in OpenAI's form."""
    required = list(properties) if required is None else required
    schema = {"type": "object", "properties": properties, "required": required, **more}
    return {"type": "function", "function": {"name": name, "parameters": schema, "strict": strict}}


LEAVES = st.sampled_from(
    [
        {"type": "integer", "minimum": 0, "maximum": 99},
        {"type": "boolean"},
        {"type": "null"},
        {"const": "null"},
        {"enum": ["red", 3, None]},
        {"type": "string", "maxLength": 5},
        {"type": "string", "pattern": "^[a-z]{2,4}$"},
        {"$ref": "#/$defs/Code"},
        {"anyOf": [{"type": "integer", "minimum": 0, "maximum": 9}, {"type": "null"}]},
        {"type": "array", "items": {"type": "boolean"}, "maxItems": 2},
    ]
)
DEFS = {"Code": {"type": "string", "pattern": "^[0-9]{5}$"}}
NO_RESET = [HealthCheck.function_scoped_fixture]


@settings(max_examples=4, deadline=None, suppress_health_check=NO_RESET)
@given(
    fields=st.dictionaries(st.sampled_from(["a", "b", "é c"]), LEAVES, min_size=1, max_size=3),
    seed=st.integers(0, 99),
    thinking=st.booleans(),
)
def test_json_schema(noise, fields, seed, thinking):
    """The content is a document of the schema, thinking or not; the reasoning is free."""
    schema = {
        "type": "object",
        "properties": fields,
        "required": list(fields),
        "additionalProperties": False,
        "$defs": DEFS,
    }
    form = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema, "strict": True}}
    budget = {"thinking_token_budget": 5} if thinking else {}
    found = ask(noise[0], response_format=form, seed=seed, enable_thinking=thinking, **budget)
    (choice,) = found["choices"]
    if choice["finish_reason"] == "length":
        return  # white space between the parts may be long
    assert choice["finish_reason"] == "stop" and "format_error" not in choice
    jsonschema.validate(json.loads(choice["message"]["content"]), schema)
    reasoning = found["usage"]["completion_tokens_details"]["reasoning_tokens"]
    # the budget, the two tags, and three bytes to complete a character
    assert reasoning <= (10 if thinking else 0)


@pytest.mark.parametrize("spelling", ["openai", "zai", "anthropic"])
def test_a_budget_of_reasoning(noise, spelling):
    """The thought ends where its budget does, in each spelling; an agent is told which token was not sampled."""
    http, _ = noise
    form = {"type": "json_schema", "schema": {"type": "array", "items": False}}
    body = {"response_format": form, "return_token_ids": True, "seed": 3}
    switch = {"type": "enabled", "budget_tokens": 4}
    if spelling == "anthropic":
        # These messages have no seed, and noise sometimes closes its thought at once or thinks white space.
        kinds = []
        for _ in range(10):
            found = ask(http, "/v1/messages", thinking=switch, output_config={"format": form})
            kinds.append([part["type"] for part in found["content"]])
        assert ["thinking", "text"] in kinds
        assert all(kind in (["thinking", "text"], ["text"]) for kind in kinds)
        return
    if spelling == "zai":
        found = ask(http, thinking=switch, **body)
    else:
        found = ask(http, thinking_token_budget=4, reasoning_effort="low", **body)
    (choice,) = found["choices"]
    (place,) = choice["forced_places"]
    text = choice["prompt_token_ids"] + choice["token_ids"]
    close = len(choice["prompt_token_ids"]) + place
    assert text[close] == TOKENIZER.special["</think>"]
    opening = max(i for i in range(close) if text[i] == TOKENIZER.special["<think>"])
    thought = text[opening + 1 : close]
    # Bytes of noise may begin a character of up to three more.
    assert 4 <= len(thought) <= 7
    assert found["usage"]["completion_tokens"] == len(choice["token_ids"])
    sampled_tag = opening >= len(choice["prompt_token_ids"])  # 4.7 opens the thought in the prompt
    counted = found["usage"]["completion_tokens_details"]["reasoning_tokens"]
    assert counted == len(thought) + 1 + sampled_tag


@pytest.mark.parametrize(
    "form, pattern",
    [
        ({"guided_choice": ["yes", "no/never"]}, "yes|no/never"),
        ({"guided_regex": "[0-9]{3}/x"}, "[0-9]{3}/x"),
        ({"structured_outputs": {"regex": "^a+b$"}}, "a+b"),
        ({"structured_outputs": {"choice": ["é☕"]}}, "é☕"),
        ({"guided_json": {"type": "integer", "minimum": 10, "maximum": 99}}, "[0-9]{2}"),
        ({"structured_outputs": {"json_object": True}}, r"(?s)\{.*\}"),
        ({"response_format": {"type": "json_object"}}, r"(?s)\{.*\}"),
    ],
)
def test_other_formats(noise, form, pattern):
    """In a chat and in a plain completion."""
    for seed in range(2):
        chat = ask(noise[0], seed=seed, enable_thinking=False, **form)["choices"][0]
        text = (
            noise[0]
            .post("/v1/completions", json={"prompt": "x", "max_tokens": 300, "seed": seed, **form})
            .json()["choices"][0]
        )
        for content, end in (
            (chat["message"]["content"], chat["finish_reason"]),
            (text["text"], text["finish_reason"]),
        ):
            assert end == "length" or re.fullmatch(pattern, content), content


@settings(max_examples=5, deadline=None, suppress_health_check=NO_RESET)
@given(
    fields=st.dictionaries(st.sampled_from(["a", "b", "c_d"]), LEAVES, max_size=3),
    seed=st.integers(0, 99),
    choice=st.sampled_from(["required", "named"]),
    strict=st.booleans(),
)
def test_required_calls(noise, fields, seed, choice, strict):
    """A random model calls a tool that was offered, with arguments of its schema, whole and streamed alike."""
    tools = [
        function("look_up", fields, strict, **{"$defs": DEFS}),
        function("go", {"n": {"type": "integer", "minimum": 1, "maximum": 5}}, strict),
    ]
    named = {"type": "function", "function": {"name": "look_up"}}
    wanted = named if choice == "named" else "required"
    body = {"tools": tools, "tool_choice": wanted, "parallel_tool_calls": False, "seed": seed}
    found = ask(noise[0], **body)["choices"][0]
    if found["finish_reason"] == "length":
        return  # a string without a bound may be long
    assert "format_error" not in found and found["message"]["content"] is None
    # OpenAI ends an answer to a named function with stop.
    assert found["finish_reason"] == ("stop" if choice == "named" else "tool_calls")
    (call,) = found["message"]["tool_calls"]
    schemas = {tool["function"]["name"]: tool["function"]["parameters"] for tool in tools}
    if choice == "named":
        assert call["function"]["name"] == "look_up"
    arguments = json.loads(call["function"]["arguments"])
    if strict:
        jsonschema.validate(arguments, schemas[call["function"]["name"]])
    assert arguments.keys() == schemas[call["function"]["name"]]["properties"].keys()
    streamed = noise[1].chat.completions.create(
        model="tiny", messages=HI, max_tokens=150, stream=True, **body
    )
    text = ""
    for chunk in streamed:
        for part in chunk.choices[0].delta.tool_calls or ():
            text += part.function.arguments or ""
    assert json.loads(text) == arguments


def test_strict_tools_of_a_free_choice(noise):
    """With a bias for calls a random model calls; every call fits the schema, and plain answers stay possible."""
    tools = [function("go", {"n": {"enum": [1, 2]}})]
    call_id = TOKENIZER.special["<tool_call>"]
    ends = 0
    for seed in range(3):
        body = {"tools": tools, "seed": seed, "enable_thinking": False}
        found = ask(noise[0], **body, logit_bias={str(call_id): 100})["choices"][0]
        calls = found["message"].get("tool_calls", [])
        assert calls
        if found["finish_reason"] == "tool_calls":
            ends += 1
            assert all(
                json.loads(call["function"]["arguments"]) in ({"n": 1}, {"n": 2}) for call in calls
            )
    user = TOKENIZER.special["<|user|>"]
    found = ask(noise[0], tools=tools, enable_thinking=False, logit_bias={str(user): 100})
    assert found["choices"][0]["finish_reason"] == "stop"


@pytest.mark.parametrize(
    "body, param",
    [
        ({"response_format": {"type": "json_schema"}}, "response_format"),
        ({"response_format": {"type": "grammar"}}, "response_format"),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"schema": {"not": {}}}}},
            "response_format",
        ),
        ({"guided_regex": "(("}, "guided_regex"),
        ({"guided_choice": []}, "guided_choice"),
        ({"guided_json": "{"}, "guided_json"),
        ({"guided_regex": "a", "guided_choice": ["a"]}, "guided_choice"),
        ({"structured_outputs": {"grammar": "x"}}, "structured_outputs.grammar"),
        ({"tools": [function("f", {}, anyOf=[{"required": ["a"]}])]}, "tools"),
        ({"tools": [function("f", {"a": {"type": "string", "format": "date"}})]}, "tools"),
        ({"tools": [function("f", {"a": {"not": {"type": "integer"}}})]}, "tools"),
    ],
)
def test_forms_that_cannot_be_enforced(noise, body, param):
    """They are refused by name, in one line: nothing is accepted and then not enforced."""
    answer = noise[0].post("/v1/chat/completions", json={"messages": HI, **body})
    assert answer.status_code == 400, answer.text
    assert answer.json()["error"]["param"] == param
    assert "\n" not in answer.json()["error"]["message"]
