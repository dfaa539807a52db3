"""The router's choice and the sort by expert as Triton kernels. Equations and plain forms: `router_topk.py`.

A program is one warp with a few tokens and all their E scores in registers, in groups of one expert a lane, so that no
step waits for another warp and few lanes are without an expert. It picks K times the largest that is left: with K = 8
of 160 that is less work than a sort. Scores are compared as integers in the same order, because a warp finds the
largest integer in one instruction. The lowest expert of the largest score is a second such step, which gives ties to
the lower expert exactly. The smallest integer is no score but marks an expert as taken.

The sort has no atomic additions in memory: the row of a pair is the number of pairs that come before it, a count.
Up to ALONE pairs one launch compares every pair with every other. Beyond that three launches do: blocks of pairs count
their pairs of each expert, running sums over the table (expert, block) are the first rows of each expert in each block,
and a pair adds to that the number of earlier pairs of its own expert in its block.
"""

import torch
import triton
import triton.language as tl

from minglm.kernels.toolchain.spec import Spec

TOKENS, LANES = 2, 32  # tokens of a program of the choice, which is one warp; experts of a group
ALONE, BLOCK = (
    1024,
    512,
)  # pairs that one launch sorts; pairs of a block of the table, a multiple of ITEMS
# Pairs that a program places, and with how many it compares them at a time. More of these than its 128 threads: up to
# that many Triton lets every thread load all of them, and not shared memory hand them round.
ITEMS, STEP = 128, 256
LOWER, OWN = (
    4096,
    512,
)  # counts of lower experts that the running sums take at a time, and of their own


@triton.jit
def _score(logits_ptr, at, inside):
    """Sigmoid of the logits: an expression of its own, so that a chosen score has the same bits when computed again."""
    return 1 / (1 + tl.exp(-tl.load(logits_ptr + at, inside, other=0.0)))


@triton.jit(
    do_not_specialize=["experts"]
)  # that it is a multiple of 16 would give a lane four experts side by side
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
    """Scores of TOKENS tokens, and CHOICES times the largest biased score that is left of each."""
    token = tl.program_id(0).to(tl.int64) * TOKENS + tl.arange(0, TOKENS)
    lane, place = tl.arange(0, LANES), tl.arange(0, PLACES)
    TAKEN: tl.constexpr = -(2**31)
    left = ()
    for group in tl.static_range(GROUPS):
        expert = group * LANES + lane
        inside = (token < tokens)[:, None] & (expert < experts)[None, :]
        at = token[:, None] * experts + expert[None, :]
        score = _score(logits_ptr, at, inside)
        tl.store(scores_ptr + at, score, inside)
        biased = score + tl.load(bias_ptr + expert, expert < experts, other=0.0)[None, :]
        biased = tl.where(biased == biased, biased, float("-inf"))
        # the order of floats: a score is at least +0, so its sum with a bias is never -0, which would come before +0
        bits = biased.to(tl.int32, bitcast=True)
        left += (tl.where((expert < experts)[None, :], bits ^ ((bits >> 31) & 0x7FFFFFFF), TAKEN),)
    chosen = tl.zeros((TOKENS, PLACES), tl.int32)
    for k in tl.static_range(CHOICES):
        largest = left[0]
        for group in tl.static_range(1, GROUPS):
            largest = tl.maximum(largest, left[group])
        largest = tl.max(largest, 1)
        best = tl.full((TOKENS, LANES), GROUPS * LANES, tl.int32)
        for group in tl.static_range(GROUPS):
            expert = (group * LANES + lane)[None, :]
            best = tl.minimum(
                best, tl.where(left[group] == largest[:, None], expert, GROUPS * LANES)
            )
        best = tl.min(best, 1)
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
    """dlogits of TOKENS tokens from the gradients of all their scores, and then again of those that were chosen."""
    token = tl.program_id(0).to(tl.int64) * TOKENS + tl.arange(0, TOKENS)
    place = tl.arange(0, PLACES)
    for group in tl.static_range(GROUPS):
        expert = group * LANES + tl.arange(0, LANES)
        inside = (token < tokens)[:, None] & (expert < experts)[None, :]
        at = token[:, None] * experts + expert[None, :]
        score = tl.load(scores_ptr + at, inside, other=0.0)
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
    if NORMALIZE:
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
    """The whole sort: how many pairs come before each of ITEMS pairs, and before the end of an expert.

    Pair i of expert e has the key e * pairs + i; the ends of the experts are items after the pairs, and expert e ends
    with the key (e + 1) * pairs.
    """
    item = tl.program_id(0) * ITEMS + tl.arange(0, ITEMS)
    is_pair, ending = item < pairs, item - pairs
    chosen = tl.load(flat_ptr + item, is_pair, other=0).to(tl.int32)
    key, row = (
        tl.where(is_pair, chosen * pairs + item, (ending + 1) * pairs),
        tl.zeros((ITEMS,), tl.int32),
    )
    for start in range(0, pairs, STEP):
        other = start + tl.arange(0, STEP)
        # past the last pair: an expert that comes after every key
        other_key = (
            tl.load(flat_ptr + other, other < pairs, other=experts).to(tl.int32) * pairs + other
        )
        row += tl.sum((other_key[:, None] < key[None, :]).to(tl.int32), 0)
    tl.store(inverse_ptr + item, row.to(tl.int64), is_pair)
    tl.store(order_ptr + row, item.to(tl.int64), is_pair)
    tl.store(ends_ptr + ending, row, (ending >= 0) & (ending < experts))


