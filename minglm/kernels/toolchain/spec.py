"""Describe one Triton kernel in one configuration, for the compile check."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Spec:
    """One Triton kernel in one configuration, as `minglm.kernels.toolchain.compile_check` compiles it for an H100.

    A module of kernels exports a list of these as `SPECS`: every kernel, in each configuration that is a default.
    """

    name: str
    """The name in the table; unique in its module."""
    kernel: Any
    """The function that `@triton.jit` made."""
    signature: Mapping[str, str]
    """Type of each run-time argument in order: "*bf16", "*fp8e4nv", "i32", "fp32", "tensordesc<bf16[128, 64]>"."""
    constants: Mapping[str, Any]
    """Value of each `tl.constexpr` argument (and None for pointers that this configuration does not use)."""
    warps: int = 4
    """Warps of a program."""
    stages: int = 3
    """Stages of the software pipeline of loops."""
    aligned: tuple[str, ...] = ()
    """Integers that are multiples of 16 (strides, widths). Pointers always are, as PyTorch's allocations."""
    unit: str = ""
    """Tensor-core instruction that must be present: "HGMMA", "QGMMA" for float8; empty for a kernel without products."""
    opcodes: tuple[str, ...] = ()
    """Other instructions that must be present: "UTMALDG" for TMA loads, "LDGSTS" for asynchronous copies."""
    spill_bytes: int = 0
    """Limit on the bytes of registers spilled to memory; anything but 0 needs a reason beside it."""
