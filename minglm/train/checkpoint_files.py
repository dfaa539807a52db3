"""Write and read one checkpoint: safetensors, plain values, and a checksum of each file (no section in the paper).

    FOLDER/shard-00001-model-00001-of-00001.safetensors    what rank 0 holds of the tensors
    FOLDER/shard-00002-model-00001-of-00001.safetensors    what rank 1 holds, ...
    FOLDER/state.json                                      plain values, and the checksums

`torch.distributed.checkpoint` decides which rank writes what, and finds the parts of the files that a rank
needs when it reads. What any number of ranks wrote in any layout is therefore read by any other. One process
is a world of one rank: it writes and reads in the same way.

Choices
- Names of tensors are those of parameters: `model.NAME`, and `optimizer.NAME.KEY` for the optimizer's state. They say
  nothing of the layout.
- safetensors, not pickles: reading a checkpoint runs no code.
- All ranks write into one folder, so they must see one disk.

Earlier runs have one file of torch.save, FOLDER.pt, with the same content under other names. It is read, never written.
"""

import json
import os
import warnings
import zipfile
import zlib
from collections.abc import Callable, Sequence
from functools import lru_cache, partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed.checkpoint as dcp
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import MetadataIndex
from torch.distributed.tensor import DTensor, distribute_tensor

from minglm.common.files import read_object
from minglm.common.mistakes import shown
from minglm.common.ranks import Ranks

State = dict[str, Any]
"""The plain values of a checkpoint by name: counters, the position in the data, ..."""
Tensors = dict[str, Tensor]
"""The tensors of a checkpoint by name."""
VALUES = "state.json"
BLOCK_BYTES = 2**24
OPEN_FILES = 64

# One process is no mistake.
warnings.filterwarnings("ignore", "torch.distributed is disabled", UserWarning)


def reason_of(error: BaseException) -> str:
    """Return what went wrong in one line. torch.distributed.checkpoint wraps the errors of its ranks."""
    while isinstance(error, CheckpointException) and error.failures:
        error, _ = next(iter(error.failures.values()))
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return shown((str(error) or type(error).__name__).splitlines()[0])


def weights_of(model: nn.Module) -> Tensors:
    """Return what a checkpoint holds of a model: its parameters and buffers themselves, not copies."""
    return {f"model.{name}": tensor for name, tensor in model.state_dict().items()}


def moments_of(model: nn.Module, optimizer: torch.optim.Optimizer) -> Tensors:
    """Return what a checkpoint holds of the optimizer of a model, by name of the parameter; not copies."""
    names: dict[Tensor, str] = {tensor: name for name, tensor in model.named_parameters()}
    tensors = {}
    for parameter, state in optimizer.state.items():
        for key, tensor in state.items():
            tensors[f"optimizer.{names[parameter]}.{key}"] = tensor
    return tensors


def checksum(path: Path) -> int:
    """Return the CRC-32 of a file."""
    value = 0
    with open(path, "rb") as file:
        while block := file.read(BLOCK_BYTES):
            value = zlib.crc32(block, value)
    return value


def checksum_of(value: Any) -> int:
    """Return the CRC-32 of plain values."""
    return zlib.crc32(json.dumps(value).encode())


def write(folder: Path, tensors: Tensors, values: State, ranks: Ranks) -> None:
    """Write a checkpoint of live tensors into an empty folder, which rank 0 has made; each rank writes what it holds.

    Raises ValueError or OSError, on all ranks.
    """

    def own_checksums() -> dict[str, int]:
        written = sorted(folder.glob(f"shard-{ranks.rank + 1:05}-*.safetensors"))
        return {path.name: checksum(path) for path in written}

    _check_disk(folder, ranks)
    writer = dcp.HuggingFaceStorageWriter(str(folder), save_distributed=True)
    try:
        dcp.save(tensors, storage_writer=writer, process_group=ranks.group)
    except CheckpointException as error:
        raise ValueError(reason_of(error)) from error
    _complete(folder, values, ranks.together(own_checksums), ranks)


