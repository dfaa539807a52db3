"""Build OpenAI's response objects for a `Job`, whole or in chunks (no section in the paper)."""

from collections.abc import AsyncIterator
from typing import Any

from minglm.serve.requests import Job
from minglm.serve.stream import Answer, AnswerStream, Delta

JSONObject = dict[str, Any]


class CompletionBuilder:
    """Sums the deltas of one choice into what a response that is not streamed holds."""

    def __init__(self) -> None:
        self.texts: dict[str, str] = {}
        self.tool_calls: list[JSONObject] = []
        self.logprobs: JSONObject | None = None

    def add(self, delta: Delta, logprobs: JSONObject | None = None) -> None:
        """Add a delta, and the log-probabilities that came with it."""
        for key, value in delta.items():
            if key == "tool_calls":
                for fragment in value:
                    self._add_call(fragment)
            elif key == "withdrawn" and value == "tool_calls":
                self.tool_calls.pop()
            elif key == "withdrawn":
                self.texts.pop(value, None)
            elif isinstance(value, str):
                self.texts[key] = self.texts.get(key, "") + value
        if not logprobs:
            return
        if self.logprobs is None:
            self.logprobs = logprobs
            return
        for key, values in logprobs.items():
            if values:
                self.logprobs[key] += values

    def _add_call(self, fragment: JSONObject) -> None:
        """Add the beginning of a call, or more of the arguments of the last one."""
        function = fragment["function"]
        if "id" in fragment:
            call = {k: v for k, v in fragment.items() if k != "index"}
            self.tool_calls.append(call | {"function": dict(function)})
        else:
            self.tool_calls[-1]["function"]["arguments"] += function["arguments"]

    def text(self) -> str:
        """Return the text of a plain completion."""
        return self.texts.get("text", "")

    def message(self) -> JSONObject:
        """Return the assistant message of a chat."""
        no_content = None if self.tool_calls else ""
        message: JSONObject = {
            "role": "assistant",
            "content": self.texts.get("content", no_content),
        }
        # Sent back without the field, an answer that speaks of the tag would be cut there by the template.
        if "reasoning_content" in self.texts or "</think>" in (message["content"] or ""):
            message["reasoning_content"] = self.texts.get("reasoning_content", "")
        if self.tool_calls:
            message["tool_calls"] = self.tool_calls
        return message


async def whole_response(job: Job, stream: AnswerStream, model_name: str) -> JSONObject:
    """Return the object of a response that is not streamed."""
    builders = [CompletionBuilder() for _ in stream.answers]
    async for index, answer, deltas in stream:
        for delta in deltas:
            builders[index].add(delta)
        builders[index].add({}, answer.logprobs())
    choices = []
    for index, (builder, answer) in enumerate(zip(builders, stream.answers, strict=True)):
        content = {"message": builder.message()} if job.chat else {"text": builder.text()}
        choice = {"index": index, **content, "logprobs": builder.logprobs}
        if job.prompt_logprobs and not job.chat:
            choice["prompt_logprobs"] = answer.vllm_prompt_logprobs()
        choices.append(choice | _end(job, index, answer))
    response = _head(job, model_name, streamed=False)
    response |= {"choices": choices, "usage": usage(job, stream)}
    if job.prompt_logprobs and job.chat:
        response["prompt_logprobs"] = stream.answers[0].vllm_prompt_logprobs()
    return response


async def response_chunks(
    job: Job, stream: AnswerStream, model_name: str
) -> AsyncIterator[JSONObject]:
    """Yield the objects of a streamed response."""
    head = _head(job, model_name, streamed=True)
    if job.include_usage:
        head["usage"] = None

    def chunk(
        index: int, delta: Delta, logprobs: JSONObject | None = None, end: JSONObject | None = None
    ) -> JSONObject:
        content = {"delta": delta} if job.chat else {"text": delta.get("text", "")}
        choice = {"index": index, **content, "logprobs": logprobs}
        return head | {"choices": [choice | (end or {"finish_reason": None})]}

    if job.chat:
        for index in range(len(stream.answers)):
            yield chunk(index, {"role": "assistant", "content": ""})
    async for index, answer, deltas in stream:
        for delta in deltas:
            if "withdrawn" not in delta:  # what was sent cannot be taken back
                yield chunk(index, delta, answer.logprobs())
        if answer.finish_reason is not None:
            yield chunk(index, {}, answer.logprobs(), _end(job, index, answer))
    if job.include_usage:
        yield head | {"choices": [], "usage": usage(job, stream)}


def usage(job: Job, stream: AnswerStream) -> JSONObject:
    """Return how many tokens the prompts have, each prompt counted once, and all choices."""
    counts: JSONObject = {
        "prompt_tokens": stream.prompt_tokens,
        "completion_tokens": stream.completion_tokens,
        "total_tokens": stream.prompt_tokens + stream.completion_tokens,
    }
    if job.chat:
        reasoning_tokens = sum(answer.reasoning_tokens for answer in stream.answers)
        counts["completion_tokens_details"] = {"reasoning_tokens": reasoning_tokens}
    return counts


def _head(job: Job, model_name: str, streamed: bool) -> JSONObject:
    """Return the fields that every object of a response begins with."""
    if job.chat:
        prefix = "chatcmpl"
        kind = "chat.completion.chunk" if streamed else "chat.completion"
    else:
        prefix = "cmpl"
        kind = "text_completion"
    return {"id": f"{prefix}-{job.id}", "object": kind, "created": job.created, "model": model_name}


def _end(job: Job, index: int, answer: Answer) -> JSONObject:
    """Return why a choice ended, with the fields that this server adds to OpenAI's objects."""
    end: JSONObject = {"finish_reason": answer.finish_reason}
    if answer.format_error:
        end["format_error"] = answer.format_error
    if job.return_token_ids:
        end["prompt_token_ids"] = job.requests[index].prompt
        end["token_ids"] = answer.ids
        if answer.forced:
            end["forced_places"] = answer.forced
    return end
