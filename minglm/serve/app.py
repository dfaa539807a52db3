"""An OpenAI-compatible server with a chat page (no section in the paper; the thinking switch and tools are 3.1's).

    POST /v1/chat/completions, /v1/completions      whole or streamed (`requests.py` says what is supported)
    POST /v1/responses, /v1/messages                OpenAI's Responses and Anthropic's Messages, for a chat with tools
    GET  /v1/models, /health, /metrics, /           the model's name, whether the engine runs, Prometheus text, chat page
    GET  /page/...                                  the page's files, and what it suggests to ask

    minglm serve runs/toy --port 8000
    OpenAI(base_url="http://127.0.0.1:8000/v1", api_key="none").chat.completions.create(model="toy", messages=...)

All requests share one engine, which answers them in one batch (`engine_thread.py`). When a client disconnects, its
requests leave the engine. Errors are OpenAI's error objects, also for bodies that are not JSON or are too large, and for
unknown paths; a failure in one response ends that response only.

Simplified: there are no API keys and no encryption. The server listens on this machine only unless told otherwise; put a
proxy in front of it.
"""

import asyncio
import contextlib
import json
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine
from typing import TYPE_CHECKING, Any, TypeVar

from minglm.serve.anthropic_messages import MessagesFormat, error_body
from minglm.serve.engine_thread import EngineThread, SteppedEngine
from minglm.serve.errors import APIError, as_api_error
from minglm.serve.examples import examples
from minglm.serve.formats import APIFormat, OpenAIFormat, as_json
from minglm.serve.metrics import Metrics
from minglm.serve.openai_responses import ResponsesFormat
from minglm.serve.page_files import read_page_files
from minglm.serve.requests import ServedModel
from minglm.serve.stream import AnswerStream

if TYPE_CHECKING:  # starlette is an optional package, imported where it is used
    from starlette.applications import Starlette
    from starlette.requests import Request
    from starlette.responses import Response
    from starlette.types import Receive, Scope, Send

BODY_SECONDS = 60  # a body must arrive within this time
DRAIN_FACTOR = 8  # read a body up to this many times the limit before closing the connection
CLIENT_GONE = 499  # nginx's status for a client that disconnected

T = TypeVar("T")
JSONObject = dict[str, Any]


class ClientGone(Exception):
    """The client has closed the connection."""


async def while_connected(receive: "Receive", work: Coroutine[Any, Any, T]) -> T:
    """Return the result of a coroutine. If the client disconnects first, cancel it and raise `ClientGone`."""

    async def disconnected() -> None:
        while (await receive())["type"] != "http.disconnect":
            pass

    working = asyncio.ensure_future(work)
    leaving = asyncio.ensure_future(disconnected())
    try:
        await asyncio.wait({working, leaving}, return_when=asyncio.FIRST_COMPLETED)
        if not working.done():
            raise ClientGone
        return working.result()
    finally:
        working.cancel()
        leaving.cancel()
        await asyncio.gather(working, leaving, return_exceptions=True)


async def read_body(request: "Request", max_bytes: int, keep: bool = True) -> bytes:
    """Return the bytes of a body, or nothing if `keep` is False.

    A body that is too large is read on for a while, so that the client receives the error.
    """
    from starlette.requests import ClientDisconnect

    chunks: list[bytes] = []
    size = 0
    try:
        async with asyncio.timeout(BODY_SECONDS):
            async for chunk in request.stream():
                size += len(chunk)
                if size <= max_bytes and keep:
                    chunks.append(chunk)
                elif size > DRAIN_FACTOR * max_bytes:
                    break
    except ClientDisconnect:
        raise ClientGone from None
    except TimeoutError:
        message = f"the body did not arrive within {BODY_SECONDS} seconds"
        raise APIError(message, status=408) from None
    if size > max_bytes:
        message = f"the body is larger than {max_bytes} bytes"
        raise APIError(message, status=413, code="request_too_large")
    return b"".join(chunks)


def parse_body(body: bytes) -> Any:
    """Parse a JSON body; refuse NaN and infinity, which Python would read. Raises `APIError`."""
    try:
        return json.loads(body, parse_constant=_no_constant)
    except RecursionError:
        raise APIError("the body is nested too deeply") from None
    except ValueError as error:
        raise APIError(f"the body is not JSON: {error}") from None


def _no_constant(word: str) -> float:
    raise ValueError(f"{word} is not a JSON number")


