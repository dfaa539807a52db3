"""Triton kernels on a CPU: Triton's interpreter, with its faults mended (no counterpart in the paper).

    from minglm.kernels.interpreter import switch_on

    DEVICE = switch_on()                                    # at the top of a test file, before any kernel is imported
    from minglm.kernels import norm_triton                  # noqa: E402

With `TRITON_INTERPRET=1` in the environment `@triton.jit` makes functions that numpy runs, one program after another.
That is decided when a kernel is defined, Triton's own `tl.sum` among them, so the variable must be set before triton is
imported: `tests/conftest.py` sets it for the whole test process where there is no GPU, and `switch_on` checks that it
was. Where there is a GPU, `switch_on` leaves Triton alone and returns "cuda", and the same tests run compiled.

The interpreter's faults (Triton 3.6 to 3.9, tests/test_interpreter.py shows each), and what stands here instead:

    tl.dot of bfloat16        multiplies the bit patterns, silently           float32 products
    float32 to bfloat16       cuts the low bits off                           nearest, ties to even, as the GPU does
    float64, int to bfloat16  stores the integer part as a bit pattern        by way of float32
    float32 to float8         rounds some values twice or overflows           PyTorch's rounding, saturating
    bfloat16 arithmetic       computes with bit patterns, silently            TypeError: cast to float32 after the load
    run-time loop bounds      crash in Triton 3.6 with numpy 2.4 or newer     the bound is read as a scalar
    sanitize_overflow         doubles the time of every integer operation     off

What it cannot show: 32-bit tensor-core accumulation order, TF32 rounding, shared memory, races between programs. It
costs 0.2 to 0.5 ms for each operation of each program, whatever the size of the tile: use few programs and large tiles.
"""

import contextlib
import os
import subprocess
import sys

import numpy as np
import torch

REFUSED = "bfloat16 arithmetic is garbage in the interpreter: cast to float32 right after the load"


def from_bfloat16(bits):
    """The float32 values of bfloat16 bit patterns (uint16)."""
    return (bits.astype(np.uint32) << 16).view(np.float32)


def to_bfloat16(values):
    """Bit patterns (uint16) of the nearest bfloat16 values, ties to even; any NaN gives a quiet NaN."""
    values = np.ascontiguousarray(values, dtype=np.float32)
    bits = values.view(np.uint32).astype(np.uint64)
    rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
    return np.where(np.isnan(values), 0x7FC0, rounded).astype(np.uint16)


def to_float8(values):
    """Bit patterns (uint8) of the nearest float8_e4m3fn values; beyond 448 the largest, as the GPU's conversion."""
    nearest = (
        torch.from_numpy(np.array(values, dtype=np.float32))
        .clamp(-448, 448)
        .to(torch.float8_e4m3fn)
    )
    return nearest.view(torch.uint8).numpy()


def mend():
    """Replace the faulty parts of the interpreter in this process; a second call does nothing."""
    import triton.language as tl
    from triton.runtime import interpreter as unmended

    builder, Handle = unmended.InterpreterBuilder, unmended.TensorHandle
    if builder.__dict__.get("mended"):
        return
    builder.mended = True
    unmended.interpreter_builder.options = unmended.InterpreterOptions(sanitize_overflow=False)
    cast, to_fp, dot = builder.cast_impl, builder.create_fp_to_fp, builder.create_dot

    def widened(handle):
        return (
            Handle(from_bfloat16(handle.data), tl.float32)
            if handle.dtype.scalar == tl.bfloat16
            else handle
        )

    def mended_cast(self, source, kind):
        if kind.scalar == tl.bfloat16:
            same = source.dtype.scalar == tl.bfloat16
            return Handle(source.data if same else to_bfloat16(source.data), tl.bfloat16)
        return cast(self, widened(source), kind)

    def mended_to_fp(self, source, kind, rounding):
        if tl.bfloat16 in (kind.scalar, source.dtype.scalar) and tl.float32 in (
            kind.scalar,
            source.dtype.scalar,
        ):
            return mended_cast(self, source, kind)
        if kind.scalar == tl.float8e4nv and not source.dtype.scalar.is_fp8():
            return Handle(to_float8(mended_cast(self, source, tl.float32).data), tl.float8e4nv)
        return to_fp(self, source, kind, rounding)

    def mended_dot(self, a, b, *rest):
        return dot(self, widened(a), widened(b), *rest)

    builder.cast_impl, builder.create_fp_to_fp, builder.create_dot = (
        mended_cast,
        mended_to_fp,
        mended_dot,
    )
    for name in ("binary_op", "unary_op"):
        setattr(builder, name, _refusing(getattr(builder, name), tl.bfloat16))
    reducing = unmended.ReduceScanOpInterface
    reducing.check_tensor = _refusing_reduction(reducing.check_tensor, tl.bfloat16)
    _mend_index(unmended)


