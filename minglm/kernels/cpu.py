"""Small operations on a CPU, in C: compiled when first needed, found again on disk (no section in the paper).

    cc -O3 -march=native -ffast-math cpu.c  ->  cache/minglm/cpu-<hash of source, compiler, processor>.so  ->  ctypes

`cpu.c` is the third form of eight operations, beside PyTorch and Triton, chosen by `minglm.kernels.backend` for float32
tensors on a CPU where no gradient can be asked for. What PyTorch's form costs in generation is not arithmetic but
calls: a token of the toy model is about a thousand of them. Compiling takes a second or two, once for a machine, and
without a compiler PyTorch goes on. C without PyTorch's headers is what keeps that so short, and readable.

Simplified: one thread, but for Newton-Schulz. Where there is enough work for more (`alone`), PyTorch does it.
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

from minglm import common

SOURCE = Path(__file__).with_suffix(".c")
FLAGS = ("-O3", "-march=native", "-ffast-math", "-fPIC", "-std=gnu11")
FEW = 2**25
PANEL, LANES = 16, 8  # tokens that a product takes at once, numbers in a vector: as in the source


def cache_folder():
    """Where compiled libraries are kept: $XDG_CACHE_HOME/minglm, by default ~/.cache/minglm."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "minglm"


def _processor():
    """What -march=native depends on."""
    with contextlib.suppress(OSError):
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return platform.machine() + next((line for line in lines if line.startswith(("flags", "Features"))), "")
    return platform.machine() + platform.processor()


def build(compiler, folder):
    """The path of the compiled library, which is made if it is not there. Raises OSError or CalledProcessError."""
    version = subprocess.run([compiler, "--version"], capture_output=True, check=True).stdout
    told = hashlib.sha256(SOURCE.read_bytes() + version + _processor().encode() + " ".join(FLAGS).encode())
    library = folder / f"cpu-{told.hexdigest()[:16]}.so"
    if not library.exists():
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder) as work:  # in two steps: linked with -ffast-math, the library
            part, whole = Path(work) / "cpu.o", Path(work) / "cpu.so"  # would change how all others treat tiny numbers
            subprocess.run([compiler, *FLAGS, "-c", SOURCE, "-o", part], capture_output=True, check=True)
            subprocess.run([compiler, "-shared", part, "-o", whole, "-lm"], capture_output=True, check=True)
            os.replace(whole, library)
    return library


def compiler():
    """$CC, or the C compiler that there is; None without one, and on Windows."""
    found = os.environ.get("CC") or shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")
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
        print(f"minglm: plain PyTorch in place of C, because {command} failed: {error}", file=sys.stderr)
        return None
    kinds = {"p": ctypes.c_void_p, "l": ctypes.c_long, "f": ctypes.c_float, "i": ctypes.c_int, "q": ctypes.c_int64}
    for name, letters in SIGNATURES.items():
        function = getattr(loaded, name)
        function.argtypes, function.restype = [kinds[letter] for letter in letters], None
    return loaded


SIGNATURES = {
    "add_norm": "ppppp" + "llf",
    "norm_rope": "pppp" + "llllf",
    "router_topk": "ppppp" + "lllif",
    "experts": "ppppppppp" + "lllll",
    "keep": "pppp" + "lll",
    "paged_attention": "pppppp" + "lllllllll",
    "sample": "pppppqppp" + "ll",
    "newton_schulz": "pppp" + "llll",
}
"""Arguments in order: pointer, long, float, int, int64."""


def alone(multiplications):
    """Whether one thread is enough for so many: below a millisecond, or where there is no other."""
    return multiplications <= FEW or torch.get_num_threads() == 1


def _at(tensor):
    """Where its numbers begin; what another layout or dtype would make of them nobody would notice."""
    if tensor is None:
        return None
    assert tensor.dtype in (torch.float32, torch.int64) and tensor.is_contiguous()
    return tensor.data_ptr()


