"""Show a run in a browser while it trains: the page of `minglm.report.run_view`, over HTTP (no section in the paper).

    GET /                               the page, and its files beside it
    GET /overview.json                  stages, curves, load of the experts, scores
    GET /samples/STAGE.json             one row a sample;  /samples/STAGE/N.json  one sample with its tokens

It reads the run's folder only, so it needs no model, may be started before, during or after a run, and never
disturbs one. The page asks again every few seconds. This machine alone can ask, as with `serve`.
"""

import asyncio
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

from minglm.report.run_view import PAGE_FILES, RunView, page_file
from minglm.serve.access import Access, Gate
from minglm.serve.errors import APIError, as_api_error
from minglm.serve.formats import as_json, error_response
from minglm.serve.metrics import Metrics

if TYPE_CHECKING:  # starlette is an optional package, imported where it is used
    from starlette.applications import Starlette
    from starlette.requests import Request
    from starlette.responses import Response

TYPES = {"html": "text/html", "css": "text/css", "js": "text/javascript"}


def create_view_app(view: RunView) -> "Starlette":
    """Return the ASGI application around a run's folder."""
    from starlette.applications import Starlette
    from starlette.middleware import Middleware
    from starlette.responses import Response
    from starlette.routing import Route

    files = {name: page_file(name) for name in PAGE_FILES}
    reading = asyncio.Lock()  # a `RunView` reads on from where it was

    async def page(request: "Request") -> "Response":
        name = request.path_params.get("name", "view.html")
        if name not in files:
            error = APIError(f"the page has no file {name!r:.80}", status=404)
            return error_response(error, request.url.path)
        kind = TYPES[name.rpartition(".")[2]]
        return Response(files[name], media_type=f"{kind}; charset=utf-8")

    async def data(request: "Request") -> "Response":
        stage = request.path_params.get("stage")
        number = request.path_params.get("number")
        try:
            async with reading:
                found = await asyncio.to_thread(read, view, stage, number)
        except Exception as error:
            mistake = isinstance(error, ValueError | OSError)
            shown = APIError(str(error), status=404) if mistake else as_api_error(error)
            return error_response(shown, request.url.path)
        return Response(as_json(found), media_type="application/json")

    routes = [
        Route("/overview.json", data),
        Route("/samples/{stage}.json", data),
        Route("/samples/{stage}/{number:int}.json", data),
        Route("/", page),
        Route("/{name}", page),
    ]
    app = Starlette(
        routes=routes, middleware=[Middleware(Gate, access=Access(), metrics=Metrics())]
    )
    app.state.service = SimpleNamespace(stop=lambda: None)  # no answer takes long
    return app


def read(view: RunView, stage: str | None, number: int | None) -> dict[str, Any]:
    """Return the overview; of a stage its list of samples, or one of them."""
    if stage is None:
        return view.overview()
    if number is None:
        return {"rows": view.samples(stage)}
    return view.sample(stage, number)
