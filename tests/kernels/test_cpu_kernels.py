"""The C forms of generation's small operations equal their plain twins for every shape, and can be done without."""

import random
import subprocess

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from minglm.common import threads as threads_module
from minglm.inference import Engine, Request, cpu_decoder
from minglm.inference.cpu_decoder import CpuDecoder
from minglm.inference.fp8_experts import Fp8Decoder
from minglm.inference.kv_cache import BlockTable
from minglm.inference.pages import PagedCache, TableSpan, decoder_for
from minglm.inference.sampling import Purpose, cut, sample, uniforms
from minglm.kernels import dispatch
from minglm.kernels.cpu import build
from minglm.kernels.cpu import newton_schulz as c_newton_schulz
from minglm.kernels.cpu.newton_schulz import newton_schulz_c
from minglm.kernels.cpu.sampling import sample_c
from minglm.kernels.newton_schulz import COEFFICIENTS, orthogonalize, polar_express
from minglm.testing.model import tiny_model
from minglm.testing.strategies import numbers, seeds

pytestmark = pytest.mark.skipif(build.library() is None, reason="no C compiler here")
CLOSE = {"atol": 2e-5, "rtol": 2e-5}
"""Sums of up to 100 float32 products of size one, in another order."""


def drawn(seed, *shape):
    """Draw normal numbers of this seed."""
    return torch.randn(*shape, generator=numbers(seed))


@st.composite
def models(draw):
    """Draw a model that C can run: any widths, heads and experts, with and without each part that a config may leave out."""

    def n(low, high):
        return draw(st.integers(low, high))

    half = draw(st.integers(1, 9))
    M = n(1, 3)
    E = n(2, 20)
    layers = n(1, 3)
    A = 2 * half * draw(st.sampled_from([1, 2]))
    return tiny_model(
        draw(seeds),
        vocab_size=n(2, 70),
        hidden_size=n(1, 40),
        num_hidden_layers=layers,
        first_k_dense_replace=n(0, layers),
        num_attention_heads=M * n(1, 6),
        num_key_value_heads=M,
        head_dim=A,
        partial_rotary_factor=2 * half / A,
        intermediate_size=n(1, 60),
        moe_intermediate_size=n(1, 40),
        n_routed_experts=E,
        num_experts_per_tok=n(2, E),
        n_shared_experts=n(0, 2),
        norm_topk_prob=draw(st.booleans()),
        use_qk_norm=draw(st.booleans()),
        attention_bias=draw(st.booleans()),
        tie_word_embeddings=draw(st.booleans()),
    )