def write_parts(
    folder: Path, parts: Sequence[Callable[[], Tensors]], values: State, ranks: Ranks
) -> None:
    """Write a checkpoint of whole tensors that need not be in memory at once: a file for each part.

    parts: make the tensors of one file; the ranks divide them. folder, errors: as in `write`.
    """

    def write_own() -> dict[str, int]:
        checksums = {}
        for number in range(ranks.rank, len(parts), ranks.size):
            path = folder / f"shard-{number + 1:05}-model-00001-of-00001.safetensors"
            save_file(parts[number](), path)
            with open(path, "rb") as file:
                os.fsync(file.fileno())
            checksums[path.name] = checksum(path)
        return checksums

    _check_disk(folder, ranks)
    _complete(folder, values, ranks.together(write_own), ranks)


def _check_disk(folder: Path, ranks: Ranks) -> None:
    def check() -> None:
        if not folder.exists():
            raise ValueError("the folder is not on a disk that all ranks see")

    ranks.together(check)


def _complete(
    folder: Path, values: State, checksums: Sequence[dict[str, int]], ranks: Ranks
) -> None:
    """Write the plain values, and the checksums of the files of each rank."""
    files: dict[str, int] = {}
    for part in checksums:
        files |= part
    content = {"values": values, "files": files, "checksum": checksum_of([values, files])}

    def write_content() -> None:
        with open(folder / VALUES, "w", encoding="utf-8") as file:
            json.dump(content, file, indent=1)
            file.flush()
            os.fsync(file.fileno())

    ranks.first(write_content)


class Content(NamedTuple):
    """What state.json holds."""

    values: State
    files: dict[str, int]
    """The checksum of each file of tensors."""


def _content(folder: Path) -> Content:
    """Return what state.json of a checkpoint holds. Raises ValueError where it is not what was written."""
    stored = read_object(folder / VALUES, "values", "files", "checksum")
    if stored["checksum"] != checksum_of([stored["values"], stored["files"]]):
        raise ValueError(f"{VALUES} is not what was written")
    return Content(stored["values"], stored["files"])


def _refused(path: Path, error: BaseException) -> ValueError:
    reason = reason_of(error)
    return ValueError(f"cannot read checkpoint {path}: {reason}; delete it to repeat its stage")


def read_values(path: Path) -> State:
    """Return the plain values of a checkpoint.

    Raises ValueError, in one line, when it is missing or damaged.
    """
    try:
        if path.suffix == ".pt":
            state = _single_file(path)
            values = {name: state[name] for name in state if name not in ("model", "optimizer")}
        else:
            values = _content(path).values
        if not isinstance(values.get("log_position"), int):
            raise ValueError("it holds no state of a stage")
        return values
    except Exception as error:  # a damaged file raises almost anything
        raise _refused(path, error) from error


def verify(path: Path, ranks: Ranks) -> None:
    """Compare the checksums of a checkpoint, each rank for a part of the files.

    Raises ValueError, in one line and on all ranks, when one differs or a file is missing.
    """

    def compare() -> None:
        if path.suffix == ".pt":
            if ranks.rank == 0:
                _verify_single_file(path)
            return
        files = _content(path).files
        for name in sorted(files)[ranks.rank :: ranks.size]:
            if checksum(path / name) != files[name]:
                raise ValueError(f"{name} is not what was written")

    try:
        ranks.together(compare)
    except Exception as error:
        raise _refused(path, error) from error


def read_tensors(path: Path, tensors: Tensors, ranks: Ranks) -> None:
    """Fill tensors, whole ones or shards, with those of the same names in a checkpoint, whose checksums are right.

    Raises ValueError, on all ranks, where one is missing or has another shape, and where the checkpoint holds
    others beside them: more layers, or more of the optimizer's state.
    """
    if path.suffix == ".pt":
        ranks.together(lambda: _fill_from_single_file(path, tensors))
        return
    reader = dcp.HuggingFaceStorageReader(str(path))
    prefixes = {name.partition(".")[0] for name in tensors}
    others = set()
    for name in reader.read_metadata().state_dict_metadata:
        if name not in tensors and name.partition(".")[0] in prefixes:
            others.add(name)
    # With a pipeline, what one rank has not is what another has.
    unknown = set.intersection(*ranks.together(lambda: others))
    if unknown:
        raise ValueError(f"{min(unknown)} is unknown")
    try:
        dcp.load(tensors, storage_reader=reader, process_group=ranks.group)
    except CheckpointException as error:
        raise ValueError(reason_of(error)) from error


