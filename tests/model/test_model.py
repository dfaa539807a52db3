"""The whole model: what a position may see, the same numbers in every layout, and the published parameter counts."""

import dataclasses

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.checkpoint import checkpoint

from minglm.config import ModelConfig, load_config
from minglm.model.glm import GLM, initialize
from minglm.model.layers import MLP, RMSNorm
from minglm.testing.model import drawn_documents, normal, tiny_model
from minglm.testing.strategies import numbers, seeds

shapes = st.tuples(st.integers(1, 3), st.integers(1, 10))
ROUNDING = 1e-4  # float32 logits of size up to 10; other tokens in a batch change how the expert products round


def drawn_tokens(seed, B, S):
    """Draw token ids of the tiny vocabulary."""
    return torch.randint(0, 24, (B, S), generator=numbers(seed))


@given(seed=seeds, width=st.integers(1, 9), factor=st.sampled_from([1e-3, 1.0, 1e3]))
def test_norm_and_mlp_are_their_equations(seed, width, factor):
    """RMSNorm divides by the root of mean square plus epsilon, then weighs; the MLP is SwiGLU."""
    norm = RMSNorm(width, 1e-5)
    mlp = MLP(width, 5)
    x = normal(seed, 3, width, scale=factor).double()
    with torch.no_grad():
        for i, parameter in enumerate([*norm.parameters(), *mlp.parameters()]):
            parameter.copy_(normal(seed + 1 + i, *parameter.shape))
    expected = norm.weight.double() * x / (x.square().mean(-1, keepdim=True) + 1e-5).sqrt()
    torch.testing.assert_close(norm(x.float()), expected.float())
    gate, up, down = (p.double() for p in mlp.parameters())
    inner = (x @ gate.T) * torch.sigmoid(x @ gate.T) * (x @ up.T)
    # float32.
    torch.testing.assert_close(
        mlp(x.float()), (inner @ down.T).float(), atol=1e-4 * factor**2, rtol=1e-4
    )
    assert norm(x.bfloat16()).dtype == mlp(x.bfloat16()).dtype == torch.bfloat16


@given(seed=seeds, shape=shapes)
def test_causality(seed, shape):
    """A new token at position t leaves all logits before t as they were, and changes those at t."""
    model = tiny_model(seed)
    tokens_BS = drawn_tokens(seed, *shape)
    at = seed % shape[1]
    other_BS = tokens_BS.clone()
    other_BS[:, at] = (other_BS[:, at] + 1) % 24
    with torch.no_grad():
        difference_BS = (model(tokens_BS) - model(other_BS)).abs().amax(-1)
    assert not (difference_BS[:, :at] > ROUNDING).any()
    assert (difference_BS[:, at] > ROUNDING).all()


@given(seed=seeds, S=st.integers(2, 12))
def test_documents_of_a_row_know_nothing_of_each_other(seed, S):
    """Other tokens in one document, or in the padding, leave the logits of every other document equal."""
    model = tiny_model(seed)
    tokens_BS = drawn_tokens(seed, 2, S)
    documents_BS = drawn_documents(seed, 2, S)
    chosen = documents_BS == documents_BS[:, seed % S, None]
    other_BS = torch.where(chosen, drawn_tokens(seed + 1, 2, S), tokens_BS)
    with torch.no_grad():
        before, after = (model(t, None, documents_BS) for t in (tokens_BS, other_BS))
    assert not ((before - after).abs().amax(-1) > ROUNDING)[~chosen].any()


@given(seed=seeds, S=st.integers(2, 12))
def test_packed_documents_equal_each_alone(seed, S):
    """A row of two documents, with positions that restart, gives the same outputs as two separate rows."""
    model = tiny_model(seed)
    tokens_BS = drawn_tokens(seed, 1, S)
    border = 1 + seed % (S - 1)
    at_BS = torch.arange(S)[None]
    documents_BS = (at_BS >= border).int()
    positions_BS = torch.where(at_BS >= border, at_BS - border, at_BS)
    with torch.no_grad():
        packed = model(tokens_BS, positions_BS, documents_BS)
        alone = torch.cat([model(tokens_BS[:, :border]), model(tokens_BS[:, border:])], 1)
    torch.testing.assert_close(packed, alone, atol=ROUNDING, rtol=1e-4)


