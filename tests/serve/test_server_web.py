"""The server as strangers on a network meet it: other pages, large bodies, half requests, floods, signals."""

import asyncio
import contextlib
import errno
import gc
import ipaddress
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
import weakref
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from unittest.mock import Mock

import anthropic
import httpx
import openai
import pytest
import uvicorn
from helpers.browser import Page, browser, needs_browser
from helpers.scripted import byte_tokenizer, spelled, word_tokenizer
from helpers.serving import TOKENIZER, Script, running, settled
from helpers.shop import CALL, SHOP, script
from hypothesis import example, given
from hypothesis import strategies as st

from minglm.__main__ import main
from minglm.inference.request import Event
from minglm.serve import app as app_module
from minglm.serve import bodies, listener
from minglm.serve.access import Access
from minglm.serve.blocks import BlockKind, BlockReader, Happening, blocks_of
from minglm.serve.errors import APIError
from minglm.serve.openai_responses import ResponsesFormat
from minglm.serve.requests import Job, ServedModel, chat_job, text_job
from minglm.serve.responses import CompletionBuilder
from minglm.serve.stream import Answer

HELPERS = Path(__file__).parent.parent / "helpers"
HI = [{"role": "user", "content": "hi"}]
ENDLESS = [{"role": "user", "content": "endless"}]
CHAT = "/v1/chat/completions"
PAGE = "https://chat.example.com"
KEY = "sk-0123456789"


@pytest.fixture(scope="module")
def shop():
    """A server for this machine, and the engine that it asks."""
    engine = Script(script)
    with running(engine) as (http, _, _):
        yield http, engine


@pytest.fixture(scope="module")
def opened():
    """A server with a key, for one other page and one more name."""
    access = Access(allowed_hosts=["Model.example"], allowed_origins=[PAGE], key=KEY)
    engine = Script(script)
    with running(engine, access=access) as (http, client, _):
        yield http, client, engine


# Who may ask


LOOPBACK = ["127.0.0.1", "127.0.0.1:8000", "localhost", "LocalHost:80", "localhost.", "[::1]:8000"]
STRANGE = [
    *("evil.example", "evil.example:8000", "127.0.0.1.evil.example", "localhost.evil.example"),
    *("evil.example:80@127.0.0.1", "127.0.0.1:80:80", "127.0.0.1/", "[::1", "::1", ""),
    *("93.184.216.34", "0x7f.1", "localhost:port"),
]


@pytest.mark.parametrize("host", [*LOOPBACK, *STRANGE])
def test_hosts(shop, host):
    """The names of this machine are answered; any other is refused with 403 and the remedy, whatever is asked for."""
    http, engine = shop
    asked = len(engine.prompts)
    headers = {"host": host}
    answers = [http.get(path, headers=headers) for path in ("/", "/health", "/v1/models", "/no")]
    answers.append(http.post(CHAT, json={"messages": HI}, headers=headers))
    statuses = [answer.status_code for answer in answers]
    if host in LOOPBACK:
        assert statuses == [200, 200, 200, 404, 200]
        return
    assert set(statuses) <= {403, 400}, "400: not even HTTP"
    assert len(engine.prompts) == asked
    if 400 not in statuses:
        error = answers[-1].json()["error"]
        assert error["type"] == "permission_error" and "--allowed-host" in error["message"]


@given(
    listens=st.sampled_from(["127.0.0.1", "::1", "localhost", "0.0.0.0", "::", "10.0.0.7", "box"]),
    name=st.sampled_from(["localhost", "box", "evil.example", "good.example", "10.0.0.7.nip.io"])
    | st.ip_addresses().map(str),
    port=st.none() | st.integers(1, 65535),
)
def test_a_name_counts_only_if_it_was_given(listens, name, port):
    """A name is known if it is localhost, the bound one or allowed; an address of another machine never on loopback."""
    access = Access(listens, allowed_hosts=["good.example"])
    header = f"[{name}]" if ":" in name else name
    header += "" if port is None else f":{port}"
    try:
        address = ipaddress.ip_address(name)
    except ValueError:
        assert access.knows_host(header) == (name in {"localhost", "good.example", listens})
    else:
        loopback_only = listens in ("127.0.0.1", "::1", "localhost")
        assert access.knows_host(header) == (address.is_loopback or not loopback_only)
        assert access.beyond_this_machine != loopback_only


ORIGINS = ["https://evil.example", "null", "http://127.0.0.1.evil.example", "http://localhost"]


