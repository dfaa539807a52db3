"""The softmax over the output head as Triton kernels (paper 2.1). Eager forms: `cross_entropy/eager.py`.

    l = x W' / temperature;   log p_t = l_target - lse,   lse = log sum_v exp l_v,   entropy = lse - sum_v p_v l_v
    dlog p_t -> dl = dlog p_t * (onehot_target - p);   dx = dl W / temperature;   dW = dl' x / temperature

Cross-entropy knows dlog p_t beforehand, so its logits may be in memory, a chunk of tokens at a time, until
`softmax_gradient_kernel` replaces them with dl; the products are cuBLAS's.

The loss of reinforcement learning does not know it, and its function never holds logits.
Forward: `statistics_kernel` multiplies tile by tile and keeps of each row only the running maximum, the sum of
exponentials, their sum weighted by l, and the target's logit; `SPLITS` programs share a row's vocabulary, and PyTorch
combines their results.
Backward: for a chunk of the vocabulary `gradient_kernel` multiplies once more and writes dl; two products of PyTorch's
turn that into the chunk's rows of dW, complete at once, and its part of dx, which is summed in float32.

Choices of that function:
- The logits are computed twice: 8 T D V operations where storing them would need 6. In exchange nothing is kept between
  the passes but a number for each token, the gradient of each token may be anything, and logits are not rounded to
  bfloat16.
- Chunks of the vocabulary, not of the tokens: each row of dW then comes from one product and needs no float32 copy.
- Beyond the results a call in bfloat16 allocates CHUNK_BYTES for dl, 6 T D bytes for the float32 sum of dx and the part
  that is added to it, and a chunk of dW: 0.68 GB for 16,384 tokens of GLM-4.5. A head whose dtype is not that of the
  hidden states is copied.
- `band` row tiles and SPLITS vocabulary tiles are in progress at the same time: 128 programs, about as many as an H100
  has multiprocessors, which share 16 tiles of x and 8 of W in its L2 cache.
"""

# Triton has no types for a kernel's tensors, constexpr arguments, loops and launch options:
# pyright: reportArgumentType=false, reportCallIssue=false, reportOperatorIssue=false, reportAttributeAccessIssue=false
# pyright: reportGeneralTypeIssues=false, reportPossiblyUnboundVariable=false

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

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
SPLITS = 8  # programs that share the vocabulary of a tile of rows
CHUNK_BYTES = 2**27  # limit on dl in the backward pass
WIDTH = 8192  # words that a program of `softmax_gradient_kernel` takes at a time
WARPS = 16  # warps of such a program


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
    """Compute a tile of the logits l = x w' * sharpness; sharpness is 1 / temperature."""
    total = tl.zeros((ROWS, COLUMNS), dtype=tl.float32)
    for k in range(0, depth, STEP):
        left = load_tile(x, 0, row, k, tokens, depth, ROWS, STEP, BULK)
        right = load_tile(w, 0, column, k, vocabulary, depth, COLUMNS, STEP, BULK)
        total = tl.dot(left, right.T, total, input_precision="ieee")
    return total * sharpness


@triton.jit
def _row_tile(program, tokens, across, ROWS: tl.constexpr, BAND: tl.constexpr):
    """Find (row tile, which of `across`) of a program: a band of row tiles walks through `across` together."""
    band = program // (BAND * across)
    inside = program % (BAND * across)
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
    """Compute max l, sum of exp(l - max), sum of l exp(l - max) and l_target, for a tile of rows and one split."""
    row_tile, split = _row_tile(tl.program_id(0), tokens, splits, ROWS, BAND)
    rows = row_tile * ROWS + tl.arange(0, ROWS)
    target = tl.load(targets + rows, mask=rows < tokens, other=-1)
    most = tl.full((ROWS,), float("-inf"), dtype=tl.float32)
    mass = tl.zeros((ROWS,), dtype=tl.float32)
    mean = tl.zeros((ROWS,), dtype=tl.float32)
    target_logit = tl.zeros((ROWS,), dtype=tl.float32)
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
        # Where p is 0 the logit may be -inf, and 0 times -inf is NaN.
        mean = mean * shrink + tl.sum(p * tl.where(p > 0, logits, 0.0), 1)
        target_logit += tl.sum(tl.where(columns[None, :] == target[:, None], logits, 0.0), 1)
        most = higher
    at = split.to(tl.int64) * tokens + rows
    tl.store(largest + at, most, mask=rows < tokens)
    tl.store(total + at, mass, mask=rows < tokens)
    tl.store(weighted + at, mean, mask=rows < tokens)
    tl.store(hit + at, target_logit, mask=rows < tokens)


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
    """Compute out (T, words) = weight_t * (onehot_target - p) / temperature for the words of a chunk of the head."""
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
    rows = row_tile * ROWS + tl.arange(0, ROWS)
    columns = column + tl.arange(0, COLUMNS)
    target = tl.load(targets + rows, mask=rows < tokens, other=-1)
    weight = tl.load(weights + rows, mask=rows < tokens, other=0) * sharpness
    p = tl.exp(logits - tl.load(lse + rows, mask=rows < tokens, other=0)[:, None])
    d = (tl.where(columns[None, :] == target[:, None], 1.0, 0.0) - p) * weight[:, None]
    pointers = out + rows.to(tl.int64)[:, None] * vocabulary + columns[None, :]
    mask = (rows < tokens)[:, None] & (columns < vocabulary)[None, :]
    tl.store(pointers, d.to(out.dtype.element_ty), mask=mask)


