"""Causal attention in C, with its backward pass (no section in the paper).

Equations: `minglm.kernels.attention.chunked`. Reference: `minglm.kernels.attention.eager`.
"""

from typing import Any

import torch

from minglm.kernels.attention.chunked import document_starts
from minglm.kernels.attention.shared import SharedPrompts
from minglm.kernels.cpu.build import address, loaded_library


class _Attention(torch.autograd.Function):
    """Attention. It keeps its arguments and the log-sum of each query."""

    @staticmethod
    def forward(
        ctx: Any,
        q_BSNA: torch.Tensor,
        k_BSMA: torch.Tensor,
        v_BSMA: torch.Tensor,
        starts_BS: torch.Tensor | None,
        prompt_ranges: torch.Tensor | None,
    ) -> torch.Tensor:
        B, S, N, A = q_BSNA.shape
        M = k_BSMA.shape[2]
        out_BSNA = torch.empty_like(q_BSNA)
        sums_BMSG = q_BSNA.new_empty(B, M, S, N // M)
        ctx.sizes = (B, S, N, M, A)
        ctx.save_for_backward(q_BSNA, k_BSMA, v_BSMA, starts_BS, prompt_ranges, sums_BMSG)
        tensors = (q_BSNA, k_BSMA, v_BSMA, starts_BS, prompt_ranges, out_BSNA, sums_BMSG)
        loaded_library().attention_forward(*map(address, tensors), *ctx.sizes)
        return out_BSNA

    @staticmethod
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]  torch declares *grads
        ctx: Any, grad_BSNA: torch.Tensor
    ) -> tuple[torch.Tensor | None, ...]:
        saved = ctx.saved_tensors
        gradients = [torch.empty_like(x) for x in saved[:3]]
        tensors = (*saved, grad_BSNA.contiguous(), *gradients)
        loaded_library().attention_backward(*map(address, tensors), *ctx.sizes)
        return *gradients, None, None


# The compiler cannot trace addresses of tensors.
_attention: Any = torch.compiler.disable(_Attention.apply)


def attention_c(
    q_BSNA: torch.Tensor,
    k_BSMA: torch.Tensor,
    v_BSMA: torch.Tensor,
    documents_BS: torch.Tensor | None = None,
) -> torch.Tensor:
    """Compute `attention` of `attention/eager.py`: q and the result (B, S, N, A), k and v (B, S, M, A), all float32.

    documents_BS: integer ids (B, S), of which equal ones are next to each other.
    """
    starts_BS = None if documents_BS is None else document_starts(documents_BS)
    tensors = (x.contiguous() for x in (q_BSNA, k_BSMA, v_BSMA))
    return _attention(*tensors, starts_BS, None)


def attention_to_prompts_c(
    q_TNA: torch.Tensor, k_TMA: torch.Tensor, v_TMA: torch.Tensor, shared: SharedPrompts
) -> torch.Tensor:
    """Compute `attention_to_prompts` of `attention/eager.py`: q and the result (1, T, N, A), all float32."""
    tensors = (x.contiguous() for x in (q_TNA, k_TMA, v_TMA))
    return _attention(*tensors, shared.starts_T, shared.prompt_ranges)
