"""Let outside agents play the tasks of a stage over HTTP: their calls become trajectories (paper 3.5: one endpoint).

    POST /sessions                        -> 200 {id, url, model, task}; 204 after a while without a task; 503 at the end
    POST {url}/chat/completions, /responses, /messages          as `serve` answers them; `minglm.rl.session` records
    POST /sessions/{id}/reward            {reward, parts, error} -> the episode ends

    OpenAI(base_url=session["url"], api_key="none").chat.completions.create(model=session["model"], ...)

Any framework that takes a base URL can be the agent, with tools and a world of its own. It runs in processes
of its own, started by the run (`rl.outside.command`) or by hand on any machine, and asks for work until the
endpoint is gone. The task that it gets holds the label, because the agent plays the world too and computes
the reward.

Choices
- The server has a thread with an event loop of its own; answers come from the generator in the loop of the rollout.
- The trainer decides how answers are sampled, because the loss must know it: a field that would change that is refused
  by name, except one that asks for what happens anyway.
- Nothing waits for ever. An agent that says nothing for `idle_seconds` loses its session: if the model has not been
  asked yet, the task goes to the next agent; otherwise the trajectory ends with status "infrastructure", and leaves the
  statistics with all its tokens. Agents that the run has started are started again when they end (`minglm.rl.agents`).

Simplified: there is no key. The server listens on this machine; a tunnel brings agents from elsewhere.
"""

import asyncio
import secrets
import threading
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from concurrent.futures import Future
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeGuard

from minglm.chat.messages import in_order_of_calls
from minglm.common.mistakes import one_line
from minglm.config import OutsideConfig
from minglm.data.tokenizer import Tokenizer
from minglm.envs.base import Misconfigured, Task, check_reward
from minglm.inference.request import AnswerFailed, Completion, Event
from minglm.rl.agents import Agents
from minglm.rl.episode import Player, SeedOfTurn, Trajectory
from minglm.rl.session import Session
from minglm.serve.access import Access, Gate
from minglm.serve.app import EventStreamResponse, disconnected, format_of, unless
from minglm.serve.bodies import ClientGone, check_type, parse_object, read_body
from minglm.serve.engine_thread import Stopping
from minglm.serve.errors import APIError, as_api_error
from minglm.serve.fields import refuse_unknown
from minglm.serve.formats import APIFormat, as_json, error_response
from minglm.serve.listener import listen, url_of
from minglm.serve.metrics import Metrics
from minglm.serve.requests import ServedModel
from minglm.serve.stream import AnswerStream

if TYPE_CHECKING:  # starlette is an optional package, imported where it is used
    from starlette.applications import Starlette
    from starlette.requests import Request as HTTPRequest
    from starlette.responses import Response

JSONObject = dict[str, Any]

MODEL = "policy"
"""What agents call the model."""
CLAIM_SECONDS = 20.0
"""An agent that asks for work waits so long, and asks again."""
MOST_CLAIMS = 3
"""Agents that may take a task and never ask the model."""
LARGEST_PART = 1e15
"""Size of a part of a reward: means of them are logged."""
MAX_BODY_BYTES = 8 << 20
JOIN_SECONDS = 5

FIELDS = frozenset(
    {
        *("model", "messages", "input", "instructions", "system", "tools", "tool_choice"),
        *("stream", "stream_options", "max_tokens", "max_completion_tokens", "max_output_tokens"),
        *("logprobs", "top_logprobs", "return_token_ids", "include", "text"),
        "parallel_tool_calls",
    }
)
"""What an agent may ask: everything else decides how answers are sampled, which is the trainer's."""


@dataclass(eq=False)
class Ticket:
    """A session from the rollout's side and from the agent's."""

    session: Session
    loop: asyncio.AbstractEventLoop
    """The rollout's, in which the generator answers."""
    outcome: "Future[Trajectory]" = field(default_factory=Future)
    id: str = field(default_factory=lambda: secrets.token_urlsafe(12))
    claims: int = 0
    open_calls: int = 0
    last_heard: float = 0.0
    """`time.monotonic` of the last request."""


