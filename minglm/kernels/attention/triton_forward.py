"""Causal grouped-query attention as a Triton kernel, forward pass (paper 2.1). Eager form: `attention/eager.py`.

    s_ij  = q_i . k_j A^-1/2 log2(e)                       for begin_i <= j <= i, else -inf
    m_i   = max over j of s_ij
    out_i = sum over j of 2^(s_ij - m_i) v_j / sum over j of 2^(s_ij - m_i)
    L_i   = m_i + log2( sum over j of 2^(s_ij - m_i) )     saved for the backward pass

A program computes a tile of queries of one head. It walks along the keys tile by tile and keeps a running maximum, a
running total and a running sum; older ones shrink by 2^(old maximum - new maximum).

Choices, each with its reason:
- What a query may see is an interval of keys (`triton_common.py`). The key tiles that need no mask have a loop of
  their own; a second loop takes the tiles at both ends.
- Tiles are read through descriptors of (B, heads, S, A) views (the bulk copy engine): what lies beyond S, or beyond A
  where A is not a power of two, arrives as zeros and is not written, and offsets are not bounded by 32 bits.
- The longest rows of tiles start first, so that the short ones fill the gaps at the end; the query heads that share a
  key/value head run side by side and find it in the L2 cache.
- On Hopper, heads of 128 dimensions use the kernel of `gluon_forward.py`, in which the softmax runs beside the products.
"""

# Triton has no types for a kernel's tensors, constexpr arguments, loops and launch options:
# pyright: reportArgumentType=false, reportCallIssue=false, reportOperatorIssue=false, reportAttributeAccessIssue=false
# pyright: reportGeneralTypeIssues=false, reportPossiblyUnboundVariable=false

import triton
import triton.language as tl
from torch import Tensor

from minglm.kernels.attention.triton_common import (
    LOG2E,
    LOWEST,
    SPEC_HEADS,
    Tiles,
    attention_spec,
    compile_constants,
    key_spans,
    load_begins,
    load_tile,
    masked_tile_key,
    tile_descriptor,
    tiles_for_heads,
)

# Tiles by the largest width of a head. Small tiles without a pipeline are the fastest of those timed on an H100 for 128:
# four programs fit on a multiprocessor, and while one computes its softmax another computes its products.
FORWARD = {128: Tiles(64, 64, 4, 1), 256: Tiles(128, 64, 8, 2)}


@triton.jit
def _attend(
    q,
    k,
    v,
    batch,
    head,
    key,
    rows,
    begins,
    out,
    total,
    most,
    factor,
    KEYS: tl.constexpr,
    WIDTH: tl.constexpr,
    MASK: tl.constexpr,
):
    """Add KEYS more keys to the running out, total and maximum (most) of each query."""
    # s_ij, but for the factor
    scores = tl.dot(q, load_tile(k, batch, head, key, KEYS, WIDTH).T, input_precision="tf32x3")
    if MASK:
        keys = key + tl.arange(0, KEYS)
        seen = (keys[None, :] <= rows[:, None]) & (keys[None, :] >= begins[:, None])
        scores = tl.where(seen, scores, float("-inf"))
    highest = tl.maximum(most, tl.max(scores, 1) * factor)  # m_i so far
    weights = tl.exp2(scores * factor - highest[:, None])  # 2^(s_ij - m_i)
    shrink = tl.exp2(most - highest)  # what was summed with the old maximum shrinks by this
    values = load_tile(v, batch, head, key, KEYS, WIDTH)
    out = tl.dot(weights.to(values.dtype), values, out * shrink[:, None], input_precision="tf32x3")
    return out, total * shrink + tl.sum(weights, 1), highest


@triton.jit
def _forward(
    q,
    k,
    v,
    begin,
    out,
    log_sum,
    S,
    factor,
    GROUP: tl.constexpr,
    DOCUMENTS: tl.constexpr,
    ROWS: tl.constexpr,
    KEYS: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """Compute out and log_sum (L) of ROWS queries of one head. Grid: (query head, tile of queries, batch)."""
    n = tl.program_id(0)
    batch = tl.program_id(2)
    # Tiles count from the end of the row: the last queries see the most keys, and start first.
    row = (tl.cdiv(S, ROWS) - 1 - tl.program_id(1)) * ROWS
    head = n // GROUP
    rows = row + tl.arange(0, ROWS)
    first, middle, left, masked = key_spans(begin, batch, row, S, ROWS, KEYS, DOCUMENTS)
    begins = load_begins(begin, batch, rows, S, DOCUMENTS)
    queries = load_tile(q, batch, n, row, ROWS, WIDTH)
    sums = tl.zeros((ROWS, WIDTH), tl.float32)
    total = tl.zeros((ROWS,), tl.float32)
    most = tl.full((ROWS,), LOWEST, tl.float32)
    # The keys that every query of the tile sees.
    for key in range(middle, row, KEYS):
        sums, total, most = _attend(
            queries,
            k,
            v,
            batch,
            head,
            key,
            rows,
            begins,
            sums,
            total,
            most,
            factor,
            KEYS,
            WIDTH,
            False,
        )
    # The tiles at the left end of documents, then those at the diagonal.
    for tile in range(0, masked):
        key = masked_tile_key(tile, first, left, row, KEYS)
        sums, total, most = _attend(
            queries,
            k,
            v,
            batch,
            head,
            key,
            rows,
            begins,
            sums,
            total,
            most,
            factor,
            KEYS,
            WIDTH,
            True,
        )
    sums = sums / total[:, None]
    out.store([batch, n, row, 0], sums.to(queries.dtype).reshape(1, 1, ROWS, WIDTH))
    log_sum.store([batch, n, row], (most + tl.log2(total)).reshape(1, 1, ROWS))


def forward_triton(
    q_BSNA: Tensor,
    k_BSMA: Tensor,
    v_BSMA: Tensor,
    begin_BS: Tensor | None,
    out_BSNA: Tensor,
    log_sum_BNS: Tensor,
    scale: float,
) -> None:
    """Write out (B, S, N, A) and log_sum, float32 (B, N, S), of contiguous q (B, S, N, A), k and v (B, S, M, A).

    begin: int32 (B, S), the first key that each query may see, or None where it is always the first one.
    """
    B, S, N, _ = q_BSNA.shape
    tiles = tiles_for_heads(FORWARD, q_BSNA)
    _forward[(N, triton.cdiv(S, tiles.rows), B)](
        tile_descriptor(q_BSNA, tiles.rows),
        tile_descriptor(k_BSMA, tiles.keys),
        tile_descriptor(v_BSMA, tiles.keys),
        begin_BS,
        tile_descriptor(out_BSNA, tiles.rows),
        tile_descriptor(log_sum_BNS, tiles.rows),
        S,
        scale * LOG2E,
        **compile_constants(q_BSNA, k_BSMA, begin_BS, tiles),
    )


SPECS = [
    attention_spec("forward", _forward, width, packed, FORWARD[width], ("q", "out"), ("k", "v"))
    for width, packed in SPEC_HEADS
]
