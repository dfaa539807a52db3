"""The temperature controller: patient while the reward climbs, and never above what accuracy allows."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from minglm.rl.temperature import TemperatureController
from minglm.testing.rl import check_temperature


def test_contract_holds():
    """Climb, plateau, choice and resumption."""
    check_temperature(TemperatureController)


class Impatient(TemperatureController):
    """Probes at every step."""

    def observe(self, reward, evaluate):
        """Broken: never ask whether the reward stands still."""
        self._probe(evaluate, reward, reward)
        return self.temperature


class Best(TemperatureController):
    """Takes the most accurate temperature, which gives up exploration."""

    def _probe(self, evaluate, before, now):
        super()._probe(evaluate, before, now)
        self.temperature = max(self.log[-1]["scores"], key=lambda pair: pair[1])[0]


class Hottest(TemperatureController):
    """Always takes the highest temperature."""

    def _probe(self, evaluate, before, now):
        super()._probe(evaluate, before, now)
        self.temperature = max(self.log[-1]["scores"])[0]


class Forgetful(TemperatureController):
    """Does not store the rewards it has seen."""

    def load_state_dict(self, state):
        """Broken: lose the windows."""
        super().load_state_dict(state | {"rewards": []})


@pytest.mark.parametrize("broken", [Impatient, Best, Hottest, Forgetful])
def test_contract_finds_the_broken_twin(broken):
    """Each shortcut is found."""
    with pytest.raises(AssertionError):
        check_temperature(broken)


@given(tolerance=st.floats(0, 0.2), level=st.floats(0.2, 0.9))
def test_relative_and_absolute_drop(tolerance, level):
    """The same table of scores allows a relative drop of at most that share of the best, or an absolute one."""
    table = {1.0: level, 1.2: level * 0.95}
    for relative, allowed in ((True, 0.05), (False, level * 0.05)):
        if math.isclose(tolerance, allowed, rel_tol=1e-6):
            continue  # rounding decides
        subject = TemperatureController(grid=(1.2,), window=1, drop=tolerance, relative=relative)
        subject.observe(0.5, table.get)
        assert subject.observe(0.5, table.get) == (1.2 if tolerance > allowed else 1.0)


def test_decisions_are_logged():
    """Every probe leaves what it saw and what it decided, and the windows start anew."""
    subject = TemperatureController(grid=(1.2, 1.4), window=2)
    table = {1.0: 0.8, 1.2: 0.795, 1.4: 0.5}
    for reward in (0.1, 0.1, 0.5, 0.5, 0.5):  # the reward rises once, then stands still
        assert subject.observe(reward, table.get) == 1.0
    assert subject.observe(0.5, table.get) == 1.2
    (decision,) = subject.log
    assert decision["step"] == 6
    assert (decision["from"], decision["to"]) == (1.0, 1.2)
    assert dict(decision["scores"]) == table
    assert decision["bound"] == pytest.approx(0.792)
    assert subject.observe(0.5, table.get) == 1.2 and len(subject.log) == 1


def test_falling_reward_is_no_plateau():
    """A policy that gets worse is not made more random."""
    subject = TemperatureController(window=3)
    for step in range(20):
        assert subject.observe(1 - 0.04 * step, lambda t: pytest.fail("probed")) == 1.0


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_failed_probe_is_ignored(bad):
    """A temperature whose score is no number is not chosen; when all fail, nothing changes."""
    subject = TemperatureController(grid=(1.2,), window=1)
    for table in ({1.0: 0.5, 1.2: bad}, {1.0: bad, 1.2: bad}):
        subject.observe(0.5, table.get)
        assert subject.observe(0.5, table.get) == 1.0


@given(
    rise=st.floats(-0.1, 0.1),
    window=st.integers(1, 4),
    gain=st.sampled_from([0.0, 0.01, 0.05]),
    noise=st.lists(st.floats(-0.3, 0.3), min_size=4, max_size=4),
)
def test_a_plateau_is_a_small_change_of_the_mean(rise, window, gain, noise):
    """Whatever the single rewards are: probed exactly when the means of the two windows differ by at most the gain.

    Nothing is probed before both windows are full, and after a probe they are filled anew.
    """
    subject = TemperatureController(grid=(1.2,), window=window, gain=gain)
    centred = [x - sum(noise[:window]) / window for x in noise[:window]]
    rewards = [0.5 + x for x in centred] + [0.5 + rise + x for x in reversed(centred)]
    for reward in rewards[:-1]:
        subject.observe(reward, lambda t: pytest.fail("probed too early"))
    if math.isclose(abs(rise), gain, abs_tol=1e-9):
        return  # rounding decides
    probes = []
    subject.observe(rewards[-1], lambda t: probes.append(t) or 0.5)
    assert bool(probes) == (abs(rise) < gain)
    if probes:
        assert probes == [1.0, 1.2] and subject.rewards == []
        for _ in range(2 * window - 1):
            subject.observe(0.5, lambda t: pytest.fail("probed with a window half full"))
        before = len(probes)
        subject.observe(0.5, lambda t: probes.append(t) or 0.5)
        assert len(probes) > before
    else:
        assert len(subject.rewards) == 2 * window


@pytest.mark.parametrize(("rise", "chosen"), [(0.0099, 1.1), (0.0101, 1.0)])
def test_the_defaults_compare_twenty_steps_with_twenty_and_probe_from_0_8_to_1_4(rise, chosen):
    """A rise of less than 0.01 from one window to the next is a plateau; 1% of the best score may be lost."""
    table = {0.8: 0.5, 0.9: 0.5, 1.0: 0.5, 1.1: 0.4951, 1.2: 0.4949, 1.3: 0.1, 1.4: 0.1}
    probes = []
    subject = TemperatureController()
    for step in range(40):
        assert not probes and subject.temperature == 1.0
        noise = 0.05 * (-1) ** step  # the same in both windows, and larger than the gain
        reward = 0.5 + noise + (rise if step >= 20 else 0.0)
        found = subject.observe(reward, lambda t: probes.append(t) or table[t])
    assert found == chosen
    assert probes == (sorted(table) if chosen == 1.1 else [])


def test_a_change_of_exactly_the_gain_is_a_plateau():
    """And so is no change where the gain is 0; numbers that float64 holds exactly."""
    for gain in (0.0, 0.25):
        subject = TemperatureController(grid=(1.2,), window=1, gain=gain)
        subject.observe(0.25, None)
        assert subject.observe(0.25 + gain, lambda t: 0.5) == 1.2


def test_a_score_at_the_bound_is_allowed():
    """drop = 0 allows the scores that equal the best, and of those the hottest; a negative score has its drop too."""
    subject = TemperatureController(grid=(1.2, 1.4), window=1, drop=0.0)
    subject.observe(0.5, None)
    assert subject.observe(0.5, {1.0: 0.5, 1.2: 0.5, 1.4: 0.25}.get) == 1.2
    subject = TemperatureController(grid=(1.2, 1.4), window=1, drop=0.5)
    subject.observe(0.5, None)
    assert subject.observe(0.5, {1.0: -1.0, 1.2: -1.5, 1.4: -1.75}.get) == 1.2


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_reward_that_is_no_number_is_one_line(bad):
    """It would sit in a window, and no mean of it would ever be a plateau."""
    subject = TemperatureController(window=1)
    subject.observe(0.5, None)
    with pytest.raises(ValueError, match=f"reward = {bad} at step 2: must be finite"):
        subject.observe(bad, None)


wrong = {
    "temperature": [0.0, -1.0, math.nan, math.inf],
    "grid": [(0.0, 1.0), (1.0, math.nan), (1.0, -0.5), (math.inf,)],
    "window": [0, -1, math.nan],
    "gain": [-0.1, math.nan, math.inf],
    "drop": [-0.1, math.nan, math.inf],
}


@pytest.mark.parametrize("name, value", [(n, v) for n, values in wrong.items() for v in values])
def test_user_mistakes_are_one_line(name, value):
    """Each setting that no controller can have is named, with its value."""
    with pytest.raises(ValueError, match=name) as error:
        TemperatureController(**{name: value})
    assert "\n" not in str(error.value)
    assert str(value) in str(error.value)
