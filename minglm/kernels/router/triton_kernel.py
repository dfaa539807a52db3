"""The router's choice of experts and the sort by expert, as Triton kernels (paper 2.1). Eager forms: `router/eager.py`.

    s = sigmoid(logits);   the top K of s + bias are chosen, ties to the lower expert
    w = s of the chosen ones, divided by their sum if NORMALIZE, times the scale

A program of the choice is one warp with a few tokens and all their E scores in registers, in groups of one expert a
lane, so that no step waits for another warp and few lanes are without an expert. It takes the largest score that is
left K times: with K = 8 of 160 that is less work than a sort. Scores are compared as integers in the same order, because
a warp finds the largest integer in one instruction. The lowest expert with the largest score is a second such step,
which gives ties to the lower expert exactly. The smallest integer is never a score and marks an expert as taken.

The sort has no atomic additions in memory: the row of a pair is the number of pairs that come before it, a count.
Up to MAX_RANKED pairs one launch compares every pair with every other. Beyond that it takes three launches: blocks of
pairs count their pairs of each expert, running sums over the table (expert, block) are the first rows of each expert in
each block, and a pair adds to that the number of earlier pairs of the same expert in its block.
"""

# Triton has no types for a kernel's tensors, constexpr arguments, loops and launch options:
# pyright: reportArgumentType=false, reportCallIssue=false, reportOperatorIssue=false, reportAttributeAccessIssue=false
# pyright: reportGeneralTypeIssues=false, reportPossiblyUnboundVariable=false

from collections.abc import Iterator
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from minglm.kernels.router.eager import SortedPairs
from minglm.kernels.toolchain.spec import Spec

TOKENS = 2  # tokens of a program of the choice, which is one warp
LANES = 32  # experts of a group: one for each lane of the warp
MAX_RANKED = 1024  # pairs up to which one launch sorts them all
BLOCK = 512  # pairs of a block of the table, a multiple of ITEMS
ITEMS = 128  # pairs that a program places
# Pairs that a program compares its own with at a time. More than its 128 threads: up to that many, Triton lets every
# thread load all of them instead of sharing them through shared memory.
STEP = 256
LOWER = 4096  # counts of lower experts that the running sums take at a time
OWN = 512  # counts of the expert itself that the running sums take at a time


@triton.jit
def _score(logits_ptr, at, inside):
    """Compute the sigmoid of logits, in one place, so that a chosen score has the same bits when it is computed again."""
    return 1 / (1 + tl.exp(-tl.load(logits_ptr + at, inside, other=0.0)))


