"""Run Triton kernels on a CPU: Triton's interpreter, with its faults patched (no counterpart in the paper).

    from minglm.kernels.toolchain.interpreter import switch_on

    DEVICE = switch_on()                        # at the top of a test file, before any kernel is imported
    from minglm.kernels.norm import triton_kernel                                         # noqa: E402

With `TRITON_INTERPRET=1` in the environment `@triton.jit` makes functions that numpy runs, one program after another.
That is decided when a kernel is defined, and Triton's own `tl.sum` is one, so the variable must be set before triton is
imported: `tests/conftest.py` sets it for the whole test process where there is no GPU, and `switch_on` checks that it
was. Where there is a GPU, `switch_on` leaves Triton alone and returns "cuda", and the same tests run compiled.

The interpreter's faults (Triton 3.6 to 3.9; tests/kernels/test_interpreter.py shows each), and the patches:

    tl.dot of bfloat16        multiplies the bit patterns, silently           float32 products
    float32 to bfloat16       cuts the low bits off                           nearest, ties to even, as the GPU does
    float64, int to bfloat16  stores the integer part as a bit pattern        converted through float32
    float32 to float8         rounds some values twice or overflows           PyTorch's rounding, saturating
    bfloat16 arithmetic       computes with bit patterns, silently            TypeError: cast to float32 after the load
    run-time loop bounds      crash in Triton 3.6 with numpy 2.4 or newer     the bound is read as a scalar
    sanitize_overflow         doubles the time of every integer operation     off

The interpreter cannot show 32-bit tensor-core accumulation order, TF32 rounding, shared memory, or races between
programs. It costs 0.2 to 0.5 ms for each operation of each program, whatever the size of the tile: use few programs and
large tiles.
"""

import contextlib
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

REFUSED = "bfloat16 arithmetic is garbage in the interpreter: cast to float32 right after the load"


def from_bfloat16(bits: np.ndarray) -> np.ndarray:
    """Return the float32 values of bfloat16 bit patterns (uint16): they are the upper half of a float32's."""
    return (bits.astype(np.uint32) << 16).view(np.float32)


def to_bfloat16(values: np.ndarray) -> np.ndarray:
    """Return the bit patterns (uint16) of the nearest bfloat16 values, ties to even; any NaN gives a quiet NaN."""
    values = np.ascontiguousarray(values, dtype=np.float32)
    bits = values.view(np.uint32).astype(np.uint64)
    # Add half of the last place that is kept, less one where that place is even: a tie then rounds to even.
    last_kept_bit = (bits >> 16) & 1
    rounded = (bits + 0x7FFF + last_kept_bit) >> 16
    return np.where(np.isnan(values), 0x7FC0, rounded).astype(np.uint16)


def to_float8(values: np.ndarray) -> np.ndarray:
    """Return the bit patterns (uint8) of the nearest float8_e4m3fn values; beyond 448 the largest, as on the GPU."""
    float32 = torch.from_numpy(np.array(values, dtype=np.float32))
    nearest = float32.clamp(-448, 448).to(torch.float8_e4m3fn)
    return nearest.view(torch.uint8).numpy()


def patch_interpreter() -> None:
    """Replace the faulty parts of Triton's interpreter in this process; a second call does nothing."""
    import triton.language as tl
    from triton.runtime import interpreter

    builder: Any = interpreter.InterpreterBuilder
    if builder.__dict__.get("patched"):
        return
    builder.patched = True
    only_builder: Any = interpreter.interpreter_builder
    only_builder.options = interpreter.InterpreterOptions(sanitize_overflow=False)
    _patch_casts_and_products(builder, interpreter.TensorHandle, tl)

    # Arithmetic and reductions of bfloat16 are refused.
    for name in ("binary_op", "unary_op"):
        setattr(builder, name, _refusing(getattr(builder, name), tl.bfloat16))
    reductions: Any = interpreter.ReduceScanOpInterface
    reductions.check_tensor = _refusing_reduction(reductions.check_tensor, tl.bfloat16)
    _patch_index(interpreter)


def _patch_casts_and_products(builder: Any, handle_type: Any, tl: Any) -> None:
    """Replace the builder's casts to bfloat16 and float8, and its products of bfloat16."""
    original_cast = builder.cast_impl
    original_fp_to_fp = builder.create_fp_to_fp
    original_dot = builder.create_dot

    def to_float32(handle: Any) -> Any:
        if handle.dtype.scalar != tl.bfloat16:
            return handle
        return handle_type(from_bfloat16(handle.data), tl.float32)

    def patched_cast(self: Any, source: Any, target_type: Any) -> Any:
        if target_type.scalar != tl.bfloat16:
            return original_cast(self, to_float32(source), target_type)
        if source.dtype.scalar == tl.bfloat16:
            return handle_type(source.data, tl.bfloat16)
        return handle_type(to_bfloat16(source.data), tl.bfloat16)

    def patched_fp_to_fp(self: Any, source: Any, target_type: Any, rounding: Any) -> Any:
        types = (source.dtype.scalar, target_type.scalar)
        if tl.bfloat16 in types and tl.float32 in types:
            return patched_cast(self, source, target_type)
        if target_type.scalar == tl.float8e4nv and not source.dtype.scalar.is_fp8():
            float32 = patched_cast(self, source, tl.float32)
            return handle_type(to_float8(float32.data), tl.float8e4nv)
        return original_fp_to_fp(self, source, target_type, rounding)

    def patched_dot(self: Any, a: Any, b: Any, *rest: Any) -> Any:
        return original_dot(self, to_float32(a), to_float32(b), *rest)

    builder.cast_impl = patched_cast
    builder.create_fp_to_fp = patched_fp_to_fp
    builder.create_dot = patched_dot


