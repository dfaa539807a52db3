"""Write released checkpoints: safetensors shards, their index, and config.json (no section in the paper).

Streaming: one shard is collected, and written. Memory never holds more than that beside the model, which itself may be on
the disk: `Weights` is read tensor by tensor. Ranks divide the shards. Everything is written into a new folder that takes
its name when it is complete, so that no folder ever holds parts of two checkpoints.
"""

import math
import shutil
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

    dtype: None (each tensor as it is), float32, bfloat16, float16, float64, or fp8 (projections in blocks of float8, the
    rest in bfloat16). shard_gigabytes: size of a file; None: files as they came, or of 5. Raises ValueError for another
    dtype, for a folder that already holds something, and where space runs out; then nothing is left behind.
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
    """Write what `save` writes into a folder that exists; ranks divide the files. Memory holds one file at a time."""
    origin = weights.origin
    wanted = expected(weights.config)
    entries: dict[str, Entry] = {}
    for name, entry in wanted.items():
        # Copies are written only if the checkpoint had them.
        if entry.kind != EntryKind.COPY or (origin is not None and name in origin.files):
            entries[name] = entry
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
    head = wanted["lm_head.weight"].target
    config_dtype = _config_dtype(dtype, weights.dtype_of(head))

    def write_about() -> None:
        if len(written) > 1:
            weight_map = {name: file.name for file in written for name in file.tensors}
            total = sum(file.size for file in written)
            content = {
                "metadata": {"total_size": total},
                "weight_map": dict(sorted(weight_map.items())),
            }
            write_json(folder / INDEX, content)
        base = None if origin is None else origin.config
        write_json(
            folder / "config.json", to_hf(weights.config, base, config_dtype, dtype == "fp8")
        )

    ranks.first(write_about)


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
    _write_file(path, tensors)
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
