"""The expert layer as grouped matrix products: every expert multiplies the rows that were sent to it (paper 2.1).

    y_t = sum over the K experts e chosen for token t of  w_te * down_e( silu(gate_e x_t) * (up_e x_t) )

`experts_loop` is the plain form, a loop over experts; the oracle. `grouped_experts` sorts the (token, expert) pairs by
expert once, so that each expert's rows are contiguous, and needs no padding and no atomic addition: the inverse
permutation brings results and gradients back, which makes it bitwise repeatable. Its backward keeps only the inputs,
the two pre-activations and the indices. The gradient of the router's weight is the row sum of activation times the
gradient of the activation, so the expert's output need not be kept. (The weight enters before the second product in
Triton and C; plain PyTorch multiplies where it sums a token's rows, which is one operation there.)

On a GPU it is the Triton kernels of `grouped_gemm_triton`, which sort the indices only. In plain PyTorch the products
are `torch.nn.functional.grouped_mm`, on a CPU too: its loop over the experts does not hold Python's lock. Shapes and
dtypes that it does not take get a loop here. On a CPU a product in bfloat16 is compiled for its shape when that shape
is first met, which takes ten times as long as the product itself, and the experts' loads are new in every step. So each
expert's rows are filled up to a multiple of `ROWS`, with weight zero, and the same few shapes come again and again.
"""

import torch
import torch.nn.functional as F

from minglm.kernels.dispatch import backend
from minglm.kernels.router.eager import group_by_expert

ROWS = 32
FEW = (
    2**23
)  # multiplications of one matrix by all tokens, below which sorting them by expert does not pay


def experts_loop(x_TD, experts_TK, weights_TK, gate_EFD, up_EFD, down_EDF):
    """Plain form. x (T, D); experts int (T, K); weights (T, K) float32; returns (T, D) in x's dtype.

    The matrices may be of another dtype, as a model's are that computes in bfloat16: products are made in x's.
    """
    y_TD = torch.zeros_like(x_TD, dtype=torch.float32)
    for e in range(gate_EFD.shape[0]):
        token, slot = (experts_TK == e).nonzero(as_tuple=True)
        x = x_TD[token]
        gate_FD, up_FD, down_DF = (w[e].to(x.dtype) for w in (gate_EFD, up_EFD, down_EDF))
        out = (F.silu(x @ gate_FD.T) * (x @ up_FD.T)) @ down_DF.T
        y_TD = y_TD.index_add(0, token, out.float() * weights_TK[token, slot, None])
    return y_TD.to(x_TD.dtype)


def _in_one_call(*matrices):
    """Whether `torch.nn.functional.grouped_mm` takes them: on a CPU not float64, and rows begin at whole 16 bytes."""
    if matrices[0].is_cuda:
        return True
    places = [
        place for m in matrices for place in (m.data_ptr(), m.itemsize * max(m.stride()[-2:]))
    ]
    return matrices[0].dtype != torch.float64 and not any(place % 16 for place in places)


def grouped_mm(x_TD, w_EDF, ends_E):
    """Rows ends[e-1] to ends[e] of x times w[e]: (T, D) by (E, D, F) gives (T, F). ends_E: int32, on x's device."""
    if _in_one_call(x_TD, w_EDF):
        return F.grouped_mm(x_TD, w_EDF, offs=ends_E)
    y = x_TD.new_empty(x_TD.shape[0], w_EDF.shape[2])
    start = 0
    for e, end in enumerate(ends_E.tolist()):
        if end > start:
            torch.mm(x_TD[start:end], w_EDF[e], out=y[start:end])
        start = end
    return y


def grouped_outer(x_TD, y_TF, ends_E):
    """For each expert x' y over its rows: (T, D) and (T, F) give (E, D, F); zeros for an expert without rows."""
    if _in_one_call(x_TD, y_TF):
        return F.grouped_mm(x_TD.T, y_TF, offs=ends_E)
    out = x_TD.new_zeros(len(ends_E), x_TD.shape[1], y_TF.shape[1])
    start = 0
    for e, end in enumerate(ends_E.tolist()):
        if end > start:
            torch.mm(x_TD[start:end].T, y_TF[start:end], out=out[e])
        start = end
    return out


