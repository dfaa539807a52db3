"""What goes into the engine and what comes out of it (no section in the paper)."""

from dataclasses import dataclass, field
from typing import NamedTuple


@dataclass(frozen=True)
class Request:
    """A prompt and how to continue it."""

    prompt: list[int]
    max_new_tokens: int = 256
    temperature: float = 1.0
    """0 takes the likeliest token."""
    top_p: float = 1.0
    """Draw from the smallest set of likeliest tokens with this share of the probability."""
    seed: int = 0
    """The same request with the same seed gets the same answer, whatever else is being answered."""
    stop_ids: tuple[int, ...] | None = None
    """Ids that end the answer; None: the tokenizer's (end of text, user, observation)."""
    top_k: int = 0
    """Draw from so many likeliest tokens; 0: from all."""
    min_p: float = 0.0
    """Draw from tokens with at least this share of the likeliest one's probability."""
    top_logprobs: int = 0
    """How many of the likeliest tokens to report with each token drawn."""

    def check(self, limit):
        """Raise ValueError, in one line, for a request that cannot be answered by a model of `limit` positions."""
        if not self.prompt or len(self.prompt) >= limit:
            raise ValueError(
                f"a prompt of {len(self.prompt)} tokens; this model takes 1 to {limit - 1}"
            )
        bounds = {
            "max_new_tokens": (0, None),
            "temperature": (0, None),
            "top_p": (0, 1),
            "top_k": (0, None),
        }
        for name, (low, high) in (bounds | {"min_p": (0, 1), "top_logprobs": (0, None)}).items():
            value = getattr(self, name)
            if not (value >= low and (high is None or value <= high)):
                raise ValueError(
                    f"{name} = {value}: must be at least {low}{f' and at most {high}' if high else ''}"
                )


@dataclass
class Completion:
    """An answer: sampled ids, the stop id included, and the log-probability of each at the request's temperature."""

    tokens: list[int]
    logprobs: list[float]
    finish_reason: str = "length"
    """stop, length, or cancelled."""
    top_logprobs: list = field(default_factory=list)
    """For each token [(id, log-probability), ...] of the likeliest, if the request asked for them."""


class Event(NamedTuple):
    """One token of an answer, or its end, or both."""

    id: int
    """Of the request, as `submit` returned it."""
    token: int | None
    """None where an answer ends without one more: cancelled, or no room for any."""
    logprob: float = 0.0
    top_logprobs: tuple = ()
    """((id, log-probability), ...) of the likeliest tokens, as many as the request asked for."""
    finish_reason: str | None = None
    """None while the answer goes on; then stop, length, cancelled, or error."""
