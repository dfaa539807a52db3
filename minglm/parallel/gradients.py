"""Measure and clip the gradient of a whole model, wherever its parameters are (no section in the paper).

    |g|^2 = sum over ranks, and over the parameters of each, of |g_local|^2 / copies;      g <- g min(1, bound / |g|)

Dense parameters and experts are sharded over different meshes, and pipeline stages have different parameters,
so no mesh holds all. One number each rank can always add: the squares of its own rows. Rows that
`dp_replicate` ranks hold in copies count as a part each. One all-reduce of one number then gives the norm,
for any layout.

- A NaN or an infinity on one rank makes the sum NaN or infinite on all, and all ranks get the same bits from
  the all-reduce. So whatever is decided by the norm, such as to skip a step, is decided equally everywhere.
- The squares are summed in float64, whose range the square of no float32 number leaves.
- A model that is not sharded is measured by `torch.nn.utils.get_total_norm`, without any communication.
"""

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from minglm.parallel.local import copies, local

CLIP_EPS = 1e-6
"""Added to the norm before it divides, as in `torch.nn.utils.clip_grad_norm_`."""


@torch.no_grad()
def global_norm(model: nn.Module, without: nn.Module | None = None) -> Tensor:
    """Return the 2-norm of all gradients of a model, but those of its part `without`: a scalar, the same on every rank.

    Of a model with DTensors every rank must call it, whether it has gradients or not. Raises ValueError for a
    model of which only some parameters are DTensors: it cannot be known which ranks hold the others.
    """
    gradients = _gradients(model, without)
    sharded = {isinstance(parameter, DTensor) for parameter in model.parameters()}
    if sharded == {True, False}:
        raise ValueError("a model is sharded whole or not at all: some parameters are no DTensors")
    if True not in sharded:
        return torch.nn.utils.get_total_norm(gradients)

    device = local(next(model.parameters())).device
    square = torch.zeros((), dtype=torch.float64, device=device)
    if gradients:
        norms = torch.stack(torch._foreach_norm([local(gradient) for gradient in gradients]))
        parts = [1 / copies(gradient) for gradient in gradients]
        square = torch.tensor(parts, dtype=torch.float64, device=device) @ norms.double().square()
    dist.all_reduce(square)
    return square.sqrt().float()


@torch.no_grad()
def clip_gradients(
    model: nn.Module, bound: float, norm: Tensor, without: nn.Module | None = None
) -> None:
    """Scale the gradients that `global_norm` measured in place so that their norm, now `norm`, is at most `bound`."""
    gradients = [local(gradient) for gradient in _gradients(model, without)]
    if gradients:
        torch._foreach_mul_(gradients, (bound / (norm + CLIP_EPS)).clamp(max=1.0))


def _gradients(model: nn.Module, without: nn.Module | None) -> list[Tensor]:
    """Return the gradients of a model that are there, but those of a part."""
    left_out = set() if without is None else set(without.parameters())
    return [p.grad for p in model.parameters() if p.grad is not None and p not in left_out]
