"""Causal grouped-query attention as Triton kernels, backward pass (paper 2.1). Forward pass: `triton_forward.py`.

    P_ij  = 2^(s_ij - L_i)                       the weights, computed again from the saved L
    dP_ij = dO_i . v_j,   delta_i = dO_i . O_i
    dS_ij = P_ij (dP_ij - delta_i)
    dq_i  = A^-1/2 sum over j of dS_ij k_j       `_backward_rows`, which writes delta too
    dk_j  = A^-1/2 sum over i of dS_ij q_i       `_backward_keys`, summed over the query heads that share a key
    dv_j  = sum over i of P_ij dO_i              `_backward_keys`

Choices, each with its reason:
- Both kernels compute the scores, so there are seven products in place of five. One kernel for all three gradients does
  not fit in the registers of a thread, and would have to add up dq atomically. Here every sum has its own program and
  always the same order: the same input gives the same bits.
- `_backward_keys` computes scores transposed, keys x queries: P and dS are then the left factors of the products that
  give dv and dk, and stay in registers.
- Heads wider than MAX_JOINT_WIDTH have too many sums for one program; dk and dv then take a launch each, eight products
  in all.
- Beyond S the queries, their gradients, L and delta arrive as zeros, so that P is 1 there and adds nothing to any sum.
"""

# Triton has no types for a kernel's tensors, constexpr arguments, loops and launch options:
# pyright: reportArgumentType=false, reportCallIssue=false, reportOperatorIssue=false, reportAttributeAccessIssue=false
# pyright: reportGeneralTypeIssues=false, reportPossiblyUnboundVariable=false

from collections.abc import Iterator
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from minglm.kernels.attention.triton_common import (
    LOG2E,
    SPEC_HEADS,
    Tiles,
    attention_spec,
    compile_constants,
    empty_row_values,
    key_spans,
    load_begins,
    load_row_values,
    load_tile,
    masked_tile_key,
    tile_descriptor,
    tiles_for_heads,
)
from minglm.kernels.toolchain.spec import Spec

# Tiles by the largest width of a head. At least 32 rows: L and delta, 4 bytes for each row, arrive by the bulk copy
# engine, which needs every tile of them at a multiple of 128 bytes.
ROWS = {128: Tiles(128, 64, 8, 3), 256: Tiles(128, 32, 8, 2)}  # of `_backward_rows`
KEYS = {128: Tiles(64, 128, 8, 2), 256: Tiles(32, 64, 8, 2)}  # of `_backward_keys`
MAX_JOINT_WIDTH = 128  # widest head for which dk and dv of a tile fit in the registers together


