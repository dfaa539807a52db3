"""OpenAI's objects for the answers to a `Job`: whole, or in chunks as they grow (no section in the paper)."""

from minglm.serve.stream import Whole


def usage(job, following):
    """Tokens of the prompts, each counted once, and of all answers."""
    each = len(job.requests) // job.prompts
    prompt = sum(len(request.prompt) for request in job.requests[::each])
    sampled = sum(len(answer.ids) for answer in following.answers)
    found = {
        "prompt_tokens": prompt,
        "completion_tokens": sampled,
        "total_tokens": prompt + sampled,
    }
    if job.chat:
        thought = sum(answer.reasoning_tokens for answer in following.answers)
        found["completion_tokens_details"] = {"reasoning_tokens": thought}
    return found


def _head(job, name, streamed):
    return {
        "id": f"{'chatcmpl' if job.chat else 'cmpl'}-{job.id}",
        "object": ("chat.completion.chunk" if streamed else "chat.completion")
        if job.chat
        else "text_completion",
        "created": job.created,
        "model": name,
    }


def _end(job, index, answer):
    """Why an answer ended, with what this server adds to OpenAI's objects."""
    found = {"finish_reason": answer.reason}
    if answer.error:
        found["format_error"] = answer.error
    if job.token_ids:
        found |= {"prompt_token_ids": job.requests[index].prompt, "token_ids": answer.ids}
    return found


async def whole(job, following, name):
    """The object of an answer that is not streamed. following: yields (index, answer, deltas)."""
    wholes = [Whole() for _ in following.answers]
    async for index, answer, deltas in following:
        for delta in deltas:
            wholes[index].add(delta)
        wholes[index].add({}, answer.logprobs())
    choices = []
    for index, (found, answer) in enumerate(zip(wholes, following.answers, strict=True)):
        content = (
            {"message": found.message()} if job.chat else {"text": found.texts.get("text", "")}
        )
        choices.append(
            {"index": index, **content, "logprobs": found.logprobs, **_end(job, index, answer)}
        )
    return {**_head(job, name, streamed=False), "choices": choices, "usage": usage(job, following)}


async def chunks(job, following, name):
    """The objects of a streamed answer, as they come. following: yields (index, answer, deltas)."""
    head = _head(job, name, streamed=True) | ({"usage": None} if job.include_usage else {})

    def chunk(index, delta, logprobs=None, **end):
        content = {"delta": delta} if job.chat else {"text": delta.get("text", "")}
        choice = {
            "index": index,
            **content,
            "logprobs": logprobs,
            **(end or {"finish_reason": None}),
        }
        return {**head, "choices": [choice]}

    if job.chat:
        for index in range(len(following.answers)):
            yield chunk(index, {"role": "assistant", "content": ""})
    async for index, answer, deltas in following:
        for delta in deltas:
            yield chunk(index, delta, answer.logprobs())
        if answer.reason is not None:
            yield chunk(index, {}, answer.logprobs(), **_end(job, index, answer))
    if job.include_usage:
        yield {**head, "choices": [], "usage": usage(job, following)}