class CompletedTokens:
    """The tokens of one completion, as a source that an `AnswerStream` reads."""

    def __init__(self, completion: Completion) -> None:
        self.completion = completion

    async def __aiter__(self) -> AsyncIterator[tuple[int, Event]]:
        """Yield the tokens, the last one with the reason why there are no more."""
        completion = self.completion
        forced = set(completion.forced)
        last = len(completion.tokens) - 1
        for place, token in enumerate(completion.tokens):
            yield (
                0,
                Event(
                    0,
                    token,
                    completion.logprobs[place],
                    completion.top_logprobs[place] if completion.top_logprobs else (),
                    completion.finish_reason if place == last else None,
                    forced=place in forced,
                ),
            )

    def cancel(self, index: int) -> None:
        """Do nothing: the completion is there."""

    def close(self) -> None:
        """Do nothing: nothing is held."""


class Endpoint:
    """The HTTP server, and the agents that it starts. An `OutsidePlayer`; close it, whatever happens.

    folder: where the agents' output goes. Raises ValueError for a port in use or a command that cannot be started.
    """

    def __init__(
        self, config: OutsideConfig, tokenizer: Tokenizer, max_model_len: int, folder: Path
    ) -> None:
        self.config = config
        self.served = ServedModel(tokenizer, MODEL, max_model_len, bare_tools=True, max_choices=1)
        self.tickets: dict[str, Ticket] = {}
        self.queue: asyncio.Queue[Ticket] = asyncio.Queue()
        self.metrics = Metrics()
        self.listening = listen("127.0.0.1", config.port)
        self.url = url_of(self.listening)
        self.loop = asyncio.new_event_loop()
        self.thread = threading.Thread(target=self._serve, name="endpoint", daemon=True)
        self.closing = threading.Event()
        """Set by the rollout's thread."""
        self.stopped = asyncio.Event()
        """Set by the server's thread: agents that wait for a task wait in vain."""
        self.agents: Agents | None = None
        if config.command:
            try:
                self.agents = Agents(config.command, config.processes, self.url, folder)
            except ValueError:
                self.listening.close()
                raise
        self.thread.start()

    # The rollout's side, in the loop of the rollout

    async def play(
        self, player: Player, task: Task, thinking: bool, seed_of_turn: SeedOfTurn
    ) -> Trajectory:
        """Have an agent play one task once, and return its trajectory."""
        session = Session(player, task, thinking, seed_of_turn)
        ticket = Ticket(session, asyncio.get_running_loop())
        self.loop.call_soon_threadsafe(self._offer, ticket)
        try:
            return await asyncio.wrap_future(ticket.outcome)
        finally:
            self.loop.call_soon_threadsafe(self.tickets.pop, ticket.id, None)

    def close(self) -> None:
        """Stop the server and the agents."""
        self.closing.set()
        self.thread.join(JOIN_SECONDS)
        if self.agents is not None:
            self.agents.close()

    # The server's side, in the thread of the endpoint

    def _offer(self, ticket: Ticket) -> None:
        self.tickets[ticket.id] = ticket
        self.queue.put_nowait(ticket)

    def _serve(self) -> None:
        import uvicorn

        config = uvicorn.Config(
            self._app(),
            ws="none",
            lifespan="off",
            log_level="error",
            access_log=False,
            server_header=False,
            proxy_headers=False,
            timeout_graceful_shutdown=1,
        )
        asyncio.set_event_loop(self.loop)
        server = uvicorn.Server(config)

        async def run() -> None:
            watch = asyncio.create_task(self._watch(server))
            await server.serve(sockets=[self.listening])
            watch.cancel()

        self.loop.run_until_complete(run())

    def _app(self) -> "Starlette":
        from starlette.applications import Starlette
        from starlette.exceptions import HTTPException
        from starlette.middleware import Middleware
        from starlette.routing import Route

        table = (
            ("POST", "/sessions", self.claim),
            ("POST", "/sessions/{id}/reward", self.reward),
            ("POST", "/sessions/{id}/v1/chat/completions", self.answer),
            ("POST", "/sessions/{id}/v1/responses", self.answer),
            ("POST", "/sessions/{id}/v1/messages", self.answer),
        )

        def unknown(request: "HTTPRequest", exception: Exception) -> "Response":
            paths = ", ".join(path for _, path, _ in table)
            error = APIError(f"no such path: {request.url.path:.80}; there are {paths}", status=404)
            return error_response(error, request.url.path)

        return Starlette(
            routes=[Route(path, guarded(handler), methods=[verb]) for verb, path, handler in table],
            middleware=[Middleware(Gate, access=Access(), metrics=self.metrics)],
            exception_handlers={HTTPException: unknown},
        )

    async def claim(self, request: "HTTPRequest") -> JSONObject | None:
        """Hand the next task to an agent; None after `CLAIM_SECONDS` without one."""
        waiting = asyncio.wait_for(self._next(), CLAIM_SECONDS)
        wanted = unless(disconnected(request.receive), waiting, ClientGone())
        try:
            ticket = await unless(self.stopped.wait(), wanted, Stopping())
        except TimeoutError:
            return None
        trajectory = ticket.session.trajectory
        return {
            "id": ticket.id,
            "url": f"{self.url}/sessions/{ticket.id}/v1",
            "model": MODEL,
            "task": {**asdict(trajectory.task), "messages": trajectory.messages},
        }

    async def _next(self) -> Ticket:
        """Wait for a task that is still wanted."""
        while True:
            ticket = await self.queue.get()
            if ticket.id in self.tickets:
                # Now, not when it is sent: the agent may leave in between, and would be waited for without end.
                ticket.claims += 1
                ticket.last_heard = time.monotonic()
                return ticket

    async def reward(self, request: "HTTPRequest") -> JSONObject:
        """End a session with the reward that the agent has computed, or with the agent's own failure."""
        ticket = self._ticket(request)
        body = await self._body(request)
        refuse_unknown(body, {"reward", "parts", "error"})
        error, value, parts = body.get("error"), body.get("reward"), body.get("parts") or {}
        if error is not None:
            self._end(ticket, ticket.session.fail(AgentFailed(one_line(str(error)))))
            return {"status": ticket.session.trajectory.score.status}
        if not _is_number(value):
            raise APIError("reward must be a number, or error must say what failed", "reward")
        if not isinstance(parts, dict) or not all(map(_is_part, parts.values())):
            raise APIError(f"parts must be an object of numbers up to {LARGEST_PART:g}", "parts")
        try:
            check_reward(value)
        except ValueError as mistake:
            raise APIError(str(mistake), "reward") from None
        trajectory = ticket.session.end(value, parts)
        self._end(ticket, trajectory)
        return {"status": trajectory.score.status, "reward": trajectory.score.value}

    async def answer(self, request: "HTTPRequest") -> "JSONObject | EventStreamResponse":
        """Answer a call of the model, and note it in the session's trajectory."""
        ticket = self._ticket(request)
        session = ticket.session
        answer_format = self._read(await self._body(request), request.url.path, session)
        if session.closed is not None:
            raise APIError(session.closed, status=409, code="session_closed")
        job, (asked,) = answer_format.job, answer_format.job.requests
        messages = in_order_of_calls(answer_format.chat["messages"])
        tools = [tool["function"] for tool in job.tools or ()]
        prompt = session.known_prompt(messages, tools) or asked.prompt
        if len(prompt) >= self.served.max_model_len:
            session.trajectory.truncated = True
            raise APIError(session.closed or "", "messages", code="context_length_exceeded")
        started = time.monotonic()
        own = session.ask(prompt, asked.max_new_tokens, asked.top_logprobs)
        answer_format.job = replace(job, requests=[own])
        ticket.open_calls += 1
        try:
            generated = asyncio.run_coroutine_threadsafe(
                session.player.generator.generate(own), ticket.loop
            )
            completion = await unless(
                disconnected(request.receive), _awaited(generated), ClientGone()
            )
        except AnswerFailed as failure:
            self._end(ticket, session.fail(failure))
            raise APIError(str(failure), status=500, kind="server_error") from None
        except ClientGone:
            raise
        except Exception as error:  # the generator is broken, and with it the rollout
            self._break(ticket, error)
            raise
        finally:
            ticket.open_calls -= 1
            ticket.last_heard = time.monotonic()
        if ticket.outcome.done():
            raise APIError("the session has ended while the model answered", status=404)
        session.note(prompt, completion, messages, tools)
        tokens = CompletedTokens(completion)
        stream = AnswerStream(
            tokens, answer_format.job, self.served.tokenizer, self.metrics, started
        )
        if job.stream:
            return EventStreamResponse(answer_format, stream, self.metrics)
        return await answer_format.whole(stream)

    def _read(self, body: JSONObject, path: str, session: Session) -> APIFormat:
        """Return a call in the words of its API. Raises `APIError` for what the trainer decides."""
        settings = session.player.settings
        for name in ("temperature", "top_p"):
            if body.get(name) == getattr(settings, name):
                body = {key: value for key, value in body.items() if key != name}
        refuse_unknown(body, FIELDS)
        answer_format = format_of(
            body | switch(path, session.trajectory.thinking), path, self.served
        )
        (asked,) = answer_format.job.requests
        if asked.changes_logits or not answer_format.job.parallel_tool_calls:
            raise APIError(
                "the trainer decides how answers are sampled, so none is held to a form: leave out a tool_choice that"
                " forces calls, parallel_tool_calls = false, strict tools and formats"
            )
        return answer_format

    def _ticket(self, request: "HTTPRequest") -> Ticket:
        """Return the session that a path names. Raises `APIError` 404."""
        ticket = self.tickets.get(request.path_params["id"])
        if ticket is None or ticket.outcome.done():
            raise APIError("there is no such session, or it has ended", status=404)
        ticket.last_heard = time.monotonic()
        return ticket

    async def _body(self, request: "HTTPRequest") -> JSONObject:
        check_type(request.headers.get("content-type", ""))
        return parse_object(await read_body(request, MAX_BODY_BYTES, _at_once))

    def _end(self, ticket: Ticket, trajectory: Trajectory) -> None:
        """Hand a trajectory to the rollout, unless nobody waits for it any more."""
        if self.tickets.pop(ticket.id, None) and ticket.outcome.set_running_or_notify_cancel():
            ticket.outcome.set_result(trajectory)
        if self.agents is not None:
            self.agents.starts = 0

    def _break(self, ticket: Ticket, error: Exception) -> None:
        """End the rollout of a session with an exception."""
        if self.tickets.pop(ticket.id, None) and ticket.outcome.set_running_or_notify_cancel():
            ticket.outcome.set_exception(error)

    async def _watch(self, server: Any) -> None:
        """Look after sessions that went silent and agents that ended, until the endpoint closes."""
        looked = time.monotonic()
        while not self.closing.is_set():
            await asyncio.sleep(min(0.1, self.config.idle_seconds / 4))
            now = time.monotonic()
            stood_still = now - looked > self.config.idle_seconds / 2  # Ctrl-Z: nothing was read
            looked = now
            for ticket in list(self.tickets.values()):
                if ticket.last_heard and stood_still:
                    ticket.last_heard = now
                silent = now - ticket.last_heard > self.config.idle_seconds
                if ticket.last_heard and silent and not ticket.open_calls:
                    self._give_up(ticket)
            if self.agents is not None and self.tickets:
                try:
                    self.agents.keep_running()
                except Misconfigured as error:
                    for ticket in list(self.tickets.values()):
                        self._break(ticket, error)
        self.stopped.set()
        server.should_exit = True

    def _give_up(self, ticket: Ticket) -> None:
        """Take a session from an agent that went silent: to the next one, or out of the statistics."""
        ticket.last_heard = 0.0
        calls = ticket.session.calls
        if calls == 0 and ticket.claims < MOST_CLAIMS:
            ticket.id = secrets.token_urlsafe(12)
            self.tickets = {each.id: each for each in self.tickets.values()}
            self.queue.put_nowait(ticket)
            return
        silence = (
            f"the agent has been silent for {self.config.idle_seconds:g} s after {calls} calls"
        )
        self._end(ticket, ticket.session.fail(AgentFailed(silence)))


