"""Scales of matrices that are stored in float8: their names, and which entries each serves (no section in the paper).

    the matrix NAME is NAME (float8) times NAME_scale_inv or NAME_scale

Both names are in use for a factor by which one multiplies. What a scale serves follows from its shape, since
writers do not agree on a place that says it:

    shape of the scale                          each scale serves
    blocks of rows, blocks of columns           a block, 128 x 128 where config.json does not say otherwise
    rows, 1   or   rows                         a row
    1, 1   or   1   or nothing                  a matrix

A stack of matrices has one more axis in front. Scales of activations stand beside some matrices; here
activations are not float8, so they are not read.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from minglm.kernels.fp8 import WEIGHT_BLOCK, Block, dequantize

FLOAT8 = ("F8_E4M3", "F8_E5M2")
"""Dtypes of a file that need a scale."""
SUFFIXES = ("_scale_inv", "_scale")
ACTIVATION_SCALES = ("input_scale", "activation_scale")


def block_of_config(values: Mapping[str, Any], where: str) -> Block:
    """Return the (rows, columns) of a block, as the quantization_config of a config.json says."""
    block = (values.get("quantization_config") or {}).get("weight_block_size")
    if block is None:
        return WEIGHT_BLOCK
    is_pair = isinstance(block, list) and len(block) == 2
    if not is_pair or not all(type(size) is int and size > 0 for size in block):
        raise ValueError(
            f"{where}: weight_block_size = {block!r}: must be a list of two positive integers"
        )
    return block[0], block[1]


def scale_grid(
    shape: Sequence[int], scale_shape: Sequence[int], block: Block
) -> tuple[tuple[int, ...], Block] | None:
    """Return (the scale's shape with an axis for rows and one for columns, the block of each scale); None: no layout."""
    if len(shape) < 2:
        return None
    *stack, rows, columns = shape
    by_block = (*stack, math.ceil(rows / block[0]), math.ceil(columns / block[1]))
    by_row = (*stack, rows, 1)
    by_matrix = (*stack, 1, 1)
    found = tuple(scale_shape)
    if found == by_block:
        return by_block, block
    if found in (by_row, by_row[:-1]):
        return by_row, (1, columns)
    if found in (by_matrix, tuple(stack), (*stack, 1)):
        return by_matrix, (rows, columns)
    if math.prod(found) == 1:  # one for the whole stack
        return (1,) * len(shape), (rows, columns)
    return None


def multiply_out(tensor: Tensor, scale: Tensor, block: Block) -> Tensor:
    """Return the float32 matrices of float8 ones and their scales, whose layout `scale_grid` knows."""
    grid = scale_grid(tensor.shape, scale.shape, block)
    if grid is None:
        raise ValueError(f"a scale of shape {tuple(scale.shape)} fits no layout")
    shape, of_scale = grid
    return dequantize(tensor, scale.reshape(shape), block=of_scale)
