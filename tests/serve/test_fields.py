"""Test that no field of a request is accepted and ignored, and what the fields beyond OpenAI's own do.

The lists are those of the public documentation of OpenAI's, vLLM's and SGLang's chat and text completions.
"""

import pytest
from helpers.serving import TOKENIZER, Script, running
from hypothesis import given
from hypothesis import strategies as st

from minglm.inference import Engine, Request
from minglm.serve.errors import APIError
from minglm.serve.fields import CHAT, NEUTRAL, TEXT, WITHOUT_EFFECT
from minglm.serve.requests import ServedModel, chat_job, text_job
from minglm.testing.model import tiny_model

HI = [{"role": "user", "content": "hi"}]
SERVED = ServedModel(TOKENIZER, "tiny", 4096)
V = TOKENIZER.vocab_size

# What each field would do, {field: (value, how the job differs)}: an attribute of the job or of its first request.
EFFECTS = {
    "temperature": (0.5, "temperature", 0.5),
    "top_p": (0.5, "top_p", 0.5),
    "top_k": (5, "top_k", 5),
    "min_p": (0.1, "min_p", 0.1),
    "frequency_penalty": (0.5, "frequency_penalty", 0.5),
    "presence_penalty": (0.5, "presence_penalty", 0.5),
    "repetition_penalty": (1.2, "repetition_penalty", 1.2),
    "logit_bias": ({"5": -3}, "logit_bias", ((5, -3.0),)),
    "stop_token_ids": ([7], "stop_ids", (*TOKENIZER.stop_ids, 7)),
    "ignore_eos": (True, "stop_ids", ()),
    "min_tokens": (4, "min_new_tokens", 4),
    "allowed_token_ids": ([1, 2], "allowed_ids", (1, 2)),
    "max_tokens": (5, "max_new_tokens", 5),
    "prompt_logprobs": (2, "prompt_logprobs", 2),
    "stop": ("x", "stop_strings", ("x",)),
    "stream": (True, "stream", True),
    "return_token_ids": (True, "return_token_ids", True),
}

# Fields that change an answer and that this server has no way to honour, with a value that asks for it.
REFUSED = {
    "best_of": 3,
    "suffix": "end",
    "functions": [{"name": "f"}],
    "function_call": {"name": "f"},
    "modalities": ["audio"],
    "audio": {"voice": "a"},
    "web_search_options": {},
    "verbosity": "low",
    "moderation": {"model": "x"},
    "use_beam_search": True,
    "length_penalty": 2.0,
    "early_stopping": True,
    "include_stop_str_in_output": True,
    "no_stop_trim": True,
    "skip_special_tokens": False,
    "truncate_prompt_tokens": 5,
    "add_generation_prompt": False,
    "continue_final_message": True,
    "add_special_tokens": True,
    "documents": [{"text": "x"}],
    "chat_template": "{{ x }}",
    "mm_processor_kwargs": {"a": 1},
    "guided_grammar": "root ::= x",
    "guided_whitespace_pattern": " ",
    "logits_processors": ["x"],
    "bad_words": ["x"],
    "return_tokens_as_token_ids": True,
    "return_hidden_states": True,
    "include_reasoning": False,
    "separate_reasoning": False,
    "stream_reasoning": False,
    "regex": "a",
    "ebnf": "root ::= x",
    "json_schema": "{}",
    "structural_tag": "x",
    "stop_regex": "a",
    "custom_logit_processor": "x",
    "custom_params": {"a": 1},
    "lora_path": "x",
    "session_params": {"id": 1},
    "top_a": 0.5,
    "typical_p": 0.5,
    "vllm_xargs": {"a": 1},
    "kv_transfer_params": {"a": 1},
}


def jobs(**body):
    """Return the job of each endpoint, or the error that it raises."""
    found = []
    for make, fixed in ((chat_job, {"messages": HI}), (text_job, {"prompt": "hi"})):
        try:
            found.append(make({**fixed, **body}, SERVED))
        except APIError as error:
            found.append(error)
    return found


@pytest.mark.parametrize("field", EFFECTS)
def test_an_honoured_field_reaches_the_engine(field):
    """It changes the job in the way that is written here."""
    value, attribute, expected = EFFECTS[field]
    for job, default in zip(jobs(**{field: value}), jobs(), strict=True):
        holder = job.requests[0] if hasattr(job.requests[0], attribute) else job
        assert getattr(holder, attribute) == expected
        holder = default.requests[0] if hasattr(default.requests[0], attribute) else default
        assert getattr(holder, attribute) != expected


