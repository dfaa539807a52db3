"""Cases of output head and cross-entropy over GLM-4.5's 151,552 words: the loss alone, and with its gradients.

Operations are counted as 6 T D V with gradients, each product once. Baselines: PyTorch by chunks of tokens
whose logits are computed again in the backward pass, as written and compiled; PyTorch's own fused function
where this release has it; Liger; cut-cross-entropy (which leaves out gradients too small for bfloat16).
"""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from minglm.bench.case import Case, Form
from minglm.bench.cases import compiled, have, normal, with_gradients, without_gradients
from minglm.kernels.cross_entropy import linear_cross_entropy

D, V = 5120, 151_552
CHUNK = 2048  # tokens

Loss = Callable[[Tensor, Tensor, Tensor], Any]
"""The summed loss of hidden states (T, D), head (V, D) and targets (T)."""


def piece(hidden_TD: Tensor, head_VD: Tensor, targets_T: Tensor) -> Tensor:
    """Compute the summed loss of a chunk."""
    return F.cross_entropy((hidden_TD @ head_VD.T).float(), targets_T, reduction="sum")


def chunked(loss: Loss) -> Loss:
    """Return a loss that is computed by chunks of tokens, each computed again in the backward pass."""

    def run(hidden_TD: Tensor, head_VD: Tensor, targets_T: Tensor) -> Any:
        parts = zip(hidden_TD.split(CHUNK), targets_T.split(CHUNK))
        return sum(
            checkpoint(loss, hidden, head_VD, targets, use_reentrant=False)
            for hidden, targets in parts
        )

    return run


def liger(hidden_TD: Tensor, head_VD: Tensor, targets_T: Tensor) -> Tensor:
    """Compute the loss by Liger's fused function."""
    from liger_kernel.transformers.functional import liger_fused_linear_cross_entropy

    return liger_fused_linear_cross_entropy(hidden_TD, head_VD, targets_T, reduction="sum")


def cut(hidden_TD: Tensor, head_VD: Tensor, targets_T: Tensor) -> Tensor:
    """Compute the loss by cut-cross-entropy's Triton kernels."""
    from cut_cross_entropy import linear_cross_entropy as cut_cross_entropy

    return cut_cross_entropy(hidden_TD, head_VD, targets_T, reduction="sum", impl="cce")


def fused(hidden_TD: Tensor, head_VD: Tensor, targets_T: Tensor) -> Tensor:
    """Compute the loss by PyTorch's own fused function."""
    return F.linear_cross_entropy(hidden_TD, head_VD, targets_T, reduction="sum")


def forms(device: torch.device, T: int, D: int, V: int, gradients: bool) -> dict[str, Form]:
    """Return {form: the summed loss}, or {form: the loss and the gradients of states and head}."""
    hidden_TD = normal(device, T, D)
    head_VD = normal(device, V, D, seed=1, scale=D**-0.5)
    generator = torch.Generator(device).manual_seed(2)
    targets_T = torch.randint(V, (T,), generator=generator, device=device)
    ones_T = torch.ones(T, device=device)
    functions: dict[str, Loss] = {
        "minglm": lambda h, w, t: linear_cross_entropy(h, w, t, ones_T),
        "torch, chunks": chunked(piece),
    }
    for name, function in compiled(piece, device, T).items():
        functions[f"{name}, chunks"] = chunked(function)
    if hasattr(F, "linear_cross_entropy"):
        functions["torch linear_cross_entropy"] = fused
    if have("liger_kernel", device):
        functions["liger"] = liger
    if have("cut_cross_entropy", device):
        functions["cut-cross-entropy"] = cut
    if not gradients:
        return {
            name: without_gradients(f, hidden_TD, head_VD, targets_T)
            for name, f in functions.items()
        }
    inputs = [hidden_TD.requires_grad_(), head_VD.requires_grad_(), targets_T]
    return {name: with_gradients(f, inputs, None) for name, f in functions.items()}


def cases(device: torch.device, smoke: bool) -> Iterator[Case]:
    """Yield the loss, and the loss with its gradients."""
    d, v = (16, 50) if smoke else (D, V)
    for T in (30,) if smoke else (4096, 16384):
        name = f"{T} tokens, {d} x {v}"
        product = 2 * T * d * v  # operations
        read = 2 * d * (T + v)  # bytes, in bfloat16
        yield Case(
            f"head and cross-entropy, {name}",
            product,
            read,
            partial(forms, device, T, d, v, gradients=False),
        )
        yield Case(
            f"head and cross-entropy with gradients, {name}",
            3 * product,
            3 * read,
            partial(forms, device, T, d, v, gradients=True),
        )
