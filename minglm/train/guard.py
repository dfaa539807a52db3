"""Steps that would harm the weights are left out, and a run that keeps failing goes back (no section in the paper).

    left out:  |g| is not finite, or |g| > spike_factor * median of the last 50 norms that were accepted
    back:      after `rollback_after` steps left out in a row, model and optimizer return to the last checkpoint

A bad batch shows in its gradient before it can do anything, so leaving the step out costs one batch. When several in a
row fail, the weights themselves have gone wrong: then those of the last good checkpoint come back, and training goes on
with the next batches, not with those that led there. Tokens and schedule go on as well; the log says all of it.
No checkpoint is written between the first step left out and the next accepted one: it would not be a good one.

The paper reports no instability; QK-norm and clipping are its means. So only NaN is left out by default.
"""

import math
import statistics
from collections import deque

WINDOW = 50
ENOUGH = 10  # norms, before a median means something


class Guard:
    """Judges the gradient norm of each step. spike_factor, rollback_after: see OptimizerConfig; 0 turns either off."""

    def __init__(self, spike_factor=0.0, rollback_after=0):
        self.spike_factor, self.rollback_after = spike_factor, rollback_after
        self.norms, self.in_a_row, self.left_out = deque(maxlen=WINDOW), 0, 0

    def reason(self, norm):
        """Why the step with this gradient norm is left out, "not finite" or "spike"; None accepts it. Keeps count."""
        found = None
        if not math.isfinite(norm):
            found = "not finite"
        elif self.spike_factor and len(self.norms) >= ENOUGH:
            found = "spike" if norm > self.spike_factor * statistics.median(self.norms) else None
        if found is None:
            self.norms.append(norm)
        self.in_a_row = self.in_a_row + 1 if found else 0
        self.left_out += found is not None
        return found

    @property
    def gives_up(self):
        """Whether so many steps in a row were left out that the last checkpoint should come back."""
        return 0 < self.rollback_after <= self.in_a_row

    def state_dict(self):
        """Plain values for a checkpoint."""
        return {"norms": list(self.norms), "in_a_row": self.in_a_row, "left_out": self.left_out}

    def load_state_dict(self, state):
        """The inverse."""
        self.norms = deque(state["norms"], maxlen=WINDOW)
        self.in_a_row, self.left_out = state["in_a_row"], state["left_out"]
