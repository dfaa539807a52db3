"""Models in and out: of a run's folder, of a released checkpoint, and from one to the other (no section in the paper).

    released folder --import--> run of a config, complete up to the last stage of mid-training --run--> its experts, ...
    run --export--> released folder: config.json, safetensors, tokenizer.json, which vLLM, SGLang and transformers read

A run that began with an import keeps everything but the weights of the folder it came from in `RUN/imported_from/`, and its
exports go back to the same: the same keys in config.json, names, files and dtype, and every file that is not a weight.
Weights are float32 in a run, since they are trained.

Simplified: a run's checkpoint is one file, so an import is for models that one machine holds. `GLM.from_pretrained`
reads any size.
"""

import dataclasses
import json
import shutil
from pathlib import Path

import torch

from minglm.common.files import write_json
from minglm.config.run import to_dict
from minglm.model.glm import GLM
from minglm.model.hf.config import to_hf
from minglm.model.hf.files import DTYPES, INDEX, HFOrigin, open_folder, read_config, refuse_taken
from minglm.recipe.load import load_run
from minglm.train.checkpoint import CheckpointStore
from minglm.train.stages import phases

LARGEST_EXTRA = 100 * 2**20  # bytes of a file beside the weights: a tokenizer has 20 MB


def extras(folder):
    """The files of a released checkpoint that are neither weights nor about them."""
    about = ("config.json", INDEX)
    return [
        path
        for path in sorted(Path(folder).iterdir())
        if path.is_file()
        and path.suffix != ".safetensors"
        and path.name not in about
        and path.name[0] != "."
        if path.stat().st_size <= LARGEST_EXTRA
    ]


def import_checkpoint(run, folder, out):
    """Make a released checkpoint the result of the last stage of mid-training of a run; returns that stage's name.

    Raises ValueError, before any weight is read, where the checkpoint is not of the run's model, where it has a
    tokenizer that the run does not use, or where the stage is complete already.
    """
    folder, out = Path(folder), Path(out)
    config, files, values = open_folder(folder)
    for f in dataclasses.fields(config):
        ours, theirs = getattr(run.model, f.name), getattr(config, f.name)
        if ours != theirs and f.name not in ("initializer_range", "max_position_embeddings"):
            raise ValueError(
                f"{folder} has {f.name} = {theirs}, {run.name} {ours}; give --model.{f.name} {theirs}"
            )
    if (folder / "tokenizer.json").exists() and not run.data.tokenizer:
        raise ValueError(
            f"{folder} has a tokenizer; give --data.tokenizer {folder / 'tokenizer.json'}"
        )
    trained = phases(run)
    if not trained:
        raise ValueError(
            f"{run.name} has no stage before post-training; give --stages.long_agent.tokens 1"
        )
    stage = trained[-1].name
    if (out / "config.json").exists():
        raise ValueError(f"{out} already holds a run; choose another --out")
    model = GLM.from_pretrained(folder, torch.float32)
    for path in extras(folder):
        (out / "imported_from").mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, out / "imported_from" / path.name)
    write_json(out / "imported_from" / "config.json", values)
    write_json(out / "imported_from" / INDEX, {"weight_map": files.files})
    CheckpointStore(out).save(stage, {"model": model.state_dict(), "tokens": 0})
    write_json(
        out / "config.json", {"hash": run.hash(), "config": to_dict(run)}
    )  # last: now it is a run
    return stage


def export_checkpoint(source, out, stage=None, dtype=None, shard_gigabytes=5.0):
    """Write a run, or a released checkpoint, as a released checkpoint; returns the stage that was written.

    dtype: as `GLM.save_pretrained`; None: that of the checkpoint the run began with, otherwise as it is. Raises
    ValueError as `load_run` and `GLM.save_pretrained` do.
    """
    source, out = Path(source), Path(out)
    refuse_taken(out)
    loaded = load_run(source, stage)
    model = loaded.model
    origin = source if loaded.from_hf else source / "imported_from"
    if origin.exists():
        values = read_config(origin)
        if not loaded.from_hf:
            model.checkpoint_origin = HFOrigin(
                values, json.loads((origin / INDEX).read_text())["weight_map"]
            )
            named = values.get("torch_dtype", values.get("dtype"))
            dtype = dtype or (named if named in DTYPES else "bfloat16")
    else:
        values = to_hf(dataclasses.replace(model.config, rope_theta=model.rope_theta))
        values |= {
            "eos_token_id": list(loaded.tokenizer.stop_ids),
            "pad_token_id": loaded.tokenizer.pad,
        }
        model.checkpoint_origin = HFOrigin(values, {})
    model.config = dataclasses.replace(model.config, rope_theta=model.rope_theta)
    out.mkdir(parents=True, exist_ok=True)
    for path in extras(origin) if origin.exists() else ():
        shutil.copyfile(path, out / path.name)
    if not (out / "tokenizer.json").exists():
        loaded.tokenizer.save(out / "tokenizer.json")
    if not (out / "generation_config.json").exists():
        write_json(
            out / "generation_config.json",
            {k: v for k, v in values.items() if k.endswith("token_id")},
        )
    model.save_pretrained(out, dtype, shard_gigabytes)  # its config.json is last
    return loaded.stage