# Not specialized: knowing that the experts are a multiple of 16 would give a lane four neighbouring experts.
@triton.jit(do_not_specialize=["experts"])
def _choose(
    logits_ptr,
    bias_ptr,
    experts_ptr,
    weights_ptr,
    scores_ptr,
    tokens,
    experts,
    scale,
    NORMALIZE: tl.constexpr,
    CHOICES: tl.constexpr,
    TOKENS: tl.constexpr,
    GROUPS: tl.constexpr,
    LANES: tl.constexpr,
    PLACES: tl.constexpr,
):
    """Compute the scores of TOKENS tokens; take the largest biased score that is left of each, CHOICES times."""
    token = tl.program_id(0).to(tl.int64) * TOKENS + tl.arange(0, TOKENS)
    lane = tl.arange(0, LANES)
    place = tl.arange(0, PLACES)
    TAKEN: tl.constexpr = -(2**31)  # pyright: ignore[reportAssignmentType]
    left = ()  # for each group of experts their biased scores as integers in the same order, or TAKEN
    for group in tl.static_range(GROUPS):
        expert = group * LANES + lane
        inside = (token < tokens)[:, None] & (expert < experts)[None, :]
        at = token[:, None] * experts + expert[None, :]
        score = _score(logits_ptr, at, inside)
        tl.store(scores_ptr + at, score, inside)
        biased = score + tl.load(bias_ptr + expert, expert < experts, other=0.0)[None, :]
        biased = tl.where(biased == biased, biased, float("-inf"))
        # The order of floats as integers. A score is at least +0, so its sum with a bias is never -0, which would come
        # before +0.
        bits = biased.to(tl.int32, bitcast=True)
        left += (tl.where((expert < experts)[None, :], bits ^ ((bits >> 31) & 0x7FFFFFFF), TAKEN),)
    chosen = tl.zeros((TOKENS, PLACES), tl.int32)
    for k in tl.static_range(CHOICES):
        # The largest score that is left of each token.
        largest = left[0]
        for group in tl.static_range(1, GROUPS):
            largest = tl.maximum(largest, left[group])
        largest = tl.max(largest, 1)
        # The lowest expert that has it.
        best = tl.full((TOKENS, LANES), GROUPS * LANES, tl.int32)
        for group in tl.static_range(GROUPS):
            expert = (group * LANES + lane)[None, :]
            best = tl.minimum(
                best, tl.where(left[group] == largest[:, None], expert, GROUPS * LANES)
            )
        best = tl.min(best, 1)
        # That expert is taken.
        remaining = ()
        for group in tl.static_range(GROUPS):
            expert = (group * LANES + lane)[None, :]
            remaining += (tl.where(expert == best[:, None], TAKEN, left[group]),)
        left = remaining
        chosen = tl.where((place == k)[None, :], best[:, None], chosen)
    inside = (token < tokens)[:, None] & (place < CHOICES)[None, :]
    weight = tl.where(inside, _score(logits_ptr, token[:, None] * experts + chosen, inside), 0.0)
    if NORMALIZE:
        weight = weight / (tl.sum(weight, 1) + 1e-20)[:, None]
    at = token[:, None] * CHOICES + place[None, :]
    tl.store(experts_ptr + at, chosen.to(tl.int64), inside)
    tl.store(weights_ptr + at, weight * scale, inside)


@triton.jit
def _choose_backward(
    scores_ptr,
    experts_ptr,
    dweights_ptr,
    dscores_ptr,
    dlogits_ptr,
    tokens,
    experts,
    scale,
    NORMALIZE: tl.constexpr,
    CHOICES: tl.constexpr,
    TOKENS: tl.constexpr,
    GROUPS: tl.constexpr,
    LANES: tl.constexpr,
    PLACES: tl.constexpr,
):
    """Compute dlogits of TOKENS tokens from the gradients of all scores, and then again for the chosen experts."""
    token = tl.program_id(0).to(tl.int64) * TOKENS + tl.arange(0, TOKENS)
    place = tl.arange(0, PLACES)
    for group in tl.static_range(GROUPS):
        expert = group * LANES + tl.arange(0, LANES)
        inside = (token < tokens)[:, None] & (expert < experts)[None, :]
        at = token[:, None] * experts + expert[None, :]
        score = tl.load(scores_ptr + at, inside, other=0.0)
        # dscore times the sigmoid's derivative
        tl.store(
            dlogits_ptr + at,
            tl.load(dscores_ptr + at, inside, other=0.0) * score * (1 - score),
            inside,
        )
    inside = (token < tokens)[:, None] & (place < CHOICES)[None, :]
    at = token[:, None] * CHOICES + place[None, :]
    dscore = tl.load(dweights_ptr + at, inside, other=0.0) * scale
    at = token[:, None] * experts + tl.load(experts_ptr + at, inside, other=0)
    score = tl.load(scores_ptr + at, inside, other=0.0)
    if NORMALIZE:  # back through w = s / sum of s
        total = tl.sum(score, 1) + 1e-20
        dscore = (dscore - (tl.sum(dscore * score, 1) / total)[:, None]) / total[:, None]
    dscore += tl.load(dscores_ptr + at, inside, other=0.0)
    tl.debug_barrier()  # the store above must not come after this one
    tl.store(dlogits_ptr + at, dscore * score * (1 - score), inside)