@pytest.mark.parametrize("origin", [*ORIGINS, "file://", "http://127.0.0.1:1", "x"])
@pytest.mark.parametrize("kind", ["application/json", "text/plain"])
def test_pages_of_other_origins(shop, origin, kind):
    """They are refused whatever they send, before the engine hears of it, and without a header that lets them read."""
    http, engine = shop
    asked = len(engine.prompts)
    headers = {"origin": origin, "content-type": kind}
    answers = [
        http.post(CHAT, content=json.dumps({"messages": HI}), headers=headers),
        http.get("/v1/models", headers=headers),
        http.options(CHAT, headers=headers | {"access-control-request-method": "POST"}),
    ]
    for answer in answers:
        assert answer.status_code == 403 and "--allow-origin" in answer.text
        assert not any(name.startswith("access-control") for name in answer.headers)
    assert len(engine.prompts) == asked


def test_the_own_page_may_ask(shop):
    """A page that the server itself has sent has its origin, under each of its names."""
    http, _ = shop
    port = http.base_url.port
    for name in ("127.0.0.1", "localhost"):
        headers = {"host": f"{name}:{port}", "origin": f"http://{name}:{port}"}
        assert http.post(CHAT, json={"messages": HI}, headers=headers).status_code == 200


@pytest.mark.parametrize(
    "kind",
    [
        "text/plain",
        "application/x-www-form-urlencoded",
        "multipart/form-data",
        "",
        "application",
        None,
    ],
)
@pytest.mark.parametrize("path", [CHAT, "/v1/completions", "/v1/responses", "/v1/messages"])
def test_a_body_has_to_be_announced_as_json(shop, path, kind):
    """A browser sends other types, and none, to any server without asking first: 415, which names the type to send."""
    http, engine = shop
    asked = len(engine.prompts)
    body = json.dumps({"messages": HI, "prompt": "x", "input": "x", "max_tokens": 1})
    headers = {} if kind is None else {"content-type": kind}
    answer = http.post(path, content=body.encode(), headers=headers)
    assert answer.status_code == 415 and "application/json" in answer.json()["error"]["message"]
    assert len(engine.prompts) == asked


def test_json_may_have_parameters(shop):
    """A character set does not make it another type."""
    http, _ = shop
    headers = {"content-type": "Application/JSON; charset=utf-8"}
    answer = http.post(CHAT, content=json.dumps({"messages": HI}), headers=headers)
    assert answer.status_code == 200


@pytest.mark.parametrize("method", ["OPTIONS", "PUT", "DELETE", "PATCH"])
@pytest.mark.parametrize("path, allowed", [(CHAT, {"POST"}), ("/health", {"GET", "HEAD"})])
def test_other_methods(shop, method, path, allowed):
    """They are 405 with the methods that are answered, in the error format."""
    answer = shop[0].request(method, path)
    assert answer.status_code == 405 and answer.json()["error"]["type"] == "invalid_request_error"
    assert set(answer.headers["allow"].split(", ")) == allowed


def test_every_answer_says_what_browsers_must_not_do(shop):
    """No guessing of types, no frame, no reading by other pages, and no script on the page that came in an answer."""
    http, _ = shop
    answers = [
        http.get("/"),
        http.get("/nothing"),
        http.get("/health", headers={"host": "evil.example"}),
        http.post(CHAT, json={"messages": HI}),
        http.post(CHAT, json={"messages": HI, "stream": True}),
    ]
    for answer in answers:
        assert answer.headers["x-content-type-options"] == "nosniff"
        assert answer.headers["x-frame-options"] == "DENY"
        assert answer.headers["cross-origin-resource-policy"] == "same-origin"
        policy = answer.headers["content-security-policy"]
        assert "default-src 'none'" in policy and "frame-ancestors 'none'" in policy
        assert "unsafe" not in policy and "*" not in policy
        assert "server" not in answer.headers


def test_an_allowed_page(opened):
    """It is told that it may ask, with which headers, and may read answers and errors; the name in front of it is known."""
    http, _, _ = opened
    asks = {"access-control-request-method": "POST"}
    asks["access-control-request-headers"] = "authorization,content-type"
    answer = http.options(CHAT, headers={"origin": PAGE, **asks})
    assert answer.status_code == 200
    assert answer.headers["access-control-allow-origin"] == PAGE
    assert "POST" in answer.headers["access-control-allow-methods"]
    assert "authorization" in answer.headers["access-control-allow-headers"]
    key = {"authorization": f"Bearer {KEY}", "origin": PAGE, "host": "model.example"}
    for headers, status in ((key, 200), ({"origin": PAGE}, 401)):
        answer = http.post(CHAT, json={"messages": HI}, headers=headers)
        assert answer.status_code == status
        assert answer.headers["access-control-allow-origin"] == PAGE
    assert http.options(CHAT, headers={"origin": ORIGINS[0], **asks}).status_code == 403


