"""Shard a model over the ranks: FSDP2 for all weights, and a part of the experts on each rank (no section in the paper).

    unit                     sharded over          before its forward pass and its backward pass
    embedding, head          fsdp                  gathered; the head stays, since the backward pass begins with it
    each layer               fsdp                  gathered, and freed after it
      its experts            efsdp, after ep       gathered over efsdp: the rank's E / ep experts
      its router             fsdp, in float32      gathered (where the layer is in bfloat16)

With `dp_replicate` each unit is sharded inside a replica, and gradients are summed over the replicas too (HSDP).

Rules, each of which cost others days:
- Gradients are summed and never divided: the loss has the counts of the whole batch in it (`minglm.train.loss`). It is the
  only scale that is right for experts, for uneven shares, and on every backend.
- Experts keep their global shape, (E, F, D), as DTensors: divided by expert over ep and by rows over efsdp. A checkpoint of
  one layout therefore fits any other.
- What is called on a module other than `forward` is registered, or it would see the shards.
- With ep > 1 the host waits in each layer for the sizes of the exchange, and the next layer's gather would begin too late.
  So each layer asks for the next one's.

Weights are float32; with `dtype` bfloat16 they are gathered in it and their gradients summed in float32.
Norms then compute with weights rounded to bfloat16, where one process has float32; the router has float32 in
both.
"""

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import (
    FSDPModule,
    MixedPrecisionPolicy,
    fully_shard,
    register_fsdp_forward_method,
)
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

from minglm.config import ModelConfig, ParallelConfig, TokenExchange
from minglm.kernels.experts import grouped_experts
from minglm.model.decoder import DecoderLayer
from minglm.model.embedding import Embedding, LMHead
from minglm.model.glm import GLM, Part, initialize
from minglm.model.moe import Dispatcher, Experts, LocalDispatcher, MoE
from minglm.parallel.deepep import DeepEPDispatcher
from minglm.parallel.dispatcher import AllToAllDispatcher
from minglm.parallel.mesh import Meshes
from minglm.parallel.sequence import share_sequences

BY_EXPERT = 0  # axis E of (E, F, D)
BY_ROW = 1  # axis F of gate and up, axis D of down


def shard(model: GLM, meshes: Meshes, config: ParallelConfig) -> None:
    """Shard a model in place: each parameter becomes a DTensor. Every rank must call it, with the same model.

    model: on the meta device, or the same values on all ranks. It computes in `model.dtype`.
    """
    policy = MixedPrecisionPolicy(cast_forward_inputs=False)
    if model.dtype != torch.float32:
        # The inputs are what the layers make them: angles and router scores stay float32.
        policy = MixedPrecisionPolicy(
            param_dtype=model.dtype, reduce_dtype=torch.float32, cast_forward_inputs=False
        )
    reshard = config.reshard_after_forward
    replicas = ("dp_replicate",) if meshes.layout.dp_replicate > 1 else ()
    dense = meshes.dense[(*replicas, "fsdp")]
    sparse = meshes.sparse[(*replicas, "efsdp")]

    layers = list(model.model.layers)
    dispatcher = exchange_of(model.config, meshes, config)
    for layer in layers:
        if not isinstance(layer, DecoderLayer):  # another stage of a pipeline has it
            continue
        if isinstance(layer.mlp, MoE):
            layer.mlp.dispatcher = dispatcher
            if meshes.layout.ep > 1:
                divide_experts(layer.mlp.experts, meshes.sparse["ep"])
            fully_shard(
                layer.mlp.experts,
                mesh=sparse,
                mp_policy=policy,
                reshard_after_forward=reshard,
                shard_placement_fn=lambda parameter: Shard(BY_ROW),
            )
            if meshes.layout.ep == 1:
                register_fsdp_forward_method(layer.mlp.experts, "weighted_sum")
            if policy.param_dtype is not None:
                fully_shard(layer.mlp.gate, mesh=dense, reshard_after_forward=reshard)
        fully_shard(layer, mesh=dense, mp_policy=policy, reshard_after_forward=reshard)
    embedding, head = model.model.embed_tokens, model.lm_head
    if not model.config.tie_word_embeddings:  # tied, both belong to the whole model's own unit
        if isinstance(embedding, Embedding):
            fully_shard(embedding, mesh=dense, mp_policy=policy)
        if isinstance(head, LMHead):
            fully_shard(head, mesh=dense, mp_policy=policy, reshard_after_forward=False)
    fully_shard(model, mesh=dense, mp_policy=policy)

    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)
    for method in ("cross_entropy", "token_log_probabilities"):
        register_fsdp_forward_method(head, method)
    register_fsdp_forward_method(model, "hidden")
    if meshes.layout.cp > 1:
        share_sequences(model, meshes.rows["cp"].get_group())
    if meshes.layout.ep > 1:
        prefetch(layers)


