"""Choose problems by measured difficulty, in two tiers (paper 3.2, difficulty-based curriculum).

A group whose answers are all right or all wrong teaches nothing, so the problems must follow the model.
Before the stage each problem of a pool is answered a few times (`minglm.rl.screening`); then

    first steps   moderate problems
    later steps   extremely hard ones: none of 8 answers is right, but of 512 at least one is, so that the answer is
                  known to be within reach; only problems with a verified answer

Choices
- Problems never solved give no gradient and may have a wrong label; problems always solved give none either. Neither
  is ever admitted. Every environment here computes its labels by a program, so all answers are verified.
- At toy scale the paper's second tier destroys the policy: with about 1% of right answers the gradients are rare and
  tiny, and an optimizer that normalises makes full steps of them. `ExtremeTier.RATE`, the default, is a pass rate of
  5% to 20%; `ExtremeTier.UNSOLVED` is the paper's rule.
- A rate of 5% cannot be told from one of 2% by eight answers. Every problem that may be extreme is drawn again, and its
  rate is that of the second draw *alone*: the first one chose it for its bad luck and would make it look harder than
  it is.
- A held-out set of moderate problems, of the development split, is scored before the first hard step and every few
  steps from then on. When it is shown to have fallen by more than `guard_drop`, the weights of the last score that was
  healthy return, and the remaining steps are moderate ones.

Simplified: difficulty is measured once before a stage, not followed during it.
"""

import random
from collections.abc import Mapping, Sequence
from enum import StrEnum
from statistics import fmean
from typing import Any, NamedTuple

from minglm.common.statistics import interval
from minglm.config.posttraining import CurriculumConfig, ExtremeTier
from minglm.envs.base import Task
from minglm.rl.temperature import upper_bound

GUARD_RISK = 0.05
"""Chance of a rollback although the score has not fallen by more than the drop."""


class Tier(StrEnum):
    """How hard a problem is for the model; only the first two are trained on."""

    MODERATE = "moderate"
    """Of the first steps."""
    EXTREME = "extreme"
    """Of the later steps."""
    SOLVED = "solved"
    """Every answer is right."""
    UNSOLVED = "unsolved"
    """No answer is right."""
    BETWEEN = "between"
    """In neither stage's range."""


class PassRate(NamedTuple):
    """The answers to one problem."""

    first: int
    """Answers of the first draw."""
    first_right: int
    """Right ones among them."""
    second: int = 0
    """Answers of the second draw; 0 where there was none."""
    second_right: int = 0
    """Right ones among them."""

    @property
    def rate(self) -> float:
        """Return the share of right answers, of the second draw where there was one."""
        if self.second:
            return self.second_right / self.second
        return self.first_right / self.first

    @property
    def interval(self) -> tuple[float, float]:
        """Return the 95% interval of the rate."""
        attempts, right = self.first, self.first_right
        if self.second:
            attempts, right = self.second, self.second_right
        return interval([1.0] * right + [0.0] * (attempts - right))


def tier_of(seen: PassRate, config: CurriculumConfig) -> Tier:
    """Return the tier of a problem."""
    attempts = seen.first + seen.second
    right = seen.first_right + seen.second_right
    if right == 0:
        return Tier.UNSOLVED
    if right == attempts:
        return Tier.SOLVED
    if config.extreme_tier == ExtremeTier.UNSOLVED:
        is_extreme = seen.first_right == 0
    else:
        is_extreme = config.extreme_lowest <= seen.rate < config.extreme_highest
    if is_extreme:
        return Tier.EXTREME
    if config.moderate_lowest <= seen.rate <= config.moderate_highest:
        return Tier.MODERATE
    return Tier.BETWEEN


class Problem(NamedTuple):
    """A problem of the pool."""

    task: Task
    thinking: bool
    """Its thinking switch, in the screening and in training."""


class Verdict(StrEnum):
    """What scoring the held-out moderate problems led to."""

    REMEMBERED = "remembered"
    """The score before the first hard step."""
    HELD = "held"
    """It is not shown to have fallen."""
    FALLEN = "fallen"
    """It has fallen by more than the drop: the weights go back, and the stage to moderate problems."""


