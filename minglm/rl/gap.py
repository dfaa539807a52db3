"""Measure how far the trainer and the rollout engine are apart, for the same weights (paper 3.5).

    d_t = log pi(y_t) - log mu(y_t)            of every sampled token, before the first update of a rollout
    mean |d|,   99th percentile of |d|,   largest |d|,   KL(mu, pi) ~ mean( exp(d) - 1 - d )

pi is what the trainer computes for a token and mu what the engine recorded when it drew it. Before any update
both have the same weights, so each d is an error: of rounding, of a kernel, of float8, or of a router that
chose other experts. It enters the ratio of the loss as if the policy had changed. Mixture-of-experts models
are told to collapse from it, because one expert that differs changes a token more than all rounding does
(arXiv 2510.11370).

What is healthy: with float32 on both sides d is rounding, about 1e-6, and its mean square half of that of the
KL, far below 1e-6 nats; with float8 rollouts a KL below 0.015. It must stay flat while the weights do
(learning rate 0). A gap that grows with training comes from weights that were not handed over, or from text
that the two read differently.

Choices. It is measured in the forward pass that the first update makes anyway, so it costs nothing; where a
rollout serves several updates, that is the share of its samples which the first one gets. A skipped step has
no forward pass, and no gap. The percentile over several ranks is the largest of theirs.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from minglm.parallel import Workers

TAIL = 0.99
"""The share of the tokens that lies below the percentile."""


class Gap(NamedTuple):
    """Differences of log-probabilities between trainer and engine, nats."""

    mean: float
    """Of the absolute differences."""
    p99: float
    """Absolute difference that 99% of the tokens do not exceed."""
    worst: float
    """Largest absolute difference."""
    kl: float
    """Estimate of KL(mu, pi)."""


def measure_gap(log_ratios_T: Tensor, workers: Workers | None = None) -> Gap:
    """Return the gap of sampled tokens.

    Args:
        log_ratios_T: float, log pi - log mu of the tokens of this process, detached; may be empty.
        workers: those who have the other tokens; None: there are no others.
    """
    d_T = log_ratios_T.double().cpu()
    size_T = d_T.abs()
    kl_T = torch.expm1(d_T) - d_T
    count = torch.tensor(float(len(d_T)), dtype=torch.float64)
    sums = torch.stack([count, size_T.sum(), kl_T.sum()])
    p99 = 0.0
    worst = 0.0
    if len(d_T):
        rank = max(1, -int(-TAIL * len(d_T) // 1))  # of the first one that enough do not exceed
        p99 = float(size_T.kthvalue(rank).values)
        worst = float(size_T.amax())
    if workers is not None:
        sums = workers.sum(sums)
        p99 = workers.largest(p99)
        worst = workers.largest(worst)
    tokens, size, kl = sums.tolist()
    tokens = max(1.0, tokens)
    return Gap(size / tokens, p99, worst, kl / tokens)
