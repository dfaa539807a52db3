"""Causal grouped-query attention as Triton kernels, backward pass. See `flash_attention_triton.py`.

    _backward_rows    dq and delta = rowsum(dO * O) of a tile of queries;        P = 2^(score - L) is computed again
    _backward_keys    dk and dv of a tile of keys, summed over the query heads that share it

Choices, each with its reason:
- Both kernels compute the scores, so there are seven products in place of five. One kernel for all three gradients does
  not fit in the registers of a thread, and would have to add up dq atomically; here every sum has its own program and
  always the same order: the same input gives the same bits.
- `_backward_keys` computes scores transposed, keys x queries: P and dS are then the left factors of the products that
  dv and dk are, and stay in registers.
- Heads wider than TOGETHER have too many sums for one program; dk and dv are then a launch each, eight products in all.
- Beyond S queries, their gradients, L and delta arrive as zeros, so that P is 1 there and adds nothing to any sum.
"""

import torch
import triton
import triton.language as tl

from minglm.kernels.attention.triton_forward import (
    HEADS,
    LOG2E,
    Tiles,
    _begins,
    _masked_key,
    _of_rows,
    _spans,
    _tile,
    chosen,
    constants,
    described,
    spec,
    sums_like,
)

# Tiles by the width of a head, as those of the forward pass. At least 32 rows: their sums, 4 bytes each, arrive by the
# bulk copy engine, which needs every tile of them at a multiple of 128 bytes.
ROWS = {128: Tiles(128, 64, 8, 3), 256: Tiles(128, 32, 8, 2)}
KEYS = {128: Tiles(64, 128, 8, 2), 256: Tiles(32, 64, 8, 2)}
TOGETHER = 128  # widest head of which dk and dv of a tile fit in the registers together


@triton.jit
def _row_step(
    q,
    grad,
    log_sums,
    delta,
    k,
    v,
    batch,
    head,
    key,
    rows,
    begins,
    dq,
    factor,
    KEYS: tl.constexpr,
    WIDTH: tl.constexpr,
    MASK: tl.constexpr,
):
    """dq of each query with KEYS more keys, but for the scale."""
    keys = _tile(k, batch, head, key, KEYS, WIDTH)
    weights = tl.exp2(tl.dot(q, keys.T, input_precision="tf32x3") * factor - log_sums[:, None])
    if MASK:
        j = key + tl.arange(0, KEYS)
        weights = tl.where(
            (j[None, :] <= rows[:, None]) & (j[None, :] >= begins[:, None]), weights, 0.0
        )
    dweights = tl.dot(grad, _tile(v, batch, head, key, KEYS, WIDTH).T, input_precision="tf32x3")
    dscores = weights * (dweights - delta[:, None])
    return tl.dot(dscores.to(keys.dtype), keys, dq, input_precision="tf32x3")