@triton.jit
def softmax_gradient_kernel(logits, targets, weights, losses, vocabulary, WIDTH: tl.constexpr):
    """Compute a token's loss, weight * (lse - l_target), and overwrite its logits with weight * (p - onehot_target)."""
    row = tl.program_id(0)
    at = logits + row.to(tl.int64) * vocabulary
    target = tl.load(targets + row)
    weight = tl.load(weights + row)
    hit = tl.load(at + target).to(tl.float32)
    # First pass: the maximum, and for each lane the sum of its exponentials.
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
    # Second pass, backwards, since what was read last is still in the cache.
    last = (tl.cdiv(vocabulary, WIDTH) - 1) * WIDTH
    for back in range(0, vocabulary, WIDTH):
        columns = last - back + tl.arange(0, WIDTH)
        piece = tl.load(at + columns, mask=columns < vocabulary, other=0).to(tl.float32)
        d = tl.exp(piece - most) * (weight / total) - tl.where(columns == target, weight, 0.0)
        tl.store(at + columns, d.to(logits.dtype.element_ty), mask=columns < vocabulary)


def softmax_gradient_triton(logits_TV: Tensor, targets_T: Tensor, weights_T: Tensor) -> Tensor:
    """Compute each token's weighted loss, float32 (T,), and overwrite its logits with their gradients.

    logits: (T, V), contiguous; targets: int64; weights: float32.
    """
    losses_T = torch.empty_like(weights_T)
    V = logits_TV.shape[1]
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


class _Launch(NamedTuple):
    """What both products with the head share."""

    tiles: Tiles
    x: Any
    """Hidden states, as a kernel reads them."""
    w: Any
    """Head, as a kernel reads it."""
    options: dict[str, Any]
    """Constants and launch options."""


def _launch(x_TD: Tensor, head_VD: Tensor) -> _Launch:
    """Choose the tiles for a product of hidden states and (a chunk of) the head."""
    tiles = tiles_for(PRODUCT, x_TD, len(x_TD))
    bulk = bulk_readable(x_TD, head_VD)
    options = {
        **tiles.constants(),
        "BULK": bulk,
        "num_warps": tiles.warps,
        "num_stages": tiles.stages,
    }
    return _Launch(
        tiles,
        x=read(x_TD[None], tiles.rows, tiles.step, bulk),
        w=read(head_VD[None], tiles.columns, tiles.step, bulk),
        options=options,
    )


