"""Decoder passes in C over the paged cache, for float32 models that generate on a CPU (no section in the paper).

    PagedCache    PyTorch or Triton: a pass is the model's own forward, each layer with its pages as the cache
    CpuDecoder    `minglm/kernels/cpu/decoder.c`: a pass is one call; the same numbers, up to rounding

The weights are packed: a matrix (outputs, inputs) becomes (outputs / lanes, inputs, lanes). A vector holds as many
outputs as the processor takes at once, so each number of a token is multiplied by one vector after the other. Keys are
in their block as (A, slots), so that a vector holds one number of each of the slots, and values as (slots, A). The
packed weights are a copy, made again whenever the model's own have changed: float32 models that generate on a CPU are
small.

In C, every number of a token depends on its own text and on nothing else in the pass, so an answer has the same bits
alone, in any batch, with any number of threads, and however its prompt was cut.
"""

import ctypes
from collections.abc import Sequence
from typing import cast

import torch
import torch.nn.functional as F

from minglm.common.threads import threads_in_use
from minglm.inference.pages import LayerPages, PagedCache, Span, integers
from minglm.kernels.cpu.build import address, lanes, loaded_library
from minglm.model.attention import Attention
from minglm.model.decoder import DecoderLayer
from minglm.model.layers import RMSNorm
from minglm.model.moe import MoE
from minglm.model.rope import Rotation

CHUNK = 64
"""Rows of a product together, as in decoder.c."""

MIN_TOKENS_PER_THREAD = 8
"""Tokens below which a thread of their own does not pay."""


def fields(c_type: type, names: str) -> list[tuple[str, type]]:
    """Return members of a structure, all of one type."""
    return [(name, c_type) for name in names.split()]


class Layer(ctypes.Structure):
    """A decoder layer, as in decoder.c: pointers, null where the model has none, and the width of the dense MLP."""

    _fields_ = [
        *fields(ctypes.c_void_p, "input_norm qkv qkv_bias q_norm k_norm o post_norm"),
        *fields(ctypes.c_void_p, "router router_bias gate_up down"),
        *fields(ctypes.c_void_p, "dense_gate_up dense_down store"),
        *fields(ctypes.c_long, "dense"),
    ]


class Pass(ctypes.Structure):
    """What one call computes, as in decoder.c."""

    _fields_ = [
        *fields(ctypes.c_void_p, "layers x cosine sine positions rows tables norm head"),
        *fields(ctypes.c_void_p, "wanted logits scratch chosen"),
        *fields(ctypes.c_long, "layer_count T D N M A half blocks size first"),
        *fields(ctypes.c_long, "E K F normalize logit_rows V L"),
        *fields(ctypes.c_long, "threads per_token per_thread"),
        *fields(ctypes.c_float, "eps scale"),
        *fields(ctypes.c_long, "ready arrived"),
    ]