@triton.jit
def _rank(
    flat_ptr,
    order_ptr,
    inverse_ptr,
    ends_ptr,
    pairs,
    experts,
    ITEMS: tl.constexpr,
    STEP: tl.constexpr,
):
    """Sort all pairs in one launch: count the pairs before each of ITEMS pairs, and before the end of an expert.

    Pair i of expert e has the key e * pairs + i; the ends of the experts are items after the pairs, and expert e ends
    with the key (e + 1) * pairs.
    """
    item = tl.program_id(0) * ITEMS + tl.arange(0, ITEMS)
    is_pair = item < pairs
    ending = item - pairs  # the expert whose end this item is
    chosen = tl.load(flat_ptr + item, is_pair, other=0).to(tl.int32)
    key = tl.where(is_pair, chosen * pairs + item, (ending + 1) * pairs)
    row = tl.zeros((ITEMS,), tl.int32)
    for start in range(0, pairs, STEP):
        other = start + tl.arange(0, STEP)
        # Past the last pair: an expert that comes after every key.
        other_chosen = tl.load(flat_ptr + other, other < pairs, other=experts).to(tl.int32)
        other_key = other_chosen * pairs + other
        row += tl.sum((other_key[:, None] < key[None, :]).to(tl.int32), 0)
    tl.store(inverse_ptr + item, row.to(tl.int64), is_pair)
    tl.store(order_ptr + row, item.to(tl.int64), is_pair)
    tl.store(ends_ptr + ending, row, (ending >= 0) & (ending < experts))


@triton.jit
def _count(
    flat_ptr, counts_ptr, pairs, experts, blocks, BLOCK: tl.constexpr, EXPERTS: tl.constexpr
):
    """Count this block's pairs of each expert: a column of the table (expert, block)."""
    block = tl.program_id(0)
    expert = tl.arange(0, EXPERTS)
    pair = block * BLOCK + tl.arange(0, BLOCK)
    chosen = tl.load(flat_ptr + pair, pair < pairs, other=0).to(tl.int32)
    count = tl.histogram(chosen, EXPERTS, pair < pairs)
    tl.store(counts_ptr + expert * blocks + block, count, expert < experts)


@triton.jit
def _scan(counts_ptr, first_ptr, ends_ptr, blocks, LOWER: tl.constexpr, OWN: tl.constexpr):
    """Compute one expert's first row in each block, and its end.

    The first row is the number of pairs of lower experts, and of this expert's pairs in earlier blocks. Every program
    adds up all lower experts again: that many sums in parallel take less time than one program that hands each expert's
    sum to the next.
    """
    expert = tl.program_id(0)
    i = tl.arange(0, LOWER)
    lower = tl.zeros((LOWER,), tl.int32)
    for start in range(0, expert * blocks, LOWER):
        lower += tl.load(counts_ptr + start + i, start + i < expert * blocks, other=0)
    row = tl.sum(lower, 0)
    for start in range(0, blocks, OWN):
        block = start + tl.arange(0, OWN)
        count = tl.load(counts_ptr + expert * blocks + block, block < blocks, other=0)
        first = row + tl.cumsum(count, 0) - count
        tl.store(first_ptr + expert * blocks + block, first, block < blocks)
        row += tl.sum(count, 0)
    tl.store(ends_ptr + expert, row)


