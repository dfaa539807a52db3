"""Declare one benchmark case of a kernel: an operation at one shape, in several forms (no counterpart in the paper)."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from enum import StrEnum

Form = Callable[[], object]
"""One implementation with its inputs: takes no arguments, returns a tensor or a tuple of tensors."""


class Unit(StrEnum):
    """The dtype in which the products are made; it names the ceiling."""

    FLOAT32 = "float32"
    """Products in float32."""
    BFLOAT16 = "bfloat16"
    """Products of bfloat16, on the tensor cores of a GPU."""
    FLOAT8 = "float8"
    """Products of float8, on the tensor cores of a GPU that has them."""


@dataclass(frozen=True)
class Case:
    """One operation at one shape, in several forms."""

    name: str
    """Operation and shape, "attention forward, 1 x 32768, 96/8 heads of 128"."""
    flops: float
    """Floating-point operations that the mathematics needs, two for each multiplication of a matrix product."""
    bytes: float
    """Bytes that must be read and written at least once."""
    forms: Callable[[], Mapping[str, Form]]
    """Makes the inputs and returns {name: form}; ours is first. It is called when the case's turn comes, so
    that only its own tensors are in memory."""
    unit: Unit = Unit.BFLOAT16
    """The dtype of the products."""
    graph: bool = False
    """Whether a GPU's work is recorded as a CUDA graph and replayed."""
