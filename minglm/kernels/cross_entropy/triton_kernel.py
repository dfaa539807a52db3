"""The softmax over the output head as Triton kernels. Plain forms: `linear_cross_entropy.py`.

    l = x W' / temperature;   log p_t = l_target - lse,   lse = log sum_v exp l_v,   entropy = lse - sum_v p_v l_v
    dlog p_t -> dl = dlog p_t * (onehot_target - p);   dx = dl W / temperature;   dW = dl' x / temperature

Cross-entropy knows dlog p_t beforehand, so its logits may be in memory, a chunk of tokens at a time, until
`softmax_gradient_kernel` puts dl in their place; the products are cuBLAS's.

The loss of reinforcement learning does not, and its function never holds logits.
Forward: `statistics_kernel` multiplies tile by tile and keeps of each row only the running maximum, the sum of
exponentials, their sum weighted by l, and the target's logit; `SPLITS` programs share a row's vocabulary, and PyTorch
joins their parts.
Backward: for a chunk of the vocabulary `gradient_kernel` multiplies once more and writes dl; two products of PyTorch's
turn that into the chunk's rows of dW, complete at once, and its part of dx, which is summed in float32.

Choices of that function:
- The logits are computed twice: 8 T D V operations where storing them would need 6. In exchange nothing is kept between
  the passes but a number a token, the gradient of each token may be anything, and logits are not rounded to bfloat16.
- Chunks of the vocabulary, not of the tokens: each row of dW then comes from one product and needs no float32 copy.
- Beyond the results a call in bfloat16 allocates CHUNK_BYTES for dl, 6 T D bytes for the float32 sum of dx and the part
  that is added to it, and a chunk of dW: 0.68 GB for 16,384 tokens of GLM-4.5. A head whose dtype is not that of the
  hidden states is copied.
- `band` row tiles and SPLITS vocabulary tiles are worked on at the same time: 128 programs, about as many as an H100
  has multiprocessors, which share 16 tiles of x and 8 of W in its L2 cache.
"""

import torch
import triton
import triton.language as tl

from minglm.kernels.experts.triton_kernels import load_tile
from minglm.kernels.toolchain.spec import Spec
from minglm.kernels.toolchain.tiles import (
    Tiles,
    bind,
    bulk_readable,
    described,
    power_of_2,
    read,
    tiles_for,
)

PRODUCT = {2**31: Tiles(128, 256, 64, 8, 3, band=16)}  # the fastest of those timed on an H100
SPLITS = 8
CHUNK_BYTES = 2**27
WIDTH, WARPS = 8192, 16  # words that a program of the softmax takes at a time


@triton.jit
def _logits(
    x,
    w,
    row,
    column,
    tokens,
    vocabulary,
    depth,
    sharpness,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    STEP: tl.constexpr,
    BULK: tl.constexpr,
):
    """A tile of x w' times `sharpness`, one over the temperature."""
    total = tl.zeros((ROWS, COLUMNS), dtype=tl.float32)
    for k in range(0, depth, STEP):
        left = load_tile(x, 0, row, k, tokens, depth, ROWS, STEP, BULK)
        right = load_tile(w, 0, column, k, vocabulary, depth, COLUMNS, STEP, BULK)
        total = tl.dot(left, right.T, total, input_precision="ieee")
    return total * sharpness


@triton.jit
def _row_tile(program, tokens, across, ROWS: tl.constexpr, BAND: tl.constexpr):
    """(row tile, which of `across`) of a program: a band of row tiles walks through `across` together."""
    band, inside = program // (BAND * across), program % (BAND * across)
    height = tl.minimum(tl.cdiv(tokens, ROWS) - band * BAND, BAND)
    return band * BAND + inside % height, inside // height


@triton.jit
def statistics_kernel(
    x,
    w,
    targets,
    largest,
    total,
    weighted,
    hit,
    tokens,
    vocabulary,
    depth,
    sharpness,
    splits,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    STEP: tl.constexpr,
    BAND: tl.constexpr,
    BULK: tl.constexpr,
):
    """Of a tile of rows and a split of the vocabulary: max l, sum of exp(l - max) and of l exp(l - max), l_target."""
    row_tile, split = _row_tile(tl.program_id(0), tokens, splits, ROWS, BAND)
    rows = row_tile * ROWS + tl.arange(0, ROWS)
    target = tl.load(targets + rows, mask=rows < tokens, other=-1)
    most = tl.full((ROWS,), float("-inf"), dtype=tl.float32)
    mass = tl.zeros((ROWS,), dtype=tl.float32)
    mean = tl.zeros((ROWS,), dtype=tl.float32)
    found = tl.zeros((ROWS,), dtype=tl.float32)
    each = tl.cdiv(tl.cdiv(vocabulary, COLUMNS), splits) * COLUMNS
    for column in range(split * each, tl.minimum((split + 1) * each, vocabulary), COLUMNS):
        logits = _logits(
            x,
            w,
            row_tile * ROWS,
            column,
            tokens,
            vocabulary,
            depth,
            sharpness,
            ROWS,
            COLUMNS,
            STEP,
            BULK,
        )
        columns = column + tl.arange(0, COLUMNS)
        logits = tl.where((columns < vocabulary)[None, :], logits, float("-inf"))
        higher = tl.maximum(most, tl.max(logits, 1))
        shrink = tl.exp(most - higher)
        p = tl.exp(logits - higher[:, None])
        mass = mass * shrink + tl.sum(p, 1)
        # 0 times minus infinity is not a number
        mean = mean * shrink + tl.sum(p * tl.where(p > 0, logits, 0.0), 1)
        found += tl.sum(tl.where(columns[None, :] == target[:, None], logits, 0.0), 1)
        most = higher
    at = split.to(tl.int64) * tokens + rows
    tl.store(largest + at, most, mask=rows < tokens)
    tl.store(total + at, mass, mask=rows < tokens)
    tl.store(weighted + at, mean, mask=rows < tokens)
    tl.store(hit + at, found, mask=rows < tokens)


