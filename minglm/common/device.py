"""Choose the device and its precision, measure its speed, seed the generators (no section in the paper)."""

import functools
import random
import time
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # `python -m minglm --help` answers without torch
    import torch

DEVICES = ("auto", "cpu", "cuda")


def pick_device(name: str = "auto") -> "torch.device":
    """Return the device of this name; "auto" is the GPU where there is one, else the CPU.

    Raises ValueError for another name, and for cuda on a machine without a GPU.
    """
    import torch

    kind, _, index = name.partition(":")
    if kind not in DEVICES or (kind != "cuda" and kind != name):
        raise ValueError(f"device = {name!r}: must be auto, cpu or cuda")
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if name.startswith("cuda") and not torch.cuda.is_available():
        raise ValueError(f"device = {name!r}: this machine has no CUDA device; use --device cpu")
    count = torch.cuda.device_count()
    if kind != name and not (index.isdecimal() and int(index) < count):
        raise ValueError(f"device = {name!r}: this machine has cuda:0 to cuda:{count - 1}")
    return torch.device(name)


def pick_dtype(name: str, device: "torch.device") -> "torch.dtype":
    """Return the precision of matrix products: `name`, or float32 on a CPU without bfloat16 products.

    Such a CPU (no AVX512-BF16, no AMX) unpacks bfloat16 number by number, which takes about six times as long as
    float32.
    """
    import torch

    if name == "bfloat16" and device.type == "cpu":
        has = torch.cpu.get_capabilities()
        if not (has.get("avx512_bf16") or has.get("amx_bf16")):
            name = "float32"
    return getattr(torch, name)


@functools.cache
def measured_flops(device: "torch.device", dtype: "torch.dtype", seconds: float = 0.1) -> float:
    """Measure the FLOP/s of a device in one large matrix product of this dtype; repeat for about `seconds`.

    The best repetition counts. A model-FLOPs utilisation is measured against it: not a data sheet's number, but what
    this machine reaches. Measured once in a process.
    """
    import torch

    def wait() -> None:
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    size = 1024 if device.type == "cpu" else 8192
    a = torch.ones(size, size, dtype=dtype, device=device)
    b = torch.ones(size, size, dtype=dtype, device=device)
    best = float("inf")
    began = time.perf_counter()
    while best == float("inf") or time.perf_counter() - began < seconds:
        # Three in a row: buffers and clocks of the first rounds are cold.
        for _ in range(3):
            wait()
            start = time.perf_counter()
            torch.mm(a, b)
            wait()
            best = min(best, time.perf_counter() - start)
    return 2 * size**3 / best


def seed_everything(seed: int) -> None:
    """Seed Python, numpy and torch. Data order and sampling have their own generators and do not depend on this."""
    import numpy as np
    import torch

    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


def free_bytes(device: "torch.device") -> float:
    """Return the memory of a GPU that this process could still use, in bytes; of a CPU, infinity: it is not asked."""
    import torch

    if device.type != "cuda":
        return float("inf")
    free, _ = torch.cuda.mem_get_info(device)
    return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
