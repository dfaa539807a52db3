"""Order the passes of a pipeline, and count what waits and what is kept (no section in the paper).

    1F1B, stages of 2 ranks                   interleaved 1F1B, 2 stages on each rank

    rank 0  F0 F1 .  B0 F2 B1 .  B2           forwards go through stages 0, 2 of rank 0 and 1, 3 of rank 1
    rank 1  .  F0 B0 F1 B1 F2 B2 .

A rank first computes forward passes until the backward pass of its first micro-batch can begin, then one
forward and one backward pass in turn, then the backward passes that are left.

                     1F1B          interleaved, v stages a rank
    first forwards   pp - 1 - r    (v - 1) pp + 2 (pp - 1 - r)
    waits            (pp - 1) T    (pp - 1) T / v                      T: a micro-batch on one rank, forward and backward
    kept by rank 0   1             (v + 1) / v - 1 / (pp v)            activations of one micro-batch, of all layers

So interleaving waits less and keeps more. All ranks wait for the one with most to do, so layers are divided
by what they compute (`divide_layers`), output head and MTP layer included, which belong to the last stage: of
GLM-4.5 they are 5.6 layers' worth. The order is that of `torch.distributed.pipelining`, of which a test
records a
real run; the two lower lines are simulated here from the order, and not computed by these formulas.
"""

from typing import NamedTuple

from minglm.config.model import ModelConfig
from minglm.config.parallel import Layout
from minglm.plan.counts import unit_counts

FORWARD_SHARE = 1 / 3
"""Of the time of a micro-batch; a backward pass takes twice as long."""
ROUNDS = 4
"""Micro-batches by pipeline rank that are simulated at most: more change neither what waits nor what is kept."""


class Pass(NamedTuple):
    """A forward or backward pass of one micro-batch through one stage."""

    is_forward: bool
    stage: int
    microbatch: int


def layer_costs(c: ModelConfig) -> list[int]:
    """Return the parameters of each decoder layer that a token passes through: what it computes, attention itself left out."""
    unit = unit_counts(c)
    moe = c.num_experts_per_tok * unit["expert"] + unit["shared"] + unit["router"]
    dense_layers = c.first_k_dense_replace
    dense = [unit["attention"] + unit["dense"]] * dense_layers
    return dense + [unit["attention"] + moe] * (c.num_hidden_layers - dense_layers)


def end_cost(c: ModelConfig) -> int:
    """Return what the last stage computes beside its layers: the head, and with an MTP layer that layer and the head again."""
    head = c.vocab_size * c.hidden_size
    idle = (c.n_routed_experts - c.num_experts_per_tok) * unit_counts(c)["expert"]
    return head + c.num_nextn_predict_layers * (unit_counts(c)["mtp"] - idle + head)


def divide_layers(c: ModelConfig, stages: int) -> list[range]:
    """Return the layers of each stage, at least one, so that the stage with most to do has as little as possible.

    Where the last stage has most, the others share the rest in the same way. Where that leaves a choice the first stages have
    less: they keep the activations of most micro-batches.
    """
    costs = layer_costs(c)
    last = _with_least(costs, end_cost(c), stages)[-1]
    if stages == 1:
        return [last]
    return [*_with_least(costs[: last.start], 0, stages - 1), last]


def _with_least(costs: list[int], end: int, stages: int) -> list[range]:
    """Divide layers of these costs so that the largest sum of a stage is the least possible; `end` counts for the last one."""
    low, high = 0, sum(costs) + end
    while low < high:
        middle = (low + high) // 2
        if _divided(costs, end, stages, middle) is None:
            low = middle + 1
        else:
            high = middle
    found = _divided(costs, end, stages, low)
    assert found is not None, "there are fewer layers than stages"
    return found


def _divided(costs: list[int], end: int, stages: int, bound: int) -> list[range] | None:
    """Fill stages up to `bound`, the last one first, whose `end` counts; None where some layers are left."""
    found = []
    stop = len(costs)
    spent = end
    for stage in reversed(range(stages)):
        start = stop
        while start > stage and spent + costs[start - 1] <= bound:
            start -= 1
            spent += costs[start]
        if start == stop:
            return None
        found.append(range(start, stop))
        stop = start
        spent = 0
    return found[::-1] if stop == 0 else None


