"""The server before a scripted model: what clients send and get, and everything that must not bring it down."""

import json
import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import openai
import pytest
from helpers.serving import TOKENIZER, Script, running, settled
from helpers.shop import SHOP, script
from hypothesis import given
from hypothesis import strategies as st

from minglm.chat import render
from minglm.inference.request import Event
from minglm.serve.errors import APIError
from minglm.serve.requests import Job, ServedModel, chat_job, text_job
from minglm.serve.responses import CompletionBuilder
from minglm.serve.stream import Answer, StopStrings
from minglm.testing.chat import TOOLS, assistant_messages

README = (Path(__file__).parent.parent.parent / "README.md").read_text(encoding="utf-8")
HI = [{"role": "user", "content": "hi"}]
AS_JSON = {"content-type": "application/json"}


@pytest.fixture(scope="module")
def shop():
    """Yield a server, shared by the tests that leave it as it was; also the engine that it asks."""
    engine = Script(script)
    with running(engine, limit=200_000) as (http, client, service):
        yield http, client, service, engine


def post(http, path="/v1/chat/completions", **body):
    """Return (status, the parsed answer) of a plain POST."""
    question = {"messages": HI} if path.endswith("/chat/completions") else {}
    answer = http.post(path, json={"model": "tiny", **question, **body})
    return answer.status_code, answer.json()


def streamed(stream):
    """Return (message, finish reason, usage) of a streamed chat, put together as a client would."""
    whole = CompletionBuilder()
    reason = None
    usage = None
    for chunk in stream:
        usage = chunk.usage or usage
        for choice in chunk.choices:
            assert reason is None, "a chunk after the last"
            whole.add(choice.delta.model_dump(exclude_none=True, exclude={"role"}))
            reason = choice.finish_reason
    return whole.message(), reason, usage


def test_a_tool_round_trip_with_the_official_client(shop):
    """Question, call with typed arguments, result, answer: whole and streamed alike, the reasoning sent back."""
    _, client, _, engine = shop
    messages = [{"role": "user", "content": "what of order 123?"}]
    ask = {"model": "tiny", "tools": SHOP, "seed": 1}
    first = client.chat.completions.create(messages=messages, **ask)
    choice = first.choices[0]
    assert choice.finish_reason == "tool_calls"
    assert choice.message.reasoning_content == "Look it up."
    assert choice.message.content == "Let me see."
    call = choice.message.tool_calls[0]
    assert call.function.name == "get_order"
    assert json.loads(call.function.arguments) == {"order_id": 123}
    assert first.usage.completion_tokens_details.reasoning_tokens == len("<>Look it up.")

    options = {"stream": True, "stream_options": {"include_usage": True}}
    message, reason, usage = streamed(
        client.chat.completions.create(messages=messages, **ask, **options)
    )
    assert reason == "tool_calls" and usage == first.usage
    assert message.pop("tool_calls")[0]["function"] == call.function.model_dump(
        include={"name", "arguments"}
    )
    assert message == {
        "role": "assistant",
        "content": "Let me see.",
        "reasoning_content": "Look it up.",
    }

    messages += [choice.message.model_dump(exclude_none=True)]
    messages += [{"role": "tool", "tool_call_id": call.id, "content": '{"status": "pending"}'}]
    second = client.chat.completions.create(messages=messages, **ask)
    assert second.choices[0].message.content == "It is pending."
    assert second.choices[0].finish_reason == "stop"
    assert "<think>Look it up.</think>" in engine.prompts[-1]
    assert '<tool_response>\n{"status": "pending"}\n</tool_response>' in engine.prompts[-1]


@pytest.mark.parametrize(
    "switch",
    [{"chat_template_kwargs": {"enable_thinking": False}}, {"thinking": {"type": "disabled"}}],
)
def test_the_thinking_switch(shop, switch):
    """Both spellings switch it off; without them it is on."""
    http, _, _, engine = shop
    _, found = post(http, **switch)
    assert engine.prompts[-1].endswith("/nothink<|assistant|>\n<think></think>")
    assert found["choices"][0]["message"] == {"role": "assistant", "content": "At once."}
    _, found = post(http)
    assert engine.prompts[-1].endswith("<|assistant|>")
    assert found["choices"][0]["message"]["reasoning_content"] == "A greeting."


