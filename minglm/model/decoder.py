"""One decoder layer: attention and FFN, each with its norm (paper 2.1, Table 1).

    x <- x + attention(norm(x));   x <- x + ffn(norm(x))

The FFN is dense in the first layers and a MoE after them.
"""

from torch import Tensor, nn

from minglm.config import ModelConfig
from minglm.kernels.attention import Documents
from minglm.model.attention import Attention, LayerCache
from minglm.model.layers import MLP, RMSNorm
from minglm.model.mla import LatentAttention
from minglm.model.moe import MoE, Routing
from minglm.model.rope import Rotation


class DecoderLayer(nn.Module):
    """Attention and FFN with their norms; parameter names are those of the released checkpoints."""

    def __init__(self, config: ModelConfig, dense: bool):
        super().__init__()
        D = config.hidden_size
        eps = config.rms_norm_eps
        self.self_attn = LatentAttention(config) if config.kv_lora_rank else Attention(config)
        self.mlp = MLP(D, config.intermediate_size) if dense else MoE(config)
        self.input_layernorm = RMSNorm(D, eps)
        self.post_attention_layernorm = RMSNorm(D, eps)

    def forward(
        self,
        x_BSD: Tensor,
        rotation: Rotation,
        documents_BS: Documents | None = None,
        cache: LayerCache | None = None,
        imposed_BSK: Tensor | None = None,
    ) -> tuple[Tensor, Routing | None]:
        """Map x (B, S, D) to (x (B, S, D), the `Routing` of a MoE layer or None).

        Arguments are those of `Attention.forward`, and imposed experts for a MoE layer.
        """
        change_BSD = self.self_attn(self.input_layernorm(x_BSD), rotation, documents_BS, cache)
        # The second norm adds the attention's change to x itself, in one operation.
        normed_BSD, x_BSD = self.post_attention_layernorm(x_BSD, change_BSD)
        if not isinstance(self.mlp, MoE):
            return x_BSD + self.mlp(normed_BSD), None
        valid_BS = documents_BS >= 0 if isinstance(documents_BS, Tensor) else None
        change_BSD, routing = self.mlp(normed_BSD, valid_BS, imposed_BSK)
        return x_BSD + change_BSD, routing