class StoredTensors:
    """The tensors of a checkpoint, read one by one, however it was divided among files."""

    def __init__(self, path: Path) -> None:
        # Opening a file reads the names of all its tensors, so the last ones stay open.
        self.open = lru_cache(OPEN_FILES)(partial(safe_open, framework="pt"))
        self.single = _single_file(path)["model"] if path.suffix == ".pt" else None
        if self.single is None:
            metadata = dcp.HuggingFaceStorageReader(str(path)).read_metadata()
            self.tensors: Any = metadata.state_dict_metadata
            self.places: Any = metadata.storage_data

    def dtype_of(self, name: str) -> torch.dtype:
        """Return the dtype of a tensor of the model, without reading it."""
        if self.single is not None:
            return self.single[name].dtype
        return self.tensors[f"model.{name}"].properties.dtype

    def read(self, name: str, index: int | None = None) -> Tensor:
        """Return a tensor of the model, or one matrix of a stack."""
        if self.single is not None:
            return self.single[name] if index is None else self.single[name][index]
        key = f"model.{name}"
        stored = self.tensors[key]
        first, count = (0, stored.size[0]) if index is None else (index, 1)
        tensor = torch.empty((count, *stored.size[1:]), dtype=stored.properties.dtype)
        for chunk in stored.chunks:
            begin = max(first, chunk.offsets[0])
            end = min(first + count, chunk.offsets[0] + chunk.sizes[0])
            if begin >= end:
                continue
            place = self.places[MetadataIndex(key, chunk.offsets)]
            target = tensor[begin - first : end - first]
            for axis in range(1, tensor.ndim):
                target = target.narrow(axis, chunk.offsets[axis], chunk.sizes[axis])
            part = self.open(place.relative_path).get_slice(key)
            target.copy_(part[begin - chunk.offsets[0] : end - chunk.offsets[0]])
        return tensor if index is None else tensor[0]


def _verify_single_file(path: Path) -> None:
    """Compare the checksums that torch.save wrote, which torch.load does not."""
    with zipfile.ZipFile(path) as archive:
        damaged = archive.testzip()
    if damaged is not None:
        raise ValueError(f"{damaged} is not what was written")
    _single_file(path)


def _single_file(path: Path) -> State:
    """Return the content of a checkpoint of an earlier run. No tensor is read before it is used."""
    state = torch.load(path, map_location="cpu", weights_only=True, mmap=os.name != "nt")
    if not isinstance(state, dict):
        raise ValueError("it holds no state of a stage")
    return state


def _fill_from_single_file(path: Path, tensors: Tensors) -> None:
    """Fill tensors from a checkpoint of an earlier run, which numbers the parameters of the optimizer."""
    state = _single_file(path)
    stored = {f"model.{name}": tensor for name, tensor in state["model"].items()}
    optimizer = state.get("optimizer", {"param_groups": []})
    for group in optimizer["param_groups"]:
        for name, number in zip(group["param_names"], group["params"], strict=True):
            for key, tensor in optimizer["state"][number].items():
                stored[f"optimizer.{name}.{key}"] = tensor

    for name, tensor in tensors.items():
        if name not in stored:
            raise ValueError(f"{name} is missing")
        whole = stored[name]
        if whole.shape != tensor.shape:
            raise ValueError(
                f"{name} has the shape {tuple(whole.shape)}, not {tuple(tensor.shape)}"
            )
        if isinstance(tensor, DTensor):  # each rank takes its own part
            whole = distribute_tensor(
                whole, tensor.device_mesh, tensor.placements, src_data_rank=None
            )
        tensor.detach().copy_(whole)
