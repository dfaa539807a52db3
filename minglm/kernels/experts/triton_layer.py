"""The expert layer on a GPU: host code over the kernels of `triton_kernels` (paper 2.1).

    y_t = sum over the K experts e chosen for token t of  w_te * down_e( silu(gate_e x_t) * (up_e x_t) )

Saved for the backward pass: x, both pre-activations g and u, and the router's choices; only g and u are in the order of
the experts. There are three launches forward (plus the sort of the choices) and seven backward. The launches are in a
file of their own because a kernel can be compiled where it cannot be launched.
"""

# Triton has no types for a kernel's tensors, constexpr arguments, loops and launch options:
# pyright: reportArgumentType=false, reportCallIssue=false, reportOperatorIssue=false, reportAttributeAccessIssue=false
# pyright: reportGeneralTypeIssues=false, reportPossiblyUnboundVariable=false

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from minglm.kernels.experts import triton_kernels as kernels
from minglm.kernels.experts.triton_kernels import DOWN, OUTER, PRODUCT, UP
from minglm.kernels.router.triton_kernel import group_by_expert_triton
from minglm.kernels.toolchain.tiles import (
    bind,
    bulk_readable,
    power_of_2,
    programs,
    read,
    tiles_for,
)

SUM_WIDTH = 1024  # numbers that a program of the sum takes at a time


class Hidden(NamedTuple):
    """The hidden units of the experts, each (T * K, F) in the order of the experts, in x's dtype."""

    h: Tensor
    """silu(g) * u * weight."""
    g: Tensor | None
    """Pre-activation x gate'; None unless it is saved for the backward pass."""
    u: Tensor | None
    """Pre-activation x up'; None unless it is saved for the backward pass."""


class SwigluGradients(NamedTuple):
    """What `swiglu_backward` computes; h, dg and du are (T * K, F) in the order of the experts."""

    h: Tensor
    """silu(g) * u * weight, computed again."""
    dg: Tensor
    du: Tensor
    """Overwrites dh."""
    dweights_TK: Tensor
    """float32."""


def up(
    x_TD: Tensor,
    order: Tensor,
    weights_TK: Tensor,
    ends_E: Tensor,
    gate_EFD: Tensor,
    up_EFD: Tensor,
    save: bool,
) -> Hidden:
    """Compute the hidden units of all pairs (token, expert).

    order: int64 (T * K), the pairs expert by expert; ends: int32 (E), the end of each expert's pairs. save: keep g, u.
    """
    E, F, D = gate_EFD.shape
    K = weights_TK.shape[1]
    tiles = tiles_for(UP, x_TD, len(order) / E)
    bulk = bulk_readable(gate_EFD, up_EFD)
    h = x_TD.new_empty(len(order), F)
    g = torch.empty_like(h) if save else None
    u = torch.empty_like(h) if save else None
    kernels.up_kernel[(programs(x_TD, tiles.per_multiprocessor),)](
        x_TD,
        order,
        weights_TK,
        ends_E,
        read(gate_EFD, tiles.columns, tiles.step, bulk),
        read(up_EFD, tiles.columns, tiles.step, bulk),
        g,
        u,
        h,
        E,
        D,
        F,
        CHOICES=K,
        EXPERTS=power_of_2(E),
        SAVE=save,
        SWAP=tiles.swap,
        BULK=bulk,
        EVEN=D % tiles.step == 0,
        **tiles.constants(),
        num_warps=tiles.warps,
        num_stages=tiles.stages,
    )
    return Hidden(h, g, u)


def product(
    terms: Sequence[tuple[Tensor, Tensor]],
    order: Tensor,
    ends_E: Tensor,
    choices: int,
    *,
    pick: bool,
    transposed: bool,
) -> Tensor:
    """Sum a @ w[expert of the row] over one or two terms (a, w); see `product_kernel`. Returns (T * K, width).

    a: (T, depth) if `pick`, else (T * K, depth); w: (E, depth, width), or (E, width, depth) if `transposed`.
    """
    a, w = terms[0]
    two = len(terms) == 2
    depth = a.shape[1]
    E = len(ends_E)
    width = w.shape[1 if transposed else 2]
    tiles = tiles_for(DOWN if transposed else PRODUCT, a, len(order) / E)
    matrices = [w for _, w in terms]
    bulk = bulk_readable(*matrices) and (pick or bulk_readable(*(a for a, _ in terms)))
    box = (tiles.columns, tiles.step) if transposed else (tiles.step, tiles.columns)
    rows = [a if pick else read(a[None], tiles.rows, tiles.step, bulk) for a, _ in terms]
    matrices = [read(w, *box, bulk) for w in matrices]
    y = a.new_empty(len(order), width)
    kernels.product_kernel[(programs(a, tiles.per_multiprocessor),)](
        rows[0],
        rows[1] if two else None,
        order,
        ends_E,
        matrices[0],
        matrices[1] if two else None,
        y,
        E,
        len(order),
        depth,
        width,
        CHOICES=choices,
        EXPERTS=power_of_2(E),
        PICK=pick,
        TWO=two,
        TRANSPOSED=transposed,
        SWAP=tiles.swap,
        BULK=bulk,
        EVEN=depth % tiles.step == 0,
        **tiles.constants(),
        num_warps=tiles.warps,
        num_stages=tiles.stages,
    )
    return y


