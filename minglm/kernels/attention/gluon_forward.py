"""Causal grouped-query attention for Hopper in Gluon, forward pass: softmax beside the products, not after them.

The same function as `_forward` of `flash_attention_triton.py`, and the same contract, for heads of 128 dimensions.
Triton waits for every product as soon as it has begun, so the tensor cores stand still during each softmax. Gluon is
Triton's lower level: layouts, copies, barriers and waits are written out, and a product may run while others compute.

One program computes ROWS queries of one head. It walks the key tiles from the diagonal to the left, j = 0, 1, ..., with
the schedule of FlashAttention-3 (arXiv 2407.08608, sections 3.1 and 3.2): a warp that only copies, and two warp groups
of ROWS / 2 queries each that only compute, and take turns (ping-pong): while one has its softmax, the tensor cores work
for the other.

    copies         Q, K_0; for each tile j: K_(j+1) once that stage is empty, V_j once that stage is empty
    a warp group   its turn:  begin S_j = Q K_j' and O += P_(j-1) V_(j-1);  then it is the other's turn
                   wait for S_j, and say that K_j is read;  P_j = 2^(S_j - maximum)
                   wait for O, and say that V_(j-1) is read;  O *= shrink;  P_j to 16 bits

Choices, each with its reason:
- Keys and values have a ring of STAGES tiles each, filled by the copy engine (TMA). Copies and products meet at
  barriers in shared memory. Every stage has two: `ready`, which the copy engine completes, and `empty`, which both
  groups do. The n-th use of a stage waits for phase n of `ready`, and for phase n - 1 of `empty`; phase -1 counts as
  complete. A barrier knows the lowest bit of its phase.
- A turn is a barrier too, one for each group, completed by the other one. Both groups walk the same tiles, so turns
  alternate to the end. They only give an order; without them it took 4% longer.
- The walk starts at the diagonal: there each query sees itself, so from then on every maximum is a real one, and the
  tiles with a mask at the left end of documents come last. The tiles between need no mask and have a loop of their own.
- The wait for the next keys stands between the softmax and the wait for O. It costs nothing, those keys came long ago,
  but it is a branch: the assembler moves the wait for O up to the softmax's beginning where no branch is between them.
- The columns of P that a thread holds are summed by that thread; the four threads of a row meet after the last tile.
- All products are begun and waited for in one turn of the loop. O in flight from one turn to the next would let S_(j+1)
  begin earlier, but the assembler then waits for each product by itself (its warning C7514).
- Registers move from the warp that copies to those that compute: 168 a thread at the start, then 24 and 240.
- Tensors are seen as (B, S, heads A): what lies beyond S arrives as zeros, and is not written.
"""

import triton
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

# Copies by the copy engine; Triton 3.6 has other names for them than later versions.
load = tma.async_load if hasattr(tma, "async_load") else tma.async_copy_global_to_shared
store = tma.async_store if hasattr(tma, "async_store") else tma.async_copy_shared_to_global
WIDTH = gl.constexpr(128)  # of a head
TILES = {"ROWS": 128, "KEYS": 128, "STAGES": 2}
LAYOUT = gl.NVMMASharedLayout(
    swizzle_byte_width=128, element_bitwidth=16, rank=3
)  # of a tile in shared memory
WARPS = 4  # of a group; the second group and the copies have warps of their own


@gluon.jit
def _spans(begin, batch, row, S, ROWS: gl.constexpr, KEYS: gl.constexpr, DOCUMENTS: gl.constexpr):
    """How many key tiles a tile of queries reads, and the number of the first of them that needs a mask again.

    Tile j has the KEYS keys from row + ROWS - (j + 1) KEYS on. The first ROWS / KEYS of them are the diagonal.
    """
    end, first, last = row + ROWS, row * 0, row * 0
    if DOCUMENTS:
        first = gl.load(begin + batch * S + row)
        last = gl.load(begin + batch * S + gl.minimum(end, S) - 1)
    return (end - first + KEYS - 1) // KEYS, gl.maximum((end - last) // KEYS, ROWS // KEYS)


@gluon.jit
def _begins(begin, batch, rows, S, DOCUMENTS: gl.constexpr):
    """First key that each query may see."""
    if DOCUMENTS:
        return gl.load(begin + batch * S + rows, mask=rows < S, other=0)
    else:
        return rows * 0


@gluon.jit
def _fetch(
    x, ring, ready, batch, end, column, tile, tiles, KEYS: gl.constexpr, STAGES: gl.constexpr
):
    """Begin the copy of a key tile to its stage, if there is such a tile."""
    stage, wanted = tile % STAGES, tile < tiles
    mbarrier.expect(ready.index(stage), x.block_type.nbytes, pred=wanted)
    load(
        x,
        [batch, end - (tile + 1) * KEYS, column],
        ready.index(stage),
        ring.index(stage),
        pred=wanted,
    )


