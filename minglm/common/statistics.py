"""Estimate scores and their uncertainty: pass@k and confidence intervals over problems (paper section 4, protocol).

    pass@k    = 1 - C(n - c, k) / C(n, k),   c right answers among n
    interval  = Wilson interval of p with effective sample size n_eff

    centre     = (p + z^2 / 2 n_eff) / (1 + z^2 / n_eff)
    half width = z sqrt( p (1 - p) / n_eff + z^2 / 4 n_eff^2 ) / (1 + z^2 / n_eff)
    n_eff      = p (1 - p) / Var(p),   Var(p) = sample variance of the problems' means / number of problems

p is the mean over problems. The answers to one problem are not independent, so n_eff lies between the number of
problems (the answers to a problem all agree) and the number of answers (they are independent).
"""

import math
from collections.abc import Sequence
from statistics import NormalDist, fmean, variance


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

    values: one number in [0, 1] per problem, or one list of such numbers (the scores of its answers) per problem.
    Raises ValueError for no problems or for a value outside [0, 1].
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
