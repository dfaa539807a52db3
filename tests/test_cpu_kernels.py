"""The C forms of generation's small operations equal their plain twins for every shape, and can be done without."""

import subprocess

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from minglm import common
from minglm.inference import Engine, Request
from minglm.inference.sampling import DRAW, cut, sample, uniforms
from minglm.kernels import backend, cpu
from minglm.kernels.grouped_gemm import experts_loop
from minglm.kernels.newton_schulz import COEFFICIENTS, orthogonalize, polar_express
from minglm.kernels.norm import norm
from minglm.kernels.paged_attention import attend_slots
from minglm.kernels.qk_norm_rope import qk_norm_rope
from minglm.kernels.router_topk import router_topk
from minglm.model.rope import angles
from minglm.testing.model import tiny_model
from minglm.testing.rl import numbers, seeds

pytestmark = pytest.mark.skipif(cpu.library() is None, reason="no C compiler here")
CLOSE = {"atol": 2e-5, "rtol": 2e-5}
"""Sums of up to 100 float32 products of size one, in another order."""


def drawn(seed, *shape):
    """Normal numbers of this seed."""
    return torch.randn(*shape, generator=numbers(seed))


@given(seed=seeds, T=st.integers(1, 5), D=st.integers(1, 40), change=st.booleans())
def test_norm(seed, T, D, change):
    """The norm and the sum it is of, with and without a change."""
    x, weight = drawn(seed, T, D), drawn(seed + 1, D)
    added = drawn(seed + 2, T, D) if change else None
    for found, expected in zip(cpu.add_norm_cpu(x, weight, 1e-5, added), norm(x, weight, 1e-5, added)):
        torch.testing.assert_close(found, expected, **CLOSE)


@given(seed=seeds, S=st.integers(1, 4), N=st.integers(1, 5), half=st.integers(1, 9), rest=st.integers(0, 9))
def test_norm_and_rotation(seed, S, N, half, rest):
    """Queries of any width, rotated in full or in part, with and without QK-norm."""
    A = 2 * half + rest
    x, rotation = drawn(seed, 2, S, N, A), angles(torch.arange(S)[None] + 7, 2 * half, 1e4)
    for weight in (None, drawn(seed + 1, A)):
        expected, _ = qk_norm_rope(x, x, weight, weight, *rotation, 1e-5)
        torch.testing.assert_close(cpu.norm_rope_cpu(x.clone(), weight, *rotation, 1e-5), expected, **CLOSE)


@given(seed=seeds, T=st.integers(1, 6), E=st.integers(1, 20), share=st.floats(0, 1), ties=st.booleans())
def test_router(seed, T, E, share, ties):
    """The same experts in the same order, ties to the lower index; the same weights."""
    K = 1 + int(share * (E - 1))
    logits, bias = drawn(seed, T, E), drawn(seed + 1, E)
    if ties:  # whole numbers, and nothing added to them that rounds
        logits, bias = logits.round(), torch.zeros(E)
    found = cpu.router_topk_cpu(logits, bias, K, ties, 1.5)
    expected = router_topk(logits, bias, K, ties, 1.5)
    assert torch.equal(found[0], expected[0])
    torch.testing.assert_close(found[1:], expected[1:], **CLOSE)


@given(
    seed=seeds,
    T=st.integers(1, 40),
    K=st.integers(1, 3),
    E=st.integers(3, 5),
    D=st.integers(1, 20),
    F=st.integers(1, 20),
)
def test_experts(seed, T, K, E, D, F):
    """One row, a few, and more than a panel for an expert; any widths; experts without rows."""
    chosen = torch.rand(T, E, generator=numbers(seed)).topk(K).indices
    weights, x = torch.rand(T, K, generator=numbers(seed + 1)), drawn(seed + 2, T, D)
    gate, up, down = (drawn(seed + 3 + i, E, *shape) * 0.3 for i, shape in enumerate(((F, D), (F, D), (D, F))))
    expected = experts_loop(x, chosen, weights, gate, up, down)
    torch.testing.assert_close(cpu.experts_cpu(x, chosen, weights, gate, up, down), expected, **CLOSE)


