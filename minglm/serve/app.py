"""An OpenAI-compatible server with a chat page (no section in the paper; the thinking switch and tools are 3.1's).

    POST /v1/chat/completions, /v1/completions      answers, whole or streamed (`api.py` says what is understood)
    GET  /v1/models, /health, /metrics, /           the model's name, is the engine alive, Prometheus text, chat page

    minglm serve runs/toy --port 8000
    OpenAI(base_url="http://127.0.0.1:8000/v1", api_key="none").chat.completions.create(model="toy", messages=...)

All requests share one engine, which answers them in one batch (`worker.py`). A client that goes away takes its answers
out of the engine. Errors are OpenAI's error objects, also for what is no JSON, too large, or unknown; a fault in one
answer ends that answer and nothing else.

Simplified: no keys and no encryption. It listens on this machine only unless told otherwise; put a proxy in front.
"""

import asyncio
import contextlib
import json
import sys
import time
import traceback
from pathlib import Path

from minglm.serve.engine_thread import Following, Worker
from minglm.serve.metrics import Metrics
from minglm.serve.requests import Refused, chat_job, text_job
from minglm.serve.responses import chunks, usage, whole

PAGE = Path(__file__).with_name("chat_page.html")
BODY_SECONDS = 60


class Gone(Exception):
    """The client has closed the connection."""


async def while_connected(receive, work):
    """The result of a coroutine, unless the client goes away first: then it is cancelled, and `Gone` raised."""

    async def left():
        while (await receive())["type"] != "http.disconnect":
            pass

    working, leaving = asyncio.ensure_future(work), asyncio.ensure_future(left())
    try:
        await asyncio.wait({working, leaving}, return_when=asyncio.FIRST_COMPLETED)
        if not working.done():
            raise Gone
        return working.result()
    finally:
        for task in (working, leaving):
            task.cancel()
        await asyncio.gather(working, leaving, return_exceptions=True)


async def read_body(request, most, keep=True):
    """The bytes of a body, or where they are not to be kept, none.

    One that is too large is read on for a while, so that the client hears why it failed.
    """
    from starlette.requests import ClientDisconnect

    parts, size = [], 0
    try:
        async with asyncio.timeout(BODY_SECONDS):
            async for part in request.stream():
                size += len(part)
                if size <= most and keep:
                    parts.append(part)
                elif size > 8 * most:
                    break
    except ClientDisconnect:
        raise Gone from None
    except TimeoutError:
        raise Refused(
            f"the body did not arrive within {BODY_SECONDS} seconds", status=408
        ) from None
    if size > most:
        raise Refused(f"the body is larger than {most} bytes", status=413, code="request_too_large")
    return b"".join(parts)


def _no_constant(word):
    raise ValueError(f"{word} is no JSON number")


class Measured:
    """A `Following` whose first token, end and tokens are counted."""

    def __init__(self, service, job, started):
        self.following = Following(service.worker, job, service.served.tokenizer)
        self.job, self.started, self.metrics, self.answers = (
            job,
            started,
            service.metrics,
            self.following.answers,
        )

    async def __aiter__(self):
        first = True
        async for index, answer, deltas in self.following:
            if first:
                self.metrics.time("minglm_first_token_seconds", time.monotonic() - self.started)
                first = False
            if answer.reason is not None:
                self.metrics.count("minglm_finished_total", reason=answer.reason)
                if answer.error:
                    self.metrics.count("minglm_format_errors_total", error=answer.error)
            yield index, answer, deltas

    def close(self):
        """Cancel what has not ended, and count what was answered."""
        self.following.close()
        used = usage(self.job, self.following)
        self.metrics.count("minglm_prompt_tokens_total", used["prompt_tokens"])
        self.metrics.count("minglm_generation_tokens_total", used["completion_tokens"])
        self.metrics.time("minglm_request_seconds", time.monotonic() - self.started)


class Events:
    """The response of a streamed answer: server-sent events. Whatever ends it, the engine is told."""

    def __init__(self, service, job, following):
        self.service, self.job, self.following = service, job, following
        self.status_code = 200

    async def __call__(self, scope, receive, send):
        """The ASGI application."""

        async def put(data, more=True):
            await send(
                {
                    "type": "http.response.body",
                    "body": b"data: " + data + b"\n\n",
                    "more_body": more,
                }
            )

        async def body():
            headers = [
                (b"content-type", b"text/event-stream; charset=utf-8"),
                (b"cache-control", b"no-cache"),
            ]
            await send({"type": "http.response.start", "status": 200, "headers": headers})
            try:
                async for chunk in chunks(self.job, self.following, self.service.served.name):
                    await put(_json(chunk))
            except Exception as error:
                await put(_json(as_refused(error).body))
            await put(b"[DONE]", more=False)

        status = 499
        try:
            await while_connected(receive, body())
            status = 200
        except (Gone, OSError):
            pass
        finally:
            self.following.close()
            self.service.metrics.count(
                "minglm_requests_total", endpoint=scope["path"], status=status
            )


def _json(value):
    return json.dumps(value, ensure_ascii=False).encode("utf-8", "replace")


def as_refused(error):
    """The `Refused` for any exception; one that nobody expected is printed and becomes status 500."""
    if isinstance(error, Refused):
        return error
    traceback.print_exception(error, file=sys.stderr)
    return Refused("this request met a fault of the server", status=500, kind="server_error")