def test_a_key_is_asked_for(opened):
    """401 in the words of each API without it or with another; health and the page stay open."""
    http, client, engine = opened
    asked = len(engine.prompts)
    assert http.get("/health").status_code == http.get("/").status_code == 200
    wrong = [
        *({}, {"authorization": KEY}, {"authorization": f"Basic {KEY}"}, {"x-api-key": ""}),
        *({"authorization": f"Bearer {KEY[:-1]}"}, {"x-api-key": KEY + "x"}, {"x-api-key": "é"}),
    ]
    for headers in wrong:
        for method, path in (("POST", CHAT), ("GET", "/v1/models"), ("GET", "/metrics")):
            body = {"messages": HI} if method == "POST" else None
            raw = {name: value.encode("latin-1") for name, value in headers.items()}
            answer = http.request(method, path, json=body, headers=raw)
            assert answer.status_code == 401, headers
            error = answer.json()["error"]
            assert (error["type"], error["code"]) == ("invalid_request_error", "invalid_api_key")
            assert answer.headers["www-authenticate"] == "Bearer"
    assert len(engine.prompts) == asked
    with pytest.raises(openai.AuthenticationError):
        client.with_options(api_key="sk-wrong").models.list()
    assert client.chat.completions.create(model="tiny", messages=HI).choices
    base = str(http.base_url).rstrip("/")
    for api_key, error in ((KEY, None), ("sk-wrong", anthropic.AuthenticationError)):
        with anthropic.Anthropic(base_url=base, api_key=api_key, max_retries=0) as messages:
            context = pytest.raises(error) if error else contextlib.nullcontext()
            with context as raised:
                messages.messages.create(model="tiny", max_tokens=9, messages=HI)
            if raised is not None:
                assert raised.value.body["error"]["type"] == "authentication_error"


@pytest.mark.parametrize(
    "words, environment, said",
    [
        (
            ["--allow-origin", "chat.example.com"],
            None,
            "--allow-origin 'chat.example.com': must be",
        ),
        (["--allow-origin", PAGE + "/page"], None, "--allow-origin"),
        (["--allow-origin", "*"], None, "--allow-origin '*'"),
        (["--allowed-host", "http://x"], None, "--allowed-host 'http://x': must be"),
        (["--api-key", ""], None, "the API key must be"),
        (["--api-key", "two words"], None, "the API key must be"),
        ([], "", "the API key must be"),
    ],
)
def test_mistakes_of_the_options(words, environment, said, capsys, monkeypatch):
    """One line, before a model is loaded; an empty variable is a mistake too, not an open door."""
    if environment is not None:
        monkeypatch.setenv("MINGLM_API_KEY", environment)
    assert main(["serve", "nowhere", *words]) == 2
    error = capsys.readouterr().err
    assert said in error and error.count("\n") == 1


# What they may send


@given(
    text=st.text(max_size=60) | st.text("the cat ", max_size=60),
    tokenizer=st.sampled_from([byte_tokenizer(), word_tokenizer()]),
    spare=st.integers(-2, 2),
    chat=st.booleans(),
)
@example("\ud800" * 9, byte_tokenizer(), 1, True)
def test_the_bound_on_bytes_refuses_nothing_that_fits(text, tokenizer, spare, chat):
    """A prompt is refused exactly if its tokens do not fit, whether the bytes or the tokens say so."""
    wide = ServedModel(tokenizer, "tiny", 10**6)
    body = {"messages": [{"role": "user", "content": text}]} if chat else {"prompt": "x" + text}
    make = chat_job if chat else text_job
    tokens = len(make(body, wide).requests[0].prompt)
    limit = max(2, tokens + spare)
    try:
        make(body, ServedModel(tokenizer, "tiny", limit))
    except APIError as error:
        assert tokens >= limit and error.body["error"]["code"] == "context_length_exceeded"
    else:
        assert tokens < limit


class Counting:
    """A tokenizer that counts the characters it has to encode."""

    def __init__(self, tokenizer):
        self.tokenizer = tokenizer
        self.characters = 0

    def __getattr__(self, name):
        return getattr(self.tokenizer, name)

    def encode(self, text):
        """Count, and encode."""
        self.characters += len(text)
        return self.tokenizer.encode(text)


