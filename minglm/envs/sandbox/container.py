"""Run one command of a repository in a container, through the socket of Docker or Podman (paper 3.5: isolated sandboxes).

    Container("python:3.11").run(["python", "-m", "pytest"], folder, 60)    ->  CommandResult("ended", 0, "... 12 passed")

The same protocol as `command.run_command`, for repositories whose tests need a system of their own. Over
HTTP, as Docker's Engine API 1.41 has it and Podman too:

    GET    /images/IMAGE/json                   is it there? nothing is pulled
    POST   /containers/create                   the folder at /work, no network, a read-only root, limits
    POST   /containers/ID/start
    POST   /containers/ID/wait                  until it ends; at the deadline POST /containers/ID/kill
    GET    /containers/ID/logs                  frames of [stream, 0, 0, 0, length (4 bytes, big-endian)] and text
    DELETE /containers/ID?force=1&v=1           whatever happened

DOCKER_HOST=unix:///PATH names the socket; otherwise it is looked for where Docker and Podman have it.

Choices
- One container a command, so that nothing of one episode is left for the next.
- A daemon that fails (a connection that breaks, a status of 500) is asked once more, in a new container. Then the result is
  "infrastructure", which is not the model's fault. What will not change by asking again (no socket, no permission, no image)
  is a ValueError of one line.
- Podman without root gives the user another number inside; "keep-id" keeps it, so that the folder can be written.

Simplified: the daemon runs on this machine, since it must see the folder.
"""

import contextlib
import http.client
import json
import os
import socket
import struct
import urllib.parse
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from minglm.envs.sandbox.command import OUTPUT, CommandResult, CommandStatus

JSONObject = dict[str, Any]

API = "/v1.41"
FOLDER = "/work"
"""Where the container has the repository."""
MEMORY = 4 * 2**30
PROCESSES = 256
CALL_SECONDS = 60.0
"""After so long without an answer a daemon has failed."""
FRAME = struct.Struct(">BxxxL")
"""Head of a piece of the log: which stream, how many bytes."""
ATTEMPTS = 2


class DaemonFailed(Exception):
    """The daemon broke off or failed, which it may not do the next time."""


FAILURES = (DaemonFailed, LookupError, ValueError)
"""What `Daemon.call` raises, but for the deadline."""


@dataclass(frozen=True)
class Container:
    """Runs commands in fresh containers of an image."""

    image: str

    def run(self, command: list[str], folder: Path, seconds: float) -> CommandResult:
        """Run a command in a folder, where alone it may write, beside /tmp.

        seconds: wall clock, after which the container is killed. Raises ValueError, in one line, where there
        is no daemon, or no such image.
        """
        problem = ""
        for _ in range(ATTEMPTS):
            try:
                daemon = Daemon(find_socket())
                daemon.check_image(self.image)
                return daemon.run(self.body(daemon, command, folder), seconds)
            except (DaemonFailed, LookupError) as failure:  # the latter: a container that is gone
                problem = str(failure)
        return CommandResult(CommandStatus.INFRASTRUCTURE, -1, problem)

    def body(self, daemon: "Daemon", command: list[str], folder: Path) -> JSONObject:
        """Return what a container is created from."""
        user, group = os.getuid(), os.getgid()
        return {
            "Image": self.image,
            "Cmd": command,
            "Entrypoint": [],
            "WorkingDir": FOLDER,
            "User": f"{user}:{group}",
            "Env": [
                "HOME=/tmp",
                "LANG=C.UTF-8",
                "PYTHONDONTWRITEBYTECODE=1",
                "PYTHONHASHSEED=0",
            ],
            "NetworkDisabled": True,
            "HostConfig": {
                "Binds": [f"{folder.resolve()}:{FOLDER}:rw"],
                "NetworkMode": "none",
                "ReadonlyRootfs": True,
                "Tmpfs": {"/tmp": "rw,size=256m"},
                "CapDrop": ["ALL"],
                "SecurityOpt": ["no-new-privileges"],
                "Memory": MEMORY,
                "MemorySwap": MEMORY,
                "PidsLimit": PROCESSES,
                "Init": True,  # ends what the command leaves behind
                "UsernsMode": "keep-id" if user and daemon.is_podman() else "",
                "LogConfig": {"Type": "json-file", "Config": {"max-size": "10m"}},
            },
        }


