"""Turn sampled tokens into what an OpenAI client receives, token by token (no section in the paper).

    tokens -> StreamDecoder (chat) or TextDecoder -> stop strings -> deltas

A delta is what one token adds: {"reasoning_content"}, {"content"}, {"tool_calls"} or, for plain completions,
{"text"}. A response that is not streamed is the sum of its deltas, so the two cannot differ. A tool call
begins with its name, and fragments of its arguments follow. If it breaks after that, or if what was sent as
reasoning turns out to be the answer, a delta {"withdrawn"} names what no longer counts, and its text follows
as content. A stream has no way to take something back, so the mark is not sent; the choice names the fault in
`format_error`, a field that OpenAI's objects do not have and that their clients pass on. So it does with a
call that was repaired.
"""

import codecs
import math
import secrets
import time
from collections.abc import AsyncIterator, Iterable, Sequence
from enum import StrEnum
from typing import Any, NamedTuple, Protocol

from minglm.chat.parser import Delta as ParsedDelta
from minglm.chat.parser import DeltaKind
from minglm.chat.stream import StreamDecoder, TextDecoder
from minglm.data.tokenizer import Tokenizer
from minglm.inference.request import Event, FinishReason, PromptLogprob
from minglm.serve.metrics import Metrics
from minglm.serve.requests import Job

SMALLEST_LOGPROB = -9999.0
"""What is reported for less, as OpenAI does: JSON has no infinity."""

Delta = dict[str, Any]
"""What a token adds to a choice, in OpenAI's form, or {"withdrawn": a field whose last value no longer counts}."""


class ChoiceEnd(StrEnum):
    """OpenAI's `finish_reason` of a choice."""

    STOP = "stop"
    """A stop token or a stop string."""
    LENGTH = "length"
    """The limit of tokens."""
    TOOL_CALLS = "tool_calls"
    """A stop token after at least one tool call."""


class StopStrings:
    """Passes text on until the first stop string is complete; holds back what may become one.

    `hit` becomes True once one is complete. The first to end wins, not the first to begin, so that the result
    does not depend on how the text is split.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        self.stops = stops
        self.held = ""
        self.hit = False
        self.found: str | None = None  # the stop string that ended the text

    def feed(self, text: str, last: bool = False) -> str:
        """Return the text that is certain to precede any stop string. last: no more text will follow."""
        if self.hit:
            return ""
        text = self.held + text
        self.held = ""

        # (end, start) of every stop string in the text: the first to end is the smallest pair.
        matches = []
        for stop in self.stops:
            start = text.find(stop)
            if start >= 0:
                matches.append((start + len(stop), start))
        if matches:
            self.hit = True
            end, start = min(matches)
            self.found = text[start:end]
            return text[:start]

        # The longest end of the text that begins a stop string is held back.
        keep = 0
        for stop in self.stops:
            for length in range(1, len(stop)):
                if text.endswith(stop[:length]):
                    keep = max(keep, length)
        if last or not keep:
            return text
        self.held = text[-keep:]
        return text[:-keep]


class Offsets:
    """Finds where each token's text begins: the number of characters that were complete before it."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer = tokenizer
        self.utf8_decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self.characters = 0

    def next(self, token: int | None) -> int:
        """Return where a token begins, and take it in."""
        start = self.characters
        if token is not None:
            self.characters += len(self.utf8_decoder.decode(self.tokenizer.bytes([token])))
        return start


