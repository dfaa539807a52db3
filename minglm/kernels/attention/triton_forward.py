"""Causal grouped-query attention as Triton kernels, forward pass. Equations and plain form: `flash_attention.py`.

`_forward` computes a tile of queries of one head: their `out`, and of each L = log2 of the sum over its keys of
2^score. Scores are q . k * A^-1/2 * log2(e), because the GPU's exponential is of base 2. Beside q, k and v only out and
L are saved for the backward pass (`flash_attention_backward_triton.py`). On Hopper heads of 128 dimensions take the
kernel of `flash_attention_gluon.py`, in which the softmax runs beside the products.

Choices, each with its reason:
- A document is a run of equal ids, so what query i may see is an interval: begin_i <= j <= i. Of the keys between the
  smallest `begin` of a tile of queries and its last query, those from the largest `begin` on and below the diagonal
  need no mask. They have a loop of their own; a second one takes the tiles at both ends.
- Tiles come by descriptors of (B, heads, S, A) views (the bulk copy engine): what lies beyond S, or beyond A where A is
  not a power of two, arrives as zeros and is not written, and offsets are not bounded by 32 bits.
- The longest rows of tiles start first, so that the short ones fill the gaps at the end; the query heads that share a
  key/value head run side by side and find it in the L2 cache.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
import triton
import triton.language as tl

from minglm.kernels.toolchain.spec import Spec
from minglm.kernels.toolchain.tiles import bind

LOG2E = 1.4426950408889634
LOWEST = tl.constexpr(
    -1e30
)  # a maximum to start from: finite, so that a row that has seen no key yet gives no NaN


@dataclass(frozen=True)
class Tiles:
    """Queries x keys of one tile of scores, and what Triton is asked for."""

    rows: int
    keys: int
    warps: int
    stages: int

    def constants(self):
        """As the kernels name them."""
        return {"ROWS": self.rows, "KEYS": self.keys}


# Tiles by the width of a head. Small tiles without a pipeline are the fastest of those timed on an H100 for 128: four
# programs fit on a multiprocessor, and while one has its softmax another has its products.
FORWARD = {128: Tiles(64, 64, 4, 1), 256: Tiles(128, 64, 8, 2)}
# For checks and not for speed: each product is three of TF32 (22 bits), and much is spilled. Exact products outside the
# tensor cores are unrolled along a whole head: they spilled more and took the compiler longer.
FLOAT32 = Tiles(32, 32, 4, 1)


@triton.jit
def _tile(x, batch, head, at, SIZE: tl.constexpr, WIDTH: tl.constexpr):
    """SIZE x WIDTH of one head from position `at` on; zeros outside of it."""
    return x.load([batch, head, at, 0]).reshape(SIZE, WIDTH)


@triton.jit
def _of_rows(x, batch, head, at, SIZE: tl.constexpr):
    """One number for each of SIZE positions; zeros beyond S."""
    return x.load([batch, head, at]).reshape(SIZE)


@triton.jit
def _spans(begin, batch, row, S, ROWS: tl.constexpr, KEYS: tl.constexpr, DOCUMENTS: tl.constexpr):
    """Where the keys of a tile of queries lie: (first key, first key without a mask, key tiles at the left end, all
    tiles with a mask)."""
    first, last = 0, 0
    if DOCUMENTS:
        first = tl.load(begin + batch * S + row) // KEYS * KEYS
        last = tl.load(begin + batch * S + tl.minimum(row + ROWS, S) - 1)
    middle = row - tl.maximum(row - last, 0) // KEYS * KEYS
    left = (middle - first) // KEYS
    return first, middle, left, left + tl.cdiv(tl.minimum(ROWS, S - row), KEYS)


@triton.jit
def _masked_key(tile, first, left, row, KEYS: tl.constexpr):
    """First key of the tile with a mask that is number `tile`: at the left end, then at the diagonal."""
    return tl.where(tile < left, first + tile * KEYS, row + (tile - left) * KEYS)


@triton.jit
def _begins(begin, batch, rows, S, DOCUMENTS: tl.constexpr):
    """First key that each query may see."""
    if DOCUMENTS:
        return tl.load(begin + batch * S + rows, mask=rows < S, other=0)
    else:
        return rows * 0


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
    """One step of the forward pass: out, total and most of each query with KEYS more keys."""
    scores = tl.dot(q, _tile(k, batch, head, key, KEYS, WIDTH).T, input_precision="tf32x3")
    if MASK:
        keys = key + tl.arange(0, KEYS)
        seen = (keys[None, :] <= rows[:, None]) & (keys[None, :] >= begins[:, None])
        scores = tl.where(seen, scores, float("-inf"))
    highest = tl.maximum(most, tl.max(scores, 1) * factor)
    weights = tl.exp2(scores * factor - highest[:, None])
    shrink = tl.exp2(most - highest)
    values = _tile(v, batch, head, key, KEYS, WIDTH)
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
    """out and log_sum of ROWS queries of one head."""
    n, batch = tl.program_id(0), tl.program_id(2)
    row = (tl.cdiv(S, ROWS) - 1 - tl.program_id(1)) * ROWS
    head, rows = n // GROUP, row + tl.arange(0, ROWS)
    first, middle, left, masked = _spans(begin, batch, row, S, ROWS, KEYS, DOCUMENTS)
    begins = _begins(begin, batch, rows, S, DOCUMENTS)
    queries = _tile(q, batch, n, row, ROWS, WIDTH)
    sums = tl.zeros((ROWS, WIDTH), tl.float32)
    total = tl.zeros((ROWS,), tl.float32)
    most = tl.full((ROWS,), LOWEST, tl.float32)
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
    for tile in range(0, masked):
        key = _masked_key(tile, first, left, row, KEYS)
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


def bounds(documents_BS):
    """(begin, end), int32 (B, S): first position of the document of each position, and the first one after it."""
    S = documents_BS.shape[1]
    index = torch.arange(S, dtype=torch.int32, device=documents_BS.device)
    changed = documents_BS[:, 1:] != documents_BS[:, :-1]
    begin = torch.where(F.pad(changed, (1, 0)), index, 0).cummax(1).values
    end = torch.where(F.pad(changed, (0, 1)), index + 1, S).flip(1).cummin(1).values.flip(1)
    return begin, end.contiguous()


def described(x, size):
    """Tiles of `size` positions of one head, as a kernel reads and writes them: x (B, S, heads, A), or (B, heads, S).

    A row must be a multiple of 16 bytes.
    """
    from triton.tools.tensor_descriptor import TensorDescriptor

    if x.ndim == 3:
        return TensorDescriptor.from_tensor(x, [1, 1, size])
    return TensorDescriptor.from_tensor(
        x.transpose(1, 2), [1, 1, size, triton.next_power_of_2(x.shape[3])]
    )


def chosen(table, x):
    """The tiles for heads like those of x."""
    if x.dtype == torch.float32:
        return FLOAT32
    return next(tiles for most, tiles in table.items() if x.shape[-1] <= most)


def constants(q, k, begin, tiles):
    """What every kernel is compiled for."""
    sizes = {
        "GROUP": q.shape[2] // k.shape[2],
        "WIDTH": triton.next_power_of_2(q.shape[3]),
        **tiles.constants(),
    }
    return sizes | {
        "DOCUMENTS": begin is not None,
        "num_warps": tiles.warps,
        "num_stages": tiles.stages,
    }


def sums_like(q_BSNA):
    """Room for a float32 number of each query, (B, N, S), in rows that the copy engine can read and write."""
    B, S, N, _ = q_BSNA.shape
    return q_BSNA.new_empty(B, N, S + -S % 4, dtype=torch.float32)[..., :S]


def forward_triton(q, k, v, begin, out, log_sum, scale):
    """Compute out and log_sum of contiguous q (B, S, N, A), k and v (B, S, M, A)."""
    (B, S, N, _), tiles = q.shape, chosen(FORWARD, q)
    by_row, by_key = (
        [described(x, size) for x in group]
        for group, size in (((q, out, log_sum), tiles.rows), ((k, v), tiles.keys))
    )
    _forward[(N, triton.cdiv(S, tiles.rows), B)](
        by_row[0], *by_key, begin, *by_row[1:], S, scale * LOG2E, **constants(q, k, begin, tiles)
    )


def gluon_serves(q):
    """Whether the kernels in Gluon, which are for Hopper alone, take heads like those of q."""
    hopper = q.is_cuda and torch.cuda.get_device_capability(q.device)[0] == 9
    return hopper and q.shape[3] == 128 and q.element_size() == 2


class _Flash(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, v, begin, end, scale):
        q, k, v = (x.contiguous() for x in (q, k, v))
        if gluon_serves(q):
            from minglm.kernels.attention.gluon_forward import forward_gluon as forward
        else:
            forward = forward_triton
        out, log_sum = torch.empty_like(q), sums_like(q)
        forward(q, k, v, begin, out, log_sum, scale)
        ctx.scale = scale
        ctx.save_for_backward(q, k, v, begin, end, out, log_sum)
        return out

    @staticmethod
    def backward(ctx, grad):
        from minglm.kernels.attention.triton_backward import gradients

        bind(grad)
        return *gradients(*ctx.saved_tensors, grad.contiguous(), ctx.scale), None, None, None


def flash_attention_triton(q_BSNA, k_BSMA, v_BSMA, documents_BS=None):
    """The same as `minglm.kernels.attention.eager.flash_attention`, for heads of up to 256 dimensions.

    A row of a head must be a multiple of 16 bytes for the copy engine; where it is not, zeros are added here.
    """
    A, unit = q_BSNA.shape[3], 16 // q_BSNA.element_size()
    q, k, v = (F.pad(x, (0, max(16, A + -A % unit) - A)) for x in (q_BSNA, k_BSMA, v_BSMA))
    begin, end = (None, None) if documents_BS is None else bounds(documents_BS)
    return _Flash.apply(q, k, v, begin, end, A**-0.5)[..., :A]


def spec(name, kernel, width, documents, tiles, by_row, by_key, **more):
    """The `Spec` of a kernel for heads of `width`: as many query heads a key/value head as GLM-4.5, or else one."""
    types = dict.fromkeys(by_row, f"tensordesc<bf16[1, 1, {tiles.rows}, {width}]>")
    types |= dict.fromkeys(by_key, f"tensordesc<bf16[1, 1, {tiles.keys}, {width}]>")
    types |= dict.fromkeys(("log_sum", "delta"), f"tensordesc<fp32[1, 1, {tiles.rows}]>")
    types |= {"S": "i32", "factor": "fp32", "scale": "fp32"} | dict.fromkeys(
        ("begin", "end"), "*i32"
    )
    values = {
        "GROUP": 12 if width == 128 else 1,
        "WIDTH": width,
        "DOCUMENTS": documents,
        **tiles.constants(),
        **more,
    }
    if not documents:
        values |= {"begin": None, "end": None}
    names = kernel.arg_names
    return Spec(
        f"{name} {width}{' packed' if documents else ''}",
        kernel,
        {x: types[x] for x in names if x not in values},
        {x: values[x] for x in names if x in values},
        tiles.warps,
        tiles.stages,
        unit="HGMMA",
        opcodes=("UTMALDG",),
    )


# Heads of GLM-4.5 and of GLM-4.7-Flash, which has 256 dimensions; with packed documents and without.
HEADS = ((128, False), (128, True), (256, True))
SPECS = [
    spec("forward", _forward, width, packed, FORWARD[width], ("q", "out"), ("k", "v"))
    for width, packed in HEADS
]
