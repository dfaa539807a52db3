"""The curriculum: unbiased pass@k, tiers that never admit the impossible or the solved, intervals over problems."""

import json
import random
from statistics import fmean

import pytest
from hypothesis import given
from hypothesis import strategies as st

from minglm.common.statistics import interval, pass_at_k
from minglm.config import CurriculumConfig, ExtremeTier
from minglm.envs.base import Task, user
from minglm.rl.curriculum import (
    Curriculum,
    PassRate,
    Problem,
    Tier,
    Verdict,
    tier_of,
)
from minglm.testing.rl import check_pass_at_k


def test_contract_holds():
    """pass@k is the share of subsets with a right answer."""
    check_pass_at_k(pass_at_k)


def with_replacement(n, c, k):
    """Broken: return the obvious estimate, which is too low for every k above one."""
    return 1 - (1 - c / n) ** k


def first_k(n, c, k):
    """Broken: ask whether any answer at all was right."""
    return float(c > 0)


@pytest.mark.parametrize("broken", [with_replacement, first_k])
def test_contract_finds_the_broken_twin(broken):
    """Biased estimates are found."""
    with pytest.raises(AssertionError):
        check_pass_at_k(broken)


@given(n=st.integers(2, 512), c=st.integers(0, 512))
def test_pass_at_k_grows_with_k(n, c):
    """More draws never hurt; one draw is the pass rate; all draws are certain as soon as one is right."""
    c = min(c, n)
    values = [pass_at_k(n, c, k) for k in range(1, n + 1)]
    assert values == sorted(values)
    assert values[0] == pytest.approx(c / n)
    assert values[-1] == float(c > 0)


def test_impossible_counts_are_one_line():
    """More right answers than answers, or more draws than answers."""
    with pytest.raises(ValueError, match="impossible"):
        pass_at_k(4, 5, 1)
    with pytest.raises(ValueError, match="needs 1 to n = 4"):
        pass_at_k(4, 2, 8)


RATE = CurriculumConfig(pool=1)
LITERAL = CurriculumConfig(pool=1, extreme_tier=ExtremeTier.UNSOLVED)


@given(first=st.integers(0, 8), second=st.none() | st.integers(0, 504), literal=st.booleans())
def test_tiers_never_admit_the_impossible_or_the_solved(first, second, literal):
    """What is trained on has a right and a wrong answer, and the pass rate, or the misfortune, of its tier."""
    seen = PassRate(8, first) if second is None else PassRate(8, first, 504, second)
    tier = tier_of(seen, LITERAL if literal else RATE)
    right = first + (second or 0)
    attempts = seen.first + seen.second
    assert (tier == Tier.UNSOLVED) == (right == 0)
    assert (tier == Tier.SOLVED) == (right == attempts)
    if tier == Tier.EXTREME and literal:
        assert first == 0 and second
    elif tier == Tier.EXTREME:
        assert 0.05 <= seen.rate < 0.2
    elif tier == Tier.MODERATE:
        assert 0.2 <= seen.rate <= 0.8
    low, high = seen.interval
    assert low <= seen.rate <= high and low < high


def test_ends_of_the_ranges():
    """Moderate takes both of its ends, extreme its lower one; at a common end the problem is moderate."""
    tiers = {}
    for right in (0, 1, 4, 5, 19, 20, 80, 81, 99, 100):
        tiers.setdefault(tier_of(PassRate(100, right), RATE), []).append(right)
    assert tiers == {
        Tier.UNSOLVED: [0],
        Tier.BETWEEN: [1, 4, 81, 99],
        Tier.EXTREME: [5, 19],
        Tier.MODERATE: [20, 80],
        Tier.SOLVED: [100],
    }


def test_the_second_draw_alone_tells_the_rate():
    """The first chose the problem for its bad luck: 0 of 8 and 12 of 56 is a rate of 21%, and moderate."""
    seen = PassRate(8, 0, 56, 12)
    assert seen.rate == 12 / 56 and tier_of(seen, RATE) == Tier.MODERATE
    assert tier_of(seen, LITERAL) == Tier.EXTREME


@pytest.mark.parametrize(
    ("attempts", "right", "rate", "literal"),
    [(8, 0, True, True), (8, 1, True, False), (8, 2, False, False), (10, 2, True, False)],
)
def test_who_is_drawn_again(attempts, right, rate, literal):
    """By the paper's rule those without a right answer; by rate all that may lie below a fifth, a fifth among them."""
    assert RATE.leaves_open(right, attempts) == rate
    assert LITERAL.leaves_open(right, attempts) == literal


def share_called_extreme(chance, second):
    """Return in how many of 1,000 screenings a problem of this pass rate is extreme, with such a second draw."""
    generator = random.Random(0)

    def right(answers):
        return sum(generator.random() < chance for _ in range(answers))

    found = 0
    for _ in range(1000):
        seen = PassRate(8, right(8))
        if second and RATE.leaves_open(seen.first_right, seen.first):
            seen = seen._replace(second=second, second_right=right(second))
        found += tier_of(seen, RATE) == Tier.EXTREME
    return found / 1000


