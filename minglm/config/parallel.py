"""Options of parallelism: how the ranks of a run share weights, experts and sequences (no section in the paper).

    world  =  pp  x  dp_replicate  x  fsdp          dense weights: each pipeline stage, replica by replica, sharded by fsdp
    fsdp   =  efsdp  x  ep                          experts: the same ranks in two factors
    fsdp   =  data groups  x  cp                    batch: the ranks of one group share the rows, each a part of every row

Expert and context parallelism borrow ranks from the sharding and never add any: a rank holds a part of the
dense weights, a part of the experts, and reads a part of the batch. A layout changes where numbers are
computed, not which, so it is no part of a config's hash: a run may resume on another one.

The rules are here, free of torch, so that the planner and a run refuse the same layouts.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from enum import StrEnum
from typing import NamedTuple, NoReturn

from minglm.config.model import ModelConfig
from minglm.config.options import option, positive

MOST_RANKS = 2**20
DEEPEP_RANKS = (2, 4, 8, 16, 24, 32, 64, 128, 144, 160)
"""Sizes of `ep` for which DeepEP 1.2.1 has settings (`Buffer.get_dispatch_config`)."""
NVLINK_RANKS = 8
"""Ranks among which DeepEP exchanges over NVLink; more of them are so many on each machine, with RDMA between machines."""
DEEPEP_WIDTH = 256
"""Numbers of bfloat16 whose multiple a token must have: DeepEP's kernels move 512 bytes at a time."""


def deepep_lacks_neighbours(ep: int, here: int) -> str:
    """Return why DeepEP cannot exchange among `ep` ranks of which a machine has `here`; "" where it can."""
    neighbours = min(ep, NVLINK_RANKS)
    if here % neighbours == 0:
        return ""
    return (
        f"of parallel.ep = {ep} ranks {neighbours} must share a machine, and this one has {here}; "
        "start another number on each"
    )


class TokenExchange(StrEnum):
    """How tokens travel to the ranks of their experts."""

    ALL_TO_ALL = "all_to_all"
    """Two all-to-alls of torch.distributed, on any device."""
    DEEPEP = "deepep"
    """The kernels of the package deep_ep, between GPUs only; never run on GPUs yet
    (`minglm.parallel.deepep`)."""


class Layout(NamedTuple):
    """The sizes of a layout for a certain number of ranks; their product is that number."""

    pp: int
    dp_replicate: int
    fsdp: int
    ep: int
    cp: int
    interleave: int = 1

    @property
    def world(self) -> int:
        """Return the number of ranks."""
        return self.pp * self.dp_replicate * self.fsdp

    @property
    def efsdp(self) -> int:
        """Return the ranks over which the weights of each expert are sharded."""
        return self.fsdp // self.ep

    @property
    def data_groups(self) -> int:
        """Return into how many parts the rows of a batch are divided."""
        return self.dp_replicate * self.fsdp // self.cp


