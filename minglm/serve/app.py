"""An OpenAI-compatible server with a chat page (no section in the paper; the thinking switch and tools are 3.1's).

    POST /v1/chat/completions, /v1/completions      whole or streamed (`requests.py` says what is supported)
    POST /v1/responses, /v1/messages                OpenAI's Responses and Anthropic's Messages, for a chat with tools
    GET  /v1/models, /health, /metrics, /           the model's name, whether the engine runs, Prometheus text, chat page
    GET  /page/...                                  the page's files, and what it suggests to ask
    POST /update_weights_from_disk                  new weights from a folder, if the server was started for that
    POST /update_weights_from_tensor                new weights in the request, if the server was started for that

    minglm serve runs/toy --port 8000
    OpenAI(base_url="http://127.0.0.1:8000/v1", api_key="none").chat.completions.create(model="toy", messages=...)

All requests share one engine, which answers them in one batch (`engine_thread.py`). When a client
disconnects, its requests leave the engine. Errors are OpenAI's error objects, also for bodies that are not
JSON or are too large, and for unknown paths; a failure in one response ends that response only. `access.py`
says who may use the server, and `listener.py` how it begins and ends.

A large body must not hold up small ones (`bodies.py`). Few are read at a time, the others stay with their
clients; one at a time is parsed and tokenized, in a thread, and the tokenizer lets the other threads run. A
body is freed when its answer is
sent: in a cycle of references it would stay until a collection, which would then free many bodies while all others wait.

Simplified: there is no encryption. The server listens on this machine only unless told otherwise; put a proxy
in front of it.
"""

import asyncio
import base64
import contextlib
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Mapping
from typing import TYPE_CHECKING, Any, TypeVar

import safetensors.torch
from safetensors import SafetensorError
from torch import Tensor

from minglm.common.mistakes import one_line
from minglm.serve.access import Access, Gate
from minglm.serve.anthropic_messages import MessagesFormat
from minglm.serve.bodies import (
    LARGE_BODY,
    ClientGone,
    check_type,
    parse_body,
    parse_object,
    read_body,
)
from minglm.serve.engine_thread import EngineThread, SteppedEngine, Stopping, TokenStream
from minglm.serve.errors import APIError, as_api_error
from minglm.serve.examples import examples
from minglm.serve.fields import refuse_unknown
from minglm.serve.formats import APIFormat, OpenAIFormat, as_json, error_response
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

LARGE_PLACES = 4
"""Large bodies that are in memory at once."""
MAX_WEIGHT_BYTES = 4 << 30
"""The largest body with weights; a matrix travels whole."""
CLIENT_GONE = 499  # nginx's status for a client that disconnected

T = TypeVar("T")
JSONObject = dict[str, Any]


async def unless(ended: Awaitable[Any], work: Coroutine[Any, Any, T], error: Exception) -> T:
    """Return the result of a coroutine. If `ended` comes first, cancel the coroutine and raise the error."""
    working = asyncio.ensure_future(work)
    ending = asyncio.ensure_future(ended)
    try:
        await asyncio.wait({working, ending}, return_when=asyncio.FIRST_COMPLETED)
        if not working.done():
            raise error
        return working.result()
    finally:
        working.cancel()
        ending.cancel()
        await asyncio.gather(working, ending, return_exceptions=True)
        # An error that `working` ended with knows this frame, and so would keep itself and all that it has passed.
        del working, ending


async def _nothing() -> None:
    """Wait for no place: the body is small."""


async def disconnected(receive: "Receive") -> None:
    """Wait until the client closes the connection."""
    while (await receive())["type"] != "http.disconnect":
        pass


def format_of(body: Any, path: str, served: ServedModel) -> APIFormat:
    """Return a parsed body in the words of the API that its path belongs to, checked. Raises `APIError`."""
    try:
        if path.endswith("/v1/responses"):
            return ResponsesFormat(body, served)
        if "/v1/messages" in path:
            return MessagesFormat(body, served, needs_limit=not path.endswith("/count_tokens"))
        return OpenAIFormat(body, served, chat=path.endswith("/chat/completions"))
    except RecursionError:
        raise APIError("the body is nested too deeply") from None