def _refusing(operation, forbidden):
    """The builder's operation, but a TypeError where its first operand has the forbidden dtype."""

    def checked(self, operand, *rest):
        if operand.dtype.scalar == forbidden:
            raise TypeError(REFUSED)
        return operation(self, operand, *rest)

    return checked


def _refusing_reduction(check, forbidden):
    """The reductions' and scans' check of their inputs, which also refuses the forbidden dtype."""

    def checked(self, inputs):
        check(self, inputs)
        if any(x.dtype.scalar == forbidden for x in inputs):
            raise TypeError(REFUSED)

    return checked


def _mend_index(unmended):
    """A tensor of one element is an index, whatever its shape: `range(n)` with an n that was loaded or passed."""
    patch = unmended._patch_lang_tensor

    def patched(tensor, *scope):
        patch(tensor, *scope)
        tensor.__index__ = lambda self: int(self.handle.data.item())

    unmended._patch_lang_tensor = patched


def switch_on():
    """Make this process able to run kernels; returns the device their tensors live on, "cuda" or "cpu".

    Raises RuntimeError where there is no GPU and triton was imported without TRITON_INTERPRET=1: too late to interpret.
    """
    if torch.cuda.is_available() and os.environ.get("TRITON_INTERPRET") != "1":
        return "cuda"
    if "triton" not in sys.modules:
        os.environ["TRITON_INTERPRET"] = "1"
    import triton.language as tl

    if isinstance(tl.sum, _jit_function()):
        raise RuntimeError(
            "triton was imported without TRITON_INTERPRET=1; set it before the first import"
        )
    mend()
    return "cpu"


def _jit_function():
    from triton.runtime.jit import JITFunction

    return JITFunction


def run_as(*index):
    """From now on every launch of this process is of the one program with this index, whatever its grid.

    For tests at real sizes, where the grid before the program of interest would take the interpreter hours.
    """
    import triton.language as tl
    from triton.runtime import interpreter as mended

    numbered = [mended.TensorHandle(np.array([i], dtype=np.int32), tl.int32) for i in index]
    mended.interpreter_builder.create_get_program_id = lambda axis: numbered[axis]
    execute = mended.GridExecutor.__call__

    def once(self, *arguments, **named):
        self.grid = (1,)
        return execute(self, *arguments, **named)

    mended.GridExecutor.__call__ = once


@contextlib.contextmanager
def watched():
    """Every store of the kernels that run inside: a list of (program, addresses, mask), arrays of the tile's shape.

    The interpreter runs one program after another, so it never shows a race. But an element to which two programs of a
    launch store is one, and an element to which none does is a hole: both can be counted. `program` is its index.
    """
    from triton.runtime import interpreter as mended

    stores, store = [], mended.InterpreterBuilder.create_masked_store

    def recorded(self, pointers, value, mask, *rest):
        stores.append(
            (self.grid_idx, *(x.copy() for x in np.broadcast_arrays(pointers.data, mask.data)))
        )
        return store(self, pointers, value, mask, *rest)

    mended.InterpreterBuilder.create_masked_store = recorded
    try:
        yield stores
    finally:
        mended.InterpreterBuilder.create_masked_store = store


def in_new_process(program, timeout=120):
    """Run Python source in an interpreting process of its own, where it may crash. Returns its CompletedProcess.

    For tests at real sizes: a kernel that adds up offsets in 32 bits reads far outside its tensors and dies with signal
    11 (return code -11). Tensors of `torch.empty` cost memory only where they are touched, so GLM-4.5's expert weights
    (160 x 3072 x 5120, past 2^31 elements) fit on a small machine if one tile of them is filled: `last_tile` and
    `run_as` are imported for the program.
    """
    start = "from minglm.kernels.toolchain.interpreter import last_tile, run_as, switch_on\nswitch_on()\n"
    environment = {**os.environ, "TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""}
    environment["PYTHONPATH"] = os.pathsep.join(path for path in sys.path if path)
    return subprocess.run(
        [sys.executable, "-c", start + program],
        env=environment,
        capture_output=True,
        text=True,
        timeout=timeout,
    )


def last_tile(*shape, tile, dtype=torch.bfloat16, seed=0):
    """A full-size tensor of which only the last `tile` of the last matrix is filled, and a view of that tile.

    shape: (..., rows, columns), far larger than memory may hold; tile: (rows, columns) at its very end. Everything else
    is untouched: pages that nobody writes cost nothing on Linux, and hold zeros. Returns (tensor, view of the tile).
    """
    whole = torch.empty(shape, dtype=dtype)
    part = whole[(-1,) * (len(shape) - 2)][-tile[0] :, -tile[1] :]
    part.copy_(torch.randn(tile, generator=torch.Generator().manual_seed(seed)))
    return whole, part