class Service:
    """The endpoints. engine: an `Engine`. served: a `Served`. most_open, most_bytes: what goes beyond is refused."""

    def __init__(self, engine, served, most_open=320, most_bytes=8 << 20):
        self.served, self.most_bytes = served, most_bytes
        self.worker, self.metrics, self.since = (
            Worker(engine, most_open),
            Metrics(),
            int(time.time()),
        )
        self.arriving = 0  # requests whose body is being read or prepared
        self.page = PAGE.read_text(encoding="utf-8")

    async def answer(self, request):
        """A completion, of a chat or of a text."""
        from starlette.concurrency import run_in_threadpool

        started, room = time.monotonic(), self.worker.most_open - self.worker.open - self.arriving
        self.arriving += 1
        try:
            body = await read_body(request, self.most_bytes, keep=room > 0)
            if room <= 0:
                raise self.worker.full()
            job = await run_in_threadpool(
                self.prepare, body, request.url.path
            )  # a long prompt takes a while
        finally:
            self.arriving -= 1
        following = Measured(self, job, started)
        if job.stream:
            return Events(self, job, following)
        try:
            return await while_connected(request.receive, whole(job, following, self.served.name))
        finally:
            following.close()

    def prepare(self, body, path):
        """The `Job` of a body. Raises `Refused`."""
        try:
            body = json.loads(body, parse_constant=_no_constant)
        except RecursionError:
            raise Refused("the body is nested too deeply") from None
        except ValueError as error:
            raise Refused(f"the body is not JSON: {error}") from None
        try:
            return (chat_job if path.endswith("/chat/completions") else text_job)(body, self.served)
        except RecursionError:
            raise Refused("the body is nested too deeply") from None

    def model(self):
        """The entry of the list of models."""
        about = {
            "id": self.served.name,
            "object": "model",
            "created": self.since,
            "owned_by": "minglm",
        }
        return about | {"max_model_len": self.served.limit}

    async def models(self, request):
        """The one model, in a list."""
        return {"object": "list", "data": [self.model()]}

    async def one_model(self, request):
        """The one model, by its name."""
        if request.path_params["name"] != self.served.name:
            message = f"there is no such model; {self.served.name!r} is served"
            raise Refused(message, "model", 404, "model_not_found")
        return self.model()

    async def health(self, request):
        """Whether the engine's thread lives."""
        if not self.worker.thread.is_alive():
            raise Refused("the engine has stopped", status=503, kind="server_error")
        return {"status": "ok", "open_answers": self.worker.open}

    async def numbers(self, request):
        """Prometheus text."""
        from starlette.responses import PlainTextResponse

        now = {
            "minglm_open_answers": self.worker.open,
            "minglm_open_answers_limit": self.worker.most_open,
            "minglm_engine_failures_total": self.worker.failures,
        }
        return PlainTextResponse(self.metrics.text(**now), media_type="text/plain; version=0.0.4")

    async def home(self, request):
        """The chat page."""
        from starlette.responses import HTMLResponse

        return HTMLResponse(self.page)

    def guarded(self, handler):
        """A handler whose results become JSON, whose exceptions become error objects, and whose calls are counted."""
        from starlette.responses import Response

        async def handle(request):
            headers = {}
            try:
                found, status = await handler(request), 200
            except Gone:
                found, status = {}, 499
            except Exception as error:
                refused = as_refused(error)
                found, status = refused.body, refused.status
                headers = {"retry-after": "1"} if status == 429 else {}
            if not isinstance(found, Events):  # which count themselves when they end
                path = request.scope["route"].path if "route" in request.scope else request.url.path
                self.metrics.count("minglm_requests_total", endpoint=path, status=status)
            if not isinstance(found, dict):
                return found
            return Response(_json(found), status, headers, media_type="application/json")

        return handle

    async def unknown(self, request, error):
        """A path or a method that does not exist."""
        self.metrics.count("minglm_requests_total", endpoint="other", status=error.status_code)
        from starlette.responses import JSONResponse

        refused = Refused(
            f"{error.detail}: {request.method} {request.url.path}", status=error.status_code
        )
        return JSONResponse(refused.body, error.status_code)


def create_app(engine, served, **bounds):
    """The ASGI application around an engine. Keywords are those of `Service`, which is `app.state.service`."""
    from starlette.applications import Starlette
    from starlette.exceptions import HTTPException
    from starlette.routing import Route

    service = Service(engine, served, **bounds)

    @contextlib.asynccontextmanager
    async def lifespan(app):
        service.worker.start()
        yield
        service.worker.close()

    table = {
        "/v1/chat/completions": (service.answer, "POST"),
        "/v1/completions": (service.answer, "POST"),
        "/v1/models": (service.models, "GET"),
        "/v1/models/{name:path}": (service.one_model, "GET"),
        "/health": (service.health, "GET"),
        "/metrics": (service.numbers, "GET"),
        "/": (service.home, "GET"),
    }
    routes = [
        Route(path, service.guarded(handler), methods=[method])
        for path, (handler, method) in table.items()
    ]
    app = Starlette(
        routes=routes, exception_handlers={HTTPException: service.unknown}, lifespan=lifespan
    )
    app.state.service = service
    return app


def serve(app, host="127.0.0.1", port=8000, ready=None):
    """Answer requests until Ctrl-C. ready(url) is called before the first. Raises ValueError for a port in use."""
    import socket

    import uvicorn

    try:
        listening = socket.create_server((host, port))
    except (OSError, OverflowError) as error:
        raise ValueError(
            f"cannot listen on {host}:{port}: {error}; choose another --port or --host"
        ) from None
    if ready is not None:
        ready(f"http://{host}:{listening.getsockname()[1]}")
    config = uvicorn.Config(
        app, log_level="warning", timeout_graceful_shutdown=3, timeout_keep_alive=60
    )
    app.state.server = uvicorn.Server(
        config
    )  # whoever runs this in a thread ends it with should_exit = True
    app.state.server.run(sockets=[listening])
