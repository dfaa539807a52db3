"""GLM-4.5: embedding, dense layers, MoE layers, final norm, output head, and the MTP layer (paper 2.1, Table 1).

    x <- x + attention(norm(x));   x <- x + ffn(norm(x));   logits = lm_head(norm(x))

Two norms per layer, before the attention and before the FFN. Parameters carry the names of the released checkpoints
(the MTP layer is layer `num_hidden_layers`), except that each layer's experts are three stacks. The rotary base is an
attribute that a training stage may change; it has no weights.
"""

from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from minglm.model.decoder import DecoderLayer
from minglm.model.hf.files import fill, open_folder, save
from minglm.model.layers import RMSNorm
from minglm.model.moe import MoE, Routing
from minglm.model.mtp import MTPLayer, shift
from minglm.model.rope import angles


@dataclass
class Output:
    """A training pass: states after the final norm, those of the MTP layer (or None), and each MoE layer's routing."""

    hidden_BSD: torch.Tensor
    mtp_hidden_BSD: torch.Tensor | None = None
    routing: list[Routing] = field(default_factory=list)


class Trunk(nn.Module):
    """Everything but the output head; exists because the checkpoints call it `model`."""

    def __init__(self, config):
        super().__init__()
        self.embed_tokens = nn.Module()
        self.embed_tokens.weight = nn.Parameter(torch.empty(config.vocab_size, config.hidden_size))
        layers = [
            DecoderLayer(config, i < config.first_k_dense_replace)
            for i in range(config.num_hidden_layers)
        ]
        if config.num_nextn_predict_layers:
            layers.append(MTPLayer(config, DecoderLayer(config, dense=False)))
        self.layers = nn.ModuleList(layers)
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)


class GLM(nn.Module):
    """The model. `GLM(config)` is initialised and ready; under `torch.device("meta")` it only has shapes."""

    def __init__(self, config, seed=0):
        super().__init__()
        config.check()
        self.config = config
        self.rope_theta = config.rope_theta
        self.dtype = torch.float32
        self.recompute = False
        self.checkpoint_origin = None
        self.model = Trunk(config)
        self.lm_head = nn.Module()
        tied = config.tie_word_embeddings
        self.lm_head.weight = (
            self.model.embed_tokens.weight
            if tied
            else nn.Parameter(torch.empty(config.vocab_size, config.hidden_size))
        )
        if self.lm_head.weight.device.type != "meta":
            initialize(self, seed)

    @classmethod
    def from_pretrained(cls, folder, dtype=None, device="cpu"):
        """The model of a released checkpoint: a folder with config.json and safetensors, see `minglm.model.hf.files`.

        dtype: of all parameters, torch.float32 to train; None: as stored, and computed in. Raises ValueError, one line,
        for a folder that is not a whole checkpoint of a GLM-4.5 model.
        """
        config, files, values = open_folder(folder)
        with torch.device("meta"):
            model = cls(config)
        fill(model, files, values, dtype, device)
        return model

    def save_pretrained(self, folder, dtype=None, shard_gigabytes=5.0):
        """Write a released checkpoint: arguments and errors are those of `minglm.model.hf.files.save`."""
        save(self, folder, dtype, shard_gigabytes)

    @property
    def mtp(self):
        """The MTP layer, or None."""
        return self.model.layers[-1] if self.config.num_nextn_predict_layers else None

    def embed(self, tokens_BS):
        """(B, S) int64 to (B, S, D) in the dtype the model computes in."""
        return F.embedding(tokens_BS, self.model.embed_tokens.weight).to(self.dtype)

    def rotation(self, tokens_BS, positions_BS=None):
        """cos and sin for these positions; by default 0, 1, 2, ... in each row."""
        if positions_BS is None:
            positions_BS = torch.arange(tokens_BS.shape[1], device=tokens_BS.device)[None]
        return angles(positions_BS, self.config.rotary_dim, self.rope_theta)

    def hidden(self, tokens_BS, positions_BS=None, documents_BS=None, cache=None, mtp=False):
        """Run the trunk, and with `mtp` the MTP layer on top of it.

        tokens int64 (B, S); positions int64 (B, S); documents int (B, S), -1 for padding. cache: a list with one
        layer cache per decoder layer. Returns an `Output`.
        """
        rotation = self.rotation(tokens_BS, positions_BS)
        x_BSD = self.embed(tokens_BS)
        out = Output(x_BSD)
        for i, layer in enumerate(self.model.layers[: self.config.num_hidden_layers]):
            x_BSD, routing = self.apply_layer(
                layer, x_BSD, rotation, documents_BS, None if cache is None else cache[i]
            )
            if routing is not None:
                out.routing.append(routing)
        out.hidden_BSD = self.model.norm(x_BSD)
        if mtp:
            ahead_BSD = self.embed(shift(tokens_BS, 1, 0))
            out.mtp_hidden_BSD, routing = self.apply_layer(
                self.mtp, out.hidden_BSD, ahead_BSD, rotation, documents_BS
            )
            out.routing.append(routing)
        return out

    def apply_layer(self, layer, *arguments):
        """Apply a layer; with `recompute`, keep only its input, and compute the rest again in the backward pass.

        The loads of its router are those of the first time: they are returned, not counted.
        """
        if self.recompute and torch.is_grad_enabled():
            return checkpoint(layer, *arguments, use_reentrant=False, preserve_rng_state=False)
        return layer(*arguments)

    def compile_layers(self, **options):
        """torch.compile each decoder layer in place; names of parameters stay. options: those of torch.compile."""
        for layer in self.model.layers:
            layer.compile(**options)

    def head(self, hidden):
        """(..., D) to logits (..., V)."""
        return F.linear(hidden, self.lm_head.weight.to(hidden.dtype))

    def forward(self, tokens_BS, positions_BS=None, documents_BS=None, cache=None):
        """tokens int64 (B, S) to logits (B, S, V) of the next token; other arguments as in `hidden`."""
        return self.head(self.hidden(tokens_BS, positions_BS, documents_BS, cache).hidden_BSD)

    def routers(self):
        """The routers in layer order, the MTP layer's last: the order of `Output.routing` of a pass with `mtp`."""
        return [layer.mlp.gate for layer in self.model.layers if isinstance(layer.mlp, MoE)]


@torch.no_grad()
def initialize(model, seed=0):
    """Set every value, from one table; each tensor draws from a generator of its own, so names fix values.

        matrices, embedding, output head    normal, standard deviation initializer_range
        norm weights                        1
        biases, router selection bias       0

    Safe for a model built on the meta device and then materialised with `to_empty`.
    """
    named = list(model.named_parameters()) + list(model.named_buffers())
    for index, (name, tensor) in enumerate(named):
        if name.endswith("bias"):
            tensor.zero_()
        elif "norm" in name:
            tensor.fill_(1.0)
        else:
            generator = torch.Generator(tensor.device).manual_seed(seed * 1_000_003 + index)
            tensor.normal_(0.0, model.config.initializer_range, generator=generator)