class EventStreamResponse:
    """A streamed response: server-sent events, as an ASGI application.

    However it ends, the engine is told.
    """

    def __init__(self, answer_format: APIFormat, stream: AnswerStream, metrics: Metrics) -> None:
        self.format = answer_format
        self.stream = stream
        self.metrics = metrics
        self.status_code = 200

    async def __call__(self, scope: "Scope", receive: "Receive", send: "Send") -> None:
        """Send the response."""
        status = CLIENT_GONE
        try:
            await unless(disconnected(receive), self._send_events(send), ClientGone())
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

    max_open_requests: choices that may be open; more are refused with status 429. max_body_bytes: the largest
    body. load_weights(path): reads other weights; raises ValueError or OSError. take_weights(tensors): uses
    some other tensors; raises RuntimeError. None: the weights stay.
    """

    def __init__(
        self,
        engine: SteppedEngine,
        served: ServedModel,
        access: Access,
        max_open_requests: int = 320,
        max_body_bytes: int = 8 << 20,
        load_weights: Callable[[str], None] | None = None,
        take_weights: Callable[[Mapping[str, Tensor]], None] | None = None,
    ) -> None:
        self.served = served
        self.load_weights = load_weights
        self.take_weights = take_weights
        self.access = access
        self.max_body_bytes = max_body_bytes
        self.large_places = asyncio.Semaphore(LARGE_PLACES)
        self.one_large = asyncio.Semaphore(1)
        self.stopping = asyncio.Event()
        self.engine_thread = EngineThread(engine, max_open_requests)
        self.metrics = Metrics()
        self.started_at = int(time.time())
        self.arriving = 0  # requests whose body is being read or checked
        self.page_files = read_page_files()

    def stop(self) -> None:
        """End every open answer with an error, and accept no more."""
        self.stopping.set()
        self.engine_thread.end_requests()

    async def completion(self, request: "Request") -> "EventStreamResponse | JSONObject":
        """Answer a completion request, of a chat or of plain text."""
        started = time.monotonic()
        thread = self.engine_thread
        answer_format = await self.accepted(request)
        job = answer_format.job
        try:
            tokens = TokenStream(thread, job.requests)
        except ValueError as error:
            raise APIError(str(error)) from None
        stream = AnswerStream(tokens, job, self.served.tokenizer, self.metrics, started)
        if job.stream:
            return EventStreamResponse(answer_format, stream, self.metrics)
        try:
            response = answer_format.whole(stream)
            return await unless(disconnected(request.receive), response, ClientGone())
        finally:
            stream.close()

    async def count_tokens(self, request: "Request") -> JSONObject:
        """Answer how many tokens the prompt of a message has."""
        answer_format = await self.accepted(request)
        return {"input_tokens": len(answer_format.job.requests[0].prompt)}

    async def accepted(self, request: "Request") -> APIFormat:
        """Read a request, and check it in the words of its API. Raises `APIError`."""
        check_type(request.headers.get("content-type", ""))
        thread = self.engine_thread
        room = thread.max_open_requests - thread.open_requests - self.arriving
        if room <= 0:
            raise thread.queue_full()
        self.arriving += 1
        try:
            return await unless(self.stopping.wait(), self._read(request), Stopping())
        finally:
            self.arriving -= 1

    async def _read(self, request: "Request") -> APIFormat:
        """Read a request, and tokenize its prompt in a thread."""
        async with contextlib.AsyncExitStack() as held:
            body = await read_body(
                request,
                self.max_body_bytes,
                lambda: held.enter_async_context(self.large_places),
            )
            path = request.url.path
            if len(body) <= LARGE_BODY:
                return await asyncio.to_thread(self.accept, body, path)
            async with self.one_large:
                return await asyncio.to_thread(self.accept, body, path)

    def accept(self, body: bytes, path: str) -> APIFormat:
        """Return a body in the words of its API, checked. Raises `APIError`."""
        answer_format = format_of(parse_body(body), path, self.served)
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

    async def update_weights(self, request: "Request") -> JSONObject:
        """Answer once the engine has the weights of a folder, in SGLang's words; open requests continue with them."""
        if self.load_weights is None:
            raise APIError(
                "this server keeps its weights; start it with --weights-from FOLDER", status=403
            )
        check_type(request.headers.get("content-type", ""))
        body = parse_object(await read_body(request, LARGE_BODY, _nothing))
        refuse_unknown(body, {"model_path", "weight_version"})
        path = body.get("model_path")
        if not isinstance(path, str):
            raise APIError("model_path must be a folder", "model_path")
        try:
            await asyncio.to_thread(self.load_weights, path)
        except (ValueError, OSError, RuntimeError) as error:
            return {"success": False, "message": one_line(str(error))}
        return {"success": True, "message": "the weights were read"}

    async def take_tensors(self, request: "Request") -> JSONObject:
        """Answer once the engine has the tensors of the body, a safetensors file in base64, in SGLang's words."""
        if self.take_weights is None:
            raise APIError(
                "this server keeps its weights; start it with --accept-weights", status=403
            )
        check_type(request.headers.get("content-type", ""))
        body = parse_object(await read_body(request, MAX_WEIGHT_BYTES, _nothing))
        fields = {"serialized_named_tensors", "load_format", "flush_cache", "weight_version"}
        refuse_unknown(body, fields)
        if body.get("load_format") != "safetensors":
            raise APIError("load_format must be safetensors", "load_format")
        try:
            (text,) = body["serialized_named_tensors"]
            tensors = safetensors.torch.load(base64.b64decode(text, validate=True))
        except (LookupError, TypeError, ValueError, SafetensorError) as error:
            message = f"serialized_named_tensors must be one safetensors file in base64: {error}"
            raise APIError(one_line(message), "serialized_named_tensors") from None
        try:
            await asyncio.to_thread(self.take_weights, tensors)
        except RuntimeError as error:
            return {"success": False, "message": one_line(str(error))}
        return {"success": True, "message": f"{len(tensors)} tensors were read"}

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
        self, handler: Callable[["Request"], Awaitable[Any]], needs_key: bool
    ) -> Callable[["Request"], Awaitable[Any]]:
        """Wrap a handler: results become JSON, exceptions become error objects, and requests are counted."""
        from starlette.responses import Response

        async def handle(request: "Request") -> Any:
            status = 200
            try:
                if needs_key:
                    self.access.check_key(request.headers)
                result = await handler(request)
            except ClientGone:
                result = Response()
                status = CLIENT_GONE
            except Exception as exception:
                # No name is left for the error: it knows this frame, and would keep the body until a collection.
                result = error_response(as_api_error(exception), request.url.path)
                status = result.status_code
            if not isinstance(result, EventStreamResponse):  # it counts itself when it ends
                self._count(request, status)
            if not isinstance(result, dict):
                return result
            return Response(as_json(result), media_type="application/json")

        return handle

    def _count(self, request: "Request", status: int) -> None:
        route = request.scope.get("route")
        endpoint = route.path if route is not None else request.url.path
        self.metrics.count("minglm_requests_total", endpoint=endpoint, status=status)

    async def unknown(self, request: "Request", exception: Any) -> "Response":
        """Answer a path or a method that does not exist. exception: starlette's `HTTPException`."""
        status = exception.status_code
        self.metrics.count("minglm_requests_total", endpoint="other", status=status)
        message = f"{exception.detail}: {request.method} {request.url.path}"
        error = APIError(message, status=status, headers=exception.headers)
        return error_response(error, request.url.path)