def whole(count: int) -> int:
    """Round a number of floats up to whole vectors."""
    return -(-count // lanes()) * lanes()


def pack(matrix: torch.Tensor) -> torch.Tensor:
    """Pack (..., outputs, inputs) to (..., outputs / lanes, inputs, lanes) float32, with zeros after the last output."""
    outputs = matrix.shape[-2]
    matrix = F.pad(matrix.float(), (0, 0, 0, whole(outputs) - outputs))
    return matrix.unflatten(-2, (-1, lanes())).transpose(-1, -2).contiguous()


def pack_both(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    """Pack two matrices (..., outputs, inputs) as one, the second beginning with a vector of its own."""
    outputs = gate.shape[-2]
    padding = (0, 0, 0, whole(outputs) - outputs)
    return pack(torch.cat((F.pad(gate, padding), F.pad(up, padding)), -2))


class Packed:
    """Decoder layers as C reads them, with the norm after them and, if there is one, the output head."""

    def __init__(
        self, layers: Sequence[DecoderLayer], norm: RMSNorm, head: torch.Tensor | None = None
    ) -> None:
        self.tensors = [self._tensors(layer) for layer in layers]
        self.norm: torch.Tensor = norm.weight.float()
        self.head = None if head is None else pack(head)
        self.layers = (Layer * len(layers))()
        for struct, tensors in zip(self.layers, self.tensors, strict=True):
            for name, tensor in tensors.items():
                setattr(struct, name, address(tensor))
            if "dense_down" in tensors:
                struct.dense = tensors["dense_down"].shape[-2]
        self.widest: int = max([struct.dense for struct in self.layers], default=0)

    @staticmethod
    def _tensors(layer: DecoderLayer) -> dict[str, torch.Tensor]:
        """Return the packed weights of a layer by their names in `Layer`."""
        attention = layer.self_attn
        assert isinstance(attention, Attention), "the C decoder does not know latent attention"
        projections = (attention.q_proj, attention.k_proj, attention.v_proj)
        tensors = {
            "input_norm": layer.input_layernorm.weight,
            "qkv": pack(torch.cat([projection.weight for projection in projections])),
            "o": pack(attention.o_proj.weight),
            "post_norm": layer.post_attention_layernorm.weight,
        }
        # All three have a bias, or none.
        biases: list[torch.Tensor] = [p.bias for p in projections if p.bias is not None]
        if biases:
            tensors["qkv_bias"] = torch.cat(biases)
        if attention.q_norm is not None and attention.k_norm is not None:
            tensors["q_norm"] = attention.q_norm.weight
            tensors["k_norm"] = attention.k_norm.weight
        mlp = layer.mlp
        if isinstance(mlp, MoE):
            experts = mlp.experts
            tensors["router"] = pack(mlp.gate.weight)
            tensors["router_bias"] = mlp.gate.e_score_correction_bias
            tensors["gate_up"] = pack_both(experts.gate_EFD, experts.up_EFD)
            tensors["down"] = pack(experts.down_EDF)
            mlp = mlp.shared_experts
        if mlp is not None:
            tensors["dense_gate_up"] = pack_both(mlp.gate_proj.weight, mlp.up_proj.weight)
            tensors["dense_down"] = pack(mlp.down_proj.weight)
        return {name: tensor.contiguous() for name, tensor in tensors.items()}


class CpuDecoder(PagedCache):
    """A `PagedCache` whose passes run in C, for a model that `minglm.inference.pages.is_plain` accepts."""

    same_bits_in_any_batch = True

    def store(self) -> torch.Tensor:
        """Allocate the blocks of one layer: (blocks, M, values (size, A) and then keys (A, whole size))."""
        _, M, size, A = self.shape
        return self._zeros(M, A * (size + whole(size)))

    def read_weights(self) -> None:
        """Pack the weights as they are now."""
        model = self.model
        none = torch.empty(1, 0, 1, 0)
        self.rotation = Rotation(none, none)  # until the first pass
        layers = cast(list[DecoderLayer], list(model.model.layers))
        trunk = layers[: model.config.num_hidden_layers]  # without the MTP layer
        self.packed = Packed(trunk, model.model.norm, model.lm_head.weight)
        self.packed_mtp: Packed | None = None
        if self.states is not None:
            assert model.mtp is not None, "drafts need an MTP layer"
            self.packed_mtp = Packed([model.mtp], cast(RMSNorm, model.mtp.shared_head["norm"]))

    def trunk(
        self, rows: Sequence[Span], tokens: Sequence[int], wanted: Sequence[int]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Run the decoder layers; arguments and results as those of `PagedCache.trunk`, all float32."""
        tokens_T = integers(tokens, self.device)
        x_TD = self.model.embed(tokens_T)
        chosen_TLK = None
        if self.choices is not None:
            chosen_TLK = torch.zeros(len(tokens), *self.choices.shape[2:], dtype=torch.int64)
        result = self._run(self.packed, self.layers, rows, tokens_T, x_TD, wanted, chosen_TLK)
        if chosen_TLK is not None:
            self.keep_choices(rows, chosen_TLK)
        return result

    def mtp(
        self, rows: Sequence[Span], tokens: Sequence[int], states_TD: torch.Tensor
    ) -> torch.Tensor:
        """Run the MTP layer; arguments and result as those of `PagedCache.mtp`, all float32."""
        assert self.packed_mtp is not None and self.mtp_layer is not None
        assert self.model.mtp is not None, "drafts need an MTP layer"
        tokens_T = integers(tokens, self.device)
        x_TD = self.model.mtp.join(states_TD, self.model.embed(tokens_T))
        states_TD, _ = self._run(self.packed_mtp, [self.mtp_layer], rows, tokens_T, x_TD, [])
        return states_TD

    def _rotation(self, positions: int) -> Rotation:
        """Return the rotation of at least the first `positions` positions, kept from pass to pass."""
        if positions > self.rotation.cos.shape[1]:
            positions_S = torch.arange(2 * positions, device=self.device)
            self.rotation = self.model.rotation(positions_S[None], positions_S[None])
        return self.rotation

    def _run(
        self,
        packed: Packed,
        pages: Sequence[LayerPages],
        rows: Sequence[Span],
        tokens_T: torch.Tensor,
        x_TD: torch.Tensor,
        wanted: Sequence[int],
        chosen_TLK: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Call C once; x (T, D) is overwritten by the states, and chosen int64 (T, L, K) by the experts of each token."""
        c = self.model.config
        T, D = x_TD.shape
        _, M, size, A = self.shape
        N = c.num_attention_heads
        E = c.n_routed_experts
        K = c.num_experts_per_tok

        # The position and the row of the tables for each token, and the blocks of each row, padded with block 0.
        positions: list[int] = []
        table_rows: list[int] = []
        tables: list[int] = []
        longest = max(row.stop for row in rows)
        blocks = (longest - 1) // size + 1
        for index, row in enumerate(rows):
            start = row.start
            stop = row.stop
            positions += range(start, stop)
            table_rows += [index] * (stop - start)
            used = row.table.blocks
            tables += used[:blocks]
            tables += [0] * (blocks - len(used))
        # One tensor for all four: a small tensor costs as much as a large one.
        numbers = integers([*positions, *table_rows, *wanted, *tables], self.device)
        positions_T, table_rows_T, wanted_R, tables_RB = numbers.split(
            (T, T, len(wanted), len(tables))
        )
        cosine, sine = self._rotation(longest)
        logits_RV = x_TD.new_empty(len(wanted), c.vocab_size)

        # Scratch memory: for each token the parts of its layer, for each thread its scores or its hidden rows, and a
        # vector for each part to begin with.
        threads = max(1, min(threads_in_use(), T // MIN_TOKENS_PER_THREAD))
        per_token = whole(D + (2 * N + 2 * M) * A + whole(E) + 5 * K)
        scores = 4 * (blocks * whole(size) + whole(1))
        hidden = 2 * CHUNK * whole(max(c.moe_intermediate_size, packed.widest))
        per_thread = max(scores, hidden) + 8 * whole(1)
        scratch = x_TD.new_empty(T * per_token + threads * per_thread)

        for struct, layer_pages in zip(packed.layers, pages, strict=True):
            struct.store = address(layer_pages.store)
        call = Pass(
            layers=ctypes.addressof(packed.layers),
            x=address(x_TD),
            cosine=address(cosine),
            sine=address(sine),
            positions=address(positions_T),
            rows=address(table_rows_T),
            tables=address(tables_RB),
            norm=address(packed.norm),
            head=address(packed.head),
            wanted=address(wanted_R),
            logits=address(logits_RV),
            scratch=address(scratch),
            chosen=address(chosen_TLK),
            layer_count=len(packed.layers),
            T=T,
            D=D,
            N=N,
            M=M,
            A=A,
            half=cosine.shape[-1],
            blocks=blocks,
            size=size,
            first=pages[0].first,
            E=E,
            K=K,
            F=c.moe_intermediate_size,
            normalize=c.norm_topk_prob,
            logit_rows=len(wanted),
            V=c.vocab_size,
            L=0 if chosen_TLK is None else chosen_TLK.shape[1],
            threads=threads,
            per_token=per_token,
            per_thread=per_thread,
            eps=c.rms_norm_eps,
            scale=c.routed_scaling_factor,
        )
        loaded_library().decode(ctypes.byref(call))
        return x_TD, logits_RV
