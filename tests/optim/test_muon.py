"""Muon and Newton-Schulz: against the singular value decomposition, torch.optim and the shared contract."""

import dataclasses

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from minglm.config import OptimizerConfig
from minglm.kernels.newton_schulz import COEFFICIENTS, orthogonalize, polar_express
from minglm.kernels.newton_schulz.eager import symmetric_product, symmetric_product_eager
from minglm.kernels.newton_schulz.polynomials import BAND, SMALLEST
from minglm.optim.muon import Muon, assign
from minglm.testing.optim import check_optimizer
from minglm.testing.strategies import seeds

sizes = st.integers(2, 24)


def draw(seed, *shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def scalar_map(values, coefficients=(COEFFICIENTS,) * 5):
    for a, b, c in coefficients:
        values = a * values + b * values**3 + c * values**5
    return values


def test_band_is_that_of_the_scalar_map():
    """The stated band is what five steps do to every share of the norm from SMALLEST to one."""
    mapped = scalar_map(torch.linspace(SMALLEST, 1, 1_000_001, dtype=torch.float64))
    assert BAND[0] <= mapped.min() and mapped.max() <= BAND[1]
    # And it is no wider than needed.
    assert mapped.min() < BAND[0] + 0.01
    assert mapped.max() > BAND[1] - 0.01


@given(sizes, sizes, seeds)
def test_singular_vectors_stay_and_values_follow_the_scalar_map(rows, columns, seed):
    """Newton-Schulz changes singular values as the scalar polynomial does, and nothing else."""
    matrix = draw(seed, rows, columns).double()
    left, values, right = torch.linalg.svd(matrix, full_matrices=False)
    expected = left @ torch.diag(scalar_map(values / values.norm())) @ right
    # float64 and a few hundred operations on numbers near one; the slope a^5 = 485 magnifies rounding of small values
    torch.testing.assert_close(
        orthogonalize(matrix, dtype=torch.float64), expected, atol=1e-10, rtol=0
    )
    torch.testing.assert_close(orthogonalize(matrix.float()), expected.float(), atol=1e-4, rtol=0)
    # bfloat16 keeps 8 bits, and 15 products in a row each round once
    error = orthogonalize(matrix, dtype=torch.bfloat16) - expected
    assert error.norm() < 0.12 * expected.norm()


@given(
    seed=seeds,
    rows=st.integers(1, 5),
    depth=st.integers(1, 5),
    given_terms=st.fixed_dictionaries(
        {},
        optional={
            "factor": st.floats(-2, 2),
            "z_factor": st.floats(-2, 2),
            "diagonal": st.floats(-2, 2),
            "z": st.just("a third matrix"),
        },
    ),
)
def test_symmetric_product_by_definition(seed, rows, depth, given_terms):
    """factor x y' + z_factor z + diagonal I; a term that is not given is one product, no matrix, no diagonal."""
    x, y = draw(seed, 2, 3, rows, depth).double()
    z = draw(seed + 1, 3, rows, rows).double()
    terms = dict(given_terms)
    if "z" in terms:
        terms["z"] = z
    expected = terms.get("factor", 1.0) * (x @ y.mT)
    expected = expected + terms.get("diagonal", 0.0) * torch.eye(rows, dtype=torch.float64)
    if "z" in terms:
        expected = expected + terms.get("z_factor", 0.0) * z
    # float64 sums of five products
    for compute in (symmetric_product, symmetric_product_eager):
        torch.testing.assert_close(compute(x, y, **terms), expected, atol=1e-12, rtol=0)


def test_polar_express_settles_at_one():
    """Every number of steps leaves values evenly around one, ever nearer; no polynomial near the best is better."""
    values = torch.linspace(1e-3, 1, 1_000_001, dtype=torch.float64)
    errors = []
    for steps in range(1, 9):
        mapped = scalar_map(values, polar_express(steps, margin=1.0))
        errors.append((mapped - 1).abs().max().item())
        # As fine as the grid.
        assert float(mapped.max() + mapped.min()) == pytest.approx(2, abs=1e-5)
    assert errors == sorted(errors, reverse=True) and errors[6] < 1e-4
    # with nothing but one step from a short interval, no polynomial nearby is better at its worst point
    values = torch.linspace(0.3, 1, 100_001, dtype=torch.float64)
    best = polar_express(1, smallest=0.3, margin=1.0)[0]
    worst = (scalar_map(values, [best]) - 1).abs().max()
    for i in range(3):
        for sign in (-1, 1):
            near = [x + sign * 1e-3 * (i == j) for j, x in enumerate(best)]
            assert (scalar_map(values, [near]) - 1).abs().max() > worst


@given(sizes, sizes, seeds, st.booleans())
def test_gram_form_is_the_standard_iteration(rows, columns, seed, express):
    """Iterating on the small Gram matrix gives the same result, whatever the coefficients, also in low precision."""
    matrix = draw(seed, 2, rows, columns)
    coefficients = polar_express(5) if express else None
    exact = orthogonalize(matrix.double(), 5, torch.float64, coefficients)
    found = orthogonalize(matrix.double(), 5, torch.float64, coefficients, gram=True)
    # As above, and differences of squares.
    torch.testing.assert_close(found, exact, atol=1e-9, rtol=0)
    # Measured: a tenth of that and less.
    for dtype, tolerance in (
        (torch.float32, 1e-3),
        (torch.float16, 0.15),
    ):
        away = orthogonalize(matrix, 5, dtype, coefficients, gram=True).double() - exact
        assert away.norm() < tolerance * exact.norm()


def test_the_gram_form_needs_its_restart(monkeypatch):
    """Without one, rounding makes small eigenvalues negative, and they grow; with one they stay where they belong."""
    left, _, right = torch.linalg.svd(draw(0, 64, 200).double(), full_matrices=False)
    matrix = left @ torch.diag(torch.logspace(0, -4, 64, dtype=torch.float64)) @ right
    exact = orthogonalize(matrix, dtype=torch.float64)
    away = {}
    for restart in (0, 2):
        monkeypatch.setattr("minglm.kernels.newton_schulz.eager.RESTART", restart)
        away[restart] = (
            orthogonalize(matrix, dtype=torch.float16, gram=True) - exact
        ).norm() / exact.norm()
    assert away[2] < 0.05 < 0.1 < away[0]


@given(st.integers(0, 70), sizes, sizes, seeds)
def test_stack_is_a_loop_and_transposition_commutes(count, rows, columns, seed):
    """A stack of any length, even none, gives what each matrix gives; transposing before or after is the same."""
    stack = draw(seed, count, rows, columns)
    together = orthogonalize(stack)
    assert together.shape == stack.shape
    for matrix, result in zip(stack, together):
        # Batched products sum differently.
        torch.testing.assert_close(orthogonalize(matrix), result, atol=1e-5, rtol=0)
    torch.testing.assert_close(orthogonalize(stack.mT), together.mT, atol=1e-5, rtol=0)


def test_waves_change_nothing():
    """A stack longer than the cache is worked on in waves; the last, shorter wave is not lost."""
    stack = draw(3, 67, 64, 80).double()  # 40 KB each, 25 in a wave; float64 is PyTorch's form
    whole = orthogonalize(stack, dtype=torch.float64)
    torch.testing.assert_close(
        whole[60:], orthogonalize(stack[60:], dtype=torch.float64), atol=1e-12, rtol=0
    )


def test_zeros_stay_zeros_and_vectors_are_refused():
    """A gradient that is zero everywhere gives no update, and no NaN; a vector is a user's mistake."""
    assert orthogonalize(torch.zeros(3, 4, 5)).eq(0).all()
    with pytest.raises(ValueError, match="needs matrices"):
        orthogonalize(torch.zeros(3))
    with pytest.raises(ValueError, match="5 steps need as many coefficients"):
        orthogonalize(torch.zeros(3, 4), coefficients=polar_express(4))


def parameters(seed, shapes):
    return {
        name: torch.nn.Parameter(draw(seed + i, *shape))
        for i, (name, shape) in enumerate(shapes.items())
    }


def train(optimizer, weights, seed, steps=4, rates=(0.02, 0.05)):
    """Step on gradients that depend on the weights, with a changing learning rate."""
    for step in range(steps):
        for i, weight in enumerate(weights.values()):
            weight.grad = draw(seed + 100 * step + i, *weight.shape) + 0.3 * weight.detach()
        for group in optimizer.param_groups:
            group["lr"] = rates[step % len(rates)]
        optimizer.step()
    return {name: weight.detach() for name, weight in weights.items()}


PLAIN = {"a.weight": (12, 20), "b.weight": (20, 12), "c.weight": (12, 20), "d.weight": (16, 16)}


@given(seeds, st.sampled_from([torch.float32, torch.bfloat16]))
def test_equals_torch_muon_on_plain_matrices(seed, dtype):
    """On two-axis parameters we are torch.optim.Muon with its AdamW-matching scale."""
    config = OptimizerConfig(weight_decay=0.1)
    ours, theirs = parameters(seed, PLAIN), parameters(seed, PLAIN)
    reference = torch.optim.Muon(theirs.values(), weight_decay=0.1, adjust_lr_fn="match_rms_adamw")
    ours_after = train(
        Muon(ours.items(), config, lambda stack, steps: orthogonalize(stack, steps, dtype)),
        ours,
        seed,
    )
    with pytest.MonkeyPatch.context() as patch:
        # Torch always casts to bfloat16; without the cast the two must agree closely.
        if dtype == torch.float32:
            patch.setattr(torch.Tensor, "bfloat16", torch.Tensor.float)
        theirs_after = train(reference, theirs, seed)
    for name, start in parameters(seed, PLAIN).items():
        moved = (theirs_after[name] - start).norm()
        # bfloat16: both round 15 products to 8 bits, in another order; float32: only the order of sums differs
        tolerance = 1e-4 if dtype == torch.float32 else 0.05
        assert (ours_after[name] - theirs_after[name]).norm() < tolerance * moved


@given(seeds)
def test_adamw_part_equals_torch_adamw(seed):
    """Parameters that Muon does not train move exactly as under torch.optim.AdamW; only matrices decay."""
    shapes = {
        "model.embed_tokens.weight": (9, 4),
        "lm_head.weight": (9, 4),
        "norm.weight": (4,),
        "q_proj.bias": (6,),
    }
    config = OptimizerConfig(weight_decay=0.3)
    ours, theirs = parameters(seed, shapes), parameters(seed, shapes)
    values = list(theirs.values())
    groups = [
        {"params": values[:2], "weight_decay": 0.3},
        {"params": values[2:], "weight_decay": 0.0},
    ]
    expected = train(torch.optim.AdamW(groups, betas=(0.9, 0.95)), theirs, seed)
    for name, value in train(Muon(ours.items(), config), ours, seed).items():
        # Another order of factors.
        torch.testing.assert_close(value, expected[name], atol=1e-6, rtol=1e-5)


def test_assignment_follows_the_paper():
    """Every matrix is Muon's, expert stacks, router and eh_proj too; embedding, head, norms and biases are AdamW's."""
    shapes = {
        "model.embed_tokens.weight": (32, 8),
        "model.layers.0.self_attn.q_proj.weight": (16, 8),
        "model.layers.0.self_attn.q_proj.bias": (16,),
        "model.layers.0.mlp.gate.weight": (4, 8),
        "model.layers.0.mlp.experts.gate_EFD": (4, 6, 8),
        "model.layers.0.mlp.experts.down_EDF": (4, 8, 6),
        "model.layers.1.eh_proj.weight": (8, 16),
        "model.layers.1.embed_tokens.weight": (32, 8),
        "model.layers.1.shared_head.head.weight": (32, 8),
        "model.norm.weight": (8,),
        "score.weight": (1, 8),
        "lm_head.weight": (32, 8),
    }
    heads = {"model.layers.1.shared_head.head.weight", "lm_head.weight"}
    matrices = {name for name in shapes if "proj.weight" in name or "mlp" in name}
    for flag in (False, True):
        groups = Muon(
            parameters(0, shapes).items(), OptimizerConfig(muon_output_head=flag)
        ).param_groups
        muon = {
            name for group in groups if group["kind"] == "muon" for name in group["param_names"]
        }
        assert muon == (matrices | heads if flag else matrices)
        undecayed = {
            name for group in groups if group["weight_decay"] == 0 for name in group["param_names"]
        }
        assert undecayed == {"model.layers.0.self_attn.q_proj.bias", "model.norm.weight"}
        assert sum(len(group["params"]) for group in groups) == len(shapes)


def test_frozen_parameters_are_left_out_and_four_axes_refused():
    """A parameter that needs no gradient is never decayed; a convolution gets one clear line."""
    weights = parameters(0, {"a.weight": (3, 4), "b.weight": (3, 4)})
    weights["b.weight"].requires_grad_(False)
    assert [group["params"][0][0] for group in assign(weights.items(), OptimizerConfig())] == [
        "a.weight"
    ]
    with pytest.raises(ValueError, match=r"conv\.weight has 4 axes"):
        Muon(parameters(0, {"conv.weight": (2, 2, 2, 2)}).items(), OptimizerConfig())


@given(seeds, st.integers(1, 4), st.integers(2, 6), st.integers(2, 12))
def test_heads_one_by_one_are_matrices_of_their_own(seed, heads, head_dim, width):
    """With `muon_head_dim`, a q projection moves as its heads would as separate matrices; o_proj stays whole."""
    stacked = {
        "self_attn.q_proj.weight": (heads * head_dim, width),
        "self_attn.o_proj.weight": (width, heads * head_dim),
    }
    whole = parameters(seed, stacked)
    q, o = (w.detach() for w in whole.values())
    apart = {
        f"{h}.weight": torch.nn.Parameter(part.clone()) for h, part in enumerate(q.split(head_dim))
    }
    apart["o.weight"] = torch.nn.Parameter(o.clone())
    gradients = [draw(seed + 9, *w.shape) for w in whole.values()]
    for weights, grads in (
        (whole, gradients),
        (apart, [*gradients[0].split(head_dim), gradients[1]]),
    ):
        for weight, grad in zip(weights.values(), grads, strict=True):
            weight.grad = grad.clone()
        Muon(
            weights.items(),
            OptimizerConfig(muon_head_dim=head_dim if weights is whole else 0, peak_lr=0.1),
        ).step()
    joined = torch.cat([w.detach() for w in list(apart.values())[:-1]])
    # float32, products of other stacks: the order of sums differs
    torch.testing.assert_close(whole["self_attn.q_proj.weight"].detach(), joined, atol=1e-5, rtol=0)
    torch.testing.assert_close(
        whole["self_attn.o_proj.weight"].detach(), apart["o.weight"].detach(), atol=1e-5, rtol=0
    )


def test_polar_express_moves_by_a_more_orthogonal_update():
    """The option's update has singular values nearer to one than the paper's coefficients give."""
    spread = {}
    for polynomial in ("jordan", "polar_express"):
        weights = parameters(5, {"a.weight": (30, 50)})
        start = weights["a.weight"].detach().clone()
        weights["a.weight"].grad = draw(7, 30, 50)
        config = OptimizerConfig(
            update_rms=0.0, weight_decay=0.0, peak_lr=1.0, polynomial=polynomial
        )
        Muon(weights.items(), config).step()
        spread[polynomial] = (
            (torch.linalg.svdvals(start - weights["a.weight"].detach()) - 1).abs().max()
        )
    assert spread["polar_express"] < 0.5 * spread["jordan"]


def test_rms_rule_off_leaves_the_orthogonal_matrix():
    """update_rms = 0 subtracts lr times the orthogonalised update itself."""
    weights = parameters(5, {"a.weight": (6, 10)})
    start = weights["a.weight"].detach().clone()
    gradient = draw(7, 6, 10)
    weights["a.weight"].grad = gradient
    optimizer = Muon(
        weights.items(), OptimizerConfig(update_rms=0.0, weight_decay=0.0, peak_lr=0.5)
    )
    optimizer.step()
    torch.testing.assert_close(
        start - weights["a.weight"].detach(), 0.5 * orthogonalize(gradient), atol=1e-5, rtol=0
    )


def test_muon_keeps_the_contract():
    """Our optimizer passes what any optimizer can be held to."""
    check_optimizer(Muon)


def muon_of_two_axes(named_parameters, config):
    """Broken: leave stacks of experts, having three axes, to AdamW."""
    return Muon(
        [("model.embed_tokens.weight" if p.ndim == 3 else name, p) for name, p in named_parameters],
        config,
    )


class CoupledDecay(Muon):
    """The trap of L2 regularisation: the decay is added to the gradient, and orthogonalised with it."""

    def step(self):
        for group in self.param_groups:
            decay = group.setdefault("coupled", group["weight_decay"])
            group["weight_decay"] = 0.0
            for parameter in group["params"]:
                parameter.grad = parameter.grad + decay * parameter.detach()
        super().step()


class ForgetsMomentum(Muon):
    """A checkpoint without the momentum continues, but not as before."""

    def load_state_dict(self, state):
        for values in state["state"].values():
            for key in {"momentum", "first"} & set(values):
                values[key].zero_()
        super().load_state_dict(state)


class NeverRests(Muon):
    """The trap of a normalised momentum: however small it has become, its direction moves the weights at full rate."""

    def step(self):
        for group in self.param_groups:
            for parameter in group["params"]:
                parameter.grad = parameter.grad + 1e-30
        super().step()


class KeepsMomentum(Muon):
    """What has no gradient keeps its momentum, as parameters without a gradient do: it returns in a stale direction."""

    def step(self):
        state = [
            (values["momentum"], values["momentum"].clone(), parameter.grad)
            for parameter, values in self.state.items()
            if "momentum" in values
        ]
        super().step()
        for momentum, kept, gradient in state:
            if not gradient.any():
                momentum.copy_(kept)


def without_rms_rule(named_parameters, config):
    """Broken: let update sizes depend on the shape."""
    return Muon(named_parameters, dataclasses.replace(config, update_rms=0.0))


@pytest.mark.parametrize(
    ("twin", "message"),
    [
        (muon_of_two_axes, "not trained as a matrix"),
        (without_rms_rule, "update RMS"),
        (CoupledDecay, "decay of"),
        (ForgetsMomentum, "saving, loading"),
        (NeverRests, "without tokens"),
        (KeepsMomentum, "outlives a rest"),
        (
            lambda named, config: torch.optim.AdamW([p for _, p in named], weight_decay=0.1),
            "update RMS",
        ),
    ],
)
def test_contract_refuses_broken_twins(twin, message):
    """Each known way to get Muon wrong fails the contract, for its own reason."""
    with pytest.raises(AssertionError, match=message):
        check_optimizer(twin)