@triton.jit
def _count(
    flat_ptr, counts_ptr, pairs, experts, blocks, BLOCK: tl.constexpr, EXPERTS: tl.constexpr
):
    """How many of this block's pairs go to each expert: a column of the table (expert, block)."""
    block, expert = tl.program_id(0), tl.arange(0, EXPERTS)
    pair = block * BLOCK + tl.arange(0, BLOCK)
    chosen = tl.load(flat_ptr + pair, pair < pairs, other=0).to(tl.int32)
    count = tl.histogram(chosen, EXPERTS, pair < pairs)
    tl.store(counts_ptr + expert * blocks + block, count, expert < experts)


@triton.jit
def _scan(counts_ptr, first_ptr, ends_ptr, blocks, LOWER: tl.constexpr, OWN: tl.constexpr):
    """One expert's first row in each block and its end: all pairs of lower experts, and its own of earlier blocks.

    Every program adds up all lower experts again: that many sums at the same time take less time than one program that
    hands each expert's sum to the next.
    """
    expert, i = tl.program_id(0), tl.arange(0, LOWER)
    lower = tl.zeros((LOWER,), tl.int32)
    for start in range(0, expert * blocks, LOWER):
        lower += tl.load(counts_ptr + start + i, start + i < expert * blocks, other=0)
    row = tl.sum(lower, 0)
    for start in range(0, blocks, OWN):
        block = start + tl.arange(0, OWN)
        count = tl.load(counts_ptr + expert * blocks + block, block < blocks, other=0)
        tl.store(
            first_ptr + expert * blocks + block, row + tl.cumsum(count, 0) - count, block < blocks
        )
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
    """Where ITEMS pairs go: the block's first row of the expert, plus the earlier pairs of the expert in the block."""
    begin = tl.program_id(0) * ITEMS
    pair, block = begin + tl.arange(0, ITEMS), begin // BLOCK
    chosen = tl.load(flat_ptr + pair, pair < pairs, other=0).to(tl.int32)
    row = tl.load(first_ptr + chosen * blocks + block, pair < pairs, other=0)
    for start in range(0, begin - block * BLOCK + ITEMS, STEP):
        other = start + tl.arange(0, STEP)  # in the block, as is `pair - block * BLOCK`
        there = block * BLOCK + other < pairs
        key = tl.load(flat_ptr + block * BLOCK + other, there, other=0).to(tl.int32) * BLOCK + other
        # of the same expert and earlier, in one comparison: below 0 is far above as an unsigned number
        distance = (key[:, None] - (chosen * BLOCK)[None, :]).to(tl.uint32)
        earlier = distance < (pair - block * BLOCK).to(tl.uint32)[None, :]
        row += tl.sum(earlier.to(tl.int32), 0)
    tl.store(inverse_ptr + pair, row.to(tl.int64), pair < pairs)
    tl.store(order_ptr + row, pair.to(tl.int64), pair < pairs)


def _sizes(experts, top_k):
    return {
        "CHOICES": top_k,
        "TOKENS": TOKENS,
        "GROUPS": triton.cdiv(experts, LANES),
        "LANES": LANES,
        "PLACES": triton.next_power_of_2(top_k),
    }


