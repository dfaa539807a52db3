"""The C forms of a training step equal the plain forms for every shape, gradients too, and are chosen where they can be."""

import importlib

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from minglm.kernels import dispatch
from minglm.kernels.attention.shared import SharedPrompts, Text, expanded
from minglm.kernels.cpu import build
from minglm.kernels.cpu.linear import product_c
from minglm.kernels.dispatch import FORMS, REFERENCES, Operation
from minglm.model.rope import angles
from minglm.testing.model import normal
from minglm.testing.strategies import numbers, seeds

pytestmark = pytest.mark.skipif(build.library() is None, reason="no C compiler here")

FLOAT32 = 2e-5
"""Share of the largest number: sums of up to 300 float32 products, each off by 6e-8, and a cancellation or two."""

widths = st.integers(1, 70)  # beside whole vectors of 8 and 16, and three of them


def c_form(operation):
    """Return the C form of an operation."""
    (form,) = [form for form in FORMS[operation] if form.name == "c"]
    return form.load()


def reference(operation):
    """Return the plain form of an operation."""
    module, function = REFERENCES[operation].split(":")
    return getattr(importlib.import_module(module), function)


def results(function, inputs, others, dtype):
    """Return what a function returns, and the gradients of its inputs for random gradients of what it returns."""
    leaves = [x.detach().to(dtype).requires_grad_() for x in inputs]
    out = function(*leaves, *others)
    out = out if isinstance(out, tuple) else (out,)
    differentiable = [x for x in out if x.requires_grad]
    upstreams = [normal(i, *x.shape).to(x.dtype) for i, x in enumerate(differentiable)]
    return [*out, *torch.autograd.grad(differentiable, leaves, upstreams)]


def error(form, plain, inputs, *others, dtype=torch.float64):
    """Return the largest difference of results and gradients, as a share of the largest number of each."""
    found = results(form, inputs, others, torch.float32)
    expected = results(plain, inputs, others, dtype)
    errors = [0.0]
    for ours, theirs in zip(found, expected, strict=True):
        assert ours.shape == theirs.shape
        if ours.numel():
            difference = (ours.double() - theirs.double()).abs().max()
            errors.append(float(difference / theirs.double().abs().max().clamp(min=1e-3)))
    return max(errors)


@given(seed=seeds, rows=st.integers(0, 70), inputs=widths, outputs=widths, bias=st.booleans())
def test_linear(seed, rows, inputs, outputs, bias):
    """Every number of rows, inputs and outputs; with and without a bias."""
    leaves = [normal(seed, 2, rows, inputs), normal(seed + 1, outputs, inputs)]
    leaves += [normal(seed + 2, outputs)] if bias else []
    assert error(c_form(Operation.LINEAR), reference(Operation.LINEAR), leaves) < FLOAT32


@given(seed=seeds, sizes=st.tuples(widths, widths, widths), turned=st.tuples(*[st.booleans()] * 2))
def test_a_product_of_any_strides(seed, sizes, turned):
    """Either factor may be transposed, or a part of a wider one."""
    M, K, N = sizes
    a_MK = normal(seed, K, M + 1).T[:M] if turned[0] else normal(seed, M, K + 1)[:, :K]
    b_KN = normal(seed + 1, N, K + 1).T[:K] if turned[1] else normal(seed + 1, K, N + 1)[:, :N]
    exact = (a_MK.double() @ b_KN.double()).float()
    torch.testing.assert_close(product_c(a_MK, b_KN), exact, atol=1e-4, rtol=1e-5)


@given(seed=seeds, shape=st.tuples(st.integers(0, 5), widths))
def test_swiglu(seed, shape):
    """Any number of values."""
    leaves = [normal(seed, *shape, scale=3), normal(seed + 1, *shape)]
    assert error(c_form(Operation.SWIGLU), reference(Operation.SWIGLU), leaves) < FLOAT32


