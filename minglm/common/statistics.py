"""Estimate scores and how sure they are: pass@k, avg@k, confidence intervals (paper section 4, protocol)."""

import math
from statistics import NormalDist, fmean, variance


def pass_at_k(n, c, k):
    """Unbiased estimate of pass@k from c right answers among n, computed with whole numbers.

    Raises ValueError unless 0 <= c <= n and 1 <= k <= n.
    """
    if not 0 <= c <= n:
        raise ValueError(f"pass@k: c = {c} right answers among n = {n} is impossible")
    if not 1 <= k <= n:
        raise ValueError(f"pass@{k} needs 1 to n = {n} answers; draw more answers or lower k")
    return 1.0 - math.comb(n - c, k) / math.comb(n, k)


def avg_at_k(values):
    """Mean over problems of the mean over their answers. values: one list of scores per problem."""
    return fmean(fmean(answers) for answers in values)


def interval(values, confidence=0.95):
    """(low, high) around the mean over problems: a confidence interval that treats a problem as one observation.

    values: one number in [0, 1] per problem, or one list of such numbers (the scores of its answers) per problem.
    Raises ValueError for no problems or for a value outside [0, 1].
    """
    answers = [list(value) if hasattr(value, "__iter__") else [value] for value in values]
    scores = [score for problem in answers for score in problem]
    if not scores or not all(answers):
        raise ValueError("an interval needs at least one problem, and an answer to each")
    if min(scores) < 0 or max(scores) > 1:
        raise ValueError("an interval needs scores between 0 and 1")
    means = [fmean(problem) for problem in answers]
    p, problems = fmean(means), len(means)
    spread = variance(means) / problems if problems > 1 else 0.0
    n = min(max(p * (1 - p) / spread, problems), len(scores)) if spread else problems
    z2 = NormalDist().inv_cdf(0.5 + confidence / 2) ** 2
    centre = (p + z2 / (2 * n)) / (1 + z2 / n)
    half = math.sqrt(z2 * (p * (1 - p) / n + z2 / (4 * n * n))) / (1 + z2 / n)
    return max(0.0, centre - half), min(1.0, centre + half)
