"""Operations that compute nothing and keep what the GPU's kernels keep: the step of a rehearsal (no section in the paper).

A rehearsal runs the real step on tensors without numbers, on a machine without a GPU. Its memory must be that
of the kernels for a GPU and not that of the forms for a CPU, so each operation of a layer is replaced by one
with the same arguments, results and gradients, that saves for its backward pass what the Triton form saves.
What a kernel needs only while it runs is allocated and dropped.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from minglm.kernels.cross_entropy.chunked import GPU_CHUNK_BYTES
from minglm.kernels.dispatch import Operation
from minglm.kernels.linear.eager import linear
from minglm.kernels.router.eager import route
from minglm.kernels.swiglu.eager import swiglu


class _Saved(torch.autograd.Function):
    """Return `results`, save the inputs and `kept`; the gradient of an input is as large as the input."""

    @staticmethod
    def forward(
        ctx: Any, results: Sequence[Tensor], kept: Sequence[Tensor], *inputs: Tensor | None
    ) -> tuple[Tensor, ...]:
        ctx.count = len(inputs)
        ctx.given = [index for index, value in enumerate(inputs) if value is not None]
        ctx.save_for_backward(*[inputs[index] for index in ctx.given], *kept)
        integers = [result for result in results if not result.is_floating_point()]
        ctx.mark_non_differentiable(*integers)
        return tuple(results)

    @staticmethod
    def backward(ctx: Any, *_: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride] -- autograd passes one gradient for each output
        gradients: list[Tensor | None] = [None] * (2 + ctx.count)
        for index, value in zip(ctx.given, ctx.saved_tensors, strict=False):
            if ctx.needs_input_grad[2 + index]:
                gradients[2 + index] = torch.empty_like(value)
        return tuple(gradients)


def attention(
    q_BSNA: Tensor, k_BSMA: Tensor, v_BSMA: Tensor, documents_BS: Tensor | None = None
) -> Tensor:
    """Stand in for attention, which saves its arguments, its result, and a log-sum for each query."""
    B, S, N, _ = q_BSNA.shape
    out_BSNA = q_BSNA.new_empty(B, S, N, v_BSMA.shape[3])
    log_sum_BNS = q_BSNA.new_empty(B, N, S, dtype=torch.float32)
    (result,) = _Saved.apply((out_BSNA,), (out_BSNA.detach(), log_sum_BNS), q_BSNA, k_BSMA, v_BSMA)
    return result


def experts(
    x_TD: Tensor,
    experts_TK: Tensor,
    weights_TK: Tensor,
    gate_EFD: Tensor,
    up_EFD: Tensor,
    down_EDF: Tensor,
) -> Tensor:
    """Stand in for the experts, which save their arguments, both pre-activations, and the order of the pairs."""
    pairs = experts_TK.numel()
    F = gate_EFD.shape[1]
    kept = [x_TD.new_empty(pairs, F), x_TD.new_empty(pairs, F), experts_TK.new_empty(pairs)]
    # The hidden units, and the pairs' results before they are summed.
    x_TD.new_empty(pairs, F + x_TD.shape[1])
    (result,) = _Saved.apply(
        (torch.empty_like(x_TD),), kept, x_TD, weights_TK, gate_EFD, up_EFD, down_EDF
    )
    return result


def cross_entropy(
    hidden_TD: Tensor, head_VD: Tensor, targets_T: Tensor, weights_T: Tensor
) -> Tensor:
    """Stand in for head and cross-entropy, which compute both gradients with the loss and save them alone."""
    T = len(hidden_TD)
    head = head_VD.to(hidden_TD.dtype)
    chunks = max(1, math.ceil(T * len(head) * head.itemsize / GPU_CHUNK_BYTES))
    head.new_empty(math.ceil(T / chunks), len(head))  # the logits of a chunk
    return _Loss.apply(hidden_TD, head_VD)


class _Loss(torch.autograd.Function):
    """Return the loss; save a gradient for the states and one for the head."""

    @staticmethod
    def forward(ctx: Any, hidden_TD: Tensor, head_VD: Tensor) -> Tensor:
        ctx.save_for_backward(torch.empty_like(hidden_TD), torch.empty_like(head_VD))
        return hidden_TD.new_empty((), dtype=torch.float32)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:  # pyright: ignore[reportIncompatibleMethodOverride] -- autograd passes one gradient for each output
        hidden, head = ctx.saved_tensors
        return hidden, head


def norm(
    x_TD: Tensor, weight_D: Tensor, eps: float, change_TD: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Stand in for the norm, which saves the sum that it norms, its weight, and one factor a row."""
    total = x_TD if change_TD is None else x_TD + change_TD
    scale = x_TD.new_empty(x_TD.shape[:-1], dtype=torch.float32)
    (out,) = _Saved.apply((torch.empty_like(total),), (scale,), total, weight_D)
    return out, total


def qk_norm_rope(
    q_BSNA: Tensor,
    k_BSMA: Tensor,
    q_weight_A: Tensor | None,
    k_weight_A: Tensor | None,
    cos: Tensor,
    sin: Tensor,
    eps: float,
) -> tuple[Tensor, Tensor]:
    """Stand in for QK-norm and rotation, which save their arguments."""
    results = (torch.empty_like(q_BSNA), torch.empty_like(k_BSMA))
    return _Saved.apply(results, (cos, sin), q_BSNA, k_BSMA, q_weight_A, k_weight_A)


def newton_schulz(updates: Tensor, *arguments: Any, **options: Any) -> Tensor:
    """Stand in for Newton-Schulz, which works on one copy of the matrices, with their products."""
    return torch.empty_like(updates)


STAND_INS: dict[Operation, Callable[..., Any]] = {
    Operation.ATTENTION: attention,
    Operation.LINEAR: linear,
    Operation.SWIGLU: swiglu,
    Operation.ROUTER: route,
    Operation.EXPERTS: experts,
    Operation.CROSS_ENTROPY: cross_entropy,
    Operation.NORM: norm,
    Operation.QK_NORM_ROPE: qk_norm_rope,
    Operation.NEWTON_SCHULZ: newton_schulz,
}
"""The function that stands in for each operation of a training step; router, projections and MLPs are PyTorch's."""