@given(seed=seeds, rows=st.integers(0, 9), width=widths, added=st.booleans())
def test_norm(seed, rows, width, added):
    """With and without a change, the stream's later gradient included."""
    leaves = [normal(seed + i, 2, rows, width) for i in range(1 + added)]

    def form(f):
        return lambda weight, x, *change: f(x, weight, 1e-2, *change)

    forms = [form(f(Operation.NORM)) for f in (c_form, reference)]
    assert error(*forms, [normal(seed + 2, width), *leaves]) < FLOAT32


@given(
    seed=seeds,
    rows=st.integers(1, 3),
    length=st.integers(1, 9),
    heads=st.tuples(st.integers(1, 5), st.integers(1, 3)),
    half=st.integers(1, 12),
    rest=st.integers(0, 20),
    moved=st.booleans(),
)
def test_qk_norm_and_rotation(seed, rows, length, heads, half, rest, moved):
    """Any part of the head rotates; positions are those of every row, or each row has its own."""
    A = 2 * half + rest
    positions_BS = torch.arange(length).expand(rows if moved else 1, -1)
    positions_BS = positions_BS + 7 * torch.arange(len(positions_BS))[:, None]
    leaves = [normal(seed + i, rows, length, n, A) for i, n in enumerate(heads)]
    leaves += [normal(seed + 2, A), normal(seed + 3, A)]
    forms = [f(Operation.QK_NORM_ROPE) for f in (c_form, reference)]
    assert error(*forms, leaves, *angles(positions_BS, 2 * half, 1e4), 1e-2) < FLOAT32


@given(
    seed=seeds,
    tokens=st.integers(0, 20),
    experts=st.integers(1, 40),
    chosen=st.integers(1, 8),
    normalize=st.booleans(),
    used=st.sampled_from([(0,), (1,), (0, 1)]),
)
def test_router(seed, tokens, experts, chosen, normalize, used):
    """The same experts, ties to the lower index; gradients through the weights, the scores, or both."""
    logits_TE = normal(seed, tokens, experts).mul(2).round() / 2
    bias_E = normal(seed + 1, experts).round() / 4
    K = min(chosen, experts)

    def form(f):
        def differentiable(x_TE, bias_E):
            experts_TK, *floats = f(x_TE, bias_E.to(x_TE.dtype), K, normalize, 2.5)
            return experts_TK, *[floats[i] for i in used]

        return differentiable

    forms = [form(f(Operation.ROUTER)) for f in (c_form, reference)]
    assert error(*forms, [logits_TE], bias_E) < FLOAT32


@given(
    seed=seeds,
    tokens=st.integers(0, 150),
    experts=st.integers(1, 7),
    chosen=st.integers(1, 4),
    width=widths,
    inner=widths,
)
def test_experts(seed, tokens, experts, chosen, width, inner):
    """Experts with no tokens, and with more than a block of them."""
    K = min(chosen, experts)
    scores_TE = torch.rand(tokens, experts, generator=numbers(seed)) ** 2
    experts_TK = scores_TE.topk(K).indices
    leaves = [
        normal(seed, tokens, width),
        scores_TE[:, :K],
        normal(seed + 1, experts, inner, width),
    ]
    leaves += [normal(seed + 2, experts, inner, width), normal(seed + 3, experts, width, inner)]

    def form(f):
        return lambda x, weights, *matrices: f(x, experts_TK, weights.float(), *matrices)

    forms = [form(f(Operation.EXPERTS)) for f in (c_form, reference)]
    assert error(*forms, leaves, dtype=torch.float32) < 5 * FLOAT32  # the reference is float32 too


@given(
    seed=seeds,
    rows=st.integers(1, 3),
    length=st.integers(1, 100),
    kv_heads=st.integers(1, 3),
    group=st.integers(1, 5),
    width=st.integers(1, 40),
    documents=st.integers(0, 5),
)
def test_attention(seed, rows, length, kv_heads, group, width, documents):
    """Any heads and lengths; documents that begin anywhere, padding among them."""
    shapes = [(kv_heads * group, width), (kv_heads, width), (kv_heads, width)]
    leaves = [normal(seed + i, rows, length, *shape) for i, shape in enumerate(shapes)]
    ids_BS = None
    if documents:
        begins = torch.rand(rows, length, generator=numbers(seed)) < documents / length
        ids_BS = begins.int().cumsum(1, dtype=torch.int32) - 1
    forms = [f(Operation.ATTENTION) for f in (c_form, reference)]
    assert error(*forms, leaves, ids_BS) < FLOAT32


