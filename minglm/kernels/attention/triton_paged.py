"""Attention over a paged cache as Triton kernels (no section in the paper). Eager form: `attend_slots` in `attention/eager.py`.

    _attend     one part p of the slots of a sequence, for the query heads (and drafted tokens) of one key/value head
    _combine    out = sum over parts p of out_p 2^(L_p - L),   L = log2 of the sum over parts of 2^L_p

Choices, each with its reason:
- A token takes 12 FLOP for each byte of the cache (GLM-4.5: 12 query heads share a key/value head), so decoding is as
  fast as the cache is read, and it is read once: all query heads of a key/value head are columns of one tile, of 16
  where one token asks and of up to 64 for a prompt.
- Slots are on the left of both products, scores and sums are transposed: the tensor cores take at least 64 rows on the
  left, but only 8 columns on the right.
- Blocks are read in place; a tile looks up its blocks in the table. A sequence is read up to its own last position and
  no further, so a short one in the batch of a long one is short, and stale slots are not read.
- Few sequences do not fill a GPU, so the slots are cut into parts. The number of parts follows from shapes alone, neither
  from the other sequences nor from timing: the same input gives the same bits, and the host never waits.
"""

# Triton has no types for a kernel's tensors, constexpr arguments, loops and launch options:
# pyright: reportArgumentType=false, reportCallIssue=false, reportOperatorIssue=false, reportAttributeAccessIssue=false
# pyright: reportGeneralTypeIssues=false, reportPossiblyUnboundVariable=false

from collections.abc import Iterator
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from minglm.kernels.attention.triton_common import LOG2E, LOWEST
from minglm.kernels.toolchain.spec import Spec


@dataclass(frozen=True)
class Tiles:
    """Slots x columns (heads of all queries) of one tile of scores, and the launch options of Triton."""

    slots: int
    columns: int
    warps: int
    stages: int


