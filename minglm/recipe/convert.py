"""Convert a released checkpoint to the base of a run, and a run to a released checkpoint (no section in the paper).

    released folder --import--> run of a config, complete up to the last stage of mid-training --run--> its experts, ...
    run --export--> released folder: config.json, safetensors, tokenizer.json, which vLLM, SGLang and transformers read

A run that began with an import keeps everything but the weights of the original folder in `RUN/imported_from/`. Its
exports restore the original form: the keys of config.json, names of tensors, files, dtype, and every other file.
Weights are float32 in a run, since they are trained.

Simplified: a run's checkpoint is one file, so an import is for models that one machine holds. `GLM.from_pretrained`
reads any size.
"""

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import torch

from minglm.common.files import write_json
from minglm.config import ModelConfig, RunConfig
from minglm.config.run import to_dict
from minglm.model.glm import GLM
from minglm.model.hf.config import to_hf
from minglm.model.hf.files import DTYPES, INDEX, HFOrigin, open_folder, read_config, refuse_taken
from minglm.recipe.load import LoadedModel, load_run
from minglm.train.checkpoint import CheckpointStore
from minglm.train.stages import phases

MAX_EXTRA_BYTES = 100 * 2**20  # of a file beside the weights: a tokenizer has 20 MB
MAY_DIFFER = ("initializer_range", "max_position_embeddings")
"""Fields of the model's config that do not change its weights."""


def extra_files(folder: Path) -> list[Path]:
    """List the files of a released checkpoint that are neither weights nor their index nor the model's config."""
    extras = []
    for path in sorted(folder.iterdir()):
        is_about_weights = path.suffix == ".safetensors" or path.name in ("config.json", INDEX)
        is_hidden = path.name.startswith(".")
        if not path.is_file() or is_about_weights or is_hidden:
            continue
        if path.stat().st_size <= MAX_EXTRA_BYTES:
            extras.append(path)
    return extras


def import_checkpoint(run: RunConfig, folder: str | Path, out: str | Path) -> str:
    """Make a released checkpoint the result of the last stage of mid-training of a run; return that stage's name.

    Raises ValueError, before any weight is read, where the checkpoint is not of the run's model, where it has a
    tokenizer that the run does not use, or where `out` already holds a run.
    """
    folder = Path(folder)
    out = Path(out)
    config, files, values = open_folder(folder)
    _check_model(run, folder, config)
    tokenizer = folder / "tokenizer.json"
    if tokenizer.exists() and not run.data.tokenizer:
        raise ValueError(f"{folder} has a tokenizer; give --data.tokenizer {tokenizer}")
    pretraining = phases(run)
    if not pretraining:
        raise ValueError(
            f"{run.name} has no stage before post-training; give --stages.long_agent.tokens 1"
        )
    if (out / "config.json").exists():
        raise ValueError(f"{out} already holds a run; choose another --out")

    model = GLM.from_pretrained(folder, torch.float32)
    origin = out / "imported_from"
    origin.mkdir(parents=True, exist_ok=True)
    for path in extra_files(folder):
        shutil.copyfile(path, origin / path.name)
    write_json(origin / "config.json", values)
    write_json(origin / INDEX, {"weight_map": files.files})
    stage = pretraining[-1].name
    CheckpointStore(out).save(stage, {"model": model.state_dict(), "tokens": 0})
    # The config comes last: with it the folder is a run.
    write_json(out / "config.json", {"hash": run.hash(), "config": to_dict(run)})
    return stage


def _check_model(run: RunConfig, folder: Path, config: ModelConfig) -> None:
    """Refuse a checkpoint whose model is not the run's."""
    for field in dataclasses.fields(config):
        ours = getattr(run.model, field.name)
        theirs = getattr(config, field.name)
        if ours != theirs and field.name not in MAY_DIFFER:
            raise ValueError(
                f"{folder} has {field.name} = {theirs}, {run.name} has {ours}; give --model.{field.name} {theirs}"
            )


def export_checkpoint(
    source: str | Path,
    out: str | Path,
    stage: str | None = None,
    dtype: str | None = None,
    shard_gigabytes: float = 5.0,
) -> str:
    """Write a run, or a released checkpoint, as a released checkpoint; return the stage that was written.

    dtype: as in `GLM.save_pretrained`; None: that of the checkpoint that the run began with, otherwise unchanged.
    Raises ValueError as `load_run` and `GLM.save_pretrained` do.
    """
    source = Path(source)
    out = Path(out)
    refuse_taken(out)
    loaded = load_run(source, stage)
    model = loaded.model
    origin = source if loaded.from_hf else source / "imported_from"
    extras = []
    if origin.exists():
        values = read_config(origin)
        extras = extra_files(origin)
        if not loaded.from_hf:
            weight_map = json.loads((origin / INDEX).read_text())["weight_map"]
            model.checkpoint_origin = HFOrigin(values, weight_map)
            dtype = dtype or _original_dtype(values)
    else:
        values = _new_config(loaded)
        model.checkpoint_origin = HFOrigin(values, {})
    model.config = dataclasses.replace(model.config, rope_theta=model.rope_theta)

    out.mkdir(parents=True, exist_ok=True)
    for path in extras:
        shutil.copyfile(path, out / path.name)
    if not (out / "tokenizer.json").exists():
        loaded.tokenizer.save(out / "tokenizer.json")
    if not (out / "generation_config.json").exists():
        tokens = {key: value for key, value in values.items() if key.endswith("token_id")}
        write_json(out / "generation_config.json", tokens)
    model.save_pretrained(out, dtype, shard_gigabytes)  # writes its config.json last
    return loaded.stage


def _original_dtype(values: dict[str, Any]) -> str:
    """Return the dtype that a released config.json names; bfloat16 where it names none that can be written."""
    named = values.get("torch_dtype", values.get("dtype"))
    return named if named in DTYPES else "bfloat16"


def _new_config(loaded: LoadedModel) -> dict[str, Any]:
    """Return the config.json of a model that was never released."""
    config = dataclasses.replace(loaded.model.config, rope_theta=loaded.model.rope_theta)
    values = to_hf(config)
    values["eos_token_id"] = list(loaded.tokenizer.stop_ids)
    values["pad_token_id"] = loaded.tokenizer.pad
    return values
