"""GLM-4.5: embedding, dense layers, MoE layers, final norm, output head, and the MTP layer (paper 2.1, Table 1).

    x <- x + attention(norm(x));   x <- x + ffn(norm(x));   logits = lm_head(norm(x))

Parameters carry the names of the released checkpoints (the MTP layer is layer `num_hidden_layers`), except
that each layer's experts are three stacks. The rotary base is an attribute that a training stage may change;
it has no weights.
"""

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from minglm.config import ModelConfig
from minglm.kernels.attention import Documents
from minglm.model.attention import LayerCache
from minglm.model.decoder import DecoderLayer
from minglm.model.embedding import Embedding, LMHead
from minglm.model.hf.files import HFOrigin, fill, open_folder
from minglm.model.hf.write import save
from minglm.model.layers import RMSNorm
from minglm.model.moe import MoE, Routing
from minglm.model.mtp import MTPLayer, shift
from minglm.model.parameters import TREATMENT, Initial, kind_of
from minglm.model.rope import Rotation, angles
from minglm.model.router import Router


@dataclass
class Output:
    """The result of a pass before the output head."""

    hidden_BSD: Tensor
    """States after the final norm."""
    mtp_hidden_BSD: Tensor | None = None
    """States of the MTP layer, after its norm; None for a pass without it."""
    routing: list[Routing] = field(default_factory=list)
    """One report for each MoE layer, in the order of `GLM.routers`."""


class Trunk(nn.Module):
    """Everything but the output head; exists because the checkpoints call it `model`."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.embed_tokens = Embedding(config.vocab_size, config.hidden_size)
        layers: list[DecoderLayer] = []
        for index in range(config.num_hidden_layers):
            layers.append(DecoderLayer(config, dense=index < config.first_k_dense_replace))
        if config.num_nextn_predict_layers:
            layers.append(MTPLayer(config))
        self.layers = nn.ModuleList(layers)
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)


class GLM(nn.Module):
    """The model. `GLM(config)` is initialised and ready; under `torch.device("meta")` it has shapes only."""

    def __init__(self, config: ModelConfig, seed: int = 0):
        super().__init__()
        config.check()
        self.config = config
        self.rope_theta = config.rope_theta
        # Activations and matrix products have this dtype; the weights may have another.
        self.dtype = torch.float32
        # True: keep only the input of each layer for the backward pass.
        self.recompute = False
        self.checkpoint_origin: HFOrigin | None = None
        self.model = Trunk(config)
        self.lm_head = LMHead(config.vocab_size, config.hidden_size)
        self.tie_weights()
        if self.device.type != "meta":
            initialize(self, seed)

    def tie_weights(self) -> None:
        """Give the output head the embedding's matrix, where the config ties them; again after `to_empty`, which parts them."""
        if self.config.tie_word_embeddings:
            self.lm_head.weight = self.model.embed_tokens.weight

    @classmethod
    def from_pretrained(
        cls,
        folder: str | Path,
        dtype: torch.dtype | None = None,
        device: str | torch.device = "cpu",
    ) -> "GLM":
        """Load a released checkpoint: a folder with config.json and safetensors, see `minglm.model.hf.files`.

        dtype: of all parameters, torch.float32 to train; None: as stored, and computed in. Raises ValueError,
        one line, for a folder that is not a whole checkpoint of a GLM-4.5 model.
        """
        opened = open_folder(folder)
        with torch.device("meta"):
            model = cls(opened.config)
        fill(model, opened, dtype, device)
        return model

    def save_pretrained(
        self,
        folder: str | Path,
        dtype: str | None = None,
        shard_gigabytes: float | None = None,
    ) -> None:
        """Write a released checkpoint: arguments and errors are those of `minglm.model.hf.write.save`."""
        save(self, folder, dtype, shard_gigabytes)

    @property
    def device(self) -> torch.device:
        """Return the device of the weights."""
        return self.lm_head.weight.device

    @property
    def mtp(self) -> MTPLayer | None:
        """Return the MTP layer, or None."""
        last = self.model.layers[-1]
        return last if isinstance(last, MTPLayer) else None

    def embed(self, tokens_BS: Tensor) -> Tensor:
        """Map tokens (B, S) int64 to vectors (B, S, D) in the dtype the model computes in."""
        return self.model.embed_tokens(tokens_BS).to(self.dtype)

    def rotation(self, tokens_BS: Tensor, positions_BS: Tensor | None = None) -> Rotation:
        """Compute the rotation for these positions; by default 0, 1, 2, ... in each row."""
        if positions_BS is None:
            positions_BS = torch.arange(tokens_BS.shape[1], device=tokens_BS.device)[None]
        return angles(positions_BS, self.config.rotary_dim, self.rope_theta)

    def hidden(
        self,
        tokens_BS: Tensor,
        positions_BS: Tensor | None = None,
        documents_BS: Documents | None = None,
        cache: Sequence[LayerCache] | None = None,
        mtp: bool = False,
        next_BS: Tensor | None = None,
        imposed_BSLK: Tensor | None = None,
    ) -> Output:
        """Run the trunk, and with `mtp` the MTP layer after it.

        tokens int64 (B, S); positions int64 (B, S); documents int (B, S), -1 for padding, or `SharedPrompts`. cache: one layer
        cache for each decoder layer. next int64 (B, S): the token after each position, for the MTP layer;
        None: that of the row. imposed int (B, S, L, K): experts for each MoE layer of the trunk to take, see
        `Router.impose`.
        """
        rotation = self.rotation(tokens_BS, positions_BS)
        x_BSD = self.embed(tokens_BS)
        reports: list[Routing] = []
        for index in range(self.config.num_hidden_layers):
            layer_cache = None if cache is None else cache[index]
            routed = index - self.config.first_k_dense_replace
            imposed_BSK = None
            if imposed_BSLK is not None and routed >= 0:
                imposed_BSK = imposed_BSLK[:, :, routed]
            x_BSD, routing = self.apply_layer(
                self.model.layers[index], x_BSD, rotation, documents_BS, layer_cache, imposed_BSK
            )
            if routing is not None:
                reports.append(routing)
        out = Output(self.model.norm(x_BSD), routing=reports)
        if mtp:
            next_BS = shift(tokens_BS, 1, 0) if next_BS is None else next_BS
            next_BSD = self.embed(next_BS)
            out.mtp_hidden_BSD, routing = self.apply_layer(
                self.mtp, out.hidden_BSD, next_BSD, rotation, documents_BS
            )
            if routing is not None:
                reports.append(routing)
        return out

    def apply_layer(self, layer: nn.Module | None, *arguments: Any) -> Any:
        """Call a layer; with `recompute`, keep only its input and compute the rest again in the backward pass.

        The routing that is returned is that of the first time, so no token is counted twice. Raises
        ValueError where there is no layer: a pass with `mtp` through a model without an MTP layer.
        """
        if layer is None:
            raise ValueError("this model has no MTP layer (num_nextn_predict_layers = 0)")
        if self.recompute and torch.is_grad_enabled():
            return checkpoint(layer, *arguments, use_reentrant=False, preserve_rng_state=False)
        return layer(*arguments)

    def compile_layers(self, **options: Any) -> None:
        """torch.compile each decoder layer in place; names of parameters stay. options: those of torch.compile."""
        for layer in self.model.layers:
            layer.compile(**options)

    def forward(
        self,
        tokens_BS: Tensor,
        positions_BS: Tensor | None = None,
        documents_BS: Tensor | None = None,
        cache: Sequence[LayerCache] | None = None,
    ) -> Tensor:
        """Map tokens int64 (B, S) to logits (B, S, V) of the next token; other arguments as in `hidden`."""
        hidden_BSD = self.hidden(tokens_BS, positions_BS, documents_BS, cache).hidden_BSD
        return self.lm_head(hidden_BSD)

    def routers(self) -> list[Router]:
        """Return the routers in layer order, the MTP layer's last: the order of `Output.routing` of a pass with `mtp`."""
        return [module.gate for module in self.modules() if isinstance(module, MoE)]

    def router_numbers(self) -> list[int]:
        """Return the numbers of `routers` among those of the whole model; a stage of a pipeline has some of them."""
        return list(range(len(self.routers())))


