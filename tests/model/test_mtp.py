"""Multi-token prediction: which token is the target, what the layer may see, and what it leaves alone."""

import io
import pickle

import torch
from helpers.tiny import changed, drawn_batch, gradients
from hypothesis import given, settings
from hypothesis import strategies as st

from minglm.data.packing import Batch
from minglm.model.glm import GLM
from minglm.testing.model import tiny_model
from minglm.testing.strategies import numbers, seeds
from minglm.train.loss import next_token_targets

rows = st.tuples(st.integers(1, 3), st.integers(3, 12))


@given(seed=seeds, shape=rows, ahead=st.integers(1, 2), packed=st.booleans())
def test_targets_are_their_definition(seed, shape, ahead, packed):
    """A position's target is `ahead` tokens on, and counts if it is there, is one, and is in the same document."""
    B, S = shape
    batch = drawn_batch(seed, *shape, packed)
    target_BS, counts_BS = next_token_targets(
        batch.tokens_BS, batch.mask_BS, batch.documents_BS, ahead
    )
    for b in range(B):
        for s in range(S):
            exists = s + ahead < S and bool(batch.mask_BS[b, s + ahead])
            if exists and packed:
                exists = batch.documents_BS[b, s] == batch.documents_BS[b, s + ahead]
            assert counts_BS[b, s] == exists, f"row {b}, position {s}"
            if exists:
                assert target_BS[b, s] == batch.tokens_BS[b, s + ahead]


@given(seed=seeds, shape=rows, packed=st.booleans())
def test_layer_is_its_equation(seed, shape, packed):
    """Projection of the next token's embedding, first, and of the normed hidden state; a decoder layer; a norm."""
    model = tiny_model(seed)
    batch = drawn_batch(seed, *shape, packed)
    out = model.hidden(batch.tokens_BS, batch.positions_BS, batch.documents_BS, mtp=True)
    layer = model.mtp
    next_BS = torch.nn.functional.pad(batch.tokens_BS[:, 1:], (0, 1))
    embedding_BSD = model.model.embed_tokens.weight[next_BS]
    z_BSD = (
        torch.cat([layer.enorm(embedding_BSD), layer.hnorm(out.hidden_BSD)], -1)
        @ layer.eh_proj.weight.T
    )
    rotation = model.rotation(batch.tokens_BS, batch.positions_BS)
    z_BSD = z_BSD + layer.self_attn(layer.input_layernorm(z_BSD), rotation, batch.documents_BS)
    z_BSD = z_BSD + layer.mlp(layer.post_attention_layernorm(z_BSD))[0]
    # float32.
    torch.testing.assert_close(
        out.mtp_hidden_BSD, layer.shared_head["norm"](z_BSD), atol=1e-5, rtol=1e-5
    )
    # and the hidden state it is given is the one after the final norm, which the output head reads too
    scale_BS1 = (out.hidden_BSD / model.model.norm.weight).square().mean(-1)
    # epsilon against the norm.
    torch.testing.assert_close(scale_BS1, torch.ones_like(scale_BS1), atol=1e-3, rtol=0)


@given(seed=seeds, shape=rows, packed=st.booleans())
def test_layer_sees_one_token_more_than_the_trunk_and_no_other_document(seed, shape, packed):
    """A new token changes the states that count only from one position before it on, inside its document."""
    model = tiny_model(seed)
    batch = drawn_batch(seed, *shape, packed)
    at = seed % shape[1]
    other_BS = batch.tokens_BS.clone()
    other_BS[:, at] = (other_BS[:, at] + 1) % 24
    with torch.no_grad():
        before, after = (
            model.hidden(t, batch.positions_BS, batch.documents_BS, mtp=True).mtp_hidden_BSD
            for t in (batch.tokens_BS, other_BS)
        )
    sees_BS = (torch.arange(shape[1]) >= at - 1).expand(shape)
    if packed:
        sees_BS = sees_BS & (batch.documents_BS == batch.documents_BS[:, at, None])
    counts_BS = next_token_targets(
        batch.tokens_BS, torch.ones(shape, dtype=torch.bool), batch.documents_BS, 2
    )[1]
    difference_BS = (before - after).abs().amax(-1)
    # the expert products of other tokens may round differently when the tokens are sorted otherwise
    assert not (difference_BS > 1e-4)[counts_BS & ~sees_BS].any()


