"""Read and write released checkpoints: folders of safetensors shards beside a config.json (no section in the paper).

Names are those of `minglm.model.hf.names`. A missing or unknown tensor and a wrong shape are found from the files'
headers, before the first weight is read.

Choices
- Streaming: one tensor is read, and copied to where it belongs; one shard is collected, and written. Memory never holds
  more than that beside the model.
- The dtype of each tensor is kept. Blocks of float8 (`NAME_scale_inv`) and float8 rows (`weight_scale`) are multiplied
  out into the dtype that config.json names; the selection bias of a router is always float32.
- All *.safetensors of a folder are read, whatever its index says: GLM-4.6 keeps the MTP layer in a separate file.
  Copies of embedding and head are compared with the originals, not loaded, and written again where they came from.
- transformers leaves the MTP layer out on loading, and therefore on saving. A folder whose config.json promises the layer
  and whose files lack it is loaded without it, with a warning; a folder with a part of it is refused.
- `model.checkpoint_origin` remembers where tensors came from, so that an unchanged model is written as the same files.
"""

import json
import math
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from minglm.common.files import atomic_path, write_json
from minglm.config import ModelConfig
from minglm.kernels.fp8 import WEIGHT_BLOCK, dequantize, quantize
from minglm.model.hf.config import from_hf, to_hf
from minglm.model.hf.names import FUSED, Entry, EntryKind, expected, goes_to_float8

INDEX = "model.safetensors.index.json"
SCALES: dict[str, tuple[int, int | None]] = {
    "weight_scale_inv": WEIGHT_BLOCK,
    "weight_scale": (1, None),
}
"""Names of float8 scales: (rows, columns) of the block that one scale serves; None: the whole row."""
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
BIAS = "e_score_correction_bias"


@dataclass(frozen=True)
class HFOrigin:
    """The released checkpoint that a model came from."""

    config: dict[str, Any]
    """Its parsed config.json."""
    files: dict[str, str]
    """The file of each tensor."""


class HFModel(Protocol):
    """The attributes of a `GLM` that reading and writing use."""

    config: ModelConfig
    dtype: torch.dtype
    checkpoint_origin: HFOrigin | None
    model: Any
    lm_head: Any

    def state_dict(self) -> dict[str, Any]:
        """Return every parameter and buffer by name."""
        ...

    def load_state_dict(
        self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False
    ) -> Any:
        """Take these values; with `assign`, these tensors themselves."""
        ...


class Header(NamedTuple):
    """Shape and dtype of a stored tensor, known before it is read."""

    shape: tuple[int, ...]
    dtype: str
    """As safetensors writes it: F32, BF16, F8_E4M3, ..."""


class OpenedCheckpoint(NamedTuple):
    """A folder whose config.json and files fit together."""

    config: ModelConfig
    files: "Files"
    values: dict[str, Any]
    """The parsed config.json."""


def read_config(folder: str | Path) -> dict[str, Any]:
    """Parse the config.json of a folder. Raises ValueError, one line, where there is none."""
    path = Path(folder) / "config.json"
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(
            f"cannot read {path}: {error.strerror}; give the folder of a released checkpoint"
        ) from None
    except ValueError as error:
        raise ValueError(f"{path}: {error}; fetch the file again") from None
    if not isinstance(values, dict):
        raise ValueError(f"{path}: not a table of names and values; fetch the file again")
    return values


def _indexed_files(index: Path) -> set[str]:
    """Return the files that an index names; none without an index."""
    if not index.exists():
        return set()
    try:
        return set(json.loads(index.read_text())["weight_map"].values())
    except (ValueError, KeyError, AttributeError) as error:
        raise ValueError(f"{index}: no weight_map in it ({error}); fetch the file again") from None


