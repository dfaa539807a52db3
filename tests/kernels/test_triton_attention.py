"""The attention kernels against PyTorch's attention and `attend_slots` in float64 (no section of its own)."""

import math

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from minglm.inference.kv_cache import BlockManager
from minglm.inference.pages import PagedCache, Plan
from minglm.kernels import dispatch
from minglm.kernels.attention import flash_attention
from minglm.kernels.attention.eager import attend_slots
from minglm.kernels.toolchain.interpreter import in_new_process, switch_on
from minglm.testing.model import drawn_documents, normal, tiny_model, torch_attention
from minglm.testing.strategies import numbers, seeds

DEVICE = switch_on()
from minglm.kernels.attention import triton_backward as backward
from minglm.kernels.attention import triton_forward as forward
from minglm.kernels.attention import triton_layer as layer
from minglm.kernels.attention import triton_paged as paged
from minglm.kernels.attention.triton_common import Tiles

pytestmark = pytest.mark.usefixtures("poisoned")

NAMES = ("output", "gradient of q", "of k", "of v")
# Queries x keys; several tiles at every end of short rows.
SMALL = [
    Tiles(32, 16, 4, 1),
    Tiles(16, 32, 4, 1),
]


@pytest.fixture
def small(monkeypatch):
    """Use tiles as uneven as those of a GPU, but small."""
    monkeypatch.setattr(forward, "tiles_for_heads", lambda table, x: SMALL[0])
    monkeypatch.setattr(backward, "tiles_for_heads", lambda table, x: SMALL[table is backward.KEYS])


def drawn(seed, B, S, heads, A, dtype=torch.float32):
    """Draw q, k, v and the gradient of the output; scores of size up to 30 A^-1/2 are sharp enough to show mistakes."""
    N, M = heads
    shapes = ((N, 2), (M, 2), (M, 1), (N, 1))
    return [
        normal(seed + i, B, S, n, A, scale=scale).to(DEVICE, dtype)
        for i, (n, scale) in enumerate(shapes)
    ]


def results(function, values, documents_BS):
    """Return output and gradients."""
    *inputs, gradient = (v.detach().clone() for v in values)
    inputs = [v.requires_grad_() for v in inputs]
    out = function(*inputs, documents_BS)
    return [out.detach(), *torch.autograd.grad(out, inputs, gradient)]


def compare(function, values, documents_BS, tolerance):
    """Check every result to a tolerance of PyTorch's largest number in float64; NaN, where a kernel left a hole, fails."""
    ours = results(function, values, documents_BS)
    documents_BS = None if documents_BS is None else documents_BS.cpu()
    theirs = results(torch_attention, [v.double().cpu() for v in values], documents_BS)
    for name, a, b in zip(NAMES, ours, theirs):
        away = (a.double().cpu() - b).abs().max() / b.abs().max().clamp(min=1)
        assert away <= tolerance, f"{name}: off by {away:.1e} of the largest"


@settings(max_examples=8)
@given(
    seed=seeds,
    B=st.integers(1, 2),
    S=st.integers(1, 75),
    packed=st.booleans(),
    heads=st.sampled_from([(1, 1), (2, 1), (2, 2), (3, 1)]),
    A=st.sampled_from([2, 8, 24, 32]),
)
@example(seed=0, B=1, S=1, packed=False, heads=(12, 1), A=16)  # one position
@example(seed=1, B=1, S=33, packed=True, heads=(12, 1), A=16)  # GLM-4.5's group
@example(seed=3, B=1, S=150, packed=False, heads=(2, 1), A=8)  # several whole tiles
def test_equals_pytorch_in_float64(seed, B, S, packed, heads, A):
    """Output and gradients, for odd lengths, packed documents and padding, groups of heads, narrow and odd widths."""
    documents_BS = drawn_documents(seed, B, S).to(DEVICE) if packed else None
    # float32 sums.
    compare(layer.flash_attention_triton, drawn(seed, B, S, heads, A), documents_BS, 1e-5)


LENGTHS = [[90], [1] * 40, [1, 88, 1], [31, 1, 33, 1, 64], [16, 16, 48], [20, -60], [-3]]