class Answer:
    """One choice of a response while it grows. `finish_reason` is None until it has ended.

    index: the number of the choice. ids: its tokens so far. forced: places of those that were put in, not sampled.
    reasoning_tokens: those between `<think>` and `</think>`, the closing tag included. format_error: the name
    of a format fault, or None.
    """

    def __init__(self, job: Job, tokenizer: Tokenizer, index: int = 0) -> None:
        self.job = job
        self.index = index
        self.tokenizer = tokenizer
        self.decoder = (
            StreamDecoder(tokenizer, job.tools or [], job.opened, job.prefix, strict=False)
            if job.chat
            else TextDecoder(tokenizer)
        )
        self.stop_strings = StopStrings(job.stop_strings)
        self.ids: list[int] = []
        self.forced: list[int] = []
        self.calls = 0  # complete tool calls
        self.calls_begun = 0
        self.reasoning_tokens = 0
        self.finish_reason: ChoiceEnd | None = None
        self.format_error: str | None = None
        self._thinking = job.opened
        self._unreported: list[Event] = []  # events whose log-probabilities are not sent yet
        self._offsets = Offsets(tokenizer)  # of plain text, beside log-probabilities
        self.prompt_logprobs: Sequence[PromptLogprob] = ()
        self._prompt_pending = job.echo  # the prompt is still to be sent

    def take(self, event: Event) -> list[Delta]:
        """Read an engine event, and return the deltas that it adds."""
        if self.finish_reason is not None:
            return []
        parsed: list[ParsedDelta] = []
        if event.prompt_logprobs:
            self.prompt_logprobs = event.prompt_logprobs
        if event.token is not None:
            if event.forced:
                self.forced.append(len(self.ids))
            self.ids.append(event.token)
            self._count_reasoning(event.token)
            if self.job.logprobs is not None:
                self._unreported.append(event)
            # A stop token is not part of the text, but it tells the parser that the turn was not cut off.
            stopped = event.finish_reason == FinishReason.STOP
            ends_turn = self.job.chat and event.token in self.tokenizer.stop_ids
            if not stopped or ends_turn:
                parsed += self.decoder.feed(event.token)
        last = event.finish_reason is not None
        if last:
            parsed += self.decoder.flush()
        if self.job.chat:
            deltas = self._chat_deltas(parsed, last)
        else:
            deltas = self._echo() + self._text(parsed, last)

        if self._cut_off or event.finish_reason == FinishReason.STOP:
            self.finish_reason = ChoiceEnd.STOP
        elif event.finish_reason == FinishReason.LENGTH:
            self.finish_reason = ChoiceEnd.LENGTH
        calls_end_it = self.calls > 0 and not self.job.named_call
        if calls_end_it and self.finish_reason == ChoiceEnd.STOP:
            self.finish_reason = ChoiceEnd.TOOL_CALLS
        if self.finish_reason is not None and isinstance(self.decoder, StreamDecoder):
            self.format_error = self.decoder.finish()["error"]
        return deltas

    @property
    def _cut_off(self) -> bool:
        """Return whether a stop string has come, or the one call where only one is wanted."""
        return self.stop_strings.hit or (self.calls > 0 and not self.job.parallel_tool_calls)

    def _text(self, parsed: Iterable[ParsedDelta], last: bool) -> list[Delta]:
        text = self.stop_strings.feed("".join(delta.text for delta in parsed), last)
        return [{"text": text}] if text else []

    def _chat_deltas(self, parsed: Iterable[ParsedDelta], last: bool) -> list[Delta]:
        deltas: list[Delta] = []
        for delta in parsed:
            if self._cut_off:
                break
            if delta.kind is DeltaKind.REASONING:
                deltas.append({"reasoning_content": delta.text})
            elif delta.kind is DeltaKind.CONTENT:
                text = self.stop_strings.feed(delta.text)
                if text:
                    deltas.append({"content": text})
            elif delta.kind is DeltaKind.CALL_BEGINS:
                deltas.append({"tool_calls": [self._call(delta.text)]})
            elif delta.kind is DeltaKind.ARGUMENTS:
                fragment = {
                    "index": self.calls_begun - 1,
                    "function": {"arguments": delta.text},
                }
                deltas.append({"tool_calls": [fragment]})
            elif delta.kind is DeltaKind.CALL:
                self.calls += 1
            elif delta.kind is DeltaKind.CALL_WITHDRAWN:
                deltas.append({"withdrawn": "tool_calls"})
            elif delta.kind is DeltaKind.REASONING_WITHDRAWN:
                deltas.append({"withdrawn": "reasoning_content"})
        if last:
            text = self.stop_strings.feed("", last=True)
            if text:
                deltas.append({"content": text})
        return deltas

    def _call(self, name: str) -> dict[str, Any]:
        """Return the beginning of the next call."""
        index = self.calls_begun
        self.calls_begun += 1
        return {
            "index": index,
            "id": f"call_{secrets.token_hex(8)}",
            "type": "function",
            "function": {"name": name, "arguments": ""},
        }

    def _count_reasoning(self, token: int) -> None:
        special = self.tokenizer.special
        if token == special.get("<think>"):
            self._thinking = True
        if self._thinking:
            self.reasoning_tokens += 1
        if token == special.get("</think>"):
            self._thinking = False

    def logprobs(self) -> dict[str, Any] | None:
        """Return the log-probabilities of the tokens since the last call, in the endpoint's form; None if not wanted."""
        events = self._unreported
        self._unreported = []
        if self.job.logprobs is None or not events:
            return None
        if self.job.chat:
            return {"content": [self._chat_logprob(event) for event in events], "refusal": None}
        return {
            "tokens": [self._token_name(event.token) for event in events],
            "token_logprobs": [self._shown(event) for event in events],
            "top_logprobs": [self._top(event) for event in events],
            "text_offset": [self._offsets.next(event.token) for event in events],
        }

    def _echo(self) -> list[Delta]:
        """Return the prompt as the first delta of a choice that echoes it."""
        if not self._prompt_pending:
            return []
        self._prompt_pending = False
        prompt = self.job.requests[self.index].prompt
        if self.job.logprobs is not None:
            shown = [Event(0, prompt[0], math.nan)]
            for score in self.prompt_logprobs:
                shown.append(Event(0, score.token, score.logprob, score.top[: self.job.logprobs]))
            self._unreported = shown + self._unreported
        return [{"text": self.tokenizer.decode(prompt)}]

    def _shown(self, event: Event) -> float | None:
        """Return a log-probability as JSON can have it; None for the first token of a prompt."""
        return None if math.isnan(event.logprob) else max(event.logprob, SMALLEST_LOGPROB)

    def _top(self, event: Event) -> dict[str, float] | None:
        """Return the most likely tokens by their names, the best first; ids of equal names are all kept."""
        if math.isnan(event.logprob):
            return None
        top: dict[str, float] = {}
        for token, logprob in event.top_logprobs:
            name = self._token_name(token)
            if name in top:
                name = f"token_id:{token}"
            top[name] = max(logprob, SMALLEST_LOGPROB)
        return top

    def _token_name(self, token: int | None) -> str:
        """Return a token as text, or as OpenAI writes bytes that are no text: bytes:\\xe2."""
        if token is None:
            return ""
        data = self.tokenizer.bytes([token])
        try:
            return data.decode()
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in data)

    def vllm_prompt_logprobs(self) -> list[dict[str, Any] | None]:
        """Return the log-probabilities of the prompt in vLLM's form, None for its first token."""
        entries: list[dict[str, Any] | None] = [None]
        for score in self.prompt_logprobs:
            ranked = [(token, logprob, rank) for rank, (token, logprob) in enumerate(score.top, 1)]
            entry: dict[str, Any] = {}
            for token, logprob, rank in [(score.token, score.logprob, score.rank), *ranked]:
                shown = max(logprob, SMALLEST_LOGPROB)
                name = self._token_name(token)
                entry.setdefault(
                    str(token), {"logprob": shown, "rank": rank, "decoded_token": name}
                )
            entries.append(entry)
        return entries

    def _chat_logprob(self, event: Event) -> dict[str, Any]:
        def entry(token: int, logprob: float) -> dict[str, Any]:
            data = self.tokenizer.bytes([token])
            shown = max(logprob, SMALLEST_LOGPROB)
            return {"token": self._token_name(token), "logprob": shown, "bytes": list(data)}

        assert event.token is not None, "only events with a token are reported"
        top = [entry(token, logprob) for token, logprob in event.top_logprobs]
        return entry(event.token, event.logprob) | {"top_logprobs": top}


