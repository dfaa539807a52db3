"""Commands in containers: a fake daemon on a Unix socket checks every field of every request, and runs the command itself."""

import contextlib
import http.server
import itertools
import json
import os
import socketserver
import struct
import subprocess
import sys
import threading
from pathlib import Path
from urllib.parse import unquote

import pytest

from minglm.envs.sandbox import container
from minglm.envs.sandbox.container import OUTPUT, Container, find_socket
from minglm.envs.swe.repository import git
from minglm.envs.swe.users import UserRepository

IMAGE = "python:3.11"


class Daemon:
    """What the fake daemon knows and is told.

    change(verb, path) may return a status in the place of an answer, or "break" to hang up; `running` are the processes by
    the container's id, `requests` all requests in order.
    """

    def __init__(self, change=lambda verb, path: None, podman=False):
        self.change, self.podman = change, podman
        self.requests = []
        self.created = {}
        self.running = {}
        self.outputs = {}
        self.lock = threading.Lock()
        self.numbers = itertools.count()

    def output(self, name):
        """Wait for the end of a container. Return what it has printed, by stream."""
        with self.lock:
            if name not in self.outputs:
                self.outputs[name] = self.running[name].communicate()
        return self.outputs[name]

    def answer(self, verb, path, body):
        """Return (status, object or bytes)."""
        if path == "/version":
            name = "Podman Engine" if self.podman else "Engine"
            return 200, {"Components": [{"Name": name}]}
        if verb == "GET" and path.startswith("/images/"):
            found = unquote(path) == f"/images/{IMAGE}/json"
            return (200, {"Id": "sha256:1"}) if found else (404, {"message": "No such image"})
        if (verb, path) == ("POST", "/containers/create"):
            name = f"c{next(self.numbers)}"
            self.created[name] = body
            return 201, {"Id": name, "Warnings": []}
        _, _, name, *rest = path.partition("?")[0].split("/")
        asked = (verb, *rest)
        if asked == ("POST", "start"):
            self.start(name)
            return 204, b""
        if asked == ("POST", "wait"):
            self.output(name)
            return 200, {"StatusCode": self.running[name].returncode}
        if asked == ("POST", "kill"):
            self.running[name].kill()
            return 204, b""
        if asked == ("GET", "logs"):
            assert path.endswith("?stdout=1&stderr=1")
            return 200, b"".join(
                struct.pack(">BxxxL", stream, len(text)) + text
                for stream, text in zip((1, 2), self.output(name))
            )
        assert asked == ("DELETE",) and path.endswith("?force=1&v=1"), (verb, path)
        del self.created[name]
        return 204, b""

    def start(self, name):
        """Run the command of a container, in the folder that is bound to /work."""
        body = self.created[name]
        (bind,) = body["HostConfig"]["Binds"]
        folder, inside, mode = bind.split(":")
        assert (inside, mode) == (body["WorkingDir"], "rw") == ("/work", "rw")
        command = [sys.executable if word == "python" else word for word in body["Cmd"]]
        pipe = subprocess.PIPE
        self.running[name] = subprocess.Popen(command, cwd=folder, stdout=pipe, stderr=pipe)


class Server(socketserver.ThreadingMixIn, socketserver.UnixStreamServer):
    """HTTP on a Unix socket."""

    daemon_threads = True
    request_queue_size = 64

    def handle_error(self, request, client_address):
        """Say nothing: a client that no longer waits has hung up, and what a handler asserts breaks the connection."""