class EventStreamResponse:
    """A streamed response: server-sent events, as an ASGI application. However it ends, the engine is told."""

    def __init__(self, answer_format: APIFormat, stream: AnswerStream, metrics: Metrics) -> None:
        self.format = answer_format
        self.stream = stream
        self.metrics = metrics
        self.status_code = 200

    async def __call__(self, scope: "Scope", receive: "Receive", send: "Send") -> None:
        """Send the response."""
        status = CLIENT_GONE
        try:
            await while_connected(receive, self._send_events(send))
            status = 200
        except (ClientGone, OSError):
            pass
        finally:
            self.stream.close()
            self.metrics.count("minglm_requests_total", endpoint=scope["path"], status=status)

    async def _send_events(self, send: "Send") -> None:
        headers = [
            (b"content-type", b"text/event-stream; charset=utf-8"),
            (b"cache-control", b"no-cache"),
        ]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        try:
            async for event in self.format.events(self.stream):
                await self._send_part(send, event)
        except Exception as error:
            # The status has been sent: the error becomes an event.
            await self._send_part(send, self.format.failure(as_api_error(error)))
        await self._send_part(send, b"", more=False)

    async def _send_part(self, send: "Send", body: bytes, more: bool = True) -> None:
        await send({"type": "http.response.body", "body": body, "more_body": more})


class Service:
    """The endpoints of the server, around one engine.

    max_open_requests: choices that may be open; more are refused with status 429. max_body_bytes: the largest body.
    """

    def __init__(
        self,
        engine: SteppedEngine,
        served: ServedModel,
        max_open_requests: int = 320,
        max_body_bytes: int = 8 << 20,
    ) -> None:
        self.served = served
        self.max_body_bytes = max_body_bytes
        self.engine_thread = EngineThread(engine, max_open_requests)
        self.metrics = Metrics()
        self.started_at = int(time.time())
        self.arriving = 0  # requests whose body is being read or checked
        self.page_files = read_page_files()

    async def completion(self, request: "Request") -> "EventStreamResponse | JSONObject":
        """Answer a completion request, of a chat or of plain text."""
        started = time.monotonic()
        thread = self.engine_thread
        answer_format = await self.accepted(request)
        job = answer_format.job
        stream = AnswerStream(thread, job, self.served.tokenizer, self.metrics, started)
        if job.stream:
            return EventStreamResponse(answer_format, stream, self.metrics)
        try:
            response = answer_format.whole(stream)
            return await while_connected(request.receive, response)
        finally:
            stream.close()

    async def count_tokens(self, request: "Request") -> JSONObject:
        """Answer how many tokens the prompt of a message has."""
        answer_format = await self.accepted(request)
        return {"input_tokens": len(answer_format.job.requests[0].prompt)}

    async def accepted(self, request: "Request") -> APIFormat:
        """Read a request, and check it in the words of its API. Raises `APIError`."""
        from starlette.concurrency import run_in_threadpool

        thread = self.engine_thread
        room = thread.max_open_requests - thread.open_requests - self.arriving
        self.arriving += 1
        try:
            body = await read_body(request, self.max_body_bytes, keep=room > 0)
            if room <= 0:
                raise thread.queue_full()
            # Tokenizing a long prompt takes a while: not in the event loop.
            return await run_in_threadpool(self.accept, body, request.url.path)
        finally:
            self.arriving -= 1

    def accept(self, body: bytes, path: str) -> APIFormat:
        """Return a body in the words of its API, checked. Raises `APIError`."""
        try:
            parsed = parse_body(body)
            answer_format: APIFormat
            if path == "/v1/responses":
                answer_format = ResponsesFormat(parsed, self.served)
            elif path.startswith("/v1/messages"):
                needs_limit = not path.endswith("/count_tokens")
                answer_format = MessagesFormat(parsed, self.served, needs_limit)
            else:
                chat = path.endswith("/chat/completions")
                answer_format = OpenAIFormat(parsed, self.served, chat)
        except RecursionError:
            raise APIError("the body is nested too deeply") from None
        job = answer_format.job
        try:
            # All requests of a job have the same grammar; it may take a while to compile.
            self.engine_thread.engine.prepare(job.requests[0])
        except ValueError as error:
            raise APIError(str(error), job.grammar_field or None) from None
        return answer_format

    def model_entry(self) -> JSONObject:
        """Return the model's entry in the list of models."""
        return {
            "id": self.served.name,
            "object": "model",
            "created": self.started_at,
            "owned_by": "minglm",
            "max_model_len": self.served.max_model_len,
        }

    async def models(self, request: "Request") -> JSONObject:
        """Answer with the list of models, which has one."""
        return {"object": "list", "data": [self.model_entry()]}

    async def model(self, request: "Request") -> JSONObject:
        """Answer with one model, by its name."""
        if request.path_params["name"] != self.served.name:
            message = f"there is no such model; {self.served.name!r} is served"
            raise APIError(message, "model", 404, "model_not_found")
        return self.model_entry()

    async def health(self, request: "Request") -> JSONObject:
        """Answer whether the engine's thread is running."""
        if not self.engine_thread.alive:
            raise APIError("the engine has stopped", status=503, kind="server_error")
        return {"status": "ok", "open_answers": self.engine_thread.open_requests}

    async def prometheus(self, request: "Request") -> "Response":
        """Answer with the metrics as Prometheus text."""
        from starlette.responses import PlainTextResponse

        values = {
            "minglm_open_answers": self.engine_thread.open_requests,
            "minglm_open_answers_limit": self.engine_thread.max_open_requests,
            "minglm_engine_failures_total": self.engine_thread.failures,
        }
        text = self.metrics.text(**values)
        return PlainTextResponse(text, media_type="text/plain; version=0.0.4")

    async def page(self, request: "Request") -> "Response":
        """Answer with a file of the chat page, or with status 304 if the client has it. Raises `APIError`."""
        from starlette.responses import Response

        name = request.path_params.get("name", "index.html")
        if name not in self.page_files:
            raise APIError(f"the chat page has no file {name!r:.80}", status=404)
        file = self.page_files[name]
        headers = {"etag": file.etag, "cache-control": file.cache_control}
        if file.etag in request.headers.get("if-none-match", ""):
            return Response(status_code=304, headers=headers)
        return Response(file.body, headers=headers, media_type=file.media_type)

    async def page_examples(self, request: "Request") -> JSONObject:
        """Answer with what the chat page suggests to ask."""
        return examples(self.served.environments)

    def guarded(
        self, handler: Callable[["Request"], Awaitable[Any]]
    ) -> Callable[["Request"], Awaitable[Any]]:
        """Wrap a handler: results become JSON, exceptions become error objects, and requests are counted."""
        from starlette.responses import Response

        async def handle(request: "Request") -> Any:
            headers: dict[str, str] = {}
            status = 200
            try:
                result = await handler(request)
            except ClientGone:
                result = {}
                status = CLIENT_GONE
            except Exception as exception:
                error = as_api_error(exception)
                result = error.body
                if request.url.path.startswith("/v1/messages"):
                    result = error_body(error)
                status = error.status
                if status == 429:
                    headers["retry-after"] = "1"
            if not isinstance(result, EventStreamResponse):  # it counts itself when it ends
                self._count(request, status)
            if not isinstance(result, dict):
                return result
            return Response(as_json(result), status, headers, media_type="application/json")

        return handle

    def _count(self, request: "Request", status: int) -> None:
        route = request.scope.get("route")
        endpoint = route.path if route is not None else request.url.path
        self.metrics.count("minglm_requests_total", endpoint=endpoint, status=status)

    async def unknown(self, request: "Request", error: Any) -> "Response":
        """Answer a path or a method that does not exist. error: starlette's `HTTPException`."""
        from starlette.responses import JSONResponse

        self.metrics.count("minglm_requests_total", endpoint="other", status=error.status_code)
        message = f"{error.detail}: {request.method} {request.url.path}"
        return JSONResponse(APIError(message, status=error.status_code).body, error.status_code)