class AgentFailed(Exception):
    """An outside agent did not finish its episode."""


def switch(path: str, thinking: bool) -> JSONObject:
    """Return the thinking switch in the words of the API that a path belongs to."""
    if path.endswith("/v1/responses"):
        return {"reasoning": {"enabled": thinking}}
    if path.endswith("/v1/messages"):
        return {"thinking": {"type": "enabled" if thinking else "disabled"}}
    return {"chat_template_kwargs": {"enable_thinking": thinking}}


def guarded(
    handler: Callable[["HTTPRequest"], Awaitable[Any]],
) -> Callable[["HTTPRequest"], Awaitable[Any]]:
    """Wrap a handler: objects become JSON, None becomes 204, exceptions become error objects."""
    from starlette.responses import Response

    async def handle(request: "HTTPRequest") -> Any:
        try:
            result = await handler(request)
        except ClientGone:
            return Response()
        except Exception as exception:
            return error_response(as_api_error(exception), request.url.path)
        if result is None:
            return Response(status_code=204)
        if not isinstance(result, dict):
            return result
        return Response(as_json(result), media_type="application/json")

    return handle


async def _awaited(generated: "Future[Completion]") -> Completion:
    return await asyncio.wrap_future(generated)


async def _at_once() -> None:
    """Let a large body in: agents are few, and known."""


def _is_number(value: Any) -> TypeGuard[float]:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _is_part(value: Any) -> bool:
    return _is_number(value) and abs(value) <= LARGEST_PART
