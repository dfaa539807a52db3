"""Cases of Newton-Schulz, five steps, for the matrices of GLM-4.5: a node's experts of a layer, all experts, attention's.

Operations are counted for the cheapest way known here, whatever a form does: the Gram form with one restart,
its symmetric products halved, so that shares of the ceiling of all forms can be compared. The baseline is
PyTorch's batched product; for a single matrix also the code of torch.optim.Muon.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from minglm.bench.case import Case, Form
from minglm.bench.cases import normal, without_gradients
from minglm.kernels.newton_schulz import COEFFICIENTS, orthogonalize
from minglm.kernels.newton_schulz.eager import RESTART

STEPS = 5
SHAPES = ((60, 1536, 5120), (480, 1536, 5120), (1, 5120, 5120), (1, 5120, 12288))


def batched(matrices: Tensor) -> Tensor:
    """Run the standard iteration in bfloat16, all matrices at once."""
    a, b, c = COEFFICIENTS
    x = (matrices / torch.linalg.matrix_norm(matrices.float(), keepdim=True)).bfloat16()
    for _ in range(STEPS):
        gram = torch.bmm(x, x.mT)
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x


def torch_muon(matrices: Tensor) -> Tensor:
    """Run the iteration of torch.optim.Muon on one matrix."""
    from torch.optim._muon import _zeropower_via_newtonschulz

    return _zeropower_via_newtonschulz(matrices[0], COEFFICIENTS, STEPS, 1e-7)[None]


def forms(device: torch.device, shape: tuple[int, int, int]) -> dict[str, Form]:
    """Return {form: the orthogonalized stack}."""
    matrices = normal(device, *shape)
    functions = {
        "minglm": orthogonalize,
        "minglm, standard form": lambda x: orthogonalize(x, gram=False),
    }
    functions["torch bmm"] = batched
    functions |= {"torch.optim.Muon": torch_muon} if shape[0] == 1 else {}
    return {name: without_gradients(function, matrices) for name, function in functions.items()}


def cheapest(rows: int, columns: int) -> int:
    """Count the operations of one matrix: X X' and Q X of each part, and P, Q and R of each step where needed."""
    parts = 2 if STEPS > RESTART else 1
    # P of each step; Q and twice R of each step but a part's first.
    small = STEPS + (STEPS - parts) + 2 * (STEPS - parts)
    return parts * (rows**2 * columns + 2 * rows**2 * columns) + small * rows**3


def cases(device: torch.device, smoke: bool) -> Iterator[Case]:
    """Yield each stack."""
    for count, rows, columns in ((3, 12, 20), (1, 12, 12)) if smoke else SHAPES:
        made = (count, rows, columns)
        yield Case(
            f"Newton-Schulz, {count} of {rows} x {columns}",
            count * cheapest(rows, columns),
            4 * count * rows * columns,
            lambda made=made: forms(device, made),
        )
