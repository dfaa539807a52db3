"""The tensors of the paged cache, and what one forward pass sees of them (no section in the paper).

A pass computes T tokens of any number of sequences as one row of T: the whole of a prompt, the next token of
an answer, a token and the drafts after it. Linear layers and experts see T tokens without padding; only
attention sorts them by sequence. All rows write their keys and values before any row reads, so a prompt may
begin with blocks that another one fills in the same pass.
"""

from array import array
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import ClassVar, Protocol

import torch

from minglm.inference.kv_cache import BLOCK_SIZE, BlockTable
from minglm.kernels.attention import PagedRows, flash_attention, paged_attention
from minglm.kernels.dispatch import Operation, select
from minglm.kernels.experts import grouped_experts
from minglm.model.decoder import DecoderLayer
from minglm.model.glm import GLM
from minglm.model.moe import LocalDispatcher, MoE

MOST_EXPERTS_IN_A_BYTE = 256
"""Experts of a layer up to which a choice is kept in eight bits."""


class Span(Protocol):
    """Positions `start` to `stop` of a sequence whose blocks are in `table`."""

    @property
    def table(self) -> BlockTable:
        """The blocks of the sequence."""
        ...

    @property
    def start(self) -> int:
        """The first position of the pass."""
        ...

    @property
    def stop(self) -> int:
        """The position after the last one of the pass."""
        ...


@dataclass
class TableSpan:
    """Slots `start` to `stop` of a table."""

    table: BlockTable
    start: int
    stop: int


class LayerPages:
    """Keys and values of one layer: (blocks, 2, M, size, A), keys first. `plan` is the pass in progress.

    With latent attention there are no values: (blocks, 1, 1, size, L + R), see `minglm.model.mla`. Slots
    before `first` are hidden.
    """

    def __init__(self, store: torch.Tensor, size: int, first: int = 0) -> None:
        self.store = store
        self.size = size
        self.first = first
        self.plan: Plan | None = None

    def attend(
        self, q_BSNA: torch.Tensor, k_BSMA: torch.Tensor, v_BSMA: torch.Tensor | None
    ) -> torch.Tensor:
        """Write k, v (1, T, M, A) to their slots, then attend q (1, T, N, A) over all slots of each sequence.

        v may be None: then keys serve as values.
        """
        assert self.plan is not None, "no pass has begun"
        A = q_BSNA.shape[3]
        new = k_BSMA[0] if v_BSMA is None else torch.cat((k_BSMA[0], v_BSMA[0]), 1)
        self.store.view(-1, A).index_copy_(0, self.plan.written, new.reshape(-1, A))

        groups = self.plan.groups
        if len(groups) == 1:
            q = q_BSNA.view(*groups[0].positions_BS.shape, *q_BSNA.shape[2:])
            return paged_attention(q, self.store, groups[0], self.first).reshape(q_BSNA.shape)
        tokens = [group.positions_BS.numel() for group in groups]
        outputs = []
        for group, q_TNA in zip(groups, q_BSNA[0].split(tokens), strict=True):
            q = q_TNA.unflatten(0, group.positions_BS.shape)
            outputs.append(paged_attention(q, self.store, group, self.first).flatten(0, 1))
        return torch.cat(outputs)[None]


def integers(values: Sequence[int], device: torch.device) -> torch.Tensor:
    """Return a list as an int64 tensor; from an array, because a list takes PyTorch as long as a layer."""
    return torch.frombuffer(array("q", values), dtype=torch.int64).to(device)


