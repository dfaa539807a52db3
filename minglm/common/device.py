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

    Such a CPU (no AVX512-BF16, no AMX) unpacks bfloat16 number by number, which takes about six times as long
    as float32.
    """
    import torch

    if name == "bfloat16" and device.type == "cpu":
        has = torch.cpu.get_capabilities()
        if not (has.get("avx512_bf16") or has.get("amx_bf16")):
            name = "float32"
    return getattr(torch, name)


def measured_flops(device: "torch.device", dtype: "torch.dtype", threads: int) -> float:
    """Measure the FLOP/s of a device in one large matrix product of this dtype; of a CPU, those of `threads` cores.

    A model-FLOPs utilisation is measured against it: not a data sheet's number, but what this machine reaches.
    """
    size = 1024 if device.type == "cpu" else 8192
    speed = 2 * size**3 / _product_seconds(device, dtype, size)
    return speed * threads if device.type == "cpu" else speed


@functools.cache
def _product_seconds(device: "torch.device", dtype: "torch.dtype", size: int) -> float:
    """Time products of two size x size matrices for a tenth of a second, once in a process.

    Return the seconds of the best.

    On a CPU one thread multiplies, and its own time counts: a clock would count other programs of a busy machine.
    """
    import torch

    def wait() -> None:
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    clock = time.thread_time if device.type == "cpu" else time.perf_counter
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    a = torch.ones(size, size, dtype=dtype, device=device)
    b = torch.ones(size, size, dtype=dtype, device=device)
    best = float("inf")
    began = clock()
    while best == float("inf") or clock() - began < 0.1:
        # Three in a row: buffers and clocks of the first rounds are cold.
        for _ in range(3):
            wait()
            start = clock()
            torch.mm(a, b)
            wait()
            best = min(best, clock() - start)
    torch.set_num_threads(threads)
    return best


def seed_everything(seed: int) -> None:
    """Seed Python, numpy and torch.

    Data order and sampling have their own generators and do not depend on this.
    """
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
