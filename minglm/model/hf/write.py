"""Write released checkpoints: safetensors shards, their index, and config.json (no section in the paper).

Streaming: one shard is collected, and written. Memory never holds more than that beside the model, which
itself may be on the disk: `Weights` is read tensor by tensor. Ranks divide the shards. Everything is written
into a new folder that takes its name when it is complete, so that no folder ever holds parts of two
checkpoints.

A sharded model has no tensor whole anywhere. `write_stream` gathers one after the other, on all ranks, and
each rank keeps those of its own files until these are full.
"""

import math
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from minglm.common.files import atomic_path, new_folder, write_json
from minglm.common.ranks import Ranks
from minglm.config import ModelConfig
from minglm.kernels.fp8 import quantize
from minglm.model.hf.config import to_hf
from minglm.model.hf.files import BIAS, DTYPES, INDEX, HFModel, HFOrigin
from minglm.model.hf.names import Entry, EntryKind, expected, goes_to_float8

SHARD_GIGABYTES = 5.0
"""Size of a file, where the checkpoint has none of its own."""


@dataclass(frozen=True)
class _Form:
    """The form in which tensors are stored."""

    dtype: str | None
    float8: frozenset[str]
    """The tensors that become blocks of float8."""

    def dtype_of(self, name: str, dtype: torch.dtype) -> torch.dtype:
        """Return the dtype in which a tensor of this dtype is stored, of a float8 one without its scales."""
        if name in self.float8:
            return torch.float8_e4m3fn
        if BIAS in name:
            return torch.float32
        if self.dtype == "fp8":
            return torch.bfloat16
        return dtype if self.dtype is None else DTYPES[self.dtype]

    def stored(self, name: str, tensor: Tensor) -> dict[str, Tensor]:
        """Return what a file holds of one tensor: {name: tensor}; in float8 two of them."""
        if name in self.float8:
            q, scale = quantize(tensor)
            return {name: q, f"{name}_scale_inv": scale}
        return {name: tensor.to(self.dtype_of(name, tensor.dtype)).contiguous()}


def _form(dtype: str | None, names: list[str], origin: HFOrigin | None) -> _Form:
    """Return the form that `dtype` asks for; float8 where the checkpoint had it, else where released ones have it."""
    if dtype != "fp8":
        return _Form(dtype, frozenset())
    had = [name for name in names if origin is not None and f"{name}_scale_inv" in origin.files]
    chosen = had or [name for name in names if goes_to_float8(name)]
    return _Form(dtype, frozenset(chosen))


def _plan_files(
    sizes: dict[str, int], origin: HFOrigin | None, shard_gigabytes: float | None
) -> dict[str, str]:
    """Return {tensor: file}: the file each came from, or if any is new or a size is given, shards in order."""
    unchanged = origin is not None and all(name in origin.files for name in sizes)
    if origin is not None and unchanged and shard_gigabytes is None:
        return {name: origin.files[name] for name in sizes}
    limit = (SHARD_GIGABYTES if shard_gigabytes is None else shard_gigabytes) * 1e9
    shards: list[list[str]] = [[]]
    filled = 0
    for name, size in sizes.items():
        if shards[-1] and filled + size > limit:
            shards.append([])
            filled = 0
        shards[-1].append(name)
        filled += size
    if len(shards) == 1:
        return dict.fromkeys(sizes, "model.safetensors")
    files = {}
    for number, shard in enumerate(shards, 1):
        for name in shard:
            files[name] = f"model-{number:05}-of-{len(shards):05}.safetensors"
    return files


def check_dtype(dtype: str | None) -> None:
    """Raise ValueError for a dtype that cannot be written."""
    if dtype not in (None, "fp8", *DTYPES):
        raise ValueError(f"dtype = {dtype!r}: must be one of fp8, {', '.join(DTYPES)}")


class Weights(Protocol):
    """What is written: the tensors of a model, in memory or read when they are wanted."""

    config: ModelConfig
    origin: HFOrigin | None
    """The released checkpoint that they came from."""

    def dtype_of(self, name: str) -> torch.dtype:
        """Return the dtype of a tensor."""
        ...

    def read(self, name: str, index: int | None = None) -> Tensor:
        """Return a tensor, or one matrix of a stack, on the CPU."""
        ...


