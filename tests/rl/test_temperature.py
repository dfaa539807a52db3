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
        """No question whether the reward stands still."""
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
        """Loses the windows."""
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
    assert decision["step"] == 6 and (decision["from"], decision["to"]) == (1.0, 1.2)
    assert dict(decision["scores"]) == table and decision["bound"] == pytest.approx(0.792)
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


def test_user_mistakes_are_one_line():
    """Temperatures must be positive, windows at least one step."""
    with pytest.raises(ValueError, match="must be positive"):
        TemperatureController(grid=(0.0, 1.0))
    with pytest.raises(ValueError, match="at least 1"):
        TemperatureController(window=0)
