"""Reward shaping: one penalty for any number of faults, and none without."""

from hypothesis import given
from hypothesis import strategies as st

from minglm.rewards.pathology import FAULTS
from minglm.rewards.shaping import shaped_reward

flags = st.fixed_dictionaries({fault: st.booleans() for fault in FAULTS})


@given(value=st.floats(0, 1), flags=flags, obeyed=st.booleans(), penalty=st.floats(0, 1))
def test_the_penalty_is_taken_off_once(value, flags, obeyed, penalty):
    """A clean turn keeps its score; faults and disobedience cost one penalty together."""
    clean = obeyed and not any(flags.values())
    assert shaped_reward(value, flags, obeyed, penalty) == (value if clean else value - penalty)
