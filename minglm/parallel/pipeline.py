"""Hold the stages of a pipeline that are on one rank: consecutive layers of the model each (no section in the paper).

    n = pp x interleave stages, which divide the layers by what they compute (`minglm.plan.pipeline.divide_layers`)
    stage 0            embedding, the first layers
    stage s            layers
    stage n - 1        the last layers, fewer of them; final norm, MTP layer, output head
    rank r             stages r, r + pp, r + 2 pp, ...: one, or with `interleave` several that are far apart

What a rank has is the model without the parts that others have, so its parameters keep their names: initial
values, checkpoints and the optimizer know nothing of stages.

- The MTP layer is in the last stage and needs the embedding of the next token, whose matrix is in the first.
  So that vector travels with the state from stage to stage. Simplified: with a second copy of the embedding
  less would be sent, and its gradients would have to be added up.
- The balance loss of a router belongs to the stage that has the router. Its gradient enters there
  (`AddLoss`), as if the loss at the end of the pipeline contained it.
- FSDP2 sees no pipeline: `Stage`, which the schedule calls, is no module of its own. Weights are gathered and
  gradients reduced for each micro-batch, as without a pipeline. PyTorch's pipelining, if it knew, would
  gather once a step and keep all weights and float32 gradients of a rank's stages whole: by arithmetic 60 GB
  for a quarter of GLM-4.5 with EP 8.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from minglm.config import ModelConfig
from minglm.model.glm import GLM
from minglm.model.moe import MoE, Routing
from minglm.model.mtp import MTPLayer, shift
from minglm.parallel.mesh import Meshes
from minglm.plan.pipeline import divide_layers


class Absent(nn.Module):
    """A part of the model that another rank has."""


class AddLoss(torch.autograd.Function):
    """Return a copy of x; in the backward pass `loss` gets the gradient 1, as a term of the total loss."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, loss: Tensor) -> Tensor:
        """Pass x on."""
        return x.clone()  # no view: FSDP puts a hook on what a stage returns

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:  # pyright: ignore[reportIncompatibleMethodOverride] -- autograd passes one gradient for each output
        """Pass the gradient of x on."""
        return grad, torch.ones((), device=grad.device)


class PipelineGLM(GLM):
    """The layers of the stages of one rank; made on the meta device.

    rank: of the pipeline, from 0; ranks: how many there are; interleave: stages of each. division: the layers
    of every stage; None: by what they compute.
    """

    def __init__(
        self,
        config: ModelConfig,
        rank: int,
        ranks: int,
        interleave: int = 1,
        division: Sequence[range] | None = None,
    ) -> None:
        super().__init__(config)
        stages = ranks * interleave
        division = division or divide_layers(config, stages)
        self.own_stages = range(rank, stages, ranks)
        self.last_stage = stages - 1
        self.own_layers = {stage: division[stage] for stage in self.own_stages}
        self.is_first = rank == 0
        self.is_last = rank == ranks - 1
        self.own_routers: dict[int, list[int]] = {stage: [] for stage in self.own_stages}
        """The numbers of each own stage's routers among all, which are counted from 0."""
        stage_of = {layer: stage for stage in self.own_stages for layer in self.own_layers[stage]}
        if self.is_last:
            stage_of |= {
                index: self.last_stage
                for index, layer in enumerate(self.model.layers)
                if isinstance(layer, MTPLayer)
            }
        routers = 0
        for index, layer in enumerate(self.model.layers):
            if isinstance(layer.mlp, MoE):
                if index in stage_of:
                    self.own_routers[stage_of[index]].append(routers)
                routers += 1
            if index not in stage_of:
                self.model.layers[index] = Absent()
        if not self.is_first:
            self.model.embed_tokens = Absent()  # type: ignore[assignment]
        if not self.is_last:
            self.model.norm = Absent()  # type: ignore[assignment]
            self.lm_head = Absent()  # type: ignore[assignment]
        self.with_mtp = False
        """Whether the next step trains the MTP layer."""
        self.balance_factor = 0.0
        """The factor of each router's balance loss in the total loss."""
        self.reports: list[tuple[int, list[Routing]]] = []
        """Each pass of a step: its stage, and what the routers of that stage said."""

    @property
    def device(self) -> torch.device:
        """Return the device of the weights."""
        return next(self.parameters()).device

    def router_numbers(self) -> list[int]:
        """Return the numbers of `routers` among those of the whole model."""
        return [number for stage in self.own_stages for number in self.own_routers[stage]]

    def forward(  # pyright: ignore[reportIncompatibleMethodOverride]  # a stage has another input
        self,
        stage: int,
        x: Tensor,
        next_BSD: Tensor | None = None,
        *,
        tokens_BS: Tensor,
        positions_BS: Tensor | None = None,
        documents_BS: Tensor | None = None,
    ) -> tuple[Tensor, ...]:
        """Map what the stage before sends to what the stage after gets.

        stage: one of `own_stages`. x: the states (B, S, D), for stage 0 the tokens. next (B, S, D): the
        embedding of the next token, with the MTP layer. Returns (states,), with the MTP layer (states, next
        embedding); of the last stage the states after the final norm, with the MTP layer (states, states of
        the MTP layer).
        """
        rotation = self.rotation(tokens_BS, positions_BS)
        if stage == 0:
            x = self.embed(tokens_BS)
            next_BSD = self.embed(shift(tokens_BS, 1, 0)) if self.with_mtp else None
        reports = []
        for index in self.own_layers[stage]:
            x, routing = self.apply_layer(self.model.layers[index], x, rotation, documents_BS)
            reports.append(routing)
        if stage == self.last_stage:
            x = self.model.norm(x)
            if self.with_mtp:
                next_BSD, routing = self.apply_layer(self.mtp, x, next_BSD, rotation, documents_BS)
                reports.append(routing)
        routed = [routing for routing in reports if routing is not None]
        self.reports.append((stage, routed))
        if routed:
            balance = torch.stack([routing.balance_loss for routing in routed]).sum()
            x = AddLoss.apply(x, self.balance_factor * balance)
        if next_BSD is None:
            return (x,)
        return x, next_BSD.clone()  # what came in must not go out as the same tensor


class Stage(nn.Module):
    """One stage of a rank's model, as the schedule calls it.

    number: of the stage among all.
    """

    def __init__(self, model: PipelineGLM, number: int) -> None:
        super().__init__()
        self.model = model
        self.number = number

    def forward(self, *x: Tensor, **inputs: Tensor) -> tuple[Tensor, ...]:
        """Call the model for this stage."""
        return self.model(self.number, *x, **inputs)


def own_model(
    config: ModelConfig, meshes: Meshes | None, division: Sequence[range] | None = None
) -> GLM:
    """Return the whole model, or in a pipeline the layers of this rank's stages; made on the meta device.

    division: as in `PipelineGLM`.
    """
    with torch.device("meta"):
        if meshes is None or meshes.layout.pp == 1:
            return GLM(config)
        rank = meshes.dense.get_local_rank("pp")
        return PipelineGLM(config, rank, meshes.layout.pp, meshes.layout.interleave, division)