def add_norm_cpu(x, weight_D, eps, change=None):
    """The same as `minglm.kernels.norm.norm`, any leading axes."""
    x, change, weight_D = x.contiguous(), None if change is None else change.contiguous(), weight_D.float()
    out, D = torch.empty_like(x), x.shape[-1]
    total = x if change is None else torch.empty_like(x)
    library().add_norm(_at(x), _at(change), _at(weight_D), _at(out), _at(total), x.numel() // D, D, eps)
    return out, total


def norm_rope_cpu(x_BSNA, weight_A, cos, sin, eps):
    """One half of `minglm.kernels.qk_norm_rope.qk_norm_rope`, in place: x must be its caller's own, contiguous."""
    B, S, N, A = x_BSNA.shape
    half, weight_A = cos.shape[-1], None if weight_A is None else weight_A.float()
    cos, sin = (a.expand(B, S, 1, half).contiguous() for a in (cos, sin))
    library().norm_rope(_at(x_BSNA), _at(weight_A), _at(cos), _at(sin), B * S, N, A, half, eps)
    return x_BSNA


def router_topk_cpu(logits_TE, bias_E, top_k, normalize=True, scale=1.0):
    """The same as `minglm.kernels.router_topk.router_topk`."""
    T, E = logits_TE.shape
    logits_TE, scores_TE = logits_TE.contiguous(), torch.empty_like(logits_TE)
    experts_TK, weights_TK = logits_TE.new_empty(T, top_k, dtype=torch.int64), logits_TE.new_empty(T, top_k)
    library().router_topk(
        _at(logits_TE), _at(bias_E), _at(experts_TK), _at(weights_TK), _at(scores_TE), T, E, top_k, normalize, scale
    )
    return experts_TK, weights_TK, scores_TE


def experts_cpu(x_TD, experts_TK, weights_TK, gate_EFD, up_EFD, down_EDF):
    """The same as `minglm.kernels.grouped_gemm.experts_loop`."""
    (T, K), (E, F, D) = experts_TK.shape, gate_EFD.shape
    x_TD, experts_TK, weights_TK = x_TD.contiguous(), experts_TK.contiguous(), weights_TK.contiguous()
    gate_EFD, up_EFD, down_EDF = gate_EFD.contiguous(), up_EFD.contiguous(), down_EDF.contiguous()
    y_TD, order = torch.empty_like(x_TD), torch.empty_like(experts_TK)
    scratch = x_TD.new_empty(2 * (D + F) * PANEL)
    library().experts(
        _at(x_TD), _at(experts_TK), _at(weights_TK), _at(gate_EFD), _at(up_EFD), _at(down_EDF), _at(y_TD), _at(order),
        _at(scratch), T, K, E, D, F,
    )  # fmt: skip
    return y_TD


def swiglu_cpu(x, gate_FD, up_FD, down_DF):
    """down( silu(gate x) * (up x) ) for x (..., D): one expert that every token visits with weight one."""
    x_TD = x.reshape(-1, x.shape[-1])
    experts_T1, weights_T1 = x_TD.new_zeros(len(x_TD), 1, dtype=torch.int64), x_TD.new_ones(len(x_TD), 1)
    matrices = (matrix.to(x.dtype)[None] for matrix in (gate_FD, up_FD, down_DF))
    return experts_cpu(x_TD, experts_T1, weights_T1, *matrices).view(x.shape)


def keep_cpu(k, v, written, store):
    """Put keys and values (..., M, A) into the rows `written` of the store seen as (..., A); v may be None."""
    M, A = k.shape[-2:]
    k, v = k.contiguous(), None if v is None else v.contiguous()
    library().keep(_at(k), _at(v), _at(written), _at(store), k.numel() // (M * A), M, A)


def paged_attention_cpu(q_BSNA, store, rows, positions_BS, first=0):
    """The same as `minglm.kernels.paged_attention.paged_attention`, with positions and first slot for a mask."""
    B, S, N, A = q_BSNA.shape
    parts, M, size = store.shape[1:4]
    blocks = rows.numel() // (parts * B * M)
    q_BSNA, positions_BS = q_BSNA.contiguous(), positions_BS.contiguous()
    out, scratch = torch.empty_like(q_BSNA), q_BSNA.new_empty((blocks * size + 2 * A) * (N // M + 3))
    library().paged_attention(
        _at(q_BSNA), _at(store), _at(rows), _at(positions_BS), _at(out), _at(scratch), B, S, N, M, A, blocks, size,
        parts, first,
    )  # fmt: skip
    return out


def sample_cpu(logits_BV, temperature_B, top_p_B, seeds_B, index_B, purpose):
    """`sample` of `minglm.inference.sampling` with its `uniforms`: tokens int64 and log-probabilities.

    top_p_B: float32, None for no cut; the other cuts are left to PyTorch.
    """
    B, V = logits_BV.shape
    logits_BV = logits_BV.contiguous()
    tokens_B, logprobs_B, scratch = torch.empty_like(seeds_B), logits_BV.new_empty(B), logits_BV.new_empty(V)
    library().sample(
        _at(logits_BV), _at(temperature_B), _at(top_p_B), _at(seeds_B), _at(index_B), purpose, _at(tokens_B),
        _at(logprobs_B), _at(scratch), B, V,
    )  # fmt: skip
    return tokens_B, logprobs_B


def newton_schulz_cpu(stack, coefficients):
    """The same as `minglm.kernels.newton_schulz.orthogonalize` for (matrices, rows, columns), shared among threads.

    A matrix never meets another, so a result depends neither on the threads nor on what else is in the stack.
    """
    stack, (count, rows, columns) = stack.contiguous(), stack.shape
    out, table = torch.empty_like(stack), torch.tensor(coefficients, dtype=torch.float32)
    short = -(-min(rows, columns) // LANES) * LANES

    def work(first, last):
        scratch = stack.new_empty(2 * short * (short + max(rows, columns)))
        part = (_at(stack[first:last]), _at(out[first:last]), _at(scratch), _at(table))
        library().newton_schulz(*part, len(coefficients), last - first, rows, columns)

    threads = common.threads if count * rows * columns * short > FEW else 1
    bounds = [count * i // threads for i in range(threads + 1)]
    if threads == 1:
        work(0, count)
    else:  # C gives Python's lock back while it computes
        with ThreadPoolExecutor(threads) as pool:
            list(pool.map(work, bounds, bounds[1:]))
    return out
