"""Small things every floor uses: threads, seeds, devices, atomic files, JSON-lines log. No counterpart in the paper."""

import functools
import random
import time


def pick_device(name="auto"):
    """`auto` is the GPU where there is one. Raises ValueError for another name, and when cuda is absent."""
    import torch

    if name.partition(":")[0] not in ("auto", "cpu", "cuda"):
        raise ValueError(f"device = {name!r}: must be auto, cpu or cuda")
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if name.startswith("cuda") and not torch.cuda.is_available():
        raise ValueError(f"device = {name!r}: this machine has no CUDA device; use --device cpu")
    return torch.device(name)


def pick_dtype(name, device):
    """The precision of matrix products on a device: `name`, or float32 on a CPU that has no bfloat16 products.

    There (no AVX512-BF16, no AMX) bfloat16 is unpacked number by number and takes about six times as long as float32.
    """
    import torch

    if name == "bfloat16" and device.type == "cpu":
        have = torch.cpu.get_capabilities()
        name = name if have.get("avx512_bf16") or have.get("amx_bf16") else "float32"
    return getattr(torch, name)


@functools.cache
def measured_flops(device, dtype, seconds=0.1):
    """FLOP/s of a device in one large matrix product of this dtype, the best of those done in about `seconds`.

    What a model-FLOPs utilisation is measured against: not a data sheet's number, but what this machine reaches.
    Measured once in a process.
    """
    import torch

    size = 1024 if device.type == "cpu" else 8192
    a, b = (torch.ones(size, size, dtype=dtype, device=device) for _ in range(2))
    best, began = float("inf"), time.perf_counter()
    while best == float("inf") or time.perf_counter() - began < seconds:
        for _ in range(
            3
        ):  # also the first rounds, whose buffers and clocks are cold; the best is kept
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            at = time.perf_counter()
            a @ b
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            best = min(best, time.perf_counter() - at)
    return 2 * size**3 / best


def peak_bytes(function, *values):
    """The most bytes that PyTorch had allocated at one time on the CPU during a call, beyond what was there before."""
    from torch.profiler import profile

    with profile(profile_memory=True) as found:
        function(*values)
    held = highest = 0
    for event in found.profiler.kineto_results.events():
        if event.name() == "[memory]":
            held += event.nbytes()
            highest = max(highest, held)
    return highest


def seed_everything(seed):
    """Seed Python, numpy and torch. Data order and sampling use generators of their own and do not depend on this."""
    import numpy as np
    import torch

    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)
