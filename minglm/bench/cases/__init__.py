"""The cases of `python -m minglm bench kernels`: a file for each operation, with `cases(device, smoke)`.

Baselines of other packages are measured where the package is installed and there is a GPU. Forms compiled by
torch are measured only on a GPU, at one size and mostly the forward pass alone, because the compiler takes
longer than all the rest.
"""

import importlib.util
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from minglm.bench.case import Form


def have(package: str, device: torch.device) -> bool:
    """Return whether this package can be imported and there is a GPU."""
    return device.type == "cuda" and importlib.util.find_spec(package) is not None


COMPILED = 16384  # tokens of the one size for which torch compiles a form


def compiled(
    function: Callable[..., Any], device: torch.device, tokens: int
) -> dict[str, Callable[..., Any]]:
    """Return {name: function as torch compiles it} at the one size that has this form, else nothing."""
    wanted = device.type == "cuda" and tokens == COMPILED
    return {"torch compiled": torch.compile(function, dynamic=False)} if wanted else {}


def normal(
    device: torch.device,
    *shape: int,
    seed: int = 0,
    scale: float = 1.0,
    dtype: torch.dtype = torch.bfloat16,
) -> Tensor:
    """Draw normal random numbers, the same in every run on this device."""
    generator = torch.Generator(device).manual_seed(seed)
    return torch.randn(*shape, generator=generator, device=device, dtype=dtype).mul_(scale)


def without_gradients(function: Callable[..., Any], *inputs: Any) -> Form:
    """Return a form that runs the forward pass and saves nothing for a backward pass."""

    def run() -> Any:
        with torch.no_grad():
            return function(*inputs)

    return run


def with_gradients(
    function: Callable[..., Any], inputs: Sequence[Any], upstream: Tensor | None
) -> Form:
    """Return a form that runs both passes and returns the (first) output and the gradients of the inputs.

    inputs: those with `requires_grad` get a gradient. upstream: the gradient of the output; None for a scalar.
    """
    needed = [x for x in inputs if isinstance(x, Tensor) and x.requires_grad]

    def run() -> tuple[Tensor, ...]:
        out = function(*inputs)
        out = out if isinstance(out, torch.Tensor) else out[0]
        return out.detach(), *torch.autograd.grad(out, needed, upstream)

    return run
