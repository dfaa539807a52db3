"""The server before a real engine and a tiny random model: what it sends is what the engine draws."""

import json
import socket
from concurrent.futures import ThreadPoolExecutor

import pytest
from helpers.serving import TOKENIZER, running

from minglm.__main__ import main
from minglm.inference import Engine, Request
from minglm.recipe.load import load_served
from minglm.serve.listener import serve
from minglm.testing.model import tiny_model

HI = [{"role": "user", "content": "hi"}]


@pytest.fixture(scope="module")
def served():
    """Yield (http, client, engine of its own with the same weights) of a server."""
    model = tiny_model(0, vocab_size=TOKENIZER.vocab_size)
    engine = Engine(model, TOKENIZER, max_batch=8)
    with running(engine, limit=engine.limit) as (http, client, _):
        yield http, client, Engine(tiny_model(0, vocab_size=TOKENIZER.vocab_size), TOKENIZER)


def test_the_tokens_are_the_engines(served):
    """Token ids in, token ids and log-probabilities out: those of the engine alone, with the same seed."""
    http, _, engine = served
    prompt = TOKENIZER.encode("Once upon")
    body = {
        "prompt": prompt,
        "max_tokens": 12,
        "seed": 7,
        "top_p": 0.9,
        "logprobs": 2,
        "return_token_ids": True,
    }
    (choice,) = http.post("/v1/completions", json=body).json()["choices"]
    (alone,) = engine.generate([Request(prompt, 12, 1.0, 0.9, seed=7, top_logprobs=2)])
    assert choice["token_ids"] == alone.tokens and choice["finish_reason"] == alone.finish_reason
    # float32 through JSON.
    assert choice["logprobs"]["token_logprobs"] == pytest.approx(alone.logprobs, abs=1e-5)
    assert choice["text"] == TOKENIZER.decode(
        [t for t in alone.tokens if t not in TOKENIZER.stop_ids]
    )


def test_concurrent_requests_are_each_as_if_alone(served):
    """Twenty clients at once, streaming and not, get what each seed gets on its own; n answers differ."""
    http, client, _ = served

    def ask(number):
        settings = {"model": "tiny", "messages": HI, "seed": number % 5, "max_tokens": 10}
        if number % 2:
            found = client.chat.completions.create(**settings)
            message = found.choices[0].message
            return number % 5, (message.model_extra.get("reasoning_content", ""), message.content)
        texts = {"reasoning_content": "", "content": ""}
        for chunk in client.chat.completions.create(**settings, stream=True):
            for kind in texts:
                texts[kind] += getattr(chunk.choices[0].delta, kind, None) or ""
        return number % 5, tuple(texts.values())

    with ThreadPoolExecutor(20) as pool:
        found = list(pool.map(ask, range(20)))
    assert len({seed for seed, _ in found}) == 5 == len(set(found))
    several = client.completions.create(model="tiny", prompt="x", n=4, seed=3, max_tokens=8)
    again = client.completions.create(model="tiny", prompt="x", n=4, seed=3, max_tokens=8)
    texts = [choice.text for choice in several.choices]
    assert len(set(texts)) > 1
    assert texts == [choice.text for choice in again.choices]
    assert several.usage.prompt_tokens == 1


def test_a_bounded_cache_bounds_the_answer():
    """What is asked for beyond the cache is cut to what fits, and answered."""
    engine = Engine(tiny_model(0, vocab_size=TOKENIZER.vocab_size), TOKENIZER, cache_tokens=32)
    with running(engine, limit=32) as (http, _, _):
        choice = http.post(
            "/v1/completions", json={"prompt": "0123456789", "max_tokens": 99, "seed": 5}
        ).json()
        assert choice["usage"]["completion_tokens"] <= 22
        assert choice["choices"][0]["finish_reason"] in (
            "stop",
            "length",
        )
        chat = http.post(
            "/v1/chat/completions", json={"messages": HI, "temperature": 1e-40, "logprobs": True}
        )
        assert chat.status_code == 200 and "NaN" not in chat.text


def test_a_random_model_never_breaks_the_server(served):
    """Hundreds of tokens of noise, tags among them, are messages or named format errors."""
    http, _, _ = served
    tools = [
        {
            "type": "function",
            "function": {"name": "f", "parameters": {"properties": {"x": {"type": "integer"}}}},
        }
    ]
    for seed in range(6):
        body = {"messages": HI, "seed": seed, "max_tokens": 60, "temperature": 2, "n": 2}
        answer = http.post(
            "/v1/chat/completions", json=body | ({"tools": tools} if seed % 2 else {})
        )
        # the tools block alone may be longer than this tiny model takes
        assert answer.status_code == 200 or "context_length" in answer.text
        for choice in answer.json().get("choices", []):
            assert choice["finish_reason"] in ("stop", "length", "tool_calls")
            for call in choice["message"].get("tool_calls", []):
                json.loads(call["function"]["arguments"])
    assert http.get("/health").json() == {"status": "ok", "open_answers": 0}


def test_a_released_checkpoint_is_served(tmp_path, capsys):
    """A Hugging Face folder: its weights, its tokenizer, and the dialect of its own chat template."""
    model = tiny_model(0, vocab_size=TOKENIZER.vocab_size)
    model.save_pretrained(tmp_path / "glm")
    TOKENIZER.save(tmp_path / "glm" / "tokenizer.json")
    assert load_served(tmp_path / "glm")[2:] == ("glm-4.5", "released", True, ())
    with pytest.raises(ValueError, match="device = 'tpu': must be auto, cpu or cuda"):
        load_served(tmp_path / "glm", device="tpu")
    (tmp_path / "glm" / "chat_template.jinja").write_text(
        "{%- if clear_thinking is defined -%}{%- endif -%}", encoding="utf-8"
    )
    found, tokenizer, dialect, stage, *_ = load_served(tmp_path / "glm")
    assert (dialect, stage) == ("glm-4.7", "released")
    request = Request(TOKENIZER.encode("Once"), 5, seed=1)
    same = [Engine(one, tokenizer).generate([request])[0].tokens for one in (model, found)]
    assert same[0] == same[1]
    words = ["serve", str(tmp_path / "glm"), "--dry-run", "--device", "cpu"]
    assert main(words) == 0
    said = capsys.readouterr().out
    assert main([*words, "--draft-tokens", "2"]) == 0
    assert capsys.readouterr().out == said
    assert main([*words, "--draft-tokens", "17"]) == 2
    assert "--draft-tokens" in capsys.readouterr().err
    assert main(words) == 0
    assert capsys.readouterr().out == "glm, template glm-4.7, up to 256 tokens\n"


@pytest.mark.parametrize(
    "words, said",
    [
        (["nowhere"], "is not the folder of a run"),
        (["nowhere", "--dialect", "glm-9"], "choose one of glm-4.5"),
        (["nowhere", "--max-batch", "0"], "--max-batch: '0': must be a whole number from 1"),
    ],
)
def test_mistakes_of_the_verb(words, said, capsys):
    """One clear line, before anything is loaded."""
    assert main(["serve", *words]) == 2
    error = capsys.readouterr().err
    assert said in error and error.count("\n") == 1


def test_a_port_in_use_is_one_clear_line():
    """Before the first request, and with the remedy."""
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(ValueError, match="choose another --port"):
            serve(None, port=port)
