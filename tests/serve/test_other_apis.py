"""Test the Messages and the Responses API with their official clients: a chat with tools, whole and streamed."""

import json

import anthropic
import pytest
from helpers.serving import TOKENIZER, Script, running
from helpers.shop import CALL, SHOP, script

from minglm.serve.app import format_of
from minglm.serve.requests import ServedModel

ORDER_TOOL = {
    "name": "get_order",
    "description": "Look up an order.",
    "input_schema": SHOP[0]["function"]["parameters"],
}
QUESTION = {"role": "user", "content": "what of order 123?"}


@pytest.fixture(scope="module")
def shop():
    """Return (http, openai client, anthropic client, engine) of a server with a scripted shop."""
    engine = Script(script)
    with running(engine, limit=200_000) as (http, client, _):
        base = str(http.base_url).rstrip("/")
        messages = anthropic.Anthropic(base_url=base, api_key="none", max_retries=0, timeout=60)
        yield http, client, messages, engine
        messages.close()


def test_messages_round_trip(shop):
    """Question, thinking, call, result, answer; the blocks that come back render to what was sampled."""
    _, _, client, engine = shop
    settings = {
        "model": "tiny",
        "max_tokens": 2000,
        "system": [{"type": "text", "text": "You keep a shop."}],
        "tools": [ORDER_TOOL],
        "thinking": {"type": "adaptive"},
    }
    first = client.messages.create(messages=[QUESTION], **settings)
    assert [block.type for block in first.content] == ["thinking", "text", "tool_use"]
    assert first.content[0].thinking == "Look it up." and first.content[1].text == "Let me see."
    call = first.content[2]
    assert (call.name, call.input, first.stop_reason) == (
        "get_order",
        {"order_id": 123},
        "tool_use",
    )
    assert first.usage.input_tokens > 100 and first.usage.output_tokens > 20

    with client.messages.stream(messages=[QUESTION], **settings) as stream:
        kinds = {event.type for event in stream}
        whole = stream.get_final_message()
    assert {"message_start", "content_block_delta", "message_stop"} <= kinds
    assert [block.type for block in whole.content] == ["thinking", "text", "tool_use"]
    assert whole.content[2].input == {"order_id": 123} and whole.stop_reason == "tool_use"
    assert whole.usage.output_tokens == first.usage.output_tokens

    result = {"type": "tool_result", "tool_use_id": call.id, "content": '{"status": "pending"}'}
    turns = [
        QUESTION,
        {"role": "assistant", "content": [block.model_dump() for block in first.content]},
        {"role": "user", "content": [result]},
    ]
    second = client.messages.create(messages=turns, **settings)
    assert second.content[-1].text == "It is pending." and second.stop_reason == "end_turn"
    sampled = f"\n<think>Look it up.</think>\nLet me see.\n{CALL}<|observation|>"
    assert sampled in engine.prompts[-1] and "You keep a shop." in engine.prompts[-1]


def test_messages_switches_and_ends(shop):
    """Without thinking there is none; limits and stop sequences are named; tools may be forced or counted."""
    _, _, client, engine = shop
    ask = {"model": "tiny", "max_tokens": 500, "messages": [{"role": "user", "content": "hi"}]}
    found = client.messages.create(**ask)
    assert [block.type for block in found.content] == ["text"]
    assert engine.prompts[-1].endswith("<think></think>")
    thinking = {"type": "enabled", "budget_tokens": 1024}
    found = client.messages.create(**ask, thinking=thinking, stop_sequences=["; and"])
    assert (found.stop_reason, found.stop_sequence) == ("stop_sequence", "; and")
    assert found.content[-1].text == "Hello, wörld"
    assert client.messages.create(**ask | {"max_tokens": 3}).stop_reason == "max_tokens"
    for choice in ({"type": "any"}, {"type": "tool", "name": "get_order"}):
        found = client.messages.create(**ask, tools=[ORDER_TOOL], tool_choice=choice)
        assert found.content[0].name == "get_order" and found.stop_reason == "tool_use"
    count = client.messages.count_tokens(model="tiny", messages=ask["messages"])
    assert count.input_tokens == client.messages.create(**ask).usage.input_tokens


def test_messages_mistakes(shop):
    """They are Anthropic's errors, each names its field; a failing pass ends a stream with an error."""
    _, _, client, _ = shop
    ask = {"model": "tiny", "max_tokens": 50, "messages": [{"role": "user", "content": "hi"}]}
    image = {"type": "image", "source": {"type": "url", "url": "x"}}
    for wrong, said in (
        ({"messages": []}, "messages"),
        ({"messages": [{"role": "user", "content": [image]}]}, "text only"),
        ({"messages": [*ask["messages"], {"role": "assistant", "content": "He"}]}, "continued"),
        ({"tools": [{"type": "bash_20250124", "name": "bash"}]}, "custom"),
        ({"thinking": {"type": "sometimes"}}, "thinking"),
        ({"extra_body": {"container": "x"}}, "container"),
    ):
        with pytest.raises(anthropic.BadRequestError, match=said) as error:
            client.messages.create(**ask | wrong)
        assert error.value.body["error"]["type"] == "invalid_request_error"
    with pytest.raises(anthropic.NotFoundError):
        client.messages.create(**ask | {"model": "claude"})
    crash = [{"role": "user", "content": "crash"}]
    with (
        pytest.raises(anthropic.APIError, match="engine failed"),
        client.messages.stream(**ask | {"messages": crash}) as stream,
    ):
        stream.get_final_message()