class _Experts(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x_TD, experts_TK, weights_TK, gate_EFD, up_EFD, down_EDF):
        K, E = experts_TK.shape[1], gate_EFD.shape[0]
        multiple = 1 if x_TD.is_cuda or x_TD.dtype.itemsize > 2 else ROWS
        pair, row, ends_E = group_by_expert(experts_TK, E, multiple)
        token, row_TK = pair // K, row.view(-1, K)
        x = x_TD.index_select(0, token)
        g, u = grouped_mm(x, gate_EFD.mT, ends_E), grouped_mm(x, up_EFD.mT, ends_E)
        y = grouped_mm(F.silu(g).mul_(u), down_EDF.mT, ends_E)
        ctx.save_for_backward(
            x, weights_TK, g, u, token, row_TK, ends_E, gate_EFD, up_EFD, down_EDF
        )
        return F.embedding_bag(row_TK, y, mode="sum", per_sample_weights=weights_TK.to(y.dtype))

    @staticmethod
    def backward(ctx, grad_TD):
        x, weights_TK, g, u, token, row_TK, ends_E, gate_EFD, up_EFD, down_EDF = ctx.saved_tensors
        weight = (
            weights_TK.new_zeros(len(x), 1)
            .index_copy_(0, row_TK.flatten(), weights_TK.reshape(-1, 1))
            .to(x.dtype)
        )
        grad = grad_TD.index_select(0, token)
        silu = F.silu(g)
        activation = silu * u
        dweighted = grouped_mm(grad, down_EDF, ends_E)
        dweight = (dweighted * activation).sum(1, dtype=weights_TK.dtype)
        ddown = grouped_outer(grad, activation.mul_(weight), ends_E)
        dactivation = dweighted.mul_(weight)
        du = dactivation * silu
        dg = torch.ops.aten.silu_backward(dactivation.mul_(u), g)
        dgu = torch.cat((dg, du), 1)
        dx = grouped_mm(dgu, torch.cat((gate_EFD, up_EFD), 1), ends_E)
        dgate, dup = grouped_outer(dgu, x, ends_E).chunk(2, 1)
        return F.embedding_bag(row_TK, dx, mode="sum"), None, dweight[row_TK], dgate, dup, ddown


def experts_without_gradient(x_TD, experts_TK, weights_TK, gate_EFD, up_EFD, down_EDF):
    """The same as `experts_loop` on a CPU, for generation: nothing is kept, and small products are not sorted at all.

    For few tokens and small experts all experts see all tokens, and the weights of those not chosen are zero: three
    products in place of three for each expert, whose calls would cost more than the arithmetic.
    """
    (T, K), (E, F_, D) = experts_TK.shape, gate_EFD.shape
    if T * E * F_ * D <= FEW:
        weights_TE = torch.zeros(T, E, dtype=weights_TK.dtype, device=x_TD.device).scatter_(
            1, experts_TK, weights_TK
        )
        h = F.silu(x_TD @ gate_EFD.view(-1, D).T).mul_(x_TD @ up_EFD.view(-1, D).T)
        h = h.view(T, E, F_).mul_(weights_TE[..., None])
        return torch.bmm(h.transpose(0, 1), down_EDF.mT).sum(0)
    flat = experts_TK.flatten()
    order = flat.argsort(stable=True)
    counts = torch.bincount(flat, minlength=E).tolist()

    def product(x, w_EDF):
        return torch.cat(
            [torch.mm(rows, w) for rows, w in zip(x.split(counts), w_EDF, strict=True) if len(rows)]
        )

    x = x_TD[order // K]
    h = (
        F.silu(product(x, gate_EFD.mT))
        .mul_(product(x, up_EFD.mT))
        .mul_(weights_TK.flatten()[order, None])
    )
    y = torch.empty(T * K, D, dtype=x_TD.dtype).index_copy_(0, order, product(h, down_EDF.mT))
    return y.view(T, K, D).sum(1)


def grouped_experts(x_TD, experts_TK, weights_TK, gate_EFD, up_EFD, down_EDF):
    """The same as `experts_loop`, sorted and grouped. Same arguments and result; differentiable in all but experts."""
    gate_EFD, up_EFD, down_EDF = (w.to(x_TD.dtype) for w in (gate_EFD, up_EFD, down_EDF))
    if len(x_TD) and backend(x_TD) == "triton":
        from minglm.kernels.experts.triton_layer import experts_triton

        return experts_triton(x_TD, experts_TK, weights_TK, gate_EFD, up_EFD, down_EDF)
    if not torch.is_grad_enabled() and not x_TD.is_cuda:
        return experts_without_gradient(x_TD, experts_TK, weights_TK, gate_EFD, up_EFD, down_EDF)
    return _Experts.apply(x_TD, experts_TK, weights_TK, gate_EFD, up_EFD, down_EDF)