def outer(
    a: Tensor, b: Tensor, order: Tensor, ends_E: Tensor, choices: int, *, swap: bool = False
) -> Tensor:
    """Compute a' b over the rows of each expert, (E, a's width, b's width), or b' a if `swap`.

    a: (T, width), its rows are picked by token; b: (T * K, width), in the order of the experts.
    """
    E = len(ends_E)
    height = a.shape[1]
    width = b.shape[1]
    out = a.new_empty(E, width, height) if swap else a.new_empty(E, height, width)
    tiles = tiles_for(OUTER, a, 0)
    bulk = bulk_readable(b, out)
    kernels.outer_kernel[(programs(a),)](
        a,
        read(b[None], tiles.step, tiles.columns, bulk),
        order,
        ends_E,
        read(out, tiles.columns, tiles.rows, bulk and swap),
        E,
        len(order),
        height,
        width,
        CHOICES=choices,
        SWAP=swap,
        BULK=bulk,
        EVEN=height % tiles.rows == 0,
        **tiles.constants(),
        num_warps=tiles.warps,
        num_stages=tiles.stages,
    )
    return out


def swiglu_backward(
    dh: Tensor, g: Tensor, u: Tensor, order: Tensor, weights_TK: Tensor
) -> SwigluGradients:
    """Go back from dh (T * K, F) through h = silu(g) * u * weight; du overwrites dh."""
    h = torch.empty_like(g)
    dg = torch.empty_like(g)
    dweights_TK = torch.empty_like(weights_TK)
    F = g.shape[1]
    kernels.swiglu_backward_kernel[(len(order),)](
        dh, g, u, order, weights_TK, h, dg, dweights_TK, F, WIDTH=power_of_2(F)
    )
    return SwigluGradients(h, dg, dh, dweights_TK)


def sum_choices(parts: Tensor, choices: int) -> Tensor:
    """Sum the K results of each token: (T * K, D) to (T, D), in float32, always in the same order."""
    T = len(parts) // choices
    D = parts.shape[1]
    out = parts.new_empty(T, D)
    width = min(SUM_WIDTH, power_of_2(D))
    kernels.sum_kernel[(T, -(-D // width))](parts, out, D, CHOICES=choices, WIDTH=width)
    return out


class _Experts(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x_TD: Tensor,
        experts_TK: Tensor,
        weights_TK: Tensor,
        gate_EFD: Tensor,
        up_EFD: Tensor,
        down_EDF: Tensor,
    ) -> Tensor:
        K = experts_TK.shape[1]
        order, _, ends_E = group_by_expert_triton(experts_TK, len(gate_EFD))
        h, g, u = up(
            x_TD, order, weights_TK, ends_E, gate_EFD, up_EFD, save=any(ctx.needs_input_grad)
        )
        y = product([(h, down_EDF)], order, ends_E, K, pick=False, transposed=True)
        ctx.save_for_backward(x_TD, weights_TK, g, u, order, ends_E, gate_EFD, up_EFD, down_EDF)
        return sum_choices(y, K)

    @staticmethod
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]  torch declares *grads
        ctx: Any, grad_TD: Tensor
    ) -> tuple[Tensor | None, ...]:
        x_TD, weights_TK, g, u, order, ends_E, gate_EFD, up_EFD, down_EDF = ctx.saved_tensors
        bind(grad_TD)
        grad_TD = grad_TD.contiguous()
        K = weights_TK.shape[1]
        dh = product([(grad_TD, down_EDF)], order, ends_E, K, pick=True, transposed=False)
        h, dg, du, dweights_TK = swiglu_backward(dh, g, u, order, weights_TK)
        dx_TD = None
        dgate_EFD = None
        dup_EFD = None
        ddown_EDF = None
        if ctx.needs_input_grad[5]:
            ddown_EDF = outer(grad_TD, h, order, ends_E, K)
        if ctx.needs_input_grad[0]:
            dx = product(
                [(dg, gate_EFD), (du, up_EFD)], order, ends_E, K, pick=False, transposed=False
            )
            dx_TD = sum_choices(dx, K)
        if ctx.needs_input_grad[3]:
            dgate_EFD = outer(x_TD, dg, order, ends_E, K, swap=True)
        if ctx.needs_input_grad[4]:
            dup_EFD = outer(x_TD, du, order, ends_E, K, swap=True)
        return dx_TD, None, dweights_TK, dgate_EFD, dup_EFD, ddown_EDF


def experts_triton(
    x_TD: Tensor,
    experts_TK: Tensor,
    weights_TK: Tensor,
    gate_EFD: Tensor,
    up_EFD: Tensor,
    down_EDF: Tensor,
) -> Tensor:
    """Compute the routed experts' sum (T, D) for tokens x (T, D), T > 0, in bfloat16, float16 or float32.

    experts: int64 (T, K), distinct experts of each token; weights: (T, K), theirs. The matrices have x's dtype. Eager
    form: `experts_loop` of `minglm.kernels.experts.eager`.
    """
    return _Experts.apply(
        x_TD.contiguous(),
        experts_TK,
        weights_TK.float().contiguous(),
        gate_EFD.contiguous(),
        up_EFD.contiguous(),
        down_EDF.contiguous(),
    )
