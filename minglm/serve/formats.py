"""The forms in which clients ask and are answered: one class for each endpoint (no section in the paper).

    body -> format.job -> (engine) -> format.whole(stream), or format.events(stream)

`OpenAIFormat` is the chat and text completions of `requests.py` and `responses.py`.
`minglm.serve.anthropic_messages` and `minglm.serve.openai_responses` translate another API's words into a
chat request, and its answer back.
"""

import json
from collections.abc import AsyncIterator
from typing import TYPE_CHECKING, Any, Protocol

from minglm.serve.errors import APIError, anthropic_body
from minglm.serve.requests import Job, ServedModel, chat_job, text_job
from minglm.serve.responses import response_chunks, whole_response
from minglm.serve.stream import AnswerStream

if TYPE_CHECKING:  # starlette is an optional package, imported where it is used
    from starlette.responses import Response

JSONObject = dict[str, Any]


class APIFormat(Protocol):
    """One request in the words of its API."""

    job: Job
    chat: JSONObject
    """The request in the words of chat completions."""

    async def whole(self, stream: AnswerStream) -> JSONObject:
        """Return the object of a response that is not streamed."""
        ...

    def events(self, stream: AnswerStream) -> AsyncIterator[bytes]:
        """Yield the server-sent events of a streamed response."""
        ...

    def failure(self, error: APIError) -> bytes:
        """Return the last events of a streamed response that fails."""
        ...


def as_json(value: Any) -> bytes:
    """Return a JSON text. Raises ValueError for NaN and infinity, which JSON does not have."""
    return json.dumps(value, ensure_ascii=False, allow_nan=False).encode("utf-8", "replace")


def error_response(error: APIError, path: str) -> "Response":
    """Return an error as the clients of this path know it."""
    from starlette.responses import Response

    body = anthropic_body(error) if path.startswith("/v1/messages") else error.body
    return Response(as_json(body), error.status, error.headers, media_type="application/json")


def sse(data: bytes, name: str = "") -> bytes:
    """Return a server-sent event."""
    event = f"event: {name}\n".encode() if name else b""
    return event + b"data: " + data + b"\n\n"


DONE = sse(b"[DONE]")
"""The last event of OpenAI's completions."""


class OpenAIFormat:
    """A chat or text completion. Raises `APIError`."""

    def __init__(self, body: Any, served: ServedModel, chat: bool) -> None:
        self.served = served
        self.job = chat_job(body, served) if chat else text_job(body, served)
        self.chat: JSONObject = body

    async def whole(self, stream: AnswerStream) -> JSONObject:
        """Return the object of a response that is not streamed."""
        return await whole_response(self.job, stream, self.served.name)

    async def events(self, stream: AnswerStream) -> AsyncIterator[bytes]:
        """Yield the chunks, and [DONE]."""
        async for chunk in response_chunks(self.job, stream, self.served.name):
            yield sse(as_json(chunk))
        yield DONE

    def failure(self, error: APIError) -> bytes:
        """Return the error as an event, and [DONE]: the status has been sent."""
        return sse(as_json(error.body)) + DONE
