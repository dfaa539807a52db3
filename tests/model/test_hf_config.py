"""config.json: what it says is computed or refused by name, and nothing that it says is ignored.

The values come from the fields of `ModelConfig` and the tables of `minglm.model.hf.config`; transformers says what a
config.json means.
"""

import dataclasses
import itertools
import json

import pytest
import torch
import transformers
from helpers.released import mtp_model
from hypothesis import given
from hypothesis import strategies as st

from minglm.config import ModelConfig
from minglm.model.hf.config import ALIASES, DEFAULTS, NONE, ModelType, from_hf, to_hf

BOTH = pytest.mark.parametrize("latent", [False, True], ids=["glm4_moe", "glm4_moe_lite"])
LATENT = (False, True)
VALUES = {latent: to_hf(mtp_model(1, latent).config) for latent in LATENT}


def theirs(values):
    """Return what transformers reads from a parsed config.json. It changes what it is given."""
    latent = values["model_type"] == ModelType.MLA
    kind = transformers.Glm4MoeLiteConfig if latent else transformers.Glm4MoeConfig
    return kind(**json.loads(json.dumps(values)))


def refusal(values):
    """Return the one line with which a config.json is refused; None where it is accepted."""
    try:
        from_hf(values, "FILE")
    except ValueError as error:
        assert "\n" not in str(error)
        assert str(error).startswith("FILE: ")
        return str(error)
    return None


# The rotation

TABLES = (
    None,
    {},
    {"rope_type": "default"},
    {"rope_theta": 5.0},
    {"type": "default", "rope_theta": 7.0},
    {"rope_type": "default", "rope_theta": 5.0, "partial_rotary_factor": 1.0},
    {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128},
    {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128},
    {"rope_type": "linear", "factor": 2.0},
    {"type": "linear", "factor": 2.0},
    {"rope_type": "dynamic", "factor": 2.0},
    {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0},
    {"full_attention": {"rope_type": "default", "rope_theta": 5.0}},
    {"rope_theta": 5.0, "factor": 4.0},
    {"rope_type": "default", "mrope_section": [1, 1]},
    [1],
    "yarn",
    3,
)


def is_plain(table):
    """Return True for a table of the unscaled rotation without a key that it has no use for."""
    if not isinstance(table, dict):
        return False
    kinds = {table.get("rope_type", "default"), table.get("type", "default")}
    known = {"rope_type", "type", "rope_theta", "partial_rotary_factor"}
    return kinds == {"default"} and table.keys() <= known


@BOTH
@pytest.mark.parametrize("top", [None, 3.0])
def test_every_source_of_the_rotation_counts_or_is_refused(latent, top):
    """All pairs of tables: the base and share are transformers' own, or one line names the table or its key."""
    accepted = 0
    for scaling, parameters in itertools.product(TABLES, repeat=2):
        values = {**VALUES[latent], "rope_scaling": scaling, "rope_parameters": parameters}
        values.pop("rope_theta", None)
        if top is not None:
            values["rope_theta"] = top
        said = refusal(values)
        given_tables = [table for table in (scaling, parameters) if table]
        should = all(is_plain(table) for table in given_tables)
        should = should and (len(given_tables) < 2 or scaling == parameters)
        if latent and any("partial_rotary_factor" in table for table in given_tables if should):
            assert said is None  # 1.0 is what latent attention does
        assert (said is None) == should, (scaling, parameters, said)
        if said is not None:
            assert "rope" in said
            continue
        accepted += 1
        found = from_hf(values)
        reference = theirs(values).rope_parameters
        assert found.rope_theta == reference["rope_theta"]
        if not latent:
            assert found.partial_rotary_factor == reference["partial_rotary_factor"]
    assert accepted > 10


@given(half=st.integers(2, 70), factor=st.sampled_from([0.25, 0.29, 0.3, 0.5, 0.7, 1.0]))
def test_the_share_that_rotates_is_rounded_as_in_transformers(half, factor):
    """As many frequencies as transformers has, or refused where their number of dimensions is odd."""
    head_dim = 2 * half  # transformers refuses others
    values = {**VALUES[False], "head_dim": head_dim, "partial_rotary_factor": factor}
    config = theirs(values)
    kind = transformers.models.glm4_moe.modeling_glm4_moe.Glm4MoeRotaryEmbedding
    frequencies, _ = kind.compute_default_rope_parameters(config)
    if refusal(values) is None:
        rotating = from_hf(values).rotary_dim
        assert rotating == 2 * len(frequencies)
        exponents = torch.arange(0, rotating, 2) / rotating
        torch.testing.assert_close(frequencies, values["rope_theta"] ** -exponents)
    else:
        assert int(head_dim * factor) % 2 or int(head_dim * factor) == 0