def test_tool_choice(shop):
    """None offers nothing; a named function and required begin the call in the prompt."""
    http, _, _, engine = shop
    order = [{"role": "user", "content": "my order 123"}]
    _, found = post(http, messages=order, tools=SHOP, tool_choice="none")
    assert "# Tools" not in engine.prompts[-1]
    # It calls all the same, and no client hears it.
    assert "tool_calls" not in found["choices"][0]["message"]
    assert found["choices"][0]["format_error"] == "unknown_tool"
    for choice in ("required", {"type": "function", "function": {"name": "get_order"}}):
        _, found = post(http, messages=order, tools=SHOP, tool_choice=choice)
        message = found["choices"][0]["message"]
        assert message["content"] is None
        # OpenAI ends an answer to a named function with stop.
        ended = "tool_calls" if choice == "required" else "stop"
        assert found["choices"][0]["finish_reason"] == ended
        assert message["tool_calls"][0]["function"] == {
            "name": "get_order",
            "arguments": '{"order_id": 123}',
        }
    assert engine.prompts[-1].endswith("\n<think></think>\n<tool_call>get_order\n")
    _, found = post(
        http, messages=[{"role": "user", "content": "two"}], tools=SHOP, parallel_tool_calls=False
    )
    assert len(found["choices"][0]["message"]["tool_calls"]) == 1
    _, found = post(http, messages=[{"role": "user", "content": "broken"}], tools=SHOP)
    assert found["choices"][0]["format_error"] == "bad_tool_call"


def test_stop_length_and_usage(shop):
    """A stop string ends the content before it, whole and streamed; the token limit gives `length`."""
    http, client, service, _ = shop
    _, found = post(http, stop=["x", "; and"])
    assert found["choices"][0]["message"]["content"] == "Hello, wörld"
    assert found["choices"][0]["finish_reason"] == "stop"
    stream = client.chat.completions.create(model="tiny", messages=HI, stop=" and", stream=True)
    assert streamed(stream)[:2] == (
        {"role": "assistant", "content": "Hello, wörld;", "reasoning_content": "A greeting."},
        "stop",
    )
    _, found = post(http, max_completion_tokens=5)
    assert found["choices"][0]["finish_reason"] == "length"
    assert found["usage"]["completion_tokens"] == 5
    assert found["choices"][0]["format_error"] == "unclosed_think"
    assert settled(lambda: service.engine_thread.open_requests == 0)


def test_completions(shop):
    """Text or token ids, several prompts, n answers to each, log-probabilities, the ids themselves."""
    http, client, _, engine = shop
    found = client.completions.create(
        model="tiny", prompt=["Once", TOKENIZER.encode("Twice")], n=2, max_tokens=100
    )
    assert [choice.text for choice in found.choices] == [" and so on, é."] * 4
    assert sorted(engine.prompts[-4:]) == ["Once", "Once", "Twice", "Twice"]
    assert found.usage.prompt_tokens == 9
    chunks = client.completions.create(model="tiny", prompt="x", stream=True)
    assert "".join(chunk.choices[0].text for chunk in chunks) == " and so on, é."
    _, found = post(
        http, "/v1/completions", prompt="x", logprobs=2, max_tokens=3, return_token_ids=True
    )
    choice = found["choices"][0]
    assert choice["logprobs"]["tokens"] == [" ", "a", "n"]
    assert choice["logprobs"]["text_offset"] == [0, 1, 2]
    assert choice["logprobs"]["token_logprobs"] == [-0.5] * 3
    assert [len(top) for top in choice["logprobs"]["top_logprobs"]] == [2] * 3
    assert choice["token_ids"] == TOKENIZER.encode(" an")
    assert choice["prompt_token_ids"] == TOKENIZER.encode("x")
    _, found = post(http, logprobs=True, top_logprobs=1, max_tokens=2)
    entries = found["choices"][0]["logprobs"]["content"]
    assert [entry["token"] for entry in entries] == ["\n", "<think>"]
    assert len(entries[0]["top_logprobs"]) == 1