@pytest.mark.parametrize(
    "body",
    [
        {"messages": [{"role": "user", "content": "a" * 3_000_000}]},
        {"messages": [{"role": "user", "content": "a "}] * 60_000},
        {"messages": HI, "tools": [SHOP[0] | {"description": "a" * 3_000_000}]},
        {"prompt": "a" * 3_000_000},
        {"prompt": ["a"] * 100_000},
        {"prompt": [0] * 1_000_000},
    ],
    ids=["one message", "many messages", "tools", "text", "texts", "ids"],
)
def test_megabytes_are_refused_unread(body):
    """What cannot fit is refused for its bytes or its number: the tokenizer sees no more than would fit."""
    tokenizer = Counting(word_tokenizer())
    served = ServedModel(tokenizer, "tiny", 4096)
    with pytest.raises(APIError) as refused:
        (chat_job if "messages" in body else text_job)(body, served)
    assert refused.value.status == 400
    assert tokenizer.characters <= 4096 * word_tokenizer().longest_token


def test_other_threads_run_while_a_long_text_is_encoded():
    """A thread that only counts gets on beside the tokenizer, which holds the interpreter's lock for no long text."""
    text = "order is cancelled " * 50_000
    beats = 0
    done = threading.Event()

    def beat():
        nonlocal beats
        while not done.wait(0.001):
            beats += 1

    thread = threading.Thread(target=beat)
    thread.start()
    before = beats
    ids = word_tokenizer().encode(text)
    during = beats - before
    done.set()
    thread.join()
    assert word_tokenizer().decode(ids) == text
    # With the lock held the thread would run between the pieces of 250,000 characters only: four times.
    assert during > 20


class Gated(Counting):
    """A tokenizer that stops in a long text until its gate is open."""

    def __init__(self, tokenizer):
        super().__init__(tokenizer)
        self.gate = threading.Event()
        self.has_begun = threading.Event()

    def encode(self, text):
        """Wait if the text is long, count, and encode."""
        if len(text) > 1000:
            self.has_begun.set()
            assert self.gate.wait(120)
        return super().encode(text)


def test_a_small_request_beside_large_ones(monkeypatch):
    """It is answered while a large one is being read; those that are refused for their bytes are not read at all."""
    for module in (app_module, bodies):
        monkeypatch.setattr(module, "LARGE_BODY", 1000)
    tokenizer = Gated(word_tokenizer())
    engine = Script(lambda prompt: " so.<|endoftext|>")
    large = {"prompt": "a" * 5000, "max_tokens": 1}
    too_large = {"prompt": "a" * 10_000 * tokenizer.longest_token, "max_tokens": 1}
    with (
        running(engine, tokenizer, limit=10_000) as (http, _, _),
        ThreadPoolExecutor(6) as pool,
    ):
        bodies_sent = [large, too_large, large, too_large, large, too_large]
        answers = [pool.submit(http.post, "/v1/completions", json=body) for body in bodies_sent]
        try:
            assert tokenizer.has_begun.wait(60)
            for _ in range(5):
                assert http.get("/health").status_code == 200
                small = http.post("/v1/completions", json={"prompt": "x", "max_tokens": 1})
                assert small.status_code == 200
            assert not all(answer.done() for answer in answers)
        finally:
            tokenizer.gate.set()
        assert [answer.result().status_code for answer in answers] == [200, 400] * 3
    assert tokenizer.characters == 3 * 5000 + 5


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text('a"\\[{猫\U0001f408', max_size=6),
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.dictionaries(st.text('"\\[{', max_size=3), inner, max_size=4)
    ),
    max_leaves=12,
)
"""JSON values with the marks of strings, lists and objects inside strings too."""


def parts(value):
    """Count the strings, lists and objects of a value."""
    if isinstance(value, dict):
        return 1 + len(value) + sum(parts(one) for one in value.values())
    if isinstance(value, list):
        return 1 + sum(parts(one) for one in value)
    return int(isinstance(value, str))


@given(
    value=VALUES,
    plain=st.booleans(),
    encoding=st.sampled_from(["utf-8", "utf-8-sig", "utf-16", "utf-32-le"]),
    spare=st.integers(-1, 1),
)
def test_a_body_is_refused_for_its_parts_before_it_is_parsed(value, plain, encoding, spare):
    """Exactly if it has more strings, lists and objects than allowed, in any encoding; else it is what was sent."""
    body = json.dumps(value, ensure_ascii=plain).encode(encoding)
    loads = Mock(wraps=json.loads)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(bodies, "MAX_PARTS", parts(value) + spare)
        patch.setattr(bodies.json, "loads", loads)
        if spare >= 0:
            assert bodies.parse_body(body) == value
            return
        with pytest.raises(APIError) as refused:
            bodies.parse_body(body)
    assert refused.value.status == 413
    assert not loads.called