class Files:
    """The safetensors files of a folder, by tensor. Raises ValueError for a missing or damaged file or a name twice."""

    folder: Path
    files: dict[str, str]
    """The file of each tensor."""
    headers: dict[str, Header]
    """Shape and dtype of each tensor."""

    def __init__(self, folder: str | Path):
        self.folder = Path(folder)
        self.files = {}
        self.headers = {}
        paths = sorted(self.folder.glob("*.safetensors"))
        indexed = _indexed_files(self.folder / INDEX)
        missing = sorted(indexed - {path.name for path in paths})
        if missing:
            raise ValueError(
                f"{self.folder}: {missing[0]} is missing ({len(missing)} of {len(indexed)} files); fetch it again"
            )
        if not paths:
            raise ValueError(
                f"{self.folder}: no *.safetensors file; give the folder of a released checkpoint"
            )
        for path in paths:
            self._read_headers(path.name)

    def _open(self, file: str) -> Any:
        try:
            return safe_open(self.folder / file, "pt")
        except (SafetensorError, OSError) as error:
            raise ValueError(f"{self.folder / file}: {error}; fetch the file again") from None

    def _read_headers(self, file: str) -> None:
        with self._open(file) as opened:
            for name in opened.keys():  # noqa: SIM118 (not a dictionary)
                if name in self.files:
                    raise ValueError(
                        f"{self.folder}: {name} is in {self.files[name]} and in {file}"
                    )
                lazy = opened.get_slice(name)
                self.files[name] = file
                self.headers[name] = Header(tuple(lazy.get_shape()), lazy.get_dtype())

    def names(self) -> list[str]:
        """Return every tensor but scales, file by file."""
        names = [name for name in self.files if not self.is_scale(name)]
        return sorted(names, key=lambda name: (self.files[name], name))

    def is_scale(self, name: str) -> bool:
        """Return True for a tensor that is the scale of another."""
        stem, _, last = name.rpartition(".")
        return last in SCALES and f"{stem}.weight" in self.files

    def _read_stored(self, name: str) -> Tensor:
        with self._open(self.files[name]) as file:
            return file.get_tensor(name)

    def read(self, name: str) -> Tensor:
        """Read one tensor; float8 is multiplied out, to float32."""
        tensor = self._read_stored(name)
        if tensor.dtype != torch.float8_e4m3fn:
            return tensor
        for suffix, (rows, columns) in SCALES.items():
            scale_name = name.removesuffix("weight") + suffix
            if scale_name not in self.files:
                continue
            scale = self._read_stored(scale_name)
            block = (rows, columns or tensor.shape[-1])
            blocks = tuple(
                math.ceil(size / step) for size, step in zip(tensor.shape, block, strict=True)
            )
            if scale.numel() != math.prod(blocks):
                raise ValueError(
                    f"{self.folder}: {scale_name} has the shape {tuple(scale.shape)}, not {blocks}"
                )
            return dequantize(tensor, scale.view(blocks), block=block)
        raise ValueError(f"{self.folder}: {name} is float8 and has no {name}_scale_inv beside it")


def _with_fused(wanted: dict[str, Entry], stored: set[str], experts: int) -> dict[str, Entry]:
    """Replace single matrices by stacks of all experts where a file has stacks."""
    for name in stored:
        layer, _, fused = name.partition("mlp.experts.")
        if fused not in FUSED:
            continue
        stacks = {f"{layer}mlp.experts.{stack}" for stack in FUSED[fused]}
        members = {n: entry for n, entry in wanted.items() if entry.target in stacks}
        if not members:
            continue
        first = next(iter(members.values()))
        rows, columns = first.shape
        whole = Entry((experts, len(stacks) * rows, columns), name, kind=first.kind)
        wanted = {n: entry for n, entry in wanted.items() if n not in members}
        wanted[name] = whole
    return wanted


def check(files: Files, config: ModelConfig) -> ModelConfig:
    """Compare headers with the expected names. Return the config, without its MTP layer where no file has it.

    Raises ValueError, in one line, for a missing or unknown tensor or a wrong shape.
    """
    stored = set(files.names())
    wanted = _with_fused(expected(config), stored, config.n_routed_experts)
    absent = [
        name
        for name, entry in wanted.items()
        if entry.kind != EntryKind.COPY and name not in stored
    ]
    mtp_prefix = f"model.layers.{config.num_hidden_layers}."
    has_mtp = any(name.startswith(mtp_prefix) for name in stored)
    only_mtp_absent = all(wanted[name].kind == EntryKind.MTP for name in absent)
    if absent and not has_mtp and only_mtp_absent:
        reason = "config.json promises an MTP layer and no file has it; loading without"
        warnings.warn(f"{files.folder}: {reason}", stacklevel=4)
        return check(files, replace(config, num_nextn_predict_layers=0))

    unknown = sorted(stored - set(wanted))
    for problem, names in (("is missing", absent), ("is unknown", unknown)):
        if names:
            more = f", and {len(names) - 1} more" if len(names) > 1 else ""
            raise ValueError(
                f"{files.folder}: tensor {names[0]} {problem}{more}; config.json describes another model"
            )
    for name in sorted(stored):
        shape = files.headers[name].shape
        if shape != wanted[name].shape:
            raise ValueError(
                f"{files.folder}: {name} has the shape {shape}, config.json asks for {wanted[name].shape}"
            )
    return config


