"""A run leaves as a released checkpoint, comes back, and goes on; nothing is lost on the way."""

import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers
from helpers.nano_run import CONFIG, OVERRIDES, complete, weights
from helpers.released import tensors

from minglm.__main__ import main
from minglm.config import load_config
from minglm.config.run import to_dict
from minglm.data.tokenizer import Tokenizer
from minglm.model.glm import GLM
from minglm.model.hf.files import INDEX
from minglm.recipe.load import load_run
from minglm.train.checkpoint import CheckpointStore
from minglm.train.checkpoint_files import weights_of


@pytest.fixture
def run(tmp_path):
    """Return a folder like that of a run of configs/nano.py whose last stage of mid-training is complete."""
    config = load_config(CONFIG)
    model = GLM(config.model, seed=3)
    tokenizer = Tokenizer.train(["a sum of sums, 1 + 2 = 3\n"] * 3, config.model.vocab_size)
    CheckpointStore(tmp_path / "run").save("long_agent", weights_of(model), {})
    tokenizer.save(tmp_path / "run" / "data" / "tokenizer.json")
    (tmp_path / "run" / "config.json").write_text(
        json.dumps({"hash": config.hash(), "config": to_dict(config)}), encoding="utf-8"
    )
    return tmp_path / "run"


def output(capsys, *words, status=0):
    """Return what a command prints; check its status."""
    assert main([str(word) for word in words]) == status
    found = capsys.readouterr()
    return found.err if status else found.out


def test_an_exported_run_is_a_model_for_everybody(run, tmp_path, capsys):
    """transformers loads model and tokenizer of an export and computes the same; so do minglm's own verbs."""
    folder = tmp_path / "released"
    assert "stage long_agent" in output(capsys, "export", run, folder)
    model, tokenizer, config, *_ = load_run(run)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(
        folder, experts_implementation="eager"
    ).eval()
    words = transformers.AutoTokenizer.from_pretrained(folder)
    ids = tokenizer.encode("a sum of 1 + 2")
    assert words.encode("a sum of 1 + 2") == ids
    assert theirs.config.eos_token_id == list(tokenizer.stop_ids)
    assert theirs.generation_config.eos_token_id == list(tokenizer.stop_ids)
    tokens_BS = torch.tensor([ids])
    with torch.no_grad():
        torch.testing.assert_close(theirs(tokens_BS).logits, model(tokens_BS), atol=1e-5, rtol=1e-4)
    again, same, settings, stage, from_hf, _ = load_run(folder)
    assert stage == "released"
    assert from_hf
    assert settings.model == config.model
    assert same.special == tokenizer.special
    assert torch.equal(again(tokens_BS), model(tokens_BS))
    # Short answers.
    values = json.loads((folder / "config.json").read_text(encoding="utf-8")) | {
        "max_position_embeddings": 160
    }
    (folder / "config.json").write_text(json.dumps(values), encoding="utf-8")
    line = output(
        capsys, "eval", folder, "--problems", 1, "--samples", 1, "--task", "instructions", "--json"
    )
    assert json.loads(line.splitlines()[0])["stage"] == "released"


def test_import_is_the_inverse_of_export(run, tmp_path, capsys):
    """Out, in and out again: the same weights, dtype, files, and keys of config.json, also those of others."""
    first, again, second = (tmp_path / name for name in ("first", "again", "second"))
    output(capsys, "export", run, first, "--dtype", "bfloat16", "--shard-gigabytes", 1e-4)
    values = json.loads((first / "config.json").read_text(encoding="utf-8")) | {
        "added": "by somebody"
    }
    (first / "config.json").write_text(json.dumps(values), encoding="utf-8")
    (first / "chat_template.jinja").write_text("{{ messages }}", encoding="utf-8")
    tokenizer = ["--data.tokenizer", first / "tokenizer.json"]
    assert "continue with: python -m minglm run" in output(
        capsys, "import", CONFIG, first, "--out", again, *tokenizer
    )
    trained = weights(again, "long_agent")
    original = weights(run, "long_agent")
    for name, tensor in original.items():
        rounded = tensor if "e_score" in name else tensor.bfloat16().float()
        assert trained[name].dtype == torch.float32 and torch.equal(trained[name], rounded), name
    output(capsys, "export", again, second)
    found, wanted = tensors(second), tensors(first)
    for name, tensor in wanted.items():
        assert found[name].dtype == tensor.dtype
        assert torch.equal(found[name], tensor)
    assert {path.name for path in first.iterdir()} == {path.name for path in second.iterdir()}
    for name in ("config.json", INDEX, "chat_template.jinja", "generation_config.json"):
        kept = [(folder / name).read_text(encoding="utf-8") for folder in (first, second)]
        if name.endswith("json"):
            kept = [json.loads(text) for text in kept]
        assert kept[0] == kept[1], name


