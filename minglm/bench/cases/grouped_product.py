"""Cases of the expert layer's two products alone, at GLM-4.5's shapes, rows sorted: x w_e', and the gradient of w_e.

The expert layer is compared with these: fused, it should cost no more than its two bare products by torch.
"""

from collections.abc import Iterator
from functools import partial
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor

from minglm.bench.case import Case, Form
from minglm.bench.cases import normal
from minglm.kernels.dispatch import Operation, selected_name
from minglm.kernels.experts import grouped_mm, grouped_outer

SHAPES = ((3072, 5120), (5120, 1536))  # outputs, inputs
LOADS = [(E, rows) for E in (20, 160) for rows in (205, 819, 3277)]


def drawn(
    device: torch.device, E: int, rows: int, outputs: int, inputs: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Draw x, w, dy, and the end of each expert's rows, whose number varies by a half around `rows`."""
    share_E = torch.rand(E, generator=torch.Generator().manual_seed(0)) + 0.5
    ends_E = (share_E.cumsum(0) / share_E.sum() * E * rows).round().int().to(device)
    x = normal(device, E * rows, inputs)
    w = normal(device, E, outputs, inputs, seed=1, scale=inputs**-0.5)
    dy = normal(device, E * rows, outputs, seed=2)
    return x, w, dy, ends_E


def forward(device: torch.device, E: int, rows: int, outputs: int, inputs: int) -> dict[str, Form]:
    """Return {form: y}."""
    x, w, _, ends_E = drawn(device, E, rows, outputs, inputs)
    bounds = [0, *ends_E.tolist()]
    order = torch.arange(len(x), device=device)

    def ours() -> Tensor:
        if selected_name(Operation.EXPERTS, x) != "triton":
            return grouped_mm(x, w.mT, ends_E)
        from minglm.kernels.experts.triton_layer import product

        return product([(x, w)], order, ends_E, 1, pick=False, transposed=True)

    def loop() -> Tensor:
        return torch.cat([x[a:b] @ m.T for (a, b), m in zip(pairwise(bounds), w)])

    return {
        "minglm": ours,
        "torch grouped_mm": lambda: F.grouped_mm(x, w.mT, offs=ends_E),
        "loop": loop,
    }


def gradient(device: torch.device, E: int, rows: int, outputs: int, inputs: int) -> dict[str, Form]:
    """Return {form: the gradient of w}."""
    x, _, dy, ends_E = drawn(device, E, rows, outputs, inputs)
    bounds = [0, *ends_E.tolist()]
    order = torch.arange(len(x), device=device)

    def ours() -> Tensor:
        if selected_name(Operation.EXPERTS, x) != "triton":
            return grouped_outer(dy, x, ends_E)
        from minglm.kernels.experts.triton_layer import outer

        return outer(dy, x, order, ends_E, 1)

    def loop() -> Tensor:
        return torch.stack([dy[a:b].T @ x[a:b] for a, b in pairwise(bounds)])

    return {
        "minglm": ours,
        "torch grouped_mm": lambda: F.grouped_mm(dy.T, x, offs=ends_E),
        "loop": loop,
    }


def cases(device: torch.device, smoke: bool) -> Iterator[Case]:
    """Yield both products at each shape and load."""
    for outputs, inputs in ((24, 16),) if smoke else SHAPES:
        for E, rows in ((3, 10),) if smoke else LOADS:
            T = E * rows
            flops = 2 * T * outputs * inputs
            numbers_moved = T * (inputs + outputs) + E * inputs * outputs
            moved = 2 * numbers_moved  # bytes, in bfloat16
            name = f"{E} experts, {rows} rows each, {outputs} x {inputs}"
            shape = (device, E, rows, outputs, inputs)
            yield Case(f"grouped product, {name}", flops, moved, partial(forward, *shape))
            yield Case(
                f"grouped product, gradient of w, {name}", flops, moved, partial(gradient, *shape)
            )
