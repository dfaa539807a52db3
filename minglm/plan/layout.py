"""Where the ranks of a plan stand: axes, nodes and links, and what one GPU computes at a time (paper 2.4).

    world = pp * dp_replicate * fsdp;   fsdp = efsdp * ep;   ranks that share a sequence, cp, lie inside fsdp
    stride of an axis: ep 1, cp 1, efsdp ep, fsdp 1, dp_replicate fsdp, pp world / pp

Ranks are numbered node by node, so the stride of an axis and the GPUs of a node decide which of its ranks
share a node, and with it which link a collective uses: NVLink inside a node, the network cards between nodes.

Two axes gather weights, all others exchange activations. Expert parallelism borrows ranks from data
parallelism, as sequence parallelism does: neither adds any.
"""

import math
from dataclasses import replace
from typing import NamedTuple

from minglm.config.parallel import (
    Layout,
    TokenExchange,
    can_share,
    deepep_lacks_neighbours,
    divisors,
)
from minglm.config.run import RunConfig
from minglm.plan.gpus import GPU, NETWORK_SHARE, NVLINK_SHARE


class Group(NamedTuple):
    """The ranks along one axis, of which some share a node."""

    size: int
    in_node: int
    """Of them in one node."""

    @property
    def between(self) -> float:
        """Share of an even exchange that leaves the node."""
        return (self.size - self.in_node) / self.size

    @property
    def within(self) -> float:
        """Share of an even exchange that goes to another GPU of the node."""
        return (self.in_node - 1) / self.size


class Share(NamedTuple):
    """What one GPU computes in a forward pass, and how often in an optimizer step."""

    cp: int
    """GPUs that share each row."""
    tokens: int
    """Tokens of a micro-batch, on one GPU."""
    microbatches: int
    """Micro-batches of an optimizer step."""


def words(layout: Layout, every: bool = False) -> str:
    """Return the words that ask for this layout on the command line. every: also sizes of one, the default."""
    chosen = []
    for name in ("pp", "interleave", "dp_replicate", "fsdp", "ep", "cp"):
        size = getattr(layout, name)
        if every or size > 1 or name == "fsdp":
            chosen.append(f"--parallel.{name} {size}")
    return " ".join(chosen)


