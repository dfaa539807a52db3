"""Hugging Face's models at tiny sizes, for the tests that compare with them."""

import json

import torch
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from minglm.model.glm import GLM
from minglm.testing.model import tiny_model
from minglm.testing.strategies import numbers, seeds

EVERY_VALUE = {
    "hidden_act": "silu",
    "attn_implementation": "eager",
    "vocab_size": 24,
    "max_position_embeddings": 256,
}


@st.composite
def shapes(draw, latent=False):
    """Draw (keyword arguments of a tiny Glm4MoeConfig, or with `latent` of a Glm4MoeLiteConfig; a seed)."""
    layers = draw(st.integers(1, 3))
    kv_heads = draw(st.integers(1, 3))
    groups = draw(st.sampled_from([1, 1, 2, 4]))
    per_group = draw(st.integers(2, 4))
    best_groups = draw(st.integers(1, groups))
    values = {**EVERY_VALUE, "num_hidden_layers": layers, "hidden_size": draw(st.integers(3, 24))}
    values |= {
        "intermediate_size": draw(st.integers(2, 20)),
        "moe_intermediate_size": draw(st.integers(2, 12)),
    }
    values |= {"n_routed_experts": groups * per_group, "n_group": groups, "topk_group": best_groups}
    values |= {"num_experts_per_tok": draw(st.integers(2, best_groups * per_group))}
    values |= {"n_shared_experts": draw(st.integers(1, 2)), "norm_topk_prob": draw(st.booleans())}
    values |= {
        "routed_scaling_factor": draw(st.sampled_from([1.0, 1.8, 2.5])),
        "rms_norm_eps": 1e-5,
    }
    values |= {"attention_bias": draw(st.booleans()), "tie_word_embeddings": draw(st.booleans())}
    theta = draw(st.sampled_from([1e4, 1e6]))
    dense = draw(st.integers(0, layers))
    if latent:
        flat = draw(st.integers(1, 6))
        rope = 2 * draw(st.integers(1, 4))
        heads = draw(st.integers(1, 4))
        values |= {
            "num_attention_heads": heads,
            "num_key_value_heads": heads,
            "kv_lora_rank": draw(st.integers(1, 9)),
        }
        values |= {
            "q_lora_rank": draw(st.sampled_from([None, 4, 11])),
            "v_head_dim": draw(st.integers(1, 12)),
        }
        values |= {"qk_nope_head_dim": flat, "qk_rope_head_dim": rope}
        values |= {"mlp_layer_types": ["dense"] * dense + ["sparse"] * (layers - dense)}
        values |= {"rope_parameters": {"rope_type": "default", "rope_theta": theta}}
    else:
        values |= {
            "num_attention_heads": kv_heads * draw(st.integers(1, 3)),
            "num_key_value_heads": kv_heads,
        }
        values |= {"head_dim": 4 * draw(st.integers(1, 4)), "use_qk_norm": draw(st.booleans())}
        values |= {"first_k_dense_replace": dense, "num_nextn_predict_layers": 0}
        factor = draw(st.sampled_from([0.5, 1.0]))
        rope = {"rope_type": "default", "rope_theta": theta, "partial_rotary_factor": factor}
        values |= {"rope_parameters": rope}
    return values, draw(seeds)


def build(values, seed, scale=0.3):
    """Build Hugging Face's model of these values. Every weight is drawn, also biases, norms and the selection bias."""
    import transformers

    transformers.utils.logging.disable_progress_bar()
    latent = "kv_lora_rank" in values
    kind = transformers.Glm4MoeLiteConfig if latent else transformers.Glm4MoeConfig
    # Its grouped products refuse odd widths.
    config = kind(**values, experts_implementation="eager")
    model = (transformers.Glm4MoeLiteForCausalLM if latent else transformers.Glm4MoeForCausalLM)(
        config
    ).eval()
    with torch.no_grad():
        for number, (name, tensor) in enumerate(
            [*model.named_parameters(), *model.named_buffers()]
        ):
            if "inv_freq" not in name:
                drawn = torch.randn(tensor.shape, generator=numbers(seed + number))
                tensor.copy_(scale * drawn + ("norm" in name))
    return model


def drawn_tokens(seed, B, S):
    """Draw token ids of the tiny vocabulary."""
    return torch.randint(0, 24, (B, S), generator=numbers(seed))


def ours(reference, folder):
    """Return the same model, read by minglm from what transformers wrote."""
    reference.save_pretrained(folder)
    return GLM.from_pretrained(folder)


def mtp_model(seed, latent=False, **changes):
    """Build a tiny GLM of one dense and one MoE layer with an MTP layer, every value drawn."""
    heads = {
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "use_qk_norm": False,
    }
    mla = {
        "kv_lora_rank": 6,
        "q_lora_rank": 5,
        "qk_nope_head_dim": 4,
        "qk_rope_head_dim": 4,
        "v_head_dim": 3,
        **heads,
    }
    mla["attention_bias"] = False
    return tiny_model(seed, **{"num_hidden_layers": 2, **(mla if latent else {}), **changes})


def release(model, folder, copies=False, own_file=False, dtype=None):
    """Write a model as its makers would: with copies of embedding and head, the MTP layer in a file of its own.

    Returns {name: tensor} of everything in the folder.
    """
    # Four kilobytes, so that there are several files.
    model.save_pretrained(folder, dtype, shard_gigabytes=4e-6)
    last = f"model.layers.{model.config.num_hidden_layers}."
    held = tensors(folder)
    index = json.loads((folder / "model.safetensors.index.json").read_text(encoding="utf-8"))
    moved = {name for name in held if own_file and name.startswith(last)}
    for file in sorted(set(index["weight_map"].values())):
        names = {name for name, at in index["weight_map"].items() if at == file}
        kept = {name: held[name] for name in names - moved}
        (folder / file).unlink()
        if kept:
            save_file(kept, folder / file)
    extra = {name: held[name] for name in moved}
    if copies:
        extra[f"{last}embed_tokens.weight"] = held["model.embed_tokens.weight"].clone()
        extra[f"{last}shared_head.head.weight"] = held["lm_head.weight"].clone()
    if extra:
        save_file(extra, folder / "mtp.safetensors")
    # GLM-4.6's names no MTP file.
    index["weight_map"] = {n: f for n, f in index["weight_map"].items() if n not in moved}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")
    return tensors(folder)


def tensors(folder):
    """Return {name: tensor} of all safetensors files of a folder."""
    return {
        name: tensor
        for path in sorted(folder.glob("*.safetensors"))
        for name, tensor in load_file(path).items()
    }


def layout(folder):
    """Return {file: names in it} of a folder."""
    return {path.name: sorted(load_file(path)) for path in folder.glob("*.safetensors")}
