"""Engines over HTTP: a fake of each protocol that checks every field, and our own server, weights and all."""

import asyncio
import contextlib
import json
import math
import threading
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import torch
from helpers.scripted import byte_tokenizer
from helpers.serving import Script, running

from minglm.inference import Completion, Engine, FinishReason, Request
from minglm.inference.client import EngineGenerator
from minglm.inference.remote import RemoteGenerator
from minglm.inference.request import AnswerFailed
from minglm.model.glm import GLM
from minglm.testing.model import tiny_model

TOKENIZER = byte_tokenizer()
PROMPT = [257, 65, 66, 259]
ASKED = Request(PROMPT, max_new_tokens=7, temperature=0.7, top_p=0.9, seed=11)
STOPS = list(TOKENIZER.stop_ids)

COMPLETIONS = {
    "model": "policy",
    "prompt": PROMPT,
    "max_tokens": 7,
    "temperature": 0.7,
    "top_p": 0.9,
    "top_k": -1,
    "min_p": 0.0,
    "seed": 11,
    "stop_token_ids": STOPS,
    "ignore_eos": True,
    "logprobs": 0,
    "return_token_ids": True,
    "add_special_tokens": False,
    "skip_special_tokens": False,
}
GENERATE = {
    "input_ids": PROMPT,
    "sampling_params": {
        "max_new_tokens": 7,
        "temperature": 0.7,
        "top_p": 0.9,
        "top_k": -1,
        "min_p": 0.0,
        "sampling_seed": 11,
        "stop_token_ids": STOPS,
        "ignore_eos": True,
        "skip_special_tokens": False,
        "no_stop_trim": True,
    },
    "return_logprob": True,
    "logprob_start_len": -1,
    "stream": False,
}


class Fake:
    """An engine that answers as vLLM or SGLang does, and takes down what it was asked.

    change(path, answer) may spoil an answer; versions counts weight updates, each of which it reads from the disk.
    """

    def __init__(self, kind, change=lambda path, answer: answer, limit=2048):
        self.kind, self.change, self.limit = kind, change, limit
        self.asked = []
        self.read = []
        self.version = "default"

    def answer(self, path, body):
        """Return what the engine says, None for an unknown path."""
        if path == "/v1/models":
            entry = {"id": "policy", "owned_by": self.kind, "max_model_len": self.limit}
            return {"object": "list", "data": [entry]}
        if path == "/v1/completions" and self.kind == "vllm":
            logprobs = {"token_logprobs": [-0.5, -1.5], "tokens": ["C", "<|user|>"]}
            return {
                "choices": [
                    {
                        "index": 0,
                        "text": "C",
                        "token_ids": [67, STOPS[1]],
                        "prompt_token_ids": PROMPT,
                        "logprobs": logprobs,
                        "finish_reason": "stop",
                    }
                ]
            }
        if path == "/generate" and self.kind == "sglang":
            about = {
                "id": "1",
                "finish_reason": {"type": "stop", "matched": STOPS[1]},
                "weight_version": self.version,
                "output_token_logprobs": [[-0.5, 67, None], [-1.5, STOPS[1], None]],
            }
            return {"text": "", "output_ids": [67, STOPS[1]], "meta_info": about}
        if path == "/update_weights_from_disk" and self.kind == "sglang":
            self.read.append(GLM.from_pretrained(body["model_path"]).state_dict())
            self.version = body["weight_version"]
            return {"success": True, "message": "Succeeded", "num_paused_requests": 0}
        if path == "/collective_rpc" and self.kind == "vllm":
            self.read.append(GLM.from_pretrained(body["kwargs"]["weights_path"]).state_dict())
            return {"results": [None]}
        if self.kind == "vllm" and path in ("/pause?mode=keep", "/reset_prefix_cache", "/resume"):
            return {"status": "done"}
        return None


@contextlib.contextmanager
def served(fake):
    """Yield the URL of a fake engine."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            body = self.rfile.read(int(self.headers.get("content-length") or 0))
            body = json.loads(body) if body else None
            fake.asked.append((self.command, self.path, body))
            answer = fake.answer(self.path, body)
            status, answer = (404, {}) if answer is None else (200, fake.change(self.path, answer))
            if isinstance(answer, int):
                status, answer = answer, {"error": "on purpose"}
            data = json.dumps(answer).encode()
            self.send_response(status)
            self.send_header("content-length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        do_POST = do_GET

        def log_message(self, format, *words):
            """Say nothing."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()


@pytest.fixture(scope="module")
def model():
    """Return a tiny model whose vocabulary is the tokenizer's."""
    return tiny_model(0, vocab_size=TOKENIZER.vocab_size)


