"""Attention at GLM-4.5's shape (96 query heads, 8 key/value heads, width 128): forward, backward, packed, decoding.

Baselines are PyTorch's own: its fused attention with each backend by name, because the default's choice
changes between releases; FlexAttention, compiled, forward and at one length, because that takes half a
minute; and for packed documents its attention for variable lengths. The baselines of decoding get keys and
values in order, one text after another; ours reads them block by block.
"""

import inspect
from collections.abc import Callable, Iterator
from functools import cache, partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from minglm.bench.case import Case, Form
from minglm.kernels.attention import PagedRows, flash_attention, paged_attention

N, M, A = 96, 8, 128
ROWS = ((8, 512), (1, 4096), (4, 4096), (1, 32768), (1, 131072))
PACKED = (32768, 2048)  # positions of a row, and of each document in it
CACHES = [
    (texts, slots)
    for slots in (4096, 32768, 131072)
    for texts in (1, 8, 64)
    if texts * slots <= 2**21
]
BLOCK = 16  # slots of a block of the cache

Heads = tuple[int, int, int]
"""Query heads, key/value heads, dimensions of a head."""
Attend = Callable[[Tensor, Tensor, Tensor], Tensor]
"""Attention of q, k and v (B, S, heads, A)."""


def inputs(device: torch.device, B: int, S: int, heads: Heads) -> list[Tensor]:
    """Draw q, k, v and the gradient of the output, bfloat16 (B, S, heads, A)."""
    N, M, A = heads
    generator = torch.Generator(device).manual_seed(0)
    options: dict[str, Any] = {"device": device, "dtype": torch.bfloat16}
    q, k, v, grad = (
        torch.randn(B, S, count, A, generator=generator, **options) for count in (N, M, M, N)
    )
    return [q.requires_grad_(), k.requires_grad_(), v.requires_grad_(), grad]


def sdpa(backend: SDPBackend, causal: bool = True) -> Attend:
    """Return PyTorch's attention with one of its backends."""

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        with sdpa_kernel(backend):
            out = F.scaled_dot_product_attention(
                q.transpose(1, 2),
                k.transpose(1, 2),
                v.transpose(1, 2),
                is_causal=causal,
                enable_gqa=q.shape[2] != k.shape[2],
            )
        return out.transpose(1, 2)

    return attend


def flex(S: int, device: torch.device, length: int | None = None) -> Attend:
    """Return PyTorch's FlexAttention, compiled: causal, in documents of one length if given."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    def seen(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        return (i >= j) & (i // length == j // length) if length else i >= j

    # The mask is compiled, because the mask of all pairs of 131,072 positions would take 16 GiB
    mask = torch.compile(create_block_mask)(seen, None, None, S, S, device=device)
    compiled = torch.compile(flex_attention, dynamic=False)

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        return compiled(q, k, v, block_mask=mask, enable_gqa=True).transpose(1, 2)

    return attend


def variable(S: int, device: torch.device, length: int) -> Attend:
    """Return PyTorch's attention for variable lengths, causal in documents of one length."""
    from torch.nn.attention.varlen import varlen_attn

    starts = torch.arange(0, S + 1, length, device=device, dtype=torch.int32)
    # From torch 2.12 on it must be told that there are fewer key/value heads.
    grouped: dict[str, Any] = (
        {"enable_gqa": True} if "enable_gqa" in inspect.signature(varlen_attn).parameters else {}
    )

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = (x.flatten(0, 1) for x in (q, k, v))
        # Rows have no batch axis here.
        out: Any = varlen_attn(
            q, k, v, starts, starts, length, length, window_size=(-1, 0), **grouped
        )
        return out[None]

    return attend


def by_loop(length: int) -> Attend:
    """Return attention to packed documents one after the other: the baseline of a machine without a GPU."""

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        documents = zip(*(x.split(length, 1) for x in (q, k, v)), strict=True)
        return torch.cat([sdpa(SDPBackend.MATH)(*document) for document in documents], 1)

    return attend


