"""The paged cache of a model that generates on a CPU in float32: a pass is one call of C (no section in the paper).

    Pages       PyTorch or Triton: a pass is the model's own forward, each layer with its pages as the cache
    PagesInC    `minglm/kernels/cpu/decoder.c`: the same numbers, up to rounding, from the same weights, packed anew

A packed matrix (outputs, inputs) is (outputs / lanes, inputs, lanes): a vector holds as many outputs as the processor
takes at once, so each number of a token is multiplied with one vector after the other. Keys lie in their block as
(A, slots), so that a vector holds one number of each of the slots, and values as (slots, A). The packed weights are a
copy, made again whenever the model's own have changed: float32 models that generate on a CPU are small.

In C, every number of a token depends on its own text and on nothing else in the pass, so an answer has the same bits
alone, in any batch, with any number of threads, and however its prompt was cut.
"""

import ctypes

import torch
import torch.nn.functional as F

from minglm.common.threads import threads_in_use
from minglm.inference.pages import Pages, integers
from minglm.kernels.attention.eager import flash_attention
from minglm.kernels.cpu import build
from minglm.kernels.dispatch import backend
from minglm.kernels.experts.eager import grouped_experts
from minglm.model.moe import LocalDispatcher, MoE

CHUNK = 64  # rows of a product at once, as in the source
FEW = 8  # tokens, below which a thread of their own does not pay


def fields(kind, names):
    """Members of a structure, all of one kind."""
    return [(name, kind) for name in names.split()]


class Layer(ctypes.Structure):
    """A decoder layer, as in the source: pointers, null where the model has none, and the width without experts."""

    _fields_ = [
        *fields(
            ctypes.c_void_p,
            "input_norm qkv qkv_bias q_norm k_norm o post_norm router router_bias gate_up down",
        ),
        *fields(ctypes.c_void_p, "dense_gate_up dense_down store"),
        *fields(ctypes.c_long, "dense"),
    ]


class Pass(ctypes.Structure):
    """What one call computes, as in the source."""

    _fields_ = [
        *fields(
            ctypes.c_void_p,
            "layers x cosine sine positions rows tables norm head wanted logits scratch",
        ),
        *fields(
            ctypes.c_long,
            "layer_count T D N M A half blocks size first E K F normalize logit_rows V",
        ),
        *fields(ctypes.c_long, "threads per_token per_thread"),
        *fields(ctypes.c_float, "eps scale"),
        *fields(ctypes.c_long, "ready arrived"),
    ]