@given(
    seed=seeds, B=st.integers(1, 3), S=st.integers(1, 3), M=st.integers(1, 2), G=st.integers(1, 6),
    A=st.integers(1, 20), size=st.integers(1, 6), blocks=st.integers(1, 4),
    latent=st.booleans(), first=st.integers(0, 1),
)  # fmt: skip
def test_attention_over_pages(seed, B, S, M, G, A, size, blocks, latent, first):
    """What `keep` has put into blocks in any order, attended up to each query's position, from the first slot on."""
    parts, C, heads = 1 if latent else 2, size * blocks, M * (1 if latent else 2)
    if first >= C:
        return
    store, order = torch.zeros(B * blocks, parts, M, size, A), torch.randperm(B * blocks, generator=numbers(seed))
    k, v, q = drawn(seed, B, C, M, A), drawn(seed + 1, B, C, M, A), drawn(seed + 2, B, S, M * G, A)
    block = order.view(B, blocks).repeat_interleave(size, 1) * (heads * size) + torch.arange(C) % size
    written = (block[..., None] + torch.arange(heads) * size).flatten()
    cpu.keep_cpu(k, None if latent else v, written, store)
    rows = (order.view(1, B, 1, blocks) * heads + torch.arange(heads).view(parts, 1, M, 1)).flatten()
    positions = torch.randint(first, C, (B, S), generator=numbers(seed + 3))
    found = cpu.paged_attention_cpu(q, store, rows, positions, first)
    k, v = (x.transpose(1, 2)[:, :, first:] for x in (k, k if latent else v))
    torch.testing.assert_close(found, attend_slots(q, k, v, positions - first), **CLOSE)


@given(seed=seeds, B=st.integers(1, 4), V=st.integers(1, 300), top_p=st.sampled_from([None, 1.0, 0.95, 0.5, 1e-9]))
def test_drawing(seed, B, V, top_p):
    """The token of the same number and its log-probability; all temperatures in a batch; ties, also at the cut."""
    logits = drawn(seed, B, V).round()
    temperature, cuts = torch.tensor([0.0, 1.0, 0.5, 2.0])[:B], None if top_p is None else torch.full((B,), top_p)
    request, index = torch.arange(B) + seed * 7919, torch.arange(B) * 3
    tokens, logprobs = cpu.sample_cpu(logits, temperature, cuts, request, index, DRAW)
    uniform = uniforms(request, index)
    expected, expected_logprobs = sample(logits, temperature, cuts, uniform)
    for b in range(B):
        if tokens[b] != expected[b]:  # only where the number falls on a border, to rounding
            p = (logits[b].double() / temperature[b]).softmax(0)
            q = p if cuts is None else cut(p[None], cuts[b : b + 1].double())[0]
            ends = q.cumsum(0) / q.sum()
            sums = p.sort(descending=True).values.cumsum(0)  # or where top-p does
            assert (ends - uniform[b]).abs().min() < 1e-6 or (sums - (top_p or 1)).abs().min() < 1e-6
        else:
            torch.testing.assert_close(logprobs[b], expected_logprobs[b], **CLOSE)


@given(seed=seeds, V=st.integers(2, 200), top_p=st.floats(0.05, 0.999))
def test_top_p_keeps_the_smallest_set(seed, V, top_p):
    """Over many numbers exactly the tokens of the plain cut are drawn, each as often as its share."""
    logits, count = 2 * drawn(seed, 1, V), 4000
    p = logits[0].double().softmax(0)
    assume((p.sort(descending=True).values.cumsum(0) - top_p).abs().min() > 1e-6)
    q = cut(p[None], torch.tensor([top_p]).double())[0]
    rows = logits.expand(count, V), torch.ones(count), torch.full((count,), top_p)
    tokens, _ = cpu.sample_cpu(*rows, torch.arange(count), torch.zeros(count, dtype=torch.int64), DRAW)
    shares = torch.bincount(tokens, minlength=V) / count
    assert not shares[q == 0].any()
    assert (shares - q / q.sum()).abs().max() < 5.5 * 0.5 / count**0.5  # five standard deviations and more


def test_no_token_of_probability_zero_is_drawn():
    """Minus infinity is never drawn, whatever the number."""
    logits = torch.full((1, 200), -torch.inf)
    logits[0, 70] = logits[0, 130] = 0.0
    drawn_tokens = [
        int(cpu.sample_cpu(logits, torch.ones(1), None, torch.tensor([s]), torch.tensor([0]), DRAW)[0])
        for s in range(300)
    ]
    assert set(drawn_tokens) == {70, 130} and 100 < drawn_tokens.count(70) < 200