def imbalance(c: ModelConfig, layout: Layout) -> float:
    """Return what the rank of the pipeline with most to do computes, over the mean of all."""
    stages = layout.pp * layout.interleave
    costs = layer_costs(c)
    of_stages = [sum(costs[layer] for layer in own) for own in divide_layers(c, stages)]
    of_stages[-1] += end_cost(c)
    of_ranks = [sum(of_stages[rank :: layout.pp]) for rank in range(layout.pp)]
    return max(of_ranks) * layout.pp / sum(of_ranks)


def first_layers(c: ModelConfig, layout: Layout) -> float:
    """Return how many layers the first rank of the pipeline has, which keeps most activations, over the mean of all."""
    division = divide_layers(c, layout.pp * layout.interleave)
    own = sum(len(layers) for layers in division[:: layout.pp])
    return own * layout.pp / c.num_hidden_layers


def whole_rounds(layout: Layout, microbatches: int) -> int:
    """Return how many micro-batches a step makes, empty ones included.

    A pipeline is filled by `pp` of them; interleaved stages take `pp` at a time.
    """
    if layout.interleave == 1:
        return max(layout.pp, microbatches)
    return -(-microbatches // layout.pp) * layout.pp


def order(layout: Layout, microbatches: int) -> list[list[Pass]]:
    """Return the passes of each rank of the pipeline, in order. microbatches: those of `whole_rounds`."""
    pp, stages = layout.pp, layout.interleave
    total = microbatches * stages

    def nth(rank: int, number: int, is_forward: bool) -> Pass:
        if stages == 1:
            return Pass(is_forward, rank, number)
        turn = number // pp % stages  # which of its stages a rank is at
        own = turn if is_forward else stages - 1 - turn
        microbatch = number // (pp * stages) * pp + number % pp
        return Pass(is_forward, own * pp + rank, microbatch)

    ranks = []
    for rank in range(pp):
        after = pp - 1 - rank
        first = after if stages == 1 else (stages - 1) * pp + 2 * after
        first = min(first, total)
        passes = [nth(rank, number, True) for number in range(first)]
        for number in range(total):
            if first + number < total:
                passes.append(nth(rank, first + number, True))
            passes.append(nth(rank, number, False))
        ranks.append(passes)
    return ranks


def waiting(layout: Layout, microbatches: int) -> float:
    """Return how long a rank waits for others in a step, in times of one micro-batch on one rank."""
    simulated = whole_rounds(layout, min(microbatches, ROUNDS * layout.pp))
    cost = {True: FORWARD_SHARE / layout.interleave, False: (1 - FORWARD_SHARE) / layout.interleave}
    remaining = [list(reversed(passes)) for passes in order(layout, simulated)]
    clocks = [0.0] * layout.pp
    ended: dict[Pass, float] = {}
    last = layout.pp * layout.interleave - 1
    while any(remaining):
        for rank, passes in enumerate(remaining):
            while passes:
                one = passes[-1]
                step = -1 if one.is_forward else 1
                needed = one._replace(stage=one.stage + step)
                is_end = one.stage == (0 if one.is_forward else last)
                if not is_end and needed not in ended:
                    break
                begin = max(clocks[rank], 0.0 if is_end else ended[needed])
                clocks[rank] = begin + cost[one.is_forward]
                ended[passes.pop()] = clocks[rank]
    return max(clocks) - simulated


def kept(layout: Layout, microbatches: int) -> float:
    """Return what the rank that keeps most keeps for its backward passes: activations of one micro-batch of all layers."""
    simulated = whole_rounds(layout, min(microbatches, ROUNDS * layout.pp))
    most = 0
    for passes in order(layout, simulated):
        held = 0
        for one in passes:
            held += 1 if one.is_forward else -1
            most = max(most, held)
    return most / (layout.pp * layout.interleave)
