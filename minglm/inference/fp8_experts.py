"""Generate with the experts' matrices in float8 (paper 3.5: rollouts in FP8, training in higher precision).

    y_t = sum over the chosen e of  w_te down_e( silu(gate_e x_t) * (up_e x_t) ),     every product in float8 blocks

Decoding is as fast as the experts' matrices are read, and these are 95% of GLM-4.5's parameters: one byte
each in place of two. When the engine finds new weights it quantizes the experts once, in blocks of 128 x 128,
and rows of activations before each product, in blocks of 1 x 128 (`minglm.kernels.fp8`). Router, shared
expert, attention and head stay as they are, and so do the model's own parameters.

What is sampled is then not quite the policy that is trained. The recorded log-probabilities are those of what
was sampled, so the ratio of the loss accounts for it, and `gap_kl` and its neighbours in the log say how far
they are apart.
"""

import contextlib
from collections.abc import Iterator, Sequence

import torch
import torch.nn.functional as F

from minglm.inference.pages import PagedCache, Span
from minglm.kernels.fp8 import ACTIVATION_BLOCK, quantize, scaled_product
from minglm.kernels.router import sort_by_expert
from minglm.model.moe import Experts, MoE


class Fp8Experts:
    """The quantized experts of one layer; called in place of `minglm.kernels.experts.grouped_experts`."""

    def __init__(self, experts: Experts) -> None:
        self.gate = quantize(experts.gate_EFD)
        self.up = quantize(experts.up_EFD)
        self.down = quantize(experts.down_EDF)

    def __call__(
        self,
        x_TD: torch.Tensor,
        experts_TK: torch.Tensor,
        weights_TK: torch.Tensor,
        *matrices: torch.Tensor,
    ) -> torch.Tensor:
        """Compute x (T, D), experts int64 (T, K), weights float32 (T, K) to (T, D) in x's dtype; matrices are ignored."""
        T, K = experts_TK.shape
        dtype = x_TD.dtype
        pairs = sort_by_expert(experts_TK, len(self.gate.q))
        x = quantize(x_TD, ACTIVATION_BLOCK)
        g = scaled_product(*x, *self.gate, pairs.ends_E, pairs.order, K, dtype)
        u = scaled_product(*x, *self.up, pairs.ends_E, pairs.order, K, dtype)
        activation = quantize(F.silu(g).mul_(u), ACTIVATION_BLOCK)
        y = scaled_product(*activation, *self.down, pairs.ends_E, dtype=dtype)
        row_TK = pairs.inverse.view(T, K)
        return F.embedding_bag(row_TK, y, mode="sum", per_sample_weights=weights_TK.to(dtype))


class Fp8Decoder(PagedCache):
    """A `PagedCache` that replaces the model's experts by quantized ones during each pass."""

    def read_weights(self) -> None:
        """Quantize the experts as they are now."""
        layers = [module for module in self.model.modules() if isinstance(module, MoE)]
        self.experts = [(layer, Fp8Experts(layer.experts)) for layer in layers]

    def trunk(
        self, rows: Sequence[Span], tokens: Sequence[int], wanted: Sequence[int]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Run the decoder layers; arguments and results as those of `PagedCache.trunk`."""
        with self._quantized():
            return super().trunk(rows, tokens, wanted)

    def mtp(
        self, rows: Sequence[Span], tokens: Sequence[int], states_TD: torch.Tensor
    ) -> torch.Tensor:
        """Run the MTP layer; arguments and result as those of `PagedCache.mtp`."""
        with self._quantized():
            return super().mtp(rows, tokens, states_TD)

    @contextlib.contextmanager
    def _quantized(self) -> Iterator[None]:
        """Put the quantized experts into the model's layers, and afterwards what was there before."""
        before = [layer.experts.operation for layer, _ in self.experts]
        try:
            for layer, experts in self.experts:
                layer.experts.operation = experts
            yield
        finally:
            for (layer, _), operation in zip(self.experts, before, strict=True):
                layer.experts.operation = operation