class Watched(dict):
    """A parsed body that can be watched by a weak reference."""


@pytest.mark.parametrize(
    ("body", "status"),
    [
        ({"prompt": [{}]}, 400),
        ({"prompt": "a" * 5000}, 400),
        ({"messages": [{"role": "stranger", "content": "a"}]}, 400),
        ({"prompt": "hi", "max_tokens": 1}, 200),
        ({"messages": HI, "response_format": {"type": "json_schema", "json_schema": 1}}, 400),
    ],
    ids=["type", "length", "role", "answered", "format"],
)
def test_a_body_is_freed_when_it_is_answered(body, status, shop, monkeypatch):
    """Nothing keeps it until the next collection: that would free the bodies of a minute while all others wait."""
    http, _ = shop
    seen = []

    def watched(sent):
        parsed = Watched(bodies.parse_body(sent))
        seen.append(weakref.ref(parsed))
        return parsed

    monkeypatch.setattr(app_module, "parse_body", watched)
    collects = gc.isenabled()
    gc.disable()
    try:
        path = CHAT if "messages" in body else "/v1/completions"
        assert http.post(path, json=body).status_code == status
        assert len(seen) == 1
        assert settled(lambda: seen[0]() is None)
    finally:
        if collects:
            gc.enable()


def test_large_bodies_wait_outside_memory(monkeypatch):
    """Only some are read at a time; the others are answered after them."""
    for module in (app_module, bodies):
        monkeypatch.setattr(module, "LARGE_BODY", 1000)
    inside = 0
    most = 0
    taken = app_module.Service.accept

    def slow(self, body, path):
        nonlocal inside, most
        inside += 1
        most = max(most, inside)
        time.sleep(0.05)
        inside -= 1
        return taken(self, body, path)

    monkeypatch.setattr(app_module.Service, "accept", slow)
    engine = Script(script)
    with running(engine, limit=20_000) as (http, _, service), ThreadPoolExecutor(12) as pool:
        body = {"messages": [{"role": "user", "content": "a" * 5000}]}
        statuses = list(pool.map(lambda _: http.post(CHAT, json=body).status_code, range(12)))
        assert statuses == [200] * 12
        assert most == 1
        assert service.large_places._value == app_module.LARGE_PLACES


# How connections end


def raw(http, data=b""):
    """A connection of its own, on which some bytes have been sent."""
    connection = socket.create_connection((http.base_url.host, http.base_url.port))
    connection.settimeout(50)  # shorter than KEEP_ALIVE_SECONDS
    connection.sendall(data)
    return connection


HEAD = b"POST /v1/completions HTTP/1.1\r\nhost: 127.0.0.1\r\ncontent-type: application/json\r\n"
HEALTH = b"GET /health HTTP/1.1\r\nhost: 127.0.0.1\r\n\r\n"


@pytest.mark.parametrize(
    "sent",
    [b"", b"G", HEAD, HEALTH + HEAD, HEALTH + HEALTH + b"\r\n"],
    ids=["nothing", "a letter", "half a head", "half a second head", "a line"],
)
def test_half_a_head_is_hung_up_on(sent, monkeypatch):
    """A client that does not finish the head of its request is cut off, and one that was refused with its body due."""
    # Longer than a busy machine takes to send the bytes below, and much shorter than what uvicorn allows.
    monkeypatch.setattr(listener, "HEAD_SECONDS", 2.0)
    with running(Script(script)) as (http, _, _):
        connection = raw(http)
        for byte in sent:  # as slowly as it likes
            connection.sendall(bytes([byte]))
        received = b""
        while data := connection.recv(65536):
            received += data
        assert received.count(b"200 OK") == sent.count(HEALTH)


def test_who_waits_for_an_answer_is_not_hung_up_on(monkeypatch):
    """The limit is on heads: a slow body, a long answer and a quiet connection between two requests outlast it."""
    monkeypatch.setattr(listener, "HEAD_SECONDS", 0.5)
    body = b'{"prompt": "x", "max_tokens": 50}'
    with running(Script(lambda _: "on and on " * 9, pause=0.02)) as (http, _, _):
        connection = raw(http, HEAD + b"content-length: %d\r\n\r\n" % len(body))
        time.sleep(1.0)
        connection.sendall(body)
        received = b""
        while b'"total_tokens": 51}}' not in received:  # head and body may come in two pieces
            received += connection.recv(65536)
        time.sleep(1.0)
        connection.sendall(HEALTH)
        assert b"200 OK" in connection.recv(65536)


