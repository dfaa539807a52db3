"""Muon for matrices and AdamW for the rest, as one optimizer with one state dict (paper 2.4).

For a matrix W with gradient g:

    M <- mu M + (1 - mu) g                         momentum, mu = 0.95
    U  = orthogonalize(mu M + (1 - mu) g)          Nesterov; Newton-Schulz, 5 steps (minglm.kernels.newton_schulz)
    W <- W - lr wd W - lr 0.2 sqrt(max(rows, columns)) U

All singular values of U are near one, so its Frobenius norm is near sqrt(min(rows, columns)) and the RMS of
its entries near 1 / sqrt(max(rows, columns)). The last factor makes that 0.2, about the RMS of AdamW's
updates: one learning rate and one weight decay then serve both optimizers and every shape.

Choices:
- Muon trains every matrix, including the router's and the MTP layer's projection. An expert stack, (experts, rows,
  columns), is many matrices: each is orthogonalised separately. A rule "Muon for parameters of exactly two axes" would
  silently leave about 95% of GLM-4.5 to AdamW.
- q, k, v and gate, up are separate parameters: the polar factor of two joined matrices is not that of each. With
  `muon_head_dim` the heads of q, k and v are separate too, as in later models of this family; the paper does not say.
- AdamW trains the embedding, norms and biases (the paper's exceptions) and also the output head, which the paper does not
  name and other implementations leave out (`muon_output_head` moves it). A matrix with one row or one column is a
  vector, and AdamW trains it too. Parameters with one axis have no weight decay. The table is `minglm.model.parameters`.
- All matrices of one shape go through Newton-Schulz as one stack: a few large products, not hundreds.
- Sharded parameters (DTensors) are trained by the same lines. All that is done value by value is done on the rows in this
  process; for Newton-Schulz each matrix goes whole to one rank and back, in two collectives for each stack
  (`minglm.parallel.owners`). The state has the parameters' shards.
- `polynomial` = polar_express takes coefficients that bring singular values nearer to one in as many products.
- A matrix whose gradient is exactly zero does not move, but for its decay: an expert without tokens says nothing. Its
  momentum shrinks all the same. Without this rule it would go on at the full rate, in the last direction, until the
  momentum underflows, because the orthogonal factor of a matrix does not shrink with it.
- State exists from the start, so an expert or a layer that has had no gradient yet has the same keys in a checkpoint.

The learning rate is set from outside, in every group's "lr", before each step (`minglm.optim.schedule`).
Simplified: a sharded parameter has a gradient on all its ranks or on none, as `fully_shard` leaves it; an
expert without tokens has zeros.
"""

import functools
import math
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from minglm.config import OptimizerConfig, Polynomial
from minglm.kernels.newton_schulz import orthogonalize as newton_schulz
from minglm.kernels.newton_schulz import polar_express
from minglm.model.parameters import (
    TREATMENT,
    OptimizerKind,
    ParameterKind,
    kind_of,
)
from minglm.parallel.local import average_bytes, local
from minglm.parallel.owners import bring_together, ranks_of_rows

ADAM_EPS = 1e-8
STACK_BYTES = 1 << 30
"""Most bytes of a rank's rows that are updated at a time: an update takes a few times its size in memory."""

POLYNOMIALS: dict[Polynomial, Callable[[int], Any]] = {
    Polynomial.JORDAN: lambda steps: None,  # the kernel's own coefficients, the same in every step
    Polynomial.POLAR_EXPRESS: polar_express,
}
"""Newton-Schulz coefficients for a number of steps, by the name in the config."""


def kind_or_guess(name: str, parameter: Tensor) -> ParameterKind:
    """Return a parameter's kind in the table; for a name that is not there, that of a projection, or of a bias."""
    if parameter.ndim < 2:
        return ParameterKind.BIAS
    return kind_of(name) or ParameterKind.PROJECTION


def optimizer_of(name: str, parameter: Tensor, config: OptimizerConfig) -> OptimizerKind:
    """Return the optimizer of a parameter."""
    kind = kind_or_guess(name, parameter)
    if parameter.ndim > 1 and 1 in parameter.shape[-2:]:
        return OptimizerKind.ADAMW  # a matrix with one row or one column is a vector
    if kind == ParameterKind.OUTPUT_HEAD and config.muon_output_head:
        return OptimizerKind.MUON
    return TREATMENT[kind].optimizer


