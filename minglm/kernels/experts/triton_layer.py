"""The expert layer on a GPU, put together from the kernels of `grouped_gemm_triton` (paper 2.1).

    y_t = sum over the K experts e chosen for token t of  w_te * down_e( silu(gate_e x_t) * (up_e x_t) )

Saved for the backward pass: x, both pre-activations, the router's choices; nothing in the order of the experts but g
and u. Three launches forward (plus the sort of the choices), seven backward.
Written apart from the kernels, because a kernel can be compiled where it cannot be launched.
"""

import torch

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

SUM_WIDTH = 1024


def up(x_TD, order, weights_TK, ends_E, gate_EFD, up_EFD, save):
    """(h, g, u), each (T * K, F) in the order of the experts; g and u are None unless they are to be saved."""
    (E, F, D), K = gate_EFD.shape, weights_TK.shape[1]
    tiles, bulk = tiles_for(UP, x_TD, len(order) / E), bulk_readable(gate_EFD, up_EFD)
    h = x_TD.new_empty(len(order), F)
    g, u = (torch.empty_like(h), torch.empty_like(h)) if save else (None, None)
    gate, up = (read(w, tiles.columns, tiles.step, bulk) for w in (gate_EFD, up_EFD))
    kernels.up_kernel[(programs(x_TD, tiles.each),)](
        x_TD,
        order,
        weights_TK,
        ends_E,
        gate,
        up,
        g,
        u,
        h,
        E,
        D,
        F,
        CHOICES=K,
        EXPERTS=power_of_2(E),
        SAVE=save,
        TURN=tiles.turn,
        BULK=bulk,
        EVEN=D % tiles.step == 0,
        **tiles.constants(),
        num_warps=tiles.warps,
        num_stages=tiles.stages,
    )
    return h, g, u


def product(terms, order, ends_E, choices, *, pick, transposed):
    """Sum of a @ w[expert of the row] over one or two terms (a, w); see `product_kernel`. Returns (T * K, width)."""
    a, w = terms[0]
    depth, (E, width) = a.shape[1], (len(ends_E), w.shape[1 if transposed else 2])
    tiles = tiles_for(DOWN if transposed else PRODUCT, a, len(order) / E)
    matrices = [w for _, w in terms]
    bulk = bulk_readable(*matrices) and (pick or bulk_readable(*(a for a, _ in terms)))
    box = (tiles.columns, tiles.step) if transposed else (tiles.step, tiles.columns)
    rows = [a if pick else read(a[None], tiles.rows, tiles.step, bulk) for a, _ in terms]
    matrices = [read(w, *box, bulk) for w in matrices]
    y = a.new_empty(len(order), width)
    two = len(terms) == 2
    kernels.product_kernel[(programs(a, tiles.each),)](
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
        TURN=tiles.turn,
        BULK=bulk,
        EVEN=depth % tiles.step == 0,
        **tiles.constants(),
        num_warps=tiles.warps,
        num_stages=tiles.stages,
    )
    return y


def outer(a, b, order, ends_E, choices, *, turn=False):
    """For each expert a' b over its rows, (E, a's width, b's width), or b' a if turn; rows of a are their tokens'."""
    E, height, width = len(ends_E), a.shape[1], b.shape[1]
    out = a.new_empty(E, width, height) if turn else a.new_empty(E, height, width)
    tiles, bulk = tiles_for(OUTER, a, 0), bulk_readable(b, out)
    kernels.outer_kernel[(programs(a),)](
        a,
        read(b[None], tiles.step, tiles.columns, bulk),
        order,
        ends_E,
        read(out, tiles.columns, tiles.rows, bulk and turn),
        E,
        len(order),
        height,
        width,
        CHOICES=choices,
        TURN=turn,
        BULK=bulk,
        EVEN=height % tiles.rows == 0,
        **tiles.constants(),
        num_warps=tiles.warps,
        num_stages=tiles.stages,
    )
    return out


def swiglu_backward(dh, g, u, order, weights_TK):
    """(h, dg, du, dweights_TK) of dh; du takes the place of dh."""
    h, dg, dweights_TK = torch.empty_like(g), torch.empty_like(g), torch.empty_like(weights_TK)
    kernels.swiglu_backward_kernel[(len(order),)](
        dh, g, u, order, weights_TK, h, dg, dweights_TK, g.shape[1], WIDTH=power_of_2(g.shape[1])
    )
    return h, dg, dh, dweights_TK


def sum_choices(parts, choices):
    """(T * K, D) to (T, D): each token's results, in float32, always in the same order."""
    T, D = len(parts) // choices, parts.shape[1]
    out = parts.new_empty(T, D)
    width = min(SUM_WIDTH, power_of_2(D))
    kernels.sum_kernel[(T, -(-D // width))](parts, out, D, CHOICES=choices, WIDTH=width)
    return out


class _Experts(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x_TD, experts_TK, weights_TK, gate_EFD, up_EFD, down_EDF):
        K = experts_TK.shape[1]
        order, _, ends_E = group_by_expert_triton(experts_TK, len(gate_EFD))
        h, g, u = up(
            x_TD, order, weights_TK, ends_E, gate_EFD, up_EFD, save=any(ctx.needs_input_grad)
        )
        y = product([(h, down_EDF)], order, ends_E, K, pick=False, transposed=True)
        ctx.save_for_backward(x_TD, weights_TK, g, u, order, ends_E, gate_EFD, up_EFD, down_EDF)
        return sum_choices(y, K)

    @staticmethod
    def backward(ctx, grad_TD):
        x_TD, weights_TK, g, u, order, ends_E, gate_EFD, up_EFD, down_EDF = ctx.saved_tensors
        bind(grad_TD)
        grad_TD, K = grad_TD.contiguous(), weights_TK.shape[1]
        dh = product([(grad_TD, down_EDF)], order, ends_E, K, pick=True, transposed=False)
        h, dg, du, dweights_TK = swiglu_backward(dh, g, u, order, weights_TK)
        dx_TD = dgate_EFD = dup_EFD = ddown_EDF = None
        if ctx.needs_input_grad[5]:
            ddown_EDF = outer(grad_TD, h, order, ends_E, K)
        if ctx.needs_input_grad[0]:
            dx = product(
                [(dg, gate_EFD), (du, up_EFD)], order, ends_E, K, pick=False, transposed=False
            )
            dx_TD = sum_choices(dx, K)
        if ctx.needs_input_grad[3]:
            dgate_EFD = outer(x_TD, dg, order, ends_E, K, turn=True)
        if ctx.needs_input_grad[4]:
            dup_EFD = outer(x_TD, du, order, ends_E, K, turn=True)
        return dx_TD, None, dweights_TK, dgate_EFD, dup_EFD, ddown_EDF


def experts_triton(x_TD, experts_TK, weights_TK, gate_EFD, up_EFD, down_EDF):
    """The same as `experts_loop` of `minglm.kernels.experts.eager`, for T > 0, in bfloat16, float16 or float32."""
    matrices = [w.contiguous() for w in (gate_EFD, up_EFD, down_EDF)]
    return _Experts.apply(x_TD.contiguous(), experts_TK, weights_TK.float().contiguous(), *matrices)
