"""One decoder layer: attention and FFN with their norms (paper 2.1, Table 1)."""

from torch import nn

from minglm.model.attention import Attention
from minglm.model.layers import MLP, RMSNorm
from minglm.model.mla import LatentAttention
from minglm.model.moe import MoE


class DecoderLayer(nn.Module):
    """Attention and FFN with their norms; the FFN is dense in the first layers and a MoE after them."""

    def __init__(self, config, dense):
        super().__init__()
        D, eps = config.hidden_size, config.rms_norm_eps
        self.self_attn = LatentAttention(config) if config.kv_lora_rank else Attention(config)
        self.mlp = MLP(D, config.intermediate_size) if dense else MoE(config)
        self.input_layernorm = RMSNorm(D, eps)
        self.post_attention_layernorm = RMSNorm(D, eps)

    def forward(self, x_BSD, rotation, documents_BS=None, cache=None):
        """x (B, S, D) to (x (B, S, D), Routing or None)."""
        change_BSD = self.self_attn(self.input_layernorm(x_BSD), rotation, documents_BS, cache)
        normed_BSD, x_BSD = self.post_attention_layernorm(x_BSD, change_BSD)
        routing = None
        if isinstance(self.mlp, MoE):
            change_BSD, routing = self.mlp(
                normed_BSD, None if documents_BS is None else documents_BS >= 0
            )
        else:
            change_BSD = self.mlp(normed_BSD)
        return x_BSD + change_BSD, routing
