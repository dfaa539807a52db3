"""The patched interpreter: each fault of Triton's own is shown once, and the patch corrects it (no paper section).

The kernels are tiny and live in this file. The faults are shown in a process of their own, from the same source, in
which `patch_interpreter` does nothing.
"""

import json
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from minglm.kernels.toolchain.interpreter import (
    from_bfloat16,
    in_new_process,
    switch_on,
    to_bfloat16,
    to_float8,
    watched,
)
from minglm.testing.strategies import numbers, seeds

DEVICE = switch_on()
import triton  # noqa: E402
import triton.language as tl  # noqa: E402

ROOT = Path(__file__).parent.parent.parent


@triton.jit
def product(a_ptr, b_ptr, out_ptr, size: tl.constexpr):
    """Compute out = a b, square matrices."""
    i = tl.arange(0, size)
    at = i[:, None] * size + i[None, :]
    tl.store(out_ptr + at, tl.dot(tl.load(a_ptr + at), tl.load(b_ptr + at)))


@triton.jit
def copied(x_ptr, out_ptr, size: tl.constexpr):
    """Compute out = x, in out's dtype."""
    i = tl.arange(0, size)
    tl.store(out_ptr + i, tl.load(x_ptr + i).to(out_ptr.dtype.element_ty))


@triton.jit
def doubled(x_ptr, out_ptr, size: tl.constexpr):
    """Compute out = x + x in x's own dtype, which the house forbids for bfloat16."""
    i = tl.arange(0, size)
    x = tl.load(x_ptr + i)
    tl.store(out_ptr + i, x + x)


@triton.jit
def summed(x_ptr, out_ptr, size: tl.constexpr):
    """Compute out = the sum of x in x's own dtype."""
    tl.store(out_ptr, tl.sum(tl.load(x_ptr + tl.arange(0, size)), 0))


@triton.jit
def counted(bound_ptr, out_ptr):
    """Compute out = 0 + 1 + ... up to a bound that is loaded."""
    total = 0
    for i in range(0, tl.load(bound_ptr)):
        total += i
    tl.store(out_ptr, total)


def problems():
    """Return for each fault the largest relative error of the kernel, or the error it raises."""
    x = torch.randn(16, 16, generator=numbers(0), device="cpu").bfloat16()
    found = {}

    def attempt(name, kernel, inputs, expected, *constants):
        out = torch.full(expected.shape, float("nan")).to(expected.dtype)
        try:
            kernel[(1,)](*inputs, out, *constants)
            error = (out.double() - expected.double()).abs().max()
            largest = expected.double().abs().max()
            found[name] = float((error / largest).nan_to_num(1e9))
        except Exception as error:
            found[name] = str(error)

    attempt("dot", product, (x, x), x.float() @ x.float(), 16)
    values = torch.linspace(-3, 3, 256)
    attempt("round", copied, (values,), values.bfloat16(), 256)
    attempt("double", copied, (values.double(),), values.bfloat16(), 256)
    attempt("float8", copied, (values,), values.to(torch.float8_e4m3fn), 256)
    attempt("add", doubled, (x,), x + x, 256)
    attempt("sum", summed, (x,), x.float().sum().bfloat16()[None], 256)
    attempt(
        "bound",
        counted,
        (torch.tensor([5], dtype=torch.int32),),
        torch.tensor([10], dtype=torch.int32),
    )
    return found


@triton.jit
def strided(out_ptr, step, size: tl.constexpr):
    """Store program i's number to `size` elements from i times `step` on, the last of them masked out."""
    i = tl.arange(0, size)
    tl.store(out_ptr + tl.program_id(0) * step + i, i * 0 + tl.program_id(0), mask=i < size - 1)


cpu_only = pytest.mark.skipif(
    DEVICE == "cuda", reason="about the interpreter, which runs where there is no GPU"
)


@cpu_only
def test_every_fault_is_patched():
    """Products, casts and loop bounds are right; arithmetic on bfloat16 is refused and not garbage."""
    found = problems()
    assert found["dot"] < 1e-6  # float32 sums of 16 products
    assert found["round"] == found["double"] == found["float8"] == found["bound"] == 0
    assert "cast to float32" in found["add"] and "cast to float32" in found["sum"]


@cpu_only
@pytest.mark.parametrize(
    "step, counts", [(7, [1] * 21), (8, ([1] * 7 + [0]) * 3), (6, [1] * 6 + [2] + [1] * 5 + [2])]
)
def test_races_and_holes_are_seen(step, counts):
    """Stores are recorded with their program and mask: elements of two programs and of none can be counted."""
    out = torch.zeros(24, dtype=torch.int32)
    with watched() as stores:
        strided[(3,)](out, step, 8)
    assert [program for program, *_ in stores] == [(0, 0, 0), (1, 0, 0), (2, 0, 0)]
    addresses = np.concatenate([store.addresses[store.mask] for store in stores])
    elements = (addresses.astype(np.int64) - out.data_ptr()) // 4  # four bytes each
    found = np.bincount(elements, minlength=len(counts)).tolist()
    assert found[: len(counts)] == counts
    strided[(3,)](out, step, 8)
    assert len(stores) == 3  # only what ran inside