def group(size: int, stride: int, per_node: int) -> Group:
    """Return the ranks of an axis, `size` of them, `stride` apart, on nodes of `per_node` GPUs."""
    reach = max(1, per_node // stride) if stride < per_node else 1
    return Group(size, min(size, reach))


def gather_seconds(size: float, members: Group, gpu: GPU) -> float:
    """Estimate the seconds in which every rank gets `size` bytes of which each holds its part; a reduction takes the same.

    Between nodes the GPUs of one node share the work: each brings its part in through its own card, NVLink spreads it.
    """
    nodes = members.size // members.in_node
    network = size * (nodes - 1) / nodes / members.in_node
    nvlink = size * (members.in_node - 1) / members.in_node
    return _slower(network, nvlink, gpu)


def exchange_seconds(size: float, members: Group, gpu: GPU) -> float:
    """Estimate the seconds of an all-to-all in which every rank sends `size` bytes, evenly, its own part included."""
    return _slower(size * members.between, size * members.within, gpu)


def send_seconds(size: float, members: Group, gpu: GPU) -> float:
    """Estimate the seconds in which a rank sends `size` bytes to the next one along an axis."""
    if members.in_node == members.size:
        return _slower(0.0, size, gpu)
    return _slower(size, 0.0, gpu)


def _slower(network: float, nvlink: float, gpu: GPU) -> float:
    """Return the seconds of the slower of two links that work at the same time."""
    return max(network / (gpu.network * NETWORK_SHARE), nvlink / (gpu.nvlink * NVLINK_SHARE))


def shared_by(run: RunConfig, layout: Layout, sequence_length: int) -> int:
    """Return the ranks that share rows of this length: those of the layout, or more where a row is too long for them.

    Too long: its part exceeds `optimizer.microbatch_tokens`. At most as many as heads and fsdp allow.
    """
    possible = [
        size for size in divisors(layout.fsdp) if size >= layout.cp and can_share(run.model, size)
    ]
    for size in possible:
        if sequence_length <= size * run.optimizer.microbatch_tokens:
            return size
    return possible[-1] if possible else layout.cp


def layout_for(run: RunConfig, layout: Layout, sequence_length: int) -> Layout:
    """Return a layout as a stage with rows of this length uses it: with as many GPUs for a row as it needs.

    A pipeline's rows are not cut, so where rows are, there is none, as in reinforcement learning. Raises
    ValueError, in one line, where the layout is impossible without it.
    """
    cp = shared_by(run, layout, sequence_length)
    if layout.pp > 1 and cp > 1:
        layout = without_pipeline(run, layout)
        cp = shared_by(run, layout, sequence_length)
    return layout._replace(cp=cp)


def without_pipeline(run: RunConfig, layout: Layout) -> Layout:
    """Return the layout whose weights are sharded over the ranks of the pipeline too.

    Raises ValueError as `layout_for`.
    """
    if layout.pp == 1:
        return layout
    fsdp = layout.pp * layout.fsdp
    sizes = layout._replace(pp=1, interleave=1, fsdp=fsdp)._asdict()
    return replace(run.parallel, **sizes).layout(layout.world, run.model)


def share(run: RunConfig, layout: Layout, sequence_length: int) -> Share:
    """Return what one GPU computes in a stage with rows of this length, once the batch has its full size."""
    cp = layout.cp
    part_of_row = math.ceil(sequence_length / cp)
    rows = max(1, round(run.optimizer.batch_tokens_end / sequence_length))
    rows_of_group = math.ceil(rows / layout.data_groups)
    # As `minglm.train.loop` cuts batches: whole rows, then their parts.
    rows_at_once = max(1, run.optimizer.microbatch_tokens // sequence_length)
    rows_at_once = min(rows_at_once, rows_of_group)
    return Share(cp, rows_at_once * part_of_row, math.ceil(rows_of_group / rows_at_once))


def check_layout(run: RunConfig, layout: Layout) -> None:
    """Refuse a layout that a stage's batches cannot fill.

    Raises ValueError, in one line, with what all stages would fill.
    """
    refusals = []
    for name, stage in run.stages.items():
        rows = max(1, run.optimizer.batch_tokens_start // stage.sequence_length)
        longer = layout_for(run, layout, stage.sequence_length)
        if stage.tokens and rows < longer.data_groups:
            refusal = (
                f"stages.{name}: a batch has {rows:,} rows of {stage.sequence_length:,} tokens for "
                f"{longer.data_groups:,} groups of ranks, so some would idle"
            )
            refusals.append((_full_world(layout, longer, rows), refusal))
    if refusals:
        fewest, refusal = min(refusals)
        raise ValueError(
            f"{refusal}; use {fewest:,} GPUs, or a larger optimizer.batch_tokens_start"
        )


def check_exchange(run: RunConfig, layout: Layout, gpu: GPU) -> None:
    """Refuse a layout among whose ranks DeepEP cannot exchange on machines of such GPUs.

    Raises ValueError, in one line.
    """
    if run.parallel.dispatcher == TokenExchange.DEEPEP:
        alone = deepep_lacks_neighbours(layout.ep, min(layout.world, gpu.per_node))
        if alone:
            raise ValueError(f"parallel.dispatcher = 'deepep': {alone}; or use all_to_all")


def _full_world(layout: Layout, longer: Layout, rows: int) -> int:
    """Return the largest number of ranks that leaves no group of them without a row."""
    most = rows * longer.cp * longer.pp
    halved = layout.world
    while halved > most and halved % 2 == 0:
        halved //= 2
    return min(halved, most)