def whole(count):
    """So many numbers filled up to whole vectors."""
    return -(-count // build.lanes()) * build.lanes()


def pack(matrix):
    """(..., outputs, inputs) to (..., outputs / lanes, inputs, lanes), with zeros after the last output."""
    matrix = F.pad(matrix.float(), (0, 0, 0, whole(matrix.shape[-2]) - matrix.shape[-2]))
    return matrix.unflatten(-2, (-1, build.lanes())).transpose(-1, -2).contiguous()


def pack_both(gate, up):
    """Two matrices as one, the second beginning with a vector of its own."""
    filled = (0, 0, 0, whole(gate.shape[-2]) - gate.shape[-2])
    return pack(torch.cat((F.pad(gate, filled), F.pad(up, filled)), -2))


class Packed:
    """Decoder layers as C reads them, with the norm after them and, if there is one, the output head."""

    def __init__(self, layers, norm, head=None):
        self.tensors = [self._tensors(layer) for layer in layers]
        self.norm, self.head = norm.weight.float(), None if head is None else pack(head)
        self.layers = (Layer * len(layers))()
        for place, tensors in zip(self.layers, self.tensors):
            for name, tensor in tensors.items():
                setattr(place, name, build.at(tensor))
            if "dense_down" in tensors:
                place.dense = tensors["dense_down"].shape[-2]
        self.widest = max([place.dense for place in self.layers], default=0)

    @staticmethod
    def _tensors(layer):
        a, mlp = layer.self_attn, layer.mlp
        parts = a.q_proj, a.k_proj, a.v_proj
        found = {
            "input_norm": layer.input_layernorm.weight,
            "qkv": pack(torch.cat([part.weight for part in parts])),
            "o": pack(a.o_proj.weight),
            "post_norm": layer.post_attention_layernorm.weight,
        }
        if a.q_proj.bias is not None:
            found["qkv_bias"] = torch.cat([part.bias for part in parts])
        if a.q_norm is not None:
            found |= {"q_norm": a.q_norm.weight, "k_norm": a.k_norm.weight}
        if isinstance(mlp, MoE):
            e = mlp.experts
            found |= {
                "router": pack(mlp.gate.weight),
                "router_bias": mlp.gate.e_score_correction_bias,
            }
            found |= {"gate_up": pack_both(e.gate_EFD, e.up_EFD), "down": pack(e.down_EDF)}
            mlp = mlp.shared_experts
        if mlp is not None:
            found["dense_gate_up"] = pack_both(mlp.gate_proj.weight, mlp.up_proj.weight)
            found["dense_down"] = pack(mlp.down_proj.weight)
        return {name: tensor.contiguous() for name, tensor in found.items()}


class PagesInC(Pages):
    """`Pages` for a model that `serves` says yes to."""

    @staticmethod
    def serves(model):
        """Whether C can run this model here, and as it is: grouped-query attention, one group of experts, no hooks."""
        c, layers = model.config, model.model.layers
        plain = not c.kv_lora_rank and c.n_group == 1 and model.dtype == torch.float32
        return (
            plain
            and backend(model.lm_head.weight) == "c"
            and all(layer.self_attn.attend is flash_attention for layer in layers)
            and all(
                type(layer.mlp.dispatcher) is LocalDispatcher
                and layer.mlp.experts.operation is grouped_experts
                for layer in layers
                if isinstance(layer.mlp, MoE)
            )
        )

    def store(self):
        """Of one layer: (blocks, M, values (size, A) and then keys (A, whole size))."""
        _, M, size, A = self.shape
        return self._zeros(M, A * (size + whole(size)))

    def read_weights(self):
        """Pack the weights as they are now."""
        model, c = self.model, self.model.config
        self.packed = Packed(
            model.model.layers[: c.num_hidden_layers], model.model.norm, model.lm_head.weight
        )
        self.packed_mtp = None
        if self.states is not None:
            self.packed_mtp = Packed([model.mtp], model.mtp.shared_head["norm"])

    def trunk(self, rows, tokens, wanted):
        """As in `Pages`."""
        tokens_T = integers(tokens, self.device)
        return self._run(
            self.packed,
            self[: len(self.packed.layers)],
            rows,
            tokens_T,
            self.model.embed(tokens_T),
            wanted,
        )

    def mtp(self, rows, tokens, states_TD):
        """As in `Pages`."""
        tokens_T = integers(tokens, self.device)
        x_TD = self.model.mtp.join(states_TD, self.model.embed(tokens_T))
        return self._run(self.packed_mtp, self[-1:], rows, tokens_T, x_TD, [], first=1)[0]

    def _run(self, packed, pages, rows, tokens_T, x_TD, wanted, first=0):
        c, (T, D), (_, M, size, A) = self.model.config, x_TD.shape, self.shape
        N, E, K, F_ = (
            c.num_attention_heads,
            c.n_routed_experts,
            c.num_experts_per_tok,
            c.moe_intermediate_size,
        )
        positions, places, tables = [], [], []
        widest = (max(row.stop for row in rows) - 1) // size + 1
        for place, row in enumerate(rows):
            start, stop = row.start, row.stop
            positions += range(start, stop)
            places += [place] * (stop - start)
            blocks = row.table.blocks[:widest]
            tables += blocks + [0] * (widest - len(blocks))
        numbers = integers(positions + places + wanted + tables, self.device)
        positions_T, places_T, wanted, tables = numbers.split((T, T, len(wanted), len(tables)))
        cosine, sine = self.model.rotation(tokens_T[None], positions_T[None])
        logits = x_TD.new_empty(len(wanted), c.vocab_size)
        threads = max(1, min(threads_in_use(), T // FEW))
        per_token = whole(D + (2 * N + 2 * M) * A + whole(E) + 5 * K)
        scores, hidden = (
            4 * (widest * whole(size) + whole(1)),
            2 * CHUNK * whole(max(F_, packed.widest)),
        )
        per_thread = max(scores, hidden) + 8 * whole(1)  # each part begins with a vector of its own
        scratch = x_TD.new_empty(T * per_token + threads * per_thread)
        for layer, of_layer in zip(packed.layers, pages):
            layer.store = build.at(of_layer.store)
        call = Pass(
            ctypes.addressof(packed.layers),
            *map(
                build.at,
                (
                    x_TD,
                    cosine,
                    sine,
                    positions_T,
                    places_T,
                    tables,
                    packed.norm,
                    packed.head,
                    wanted,
                    logits,
                ),
            ),
            *(
                build.at(scratch),
                len(packed.layers),
                T,
                D,
                N,
                M,
                A,
                cosine.shape[-1],
                widest,
                size,
                first,
                E,
                K,
                F_,
            ),
            *(c.norm_topk_prob, len(wanted), c.vocab_size, threads, per_token, per_thread),
            *(c.rms_norm_eps, c.routed_scaling_factor),
        )
        build.library().decode(ctypes.byref(call))
        return x_TD, logits