@triton.jit
def _place(
    flat_ptr,
    first_ptr,
    order_ptr,
    inverse_ptr,
    pairs,
    blocks,
    BLOCK: tl.constexpr,
    ITEMS: tl.constexpr,
    STEP: tl.constexpr,
):
    """Place ITEMS pairs: the block's first row of the expert, plus the earlier pairs of the expert in the block."""
    begin = tl.program_id(0) * ITEMS
    pair = begin + tl.arange(0, ITEMS)
    block = begin // BLOCK
    chosen = tl.load(flat_ptr + pair, pair < pairs, other=0).to(tl.int32)
    row = tl.load(first_ptr + chosen * blocks + block, pair < pairs, other=0)
    for start in range(0, begin - block * BLOCK + ITEMS, STEP):
        other = start + tl.arange(0, STEP)  # counted in the block, as is `pair - block * BLOCK`
        exists = block * BLOCK + other < pairs
        other_chosen = tl.load(flat_ptr + block * BLOCK + other, exists, other=0).to(tl.int32)
        key = other_chosen * BLOCK + other
        # Same expert and earlier, in one comparison: a negative number is a very large unsigned one.
        distance = (key[:, None] - (chosen * BLOCK)[None, :]).to(tl.uint32)
        earlier = distance < (pair - block * BLOCK).to(tl.uint32)[None, :]
        row += tl.sum(earlier.to(tl.int32), 0)
    tl.store(inverse_ptr + pair, row.to(tl.int64), pair < pairs)
    tl.store(order_ptr + row, pair.to(tl.int64), pair < pairs)


def _choice_constants(experts: int, top_k: int) -> dict[str, int]:
    """Return the sizes that the kernels of the choice are compiled for."""
    return {
        "CHOICES": top_k,
        "TOKENS": TOKENS,
        "GROUPS": triton.cdiv(experts, LANES),
        "LANES": LANES,
        "PLACES": triton.next_power_of_2(top_k),
    }


class _Route(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, logits_TE: Tensor, bias_E: Tensor, top_k: int, normalize: bool, scale: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        logits_TE = logits_TE.contiguous()
        T, E = logits_TE.shape
        experts_TK = torch.empty(T, top_k, dtype=torch.int64, device=logits_TE.device)
        weights_TK = logits_TE.new_empty(T, top_k)
        scores_TE = torch.empty_like(logits_TE)
        if T:
            _choose[(triton.cdiv(T, TOKENS),)](
                logits_TE,
                bias_E,
                experts_TK,
                weights_TK,
                scores_TE,
                T,
                E,
                scale,
                NORMALIZE=normalize,
                **_choice_constants(E, top_k),
                num_warps=1,
            )
        ctx.normalize = normalize
        ctx.scale = scale
        ctx.save_for_backward(scores_TE, experts_TK)
        ctx.mark_non_differentiable(experts_TK)
        return experts_TK, weights_TK, scores_TE

    @staticmethod
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]  torch declares *grads
        ctx: Any, _: None, dweights_TK: Tensor, dscores_TE: Tensor
    ) -> tuple[Tensor | None, ...]:
        scores_TE, experts_TK = ctx.saved_tensors
        T, E = scores_TE.shape
        dlogits_TE = torch.empty_like(scores_TE)
        if T:
            _choose_backward[(triton.cdiv(T, TOKENS),)](
                scores_TE,
                experts_TK,
                dweights_TK.contiguous(),
                dscores_TE.contiguous(),
                dlogits_TE,
                T,
                E,
                ctx.scale,
                NORMALIZE=ctx.normalize,
                **_choice_constants(E, experts_TK.shape[1]),
                num_warps=1,
            )
        return dlogits_TE, None, None, None, None


def route_triton(
    logits_TE: Tensor, bias_E: Tensor, top_k: int, normalize: bool = True, scale: float = 1.0
) -> tuple[Tensor, Tensor, Tensor]:
    """Choose top_k experts for each token: (experts int64 (T, K), weights (T, K), scores (T, E)), all else float32.

    Raises ValueError for other dtypes of the logits and the bias. Eager form:
    `minglm.kernels.router.eager.route`.
    """
    if logits_TE.dtype != torch.float32 or bias_E.dtype != torch.float32:
        raise ValueError(
            f"the router computes in float32, got {logits_TE.dtype} and {bias_E.dtype}"
        )
    return _Route.apply(logits_TE, bias_E, top_k, normalize, float(scale))


def _histogram_bins(experts: int) -> int:
    """Return the bins of a block's counts: a power of two, and at least one for each thread of a warp."""
    return max(32, triton.next_power_of_2(experts))


