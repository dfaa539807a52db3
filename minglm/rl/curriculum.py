"""Which problems to ask, by measured difficulty, and how sure a measured rate is (paper 3.2; protocol of section 4).

A group whose answers are all right or all wrong teaches nothing, so the problems must follow the model:

    stage one   moderate problems
    stage two   extremely hard ones: none of 8 answers is right, but of 512 at least one is, so that the answer is
                known to be within reach; only problems with a verified answer

    pass@k = 1 - C(n - c, k) / C(n, k)      for c right answers among n >= k: the chance that k drawn without
                                            replacement hold a right one; unbiased, unlike 1 - (1 - c/n)^k
    avg@k  = mean over problems of the mean over their k answers

Choices
- Problems never solved give no gradient and may have a wrong label; problems always solved give none either. Neither
  is ever admitted.
- At toy scale the paper's second stage destroys the policy: with about 1% of right answers the gradients are rare and
  tiny, and Adam makes full steps of them. The default band is a pass rate of 5% to 20%; `extreme=None` is the paper's
  rule. Either way watch a held-out set of moderate problems and go back when it drops.
- The interval counts problems, not answers: answers to one problem resemble each other, and k of them are worth less
  than k problems. It is Wilson's, which stays inside [0, 1] and has a width even at 0 and 1, with the number of answers
  replaced by the number of independent ones that would vary as much as the problem means do:

    n_eff = p (1 - p) / (s^2 / problems)    s: standard deviation of the problem means; problems <= n_eff <= answers

Simplified: difficulty is measured once before a stage, not followed while it lasts.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class PassRate:
    """What was seen of one problem."""

    attempts: int
    """Answers drawn in all."""
    successes: int
    """Right ones among them."""
    first_successes: int
    """Right ones among the first draw (eight in the paper)."""


def measure(attempt, first=8, limit=512):
    """Measure one problem as the paper's tiers need it: `first` answers, and only if all fail, up to `limit`.

    attempt: callable, number of answers to draw -> number of right ones. Returns a PassRate. The second draw is not
    stopped at its first success, which would bias the rate.
    """
    early = attempt(first)
    if early or limit <= first:
        return PassRate(first, early, early)
    return PassRate(limit, attempt(limit - first), 0)


def tiers_from_pass_rates(rates, moderate=(0.2, 0.8), extreme=(0.05, 0.2)):
    """Sort problems into the two stages.

    rates: dict from a problem's id to its PassRate. moderate: (lowest, highest) pass rate of stage one.
    extreme: (lowest, below) pass rate of stage two; None: the paper's rule, no success in the first draw and one later.
    Returns lists of ids in the given order: `moderate`, `extreme`, and, admitted to neither stage, `solved` (always),
    `unsolved` (never) and `between`.
    """
    tiers = {name: [] for name in ("moderate", "extreme", "solved", "unsolved", "between")}
    for problem, seen in rates.items():
        rate = seen.successes / seen.attempts
        if extreme is None:
            hard = seen.first_successes == 0
        else:
            hard = extreme[0] <= rate < extreme[1]
        if seen.successes == 0:
            tier = "unsolved"
        elif seen.successes == seen.attempts:
            tier = "solved"
        elif hard:
            tier = "extreme"
        else:
            tier = "moderate" if moderate[0] <= rate <= moderate[1] else "between"
        tiers[tier].append(problem)
    return tiers