@contextlib.contextmanager
def process(*words):
    """A server in a process of its own: (its process, an HTTP client)."""
    command = [sys.executable, str(HELPERS / "served_script.py"), *map(str, words)]
    environment = os.environ | {"PYTHONPATH": f"{HELPERS.parent.parent}:{HELPERS.parent}"}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    server = subprocess.Popen(command, env=environment, **pipes)
    try:
        url = server.stdout.readline().strip()
        with httpx.Client(base_url=url, timeout=120) as http:
            yield server, http
    finally:
        server.kill()
        server.communicate()


STREAMS = {
    CHAT: {"messages": ENDLESS},
    "/v1/completions": {"prompt": "<|assistant|>endless", "max_tokens": 5000},
    "/v1/responses": {"input": "endless"},
    "/v1/messages": {"messages": ENDLESS, "max_tokens": 5000},
}


def test_a_signal_ends_every_answer_with_an_error():
    """Streams get an error event in the form of their API, other requests 503, half-sent ones too; then status 0."""
    with process(0.002) as (server, http), ThreadPoolExecutor(8) as pool:
        begun = threading.Barrier(len(STREAMS) + 1)

        def streamed(path):
            text = ""
            with http.stream("POST", path, json=STREAMS[path] | {"stream": True}) as answer:
                pieces = answer.iter_text()
                text += next(pieces)
                begun.wait(120)
                return text + "".join(pieces)

        streams = {path: pool.submit(streamed, path) for path in STREAMS}
        whole = pool.submit(http.post, CHAT, json={"messages": ENDLESS})
        half = raw(http, HEAD + b"content-length: 9\r\n\r\n{")
        begun.wait(120)
        assert settled(lambda: http.get("/health").json()["open_answers"] == 5)
        server.send_signal(signal.SIGTERM)
        ends = {path: stream.result(60) for path, stream in streams.items()}
        assert whole.result(60).status_code == 503
        assert b" 503 " in half.recv(65536)
        assert server.wait(60) == 0
        assert server.stderr.read() == "minglm serve: stopping\n"
    for path in (CHAT, "/v1/completions"):
        *_, error, done = ends[path].strip().split("\n\n")
        assert (
            json.loads(error.removeprefix("data: "))["error"]["message"] == "the server is stopping"
        )
        assert done == "data: [DONE]"
    name, data = ends["/v1/responses"].strip().split("\n\n")[-1].split("\n")
    assert name == "event: response.failed" and "the server is stopping" in data
    name, data = ends["/v1/messages"].strip().split("\n\n")[-1].split("\n")
    assert name == "event: error" and json.loads(data.removeprefix("data: "))["type"] == "error"


@pytest.mark.slow
def test_a_second_signal_ends_at_once():
    """A forward pass that takes half a minute holds the end up; the second signal does not wait for it."""
    with process(30) as (server, http), ThreadPoolExecutor(1) as pool:
        answer = pool.submit(http.post, CHAT, json={"messages": HI})
        assert settled(lambda: http.get("/health").json()["open_answers"] == 1)
        server.send_signal(signal.SIGTERM)
        assert answer.result(60).status_code == 503
        assert server.poll() is None
        server.send_signal(signal.SIGINT)
        assert server.wait(60) == 128 + signal.SIGINT  # the first signal ends with 0


def test_the_first_signal_asks_and_the_second_ends(monkeypatch):
    """The handler asks the server to end, and ends the process when it comes again, of whatever kind."""
    ended = []
    monkeypatch.setattr(os, "_exit", ended.append)
    server = listener.answer_server(uvicorn.Config("none"), socket.socket(), lambda: None)
    server.handle_exit(signal.SIGTERM, None)
    assert server.should_exit and ended == []
    server.handle_exit(signal.SIGHUP, None)
    assert ended == [128 + signal.SIGHUP]


def test_accepting_pauses(monkeypatch, capsys):
    """Where the process has no descriptor left, it tries a few times a second, says so once, and then goes on."""
    monkeypatch.setattr(listener, "PAUSE_SECONDS", 0.0125)
    tries = 0
    pauses = []
    sleep = asyncio.sleep

    async def counted(seconds, *result):
        pauses.append(seconds)
        return await sleep(seconds, *result)

    accept = socket.socket.accept

    def without_descriptors(self):
        nonlocal tries
        tries += 1
        if tries <= 10:
            raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))
        return accept(self)

    with running(Script(script)) as (http, _, _):
        monkeypatch.setattr(socket.socket, "accept", without_descriptors)
        monkeypatch.setattr(asyncio, "sleep", counted)
        assert b"200 OK" in raw(http, HEALTH).recv(65536)
        assert pauses.count(listener.PAUSE_SECONDS) == 10
    assert capsys.readouterr().err.count("new clients wait") == 1


