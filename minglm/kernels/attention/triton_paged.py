"""Attention over a paged cache as Triton kernels. Equation and plain form: `paged_attention.py`.

    _attend     one part of the slots of a sequence, for the query heads (and drafted tokens) of one key/value head
    _combine    out = sum over parts p of out_p 2^(L_p - L),   L = log2 of the sum over parts of 2^L_p

Choices, each with its reason:
- A token has 12 FLOP for each byte of the cache (GLM-4.5: 12 query heads on one key/value head), so decoding is as fast
  as the cache is read, and it is read once: all query heads of a key/value head are columns of one tile, of 16 where
  one token asks and of up to 64 for a prompt.
- Slots stand on the left of both products, scores and sums transposed: the tensor cores take at least 64 rows on the
  left, but only 8 columns on the right.
- Blocks are read where they lie; a tile looks up its blocks in the table. A sequence is read as far as its own last
  position and no further, so a short one in the batch of a long one is short, and slots that are stale are not read.
- Few sequences do not fill a GPU, so the slots are cut in parts; the number of parts follows from shapes alone, neither
  from what other sequences are there nor from timing: the same input gives the same bits, and the host never waits.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from minglm.kernels.attention.triton_common import LOG2E, LOWEST
from minglm.kernels.toolchain.spec import Spec


@dataclass(frozen=True)
class Tiles:
    """Slots x columns (heads of all queries) of one tile of scores, and what Triton is asked for."""

    slots: int
    columns: int
    warps: int
    stages: int


# Tiles by the number of columns that are asked for. Chosen by what the compiler reports for an H100: two programs of
# the first kind fit on a multiprocessor, each with 64 KiB on the way; of those timed on an H100 none was faster.
TILES = {16: Tiles(64, 16, 4, 5), 2**31: Tiles(64, 64, 4, 3)}
FLOAT32 = Tiles(32, 32, 4, 1)  # for checks and not for speed, as in `flash_attention_triton.py`
NARROW = 128  # widest head whose sums fit in the registers with many columns
PROGRAMS = 264  # that are wanted: two for each multiprocessor of an H100, as many as run at a time
LEAST, MOST = 4, 64  # tiles that are worth a part, and parts


@triton.jit
def _attend(
    q,
    store,
    table,
    positions,
    out,
    log_sum,
    S,
    blocks,
    first,
    factor,
    HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    A: tl.constexpr,
    WIDTH: tl.constexpr,
    SIZE: tl.constexpr,
    SHARED: tl.constexpr,
    WHOLE: tl.constexpr,
    SLOTS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Out and log_sum of COLUMNS (query, head) pairs over one part of the slots; only out, if WHOLE."""
    pair, tile, part = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    batch, head = pair // HEADS, pair % HEADS
    column, d = tile * COLUMNS + tl.arange(0, COLUMNS), tl.arange(0, WIDTH)
    query = batch * S + column // GROUP
    inside = column < S * GROUP
    position = tl.load(positions + query, mask=inside, other=-1)
    row = query.to(tl.int64) * HEADS * GROUP + head * GROUP + column % GROUP
    both = inside[None, :] & (d < A)[:, None]
    queries = tl.load(q + row[None, :] * A + d[:, None], mask=both, other=0.0)
    length = tl.max(position).to(tl.int32) + 1
    each = tl.cdiv(tl.cdiv(length, SLOTS), tl.num_programs(2)) * SLOTS
    end = tl.minimum((part + 1) * each, length)
    sums = tl.zeros((WIDTH, COLUMNS), tl.float32)
    total = tl.zeros((COLUMNS,), tl.float32)
    most = tl.full((COLUMNS,), LOWEST, tl.float32)
    for slot in range(part * each, end, SLOTS):
        slots = slot + tl.arange(0, SLOTS)
        block = tl.load(
            table + pair.to(tl.int64) * blocks + slots // SIZE, mask=slots < end, other=0
        )
        at = store + (block * SIZE + slots % SIZE)[:, None] * A + d[None, :]
        there = (slots < end)[:, None] & (d < A)[None, :]
        keys = tl.load(at, mask=there, other=0.0)
        scores = tl.dot(keys, queries, input_precision="tf32x3") * factor
        seen = (slots[:, None] <= position[None, :]) & (slots >= first)[:, None]
        scores = tl.where(seen, scores, float("-inf"))
        highest = tl.maximum(most, tl.max(scores, 0))
        weights = tl.exp2(scores - highest[None, :])
        shrink = tl.exp2(most - highest)
        values = keys
        if not SHARED:
            values = tl.load(at + HEADS * SIZE * A, mask=there, other=0.0)
        sums = tl.dot(
            values.T, weights.to(keys.dtype), sums * shrink[None, :], input_precision="tf32x3"
        )
        total = total * shrink + tl.sum(weights, 0)
        most = highest
    total = tl.maximum(
        total, 1e-30
    )  # a column of a part without slots has none: its weight will be 0
    sums = sums / total[None, :]
    if WHOLE:
        tl.store(out + row[None, :] * A + d[:, None], sums.to(out.dtype.element_ty), mask=both)
    else:
        row += part.to(tl.int64) * (tl.num_programs(0) // HEADS) * S * HEADS * GROUP
        tl.store(out + row[None, :] * A + d[:, None], sums, mask=both)
        tl.store(log_sum + row, most + tl.log2(total), mask=inside)


@triton.jit
def _combine(parts, log_sum, out, count, A: tl.constexpr, WIDTH: tl.constexpr, COUNT: tl.constexpr):
    """One head of one query: the mean of its parts, each weighted by the sum of its exponentials."""
    row, rows = tl.program_id(0).to(tl.int64), tl.num_programs(0)
    part, d = tl.arange(0, COUNT), tl.arange(0, WIDTH)
    at = part.to(tl.int64) * rows + row
    log_sums = tl.load(log_sum + at, mask=part < count, other=float("-inf"))
    weights = tl.exp2(log_sums - tl.max(log_sums))
    both = (part < count)[:, None] & (d < A)[None, :]
    means = tl.load(parts + at[:, None] * A + d[None, :], mask=both, other=0.0)
    sums = tl.sum(means * weights[:, None], 0) / tl.sum(weights)
    tl.store(out + row * A + d, sums.to(out.dtype.element_ty), mask=d < A)


def _parts(programs, tiles):
    """In how many parts a sequence is read, a power of two: enough programs for a GPU, enough tiles for a part."""
    wanted = min(MOST, PROGRAMS // programs, tiles // LEAST)
    return 1 << max(0, wanted.bit_length() - 1)


def _tiles(asked, width):
    return next(tiles for most, tiles in TILES.items() if asked <= most or width > NARROW)


def paged_attention_triton(q_BSNA, store, rows, positions_BS, first=0):
    """`minglm.kernels.attention.paged.paged_attention`, but for the mask: slots from `first` to the position are seen.

    q (B, S, N, A), A at most 256; store and rows as there; positions int64 (B, S). Returns (B, S, N, A).
    """
    q, (B, S, N, A), (parts, M, size) = q_BSNA.contiguous(), q_BSNA.shape, store.shape[1:4]
    asked, blocks, width = (
        S * N // M,
        rows.numel() // (parts * B * M),
        max(16, triton.next_power_of_2(A)),
    )
    tiles = FLOAT32 if q.dtype == torch.float32 else _tiles(asked, A)
    grid = B * M, triton.cdiv(asked, tiles.columns)
    count = _parts(grid[0] * grid[1], triton.cdiv(blocks * size, tiles.slots))
    out, log_sum = torch.empty_like(q), None
    read = out
    if count > 1:
        read, log_sum = (
            q.new_empty(count, B * S * N, *more, dtype=torch.float32) for more in ((A,), ())
        )
    _attend[(*grid, count)](
        q,
        store,
        rows,
        positions_BS.contiguous(),
        read,
        log_sum,
        S,
        blocks,
        first,
        A**-0.5 * LOG2E,
        HEADS=M,
        GROUP=N // M,
        A=A,
        WIDTH=width,
        SIZE=size,
        SHARED=parts == 1,
        WHOLE=count == 1,
        SLOTS=tiles.slots,
        COLUMNS=tiles.columns,
        num_warps=tiles.warps,
        num_stages=tiles.stages,
    )
    if count > 1:
        _combine[(B * S * N,)](read, log_sum, out, count, A=A, WIDTH=width, COUNT=count)
    return out


def _specs():
    """GLM-4.5's heads in bfloat16, blocks of 16: the next token, of few texts and of many; a prompt."""
    types = {"q": "*bf16", "store": "*bf16", "table": "*i64", "positions": "*i64"}
    types |= {"S": "i32", "blocks": "i32", "first": "i32", "factor": "fp32"}
    common = {"HEADS": 8, "GROUP": 12, "A": 128, "WIDTH": 128, "SIZE": 16, "SHARED": False}
    few, many = TILES.values()
    for name, t, whole in (
        ("token, parts", few, False),
        ("token", few, True),
        ("prompt", many, True),
    ):
        out = {"out": "*bf16"} if whole else {"out": "*fp32", "log_sum": "*fp32"}
        constants = common | {"WHOLE": whole, "SLOTS": t.slots, "COLUMNS": t.columns}
        constants |= {"log_sum": None} if whole else {}
        yield Spec(
            name,
            _attend,
            types | out,
            constants,
            t.warps,
            t.stages,
            unit="HGMMA",
            opcodes=("LDGSTS",),
        )
    types = {"parts": "*fp32", "log_sum": "*fp32", "out": "*bf16", "count": "i32"}
    yield Spec("combine", _combine, types, {"A": 128, "WIDTH": 128, "COUNT": 64})


SPECS = list(_specs())
