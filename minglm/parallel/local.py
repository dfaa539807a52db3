"""Reach the part of a sharded tensor that is in this process (no section in the paper).

A parameter of a sharded model is a DTensor: it has the global shape, and in this process the rows of one
rank. What is done value by value, such as AdamW or the scaling of a gradient, is done on these rows, as if
they were the tensor.
"""

import math

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor


@torch.no_grad()
def local(tensor: Tensor) -> Tensor:
    """Return the rows of a DTensor in this process, which share its memory; any other tensor itself."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def copies(tensor: Tensor) -> int:
    """Count the ranks that hold the same rows of a DTensor as this one, itself included."""
    if not isinstance(tensor, DTensor):
        return 1
    sizes = tensor.device_mesh.shape
    return math.prod(
        size
        for size, placement in zip(sizes, tensor.placements, strict=True)
        if placement.is_replicate()
    )


def average_bytes(tensor: Tensor) -> int:
    """Return how many bytes of a tensor are in a process, on the average of its ranks: equal on all of them."""
    whole = tensor.numel() * tensor.element_size()
    if not isinstance(tensor, DTensor):
        return whole
    return whole * copies(tensor) // tensor.device_mesh.size()
