"""Multi-token prediction: one more layer that guesses the token after next (paper 2.1, 2.4).

    z_t = eh_proj [ enorm(emb(token_{t+1})) ; hnorm(h_t) ];   z -> one MoE decoder layer -> shared_head.norm -> lm_head
    predicts token_{t+2}

h_t is the trunk's output after its final norm; embedding and output head are the trunk's own. The embedding half comes
first. In training this is a denser signal, weighted 0.3 and later 0.1; in generation the layer drafts tokens that the
trunk then accepts or rejects. A target counts only inside its own document.
"""

import torch
from torch import nn

from minglm.model.layers import Linear, RMSNorm


def shift(x_BS, by, fill):
    """x moved `by` positions to the left, `fill` entering at the end: what lies `by` tokens ahead of each position."""
    return torch.cat([x_BS[:, by:], x_BS.new_full((x_BS.shape[0], by), fill)], 1)


class MTPLayer(nn.Module):
    """The MTP layer around a decoder layer; its parameters have the names of the released checkpoints."""

    def __init__(self, config, decoder_layer):
        super().__init__()
        D, eps = config.hidden_size, config.rms_norm_eps
        self.enorm, self.hnorm = RMSNorm(D, eps), RMSNorm(D, eps)
        self.eh_proj = Linear(2 * D, D)
        self.shared_head = nn.ModuleDict({"norm": RMSNorm(D, eps)})
        for (
            name,
            part,
        ) in decoder_layer.named_children():  # checkpoints store both parts under one layer index
            self.add_module(name, part)
        self.decode = type(
            decoder_layer
        ).forward  # a function, not a bound method: those do not survive pickling

    def forward(self, hidden_BSD, next_embeddings_BSD, *arguments):
        """Hidden states and the embeddings of the tokens after them, both (B, S, D), to normed states (B, S, D).

        `arguments` are those of the decoder layer. Returns (states, Routing).
        """
        z_BSD, routing = self.decode(self, self.join(hidden_BSD, next_embeddings_BSD), *arguments)
        return self.shared_head["norm"](z_BSD), routing

    def join(self, hidden, next_embeddings):
        """What enters the decoder layer: (..., D) from states and embeddings (..., D)."""
        return self.eh_proj(torch.cat([self.enorm(next_embeddings), self.hnorm(hidden)], -1))
