"""Attention: the plain and the chunked form against PyTorch's own, and the layer's heads, norms and cache."""

import dataclasses

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from minglm.config import ModelConfig
from minglm.kernels.attention import flash_attention
from minglm.kernels.attention.eager import attend_slots, attention
from minglm.model.attention import Attention
from minglm.model.rope import angles
from minglm.testing.model import check_attention, normal, torch_attention
from minglm.testing.strategies import numbers, seeds

SMALL = dataclasses.replace(
    ModelConfig(),
    hidden_size=16,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=8,
    rms_norm_eps=1e-6,
)


@pytest.mark.parametrize("attend", [attention, flash_attention])
def test_attention_keeps_the_contract(attend):
    """Both forms equal PyTorch's attention, gradients included, and let nothing through the masks."""
    check_attention(attend)


def ignores_documents(q_BSNA, k_BSMA, v_BSMA, documents_BS=None):
    """Broken: attend over the whole row, packed or not."""
    return torch_attention(q_BSNA, k_BSMA, v_BSMA)


def sees_the_next(q_BSNA, k_BSMA, v_BSMA, documents_BS=None):
    """Broken: shift the mask by one, so that the token to be predicted is visible."""
    k, v = (torch.cat([x[:, 1:], x[:, -1:]], 1) for x in (k_BSMA, v_BSMA))
    return torch_attention(q_BSNA, k, v, documents_BS)


def forgets_the_scale(q_BSNA, k_BSMA, v_BSMA, documents_BS=None):
    """Broken: leave out the factor A^-1/2."""
    return torch_attention(q_BSNA * q_BSNA.shape[-1] ** 0.5, k_BSMA, v_BSMA, documents_BS)


def tiles_heads(q_BSNA, k_BSMA, v_BSMA, documents_BS=None):
    """Broken: let query head n read key/value head n modulo M instead of n divided by the group's size."""
    repeat = q_BSNA.shape[2] // k_BSMA.shape[2]
    return torch_attention(
        q_BSNA, k_BSMA.repeat(1, 1, repeat, 1), v_BSMA.repeat(1, 1, repeat, 1), documents_BS
    )


@pytest.mark.parametrize(
    "broken", [ignores_documents, sees_the_next, forgets_the_scale, tiles_heads]
)
def test_contract_finds_broken_attention(broken):
    """Each mistake others have made is found."""
    with pytest.raises(AssertionError):
        check_attention(broken)


@given(seed=seeds, S=st.integers(2, 90))
def test_packed_equals_documents_alone(seed, S):
    """Several documents in one row give the same outputs as each in a separate row."""
    q, k, v = (normal(seed + i, 1, S, heads, 4) for i, heads in enumerate((4, 2, 2)))
    border = 1 + seed % (S - 1)
    documents_BS = (torch.arange(S) >= border).int()[None]
    packed = flash_attention(q, k, v, documents_BS)
    for part in (slice(0, border), slice(border, S)):
        alone = flash_attention(q[:, part], k[:, part], v[:, part])
        # float32, other order of summation.
        torch.testing.assert_close(packed[:, part], alone, atol=1e-5, rtol=0)


@given(seed=seeds, B=st.integers(1, 3), S=st.integers(1, 70))
def test_cached_attention_is_attention_and_hides_stale_slots(seed, B, S):
    """Over a cache that holds junk beyond each query's position, the result is that of the whole row."""
    q, k, v = (normal(seed + i, B, S, heads, 4) for i, heads in enumerate((4, 2, 2)))
    expected = attention(q, k, v)
    stale = torch.full((B, 2, 3, 4), 1e3)
    k_BMCA, v_BMCA = (torch.cat([x.transpose(1, 2), stale], 2) for x in (k, v))
    positions_BS = torch.arange(S).expand(B, S)
    rows = torch.randperm(S, generator=numbers(seed))[: 1 + seed % S]  # any queries, in any order
    found = attend_slots(q[:, rows], k_BMCA, v_BMCA, positions_BS[:, rows])
    # float32, other order of summation.
    torch.testing.assert_close(found, expected[:, rows], atol=1e-5, rtol=0)


