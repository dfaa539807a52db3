"""Expect how many answers a stage of RL draws to screen its problems, before its first step (paper 3.2).

    answers = environments * (pool * (screen + P * (search - screen)) + guard_problems * screen)
    P       = sum over the r of which `screen` answers leave it open whether a problem is extreme, of p(r)
    p(r)    = C(2r, r) C(2(n - r), n - r) / 4^n                   r of n answers are right, n = screen

p(r) is what pass rates of Beta(1/2, 1/2) give, the U of a model that solves most problems nearly always or nearly never:
20% of the problems have none of 8 answers right, 10% have one.

Choices
- The shares depend on the model, which nobody has measured before the run, so this is an expectation. A pool that is harder
  for the model is searched more: 20 to 26% of the toy's had none of 8 right (`figures/toy`). Where every problem is
  searched there are `search` answers to each, and more cannot be.

Simplified: what guards and probes of the temperature draw during the stage is left out; it depends on the run.
"""

from math import exp, lgamma, log

from minglm.config.posttraining import CurriculumConfig, RLConfig


def screening_answers(config: RLConfig) -> float:
    """Expect the answers that screening draws for a stage; 0 without a pool."""
    curriculum = config.curriculum
    if not curriculum.pool:
        return 0.0
    searched = searched_share(curriculum) * (curriculum.search - curriculum.screen)
    pool = curriculum.pool * (curriculum.screen + searched)
    guard = curriculum.guard_problems * curriculum.screen
    return len(set(config.environments)) * (pool + guard)


def searched_share(config: CurriculumConfig) -> float:
    """Expect the share of a pool that is drawn a second time, P of the module's equation."""
    counts = range(config.screen + 1)
    searched = [right for right in counts if config.leaves_open(right, config.screen)]
    return sum(chance(right, config.screen) for right in searched)


def chance(right: int, answers: int) -> float:
    """Return p(r): how likely so many of the answers to a problem are right."""
    wrong = answers - right
    return exp(_log_central(right) + _log_central(wrong) - answers * log(4))


def _log_central(n: int) -> float:
    """Return log C(2n, n)."""
    return lgamma(2 * n + 1) - 2 * lgamma(n + 1)