def create_app(engine: SteppedEngine, served: ServedModel, **limits: int) -> "Starlette":
    """Return the ASGI application around an engine. limits: of `Service`, which is `app.state.service`."""
    from starlette.applications import Starlette
    from starlette.exceptions import HTTPException
    from starlette.routing import Route

    service = Service(engine, served, **limits)

    @contextlib.asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        service.engine_thread.start()
        yield
        service.engine_thread.close()

    table = (
        ("POST", "/v1/chat/completions", service.completion),
        ("POST", "/v1/completions", service.completion),
        ("POST", "/v1/responses", service.completion),
        ("POST", "/v1/messages", service.completion),
        ("POST", "/v1/messages/count_tokens", service.count_tokens),
        ("GET", "/v1/models", service.models),
        ("GET", "/v1/models/{name:path}", service.model),
        ("GET", "/health", service.health),
        ("GET", "/metrics", service.prometheus),
        ("GET", "/", service.page),
        ("GET", "/page/examples.json", service.page_examples),
        ("GET", "/page/{name:path}", service.page),
    )
    routes = [
        Route(path, service.guarded(handler), methods=[method]) for method, path, handler in table
    ]
    app = Starlette(
        routes=routes, exception_handlers={HTTPException: service.unknown}, lifespan=lifespan
    )
    app.state.service = service
    return app


def serve(
    app: "Starlette",
    host: str = "127.0.0.1",
    port: int = 8000,
    ready: Callable[[str], None] | None = None,
) -> None:
    """Answer requests until Ctrl-C. ready(url) is called before the first. Raises ValueError for a port in use."""
    import socket

    import uvicorn

    try:
        listening = socket.create_server((host, port))
    except (OSError, OverflowError) as error:
        message = f"cannot listen on {host}:{port}: {error}; choose another --port or --host"
        raise ValueError(message) from None
    if ready is not None:
        ready(f"http://{host}:{listening.getsockname()[1]}")
    config = uvicorn.Config(
        app, log_level="warning", timeout_graceful_shutdown=3, timeout_keep_alive=60
    )
    # Code that runs this in a thread stops it with app.state.server.should_exit = True.
    app.state.server = uvicorn.Server(config)
    app.state.server.run(sockets=[listening])