class ModelWeights:
    """The weights of a model in memory."""

    def __init__(self, model: HFModel) -> None:
        self.config = model.config
        self.origin = model.checkpoint_origin
        self.state = model.state_dict()

    def dtype_of(self, name: str) -> torch.dtype:
        """Return the dtype of a tensor."""
        return self.state[name].dtype

    def read(self, name: str, index: int | None = None) -> Tensor:
        """Return a tensor, or one matrix of a stack, on the CPU."""
        whole = self.state[name].detach()
        return (whole if index is None else whole[index]).cpu()


def save(
    model: HFModel,
    folder: str | Path,
    dtype: str | None = None,
    shard_gigabytes: float | None = None,
) -> None:
    """Write a model as a released checkpoint in a new folder.

    dtype: None (each tensor as it is), float32, bfloat16, float16, float64, or fp8 (projections in blocks of
    float8, the rest in bfloat16). shard_gigabytes: size of a file; None: files as they came, or of 5. Raises
    ValueError for another dtype, for a folder that already holds something, and where space runs out; then
    nothing is left behind.
    """
    check_dtype(dtype)
    with new_folder(folder) as temporary:
        write(ModelWeights(model), temporary, dtype, shard_gigabytes, Ranks())


def write(
    weights: Weights,
    folder: Path,
    dtype: str | None,
    shard_gigabytes: float | None,
    ranks: Ranks,
) -> None:
    """Write what `save` writes into a folder that exists; ranks divide the files.

    Memory holds one file at a time.
    """
    origin = weights.origin
    entries = _entries(weights.config, origin)
    form = _form(dtype, list(entries), origin)
    sizes = {}
    for name, entry in entries.items():
        width = form.dtype_of(name, weights.dtype_of(entry.target)).itemsize
        sizes[name] = math.prod(entry.shape) * width
    ranks.first(lambda: _check_space(folder, sum(sizes.values())))

    in_file: dict[str, list[str]] = {}
    for name, file in _plan_files(sizes, origin, shard_gigabytes).items():
        in_file.setdefault(file, []).append(name)

    def write_own() -> list[_Written]:
        own = list(in_file.items())[ranks.rank :: ranks.size]
        return [_write_tensors(folder / file, names, entries, weights, form) for file, names in own]

    written = [file for files in ranks.together(write_own) for file in files]
    kept = weights.dtype_of(expected(weights.config)["lm_head.weight"].target)
    ranks.first(lambda: _write_about(folder, written, weights.config, origin, dtype, kept))


def write_stream(
    config: ModelConfig,
    origin: HFOrigin | None,
    weights: Mapping[str, Tensor],
    folder: Path,
    dtype: str | None,
    ranks: Ranks,
    shard_gigabytes: float = SHARD_GIGABYTES,
) -> None:
    """Write what `save` writes into a folder that exists, from tensors that come one after the other on all ranks.

    weights: the state dict of a model with this config; each tensor is asked for once, by all ranks in the
    same order. Memory holds one tensor on every rank, and one file on some.
    """
    entries = _entries(config, origin)
    form = _form(dtype, list(entries), origin)
    names_of = _names_of(entries)

    written: list[_Written] = []
    failures: list[Exception] = []
    number = 1
    filled = 0
    own: dict[str, Tensor] = {}
    dtypes: dict[str, torch.dtype] = {}

    def finish_file() -> None:
        # The others gather on: a failure is told when all is gathered.
        if own and not failures:
            try:
                written.append(_write_stored(folder / f"model-{number:05}.safetensors", own))
            except OSError as error:
                failures.append(error)
        own.clear()

    for target, whole in weights.items():
        dtypes[target] = whole.dtype
        is_own = number % ranks.size == ranks.rank
        for name in names_of.get(target, ()):
            entry = entries[name]
            tensor = whole.detach() if entry.expert is None else whole.detach()[entry.expert]
            filled += tensor.numel() * form.dtype_of(name, tensor.dtype).itemsize
            if is_own:
                own |= form.stored(name, tensor.cpu().clone())
        if filled >= shard_gigabytes * 1e9:
            finish_file()
            number += 1
            filled = 0
    finish_file()

    def own_files() -> list[_Written]:
        if failures:
            raise failures[0]
        return written

    files = [file for of_rank in ranks.together(own_files) for file in of_rank]
    kept = dtypes[expected(config)["lm_head.weight"].target]
    ranks.first(lambda: _write_about(folder, files, config, origin, dtype, kept))