# (what replaces parts of a good request, the field that is named)
MALFORMED = [
    ({"messages": []}, "messages"),
    ({"messages": "hi"}, "messages"),
    ({"messages": ["hi"]}, "messages"),
    ({"messages": [{"role": []}]}, "messages"),
    ({"messages": [{"role": "user", "content": {"text": "x"}}]}, "messages"),
    ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "messages"),
    ({"messages": [{"role": "assistant", "tool_calls": {"a": 1}}]}, "messages"),
    ({"messages": [{"role": "assistant", "tool_calls": [{"function": "f"}]}]}, "messages"),
    (
        {
            "messages": [
                {"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": "{"}}]}
            ]
        },
        "messages",
    ),
    ({"model": 3}, "model"),
    ({"temperature": "warm"}, "temperature"),
    ({"temperature": True}, "temperature"),
    ({"temperature": 2.5}, "temperature"),
    ({"top_p": -0.1}, "top_p"),
    ({"n": 0}, "n"),
    ({"n": 1000}, "n"),
    ({"max_tokens": 0}, "max_tokens"),
    ({"max_tokens": 2.5}, "max_tokens"),
    ({"seed": 1 << 70}, "seed"),
    ({"stop": [""]}, "stop"),
    ({"stop": 5}, "stop"),
    ({"stop": ["a"] * 99}, "stop"),
    ({"stream": "yes"}, "stream"),
    ({"top_logprobs": 5}, "top_logprobs"),
    ({"logprobs": True, "top_logprobs": 99}, "top_logprobs"),
    ({"frequency_penalty": 5}, "frequency_penalty"),
    ({"response_format": {"type": "xml"}}, "response_format"),
    ({"tools": {"name": "f"}}, "tools"),
    ({"tools": [{"type": "function"}]}, "tools[0]"),
    ({"tools": [{"function": {"name": "a b"}}]}, "tools[0]"),
    (
        {"tools": [{"function": {"name": "f", "parameters": {"properties": {"x": {"type": 3}}}}}]},
        "tools[0]",
    ),
    (
        {
            "tools": [
                {"function": {"name": "f", "parameters": {"properties": {"x": {"anyOf": [3]}}}}}
            ]
        },
        "tools[0]",
    ),
    ({"tools": SHOP, "tool_choice": {"function": {"name": "fly"}}}, "tool_choice"),
    ({"tool_choice": "required"}, "tool_choice"),
    ({"thinking": {"type": "maybe"}}, "thinking"),
    ({"chat_template_kwargs": {"enable_thinking": 1}}, "chat_template_kwargs"),
    ({"chat_template_kwargs": {"clear_thinking": False}}, "messages"),
]


@pytest.mark.parametrize(
    "change, param", MALFORMED, ids=[str(change)[:50] for change, _ in MALFORMED]
)
def test_malformed_requests(shop, change, param):
    """Each gets status 400, an OpenAI error object that names the field, and one line of words."""
    status, found = post(shop[0], **change)
    assert (status, found["error"]["param"], found["error"]["type"]) == (
        400,
        param,
        "invalid_request_error",
    )
    assert found["error"]["message"]
    assert "\n" not in found["error"]["message"]


def test_what_is_no_request(shop):
    """Not JSON, not an object, other paths, methods and models: error objects, and the client's own exceptions."""
    http, client, _, _ = shop
    bodies = [
        b"",
        b"{",
        b"\xff\xfe",
        b'"text"',
        b'{"n": NaN}',
        b"[" * 100_000,
        b'{"messages": ' + b"[" * 5000 + b"]" * 5000,
    ]
    for body in bodies:
        answer = http.post("/v1/chat/completions", content=body, headers=AS_JSON)
        assert answer.status_code == 400, body[:20]
        assert answer.json()["error"]["type"] == "invalid_request_error", body[:20]
    assert http.get("/nothing").json()["error"]["message"] == "Not Found: GET /nothing"
    assert http.get("/v1/completions").status_code == 405
    assert post(http, "/v1/completions", prompt=[1, 10**9])[0] == 400
    assert post(http, "/v1/completions", prompt=[])[0] == 400
    assert post(http, "/v1/completions", prompt="")[0] == 400
    assert post(http, "/v1/completions", prompt="x", suffix="y")[0] == 400
    with pytest.raises(openai.NotFoundError, match="not served"):
        client.chat.completions.create(model="gpt", messages=HI)
    with pytest.raises(openai.BadRequestError, match="temperature"):
        client.chat.completions.create(model="tiny", messages=HI, temperature=9)
    assert [model.id for model in client.models.list()] == ["tiny"]
    assert client.models.retrieve("tiny").id == "tiny"
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("a/b")


_values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-3, 3)
    | st.floats()
    | st.sampled_from(["", "auto", "user", "\ud800", "a"]),
    lambda inner: (
        st.lists(inner, max_size=2)
        | st.dictionaries(
            st.sampled_from(["role", "content", "function", "name", "type", "parameters"]),
            inner,
            max_size=3,
        )
    ),
    max_leaves=6,
)
_fields = [
    "messages",
    "prompt",
    "tools",
    "tool_choice",
    "stop",
    "thinking",
    "chat_template_kwargs",
    "n",
    "seed",
    "stream",
]
_fields += [
    "temperature",
    "max_tokens",
    "logprobs",
    "top_logprobs",
    "stream_options",
    "response_format",
    "model",
]


