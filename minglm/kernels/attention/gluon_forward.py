"""Causal grouped-query attention for Hopper in Gluon, forward pass: the softmax runs beside the products (paper 2.1).

It computes the same out (B, S, N, A) and log_sum (B, N, S) as `forward_triton` of `triton_forward.py`, with the same
arguments, for heads of 128 dimensions in 16 bits. Triton waits for every product as soon as it has begun, so the tensor
cores are idle during each softmax. Gluon is Triton's lower level: layouts, copies, barriers and waits are explicit, and
a product may run while others compute.

One program computes ROWS queries of one head. It walks along the key tiles from the diagonal to the left, j = 0, 1, ...,
with the schedule of FlashAttention-3 (arXiv 2407.08608, sections 3.1 and 3.2): a warp that only copies, and two warp
groups of ROWS / 2 queries each that only compute, and take turns (ping-pong): while one computes its softmax, the tensor
cores work for the other.

    copies         Q, K_0; for each tile j: K_(j+1) once that stage is empty, V_j once that stage is empty
    a warp group   its turn:  begin S_j = Q K_j' and O += P_(j-1) V_(j-1);  then it is the other group's turn
                   wait for S_j, and signal that K_j is read;  P_j = 2^(S_j - maximum)
                   wait for O, and signal that V_(j-1) is read;  O *= shrink;  P_j to 16 bits

Choices, each with its reason:
- Keys and values have a ring of STAGES tiles each, filled by the copy engine (TMA). Copies and products meet at
  barriers in shared memory. Every stage has two: `ready`, which the copy engine completes, and `empty`, which both
  groups do. The n-th use of a stage waits for phase n of `ready`, and for phase n - 1 of `empty`; phase -1 counts as
  complete. A barrier knows the lowest bit of its phase.
- A turn is a barrier too, one for each group, completed by the other one. Both groups walk along the same tiles, so
  turns alternate to the end. They only give an order; without them it took 4% longer.
- The walk starts at the diagonal: there each query sees itself, so from then on every maximum is a real one, and the
  tiles with a mask at the left end of documents come last. The tiles between need no mask and have a loop of their own.
- The wait for the next keys is between the softmax and the wait for O. It costs nothing, since those keys came long ago,
  but it is a branch: the assembler moves the wait for O up to the softmax's beginning where no branch is between them.
- The columns of P that a thread holds are summed by that thread; the four threads of a row combine after the last tile.
- All products begin and are waited for in one iteration of the loop. O in flight across iterations would let S_(j+1)
  begin earlier, but the assembler then waits for each product separately (its warning C7514).
- Registers move from the warp that copies to those that compute: 168 a thread at the start, then 24 and 240.
- Tensors are seen as (B, S, heads A): what lies beyond S arrives as zeros, and is not written.
"""

# Triton has no types for a kernel's tensors, constexpr arguments, loops and launch options:
# pyright: reportArgumentType=false, reportCallIssue=false, reportOperatorIssue=false, reportAttributeAccessIssue=false
# pyright: reportGeneralTypeIssues=false, reportPossiblyUnboundVariable=false
# pyright: reportAssignmentType=false, reportIndexIssue=false

from collections.abc import Iterator
from typing import Any

import triton
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from minglm.kernels.attention.triton_common import LOG2E, LOWEST
from minglm.kernels.toolchain.spec import Spec

# Copies by the copy engine; their names differ between Triton 3.6 and later versions.
load = tma.async_load if hasattr(tma, "async_load") else tma.async_copy_global_to_shared
store = tma.async_store if hasattr(tma, "async_store") else tma.async_copy_shared_to_global
WIDTH = gl.constexpr(128)  # dimensions of a head
TILES = {"ROWS": 128, "KEYS": 128, "STAGES": 2}
# Layout of a tile in shared memory.
LAYOUT = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=3)
WARPS = 4  # warps of a group; the second group and the copies have further warps


@gluon.jit
def _spans(begin, batch, row, S, ROWS: gl.constexpr, KEYS: gl.constexpr, DOCUMENTS: gl.constexpr):
    """Count the key tiles that a tile of queries reads, and those before the first that needs a mask again.

    Tile j has the KEYS keys from row + ROWS - (j + 1) KEYS on. The first ROWS / KEYS of them are the diagonal.
    """
    end = row + ROWS
    first = row * 0
    last = row * 0
    if DOCUMENTS:
        first = gl.load(begin + batch * S + row)
        last = gl.load(begin + batch * S + gl.minimum(end, S) - 1)
    return (end - first + KEYS - 1) // KEYS, gl.maximum((end - last) // KEYS, ROWS // KEYS)


