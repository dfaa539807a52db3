"""Choose problems by measured difficulty, in two tiers (paper 3.2, difficulty-based curriculum).

A group whose answers are all right or all wrong teaches nothing, so the problems must follow the model:

    stage one   moderate problems
    stage two   extremely hard ones: none of 8 answers is right, but of 512 at least one is, so that the answer is
                known to be within reach; only problems with a verified answer

Choices
- Problems never solved give no gradient and may have a wrong label; problems always solved give none either. Neither
  is ever admitted.
- At toy scale the paper's second stage destroys the policy: with about 1% of right answers the gradients are rare and
  tiny, and Adam makes full steps of them. The default range is a pass rate of 5% to 20%; `extreme=None` is the paper's
  rule. In both cases watch a held-out set of moderate problems and roll back when its score drops.

Simplified: difficulty is measured once before a stage, not followed during it.
"""

from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass
from typing import NamedTuple


@dataclass(frozen=True)
class PassRate:
    """The answers to one problem.

    Not wired yet: no stage uses it.
    """

    attempts: int
    """Answers drawn in all."""
    successes: int
    """Right ones among them."""
    first_successes: int
    """Right ones among the first draw (eight in the paper)."""

    def __post_init__(self) -> None:
        """Refuse counts that no draw can have."""
        if not 0 <= self.first_successes <= self.successes <= self.attempts or self.attempts < 1:
            raise ValueError(
                f"attempts = {self.attempts}, successes = {self.successes}, first_successes = {self.first_successes}: "
                "must not be negative, each at most the one before, and at least one attempt"
            )


class Tiers(NamedTuple):
    """Ids of problems by how hard they are; only the first two are trained on."""

    moderate: list[Hashable]
    """Stage one."""
    extreme: list[Hashable]
    """Stage two."""
    solved: list[Hashable]
    """Every answer is right."""
    unsolved: list[Hashable]
    """No answer is right."""
    between: list[Hashable]
    """In neither stage's range."""


class RateRange(NamedTuple):
    """A range of pass rates."""

    lowest: float
    highest: float

    def check(self, name: str) -> None:
        """Raise ValueError, naming the range, unless 0 <= lowest <= highest <= 1."""
        if not 0 <= self.lowest <= self.highest <= 1:
            raise ValueError(f"{name} = {tuple(self)}: must be a range within 0 and 1")


MODERATE = RateRange(0.2, 0.8)
EXTREME = RateRange(0.05, 0.2)


def measure(attempt: Callable[[int], int], first: int = 8, limit: int = 512) -> PassRate:
    """Measure one problem as the paper's tiers need it: `first` answers and, only if all are wrong, up to `limit`.

    Not wired yet: no stage uses it.

    Args:
        attempt: number of answers to draw -> number of right ones.
        first: answers of the first draw.
        limit: answers in all. The second draw is not stopped at its first success, which would bias the rate.

    Raises ValueError for a first draw of nothing, and for counts that no draw can have.
    """
    if first < 1:
        raise ValueError(f"first = {first}: must be at least 1")
    first_successes = attempt(first)
    if first_successes or limit <= first:
        return PassRate(first, first_successes, first_successes)
    return PassRate(limit, attempt(limit - first), 0)


def tiers_from_pass_rates(
    rates: Mapping[Hashable, PassRate],
    moderate: RateRange = MODERATE,
    extreme: RateRange | None = EXTREME,
) -> Tiers:
    """Sort problems into the two stages, in the given order.

    Not wired yet: no stage uses it.

    Args:
        rates: {id of a problem: its PassRate}.
        moderate: pass rates of stage one, both ends included.
        extreme: pass rates of stage two, the upper end excluded; None: the paper's rule, no success in the first draw
            and one later.

    Raises ValueError for a range that is none.
    """
    moderate.check("moderate")
    if extreme is not None:
        extreme.check("extreme")
    tiers = Tiers([], [], [], [], [])
    for problem, seen in rates.items():
        rate = seen.successes / seen.attempts
        if extreme is None:
            is_extreme = seen.first_successes == 0
        else:
            is_extreme = extreme.lowest <= rate < extreme.highest
        if seen.successes == 0:
            tiers.unsolved.append(problem)
        elif seen.successes == seen.attempts:
            tiers.solved.append(problem)
        elif is_extreme:
            tiers.extreme.append(problem)
        elif moderate.lowest <= rate <= moderate.highest:
            tiers.moderate.append(problem)
        else:
            tiers.between.append(problem)
    return tiers