def baselines(S: int, device: torch.device, length: int | None = None) -> dict[str, Attend]:
    """Return every form of the forward pass, ours first. length: of each document of a packed row."""
    if length:
        documents_BS = (torch.arange(S, device=device, dtype=torch.int32) // length)[None]
        forms: dict[str, Attend] = {
            "minglm": lambda q, k, v: flash_attention(q, k, v, documents_BS)
        }
        if device.type != "cuda":
            return forms | {"SDPA, a loop": by_loop(length)}
        return forms | {"varlen_attn": variable(S, device, length)}
    forms: dict[str, Attend] = {"minglm": flash_attention}
    if device.type != "cuda":
        return forms | {"SDPA": sdpa(SDPBackend.MATH)}
    return forms | {
        "SDPA flash": sdpa(SDPBackend.FLASH_ATTENTION),
        "SDPA cuDNN": sdpa(SDPBackend.CUDNN_ATTENTION),
    }


def forward(
    device: torch.device, B: int, S: int, heads: Heads, length: int | None = None
) -> dict[str, Form]:
    """Return {form: the forward pass alone}."""
    q, k, v, _ = (x.detach() for x in inputs(device, B, S, heads))
    forms = baselines(S, device, length)
    if device.type == "cuda" and PACKED[0] == S:
        forms["FlexAttention"] = flex(S, device, length)
    return {name: lambda attend=attend: attend(q, k, v) for name, attend in forms.items()}


def backward(
    device: torch.device, B: int, S: int, heads: Heads, length: int | None = None
) -> dict[str, Form]:
    """Return {form: the backward pass alone}; each form makes its forward pass at its first call and keeps it."""
    q, k, v, grad = inputs(device, B, S, heads)
    return {
        name: _backward_pass(attend, (q, k, v), grad)
        for name, attend in baselines(S, device, length).items()
    }


def _backward_pass(attend: Attend, qkv: tuple[Tensor, Tensor, Tensor], grad: Tensor) -> Form:
    """Return a form that runs the backward pass of one forward pass, which is made at the first call."""

    @cache
    def output() -> Tensor:
        return attend(*qkv)

    def run() -> tuple[Tensor, ...]:
        return torch.autograd.grad(output(), qkv, grad, retain_graph=True)

    return run


def decode(device: torch.device, texts: int, slots: int, heads: Heads) -> dict[str, Form]:
    """Return {form: the attention of one layer for the next token of `texts` texts, each with `slots` slots}."""
    N, M, A = heads
    generator = torch.Generator(device).manual_seed(0)
    options: dict[str, Any] = {"device": device, "dtype": torch.bfloat16}
    blocks = texts * slots // BLOCK
    store = torch.randn(blocks, 2, M, BLOCK, A, generator=generator, **options)
    q = torch.randn(texts, 1, N, A, generator=generator, **options)

    # A block is 2 M rows of the store, one for each head of k and then of v. Texts own blocks in a random order.
    first_rows = torch.randperm(blocks, generator=generator, device=device) * (2 * M)
    row_of_head = torch.arange(2 * M, device=device).view(2, 1, M, 1)
    rows = (first_rows.view(1, texts, 1, -1) + row_of_head).flatten()
    k, v = (
        store.view(-1, BLOCK * A)[part].view(texts, M, slots, A).transpose(1, 2)
        for part in rows.chunk(2)
    )
    sequences = PagedRows(rows, torch.full((texts, 1), slots - 1, device=device))
    if device.type == "cuda":
        others = {"SDPA flash": sdpa(SDPBackend.FLASH_ATTENTION, False)}
        others |= {"SDPA cuDNN": sdpa(SDPBackend.CUDNN_ATTENTION, False)}
    else:
        others = {"SDPA": sdpa(SDPBackend.MATH, False)}
    forms: dict[str, Form] = {"minglm": lambda: paged_attention(q, store, sequences)}
    for name, attend in others.items():
        forms[name] = lambda attend=attend: attend(q, k, v)
    return forms


def cases(device: torch.device, smoke: bool) -> Iterator[Case]:
    """Yield forward and backward at each size, with packed documents, and a step of decoding."""
    heads = (4, 2, 16) if smoke else (N, M, A)
    rows = ((2, 40),) if smoke else ROWS
    packed = (40, 10) if smoke else PACKED
    caches = ((2, 48),) if smoke else CACHES
    query_heads, kv_heads, width = heads
    heads_name = f"{query_heads}/{kv_heads} heads of {width}"

    for B, S, length in [*((B, S, None) for B, S in rows), (1, *packed)]:
        pairs = B * S * ((length or S) + 1) / 2
        flops = 4 * width * query_heads * pairs
        numbers_moved = 2 * B * S * width * (query_heads + kv_heads)  # q and the output, k and v
        moved = 2 * numbers_moved  # bytes, in bfloat16
        documents = f"documents of {length}, " if length else ""
        name = f"{B} x {S}, {documents}{heads_name}"
        shape = (device, B, S, heads, length)
        yield Case(f"attention forward, {name}", flops, moved, partial(forward, *shape))
        if S <= 2**16:  # a minute for each form, beyond
            yield Case(
                f"attention backward, {name}", 2.5 * flops, 2.5 * moved, partial(backward, *shape)
            )

    for texts, slots in caches:
        numbers = texts * slots * width
        yield Case(
            f"attention decoding, {texts} x {slots}, {heads_name}",
            4 * numbers * query_heads,
            2 * 2 * numbers * kv_heads,
            partial(decode, device, texts, slots, heads),
            graph=True,
        )