def passes(seed, texts, size, largest):
    """Draw random texts, cut into passes: for each pass rows of some of the texts, the shortest first."""
    draw = random.Random(seed)
    lengths = [draw.randint(1, 3 * largest) for _ in range(texts)]
    room = [-(-length // size) for length in lengths]
    blocks = draw.sample(range(sum(room)), sum(room))
    tables = [BlockTable() for _ in lengths]
    for table, count in zip(tables, room):
        table.blocks = blocks[:count]
        blocks = blocks[count:]
    at = [0] * texts
    while at != lengths:
        rows = []
        for i, length in enumerate(lengths):
            if step := min(draw.randint(0, largest), length - at[i]):
                rows.append(TableSpan(tables[i], at[i], at[i] + step))
                at[i] += step
        if rows:
            yield sorted(rows, key=lambda row: row.stop - row.start)


@given(
    model=models(),
    seed=seeds,
    texts=st.integers(1, 5),
    size=st.sampled_from([1, 2, 5, 16, 17]),
    threads=st.integers(1, 3),
)
@torch.inference_mode()
def test_a_pass_is_that_of_the_model(model, seed, texts, size, threads):
    """States and logits of every pass, of prompts in pieces and single tokens, and the MTP layer's, are PyTorch's."""
    plain, found = (form(model, size, drafts=True) for form in (PagedCache, CpuDecoder))
    found.read_weights()
    draw = random.Random(seed)
    c = model.config
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(threads_module, "_threads", threads)
        patch.setattr(cpu_decoder, "MIN_TOKENS_PER_THREAD", 1)
        for rows in passes(seed, texts, size, draw.choice([1, 9, 80])):
            T = sum(row.stop - row.start for row in rows)
            tokens = [draw.randrange(c.vocab_size) for _ in range(T)]
            wanted = sorted(draw.sample(range(T), draw.randint(0, T)))
            results = []
            for pages in (plain, found):
                pages.begin([], 1 + max(block for row in rows for block in row.table.blocks))
                states, logits = pages.trunk(rows, tokens, wanted)
                after = [
                    TableSpan(row.table, max(1, row.start), row.stop)
                    for row in rows
                    if row.stop > 1
                ]
                n = sum(row.stop - row.start for row in after)
                if n:
                    drafted = pages.mtp(after, tokens[:n], drawn(seed, n, c.hidden_size))
                results.append((states, logits, drafted if n else None))
            # float32 sums in another order, magnified by up to three layers with large weights and narrow norms
            torch.testing.assert_close(*reversed(results), atol=2e-4, rtol=2e-4)


@settings(max_examples=15)
@given(
    model=models(),
    seed=seeds,
    texts=st.integers(2, 40),
    cut=st.integers(1, 30),
    block=st.sampled_from([3, 16]),
    threads=st.integers(2, 4),
)
def test_an_answer_has_the_same_bits_in_any_batch(model, seed, texts, cut, block, threads):
    """Alone or among others, its prompt whole or in pieces, one thread or more: every log-probability is the same."""
    draw = random.Random(seed)
    V = model.config.vocab_size
    requests = [
        Request([draw.randrange(V) for _ in range(draw.randint(1, 20))], 6, seed=i, stop_ids=())
        for i in range(texts)
    ]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(threads_module, "_threads", 1)
        alone = [Engine(model, block=block).generate([request])[0] for request in requests[:3]]
        patch.setattr(threads_module, "_threads", threads)
        patch.setattr(cpu_decoder, "MIN_TOKENS_PER_THREAD", 1)
        together = Engine(model, prefill_tokens=cut, block=block).generate(requests)
    assert together[:3] == alone


def test_who_is_served():
    """Groups of experts, other dtypes, and layers to which another's attention or dispatch was given go to PyTorch."""
    with torch.inference_mode():
        assert decoder_for(tiny_model(1)) is CpuDecoder
        grouped = tiny_model(1, n_routed_experts=4, n_group=2, topk_group=1)
        assert decoder_for(grouped) is PagedCache
        assert decoder_for(tiny_model(1).double()) is PagedCache
        for change in (
            lambda model: setattr(model, "dtype", torch.bfloat16),
            lambda model: setattr(model.model.layers[0].self_attn, "attend", print),
            lambda model: setattr(model.model.layers[1].mlp, "dispatcher", print),
            lambda model: setattr(model.model.layers[1].mlp.experts, "operation", print),
        ):
            model = tiny_model(1)
            change(model)
            assert decoder_for(model) is PagedCache
        assert decoder_for(tiny_model(1), fp8_experts=True) is Fp8Decoder
    assert decoder_for(tiny_model(1)) is PagedCache  # outside inference mode


@given(
    seed=seeds,
    B=st.integers(1, 4),
    V=st.integers(1, 300),
    top_p=st.sampled_from([None, 1.0, 0.95, 0.5, 1e-9]),
)
def test_drawing(seed, B, V, top_p):
    """The token of the same number and its log-probability; all temperatures in a batch; ties, also at the cut."""
    logits = drawn(seed, B, V).round()
    temperature = torch.tensor([0.0, 1.0, 0.5, 2.0])[:B]
    cuts = None if top_p is None else torch.full((B,), top_p)
    request = torch.arange(B) + seed * 7919
    index = torch.arange(B) * 3
    tokens, logprobs = sample_c(logits, temperature, cuts, request, index, Purpose.SAMPLE)
    uniform = uniforms(request, index)
    expected, expected_logprobs = sample(logits, temperature, cuts, uniform)
    for b in range(B):
        if tokens[b] == expected[b]:
            torch.testing.assert_close(logprobs[b], expected_logprobs[b], **CLOSE)
            continue
        # Another token only where the number falls on a border, to rounding, or where top-p does.
        p = (logits[b].double() / temperature[b]).softmax(0)
        q = p if cuts is None else cut(p[None], cuts[b : b + 1].double())[0]
        borders = q.cumsum(0) / q.sum()
        sums = p.sort(descending=True).values.cumsum(0)
        on_border = (borders - uniform[b]).abs().min() < 1e-6
        on_cut = (sums - (top_p or 1)).abs().min() < 1e-6
        assert on_border or on_cut


@given(seed=seeds, V=st.integers(2, 200), top_p=st.floats(0.05, 0.999))
def test_top_p_keeps_the_smallest_set(seed, V, top_p):
    """Over many numbers exactly the tokens of the plain cut are drawn, each as often as its share."""
    logits = 2 * drawn(seed, 1, V)
    count = 4000
    p = logits[0].double().softmax(0)
    sums = p.sort(descending=True).values.cumsum(0)
    assume((sums - top_p).abs().min() > 1e-6)
    q = cut(p[None], torch.tensor([top_p]).double())[0]
    tokens, _ = sample_c(
        logits.expand(count, V),
        torch.ones(count),
        torch.full((count,), top_p),
        torch.arange(count),
        torch.zeros(count, dtype=torch.int64),
        Purpose.SAMPLE,
    )
    shares = torch.bincount(tokens, minlength=V) / count
    assert not shares[q == 0].any()
    largest_deviation = 0.5 / count**0.5
    assert (shares - q / q.sum()).abs().max() < 5.5 * largest_deviation


def test_no_token_of_probability_zero_is_drawn():
    """Minus infinity is never drawn, whatever the number."""
    logits = torch.full((1, 200), -torch.inf)
    logits[0, 70] = logits[0, 130] = 0.0
    drawn_tokens = [
        int(
            sample_c(
                logits, torch.ones(1), None, torch.tensor([s]), torch.tensor([0]), Purpose.SAMPLE
            )[0]
        )
        for s in range(300)
    ]
    assert set(drawn_tokens) == {70, 130} and 100 < drawn_tokens.count(70) < 200


@settings(max_examples=20)
@given(st.integers(1, 9), st.integers(1, 60), st.integers(1, 60), seeds, st.booleans())
def test_newton_schulz(count, rows, columns, seed, express):
    """Newton-Schulz of any shape is that of float64; a matrix's bits depend on nothing beside it, nor on threads."""
    stack = drawn(seed, count, rows, columns)
    coefficients = polar_express(5) if express else [COEFFICIENTS] * 5
    exact = orthogonalize(stack, 5, torch.float64, coefficients)
    found = newton_schulz_c(stack, coefficients)
    # float32, and the slope 485 magnifies the rounding of small values; tests/test_muon.py
    torch.testing.assert_close(found, exact.float(), atol=1e-4, rtol=0)
    assert torch.equal(newton_schulz_c(stack[-1:], coefficients)[0], found[-1])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(c_newton_schulz, "ONE_THREAD_FLOPS", 0)
        patch.setattr(threads_module, "_threads", 3)
        assert torch.equal(newton_schulz_c(stack, coefficients), found)


def test_where_newton_schulz_is_in_c(monkeypatch):
    """Float32 on a CPU; not in float64, for large matrices, or where PyTorch was asked for."""
    calls = []
    monkeypatch.setattr(c_newton_schulz, "newton_schulz_c", lambda s, *_: calls.append(s) or s)
    orthogonalize(drawn(0, 2, 4, 6)), orthogonalize(drawn(0, 3, 4))
    assert len(calls) == 2
    (
        orthogonalize(drawn(0, 4, 6).double()),
        orthogonalize(drawn(0, 257, 256)),
        orthogonalize(drawn(0, 4, 6), gram=True),
    )
    dispatch.use("torch")
    try:
        orthogonalize(drawn(0, 4, 6))
    finally:
        dispatch.use("auto")
    assert len(calls) == 2


def test_a_matrix_that_is_not_finite_breaks_no_other():
    """A matrix that is not finite leaves those after it in the stack as they were."""
    stack = drawn(1, 3, 10, 12)
    whole = orthogonalize(stack)
    stack[0, 2, 3] = float("nan")
    assert torch.equal(orthogonalize(stack)[1:], whole[1:])


@settings(max_examples=5)
@given(seed=seeds)
def test_the_engine_draws_the_same_with_and_without(seed):
    """Plain PyTorch and C give the same answers, and only inference on a CPU in float32 gets C."""
    requests = [Request([1, 2, 3 + i], 6, seed=i) for i in range(3)]
    found = Engine(tiny_model(seed)).generate(requests)
    dispatch.use("torch")
    try:
        plain = Engine(tiny_model(seed)).generate(requests)
    finally:
        dispatch.use("auto")
    assert [a.tokens for a in found] == [a.tokens for a in plain]
    logits = torch.zeros(1, 5)
    assert dispatch.selected_name(dispatch.Operation.SAMPLING, logits) == "torch"
    with torch.inference_mode():
        names = [
            dispatch.selected_name(dispatch.Operation.SAMPLING, x)
            for x in (logits, logits.double(), logits.bfloat16())
        ]
    assert names == ["c", "torch", "torch"]


@pytest.mark.ci
def test_without_a_compiler_pytorch_is_used(monkeypatch, capsys, tmp_path):
    """No compiler, or one that fails: said in one line, and answers as before. A second process finds the library."""
    request = Request([1, 2, 3], 4, temperature=0.0)
    expected = Engine(tiny_model(1)).generate([request])[0].tokens
    monkeypatch.setattr(build, "library", build.library.__wrapped__)
    monkeypatch.setenv("CC", "false")
    assert build.library() is None
    assert capsys.readouterr().err.count("\n") == 1
    monkeypatch.setattr(build, "library", lambda: None)
    monkeypatch.setattr(dispatch, "_selected", {})
    assert Engine(tiny_model(1)).generate([request])[0].tokens == expected
    monkeypatch.undo()
    compiler = build.compiler()
    made = build.build(compiler, tmp_path)
    monkeypatch.setattr(build, "FLAGS", (*build.FLAGS, "-Werror", "-Wall"))
    # Other flags, another library, and no warning in the source.
    assert build.build(compiler, tmp_path) != made
    monkeypatch.undo()
    run = subprocess.run
    calls = []
    monkeypatch.setattr(build.subprocess, "run", lambda *a, **k: calls.append(a) or run(*a, **k))
    # Asks for the compiler's version only.
    assert build.build(compiler, tmp_path) == made
    assert len(calls) == 1


@pytest.mark.parametrize("damage", ["cut short", "empty", "a bit flipped", "no checksum"])
def test_a_damaged_library_is_compiled_again(damage, tmp_path, monkeypatch):
    """What is in the cache is loaded only if it is what was compiled; loading half a library ends the process."""
    monkeypatch.setattr(build, "FLAGS", ("-O0", "-fPIC", "-std=gnu11", "-pthread", "-w"))
    monkeypatch.setattr(build, "FOLDER", tmp_path)
    (tmp_path / "one.c").write_text("int one(void) { return 1; }\n", encoding="utf-8")
    cache = tmp_path / "cache"
    library = build.build(build.compiler(), cache)
    whole = library.read_bytes()
    assert build.is_whole(library)
    damaged = {
        "cut short": whole[: len(whole) // 2],
        "empty": b"",
        "a bit flipped": bytes([whole[0] ^ 1]) + whole[1:],
        "no checksum": whole,
    }
    library.write_bytes(damaged[damage])
    if damage == "no checksum":
        build.checksum_path(library).unlink()
    assert not build.is_whole(library)
    assert build.build(build.compiler(), cache) == library
    assert build.is_whole(library)


def test_a_user_without_a_home_gets_a_folder(monkeypatch):
    """The cache folder is an OSError then, after which a temporary one is used."""
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)

    def no_home():
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(build.Path, "home", no_home)
    with pytest.raises(OSError, match="home"):
        build.cache_folder()