@pytest.mark.parametrize("field", REFUSED)
def test_a_field_that_is_not_supported_is_refused_by_name(field):
    """At both endpoints, with a remedy; null and the value that changes nothing are accepted."""
    for error in jobs(**{field: REFUSED[field]}):
        assert isinstance(error, APIError)
        assert error.body["error"]["param"] == field
        assert "leave it out" in str(error)
    for value in (None, *NEUTRAL.get(field, ())):
        if field == "echo":
            continue
        assert not any(isinstance(job, APIError) for job in jobs(**{field: value}))


values = st.sampled_from([None, False, True, -2, -1, 0, 1, 2, "x", [], {}])


@given(field=st.text(min_size=1, max_size=12) | st.sampled_from(sorted(NEUTRAL)), value=values)
def test_an_unknown_field_is_never_ignored(field, value):
    """Whatever its name: unless it is null, it is known, or its value asks for nothing, the answer is 400 by name."""
    for job, known in zip(jobs(**{field: value}), (CHAT, TEXT), strict=True):
        if field in known or field in WITHOUT_EFFECT or value is None:
            continue
        if any(value == one and type(value) is type(one) for one in NEUTRAL.get(field, ())):
            assert not isinstance(job, APIError)
        else:
            assert isinstance(job, APIError)
            assert job.body["error"]["param"] == field[:80]


SWITCHED_OFF = [
    {"enable_thinking": False},
    {"thinking": False},
    {"thinking": {"type": "disabled"}},
    {"reasoning_effort": "none"},
    {"reasoning_effort": "minimal"},
    {"reasoning": {"effort": "none"}},
    {"reasoning": {"enabled": False}},
    {"chat_template_kwargs": {"enable_thinking": False}},
    {"chat_template_kwargs": {"thinking": False}},
    {"chat_template_kwargs": {"reasoning_effort": "none"}},
]
SWITCHED_ON = [
    {},
    {"enable_thinking": True},
    {"reasoning_effort": "high"},
    {"thinking": {"type": "enabled"}},
]


@pytest.mark.parametrize("switch", SWITCHED_OFF + SWITCHED_ON, ids=str)
def test_every_spelling_of_the_thinking_switch(switch):
    """Each does what its name says; two that disagree are refused."""
    prompt = TOKENIZER.decode(chat_job({"messages": HI, **switch}, SERVED).requests[0].prompt)
    assert prompt.endswith("</think>") == (switch in SWITCHED_OFF)
    other = {"reasoning_effort": "high"} if switch in SWITCHED_OFF else {"enable_thinking": False}
    if switch and not switch.keys() & other.keys():
        with pytest.raises(APIError, match="disagree"):
            chat_job({"messages": HI, **switch, **other}, SERVED)


@pytest.mark.parametrize(
    "body",
    [
        {"chat_template_kwargs": {"tools_in_user_message": True}},
        {"thinking": {"type": "enabled", "budget_tokens": -5}},
        {"thinking": {"type": "enabled", "budget_tokens": 5}, "thinking_token_budget": 6},
        {"thinking": {"type": "enabled", "level": 5}},
        {"thinking_token_budget": "many"},
        {"reasoning_effort": "huge"},
        {"reasoning": {"max_tokens": 5}},
        {"stream_options": {"continuous_usage_stats": True}},
        {"logit_bias": {str(V): 1}},
        {"logit_bias": {"x": 1}},
        {"logit_bias": {"1": 101}},
        {"stop_token_ids": [V]},
        {"allowed_token_ids": []},
        {"min_tokens": -1},
        {"enable_thinking": "no"},
        {"prompt_logprobs": 1, "stream": True},
    ],
    ids=str,
)
def test_what_is_inside_a_field_is_not_ignored_either(body):
    """The error names the field."""
    with pytest.raises(APIError) as error:
        chat_job({"messages": HI, **body}, SERVED)
    assert error.value.body["error"]["param"].partition(".")[0] in body


@pytest.fixture(scope="module")
def noise():
    """Return (http, an engine of its own with the same weights) of a server with a random model."""
    model = tiny_model(0, vocab_size=V)
    with running(Engine(model, TOKENIZER, max_batch=8), limit=256) as (http, _, _):
        yield http, Engine(tiny_model(0, vocab_size=V), TOKENIZER)