@dataclass(frozen=True)
class ParallelConfig:
    """The layout of a run over the ranks that torchrun starts; one process needs none of it."""

    pp: int = positive(1, maximum=MOST_RANKS)
    """Ranks of the pipeline: each holds consecutive layers, a stage."""
    interleave: int = positive(1, maximum=MOST_RANKS)
    """Stages on each rank of the pipeline; with more than 1 the schedule is interleaved 1F1B."""
    dp_replicate: int = positive(1, maximum=MOST_RANKS)
    """Copies of the sharded weights (hybrid sharding)."""
    fsdp: int = option(0, maximum=MOST_RANKS)
    """Ranks over which the dense weights are sharded (FSDP2); 0: all that are left, ranks / (pp * dp_replicate)."""
    ep: int = positive(1, maximum=MOST_RANKS)
    """Ranks over which the experts are divided; must divide fsdp and the number of experts."""
    cp: int = positive(1, maximum=MOST_RANKS)
    """Ranks that share each sequence; must divide fsdp, the query heads, and the key/value heads or be a multiple."""
    reshard_after_forward: bool = True
    """Free the gathered weights of a layer after its forward pass and gather them again for the backward pass."""
    dispatcher: TokenExchange = TokenExchange.ALL_TO_ALL
    """How tokens travel to their experts: all_to_all, or deepep (its package, GPUs with NVLink, bfloat16, a
    multiple of 256 hidden units, ep of 2, 4, 8, 16, 24, 32, 64, 128, 144 or 160)."""
    timeout_seconds: float = option(600.0, positive=True, maximum=10**7)
    """Most seconds of a step on several ranks: one that takes longer ends the run, and says where each rank is."""

    def check(self, model: ModelConfig) -> None:
        """Raise ValueError, in one line, for sizes that no number of ranks makes possible."""
        if model.n_routed_experts % self.ep:
            best = nearest(self.ep, divisors(model.n_routed_experts))
            raise ValueError(
                f"parallel.ep = {self.ep}: must divide model.n_routed_experts = {model.n_routed_experts}; "
                f"use {best}"
            )
        if self.pp > model.num_hidden_layers:
            raise ValueError(
                f"parallel.pp = {self.pp}: each stage needs a layer of model.num_hidden_layers = "
                f"{model.num_hidden_layers}; use {model.num_hidden_layers}"
            )
        most = model.num_hidden_layers // self.pp if self.pp > 1 else 1
        if self.interleave > most:
            raise ValueError(
                f"parallel.interleave = {self.interleave}: with parallel.pp = {self.pp} each stage needs a layer of "
                f"model.num_hidden_layers = {model.num_hidden_layers}; use {most}"
            )
        if self.pp > 1 and self.cp > 1:
            raise ValueError(
                f"parallel.pp = {self.pp}: a pipeline's rows are not cut, and parallel.cp = {self.cp}; use one of both"
            )
        if self.pp > 1 and model.tie_word_embeddings:
            raise ValueError(
                f"parallel.pp = {self.pp}: model.tie_word_embeddings ties the first stage to the last; use 1"
            )
        if not can_share(model, self.cp):
            possible = [n for n in range(1, 2 * self.cp) if can_share(model, n)]
            raise ValueError(
                f"parallel.cp = {self.cp}: each rank must have whole heads, of {model.num_attention_heads} for "
                f"queries and {model.num_key_value_heads} for keys; use {nearest(self.cp, possible)}"
            )
        if self.dispatcher == TokenExchange.DEEPEP:
            self._check_deepep(model)
        for name in ("ep", "cp"):
            size = getattr(self, name)
            if self.fsdp and self.fsdp % size:
                best = nearest(size, divisors(self.fsdp))
                raise ValueError(
                    f"parallel.{name} = {size}: must divide parallel.fsdp = {self.fsdp}; use {best}"
                )

    def _check_deepep(self, model: ModelConfig) -> None:
        """Refuse sizes that DeepEP's kernels do not have."""
        if self.ep not in DEEPEP_RANKS:
            possible = [n for n in DEEPEP_RANKS if model.n_routed_experts % n == 0]
            ways = f"{nearest(self.ep, possible)} ranks, or " if possible else ""
            raise ValueError(
                f"parallel.dispatcher = 'deepep': it exchanges among {', '.join(map(str, DEEPEP_RANKS))} ranks, and "
                f"parallel.ep = {self.ep}; use {ways}all_to_all"
            )
        if model.hidden_size % DEEPEP_WIDTH:
            raise ValueError(
                f"parallel.dispatcher = 'deepep': it moves multiples of {DEEPEP_WIDTH} numbers, and model.hidden_size = "
                f"{model.hidden_size}; use all_to_all"
            )

    def layout(self, world: int, model: ModelConfig) -> Layout:
        """Return the sizes for this many ranks.

        Raises ValueError, in one line with the nearest sizes that work, where they do not fit that number.
        """
        ranks = "1 rank" if world == 1 else f"{world:,} ranks"
        outer = self.pp * self.dp_replicate
        if world % outer:
            best = nearest(outer, divisors(world))
            raise ValueError(
                f"parallel.pp * parallel.dp_replicate = {outer}: must divide {ranks}; "
                f"use a product of {best}, or start another number of ranks with torchrun"
            )
        fsdp = self.fsdp or world // outer
        if outer * fsdp != world:
            raise ValueError(
                f"parallel.fsdp = {fsdp}: pp * dp_replicate * fsdp = {outer * fsdp:,}, but there is {ranks}; "
                f"use {world // outer}, or start {outer * fsdp:,} ranks with torchrun"
            )
        for name in ("ep", "cp"):
            size = getattr(self, name)
            if fsdp % size:
                possible = divisors(fsdp)
                if name == "ep":
                    possible = [n for n in possible if model.n_routed_experts % n == 0]
                else:
                    possible = [n for n in possible if can_share(model, n)]
                raise ValueError(
                    f"parallel.{name} = {size}: must divide fsdp = {fsdp} of {ranks}; "
                    f"use {nearest(size, possible)}, or start another number of ranks with torchrun"
                )
        layout = Layout(self.pp, self.dp_replicate, fsdp, self.ep, self.cp, self.interleave)
        if not _rows_divide(layout.efsdp, model):
            self._refuse_rows(layout, model)
        return layout

    def _refuse_rows(self, layout: Layout, model: ModelConfig) -> NoReturn:
        """Say which other layout divides the rows of each expert evenly, as FSDP2 asks for."""
        rows = f"{model.moe_intermediate_size} and {model.hidden_size} rows of an expert's matrices"
        ways = expert_ranks(layout.fsdp, model)
        if ways:
            raise ValueError(
                f"parallel.ep = {self.ep}: leaves efsdp = fsdp / ep = {layout.efsdp} ranks, which do not divide the {rows}; "
                f"use {nearest(self.ep, ways)}"
            )
        inner = layout.dp_replicate * layout.fsdp
        copies = [n for n in divisors(inner) if expert_ranks(inner // n, model)]
        raise ValueError(
            f"parallel.dp_replicate = {self.dp_replicate}: fsdp = {layout.fsdp} ranks cannot divide the {rows}; "
            f"use {nearest(self.dp_replicate, copies)}, or start another number of ranks with torchrun"
        )


def _rows_divide(efsdp: int, model: ModelConfig) -> bool:
    """Return whether so many ranks can have equal parts of the rows of every expert."""
    return model.moe_intermediate_size % efsdp == 0 and model.hidden_size % efsdp == 0


def expert_ranks(fsdp: int, model: ModelConfig) -> list[int]:
    """Return the sizes of ep that this many ranks allow: whole experts on each, and equal parts of their rows."""
    possible = [ep for ep in divisors(model.n_routed_experts) if fsdp % ep == 0]
    return [ep for ep in possible if _rows_divide(fsdp // ep, model)]


def can_share(model: ModelConfig, ranks: int) -> bool:
    """Return whether this many ranks can share a sequence: each has whole query heads, and whole key/value heads or one."""
    keys = model.num_key_value_heads
    return model.num_attention_heads % ranks == 0 and (keys % ranks == 0 or ranks % keys == 0)


def divisors(number: int) -> list[int]:
    """Return the divisors of a number, smallest first."""
    small = [n for n in range(1, int(number**0.5) + 1) if number % n == 0]
    return sorted({*small, *(number // n for n in small)})


def nearest(size: int, possible: Iterable[int]) -> int:
    """Return the possible size nearest to `size`; of two equally near, the larger one."""
    return min(possible, key=lambda other: (abs(other - size), -other))
