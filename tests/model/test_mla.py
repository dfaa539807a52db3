"""Latent attention: its equation, the cache of latents against the full pass, and what a position may see."""

import itertools
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from minglm.config import ModelConfig
from minglm.inference.engine import Engine, Request
from minglm.kernels.attention.eager import attend_slots, attention
from minglm.model.mla import attend_any_width
from minglm.model.rope import angles, rotate, rotate_pairs
from minglm.testing.model import drawn_documents, normal, tiny_model
from minglm.testing.strategies import numbers, seeds

ROUNDING = 1e-4  # float32 logits of size up to 10, products in another order


@st.composite
def latent_models(draw):
    """Draw a tiny GLM with latent attention of drawn widths, and the seed of its values."""
    flat = draw(st.integers(1, 6))
    rope = 2 * draw(st.integers(1, 4))
    heads = draw(st.integers(1, 4))
    changes = {
        "kv_lora_rank": draw(st.integers(1, 9)),
        "q_lora_rank": draw(st.sampled_from([0, 5, 12])),
    }
    changes |= {
        "qk_nope_head_dim": flat,
        "qk_rope_head_dim": rope,
        "head_dim": flat + rope,
        "use_qk_norm": False,
    }
    changes |= {
        "v_head_dim": draw(st.integers(1, 14)),
        "num_attention_heads": heads,
        "num_key_value_heads": heads,
    }
    seed = draw(seeds)
    return tiny_model(seed, attention_bias=draw(st.booleans()), **changes), seed


def drawn_tokens(seed, B, S):
    """Draw token ids of the tiny vocabulary."""
    return torch.randint(0, 24, (B, S), generator=numbers(seed))


def by_the_equation(layer, x_SD, rotation):
    """Compute one head and one pair of positions at a time, in float64, from the module's docstring."""
    w = {name: tensor.double() for name, tensor in layer.state_dict().items()}
    c = layer.latent

    def project(name, x):
        return x @ w[f"{name}.weight"].T + w.get(f"{name}.bias", 0)

    def norm(name, x):
        return w[f"{name}.weight"] * x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt()

    def rope(x, at):
        cos, sin = (part[0, at, 0].double() for part in rotation)
        turned = x.clone()
        turned[0::2] = x[0::2] * cos - x[1::2] * sin
        turned[1::2] = x[1::2] * cos + x[0::2] * sin
        return turned

    x = x_SD.double()
    q = (
        project("q_b_proj", norm("q_a_layernorm", project("q_a_proj", x)))
        if "q_a_proj.weight" in w
        else project("q_proj", x)
    )
    down = project("kv_a_proj_with_mqa", x)
    up = project("kv_b_proj", norm("kv_a_layernorm", down[:, :c]))
    q = q.unflatten(-1, (layer.heads, -1))
    up = up.unflatten(-1, (layer.heads, -1))
    out = []
    for s in range(len(x)):
        for n in range(layer.heads):
            query = torch.cat([q[s, n, : layer.flat_dim], rope(q[s, n, layer.flat_dim :], s)])
            keys = [
                torch.cat([up[j, n, : layer.flat_dim], rope(down[j, c:], j)]) for j in range(s + 1)
            ]
            weights = torch.stack([query @ key / len(query) ** 0.5 for key in keys]).softmax(0)
            out.append(weights @ up[: s + 1, n, layer.flat_dim :])
    return project("o_proj", torch.stack(out).view(len(x), -1)).float()


@given(latent_models(), st.integers(1, 6))
def test_layer_is_its_equation(drawn, S):
    """Queries and keys from latents, one rotated key for all heads, values of any width, biases where configured."""
    seed = drawn[1]
    layer = drawn[0].model.layers[0].self_attn
    x_SD = normal(seed, S, 16)
    rotation = angles(torch.arange(S)[None], layer.rope_dim, 1e4)
    with torch.no_grad():
        torch.testing.assert_close(
            layer(x_SD[None], rotation)[0],
            by_the_equation(layer, x_SD, rotation),
            atol=1e-4,
            rtol=1e-4,
        )


class Slots:
    """The plainest cache: keys one after the other, which are the values too."""

    def __init__(self):
        self.keys = torch.zeros(2, 0, 1, 0)

    def attend(self, q_BSNA, k_BSMA, v_BSMA):
        """Append keys, attend over all of them."""
        assert v_BSMA is None
        start = self.keys.shape[1]
        self.keys = torch.cat([self.keys, k_BSMA], 1) if start else k_BSMA
        k_BMCA = self.keys.transpose(1, 2)
        positions = torch.arange(start, start + q_BSNA.shape[1])
        return attend_slots(q_BSNA, k_BMCA, k_BMCA, positions.expand(2, -1))


