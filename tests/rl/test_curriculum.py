"""The curriculum: unbiased pass@k, tiers that never admit the impossible or the solved, intervals over problems."""

import random
from statistics import fmean

import pytest
from hypothesis import given
from hypothesis import strategies as st

from minglm.common.statistics import interval, pass_at_k
from minglm.rl.curriculum import EXTREME, PassRate, RateRange, measure, tiers_from_pass_rates
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


counts = st.integers(1, 512).flatmap(
    lambda n: st.integers(0, n).flatmap(lambda c: st.tuples(st.just(n), st.just(c)))
)


@given(seen=st.lists(counts, max_size=30), literal=st.booleans())
def test_tiers_never_admit_the_impossible_or_the_solved(seen, literal):
    """Every problem lands in one tier; those in a stage have a right and a wrong answer, and its pass rate."""
    rates = {i: PassRate(n, c, min(c, i % 2)) for i, (n, c) in enumerate(seen)}
    tiers = tiers_from_pass_rates(rates, extreme=None if literal else EXTREME)
    assert sorted(problem for tier in tiers for problem in tier) == sorted(rates)
    for problem in tiers.moderate + tiers.extreme:
        assert 0 < rates[problem].successes < rates[problem].attempts
    assert all(0.2 <= rates[p].successes / rates[p].attempts <= 0.8 for p in tiers.moderate)
    if literal:
        assert all(rates[problem].first_successes == 0 for problem in tiers.extreme)
    else:
        assert all(0.05 <= rates[p].successes / rates[p].attempts < 0.2 for p in tiers.extreme)


@given(counts=st.tuples(st.integers(-2, 4), st.integers(-2, 4), st.integers(-2, 4)))
def test_counts_that_no_draw_can_have_are_one_line(counts):
    """No attempt, more right answers than answers, more in the first draw than in all, or a negative count."""
    attempts, successes, first = counts
    if attempts >= 1 and 0 <= first <= successes <= attempts:
        tiers = tiers_from_pass_rates({0: PassRate(*counts)})
        assert sum(map(len, tiers)) == 1
        return
    with pytest.raises(ValueError, match=f"^attempts = {attempts}, successes = {successes}, "):
        PassRate(*counts)


@pytest.mark.parametrize("bad", [(0.8, 0.2), (-0.1, 0.5), (0.2, 1.1), (float("nan"), 0.5)])
def test_a_range_that_is_none_is_one_line(bad):
    """The ends must be in order, within 0 and 1, and numbers."""
    with pytest.raises(ValueError, match=r"moderate = .* range within 0 and 1"):
        tiers_from_pass_rates({}, moderate=RateRange(*bad))
    with pytest.raises(ValueError, match=r"extreme = .* range within 0 and 1"):
        tiers_from_pass_rates({}, extreme=RateRange(*bad))


def test_a_range_may_be_everything_or_one_rate():
    """Both ends may be 0, 1 or equal."""
    rates = {n: PassRate(10, n, 1) for n in range(1, 10)}
    everything = tiers_from_pass_rates(rates, moderate=RateRange(0, 1), extreme=None)
    assert everything.moderate == list(rates)
    assert tiers_from_pass_rates(rates, RateRange(0.3, 0.3), None).moderate == [3]
    assert tiers_from_pass_rates(rates, RateRange(1, 1), RateRange(0, 0)).between == list(rates)


def test_a_first_draw_of_nothing_is_one_line():
    """Its rate would be 0 / 0."""
    with pytest.raises(ValueError, match="first = 0"):
        measure(lambda k: 0, first=0)


def test_the_smallest_draws():
    """One answer is a draw; a limit that the first draw reaches leaves nothing to draw again."""
    assert measure(lambda k: 0, first=1, limit=1) == PassRate(1, 0, 0)
    assert measure(lambda k: k - 1, first=1, limit=2) == PassRate(2, 0, 0)
    assert measure(lambda k: k - 1, first=1, limit=3) == PassRate(3, 1, 0)
    assert measure(lambda k: 0, first=4, limit=2) == PassRate(4, 0, 0)


def test_ends_of_the_ranges():
    """Moderate takes both of its ends, extreme its lower one; at a common end the problem is moderate."""
    rates = {n: PassRate(100, n, 0) for n in (1, 4, 5, 19, 20, 80, 81, 99, 100, 0)}
    tiers = tiers_from_pass_rates(rates)
    assert tiers == ([20, 80], [5, 19], [100], [0], [1, 4, 81, 99])
    literal = tiers_from_pass_rates(
        {n: PassRate(512, n, min(n, 1)) for n in (1, 8, 256)}, extreme=None
    )
    assert literal.moderate == [256] and literal.between == [1, 8]


@given(rate=st.sampled_from([0.0, 0.004, 0.3, 1.0]), seed=st.integers(0, 2**32 - 1))
def test_measure_spends_512_answers_only_on_failures(rate, seed):
    """Eight answers where one of them is right, 512 where none is; all of them are counted."""
    generator = random.Random(seed)
    spent = []

    def attempt(k):
        right = sum(generator.random() < rate for _ in range(k))
        spent.append((k, right))
        return right

    seen = measure(attempt)
    first_right = spent[0][1]
    attempts = sum(k for k, _ in spent)
    successes = sum(right for _, right in spent)
    assert [k for k, _ in spent] == ([8] if first_right else [8, 504])
    assert seen == PassRate(attempts, successes, first_right)
    tiers = tiers_from_pass_rates({0: seen}, extreme=None)
    if not first_right:
        assert (tiers.extreme if seen.successes else tiers.unsolved) == [0]


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