def test_a_released_checkpoint_changes_its_dtype(run, tmp_path, capsys):
    """Exporting a released checkpoint writes it in another dtype, with everything that stands beside the weights."""
    output(capsys, "export", run, tmp_path / "a")
    output(capsys, "export", tmp_path / "a", tmp_path / "b", "--dtype", "fp8")
    held = tensors(tmp_path / "b")
    assert any(t.dtype == torch.float8_e4m3fn for t in held.values())
    assert (tmp_path / "a" / "tokenizer.json").read_bytes() == (
        tmp_path / "b" / "tokenizer.json"
    ).read_bytes()
    assert GLM.from_pretrained(tmp_path / "b").dtype == torch.bfloat16


WRONG = {
    "other model": (
        (),
        ["--model.hidden_size", "80"],
        "has hidden_size = 48, nano has 80; give --model.hidden_size 48",
    ),
    "tokenizer": ((), [], "give --data.tokenizer"),
    "other tokenizer": (
        (),
        ["--data.tokenizer", "OTHER"],
        "has other ids than the tokenizer of",
    ),
    "no tokenizer there": ((), ["--data.tokenizer", "x"], "cannot read tokenizer x"),
    "taken": (("config.json",), [], "already holds files; choose another folder"),
    "used": (("notes.txt",), [], "already holds files; choose another folder"),
}


@pytest.mark.parametrize("what", WRONG)
def test_an_import_that_cannot_be_is_one_line(what, run, tmp_path, capsys):
    """Nothing is written before everything fits."""
    output(capsys, "export", run, tmp_path / "a")
    there, overrides, message = WRONG[what]
    if "OTHER" in overrides:
        other = Tokenizer.train(["other words\n"] * 3, load_config(CONFIG).model.vocab_size)
        other.save(tmp_path / "other.json")
        overrides = ["--data.tokenizer", tmp_path / "other.json"]
    for name in there:
        (tmp_path / "again").mkdir()
        (tmp_path / "again" / name).write_text("{}", encoding="utf-8")
    said = output(
        capsys, "import", CONFIG, tmp_path / "a", "--out", tmp_path / "again", *overrides, status=2
    )
    assert message in said
    assert said.count("\n") == 1
    assert sorted(path.name for path in tmp_path.rglob("again/*")) == sorted(there)


def test_mistakes_of_export_and_of_a_folder(run, tmp_path, capsys):
    """A folder in use, an unknown dtype or stage: one line, and the folder as it was."""
    output(capsys, "export", run, tmp_path / "a")
    assert "already holds files" in output(capsys, "export", run, tmp_path / "a", status=2)
    assert "dtype = 'int3'" in output(
        capsys, "export", run, tmp_path / "b", "--dtype", "int3", status=2
    )
    assert "must be a number above 0" in output(
        capsys, "export", run, tmp_path / "c", "--shard-gigabytes", "0", status=2
    )
    assert "which has no stages" in output(
        capsys, "chat", tmp_path / "a", "--stage", "general", status=2
    )
    (tmp_path / "a" / "tokenizer.json").unlink()
    assert "cannot read tokenizer" in output(capsys, "chat", tmp_path / "a", status=2)