class Daemon:
    """Docker's or Podman's service behind a socket."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def run(self, body: JSONObject, seconds: float) -> CommandResult:
        """Create a container, run it to its end or for so long, and remove it."""
        name = self.call("POST", "/containers/create", body)["Id"]
        try:
            self.call("POST", f"/containers/{name}/start")
            try:
                ended = self.call("POST", f"/containers/{name}/wait", seconds=seconds)
            except TimeoutError:
                with contextlib.suppress(*FAILURES):  # it may have ended this moment
                    self.call("POST", f"/containers/{name}/kill")
                return CommandResult(CommandStatus.TIMEOUT, -1, self.log(name))
            return CommandResult(CommandStatus.ENDED, ended["StatusCode"], self.log(name))
        finally:
            with contextlib.suppress(*FAILURES):
                self.call("DELETE", f"/containers/{name}?force=1&v=1")

    def check_image(self, image: str) -> None:
        """Raise ValueError for an image that the daemon does not have."""
        try:
            self.call("GET", f"/images/{urllib.parse.quote(image, safe='/:@')}/json")
        except LookupError:
            raise ValueError(
                f"container = {image}: the daemon at {self.path} has no such image; pull it first"
            ) from None

    def is_podman(self) -> bool:
        """Return whether the daemon is Podman."""
        parts = self.call("GET", "/version").get("Components") or []
        return any(part.get("Name") == "Podman Engine" for part in parts)

    def log(self, name: str) -> str:
        """Return the end of what a container has printed."""
        path = f"/containers/{name}/logs?stdout=1&stderr=1"
        kept = b""
        with self.asked("GET", path) as response:
            while len(head := response.read(FRAME.size)) == FRAME.size:
                _, size = FRAME.unpack(head)
                kept = (kept + response.read(size))[-OUTPUT:]
        return kept.decode("utf-8", "replace")

    def call(
        self, verb: str, path: str, body: JSONObject | None = None, seconds: float = CALL_SECONDS
    ) -> JSONObject:
        """Call the daemon, and return its answer.

        Raises TimeoutError after so many seconds of waiting for a container, and `FAILURES`: LookupError for
        what is not there, ValueError, in one line, for what will not change by asking again.
        """
        try:
            with self.asked(verb, path, body, seconds) as response:
                content = response.read()
        except TimeoutError:
            # Of everything else a daemon knows the answer at once.
            if path.endswith("/wait"):
                raise
            raise DaemonFailed(f"{self.path}: no answer in {seconds:g} seconds") from None
        if not content:
            return {}
        try:
            return json.loads(content)
        except ValueError:
            raise DaemonFailed(f"{self.path}: {path} answers with no JSON") from None

    @contextlib.contextmanager
    def asked(
        self, verb: str, path: str, body: JSONObject | None = None, seconds: float = CALL_SECONDS
    ) -> Iterator[http.client.HTTPResponse]:
        """Yield the response to a request. Errors: as `call`."""
        connection = SocketConnection(self.path, seconds)
        headers = {"Content-Type": "application/json"} if body is not None else {}
        content = None if body is None else json.dumps(body)
        try:
            connection.request(verb, API + path, content, headers)
            response = connection.getresponse()
            if response.status >= 400:
                reason = f"{self.path}: status {response.status}: {_message(response.read())}"
                if response.status == 404:
                    raise LookupError(reason)
                raise DaemonFailed(reason) if response.status >= 500 else ValueError(reason)
            yield response
        except PermissionError:
            raise ValueError(
                f"{self.path}: this user may not use it; join its group, or run Podman without root"
            ) from None
        except (FileNotFoundError, ConnectionRefusedError):
            raise ValueError(f"{self.path}: no daemon listens; start Docker or Podman") from None
        except TimeoutError:
            raise
        except (OSError, http.client.HTTPException) as error:
            raise DaemonFailed(f"{self.path}: {error or type(error).__name__}") from None
        finally:
            connection.close()


class SocketConnection(http.client.HTTPConnection):
    """HTTP over a Unix socket."""

    def __init__(self, path: Path, seconds: float) -> None:
        super().__init__("localhost", timeout=seconds)
        self.path = path

    def connect(self) -> None:
        """Connect to the socket."""
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.sock.settimeout(self.timeout)
        self.sock.connect(str(self.path))


def _message(content: bytes) -> str:
    """Return what an error of the daemon says, in one line."""
    try:
        said = str(json.loads(content)["message"])
    except (ValueError, LookupError, TypeError):
        said = content.decode("utf-8", "replace")
    return " ".join(said.split())[:200]


def find_socket() -> Path:
    """Return the socket of the daemon. Raises ValueError, in one line, where there is none."""
    named = os.environ.get("DOCKER_HOST", "")
    if named:
        if not named.startswith("unix://"):
            raise ValueError(
                f"DOCKER_HOST = {named}: the daemon must be on this machine, unix:///PATH, since it must see the folder"
            )
        return Path(named.removeprefix("unix://"))
    places = [Path("/var/run/docker.sock"), Path("/run/podman/podman.sock")]
    if runtime := os.environ.get("XDG_RUNTIME_DIR"):
        places += [Path(runtime) / "docker.sock", Path(runtime) / "podman" / "podman.sock"]
    for place in places:
        if place.exists():
            return place
    raise ValueError(
        "no socket of Docker or Podman was found; start one, or name it by DOCKER_HOST=unix:///PATH"
    )
