"""Describe one Triton kernel in one configuration, for the compile check."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Spec:
    """One Triton kernel in one configuration, as it is compiled for an H100 without one (`minglm.kernels.toolchain.compile_check`).

    A file `x_triton.py` exports a list of these as `SPECS`: every kernel, in each configuration that is a default.
    """

    name: str
    """What the table calls it: unique in its file."""
    kernel: object
    """The function that `@triton.jit` made."""
    signature: dict[str, str]
    """Type of each run-time argument in order: "*bf16", "*fp8e4nv", "i32", "fp32", "tensordesc<bf16[128, 64]>"."""
    constants: dict[str, object]
    """Value of each `tl.constexpr` argument (and None for pointers that this configuration does without)."""
    warps: int = 4
    stages: int = 3
    aligned: tuple[str, ...] = ()
    """Integers that are multiples of 16 (strides, widths). Pointers always are, as PyTorch's allocations."""
    unit: str = ""
    """Tensor-core instruction that must be there: "HGMMA", "QGMMA" for float8; empty for a kernel without products."""
    opcodes: tuple[str, ...] = ()
    """Other instructions that must be there: "UTMALDG" for TMA loads, "LDGSTS" for asynchronous copies."""
    spill_bytes: int = 0
    """Most bytes of registers that may be spilled to memory; anything but 0 needs a reason beside it."""