def test_latent_attention_rotates_whole_parts():
    """With latent attention a share below 1 would be ignored, and another head_dim means another rotation."""
    for place in (
        {"partial_rotary_factor": 0.5},
        {"rope_parameters": {"partial_rotary_factor": 0.5}},
    ):
        assert "partial_rotary_factor = 0.5" in refusal({**VALUES[True], **place})
    assert "head_dim = 7" in refusal({**VALUES[True], "head_dim": 7})
    same = {**VALUES[True], "head_dim": VALUES[True]["qk_rope_head_dim"]}
    assert from_hf(same) == from_hf(VALUES[True])


# Every field

NUMBERS = [
    field.name
    for field in dataclasses.fields(ModelConfig)
    if field.type in (int, float) and not isinstance(field.default, bool)
]
FIELDS = [
    (name, latent)
    for name in NUMBERS
    for latent in LATENT
    if name in VALUES[latent] or name == "partial_rotary_factor"
]
NOT_NUMBERS = [float("nan"), float("inf"), -float("inf"), -1, 10**400, "1", [1], {"a": 1}, True]


@pytest.mark.parametrize(("name", "latent"), FIELDS)
def test_a_value_that_is_no_number_is_refused_with_the_field(name, latent):
    """Of every field, at the top and in the table of the rotation."""
    values = VALUES[latent]
    places = [{name: value} for value in NOT_NUMBERS]
    if name == "rope_theta":
        places += [{"rope_parameters": {name: value}} for value in NOT_NUMBERS]
    for place in places:
        said = refusal({**values, **place})
        assert said is not None, place
        assert name in said, (place, said)


@BOTH
def test_a_wrong_type_of_any_key_is_one_line(latent):
    """No value of any key ends in anything but one line."""
    values = VALUES[latent]
    keys = [*values, "rope_parameters", "quantization_config", "mlp_layer_types", *ALIASES.values()]
    for key, value in itertools.product(
        keys, [None, [], {}, [1], {"a": 1}, "", "x", -1, 2**70, 1.5]
    ):
        refusal({**values, key: value})
    for value in ("fp8", [1], 3, True):
        assert "quantization_config" in refusal({**values, "quantization_config": value})


@BOTH
def test_a_missing_key_has_the_value_of_transformers(latent):
    """Each default is transformers' own, by type of model."""
    model_type = ModelType.MLA if latent else ModelType.GQA
    for name in DEFAULTS[model_type]:
        values = {key: value for key, value in VALUES[latent].items() if key != name}
        if name in ("first_k_dense_replace", "num_nextn_predict_layers"):
            continue  # about layers, which the files show
        assert getattr(from_hf(values), name) == getattr(theirs(values), name), name
    without = {key: value for key, value in VALUES[False].items() if key != "head_dim"}
    without["num_attention_heads"] = without["num_key_value_heads"] = 4
    width = without["hidden_size"] // 4
    assert from_hf(without).head_dim == from_hf({**without, "head_dim": None}).head_dim == width


def test_what_inference_does_not_need_is_accepted():
    """Null for "none", dropout, one normalised expert, another name of a key."""
    values = VALUES[False]
    for name in set(NONE) & values.keys():
        assert getattr(from_hf({**values, name: None}), name) == 0
    assert from_hf({**values, "attention_dropout": 0.1}) == from_hf(values)
    assert from_hf({**values, "hidden_act": "swish"}) == from_hf(values)
    assert from_hf({**values, "num_experts_per_tok": 1}).num_experts_per_tok == 1
    for name, alias in ALIASES.items():
        renamed = {alias if key == name else key: value for key, value in values.items()}
        assert from_hf(renamed) == from_hf(values)
        assert f"{name} = {values[name]}" in refusal({**values, alias: 77})
        config = dataclasses.replace(
            from_hf(values), n_routed_experts=8, num_nextn_predict_layers=0
        )
        assert from_hf(to_hf(config, renamed)) == config


@pytest.mark.parametrize("place", ["top", "rope_parameters", "rope_scaling"])
def test_a_changed_base_is_written_where_it_was(place):
    """What is written is what the model computes, wherever the old value stood."""
    values = {key: value for key, value in VALUES[False].items() if "rope" not in key}
    if place == "top":
        values |= {"rope_theta": 5.0, "rope_parameters": None}
    else:
        values |= {place: {"rope_type": "default", "rope_theta": 5.0}}
    config = dataclasses.replace(from_hf(values), rope_theta=9.0)
    written = to_hf(config, values)
    assert from_hf(written) == config
    assert theirs(written).rope_parameters["rope_theta"] == 9.0