class Curriculum:
    """Deal the problems of a stage by tier, and watch that the hard ones do no harm.

    Args:
        config: tiers, share of moderate steps, guard.
        steps: of the stage.
        names: environments in the order in which they take turns; a repeated name has that weight.
        tiers: problems of each tier by environment; without hard ones all steps are moderate, and the reverse.
        held_out: moderate problems of the development split.
        seed: decides the order of the problems.

    Raises ValueError where neither tier has a problem.
    """

    def __init__(
        self,
        config: CurriculumConfig,
        steps: int,
        names: Sequence[str],
        tiers: Mapping[Tier, Mapping[str, Sequence[Problem]]],
        held_out: Sequence[Problem],
        seed: int,
    ) -> None:
        self.config = config
        self.steps = steps
        self.names = names
        self.tiers = tiers
        self.held_out = held_out
        self.seed = seed
        self.fallen = False
        """Whether the hard problems did harm, so that the remaining steps are moderate."""
        self.baseline: list[float | None] | None = None
        """Scores of the held-out problems before the first hard step; None where every environment failed so far."""
        self.checked = -1
        """Steps done at the last check."""
        if not any(tiers[tier][name] for tier in (Tier.MODERATE, Tier.EXTREME) for name in names):
            raise ValueError(
                "curriculum: no problem of the pool is moderate or extreme for this model; raise pool, or set it to 0"
            )

    @property
    def switch(self) -> int:
        """Return the number of moderate steps before the hard ones."""
        moderate, extreme = (
            any(self.tiers[tier][name] for name in self.names)
            for tier in (Tier.MODERATE, Tier.EXTREME)
        )
        if not extreme:
            return self.steps
        return round(self.config.moderate_share * self.steps) if moderate else 0

    def tier(self, step: int) -> Tier:
        """Return the tier that a step, numbered from 0, trains on."""
        has_moderate = any(self.tiers[Tier.MODERATE][name] for name in self.names)
        if step < self.switch or (self.fallen and has_moderate):
            return Tier.MODERATE
        return Tier.EXTREME

    def changes_at(self, step: int) -> bool:
        """Return whether a step trains on another tier than the step before, so that their rewards differ."""
        return step > 0 and self.tier(step) != self.tier(step - 1)

    def problem(self, step: int, number: int) -> Problem:
        """Return the problem of a step that has this number in the stage.

        Each pass over the problems of a tier has an order of its own.
        """
        pool = self.tiers[self.tier(step)]
        names = [name for name in self.names if pool[name]]
        turn, place = divmod(number, len(names))
        name = names[place]
        dealt = turn * names.count(name) + names[:place].count(name)
        epoch, position = divmod(dealt, len(pool[name]))
        order = list(range(len(pool[name])))
        random.Random(f"{self.seed}/{self.tier(step)}/{name}/{epoch}").shuffle(order)
        return pool[name][order[position]]

    def is_due(self, done: int) -> bool:
        """Return whether the held-out problems are to be scored when so many steps are done."""
        hard = done - self.switch
        watched = bool(self.held_out) and self.switch < self.steps and not self.fallen
        is_time = hard >= 0 and (hard % self.config.guard_every == 0 or done == self.steps)
        return watched and is_time and done != self.checked

    def guards(self, done: int) -> bool:
        """Return whether only weights with a healthy score may be kept, when so many steps are done."""
        return bool(self.held_out) and not self.fallen and done >= self.switch

    def check(self, scores: Sequence[float | None], done: int) -> Verdict:
        """Take the scores of the held-out problems when so many steps are done; remember the first, judge the others.

        A problem whose environment failed (None) is not judged; its first score is remembered later.
        """
        self.checked = done
        if self.baseline is None:
            self.baseline = list(scores)
            return Verdict.REMEMBERED
        pairs = list(zip(self.baseline, scores, strict=True))
        changes = [now - old for old, now in pairs if old is not None and now is not None]
        self.baseline = [now if old is None else old for old, now in pairs]
        # shown to lie below -drop
        self.fallen = upper_bound(changes, GUARD_RISK) < -self.config.guard_drop
        return Verdict.FALLEN if self.fallen else Verdict.HELD

    def baseline_score(self) -> float:
        """Return the mean score of the held-out problems before the first hard step, 0 where none has one."""
        assert self.baseline, "nothing was scored yet"
        return mean_known(self.baseline)

    def state_dict(self) -> dict[str, Any]:
        """Return what a resumed run needs, ready for JSON."""
        return {"fallen": self.fallen, "baseline": self.baseline, "checked": self.checked}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore the state returned by `state_dict`."""
        self.fallen = state["fallen"]
        self.baseline = state["baseline"]
        self.checked = state["checked"]


def mean_known(scores: Sequence[float | None]) -> float:
    """Return the mean of the scores that there are; 0 without any."""
    known = [score for score in scores if score is not None]
    return fmean(known) if known else 0.0
