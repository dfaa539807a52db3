"""Define what RL and evaluation need of an inference engine, and provide it for our own engine (paper 3.5).

    completion = await generator.generate(request)      many callers at once; the engine batches them
    generator.update_weights(weights, version)          after an optimizer step
    generator.close()

Rollouts are coroutines, and each of them awaits its own completion. Whoever implements the three methods of
`Generator` can answer them: the engine of this process, or later a client of a server on other machines.
Nothing else of an engine is visible to RL, so an engine is replaced without a change to the rollouts.

Choices
- `EngineGenerator` steps the engine in the thread of the event loop, one step at a time. Between two steps it yields
  once to the loop, so every episode whose turn has just ended submits its next request before the next forward pass.
  All waiting requests therefore share one batch. An environment that waits in another thread delays only its episode.
- Every token carries the version of the weights that drew it: an answer under way when they change has several.
- The generator owns the stepping of its engine: nobody else may call `step` while a request of it is open.

Simplified: a forward pass blocks the event loop for its duration, which is a few milliseconds at toy size. A
remote engine does not have this property.
"""

import asyncio
from collections.abc import Mapping
from dataclasses import replace
from typing import Protocol

from torch import Tensor

from minglm.inference.engine import Engine
from minglm.inference.request import AnswerFailed, Completion, Event, FinishReason, Request


class Generator(Protocol):
    """Whatever continues prompts, token by token."""

    @property
    def version(self) -> int:
        """By which the tokens are marked that are drawn from now on."""
        ...

    @version.setter
    def version(self, value: int) -> None: ...

    @property
    def max_model_len(self) -> int:
        """Return the largest number of tokens of prompt and answer together."""
        ...

    async def generate(self, request: Request) -> Completion:
        """Answer one request.

        Raise ValueError for a request that cannot be answered, `AnswerFailed` if the engine fails at it."""
        ...

    def update_weights(self, weights: Mapping[str, Tensor], version: int = 0) -> None:
        """Use the weights of this state dict from now on; unfinished requests continue with them.

        version: by which the tokens they draw are marked.
        """
        ...

    def close(self) -> None:
        """Cancel unfinished requests and release what the generator holds."""
        ...


class EngineGenerator:
    """A `Generator` over an `Engine` of this process."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self.unfinished: dict[int, asyncio.Future[None]] = {}
        """The future of each unfinished request, by the engine's number of the request."""
        self.version = 0
        """Of the weights that the engine has now."""
        self.stepping: asyncio.Task[None] | None = None
        """The task that steps the engine while requests are unfinished."""

    @property
    def max_model_len(self) -> int:
        """Return the largest number of tokens of prompt and answer together."""
        return self.engine.limit

    async def generate(self, request: Request) -> Completion:
        """Answer one request, in one batch with all others that are unfinished.

        Raises ValueError for a request that cannot be answered, `AnswerFailed` for one that ended with an
        error of its own, and whatever a step of the engine raises.
        """
        finished: asyncio.Future[None] = asyncio.get_running_loop().create_future()

        def on_event(event: Event) -> None:
            if event.token is not None:
                completion.versions.append(self.version)
            if event.finish_reason is None or finished.done():
                return
            if event.error:
                finished.set_exception(AnswerFailed(event.error))
            elif event.finish_reason != FinishReason.ERROR:
                finished.set_result(None)
            # After the failure of a whole step `_step` sets the exception: it knows the cause.

        number = self.engine.submit(request, on_event)
        completion = self.engine.open[number].completion
        self.unfinished[number] = finished
        if self.stepping is None or self.stepping.done():
            self.stepping = asyncio.create_task(self._step())
        try:
            await finished
        except asyncio.CancelledError:
            self.engine.cancel(number)
            # The request leaves at the next step, and nobody else needs one.
            if len(self.unfinished) == 1:
                self.engine.step()
            raise
        finally:
            del self.unfinished[number]
        return completion

    async def _step(self) -> None:
        """Step the engine until no request is unfinished; hand an exception to all that wait."""
        # The future of a finished request stays in `unfinished` until its caller runs, hence the first line.
        await asyncio.sleep(0)
        while self.unfinished:
            try:
                self.engine.step()
            except Exception as error:
                for finished in self.unfinished.values():
                    if not finished.done():
                        finished.set_exception(error)
            # Yield once: callers whose answer is complete run now, and submit what comes next.
            await asyncio.sleep(0)

    def update_weights(self, weights: Mapping[str, Tensor], version: int = 0) -> None:
        """Use the weights of this state dict from now on; the tokens that they draw are marked with the version.

        If they are the tensors of the engine's own model, changed in place, nothing is copied.
        """
        own = self.engine.model.state_dict()
        shared = all(tensor.data_ptr() == own[name].data_ptr() for name, tensor in weights.items())
        self.engine.update_weights(None if shared else dict(weights))
        self.version = version

    def abort(self) -> None:
        """End every unfinished request at the next step; its caller gets what was sampled, with reason CANCELLED."""
        for number in self.unfinished:
            self.engine.cancel(number)

    def close(self) -> None:
        """Cancel unfinished requests. The engine and its model belong to the caller."""
        for number in list(self.unfinished):
            self.engine.cancel(number)


RESUMED = 7_368_787
"""A prime: a resumed answer draws other random numbers than it began with."""


class ResumingGenerator:
    """A `Generator` that aborts what is under way when new weights come, and asks for the rest of it.

    The beginning of an answer becomes the end of the prompt, so it is kept as it was sampled, with the
    log-probabilities and the version of the weights that drew it. An engine that keeps old keys and values
    would go on with these; after an abort the new weights have read all of the text.
    """

    def __init__(self, inner: EngineGenerator) -> None:
        self.inner = inner

    @property
    def version(self) -> int:
        """The version of the weights that the inner generator has now."""
        return self.inner.version

    @version.setter
    def version(self, value: int) -> None:
        self.inner.version = value

    @property
    def max_model_len(self) -> int:
        """Return the largest number of tokens of prompt and answer together."""
        return self.inner.max_model_len

    async def generate(self, request: Request) -> Completion:
        """Answer one request, in as many parts as there are updates meanwhile.

        Raises what the inner generator does.
        """
        assert request.thinking_budget is None, "a budget would begin anew with every part"
        answer = await self.inner.generate(request)
        while answer.finish_reason == FinishReason.CANCELLED:
            done = len(answer.tokens)
            rest = replace(
                request,
                prompt=request.prompt + answer.tokens,
                max_new_tokens=request.max_new_tokens - done,
                seed=(request.seed + RESUMED * done) % 2**62,
            )
            more = await self.inner.generate(rest)
            more.tokens[:0] = answer.tokens
            more.logprobs[:0] = answer.logprobs
            more.versions[:0] = answer.versions
            answer = more
        return answer

    def update_weights(self, weights: Mapping[str, Tensor], version: int = 0) -> None:
        """Abort what is under way, and use these weights from now on."""
        self.inner.abort()
        self.inner.update_weights(weights, version)

    def close(self) -> None:
        """Cancel unfinished requests."""
        self.inner.close()