class Part(NamedTuple):
    """The part of a tensor that this process holds."""

    values: Tensor
    """The part itself."""
    where: tuple[slice, ...]
    """What it is of the whole tensor: a slice for each axis."""


def whole(tensor: Tensor) -> Part:
    """Return a tensor of which this process holds everything."""
    return Part(tensor, tuple(slice(0, size) for size in tensor.shape))


@torch.no_grad()
def initialize(model: GLM, seed: int = 0, own_part: Callable[[Tensor], Part] = whole) -> None:
    """Set every parameter and buffer to its initial value, by the table of `minglm.model.parameters`.

    Each matrix, also each of a stack, draws from its own generator, on the CPU: a process that holds a part
    of the weights has the values that one with all of them has there. own_part: the part of a tensor that is
    in this process. Safe for a model built on the meta device and then materialised with `to_empty`. Raises
    ValueError for a tensor without a row in the table.
    """
    named = list(model.named_parameters()) + list(model.named_buffers())
    for name, tensor in named:
        kind = kind_of(name)
        if kind is None:
            raise ValueError(f"{name}: add a row to the table in minglm/model/parameters.py")
        initial = TREATMENT[kind].initial
        part = own_part(tensor)
        if initial == Initial.ZERO:
            part.values.zero_()
        elif initial == Initial.ONE:
            part.values.fill_(1.0)
        elif tensor.ndim == 3:
            numbers = range(*part.where[0].indices(len(tensor)))
            for matrix, number in zip(part.values, numbers, strict=True):
                drawn = normal_matrix(model.config, f"{seed} {name} {number}", tensor.shape[1:])
                matrix.copy_(drawn[part.where[1:]])
        else:
            drawn = normal_matrix(model.config, f"{seed} {name}", tensor.shape)
            part.values.copy_(drawn[part.where])


def normal_matrix(config: ModelConfig, key: str, shape: torch.Size) -> Tensor:
    """Draw initial values, float32 on the CPU, from a generator that depends on the key alone."""
    digest = hashlib.blake2b(key.encode(), digest_size=7).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest, "little"))
    matrix = torch.empty(shape, device="cpu")
    return matrix.normal_(0.0, config.initializer_range, generator=generator)
