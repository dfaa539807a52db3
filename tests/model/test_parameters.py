"""The table of parameters: complete, without contradictions, and what the planner counts."""

from collections import Counter
from pathlib import Path

import pytest
import torch

from minglm.config import ModelConfig, OptimizerConfig, load_config
from minglm.model.glm import GLM
from minglm.model.hf.names import expected
from minglm.model.parameters import (
    PARAMETERS,
    TREATMENT,
    Initial,
    OptimizerKind,
    ParameterKind,
    Part,
    kind_of,
)
from minglm.optim.muon import optimizer_of
from minglm.plan.memory import optimizer_split
from minglm.testing.model import tiny_model

CONFIGS = Path(__file__).parents[2] / "configs"
MLA = {
    "kv_lora_rank": 6,
    "qk_nope_head_dim": 4,
    "qk_rope_head_dim": 4,
    "v_head_dim": 4,
    "num_key_value_heads": 4,
    "use_qk_norm": False,
}
VARIANTS = [
    {},
    {"use_qk_norm": False, "attention_bias": False, "n_shared_experts": 0},
    {"num_nextn_predict_layers": 0, "tie_word_embeddings": True},
    MLA,
    {**MLA, "q_lora_rank": 5},
]


def models():
    """Return small models that together have every kind of parameter."""
    return [tiny_model(0, **changes) for changes in VARIANTS]


def test_every_tensor_of_a_model_has_a_row_and_every_row_a_tensor():
    """No parameter is left to a guess, and the table names nothing that no model has."""
    seen = set()
    for model in models():
        for name in model.state_dict():
            kind = kind_of(name)
            assert kind is not None, name
            seen.add(name.split(".", 3)[-1] if name.startswith("model.layers.") else name)
        for name in expected(model.config):
            assert kind_of(name) is not None, name
    assert seen == {row.name for row in PARAMETERS if row.part != Part.MTP_COPY}


def test_every_kind_has_a_treatment_and_a_row():
    """Kinds, treatments and rows fit together."""
    assert set(TREATMENT) == set(ParameterKind) == {row.kind for row in PARAMETERS}
    assert len({(row.part, row.name) for row in PARAMETERS}) == len(PARAMETERS)


@pytest.mark.parametrize("prefix", ["", "module.", "_orig_mod.module."])
def test_a_wrappers_prefix_changes_no_kind(prefix):
    """DistributedDataParallel and torch.compile put a prefix before the names."""
    for name in tiny_model(0).state_dict():
        assert kind_of(prefix + name) == kind_of(name), name


def test_unknown_names_have_no_kind():
    """A name outside the table is not guessed."""
    for name in ("score.weight", "model.layers.0.extra.weight", "embed_tokens", ""):
        assert kind_of(name) is None


def test_initial_values_follow_the_table():
    """Ones, zeros, and normal numbers of the config's deviation."""
    config = tiny_model(0).config
    model = GLM(config)
    for name, tensor in model.state_dict().items():
        initial = TREATMENT[kind_of(name)].initial
        if initial == Initial.NORMAL:
            assert 0.5 < tensor.std() / config.initializer_range < 1.5, name
        else:
            assert (tensor == (1.0 if initial == Initial.ONE else 0.0)).all(), name


@pytest.mark.parametrize("name", ["nano", "flash_30b", "air_106b", "glm45_355b"])
@pytest.mark.parametrize("head", [False, True])
def test_the_planner_counts_what_the_table_assigns(name, head):
    """Parameters of Muon and of AdamW, by the planner's formula and tensor by tensor."""
    config: ModelConfig = load_config(CONFIGS / f"{name}.py").model
    optimizer = OptimizerConfig(muon_output_head=head)
    counts = Counter()
    with torch.device("meta"):
        for parameter_name, parameter in GLM(config).named_parameters():
            counts[optimizer_of(parameter_name, parameter, optimizer)] += parameter.numel()
    assert optimizer_split(config, optimizer) == (
        counts[OptimizerKind.MUON],
        counts[OptimizerKind.ADAMW],
    )
