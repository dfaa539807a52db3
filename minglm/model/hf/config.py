"""A released `config.json` and a `ModelConfig`, both ways (paper Table 1; Hugging Face types glm4_moe, glm4_moe_lite).

The fields have the same names, so most of this file is about the rest: where the rotary base stands (at the top, or in
`rope_parameters`), which keys say what minglm does anyway (and are refused when they say something else), and keys
that mean nothing here (token ids, versions) but must survive: writing starts from the file that was read and changes
only what the model changed. An unchanged model writes back the same file.
"""

import copy
import dataclasses

from minglm.config import ModelConfig
from minglm.config.model import MLA_FIELDS

GQA, MLA = "glm4_moe", "glm4_moe_lite"
CLASSES = {GQA: "Glm4MoeForCausalLM", MLA: "Glm4MoeLiteForCausalLM"}
DEFAULTS = {
    **{
        "attention_bias": False,
        "use_qk_norm": False,
        "tie_word_embeddings": False,
        "norm_topk_prob": True,
    },
    **{
        "n_group": 1,
        "topk_group": 1,
        "n_shared_experts": 1,
        "first_k_dense_replace": 1,
        "num_nextn_predict_layers": 0,
    },
    **{
        "initializer_range": 0.02,
        "rms_norm_eps": 1e-5,
        "routed_scaling_factor": 1.0,
        "q_lora_rank": 0,
    },
}
"""What a key means that is not there, as in transformers. Every other field of the model must be."""
ONLY = {
    "hidden_act": "silu",
    "scoring_func": "sigmoid",
    "topk_method": "noaux_tc",
    "attention_dropout": 0,
}
ROPE = {"rope_theta": 10_000.0, "partial_rotary_factor": 0.5}
FP8 = {
    "quant_method": "fp8",
    "fmt": "e4m3",
    "activation_scheme": "dynamic",
    "weight_block_size": [128, 128],
}


def _names(kind):
    """Fields of ModelConfig that stand in a config.json of this type under their own names."""
    absent = {"head_dim", "use_qk_norm", *ROPE} if kind == MLA else {*MLA_FIELDS, *ROPE}
    return [f.name for f in dataclasses.fields(ModelConfig) if f.name not in absent]


def _rope(values):
    return values.get("rope_parameters") or values.get("rope_scaling") or {}


def _check_fixed(values, kind, where):
    """Refuse what minglm would silently compute differently."""
    for key, only in {**ONLY, "rope_interleave": kind == MLA}.items():
        if values.get(key, only) != only:
            raise ValueError(f"{where}: {key} = {values[key]!r}; minglm computes {only!r} only")
    rope = _rope(values)
    if (scaling := rope.get("rope_type", rope.get("type", "default"))) != "default":
        raise ValueError(
            f"{where}: rope_type = {scaling!r}; minglm knows the unscaled rotation only"
        )


def _dense_layers(values, where):
    """How many leading layers are dense, where a list says it for each layer."""
    kinds = values["mlp_layer_types"]
    dense = kinds.count("dense")
    if (
        kinds != ["dense"] * dense + ["sparse"] * (len(kinds) - dense)
        or len(kinds) != values["num_hidden_layers"]
    ):
        raise ValueError(
            f"{where}: mlp_layer_types must be dense layers first, then sparse ones, one word per layer"
        )
    return dense


def from_hf(values, where="config.json"):
    """The ModelConfig of a parsed config.json.

    Raises ValueError, in one line that begins with `where`, for another model type, a key that is missing or of the
    wrong type, and for settings that minglm would compute differently.
    """
    kind = values.get("model_type")
    if kind not in CLASSES:
        raise ValueError(f"{where}: model_type = {kind!r}; minglm reads {' and '.join(CLASSES)}")
    _check_fixed(values, kind, where)
    found = {name: values.get(name, DEFAULTS.get(name)) for name in _names(kind)}
    if kind == MLA:
        found["q_lora_rank"] = found["q_lora_rank"] or 0  # null: one projection
    for f in dataclasses.fields(ModelConfig):
        if f.name in found and found[f.name] is None:
            raise ValueError(f"{where}: {f.name} is missing")
    found["rope_theta"] = _rope(values).get(
        "rope_theta", values.get("rope_theta", ROPE["rope_theta"])
    )
    if kind == MLA:
        if values.get("mlp_layer_types"):
            found["first_k_dense_replace"] = _dense_layers(values, where)
        found |= {
            "head_dim": found["qk_nope_head_dim"] + found["qk_rope_head_dim"],
            "use_qk_norm": False,
        }
    else:
        default = values.get("partial_rotary_factor", ROPE["partial_rotary_factor"])
        found["partial_rotary_factor"] = _rope(values).get("partial_rotary_factor", default)
    for f in dataclasses.fields(ModelConfig):
        if f.name in found:
            if type(found[f.name]) not in ((int, float) if f.type is float else (f.type,)):
                raise ValueError(
                    f"{where}: {f.name} = {found[f.name]!r}: must be of type {f.type.__name__}"
                )
            found[f.name] = f.type(found[f.name])
    config = ModelConfig(**found)
    try:
        config.check()
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from None
    return config


def _flat(config, kind):
    """What a config.json says of a ModelConfig, without the rotation."""
    return {name: getattr(config, name) for name in _names(kind)}


def _fresh(config, kind):
    """A config.json for a model that was never released, in the style of the released ones."""
    values = {
        "architectures": [CLASSES[kind]],
        "model_type": kind,
        "hidden_act": "silu",
        "attention_dropout": 0.0,
    }
    values |= {"use_cache": True, "dtype": "float32", **_flat(config, kind), "rope_scaling": None}
    values["rope_theta"] = config.rope_theta
    if kind == MLA:
        values["q_lora_rank"] = config.q_lora_rank or None
        values |= {
            "rope_interleave": True,
            "topk_method": "noaux_tc",
            "mlp_layer_types": _layer_types(config),
        }
    else:
        values["partial_rotary_factor"] = config.partial_rotary_factor
    return values


def _layer_types(config):
    dense = config.first_k_dense_replace
    return ["dense"] * dense + ["sparse"] * (config.num_hidden_layers - dense)


def to_hf(config, base=None, dtype="bfloat16", fp8=False):
    """A config.json, as a dictionary, for a ModelConfig whose weights are stored as `dtype`.

    base: the parsed config.json that the model came with; every key that the model did not change stays as it is.
    fp8: whether projections are stored as blocks of float8 with scales.
    """
    kind = MLA if config.kv_lora_rank else GQA
    if base is None:
        values = _fresh(config, kind)
    else:
        values, before = copy.deepcopy(base), from_hf(base)
        for name, value in _flat(config, kind).items():
            if value != getattr(before, name):
                values[name] = value
                if (
                    name in ("first_k_dense_replace", "num_hidden_layers")
                    and "mlp_layer_types" in values
                ):
                    values["mlp_layer_types"] = _layer_types(config)
        for name in ROPE:
            if getattr(config, name) != getattr(before, name):
                values.get("rope_parameters", values)[name] = getattr(config, name)
    key = "torch_dtype" if "torch_dtype" in values else "dtype"
    if values.get(key, "float32") != dtype:
        values[key] = dtype
    if not fp8:
        values.pop("quantization_config", None)
    elif (values.get("quantization_config") or {}).get("weight_block_size") != FP8[
        "weight_block_size"
    ]:
        values["quantization_config"] = dict(FP8)
    return values