def _refusing(operation: Callable[..., Any], forbidden: Any) -> Callable[..., Any]:
    """Wrap an operation of the builder: raise TypeError if its first operand has the forbidden dtype."""

    def checked(self: Any, operand: Any, *rest: Any) -> Any:
        if operand.dtype.scalar == forbidden:
            raise TypeError(REFUSED)
        return operation(self, operand, *rest)

    return checked


def _refusing_reduction(check: Callable[..., Any], forbidden: Any) -> Callable[..., Any]:
    """Wrap the check of the inputs of reductions and scans: raise TypeError for the forbidden dtype too."""

    def checked(self: Any, inputs: Any) -> None:
        check(self, inputs)
        if any(x.dtype.scalar == forbidden for x in inputs):
            raise TypeError(REFUSED)

    return checked


def _patch_index(interpreter: Any) -> None:
    """Let a tensor of one element be an index, whatever its shape: `range(n)` with an n that was loaded or passed."""
    original_patch = interpreter._patch_lang_tensor

    def patched(tensor: Any, *scope: Any) -> None:
        original_patch(tensor, *scope)
        tensor.__index__ = lambda self: int(self.handle.data.item())

    interpreter._patch_lang_tensor = patched


def switch_on() -> str:
    """Prepare this process to run kernels; return the device their tensors live on, "cuda" or "cpu".

    Raises RuntimeError where there is no GPU and triton was imported without TRITON_INTERPRET=1: too late to interpret.
    """
    if torch.cuda.is_available() and os.environ.get("TRITON_INTERPRET") != "1":
        return "cuda"
    if "triton" not in sys.modules:
        os.environ["TRITON_INTERPRET"] = "1"
    import triton.language as tl
    from triton.runtime.jit import JITFunction

    if isinstance(tl.sum, JITFunction):
        raise RuntimeError(
            "triton was imported without TRITON_INTERPRET=1; set it before the first import"
        )
    patch_interpreter()
    return "cpu"


def pin_program_id(*index: int) -> None:
    """Make every launch in this process run only the program with this index, whatever the grid.

    For tests at real sizes, where the programs before the one of interest would take the interpreter hours.
    """
    import triton.language as tl

    interpreter = _interpreter()
    ids = [interpreter.TensorHandle(np.array([i], dtype=np.int32), tl.int32) for i in index]
    interpreter.interpreter_builder.create_get_program_id = lambda axis: ids[axis]
    original_call = interpreter.GridExecutor.__call__

    def run_once(self: Any, *arguments: Any, **named: Any) -> Any:
        self.grid = (1,)
        return original_call(self, *arguments, **named)

    interpreter.GridExecutor.__call__ = run_once


def _interpreter() -> Any:
    """Return Triton's interpreter module, without the types that forbid patching it."""
    from triton.runtime import interpreter

    module: ModuleType = interpreter
    return module


class Store(NamedTuple):
    """One store of one program; the arrays have the shape of the stored tile."""

    program: tuple[int, int, int]
    """Index of the program in the grid."""
    addresses: np.ndarray
    """uint64: address of each element."""
    mask: np.ndarray
    """bool: whether the element is stored."""


@contextlib.contextmanager
def watched() -> Iterator[list[Store]]:
    """Record every store of the kernels that run inside.

    The interpreter runs one program after another, so it never shows a race. But an element to which two programs of a
    launch store is a race, and an element to which none does is a hole: both can be counted.
    """
    builder = _interpreter().InterpreterBuilder
    original_store = builder.create_masked_store
    stores: list[Store] = []

    def recorded(self: Any, pointers: Any, value: Any, mask: Any, *rest: Any) -> Any:
        addresses, stored = np.broadcast_arrays(pointers.data, mask.data)
        stores.append(Store(self.grid_idx, addresses.copy(), stored.copy()))
        return original_store(self, pointers, value, mask, *rest)

    builder.create_masked_store = recorded
    try:
        yield stores
    finally:
        builder.create_masked_store = original_store


def in_new_process(program: str, timeout: float = 120) -> subprocess.CompletedProcess[str]:
    """Run Python source in an interpreting process of its own, where it may crash.

    For tests at real sizes: a kernel that adds up offsets in 32 bits reads far outside its tensors and dies with signal
    11 (return code -11). Tensors of `torch.empty` cost memory only where they are touched, so GLM-4.5's expert weights
    (160 x 3072 x 5120, past 2^31 elements) fit on a small machine if one tile of them is filled: `last_tile` and
    `pin_program_id` are imported for the program.
    """
    setup = (
        "from minglm.kernels.toolchain.interpreter import last_tile, pin_program_id, switch_on\n"
        "switch_on()\n"
    )
    environment = {**os.environ, "TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""}
    environment["PYTHONPATH"] = os.pathsep.join(path for path in sys.path if path)
    return subprocess.run(
        [sys.executable, "-c", setup + program],
        env=environment,
        capture_output=True,
        text=True,
        timeout=timeout,
    )


def last_tile(
    *shape: int, tile: tuple[int, int], dtype: torch.dtype = torch.bfloat16, seed: int = 0
) -> tuple[Tensor, Tensor]:
    """Allocate a full-size tensor and fill only the last `tile` of its last matrix; return both (the tile is a view).

    shape: (..., rows, columns), far larger than memory may hold; tile: (rows, columns) at its very end. Everything else
    is untouched: pages that nobody writes cost nothing on Linux, and hold zeros.
    """
    whole = torch.empty(shape, dtype=dtype)
    last_matrix = whole[(-1,) * (len(shape) - 2)]
    view = last_matrix[-tile[0] :, -tile[1] :]
    view.copy_(torch.randn(tile, generator=torch.Generator().manual_seed(seed)))
    return whole, view