@given(
    seed=seeds,
    prompts=st.lists(st.integers(0, 30), min_size=1, max_size=3),
    answers=st.lists(st.tuples(st.integers(0, 2), st.integers(0, 30)), min_size=1, max_size=6),
    kv_heads=st.integers(1, 3),
    group=st.integers(1, 5),
    width=st.integers(1, 40),
)
def test_attention_to_prompts(seed, prompts, answers, kv_heads, group, width):
    """Texts that share prompts attend in one row as each does alone, gradients too: in C, by whole texts, by the mask."""
    texts = []
    for number, length in answers:
        number %= len(prompts)
        texts.append(Text(number, prompts[number], max(1, length)))
    lengths = [text.prompt_length + text.answer_length for text in texts]
    shared = SharedPrompts.of(texts, max(lengths))
    shapes = [(kv_heads * group, width), (kv_heads, width), (kv_heads, width)]
    count = len(shared.packed_T)
    leaves = [normal(seed + i, 1, count, *shape) for i, shape in enumerate(shapes)]

    def alone(q, k, v):
        whole = [shared.unpack(x) for x in (q, k, v)]
        attend = reference(Operation.ATTENTION)
        out = [attend(*(x[None, b, :length] for x in whole)) for b, length in enumerate(lengths)]
        longest = max(lengths)
        padded = [torch.nn.functional.pad(x, (0, 0, 0, 0, 0, longest - x.shape[1])) for x in out]
        return shared.pack(torch.cat(padded))

    mask = reference(Operation.ATTENTION_TO_PROMPTS)
    for form in (mask, expanded, c_form(Operation.ATTENTION_TO_PROMPTS)):
        assert error(lambda q, k, v, form=form: form(q, k, v, shared), alone, leaves) < FLOAT32


@given(
    seed=seeds,
    tokens=st.integers(0, 150),
    width=st.integers(1, 40),
    words=st.integers(1, 600),
    scale=st.sampled_from([0.1, 1.0, 5.0]),
    temperature=st.floats(0.3, 3),
)
def test_head(seed, tokens, width, words, scale, temperature):
    """More tokens than a block and more words than one; logits of all sizes."""
    leaves = [normal(seed, tokens, width, scale=scale), normal(seed + 1, words, width)]
    targets_T = torch.randint(0, words, (tokens,), generator=numbers(seed))
    forms = [f(Operation.LOG_PROBABILITIES) for f in (c_form, reference)]
    # An entropy near zero is the difference of two numbers as large as the logits.
    assert error(*forms, leaves, targets_T, temperature) < 20 * FLOAT32


@given(
    seed=seeds,
    tokens=st.integers(0, 150),
    width=st.integers(1, 40),
    words=st.integers(1, 600),
    scale=st.sampled_from([0.1, 1.0, 5.0]),
)
def test_cross_entropy(seed, tokens, width, words, scale):
    """The same sizes; each token has a weight of its own, some of them zero."""
    leaves = [normal(seed, tokens, width, scale=scale), normal(seed + 1, words, width)]
    targets_T = torch.randint(0, words, (tokens,), generator=numbers(seed))
    weights_T = torch.rand(tokens, generator=numbers(seed)).round(decimals=1)
    forms = [f(Operation.CROSS_ENTROPY) for f in (c_form, reference)]
    # The probability of a target near one, less one, is a difference too.
    assert error(*forms, leaves, targets_T, weights_T) < 20 * FLOAT32