class _LogProbabilities(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x_TD: Tensor, head_VD: Tensor, targets_T: Tensor, temperature: float
    ) -> tuple[Tensor, Tensor]:
        T, D = x_TD.shape
        V = len(head_VD)
        launch = _launch(x_TD, head_VD.to(x_TD.dtype))
        # One number for each split and token.
        largest, total, weighted, hit = x_TD.new_empty(4, SPLITS, T, dtype=torch.float32)
        statistics_kernel[(triton.cdiv(T, launch.tiles.rows) * SPLITS,)](
            launch.x,
            launch.w,
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
            **launch.options,
        )
        # Combine the splits: each has its own maximum.
        most_T = largest.amax(0)
        shrink = (largest - most_T).exp()
        mass_T = (total * shrink).sum(0)  # sum_v exp(l_v - max)
        lse_T = most_T + mass_T.log()
        entropy_T = lse_T - (weighted * shrink).sum(0) / mass_T
        ctx.temperature = temperature
        ctx.save_for_backward(x_TD, head_VD, targets_T, lse_T)
        ctx.mark_non_differentiable(entropy_T)
        return hit.sum(0) - lse_T, entropy_T

    @staticmethod
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]  torch declares *grads
        ctx: Any, dlogp_T: Tensor, _: None
    ) -> tuple[Tensor | None, ...]:
        x_TD, head_VD, targets_T, lse_T = ctx.saved_tensors
        T, D = x_TD.shape
        V = len(head_VD)
        dtype = x_TD.dtype
        bind(dlogp_T)
        dlogp_T = dlogp_T.contiguous()
        dx_TD = x_TD.new_zeros(T, D, dtype=torch.float32)
        dhead_VD = torch.empty_like(head_VD)
        # Words of a chunk: a multiple of 256 for which dl takes at most CHUNK_BYTES.
        width = max(1, CHUNK_BYTES // (T * dtype.itemsize * 256)) * 256
        for begin in range(0, V, width):
            chunk_VD = head_VD[begin : begin + width].to(dtype)
            words = len(chunk_VD)
            launch = _launch(x_TD, chunk_VD)
            tiles = launch.tiles
            dl_TV = x_TD.new_empty(T, words)
            gradient_kernel[(triton.cdiv(T, tiles.rows) * triton.cdiv(words, tiles.columns),)](
                launch.x,
                launch.w,
                targets_T - begin,
                lse_T,
                dlogp_T,
                dl_TV,
                T,
                words,
                D,
                1 / ctx.temperature,
                **launch.options,
            )
            dhead_VD[begin : begin + width] = dl_TV.T @ x_TD
            if dtype == torch.float32:
                dx_TD.addmm_(dl_TV, chunk_VD)
            else:  # products in low precision, their sum in float32
                dx_TD += dl_TV @ chunk_VD
        return dx_TD.to(dtype), dhead_VD, None, None


def log_probabilities_triton(
    hidden_TD: Tensor, head_VD: Tensor, targets_T: Tensor, temperature: float = 1.0
) -> tuple[Tensor, Tensor]:
    """Compute each target's log-probability and the entropy of each distribution, both float32 (T,), for T > 0.

    Logits are never in memory; the entropy has no gradient. Eager form:
    `minglm.kernels.cross_entropy.eager.log_probabilities`.
    """
    return _LogProbabilities.apply(
        hidden_TD.contiguous(), head_VD.contiguous(), targets_T.contiguous(), float(temperature)
    )


def _product_spec(name: str, kernel: Any, tiles: Tiles, own: dict[str, str]) -> Spec:
    """Return the Spec of a kernel that multiplies with the head; own: the types of its own arguments."""
    signature = {
        "x": described(tiles.rows, tiles.step),
        "w": described(tiles.columns, tiles.step),
        **dict.fromkeys(("tokens", "vocabulary", "depth"), "i32"),
        "sharpness": "fp32",
        "targets": "*i64",
        **own,
    }
    return Spec(
        name=f"{name} {tiles.rows}x{tiles.columns}",
        kernel=kernel,
        signature=signature,
        constants={**tiles.constants(), "BULK": True},
        warps=tiles.warps,
        stages=tiles.stages,
        aligned=("depth", "vocabulary"),
        unit="HGMMA",
        opcodes=("UTMALDG",),
    )


def _specs() -> Iterator[Spec]:
    """Yield the Specs for GLM-4.5's head in bfloat16."""
    statistics = dict.fromkeys(("largest", "total", "weighted", "hit"), "*fp32") | {"splits": "i32"}
    gradients = {"lse": "*fp32", "weights": "*fp32", "out": "*bf16"}
    for tiles in PRODUCT.values():
        yield _product_spec("statistics", statistics_kernel, tiles, statistics)
        yield _product_spec("gradient", gradient_kernel, tiles, gradients)
    yield Spec(
        name="softmax gradient",
        kernel=softmax_gradient_kernel,
        signature={
            "logits": "*bf16",
            "targets": "*i64",
            "weights": "*fp32",
            "losses": "*fp32",
            "vocabulary": "i32",
        },
        constants={"WIDTH": WIDTH},
        warps=WARPS,
        aligned=("vocabulary",),
    )


SPECS = list(_specs())