@gluon.jit
def _landed(ready, tile, tiles, STAGES: gl.constexpr):
    """Wait until a key tile has come, if there is such a tile."""
    mbarrier.wait(ready.index(tile % STAGES), (tile // STAGES) & 1, pred=tile < tiles)


@gluon.jit
def _empty(empty, tile, tiles, STAGES: gl.constexpr):
    """Wait until both groups have read what the stage of a key tile held before, if there is such a tile."""
    mbarrier.wait(empty.index(tile % STAGES), (tile // STAGES + 1) & 1, pred=tile < tiles)


@gluon.jit
def _of(ring, tile, STAGES: gl.constexpr):
    """A key tile in its ring, as a matrix."""
    return ring.index(tile % STAGES).reshape([ring.shape[2], ring.shape[3]])


@gluon.jit
def _scores(query, keys, tile, STAGES: gl.constexpr):
    """Begin the product of queries and a tile of keys."""
    ROWS: gl.constexpr = query.shape[0]
    KEYS: gl.constexpr = keys.shape[2]
    layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [ROWS // 16, 1], [16, KEYS, 16])
    nothing = gl.zeros([ROWS, KEYS], gl.float32, layout)
    return warpgroup_mma(
        query, _of(keys, tile, STAGES).permute((1, 0)), nothing, use_acc=False, is_async=True
    )


@gluon.jit
def _hidden(scores, rows, begins, key):
    """Scores of the keys from `key` on, with -inf where a query does not see one."""
    keys = key + gl.arange(0, scores.shape[1], gl.SliceLayout(0, scores.type.layout))
    seen = (keys[None, :] <= rows[:, None]) & (keys[None, :] >= begins[:, None])
    return gl.where(seen, scores, float("-inf"))


@gluon.jit
def _softmax(scores, most, factor):
    """Weights 2^(score - maximum) of one more tile, by how much older sums shrink, and the new maximum."""
    highest = gl.maximum(most, gl.max(scores, 1) * factor)
    return gl.exp2(scores * factor - highest[:, None]), gl.exp2(most - highest), highest


@gluon.jit
def _summed(weights):
    """Four sums of each row, one for each thread that has some of it: of every 8 columns, 2 i and 2 i + 1."""
    ROWS: gl.constexpr = weights.shape[0]
    KEYS: gl.constexpr = weights.shape[1]
    return gl.sum(gl.sum(weights.reshape([ROWS, KEYS // 8, 4, 2]), 3), 1)


@gluon.jit
def _operand(weights, dtype: gl.constexpr):
    """Weights as the left side of a product, in the registers where they are."""
    return gl.convert_layout(weights.to(dtype), gl.DotOperandLayout(0, weights.type.layout, 2))


@gluon.jit
def _first(query, keys, rows, begins, end, factor, dtype: gl.constexpr, STAGES: gl.constexpr):
    """What the walk carries, after the scores of tile 0: (O, P, the sums of P, the maxima)."""
    ROWS: gl.constexpr = query.shape[0]
    scores = warpgroup_mma_wait(0, deps=[_scores(query, keys, 0, STAGES)])
    scores = _hidden(scores, rows, begins, end - scores.shape[1])
    weights, shrink, most = _softmax(
        scores, gl.full([ROWS], LOWEST, gl.float32, rows.type.layout), factor
    )
    layout: gl.constexpr = gl.NVMMADistributedLayout(
        [3, 0], [ROWS // 16, 1], [16, keys.shape[2], 16]
    )
    return (
        gl.zeros([ROWS, WIDTH], gl.float32, layout),
        _operand(weights, dtype),
        _summed(weights),
        most,
    )


@gluon.jit
def _last(values, v_ready, tiles, carried, STAGES: gl.constexpr):
    """out and log_sum of the queries: the last tile's values are added, and all is divided by the sums."""
    sums, weights, total, most = carried
    _landed(v_ready, tiles - 1, tiles, STAGES)
    sums = warpgroup_mma(weights, _of(values, tiles - 1, STAGES), sums, is_async=True)
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
    """The work of the warp that copies: the keys are one tile ahead of the values, as their products are."""
    q_ready, k_ready, v_ready, k_empty, v_empty, turns = barriers
    end, column = row + ROWS, n // GROUP * WIDTH
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
        _empty(k_empty, tile + 1, tiles, STAGES)
        _fetch(k, keys, k_ready, batch, end, column, tile + 1, tiles, KEYS, STAGES)
        _empty(v_empty, tile, tiles, STAGES)
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
    """One turn of a group: the scores and weights of a tile, and O with the tile before it."""
    q_ready, k_ready, v_ready, k_empty, v_empty, turns = barriers
    sums, weights, total, most = carried
    mbarrier.wait(
        turns.index(HALF), (tile + HALF) & 1
    )  # the walk is at tile 1 when the first group waits first
    scores = _scores(query, keys, tile, STAGES)
    _landed(v_ready, tile - 1, tiles, STAGES)
    sums = warpgroup_mma(weights, _of(values, tile - 1, STAGES), sums, is_async=True)
    mbarrier.arrive(turns.index(1 - HALF), count=1)
    scores = warpgroup_mma_wait(1, deps=[scores])
    # One thread says so for its group. The compiler puts a barrier of the group before it.
    mbarrier.arrive(k_empty.index(tile % STAGES), count=1)
    if MASK:
        scores = _hidden(scores, rows, begins, end - (tile + 1) * keys.shape[2])
    fresh, shrink, most = _softmax(scores, most, factor)
    by_row: gl.constexpr = gl.SliceLayout(1, total.type.layout)
    total = total * gl.convert_layout(shrink, by_row)[:, None] + _summed(fresh)
    _landed(k_ready, tile + 1, tiles, STAGES)
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
    """The work of a warp group: out and log_sum of the first half of the queries (HALF 0), or the second (1)."""
    q_ready, k_ready, v_ready, k_empty, v_empty, turns = barriers
    layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, KEYS, 16])
    top, end = row + HALF * (ROWS // 2), row + ROWS
    rows = top + gl.arange(0, ROWS // 2, gl.SliceLayout(1, layout))
    begins = _begins(begin, batch, rows, S, DOCUMENTS)
    tiles, masked = _spans(begin, batch, row, S, ROWS, KEYS, DOCUMENTS)

    buffer = queries.index(HALF)  # later of out
    query = buffer.reshape([ROWS // 2, WIDTH])
    mbarrier.wait(q_ready.index(HALF), 0)
    _landed(k_ready, 0, tiles, STAGES)
    carried = _first(query, keys, rows, begins, end, factor, queries.dtype, STAGES)
    mbarrier.arrive(k_empty.index(0), count=1)
    _landed(k_ready, 1, tiles, STAGES)
    for tile in gl.static_range(1, ROWS // KEYS):  # what of the diagonal is left
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
    """COUNT new barriers, each of which ARRIVALS arrivals complete."""
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
    """out and log_sum of ROWS queries of one head. stride: of log_sum, from one head to the next."""
    n, batch = gl.program_id(0), gl.program_id(2)
    row = ((S + ROWS - 1) // ROWS - 1 - gl.program_id(1)) * ROWS
    queries = gl.allocate_shared_memory(q.dtype, [2, 1, ROWS // 2, WIDTH], q.layout)
    keys = gl.allocate_shared_memory(k.dtype, [STAGES, 1, KEYS, WIDTH], k.layout)
    values = gl.allocate_shared_memory(v.dtype, [STAGES, 1, KEYS, WIDTH], v.layout)
    barriers = (
        _barriers(2, 1),
        _barriers(STAGES, 1),
        _barriers(STAGES, 1),
        _barriers(STAGES, 2),
        _barriers(STAGES, 2),
        _barriers(2, 1),
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


def described(x_BSNA, rows):
    """Tiles of `rows` positions of one head, as a kernel copies them."""
    from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

    return TensorDescriptor.from_tensor(x_BSNA.flatten(2), [1, rows, WIDTH.value], LAYOUT)


def forward_gluon(q_BSNA, k_BSMA, v_BSMA, begin, out_BSNA, log_sum, scale):
    """Compute out and log_sum. q (B, S, N, 128), k and v (B, S, M, 128): contiguous, of 16 bits.

    begin: int32 (B, S), the first key that each query may see, or None where it is always the first one.
    """
    (B, S, N, _), M = q_BSNA.shape, k_BSMA.shape[2]
    q, out = (described(x, TILES["ROWS"] // 2) for x in (q_BSNA, out_BSNA))
    k, v = (described(x, TILES["KEYS"]) for x in (k_BSMA, v_BSMA))
    _forward[(N, triton.cdiv(S, TILES["ROWS"]), B)](
        q,
        k,
        v,
        begin,
        out,
        log_sum,
        S,
        log_sum.stride(1),
        scale * LOG2E,
        GROUP=N // M,
        DOCUMENTS=begin is not None,
        num_warps=WARPS,
        **TILES,
    )


def _specs():
    """As many query heads a key/value head as GLM-4.5."""
    rows = {
        "q": TILES["ROWS"] // 2,
        "k": TILES["KEYS"],
        "v": TILES["KEYS"],
        "out": TILES["ROWS"] // 2,
    }
    types = {name: f"tensordesc<bf16[1, {size}, 128],{LAYOUT!r}>" for name, size in rows.items()}
    types |= {"begin": "*i32", "log_sum": "*fp32", "S": "i32", "stride": "i32", "factor": "fp32"}
    for documents in (False, True):
        constants = {"GROUP": 12, "DOCUMENTS": documents, **TILES} | (
            {} if documents else {"begin": None}
        )
        given = {name: types[name] for name in _forward.arg_names if name not in constants}
        yield Spec(
            f"forward 128{' packed' if documents else ''}",
            _forward,
            given,
            constants,
            WARPS,
            unit="HGMMA",
            opcodes=("UTMALDG", "UTMASTG"),
        )


SPECS = list(_specs())