@pytest.mark.slow
def test_no_descriptors_left():
    """New clients wait while others hold all descriptors, one line says so, and health answers when they have gone."""
    with process(0.002, 64) as (server, http):
        assert http.get("/health").status_code == 200
        crowd = [raw(http) for _ in range(150)]
        time.sleep(2)
        http.close()
        for connection in crowd:
            connection.close()
        with httpx.Client(base_url=http.base_url, timeout=60) as again:
            assert again.get("/health").json()["status"] == "ok"
        server.send_signal(signal.SIGTERM)
        assert server.wait(60) == 0
        lines = server.stderr.read().splitlines()
    assert len(lines) == 2 and "new clients wait" in lines[0], lines[:5]


# What was sent and no longer counts


PIECES = [
    *("<think>", "</think>", "<tool_call>", "</tool_call>", "<arg_key>", "</arg_key>"),
    *("<arg_value>", "</arg_value>", "get_order", "order_id", "123", "\n", "words ", CALL),
    "<tool_call>get_order\n<arg_key>order_id</arg_key>\n<arg_value>",
]
BROKEN = f"<think>a{CALL}b<|user|>"
TWO = f"<think></think>{CALL}<tool_call>get_order<arg_key>note</arg_key><arg_value>x"


def deltas_of(text, opened=False):
    """(deltas, the whole message) of an answer, read token by token as a stream is."""
    tools = [tool["function"] for tool in NOTED]
    job = Job(
        True, [], tools=[{"type": "function", "function": tool} for tool in tools], opened=opened
    )
    answer = Answer(job, TOKENIZER)
    ids = spelled(TOKENIZER, text)
    deltas = []
    for place, token in enumerate(ids):
        last = place + 1 == len(ids)
        stopped = token in TOKENIZER.stop_ids
        reason = ("stop" if stopped else "length") if last or stopped else None
        deltas += answer.take(Event(0, token, finish_reason=reason))
        if reason:
            break
    whole = CompletionBuilder()
    for delta in deltas:
        whole.add(delta)
    return deltas, whole.message()


NOTED = [
    {
        "type": "function",
        "function": {
            "name": "get_order",
            "parameters": {
                "type": "object",
                "properties": {"order_id": {"type": "integer"}, "note": {"type": "string"}},
            },
        },
    }
]


@given(
    text=st.lists(st.sampled_from(PIECES), min_size=1, max_size=14).map("".join),
    end=st.sampled_from(["", "<|user|>", "<|observation|>"]),
    opened=st.booleans(),
)
@example(BROKEN, "", False)
@example(TWO, "", False)
@example("<think>it is 42.", "<|user|>", False)
@example("it is 42.", "<|user|>", True)
def test_blocks_of_a_stream_are_those_of_the_message(text, end, opened):
    """The blocks that count at the end of a stream hold the text of each kind, and the calls, of the whole answer."""
    deltas, message = deltas_of(text + end, opened)
    reader = BlockReader()
    begun, ended = [], []
    for delta in deltas:
        for event in reader.read(delta):
            if event.happening is Happening.BEGIN:
                begun.append(event.block.number)
            if event.happening is Happening.END:
                ended.append(event.block.number)
    ended += [event.block.number for event in reader.end()]
    assert begun == ended == list(range(len(begun)))

    def summed(blocks):
        texts = {
            kind: "".join(block.text for block in blocks if block.kind is kind)
            for kind in (BlockKind.REASONING, BlockKind.TEXT)
        }
        calls = [
            (block.call_id, block.name, json.loads(block.text))
            for block in blocks
            if block.kind is BlockKind.CALL
        ]
        return texts, calls

    assert summed(reader.blocks) == summed(blocks_of(message))


class Told:
    """An answer stream that was sampled already."""

    prompt_tokens = completion_tokens = 1

    def __init__(self, text):
        self.answers = [Answer(Job(True, [], tools=NOTED), TOKENIZER)]
        self.ids = spelled(TOKENIZER, text)

    async def __aiter__(self):
        answer = self.answers[0]
        for place, token in enumerate(self.ids):
            reason = "length" if place + 1 == len(self.ids) else None
            yield 0, answer, answer.take(Event(0, token, finish_reason=reason))


