"""Save and restore all that a training loop needs to resume: weights, optimizer, guard, data, counters (no section).

Pre-training, mid-training, fine-tuning and reinforcement learning share it, so that a checkpoint of any of
them holds the same parts. After repeated failures `roll_back` restores the weights and the optimizer alone:
the data and the counters continue.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import nn

from minglm.train.checkpoint import StageCheckpoints
from minglm.train.checkpoint_files import Tensors, moments_of, weights_of
from minglm.train.guard import Guard


class Stateful(Protocol):
    """Something whose state fits into a checkpoint, such as a stream of batches."""

    def state_dict(self) -> dict[str, Any]:
        """Return the state as tensors and plain values."""
        ...

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore the state returned by `state_dict`."""
        ...


@dataclass
class TrainingState:
    """The parts of a training loop that change from step to step."""

    model: nn.Module
    optimizer: torch.optim.Optimizer
    guard: Guard
    stream: Stateful | None = None
    """Where the next batch comes from; None when the data follow from the number of the step."""
    parts: Mapping[str, Stateful] = field(default_factory=dict)
    """What else changes from step to step, by name. Checkpoints of older runs may lack it."""
    step: int = 0
    """Steps done in this stage."""
    tokens: int = 0
    """Tokens seen in this stage."""

    def save(self, checkpoints: StageCheckpoints, background: bool = False) -> None:
        """Write a partial checkpoint. background: while the training goes on."""
        values = {"guard": self.guard.state_dict(), "tokens": self.tokens, "step": self.step}
        if self.stream is not None:
            values["stream"] = self.stream.state_dict()
        for name, part in self.parts.items():
            values[name] = part.state_dict()
        checkpoints.save(self._tensors(), values, background=background)

    def restore(self, checkpoints: StageCheckpoints) -> bool:
        """Resume from the partial checkpoint, and cut the log back to it. Return whether there was one."""
        values = checkpoints.load(self._tensors())
        if values is None:
            return False
        if self.stream is not None:
            self.stream.load_state_dict(values["stream"])
        if "guard" in values:  # reinforcement learning has stored it only since it has a guard
            self.guard.load_state_dict(values["guard"])
        for name, part in self.parts.items():
            if name in values:
                part.load_state_dict(values[name])
        self.step = values["step"]
        self.tokens = values.get("tokens", 0)
        return True

    def roll_back(self, checkpoints: StageCheckpoints) -> int:
        """Restore weights and optimizer from the last checkpoint. Return the step that it was made at."""
        values = checkpoints.read(self._tensors())
        assert values is not None, "a loop with rollbacks saves before its first step"
        self.guard.in_a_row = 0
        return values["step"]

    def _tensors(self) -> Tensors:
        return weights_of(self.model) | moments_of(self.model, self.optimizer)