# Tiles by the largest number of columns. They are chosen from the compiler's report for an H100: two programs of the
# first kind fit on a multiprocessor, each with 64 KiB in flight; of those timed on an H100 none was faster.
TILES = {16: Tiles(64, 16, 4, 5), 2**31: Tiles(64, 64, 4, 3)}
FLOAT32 = Tiles(32, 32, 4, 1)  # for checks and not for speed, as in `triton_common.py`
NARROW = 128  # widest head whose sums fit in the registers with many columns
PROGRAMS = 264  # programs wanted: two for each multiprocessor of an H100, as many as run at a time
MIN_TILES = 4  # tiles of slots that are worth a part
MAX_PARTS = 64  # parts of a sequence


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
    """Compute out and log_sum of COLUMNS (query, head) pairs over one part of the slots; only out if WHOLE.

    Grid: (sequence and key/value head, tile of columns, part). HEADS: key/value heads. GROUP: query heads of one of them.
    SIZE: slots of a block. SHARED: keys are values too.
    """
    pair = tl.program_id(0)
    tile = tl.program_id(1)
    part = tl.program_id(2)
    batch = pair // HEADS
    head = pair % HEADS
    column = tile * COLUMNS + tl.arange(0, COLUMNS)
    d = tl.arange(0, WIDTH)
    query = batch * S + column // GROUP
    inside = column < S * GROUP
    position = tl.load(positions + query, mask=inside, other=-1)
    row = query.to(tl.int64) * HEADS * GROUP + head * GROUP + column % GROUP
    both = inside[None, :] & (d < A)[:, None]
    queries = tl.load(q + row[None, :] * A + d[:, None], mask=both, other=0.0)
    # This part's slots, whole tiles of them: part * each ... end.
    length = tl.max(position).to(tl.int32) + 1
    each = tl.cdiv(tl.cdiv(length, SLOTS), tl.num_programs(2)) * SLOTS
    end = tl.minimum((part + 1) * each, length)
    sums = tl.zeros((WIDTH, COLUMNS), tl.float32)
    total = tl.zeros((COLUMNS,), tl.float32)
    most = tl.full((COLUMNS,), LOWEST, tl.float32)
    for slot in range(part * each, end, SLOTS):
        slots = slot + tl.arange(0, SLOTS)
        entry = table + pair.to(tl.int64) * blocks + slots // SIZE
        block = tl.load(entry, mask=slots < end, other=0)
        pointers = store + (block * SIZE + slots % SIZE)[:, None] * A + d[None, :]
        exists = (slots < end)[:, None] & (d < A)[None, :]
        keys = tl.load(pointers, mask=exists, other=0.0)
        scores = tl.dot(keys, queries, input_precision="tf32x3") * factor
        seen = (slots[:, None] <= position[None, :]) & (slots >= first)[:, None]
        scores = tl.where(seen, scores, float("-inf"))
        highest = tl.maximum(most, tl.max(scores, 0))
        weights = tl.exp2(scores - highest[None, :])
        shrink = tl.exp2(most - highest)
        values = keys
        if not SHARED:
            values = tl.load(pointers + HEADS * SIZE * A, mask=exists, other=0.0)
        sums = tl.dot(
            values.T, weights.to(keys.dtype), sums * shrink[None, :], input_precision="tf32x3"
        )
        total = total * shrink + tl.sum(weights, 0)
        most = highest
    # A column of a part without slots has a total of 0; its weight will be 0.
    total = tl.maximum(total, 1e-30)
    sums = sums / total[None, :]
    if WHOLE:
        tl.store(out + row[None, :] * A + d[:, None], sums.to(out.dtype.element_ty), mask=both)
    else:
        row += part.to(tl.int64) * (tl.num_programs(0) // HEADS) * S * HEADS * GROUP
        tl.store(out + row[None, :] * A + d[:, None], sums, mask=both)
        tl.store(log_sum + row, most + tl.log2(total), mask=inside)


@triton.jit
def _combine(parts, log_sum, out, count, A: tl.constexpr, WIDTH: tl.constexpr, COUNT: tl.constexpr):
    """Compute one head of one query: the mean of its parts, each weighted by the sum of its exponentials."""
    row = tl.program_id(0).to(tl.int64)
    rows = tl.num_programs(0)
    part = tl.arange(0, COUNT)
    d = tl.arange(0, WIDTH)
    at = part.to(tl.int64) * rows + row
    log_sums = tl.load(log_sum + at, mask=part < count, other=float("-inf"))
    weights = tl.exp2(log_sums - tl.max(log_sums))
    both = (part < count)[:, None] & (d < A)[None, :]
    means = tl.load(parts + at[:, None] * A + d[None, :], mask=both, other=0.0)
    sums = tl.sum(means * weights[:, None], 0) / tl.sum(weights)
    tl.store(out + row * A + d, sums.to(out.dtype.element_ty), mask=d < A)


def _part_count(programs: int, tiles: int) -> int:
    """Return the number of parts of a sequence, a power of two: enough programs for a GPU, enough tiles for a part.

    programs: of a launch with one part; tiles: of the slots of a sequence.
    """
    wanted = min(MAX_PARTS, PROGRAMS // programs, tiles // MIN_TILES)
    return 1 << max(0, wanted.bit_length() - 1)


def _tiles_for(columns: int, width: int) -> Tiles:
    """Choose the tiles for a number of columns and a head width."""
    return next(
        tiles for max_columns, tiles in TILES.items() if columns <= max_columns or width > NARROW
    )


def paged_attention_triton(
    q_BSNA: Tensor, store: Tensor, rows: Tensor, positions_BS: Tensor, first: int = 0
) -> Tensor:
    """Compute attention over the cache: q (B, S, N, A), A at most 256; returns (B, S, N, A) in q's dtype.

    store: (blocks, parts, M, block size, A), parts are keys and values, or one for both. rows: int64, the blocks of each
    part, sequence and key/value head, in order. positions: int64 (B, S); a query sees the slots from `first` to its
    position. Eager form: `minglm.kernels.attention.eager.attend_slots`.
    """
    q_BSNA = q_BSNA.contiguous()
    B, S, N, A = q_BSNA.shape
    _, parts, M, size, _ = store.shape
    columns = S * N // M  # queries and heads of one key/value head
    blocks = rows.numel() // (parts * B * M)
    tiles = FLOAT32 if q_BSNA.dtype == torch.float32 else _tiles_for(columns, A)
    pairs = B * M
    column_tiles = triton.cdiv(columns, tiles.columns)
    count = _part_count(pairs * column_tiles, triton.cdiv(blocks * size, tiles.slots))
    width = max(16, triton.next_power_of_2(A))

    # With several parts their results are combined by a second launch.
    out_BSNA = torch.empty_like(q_BSNA)
    part_out = out_BSNA
    part_log_sum = None
    if count > 1:
        part_out = q_BSNA.new_empty(count, B * S * N, A, dtype=torch.float32)
        part_log_sum = q_BSNA.new_empty(count, B * S * N, dtype=torch.float32)
    _attend[(pairs, column_tiles, count)](
        q_BSNA,
        store,
        rows,
        positions_BS.contiguous(),
        part_out,
        part_log_sum,
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
        _combine[(B * S * N,)](
            part_out, part_log_sum, out_BSNA, count, A=A, WIDTH=width, COUNT=count
        )
    return out_BSNA


def _attend_spec(name: str, tiles: Tiles, whole: bool) -> Spec:
    """Return the Spec of `_attend`; whole: with one part."""
    signature = {
        "q": "*bf16",
        "store": "*bf16",
        "table": "*i64",
        "positions": "*i64",
        "S": "i32",
        "blocks": "i32",
        "first": "i32",
        "factor": "fp32",
        "out": "*bf16" if whole else "*fp32",
    }
    constants = {
        "HEADS": 8,
        "GROUP": 12,
        "A": 128,
        "WIDTH": 128,
        "SIZE": 16,
        "SHARED": False,
        "WHOLE": whole,
        "SLOTS": tiles.slots,
        "COLUMNS": tiles.columns,
    }
    if whole:
        constants["log_sum"] = None
    else:
        signature["log_sum"] = "*fp32"
    return Spec(
        name=name,
        kernel=_attend,
        signature=signature,
        constants=constants,
        warps=tiles.warps,
        stages=tiles.stages,
        unit="HGMMA",
        opcodes=("LDGSTS",),
    )


def _specs() -> Iterator[Spec]:
    """Yield the Specs for GLM-4.5's heads in bfloat16, blocks of 16: the next token of few and many texts; a prompt."""
    few, many = TILES.values()
    yield _attend_spec("token, parts", few, whole=False)
    yield _attend_spec("token", few, whole=True)
    yield _attend_spec("prompt", many, whole=True)
    yield Spec(
        name="combine",
        kernel=_combine,
        signature={"parts": "*fp32", "log_sum": "*fp32", "out": "*bf16", "count": "i32"},
        constants={"A": 128, "WIDTH": 128, "COUNT": 64},
    )


SPECS = list(_specs())