def test_a_withdrawn_call_is_not_said_to_be_done():
    """A client of the Responses API is told of one call, though two had begun, and the text of the other is text."""
    served = ServedModel(TOKENIZER, "tiny", 10_000)
    form = ResponsesFormat({"input": "hi"}, served)

    async def events():
        return [data async for data in form.events(Told(TWO))]

    parsed = [json.loads(data.split(b"data: ", 1)[1]) for data in asyncio.run(events())]
    names = [event["type"] for event in parsed]
    assert names.count("response.function_call_arguments.done") == 1
    items = [event["item"] for event in parsed if event["type"] == "response.output_item.done"]
    statuses = [item["status"] for item in items if item["type"] == "function_call"]
    assert statuses == ["completed", "incomplete"]
    response = parsed[-1]["response"]
    assert [item["type"] for item in response["output"]] == ["function_call", "message"]
    assert response["output"][1]["content"][0]["text"].startswith("<tool_call>get_order")
    assert response["format_error"] == "unclosed_tool_call"


# In a browser


ASK = """
const [base, key] = given;
const answers = {};
const headers = key ? {authorization: "Bearer " + key} : {};
for (const [name, type] of [["json", "application/json"], ["text", "text/plain"], ["untyped", ""]]) {
  const body = new Blob([JSON.stringify({messages: [{role: "user", content: name}]})], {type});
  for (const mode of ["cors", "no-cors"]) {
    const request = {method: "POST", mode, body, headers: mode === "cors" ? headers : {}};
    try { answers[`${name} ${mode}`] = (await fetch(`${base}/v1/chat/completions`, request)).status; }
    catch (error) { answers[`${name} ${mode}`] = error.name; }
  }
}
try { answers.read = (await (await fetch(`${base}/v1/models`, {headers})).json()).data[0].id; }
catch (error) { answers.read = error.name; }
return answers;
"""
"""What a page may try: requests for which a browser asks no permission, requests for which it does, and to read."""


class Elsewhere(BaseHTTPRequestHandler):
    """Another server's page, which shows the server in a frame."""

    framed = ""

    def do_GET(self):
        """Send the page."""
        self.send_response(200)
        self.send_header("content-type", "text/html")
        self.end_headers()
        self.wfile.write(f"<!doctype html><iframe src='{self.framed}'></iframe>".encode())

    def log_message(self, *_):
        """Say nothing."""


@contextlib.contextmanager
def elsewhere(framed):
    """Yield the port of a server with another server's page."""
    handler = type("Handler", (Elsewhere,), {"framed": framed})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield server.server_address[1]
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


NAMES = "--host-resolver-rules=MAP *.test 127.0.0.1"


@needs_browser
@pytest.mark.slow
def test_pages_in_a_browser(tmp_path):
    """A page of another origin, and one whose name points to this machine, neither ask nor read nor frame."""
    engine = Script(script)
    with (
        running(engine) as (http, _, _),
        elsewhere(f"{http.base_url}") as port,
        browser(tmp_path, NAMES) as driver,
    ):
        base = str(http.base_url).rstrip("/")
        page = Page(driver, f"http://evil.test:{port}/")
        answers = page.run(ASK, base, "")
        refused = {"TypeError", 0}  # not allowed to know, or to read
        assert set(answers.values()) <= refused and answers["read"] == "TypeError", answers
        driver.switch_to.frame(0)
        assert driver.find_elements("css selector", "textarea") == []

        page = Page(driver, f"http://evil.test:{http.base_url.port}/")
        assert "evil.test" in page.all("body")[0]
        answers = page.run(ASK, "", "")
        assert answers["json cors"] == 403 and answers["read"] == "TypeError", answers
        assert engine.prompts == []

        # The twin: the server's own page does all of it.
        page = Page(driver, base)
        answers = page.run(ASK, "", "")
        assert answers["json cors"] == 200 and answers["read"] == "tiny", answers
        assert answers["text cors"] == answers["untyped cors"] == 415, answers
        assert driver.find_elements("css selector", "textarea") != []


@needs_browser
@pytest.mark.slow
def test_an_allowed_page_in_a_browser(tmp_path):
    """A page of an origin that was allowed asks with the key, and reads the answer; without the key it reads 401."""
    with elsewhere("about:blank") as port, browser(tmp_path, NAMES) as driver:
        page = Page(driver, f"http://good.test:{port}/")
        access = Access(allowed_origins=[f"http://good.test:{port}"], key=KEY)
        with running(Script(script), access=access) as (http, _, _):
            base = str(http.base_url).rstrip("/")
            answers = page.run(ASK, base, KEY)
            assert answers["json cors"] == 200 and answers["read"] == "tiny", answers
            assert page.run(ASK, base, "")["json cors"] == 401