@settings(max_examples=20)
@given(st.integers(1, 9), st.integers(1, 60), st.integers(1, 60), seeds, st.booleans())
def test_newton_schulz(count, rows, columns, seed, express):
    """Newton-Schulz of any shape is that of float64; a matrix's bits depend on nothing beside it, nor on threads."""
    stack, coefficients = drawn(seed, count, rows, columns), polar_express(5) if express else [COEFFICIENTS] * 5
    exact = orthogonalize(stack, 5, torch.float64, coefficients)
    found = cpu.newton_schulz_cpu(stack, coefficients)
    # float32, and the slope 485 magnifies the rounding of small values; tests/test_muon.py
    torch.testing.assert_close(found, exact.float(), atol=1e-4, rtol=0)
    assert torch.equal(cpu.newton_schulz_cpu(stack[-1:], coefficients)[0], found[-1])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cpu, "FEW", 0)
        patch.setattr(common, "threads", 3)
        assert torch.equal(cpu.newton_schulz_cpu(stack, coefficients), found)


def test_where_newton_schulz_is_in_c(monkeypatch):
    """Float32 on a CPU; not in float64, for large matrices, or where PyTorch was asked for."""
    calls = []
    monkeypatch.setattr("minglm.kernels.newton_schulz.newton_schulz_cpu", lambda s, c: calls.append(s) or s)
    orthogonalize(drawn(0, 2, 4, 6)), orthogonalize(drawn(0, 3, 4))
    assert len(calls) == 2
    orthogonalize(drawn(0, 4, 6).double()), orthogonalize(drawn(0, 257, 256)), orthogonalize(drawn(0, 4, 6), gram=True)
    backend.use("torch")
    try:
        orthogonalize(drawn(0, 4, 6))
    finally:
        backend.use("auto")
    assert len(calls) == 2


def test_a_matrix_that_is_not_finite_breaks_no_other():
    """A matrix that is not finite leaves those after it in the stack as they were."""
    stack = drawn(1, 3, 10, 12)
    whole, stack[0, 2, 3] = orthogonalize(stack), float("nan")
    assert torch.equal(orthogonalize(stack)[1:], whole[1:])


@settings(max_examples=5)
@given(seed=seeds)
def test_the_engine_draws_the_same_with_and_without(seed):
    """Plain PyTorch and C give the same answers, and only inference on a CPU in float32 gets C."""
    requests = [Request([1, 2, 3 + i], 6, seed=i) for i in range(3)]
    found = Engine(tiny_model(seed)).generate(requests)
    backend.use("torch")
    try:
        plain = Engine(tiny_model(seed)).generate(requests)
    finally:
        backend.use("auto")
    assert [a.tokens for a in found] == [a.tokens for a in plain]
    x = torch.zeros(1)
    assert backend.backend(x) == "torch"
    with torch.inference_mode():
        assert [backend.backend(y) for y in (x, x.double(), x.bfloat16())] == ["c", "torch", "torch"]


def test_without_a_compiler_pytorch_goes_on(monkeypatch, capsys, tmp_path):
    """No compiler, or one that fails: said in one line, and answers as before. A second process finds the library."""
    request = Request([1, 2, 3], 4, temperature=0.0)
    expected = Engine(tiny_model(1)).generate([request])[0].tokens
    monkeypatch.setattr(cpu, "library", cpu.library.__wrapped__)
    monkeypatch.setenv("CC", "false")
    assert cpu.library() is None and capsys.readouterr().err.count("\n") == 1
    monkeypatch.setattr(cpu, "library", lambda: None)
    assert Engine(tiny_model(1)).generate([request])[0].tokens == expected
    monkeypatch.undo()
    compiler = cpu.compiler()
    made = cpu.build(compiler, tmp_path)
    monkeypatch.setattr(cpu, "FLAGS", (*cpu.FLAGS, "-Werror", "-Wall"))
    assert cpu.build(compiler, tmp_path) != made  # other flags, another library, and no warning in the source
    monkeypatch.undo()
    run = subprocess.run
    calls = []
    monkeypatch.setattr(cpu.subprocess, "run", lambda *a, **k: calls.append(a) or run(*a, **k))
    assert cpu.build(compiler, tmp_path) == made and len(calls) == 1  # asks for the compiler's version only