@triton.jit
def gradient_kernel(
    x,
    w,
    targets,
    lse,
    weights,
    out,
    tokens,
    vocabulary,
    depth,
    sharpness,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    STEP: tl.constexpr,
    BAND: tl.constexpr,
    BULK: tl.constexpr,
):
    """out (T, words) = weight_t * (onehot_target - p) / temperature for the words of a chunk of the head."""
    row_tile, column_tile = _row_tile(
        tl.program_id(0), tokens, tl.cdiv(vocabulary, COLUMNS), ROWS, BAND
    )
    column = column_tile * COLUMNS
    logits = _logits(
        x,
        w,
        row_tile * ROWS,
        column,
        tokens,
        vocabulary,
        depth,
        sharpness,
        ROWS,
        COLUMNS,
        STEP,
        BULK,
    )
    rows, columns = row_tile * ROWS + tl.arange(0, ROWS), column + tl.arange(0, COLUMNS)
    target = tl.load(targets + rows, mask=rows < tokens, other=-1)
    weight = tl.load(weights + rows, mask=rows < tokens, other=0) * sharpness
    p = tl.exp(logits - tl.load(lse + rows, mask=rows < tokens, other=0)[:, None])
    d = (tl.where(columns[None, :] == target[:, None], 1.0, 0.0) - p) * weight[:, None]
    at = out + rows.to(tl.int64)[:, None] * vocabulary + columns[None, :]
    mask = (rows < tokens)[:, None] & (columns < vocabulary)[None, :]
    tl.store(at, d.to(out.dtype.element_ty), mask=mask)


@triton.jit
def softmax_gradient_kernel(logits, targets, weights, losses, vocabulary, WIDTH: tl.constexpr):
    """A token's loss, weight * (lse - l_target); its logits become their gradients, weight * (p - onehot_target)."""
    row = tl.program_id(0)
    at = logits + row.to(tl.int64) * vocabulary
    target, weight = tl.load(targets + row), tl.load(weights + row)
    hit = tl.load(at + target).to(tl.float32)
    most = float("-inf")
    mass = tl.zeros((WIDTH,), tl.float32)
    for begin in range(0, vocabulary, WIDTH):
        columns = begin + tl.arange(0, WIDTH)
        piece = tl.load(at + columns, mask=columns < vocabulary, other=float("-inf")).to(tl.float32)
        higher = tl.maximum(most, tl.max(piece, 0))
        mass = mass * tl.exp(most - higher) + tl.exp(piece - higher)
        most = higher
    total = tl.sum(mass, 0)
    tl.store(losses + row, weight * (most + tl.log(total) - hit))
    last = (tl.cdiv(vocabulary, WIDTH) - 1) * WIDTH
    for back in range(
        0, vocabulary, WIDTH
    ):  # backwards, since what was read last is still in the cache
        columns = last - back + tl.arange(0, WIDTH)
        piece = tl.load(at + columns, mask=columns < vocabulary, other=0).to(tl.float32)
        d = tl.exp(piece - most) * (weight / total) - tl.where(columns == target, weight, 0.0)
        tl.store(at + columns, d.to(logits.dtype.element_ty), mask=columns < vocabulary)


def softmax_gradient_triton(logits_TV, targets_T, weights_T):
    """The weighted loss of each token, (T,) float32; its logits become the gradients of that. No copy is made."""
    losses_T, V = torch.empty_like(weights_T), logits_TV.shape[1]
    softmax_gradient_kernel[(len(losses_T),)](
        logits_TV,
        targets_T,
        weights_T,
        losses_T,
        V,
        WIDTH=min(WIDTH, power_of_2(V)),
        num_warps=WARPS,
    )
    return losses_T


