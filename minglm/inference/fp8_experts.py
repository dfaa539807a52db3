"""Generation with the experts' matrices in float8 (paper 3.5: rollouts in FP8, training in higher precision).

    y_t = sum over the chosen e of  w_te down_e( silu(gate_e x_t) * (up_e x_t) ),     every product in float8 blocks

Decoding is as fast as the experts' matrices are read, and these are 95% of GLM-4.5's parameters: one byte each in place
of two. When the engine finds new weights it quantises the experts once, in blocks of 128 x 128, and rows of activations
before each product, in blocks of 1 x 128 (`minglm.kernels.fp8.eager`). Router, shared expert, attention and head stay
as they are, and so do the model's own parameters.

What is sampled is then not quite the policy that is trained. The recorded log-probabilities are those of what was
sampled, so the ratio of GRPO accounts for it, and the log's `kl` and `ratio_max` say how far they are apart.
"""

import contextlib

import torch.nn.functional as F

from minglm.inference.pages import Pages
from minglm.kernels.fp8.eager import ACTIVATION_BLOCK, quantize, scaled_product
from minglm.kernels.router.eager import sort_by_expert
from minglm.model.moe import MoE


class Float8Experts:
    """The experts of one layer as they were when this was made; called in place of `grouped_experts`."""

    def __init__(self, experts):
        self.gate, self.up, self.down = (
            quantize(w) for w in (experts.gate_EFD, experts.up_EFD, experts.down_EDF)
        )

    def __call__(self, x_TD, experts_TK, weights_TK, *matrices):
        """x (T, D), experts int64 (T, K), weights float32 (T, K); returns (T, D) in x's dtype."""
        (T, K), dtype = experts_TK.shape, x_TD.dtype
        order, row, ends_E = sort_by_expert(experts_TK, len(self.gate[0]))
        x = quantize(x_TD, ACTIVATION_BLOCK)
        g, u = (scaled_product(*x, *w, ends_E, order, K, dtype) for w in (self.gate, self.up))
        y = scaled_product(
            *quantize(F.silu(g).mul_(u), ACTIVATION_BLOCK), *self.down, ends_E, dtype=dtype
        )
        return F.embedding_bag(
            row.view(T, K), y, mode="sum", per_sample_weights=weights_TK.to(dtype)
        )


class PagesInFloat8(Pages):
    """`Pages` of a model whose experts are quantised for each pass."""

    def read_weights(self):
        """Quantise the experts as they are now."""
        layers = [module for module in self.model.modules() if isinstance(module, MoE)]
        self.experts = [(layer, Float8Experts(layer.experts)) for layer in layers]

    def trunk(self, rows, tokens, wanted):
        """As in `Pages`."""
        with self._in_place():
            return super().trunk(rows, tokens, wanted)

    def mtp(self, rows, tokens, states_TD):
        """As in `Pages`."""
        with self._in_place():
            return super().mtp(rows, tokens, states_TD)

    @contextlib.contextmanager
    def _in_place(self):
        """Put the quantised experts into the model's layers; afterwards what was there stands there again."""
        before = [layer.experts.operation for layer, _ in self.experts]
        try:
            for layer, experts in self.experts:
                layer.experts.operation = experts
            yield
        finally:
            for (layer, _), operation in zip(self.experts, before, strict=True):
                layer.experts.operation = operation