@given(latent_models(), st.integers(1, 10), st.lists(st.integers(1, 9), max_size=3))
def test_cache_of_latents_equals_the_full_pass(drawn, S, cuts):
    """Prefill and decoding in pieces, with keys never unfolded, give the logits of one pass that unfolds them all."""
    model, seed = drawn
    tokens_BS = drawn_tokens(seed, 2, S)
    borders = sorted({0, S, *(cut for cut in cuts if cut < S)})
    cache = [Slots() for _ in range(model.config.num_hidden_layers)]
    with torch.no_grad():
        pieces = []
        for start, end in itertools.pairwise(borders):
            positions_BS = torch.arange(start, end).expand(2, -1)
            pieces.append(model(tokens_BS[:, start:end], positions_BS, cache=cache))
        torch.testing.assert_close(torch.cat(pieces, 1), model(tokens_BS), atol=ROUNDING, rtol=1e-4)
    numbers_per_token = cache[0].keys[0, 0].numel()
    assert numbers_per_token == model.config.kv_lora_rank + model.config.qk_rope_head_dim
    assert numbers_per_token == math.prod(model.config.cache_shape)


@given(latent_models(), st.integers(2, 10))
def test_documents_of_a_row_know_nothing_of_each_other(drawn, S):
    """Other tokens in one document, or later, leave the logits of the others equal."""
    model, seed = drawn
    tokens_BS, documents_BS = drawn_tokens(seed, 2, S), drawn_documents(seed, 2, S)
    chosen = documents_BS == documents_BS[:, seed % S, None]
    other_BS = torch.where(chosen, drawn_tokens(seed + 1, 2, S), tokens_BS)
    with torch.no_grad():
        before, after = (model(t, None, documents_BS) for t in (tokens_BS, other_BS))
    assert not ((before - after).abs().amax(-1) > ROUNDING)[~chosen].any()


@given(seeds, st.integers(1, 5), st.integers(1, 9), st.integers(1, 9))
def test_values_of_any_width(seed, S, width, value_width):
    """Widening with zeros changes no score: the same as softmax and sum written out."""
    q, k, v = (normal(seed + i, 1, S, 2, w) for i, w in enumerate((width, width, value_width)))
    scores = torch.einsum("bsna,bcna->bnsc", q, k) * width**-0.5
    weights = scores.masked_fill(torch.ones(S, S, dtype=torch.bool).triu(1), float("-inf")).softmax(
        -1
    )
    expected = torch.einsum("bnsc,bcnv->bsnv", weights, v)
    torch.testing.assert_close(attend_any_width(attention, q, k, v), expected, atol=1e-5, rtol=1e-5)


@given(seeds, st.integers(1, 5), st.integers(1, 5))
def test_pairs_are_halves_in_another_order(seed, S, half):
    """Neighbouring pairs rotate as in the half-split layout, once the even dimensions come before the odd ones."""
    x = normal(seed, 2, S, 3, 2 * half)
    rotation = angles(torch.arange(S).expand(2, S), 2 * half, 1e4)
    order = [*range(0, 2 * half, 2), *range(1, 2 * half, 2)]
    torch.testing.assert_close(
        rotate_pairs(x, *rotation)[..., order], rotate(x[..., order], *rotation)
    )


def test_the_engine_generates_with_it():
    """Batched generation over the cache of latents draws what one full pass after the other would."""
    heads = {
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "use_qk_norm": False,
    }
    model = tiny_model(
        3, kv_lora_rank=6, qk_nope_head_dim=4, qk_rope_head_dim=4, v_head_dim=5, **heads
    )
    prompts = [[1, 2, 3], [4], [1, 2, 5, 6]]
    requests = [Request(prompt, max_new_tokens=5, temperature=0.0) for prompt in prompts]
    for prompt, done in zip(prompts, Engine(model).generate(requests)):
        tokens = list(prompt)
        for _ in range(5):
            with torch.no_grad():
                tokens.append(int(model(torch.tensor([tokens]))[0, -1].argmax()))
        assert done.tokens == tokens[len(prompt) :]


WRONG = {
    "v_head_dim": ({"v_head_dim": 0}, "must be positive with kv_lora_rank"),
    "qk_rope_head_dim": ({"qk_rope_head_dim": 3, "head_dim": 7}, "even number"),
    "head_dim": ({"head_dim": 9}, "qk_nope_head_dim \\+ qk_rope_head_dim"),
    "num_key_value_heads": ({"num_key_value_heads": 1}, "use num_attention_heads"),
    "use_qk_norm": ({"use_qk_norm": True}, "use False"),
    "q_lora_rank": ({"kv_lora_rank": 0, "q_lora_rank": 4}, "set model.kv_lora_rank too"),
}


@pytest.mark.parametrize("name", WRONG)
def test_impossible_widths_are_one_line(name):
    """A shape that cannot be built names its field."""
    good = {
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "kv_lora_rank": 6,
        "qk_nope_head_dim": 4,
        "head_dim": 8,
    }
    good |= {"qk_rope_head_dim": 4, "v_head_dim": 5, "use_qk_norm": False}
    ModelConfig(**good).check()
    changes, why = WRONG[name]
    with pytest.raises(ValueError, match=f"model.{name} = .*{why}"):
        ModelConfig(**{**good, **changes}).check()
