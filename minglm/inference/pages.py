"""The tensors of the paged cache, and what one forward pass sees of them (no section in the paper).

A pass computes T tokens of any number of sequences as one row of T: the whole of a prompt, the next token of an
answer, a token and the drafts after it. Linear layers and experts see T tokens without padding; only attention sorts
them by sequence. All rows write their keys and values before any row reads, so a prompt may begin with blocks that
another one fills in the same pass.
"""

from array import array
from itertools import groupby

import torch

from minglm.kernels.attention.eager import WIDEST
from minglm.kernels.attention.paged import paged_attention, slot_mask
from minglm.kernels.dispatch import backend


class LayerPages:
    """Keys and values of one layer: (blocks, 2, M, size, A), keys first. `plan` is the pass in progress.

    With latent attention there are no values: (blocks, 1, 1, size, L + R), see `minglm.model.mla`.
    """

    def __init__(self, store, size, first=0):
        self.store, self.size, self.first, self.plan = store, size, first, None

    def attend(self, q_BSNA, k_BSMA, v_BSMA):
        """Write k, v (1, T, M, A) to their slots, then attend q (1, T, N, A) over all slots of each sequence.

        v may be None: then keys serve as values.
        """
        A, plan = q_BSNA.shape[3], self.plan
        new = k_BSMA[0] if v_BSMA is None else torch.cat((k_BSMA[0], v_BSMA[0]), 1)
        self.store.view(-1, A).index_copy_(0, plan.written, new.reshape(-1, A))
        if len(plan.groups) == 1:
            q = q_BSNA.view(*plan.groups[0][1].shape, *q_BSNA.shape[2:])
            return self.read(0, q).reshape(q_BSNA.shape)
        out, sizes = [], [positions_BS.numel() for _, positions_BS in plan.groups]
        for i, q in enumerate(q_BSNA[0].split(sizes)):
            out.append(self.read(i, q.unflatten(0, plan.groups[i][1].shape)).flatten(0, 1))
        return torch.cat(out)[None]

    def read(self, group, q_BSNA):
        """Attend q over what is stored for a group of rows, in the form that `minglm.kernels.dispatch` chooses."""
        rows, positions_BS = self.plan.groups[group]
        if q_BSNA.shape[3] <= WIDEST and backend(q_BSNA) == "triton":
            from minglm.kernels.attention.triton_paged import paged_attention_triton

            return paged_attention_triton(q_BSNA, self.store, rows, positions_BS, self.first)
        return paged_attention(q_BSNA, self.store, rows, self.mask(group, q_BSNA))

    def mask(self, group, q_BSNA):
        """The mask of a group of rows, made once for all layers."""
        key, (rows, positions_BS) = (group, self.first), self.plan.groups[group]
        if key not in self.plan.masks:
            parts, M, size = self.store.shape[1:4]
            slots = rows.numel() // (parts * M * len(positions_BS)) * size
            self.plan.masks[key] = slot_mask(
                positions_BS, slots, q_BSNA.shape[2] // M, q_BSNA.dtype, self.first
            )
        return self.plan.masks[key]


def integers(values, device):
    """A list as an int64 tensor; from an array, because a list takes PyTorch as long as a layer."""
    return torch.frombuffer(array("q", values), dtype=torch.int64).to(device)


