"""Folders of checkpoints: other layouts are read as what they are, damaged ones refused, and none is half written."""

import json
import os
import subprocess
import sys

import pytest
import safetensors
import torch
from helpers.released import mtp_model, release, tensors
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from minglm.common.files import new_folder
from minglm.model.glm import GLM
from minglm.model.hf import files, write
from minglm.model.hf.files import INDEX
from minglm.model.hf.names import goes_to_float8
from minglm.model.hf.scales import multiply_out, scale_grid
from minglm.testing.model import normal
from minglm.testing.strategies import seeds


@pytest.fixture
def folder(tmp_path):
    """Return a checkpoint in one file, with an MTP layer and its copies."""
    model = mtp_model(1)
    model.save_pretrained(tmp_path / "glm")
    held = tensors(tmp_path / "glm")
    held["model.layers.2.embed_tokens.weight"] = held["model.embed_tokens.weight"].clone()
    held["model.layers.2.shared_head.head.weight"] = held["lm_head.weight"].clone()
    save_file(held, tmp_path / "glm" / "model.safetensors")
    return tmp_path / "glm"


def put(folder, held=None, **values):
    """Replace the weights of a folder, or values of its config.json."""
    if held is not None:
        save_file(held, folder / "model.safetensors")
    written = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    (folder / "config.json").write_text(json.dumps({**written, **values}), encoding="utf-8")


def refusal(folder):
    """Return the one line with which a folder is refused."""
    with pytest.raises(ValueError) as error:
        GLM.from_pretrained(folder)
    assert "\n" not in str(error.value)
    assert str(folder) in str(error.value)
    return str(error.value)


# Scales

