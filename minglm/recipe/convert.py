"""Convert a released checkpoint to the base of a run, and a run to a released checkpoint (no section in the paper).

    released folder --import--> run of a config, complete up to the last stage of mid-training --run--> its experts, ...
    run --export--> released folder: config.json, safetensors, tokenizer.json, which vLLM, SGLang and transformers read

A run that began with an import keeps everything but the weights of the original folder in
`RUN/imported_from/`. Its exports restore the original form: the keys of config.json, names of tensors, files,
dtype, and every other file. Weights are float32 in a run, since they are trained.

No model is built: tensors go from the files of one form to those of the other, a file at a time, so one
machine converts a checkpoint of any size. Started with `torchrun`, ranks divide the files. Only a released
checkpoint that is exported again is loaded as a whole.
"""

import dataclasses
import math
import shutil
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from minglm.common.files import refuse_used, write_json
from minglm.common.ranks import Ranks, new_folder_of
from minglm.config import ModelConfig, RunConfig
from minglm.config.run import to_dict
from minglm.data.tokenizer import Tokenizer
from minglm.model.hf.config import to_hf
from minglm.model.hf.files import (
    DTYPES,
    INDEX,
    HFOrigin,
    OpenedCheckpoint,
    ReleasedWeights,
    named_dtype,
    open_folder,
    read_config,
    read_weight_map,
)
from minglm.model.hf.write import SHARD_GIGABYTES, ModelWeights, Weights, check_dtype, write
from minglm.recipe.load import choose_stage, is_released, load_hf
from minglm.train.checkpoint import CheckpointStore
from minglm.train.checkpoint_files import StoredTensors
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

    Raises ValueError, before any weight is read, where the checkpoint is not of the run's model, where it has
    a tokenizer that the run does not use, or where `out` already holds something.
    """
    folder = Path(folder)
    out = Path(out)
    opened, tokenizer, stage = check_import(run, folder, out)
    parts = import_parts(ReleasedWeights(opened, torch.float32), opened.config)
    ranks = Ranks.of_the_world()
    with new_folder_of(ranks, out) as temporary:

        def write_about() -> None:
            origin = temporary / "imported_from"
            origin.mkdir()
            for path in extra_files(folder):
                shutil.copyfile(path, origin / path.name)
            write_json(origin / "config.json", opened.values)
            write_json(origin / INDEX, {"weight_map": opened.files.files})
            if tokenizer is not None:  # the run's data, when it is built, replaces it by the same
                tokenizer.save(temporary / "data" / "tokenizer.json")
            write_json(temporary / "config.json", {"hash": run.hash(), "config": to_dict(run)})

        ranks.first(write_about)
        CheckpointStore(temporary).save_parts(stage, parts, {"tokens": 0})
    return stage


class Importable(NamedTuple):
    """A released checkpoint that a run can begin with."""

    opened: OpenedCheckpoint
    tokenizer: Tokenizer | None
    stage: str
    """The last stage of mid-training, whose result it becomes."""


def check_import(run: RunConfig, folder: Path, out: Path) -> Importable:
    """Check everything that `import_checkpoint` needs, without reading a weight.

    Raises ValueError as it does.
    """
    refuse_used(out)
    opened = open_folder(folder)
    _check_model(run, folder, opened.config)
    tokenizer = _tokenizer(run, folder)
    pretraining = phases(run)
    if not pretraining:
        raise ValueError(
            f"{run.name} has no stage before post-training; give --stages.long_agent.tokens 1"
        )
    return Importable(opened, tokenizer, pretraining[-1].name)


def import_parts(
    weights: ReleasedWeights, config: ModelConfig
) -> list[Callable[[], dict[str, Tensor]]]:
    """Divide the tensors of a model among the files of a run's checkpoint; return what reads the tensors of each."""
    files: list[list[str]] = [[]]
    filled = 0
    for name, shape in weights.shapes.items():
        size = 4 * math.prod(shape)
        if files[-1] and filled + size > SHARD_GIGABYTES * 1e9:
            files.append([])
            filled = 0
        files[-1].append(name)
        filled += size

    def read(names: list[str]) -> dict[str, Tensor]:
        tensors = {f"model.{name}": tensor for name, tensor in weights.read(names).items()}
        embedding = "model.model.embed_tokens.weight"
        if config.tie_word_embeddings and embedding in tensors:
            tensors["model.lm_head.weight"] = tensors[embedding].clone()
        return tensors

    return [partial(read, names) for names in files]


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

    dtype, shard_gigabytes: as in `GLM.save_pretrained`; dtype None: that of the released checkpoint, also
    where the run began with it, otherwise unchanged. Raises ValueError as `load_run` and
    `GLM.save_pretrained` do; then nothing is left behind.
    """
    source = Path(source)
    out = Path(out)
    check_dtype(dtype)
    refuse_used(out)
    ranks = Ranks.of_the_world()
    exported = _released(source, stage) if is_released(source) else _run(source, stage)
    values = exported.values
    dtype = dtype or exported.dtype

    with new_folder_of(ranks, out) as temporary:

        def write_about() -> None:
            for path in exported.extras:
                shutil.copyfile(path, temporary / path.name)
            if not (temporary / "tokenizer.json").exists():
                exported.tokenizer.save(temporary / "tokenizer.json")
            if not (temporary / "generation_config.json").exists():
                tokens = {key: value for key, value in values.items() if key.endswith("token_id")}
                write_json(temporary / "generation_config.json", tokens)

        ranks.first(write_about)
        write(exported.weights, temporary, dtype, shard_gigabytes, ranks)
    head = "lm_head.weight"
    written = dtype or str(exported.weights.dtype_of(head)).removeprefix("torch.")
    return Exported(exported.stage, written)


class _Source(NamedTuple):
    """What an export is made of."""

    weights: Weights
    tokenizer: Tokenizer
    stage: str
    values: dict[str, Any]
    """The config.json to begin with."""
    extras: list[Path]
    """Files that are copied."""
    dtype: str | None
    """Of the weights, where the user names none."""


def _released(folder: Path, stage: str | None) -> _Source:
    """Load a released checkpoint, to write it again."""
    loaded = load_hf(folder, stage, "cpu")
    values = read_config(folder)
    return _Source(
        weights=ModelWeights(loaded.model),
        tokenizer=loaded.tokenizer,
        stage=loaded.stage,
        values=values,
        extras=extra_files(folder),
        dtype=_original_dtype(values, in_memory=True),
    )


def _run(folder: Path, stage: str | None) -> _Source:
    """Open a stage of a run."""
    chosen = choose_stage(folder, stage)
    tokenizer = Tokenizer.load(folder / "data" / "tokenizer.json")
    config = dataclasses.replace(chosen.run.model, rope_theta=chosen.rope_theta)
    origin = folder / "imported_from"
    if origin.exists():
        values = read_config(origin)
        files = read_weight_map(origin / INDEX)
        extras = extra_files(origin)
        dtype = _original_dtype(values, in_memory=False)
    else:
        values = _new_config(config, tokenizer)
        files = {}
        extras = []
        dtype = None
    stored = CheckpointStore(folder).stored(chosen.name)
    return _Source(
        weights=RunWeights(config, HFOrigin(values, files), stored),
        tokenizer=tokenizer,
        stage=chosen.name,
        values=values,
        extras=extras,
        dtype=dtype,
    )


class RunWeights:
    """The weights of a run, which are read when they are written."""

    def __init__(self, config: ModelConfig, origin: HFOrigin, stored: StoredTensors) -> None:
        self.config = config
        self.origin: HFOrigin | None = origin
        self.dtype_of = stored.dtype_of
        self.read = stored.read


def _original_dtype(values: dict[str, Any], in_memory: bool) -> str | None:
    """Return the dtype in which a released checkpoint is written again.

    Blocks of float8 stay float8. Otherwise None, if its tensors are in memory as they were; the dtype that
    config.json names, if a run trained them in float32; bfloat16 where it names none that can be written.
    """
    quantization = values.get("quantization_config") or {}
    if quantization.get("quant_method") == "fp8":
        return "fp8"
    if in_memory:
        return None
    named = named_dtype(values)
    return named if named in DTYPES else "bfloat16"


def _new_config(config: ModelConfig, tokenizer: Tokenizer) -> dict[str, Any]:
    """Return the config.json of a model that was never released."""
    values = to_hf(config)
    values["eos_token_id"] = list(tokenizer.stop_ids)
    values["pad_token_id"] = tokenizer.pad
    return values
