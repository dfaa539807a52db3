"""Read and parse the body of a request, at a cost that is bounded before it is paid (no section in the paper).

    check_type (its header) -> read_body (bytes) -> parse_body (Python values)

Python's parser holds the interpreter's lock from a body's first byte to its last, and every other request
waits. Texts and numbers cost it little, about 0.1 s for 8 MB. But a list, an object or a key costs up to a
microsecond, and 8 MB of `[]` took 2.5 s. So these are counted first, in steps of some milliseconds, and a
body with more than `MAX_PARTS` is refused. A body that a model of 128K tokens can answer has fewer: a message
or a tool is tokens too.
"""

import asyncio
import json
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, Any

from minglm.serve.errors import APIError

if TYPE_CHECKING:  # starlette is an optional package, imported where it is used
    from starlette.requests import Request

BODY_SECONDS = 60  # a body must arrive within this time
DRAIN_FACTOR = 8  # read a body up to this many times the limit before closing the connection
LARGE_BODY = 64 << 10
"""Bytes of a body from which it needs a place."""
MAX_PARTS = 100_000
"""Most strings, lists and objects of a body: some 0.05 s of parsing."""
CLOSE = {"connection": "close"}
"""Sent with an error after which the client may still be sending."""


class ClientGone(Exception):
    """The client has closed the connection."""


def check_type(content_type: str) -> None:
    """Raise `APIError` 415 for a body that is not announced as JSON.

    Another page may send any text without asking, but a type that is JSON only after the server has allowed it.
    """
    kind = content_type.partition(";")[0].strip().lower()
    if kind != "application/json":
        message = (
            f"the content type is {kind!r:.80}; send the header Content-Type: application/json"
        )
        raise APIError(message, status=415, code="unsupported_media_type")


async def read_body(
    request: "Request", max_bytes: int, take_place: Callable[[], Awaitable[object]]
) -> bytes:
    """Return the bytes of a body. take_place: awaited before more than `LARGE_BODY` bytes are kept.

    A body that is too large is read on for a while, so that the client receives the error.
    """
    from starlette.requests import ClientDisconnect

    chunks: list[bytes] = []
    size = 0
    large = False
    try:
        async with asyncio.timeout(BODY_SECONDS) as limit:
            async for chunk in request.stream():
                size += len(chunk)
                if size > LARGE_BODY and not large:
                    large = True
                    limit.reschedule(None)  # it is not the client that takes its time
                    await take_place()
                    limit.reschedule(asyncio.get_running_loop().time() + BODY_SECONDS)
                if size <= max_bytes:
                    chunks.append(chunk)
                    continue
                chunks.clear()
                if size > DRAIN_FACTOR * max_bytes:
                    break
    except ClientDisconnect:
        raise ClientGone from None
    except TimeoutError:
        message = f"the body did not arrive within {BODY_SECONDS} seconds"
        raise APIError(message, status=408, headers=CLOSE) from None
    if size > max_bytes:
        message = f"the body is larger than {max_bytes} bytes"
        raise APIError(message, status=413, code="request_too_large", headers=CLOSE)
    return b"".join(chunks)


def parse_body(body: bytes) -> Any:
    """Parse a JSON body; refuse NaN and infinity, which Python would read. Raises `APIError`."""
    try:
        text = body.decode(json.detect_encoding(body), "surrogatepass")
        check_parts(text)
        return json.loads(text, parse_constant=_no_constant)
    except RecursionError:
        raise APIError("the body is nested too deeply") from None
    except ValueError as error:
        raise APIError(f"the body is not JSON: {error}") from None


def parse_object(body: bytes) -> dict[str, Any]:
    """Parse a JSON body that must be an object. Raises `APIError`."""
    value = parse_body(body)
    if not isinstance(value, dict):
        raise APIError("the body must be a JSON object")
    return value


def check_parts(text: str) -> None:
    """Raise `APIError` for a JSON text with more than `MAX_PARTS` strings, lists and objects."""
    marks = text.count('"') + text.count("[") + text.count("{")
    if marks <= MAX_PARTS:
        return
    # Marks inside strings are no parts. Without what is escaped, every second piece between quotes is outside.
    plain = text.replace(r"\\", "").replace(r"\"", "")
    parts = plain.count('"') // 2
    if parts <= MAX_PARTS:
        outside = "".join(plain.split('"')[::2])
        parts += outside.count("[") + outside.count("{")
    if parts > MAX_PARTS:
        message = f"the body has {parts} strings, lists and objects or more; at most {MAX_PARTS}"
        raise APIError(message, status=413, code="request_too_large")


def _no_constant(word: str) -> float:
    raise ValueError(f"{word} is not a JSON number")