@given(
    st.dictionaries(st.sampled_from(_fields), _values, max_size=5),
    st.sampled_from([chat_job, text_job]),
)
def test_any_body_is_a_job_or_refused(body, make):
    """Whatever stands in the fields, the answer is a job that can be queued or a `APIError`."""
    body = {"messages": HI, "prompt": "x", **body}
    try:
        job = make(body, ServedModel(TOKENIZER, "tiny", 500))
    except APIError as refused:
        assert 400 <= refused.status < 500
    else:
        for request in job.requests:
            request.check(501)


def test_too_large(tmp_path):
    """A body beyond the limit gets 413, a prompt beyond the model's length 400, and the next request its answer."""
    with running(Script(script), limit=300, max_body_bytes=5000) as (http, _, _):
        status, found = post(http, messages=[{"role": "user", "content": "a" * 20_000}])
        assert (status, found["error"]["code"]) == (413, "request_too_large")
        status, found = post(http, messages=[{"role": "user", "content": "a" * 400}])
        assert (status, found["error"]["code"]) == (400, "context_length_exceeded")
        assert post(http)[0] == 200


def test_a_flood_is_refused_and_the_rest_answered():
    """As many as may wait are answered, the others get 429 at once; afterwards there is room again."""
    with running(Script(script, pause=0.01), max_open_requests=6) as (http, client, service):
        with ThreadPoolExecutor(24) as pool:
            statuses = list(
                pool.map(
                    lambda _: http.post("/v1/completions", json={"prompt": "x"}).status_code,
                    range(24),
                )
            )
        assert set(statuses) == {200, 429} and statuses.count(200) >= 6
        assert http.post("/v1/completions", json={"prompt": "x", "n": 7}).status_code == 429
        with pytest.raises(openai.RateLimitError, match="try again later"):
            client.completions.create(model="tiny", prompt="x", n=7)
        assert service.engine_thread.open_requests == 0 and post(http)[0] == 200
        refused = 'minglm_requests_total{endpoint="/v1/completions",status="429"}'
        assert refused in http.get("/metrics").text


def test_clients_that_go_away_are_cancelled():
    """Streamed or not, the engine is told, and serves the others."""
    endless = [{"role": "user", "content": "endless"}]
    engine = Script(script, pause=0.002)
    with running(engine, limit=200_000) as (http, client, service):
        with client.chat.completions.create(
            model="tiny", messages=endless, stream=True, n=2
        ) as stream:
            next(iter(stream))
            assert service.engine_thread.open_requests == 2
        assert settled(lambda: not engine.open)
        assert service.engine_thread.open_requests == 0
        assert len(engine.cancelled) == 2
        with pytest.raises(openai.APITimeoutError):
            client.with_options(timeout=2.0).chat.completions.create(model="tiny", messages=endless)
        assert settled(lambda: not engine.open) and len(engine.cancelled) == 3
        assert post(http)[0] == 200
        assert settled(lambda: 'status="499"} 2' in http.get("/metrics").text)


def test_a_failing_pass_fails_its_answers_only():
    """An exception in the engine is status 500, or an error event in a stream; the next request is answered."""
    crash = [{"role": "user", "content": "crash"}]
    with running(Script(script)) as (http, client, service):
        status, found = post(http, messages=crash)
        assert (status, found["error"]["type"]) == (500, "server_error")
        with pytest.raises(openai.APIError, match="the engine failed"):
            list(client.chat.completions.create(model="tiny", messages=crash, stream=True))
        assert post(http)[0] == 200 and service.engine_thread.open_requests == 0
        text = http.get("/metrics").text
        assert "minglm_engine_failures_total 2" in text
        assert http.get("/health").json()["status"] == "ok"


def test_metrics_are_prometheus_text(shop):
    """Every line is a comment or `name{labels} number`, every sample has a type, and histograms add up."""
    http = shop[0]
    post(http)
    text = http.get("/metrics").text
    types = dict(re.findall(r"^# TYPE (\w+) (\w+)$", text, re.MULTILINE))
    samples = [line for line in text.splitlines() if not line.startswith("#")]
    for line in samples:
        name, value = re.fullmatch(r'(\w+)(?:\{(?:\w+="[^"]*",?)+\})? (\S+)', line).groups()
        assert float(value) >= 0
        assert {name, re.sub("_(bucket|sum|count)$", "", name)} & types.keys()
    counts = re.findall(r"minglm_request_seconds_bucket\S+ (\d+)", text)
    assert counts == sorted(counts, key=int)
    assert f"minglm_request_seconds_count {counts[-1]}\n" in text