def without_mtp(model):
    """Return the same model, built without its MTP layer."""
    trunk = GLM(changed(model, num_nextn_predict_layers=0))
    trunk.load_state_dict({k: v for k, v in model.state_dict().items() if k in trunk.state_dict()})
    return trunk


@settings(max_examples=10)  # each builds models and goes backward through them
@given(seed=seeds, shape=rows, packed=st.booleans())
def test_weight_zero_is_a_model_without_the_layer(seed, shape, packed):
    """At weight 0 loss, gradients and loads of the trunk are those of a model that has no MTP layer."""
    model = tiny_model(seed)
    batch = drawn_batch(seed, *shape, packed)
    sums, found, loads = gradients(model, batch, 0.0, balance_weight=0.1)
    trunk_sums, expected, trunk_loads = gradients(
        without_mtp(model), batch, 0.0, balance_weight=0.1
    )
    assert sums == trunk_sums and torch.equal(loads, trunk_loads)
    assert all(torch.equal(found[name], gradient) for name, gradient in expected.items())
    assert not any(found[name].any() for name in found.keys() - expected.keys())


@settings(max_examples=10)  # each builds models and goes backward through them
@given(seed=seeds, shape=rows, packed=st.booleans())
def test_gradient_is_linear_in_the_weight(seed, shape, packed):
    """Twice the weight moves every gradient twice as far from that of weight 0, the trunk's too: the signal arrives."""
    model = tiny_model(seed)
    batch = drawn_batch(seed, *shape, packed)
    none, once, twice = (gradients(model, batch, w)[1] for w in (0.0, 0.3, 0.6))
    sums = gradients(model, batch, 0.3)[0]
    for name in none:
        # float32 gradients of size up to 10, from sums of up to 36 tokens
        torch.testing.assert_close(
            twice[name] - none[name], 2 * (once[name] - none[name]), atol=1e-3, rtol=1e-2
        )
    if sums["mtp_loss"]:
        for name in (
            "model.embed_tokens.weight",
            "model.layers.0.mlp.down_proj.weight",
            "lm_head.weight",
        ):
            assert (once[name] - none[name]).abs().max() > 1e-5, (
                f"the MTP loss does not reach {name}"
            )


def test_survives_saving_loading_and_pickling():
    """State dictionary and pickle keep the layer, under the names of the released checkpoints."""
    model = tiny_model(5)
    batch = drawn_batch(5, 1, 6, False)
    file = io.BytesIO()
    torch.save(model.state_dict(), file)
    file.seek(0)
    loaded = GLM(model.config, seed=9)
    loaded.load_state_dict(torch.load(file, weights_only=True))
    names = {
        name.removeprefix("model.layers.3.")
        for name in model.state_dict()
        if name.startswith("model.layers.3.")
    }
    assert {"enorm.weight", "hnorm.weight", "eh_proj.weight", "shared_head.norm.weight"} < names
    assert {
        "self_attn.q_norm.weight",
        "mlp.gate.e_score_correction_bias",
        "input_layernorm.weight",
    } < names
    expected = model.hidden(batch.tokens_BS, mtp=True).mtp_hidden_BSD
    for other in (loaded, pickle.loads(pickle.dumps(model))):
        assert torch.equal(other.hidden(batch.tokens_BS, mtp=True).mtp_hidden_BSD, expected)


def test_all_targets_masked_costs_nothing():
    """A batch in which nothing is a target: both losses exactly 0, every gradient 0."""
    model = tiny_model(1)
    tokens_BS = torch.randint(0, 24, (2, 6), generator=numbers(1))
    batch = Batch(tokens_BS, torch.zeros_like(tokens_BS, dtype=torch.bool))
    sums, found, _ = gradients(model, batch, 0.3)
    assert sums["loss"] == sums["mtp_loss"] == 0
    assert not any(g.any() for g in found.values())