def layer(seed, **changes):
    """Return an attention layer with drawn values, norm weights included."""
    module = Attention(dataclasses.replace(SMALL, **changes))
    with torch.no_grad():
        for i, parameter in enumerate(module.parameters()):
            parameter.copy_(normal(seed + i, *parameter.shape, scale=0.5))
    return module


def written_out(module, config, x_BSD, positions_BS):
    """Compute the layer's equation in float64 with PyTorch's attention and rms_norm; rotate by complex numbers."""
    p = {name: value.double() for name, value in module.named_parameters()}
    x = x_BSD.double()
    A = config.head_dim
    R = round(config.head_dim * config.partial_rotary_factor)

    def project(name, norm):
        y = F.linear(x, p[f"{name}_proj.weight"], p.get(f"{name}_proj.bias")).unflatten(-1, (-1, A))
        if norm and config.use_qk_norm:
            y = F.rms_norm(y, (A,), p[f"{name}_norm.weight"], config.rms_norm_eps)
        if norm and R:
            pairs = torch.complex(y[..., : R // 2].contiguous(), y[..., R // 2 : R].contiguous())
            turn = positions_BS[..., None] * 10_000.0 ** (-torch.arange(0, R, 2).double() / R)
            pairs = pairs * torch.polar(torch.ones_like(turn), turn)[:, :, None]
            y = torch.cat([pairs.real, pairs.imag, y[..., R:]], -1)
        return y

    out = torch_attention(project("q", True), project("k", True), project("v", False))
    return F.linear(out.flatten(2), p["o_proj.weight"])


@given(
    seed=seeds,
    S=st.integers(1, 9),
    norm=st.booleans(),
    bias=st.booleans(),
    part=st.sampled_from([0.0, 0.5, 1.0]),
)
def test_layer_is_its_equation(seed, S, norm, bias, part):
    """Projection with bias, norm per head before the rotation, attention, output: with QK-norm, and as Air without."""
    changes = {"use_qk_norm": norm, "attention_bias": bias, "partial_rotary_factor": part}
    module = layer(seed, **changes)
    config = dataclasses.replace(SMALL, **changes)
    names = {name for name, _ in module.named_parameters()}
    assert ("q_norm.weight" in names) == norm
    assert ("v_proj.bias" in names) == bias
    assert "o_proj.bias" not in names
    x_BSD = normal(seed + 50, 2, S, 16)
    positions_BS = torch.randint(0, 50, (2, S), generator=numbers(seed))
    found = module(x_BSD, angles(positions_BS, round(8 * part), 10_000.0))
    expected = written_out(module, config, x_BSD, positions_BS).float()
    # float32; the scores are sums of products of numbers of size 2 and may reach 30, which exp magnifies
    torch.testing.assert_close(found, expected, atol=2e-3, rtol=1e-3)


@given(seed=seeds, factor=st.sampled_from([1e-2, 10.0, 1e3]))
def test_qk_norm_bounds_the_logits(seed, factor):
    """With QK-norm, queries and keys keep their length however large the projections become."""
    module = layer(seed, attention_bias=False)
    x_BSD = normal(seed + 50, 1, 6, 16)
    rotation = angles(torch.arange(6)[None], 4, 10_000.0)
    before = module.queries_keys(x_BSD, rotation)
    with torch.no_grad():
        module.q_proj.weight.mul_(factor)
        module.k_proj.weight.mul_(factor)
    for q, scaled in zip(before, module.queries_keys(x_BSD, rotation)):
        # epsilon 1e-6 against mean squares that the factor 0.01 brings down to about 1e-4, so 1% at most
        torch.testing.assert_close(q, scaled, atol=0.02, rtol=0.05)
