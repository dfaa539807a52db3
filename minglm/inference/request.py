"""Requests, completions and events: what goes into the engine and what comes out (no section in the paper)."""

from dataclasses import dataclass, field
from enum import StrEnum
from typing import NamedTuple

from torch import Tensor

TopLogprobs = tuple[tuple[int, float], ...]
"""((id, log-probability), ...) of the most likely tokens, the most likely first."""


class PromptLogprob(NamedTuple):
    """How likely a token of a prompt was, given the tokens before it, at temperature 1."""

    token: int
    logprob: float
    rank: int
    """1 for the most likely token."""
    top: TopLogprobs
    """As many of the most likely tokens as the request asked for."""


class AnswerFailed(Exception):
    """The engine cannot continue a request: numbers are not finite, or its grammar allows no token."""


class FinishReason(StrEnum):
    """Why a completion ended."""

    STOP = "stop"
    """A stop token was sampled."""
    LENGTH = "length"
    """The limit of new tokens, or of the model's positions, was reached."""
    CANCELLED = "cancelled"
    """The caller cancelled the request."""
    ERROR = "error"
    """A forward pass failed, its numbers are not finite, or the grammar allows no token."""


@dataclass(frozen=True)
class Request:
    """A prompt and how to continue it."""

    prompt: list[int]
    max_new_tokens: int = 256
    temperature: float = 1.0
    """0 takes the most likely token."""
    top_p: float = 1.0
    """Sample from the smallest set of most likely tokens with at least this probability."""
    seed: int = 0
    """The same request with the same seed gets the same completion, whatever else is in the batch."""
    stop_ids: tuple[int, ...] | None = None
    """Ids that end the completion; None: the tokenizer's (end of text, user, observation)."""
    top_k: int = 0
    """Sample from this number of most likely tokens; 0: from all."""
    min_p: float = 0.0
    """Sample from tokens with at least this share of the most likely token's probability."""
    top_logprobs: int = 0
    """How many of the most likely tokens to report with each sampled token."""
    prompt_logprobs: int | None = None
    """How many of the most likely tokens to report with each token of the prompt; None: report nothing. With
    this, `max_new_tokens` = 0 scores a text."""
    grammar: str | None = None
    """What the completion must match, in the notation of `minglm.inference.grammar`."""
    thinking_budget: int | None = None
    """Most tokens of reasoning, after which `</think>` is put in (`thinking.py`); None: no bound."""
    min_new_tokens: int = 0
    """No stop token before this number of tokens."""
    logit_bias: tuple[tuple[int, float], ...] = ()
    """((id, what is added to its logit), ...)."""
    allowed_ids: tuple[int, ...] | None = None
    """The only ids to sample; None: all."""
    presence_penalty: float = 0.0
    """Subtracted from the logit of every token that the completion has."""
    frequency_penalty: float = 0.0
    """The same, times how often the completion has it."""
    repetition_penalty: float = 1.0
    """Divides the positive logit of every token that prompt or completion has, and multiplies a negative one."""

    @property
    def changes_logits(self) -> bool:
        """Return whether more than temperature and cuts decides what is sampled."""
        return (
            self.grammar is not None
            or self.allowed_ids is not None
            or bool(self.logit_bias)
            or self.min_new_tokens > 0
            or self.presence_penalty != 0
            or self.frequency_penalty != 0
            or self.repetition_penalty != 1
        )

    def check(self, limit: int) -> None:
        """Raise ValueError, in one line, for a request that a model of `limit` positions cannot answer."""
        if not self.prompt or len(self.prompt) >= limit:
            raise ValueError(
                f"a prompt of {len(self.prompt)} tokens; this model takes 1 to {limit - 1}"
            )
        bounds = {
            "max_new_tokens": (0, None),
            "temperature": (0, None),
            "top_p": (0, 1),
            "top_k": (0, None),
            "min_p": (0, 1),
            "top_logprobs": (0, None),
            "min_new_tokens": (0, None),
            "thinking_budget": (0, None),
        }
        for name, (low, high) in bounds.items():
            value = getattr(self, name)
            if value is None:
                continue
            if not (value >= low and (high is None or value <= high)):
                upper = f" and at most {high}" if high else ""
                raise ValueError(f"{name} = {value}: must be at least {low}{upper}")


@dataclass
class Completion:
    """A completion: its ids, the stop id included, and the log-probability of each at the request's temperature."""

    tokens: list[int]
    logprobs: list[float]
    finish_reason: FinishReason = FinishReason.LENGTH
    top_logprobs: list[TopLogprobs] = field(default_factory=list)
    """One entry for each token, if the request asked for them."""
    prompt_logprobs: tuple[PromptLogprob, ...] = ()
    """One entry for each token of the prompt but the first, if the request asked for them."""
    error: str = ""
    """With finish reason ERROR: what is wrong."""
    versions: list[int] = field(default_factory=list, compare=False)
    """For each token the version of the weights that drew it; empty where nobody counts versions."""
    forced: list[int] = field(default_factory=list)
    """Places of the tokens that were put in, not sampled: the close of a thought beyond its budget."""
    experts_SLK: Tensor | None = field(default=None, compare=False)
    """The experts of each token but the last of prompt and completion, on each MoE layer: uint8, int16 for
    more than 256 experts. None where the engine was not asked to keep them."""


class Event(NamedTuple):
    """One token of a completion, or its end, or both."""

    id: int
    """The request's number, as `Engine.submit` returned it."""
    token: int | None
    """None if the completion ends without another token: cancelled, failed, or no room for any."""
    logprob: float = 0.0
    top_logprobs: TopLogprobs = ()
    """As many as the request asked for."""
    finish_reason: FinishReason | None = None
    """None while the completion continues."""
    prompt_logprobs: tuple[PromptLogprob, ...] = ()
    """With the first event of a request that asked for them."""
    error: str = ""
    """With finish reason ERROR: what is wrong."""
    forced: bool = False
    """Whether the token was put in, not sampled."""
    experts_SLK: Tensor | None = None
    """With the end of a completion: as in `Completion`."""