@pytest.mark.slow
def test_a_run_goes_on_from_an_import(run, tmp_path, capsys):
    """After an import the same command goes on with post-training: no earlier stage is run, the MTP layer is there."""
    output(capsys, "export", run, tmp_path / "a")
    tokenizer = ["--data.tokenizer", str(tmp_path / "a" / "tokenizer.json")]
    output(
        capsys,
        "import",
        CONFIG,
        tmp_path / "a",
        "--out",
        tmp_path / "again",
        *OVERRIDES,
        *tokenizer,
    )
    status, printed, said = complete(tmp_path / "again", *tokenizer, "--until", "reasoning.sft")
    assert status == 0, said
    stages = {path.parent.name for path in (tmp_path / "again").glob("checkpoints/*/final")}
    assert stages == {"long_agent", "reasoning.sft"} and (tmp_path / "again" / "report.md").exists()
    output(capsys, "export", tmp_path / "again", tmp_path / "tuned")
    before, after = tensors(tmp_path / "a"), tensors(tmp_path / "tuned")
    assert before.keys() == after.keys()
    assert not torch.equal(before["lm_head.weight"], after["lm_head.weight"])


def test_an_import_can_be_exported_at_once(run, tmp_path, capsys):
    """Before any stage has run, the import already has the tokenizer that belongs to its weights."""
    output(capsys, "export", run, tmp_path / "a", "--dtype", "fp8")
    tokenizer = ["--data.tokenizer", tmp_path / "a" / "tokenizer.json"]
    output(capsys, "import", CONFIG, tmp_path / "a", "--out", tmp_path / "again", *tokenizer)
    # What came in blocks of float8 goes out so, from the import as from the folder itself.
    for source in ("a", "again"):
        said = output(capsys, "export", tmp_path / source, tmp_path / f"from {source}")
        assert "in fp8" in said
        found = tensors(tmp_path / f"from {source}")
        for name, tensor in tensors(tmp_path / "a").items():
            assert found[name].dtype == tensor.dtype, name
    said = output(capsys, "export", run, tmp_path / "b")
    assert "in bfloat16" in said or "in float32" in said


def test_a_size_of_shards_counts_for_a_released_source(run, tmp_path, capsys):
    """`--shard-gigabytes` splits a folder of one file; without it the files stay."""
    output(capsys, "export", run, tmp_path / "a")
    output(capsys, "export", tmp_path / "a", tmp_path / "b", "--shard-gigabytes", 1e-4)
    output(capsys, "export", tmp_path / "a", tmp_path / "c")
    assert len(list((tmp_path / "b").glob("*.safetensors"))) > 1
    assert len(list((tmp_path / "c").glob("*.safetensors"))) == 1


def test_an_export_carries_no_file_of_elsewhere(run, tmp_path, capsys):
    """A link out of the folder is left out; one into the store of the hub's cache is followed."""
    output(capsys, "export", run, tmp_path / "hub" / "snapshots" / "one")
    folder = tmp_path / "hub" / "snapshots" / "one"
    (tmp_path / "hub" / "blobs").mkdir()
    (tmp_path / "hub" / "blobs" / "123").write_text("{{ messages }}", encoding="utf-8")
    (tmp_path / "secret").write_text("mine", encoding="utf-8")
    (folder / "chat_template.jinja").symlink_to("../../blobs/123")
    (folder / "notes.txt").symlink_to(tmp_path / "secret")
    with pytest.warns(UserWarning, match=r"notes\.txt is a link out of the folder; left out"):
        output(capsys, "export", folder, tmp_path / "copy")
    names = {path.name for path in (tmp_path / "copy").iterdir()}
    assert "chat_template.jinja" in names
    assert "notes.txt" not in names
    # The list of files of an import names files of the folder only.
    imported = run / "imported_from"
    imported.mkdir()
    for name in ("config.json", "tokenizer.json"):
        (imported / name).write_bytes((folder / name).read_bytes())
    names = {"weight_map": {"lm_head.weight": "../../escaped.safetensors"}}
    (imported / INDEX).write_text(json.dumps(names), encoding="utf-8")
    said = output(capsys, "export", run, tmp_path / "other", status=2)
    assert "must be the name of a file of the folder" in said
    assert not (tmp_path / "other").exists()


