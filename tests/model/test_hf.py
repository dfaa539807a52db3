"""Checkpoints in and out: nothing is lost, nothing is guessed, and transformers reads what minglm writes."""

import json
import re
import shutil
import tempfile
import warnings
import weakref
from pathlib import Path

import pytest
import torch
import transformers
from helpers.released import (
    EVERY_VALUE,
    build,
    drawn_tokens,
    layout,
    mtp_model,
    release,
    shapes,
    tensors,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from minglm.config import OptimizerConfig, load_config
from minglm.model.glm import GLM
from minglm.model.hf import files, write
from minglm.model.hf.config import from_hf, to_hf
from minglm.model.hf.names import expected, goes_to_float8
from minglm.optim.muon import Muon
from minglm.testing.strategies import seeds

BOTH = pytest.mark.parametrize("latent", [False, True], ids=["glm4_moe", "glm4_moe_lite"])
CONFIGS = Path(__file__).parent.parent.parent / "configs"


@pytest.fixture
def folder(tmp_path):
    """Write a released checkpoint with copies in its MTP layer, in several files."""
    release(mtp_model(1), tmp_path / "glm", copies=True)
    return tmp_path / "glm"


def same(found, wanted):
    """Check that names, dtypes and values are equal."""
    assert found.keys() == wanted.keys()
    assert all(
        found[n].dtype == wanted[n].dtype and torch.equal(found[n], wanted[n]) for n in wanted
    )


def hugging_face(folder, latent):
    """Return (the model as transformers loads it, what it says of missing and unexpected names)."""
    transformers.utils.logging.disable_progress_bar()
    kind = transformers.Glm4MoeLiteForCausalLM if latent else transformers.Glm4MoeForCausalLM
    options = {
        "experts_implementation": "eager",
        "attn_implementation": "eager",
        "output_loading_info": True,
    }
    return kind.from_pretrained(folder, **options)


# Names


def spelled_out(latent):
    """Spell out the names that vLLM and SGLang look for: a dense layer, a MoE layer with two experts, the MTP layer."""
    if latent:
        parts = [
            "q_a_proj",
            "q_a_layernorm",
            "q_b_proj",
            "kv_a_proj_with_mqa",
            "kv_a_layernorm",
            "kv_b_proj",
            "o_proj",
        ]
        attention = [f"self_attn.{part}.weight" for part in parts]
    else:
        attention = [f"self_attn.{p}_proj.{v}" for p in "qkv" for v in ("weight", "bias")] + [
            "self_attn.o_proj.weight"
        ]
        attention += ["self_attn.q_norm.weight", "self_attn.k_norm.weight"]
    layer = [*attention, "input_layernorm.weight", "post_attention_layernorm.weight"]
    swiglu = ["gate_proj.weight", "up_proj.weight", "down_proj.weight"]
    inner = ["shared_experts", *(f"experts.{expert}" for expert in range(4))]
    moe = [
        *layer,
        "mlp.gate.weight",
        "mlp.gate.e_score_correction_bias",
        *(f"mlp.{i}.{s}" for i in inner for s in swiglu),
    ]
    mtp = [*moe, "enorm.weight", "hnorm.weight", "eh_proj.weight", "shared_head.norm.weight"]
    layers = [[*layer, *(f"mlp.{name}" for name in swiglu)], moe, mtp]
    names = {f"model.layers.{i}.{name}" for i, part in enumerate(layers) for name in part}
    return names | {"model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"}


@BOTH
def test_written_names_are_the_released_ones(latent, tmp_path):
    """Every name of a released checkpoint, and no other; copies only where they came from."""
    mtp_model(1, latent).save_pretrained(tmp_path / "glm")
    assert set(tensors(tmp_path / "glm")) == spelled_out(latent)
    copies = {
        f"model.layers.2.{name}" for name in ("embed_tokens.weight", "shared_head.head.weight")
    }
    assert set(expected(mtp_model(1, latent).config)) == spelled_out(latent) | copies


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.py")), ids=lambda path: path.stem)
def test_the_table_is_the_model(path):
    """At any size, released ones too: the table unfolds to the model's tensors, with the same numbers of values."""
    config = load_config(path).model
    with torch.device("meta"):
        model = GLM(config)
    sizes = {}
    for entry in expected(config).values():
        if entry.kind != "copy":
            rows = torch.Size(entry.shape).numel()
            sizes[entry.target] = sizes.get(entry.target, 0) + rows
    assert sizes == {name: tensor.numel() for name, tensor in model.state_dict().items()}


def test_number_of_names_in_flash():
    """GLM-4.7-Flash has 9,491 tensors and 210 of its MTP layer, as an independent converter counts them."""
    kinds = [entry.kind for entry in expected(load_config(CONFIGS / "flash_30b.py").model).values()]
    assert (kinds.count("weight"), kinds.count("mtp"), kinds.count("copy")) == (9491, 210, 2)


# Round trips


@BOTH
@settings(max_examples=12)
@given(
    seed=seeds,
    copies=st.booleans(),
    own_file=st.booleans(),
    dtype=st.sampled_from(["float32", "bfloat16"]),
)
def test_import_and_export_are_the_identity(latent, seed, copies, own_file, dtype):
    """Every tensor, its dtype, its file, and config.json with keys unknown to minglm: read, written, the same."""
    with tempfile.TemporaryDirectory() as temporary:
        first, second = Path(temporary) / "a", Path(temporary) / "b"
        wanted = release(mtp_model(seed, latent), first, copies, own_file, dtype)
        values = json.loads((first / "config.json").read_text(encoding="utf-8")) | {
            "eos_token_id": [1, 2],
            "added_by": {"some": "one"},
        }
        values |= {
            "torch_dtype": values.pop("dtype"),
            "rope_parameters": {"rope_type": "default", "rope_theta": 5.0},
        }
        if not latent:
            values["rope_parameters"]["partial_rotary_factor"] = values.pop("partial_rotary_factor")
        (first / "config.json").write_text(json.dumps(values), encoding="utf-8")
        model = GLM.from_pretrained(first)
        assert model.config.rope_theta == 5.0 and model.dtype == getattr(torch, dtype)
        assert model.mtp is not None and all(p.requires_grad for p in model.parameters())
        model.save_pretrained(second)
        same(tensors(second), wanted)
        assert layout(second) == layout(first)
        assert json.loads((second / "config.json").read_text(encoding="utf-8")) == values


@BOTH
@settings(max_examples=12)
@given(data=st.data())
def test_transformers_loads_what_minglm_writes(latent, data):
    """transformers reads what minglm wrote from its checkpoint: no name missing or unexpected, and the same logits."""
    values, seed = data.draw(shapes(latent))
    with tempfile.TemporaryDirectory() as temporary:
        there, back, own = (Path(temporary) / name for name in "abc")
        reference = build(values, seed)
        tokens_BS = drawn_tokens(seed, 2, 5)
        reference.save_pretrained(there)
        model = GLM.from_pretrained(there)
        model.save_pretrained(back)
        same(tensors(back), tensors(there))
        assert json.loads((back / "config.json").read_text(encoding="utf-8")) == json.loads(
            (there / "config.json").read_text(encoding="utf-8")
        )
        model.checkpoint_origin = None  # now config.json is ours from the first key to the last
        model.save_pretrained(own)
        for folder in (back, own):
            loaded, info = hugging_face(folder, latent)
            assert not any(info.values()), info
            with torch.no_grad():
                assert torch.equal(loaded(tokens_BS).logits, reference(tokens_BS).logits)


@BOTH
def test_transformers_leaves_only_the_mtp_layer(latent, tmp_path):
    """transformers misses nothing in a whole model, and does not expect its MTP layer only."""
    model = mtp_model(1, latent)
    model.save_pretrained(tmp_path / "glm")
    loaded, info = hugging_face(tmp_path / "glm", latent)
    assert not info["missing_keys"]
    assert all(name.startswith("model.layers.2.") for name in info["unexpected_keys"])
    tokens_BS = drawn_tokens(1, 2, 7)
    with torch.no_grad():
        torch.testing.assert_close(loaded(tokens_BS).logits, model(tokens_BS), atol=1e-4, rtol=1e-4)
    loaded.save_pretrained(tmp_path / "lossy")
    with pytest.warns(UserWarning, match="promises an MTP layer and no file has it"):
        again = GLM.from_pretrained(tmp_path / "lossy")
    assert again.mtp is None and again.config.num_nextn_predict_layers == 0


@pytest.mark.parametrize("copies", [False, True])
def test_mtp_survives_fine_tuning(copies, tmp_path):
    """Load to train, one step of the optimizer, save, load: the trained MTP layer, and copies of the new embedding."""
    release(mtp_model(2), tmp_path / "base", copies, dtype="bfloat16")
    model = GLM.from_pretrained(tmp_path / "base", torch.float32)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    out = model.hidden(drawn_tokens(2, 2, 8), mtp=True)
    loss = model.lm_head(out.mtp_hidden_BSD).square().mean() + out.hidden_BSD.square().mean()
    loss.backward()
    Muon(model, OptimizerConfig(peak_lr=0.1)).step()
    model.save_pretrained(tmp_path / "tuned", "bfloat16")
    again = GLM.from_pretrained(tmp_path / "tuned")
    held = tensors(tmp_path / "tuned")
    for name, tensor in model.state_dict().items():
        kept = tensor if "e_score" in name else tensor.bfloat16()
        assert torch.equal(again.state_dict()[name], kept), name
        assert "e_score" in name or not torch.equal(tensor, before[name]), f"{name} was not trained"
    copy = "model.layers.2.embed_tokens.weight"
    assert (copy in held) == copies
    assert not copies or torch.equal(held[copy], held["model.embed_tokens.weight"])


@pytest.mark.parametrize("copy", ["embed_tokens.weight", "shared_head.head.weight"])
def test_a_copy_that_differs_is_refused(copy, folder):
    """The model has one tensor for both, so one would be lost; without the MTP layer nothing is."""
    name = f"model.layers.2.{copy}"
    held = tensors(folder)
    extra = {name: held[name] for name in layout(folder)["mtp.safetensors"]}
    extra[name] = extra[name] + 1
    save_file(extra, folder / "mtp.safetensors")
    remedy = "set in config.json num_nextn_predict_layers to 0"
    with pytest.raises(ValueError, match=rf"{re.escape(name)} differs from .*{remedy}"):
        GLM.from_pretrained(folder)
    values = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    (folder / "config.json").write_text(
        json.dumps({**values, "num_nextn_predict_layers": 0}), encoding="utf-8"
    )
    with pytest.warns(UserWarning, match="files hold an MTP layer"):
        assert GLM.from_pretrained(folder).mtp is None


def test_stacks_of_experts_are_read(tmp_path):
    """transformers can write all experts of a layer as one tensor, gate before up; they are the same model."""
    model = mtp_model(1)
    model.save_pretrained(tmp_path / "glm")
    held = tensors(tmp_path / "glm")
    for layer in (1, 2):
        prefix = f"model.layers.{layer}.mlp.experts."
        parts = {
            p: [held.pop(f"{prefix}{e}.{p}.weight") for e in range(4)]
            for p in ("gate_proj", "up_proj", "down_proj")
        }
        held[f"{prefix}gate_up_proj"] = torch.cat(
            [torch.stack(parts["gate_proj"]), torch.stack(parts["up_proj"])], 1
        )
        held[f"{prefix}down_proj"] = torch.stack(parts["down_proj"])
    save_file(held, tmp_path / "glm" / "model.safetensors")
    read = GLM.from_pretrained(tmp_path / "glm")
    same(read.state_dict(), model.state_dict())
    read.save_pretrained(tmp_path / "again")
    assert set(tensors(tmp_path / "again")) == spelled_out(False)


# FP8


@BOTH
def test_float8_in_and_out(latent, tmp_path):
    """Projections become float8 with a scale per block, nothing else does; the next export finds the same numbers."""
    model = mtp_model(3, latent)
    model.save_pretrained(tmp_path / "a", "fp8")
    held = tensors(tmp_path / "a")
    for name, tensor in held.items():
        is_scale = name.endswith("_scale_inv")
        assert (tensor.dtype == torch.float8_e4m3fn) == (goes_to_float8(name) and not is_scale), (
            name
        )
        assert is_scale or goes_to_float8(name) == (f"{name}_scale_inv" in held)
    assert not any(
        goes_to_float8(n)
        for n in held
        if "norm" in n or "mlp.gate." in n or "embed" in n or "eh_proj" in n
    )
    again = GLM.from_pretrained(tmp_path / "a")
    for name, tensor in again.state_dict().items():
        assert tensor.dtype == (torch.float32 if "e_score" in name else torch.bfloat16)
        error = (tensor.float() - model.state_dict()[name]).abs().max() / model.state_dict()[
            name
        ].abs().max()
        assert error < 1 / 16, name  # half a step of three bits of mantissa, and bfloat16
    again.save_pretrained(tmp_path / "b", "fp8")
    second = tensors(tmp_path / "b")
    for name, tensor in held.items():
        if name.endswith("_scale_inv"):
            torch.testing.assert_close(second[name], tensor, rtol=2**-8, atol=0)  # through bfloat16
        else:
            assert torch.equal(second[name].float(), tensor.float()), name
    written = json.loads((tmp_path / "a" / "config.json").read_text(encoding="utf-8"))
    assert written["quantization_config"]["weight_block_size"] == [128, 128]
    again.save_pretrained(tmp_path / "c", "bfloat16")
    assert "quantization_config" not in json.loads(
        (tmp_path / "c" / "config.json").read_text(encoding="utf-8")
    )


def test_transformers_reads_the_same_float8(tmp_path):
    """transformers, asked to multiply float8 out, computes what minglm computes with the same folder."""
    values = {
        **EVERY_VALUE,
        "hidden_size": 256,
        "moe_intermediate_size": 128,
        "intermediate_size": 256,
    }
    values |= {
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 64,
    }
    values |= {
        "n_routed_experts": 4,
        "num_experts_per_tok": 2,
        "num_nextn_predict_layers": 0,
        "use_qk_norm": True,
    }
    # Whole blocks: transformers divides a shape evenly, whatever is left over.
    reference = build(values, 5, scale=0.05)
    reference.save_pretrained(tmp_path / "a")
    GLM.from_pretrained(tmp_path / "a").save_pretrained(tmp_path / "b", "fp8")
    options = {
        "quantization_config": transformers.FineGrainedFP8Config(dequantize=True),
        "dtype": torch.float32,
    }
    loaded = type(reference).from_pretrained(
        tmp_path / "b", experts_implementation="eager", **options
    )
    found = dict(GLM.from_pretrained(tmp_path / "b", torch.float32).named_parameters())
    for name, tensor in loaded.named_parameters():
        if "mlp.experts" not in name:
            torch.testing.assert_close(
                found[name], tensor.float(), rtol=1e-2, atol=0, msg=lambda m, n=name: f"{n}: {m}"
            )


def build_values():
    """Return the values of a small glm4_moe whose matrices have more than one block."""
    values = {
        "hidden_act": "silu",
        "attn_implementation": "eager",
        "vocab_size": 24,
        "max_position_embeddings": 256,
    }
    values |= {
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 64,
    }
    return values | {
        "n_routed_experts": 4,
        "num_experts_per_tok": 2,
        "num_nextn_predict_layers": 0,
        "use_qk_norm": True,
    }


def test_float8_rows_are_read(folder, tmp_path):
    """Checkpoints with one scale per row of a matrix (`weight_scale`) are multiplied out too."""
    held = tensors(folder)
    scaled = {}
    for name, tensor in held.items():
        if goes_to_float8(name):
            scale = tensor.abs().amax(1, keepdim=True) / 448
            scaled[f"{name}_scale"] = scale
            scaled[name] = (tensor / scale).to(torch.float8_e4m3fn)
        else:
            scaled[name] = tensor
    shutil.copytree(folder, tmp_path / "rows", ignore=shutil.ignore_patterns("*.safetensors*"))
    save_file(scaled, tmp_path / "rows" / "model.safetensors")
    found, wanted = (GLM.from_pretrained(f).state_dict() for f in (tmp_path / "rows", folder))
    for name, tensor in wanted.items():
        error = (found[name] - tensor).abs().max()
        assert error <= tensor.abs().max() / 16  # half a step of three bits of mantissa


# Streaming


def test_one_tensor_at_a_time(folder, monkeypatch):
    """While a checkpoint is read, what was read before is gone; while it is written, one file is held."""
    alive = []
    read = files.Files.read

    def watched(self, name):
        assert not any(reference() is not None for reference in alive), (
            "an earlier tensor is still held"
        )
        tensor = read(self, name)
        alive[:] = [weakref.ref(tensor)]
        return tensor

    monkeypatch.setattr(files.Files, "read", watched)
    model = GLM.from_pretrained(folder)
    written = []
    monkeypatch.setattr(
        write, "save_file", lambda held, *a, **k: (written.append(held), save_file(held, *a, **k))
    )
    model.checkpoint_origin = None
    model.save_pretrained(folder.parent / "b", shard_gigabytes=4e-6)
    sizes = [[tensor.nbytes for tensor in held.values()] for held in written]
    assert len(sizes) > 3
    assert all(sum(size) <= max(4000, max(size)) for size in sizes)
    same(GLM.from_pretrained(folder.parent / "b").state_dict(), model.state_dict())


# Mistakes


def damage(folder, what):
    """Damage a checkpoint in one way; return what the message must name."""
    held = tensors(folder)
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    if what in ("missing", "unknown", "misshapen", "partial MTP"):
        expert = "model.layers.1.mlp.experts.{}.up_proj.weight"
        name = "model.layers.2.hnorm.weight" if what == "partial MTP" else expert.format(3)
        tensor = held.pop(name)
        if what == "unknown":
            held |= {name: tensor, expert.format(4): tensor.clone()}
        elif what == "misshapen":
            held[name] = tensor.T.contiguous()
        for path in folder.glob("*.safetensors*"):
            path.unlink()
        save_file(held, folder / "model.safetensors")
        return "experts.4.up_proj.weight is unknown" if what == "unknown" else name
    if what == "config":
        (folder / "config.json").unlink()
        return "config.json: No such file"
    if what == "lost file":
        sorted(folder.glob("model-*"))[1].unlink()
        return "is missing (1 of"
    if what == "damaged":
        path = sorted(folder.glob("model-*"))[1]
        path.write_bytes(path.read_bytes()[:-7])
        return path.name
    if what == "twice":
        name = next(iter(layout(folder)["mtp.safetensors"]))
        save_file({name: held[name]}, folder / "again.safetensors")
        return f"{name} is in again.safetensors and in mtp.safetensors"
    if what == "no weights":
        for path in folder.glob("*.safetensors*"):
            path.unlink()
        return "no *.safetensors file"
    if what == "torn config":
        (folder / "config.json").write_text('{"model_type": "glm4', encoding="utf-8")
        return "config.json: "
    changes, name = CONFIG_MISTAKES[what]
    (folder / "config.json").write_text(json.dumps({**config, **changes}), encoding="utf-8")
    return name


CONFIG_MISTAKES = {
    "type": (
        {"model_type": "llama"},
        "model_type = 'llama'; minglm reads glm4_moe and glm4_moe_lite",
    ),
    "activation": ({"hidden_act": "gelu"}, "hidden_act = 'gelu'; minglm computes 'silu' only"),
    "scaled": ({"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}, "rope_type = 'yarn'"),
    "word": ({"hidden_size": "wide"}, "hidden_size = 'wide': must be of type int"),
    "absent": ({"num_attention_heads": None}, "num_attention_heads is missing"),
    "impossible": ({"num_key_value_heads": 3}, "model.num_attention_heads = 4: must be a multiple"),
    "width": ({"hidden_size": 32}, "config.json asks for (4, 32)"),
}
FILE_MISTAKES = [
    "missing",
    "unknown",
    "misshapen",
    "partial MTP",
    "config",
    "lost file",
    "damaged",
    "twice",
    "no weights",
]


@pytest.mark.parametrize("what", [*FILE_MISTAKES, *CONFIG_MISTAKES])
def test_a_mistake_is_one_line_before_any_weight_is_read(what, folder, monkeypatch):
    """The error says what is wrong and where, in one line."""
    words = damage(folder, what)
    monkeypatch.setattr(files.Files, "read", None)
    with warnings.catch_warnings(), pytest.raises(ValueError) as error:
        warnings.simplefilter("error")
        GLM.from_pretrained(folder)
    assert words in str(error.value)
    assert str(folder) in str(error.value)
    assert "\n" not in str(error.value)


def test_nothing_is_overwritten(folder):
    """Saving over a checkpoint, or in a dtype that does not exist, is refused before a file is touched."""
    model = GLM.from_pretrained(folder)
    before = tensors(folder)
    with pytest.raises(ValueError, match="already holds files; choose another folder"):
        model.save_pretrained(folder)
    with pytest.raises(ValueError, match="dtype = 'int4': must be one of fp8, float32"):
        model.save_pretrained(folder.parent / "new", "int4")
    same(tensors(folder), before)


# config.json


@BOTH
@given(data=st.data())
def test_config_survives_in_any_spelling(latent, data):
    """transformers' own dictionary gives the model it describes; written afresh, transformers understands the same."""
    values, _ = data.draw(shapes(latent))
    kind = transformers.Glm4MoeLiteConfig if latent else transformers.Glm4MoeConfig
    theirs = kind(**values, dtype="float32").to_dict()
    config = from_hf(theirs)
    assert to_hf(config, theirs, "float32") == theirs
    assert from_hf(to_hf(config)) == config
    again = kind(**to_hf(config)).to_dict()
    about = {
        "dtype",
        "architectures",
        "attn_implementation",
        "transformers_version",
        "rope_parameters",
        "rope_theta",
    }
    about |= {
        "first_k_dense_replace",
        "num_nextn_predict_layers",
        "topk_method",
        "rope_scaling",
        "partial_rotary_factor",
    }
    assert {k: v for k, v in again.items() if k not in about} == {
        k: v for k, v in theirs.items() if k not in about
    }
    assert again["rope_parameters"]["rope_theta"] == theirs["rope_parameters"]["rope_theta"]


def test_only_what_changed_is_changed(folder):
    """A model with a longer context writes its config.json with that one value changed."""
    values = json.loads((folder / "config.json").read_text(encoding="utf-8")) | {"some_key": 1}
    config = from_hf({**values, "max_position_embeddings": 512, "rope_theta": 7.0})
    written = to_hf(config, values, "float32")
    assert {k for k in written if written[k] != values.get(k)} == {
        "max_position_embeddings",
        "rope_theta",
    }