class AnswerStep(NamedTuple):
    """What one token adds to a response."""

    choice: int
    """The number of the choice that it belongs to."""
    answer: Answer
    """That choice, with this token."""
    deltas: list[Delta]


class TokenSource(Protocol):
    """The tokens of several requests: an async iterator of (number of the request, event)."""

    def __aiter__(self) -> AsyncIterator[tuple[int, Event]]:
        """Return the iterator."""
        ...

    def cancel(self, index: int) -> None:
        """End one request."""
        ...

    def close(self) -> None:
        """End all requests."""
        ...


class AnswerStream:
    """The choices of a `Job` as they grow: an async iterator of `AnswerStep`, one for each token.

    It counts in `metrics`: the time to the first token since `started` (`time.monotonic`), tokens, and how
    the choices ended. Close it, whatever happens; it closes the tokens that it reads.
    """

    def __init__(
        self,
        tokens: TokenSource,
        job: Job,
        tokenizer: Tokenizer,
        metrics: Metrics,
        started: float,
    ) -> None:
        self.job = job
        self.metrics = metrics
        self.started = started
        self.answers = [Answer(job, tokenizer, index) for index in range(len(job.requests))]
        self.tokens = tokens

    async def __aiter__(self) -> AsyncIterator[AnswerStep]:
        first = True
        async for index, event in self.tokens:
            answer = self.answers[index]
            deltas = answer.take(event)
            if first:
                self.metrics.time("minglm_first_token_seconds", time.monotonic() - self.started)
                first = False
            if answer.finish_reason is not None:
                self.tokens.cancel(index)  # a stop string may have come before a stop token
                self.metrics.count("minglm_finished_total", reason=answer.finish_reason)
                if answer.format_error:
                    self.metrics.count("minglm_format_errors_total", error=answer.format_error)
            yield AnswerStep(index, answer, deltas)

    @property
    def prompt_tokens(self) -> int:
        """Return the number of prompt tokens; a prompt counts once, however many choices it has."""
        choices_per_prompt = len(self.job.requests) // self.job.prompts
        return sum(len(request.prompt) for request in self.job.requests[::choices_per_prompt])

    @property
    def completion_tokens(self) -> int:
        """Return the number of tokens sampled for all choices."""
        return sum(len(answer.ids) for answer in self.answers)

    def close(self) -> None:
        """Cancel the requests that have not ended, and count what was answered."""
        self.tokens.close()
        self.metrics.count("minglm_prompt_tokens_total", self.prompt_tokens)
        self.metrics.count("minglm_generation_tokens_total", self.completion_tokens)
        self.metrics.time("minglm_request_seconds", time.monotonic() - self.started)