@given(
    seed=seeds,
    length=st.integers(1, 60),
    group=st.integers(1, 5),
    in_queries=st.booleans(),
    bad=st.sampled_from([torch.nan, torch.inf, -torch.inf]),
    data=st.data(),
)
def test_attention_hides_no_bad_number(seed, length, group, in_queries, bad, data):
    """What sees a query or key that is no number, or infinite, is no number; others are as before."""
    A = 8
    q_BSNA = normal(seed, 1, length, group, A)
    k_BSMA = normal(seed + 1, 1, length, 1, A)
    v_BSMA = normal(seed + 2, 1, length, 1, A).requires_grad_()
    good_BSNA = c_form(Operation.ATTENTION)(q_BSNA, k_BSMA, v_BSMA)
    place = data.draw(st.integers(0, length - 1))
    (q_BSNA if in_queries else k_BSMA)[0, place] = bad
    out_BSNA = c_form(Operation.ATTENTION)(q_BSNA, k_BSMA, v_BSMA)
    last = place + 1 if in_queries else length
    assert not out_BSNA[0, place:last].isfinite().any()
    assert torch.equal(out_BSNA[0, :place], good_BSNA[0, :place])
    assert torch.equal(out_BSNA[0, last:], good_BSNA[0, last:])


@given(
    seed=seeds,
    tokens=st.integers(1, 100),
    words=st.integers(1, 600),
    in_head=st.booleans(),
    bad=st.sampled_from([torch.nan, torch.inf, -torch.inf]),
    data=st.data(),
)
def test_head_hides_no_bad_number(seed, tokens, words, in_head, bad, data):
    """A token whose logits are not all finite has no log-probability; a bad word of the head spoils every token."""
    hidden_TD = normal(seed, tokens, 8).requires_grad_()
    head_VD = normal(seed + 1, words, 8)
    targets_T = torch.randint(0, words, (tokens,), generator=numbers(seed))
    place = data.draw(st.integers(0, (words if in_head else tokens) - 1))
    with torch.no_grad():
        (head_VD if in_head else hidden_TD)[place, 3] = bad
    logprobs_T, entropies_T = c_form(Operation.LOG_PROBABILITIES)(hidden_TD, head_VD, targets_T)
    loss = c_form(Operation.CROSS_ENTROPY)(hidden_TD, head_VD, targets_T, torch.ones(tokens))
    assert loss.isnan()
    spoiled = torch.full((tokens,), in_head)
    if not in_head:
        spoiled[place] = True
    assert torch.equal(logprobs_T.isnan(), spoiled)
    assert torch.equal(entropies_T.isnan(), spoiled)


def test_a_wrong_gradient_is_found():
    """Broken: a norm that forgets the stream's later gradient, and experts whose weights get none."""
    x_TD, weight_D = normal(0, 5, 8), normal(1, 8)

    def forgets(x, weight):
        out, r = c_form(Operation.NORM)(x, weight, 1e-5, x)
        return out, r.detach() + 0 * r

    def form(x, weight):
        return c_form(Operation.NORM)(x, weight, 1e-5, x)

    assert error(form, form, [x_TD, weight_D], dtype=torch.float32) == 0
    assert error(forgets, form, [x_TD, weight_D], dtype=torch.float32) > 0.1


TRAINING = (
    Operation.ATTENTION,
    Operation.LINEAR,
    Operation.SWIGLU,
    Operation.NORM,
    Operation.QK_NORM_ROPE,
    Operation.ROUTER,
    Operation.EXPERTS,
    Operation.CROSS_ENTROPY,
    Operation.LOG_PROBABILITIES,
)


@pytest.mark.parametrize("operation", TRAINING)
def test_where_training_is_in_c(operation):
    """Float32 with gradients on a CPU; not in other dtypes, without gradients, or where PyTorch was asked for."""

    def name(dtype=torch.float32):
        x = torch.zeros(1, dtype=dtype)
        return dispatch.selected_name(operation, x, matrix_size=16)

    assert name() == "c"
    assert "c" not in (name(torch.float64), name(torch.bfloat16))
    with torch.no_grad():
        assert name() != "c"
    dispatch.use("torch")
    try:
        assert name() != "c"
    finally:
        dispatch.use("auto")