def released_tensors(
    config: ModelConfig, origin: HFOrigin | None, weights: Mapping[str, Tensor], dtype: str | None
) -> Iterator[tuple[str, Tensor]]:
    """Yield (name, tensor) of all that `write_stream` writes, by the released names, in the order of `weights`."""
    entries = _entries(config, origin)
    form = _form(dtype, list(entries), origin)
    names_of = _names_of(entries)
    for target, whole in weights.items():
        for name in names_of.get(target, ()):
            expert = entries[name].expert
            tensor = whole.detach() if expert is None else whole.detach()[expert]
            yield from form.stored(name, tensor).items()


def _names_of(entries: Mapping[str, Entry]) -> dict[str, list[str]]:
    """Return the names under which each tensor of the model is stored."""
    names: dict[str, list[str]] = {}
    for name, entry in entries.items():
        names.setdefault(entry.target, []).append(name)
    return names


def _entries(config: ModelConfig, origin: HFOrigin | None) -> dict[str, Entry]:
    """Return the tensors that are written, by name: copies only if the checkpoint had them."""
    return {
        name: entry
        for name, entry in expected(config).items()
        if entry.kind != EntryKind.COPY or (origin is not None and name in origin.files)
    }


def _write_about(
    folder: Path,
    written: Sequence["_Written"],
    config: ModelConfig,
    origin: HFOrigin | None,
    dtype: str | None,
    kept: torch.dtype,
) -> None:
    """Write the index and config.json. kept: the dtype of the head, where `dtype` does not say it."""
    if [file.name for file in written] != ["model.safetensors"]:
        weight_map = {name: file.name for file in written for name in file.tensors}
        total = sum(file.size for file in written)
        content = {
            "metadata": {"total_size": total},
            "weight_map": dict(sorted(weight_map.items())),
        }
        write_json(folder / INDEX, content)
    base = None if origin is None else origin.config
    values = to_hf(config, base, _config_dtype(dtype, kept), dtype == "fp8")
    write_json(folder / "config.json", values)


class _Written(NamedTuple):
    """A file that was written."""

    name: str
    tensors: list[str]
    size: int
    """Bytes of its tensors."""


def _write_tensors(
    path: Path, names: list[str], entries: dict[str, Entry], weights: Weights, form: _Form
) -> _Written:
    """Write one file."""
    tensors: dict[str, Tensor] = {}
    for name in names:
        entry = entries[name]
        tensor = weights.read(entry.target, entry.expert)
        if entry.kind == EntryKind.COPY:  # a file may not hold one memory under two names
            tensor = tensor.clone()
        tensors |= form.stored(name, tensor)
    return _write_stored(path, tensors)


def _write_stored(path: Path, tensors: Mapping[str, Tensor]) -> _Written:
    """Write one file of tensors in the form in which they are stored."""
    _write_file(path, dict(tensors))
    return _Written(path.name, list(tensors), sum(tensor.nbytes for tensor in tensors.values()))


def _check_space(folder: Path, needed: int) -> None:
    """Raise ValueError where the file system has less room than the weights take."""
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise ValueError(
            f"{folder}: {free / 1e9:.2f} GB are free, the weights need {needed / 1e9:.2f}; free space or choose "
            "another folder"
        )


def _write_file(path: Path, tensors: dict[str, Any]) -> None:
    with atomic_path(path) as temporary:
        try:
            save_file(tensors, temporary, metadata={"format": "pt"})
        except SafetensorError as error:  # its errors are not those of Python
            raise OSError(str(error)) from error


def _config_dtype(dtype: str | None, kept: torch.dtype) -> str:
    """Return the dtype that config.json names."""
    if dtype == "fp8":
        return "bfloat16"
    if dtype is not None:
        return dtype
    return next(name for name, value in DTYPES.items() if value == kept)
