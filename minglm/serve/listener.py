"""Listen, accept, and stop: what uvicorn leaves open towards strangers (no section in the paper).

    accept      pauses while the process has no descriptor left, and says so once a minute
    headers     a client that does not send the whole head of a request within HEAD_SECONDS is hung up on
    signals     the first ends every open answer with an error, and then the server, status 0; the second ends the process

asyncio's own accepting tries 2,048 times a second when descriptors run out, and reports each failure with a
traceback. uvicorn bounds the time between two requests, but not that of a half-sent one, and it cuts streams
off when it stops.
"""

import asyncio
import contextlib
import os
import socket
import sys
import time
from collections.abc import Callable, Generator
from types import FrameType
from typing import TYPE_CHECKING

from minglm.common.signals import handled

if TYPE_CHECKING:  # uvicorn and starlette are optional packages, imported where they are used
    import uvicorn
    from starlette.applications import Starlette
    from uvicorn.protocols.http.h11_impl import H11Protocol

HEAD_SECONDS = 10
GRACE_SECONDS = 3  # for clients that read slowly, when the server stops
KEEP_ALIVE_SECONDS = 60
PAUSE_SECONDS = 0.5  # before accepting again
SAY_SECONDS = 60  # from one line about a lack of descriptors to the next
BACKLOG = 2048  # connections that wait to be accepted


def serve(
    app: "Starlette",
    host: str = "127.0.0.1",
    port: int = 8000,
    ready: Callable[[str], None] | None = None,
) -> None:
    """Answer requests until Ctrl-C, SIGTERM or SIGHUP. ready(url) is called before the first.

    Raises ValueError for a port in use.
    """
    import uvicorn

    listening = listen(host, port)
    if ready is not None:
        ready(url_of(listening))
    config = uvicorn.Config(
        app,
        ws="none",
        log_level="error",
        access_log=False,
        server_header=False,
        proxy_headers=False,
        timeout_graceful_shutdown=GRACE_SECONDS,
        timeout_keep_alive=KEEP_ALIVE_SECONDS,
    )
    # Code that runs this in a thread stops it with app.state.server.should_exit = True.
    app.state.server = answer_server(config, listening, app.state.service.stop)
    app.state.server.run()


def listen(host: str, port: int) -> socket.socket:
    """Return a listening socket.

    Raises ValueError for a port in use, or an address that is not this machine's.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        listening = socket.create_server((host, port), family=family, backlog=BACKLOG)
    except (OSError, OverflowError) as error:
        message = f"cannot listen on {host}:{port}: {error}; choose another --port or --host"
        raise ValueError(message) from None
    listening.setblocking(False)
    return listening


def url_of(listening: socket.socket) -> str:
    """Return an address for the browser of this machine."""
    host: str
    host, port = listening.getsockname()[:2]
    # Browsers do not take what stands for all addresses.
    host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def connection_class() -> "type[H11Protocol]":
    """Return uvicorn's connection, with a limit on the time in which a request must begin."""
    from uvicorn.protocols.http.h11_impl import H11Protocol

    class Connection(H11Protocol):
        """Hangs up HEAD_SECONDS after the first byte for which no request is being answered.

        So it does with a connection without any byte, and with the body of a request that was refused unread.
        """

        deadline: asyncio.TimerHandle | None = None

        def connection_made(self, transport: asyncio.Transport) -> None:
            super().connection_made(transport)
            self._watch()

        def data_received(self, data: bytes) -> None:
            super().data_received(data)
            self._watch()

        def on_response_complete(self) -> None:
            super().on_response_complete()
            if self.conn.trailing_data[0]:  # part of the next request has come already
                self._watch()

        def connection_lost(self, exc: Exception | None) -> None:
            super().connection_lost(exc)
            self._forget()

        def _watch(self) -> None:
            """Set the deadline if bytes are owed, and lift it while a request is being answered."""
            if self.cycle is not None and not self.cycle.response_complete:
                self._forget()
            elif self.deadline is None:
                self.deadline = self.loop.call_later(HEAD_SECONDS, self.transport.close)

        def _forget(self) -> None:
            if self.deadline is not None:
                self.deadline.cancel()
                self.deadline = None

    return Connection


def answer_server(
    config: "uvicorn.Config", listening: socket.socket, stop: Callable[[], None]
) -> "uvicorn.Server":
    """Return uvicorn's server with an accepting of our own. stop() is called before it waits for open answers."""
    import uvicorn

    connection = connection_class()

    class AnswerServer(uvicorn.Server):
        """Accepts, and stops, as the module says."""

        async def startup(self, sockets: list[socket.socket] | None = None) -> None:
            await super().startup(sockets=[])
            self.accepting = asyncio.create_task(accept(listening, self._connection))

        async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
            print("minglm serve: stopping", file=sys.stderr, flush=True)
            self.accepting.cancel()
            await asyncio.gather(self.accepting, return_exceptions=True)
            listening.close()
            stop()
            await super().shutdown()

        @contextlib.contextmanager
        def capture_signals(self) -> Generator[None, None, None]:
            with handled(self.handle_exit):
                yield

        def handle_exit(self, sig: int, frame: FrameType | None) -> None:
            if self.should_exit:
                os._exit(128 + sig)  # nothing is lost: a server keeps nothing
            self.should_exit = True

        def _connection(self) -> asyncio.BaseProtocol:
            return connection(
                config=config, server_state=self.server_state, app_state=self.lifespan.state
            )

    return AnswerServer(config)


async def accept(listening: socket.socket, protocol: Callable[[], asyncio.BaseProtocol]) -> None:
    """Accept connections until cancelled; pause where the process may have no more descriptors."""
    loop = asyncio.get_running_loop()
    said = -float(SAY_SECONDS)
    while True:
        try:
            connection, _ = await loop.sock_accept(listening)
            await loop.connect_accepted_socket(protocol, connection)
        except ConnectionError:
            continue  # this client has gone already
        except OSError as error:
            if time.monotonic() - said >= SAY_SECONDS:
                said = time.monotonic()
                message = (
                    f"minglm serve: {error.strerror}: new clients wait; ulimit -n raises the limit"
                )
                print(message, file=sys.stderr, flush=True)
            await asyncio.sleep(PAUSE_SECONDS)
