"""Decide who may use the server: by which name it is called, from which page, with which key (no section in the paper).

A server that listens on this machine only is still within reach of every page that a browser on it has open.

    Host      localhost, an address of this machine, or a name that was allowed     else 403
    Origin    absent, the server's own, or one that was allowed                     else 403
    key       Authorization: Bearer KEY, or x-api-key: KEY (Anthropic's clients)    else 401, where a key is set

Choices
- The name is checked because a page may let its own name point to this machine (DNS rebinding): then the browser takes
  the server for a part of that page. Nobody can do so with an address, so a server that listens beyond this machine may
  be called by any address.
- A browser sends Origin with every POST to another origin and with every read that the page is to see. Other clients
  send none.
- Every answer tells the browser not to guess its type, not to show it in a frame, and not to hand it to other pages.
"""

import hmac
import ipaddress
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from minglm.serve.errors import APIError
from minglm.serve.formats import error_response
from minglm.serve.metrics import Metrics

if TYPE_CHECKING:  # starlette is an optional package, imported where it is used
    from starlette.datastructures import Headers
    from starlette.types import ASGIApp, Message, Receive, Scope, Send

PAGE_POLICY = (
    "default-src 'none'",
    "script-src 'self'",
    "style-src 'self'",
    "img-src 'self' data:",
    "font-src 'self'",
    "connect-src 'self'",
    "base-uri 'none'",
    "form-action 'none'",
    "frame-ancestors 'none'",
)
"""What the chat page may load and run: its own files only, and nothing that a model's answer writes into it."""

HEADERS = {
    "content-security-policy": "; ".join(PAGE_POLICY),
    "x-content-type-options": "nosniff",
    "x-frame-options": "DENY",
    "referrer-policy": "no-referrer",
    "cross-origin-resource-policy": "same-origin",
    "cross-origin-opener-policy": "same-origin",
}
"""Sent with every answer."""

_HOST = re.compile(r"(?P<name>\[[0-9a-f:.]+\]|[\w.-]+?)\.?(?P<port>:\d{1,5})?", re.ASCII)
_ORIGIN = re.compile(r"https?://(?P<host>[^/?#@\s]+)")


@dataclass(frozen=True)
class Access:
    """Who may use the server. Raises ValueError for what is no name, no origin or no key."""

    host: str = "127.0.0.1"
    """What the server listens on: an address or a name."""
    allowed_hosts: Sequence[str] = ()
    """More names that it may be called by."""
    allowed_origins: Sequence[str] = ()
    """Pages of other origins that may use it, as scheme://host or scheme://host:port."""
    key: str | None = field(default=None, repr=False)
    """What clients have to know; None: nothing."""

    def __post_init__(self) -> None:
        for name in self.allowed_hosts:
            if host_name(name) != name.lower().strip("[]"):
                raise ValueError(
                    f"--allowed-host {name!r}: must be a name or an address without scheme and port,"
                    " such as chat.example.com"
                )
        for origin in self.allowed_origins:
            match = _ORIGIN.fullmatch(origin)
            if match is None or host_name(match["host"]) is None or origin != origin.lower():
                raise ValueError(
                    f"--allow-origin {origin!r}: must be scheme://host or scheme://host:port in lower case,"
                    " such as https://chat.example.com"
                )
        if self.key is not None and not re.fullmatch(r"[!-~]+", self.key):
            raise ValueError(
                "the API key must be at least one visible ASCII character, without spaces"
            )

    @property
    def beyond_this_machine(self) -> bool:
        """Whether other machines reach the server."""
        address = _address(self.host)
        if address is None:
            return self.host.lower() != "localhost"
        return not address.is_loopback

    def knows_host(self, header: str | None) -> bool:
        """Return whether the server may be called by what stands in the header Host."""
        name = host_name(header or "")
        if name is None:
            return False
        own = {
            "localhost",
            self.host.lower(),
            *(host.lower().strip("[]") for host in self.allowed_hosts),
        }
        address = _address(name)
        if name in own or address is None:
            return name in own
        return address.is_loopback or self.beyond_this_machine

    def knows_origin(self, origin: str | None, host: str | None) -> bool:
        """Return whether a page of this origin may use the server. host: the header Host of the request."""
        if origin is None or origin in self.allowed_origins:
            return True
        # A proxy may have taken the encryption off, so only what follows the scheme is compared.
        match = _ORIGIN.fullmatch(origin)
        return match is not None and host is not None and match["host"].lower() == host.lower()

    def check_key(self, headers: "Headers") -> None:
        """Raise `APIError` 401 for a request without the key."""
        if self.key is None:
            return
        scheme, _, bearer = headers.get("authorization", "").partition(" ")
        given = [headers.get("x-api-key", ""), bearer.strip() if scheme.lower() == "bearer" else ""]
        # The time must not tell how much of a guess is right.
        matches = [hmac.compare_digest(key.encode(), self.key.encode()) for key in given]
        if any(matches):
            return
        message = "this is not the API key of this server"
        if not any(given):
            message = "this server needs an API key: send the header Authorization: Bearer KEY"
        asks = {"www-authenticate": "Bearer"}
        raise APIError(message, status=401, code="invalid_api_key", headers=asks)


def host_name(header: str) -> str | None:
    """Return the name or address in a header Host, in lower case without port and brackets; None if it is malformed."""
    match = _HOST.fullmatch(header.lower())
    return match["name"].strip("[]") if match else None


def _address(name: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address | None:
    try:
        return ipaddress.ip_address(name)
    except ValueError:
        return None


class Gate:
    """Refuses requests by Host and Origin before anything else sees them, and sends `HEADERS` with every answer."""

    def __init__(self, app: "ASGIApp", access: Access, metrics: Metrics) -> None:
        self.app = app
        self.access = access
        self.metrics = metrics

    async def __call__(self, scope: "Scope", receive: "Receive", send: "Send") -> None:
        """Answer one request."""
        from starlette.datastructures import Headers

        if scope["type"] != "http":  # the beginning and the end of the server
            await self.app(scope, receive, send)
            return

        async def send_guarded(message: "Message") -> None:
            if message["type"] == "http.response.start":
                fixed = [(name.encode(), value.encode()) for name, value in HEADERS.items()]
                message["headers"] = [*message.get("headers", ()), *fixed]
            await send(message)

        headers = Headers(scope=scope)
        host = headers.get("host")
        origin = headers.get("origin")
        refusal = None
        if not self.access.knows_host(host):
            refusal = f"the server is not known as {host!r:.80}; start it with --allowed-host NAME to allow a name"
        elif not self.access.knows_origin(origin, host):
            refusal = f"pages of {origin!r:.80} may not use this server; start it with --allow-origin ORIGIN to allow one"
        if refusal is None:
            await self.app(scope, receive, send_guarded)
            return
        self.metrics.count("minglm_requests_total", endpoint="other", status=403)
        error = APIError(refusal, status=403, kind="permission_error")
        response = error_response(error, scope["path"])
        await response(scope, receive, send_guarded)
