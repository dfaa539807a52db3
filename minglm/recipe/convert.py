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
import shutil
import warnings
from pathlib import Path
from typing import Any, NamedTuple

import torch

from minglm.common.files import new_folder, refuse_used, write_json
from minglm.config import ModelConfig, RunConfig
from minglm.config.run import to_dict
from minglm.data.tokenizer import Tokenizer
from minglm.model.glm import GLM
from minglm.model.hf.config import to_hf
from minglm.model.hf.files import (
    DTYPES,
    INDEX,
    HFOrigin,
    named_dtype,
    open_folder,
    read_config,
    read_weight_map,
)
from minglm.model.hf.write import check_dtype, write
from minglm.recipe.load import LoadedModel, load_run
from minglm.train.checkpoint import CheckpointStore
from minglm.train.stages import phases

MAX_EXTRA_BYTES = 100 * 2**20  # of a file beside the weights: a tokenizer has 20 MB
MAY_DIFFER = ("initializer_range", "max_position_embeddings")
"""Fields of the model's config that do not change its weights."""


class Exported(NamedTuple):
    """What an export wrote."""

    stage: str
    dtype: str


def extra_files(folder: Path) -> list[Path]:
    """List the files of a released checkpoint that are neither weights nor their index nor the model's config.

    A link out of the folder is left out, with a warning: it would carry a file of this machine into an export.
    """
    extras = []
    for path in sorted(folder.iterdir()):
        is_about_weights = path.suffix == ".safetensors" or path.name in ("config.json", INDEX)
        is_hidden = path.name.startswith(".")
        if not path.is_file() or is_about_weights or is_hidden:
            continue
        if not _stays_inside(path, folder):
            warnings.warn(f"{path} is a link out of the folder; left out", stacklevel=3)
        elif path.stat().st_size <= MAX_EXTRA_BYTES:
            extras.append(path)
    return extras


def _stays_inside(path: Path, folder: Path) -> bool:
    """Return True for a file of the folder itself.

    The hub's cache keeps the files of all versions in `blobs`, and in `snapshots/VERSION` links to them: one folder.
    """
    root = folder.resolve()
    roots = [root]
    if root.parent.name == "snapshots":
        roots.append(root.parent.parent / "blobs")
    return any(path.resolve().is_relative_to(allowed) for allowed in roots)


def import_checkpoint(run: RunConfig, folder: str | Path, out: str | Path) -> str:
    """Make a released checkpoint the result of the last stage of mid-training of a run; return that stage's name.

    Raises ValueError, before any weight is read, where the checkpoint is not of the run's model, where it has a
    tokenizer that the run does not use, or where `out` already holds something.
    """
    folder = Path(folder)
    out = Path(out)
    refuse_used(out)
    with warnings.catch_warnings():  # it is opened again to be read, and warns then
        warnings.simplefilter("ignore")
        config, files, values = open_folder(folder)
    _check_model(run, folder, config)
    tokenizer = _tokenizer(run, folder)
    pretraining = phases(run)
    if not pretraining:
        raise ValueError(
            f"{run.name} has no stage before post-training; give --stages.long_agent.tokens 1"
        )

    model = GLM.from_pretrained(folder, torch.float32)
    stage = pretraining[-1].name
    with new_folder(out) as temporary:
        origin = temporary / "imported_from"
        origin.mkdir()
        for path in extra_files(folder):
            shutil.copyfile(path, origin / path.name)
        write_json(origin / "config.json", values)
        write_json(origin / INDEX, {"weight_map": files.files})
        if tokenizer is not None:  # the run's data, when it is built, replaces it by the same
            tokenizer.save(temporary / "data" / "tokenizer.json")
        CheckpointStore(temporary).save(stage, {"model": model.state_dict(), "tokens": 0})
        write_json(temporary / "config.json", {"hash": run.hash(), "config": to_dict(run)})
    return stage


def _tokenizer(run: RunConfig, folder: Path) -> Tokenizer | None:
    """Return the tokenizer of an import: the run's, which must be the checkpoint's; None where neither has one."""
    path = folder / "tokenizer.json"
    if not run.data.tokenizer:
        if path.exists():
            raise ValueError(f"{folder} has a tokenizer; give --data.tokenizer {path}")
        return None
    tokenizer = Tokenizer.load(run.data.tokenizer)
    if path.exists() and not tokenizer.same_ids(Tokenizer.load(path)):
        raise ValueError(
            f"--data.tokenizer {run.data.tokenizer}: has other ids than the tokenizer of {folder}; give "
            f"--data.tokenizer {path}"
        )
    return tokenizer


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
    shard_gigabytes: float | None = None,
) -> Exported:
    """Write a run, or a released checkpoint, as a released checkpoint; return what was written.

    dtype, shard_gigabytes: as in `GLM.save_pretrained`; dtype None: that of the released checkpoint, also where the run
    began with it, otherwise unchanged. Raises ValueError as `load_run` and `GLM.save_pretrained` do; then nothing is left
    behind.
    """
    source = Path(source)
    out = Path(out)
    check_dtype(dtype)
    refuse_used(out)
    loaded = load_run(source, stage)
    model = loaded.model
    origin = source if loaded.from_hf else source / "imported_from"
    extras = []
    if origin.exists():
        values = read_config(origin)
        extras = extra_files(origin)
        if not loaded.from_hf:
            model.checkpoint_origin = HFOrigin(values, read_weight_map(origin / INDEX))
        dtype = dtype or _original_dtype(values, loaded.from_hf)
    else:
        values = _new_config(loaded)
        model.checkpoint_origin = HFOrigin(values, {})
    model.config = dataclasses.replace(model.config, rope_theta=model.rope_theta)

    with new_folder(out) as temporary:
        for path in extras:
            shutil.copyfile(path, temporary / path.name)
        if not (temporary / "tokenizer.json").exists():
            loaded.tokenizer.save(temporary / "tokenizer.json")
        if not (temporary / "generation_config.json").exists():
            tokens = {key: value for key, value in values.items() if key.endswith("token_id")}
            write_json(temporary / "generation_config.json", tokens)
        write(model, temporary, dtype, shard_gigabytes)
    written = dtype or str(next(model.parameters()).dtype).removeprefix("torch.")
    return Exported(loaded.stage, written)


def _original_dtype(values: dict[str, Any], in_memory: bool) -> str | None:
    """Return the dtype in which a released checkpoint is written again.

    Blocks of float8 stay float8. Otherwise None, if its tensors are in memory as they were; the dtype that config.json
    names, if a run trained them in float32; bfloat16 where it names none that can be written.
    """
    quantization = values.get("quantization_config") or {}
    if quantization.get("quant_method") == "fp8":
        return "fp8"
    if in_memory:
        return None
    named = named_dtype(values)
    return named if named in DTYPES else "bfloat16"


def _new_config(loaded: LoadedModel) -> dict[str, Any]:
    """Return the config.json of a model that was never released."""
    config = dataclasses.replace(loaded.model.config, rope_theta=loaded.model.rope_theta)
    values = to_hf(config)
    values["eos_token_id"] = list(loaded.tokenizer.stop_ids)
    values["pad_token_id"] = loaded.tokenizer.pad
    return values