@cpu_only
def test_unpatched_interpreter_has_the_faults():
    """Without `patch_interpreter` the same kernels are wrong: once one of them is right, its patch can be removed."""
    program = (
        f"import sys, json; sys.path.insert(0, {str(Path(__file__).parent)!r})\n"
        "import minglm.kernels.toolchain.interpreter as shim; shim.patch_interpreter = lambda: None\n"
        "import test_interpreter; print(json.dumps(test_interpreter.problems()))"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    for name in ("dot", "add", "sum", "double"):
        assert found[name] > 0.5, name  # garbage without an error
    assert 0 < found["round"] < 0.01 and 0 < found["float8"] < 0.5  # float8 loses carries
    old = version("triton").startswith("3.6.") and np.lib.NumpyVersion(np.__version__) >= "2.4.0"
    assert isinstance(found["bound"], str) == old


@given(st.lists(st.floats(width=32), min_size=1, max_size=20))
def test_rounding_to_bfloat16_is_that_of_pytorch(values):
    """Every float32, infinities, subnormal numbers and NaN among them."""
    x = torch.tensor(values, dtype=torch.float32)
    expected = x.bfloat16()
    ours = torch.from_numpy(to_bfloat16(x.numpy()).view(np.int16)).view(torch.bfloat16)
    assert torch.equal(ours.isnan(), expected.isnan())
    assert torch.equal(ours.nan_to_num(0), expected.nan_to_num(0))
    back = torch.from_numpy(from_bfloat16(to_bfloat16(x.numpy())))
    assert torch.equal(back.nan_to_num(0), expected.float().nan_to_num(0))


@given(seed=seeds, scale=st.sampled_from([1e-3, 1.0, 100.0, 1e4]))
def test_rounding_to_float8_is_nearest_and_saturates(seed, scale):
    """No value of the format is nearer than the one chosen."""
    x = scale * torch.randn(32, generator=numbers(seed))
    every = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
    every = every[every.isfinite()]
    ours = torch.from_numpy(to_float8(x.numpy())).view(torch.float8_e4m3fn).float()
    assert torch.equal((ours - x).abs(), (every[None] - x[:, None]).abs().amin(1))


ADDRESS = """
import torch, triton, triton.language as tl
@triton.jit
def pick(w_ptr, out_ptr, expert, stride, WIDE: tl.constexpr, size: tl.constexpr):
    if WIDE:
        expert = expert.to(tl.int64)
    i = tl.arange(0, size)
    tl.store(out_ptr + i, tl.load(w_ptr + expert * stride + (stride - size) + i))
"""
RUN = """
w, tile = last_tile(160, 3072, 5120, tile=(1, 16))
out = torch.full((16,), float("nan"), dtype=torch.bfloat16)
pick[(1,)](w, out, 159, w.stride(0), {wide}, 16)
assert torch.equal(out, tile[0])
"""


@cpu_only
@pytest.mark.parametrize("wide", [True, False])
def test_32_bit_offsets_die_at_real_size(wide, tmp_path):
    """GLM-4.5's expert weights pass 2^31 elements: a 32-bit expert offset reads elsewhere, a 64-bit one the tile."""
    (tmp_path / "kernels.py").write_text(
        ADDRESS, encoding="utf-8"
    )  # triton reads a kernel's source from its file
    program = (
        f"import sys; sys.path.insert(0, {str(tmp_path)!r}); from kernels import *\n"
        + RUN.format(wide=wide)
    )
    done = in_new_process(program)
    assert (done.returncode == 0) == wide, done.stderr


@cpu_only
def test_whoever_asks_for_triton_gets_the_patched_one():
    """`--kernels triton` of any command patches the interpreter, without `switch_on`; nothing else does."""
    program = (
        "from minglm.kernels import dispatch; from triton.runtime.interpreter import InterpreterBuilder as builder\n"
        "dispatch.use('auto'); assert not hasattr(builder, 'patched')\n"
        "dispatch.use('triton'); assert builder.patched"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stderr


@cpu_only
def test_too_late_is_an_error():
    """A process that imported triton without the variable cannot interpret any more, and says so."""
    program = (
        "import os, sys; os.environ.pop('TRITON_INTERPRET', 0); import triton.language\n"
        "from minglm.kernels.toolchain.interpreter import switch_on; switch_on()"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 1 and "set it before the first import" in done.stderr