@pytest.mark.parametrize("lengths", LENGTHS, ids=str)
def test_documents_at_every_edge_of_a_tile(small, lengths):
    """Documents of one token, that end with a tile, before or after it, or span several; rows of padding alone."""
    ids = [i if length > 0 else -1 for i, length in enumerate(lengths)]
    documents_BS = (
        torch.tensor(ids).repeat_interleave(torch.tensor(lengths).abs())[None].int().to(DEVICE)
    )
    values = drawn(len(lengths), 1, documents_BS.shape[1], (2, 1), 8)
    compare(layer.flash_attention_triton, values, documents_BS, 1e-5)  # float32 sums


@given(seed=seeds, B=st.integers(1, 3), S=st.integers(1, 40))
def test_bounds_are_those_of_the_run(seed, B, S):
    """Begin and end of each position's document, found by walking from it to both sides."""
    documents_BS = drawn_documents(seed, B, S)
    begin_BS, end_BS = layer.document_bounds(documents_BS)
    for ids, begins, ends in zip(documents_BS.tolist(), begin_BS.tolist(), end_BS.tolist()):
        for i in range(S):
            begin = i
            end = i + 1
            while begin > 0 and ids[begin - 1] == ids[i]:
                begin -= 1
            while end < S and ids[end] == ids[i]:
                end += 1
            assert (begins[i], ends[i]) == (begin, end)


@pytest.mark.parametrize(
    "dtype, A, S, packed",
    [
        (torch.bfloat16, 128, 300, True),
        (torch.bfloat16, 256, 150, True),
        (torch.float16, 128, 140, False),
    ],
)
def test_half_precision_tiles(dtype, A, S, packed):
    """The tiles a GPU would take. Each number is rounded once at the end, weights and dscores before the products."""
    documents_BS = drawn_documents(0, 1, S).to(DEVICE) if packed else None
    compare(layer.flash_attention_triton, drawn(0, 1, S, (2, 1), A, dtype), documents_BS, 0.01)


def test_repeats_to_the_bit(small):
    """The same input gives the same bits, gradients included; what is before a document does not matter either."""
    documents_BS = torch.tensor([0] * 41 + [1] * 30)[None].int().to(DEVICE)
    values = drawn(0, 1, 71, (4, 2), 8)
    first = results(layer.flash_attention_triton, values, documents_BS)
    assert all(map(torch.equal, first, results(layer.flash_attention_triton, values, documents_BS)))
    for value in values:
        value[:, :41] = 7.0
    second = results(layer.flash_attention_triton, values, documents_BS)
    assert all(torch.equal(a[:, 41:], b[:, 41:]) for a, b in zip(first, second))


@pytest.mark.parametrize("peak", [0, 40, 63])
@pytest.mark.parametrize("size", [1e-20, 50.0, 1e4])
def test_log_sum_keeps_a_long_tail(small, peak, size):
    """With one score above all others, in the first tile or the last, or all equal, L is log2 of the float64 sum."""
    q, k, v, _ = drawn(0, 1, 64, (1, 1), 8)
    k[0, peak, 0] = q[0, -1, 0] * size
    inputs = [x.requires_grad_() for x in (q, k, v)]
    saved = layer.flash_attention_triton(*inputs).grad_fn
    # Below the cut of the added zeros.
    while not hasattr(saved, "saved_tensors") or len(saved.saved_tensors) < 7:
        saved = saved.next_functions[0][0]
    scores = torch.einsum("sa,ca->sc", q[0, :, 0].double(), k[0, :, 0].double()) * 8**-0.5
    hidden = torch.ones(64, 64, dtype=torch.bool, device=DEVICE).triu(1)
    expected = scores.masked_fill(hidden, -math.inf).logsumexp(-1) / math.log(2)
    torch.testing.assert_close(
        saved.saved_tensors[6][0, 0].double(), expected, rtol=1e-6, atol=1e-5
    )


def test_a_leak_is_found(small, monkeypatch):
    """The comparison fails if a document begins one position too early or a key is seen one query too late."""
    documents_BS = torch.tensor([0] * 20 + [1] * 20)[None].int().to(DEVICE)
    values = drawn(0, 1, 40, (1, 1), 8)
    whole = layer.document_bounds
    for wrong, name in (((-1, 0), "output"), ((0, -8), "of k")):
        shifted = lambda ids, wrong=wrong: [(x + s).clamp(0) for x, s in zip(whole(ids), wrong)]  # noqa: E731
        monkeypatch.setattr(layer, "document_bounds", shifted)
        with pytest.raises(AssertionError, match=name):
            compare(layer.flash_attention_triton, values, documents_BS, 1e-5)


