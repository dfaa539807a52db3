"""Convert between a released `config.json` and a `ModelConfig` (paper Table 1; types glm4_moe, glm4_moe_lite).

The fields have the same names, so most of this file is about the rest: where the rotary base is (at the top, or in
`rope_parameters`), keys for what minglm always does (which are refused if they say something else), and keys that mean
nothing here (token ids, versions) but must survive. Writing therefore starts from the file that was read and changes only
what the model changed. An unchanged model writes the same file.
"""

import copy
import dataclasses
from collections.abc import Mapping
from enum import StrEnum
from typing import Any

from minglm.config import ModelConfig
from minglm.config.model import MLA_FIELDS


class ModelType(StrEnum):
    """The `model_type` of a config.json that minglm reads."""

    GQA = "glm4_moe"
    """Grouped-query attention: GLM-4.5, Air, 4.6, 4.7."""
    MLA = "glm4_moe_lite"
    """Latent attention: GLM-4.7-Flash."""


ARCHITECTURES = {
    ModelType.GQA: "Glm4MoeForCausalLM",
    ModelType.MLA: "Glm4MoeLiteForCausalLM",
}
DEFAULTS: dict[str, Any] = {
    "attention_bias": False,
    "use_qk_norm": False,
    "tie_word_embeddings": False,
    "norm_topk_prob": True,
    "n_group": 1,
    "topk_group": 1,
    "n_shared_experts": 1,
    "first_k_dense_replace": 1,
    "num_nextn_predict_layers": 0,
    "initializer_range": 0.02,
    "rms_norm_eps": 1e-5,
    "routed_scaling_factor": 1.0,
    "q_lora_rank": 0,
}
"""The value of a key that is missing, as in transformers. Every other field of the model must be there."""
FIXED: dict[str, Any] = {
    "hidden_act": "silu",
    "scoring_func": "sigmoid",
    "topk_method": "noaux_tc",
    "attention_dropout": 0,
}
"""Keys for which minglm computes one value only."""
ROPE = {"rope_theta": 10_000.0, "partial_rotary_factor": 0.5}
FP8: dict[str, Any] = {
    "quant_method": "fp8",
    "fmt": "e4m3",
    "activation_scheme": "dynamic",
    "weight_block_size": [128, 128],
}
"""The `quantization_config` of a checkpoint with projections in blocks of float8."""


def _field_names(model_type: ModelType) -> list[str]:
    """Return the fields of ModelConfig that a config.json of this type holds under their own names."""
    if model_type == ModelType.MLA:
        absent = {"head_dim", "use_qk_norm", *ROPE}
    else:
        absent = {*MLA_FIELDS, *ROPE}
    return [field.name for field in dataclasses.fields(ModelConfig) if field.name not in absent]


def _rope(values: Mapping[str, Any]) -> Mapping[str, Any]:
    return values.get("rope_parameters") or values.get("rope_scaling") or {}


def _check_fixed(values: Mapping[str, Any], model_type: ModelType, where: str) -> None:
    """Refuse what minglm would silently compute differently."""
    fixed = {**FIXED, "rope_interleave": model_type == ModelType.MLA}
    for key, only in fixed.items():
        if values.get(key, only) != only:
            raise ValueError(f"{where}: {key} = {values[key]!r}; minglm computes {only!r} only")
    rope = _rope(values)
    scaling = rope.get("rope_type", rope.get("type", "default"))
    if scaling != "default":
        raise ValueError(
            f"{where}: rope_type = {scaling!r}; minglm computes the unscaled rotation only"
        )


def _dense_layers(values: Mapping[str, Any], where: str) -> int:
    """Return the number of leading dense layers, from a list with one word per layer."""
    types = values["mlp_layer_types"]
    dense = types.count("dense")
    sorted_types = ["dense"] * dense + ["sparse"] * (len(types) - dense)
    if types != sorted_types or len(types) != values["num_hidden_layers"]:
        raise ValueError(
            f"{where}: mlp_layer_types must be dense layers first, then sparse ones, one word per layer"
        )
    return dense


def _layer_types(config: ModelConfig) -> list[str]:
    dense = config.first_k_dense_replace
    return ["dense"] * dense + ["sparse"] * (config.num_hidden_layers - dense)


def _typed(name: str, value: Any, type_: Any, where: str) -> Any:
    """Return a value in the type of its field; an integer may be given for a float."""
    accepted = (int, float) if type_ is float else (type_,)
    if type(value) not in accepted:
        raise ValueError(f"{where}: {name} = {value!r}: must be of type {type_.__name__}")
    return type_(value)