@pytest.mark.parametrize(
    ("kind", "path", "body"),
    [("vllm", "/v1/completions", COMPLETIONS), ("sglang", "/generate", GENERATE)],
)
def test_every_field_of_both_protocols(tmp_path, model, kind, path, body):
    """What is asked is, field by field, what the engine reads; ids and log-probabilities come back with the stop token."""
    fake = Fake(kind)
    with served(fake) as url:
        generator = RemoteGenerator(url, model, TOKENIZER, tmp_path / "weights")
        answer = asyncio.run(generator.generate(ASKED))
        again = asyncio.run(generator.generate(ASKED))  # another event loop
        assert fake.asked[-1] == ("POST", path, body)
        assert answer == again == Completion([67, STOPS[1]], [-0.5, -1.5], FinishReason.STOP)
        with torch.no_grad():
            changed = {name: tensor + 1 for name, tensor in model.state_dict().items()}
        before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        generator.update_weights(changed, 3)
        assert asyncio.run(generator.generate(ASKED)).versions == [3, 3]
        generator.update_weights(before, 4)
    for found, sent in zip(fake.read, (before, changed, before), strict=True):
        assert all(torch.equal(found[name], sent[name]) for name in sent)
    paths = [
        path
        for _, path, _ in fake.asked
        if path not in ("/v1/models", "/v1/completions", "/generate")
    ]
    update = {
        "vllm": ["/pause?mode=keep", "/collective_rpc", "/reset_prefix_cache", "/resume"],
        "sglang": ["/update_weights_from_disk"],
    }
    assert paths == update[kind] * 3
    generator.close()
    assert not (tmp_path / "weights").exists()


def spoiled(path, **fields):
    """Return a change of one answer's first choice, or of its meta information, or of the answer itself."""

    def change(asked, answer):
        if asked != path:
            return answer
        if "status" in fields:
            return fields["status"]
        inner = answer["choices"][0] if "choices" in answer else answer.get("meta_info", answer)
        inner = answer["data"][0] if "data" in answer else inner
        inner.update(fields)
        return answer

    return change


WRONG = [
    ("vllm", spoiled("/v1/models", owned_by="somebody"), "must be one of vllm, sglang, minglm"),
    ("vllm", spoiled("/v1/models", max_model_len=None), "use a newer vllm"),
    ("vllm", spoiled("/collective_rpc", status=404), "too old, or was not started as"),
    ("vllm", spoiled("/collective_rpc", status=500), "status 500"),
    (
        "sglang",
        spoiled("/update_weights_from_disk", success=False, message="shape mismatch"),
        "shape mismatch",
    ),
    ("vllm", spoiled("/v1/completions", prompt_token_ids=[1]), "is its tokenizer the run's"),
    ("vllm", spoiled("/v1/completions", token_ids=None), "no token_ids; the engine is too old"),
    ("vllm", spoiled("/v1/completions", token_ids=[67]), "1 ids came with 2 log-probabilities"),
    ("vllm", spoiled("/v1/completions", token_ids=[67, 10**6]), "it serves another model"),
    ("vllm", spoiled("/v1/completions", token_ids=[67, -1]), "it serves another model"),
    ("vllm", spoiled("/v1/completions", token_ids=[67, "a"]), "it serves another model"),
    ("vllm", spoiled("/v1/completions", token_ids=[67, 2.0]), "it serves another model"),
    ("vllm", spoiled("/v1/completions", token_ids=[67, 68]), "leaves the stop token out"),
    ("sglang", spoiled("/generate", output_token_logprobs=[[-0.5, 67]]), "leaves the stop token"),
    ("vllm", spoiled("/v1/models", max_model_len=-1), "use a newer vllm"),
    ("vllm", spoiled("/v1/models", id=None), "does not say the name"),
    ("vllm", lambda path, answer: [], "answers with no object"),
    ("vllm", lambda path, answer: {"data": [None]}, "must be one of vllm, sglang, minglm"),
    (
        "vllm",
        lambda path, answer: {"choices": [[]]} if path == "/v1/completions" else answer,
        "no token_ids",
    ),
    ("sglang", spoiled("/generate", output_token_logprobs=[[-0.5]]), "must hold"),
    ("sglang", spoiled("/generate", output_token_logprobs=[5]), "must hold"),
    ("vllm", spoiled("/v1/completions", status=400), "status 400"),
    ("sglang", spoiled("/generate", weight_version="7"), "does another run update it"),
    ("sglang", spoiled("/generate", output_token_logprobs=None), "no output_token_logprobs"),
]