def cache(seed, B, S, heads, A, size, blocks, parts=2, dtype=torch.float32):
    """Draw (q, store, rows, positions) as the engine gives them: blocks in any order, NaN in slots that nobody has written.

    Each sequence is written up to its own last position, as in a batch of long and short ones.
    """
    N, M = heads
    random = numbers(seed)
    store = torch.full((B * blocks + 2, parts, M, size, A), math.nan)
    tables = torch.randperm(B * blocks, generator=random).view(B, blocks)
    last_B = torch.randint(S, blocks * size + 1, (B,), generator=random) - 1
    positions_BS = last_B[:, None] - S + 1 + torch.arange(S)
    for table, last in zip(tables, last_B.tolist()):
        for slot in range(last + 1):
            store[table[slot // size], :, :, slot % size] = normal(
                seed + slot, parts, M, A, scale=2
            )
    head = torch.arange(parts * M).view(parts, 1, M, 1)
    rows = (tables[None, :, None] * (parts * M) + head).flatten()
    q_BSNA = normal(seed, B, S, N, A).to(dtype)
    return [x.to(DEVICE) for x in (q_BSNA, store.to(dtype), rows, positions_BS)]


def in_order(q_BSNA, store, rows, positions_BS, first):
    """Compute `attend_slots` in float64 over the blocks in order, without the slots before `first`."""
    B = len(q_BSNA)
    parts, M, size, A = store.shape[1:]
    kv = (
        store.view(-1, size * A)[rows]
        .view(parts, B, M, -1, A)
        .double()
        .nan_to_num(9.0)[:, :, :, first:]
    )
    return attend_slots(q_BSNA.double(), kv[0], kv[-1], positions_BS - first)


@settings(max_examples=12)
@given(
    seed=seeds,
    B=st.integers(1, 3),
    S=st.sampled_from([1, 1, 3, 9]),
    first=st.integers(0, 1),
    parts=st.integers(1, 2),
    heads=st.sampled_from([(12, 1), (4, 2), (3, 3)]),
    A=st.sampled_from([3, 8, 24]),
    size=st.sampled_from([4, 16]),
    programs=st.sampled_from([1, 20, 1056]),
)
def test_paged_attention_equals_the_plain_form(seed, B, S, first, parts, heads, A, size, programs):
    """For one query or several, any cut in parts, heads that share keys, and without reading what is not written."""
    case = cache(seed, B, S + first, heads, A, size, 144 // size, parts)
    # A sequence of only the slot that is left out has no mean.
    case[0], case[3] = (
        case[0][:, first:],
        case[3][:, first:],
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(paged, "PROGRAMS", programs)
        patch.setattr(paged, "MIN_TILES", 1)
        found = paged.paged_attention_triton(*case, first)
    # float32 sums.
    torch.testing.assert_close(found.double(), in_order(*case, first), atol=1e-5, rtol=0)


@pytest.mark.parametrize("S", [1, 6])
def test_paged_attention_in_bfloat16(S):
    """The tiles a GPU would take for a token and for a prompt; weights are rounded before the product."""
    case = cache(S, 2, S, (12, 1), 128, 16, 40, dtype=torch.bfloat16)
    found = paged.paged_attention_triton(*case)
    # 2^-8 of values up to 6.
    torch.testing.assert_close(found.double(), in_order(*case, 0), atol=0.02, rtol=0)
    assert torch.equal(found, paged.paged_attention_triton(*case))


@given(st.integers(1, 5000), st.integers(1, 9000))
def test_parts_are_worth_their_program(programs, tiles):
    """A power of two; never less than MIN_TILES tiles a part unless there is one part, nor more programs than wanted."""
    count = paged._part_count(programs, tiles)
    assert count.bit_count() == 1 and count <= paged.MAX_PARTS
    assert count == 1 or (count * paged.MIN_TILES <= tiles and count * programs <= paged.PROGRAMS)


def test_a_step_equals_the_row_of_a_whole_pass(monkeypatch):
    """Keys and values written and read page by page, by the engine's own plan, give what attention over the row gives:
    for a prompt, its continuation, and a batch of both."""
    monkeypatch.setattr(dispatch, "_chosen", "triton")
    model = tiny_model(0).to(DEVICE)
    blocks = BlockManager(4)
    pages = PagedCache(model, size=4, blocks=16)
    S = 11
    heads = model.config.num_attention_heads, model.config.num_key_value_heads
    q, k, v, _ = drawn(0, 2, S, heads, model.config.head_dim)
    whole = flash_attention(q, k, v)
    rows = [
        type("Row", (), {"table": table, "start": 0, "stop": 0})()
        for table in _tables(blocks, 2, S)
    ]
    for stops in ((6, 3), (7, 4), (7, 9), (11, 10), (11, 11)):
        for row, stop in zip(rows, stops):
            row.start = row.stop
            row.stop = stop
        going = [(b, row) for b, row in enumerate(rows) if row.start < row.stop]
        pages.layers[0].plan = Plan([row for _, row in going], pages.shape, pages.device)
        new = [torch.cat([x[b, row.start : row.stop] for b, row in going])[None] for x in (q, k, v)]
        expected = torch.cat([whole[b, row.start : row.stop] for b, row in going])[None]
        # float32, another order.
        torch.testing.assert_close(pages.layers[0].attend(*new), expected, atol=1e-5, rtol=0)


def _tables(blocks, count, length):
    from minglm.inference.kv_cache import BlockTable

    tables = [BlockTable() for _ in range(count)]
    for table in tables:
        blocks.extend(table, length)
    return tables


def test_the_switch_chooses_these_kernels(monkeypatch):
    """`flash_attention` runs them when asked; wide heads and float64 go the plain way."""
    values = drawn(0, 1, 5, (2, 1), 8)
    called = []
    ours = layer.flash_attention_triton
    monkeypatch.setattr(layer, "flash_attention_triton", lambda *a: called.append(1) or ours(*a))
    for choice, expected in (("torch", 0), ("triton", 1)):
        monkeypatch.setattr(dispatch, "_chosen", choice)
        compare(flash_attention, values, None, 1e-5)
        assert len(called) == expected
    for others in (drawn(0, 1, 2, (1, 1), 300), [v.double() for v in values]):
        assert flash_attention(*others[:3]).shape == others[0].shape
        assert len(called) == 1


SETUP = """
import torch
from minglm.kernels.attention import triton_backward as backward
from minglm.kernels.attention import triton_layer as layer
from minglm.kernels.attention import triton_paged as paged
def check(found, expected):
    away = float((found.double() - expected).abs().max())
    assert away < 0.05, away
"""
ROWS = """
S, N, A = 180_000, 96, 128
q, tile = last_tile(1, S, N * A, tile=(1, A))
q = q.view(1, S, N, A)
k, v = torch.zeros(1, S, 8, A).bfloat16(), torch.zeros(1, S, 8, A).bfloat16()
k[0, -1, -1], v[0, -1, -1] = torch.randn(2, A)
begin = torch.arange(S, dtype=torch.int32)[None]  # every token is a document of its own, so a tile has one other
end = begin + 1
pin_program_id(N - 1, 0, 0)
context = type("Context", (), {"save_for_backward": lambda self, *x: setattr(self, "saved", x)})()
out = layer._FlashAttention.forward(context, q, k, v, begin, end, A**-0.5)
check(out[0, -1, -1], v[0, -1, -1].double())  # a query that sees one key
grad = torch.empty_like(q)
grad[0, -1, -1] = torch.randn(A)
dq, dk, dv = backward.backward_triton(*context.saved, grad, A**-0.5)
check(dq[0, -1, -1], torch.zeros(A).double())
pin_program_id(7, -(-S // backward.tiles_for_heads(backward.KEYS, q).keys) - 1, 0)
dq, dk, dv = backward.backward_triton(*context.saved, grad, A**-0.5)
check(dv[0, -1, -1], grad[0, -1, -1].double())
"""
PAGES = """
blocks, M, size, A = 70_000, 8, 16, 128
store, tile = last_tile(blocks, 2, M, size, A, tile=(size, A))
store[-1, 0, -1] = torch.randn(size, A)
q, rows = torch.randn(1, 1, 12 * M, A).bfloat16(), torch.arange(2 * M) + (blocks - 1) * 2 * M
pin_program_id(M - 1, 0, 0)
out = paged.paged_attention_triton(q, store, rows, torch.tensor([[size - 1]]))
weights = (q[0, 0, -12:].double() @ store[-1, 0, -1].double().T * A**-0.5).softmax(-1)
check(out[0, 0, -12:], weights @ tile.double())
"""


@pytest.mark.ci
@pytest.mark.parametrize("program", [ROWS, PAGES], ids=["rows", "pages"])
def test_offsets_beyond_32_bits(program):
    """The last of 180,000 positions of 96 heads, and the last of 70,000 blocks, lie past 2^31 elements; found."""
    done = in_new_process(SETUP + program)
    assert done.returncode == 0, done.stderr


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("heads, A", [((96, 8), 128), ((4, 4), 256), ((8, 2), 64), ((4, 2), 24)])
@pytest.mark.parametrize("packed", [False, True], ids=["row", "packed"])
def test_real_shapes(dtype, heads, A, packed):
    """The released models' heads and a toy's, twice to the same bits."""
    values = drawn(0, 1, 515, heads, A, dtype)
    documents_BS = drawn_documents(0, 1, 515).to(DEVICE) if packed else None
    compare(
        layer.flash_attention_triton,
        values,
        documents_BS,
        2e-5 if dtype == torch.float32 else 0.01,
    )
    first = results(layer.flash_attention_triton, values, documents_BS)
    assert all(map(torch.equal, first, results(layer.flash_attention_triton, values, documents_BS)))


@pytest.mark.gpu
@pytest.mark.parametrize("S", [1, 127, 129, 1000])
@pytest.mark.parametrize("packed", [False, True], ids=["row", "packed"])
def test_both_forms_on_hopper(monkeypatch, S, packed):
    """Where Gluon's kernels serve, Triton's give the same: documents of one position, and part of a last tile."""
    if torch.cuda.get_device_capability()[0] != 9:
        pytest.skip("Gluon's kernels are for Hopper alone")
    values = drawn(S, 2, S, (24, 2), 128, torch.bfloat16)
    documents_BS = drawn_documents(S, 2, S).to(DEVICE) if packed else None
    compare(layer.flash_attention_triton, values, documents_BS, 0.01)
    forward = dispatch.Operation.ATTENTION_FORWARD
    monkeypatch.setitem(dispatch.FORMS, forward, dispatch.FORMS[forward][1:])
    monkeypatch.setattr(dispatch, "_selected", {})
    compare(layer.flash_attention_triton, values, documents_BS, 0.01)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "B, S, blocks", [(1, 1, 256), (8, 1, 40), (64, 1, 12), (2, 4, 100), (1, 300, 30)]
)
def test_real_caches(dtype, B, S, blocks):
    """GLM-4.5's heads over blocks of 16: one token in many parts, many tokens, drafts, a prompt."""
    case = cache(0, B, S, (96, 8), 128, 16, blocks, dtype=dtype)
    found = paged.paged_attention_triton(*case)
    tolerance = 2e-5 if dtype == torch.float32 else 0.02  # as above
    torch.testing.assert_close(found.double(), in_order(*case, 0), atol=tolerance, rtol=0)
    assert torch.equal(found, paged.paged_attention_triton(*case))


@pytest.mark.gpu
def test_the_host_never_waits():
    """Forward and backward pass and a step over the cache without a synchronisation: PyTorch raises at one."""
    values = drawn(0, 2, 200, (8, 2), 128, torch.bfloat16)
    documents_BS = drawn_documents(0, 2, 200).to(DEVICE)
    case = cache(0, 2, 1, (8, 2), 128, 16, 8, dtype=torch.bfloat16)
    for mode in ("default", "error"):  # the first time compiles
        torch.cuda.set_sync_debug_mode(mode)
        try:
            results(layer.flash_attention_triton, values, documents_BS)
            paged.paged_attention_triton(*case)
        finally:
            torch.cuda.set_sync_debug_mode("default")