@triton.jit
def _backward_rows(
    q,
    k,
    v,
    begin,
    out,
    grad,
    log_sum,
    delta,
    dq,
    S,
    factor,
    scale,
    GROUP: tl.constexpr,
    DOCUMENTS: tl.constexpr,
    ROWS: tl.constexpr,
    KEYS: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """dq and delta of ROWS queries of one head."""
    n, batch = tl.program_id(0), tl.program_id(2)
    row = (tl.cdiv(S, ROWS) - 1 - tl.program_id(1)) * ROWS
    head, rows = n // GROUP, row + tl.arange(0, ROWS)
    first, middle, left, masked = _spans(begin, batch, row, S, ROWS, KEYS, DOCUMENTS)
    begins = _begins(begin, batch, rows, S, DOCUMENTS)
    queries, grads = _tile(q, batch, n, row, ROWS, WIDTH), _tile(grad, batch, n, row, ROWS, WIDTH)
    inner = tl.sum(grads.to(tl.float32) * _tile(out, batch, n, row, ROWS, WIDTH).to(tl.float32), 1)
    delta.store([batch, n, row], inner.reshape(1, 1, ROWS))
    log_sums = _of_rows(log_sum, batch, n, row, ROWS)
    sums = tl.zeros((ROWS, WIDTH), tl.float32)
    for key in range(middle, row, KEYS):
        sums = _row_step(
            queries,
            grads,
            log_sums,
            inner,
            k,
            v,
            batch,
            head,
            key,
            rows,
            begins,
            sums,
            factor,
            KEYS,
            WIDTH,
            False,
        )
    for tile in range(0, masked):
        key = _masked_key(tile, first, left, row, KEYS)
        sums = _row_step(
            queries,
            grads,
            log_sums,
            inner,
            k,
            v,
            batch,
            head,
            key,
            rows,
            begins,
            sums,
            factor,
            KEYS,
            WIDTH,
            True,
        )
    dq.store([batch, n, row, 0], (sums * scale).to(queries.dtype).reshape(1, 1, ROWS, WIDTH))


@triton.jit
def _key_step(
    k,
    v,
    q,
    grad,
    begin,
    log_sum,
    delta,
    batch,
    n,
    row,
    keys,
    dk,
    dv,
    S,
    factor,
    DK: tl.constexpr,
    DV: tl.constexpr,
    DOCUMENTS: tl.constexpr,
    ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
    MASK: tl.constexpr,
):
    """dk (but for the scale) and dv of each key with ROWS more queries of one head."""
    rows = row + tl.arange(0, ROWS)
    queries = _tile(q, batch, n, row, ROWS, WIDTH)
    scores = tl.dot(k, queries.T, input_precision="tf32x3")  # keys x queries
    weights = tl.exp2(scores * factor - _of_rows(log_sum, batch, n, row, ROWS)[None, :])
    if MASK:
        begins = _begins(begin, batch, rows, S, DOCUMENTS)
        weights = tl.where(
            (keys[:, None] <= rows[None, :]) & (keys[:, None] >= begins[None, :]), weights, 0.0
        )
    grads = _tile(grad, batch, n, row, ROWS, WIDTH)
    if DV:
        dv = tl.dot(weights.to(grads.dtype), grads, dv, input_precision="tf32x3")
    if DK:
        dweights = tl.dot(v, grads.T, input_precision="tf32x3")
        dscores = weights * (dweights - _of_rows(delta, batch, n, row, ROWS)[None, :])
        dk = tl.dot(dscores.to(queries.dtype), queries, dk, input_precision="tf32x3")
    return dk, dv


@triton.jit
def _backward_keys(
    q,
    k,
    v,
    begin,
    end,
    grad,
    log_sum,
    delta,
    dk,
    dv,
    S,
    factor,
    scale,
    DK: tl.constexpr,
    DV: tl.constexpr,
    GROUP: tl.constexpr,
    DOCUMENTS: tl.constexpr,
    ROWS: tl.constexpr,
    KEYS: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """dk, dv or both of KEYS keys of one key/value head: over the tiles of queries of all its query heads."""
    head, key, batch = tl.program_id(0), tl.program_id(1) * KEYS, tl.program_id(2)
    keys = key + tl.arange(0, KEYS)
    near, far = S, S  # where the documents of the first and of the last key end
    if DOCUMENTS:
        near = tl.load(end + batch * S + key)
        far = tl.load(end + batch * S + tl.minimum(key + KEYS, S) - 1)
    # tiles of queries from the first key on: at the diagonal; of queries that all see all keys; at the far end
    tiles = tl.cdiv(far - key, ROWS)
    diagonal = tl.minimum(KEYS // ROWS, tiles)
    inner = tl.maximum((near - key) // ROWS - diagonal, 0)
    # divisors, not 0: the addresses of a loop's first loads are computed even if it has no turn
    masked, whole = tiles - inner, tl.maximum(inner, 1)
    k_tile, v_tile = (
        _tile(k, batch, head, key, KEYS, WIDTH),
        _tile(v, batch, head, key, KEYS, WIDTH),
    )
    k_sums, v_sums = tl.zeros((KEYS, WIDTH), tl.float32), tl.zeros((KEYS, WIDTH), tl.float32)
    for step in range(0, GROUP * inner):
        n, row = head * GROUP + step // whole, key + (diagonal + step % whole) * ROWS
        k_sums, v_sums = _key_step(
            k_tile,
            v_tile,
            q,
            grad,
            begin,
            log_sum,
            delta,
            batch,
            n,
            row,
            keys,
            k_sums,
            v_sums,
            S,
            factor,
            DK,
            DV,
            DOCUMENTS,
            ROWS,
            WIDTH,
            False,
        )
    for step in range(0, GROUP * masked):
        n, tile = head * GROUP + step // masked, step % masked
        row = key + tl.where(tile < diagonal, tile, tile + inner) * ROWS
        k_sums, v_sums = _key_step(
            k_tile,
            v_tile,
            q,
            grad,
            begin,
            log_sum,
            delta,
            batch,
            n,
            row,
            keys,
            k_sums,
            v_sums,
            S,
            factor,
            DK,
            DV,
            DOCUMENTS,
            ROWS,
            WIDTH,
            True,
        )
    if DK:
        dk.store(
            [batch, head, key, 0], (k_sums * scale).to(k_tile.dtype).reshape(1, 1, KEYS, WIDTH)
        )
    if DV:
        dv.store([batch, head, key, 0], v_sums.to(k_tile.dtype).reshape(1, 1, KEYS, WIDTH))


def _parts(width):
    """What each launch of `_backward_keys` computes."""
    return (
        [{"DK": True, "DV": True}]
        if width <= TOGETHER
        else [{"DK": True, "DV": False}, {"DK": False, "DV": True}]
    )


def gradients(q, k, v, begin, end, out, log_sum, grad, scale):
    """dq, dk and dv of `_Flash`, from what it saved and the gradient of out."""
    (B, S, N, A), M = q.shape, k.shape[2]
    dq, dk, dv = (torch.empty_like(x) for x in (q, k, v))
    delta = sums_like(q)

    def tiles_of(tiles, by_row, by_key):
        return [described(x, tiles.rows) for x in by_row], [
            described(x, tiles.keys) for x in by_key
        ]

    t = chosen(ROWS, q)
    (queries, *by_row), by_key = tiles_of(t, (q, out, grad, log_sum, delta, dq), (k, v))
    _backward_rows[(N, triton.cdiv(S, t.rows), B)](
        queries, *by_key, begin, *by_row, S, scale * LOG2E, scale, **constants(q, k, begin, t)
    )
    t = chosen(KEYS, q)
    (queries, *by_row), by_key = tiles_of(t, (q, grad, log_sum, delta), (k, v, dk, dv))
    for parts in _parts(A):
        _backward_keys[(M, triton.cdiv(S, t.keys), B)](
            queries,
            *by_key[:2],
            begin,
            end,
            *by_row,
            *by_key[2:],
            S,
            scale * LOG2E,
            scale,
            **parts,
            **constants(q, k, begin, t),
        )
    return dq, dk, dv


def _specs():
    for width, packed in HEADS:
        yield spec(
            "dq", _backward_rows, width, packed, ROWS[width], ("q", "out", "grad", "dq"), ("k", "v")
        )
        for parts in _parts(width):
            name = ", ".join(x.lower() for x in parts if parts[x])
            yield spec(
                name,
                _backward_keys,
                width,
                packed,
                KEYS[width],
                ("q", "grad"),
                ("k", "v", "dk", "dv"),
                **parts,
            )


SPECS = list(_specs())
