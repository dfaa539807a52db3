"""Change a request's logits before sampling: penalties, biases, forbidden tokens, a grammar (no section in the paper).

    logits -> penalties -> bias -> forbidden tokens to -inf -> temperature and cuts (`sampling.py`)

Rules belong to what is sampled, as the cuts do: a reported log-probability stays the model's own, which
training reproduces.
"""

from collections import Counter
from collections.abc import Iterable
from typing import Protocol

import torch
from torch import Tensor

from minglm.inference.request import Request


class Matcher(Protocol):
    """The part of `minglm.inference.grammar.GrammarMatcher` that the rules use."""

    def allowed(self, vocab_size: int) -> Tensor:
        """Return which tokens may come next, bool (V,)."""
        ...

    def accept(self, token: int) -> bool:
        """Move on by a token; return whether the grammar allowed it."""
        ...

    def allows(self, token: int) -> bool:
        """Return whether this token may come next."""
        ...


class LogitRules:
    """The rules of one request while it is answered. Raises ValueError for ids outside the vocabulary."""

    def __init__(
        self,
        request: Request,
        stop_ids: Iterable[int],
        vocab_size: int,
        matcher: Matcher | None = None,
    ) -> None:
        self.request = request
        self.matcher = matcher
        self.sampled: Counter[int] = Counter()
        self.length = 0  # tokens sampled
        self.seen = set(request.prompt) if request.repetition_penalty != 1 else set()
        self.stop_ids = torch.tensor(list(stop_ids), dtype=torch.long)
        self.bias_ids = torch.tensor([token for token, _ in request.logit_bias], dtype=torch.long)
        self.biases = torch.tensor([bias for _, bias in request.logit_bias])
        self.forbidden: Tensor | None = None
        if request.allowed_ids is not None:
            self.forbidden = torch.ones(vocab_size, dtype=torch.bool)
        for name, ids in (
            ("logit_bias", [token for token, _ in request.logit_bias]),
            ("allowed_ids", request.allowed_ids or ()),
        ):
            for token in ids:
                if not 0 <= token < vocab_size:
                    raise ValueError(f"{name}: the id {token} is not from 0 to {vocab_size - 1}")
        if self.forbidden is not None:
            self.forbidden[list(request.allowed_ids or ())] = False

    def apply(self, logits_V: Tensor) -> None:
        """Change float logits (V,) in place."""
        request = self.request
        device = logits_V.device
        if request.repetition_penalty != 1 and self.seen:
            ids = torch.tensor(list(self.seen), device=device)
            penalised = logits_V[ids]
            factor = request.repetition_penalty
            logits_V[ids] = torch.where(penalised > 0, penalised / factor, penalised * factor)
        if self.sampled and (request.presence_penalty or request.frequency_penalty):
            ids = torch.tensor(list(self.sampled), device=device)
            counts = torch.tensor(list(self.sampled.values()), device=device)
            logits_V[ids] -= request.presence_penalty + request.frequency_penalty * counts
        if len(self.bias_ids):
            logits_V.index_add_(0, self.bias_ids.to(device), self.biases.to(device))
        if self.forbidden is not None:
            logits_V.masked_fill_(self.forbidden.to(device), -torch.inf)
        if self.length < request.min_new_tokens:
            logits_V[self.stop_ids.to(device)] = -torch.inf
        if self.matcher is not None:
            allowed_V = self.matcher.allowed(len(logits_V)).to(device)
            logits_V.masked_fill_(~allowed_V, -torch.inf)

    def allows(self, token: int) -> bool:
        """Return whether the grammar allows a token to come next, sampled or not."""
        return self.matcher is None or self.matcher.allows(token)

    def accept(self, token: int, forced: bool = False) -> bool:
        """Take in the next token; return whether the rules allowed it.

        They do not if they left no token at all.

        forced: the token was not sampled, so that only the grammar has to allow it.
        """
        if not forced and not self._may_sample(token):
            return False
        self.length += 1
        self.sampled[token] += 1
        if self.request.repetition_penalty != 1:
            self.seen.add(token)
        return self.matcher is None or self.matcher.accept(token)

    def _may_sample(self, token: int) -> bool:
        """Return whether the ids allow a token, whatever the grammar says."""
        if self.forbidden is not None and bool(self.forbidden[token]):
            return False
        too_early = self.length < self.request.min_new_tokens
        return not (too_early and bool((self.stop_ids == token).any()))