def assign(
    named_parameters: Iterable[tuple[str, Tensor]], config: OptimizerConfig
) -> list[dict[str, Any]]:
    """Divide parameters between Muon and AdamW by the table of `minglm.model.parameters`.

    named_parameters: (name, parameter) pairs, names as in `GLM.named_parameters()`; parameters that need no
    gradient are left out. Returns optimizer groups: dictionaries with "kind" ("muon" or "adamw"), (name,
    parameter) pairs in "params", and settings. Raises ValueError for a parameter with more than three axes.
    """
    muon: list[tuple[str, Tensor]] = []
    heads: list[tuple[str, Tensor]] = []
    decayed: list[tuple[str, Tensor]] = []
    plain: list[tuple[str, Tensor]] = []
    for name, parameter in named_parameters:
        if not parameter.requires_grad:
            continue
        if parameter.ndim > 3:
            raise ValueError(
                f"{name} has {parameter.ndim} axes; Muon trains matrices (2) and stacks of matrices (3)"
            )
        kind = kind_or_guess(name, parameter)
        if optimizer_of(name, parameter, config) == OptimizerKind.MUON:
            by_heads = config.muon_head_dim and kind == ParameterKind.HEADS_PROJECTION
            group = heads if by_heads else muon
        else:
            group = decayed if TREATMENT[kind].weight_decay else plain
        group.append((name, parameter))

    shared = {"lr": config.peak_lr, "weight_decay": config.weight_decay}
    # Plain strings, not members of the enumeration: the groups are saved in checkpoints.
    adamw_settings = {"kind": "adamw", "betas": (config.adam_beta1, config.adam_beta2)}
    muon_settings = {
        "kind": "muon",
        "momentum": config.muon_momentum,
        "steps": config.newton_schulz_steps,
        "update_rms": config.update_rms,
    }
    groups: list[dict[str, Any]] = [
        {"params": muon, **shared, **muon_settings},
        {"params": heads, **shared, **muon_settings, "head_dim": config.muon_head_dim},
        {"params": decayed, **shared, **adamw_settings},
        {"params": plain, **shared, **adamw_settings, "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]


def update_scale(shape: torch.Size | tuple[int, ...], update_rms: float) -> float:
    """Return the factor that brings an orthogonal (..., rows, columns) matrix to the given RMS; 1 if that is 0."""
    if not update_rms:
        return 1.0
    return update_rms * math.sqrt(max(shape[-2:]))


def alike(parameters: Sequence[Tensor], head_dim: int = 0) -> Iterator[list[Tensor]]:
    """Yield parameters whose matrices can be one stack: of one shape, dtype and device, with rows on the same ranks.

    head_dim: rows of a matrix, where each head is one; 0: all rows of the parameter. At most `STACK_BYTES` of
    them at a time, on the average of the ranks, so that all ranks divide them equally.
    """
    stacks: dict[Any, list[Tensor]] = defaultdict(list)
    for parameter in parameters:
        rows, columns = parameter.shape[-2:]
        ranks = ranks_of_rows(parameter)
        kind = (head_dim or rows, columns, ranks, parameter.dtype, parameter.device)
        stacks[kind].append(parameter)
    for stack in stacks.values():
        chosen: list[Tensor] = []
        filled = 0
        for parameter in stack:
            size = average_bytes(parameter)
            if chosen and filled + size > STACK_BYTES:
                yield chosen
                chosen = []
                filled = 0
            chosen.append(parameter)
            filled += size
        yield chosen


class Muon(torch.optim.Optimizer):
    """Muon and AdamW over one model (equations in the module docstring).

    parameters: a module, or an iterable of (name, parameter), already on their device.
    config: OptimizerConfig. orthogonalize: (stack, steps) -> stack, where another precision or algorithm is
    wanted; None is Newton-Schulz with the config's polynomial.
    Raises ValueError as `assign` and `ranks_of_rows` do, and when no parameter needs a gradient.
    """

    def __init__(
        self,
        parameters: torch.nn.Module | Iterable[tuple[str, Tensor]],
        config: OptimizerConfig,
        orthogonalize: Callable[[Tensor, int], Tensor] | None = None,
    ):
        if isinstance(parameters, torch.nn.Module):
            parameters = parameters.named_parameters()
        super().__init__(assign(parameters, config), {"lr": config.peak_lr})
        if orthogonalize is None:
            coefficients = POLYNOMIALS[config.polynomial](config.newton_schulz_steps)
            orthogonalize = functools.partial(newton_schulz, coefficients=coefficients)
        self.newton_schulz = orthogonalize
        for group in self.param_groups:
            for parameter in group["params"]:
                self.state[parameter] = self._initial_state(group["kind"], parameter)

    @staticmethod
    def _initial_state(kind: str, parameter: Tensor) -> dict[str, Tensor]:
        if kind == OptimizerKind.MUON:
            ranks_of_rows(parameter)  # refuses what cannot be trained
            return {"momentum": torch.zeros_like(parameter)}
        return {
            "first": torch.zeros_like(parameter),
            "second": torch.zeros_like(parameter),
            "step": torch.tensor(0.0),
        }

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # pyright: ignore[reportIncompatibleMethodOverride]  # torch declares overloads
        """Update every parameter that has a gradient. Return the closure's loss, if there is a closure."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        turns: Counter[dist.ProcessGroup] = Counter()  # matrices that each group of ranks was given
        for group in self.param_groups:
            parameters = [parameter for parameter in group["params"] if parameter.grad is not None]
            if not parameters:
                continue
            weights = [local(parameter) for parameter in parameters]
            # W <- W - lr wd W
            torch._foreach_mul_(weights, 1 - group["lr"] * group["weight_decay"])
            if group["kind"] == OptimizerKind.MUON:
                for chosen in alike(parameters, group.get("head_dim", 0)):
                    self._muon(group, chosen, turns)
            else:
                gradients = [local(parameter.grad) for parameter in parameters]
                states = [self._local_state(parameter) for parameter in parameters]
                self._adamw(group, weights, gradients, states)
        return loss

    def _local_state(self, parameter: Tensor) -> dict[str, Tensor]:
        return {name: local(value) for name, value in self.state[parameter].items()}

    def _muon(
        self,
        group: dict[str, Any],
        parameters: list[Tensor],
        turns: "Counter[dist.ProcessGroup]",
    ) -> None:
        """Update parameters whose matrices have one shape and are in one place. turns: see `bring_together`."""
        gradients = [local(p.grad) for p in parameters if p.grad is not None]
        momenta = [local(self.state[parameter]["momentum"]) for parameter in parameters]
        # M <- mu M + (1 - mu) g
        torch._foreach_lerp_(momenta, gradients, 1 - group["momentum"])
        # mu M + (1 - mu) g
        updates = torch._foreach_lerp(gradients, momenta, group["momentum"])

        rows, columns = parameters[0].shape[-2:]
        rows = group.get("head_dim") or rows
        together = bring_together(parameters, rows, turns)
        stack, informed = together.to_owners(updates, gradients)
        if len(stack):
            # U, or zeros where there is no gradient
            stack = self.newton_schulz(stack, group["steps"]) * informed
        scale = update_scale((rows, columns), group["update_rms"])
        for parameter, step in zip(parameters, together.from_owners(stack), strict=True):
            # W <- W - lr 0.2 sqrt(max(rows, columns)) U
            weight = local(parameter)
            weight.add_(step.reshape(weight.shape), alpha=-group["lr"] * scale)

    def _adamw(
        self,
        group: dict[str, Any],
        parameters: list[Tensor],
        gradients: list[Tensor],
        states: list[dict[str, Tensor]],
    ) -> None:
        beta1, beta2 = group["betas"]
        first = [state["first"] for state in states]
        second = [state["second"] for state in states]
        for state in states:
            state["step"] += 1
        steps = [state["step"].item() for state in states]
        # m <- beta1 m + (1 - beta1) g;   v <- beta2 v + (1 - beta2) g^2
        torch._foreach_lerp_(first, gradients, 1 - beta1)
        torch._foreach_mul_(second, beta2)
        torch._foreach_addcmul_(second, gradients, gradients, 1 - beta2)
        # sqrt(v / (1 - beta2^t)) + eps
        scale = torch._foreach_sqrt(second)
        torch._foreach_div_(scale, [math.sqrt(1 - beta2**step) for step in steps])
        torch._foreach_add_(scale, ADAM_EPS)
        # W <- W - lr / (1 - beta1^t) m / scale
        rates = [-group["lr"] / (1 - beta1**step) for step in steps]
        torch._foreach_addcdiv_(parameters, first, scale, rates)
