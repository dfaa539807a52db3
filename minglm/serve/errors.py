"""Errors of the HTTP API, as the objects that OpenAI's clients know (no section in the paper)."""

import sys
import traceback
from collections.abc import Mapping
from typing import Any

from minglm.serve.engine_thread import EngineFailed, QueueFull, Stopping


class APIError(Exception):
    """A request that is not answered: an HTTP status with headers, and an OpenAI error object."""

    def __init__(
        self,
        message: str,
        param: str | None = None,
        status: int = 400,
        code: str | None = None,
        kind: str = "invalid_request_error",
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.headers = dict(headers or {})
        error = {"message": message, "type": kind, "param": param, "code": code}
        self.body: dict[str, Any] = {"error": error}


def as_api_error(error: Exception) -> APIError:
    """Return the `APIError` for any exception. An unexpected one is printed and becomes status 500."""
    if isinstance(error, APIError):
        return error
    if isinstance(error, QueueFull):
        return APIError(
            str(error),
            status=429,
            code="rate_limit_exceeded",
            kind="rate_limit_error",
            headers={"retry-after": "1"},
        )
    if isinstance(error, Stopping):
        return APIError(str(error), status=503, kind="server_error")
    if isinstance(error, EngineFailed):
        return APIError(str(error), status=500, kind="server_error")
    traceback.print_exception(error, file=sys.stderr)
    return APIError("the server failed on this request", status=500, kind="server_error")


def anthropic_body(error: APIError) -> dict[str, Any]:
    """Return an error as Anthropic's clients know it."""
    kinds = {
        401: "authentication_error",
        403: "permission_error",
        404: "not_found_error",
        413: "request_too_large",
        429: "rate_limit_error",
    }
    kind = kinds.get(error.status, "api_error" if error.status >= 500 else "invalid_request_error")
    message = error.body["error"]["message"]
    return {"type": "error", "error": {"type": kind, "message": message}}
