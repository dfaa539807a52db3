"""Skip steps whose gradient is not finite or spikes; after too many in a row, roll back (no section in the paper).

    skip:       |g| is not finite, or |g| > spike_factor * median of the last 50 norms that were accepted
    roll back:  after `rollback_after` skipped steps in a row, restore model and optimizer from the last checkpoint

A bad batch shows in its gradient before it can do harm, so skipping the step costs one batch. When several in
a row fail, the weights themselves have gone wrong. Then those of the last good checkpoint are restored, and
training continues with the next batches, not with those that led there. Tokens and schedule continue as well;
the log records all of it. No checkpoint is written between the first skipped step and the next accepted one,
since it might be bad.

The paper reports no instability (it relies on QK-norm and clipping), so by default only steps with a NaN or
infinite gradient are skipped. On many ranks all judge the norm of the whole gradient
(`minglm.parallel.gradients`), so all skip the same steps.
"""

import math
import statistics
from collections import deque
from enum import StrEnum
from typing import Any, NamedTuple

import torch
from torch import nn

from minglm.parallel.gradients import clip_gradients, global_norm

WINDOW = 50  # accepted norms that the median is taken over
MIN_HISTORY = 10  # accepted norms before a median means something


class SkipReason(StrEnum):
    """Why a step is skipped."""

    NOT_FINITE = "not finite"
    """The gradient holds a NaN or an infinity."""
    SPIKE = "spike"
    """The norm exceeds `spike_factor` times the median."""


class Guard:
    """Judge the gradient norm of each step.

    spike_factor, rollback_after: see `OptimizerConfig`; 0 turns either off.
    """

    def __init__(self, spike_factor: float = 0.0, rollback_after: int = 0) -> None:
        self.spike_factor = spike_factor
        self.rollback_after = rollback_after
        self.norms: deque[float] = deque(maxlen=WINDOW)
        """The last accepted norms."""
        self.in_a_row = 0
        """Steps skipped since the last accepted one."""
        self.left_out = 0
        """Steps skipped in all."""

    def reason(self, norm: float) -> SkipReason | None:
        """Return why the step with this gradient norm is skipped, or None to accept it; update the counts."""
        reason = None
        if not math.isfinite(norm):
            reason = SkipReason.NOT_FINITE
        elif self._is_spike(norm):
            reason = SkipReason.SPIKE

        if reason is None:
            self.norms.append(norm)
            self.in_a_row = 0
        else:
            self.in_a_row += 1
            self.left_out += 1
        return reason

    def _is_spike(self, norm: float) -> bool:
        if not self.spike_factor or len(self.norms) < MIN_HISTORY:
            return False
        return norm > self.spike_factor * statistics.median(self.norms)

    @property
    def gives_up(self) -> bool:
        """Return whether enough steps in a row were skipped to roll back to the last checkpoint."""
        return 0 < self.rollback_after <= self.in_a_row

    def state_dict(self) -> dict[str, Any]:
        """Return the state as plain values for a checkpoint."""
        return {"norms": list(self.norms), "in_a_row": self.in_a_row, "left_out": self.left_out}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore the state returned by `state_dict`."""
        self.norms = deque(state["norms"], maxlen=WINDOW)
        self.in_a_row = state["in_a_row"]
        self.left_out = state["left_out"]


class StepResult(NamedTuple):
    """What became of one optimizer step."""

    grad_norm: float
    """Global 2-norm of the gradient before clipping."""
    left_out: SkipReason | None
    """Why the step was skipped; None when it was taken."""


def guarded_step(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    learning_rate: float,
    clip_norm: float,
    guard: Guard,
    apart: nn.Module | None = None,
) -> StepResult:
    """Clip the gradients and take one optimizer step, unless the guard skips it. Clears the gradients.

    clip_norm: bound on the global gradient norm; 0 turns it off. apart: a part of the model that is trained
    on a loss of its own: its norm is bounded by itself, and the guard does not see it. It stays as it is if
    it is not finite.
    """
    norm = global_norm(model, apart)
    left_out = guard.reason(float(norm))
    for group in optimizer.param_groups:
        group["lr"] = learning_rate
    if left_out is None:
        if clip_norm:
            clip_gradients(model, clip_norm, norm, apart)
        if apart is not None:
            _prepare(apart, clip_norm)
        optimizer.step()
    optimizer.zero_grad()
    return StepResult(float(norm), left_out)


def _prepare(part: nn.Module, clip_norm: float) -> None:
    """Clip the gradient of a part by itself, or clear it where it is not finite."""
    norm = global_norm(part)
    if not math.isfinite(float(norm)):
        part.zero_grad()
    elif clip_norm:
        clip_gradients(part, clip_norm, norm)