@given(seed=seeds, shape=shapes, move=st.integers(0, 200))
def test_only_distances_matter(seed, shape, move):
    """Positions are 0, 1, 2, ... by default, and moving all of them changes nothing."""
    model = tiny_model(seed)
    tokens_BS = drawn_tokens(seed, *shape)
    positions_BS = torch.arange(shape[1]).expand(shape)
    with torch.no_grad():
        default, given_positions, moved = (
            model(tokens_BS, p) for p in (None, positions_BS, positions_BS + move)
        )
    assert torch.equal(default, given_positions)
    # float32 angles of 200 are exact to 1e-5.
    torch.testing.assert_close(default, moved, atol=2e-3, rtol=1e-3)


@given(seed=seeds, shape=shapes)
def test_rows_are_independent(seed, shape):
    """Each row of a batch gives what it gives alone."""
    model = tiny_model(seed)
    tokens_BS = drawn_tokens(seed, *shape)
    with torch.no_grad():
        together = model(tokens_BS)
        alone = torch.cat([model(row[None]) for row in tokens_BS])
    torch.testing.assert_close(together, alone, atol=ROUNDING, rtol=1e-4)


@settings(max_examples=10)  # each builds models and goes backward through them
@given(seed=seeds)
def test_recomputation_changes_no_gradient_and_counts_once(seed):
    """Layers recomputed in the backward pass give the same gradients, and each token is counted once."""
    model = tiny_model(seed)
    tokens_BS = drawn_tokens(seed, 2, 7)
    results = []
    for recompute in (False, True):
        if recompute:
            for layer in model.model.layers:
                plain = layer.forward
                layer.forward = lambda *a, plain=plain: checkpoint(plain, *a, use_reentrant=False)
        model.zero_grad()
        out = model.hidden(tokens_BS, mtp=True)
        balance = sum(r.balance_loss for r in out.routing)
        loss = model.lm_head(out.hidden_BSD).square().mean() + out.mtp_hidden_BSD.square().mean()
        (loss + balance).backward()
        loads = [r.tokens_per_expert_E for r in out.routing]
        gradients = [p.grad for p in model.parameters()]
        results.append((loads, gradients))
    (loads, plain), (again, recomputed) = results
    assert len(loads) == 3
    for load_E, again_E in zip(loads, again, strict=True):
        assert torch.equal(load_E, again_E)
        assert load_E.sum() == 2 * 2 * 7
    assert all(torch.equal(a, b) for a, b in zip(plain, recomputed))


def test_bfloat16_products_stay_close():
    """With the activations in bfloat16 the model computes nearly the same; its weights stay float32."""
    model = GLM(dataclasses.replace(tiny_model(1).config, initializer_range=0.1))
    tokens_BS = drawn_tokens(1, 4, 12)
    with torch.no_grad():
        exact = model(tokens_BS)
        model.dtype = torch.bfloat16
        rounded = model(tokens_BS)
    assert rounded.dtype == torch.bfloat16 and model.lm_head.weight.dtype == torch.float32
    # each product rounds at 2^-9; a handful of layers, and logits whose size is 1
    assert (rounded.float() - exact).norm() < 0.03 * exact.norm()


def test_variants():
    """No MTP layer, no MoE layer at all, one shared embedding table: each is built, and computes."""
    tokens_BS = drawn_tokens(1, 1, 4)
    for changes in (
        {"num_nextn_predict_layers": 0},
        {"first_k_dense_replace": 3, "num_nextn_predict_layers": 0},
    ):
        model = tiny_model(1, **changes)
        out = model.hidden(tokens_BS)
        assert model.mtp is None
        assert len(out.routing) == len(model.routers()) == 3 - model.config.first_k_dense_replace
    tied = tiny_model(1, tie_word_embeddings=True)
    assert tied.lm_head.weight is tied.model.embed_tokens.weight
    hidden_BSD = tied.hidden(tokens_BS).hidden_BSD
    assert torch.equal(tied(tokens_BS), F.linear(hidden_BSD, tied.model.embed_tokens.weight))
    with pytest.raises(ValueError, match="num_attention_heads"):
        tiny_model(1, num_attention_heads=3)


