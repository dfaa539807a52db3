"""What C does on a CPU: compiled when first needed, found again on disk (no section in the paper).

    cc -O3 -march=native -ffast-math *.c  ->  cache/minglm/cpu-<hash of sources, compiler, processor>.so  ->  ctypes

C is the third form of a few operations, beside PyTorch and Triton, chosen by `minglm.kernels.dispatch` for float32 on a
CPU where no gradient can be asked for. Generation of a small model costs calls and not arithmetic: a token of the toy
is about a thousand calls of PyTorch. So a whole pass is one call (`decoder.c`, from `minglm.inference.cpu_decoder`),
drawing the next tokens is another, and Muon's Newton-Schulz a third (both in `cpu.c`). Compiling takes seconds, once
for a machine, and without a compiler PyTorch goes on. C without PyTorch's headers is what keeps that so short, and
readable.
"""

import contextlib
import ctypes
import functools
import hashlib
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

from minglm.common.threads import threads_in_use

FOLDER = Path(__file__).parent
FLAGS = ("-O3", "-march=native", "-ffast-math", "-fPIC", "-std=gnu11", "-pthread")
FEW = 2**25  # multiplications, for which one thread is enough: a millisecond


def cache_folder():
    """Where compiled libraries are kept: $XDG_CACHE_HOME/minglm, by default ~/.cache/minglm."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "minglm"


def _processor():
    """What -march=native depends on."""
    with contextlib.suppress(OSError):
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return platform.machine() + next(
            (line for line in lines if line.startswith(("flags", "Features"))), ""
        )
    return platform.machine() + platform.processor()


def build(compiler, folder):
    """The path of the compiled library, which is made if it is not there. Raises OSError or CalledProcessError."""
    version = subprocess.run([compiler, "--version"], capture_output=True, check=True).stdout
    sources = sorted(FOLDER.glob("*.c"))
    told = b"".join(file.read_bytes() for file in (*sources, *sorted(FOLDER.glob("*.h"))))
    told = hashlib.sha256(told + version + _processor().encode() + " ".join(FLAGS).encode())
    library = folder / f"cpu-{told.hexdigest()[:16]}.so"
    if not library.exists():
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(
            dir=folder
        ) as work:  # in two steps: linked with -ffast-math, the library
            # would change how all others treat tiny numbers
            subprocess.run(
                [compiler, *FLAGS, "-c", *sources], capture_output=True, check=True, cwd=work
            )
            link = [
                compiler,
                "-shared",
                "-pthread",
                *Path(work).glob("*.o"),
                "-o",
                Path(work) / "cpu.so",
                "-lm",
            ]
            subprocess.run(link, capture_output=True, check=True)
            os.replace(Path(work) / "cpu.so", library)
    return library


def compiler():
    """$CC, or the C compiler that there is; None without one, and on Windows."""
    found = (
        os.environ.get("CC") or shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")
    )
    return None if sys.platform == "win32" else found


@functools.cache
def library():
    """The loaded library, or None where there is no compiler or it fails; which is said once."""
    command = compiler()
    if command is None:
        return None
    try:
        try:
            path = build(command, cache_folder())
        except OSError:  # a home that cannot be written to
            path = build(command, Path(tempfile.mkdtemp(prefix="minglm-")))
        loaded = ctypes.CDLL(str(path))
    except (OSError, subprocess.SubprocessError) as error:
        print(
            f"minglm: plain PyTorch in place of C, because {command} failed: {error}",
            file=sys.stderr,
        )
        return None
    kinds = {"p": ctypes.c_void_p, "l": ctypes.c_long, "q": ctypes.c_int64}
    for name, letters in SIGNATURES.items():
        function = getattr(loaded, name)
        function.argtypes, function.restype = [kinds[letter] for letter in letters], None
    return loaded


SIGNATURES = {"decode": "p", "sample": "pppppqppp" + "ll", "newton_schulz": "pppp" + "llll"}
"""Arguments in order: pointer, long, int64."""


def lanes():
    """How many float32 numbers a vector of the library has."""
    return ctypes.c_long.in_dll(library(), "vector_lanes").value


def at(tensor):
    """Where its numbers begin; what another layout or dtype would make of them nobody would notice. None for None."""
    if tensor is None:
        return None
    assert tensor.dtype in (torch.float32, torch.int64) and tensor.is_contiguous()
    return tensor.data_ptr()


def sample_cpu(logits_BV, temperature_B, top_p_B, seeds_B, index_B, purpose):
    """`sample` of `minglm.inference.sampling` with its `uniforms`: tokens int64 and log-probabilities.

    top_p_B: float32, None for no cut; the other cuts are left to PyTorch.
    """
    B, V = logits_BV.shape
    logits_BV = logits_BV.contiguous()
    tokens_B, logprobs_B = torch.empty_like(seeds_B), logits_BV.new_empty(B)
    scratch = logits_BV.new_empty(V + lanes())
    library().sample(
        at(logits_BV),
        at(temperature_B),
        at(top_p_B),
        at(seeds_B),
        at(index_B),
        purpose,
        at(tokens_B),
        at(logprobs_B),
        at(scratch),
        B,
        V,
    )
    return tokens_B, logprobs_B


def newton_schulz_cpu(stack, coefficients):
    """The same as `minglm.kernels.newton_schulz.eager.orthogonalize` for (matrices, rows, columns), shared among threads.

    A matrix never meets another, so a result depends neither on the threads nor on what else is in the stack.
    """
    stack, (count, rows, columns) = stack.contiguous(), stack.shape
    out, table = torch.empty_like(stack), torch.tensor(coefficients, dtype=torch.float32)
    short = -(-min(rows, columns) // lanes()) * lanes()

    def work(first, last):
        scratch = stack.new_empty(2 * short * (short + max(rows, columns)))
        part = (at(stack[first:last]), at(out[first:last]), at(scratch), at(table))
        library().newton_schulz(*part, len(coefficients), last - first, rows, columns)

    threads = threads_in_use() if count * rows * columns * short > FEW else 1
    bounds = [count * i // threads for i in range(threads + 1)]
    if threads == 1:
        work(0, count)
    else:  # C gives Python's lock back while it computes
        with ThreadPoolExecutor(threads) as pool:
            list(pool.map(work, bounds, bounds[1:]))
    return out
