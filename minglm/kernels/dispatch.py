"""Which form of a kernel runs, plain PyTorch, Triton or C, and how a Triton kernel says what is to be compiled.

    from minglm.kernels.backend import backend

    def norm(x, weight):
        if backend(x) == "triton":
            from minglm.kernels.norm_triton import norm_triton
            return norm_triton(x, weight)
        return plain_norm(x, weight)

Every operation has a file `x.py` with its plain form and this choice, and a file `x_triton.py`, which imports triton at
the top and is itself imported only here, when a tensor asks for it. There is one choice for the process, as with
`torch.backends`: a model that mixes both forms could not be compared with anything.

    auto     Triton for tensors on a GPU, where triton is installed; C, where there is a compiler, for what the engine
             generates on a CPU in float32 (`minglm.inference.cpu_decoder`) and in Muon; PyTorch for all others
    torch    PyTorch everywhere
    triton   Triton everywhere: on a CPU only in its interpreter (TRITON_INTERPRET=1), mended, which is for tests
"""

import functools
import importlib.util
import os

import torch

from minglm.kernels.cpu import build
from minglm.kernels.toolchain.interpreter import patch_interpreter

CHOICES = ("auto", "torch", "triton")
_chosen = "auto"


@functools.cache
def installed():
    """Whether triton can be imported; asks the file system only once."""
    return importlib.util.find_spec("triton") is not None


def use(name):
    """Choose the form of all kernels in this process: auto, torch or triton.

    Raises ValueError for another name, and for triton where it is not installed.
    """
    global _chosen
    if name not in CHOICES:
        raise ValueError(f"kernels = {name!r}: must be auto, torch or triton")
    if name == "triton" and not installed():
        raise ValueError(
            "kernels = 'triton': triton is not installed; pip install triton, or use --kernels auto"
        )
    if name == "triton" and os.environ.get("TRITON_INTERPRET") == "1":
        patch_interpreter()
    _chosen = name


def backend(tensor, gradients=True):
    """ "triton", "c" or "torch": the form that runs for this tensor. Float64, which is for references, gets torch.

    gradients: whether they are ever asked of this operation; where not, C does not wait for inference mode.

    Raises ValueError for triton on a CPU outside the interpreter, where a kernel could not run.
    """
    if _chosen == "torch" or tensor.dtype == torch.float64:
        return "torch"
    if _chosen == "auto" and not tensor.is_cuda:
        quiet = torch.is_inference_mode_enabled() or not gradients
        fits = tensor.dtype == torch.float32 and tensor.is_cpu and quiet
        return "c" if fits and build.library() is not None else "torch"
    if _chosen == "auto":
        return "triton" if installed() else "torch"
    if not tensor.is_cuda and os.environ.get("TRITON_INTERPRET") != "1":
        raise ValueError(
            "kernels = 'triton' needs a GPU; use --kernels auto, or TRITON_INTERPRET=1 for a slow test"
        )
    return "triton"