def group_by_expert_triton(experts_TK: Tensor, experts: int) -> SortedPairs:
    """Sort the pairs of experts (T, K), int64, by expert, stably; the host does not wait for the counts.

    Eager form: `minglm.kernels.router.eager.group_by_expert`.
    """
    flat = experts_TK.reshape(-1).contiguous()
    pairs = len(flat)
    order = torch.empty_like(flat)
    inverse = torch.empty_like(flat)
    ends_E = torch.empty(experts, dtype=torch.int32, device=flat.device)
    if pairs <= MAX_RANKED:
        programs = triton.cdiv(pairs + experts, ITEMS)
        _rank[(programs,)](flat, order, inverse, ends_E, pairs, experts, ITEMS=ITEMS, STEP=STEP)
        return SortedPairs(order, inverse, ends_E)
    blocks = triton.cdiv(pairs, BLOCK)
    counts, first = torch.empty(2, experts, blocks, dtype=torch.int32, device=flat.device)
    bins = _histogram_bins(experts)
    _count[(blocks,)](flat, counts, pairs, experts, blocks, BLOCK=BLOCK, EXPERTS=bins)
    _scan[(experts,)](counts, first, ends_E, blocks, LOWER=LOWER, OWN=OWN)
    _place[(triton.cdiv(pairs, ITEMS),)](
        flat, first, order, inverse, pairs, blocks, BLOCK=BLOCK, ITEMS=ITEMS, STEP=STEP
    )
    return SortedPairs(order, inverse, ends_E)


def _choice_specs(experts: int) -> Iterator[Spec]:
    """Yield the Specs of the choice and of the first kernel of the sort, for this number of experts."""
    constants = {**_choice_constants(experts, 8), "NORMALIZE": True}
    numbers = {"experts_ptr": "*i64", "tokens": "i32", "experts": "i32", "scale": "fp32"}
    pointers = dict.fromkeys(("logits_ptr", "bias_ptr", "weights_ptr", "scores_ptr"), "*fp32")
    yield Spec(f"route {experts}", _choose, pointers | numbers, constants, warps=1)
    pointers = dict.fromkeys(("scores_ptr", "dweights_ptr", "dscores_ptr", "dlogits_ptr"), "*fp32")
    yield Spec(
        name=f"route backward {experts}",
        kernel=_choose_backward,
        signature=pointers | numbers,
        constants=constants,
        warps=1,
        aligned=("experts",),
    )
    yield Spec(
        name=f"count {experts}",
        kernel=_count,
        signature={
            "flat_ptr": "*i64",
            "counts_ptr": "*i32",
            "pairs": "i32",
            "experts": "i32",
            "blocks": "i32",
        },
        constants={"BLOCK": BLOCK, "EXPERTS": _histogram_bins(experts)},
        aligned=("experts",),
    )


def _specs() -> Iterator[Spec]:
    """Yield the Specs for the experts and choices of GLM-4.5 and of GLM-4.5-Air."""
    for experts in (160, 128):
        yield from _choice_specs(experts)
    yield Spec(
        name="scan",
        kernel=_scan,
        signature={
            "counts_ptr": "*i32",
            "first_ptr": "*i32",
            "ends_ptr": "*i32",
            "blocks": "i32",
        },
        constants={"LOWER": LOWER, "OWN": OWN},
        aligned=("blocks",),
    )
    pairs = {"flat_ptr": "*i64", "order_ptr": "*i64", "inverse_ptr": "*i64", "pairs": "i32"}
    yield Spec(
        name="place",
        kernel=_place,
        signature=pairs | {"first_ptr": "*i32", "blocks": "i32"},
        constants={"ITEMS": ITEMS, "STEP": STEP, "BLOCK": BLOCK},
        aligned=("pairs", "blocks"),
    )
    yield Spec(
        name="rank",
        kernel=_rank,
        signature=pairs | {"ends_ptr": "*i32", "experts": "i32"},
        constants={"ITEMS": ITEMS, "STEP": STEP},
        aligned=("pairs", "experts"),
    )


SPECS = list(_specs())