def test_parameter_names_are_those_of_the_released_checkpoints():
    """One dense layer, one MoE layer and the MTP layer, spelled out; each layer's experts are three stacks."""
    attention = [f"self_attn.{p}_proj.{v}" for p in "qkv" for v in ("weight", "bias")]
    layer = [
        *attention,
        "self_attn.o_proj.weight",
        "self_attn.q_norm.weight",
        "self_attn.k_norm.weight",
    ]
    layer += ["input_layernorm.weight", "post_attention_layernorm.weight"]
    moe = [
        "gate.weight",
        "gate.e_score_correction_bias",
        "experts.gate_EFD",
        "experts.up_EFD",
        "experts.down_EDF",
    ]
    swiglu = [f"{p}_proj.weight" for p in ("gate", "up", "down")]
    parts = {
        0: [*layer, *(f"mlp.{name}" for name in swiglu)],
        1: [
            *layer,
            *(f"mlp.{name}" for name in moe),
            *(f"mlp.shared_experts.{name}" for name in swiglu),
        ],
    }
    parts[2] = [
        *parts[1],
        "enorm.weight",
        "hnorm.weight",
        "eh_proj.weight",
        "shared_head.norm.weight",
    ]
    expected = {f"model.layers.{i}.{name}" for i, names in parts.items() for name in names}
    expected |= {"model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"}
    assert set(tiny_model(1, num_hidden_layers=2).state_dict()) == expected


COUNTS = {  # total of the body, with the MTP layer, and what one token uses of the body
    **{
        f"configs/glm45_355b.py{variant}": (351_245_936_544, 355_234_006_336, 32_080_373_664)
        for variant in ("", ":glm46", ":glm47")
    },
    "configs/flash_30b.py": (29_309_005_440, 29_952_711_616, 3_262_377_600),
    "configs/air_106b.py": (105_610_737_280, 107_985_796_864, 12_182_615_680),
}


@pytest.mark.parametrize("path", COUNTS)
def test_full_size_has_the_published_parameter_counts(path, pytestconfig):
    """Built on the meta device, without memory, the model has exactly the published number of weights.

    "355B" is the body with the MTP layer, "106B" the body of Air without it; embedding and output head are not counted.
    """
    config = load_config(f"{pytestconfig.rootpath}/{path}").model
    with torch.device("meta"):
        model = GLM(config)
    assert {tensor.device.type for tensor in model.state_dict().values()} == {"meta"}
    sizes = {
        name: tensor.numel()
        for name, tensor in model.state_dict().items()
        if name.startswith("model.layers")
    }
    sizes["model.norm.weight"] = model.model.norm.weight.numel()
    mtp = sum(
        size
        for name, size in sizes.items()
        if name.startswith(f"model.layers.{config.num_hidden_layers}.")
    )
    body = sum(sizes.values()) - mtp
    last = f"model.layers.{config.num_hidden_layers}."
    experts = sum(
        size for name, size in sizes.items() if ".experts." in name and not name.startswith(last)
    )
    active = body - experts + experts * config.num_experts_per_tok // config.n_routed_experts
    assert (body, body + mtp, active) == COUNTS[path]


def test_initial_values():
    """Norms are one, biases zero, matrices normal of the configured width; the seed decides, tensor by tensor."""
    config = dataclasses.replace(tiny_model(1).config, hidden_size=64, initializer_range=0.05)
    model = GLM(config, seed=3)
    for name, tensor in model.state_dict().items():
        if name.endswith("bias"):
            assert not tensor.any(), name
        elif "norm" in name:
            assert (tensor == 1).all(), name
        elif tensor.numel() > 1000:
            # 1000 draws: 2% and 0.0016.
            assert abs(tensor.std() / 0.05 - 1) < 0.1, name
            assert abs(tensor.mean()) < 0.01, name
    assert not torch.equal(
        model.model.layers[1].mlp.gate.weight, model.model.layers[2].mlp.gate.weight
    )
    assert all(
        torch.equal(a, b) for a, b in zip(model.parameters(), GLM(config, seed=3).parameters())
    )
    assert not torch.equal(model.lm_head.weight, GLM(config, seed=4).lm_head.weight)


def test_meta_then_empty_then_initialise_equals_direct_construction():
    """The way large models are built gives bit for bit the same values, buffers included."""
    config = tiny_model(1).config
    with torch.device("meta"):
        model = GLM(config)
    assert all(p.is_meta for p in model.parameters())
    model = model.to_empty(device="cpu")
    initialize(model, seed=5)
    direct = GLM(config, seed=5)
    assert all(
        torch.equal(a, b) for a, b in zip(model.state_dict().values(), direct.state_dict().values())
    )


def test_defaults_are_the_released_glm45(pytestconfig):
    """A ModelConfig without arguments is the 355B model."""
    assert load_config(pytestconfig.rootpath / "configs/glm45_355b.py").model == ModelConfig()
