"""The GPUs that a plan may name: speed, memory and links of each, from the maker's data sheets (no section in the paper).

    bytes per second that a collective reaches = the link's, in one direction, * the share of it that is usually reached

Nothing here was measured by this project, but `KERNEL_SHARE`: on an H100 our expert layer reached 530 TFLOP/s
forward and backward (`figures/bench_kernels.json`), 54% of the data sheet's 989.

Simplified: nodes are the usual ones, with one network card for each GPU. Another cluster is described by
--gpu-memory-gib and --gpus-per-node, and its collectives are measured by `minglm bench collectives`.
"""

from dataclasses import dataclass

KERNEL_SHARE = 0.54
"""Share of the peak that large products reach in a layer, all its operations counted."""
NVLINK_SHARE = 0.67
"""Share of NVLink's bytes per second that an all-to-all reaches: 300 of 450 GB/s is what NCCL reports on an H100."""
NETWORK_SHARE = 0.9
"""Share of the network card's: 45 of 50 GB/s."""
USABLE = 0.9
"""Share of the memory for the run; the rest is the CUDA context, NCCL's buffers and fragmentation."""


@dataclass(frozen=True)
class GPU:
    """One kind of GPU, in the node that it is usually sold in."""

    name: str
    """As --gpu takes it."""
    memory_gib: float
    """Memory, in GiB."""
    flops: float
    """Dense bfloat16 products, operations per second."""
    bandwidth: float
    """Of its memory, bytes per second."""
    nvlink: float
    """Of its links to the other GPUs of the node, bytes per second in one direction."""
    network: float
    """Of its network card, bytes per second in one direction."""
    per_node: int
    """GPUs of a node."""
    float8: bool
    """Whether it multiplies float8."""
    source: str
    """Where the numbers are from."""


GPUS = {
    gpu.name: gpu
    for gpu in (
        GPU("a100", 80, 312e12, 2.04e12, 300e9, 25e9, 8, False, "NVIDIA A100 80GB SXM; DGX A100"),
        GPU("h20", 95, 148e12, 4.0e12, 450e9, 50e9, 8, True, "NVIDIA H20"),
        GPU("h100", 80, 989e12, 3.35e12, 450e9, 50e9, 8, True, "NVIDIA H100 SXM; DGX H100"),
        GPU("h200", 140, 989e12, 4.8e12, 450e9, 50e9, 8, True, "NVIDIA H200 SXM; DGX H200"),
        GPU("b200", 179, 2250e12, 8.0e12, 900e9, 50e9, 8, True, "NVIDIA B200; DGX B200"),
    )
}
"""The kinds that --gpu takes."""
