"""RMSNorm, with the addition to the residual stream before it in the same pass (paper 2.1: two norms a layer).

    r = x + change;   out = weight * r / sqrt(mean(r^2) + eps)

`norm` is the plain form. Every layer adds to the stream and norms it twice, and neither has any arithmetic to speak of:
on a GPU the time is that of moving r. One kernel reads x and change and writes r and out, where two would move r twice
more. The mean is float32 whatever the dtype; the factor 1 / sqrt(...) of each row, `scale`, is kept for the backward:

    n = r * scale;   dr = scale * (dout * weight - n * mean(dout * weight * n));   dweight = sum over rows of dout * n

The gradient that reaches r from later layers is added to dr in the same pass. dweight is summed in two stages, a part
for each program and then the parts, without atomic additions: bitwise repeatable.

On a CPU the backward is written out too (`_Norm`), because automatic differentiation writes a tensor for every factor.
In bfloat16 it computes in float32 and rounds once, at the end.
"""

import torch
import torch.nn.functional as F

from minglm.kernels.dispatch import backend


def norm(x_TD, weight_D, eps, change_TD=None):
    """Plain form: (out, r). x and change (T, D), weight (D,) float32; r is x + change, or x without a change.

    out has x's dtype; r / sqrt(mean) is rounded to it before the weight multiplies, as in `minglm.model.layers`.
    """
    r_TD = x_TD if change_TD is None else x_TD + change_TD
    if r_TD.dtype == weight_D.dtype:
        return F.rms_norm(r_TD, weight_D.shape, weight_D, eps), r_TD
    normal_TD = F.rms_norm(r_TD.float(), weight_D.shape, eps=eps).to(r_TD.dtype)
    return normal_TD * weight_D.to(r_TD.dtype), r_TD


def widen(*tensors):
    """The tensors in float32 at least."""
    return [x.to(torch.promote_types(x.dtype, torch.float32)) for x in tensors]


def normalize(x, weight, eps):
    """(weight * x / sqrt(mean(x^2) + eps), 1 / sqrt(...)) over the last axis; arguments and results are wide."""
    scale = x.square().mean(-1, keepdim=True).add_(eps).rsqrt_()
    return (x * scale).mul_(weight), scale


def normalize_backward(grad, x, weight, scale):
    """Gradients of x and weight; all are wide. The mean is over x and not n: one pass less over whole rows."""
    product = grad * x
    mean = (product @ weight[:, None]).mul_(scale**3 / x.shape[-1])
    dweight = product.flatten(0, -2).T @ scale.flatten()
    return (grad * weight).mul_(scale).addcmul_(x, mean, value=-1), dweight


class _Norm(torch.autograd.Function):
    """RMSNorm on a CPU, in float32 whatever the dtype of x."""

    @staticmethod
    def forward(ctx, x, weight, eps):
        out, scale = normalize(*widen(x, weight), eps)
        ctx.save_for_backward(x, weight, scale)
        return out.to(x.dtype)

    @staticmethod
    def backward(ctx, grad):
        x, weight, scale = ctx.saved_tensors
        dx, dweight = normalize_backward(*widen(grad, x, weight), scale)
        return dx.to(x.dtype), dweight.to(weight.dtype), None


def add_norm(x_TD, weight_D, eps, change_TD=None):
    """The same as `norm`, in the form that `minglm.kernels.dispatch` chooses. Any leading axes; differentiable."""
    if backend(x_TD) == "triton":
        from minglm.kernels.norm.triton_kernel import add_norm_triton

        return add_norm_triton(x_TD, weight_D, eps, change_TD)
    if x_TD.is_cuda or not torch.is_grad_enabled():
        return norm(x_TD, weight_D, eps, change_TD)
    r_TD = x_TD if change_TD is None else x_TD + change_TD
    return _Norm.apply(r_TD, weight_D, eps), r_TD