@gluon.jit
def _begins(begin, batch, rows, S, DOCUMENTS: gl.constexpr):
    """Load the first key that each query may see: begin_i, or 0 without documents."""
    if DOCUMENTS:
        return gl.load(begin + batch * S + rows, mask=rows < S, other=0)
    else:
        return rows * 0


@gluon.jit
def _fetch(
    x, ring, ready, batch, end, column, tile, tiles, KEYS: gl.constexpr, STAGES: gl.constexpr
):
    """Begin the copy of a key tile to its stage, if there is such a tile."""
    stage = tile % STAGES
    wanted = tile < tiles
    mbarrier.expect(ready.index(stage), x.block_type.nbytes, pred=wanted)
    load(
        x,
        [batch, end - (tile + 1) * KEYS, column],
        ready.index(stage),
        ring.index(stage),
        pred=wanted,
    )


@gluon.jit
def _wait_ready(ready, tile, tiles, STAGES: gl.constexpr):
    """Wait until a key tile has arrived, if there is such a tile."""
    mbarrier.wait(ready.index(tile % STAGES), (tile // STAGES) & 1, pred=tile < tiles)


@gluon.jit
def _wait_empty(empty, tile, tiles, STAGES: gl.constexpr):
    """Wait until both groups have read what the stage of a key tile held before, if there is such a tile."""
    mbarrier.wait(empty.index(tile % STAGES), (tile // STAGES + 1) & 1, pred=tile < tiles)


@gluon.jit
def _tile(ring, tile, STAGES: gl.constexpr):
    """Return a key tile in its ring, as a matrix."""
    return ring.index(tile % STAGES).reshape([ring.shape[2], ring.shape[3]])


@gluon.jit
def _scores(query, keys, tile, STAGES: gl.constexpr):
    """Begin the product S_j = Q K_j' of queries and a tile of keys."""
    ROWS: gl.constexpr = query.shape[0]
    KEYS: gl.constexpr = keys.shape[2]
    layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [ROWS // 16, 1], [16, KEYS, 16])
    zeros = gl.zeros([ROWS, KEYS], gl.float32, layout)
    return warpgroup_mma(
        query, _tile(keys, tile, STAGES).permute((1, 0)), zeros, use_acc=False, is_async=True
    )


@gluon.jit
def _masked(scores, rows, begins, key):
    """Return the scores of the keys from `key` on, with -inf where a query does not see a key."""
    keys = key + gl.arange(0, scores.shape[1], gl.SliceLayout(0, scores.type.layout))
    seen = (keys[None, :] <= rows[:, None]) & (keys[None, :] >= begins[:, None])
    return gl.where(seen, scores, float("-inf"))


@gluon.jit
def _softmax(scores, most, factor):
    """Compute the weights P_j = 2^(S_j - maximum) of one more tile, the factor of older sums, and the new maximum."""
    highest = gl.maximum(most, gl.max(scores, 1) * factor)
    weights = gl.exp2(scores * factor - highest[:, None])
    shrink = gl.exp2(most - highest)
    return weights, shrink, highest


@gluon.jit
def _thread_sums(weights):
    """Compute four sums of each row, one for each of its four threads: thread i has columns 2 i, 2 i + 1 of every 8."""
    ROWS: gl.constexpr = weights.shape[0]
    KEYS: gl.constexpr = weights.shape[1]
    return gl.sum(gl.sum(weights.reshape([ROWS, KEYS // 8, 4, 2]), 3), 1)


@gluon.jit
def _operand(weights, dtype: gl.constexpr):
    """Return weights as the left side of a product, in the registers where they are."""
    return gl.convert_layout(weights.to(dtype), gl.DotOperandLayout(0, weights.type.layout, 2))


@gluon.jit
def _first(query, keys, rows, begins, end, factor, dtype: gl.constexpr, STAGES: gl.constexpr):
    """Compute what the walk carries after tile 0: (O, P_0, the sums of P, the maxima)."""
    ROWS: gl.constexpr = query.shape[0]
    scores = warpgroup_mma_wait(0, deps=[_scores(query, keys, 0, STAGES)])
    scores = _masked(scores, rows, begins, end - scores.shape[1])
    weights, shrink, most = _softmax(
        scores, gl.full([ROWS], LOWEST, gl.float32, rows.type.layout), factor
    )
    layout: gl.constexpr = gl.NVMMADistributedLayout(
        [3, 0], [ROWS // 16, 1], [16, keys.shape[2], 16]
    )
    return (
        gl.zeros([ROWS, WIDTH], gl.float32, layout),
        _operand(weights, dtype),
        _thread_sums(weights),
        most,
    )


@gluon.jit
def _last(values, v_ready, tiles, carried, STAGES: gl.constexpr):
    """Compute out and log_sum of the queries: add the last tile's values, and divide by the sums."""
    sums, weights, total, most = carried
    _wait_ready(v_ready, tiles - 1, tiles, STAGES)
    sums = warpgroup_mma(weights, _tile(values, tiles - 1, STAGES), sums, is_async=True)
    sums = warpgroup_mma_wait(0, deps=[sums])
    total = gl.convert_layout(gl.sum(total, 1), most.type.layout)
    return sums * (1 / total)[:, None], most + gl.log2(total)


@gluon.jit
def _copy(
    q,
    k,
    v,
    begin,
    S,
    n,
    batch,
    row,
    queries,
    keys,
    values,
    barriers,
    GROUP: gl.constexpr,
    DOCUMENTS: gl.constexpr,
    ROWS: gl.constexpr,
    KEYS: gl.constexpr,
    STAGES: gl.constexpr,
):
    """Do the work of the warp that copies: the keys are one tile ahead of the values, as their products are."""
    q_ready, k_ready, v_ready, k_empty, v_empty, turns = barriers
    end = row + ROWS
    column = n // GROUP * WIDTH
    tiles, masked = _spans(begin, batch, row, S, ROWS, KEYS, DOCUMENTS)
    for half in gl.static_range(2):
        mbarrier.expect(q_ready.index(half), q.block_type.nbytes)
        load(
            q,
            [batch, row + half * (ROWS // 2), n * WIDTH],
            q_ready.index(half),
            queries.index(half),
        )
    _fetch(k, keys, k_ready, batch, end, column, 0, tiles, KEYS, STAGES)
    for tile in range(0, tiles):
        _wait_empty(k_empty, tile + 1, tiles, STAGES)
        _fetch(k, keys, k_ready, batch, end, column, tile + 1, tiles, KEYS, STAGES)
        _wait_empty(v_empty, tile, tiles, STAGES)
        _fetch(v, values, v_ready, batch, end, column, tile, tiles, KEYS, STAGES)


@gluon.jit
def _step(
    query,
    keys,
    values,
    barriers,
    rows,
    begins,
    factor,
    end,
    tiles,
    tile,
    carried,
    STAGES: gl.constexpr,
    HALF: gl.constexpr,
    MASK: gl.constexpr,
):
    """Take one turn of a group: the scores and weights of tile j, and O with tile j - 1."""
    q_ready, k_ready, v_ready, k_empty, v_empty, turns = barriers
    sums, weights, total, most = carried  # O, P_(j-1), the sums of P, the maxima
    # Wait for this group's turn. The walk is at tile 1 when the first group waits for the first time.
    mbarrier.wait(turns.index(HALF), (tile + HALF) & 1)
    scores = _scores(query, keys, tile, STAGES)
    _wait_ready(v_ready, tile - 1, tiles, STAGES)
    sums = warpgroup_mma(weights, _tile(values, tile - 1, STAGES), sums, is_async=True)
    mbarrier.arrive(turns.index(1 - HALF), count=1)
    scores = warpgroup_mma_wait(1, deps=[scores])
    # K_j is read. One thread signals it for its group; the compiler puts a barrier of the group before it.
    mbarrier.arrive(k_empty.index(tile % STAGES), count=1)
    if MASK:
        scores = _masked(scores, rows, begins, end - (tile + 1) * keys.shape[2])
    fresh, shrink, most = _softmax(scores, most, factor)
    by_row: gl.constexpr = gl.SliceLayout(1, total.type.layout)
    total = total * gl.convert_layout(shrink, by_row)[:, None] + _thread_sums(fresh)
    _wait_ready(k_ready, tile + 1, tiles, STAGES)
    sums, weights = warpgroup_mma_wait(0, deps=[sums, weights])
    mbarrier.arrive(v_empty.index((tile - 1) % STAGES), count=1)
    return sums * shrink[:, None], _operand(fresh, weights.dtype), total, most


@gluon.jit
def _compute(
    begin,
    out,
    log_sum,
    S,
    stride,
    factor,
    n,
    batch,
    row,
    queries,
    keys,
    values,
    barriers,
    DOCUMENTS: gl.constexpr,
    ROWS: gl.constexpr,
    KEYS: gl.constexpr,
    STAGES: gl.constexpr,
    HALF: gl.constexpr,
):
    """Do the work of a warp group: out and log_sum of the first half of the queries (HALF 0) or the second (1)."""
    q_ready, k_ready, v_ready, k_empty, v_empty, turns = barriers
    layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, KEYS, 16])
    top = row + HALF * (ROWS // 2)
    end = row + ROWS
    rows = top + gl.arange(0, ROWS // 2, gl.SliceLayout(1, layout))
    begins = _begins(begin, batch, rows, S, DOCUMENTS)
    tiles, masked = _spans(begin, batch, row, S, ROWS, KEYS, DOCUMENTS)

    buffer = queries.index(HALF)  # holds the queries, and at the end out
    query = buffer.reshape([ROWS // 2, WIDTH])
    mbarrier.wait(q_ready.index(HALF), 0)
    _wait_ready(k_ready, 0, tiles, STAGES)
    carried = _first(query, keys, rows, begins, end, factor, queries.dtype, STAGES)
    mbarrier.arrive(k_empty.index(0), count=1)
    _wait_ready(k_ready, 1, tiles, STAGES)
    # The rest of the diagonal, with a mask.
    for tile in gl.static_range(1, ROWS // KEYS):
        carried = _step(
            query,
            keys,
            values,
            barriers,
            rows,
            begins,
            factor,
            end,
            tiles,
            tile,
            carried,
            STAGES,
            HALF,
            True,
        )
    # The keys that every query sees.
    for tile in range(ROWS // KEYS, masked):
        carried = _step(
            query,
            keys,
            values,
            barriers,
            rows,
            begins,
            factor,
            end,
            tiles,
            tile,
            carried,
            STAGES,
            HALF,
            False,
        )
    # The left end of documents, with a mask.
    if DOCUMENTS:
        for tile in range(masked, tiles):
            carried = _step(
                query,
                keys,
                values,
                barriers,
                rows,
                begins,
                factor,
                end,
                tiles,
                tile,
                carried,
                STAGES,
                HALF,
                True,
            )
    sums, logs = _last(values, v_ready, tiles, carried, STAGES)

    query.store(sums.to(queries.dtype))
    fence_async_shared()  # the copy engine must see what was stored
    store(out, [batch, top, n * WIDTH], buffer)
    head = batch.to(gl.int64) * gl.num_programs(0) + n
    gl.store(log_sum + head * stride + rows, logs, mask=rows < S)
    tma.store_wait(0)


@gluon.jit
def _barriers(COUNT: gl.constexpr, ARRIVALS: gl.constexpr):
    """Allocate COUNT barriers, each of which ARRIVALS arrivals complete."""
    barriers = gl.allocate_shared_memory(gl.int64, [COUNT, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(COUNT):
        mbarrier.init(barriers.index(i), count=ARRIVALS)
    return barriers


@gluon.jit
def _forward(
    q,
    k,
    v,
    begin,
    out,
    log_sum,
    S,
    stride,
    factor,
    GROUP: gl.constexpr,
    DOCUMENTS: gl.constexpr,
    ROWS: gl.constexpr,
    KEYS: gl.constexpr,
    STAGES: gl.constexpr,
):
    """Compute out and log_sum of ROWS queries of one head. Grid: (query head, tile of queries, batch).

    stride: of log_sum, from one head to the next.
    """
    n = gl.program_id(0)
    batch = gl.program_id(2)
    row = ((S + ROWS - 1) // ROWS - 1 - gl.program_id(1)) * ROWS
    queries = gl.allocate_shared_memory(q.dtype, [2, 1, ROWS // 2, WIDTH], q.layout)
    keys = gl.allocate_shared_memory(k.dtype, [STAGES, 1, KEYS, WIDTH], k.layout)
    values = gl.allocate_shared_memory(v.dtype, [STAGES, 1, KEYS, WIDTH], v.layout)
    barriers = (
        _barriers(2, 1),  # q_ready, for each half of the queries
        _barriers(STAGES, 1),  # k_ready
        _barriers(STAGES, 1),  # v_ready
        _barriers(STAGES, 2),  # k_empty, by both groups
        _barriers(STAGES, 2),  # v_empty, by both groups
        _barriers(2, 1),  # turns, for each group
    )
    fence_async_shared()  # the copy engine must see the barriers
    # Constants stay constants only in tuples that are written out.
    gl.warp_specialize(
        [
            (
                _compute,
                (
                    begin,
                    out,
                    log_sum,
                    S,
                    stride,
                    factor,
                    n,
                    batch,
                    row,
                    queries,
                    keys,
                    values,
                    barriers,
                    DOCUMENTS,
                    ROWS,
                    KEYS,
                    STAGES,
                    0,
                ),
            ),
            (
                _compute,
                (
                    begin,
                    out,
                    log_sum,
                    S,
                    stride,
                    factor,
                    n,
                    batch,
                    row,
                    queries,
                    keys,
                    values,
                    barriers,
                    DOCUMENTS,
                    ROWS,
                    KEYS,
                    STAGES,
                    1,
                ),
            ),
            (
                _copy,
                (
                    q,
                    k,
                    v,
                    begin,
                    S,
                    n,
                    batch,
                    row,
                    queries,
                    keys,
                    values,
                    barriers,
                    GROUP,
                    DOCUMENTS,
                    ROWS,
                    KEYS,
                    STAGES,
                ),
            ),
        ],
        [4, 1],
        [240, 24],
    )


def tile_descriptor(x_BSNA: Tensor, rows: int) -> Any:
    """Describe tiles of `rows` positions of one head to the copy engine."""
    from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

    return TensorDescriptor.from_tensor(x_BSNA.flatten(2), [1, rows, WIDTH.value], LAYOUT)


def forward_gluon(
    q_BSNA: Tensor,
    k_BSMA: Tensor,
    v_BSMA: Tensor,
    begin_BS: Tensor | None,
    out_BSNA: Tensor,
    log_sum_BNS: Tensor,
    scale: float,
) -> None:
    """Write out and log_sum of contiguous q (B, S, N, 128), k and v (B, S, M, 128), all of 16 bits.

    begin: int32 (B, S), the first key that each query may see, or None where it is always the first one. out: like q.
    log_sum: float32 (B, N, S).
    """
    B, S, N, _ = q_BSNA.shape
    M = k_BSMA.shape[2]
    half = TILES["ROWS"] // 2
    _forward[(N, triton.cdiv(S, TILES["ROWS"]), B)](
        tile_descriptor(q_BSNA, half),
        tile_descriptor(k_BSMA, TILES["KEYS"]),
        tile_descriptor(v_BSMA, TILES["KEYS"]),
        begin_BS,
        tile_descriptor(out_BSNA, half),
        log_sum_BNS,
        S,
        log_sum_BNS.stride(1),
        scale * LOG2E,
        GROUP=N // M,
        DOCUMENTS=begin_BS is not None,
        num_warps=WARPS,
        **TILES,
    )


def _specs() -> Iterator[Spec]:
    """Yield the Specs for the query heads of a key/value head of GLM-4.5, without and with packed documents."""
    sizes = {
        "q": TILES["ROWS"] // 2,
        "k": TILES["KEYS"],
        "v": TILES["KEYS"],
        "out": TILES["ROWS"] // 2,
    }
    types = {name: f"tensordesc<bf16[1, {size}, 128],{LAYOUT!r}>" for name, size in sizes.items()}
    types |= {"begin": "*i32", "log_sum": "*fp32", "S": "i32", "stride": "i32", "factor": "fp32"}
    for documents in (False, True):
        constants: dict[str, Any] = {"GROUP": 12, "DOCUMENTS": documents, **TILES}
        if not documents:
            constants["begin"] = None
        yield Spec(
            name=f"forward 128{' packed' if documents else ''}",
            kernel=_forward,
            signature={name: types[name] for name in _forward.arg_names if name not in constants},
            constants=constants,
            warps=WARPS,
            unit="HGMMA",
            opcodes=("UTMALDG", "UTMASTG"),
        )


SPECS = list(_specs())
