"""Write released checkpoints: safetensors shards, their index, and config.json (no section in the paper).

Streaming: one shard is collected, and written. Memory never holds more than that beside the model. Everything is written
into a new folder that takes its name when it is complete, so that no folder ever holds parts of two checkpoints.
"""

import math
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from minglm.common.files import atomic_path, new_folder, write_json
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

    def dtype_of(self, name: str, tensor: Tensor) -> torch.dtype:
        """Return the dtype of a stored tensor, of a float8 one without its scales."""
        if name in self.float8:
            return torch.float8_e4m3fn
        if BIAS in name:
            return torch.float32
        if self.dtype == "fp8":
            return torch.bfloat16
        return tensor.dtype if self.dtype is None else DTYPES[self.dtype]

    def stored(self, name: str, tensor: Tensor) -> dict[str, Tensor]:
        """Return what a file holds of one tensor: {name: tensor}; in float8 two of them."""
        if name in self.float8:
            q, scale = quantize(tensor)
            return {name: q, f"{name}_scale_inv": scale}
        return {name: tensor.to(self.dtype_of(name, tensor)).contiguous()}


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
        write(model, temporary, dtype, shard_gigabytes)


def write(
    model: HFModel,
    folder: Path,
    dtype: str | None = None,
    shard_gigabytes: float | None = None,
) -> None:
    """Write what `save` writes into a folder that exists."""
    origin = model.checkpoint_origin
    entries: dict[str, Entry] = {}
    for name, entry in expected(model.config).items():
        # Copies are written only if the checkpoint had them.
        if entry.kind != EntryKind.COPY or (origin is not None and name in origin.files):
            entries[name] = entry
    state = model.state_dict()
    form = _form(dtype, list(entries), origin)
    sizes = {}
    for name, entry in entries.items():
        width = form.dtype_of(name, state[entry.target]).itemsize
        sizes[name] = math.prod(entry.shape) * width
    _check_space(folder, sum(sizes.values()))

    in_file: dict[str, list[str]] = {}
    for name, file in _plan_files(sizes, origin, shard_gigabytes).items():
        in_file.setdefault(file, []).append(name)
    written: dict[str, str] = {}
    total = 0
    for file, names in in_file.items():
        tensors: dict[str, Tensor] = {}
        for name in names:
            entry = entries[name]
            whole = state[entry.target].detach()
            tensor = (whole if entry.expert is None else whole[entry.expert]).cpu()
            if entry.kind == EntryKind.COPY:  # a file may not hold one memory under two names
                tensor = tensor.clone()
            tensors |= form.stored(name, tensor)
        _write_file(folder / file, tensors)
        written |= dict.fromkeys(tensors, file)
        total += sum(tensor.nbytes for tensor in tensors.values())

    if len(in_file) > 1:
        weight_map = dict(sorted(written.items()))
        write_json(folder / INDEX, {"metadata": {"total_size": total}, "weight_map": weight_map})
    base = None if origin is None else origin.config
    config_dtype = _config_dtype(dtype, state["lm_head.weight"])
    write_json(folder / "config.json", to_hf(model.config, base, config_dtype, dtype == "fp8"))


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


def _config_dtype(dtype: str | None, head_VD: Tensor) -> str:
    """Return the dtype that config.json names."""
    if dtype == "fp8":
        return "bfloat16"
    if dtype is not None:
        return dtype
    return next(name for name, value in DTYPES.items() if value == head_VD.dtype)
