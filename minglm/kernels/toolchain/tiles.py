"""Choose tile sizes and describe matrices to the copy engine, for the Triton kernels that multiply matrices.

A kernel computes its result in tiles; a program holds one in registers while it walks along the sum in steps. A matrix
whose rows are multiples of 16 bytes is read through a descriptor (the bulk copy engine, TMA), any other through
pointers. Kernels read either with `minglm.kernels.experts.triton_kernels.load_tile`.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Tiles:
    """The size of one tile of the result, the step along the sum, and the launch options of Triton."""

    rows: int
    """Rows of the result's tile."""
    columns: int
    """Columns of the result's tile."""
    step: int
    """Terms of the sum that are read at a time."""
    warps: int
    """Warps of a program."""
    stages: int
    """Stages of the software pipeline of the loop along the sum."""
    swap: bool = False
    """Whether the product is transposed, because the tensor cores take at least 64 rows on the left."""
    per_multiprocessor: int = 1
    """Programs on one multiprocessor: several where their shared memory fits, to keep more loads in flight."""
    band: int = 8
    """Row tiles that walk through the columns together, so that both matrices stay in the L2 cache."""

    def constants(self) -> dict[str, int]:
        """Return the sizes under the names of the kernels' arguments."""
        return {"ROWS": self.rows, "COLUMNS": self.columns, "STEP": self.step, "BAND": self.band}


# Float32 is outside the tensor cores: exact products, for checks and not for speed.
FLOAT32 = Tiles(32, 32, 32, 4, 2)


def tiles_for(table: Mapping[int, Tiles], x: Tensor, rows: float) -> Tiles:
    """Choose the entry of {largest number of rows: Tiles} for `rows` rows; FLOAT32 for that dtype."""
    if x.dtype == torch.float32:
        return FLOAT32
    return next(tiles for max_rows, tiles in table.items() if rows <= max_rows)


def power_of_2(number: int) -> int:
    """Return the smallest power of two that is at least `number`."""
    return 1 << (number - 1).bit_length()


def programs(x: Tensor, per_multiprocessor: int = 1) -> int:
    """Return how many programs run at the same time on x's GPU, with `per_multiprocessor` on each multiprocessor.

    It is two in the interpreter, where each program costs time.
    """
    if not x.is_cuda:
        return 2
    multiprocessors = torch.cuda.get_device_properties(x.device).multi_processor_count
    return per_multiprocessor * multiprocessors


def bulk_readable(*tensors: Tensor) -> bool:
    """Return whether the bulk copy engine can read and write the rows of all these tensors: multiples of 16 bytes."""
    return all(
        tensor.data_ptr() % 16 == 0 and tensor.shape[-1] * tensor.element_size() % 16 == 0
        for tensor in tensors
    )


def bind(x: Tensor) -> None:
    """Bind x's GPU to this thread, for backward passes: call it before a kernel gets its first descriptor.

    A descriptor is made by the driver, which knows a GPU only in threads that have used it. Autograd's own thread may
    begin with a backward pass, with memory from PyTorch's cache, and has then used no GPU yet.
    """
    if x.is_cuda:
        torch.cuda.Event().record()


def read(matrices: Tensor, rows: int, columns: int, bulk: bool) -> Any:
    """Return a stack of matrices as a kernel reads (or writes) it in tiles of rows x columns.

    That is a descriptor for the bulk copy engine if `bulk`, else the tensor itself, which the kernel sees as a pointer.
    """
    from triton.tools.tensor_descriptor import TensorDescriptor

    return TensorDescriptor.from_tensor(matrices, [1, rows, columns]) if bulk else matrices


def described(rows: int, columns: int, dtype: str = "bf16") -> str:
    """Return the type of such a descriptor in a `Spec`."""
    return f"tensordesc<{dtype}[1, {rows}, {columns}]>"