def exchange_of(model: ModelConfig, meshes: Meshes, config: ParallelConfig) -> Dispatcher:
    """Return the dispatcher of all layers: that of one process where no experts are divided."""
    if meshes.layout.ep == 1:
        return LocalDispatcher()
    group = meshes.sparse["ep"].get_group()
    if config.dispatcher == TokenExchange.DEEPEP:
        return DeepEPDispatcher(group, model.n_routed_experts, model.hidden_size)
    return AllToAllDispatcher(group, model.n_routed_experts)


def divide_experts(experts: Experts, mesh: DeviceMesh) -> None:
    """Give each rank of a mesh, that of the axis ep, its experts."""
    for name, parameter in list(experts.named_parameters()):
        # All ranks have the same values, so each takes its part and nothing is sent.
        divided = distribute_tensor(
            parameter.detach(), mesh, [Shard(BY_EXPERT)], src_data_rank=None
        )
        setattr(experts, name, nn.Parameter(divided))
    experts.operation = own_experts


def own_experts(
    x_TD: Tensor,
    experts_TK: Tensor,
    weights_TK: Tensor,
    gate_EFD: Tensor,
    up_EFD: Tensor,
    down_EDF: Tensor,
) -> Tensor:
    """Compute the experts of this rank, numbered from 0: the operation of `Experts` whose weights are DTensors over ep."""
    matrices = [weight.to_local() for weight in (gate_EFD, up_EFD, down_EDF)]  # type: ignore[attr-defined]
    return grouped_experts(x_TD, experts_TK, weights_TK, *matrices)


def prefetch(layers: Sequence[nn.Module]) -> None:
    """Let each layer begin to gather the next one's weights before it computes, in both directions."""

    def units(layer: nn.Module) -> list[FSDPModule]:
        return [module for module in layer.modules() if isinstance(module, FSDPModule)]

    for layer, following in pairwise(layers):
        if not (isinstance(layer, FSDPModule) and isinstance(following, FSDPModule)):
            continue  # one of both is on another rank of a pipeline
        layer.set_modules_to_forward_prefetch(units(following))
        following.set_modules_to_backward_prefetch(units(layer))


def own_part(tensor: Tensor) -> Part:
    """Return the part of a DTensor in this process; all of any other tensor."""
    where = [slice(0, size) for size in tensor.shape]
    if not isinstance(tensor, DTensor):
        return Part(tensor, tuple(where))
    for axis, placement in enumerate(tensor.placements):
        if not isinstance(placement, Shard):
            continue
        ranks = tensor.device_mesh.size(axis)
        rank = tensor.device_mesh.get_local_rank(axis)
        # As torch.chunk cuts: parts of one size, but for the last ones.
        begin, end = where[placement.dim].start, where[placement.dim].stop
        size = -(-(end - begin) // ranks)
        first = min(begin + rank * size, end)
        where[placement.dim] = slice(first, min(first + size, end))
    return Part(tensor.to_local(), tuple(where))


def materialize(model: GLM, device: torch.device, seed: int) -> None:
    """Give a model on the meta device its memory and its initial values, which are the same in any layout."""
    model.to_empty(device=device)
    model.tie_weights()
    initialize(model, seed, own_part)
