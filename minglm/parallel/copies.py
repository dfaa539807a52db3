"""Copy a sharded model: whole, to generate with, or sharded over all ranks where it is cut into stages (no section).

    whole_copy        every rank has all layers: an engine that samples needs no other rank
    without_stages    every rank has a part of each layer, of a pipeline's model too

Both are filled tensor by tensor: beside the copy, a rank never has more than one whole tensor.

A copy to generate with keeps its matrices in the dtype in which they are multiplied, half of the bytes for
bfloat16: they would be rounded at each use, to the same numbers. Router, norms and biases stay float32, as a
model in training has them.
"""

import torch

from minglm.config import ParallelConfig
from minglm.model.glm import GLM
from minglm.model.parameters import ParameterKind, kind_of
from minglm.parallel.mesh import Meshes
from minglm.parallel.shard import shard
from minglm.parallel.workers import ShardedWorker

FLOAT32 = (ParameterKind.ROUTER, ParameterKind.NORM, ParameterKind.BIAS)
"""Kinds that are not rounded before they are used."""


def whole_copy(
    workers: ShardedWorker, model: GLM, device: torch.device, rounded: bool = False
) -> GLM:
    """Return a copy with all weights, on each rank; all must call it. rounded: only to generate with, see the module."""
    with torch.device("meta"):
        copy = GLM(model.config)
        for name, parameter in copy.named_parameters():
            if rounded and kind_of(name) not in FLOAT32:
                parameter.data = parameter.data.to(model.dtype)
    copy.to_empty(device=device)
    copy.tie_weights()
    copy.dtype = model.dtype
    copy.rope_theta = model.rope_theta
    workers.gather_into(copy)
    return copy


def without_stages(
    workers: ShardedWorker, model: GLM, meshes: Meshes, config: ParallelConfig, device: torch.device
) -> GLM:
    """Return a copy of a pipeline's model that has all layers, sharded over the ranks of `meshes`, those of all stages."""
    with torch.device("meta"):
        copy = GLM(model.config)
    copy.dtype = model.dtype
    copy.rope_theta = model.rope_theta
    shard(copy, meshes, config)
    copy.to_empty(device=device)
    workers.gather_into(copy)
    return copy