def test_what_an_evaluation_harness_sends(noise):
    """Echo, no or one new token, log-probabilities, prompts of ids: those of the engine, the first of each null."""
    http, engine = noise
    prompts = [TOKENIZER.encode("Once upon"), TOKENIZER.encode("é☕ok")]
    for new in (0, 1):
        body = {"prompt": prompts, "max_tokens": new, "logprobs": 1, "echo": True, "seed": 1}
        found = http.post("/v1/completions", json=body | {"temperature": 0}).json()
        for prompt, choice in zip(prompts, found["choices"], strict=True):
            logprobs = choice["logprobs"]
            (done,) = engine.generate([Request(prompt, new, 0.0, prompt_logprobs=1)])
            assert logprobs["token_logprobs"][0] is None
            assert logprobs["top_logprobs"][0] is None
            expected = [score.logprob for score in done.prompt_logprobs] + done.logprobs
            assert logprobs["token_logprobs"][1:] == pytest.approx(expected, abs=1e-4)
            assert len(logprobs["tokens"]) == len(prompt) + new == len(logprobs["text_offset"])
            assert choice["text"].startswith(TOKENIZER.decode(prompt))
            columns = (logprobs[key] for key in ("tokens", "token_logprobs", "top_logprobs"))
            rows = list(zip(*columns, strict=True))
            for name, logprob, top in rows[1:]:
                assert max(top, key=top.get) == name or max(top.values()) >= logprob
        assert found["usage"]["completion_tokens"] == 2 * new
    # Streamed, it is the same.
    pieces = http.post("/v1/completions", json=body | {"stream": True, "temperature": 0}).text
    assert pieces.count('"text_offset"') >= 2 and "null" in pieces
    chat = http.post(
        "/v1/chat/completions", json={"messages": HI, "max_tokens": 1, "prompt_logprobs": 2}
    ).json()
    assert chat["prompt_logprobs"][0] is None
    assert len(chat["prompt_logprobs"]) == chat["usage"]["prompt_tokens"]
    assert all(entry for entry in chat["prompt_logprobs"][1:])


def test_names_and_offsets_of_tokens_that_are_no_text():
    """Bytes of a character have names of their own, and begin where the character does."""
    engine = Script(lambda prompt: "é☕ok<|endoftext|>")
    with running(engine) as (http, _, _):
        body = {"prompt": "x", "max_tokens": 20, "logprobs": 5}
        logprobs = http.post("/v1/completions", json=body).json()["choices"][0]["logprobs"]
    assert logprobs["tokens"][:7] == [
        *("bytes:\\xc3", "bytes:\\xa9"),
        *("bytes:\\xe2", "bytes:\\x98", "bytes:\\x95"),
        *("o", "k"),
    ]
    assert logprobs["text_offset"][:7] == [0, 0, 1, 1, 1, 2, 3]
    assert all(len(top) == 5 for top in logprobs["top_logprobs"])


def test_every_id_is_kept_and_numbers_are_json(noise):
    """At a low temperature nothing is infinite, no id is lost, and the best comes first."""
    body = {"prompt": "x", "max_tokens": 4, "temperature": 0.01, "top_p": 0.3, "logprobs": 20}
    answer = noise[0].post("/v1/completions", json=body)
    assert "Infinity" not in answer.text and "NaN" not in answer.text
    for top in answer.json()["choices"][0]["logprobs"]["top_logprobs"]:
        assert len(top) == 20
        assert list(top.values()) == sorted(top.values(), reverse=True)


def test_stop_ids_and_least_lengths(noise):
    """A stop id ends the answer, ignore_eos keeps it going, and no end comes before min_tokens."""
    http = noise[0]
    body = {"prompt": "x", "max_tokens": 12, "seed": 2, "return_token_ids": True}
    (choice,) = http.post("/v1/completions", json=body | {"ignore_eos": True}).json()["choices"]
    assert choice["finish_reason"] == "length"
    assert len(choice["token_ids"]) == 12
    third = choice["token_ids"][2]
    more = {"stop_token_ids": [third], "ignore_eos": True}
    (cut,) = http.post("/v1/completions", json=body | more).json()["choices"]
    first = choice["token_ids"].index(third)
    assert cut["finish_reason"] == "stop"
    assert cut["token_ids"] == choice["token_ids"][: first + 1]
    (late,) = http.post("/v1/completions", json=body | more | {"min_tokens": 6}).json()["choices"]
    assert len(late["token_ids"]) > 6
    assert third not in late["token_ids"][:6]


def test_a_model_that_is_broken_answers_with_an_error():
    """NaN in a weight is status 500 with the reason, and never a token."""
    model = tiny_model(0, vocab_size=V)
    next(model.parameters()).data[0, 0] = float("nan")
    with running(Engine(model, TOKENIZER), limit=256) as (http, _, _):
        answer = http.post("/v1/completions", json={"prompt": "x", "max_tokens": 3})
        assert answer.status_code == 500
        assert answer.json()["error"]["type"] == "server_error"
        assert http.get("/health").status_code == 200
