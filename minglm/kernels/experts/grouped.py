"""The expert layer as grouped products in PyTorch, with the backward pass written out (paper 2.1).

    y_t = sum over the K experts e chosen for token t of  w_te * down_e( silu(gate_e x_t) * (up_e x_t) )

The (token, expert) pairs are sorted by expert once, so that each expert's rows are contiguous, without atomic
additions; the inverse permutation brings results and gradients back, which makes it bitwise repeatable. The backward
pass keeps only the inputs, the two pre-activations and the indices. With g = gate x, u = up x, a = silu(g) u and d the
gradient of y:

    dw_te = a . (down' d);   da = w down' d;   ddown = d (w a)';   du = da silu(g);   dg = da u silu'(g)
    dgate = dg x';   dup = du x';   dx = gate' dg + up' du

The expert's output need not be kept for dw. (The weight enters before the second product in Triton and C; here it
multiplies where a token's rows are summed, which is one operation.)

The products are `torch.nn.functional.grouped_mm`, on a CPU too: its loop over the experts does not hold Python's lock.
Shapes and dtypes that it does not take get a loop here. A CPU compiles a product in bfloat16 for each new shape, which
takes ten times as long as the product itself, and the experts' loads are new in every step. So each expert's rows are
filled up to a multiple of `BFLOAT16_ROWS`, with weight zero, and the same few shapes come again and again.
"""

from typing import Any

import torch
import torch.nn.functional as F

from minglm.kernels.dispatch import Operation, select
from minglm.kernels.router.eager import group_by_expert

BFLOAT16_ROWS = 32
"""In two-byte dtypes on a CPU the rows of an expert are a multiple of this."""


def _aligned(*matrices: torch.Tensor) -> bool:
    """Return whether all rows of all matrices begin at whole 16 bytes."""
    for matrix in matrices:
        if matrix.data_ptr() % 16:
            return False
        if matrix.itemsize * max(matrix.stride()[-2:]) % 16:
            return False
    return True


def _product(x: torch.Tensor, w: torch.Tensor, ends_E: torch.Tensor) -> torch.Tensor:
    aligned = x.is_cuda or _aligned(x, w)
    return select(Operation.GROUPED_PRODUCT, x, aligned=aligned)(x, w, ends_E)


def torch_grouped_mm(x: torch.Tensor, w: torch.Tensor, ends_E: torch.Tensor) -> torch.Tensor:
    """Multiply by `torch.nn.functional.grouped_mm`; shapes as in `loop_over_experts`."""
    return F.grouped_mm(x, w, offs=ends_E)


def loop_over_experts(x: torch.Tensor, w: torch.Tensor, ends_E: torch.Tensor) -> torch.Tensor:
    """Multiply expert by expert: (T, D) by (E, D, F) gives (T, F), and (D, T) by (T, F) gives (E, D, F).

    In the first, expert e has rows ends[e - 1] to ends[e] of x; in the second these columns of x and rows of w.
    """
    outer = w.ndim == 2
    if outer:
        out = x.new_zeros(len(ends_E), x.shape[0], w.shape[1])
    else:
        out = x.new_empty(x.shape[0], w.shape[2])
    start = 0
    for e, end in enumerate(ends_E.tolist()):
        rows = slice(start, end)
        if end > start and outer:
            torch.mm(x[:, rows], w[rows], out=out[e])
        elif end > start:
            torch.mm(x[rows], w[e], out=out[rows])
        start = end
    return out


def grouped_mm(x_TD: torch.Tensor, w_EDF: torch.Tensor, ends_E: torch.Tensor) -> torch.Tensor:
    """Multiply rows ends[e-1] to ends[e] of x (T, D) by w[e] (D, F) to (T, F). ends_E: int32, on x's device."""
    return _product(x_TD, w_EDF, ends_E)


def grouped_outer(x_TD: torch.Tensor, y_TF: torch.Tensor, ends_E: torch.Tensor) -> torch.Tensor:
    """Return x' y over the rows of each expert: (T, D) and (T, F) give (E, D, F); zeros for an expert without rows."""
    return _product(x_TD.T, y_TF, ends_E)


class _GroupedExperts(torch.autograd.Function):
    """The layer as in the module's docstring; matrices in x's dtype."""

    @staticmethod
    def forward(
        ctx: Any,
        x_TD: torch.Tensor,
        experts_TK: torch.Tensor,
        weights_TK: torch.Tensor,
        gate_EFD: torch.Tensor,
        up_EFD: torch.Tensor,
        down_EDF: torch.Tensor,
    ) -> torch.Tensor:
        K = experts_TK.shape[1]
        E = gate_EFD.shape[0]
        multiple = 1 if x_TD.is_cuda or x_TD.dtype.itemsize > 2 else BFLOAT16_ROWS
        pair, row, ends_E = group_by_expert(experts_TK, E, multiple)
        token = pair // K
        row_TK = row.view(-1, K)
        x = x_TD.index_select(0, token)
        g = grouped_mm(x, gate_EFD.mT, ends_E)
        u = grouped_mm(x, up_EFD.mT, ends_E)
        y = grouped_mm(F.silu(g).mul_(u), down_EDF.mT, ends_E)
        ctx.save_for_backward(
            x, weights_TK, g, u, token, row_TK, ends_E, gate_EFD, up_EFD, down_EDF
        )
        return F.embedding_bag(row_TK, y, mode="sum", per_sample_weights=weights_TK.to(y.dtype))

    @staticmethod
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]  torch declares *grads
        ctx: Any, grad_TD: torch.Tensor
    ) -> tuple[torch.Tensor | None, ...]:
        x, weights_TK, g, u, token, row_TK, ends_E, gate_EFD, up_EFD, down_EDF = ctx.saved_tensors
        weight = weights_TK.new_zeros(len(x), 1)  # of each row; zero in the padding
        weight.index_copy_(0, row_TK.flatten(), weights_TK.reshape(-1, 1))
        weight = weight.to(x.dtype)
        grad = grad_TD.index_select(0, token)  # d, of each row
        silu = F.silu(g)
        activation = silu * u  # a
        dweighted = grouped_mm(grad, down_EDF, ends_E)  # down' d
        dweight = (dweighted * activation).sum(1, dtype=weights_TK.dtype)
        ddown = grouped_outer(grad, activation.mul_(weight), ends_E)
        dactivation = dweighted.mul_(weight)  # da
        du = dactivation * silu
        dg = torch.ops.aten.silu_backward(dactivation.mul_(u), g)
        # Gate and up are one product here: dgu has the columns of both.
        dgu = torch.cat((dg, du), 1)
        dx = grouped_mm(dgu, torch.cat((gate_EFD, up_EFD), 1), ends_E)
        dgate, dup = grouped_outer(dgu, x, ends_E).chunk(2, 1)
        dx_TD = F.embedding_bag(row_TK, dx, mode="sum")
        return dx_TD, None, dweight[row_TK], dgate, dup, ddown


# The compiler can trace grouped_mm in bfloat16 only, and no addresses of tensors.
_apply_uncompiled: Any = torch.compiler.disable(_GroupedExperts.apply)


def experts_grouped(
    x_TD: torch.Tensor,
    experts_TK: torch.Tensor,
    weights_TK: torch.Tensor,
    gate_EFD: torch.Tensor,
    up_EFD: torch.Tensor,
    down_EDF: torch.Tensor,
) -> torch.Tensor:
    """Compute `experts_loop` of `eager.py`: x and y (T, D), experts int64 and weights float32 (T, K), all else x's dtype."""
    return _apply_uncompiled(x_TD, experts_TK, weights_TK, gate_EFD, up_EFD, down_EDF)