def test_a_problem_of_two_percent_is_seldom_called_extreme():
    """Eight answers call it so in 15% of the screenings, 200 in few; a problem of 10% is found by them in most."""
    assert 0.1 < share_called_extreme(0.02, 0) < 0.2
    assert share_called_extreme(0.02, 192) < 0.03
    assert share_called_extreme(0.1, 192) > 0.7


def problem(environment, number):
    """Return a problem with a number for a name."""
    task = Task(f"{environment}{number}", environment, (user("?"),), (), None, 1)
    return Problem(task, bool(number % 2))


def curriculum(moderate, extreme, steps=10, names=("a", "b", "a"), held_out=3, **changes):
    """Return a curriculum with so many problems of each tier, by environment."""
    tiers = {tier: {name: [] for name in names} for tier in Tier}
    for tier, counts in ((Tier.MODERATE, moderate), (Tier.EXTREME, extreme)):
        for name, count in counts.items():
            tiers[tier][name] = [problem(f"{name}-{tier}-", i) for i in range(count)]
    config = CurriculumConfig(pool=1, **changes)
    held = [problem("held", i) for i in range(held_out)]
    return Curriculum(config, steps, names, tiers, held, 5)


@given(
    share=st.sampled_from([0.0, 0.3, 0.5, 1.0]),
    a=st.integers(0, 4),
    b=st.integers(0, 4),
    steps=st.integers(1, 12),
)
def test_moderate_steps_come_first(share, a, b, steps):
    """Hard problems after the share of the steps; a tier without problems gives its steps to the other."""
    if a + b == 0:
        with pytest.raises(ValueError, match="no problem of the pool is moderate or extreme"):
            curriculum({"a": 0}, {"b": 0})
        return
    subject = curriculum({"a": a}, {"b": b}, steps, moderate_share=share)
    tiers = [subject.tier(step) for step in range(steps)]
    moderate = round(share * steps)
    if a == 0:
        moderate = 0
    if b == 0:
        moderate = steps
    assert tiers == [Tier.MODERATE] * moderate + [Tier.EXTREME] * (steps - moderate)
    changes = [step for step in range(steps) if subject.changes_at(step)]
    assert changes == ([moderate] if 0 < moderate < steps else [])
    for step, tier in enumerate(tiers):
        for number in range(6):
            dealt = subject.problem(step, number)
            assert dealt == subject.problem(step, number)
            assert dealt.task.environment.startswith("a-mod" if tier == Tier.MODERATE else "b-ext")


def test_each_pass_deals_every_problem_once_and_by_weight():
    """With names a, b, a the first environment has two of three places; each pass has another order."""
    subject = curriculum({"a": 4, "b": 2}, {"a": 1})
    dealt = [subject.problem(0, number).task.id for number in range(6 * 20)]
    passes = [dealt[i : i + 6] for i in range(0, len(dealt), 6)]
    assert all(len(set(each)) == 6 for each in passes)
    assert [name[0] for name in dealt[:6]] == ["a", "b", "a", "a", "b", "a"]
    assert len({tuple(each) for each in passes}) > 1


def test_the_guard_remembers_holds_and_falls():
    """Scored before the first hard step, every few steps, and at the end; a shown fall makes the rest moderate."""
    subject = curriculum({"a": 3}, {"a": 3}, steps=12, guard_every=4, guard_drop=0.1)
    subject.held_out = [problem("held", i) for i in range(200)]
    assert [done for done in range(13) if subject.is_due(done)] == [6, 10, 12]
    assert [done for done in range(13) if subject.guards(done)] == list(range(6, 13))
    assert subject.check([0.5] * 200, 6) == Verdict.REMEMBERED and not subject.is_due(6)
    assert subject.check([0.45] * 200, 10) == Verdict.HELD  # within the drop
    restored = curriculum({"a": 3}, {"a": 3}, steps=12, guard_every=4, guard_drop=0.1)
    restored.load_state_dict(json.loads(json.dumps(subject.state_dict())))
    restored.held_out = subject.held_out
    for one in (subject, restored):
        assert one.check([0.3] * 200, 12) == Verdict.FALLEN
        assert one.tier(11) == Tier.MODERATE and not one.guards(11) and not one.is_due(12)
        assert one.baseline_score() == 0.5


