"""The debugger names the module where two implementations part, for each of the usual mistakes."""

import dataclasses
from unittest import mock

import pytest
import torch
from helpers.released import build, drawn_tokens, mtp_model, ours

from minglm.model.parity import ModuleError, compare, first_difference, main
from minglm.model.rope import rotate_pairs
from minglm.testing.model import normal

BOTH = pytest.mark.parametrize("latent", [False, True], ids=["glm4_moe", "glm4_moe_lite"])


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """Return Hugging Face's model of one dense and two MoE layers, and minglm's of the same weights."""
    values = {
        "vocab_size": 24,
        "hidden_size": 16,
        "intermediate_size": 20,
        "num_hidden_layers": 3,
        "head_dim": 8,
    }
    values |= {
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "moe_intermediate_size": 8,
        "use_qk_norm": True,
    }
    values |= {"n_routed_experts": 4, "num_experts_per_tok": 2, "num_nextn_predict_layers": 0}
    reference = build({**values, "attn_implementation": "eager"}, 1)
    return ours(reference, tmp_path_factory.mktemp("glm")), reference


@BOTH
def test_equal_models_differ_nowhere(latent, tmp_path, capsys):
    """From a folder: every module of every layer is compared, embedding and logits too, and none differs."""
    mtp_model(1, latent).save_pretrained(tmp_path / "glm")
    main([str(tmp_path / "glm")])
    *lines, last = capsys.readouterr().out.strip().splitlines()
    assert last == "first difference above 0.0001: None"
    names = [line.split()[1] for line in lines]
    parts = ["input_layernorm", "self_attn.o_proj", "self_attn", "post_attention_layernorm", "mlp"]
    wanted = [
        f"model.layers.{layer}{part}"
        for layer in (0, 1)
        for part in ("", *(f".{part}" for part in parts))
    ]
    assert {
        "model.embed_tokens",
        "model.norm",
        "lm_head",
        "model.layers.1.mlp.gate",
        *wanted,
    } <= set(names)
    assert names[0] == "model.embed_tokens" and names[-1] == "lm_head"


MISTAKES = {
    "model.layers.1.self_attn.k_proj.weight": "model.layers.1.self_attn.k_proj",
    # QK-norm and rotation are one operation, so the next module sees it first.
    "model.layers.1.self_attn.q_norm.weight": "model.layers.1.self_attn.o_proj",
    "model.layers.2.mlp.gate.e_score_correction_bias": "model.layers.2.mlp.gate",
    "model.layers.2.mlp.experts.down_EDF": "model.layers.2.mlp",
    "model.layers.2.mlp.shared_experts.up_proj.weight": "model.layers.2.mlp.shared_experts.up_proj",
    "model.embed_tokens.weight": "model.embed_tokens",
    "model.norm.weight": "model.norm",
    "lm_head.weight": "lm_head",
}


@pytest.mark.parametrize("name", MISTAKES)
def test_a_wrong_tensor_is_found(name, pair):
    """One tensor changed a little: the first module that uses it is named."""
    model, reference = pair
    tensor = dict([*model.named_parameters(), *model.named_buffers()])[name]
    kept = tensor.detach().clone()
    with torch.no_grad():
        tensor += 0.5 * normal(1, *tensor.shape)
    try:
        assert first_difference(compare(model, reference, drawn_tokens(1, 2, 9))) == MISTAKES[name]
    finally:
        tensor.data.copy_(kept)


def test_wrong_code_is_found(pair):
    """The rotation of another layout, and a scale left out, show where they act."""
    model, reference = pair
    tokens_BS = drawn_tokens(1, 2, 9)

    def neighbours(x, cos, sin):
        rotating = 2 * cos.shape[-1]
        turned = x[..., :rotating]
        rest = x[..., rotating:]
        return torch.cat([rotate_pairs(turned, cos, sin), rest], -1)

    with mock.patch("minglm.kernels.qk_norm_rope.eager.rotate", neighbours):
        errors = compare(model, reference, tokens_BS)
        assert first_difference(errors) == "model.layers.0.self_attn.o_proj"
    router = model.model.layers[1].mlp.gate
    with mock.patch.object(
        router, "config", dataclasses.replace(router.config, routed_scaling_factor=2.0)
    ):
        assert first_difference(compare(model, reference, tokens_BS)) == "model.layers.1.mlp.gate"
    assert first_difference(compare(model, reference, tokens_BS)) is None


def test_not_a_number_is_a_difference():
    """NaN is above every tolerance."""
    errors = [ModuleError("a", 0.0), ModuleError("b", float("nan")), ModuleError("c", 1.0)]
    assert first_difference(errors) == "b"