def open_folder(folder: str | Path) -> OpenedCheckpoint:
    """Open a checkpoint and check config.json and files against each other. No weight is read."""
    values = read_config(folder)
    config = from_hf(values, str(Path(folder) / "config.json"))
    files = Files(folder)
    return OpenedCheckpoint(check(files, config), files, values)


class Piece(NamedTuple):
    """A part of a stored tensor, and where it belongs."""

    target: str
    """The tensor of the model."""
    expert: int | None
    """The index in a stack; None: the whole target."""
    tensor: Tensor


def _pieces(name: str, tensor: Tensor, entries: dict[str, Entry]) -> Iterator[Piece]:
    """Yield everything that one tensor of a file holds."""
    if name in entries:
        yield Piece(entries[name].target, entries[name].expert, tensor)
        return
    layer, _, fused = name.partition("mlp.experts.")
    stacks = FUSED[fused]
    for stack, part in zip(stacks, tensor.chunk(len(stacks), 1), strict=True):
        yield Piece(f"{layer}mlp.experts.{stack}", None, part)


def fill(
    model: HFModel,
    files: Files,
    values: dict[str, Any],
    dtype: torch.dtype | None = None,
    device: str | torch.device = "cpu",
) -> None:
    """Read all weights into a model built on the meta device, one tensor at a time.

    dtype: of all parameters; None: each as stored, float8 as config.json says. Raises ValueError where matrices of one
    stack have several dtypes.
    """
    entries = expected(model.config)
    shapes = {name: tensor.shape for name, tensor in model.state_dict().items()}
    config_dtype = DTYPES.get(values.get("torch_dtype", values.get("dtype", "")), torch.bfloat16)
    state: dict[str, Tensor] = {}

    def kept_dtype(name: str, tensor: Tensor) -> torch.dtype:
        if BIAS in name:
            return torch.float32
        if dtype is not None:
            return dtype
        return config_dtype if files.headers[name].dtype == "F8_E4M3" else tensor.dtype

    def place(name: str) -> None:
        # A function, so that what it read is freed before the next tensor is read.
        tensor = files.read(name)
        kept = kept_dtype(name, tensor)
        for target, expert, part in _pieces(name, tensor, entries):
            if target not in state:
                state[target] = torch.empty(shapes[target], dtype=kept, device=device)
            if state[target].dtype != kept:
                raise ValueError(
                    f"{files.folder}: {name} is {kept}, other matrices of its stack {state[target].dtype}"
                )
            destination = state[target] if expert is None else state[target][expert]
            destination.copy_(part)

    copies = []
    for name in files.names():
        if name in entries and entries[name].kind == EntryKind.COPY:
            copies.append(name)
        else:
            place(name)
    for name in copies:
        original = state[entries[name].target]
        if not torch.equal(files.read(name).to(original.dtype), original.cpu()):
            warnings.warn(
                f"{files.folder}: {name} differs from {entries[name].target}, which is used",
                stacklevel=3,
            )

    if model.config.tie_word_embeddings:
        state["lm_head.weight"] = state["model.embed_tokens.weight"]
    model.load_state_dict(state, assign=True)
    if model.config.tie_word_embeddings:
        model.lm_head.weight = model.model.embed_tokens.weight
    model.dtype = model.lm_head.weight.dtype
    model.checkpoint_origin = HFOrigin(values, dict(files.files))