def test_a_failed_environment_hides_no_fall():
    """Problems that could not be scored before the hard steps are judged from their first score on, not from 0."""
    subject = curriculum({"a": 3}, {"a": 3}, steps=12, guard_every=2, guard_drop=0.1)
    subject.held_out = [problem("held", i) for i in range(200)]
    assert subject.check([None] * 100 + [0.8] * 100, 6) == Verdict.REMEMBERED
    assert subject.baseline_score() == 0.8
    assert subject.check([0.8] * 100 + [None] * 100, 8) == Verdict.HELD
    assert subject.check([0.5] * 200, 10) == Verdict.FALLEN
    nothing = curriculum({"a": 3}, {"a": 3}, steps=12)
    assert nothing.check([None] * 200, 6) == Verdict.REMEMBERED
    assert nothing.check([0.0] * 200, 8) == Verdict.HELD


def test_noise_alone_does_not_roll_back():
    """Over many checks of unchanged weights the score is seldom shown to have fallen; a collapse always is."""
    generator = random.Random(0)
    fallen = 0
    for _ in range(200):
        chances = [generator.random() for _ in range(60)]
        scores = [
            [sum(generator.random() < chance for _ in range(4)) / 4 for chance in chances]
            for _ in range(2)
        ]
        subject = curriculum({"a": 1}, {"a": 1})
        subject.check(scores[0], 5)
        fallen += subject.check(scores[1], 7) == Verdict.FALLEN
        collapsed = curriculum({"a": 1}, {"a": 1})
        collapsed.check(scores[0], 5)
        assert collapsed.check([0.0] * 60, 7) == Verdict.FALLEN
    assert fallen <= 4  # the drop of 0.1 comes on top of the risk of 5%


@given(st.lists(st.lists(st.integers(0, 1), min_size=1, max_size=8), min_size=1, max_size=20))
def test_interval_holds_the_mean(values):
    """The interval lies in [0, 1], contains avg@k, and never collapses to a point."""
    low, high = interval(values)
    avg_at_k = fmean(fmean(answers) for answers in values)
    assert 0 <= low <= avg_at_k + 1e-9
    assert avg_at_k - 1e-9 <= high <= 1
    assert low < high


@given(right=st.integers(0, 40), wrong=st.integers(1, 40))
def test_single_answers_give_wilson(right, wrong):
    """With one answer a problem it is Wilson's interval: its ends solve |p - q| = z sqrt(q (1 - q) / n)."""
    n = right + wrong
    for q in interval([1] * right + [0] * wrong):
        deviation = (q * (1 - q) / n) ** 0.5
        assert abs(right / n - q) == pytest.approx(1.959964 * deviation, abs=1e-5)


@given(
    st.lists(
        st.lists(st.sampled_from([0.0, 0.5, 1.0]), min_size=1, max_size=5), min_size=1, max_size=8
    )
)
def test_interval_is_wilson_with_an_effective_number(values):
    """Its ends solve |p - q| = z sqrt(q (1 - q) / n), n = p (1 - p) / Var(p) between the problems and the answers."""
    means = [fmean(answers) for answers in values]
    p = fmean(means)
    problems = len(values)
    answers = sum(map(len, values))
    n = problems
    if len(set(means)) > 1:
        deviations = sum((mean - p) ** 2 for mean in means)
        n = p * (1 - p) / (deviations / (problems - 1) / problems)
        n = min(max(n, problems), answers)
    for q in interval(values):
        deviation = (q * (1 - q) / n) ** 0.5
        assert abs(p - q) == pytest.approx(1.959964 * deviation, abs=1e-6)


def coverage(bound, problems, answers, difficulty, trials=400):
    """Return the share of simulated evaluations whose interval holds the true mean of a Beta population of problems."""
    generator = random.Random(0)
    inside = 0
    truth = difficulty[0] / sum(difficulty)
    for _ in range(trials):
        rates = [generator.betavariate(*difficulty) for _ in range(problems)]
        low, high = bound([[generator.random() < rate for _ in range(answers)] for rate in rates])
        inside += low <= truth <= high
    return inside / trials


@pytest.mark.parametrize("problems, answers", [(20, 1), (20, 8), (60, 16)])
@pytest.mark.parametrize("difficulty", [(1, 1), (0.3, 0.7), (8, 2)])
def test_interval_covers_the_truth(problems, answers, difficulty):
    """About 95% of the intervals hold the population's mean, for alike and for very different problems."""
    # 400 trials have a standard error of 1.1% at 95%: three of them, and one more percent for small samples
    assert coverage(interval, problems, answers, difficulty) > 0.905


def test_counting_answers_instead_of_problems_does_not_cover():
    """Treating every answer as independent claims far too much: the twin must fail the same simulation."""

    def pooled(values):
        return interval([score for answers in values for score in answers])

    assert coverage(pooled, 20, 8, (0.3, 0.7)) < 0.8


def test_interval_refuses_what_it_cannot_judge():
    """No problems, a problem without answers, scores outside [0, 1]."""
    for values in ([], [[1], []], [0.5, 1.5], [-0.5, 0.5]):
        with pytest.raises(ValueError, match="an interval needs"):
            interval(values)
