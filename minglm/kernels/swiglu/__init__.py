"""The unit of every MLP, silu(gate) * up: the function that the model calls (paper 2.1).

`eager.py` has the reference. `minglm.kernels.dispatch` chooses the form.
"""

import torch

from minglm.kernels.dispatch import Operation, select


def swiglu(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    """Return silu(gate) * up, all of one shape and dtype. Differentiable in both."""
    return select(Operation.SWIGLU, gate)(gate, up)