def create_app(
    engine: SteppedEngine, served: ServedModel, access: Access | None = None, **options: Any
) -> "Starlette":
    """Return the ASGI application around an engine.

    access: who may use it; None: this machine. options: of `Service`, which is `app.state.service`.
    """
    from starlette.applications import Starlette
    from starlette.exceptions import HTTPException
    from starlette.middleware import Middleware
    from starlette.middleware.cors import CORSMiddleware
    from starlette.routing import Route

    access = access or Access()
    service = Service(engine, served, access, **options)

    @contextlib.asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        service.engine_thread.start()
        yield
        service.engine_thread.close()

    table = (  # method, path, what answers, whether that needs the key
        ("POST", "/v1/chat/completions", service.completion, True),
        ("POST", "/v1/completions", service.completion, True),
        ("POST", "/v1/responses", service.completion, True),
        ("POST", "/v1/messages", service.completion, True),
        ("POST", "/v1/messages/count_tokens", service.count_tokens, True),
        ("GET", "/v1/models", service.models, True),
        ("GET", "/v1/models/{name:path}", service.model, True),
        ("POST", "/update_weights_from_disk", service.update_weights, True),
        ("POST", "/update_weights_from_tensor", service.take_tensors, True),
        ("GET", "/metrics", service.prometheus, True),
        ("GET", "/health", service.health, False),
        ("GET", "/", service.page, False),
        ("GET", "/page/examples.json", service.page_examples, False),
        ("GET", "/page/{name:path}", service.page, False),
    )
    routes = [
        Route(path, service.guarded(handler, needs_key), methods=[method])
        for method, path, handler, needs_key in table
    ]
    middleware = [Middleware(Gate, access=access, metrics=service.metrics)]
    if access.allowed_origins:
        # The gate has let only these origins pass, and the server's own.
        cors = Middleware(
            CORSMiddleware,
            allow_origins=access.allowed_origins,
            allow_methods=["GET", "POST"],
            allow_headers=["*"],
            allow_private_network=True,
            expose_headers=["retry-after"],
        )
        middleware.append(cors)
    app = Starlette(
        routes=routes,
        middleware=middleware,
        exception_handlers={HTTPException: service.unknown},
        lifespan=lifespan,
    )
    app.state.service = service
    return app