LAYOUTS = {
    "block": lambda rows, columns, block: (-(-rows // block[0]), -(-columns // block[1])),
    "row": lambda rows, columns, block: (rows, 1),
    "flat row": lambda rows, columns, block: (rows,),
    "matrix": lambda rows, columns, block: (1, 1),
    "one": lambda rows, columns, block: (1,),
    "scalar": lambda rows, columns, block: (),
}


@settings(max_examples=40)
@given(
    seed=seeds,
    rows=st.integers(1, 20),
    columns=st.integers(1, 20),
    block=st.tuples(st.integers(1, 8), st.integers(1, 8)),
    layout=st.sampled_from(sorted(LAYOUTS)),
    dtype=st.sampled_from([torch.float8_e4m3fn, torch.float8_e5m2]),
    stack=st.sampled_from([(), (3,)]),
)
def test_each_entry_is_multiplied_by_the_scale_of_its_place(
    seed, rows, columns, block, layout, dtype, stack
):
    """Every layout, dtype and shape equals the product entry by entry, to the bit."""
    shape = LAYOUTS[layout](rows, columns, block)
    if layout not in ("one", "scalar"):
        shape = (*stack, *shape)
    stored = normal(seed, *stack, rows, columns).to(dtype)
    scale = 0.5 + torch.rand(shape, generator=torch.Generator().manual_seed(seed))
    grid, size = scale_grid(stored.shape, shape, block)
    found = multiply_out(stored, scale, block)
    scale = scale.reshape(grid).expand(*stack, *grid[-2:])
    for row in range(rows):
        for column in range(columns):
            of_place = scale[..., row // size[0], column // size[1]]
            expected = stored[..., row, column].float() * of_place
            assert torch.equal(found[..., row, column], expected)


def test_a_scale_of_another_layout_has_no_grid():
    """Columns, a third axis, too many blocks: nothing is reshaped until it fits."""
    for shape in ((1, 6), (6,), (2, 3), (4, 1, 1), (3, 2), (0,)):
        assert scale_grid((4, 6), shape, (4, 4)) is None, shape
    assert scale_grid((6,), (6,), (4, 4)) is None


@pytest.mark.parametrize("layout", sorted(LAYOUTS))
@pytest.mark.parametrize(
    ("dtype", "suffix"),
    [(torch.float8_e4m3fn, "_scale_inv"), (torch.float8_e5m2, "_scale")],
    ids=["e4m3", "e5m2"],
)
def test_float8_of_any_layout_is_read(layout, dtype, suffix, folder):
    """A folder in float8 is the same model, up to the bits of its mantissa, with scales of activations beside or not."""
    held = tensors(folder)
    block = (8, 4)
    stored = {}
    for name, tensor in held.items():
        if not goes_to_float8(name):
            stored[name] = tensor
            continue
        scale = torch.full(LAYOUTS[layout](*tensor.shape, block), 2.0**-8)
        stored[name] = (tensor * 2.0**8).to(dtype)
        stored[name + suffix] = scale
        stored[name.removesuffix("weight") + "input_scale"] = torch.ones(())
    put(folder, stored, quantization_config={"weight_block_size": list(block)})
    model = GLM.from_pretrained(folder, torch.float32)
    for name, tensor in model.state_dict().items():
        if name in held and goes_to_float8(name):
            assert torch.equal(tensor, stored[name].float() * 2.0**-8)
    steps = 16 if dtype == torch.float8_e4m3fn else 8  # half a step of the mantissa
    original = mtp_model(1).state_dict()
    for name, tensor in model.state_dict().items():
        error = (tensor - original[name]).abs().max()
        assert error <= original[name].abs().max() / steps


def wrong_numbers():
    """Yield (what the line names, a change of one float8 matrix and its scale)."""
    q = torch.zeros(16, 32)
    f8 = q.to(torch.float8_e4m3fn)
    yield "I8", {"": q.to(torch.int8), "_scale": torch.ones(16, 1)}
    yield "I32", {"": q.to(torch.int32)}
    yield "U8", {"": q.to(torch.uint8), "_scale": torch.ones(16, 1)}
    yield "BOOL", {"": q.to(torch.bool)}
    yield "no NAME_scale_inv", {"": f8}
    yield "two scales", {"": f8, "_scale": torch.ones(16, 1), "_scale_inv": torch.ones(1, 1)}
    yield "has the shape (1, 32)", {"": f8, "_scale": torch.ones(1, 32)}
    yield "has the shape (2, 2)", {"": f8, "_scale_inv": torch.ones(2, 2)}
    yield "_scale is I32", {"": f8, "_scale": torch.ones(16, 1, dtype=torch.int32)}
    yield "is F32 and has a scale", {"": q, "_scale": torch.ones(16, 1)}


@pytest.mark.parametrize(
    ("words", "change"), [pytest.param(*case, id=case[0]) for case in wrong_numbers()]
)
def test_numbers_of_another_kind_are_refused(words, change, folder, monkeypatch):
    """Before any weight is read, by the name of the tensor."""
    held = tensors(folder)
    name = "model.layers.1.self_attn.o_proj.weight"
    rows, columns = held.pop(name).shape
    assert (rows, columns) == (16, 32)
    put(folder, {**held, **{name + suffix: tensor for suffix, tensor in change.items()}})
    monkeypatch.setattr(files.Files, "read", None)
    said = refusal(folder)
    assert name in said
    assert words.replace("NAME", name) in said


@pytest.mark.parametrize("dtype", [torch.float16, torch.float64])
def test_other_floats_go_in_and_out(dtype, folder, tmp_path):
    """Every dtype that is read can be written: the same tensors, and config.json names it."""
    held = {name: tensor.to(dtype) for name, tensor in tensors(folder).items()}
    put(folder, held)
    model = GLM.from_pretrained(folder)
    model.save_pretrained(tmp_path / "again")
    for name, tensor in tensors(tmp_path / "again").items():
        assert tensor.dtype == (torch.float32 if "e_score" in name else dtype)
        assert torch.equal(tensor.double(), held[name].double())
    values = json.loads((tmp_path / "again" / "config.json").read_text(encoding="utf-8"))
    assert values["dtype"] == str(dtype).removeprefix("torch.")


# The MTP layer, copies, experts


def test_copies_and_originals_may_be_in_one_file(folder, tmp_path):
    """As they came, also where one file holds a tensor and its copy."""
    GLM.from_pretrained(folder).save_pretrained(tmp_path / "again")
    found = tensors(tmp_path / "again")
    for name, tensor in tensors(folder).items():
        assert torch.equal(found.pop(name), tensor)
    assert not found


def test_an_mtp_layer_that_the_config_does_not_have_is_left_out(folder, tmp_path):
    """The trunk is the same, a warning says so, and what is written fits its config.json."""
    tokens_BS = torch.arange(6)[None]
    whole = GLM.from_pretrained(folder)
    for value in (0, None):
        put(folder, num_nextn_predict_layers=value)
        with pytest.warns(UserWarning, match="hold an MTP layer and config.json has none") as said:
            model = GLM.from_pretrained(folder)
        assert len(said) == 1
        assert torch.equal(model(tokens_BS), whole(tokens_BS))
    model.save_pretrained(tmp_path / "again")
    assert GLM.from_pretrained(tmp_path / "again").mtp is None


def test_matrices_without_rows_stand_for_no_shared_expert(folder):
    """transformers writes the shared expert of a model that has none as matrices without rows."""
    held = {
        name: tensor for name, tensor in tensors(folder).items() if "shared_experts" not in name
    }
    width = held["model.embed_tokens.weight"].shape[1]
    put(folder, held, n_shared_experts=0)
    plain = GLM.from_pretrained(folder)
    for layer in (1, 2):
        prefix = f"model.layers.{layer}.mlp.shared_experts."
        held |= {f"{prefix}{part}_proj.weight": torch.zeros(0, width) for part in ("gate", "up")}
        held[f"{prefix}down_proj.weight"] = torch.zeros(width, 0)
    put(folder, held)
    tokens_BS = torch.arange(6)[None]
    assert torch.equal(GLM.from_pretrained(folder)(tokens_BS), plain(tokens_BS))


@pytest.mark.parametrize(
    "field", ["num_hidden_layers", "n_routed_experts", "vocab_size", "hidden_size", "head_dim"]
)
def test_a_size_that_the_files_do_not_have_is_found_at_once(field, folder):
    """A number of a thousand billions: no name is made for each, and no memory is taken."""
    put(folder, **{field: 10**12})
    assert "config.json" in refusal(folder)


@pytest.mark.parametrize(
    "prefix", ["model.language_model.", "language_model.model.", "module.model.", ""]
)
def test_names_of_another_writer_are_named(prefix, folder):
    """A part of a larger model, a wrapped one, a trunk alone: one line with the name of the embedding."""
    held = tensors(folder)
    renamed = {prefix + name.removeprefix("model."): tensor for name, tensor in held.items()}
    put(folder, renamed)
    assert f"the embedding is called {prefix}embed_tokens.weight" in refusal(folder)
    put(folder, {**held, "model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)})
    assert "rotary_emb.inv_freq is written by old tools" in refusal(folder)


BAD_TEXT = [
    "",
    "{",
    "[]",
    "{}",
    "3",
    '"x"',
    "null",
    "[" * 100_000,
    '{"a": 1' + "0" * 5000 + "}",
    "\ud800",
]
BAD_INDEX = [
    '{"weight_map": []}',
    '{"weight_map": "x"}',
    '{"weight_map": {"a": 1}}',
    '{"weight_map": {"a": "../x"}}',
]


@pytest.mark.parametrize("file", ["config.json", INDEX])
def test_a_broken_file_is_one_line(file, folder):
    """Torn, of another type, or nested without end."""
    for text in BAD_TEXT if file == "config.json" else BAD_TEXT + BAD_INDEX:
        (folder / file).write_bytes(text.encode("utf-8", "surrogatepass"))
        assert file in refusal(folder)


# Cost


def test_a_file_is_opened_once(folder, monkeypatch, tmp_path):
    """Opening a file reads the names of all its tensors: one opening for each tensor would be quadratic."""
    opened = []

    def counted(path, framework):
        opened.append(path)
        return safetensors.safe_open(path, framework)

    monkeypatch.setattr(files, "safe_open", counted)
    GLM.from_pretrained(folder)
    assert len(opened) == 1
    release(mtp_model(1), tmp_path / "many", copies=True, own_file=True)
    many = list((tmp_path / "many").glob("*.safetensors"))
    opened.clear()
    GLM.from_pretrained(tmp_path / "many")
    # once for the headers, once for the weights, and again for each of the two copies and its file
    assert len(many) > 4
    assert len(opened) <= 2 * len(many) + 2


# Writing


def test_a_used_folder_is_refused_and_stays(folder, tmp_path):
    """Whatever is in it, or where it is not a folder at all."""
    model = GLM.from_pretrained(folder)
    used = tmp_path / "used"
    used.mkdir()
    (used / "notes.txt").write_text("mine", encoding="utf-8")
    (tmp_path / "link").symlink_to(used)
    for target in (used, used / "notes.txt", tmp_path / "link", tmp_path):
        with pytest.raises(ValueError, match="choose another"):
            model.save_pretrained(target)
    assert [path.name for path in used.iterdir()] == ["notes.txt"]
    (tmp_path / "empty").mkdir()
    model.save_pretrained(tmp_path / "empty")
    assert not list(tmp_path.glob(".*"))


@pytest.mark.parametrize("failing", [0, 1, 2])
def test_an_error_while_writing_leaves_nothing(failing, folder, tmp_path, monkeypatch):
    """A full disk at any file: one line with the folder that was asked for, and neither folder nor temporary file."""
    model = GLM.from_pretrained(folder)
    count = 0

    def full(held, path, **options):
        nonlocal count
        count += 1
        if count > failing:
            path.write_bytes(b"a part")
            raise safetensors.SafetensorError("No space left on device (os error 28)")
        save_file(held, path, **options)

    monkeypatch.setattr(write, "save_file", full)
    with pytest.raises(ValueError, match="No space left on device") as error:
        model.save_pretrained(tmp_path / "new", shard_gigabytes=4e-6)
    assert str(tmp_path / "new") in str(error.value)
    assert ".tmp" not in str(error.value)
    assert [path.name for path in tmp_path.iterdir()] == ["glm"]


def test_too_little_room_is_found_before_anything_is_written(folder, tmp_path, monkeypatch):
    """The sizes of all tensors are known."""
    model = GLM.from_pretrained(folder)
    small = type("Usage", (), {"free": 1000})
    monkeypatch.setattr(write.shutil, "disk_usage", lambda folder: small)
    monkeypatch.setattr(write, "save_file", None)
    with pytest.raises(ValueError, match=r"0\.00 GB are free, the weights need"):
        model.save_pretrained(tmp_path / "new")
    assert [path.name for path in tmp_path.iterdir()] == ["glm"]


def test_what_a_killed_process_left_is_removed(tmp_path):
    """A kill cannot be caught; the next one to write there tidies up, and leaves the folder of a living process."""
    program = (
        "import os, sys; from minglm.common.files import new_folder\n"
        "with new_folder(sys.argv[1]) as folder: (folder / 'large').write_text('x'); os.kill(os.getpid(), 9)"
    )
    target = tmp_path / "out"
    assert subprocess.run([sys.executable, "-c", program, target]).returncode == -9
    assert not target.exists()
    assert len(list(tmp_path.iterdir())) == 1
    living = tmp_path / f".out.{os.getppid()}.tmp"
    living.mkdir()
    with new_folder(target) as folder:
        (folder / "small").write_text("y", encoding="utf-8")
    assert sorted(tmp_path.iterdir()) == [living, target]
    assert [path.name for path in target.iterdir()] == ["small"]


def test_shards_of_a_size_that_is_asked_for(folder, tmp_path):
    """Also where the files came in another size; without one they stay as they were."""
    model = GLM.from_pretrained(folder)
    model.save_pretrained(tmp_path / "same")
    assert [path.name for path in (tmp_path / "same").glob("*.safetensors")] == [
        "model.safetensors"
    ]
    model.save_pretrained(tmp_path / "small", shard_gigabytes=8e-6)
    assert len(list((tmp_path / "small").glob("*.safetensors"))) > 3
    found = tensors(tmp_path / "small")
    for name, tensor in tensors(folder).items():
        assert torch.equal(found[name], tensor)


def test_float8_goes_out_where_it_came_in(folder, tmp_path):
    """A checkpoint that keeps some projections in bfloat16 keeps them there."""
    held = tensors(folder)
    kept = "model.layers.1.self_attn.o_proj.weight"
    stored = {}
    for name, tensor in held.items():
        stored[name] = tensor
        if goes_to_float8(name) and name != kept:
            stored[name] = (tensor * 256).to(torch.float8_e4m3fn)
            stored[f"{name}_scale_inv"] = torch.full((1, 1), 1 / 256)
    about = {"quant_method": "fp8", "modules_to_not_convert": [kept.removesuffix(".weight")]}
    put(folder, stored, quantization_config=about)
    GLM.from_pretrained(folder, torch.bfloat16).save_pretrained(tmp_path / "again", "fp8")
    written = {name: tensor.dtype for name, tensor in tensors(tmp_path / "again").items()}
    float8 = {name for name, dtype in written.items() if dtype == torch.float8_e4m3fn}
    assert float8 == {name for name in held if goes_to_float8(name)} - {kept}
    values = json.loads((tmp_path / "again" / "config.json").read_text(encoding="utf-8"))[
        "quantization_config"
    ]
    assert values["modules_to_not_convert"] == about["modules_to_not_convert"]
    assert values["weight_block_size"] == [128, 128]