@contextlib.contextmanager
def listening(daemon, path, monkeypatch):
    """Let the fake daemon listen on a socket, which DOCKER_HOST names."""

    class Handler(http.server.BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def answer(self):
            size = int(self.headers.get("content-length") or 0)
            content = self.rfile.read(size)
            assert self.path.startswith("/v1.41/")
            asked = self.path.removeprefix("/v1.41")
            daemon.requests.append((self.command, asked))
            changed = daemon.change(self.command, asked)
            if changed == "break":
                self.close_connection = True
                return
            if changed is not None:
                status, found = changed, {"message": "on\npurpose"}
            else:
                status, found = daemon.answer(
                    self.command, asked, json.loads(content) if content else None
                )
            data = found if isinstance(found, bytes) else json.dumps(found).encode()
            self.send_response(status)
            if status != 204:
                self.send_header("content-length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        do_GET = do_POST = do_DELETE = answer

        def address_string(self):
            return "a socket"

        def log_message(self, format, *words):
            """Say nothing."""

    monkeypatch.setenv("DOCKER_HOST", f"unix://{path}")
    server = Server(str(path), Handler)
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    try:
        yield daemon
    finally:
        server.shutdown()
        server.server_close()
        for process in daemon.running.values():
            process.kill()
            process.wait()


@pytest.fixture
def listen(tmp_path, monkeypatch):
    """Return a function that lets a daemon listen."""
    return lambda daemon: listening(daemon, tmp_path / "docker.sock", monkeypatch)


def test_every_field_of_a_container(listen, tmp_path):
    """No network, nothing but the folder and /tmp to write, limits, the user's own number; afterwards it is removed."""
    seen = []
    with listen(Daemon(lambda verb, path: seen.extend(daemon.created.values()))) as daemon:
        result = Container(IMAGE).run(["python", "-c", "print('hello')"], tmp_path, 30)
    assert result == ("ended", 0, "hello\n")
    assert seen[0] == {
        "Image": IMAGE,
        "Cmd": ["python", "-c", "print('hello')"],
        "Entrypoint": [],
        "WorkingDir": "/work",
        "User": f"{os.getuid()}:{os.getgid()}",
        "Env": ["HOME=/tmp", "LANG=C.UTF-8", "PYTHONDONTWRITEBYTECODE=1", "PYTHONHASHSEED=0"],
        "NetworkDisabled": True,
        "HostConfig": {
            "Binds": [f"{tmp_path}:/work:rw"],
            "NetworkMode": "none",
            "ReadonlyRootfs": True,
            "Tmpfs": {"/tmp": "rw,size=256m"},
            "CapDrop": ["ALL"],
            "SecurityOpt": ["no-new-privileges"],
            "Memory": 4 * 2**30,
            "MemorySwap": 4 * 2**30,
            "PidsLimit": 256,
            "Init": True,
            "UsernsMode": "",
            "LogConfig": {"Type": "json-file", "Config": {"max-size": "10m"}},
        },
    }
    verbs = [("GET", f"/images/{IMAGE}/json"), ("POST", "/containers/create")]
    verbs += [("POST", "/containers/c0/start"), ("POST", "/containers/c0/wait")]
    verbs += [("GET", "/containers/c0/logs?stdout=1&stderr=1")]
    verbs += [("DELETE", "/containers/c0?force=1&v=1")]
    assert [request for request in daemon.requests if request[1] != "/version"] == verbs
    assert daemon.created == {}


@pytest.mark.parametrize(("podman", "user", "mode"), [(True, 7, "keep-id"), (False, 7, "")])
def test_podman_without_root_keeps_the_users_number(
    listen, tmp_path, monkeypatch, podman, user, mode
):
    """Otherwise the folder could not be written."""
    monkeypatch.setattr(os, "getuid", lambda: user)
    with listen(Daemon(podman=podman)) as daemon:
        body = Container(IMAGE).body(container.Daemon(find_socket()), ["true"], tmp_path)
    assert body["HostConfig"]["UsernsMode"] == mode and body["User"].startswith("7:")
    assert daemon.requests == [("GET", "/version")]


def test_how_a_command_ends(listen, tmp_path):
    """Its status and the end of both streams; at the deadline it is killed, with what it had printed until then."""
    loud = f"import sys; print('x' * {2 * OUTPUT}); print('end', file=sys.stderr); sys.exit(3)"
    slow = ["sh", "-c", "echo begun; exec sleep 600"]
    with listen(Daemon()) as daemon:
        status, code, output = Container(IMAGE).run(["python", "-c", loud], tmp_path, 30)
        assert (status, code, len(output), output[-5:]) == ("ended", 3, OUTPUT, "\nend\n")
        found = Container(IMAGE).run(slow, tmp_path, 4.0)
        assert found == ("timeout", -1, "begun\n")
        assert ("POST", "/containers/c1/kill") in daemon.requests and daemon.created == {}


def once(step, outcome):
    """Return a change that spoils the first request to a step."""
    left = [outcome]

    def change(verb, path):
        return left.pop() if left and step in f"{verb} {path}" else None

    return change


@pytest.mark.parametrize("step", ["create", "start", "wait", "logs", "images"])
@pytest.mark.parametrize("outcome", [500, "break"])
def test_a_daemon_that_fails_once_costs_nothing(listen, tmp_path, step, outcome):
    """The command is run once more, in a new container, and no container stays; a failed removal is no failure."""
    with listen(Daemon(once(step, outcome))) as daemon:
        assert Container(IMAGE).run(["true"], tmp_path, 30) == ("ended", 0, "")
        assert daemon.created == {}
    with listen_again(listen, tmp_path, once("DELETE", 500)):
        assert Container(IMAGE).run(["true"], tmp_path, 30).status == "ended"


def listen_again(listen, tmp_path, change):
    """Let another daemon listen on the socket."""
    (tmp_path / "docker.sock").unlink()
    return listen(Daemon(change))


@pytest.mark.parametrize("outcome", [500, "break", 404])
def test_a_daemon_that_keeps_failing_is_an_infrastructure_failure(listen, tmp_path, outcome):
    """After the second time, in one line that names the socket."""
    with listen(Daemon(lambda verb, path: outcome if "start" in path else None)) as daemon:
        status, _, output = Container(IMAGE).run(["true"], tmp_path, 30)
    assert status == "infrastructure" and "\n" not in output and "docker.sock" in output
    assert daemon.created == {}
    assert sum("start" in path for _, path in daemon.requests) == 2


def test_what_asking_again_does_not_change_is_one_line(listen, tmp_path, monkeypatch):
    """No image, a refused field, no permission, no daemon, another machine: each names what to do."""
    with listen(Daemon()), pytest.raises(ValueError, match="has no such image; pull it first"):
        Container("other").run(["true"], tmp_path, 30)
    with listen_again(listen, tmp_path, once("create", 400)) as daemon:
        with pytest.raises(ValueError, match=r"docker\.sock: status 400: on purpose$"):
            Container(IMAGE).run(["true"], tmp_path, 30)
        monkeypatch.setattr(container.SocketConnection, "connect", _forbidden)
        with pytest.raises(ValueError, match="this user may not use it"):
            Container(IMAGE).run(["true"], tmp_path, 30)
        monkeypatch.undo()
    monkeypatch.setenv("DOCKER_HOST", f"unix://{tmp_path / 'none'}")
    with pytest.raises(ValueError, match="no daemon listens; start Docker or Podman"):
        Container(IMAGE).run(["true"], tmp_path, 30)
    monkeypatch.setenv("DOCKER_HOST", "tcp://10.0.0.1:2375")
    with pytest.raises(ValueError, match="must be on this machine"):
        find_socket()
    monkeypatch.delenv("DOCKER_HOST")
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    monkeypatch.setattr(Path, "exists", lambda path: False)
    with pytest.raises(ValueError, match="no socket of Docker or Podman was found"):
        find_socket()
    assert daemon.created == {}


def _forbidden(connection):
    raise PermissionError(13, "Permission denied")


def test_a_repository_whose_tests_run_in_containers(listen, tmp_path):
    """`&container=IMAGE` in the environment's name: failing and passing tests are found by what the container prints."""
    place = tmp_path / "repository"
    place.mkdir()
    (place / "double.py").write_text("def double(x):\n    return x + x + 1\n")
    (place / "test_double.py").write_text(
        "import unittest\nfrom double import double\n\n\nclass Tests(unittest.TestCase):\n"
        "    def test_two(self):\n        self.assertEqual(double(2), 4)\n\n"
        "    def test_kind(self):\n        self.assertIsInstance(double(2), int)\n"
    )
    (tmp_path / "issue.txt").write_text("double(2) is 5")
    git(place, "init", "--quiet")
    git(place, "add", ".")
    git(place, "commit", "--quiet", "-m", "first")
    name = f"swe:{place}?issue={tmp_path / 'issue.txt'}&tests=python -m unittest -v"
    with listen(Daemon()) as daemon:
        found = UserRepository(f"{name}&container={IMAGE}")
        assert daemon.running["c0"].args[1:] == ["-m", "unittest", "-v"]
    assert ["two" in test for test in (*found.failing, *found.passing)] == [True, False]
    with listen_again(listen, tmp_path, lambda verb, path: 500 if "start" in path else None):
        with pytest.raises(ValueError, match="status 500") as raised:
            UserRepository(f"{name}&container={IMAGE}")
        assert "\n" not in str(raised.value) and name in str(raised.value)
