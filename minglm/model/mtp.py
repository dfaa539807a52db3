"""Multi-token prediction: a further decoder layer that predicts the token after next (paper 2.1, 2.4).

    z_t = eh_proj [ enorm(emb(token_{t+1})) ; hnorm(h_t) ];   z -> one MoE decoder layer -> shared_head.norm -> lm_head
    predicts token_{t+2}

h_t is the trunk's output after its final norm; embedding and output head are the trunk's own. The embedding
half comes first. In training this is a denser signal, weighted 0.3 and later 0.1; in generation the layer
drafts tokens that the trunk then accepts or rejects. A target counts only inside its own document.
"""

import torch
from torch import Tensor, nn

from minglm.config import ModelConfig
from minglm.model.attention import LayerCache
from minglm.model.decoder import DecoderLayer
from minglm.model.layers import Linear, RMSNorm
from minglm.model.moe import Routing
from minglm.model.rope import Rotation


def shift(x_BS: Tensor, by: int, fill: int | bool) -> Tensor:
    """Move x (B, S) `by` positions to the left, so that each position holds what lies `by` tokens ahead of it.

    `fill` enters at the end. Returns the shape and dtype of x.
    """
    end_BS = x_BS.new_full((x_BS.shape[0], by), fill)
    return torch.cat([x_BS[:, by:], end_BS], 1)


class MTPLayer(DecoderLayer):
    """A MoE decoder layer with a projection before it and a norm after it; names as in the released checkpoints."""

    def __init__(self, config: ModelConfig):
        super().__init__(config, dense=False)
        D = config.hidden_size
        eps = config.rms_norm_eps
        inherited = dict(self.named_children())
        self.enorm = RMSNorm(D, eps)
        self.hnorm = RMSNorm(D, eps)
        self.eh_proj = Linear(2 * D, D)
        self.shared_head = nn.ModuleDict({"norm": RMSNorm(D, eps)})
        # The order of parameters decides initial values and the optimizer's state in checkpoints, and there the four
        # modules above come first.
        for name, module in inherited.items():
            delattr(self, name)
            self.add_module(name, module)

    def forward(  # pyright: ignore[reportIncompatibleMethodOverride]  # a second input: the next token's embedding
        self,
        hidden_BSD: Tensor,
        next_embeddings_BSD: Tensor,
        rotation: Rotation,
        documents_BS: Tensor | None = None,
        cache: LayerCache | None = None,
    ) -> tuple[Tensor, Routing | None]:
        """Map states and the embeddings of the tokens after them, both (B, S, D), to normed states (B, S, D).

        The other arguments are those of the decoder layer. Returns (states, Routing).
        """
        z_BSD = self.join(hidden_BSD, next_embeddings_BSD)
        z_BSD, routing = super().forward(z_BSD, rotation, documents_BS, cache)
        return self.shared_head["norm"](z_BSD), routing

    def join(self, hidden: Tensor, next_embeddings: Tensor) -> Tensor:
        """Return the input z (..., D) of the decoder layer, from states and next embeddings (..., D)."""
        both = torch.cat([self.enorm(next_embeddings), self.hnorm(hidden)], -1)
        return self.eh_proj(both)
