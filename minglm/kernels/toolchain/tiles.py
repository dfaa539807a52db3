"""What the matrix products in Triton share on the side of the host: sizes of tiles, and how a matrix is read.

A kernel computes its result in tiles; a program holds one in registers while it walks along the sum in steps. A matrix
whose rows are multiples of 16 bytes is read through a descriptor (the bulk copy engine, TMA), any other through
pointers. Kernels do the reading with `minglm.kernels.experts.triton_kernels.load_tile`.
"""

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Tiles:
    """Rows x columns of one tile of the result, the step along the sum, and what Triton is asked for."""

    rows: int
    columns: int
    step: int
    warps: int
    stages: int
    turn: bool = False
    """Whether the product is turned round, because the tensor cores want at least 64 rows on the left."""
    each: int = 1
    """Programs on one multiprocessor: several where their shared memory fits, to keep more loads in the air."""
    band: int = 8
    """Row tiles that walk through the columns together, so that both matrices stay in the L2 cache."""

    def constants(self):
        """As the kernels name them."""
        return {"ROWS": self.rows, "COLUMNS": self.columns, "STEP": self.step, "BAND": self.band}


FLOAT32 = Tiles(
    32, 32, 32, 4, 2
)  # outside the tensor cores: exact products, for checks and not for speed


def tiles_for(table, x, rows):
    """The entry of {most rows: Tiles} for so many rows; FLOAT32 for that dtype."""
    if x.dtype == torch.float32:
        return FLOAT32
    return next(tiles for most, tiles in table.items() if rows <= most)


def power_of_2(number):
    """The next power of two."""
    return 1 << (number - 1).bit_length()


def programs(x, each=1):
    """As many programs as run at the same time; two in the interpreter, where each is a price."""
    return (
        each * torch.cuda.get_device_properties(x.device).multi_processor_count if x.is_cuda else 2
    )


def bulk_readable(*tensors):
    """Whether the bulk copy engine can read and write the rows of all of them."""
    return all(t.data_ptr() % 16 == 0 and t.shape[-1] * t.element_size() % 16 == 0 for t in tensors)


def bind(x):
    """Bind x's GPU to this thread, for backward passes: call it before a kernel gets its first descriptor.

    A descriptor is made by the driver, which knows a GPU only in threads that have used it. Autograd's own thread may
    come to a backward pass as its first work, with memory from PyTorch's cache, and has then used nothing yet.
    """
    if x.is_cuda:
        torch.cuda.Event().record()


def read(matrices, rows, columns, bulk):
    """A stack of matrices as a kernel reads (or writes) it, in tiles of rows x columns."""
    from triton.tools.tensor_descriptor import TensorDescriptor

    return TensorDescriptor.from_tensor(matrices, [1, rows, columns]) if bulk else matrices


def described(rows, columns, kind="bf16"):
    """Type of such a descriptor in a `Spec`."""
    return f"tensordesc<{kind}[1, {rows}, {columns}]>"
