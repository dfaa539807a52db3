"""Estimate scores, differences and their uncertainty: pass@k and intervals over problems (paper section 4, protocol).

    pass@k    = 1 - C(n - c, k) / C(n, k),   c right answers among n
    interval  = Wilson interval of p with effective sample size n_eff

    centre     = (p + z^2 / 2 n_eff) / (1 + z^2 / n_eff)
    half width = z sqrt( p (1 - p) / n_eff + z^2 / 4 n_eff^2 ) / (1 + z^2 / n_eff)
    n_eff      = p (1 - p) / Var(p),   Var(p) = sample variance of the problems' means / number of problems

p is the mean over problems. The answers to one problem are not independent, so n_eff lies between the number
of problems (the answers to a problem all agree) and the number of answers (they are independent).

Two models that answer the same problems are compared problem by problem: what makes a problem hard for both
is in neither the difference nor its interval.

    difference = mean over problems of (score after - score before)
    interval   = percentiles of that mean over problems drawn again, with replacement (bootstrap)
"""

import math
from collections.abc import Sequence
from statistics import NormalDist, fmean, variance
from typing import NamedTuple

import numpy as np

RESAMPLES = 4000
"""Draws of the bootstrap: the ends of a 95% interval then vary by a few hundredths of its width."""


class Difference(NamedTuple):
    """A mean difference over problems, and its interval."""

    mean: float
    low: float
    high: float


def pass_at_k(n: int, c: int, k: int) -> float:
    """Return the unbiased estimate of pass@k from c right answers among n, computed with whole numbers.

    Raises ValueError unless 0 <= c <= n and 1 <= k <= n.
    """
    if not 0 <= c <= n:
        raise ValueError(f"pass@k: c = {c} right answers among n = {n} is impossible")
    if not 1 <= k <= n:
        raise ValueError(f"pass@{k} needs 1 to n = {n} answers; draw more answers or lower k")
    return 1.0 - math.comb(n - c, k) / math.comb(n, k)


def interval(
    values: Sequence[float] | Sequence[Sequence[float]], confidence: float = 0.95
) -> tuple[float, float]:
    """Return (low, high), the Wilson interval with effective sample size around the mean over problems.

    values: one number in [0, 1] per problem, or one list of such numbers (the scores of its answers) per
    problem. Raises ValueError for no problems or for a value outside [0, 1].
    """
    answers = [list(value) if isinstance(value, Sequence) else [value] for value in values]
    scores = [score for problem in answers for score in problem]
    if not scores or not all(answers):
        raise ValueError("an interval needs at least one problem, and an answer to each")
    if min(scores) < 0 or max(scores) > 1:
        raise ValueError("an interval needs scores between 0 and 1")
    means = [fmean(problem) for problem in answers]
    p = fmean(means)
    problems = len(means)

    # n_eff = p (1 - p) / Var(p), between the number of problems and the number of answers
    variance_of_p = variance(means) / problems if problems > 1 else 0.0
    effective_n: float = problems
    if variance_of_p:
        effective_n = min(max(p * (1 - p) / variance_of_p, problems), len(scores))

    z2 = NormalDist().inv_cdf(0.5 + confidence / 2) ** 2
    shrink = 1 + z2 / effective_n
    centre = (p + z2 / (2 * effective_n)) / shrink
    spread = p * (1 - p) / effective_n + z2 / (4 * effective_n * effective_n)
    half_width = math.sqrt(z2 * spread) / shrink
    return max(0.0, centre - half_width), min(1.0, centre + half_width)


def paired_difference(
    before: Sequence[float | None], after: Sequence[float | None], confidence: float = 0.95
) -> Difference:
    """Return the mean of after - before over problems, with its bootstrap interval; the same values, the same interval.

    before, after: the scores of two models on the same problems, in the same order. A problem that either
    could not be scored on (None) is left out. Raises ValueError for sequences of different length, or without
    a common problem.
    """
    if len(before) != len(after):
        raise ValueError(
            f"{len(before)} problems before and {len(after)} after: a paired difference needs the same ones"
        )
    differences = []
    for first, second in zip(before, after):
        if first is not None and second is not None:
            differences.append(second - first)
    if not differences:
        raise ValueError("a paired difference needs a problem that both were scored on")
    values = np.array(differences)
    draws = np.random.default_rng(0).integers(len(values), size=(RESAMPLES, len(values)))
    tail = (1 - confidence) / 2
    low, high = np.quantile(values[draws].mean(axis=1), (tail, 1 - tail))
    return Difference(float(values.mean()), float(low), float(high))