@pytest.mark.parametrize(("kind", "change", "message"), WRONG)
def test_an_engine_that_does_not_fit_is_refused_in_one_line(tmp_path, model, kind, change, message):
    """Another owner, an old version, other ids, other weights: one line that names the engine."""
    with served(Fake(kind, change)) as url, pytest.raises(ValueError, match=message) as raised:
        generator = RemoteGenerator(url, model, TOKENIZER, tmp_path)
        asyncio.run(generator.generate(ASKED))
    assert "\n" not in str(raised.value) and "rollout_engine" in str(raised.value)


def failing(*paths):
    """Return a change of the answers of some paths to an error."""
    return lambda path, answer: 500 if path in paths else answer


@pytest.mark.parametrize("path", ["/collective_rpc", "/reset_prefix_cache"])
@pytest.mark.parametrize("others", [(), ("/resume",)])
def test_a_failed_update_leaves_no_engine_paused(tmp_path, model, path, others):
    """vLLM is resumed after a failure at any point; the error is the first one, whether or not it could be resumed."""
    fake = Fake("vllm", failing(path, *others))
    with served(fake) as url, pytest.raises(ValueError, match=f"{path} has status 500"):
        RemoteGenerator(url, model, TOKENIZER, tmp_path)
    asked = [path for _, path, _ in fake.asked]
    assert asked[1] == "/pause?mode=keep" and asked[-2:] == [path, "/resume"]


@pytest.mark.parametrize(
    "change",
    [
        spoiled("/generate", status=503),
        spoiled("/generate", finish_reason={"type": "abort"}),
        spoiled("/generate", output_token_logprobs=[[math.nan, 67, None]]),
        spoiled("/generate", output_token_logprobs=[[-math.inf, 67, None]]),
    ],
)
def test_an_answer_that_fails_is_a_sample_s_own(tmp_path, model, change):
    """An abort and a server error end one answer, which leaves the statistics."""
    with served(Fake("sglang", change)) as url:
        generator = RemoteGenerator(url, model, TOKENIZER, tmp_path)
        with pytest.raises(AnswerFailed):
            asyncio.run(generator.generate(ASKED))


def test_what_cannot_be_asked_for_is_refused(tmp_path, model):
    """By its name, before anything is sent; so is a place where nobody listens."""
    with served(Fake("vllm")) as url:
        generator = RemoteGenerator(url, model, TOKENIZER, tmp_path)
        for field in ({"thinking_budget": 3}, {"prompt_logprobs": 0}, {"top_logprobs": 1}):
            with pytest.raises(ValueError, match=next(iter(field))):
                asyncio.run(generator.generate(replace(ASKED, **field)))
    with pytest.raises(ValueError, match=r"^rollout_engine = http://127\.0\.0\.1:1: "):
        RemoteGenerator("http://127.0.0.1:1", model, TOKENIZER, tmp_path)


def test_our_own_server_answers_as_the_engine_of_the_run(tmp_path, model):
    """The same ids and, to the bit, the same log-probabilities, before and after new weights."""
    engine = Engine(tiny_model(5, vocab_size=TOKENIZER.vocab_size), TOKENIZER)

    def load(path):
        engine.update_weights(GLM.from_pretrained(Path(path)).state_dict())

    local = EngineGenerator(Engine(model, TOKENIZER))
    with running(engine, limit=64, load_weights=load) as (http, _, _):
        generator = RemoteGenerator(str(http.base_url), model, TOKENIZER, tmp_path)
        assert asyncio.run(generator.generate(ASKED)) == asyncio.run(local.generate(ASKED))
        other = {name: tensor * 0.5 for name, tensor in model.state_dict().items()}
        generator.update_weights(other)
        local.update_weights(other)
        assert asyncio.run(generator.generate(ASKED)) == asyncio.run(local.generate(ASKED))
        refused = http.post("/update_weights_from_disk", json={"model_path": str(tmp_path / "no")})
        assert refused.json()["success"] is False
    with running(engine, limit=64) as (http, _, _):
        kept = http.post("/update_weights_from_disk", json={"model_path": str(tmp_path)})
        assert kept.status_code == 403 and "--weights-from" in kept.text


@pytest.mark.parametrize("path", ["disk", "tensor"])
@pytest.mark.parametrize("body", [[], 5, "x", {}, {"model_path": 5, "load_format": 5}])
def test_weights_in_a_body_of_another_form_are_refused(path, body):
    """Status 400 with the field, or with what the body must be."""
    engine = Script(lambda prompt: "x")
    with running(engine, load_weights=lambda path: None, take_weights=lambda t: None) as (http, *_):
        refused = http.post(f"/update_weights_from_{path}", json=body)
    assert refused.status_code == 400 and refused.json()["error"]["message"]
