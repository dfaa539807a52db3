"""Convert between a released `config.json` and a `ModelConfig` (paper Table 1; types glm4_moe, glm4_moe_lite).

The fields have the same names, so most of this file is about the rest: where the rotary base is (at the top,
or in `rope_parameters`), keys for what minglm always does (which are refused if they say something else), and
keys that mean nothing here (token ids, versions) but must survive. Writing therefore starts from the file
that was read and changes only what the model changed. An unchanged model writes the same file.
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
_DEFAULTS: dict[str, Any] = {
    "attention_bias": False,
    "tie_word_embeddings": False,
    "norm_topk_prob": True,
    "n_group": 1,
    "topk_group": 1,
    "n_shared_experts": 1,
    "first_k_dense_replace": 1,
    "num_nextn_predict_layers": 0,
    "initializer_range": 0.02,
    "rms_norm_eps": 1e-5,
}
DEFAULTS: dict[ModelType, dict[str, Any]] = {
    ModelType.GQA: {**_DEFAULTS, "use_qk_norm": False, "routed_scaling_factor": 1.0},
    ModelType.MLA: {**_DEFAULTS, "q_lora_rank": 768, "routed_scaling_factor": 1.8},
}
"""The value of a key that is missing, as in transformers. Every other field of the model must be there."""
NONE = ("num_nextn_predict_layers", "n_shared_experts", "q_lora_rank")
"""Keys that may be null, which is 0: no such layer, expert, or latent."""
ALIASES = {
    "n_routed_experts": "num_local_experts",
    "num_nextn_predict_layers": "num_mtp_layers",
}
"""Other names of a key, which transformers reads too."""
FIXED: dict[str, tuple[Any, ...]] = {
    "hidden_act": ("silu", "swish"),
    "scoring_func": ("sigmoid",),
    "topk_method": ("noaux_tc",),
}
"""Keys for which minglm computes one value only, under all its names."""
ROPE = {"rope_theta": 10_000.0, "partial_rotary_factor": 0.5}
ROPE_TABLES = ("rope_parameters", "rope_scaling")
ROPE_KEYS = {*ROPE, "rope_type", "type"}
"""Keys of a table about the rotation. Any other key belongs to a rotation that minglm does not compute."""
LARGEST = 2**53
"""Numbers in a config.json stay below: a float holds every integer up to here."""
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


def _rope_table(values: Mapping[str, Any], where: str) -> Mapping[str, Any]:
    """Return the table about the rotation, empty where there is none.

    It has two names. Where both are given and differ, readers disagree which one counts, so neither is chosen.
    """
    tables = {}
    for name in ROPE_TABLES:
        table = values.get(name) or {}
        if not isinstance(table, dict):
            raise ValueError(f"{where}: {name} = {table!r}: must be a table of names and values")
        if table:
            tables[name] = table
    if len(tables) == 2 and tables["rope_parameters"] != tables["rope_scaling"]:
        raise ValueError(
            f"{where}: rope_scaling and rope_parameters differ; remove the one that does not hold"
        )
    for name, table in tables.items():
        _check_rope_table(table, f"{where}: {name}")
    return next(iter(tables.values()), {})


def _check_rope_table(table: Mapping[str, Any], where: str) -> None:
    """Refuse every rotation but the unscaled one, whichever key asks for it."""
    for key in ("rope_type", "type"):
        if table.get(key, "default") != "default":
            raise ValueError(
                f"{where}: {key} = {table[key]!r}; minglm computes the unscaled rotation only (default)"
            )
    for key, value in table.items():
        if key not in ROPE_KEYS and value is not None:
            raise ValueError(
                f"{where}: {key} = {value!r} has no meaning in the unscaled rotation, "
                "the only one that minglm computes; remove it if it does not hold"
            )


def _rope_value(values: Mapping[str, Any], name: str, where: str, default: float) -> Any:
    """Return a value of the rotation: from its table, else from the top of config.json, else the default."""
    return _rope_table(values, where).get(name, values.get(name, default))


def _check_fixed(values: Mapping[str, Any], model_type: ModelType, where: str) -> None:
    """Refuse what minglm would silently compute differently."""
    fixed = {**FIXED, "rope_interleave": (model_type == ModelType.MLA,)}
    for key, accepted in fixed.items():
        if values.get(key, accepted[0]) not in accepted:
            raise ValueError(
                f"{where}: {key} = {values[key]!r}; minglm computes {accepted[0]!r} only"
            )
    if model_type != ModelType.MLA:
        return
    factor = _rope_value(values, "partial_rotary_factor", where, 1.0)
    if _typed("partial_rotary_factor", factor, float, where) != 1:
        raise ValueError(
            f"{where}: partial_rotary_factor = {factor!r}; with latent attention minglm computes 1.0 only"
        )


def _check_quantization(values: Mapping[str, Any], where: str) -> None:
    """Refuse a quantization_config that is not a table; the files say the rest."""
    quantization = values.get("quantization_config")
    if quantization is not None and not isinstance(quantization, dict):
        raise ValueError(
            f"{where}: quantization_config = {quantization!r}: must be a table of names and values"
        )


def _dense_layers(types: Any, layers: int, where: str) -> int:
    """Return the number of leading dense layers, from a list with one word per layer."""
    fits = isinstance(types, list) and len(types) == layers
    dense = types.count("dense") if fits else 0
    if not fits or types != ["dense"] * dense + ["sparse"] * (layers - dense):
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
    if not 0 <= value <= LARGEST:  # false for NaN too
        raise ValueError(f"{where}: {name}: must be a finite number from 0 to {LARGEST}")
    return type_(value)


def _named(values: Mapping[str, Any], name: str, where: str) -> Any:
    """Return the value of a key under its own name or its other one; None where neither is given."""
    alias = ALIASES.get(name)
    if alias is None or alias not in values:
        return values.get(name)
    if name in values and values[name] != values[alias]:
        raise ValueError(
            f"{where}: {name} = {values[name]!r} and {alias} = {values[alias]!r} are two names of one "
            "number; remove one"
        )
    return values[alias]


def _head_dim(values: Mapping[str, Any], given: Mapping[str, Any], where: str) -> int:
    """Return the width of a query or key head.

    Without one of its own, transformers divides the width of the model. With latent attention it is the sum
    of two parts, and transformers takes `head_dim` for another name of one of them.
    """
    if "qk_rope_head_dim" in given:
        named = values.get("head_dim")
        if named not in (None, given["qk_rope_head_dim"]):
            raise ValueError(
                f"{where}: head_dim = {named!r}: must be qk_rope_head_dim = {given['qk_rope_head_dim']}, or absent"
            )
        return given["qk_nope_head_dim"] + given["qk_rope_head_dim"]
    if values.get("head_dim") is None:
        return given["hidden_size"] // max(given["num_attention_heads"], 1)
    return _typed("head_dim", values["head_dim"], int, where)


def from_hf(values: Mapping[str, Any], where: str = "config.json") -> ModelConfig:
    """Convert a parsed config.json to a ModelConfig.

    Raises ValueError, in one line that begins with `where`, for another model type, a key that is missing or
    of the wrong type, and for settings that minglm would compute differently.
    """
    if values.get("model_type") not in list(ModelType):
        raise ValueError(
            f"{where}: model_type = {values.get('model_type')!r}; minglm reads {' and '.join(ModelType)}"
        )
    model_type = ModelType(values["model_type"])
    _check_fixed(values, model_type, where)
    _check_quantization(values, where)

    types = {field.name: field.type for field in dataclasses.fields(ModelConfig)}
    given: dict[str, Any] = {}
    for name in _field_names(model_type):
        if name == "head_dim":
            continue
        value = _named(values, name, where)
        if value is None and name in NONE and name in values:
            value = 0
        if value is None:
            value = DEFAULTS[model_type].get(name)
        if value is None:
            raise ValueError(f"{where}: {name} is missing")
        given[name] = _typed(name, value, types[name], where)
    given["head_dim"] = _head_dim(values, given, where)

    given["use_qk_norm"] = given.get("use_qk_norm", False)
    if model_type == ModelType.MLA and values.get("mlp_layer_types"):
        layer_types = values["mlp_layer_types"]
        layers = given["num_hidden_layers"]
        given["first_k_dense_replace"] = _dense_layers(layer_types, layers, where)
    for name in ROPE if model_type == ModelType.GQA else ("rope_theta",):
        value = _rope_value(values, name, where, ROPE[name])
        given[name] = _typed(name, value, float, where)

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
        names = [name, ALIASES.get(name)]
        for known in [known for known in names if known in values] or [name]:
            values[known] = value
        decides_layers = name in ("first_k_dense_replace", "num_hidden_layers")
        if decides_layers and "mlp_layer_types" in values:
            values["mlp_layer_types"] = _layer_types(config)
    for name in ROPE:
        if getattr(config, name) == getattr(before, name):
            continue
        # Wherever the value was given, at the top if it was not.
        tables = [values[table] for table in ROPE_TABLES if values.get(table)]
        holders = [table for table in tables if name in table]
        for holder in holders or [values]:
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
    if quantization.get("quant_method") != "fp8":  # of another method nothing stays true
        quantization = {}
    values["quantization_config"] = {**quantization, **FP8}
    return values
