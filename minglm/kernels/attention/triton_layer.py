"""Causal grouped-query attention on a GPU: the autograd function over the Triton and Gluon kernels (paper 2.1).

    out_i = sum over begin_i <= j <= i of  softmax_j(q_i . k_j A^-1/2) v_j        eager form: `attention/eager.py`

The forward kernel is Gluon's on Hopper for heads of 128 dimensions in 16 bits (`gluon_forward.py`), else Triton's
(`triton_forward.py`); the backward kernels are Triton's (`triton_backward.py`). Beside q, k and v only out and L, one
number for each query, are saved for the backward pass.
"""

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from minglm.kernels.attention.triton_backward import backward_triton
from minglm.kernels.attention.triton_common import empty_row_values
from minglm.kernels.dispatch import Operation, select
from minglm.kernels.toolchain.tiles import bind


class Bounds(NamedTuple):
    """The document of each position, as an interval of positions."""

    begin_BS: Tensor
    """int32: first position of the document."""
    end_BS: Tensor
    """int32: first position after the document."""


def document_bounds(documents_BS: Tensor) -> Bounds:
    """Find the bounds of the document (a run of equal ids) of each position; documents (B, S), any integer dtype."""
    S = documents_BS.shape[1]
    index_S = torch.arange(S, dtype=torch.int32, device=documents_BS.device)
    changed = documents_BS[:, 1:] != documents_BS[:, :-1]
    # begin: the largest start of a document up to here; the first position is one.
    begin_BS = torch.where(F.pad(changed, (1, 0)), index_S, 0).cummax(1).values
    # end: the smallest end of a document from here on, so the running minimum from the right.
    ends_BS = torch.where(F.pad(changed, (0, 1)), index_S + 1, S)
    end_BS = ends_BS.flip(1).cummin(1).values.flip(1).contiguous()
    return Bounds(begin_BS, end_BS)


class _FlashAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        q_BSNA: Tensor,
        k_BSMA: Tensor,
        v_BSMA: Tensor,
        begin_BS: Tensor | None,
        end_BS: Tensor | None,
        scale: float,
    ) -> Tensor:
        q_BSNA = q_BSNA.contiguous()
        k_BSMA = k_BSMA.contiguous()
        v_BSMA = v_BSMA.contiguous()
        forward = select(Operation.ATTENTION_FORWARD, q_BSNA, head_dim=q_BSNA.shape[3])
        out_BSNA = torch.empty_like(q_BSNA)
        log_sum_BNS = empty_row_values(q_BSNA)
        forward(q_BSNA, k_BSMA, v_BSMA, begin_BS, out_BSNA, log_sum_BNS, scale)
        ctx.scale = scale
        ctx.save_for_backward(q_BSNA, k_BSMA, v_BSMA, begin_BS, end_BS, out_BSNA, log_sum_BNS)
        return out_BSNA

    @staticmethod
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]  torch declares *grads
        ctx: Any, grad_BSNA: Tensor
    ) -> tuple[Tensor | None, ...]:
        bind(grad_BSNA)
        q_BSNA, k_BSMA, v_BSMA, begin_BS, end_BS, out_BSNA, log_sum_BNS = ctx.saved_tensors
        gradients = backward_triton(
            q_BSNA,
            k_BSMA,
            v_BSMA,
            begin_BS,
            end_BS,
            out_BSNA,
            log_sum_BNS,
            grad_BSNA.contiguous(),
            ctx.scale,
        )
        return gradients.dq_BSNA, gradients.dk_BSMA, gradients.dv_BSMA, None, None, None


def flash_attention_triton(
    q_BSNA: Tensor, k_BSMA: Tensor, v_BSMA: Tensor, documents_BS: Tensor | None = None
) -> Tensor:
    """Compute causal attention: q (B, S, N, A), k and v (B, S, M, A), A at most 256; returns (B, S, N, A) in q's dtype.

    documents: integers (B, S); a query sees the keys of its own run of equal ids only. See
    `minglm.kernels.attention.flash_attention`. The copy engine needs rows of a head that are multiples of 16
    bytes, and at least 16 numbers; zeros are appended where they are not.
    """
    A = q_BSNA.shape[3]
    multiple = 16 // q_BSNA.element_size()
    padding = (0, max(16, A + -A % multiple) - A)
    begin_BS, end_BS = (None, None) if documents_BS is None else document_bounds(documents_BS)
    out_BSNA = _FlashAttention.apply(
        F.pad(q_BSNA, padding),
        F.pad(k_BSMA, padding),
        F.pad(v_BSMA, padding),
        begin_BS,
        end_BS,
        A**-0.5,
    )
    return out_BSNA[..., :A]
