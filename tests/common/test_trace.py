"""The share of time in which a lane is idle, against a count of small pieces of time."""

from hypothesis import given
from hypothesis import strategies as st

from minglm.common.trace import Span, idle_share

# Bounds in eighths of a second: far above the gap that is bridged, and sums of them are exact.
SPANS = st.lists(
    st.builds(
        lambda lane, phase, began, length: Span(lane, phase, began / 8, (began + length) / 8),
        st.sampled_from(["trainer", "rollout 0"]),
        st.sampled_from(["generate", "reward", "train"]),
        st.integers(0, 40),
        st.integers(1, 20),
    ),
    min_size=1,
    max_size=12,
)


@given(SPANS, st.sets(st.sampled_from(["generate", "reward"])))
def test_idle_is_every_piece_of_time_without_a_wanted_phase(spans, phases):
    """Spans that overlap count once, those of other lanes and phases not at all; all time is from first to last of any."""
    first = int(min(span.began for span in spans) * 8)
    last = int(max(span.ended for span in spans) * 8)
    own = [span for span in spans if span.lane == "trainer" and span.phase in phases]
    idle = sum(
        not any(span.began <= eighth / 8 < span.ended for span in own)
        for eighth in range(first, last)
    )
    # The lengths are exact, but one minus a quotient is rounded once more than a quotient.
    assert abs(idle_share(spans, "trainer", phases) - idle / (last - first)) < 1e-12