def _plan_files(
    sizes: dict[str, int], origin: HFOrigin | None, shard_bytes: float
) -> dict[str, str]:
    """Return {tensor: file}: the file each came from, or if any is new, shards of about `shard_bytes` in order."""
    if origin is not None and all(name in origin.files for name in sizes):
        return {name: origin.files[name] for name in sizes}
    shards: list[list[str]] = [[]]
    filled = 0
    for name, size in sizes.items():
        if shards[-1] and filled + size > shard_bytes:
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


def _stored(name: str, tensor: Tensor, dtype: str | None) -> dict[str, Tensor]:
    """Return what a file holds of one tensor: {name: tensor}; in float8 two of them."""
    if dtype == "fp8" and goes_to_float8(name):
        q, scale = quantize(tensor)
        return {name: q, f"{name}_scale_inv": scale}
    if BIAS in name:
        return {name: tensor.float()}
    if dtype == "fp8":
        kept = torch.bfloat16
    elif dtype is None:
        kept = tensor.dtype
    else:
        kept = DTYPES[dtype]
    return {name: tensor.to(kept).contiguous()}


def _bytes_per_value(dtype: str | None) -> int:
    """Return the bytes of a value, to plan shards; a tensor that is kept as it is counts as float32."""
    if dtype == "fp8":
        return 1
    return 4 if dtype is None else DTYPES[dtype].itemsize


def refuse_taken(folder: str | Path) -> None:
    """Raise ValueError for a folder that already holds a checkpoint, or anything else with a config.json."""
    if (Path(folder) / "config.json").exists():
        raise ValueError(f"{folder} already holds a checkpoint; choose another folder")


def save(
    model: HFModel, folder: str | Path, dtype: str | None = None, shard_gigabytes: float = 5.0
) -> None:
    """Write a model as a released checkpoint: shards, their index, and last config.json, which makes it complete.

    dtype: None (each tensor as it is), float32, bfloat16, float16, or fp8 (projections in blocks of float8, the rest in
    bfloat16). Raises ValueError for another dtype and for a folder that already holds a checkpoint.
    """
    folder = Path(folder)
    origin = model.checkpoint_origin
    if dtype not in (None, "fp8", *DTYPES):
        raise ValueError(f"dtype = {dtype!r}: must be one of fp8, {', '.join(DTYPES)}")
    refuse_taken(folder)
    folder.mkdir(parents=True, exist_ok=True)

    entries: dict[str, Entry] = {}
    for name, entry in expected(model.config).items():
        # Copies are written only if the checkpoint had them.
        if entry.kind != EntryKind.COPY or (origin is not None and name in origin.files):
            entries[name] = entry
    width = _bytes_per_value(dtype)
    sizes = {name: math.prod(entry.shape) * width for name, entry in entries.items()}
    file_of = _plan_files(sizes, origin, shard_gigabytes * 1e9)

    state = model.state_dict()
    written: dict[str, str] = {}
    total = 0
    for file in dict.fromkeys(file_of.values()):
        tensors: dict[str, Tensor] = {}
        for name, entry in entries.items():
            if file_of[name] != file:
                continue
            whole = state[entry.target].detach()
            tensor = whole if entry.expert is None else whole[entry.expert]
            tensors |= _stored(name, tensor.cpu(), dtype)
        with atomic_path(folder / file) as temporary:
            save_file(tensors, temporary, metadata={"format": "pt"})
        written |= dict.fromkeys(tensors, file)
        total += sum(tensor.nbytes for tensor in tensors.values())

    if len(set(written.values())) > 1:
        weight_map = dict(sorted(written.items()))
        write_json(folder / INDEX, {"metadata": {"total_size": total}, "weight_map": weight_map})
    base = None if origin is None else origin.config
    config_dtype = _config_dtype(dtype, state["lm_head.weight"])
    write_json(folder / "config.json", to_hf(model.config, base, config_dtype, dtype == "fp8"))


def _config_dtype(dtype: str | None, head_VD: Tensor) -> str:
    """Return the dtype that config.json names."""
    if dtype == "fp8":
        return "bfloat16"
    if dtype is not None:
        return dtype
    return next(name for name, value in DTYPES.items() if value == head_VD.dtype)