class Plan:
    """One pass: which rows of the stores it writes and reads.

    written: for each token, part (keys, values) and head, the row of the store seen as (blocks * parts * M * size, A).
    groups: the sequences that are read together, those of equal length next to each other; their rows are
    those of the store seen as (blocks * parts * M, size * A). positions_T: the position of each token.
    """

    def __init__(
        self, spans: Sequence[Span], shape: tuple[int, int, int, int], device: torch.device
    ) -> None:
        parts, heads, size, _ = shape
        positions: list[int] = []
        slots: list[int] = []  # of each token in part 0 and head 0
        for span in spans:
            blocks = span.table.blocks
            for position in range(span.start, span.stop):
                positions.append(position)
                slots.append(blocks[position // size] * (parts * heads * size) + position % size)
        slots_T, self.positions_T = integers(slots + positions, device).view(2, -1)
        head = torch.arange(parts * heads, device=device)
        self.written = (slots_T[:, None] + head * size).flatten()

        self.groups: list[PagedRows] = []
        start = 0
        for length, same_length in groupby(spans, key=lambda span: span.stop - span.start):
            group = list(same_length)
            used = [(span.stop - 1) // size + 1 for span in group]  # blocks of each sequence
            widest = max(used)
            padded: list[int] = []
            for span, count in zip(group, used, strict=True):
                padded += span.table.blocks[:count]
                padded += [0] * (widest - count)
            tables = integers(padded, device).view(-1, 1, widest) * (parts * heads)
            read = tables + head.view(parts, 1, heads, 1)
            end = start + length * len(group)
            positions_BS = self.positions_T[start:end].view(-1, length)
            self.groups.append(PagedRows(read.flatten(), positions_BS))
            start = end


class PagedCache:
    """Keys and values of all layers, and passes of the model's own forward over them.

    `layers` has one `LayerPages` for each decoder layer. With drafts `mtp_layer` is that of the MTP layer,
    and `states` has the state after each token. With `choices` that tensor has the experts of each token
    (blocks, size, L, K), for the L MoE layers of the trunk: they are kept where the token's keys are, so
    blocks that are shared bring them along.
    """

    same_bits_in_any_batch: ClassVar[bool] = False
    """Whether the numbers of a token depend on its own text alone, to the last bit."""

    def __init__(
        self,
        model: GLM,
        size: int = BLOCK_SIZE,
        drafts: bool = False,
        blocks: int = 64,
        choices: bool = False,
    ) -> None:
        c = model.config
        self.model = model
        self.dtype: torch.dtype = model.dtype
        self.device: torch.device = model.device
        parts, heads, width = c.cache_shape
        self.shape = (parts, heads, size, width)
        self.blocks = blocks
        self.size = size
        self.layers = [LayerPages(self.store(), size) for _ in range(c.num_hidden_layers)]
        self.mtp_layer: LayerPages | None = None
        self.states: torch.Tensor | None = None
        if drafts:
            self.mtp_layer = LayerPages(self.store(), size, first=1)
            self.states = self._zeros(size, c.hidden_size)
        self.choices: torch.Tensor | None = None
        if choices:
            layers = c.num_hidden_layers - c.first_k_dense_replace
            dtype = torch.uint8 if c.n_routed_experts <= MOST_EXPERTS_IN_A_BYTE else torch.int16
            self.choices = self._zeros(size, layers, c.num_experts_per_tok).to(dtype)

    def store(self) -> torch.Tensor:
        """Allocate the key/value blocks of one layer."""
        return self._zeros(*self.shape)

    def _zeros(self, *shape: int) -> torch.Tensor:
        """Allocate zeros: what is hidden is still multiplied by zero, so uninitialised memory would not do."""
        return torch.zeros(self.blocks, *shape, dtype=self.dtype, device=self.device)

    def fits(self, model: GLM) -> bool:
        """Return whether these pages have the model's dtype and device."""
        return (self.dtype, self.device) == (model.dtype, model.device)

    def read_weights(self) -> None:
        """Take in new weights of the model. Nothing to do here: the model's layers read their own."""

    def _all_layers(self) -> list[LayerPages]:
        return self.layers if self.mtp_layer is None else [*self.layers, self.mtp_layer]

    def begin(self, copies: Sequence[tuple[int, int]], blocks: int) -> None:
        """Prepare a step: make sure that `blocks` blocks exist, and copy those in `copies`, (from, to) pairs."""
        if blocks > self.blocks:
            old = self.blocks
            self.blocks = 2 * blocks
            self._change(lambda x: torch.cat([x, self._zeros(*x.shape[1:])[old:].to(x.dtype)]))
        if copies:
            source = torch.tensor([pair[0] for pair in copies], device=self.device)
            target = torch.tensor([pair[1] for pair in copies], device=self.device)
            self._change(lambda x: x.index_copy_(0, target, x[source]))

    def _change(self, change: Callable[[torch.Tensor], torch.Tensor]) -> None:
        for layer in self._all_layers():
            layer.store = change(layer.store)
        if self.states is not None:
            self.states = change(self.states)
        if self.choices is not None:
            self.choices = change(self.choices)

    def trunk(
        self, rows: Sequence[Span], tokens: Sequence[int], wanted: Sequence[int]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Run the decoder layers over these rows and their tokens, row after row.

        Returns the states (T, D), and the logits (wanted, V) after the tokens at the indices `wanted`.
        """
        plan = Plan(rows, self.shape, self.device)
        for layer in self.layers:
            layer.plan = plan
        tokens_BS = torch.tensor([tokens], device=self.device)
        out = self.model.hidden(tokens_BS, plan.positions_T[None], cache=self.layers)
        if self.choices is not None:
            self.keep_choices(rows, torch.stack([r.experts_TK for r in out.routing], 1))
        hidden_TD = out.hidden_BSD[0]
        wanted_TD = hidden_TD if len(wanted) == len(tokens) else hidden_TD[wanted]
        return hidden_TD, self.model.lm_head(wanted_TD)

    def mtp(
        self, rows: Sequence[Span], tokens: Sequence[int], states_TD: torch.Tensor
    ) -> torch.Tensor:
        """Run the MTP layer over rows, their tokens and the states before those; return its states (T, D)."""
        assert self.mtp_layer is not None and self.model.mtp is not None, "made without drafts"
        plan = Plan(rows, self.shape, self.device)
        self.mtp_layer.plan = plan
        tokens_BS = torch.tensor([tokens], device=self.device)
        rotation = self.model.rotation(tokens_BS, plan.positions_T[None])  # only distances matter
        embedded = self.model.embed(tokens_BS)
        return self.model.mtp(states_TD[None], embedded, rotation, None, self.mtp_layer)[0][0]

    def _slots(self, rows: Sequence[Span], back: int = 0) -> torch.Tensor:
        """Return the slot of the token `back` tokens before each token of these rows, counted over all blocks."""
        slots = []
        for row in rows:
            for position in range(row.start - back, row.stop - back):
                block = row.table.blocks[position // self.size]
                slots.append(block * self.size + position % self.size)
        return torch.tensor(slots, device=self.device)

    def keep_states(self, rows: Sequence[Span], states_TD: torch.Tensor) -> None:
        """Keep the state after each token of these rows."""
        assert self.states is not None, "the cache was made without drafts"
        self.states.flatten(0, 1).index_copy_(0, self._slots(rows), states_TD)

    def keep_choices(self, rows: Sequence[Span], chosen_TLK: torch.Tensor) -> None:
        """Keep the experts of each token of these rows, int64 (T, L, K)."""
        assert self.choices is not None, "the cache was made without choices"
        chosen_TLK = chosen_TLK.to(self.choices.dtype)
        self.choices.flatten(0, 1).index_copy_(0, self._slots(rows), chosen_TLK)

    def choices_of(self, table: BlockTable, length: int) -> torch.Tensor | None:
        """Return the experts of the first tokens of a sequence, (length, L, K); None for a cache without choices."""
        if self.choices is None:
            return None
        slots = torch.arange(length, device=self.device)
        blocks = torch.tensor(table.blocks, dtype=torch.int64, device=self.device)
        return self.choices[blocks[slots // self.size], slots % self.size]

    def states_before(self, rows: Sequence[Span]) -> torch.Tensor:
        """Return the state before each token of these rows: (T, D)."""
        assert self.states is not None, "the cache was made without drafts"
        return self.states.flatten(0, 1)[self._slots(rows, back=1)]

    @property
    def bytes(self) -> int:
        """Memory of the keys and values."""
        return sum(layer.store.nbytes for layer in self._all_layers())


def is_plain(model: GLM) -> bool:
    """Return whether the C decoder knows all parts of a model: grouped-query attention, one group of experts, no hooks."""
    c = model.config
    if c.kv_lora_rank or c.n_group != 1 or model.dtype != torch.float32:
        return False
    for layer in model.model.layers:
        assert isinstance(layer, DecoderLayer)
        if layer.self_attn.attend is not flash_attention:
            return False
        if isinstance(layer.mlp, MoE):
            if type(layer.mlp.dispatcher) is not LocalDispatcher:
                return False
            if layer.mlp.experts.operation is not grouped_experts:
                return False
    return True


def decoder_for(model: GLM, fp8_experts: bool = False) -> type[PagedCache]:
    """Return the class that generates with this model here: the model's own forward, C, or experts in float8."""
    return select(  # pyright: ignore[reportReturnType] -- the forms of this operation are classes
        Operation.DECODER,
        model.lm_head.weight,
        plain_model=is_plain(model),
        fp8_experts=fp8_experts,
    )