def test_the_4_7_dialect():
    """The prompt opens the reasoning, so what comes is reasoning; clear_thinking keeps the old one."""
    engine = Script(
        lambda prompt: "r</think>c<|user|>" if prompt.endswith("<think>") else "plain<|user|>"
    )
    with running(engine, dialect="glm-4.7") as (http, _, _):
        _, found = post(http)
        assert found["choices"][0]["message"] == {
            "role": "assistant",
            "content": "c",
            "reasoning_content": "r",
        }
        assert found["usage"]["completion_tokens_details"]["reasoning_tokens"] == 2
        old = [*HI, found["choices"][0]["message"], *HI]
        post(http, messages=old, chat_template_kwargs={"clear_thinking": False})
        assert (
            engine.prompts[-1]
            == "[gMASK]<sop><|user|>hi<|assistant|><think>r</think>c<|user|>hi<|assistant|><think>"
        )
        _, found = post(http, thinking={"type": "disabled"})
        assert found["choices"][0]["message"] == {"role": "assistant", "content": "plain"}


def test_the_example_in_readme_runs():
    """The Python block that calls the server does, against a server."""
    (block,) = re.findall(r"^```py\n(.*?)^```", README, re.MULTILINE | re.DOTALL)
    with running(Script(script)) as (http, _, _):
        program = block.replace("http://127.0.0.1:8000", str(http.base_url).rstrip("/")).replace(
            '"toy"', '"tiny"'
        )
        done = subprocess.run(
            [sys.executable, "-c", program], capture_output=True, text=True, timeout=300
        )
        assert done.returncode == 0 and "get_order" in done.stdout, done.stderr


@given(
    st.lists(st.sampled_from(["b", "aba", "aab", "abab"]), max_size=3),
    st.text("aab", max_size=12),
    st.data(),
)
def test_stop_strings_in_any_split(stops, text, data):
    """What is passed on is the text before the stop string that ends first, whatever the pieces."""
    ends = [(text.find(stop) + len(stop), text.find(stop)) for stop in stops if stop in text]
    expected = text[: min(ends)[1]] if ends else text
    assert StopStrings(("aba", "b")).feed("aba") == "a"  # in one piece as in three: "b" ends first
    finder = StopStrings(tuple(stops))
    said = ""
    rest = text
    while rest:
        piece = rest[: data.draw(st.integers(1, len(rest)))]
        said = said + finder.feed(piece)
        rest = rest[len(piece) :]
        assert expected.startswith(said)
    assert said + finder.feed("", last=True) == expected
    assert finder.hit == bool(ends)


@given(
    message=st.booleans().flatmap(lambda calls: assistant_messages(calls=calls)),
    opened=st.booleans(),
)
def test_the_deltas_make_the_message(message, opened):
    """Any message, token by token, sums to itself, with calls as JSON text."""
    if opened:  # 4.7 writes no tag before reasoning, and has none that is empty
        message = message | {"reasoning_content": message["reasoning_content"] or "r"}
    question = [{"role": "user", "content": "hi"}]
    dialect = "glm-4.7" if opened else "glm-4.5"
    prompt = render(TOKENIZER, question, TOOLS, generation_prompt=True, dialect=dialect).ids
    rendered = render(TOKENIZER, [*question, message], TOOLS, dialect=dialect).ids
    ids = rendered[len(prompt) :]
    tools = [{"type": "function", "function": tool} for tool in TOOLS]
    answer = Answer(Job(True, [], tools=tools, opened=opened), TOKENIZER)
    whole = CompletionBuilder()
    for number, token in enumerate(ids):
        reason = "stop" if number + 1 == len(ids) else None
        for delta in answer.take(Event(0, token, finish_reason=reason)):
            whole.add(delta)
    found = whole.message()
    assert (found["content"] or "") == message["content"]
    assert found.get("reasoning_content", "") == message["reasoning_content"]
    calls = [
        {"name": call["function"]["name"], "arguments": json.loads(call["function"]["arguments"])}
        for call in found.get("tool_calls", [])
    ]
    assert calls == message["tool_calls"]
    assert answer.format_error is None
    assert answer.finish_reason == ("tool_calls" if message["tool_calls"] else "stop")
