"""A model that says what it is told to: stands in for the engine where a test is about what happens around it."""

import asyncio
import re
from dataclasses import replace
from functools import cache
from types import SimpleNamespace

from minglm.chat import render
from minglm.data.tokenizer import SPECIAL_TOKENS, Tokenizer
from minglm.inference import Completion


@cache
def byte_tokenizer():
    """Return a tokenizer of 256 bytes and the special tokens: every text has one tokenization only."""
    return Tokenizer.train([], 292)


@cache
def word_tokenizer():
    """Return a tokenizer with a few merges, so that a text has several tokenizations."""
    return Tokenizer.train(
        ["order is cancelled returned get_order status pending in the shop 38+7=45;"] * 9, 330
    )


def spelled(tokenizer, text):
    """Return the ids of a text with special tokens spelled out, byte by byte: not as `encode` would join them."""
    single = {tokenizer.bytes([i]): i for i in range(256)}
    ids = []
    for part in re.split("(" + "|".join(map(re.escape, SPECIAL_TOKENS)) + ")", text):
        special = tokenizer.special.get(part)
        ids += [single[bytes([byte])] for byte in part.encode()] if special is None else [special]
    return ids


def said(tokenizer, message, thinking=True):
    """Return an assistant message as the text that a model would sample, up to the role token that ends the turn."""
    rendered = render(tokenizer, [{"role": "user", "content": "?"}, message], None, thinking)
    return tokenizer.decode(
        [token for token, sampled in zip(rendered.ids, rendered.mask) if sampled]
    )


class Scripted:
    """An engine whose answers are a function of the prompt: script(text of the prompt) -> text, or ids.

    `asked` and `answers` are what it was asked and what it said, call by call. Every token has a log-probability of its
    own, by which a test can tell whose it was.
    """

    def __init__(self, tokenizer, script, limit=10**6):
        self.tokenizer = tokenizer
        self.script = script
        self.limit = limit
        self.asked = []
        self.answers = []
        self.tokens = 0
        self.model = SimpleNamespace(config=SimpleNamespace(max_position_embeddings=limit))

    def generate(self, requests, on_token=None):
        """Return one completion for each request; an answer that does not end in a stop token is one that was cut off."""
        completions = []
        for number, request in enumerate(requests):
            answer = self.script(self.tokenizer.decode(request.prompt))
            ids = spelled(self.tokenizer, answer) if isinstance(answer, str) else list(answer)
            logprobs = [-1e-4 * (self.tokens + i + 1) for i in range(len(ids))]
            self.tokens += len(ids)
            reason = "stop" if ids and ids[-1] in self.tokenizer.stop_ids else "length"
            completions.append(Completion(ids, logprobs, reason))
            for token in ids:
                if on_token is not None:
                    on_token(number, token)
        self.asked.append([replace(request, prompt=list(request.prompt)) for request in requests])
        self.answers.append(completions)
        return completions


class ScriptedGenerator:
    """A `Generator` whose answers are a function of the prompt, like `Scripted`, for rollouts and evaluation.

    `asked` and `answers` are lists of requests and completions in the order of the requests.
    """

    def __init__(self, tokenizer, script, limit=10**6):
        self.engine = Scripted(tokenizer, script, limit)
        self.max_model_len = limit
        self.updates = 0

    async def generate(self, request):
        """Answer one request, once everybody else had a chance to ask."""
        await asyncio.sleep(0)
        return self.engine.generate([request])[0]

    def update_weights(self, weights, version=0):
        """Count the updates."""
        self.updates += 1

    def close(self):
        """Release nothing, since nothing is held."""

    @property
    def asked(self):
        """Return every request."""
        return [request for call in self.engine.asked for request in call]

    @property
    def answers(self):
        """Return every completion."""
        return [completion for call in self.engine.answers for completion in call]

    @property
    def tokens(self):
        """Return the number of tokens that were said."""
        return self.engine.tokens


def oracle(tokenizer, environment, tasks, thinking=True):
    """Return a script that plays these tasks perfectly, and knows no other prompt than those of their right course."""
    known = {}
    for task in tasks:
        conversation = environment.demonstrate(task, thinking)
        for at, message in enumerate(conversation):
            if message["role"] == "assistant":
                prompt = render(
                    tokenizer, conversation[:at], task.tools, thinking, generation_prompt=True
                )
                known[prompt.text] = said(tokenizer, message, thinking)
    return known.__getitem__
