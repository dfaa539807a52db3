"""What `python -m minglm bench kernels` measures: a file for each operation, with `cases(device, smoke)`.

Baselines of other packages are there where the package is and there is a GPU for it; what is compiled by torch, only on
a GPU, at one size and mostly the forward pass alone, because the compiler takes longer than all the rest.
"""

import importlib.util

import torch


def have(package, device):
    """Whether this package can be imported and there is a GPU."""
    return device.type == "cuda" and importlib.util.find_spec(package) is not None


COMPILED = 16384  # tokens


def compiled(function, device, tokens):
    """The form that torch compiles, at the one size that has it: {name: function}."""
    wanted = device.type == "cuda" and tokens == COMPILED
    return {"torch compiled": torch.compile(function, dynamic=False)} if wanted else {}


def normal(device, *shape, seed=0, scale=1.0, dtype=torch.bfloat16):
    """Random numbers, the same in every run on this device."""
    generator = torch.Generator(device).manual_seed(seed)
    return torch.randn(*shape, generator=generator, device=device, dtype=dtype).mul_(scale)


def without_gradients(function, *inputs):
    """A form: the forward pass, which keeps nothing."""

    def run():
        with torch.no_grad():
            return function(*inputs)

    return run


def with_gradients(function, inputs, upstream):
    """A form: forward and backward pass; returns the (first) output and the gradients of the inputs that need one."""
    needed = [x for x in inputs if x.requires_grad]

    def run():
        out = function(*inputs)
        out = out if isinstance(out, torch.Tensor) else out[0]
        return out.detach(), *torch.autograd.grad(out, needed, upstream)

    return run