def test_a_refused_export_leaves_nothing(run, tmp_path, capsys):
    """Arguments are checked first, so that no tokenizer of one model waits for the weights of another."""
    for words in (["--dtype", "int4"], ["--shard-gigabytes", "nan"], ["--stage", "none"]):
        output(capsys, "export", run, tmp_path / "new", *words, status=2)
        assert [path.name for path in tmp_path.iterdir()] == ["run"]


def test_a_tokenizer_of_another_model_is_refused(run, tmp_path, capsys):
    """Ids that the model has no row for would end in the middle of a text."""
    output(capsys, "export", run, tmp_path / "a")
    larger = Tokenizer.train(["a sum of sums\n"], load_config(CONFIG).model.vocab_size + 1)
    larger.save(tmp_path / "a" / "tokenizer.json")
    said = output(capsys, "export", tmp_path / "a", tmp_path / "b", status=2)
    assert "tokenizer.json has" in said
    assert "ids, the model" in said


@pytest.mark.parametrize("text", ["{}", "[]", "3", '{"config": 3}', "{"])
def test_a_folder_of_nothing_known_is_one_line(text, tmp_path, capsys):
    """A config.json that is neither a run's nor a released one's."""
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "config.json").write_text(text, encoding="utf-8")
    said = output(capsys, "export", tmp_path / "a", tmp_path / "b", status=2)
    assert "config.json" in said
    assert said.count("\n") == 1


CONVERSION = """
import sys, threading, time
from pathlib import Path
import torch
from minglm.config import load_config
from minglm.model.hf import write
from minglm.recipe import convert

def held():
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("RssAnon")) * 1024

def watch():
    global most
    while True:
        most = max(most, held())
        time.sleep(0.002)

config, released, run, again, *overrides = sys.argv[1:]
torch.set_num_threads(1)
convert.SHARD_GIGABYTES = 0.02
torch.empty(1).to(torch.bfloat16)  # what the first operation loads
before = most = held()
threading.Thread(target=watch, daemon=True).start()
convert.import_checkpoint(load_config(config, overrides), released, run)
convert.export_checkpoint(run, again, shard_gigabytes=0.02)
print(most - before)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux to count memory")
def test_no_conversion_holds_the_model(tmp_path):
    """Imported and exported again: the memory is that of a few files, far below the model; the same bytes come out."""
    shape = {
        "hidden_size": 128,
        "num_hidden_layers": 5,
        "moe_intermediate_size": 256,
        "n_routed_experts": 64,
    }
    config = dataclasses.replace(load_config(CONFIG).model, **shape)
    with torch.device("meta"):
        model = GLM(config)
    generator = torch.Generator().manual_seed(0)
    state = {}
    for name, tensor in model.state_dict().items():
        dtype = torch.float32 if "e_score" in name else torch.bfloat16
        state[name] = torch.rand(tensor.shape, generator=generator).to(dtype)
    model.load_state_dict(state, assign=True)
    model.save_pretrained(tmp_path / "released", shard_gigabytes=0.02)
    tokenizer = Tokenizer.train(["a sum of sums, 1 + 2 = 3\n"] * 3, config.vocab_size)
    tokenizer.save(tmp_path / "released" / "tokenizer.json")

    overrides = [word for name, value in shape.items() for word in (f"--model.{name}", str(value))]
    overrides += ["--data.tokenizer", str(tmp_path / "released" / "tokenizer.json")]
    folders = [str(tmp_path / name) for name in ("released", "run", "again")]
    done = subprocess.run(
        [sys.executable, "-c", CONVERSION, CONFIG, *folders, *overrides],
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr
    whole = 4 * sum(tensor.numel() for tensor in state.values())  # a run holds float32
    assert int(done.stdout) < whole / 2, (int(done.stdout), whole)
    found, wanted = tensors(tmp_path / "again"), tensors(tmp_path / "released")
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)
