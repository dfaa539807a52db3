"""Many answers at once: batched generation with a key/value cache (paper 3.5 calls it the rollout engine).

Requests are decoded together, one token each per pass. When enough rows have finished, the batch is drawn together and
waiting requests join it, so long answers do not hold up short ones. A prompt is computed once however many samples it
gets, and what all new prompts begin with (a system prompt, a tools block) is computed once for all of them.

Tokens in, tokens out: the engine knows nothing of messages. It returns the sampled ids with the log-probability of
each, which training uses as they are.
"""

from collections import deque
from dataclasses import dataclass

import torch

from minglm.inference.kv_cache import KVCache
from minglm.inference.sampling import sample, uniforms

SHRINK = 0.7  # draw the batch together when this share of its rows, or less, still generates


@dataclass(frozen=True)
class Request:
    """A prompt and how to continue it."""

    prompt: list[int]
    max_new_tokens: int = 256
    temperature: float = 1.0
    top_p: float = 1.0
    seed: int = 0
    stop_ids: tuple[int, ...] | None = None
    """Ids that end the answer; None: the tokenizer's (end of text, user, observation)."""


@dataclass
class Completion:
    """An answer: sampled ids, the stop id included, and the log-probability of each at the request's temperature."""

    tokens: list[int]
    logprobs: list[float]
    finish_reason: str = "length"
    """stop or length."""


class Engine:
    """Generates with a model. The model is read, never copied: new weights are used from the next call on."""

    def __init__(self, model, tokenizer=None, max_batch=256):
        self.model, self.tokenizer, self.max_batch = model, tokenizer, max_batch
        self.limit = model.config.max_position_embeddings  # of prompt and answer together

    @torch.inference_mode()
    def generate(self, requests, on_token=None):
        """Answer every `Request`; returns `Completion`s in the same order.

        on_token(request_index, token) is called for each token as it is drawn. Raises ValueError for an empty prompt
        or one that leaves no room within the model's longest sequence.
        """
        done = [Completion([], []) for _ in requests]
        stops = [self._check(i, request) for i, request in enumerate(requests)]
        waiting, rows, cache = deque(self._live(range(len(requests)), requests, done)), [], None
        while waiting or rows:
            alive = self._live(rows, requests, done)
            if not alive or len(alive) < len(rows) * SHRINK:
                cache, rows, logits_BV = self._rebatch(cache, rows, alive, waiting, requests, done)
                if not rows:
                    break
            else:
                logits_BV = self._decode(cache, rows, requests, done)
            self._draw(logits_BV, rows, requests, done, stops, on_token)
        return done

    def _check(self, index, request):
        if not request.prompt or len(request.prompt) >= self.limit:
            raise ValueError(
                f"request {index}: a prompt of {len(request.prompt)} tokens; this model takes 1 to {self.limit - 1}"
            )
        if request.stop_ids is not None:
            return set(request.stop_ids)
        return set(self.tokenizer.stop_ids) if self.tokenizer is not None else set()

    def _live(self, rows, requests, done):
        """Which of these rows (request numbers) still generate, by their place in `rows`."""

        def wants_more(request, completion):
            most = min(request.max_new_tokens, self.limit - len(request.prompt))
            return completion.finish_reason != "stop" and len(completion.tokens) < most

        return [b for b, i in enumerate(rows) if wants_more(requests[i], done[i])]

    def _draw(self, logits_BV, rows, requests, done, stops, on_token):
        device = logits_BV.device
        live = self._live(rows, requests, done)
        chosen = [requests[rows[b]] for b in live]
        seeds = torch.tensor([r.seed for r in chosen], device=device)
        index = torch.tensor([len(done[rows[b]].tokens) for b in live], device=device)
        tokens_B, logprobs_B = sample(
            logits_BV[live],
            torch.tensor([r.temperature for r in chosen], device=device),
            torch.tensor([r.top_p for r in chosen], device=device),
            uniforms(seeds, index),
        )
        for b, token, logprob in zip(live, tokens_B.tolist(), logprobs_B.tolist(), strict=True):
            completion = done[rows[b]]
            completion.tokens.append(token)
            completion.logprobs.append(logprob)
            if token in stops[rows[b]]:
                completion.finish_reason = "stop"
            if on_token is not None:
                on_token(rows[b], token)

    def _decode(self, cache, rows, requests, done):
        """One pass over the last token of every row; finished rows are computed too, until the next rebatch."""
        device = self.model.lm_head.weight.device
        tokens_BS = torch.tensor([[done[i].tokens[-1]] for i in rows], device=device)
        positions_BS = torch.tensor([[len(requests[i].prompt) + len(done[i].tokens) - 1] for i in rows], device=device)
        hidden_BSD = self.model.hidden(tokens_BS, positions_BS, cache=cache.at(positions_BS)).hidden_BSD
        return self.model.head(hidden_BSD[:, -1])

    def _rebatch(self, cache, rows, alive, waiting, requests, done):
        """Drop finished rows and admit waiting requests. Returns cache, rows, and the next logits of every row."""
        kept = [rows[b] for b in alive]
        fresh = [waiting.popleft() for _ in range(min(len(waiting), self.max_batch - len(kept)))]
        rows = kept + fresh
        if not rows:
            return None, [], None
        capacity = max(min(len(requests[i].prompt) + requests[i].max_new_tokens, self.limit) for i in rows)
        parts, logits = [], []
        if kept:
            parts.append(cache.select(alive, capacity))
            logits.append(self._decode(parts[0], kept, requests, done))
        if fresh:
            new_cache, new_logits = self.prefill([requests[i].prompt for i in fresh], capacity)
            parts.append(new_cache)
            logits.append(new_logits)
        return parts[0] if len(parts) == 1 else parts[0].join(parts[1]), rows, torch.cat(logits)

    def prefill(self, prompts, capacity):
        """Compute prompts (lists of ids): a cache with a row for each, and the next logits (B, V)."""
        device = self.model.lm_head.weight.device
        unique = list(dict.fromkeys(map(tuple, prompts)))
        shortest = min(map(len, unique))
        shared = next((c for c in range(shortest) if len({p[c] for p in unique}) > 1), shortest)
        shared = min(shared, shortest - 1) if len(unique) > 1 else 0  # each row keeps at least one token of its own
        cache = KVCache.empty(self.model, 1, max(capacity, 1))
        if shared:
            prefix_BS = torch.tensor([unique[0][:shared]], device=device)
            positions_BS = torch.arange(shared, device=device)[None]
            self.model.hidden(prefix_BS, positions_BS, cache=cache.at(positions_BS))
        cache = cache.select([0] * len(unique))
        longest = max(map(len, unique))
        tokens_BS = torch.tensor([[*p[shared:], *[0] * (longest - len(p))] for p in unique], device=device)
        positions_BS = torch.arange(shared, longest, device=device).expand_as(tokens_BS)
        hidden_BSD = self.model.hidden(tokens_BS, positions_BS, cache=cache.at(positions_BS)).hidden_BSD
        last = torch.tensor([len(p) - 1 - shared for p in unique], device=device)
        logits_BV = self.model.head(hidden_BSD[torch.arange(len(unique), device=device), last])
        where = {p: b for b, p in enumerate(unique)}
        index = [where[tuple(p)] for p in prompts]
        return cache.select(index), logits_BV[index]
