"""Declare the sizes of the benchmarks that run on a CPU (no counterpart in the paper)."""

from dataclasses import dataclass


@dataclass(frozen=True)
class BenchOptions:
    """Sizes of the benchmarks that run on a CPU."""

    batches: tuple[int, ...] = (1, 8, 64, 256)
    """Answers that are generated at once."""
    prompt: int = 32
    """Tokens of each prompt."""
    tokens: int = 48
    """Tokens of each answer."""
    train_tokens: int = 2048
    """Tokens of a training batch."""
    repeats: int = 3
    """Turns of each side; the best counts."""