class _Route(torch.autograd.Function):
    @staticmethod
    def forward(ctx, logits_TE, bias_E, top_k, normalize, scale):
        (T, E), logits_TE = logits_TE.shape, logits_TE.contiguous()
        experts_TK = torch.empty(T, top_k, dtype=torch.int64, device=logits_TE.device)
        weights_TK, scores_TE = logits_TE.new_empty(T, top_k), torch.empty_like(logits_TE)
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
                **_sizes(E, top_k),
                num_warps=1,
            )
        ctx.normalize, ctx.scale = normalize, scale
        ctx.save_for_backward(scores_TE, experts_TK)
        ctx.mark_non_differentiable(experts_TK)
        return experts_TK, weights_TK, scores_TE

    @staticmethod
    def backward(ctx, _, dweights_TK, dscores_TE):
        scores_TE, experts_TK = ctx.saved_tensors
        (T, E), dlogits_TE = scores_TE.shape, torch.empty_like(scores_TE)
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
                **_sizes(E, experts_TK.shape[1]),
                num_warps=1,
            )
        return dlogits_TE, None, None, None, None


def route_triton(logits_TE, bias_E, top_k, normalize=True, scale=1.0):
    """The same as `minglm.kernels.router.eager.router_topk`; float32. Raises ValueError for other dtypes."""
    if logits_TE.dtype != torch.float32 or bias_E.dtype != torch.float32:
        raise ValueError(
            f"the router computes in float32, got {logits_TE.dtype} and {bias_E.dtype}"
        )
    return _Route.apply(logits_TE, bias_E, top_k, normalize, float(scale))


def _bins(experts):
    """Bins of a block's counts: a power of two, and one at least for each thread of a warp."""
    return max(32, triton.next_power_of_2(experts))


def group_by_expert_triton(experts_TK, experts):
    """The same as `minglm.kernels.router.eager.group_by_expert`, without the host waiting for the counts."""
    flat = experts_TK.reshape(-1).contiguous()
    pairs, blocks = len(flat), triton.cdiv(len(flat), BLOCK)
    order, inverse = torch.empty_like(flat), torch.empty_like(flat)
    ends_E = torch.empty(experts, dtype=torch.int32, device=flat.device)
    if pairs <= ALONE:
        programs = triton.cdiv(pairs + experts, ITEMS)
        _rank[(programs,)](flat, order, inverse, ends_E, pairs, experts, ITEMS=ITEMS, STEP=STEP)
        return order, inverse, ends_E
    counts, first = torch.empty(2, experts, blocks, dtype=torch.int32, device=flat.device)
    _count[(blocks,)](flat, counts, pairs, experts, blocks, BLOCK=BLOCK, EXPERTS=_bins(experts))
    _scan[(experts,)](counts, first, ends_E, blocks, LOWER=LOWER, OWN=OWN)
    _place[(triton.cdiv(pairs, ITEMS),)](
        flat, first, order, inverse, pairs, blocks, BLOCK=BLOCK, ITEMS=ITEMS, STEP=STEP
    )
    return order, inverse, ends_E


def _specs():
    """The experts and choices of GLM-4.5 and of GLM-4.5-Air."""
    common = {"experts_ptr": "*i64", "tokens": "i32", "experts": "i32", "scale": "fp32"}
    forward = {name: "*fp32" for name in ("logits_ptr", "bias_ptr", "weights_ptr", "scores_ptr")}
    backward = {
        name: "*fp32" for name in ("scores_ptr", "dweights_ptr", "dscores_ptr", "dlogits_ptr")
    }
    for experts in (160, 128):
        constants = _sizes(experts, 8) | {"NORMALIZE": True}
        yield Spec(f"route {experts}", _choose, forward | common, constants, warps=1)
        yield Spec(
            f"route backward {experts}",
            _choose_backward,
            backward | common,
            constants,
            warps=1,
            aligned=("experts",),
        )
        sizes = {"BLOCK": BLOCK, "EXPERTS": _bins(experts)}
        signature = {
            "flat_ptr": "*i64",
            "counts_ptr": "*i32",
            "pairs": "i32",
            "experts": "i32",
            "blocks": "i32",
        }
        yield Spec(f"count {experts}", _count, signature, sizes, aligned=("experts",))
    signature = {"counts_ptr": "*i32", "first_ptr": "*i32", "ends_ptr": "*i32", "blocks": "i32"}
    yield Spec("scan", _scan, signature, {"LOWER": LOWER, "OWN": OWN}, aligned=("blocks",))
    signature = {"flat_ptr": "*i64", "order_ptr": "*i64", "inverse_ptr": "*i64", "pairs": "i32"}
    sizes, extra = {"ITEMS": ITEMS, "STEP": STEP}, {"first_ptr": "*i32", "blocks": "i32"}
    yield Spec(
        "place", _place, signature | extra, sizes | {"BLOCK": BLOCK}, aligned=("pairs", "blocks")
    )
    extra = {"ends_ptr": "*i32", "experts": "i32"}
    yield Spec("rank", _rank, signature | extra, sizes, aligned=("pairs", "experts"))


SPECS = list(_specs())