def from_hf(values: Mapping[str, Any], where: str = "config.json") -> ModelConfig:
    """Convert a parsed config.json to a ModelConfig.

    Raises ValueError, in one line that begins with `where`, for another model type, a key that is missing or of the
    wrong type, and for settings that minglm would compute differently.
    """
    if values.get("model_type") not in list(ModelType):
        raise ValueError(
            f"{where}: model_type = {values.get('model_type')!r}; minglm reads {' and '.join(ModelType)}"
        )
    model_type = ModelType(values["model_type"])
    _check_fixed(values, model_type, where)

    given = {name: values.get(name, DEFAULTS.get(name)) for name in _field_names(model_type)}
    if model_type == ModelType.MLA:
        given["q_lora_rank"] = given["q_lora_rank"] or 0  # null: one projection
    for field in dataclasses.fields(ModelConfig):
        if field.name in given and given[field.name] is None:
            raise ValueError(f"{where}: {field.name} is missing")

    rope = _rope(values)
    theta = values.get("rope_theta", ROPE["rope_theta"])
    given["rope_theta"] = rope.get("rope_theta", theta)
    if model_type == ModelType.MLA:
        if values.get("mlp_layer_types"):
            given["first_k_dense_replace"] = _dense_layers(values, where)
        given["head_dim"] = given["qk_nope_head_dim"] + given["qk_rope_head_dim"]
        given["use_qk_norm"] = False
    else:
        factor = values.get("partial_rotary_factor", ROPE["partial_rotary_factor"])
        given["partial_rotary_factor"] = rope.get("partial_rotary_factor", factor)

    for field in dataclasses.fields(ModelConfig):
        if field.name in given:
            given[field.name] = _typed(field.name, given[field.name], field.type, where)
    config = ModelConfig(**given)
    try:
        config.check()
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from None
    return config


def _flat(config: ModelConfig, model_type: ModelType) -> dict[str, Any]:
    """Return what a config.json says of a ModelConfig, without the rotation."""
    return {name: getattr(config, name) for name in _field_names(model_type)}


def _fresh(config: ModelConfig, model_type: ModelType) -> dict[str, Any]:
    """Return a config.json for a model that was never released, in the style of the released ones."""
    values: dict[str, Any] = {
        "architectures": [ARCHITECTURES[model_type]],
        "model_type": str(model_type),
        "hidden_act": "silu",
        "attention_dropout": 0.0,
        "use_cache": True,
        "dtype": "float32",
        **_flat(config, model_type),
        "rope_scaling": None,
        "rope_theta": config.rope_theta,
    }
    if model_type == ModelType.MLA:
        values["q_lora_rank"] = config.q_lora_rank or None
        values["rope_interleave"] = True
        values["topk_method"] = "noaux_tc"
        values["mlp_layer_types"] = _layer_types(config)
    else:
        values["partial_rotary_factor"] = config.partial_rotary_factor
    return values


def _changed(config: ModelConfig, model_type: ModelType, base: Mapping[str, Any]) -> dict[str, Any]:
    """Return a copy of `base` with the values that the model has changed since."""
    values = copy.deepcopy(dict(base))
    before = from_hf(base)
    for name, value in _flat(config, model_type).items():
        if value == getattr(before, name):
            continue
        values[name] = value
        decides_layers = name in ("first_k_dense_replace", "num_hidden_layers")
        if decides_layers and "mlp_layer_types" in values:
            values["mlp_layer_types"] = _layer_types(config)
    for name in ROPE:
        if getattr(config, name) != getattr(before, name):
            holder = values.get("rope_parameters", values)
            holder[name] = getattr(config, name)
    return values


def to_hf(
    config: ModelConfig,
    base: Mapping[str, Any] | None = None,
    dtype: str = "bfloat16",
    fp8: bool = False,
) -> dict[str, Any]:
    """Convert a ModelConfig whose weights are stored as `dtype` to a config.json, as a dictionary.

    base: the parsed config.json that the model came with; every key that the model did not change stays as it is.
    fp8: True if projections are stored as blocks of float8 with scales.
    """
    model_type = ModelType.MLA if config.kv_lora_rank else ModelType.GQA
    if base is None:
        values = _fresh(config, model_type)
    else:
        values = _changed(config, model_type, base)
    key = "torch_dtype" if "torch_dtype" in values else "dtype"
    if values.get(key, "float32") != dtype:
        values[key] = dtype
    if not fp8:
        values.pop("quantization_config", None)
        return values
    quantization = values.get("quantization_config") or {}
    if quantization.get("weight_block_size") != FP8["weight_block_size"]:
        values["quantization_config"] = dict(FP8)
    return values
