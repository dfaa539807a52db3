"""Shared parts of the Triton attention kernels: tile sizes, descriptors, and the interval of keys of each query.

A document is a run of equal ids, so what query i may see is an interval of keys: begin_i <= j <= i. For a tile of
queries the key tiles between the smallest `begin` and the last query fall into three groups:

    left end    some queries see some keys: a mask is needed         first ... middle
    middle      every query sees every key: no mask                  middle ... row
    diagonal    key j and query i with j > i are in one tile: mask   row ... row + ROWS

Rows are tiles of queries, as the result has them; keys are tiles of the sum.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from minglm.kernels.toolchain.spec import Spec

LOG2E = 1.4426950408889634  # log2(e): the kernels use powers of 2, because the GPU's exponential has base 2
# The initial maximum of a row. It is finite, so that a row that has seen no key yet gives no NaN.
LOWEST = tl.constexpr(-1e30)


@dataclass(frozen=True)
class Tiles:
    """The size of one tile of scores, and the launch options of Triton."""

    rows: int
    """Queries of a tile."""
    keys: int
    """Keys of a tile."""
    warps: int
    """Warps of a program."""
    stages: int
    """Stages of the software pipeline of a loop; 1 means no pipeline."""

    def constants(self) -> dict[str, int]:
        """Return the sizes under the names of the kernels' arguments."""
        return {"ROWS": self.rows, "KEYS": self.keys}


# Float32 is for checks and not for speed: each product is three products of TF32 (22 bits), and many registers are
# spilled. Exact products outside the tensor cores are unrolled along the whole head: they spilled more and took longer
# to compile.
FLOAT32 = Tiles(32, 32, 4, 1)


@triton.jit
def load_tile(x, batch, head, start, SIZE: tl.constexpr, WIDTH: tl.constexpr):
    """Load SIZE positions x WIDTH dimensions of one head, from position `start` on; zeros outside the tensor."""
    return x.load([batch, head, start, 0]).reshape(SIZE, WIDTH)


@triton.jit
def load_row_values(x, batch, head, start, SIZE: tl.constexpr):
    """Load one number for each of SIZE positions; zeros beyond S."""
    return x.load([batch, head, start]).reshape(SIZE)


@triton.jit
def key_spans(
    begin, batch, row, S, ROWS: tl.constexpr, KEYS: tl.constexpr, DOCUMENTS: tl.constexpr
):
    """Locate the keys of a tile of queries (see the module header).

    Returns (first key, first key without a mask, key tiles at the left end, key tiles with a mask in all).
    """
    # begin of the first query, rounded down to a whole tile, and begin of the last query: the smallest and the largest.
    first, last = 0, 0
    if DOCUMENTS:
        first = tl.load(begin + batch * S + row) // KEYS * KEYS
        last = tl.load(begin + batch * S + tl.minimum(row + ROWS, S) - 1)
    middle = row - tl.maximum(row - last, 0) // KEYS * KEYS
    left = (middle - first) // KEYS
    return first, middle, left, left + tl.cdiv(tl.minimum(ROWS, S - row), KEYS)


@triton.jit
def masked_tile_key(tile, first, left, row, KEYS: tl.constexpr):
    """Compute the first key of masked tile number `tile`: the tiles of the left end come first, then the diagonal's."""
    return tl.where(tile < left, first + tile * KEYS, row + (tile - left) * KEYS)


@triton.jit
def load_begins(begin, batch, rows, S, DOCUMENTS: tl.constexpr):
    """Load the first key that each query may see: begin_i, or 0 without documents."""
    if DOCUMENTS:
        return tl.load(begin + batch * S + rows, mask=rows < S, other=0)
    else:
        return rows * 0


def tile_descriptor(x: Tensor, size: int) -> Any:
    """Describe tiles of `size` positions of one head to the copy engine, for reading and for writing.

    x: (B, S, heads, A), or (B, heads, S) for one number a position. Its rows must be multiples of 16 bytes. Returns a
    TensorDescriptor of Triton, whose module is imported here because it needs a GPU's driver.
    """
    from triton.tools.tensor_descriptor import TensorDescriptor

    if x.ndim == 3:
        return TensorDescriptor.from_tensor(x, [1, 1, size])
    width = triton.next_power_of_2(x.shape[3])
    return TensorDescriptor.from_tensor(x.transpose(1, 2), [1, 1, size, width])


def tiles_for_heads(table: Mapping[int, Tiles], x: Tensor) -> Tiles:
    """Choose the tiles for x (B, S, heads, A) from {largest A: tiles}; FLOAT32 for that dtype."""
    if x.dtype == torch.float32:
        return FLOAT32
    return next(tiles for max_width, tiles in table.items() if x.shape[-1] <= max_width)


def compile_constants(
    q_BSNA: Tensor, k_BSMA: Tensor, begin_BS: Tensor | None, tiles: Tiles
) -> dict[str, Any]:
    """Return the constants and the options that every attention kernel is compiled for."""
    return {
        "GROUP": q_BSNA.shape[2] // k_BSMA.shape[2],  # query heads that share a key/value head
        "WIDTH": triton.next_power_of_2(q_BSNA.shape[3]),
        **tiles.constants(),
        "DOCUMENTS": begin_BS is not None,
        "num_warps": tiles.warps,
        "num_stages": tiles.stages,
    }


def empty_row_values(q_BSNA: Tensor) -> Tensor:
    """Allocate one float32 number for each query, (B, N, S), with rows that the copy engine can read and write.

    A row must begin at a multiple of 16 bytes, so rows have a stride of S rounded up to a multiple of 4.
    """
    B, S, N, _ = q_BSNA.shape
    padded = S + -S % 4
    return q_BSNA.new_empty(B, N, padded, dtype=torch.float32)[..., :S]


# Heads of GLM-4.5 with and without packed documents, and of GLM-4.7-Flash, which has 256 dimensions: (width, packed).
SPEC_HEADS = ((128, False), (128, True), (256, True))


def attention_spec(
    name: str,
    kernel: Any,
    width: int,
    documents: bool,
    tiles: Tiles,
    by_row: Iterable[str],
    by_key: Iterable[str],
    **constants: Any,
) -> Spec:
    """Describe a kernel for heads of `width` to the compile check.

    The group of query heads of a key/value head is that of GLM-4.5 for width 128, else one head. `by_row` and `by_key`
    name the arguments that are read in tiles of queries and of keys; `constants` are the kernel's own.
    """
    types = dict.fromkeys(by_row, f"tensordesc<bf16[1, 1, {tiles.rows}, {width}]>")
    types |= dict.fromkeys(by_key, f"tensordesc<bf16[1, 1, {tiles.keys}, {width}]>")
    types |= dict.fromkeys(("log_sum", "delta"), f"tensordesc<fp32[1, 1, {tiles.rows}]>")
    types |= {"S": "i32", "factor": "fp32", "scale": "fp32"}
    types |= dict.fromkeys(("begin", "end"), "*i32")
    values: dict[str, Any] = {
        "GROUP": 12 if width == 128 else 1,
        "WIDTH": width,
        "DOCUMENTS": documents,
        **tiles.constants(),
        **constants,
    }
    if not documents:
        values |= {"begin": None, "end": None}
    arguments = kernel.arg_names
    return Spec(
        name=f"{name} {width}{' packed' if documents else ''}",
        kernel=kernel,
        signature={argument: types[argument] for argument in arguments if argument not in values},
        constants={argument: values[argument] for argument in arguments if argument in values},
        warps=tiles.warps,
        stages=tiles.stages,
        unit="HGMMA",
        opcodes=("UTMALDG",),
    )