def test_responses_round_trip(shop):
    """Question, reasoning, call, output, answer; whole and streamed alike."""
    _, client, _, engine = shop
    tool = {"type": "function", **SHOP[0]["function"], "strict": False}
    settings = {"model": "tiny", "instructions": "You keep a shop.", "tools": [tool]}
    first = client.responses.create(input="what of order 123?", **settings)
    assert [item.type for item in first.output] == ["reasoning", "message", "function_call"]
    assert first.output[0].content[0].text == "Look it up."
    assert first.output_text == "Let me see." and first.status == "completed"
    call = first.output[2]
    assert (call.name, json.loads(call.arguments)) == ("get_order", {"order_id": 123})
    assert first.usage.output_tokens_details.reasoning_tokens > 5

    with client.responses.stream(input="what of order 123?", **settings) as stream:
        events = list(stream)
        whole = stream.get_final_response()
    assert [event.sequence_number for event in events] == sorted(
        event.sequence_number for event in events
    )
    assert events[0].type == "response.created" and events[-1].type == "response.completed"
    text = "".join(event.delta for event in events if event.type == "response.output_text.delta")
    assert text == first.output_text == whole.output_text
    assert whole.output[2].arguments == call.arguments

    items = [QUESTION, *(item.model_dump(exclude_none=True) for item in first.output)]
    output = '{"status": "pending"}'
    items.append({"type": "function_call_output", "call_id": call.call_id, "output": output})
    second = client.responses.create(input=items, **settings)
    assert second.output_text == "It is pending."
    sampled = f"\n<think>Look it up.</think>\nLet me see.\n{CALL}<|observation|>"
    assert sampled in engine.prompts[-1]


def test_responses_switches_ends_and_mistakes(shop):
    """Effort none switches thinking off; a limit makes it incomplete; what is stored elsewhere is refused."""
    http, client, _, _ = shop
    found = client.responses.create(model="tiny", input="hi", reasoning={"effort": "none"})
    assert [item.type for item in found.output] == ["message"]
    found = client.responses.create(model="tiny", input="hi", max_output_tokens=16)
    assert found.status == "incomplete"
    assert found.incomplete_details.reason == "max_output_tokens"
    for wrong, field in (
        ({"previous_response_id": "resp_1"}, "previous_response_id"),
        ({"background": True}, "background"),
        ({"conversation": "c"}, "conversation"),
        ({"tools": [{"type": "web_search"}]}, "tools[0]"),
        ({"input": []}, "input"),
        ({"input": [{"type": "item_reference", "id": "x"}]}, "input"),
        ({"truncation": "auto"}, "truncation"),
        ({"text": {"format": {"type": "xml"}}}, "response_format"),
    ):
        answer = http.post("/v1/responses", json={"model": "tiny", "input": "hi", **wrong})
        assert (answer.status_code, answer.json()["error"]["param"]) == (400, field), answer.text
    answer = http.post("/v1/responses", json={"input": "crash", "stream": True})
    assert "response.failed" in answer.text and "engine failed" in answer.text


def in_chat(ids):
    """Return two calls and their results, which arrive by these ids, as OpenAI's chat has them."""
    calls = [
        {"id": id, "type": "function", "function": {"name": "get_order", "arguments": "{}"}}
        for id in "ab"
    ]
    results = [{"role": "tool", "tool_call_id": id, "content": f"result {id}"} for id in ids]
    return {"messages": [QUESTION, {"role": "assistant", "tool_calls": calls}, *results]}


def in_responses(ids):
    """Return the same as items of OpenAI's Responses."""
    calls = [{"type": "function_call", "call_id": id, "name": "get_order"} for id in "ab"]
    results = [
        {"type": "function_call_output", "call_id": id, "output": f"result {id}"} for id in ids
    ]
    return {"input": [QUESTION, *calls, *results]}


def in_messages(ids):
    """Return the same as blocks of Anthropic's Messages."""
    calls = [{"type": "tool_use", "id": id, "name": "get_order", "input": {}} for id in "ab"]
    results = [{"type": "tool_result", "tool_use_id": id, "content": f"result {id}"} for id in ids]
    turns = [{"role": "assistant", "content": calls}, {"role": "user", "content": results}]
    return {"max_tokens": 9, "messages": [QUESTION, *turns]}


APIS = {"chat/completions": in_chat, "responses": in_responses, "messages": in_messages}


@pytest.mark.parametrize("path", APIS)
def test_results_stand_in_the_order_of_their_calls(path):
    """A client sends them as they come, told apart by ids, which the prompt has none of; without ids they stay."""
    served = ServedModel(TOKENIZER, "tiny", 100_000)

    def prompt(ids):
        job = format_of(APIS[path](ids), f"/v1/{path}", served).job
        return TOKENIZER.decode(job.requests[0].prompt)

    assert prompt("ba") == prompt("ab")
    for ids in ("ab", "a", "xa"):  # all, one of them, one of no call
        shown = prompt(ids)
        places = [shown.index(f"result {id}") for id in ids]
        assert places == sorted(places)