class Plan:
    """One pass: which rows of the stores it writes and reads. Texts of equal length, next to each other, are a group.

    written: for each token, part (keys, values) and head, the row of the store seen as (blocks * parts * M * size, A).
    groups: (rows of the store seen as (blocks * parts * M, size * A), in order of (parts, B, M, blocks of a text);
    positions (B, S)).
    """

    def __init__(self, rows, shape, device):
        parts, heads, size, _ = shape
        slots, positions, self.groups, self.masks = [], [], [], {}
        spans = [(row.table.blocks, row.start, row.stop) for row in rows]
        for blocks, start, stop in spans:
            positions += range(start, stop)
            slots += [
                blocks[p // size] * (parts * heads * size) + p % size for p in range(start, stop)
            ]
        slots_T, self.positions_T = integers(slots + positions, device).view(2, -1)
        head = torch.arange(parts * heads, device=device)
        self.written = (slots_T[:, None] + head * size).flatten()
        at = 0
        for count, group in groupby(spans, key=lambda span: span[2] - span[1]):
            group = [(blocks, (stop - 1) // size + 1) for blocks, _, stop in group]
            widest = max(used for _, used in group)
            tables = []
            for blocks, used in group:
                tables += blocks[:used]
                tables += [0] * (widest - used)
            tables = integers(tables, device).view(-1, 1, widest) * (parts * heads)
            read = tables + head.view(parts, 1, heads, 1)
            end = at + count * len(group)
            self.groups.append((read.flatten(), self.positions_T[at:end].view(-1, count)))
            at = end


class Pages(list):
    """One `LayerPages` for each decoder layer; with drafts one for the MTP layer, and the state after each token."""

    def __init__(self, model, size=16, drafts=False, blocks=64):
        c = model.config
        self.model, self.dtype, self.device = model, model.dtype, model.device
        parts, heads, width = c.cache_shape
        self.shape, self.blocks, self.size = (parts, heads, size, width), blocks, size
        super().__init__(LayerPages(self.store(), size) for _ in range(c.num_hidden_layers))
        self.states = None
        if drafts:
            self.append(LayerPages(self.store(), size, first=1))
            self.states = self._zeros(size, c.hidden_size)

    def store(self):
        """Of one layer."""
        return self._zeros(*self.shape)

    def _zeros(self, *shape):
        """Not uninitialised memory, because what is hidden is still multiplied by zero."""
        return torch.zeros(self.blocks, *shape, dtype=self.dtype, device=self.device)

    def fit(self, model):
        """Whether these pages are of the model's type and on its device."""
        return (self.dtype, self.device) == (model.dtype, model.device)

    def read_weights(self):
        """To be called when the model's weights have changed. Nothing to do: its layers read their own."""

    def begin(self, copies, blocks):
        """Before a step: make sure that so many blocks exist, and copy those that have to be, (from, to) pairs."""
        if blocks > self.blocks:
            old, self.blocks = self.blocks, 2 * blocks
            self._change(lambda x: torch.cat([x, self._zeros(*x.shape[1:])[old:]]))
        if copies:
            source, target = (
                torch.tensor(side, device=self.device) for side in zip(*copies, strict=True)
            )
            self._change(lambda x: x.index_copy_(0, target, x[source]))

    def _change(self, change):
        for layer in self:
            layer.store = change(layer.store)
        if self.states is not None:
            self.states = change(self.states)

    def trunk(self, rows, tokens, wanted):
        """One pass over these rows, each with `table`, `start` and `stop`, and their tokens, a list, row after row.

        Returns the states (T, D), and the logits (wanted, V) after those tokens whose places `wanted` lists.
        """
        plan = Plan(rows, self.shape, self.device)
        for layer in self[: self.model.config.num_hidden_layers]:
            layer.plan = plan
        tokens_BS = torch.tensor([tokens], device=self.device)
        hidden_TD = self.model.hidden(tokens_BS, plan.positions_T[None], cache=self).hidden_BSD[0]
        return hidden_TD, self.model.lm_head(
            hidden_TD if len(wanted) == len(tokens) else hidden_TD[wanted]
        )

    def mtp(self, rows, tokens, states_TD):
        """One pass of the MTP layer over rows, their tokens and the states before those. Returns states (T, D)."""
        plan = self[-1].plan = Plan(rows, self.shape, self.device)
        tokens_BS = torch.tensor([tokens], device=self.device)
        rotation = self.model.rotation(tokens_BS, plan.positions_T[None])  # only distances matter
        return self.model.mtp(
            states_TD[None], self.model.embed(tokens_BS), rotation, None, self[-1]
        )[0][0]

    def _slots(self, rows, back=0):
        at = [(row.table.blocks, p - back) for row in rows for p in range(row.start, row.stop)]
        return torch.tensor(
            [blocks[p // self.size] * self.size + p % self.size for blocks, p in at],
            device=self.device,
        )

    def keep_states(self, rows, states_TD):
        """Keep the state after each token of these rows."""
        self.states.flatten(0, 1).index_copy_(0, self._slots(rows), states_TD)

    def states_before(self, rows):
        """The state before each token of these rows: (T, D)."""
        return self.states.flatten(0, 1)[self._slots(rows, back=1)]

    @property
    def bytes(self):
        """Memory of the keys and values."""
        return sum(layer.store.nbytes for layer in self)
