"""Hold one stage of a pipeline: consecutive layers of the model on each group of ranks (no section in the paper).

    stage 0            embedding, layers 0 ... L/pp - 1
    stage s            layers s L/pp ... (s + 1) L/pp - 1
    stage pp - 1       the last layers, final norm, MTP layer, output head

A stage is the model without the parts that others have, so its parameters keep their names: initial values, checkpoints and
the optimizer know nothing of stages.

- The MTP layer is in the last stage and needs the embedding of the next token, whose matrix is in the first. So that vector
  travels with the state from stage to stage. Simplified: with a second copy of the embedding less would be sent, and its
  gradients would have to be added up.
- The balance loss of a router belongs to the stage that has the router. Its gradient enters there (`AddLoss`), as if the
  loss at the end of the pipeline contained it.
"""

from typing import Any

import torch
from torch import Tensor, nn

from minglm.config import ModelConfig
from minglm.model.glm import GLM
from minglm.model.moe import MoE, Routing
from minglm.model.mtp import MTPLayer, shift


class Absent(nn.Module):
    """A part of the model that another stage has."""


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


class GLMStage(GLM):
    """The layers of one stage of a pipeline; made on the meta device.

    stage: its number from 0; stages: how many there are.
    """

    def __init__(self, config: ModelConfig, stage: int, stages: int) -> None:
        super().__init__(config)
        layers = config.num_hidden_layers
        self.own_layers = range(stage * layers // stages, (stage + 1) * layers // stages)
        self.is_first = stage == 0
        self.is_last = stage == stages - 1
        self.own_routers: list[int] = []
        """The numbers of this stage's routers among all, which are counted from 0."""
        routers = 0
        for index, layer in enumerate(self.model.layers):
            is_own = self.is_last if isinstance(layer, MTPLayer) else index in self.own_layers
            if isinstance(layer.mlp, MoE):
                if is_own:
                    self.own_routers.append(routers)
                routers += 1
            if not is_own:
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
        self.reports: list[list[Routing]] = []
        """What the routers of this stage said of each micro-batch of a step."""

    @property
    def device(self) -> torch.device:
        """Return the device of the weights."""
        return next(self.parameters()).device

    def router_numbers(self) -> list[int]:
        """Return the numbers of `routers` among those of the whole model."""
        return self.own_routers

    def forward(  # pyright: ignore[reportIncompatibleMethodOverride]  # a stage has another input
        self,
        x: Tensor,
        next_BSD: Tensor | None = None,
        *,
        tokens_BS: Tensor,
        positions_BS: Tensor | None = None,
        documents_BS: Tensor | None = None,
    ) -> tuple[Tensor, ...]:
        """Map what the stage before sends to what the stage after gets.

        x: the states (B, S, D), for the first stage the tokens. next (B, S, D): the embedding of the next token, with the
        MTP layer. Returns (states,), with the MTP layer (states, next embedding); of the last stage the states after the
        final norm, with the MTP layer (states, states of the MTP layer).
        """
        rotation = self.rotation(tokens_BS, positions_BS)
        if self.is_first:
            x = self.embed(tokens_BS)
            next_BSD = self.embed(shift(tokens_BS, 1, 0)) if self.with_mtp else None
        reports = []
        for index in self.own_layers:
            x, routing = self.apply_layer(self.model.layers[index], x, rotation, documents_BS)
            reports.append(routing)
        if self.is_last:
            x = self.model.norm(x)
        if self.is_last and self.with_mtp:
            next_BSD, routing = self.apply_layer(self.mtp, x, next_BSD, rotation, documents_BS)
            reports.append(routing)
        routed = [routing for routing in reports if routing is not None]
        self.reports.append(routed)
        if routed:
            balance = torch.stack([routing.balance_loss for routing in routed]).sum()
            x = AddLoss.apply(x, self.balance_factor * balance)
        if next_BSD is None:
            return (x,)
        return x, next_BSD.clone()  # what came in must not go out as the same tensor
