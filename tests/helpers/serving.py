"""Servers for tests: a model that says what it is told to behind the step-wise engine, and a server on a free port."""

import contextlib
import itertools
import threading
import time
from functools import lru_cache

import httpx
from helpers.scripted import byte_tokenizer, spelled

from minglm.inference.request import Event, FinishReason
from minglm.serve.app import create_app
from minglm.serve.listener import serve
from minglm.serve.requests import ServedModel

TOKENIZER = byte_tokenizer()


@lru_cache(maxsize=64)
def _ids(answer):
    """The ids of an answer, which is asked for at every step."""
    return spelled(TOKENIZER, answer)


class Script:
    """An engine whose answers are a function of the prompt: script(text of the prompt) -> text, or an exception.

    Each step gives each open request one token. `pause` is how long a step takes; `prompts` is what it was asked.
    """

    def __init__(self, script, pause=0.0):
        self.script = script
        self.pause = pause
        self.prompts = []
        self.lock = threading.Condition()
        self.numbers = itertools.count()
        self.open = {}
        self.cancelled = []

    def submit(self, request, on_event=None):
        """Queue a request."""
        prompt = TOKENIZER.decode(request.prompt)
        self.prompts.append(prompt)
        with self.lock:
            number = next(self.numbers)
            self.open[number] = (request, on_event, [])
            self.lock.notify_all()
        return number

    def prepare(self, request):
        """Do nothing: a script is held to no grammar."""

    def cancel(self, number):
        """Forget a request."""
        with self.lock:
            self.cancelled += [number] * (number in self.open)
            return self.open.pop(number, None) is not None

    def wait(self, timeout=None):
        """Wait for something to do."""
        with self.lock:
            return bool(self.lock.wait_for(lambda: self.open, timeout))

    def step(self):
        """Give one token to everyone; a script that raises fails the step, and all that is under way."""
        time.sleep(self.pause)
        for number, (request, on_event, said) in list(self.open.items()):
            answer = self.script(TOKENIZER.decode(request.prompt))
            if isinstance(answer, Exception):
                lost = self.open
                self.open = {}
                for failed, (_, listener, _) in lost.items():  # as the engine does
                    listener(Event(failed, None, finish_reason=FinishReason.ERROR))
                raise answer
            ids = _ids(answer)
            token = ids[len(said)]
            said.append(token)
            stopped = token in TOKENIZER.stop_ids
            full = len(said) >= request.max_new_tokens or len(said) == len(ids)
            end = FinishReason.STOP if stopped else FinishReason.LENGTH if full else None
            if end is not None:
                self.open.pop(number, None)
            top = tuple((other, -1.0 - other) for other in range(request.top_logprobs))
            on_event(Event(number, token, -0.5, top, end))


@contextlib.contextmanager
def running(engine, tokenizer=TOKENIZER, limit=4096, access=None, **options):
    """Yield (http client, OpenAI client, the app's service) of a server in a thread of its own."""
    from openai import OpenAI  # takes a second to import, which a process that only serves saves

    limits = {
        name: options.pop(name)
        for name in ("max_open_requests", "max_body_bytes", "load_weights", "take_weights")
        if name in options
    }
    app = create_app(engine, ServedModel(tokenizer, "tiny", limit, **options), access, **limits)
    found = []
    ready = threading.Event()

    def run():
        serve(app, port=0, ready=lambda url: (found.append(url), ready.set()))

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    assert ready.wait(60)
    with httpx.Client(base_url=found[0], timeout=60) as client:
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline:
            with contextlib.suppress(httpx.TransportError):
                if client.get("/health").status_code == 200:
                    break
            time.sleep(0.02)
        openai = OpenAI(
            base_url=found[0] + "/v1",
            api_key=(access and access.key) or "none",
            max_retries=0,
            timeout=60,
        )
        try:
            yield client, openai, app.state.service
        finally:
            openai.close()
            app.state.server.should_exit = True
            thread.join(timeout=60)


def settled(condition, seconds=120):
    """Tell whether a condition comes true within some seconds."""
    deadline = time.monotonic() + seconds
    # Asked once a turn: what was true a moment ago may be false when it is asked again.
    while not (is_met := condition()) and time.monotonic() < deadline:
        time.sleep(0.01)
    return is_met