class Gradients(NamedTuple):
    """The gradients of attention's inputs, each with the shape and dtype of its input."""

    dq_BSNA: Tensor
    dk_BSMA: Tensor
    dv_BSMA: Tensor


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
    """Add KEYS more keys to dq of each query; the factor A^-1/2 comes at the end."""
    keys = load_tile(k, batch, head, key, KEYS, WIDTH)
    # P_ij = 2^(s_ij - L_i)
    weights = tl.exp2(tl.dot(q, keys.T, input_precision="tf32x3") * factor - log_sums[:, None])
    if MASK:
        j = key + tl.arange(0, KEYS)
        weights = tl.where(
            (j[None, :] <= rows[:, None]) & (j[None, :] >= begins[:, None]), weights, 0.0
        )
    # dP_ij = dO_i . v_j
    dweights = tl.dot(grad, load_tile(v, batch, head, key, KEYS, WIDTH).T, input_precision="tf32x3")
    dscores = weights * (dweights - delta[:, None])  # dS_ij
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
    """Compute dq and delta of ROWS queries of one head. Grid: (query head, tile of queries, batch)."""
    n = tl.program_id(0)
    batch = tl.program_id(2)
    # As in the forward pass, the last queries start first.
    row = (tl.cdiv(S, ROWS) - 1 - tl.program_id(1)) * ROWS
    head = n // GROUP
    rows = row + tl.arange(0, ROWS)
    first, middle, left, masked = key_spans(begin, batch, row, S, ROWS, KEYS, DOCUMENTS)
    begins = load_begins(begin, batch, rows, S, DOCUMENTS)
    queries = load_tile(q, batch, n, row, ROWS, WIDTH)
    grads = load_tile(grad, batch, n, row, ROWS, WIDTH)
    outs = load_tile(out, batch, n, row, ROWS, WIDTH)
    inner = tl.sum(grads.to(tl.float32) * outs.to(tl.float32), 1)  # delta_i = dO_i . O_i
    delta.store([batch, n, row], inner.reshape(1, 1, ROWS))
    log_sums = load_row_values(log_sum, batch, n, row, ROWS)
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
        key = masked_tile_key(tile, first, left, row, KEYS)
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
    """Add ROWS more queries of one head to dk (without its factor A^-1/2) and dv of each key."""
    rows = row + tl.arange(0, ROWS)
    queries = load_tile(q, batch, n, row, ROWS, WIDTH)
    scores = tl.dot(k, queries.T, input_precision="tf32x3")  # keys x queries
    # P_ij = 2^(s_ij - L_i)
    weights = tl.exp2(scores * factor - load_row_values(log_sum, batch, n, row, ROWS)[None, :])
    if MASK:
        begins = load_begins(begin, batch, rows, S, DOCUMENTS)
        weights = tl.where(
            (keys[:, None] <= rows[None, :]) & (keys[:, None] >= begins[None, :]), weights, 0.0
        )
    grads = load_tile(grad, batch, n, row, ROWS, WIDTH)
    if DV:
        dv = tl.dot(weights.to(grads.dtype), grads, dv, input_precision="tf32x3")
    if DK:
        dweights = tl.dot(v, grads.T, input_precision="tf32x3")  # dP_ij = dO_i . v_j
        # dS_ij
        dscores = weights * (dweights - load_row_values(delta, batch, n, row, ROWS)[None, :])
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
    """Compute dk (if DK) and dv (if DV) of KEYS keys of one key/value head. Grid: (key/value head, tile of keys, batch).

    The loops run over the tiles of queries of all query heads of the key/value head.
    """
    head = tl.program_id(0)
    key = tl.program_id(1) * KEYS
    batch = tl.program_id(2)
    keys = key + tl.arange(0, KEYS)
    # The ends of the documents of the first key (near) and of the last key (far).
    near, far = S, S
    if DOCUMENTS:
        near = tl.load(end + batch * S + key)
        far = tl.load(end + batch * S + tl.minimum(key + KEYS, S) - 1)
    # Tiles of queries from the first key on, in order: at the diagonal (masked); of queries that all see all keys
    # (inner, without a mask); at the far end (masked).
    tiles = tl.cdiv(far - key, ROWS)
    diagonal = tl.minimum(KEYS // ROWS, tiles)
    inner = tl.maximum((near - key) // ROWS - diagonal, 0)
    masked = tiles - inner
    # A divisor, so not 0: the addresses of a loop's first loads are computed even if the loop has no step.
    whole = tl.maximum(inner, 1)
    k_tile = load_tile(k, batch, head, key, KEYS, WIDTH)
    v_tile = load_tile(v, batch, head, key, KEYS, WIDTH)
    k_sums = tl.zeros((KEYS, WIDTH), tl.float32)
    v_sums = tl.zeros((KEYS, WIDTH), tl.float32)
    for step in range(0, GROUP * inner):
        n = head * GROUP + step // whole
        row = key + (diagonal + step % whole) * ROWS
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
        n = head * GROUP + step // masked
        tile = step % masked
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


def _key_launches(width: int) -> list[dict[str, bool]]:
    """Return what each launch of `_backward_keys` computes, for heads of `width` dimensions."""
    if width <= MAX_JOINT_WIDTH:
        return [{"DK": True, "DV": True}]
    return [{"DK": True, "DV": False}, {"DK": False, "DV": True}]


def backward_triton(
    q_BSNA: Tensor,
    k_BSMA: Tensor,
    v_BSMA: Tensor,
    begin_BS: Tensor | None,
    end_BS: Tensor | None,
    out_BSNA: Tensor,
    log_sum_BNS: Tensor,
    grad_BSNA: Tensor,
    scale: float,
) -> Gradients:
    """Compute the gradients of attention from its inputs, what the forward pass saved, and the gradient of out.

    Tensors are contiguous. begin, end: int32 (B, S), bounds of each position's document, or None without documents.
    """
    B, S, N, A = q_BSNA.shape
    M = k_BSMA.shape[2]
    dq_BSNA = torch.empty_like(q_BSNA)
    dk_BSMA = torch.empty_like(k_BSMA)
    dv_BSMA = torch.empty_like(v_BSMA)
    delta_BNS = empty_row_values(q_BSNA)

    tiles = tiles_for_heads(ROWS, q_BSNA)
    _backward_rows[(N, triton.cdiv(S, tiles.rows), B)](
        tile_descriptor(q_BSNA, tiles.rows),
        tile_descriptor(k_BSMA, tiles.keys),
        tile_descriptor(v_BSMA, tiles.keys),
        begin_BS,
        tile_descriptor(out_BSNA, tiles.rows),
        tile_descriptor(grad_BSNA, tiles.rows),
        tile_descriptor(log_sum_BNS, tiles.rows),
        tile_descriptor(delta_BNS, tiles.rows),
        tile_descriptor(dq_BSNA, tiles.rows),
        S,
        scale * LOG2E,
        scale,
        **compile_constants(q_BSNA, k_BSMA, begin_BS, tiles),
    )

    tiles = tiles_for_heads(KEYS, q_BSNA)
    arguments = (
        tile_descriptor(q_BSNA, tiles.rows),
        tile_descriptor(k_BSMA, tiles.keys),
        tile_descriptor(v_BSMA, tiles.keys),
        begin_BS,
        end_BS,
        tile_descriptor(grad_BSNA, tiles.rows),
        tile_descriptor(log_sum_BNS, tiles.rows),
        tile_descriptor(delta_BNS, tiles.rows),
        tile_descriptor(dk_BSMA, tiles.keys),
        tile_descriptor(dv_BSMA, tiles.keys),
        S,
        scale * LOG2E,
        scale,
    )
    for wanted in _key_launches(A):
        _backward_keys[(M, triton.cdiv(S, tiles.keys), B)](
            *arguments, **wanted, **compile_constants(q_BSNA, k_BSMA, begin_BS, tiles)
        )
    return Gradients(dq_BSNA, dk_BSMA, dv_BSMA)


def _specs() -> Iterator[Spec]:
    """Yield the Specs of both kernels for the heads of GLM-4.5 and of GLM-4.7-Flash."""
    for width, packed in SPEC_HEADS:
        by_row = ("q", "out", "grad", "dq")
        yield attention_spec("dq", _backward_rows, width, packed, ROWS[width], by_row, ("k", "v"))
        for wanted in _key_launches(width):
            name = ", ".join(constant.lower() for constant in wanted if wanted[constant])
            by_row = ("q", "grad")
            by_key = ("k", "v", "dk", "dv")
            yield attention_spec(
                name, _backward_keys, width, packed, KEYS[width], by_row, by_key, **wanted
            )


SPECS = list(_specs())