def _launch(x_TD, head_VD):
    """(tiles, x and head as a kernel reads them, the arguments that both kernels share)."""
    tiles, bulk = tiles_for(PRODUCT, x_TD, len(x_TD)), bulk_readable(x_TD, head_VD)
    x, w = (
        read(x_TD[None], tiles.rows, tiles.step, bulk),
        read(head_VD[None], tiles.columns, tiles.step, bulk),
    )
    return (
        tiles,
        x,
        w,
        tiles.constants() | {"BULK": bulk, "num_warps": tiles.warps, "num_stages": tiles.stages},
    )


class _LogProbabilities(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x_TD, head_VD, targets_T, temperature):
        (T, D), V = x_TD.shape, len(head_VD)
        tiles, x, w, common = _launch(x_TD, head_VD.to(x_TD.dtype))
        largest, total, weighted, hit = x_TD.new_empty(4, SPLITS, T, dtype=torch.float32)
        statistics_kernel[(triton.cdiv(T, tiles.rows) * SPLITS,)](
            x,
            w,
            targets_T,
            largest,
            total,
            weighted,
            hit,
            T,
            V,
            D,
            1 / temperature,
            SPLITS,
            **common,
        )
        most_T = largest.amax(0)
        share = (largest - most_T).exp()
        mass_T = (total * share).sum(0)
        lse_T = most_T + mass_T.log()
        ctx.temperature = temperature
        ctx.save_for_backward(x_TD, head_VD, targets_T, lse_T)
        entropy_T = lse_T - (weighted * share).sum(0) / mass_T
        ctx.mark_non_differentiable(entropy_T)
        return hit.sum(0) - lse_T, entropy_T

    @staticmethod
    def backward(ctx, dlogp_T, _):
        x_TD, head_VD, targets_T, lse_T = ctx.saved_tensors
        (T, D), V, dtype = x_TD.shape, len(head_VD), x_TD.dtype
        bind(dlogp_T)
        dlogp_T = dlogp_T.contiguous()
        dx_TD = x_TD.new_zeros(T, D, dtype=torch.float32)
        dhead_VD = torch.empty_like(head_VD)
        width = max(1, CHUNK_BYTES // (T * dtype.itemsize * 256)) * 256
        for begin in range(0, V, width):
            chunk_VD = head_VD[begin : begin + width].to(dtype)
            words = len(chunk_VD)
            tiles, x, w, common = _launch(x_TD, chunk_VD)
            d_TV = x_TD.new_empty(T, words)
            gradient_kernel[(triton.cdiv(T, tiles.rows) * triton.cdiv(words, tiles.columns),)](
                x,
                w,
                targets_T - begin,
                lse_T,
                dlogp_T,
                d_TV,
                T,
                words,
                D,
                1 / ctx.temperature,
                **common,
            )
            dhead_VD[begin : begin + width] = d_TV.T @ x_TD
            if dtype == torch.float32:
                dx_TD.addmm_(d_TV, chunk_VD)
            else:  # products in low precision, their sum in float32
                dx_TD += d_TV @ chunk_VD
        return dx_TD.to(dtype), dhead_VD, None, None


def log_probabilities_triton(hidden_TD, head_VD, targets_T, temperature=1.0):
    """The same as `minglm.kernels.cross_entropy.eager.token_log_probabilities`, for T > 0; no logits in memory."""
    hidden_TD, head_VD = hidden_TD.contiguous(), head_VD.contiguous()
    return _LogProbabilities.apply(hidden_TD, head_VD, targets_T.contiguous(), float(temperature))


def _specs():
    """GLM-4.5's head in bfloat16."""
    sizes = {name: "i32" for name in ("tokens", "vocabulary", "depth")} | {
        "sharpness": "fp32",
        "targets": "*i64",
    }
    results = {name: "*fp32" for name in ("largest", "total", "weighted", "hit")} | {
        "splits": "i32"
    }
    gradients = {"lse": "*fp32", "weights": "*fp32", "out": "*bf16"}
    for t in PRODUCT.values():
        read = {"x": described(t.rows, t.step), "w": described(t.columns, t.step)}
        common, constants = (
            {"unit": "HGMMA", "opcodes": ("UTMALDG",)},
            t.constants() | {"BULK": True},
        )
        yield Spec(
            f"statistics {t.rows}x{t.columns}",
            statistics_kernel,
            read | sizes | results,
            constants,
            t.warps,
            t.stages,
            ("depth", "vocabulary"),
            **common,
        )
        yield Spec(
            f"gradient {t.rows}x{t.columns}",
            gradient_kernel,
            read | sizes | gradients,
            constants,
            t.warps,
            t.stages,
            ("depth", "vocabulary"),
            **common,
        )
    signature = {
        "logits": "*bf16",
        "targets": "*i64",
        "weights": "*fp32",
        "losses": "*fp32",
        "vocabulary": "i32",
    }
    yield Spec(
        "softmax gradient",
        softmax_gradient_kernel,
        signature,
        {"WIDTH": WIDTH},
        WARPS,
        aligned=("vocabulary",),
    )


SPECS = list(_specs())
