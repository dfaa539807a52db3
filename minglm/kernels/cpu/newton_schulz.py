"""Newton-Schulz in C, for stacks of small matrices (paper 2.4).

Equations and reference: `minglm.kernels.newton_schulz.eager`.
"""

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import torch

from minglm.common.threads import threads_in_use
from minglm.kernels.cpu.build import address, lanes, loaded_library

ONE_THREAD_FLOPS = 2**25
"""Multiplications for which one thread is enough: a millisecond."""


def newton_schulz_c(
    stack: torch.Tensor,
    coefficients: Sequence[tuple[float, float, float]],
    dtype: torch.dtype = torch.float32,
    gram: bool = False,
) -> torch.Tensor:
    """Orthogonalize each of the matrices (matrices, rows, columns) float32, shared among threads; same shape and dtype.

    dtype and gram are those of `minglm.kernels.newton_schulz.eager.newton_schulz`, of which only the defaults are
    chosen. A result depends neither on the threads nor on what else is in the stack.
    """
    assert dtype is torch.float32 and not gram
    stack = stack.contiguous()
    count, rows, columns = stack.shape
    out = torch.empty_like(stack)
    table = torch.tensor(coefficients, dtype=torch.float32)
    short = -(-min(rows, columns) // lanes()) * lanes()  # the short side in whole vectors

    def work(first: int, last: int) -> None:
        """Orthogonalize the matrices from `first` to `last`."""
        scratch = stack.new_empty(2 * short * (short + max(rows, columns)))
        loaded_library().newton_schulz(
            address(stack[first:last]),
            address(out[first:last]),
            address(scratch),
            address(table),
            len(coefficients),
            last - first,
            rows,
            columns,
        )

    few = count * rows * columns * short <= ONE_THREAD_FLOPS
    threads = 1 if few else threads_in_use()
    if threads == 1:
        work(0, count)
        return out
    bounds = [count * i // threads for i in range(threads + 1)]
    with ThreadPoolExecutor(threads) as pool:  # ctypes releases Python's lock while C computes
        list(pool.map(work, bounds, bounds[1:]))
    return out
