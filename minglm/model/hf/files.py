"""Read released checkpoints: folders of safetensors shards beside a config.json (no section in the paper).

Names are those of `minglm.model.hf.names`. A missing or unknown tensor, a wrong shape, and a dtype or scale
that minglm does not read are found from the files' headers, before the first weight is read.

Choices
- Streaming: one tensor is read, and copied to where it belongs. Memory never holds more than that beside the model. A
  file stays open until the next one is needed, because opening it reads the names of all its tensors.
- The dtype of each tensor is kept. Float8 (`minglm.model.hf.scales`) is multiplied out into the dtype that config.json
  names; the selection bias of a router is always float32.
- All *.safetensors of a folder are read, whatever its index says: GLM-4.6 keeps the MTP layer in a separate file.
- Copies of embedding and head are compared with the originals, not loaded, and written again where they came from. A
  copy that differs is refused: the model has one tensor for both, and one of the two would be lost.
- transformers leaves the MTP layer out on loading, and therefore on saving. A folder whose config.json promises the layer
  and whose files lack it is loaded without it, and so is one whose config.json has no such layer and whose files hold
  one, both with a warning; a folder with a part of it is refused.
- `model.checkpoint_origin` remembers where tensors came from, so that an unchanged model is written as the same files.
"""

import json
import re
import warnings
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from minglm.common.files import read_text
from minglm.config import ModelConfig
from minglm.kernels.fp8 import WEIGHT_BLOCK, Block
from minglm.model.hf.config import from_hf
from minglm.model.hf.names import FUSED, Entry, EntryKind, expected
from minglm.model.hf.scales import (
    ACTIVATION_SCALES,
    FLOAT8,
    SUFFIXES,
    block_of_config,
    multiply_out,
    scale_grid,
)

INDEX = "model.safetensors.index.json"
DTYPES = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "float64": torch.float64,
}
PLAIN = ("F32", "BF16", "F16", "F64")
"""Dtypes of a file whose numbers are the weights."""
BIAS = "e_score_correction_bias"
OPEN_FILES = 4
"""Files that are open at once: that of the tensor, and those of scales that are elsewhere."""


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
        values = json.loads(read_text(path))
    except OSError as error:
        raise ValueError(
            f"cannot read {path}: {error.strerror}; give the folder of a released checkpoint"
        ) from None
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: {error}; fetch the file again") from None
    if not isinstance(values, dict):
        raise ValueError(f"{path}: not a table of names and values; fetch the file again")
    return values


def read_weight_map(index: Path) -> dict[str, str]:
    """Return {tensor: file} of an index; empty where there is none. No file is outside the folder."""
    if not index.exists():
        return {}
    try:
        weight_map = json.loads(read_text(index))["weight_map"]
    except OSError as error:
        raise ValueError(f"cannot read {index}: {error.strerror}; fetch the file again") from None
    except (ValueError, LookupError, TypeError, RecursionError) as error:
        raise ValueError(f"{index}: no weight_map in it ({error}); fetch the file again") from None
    if not isinstance(weight_map, dict):
        raise ValueError(f"{index}: weight_map is not a table; fetch the file again")
    for name, file in weight_map.items():
        if not isinstance(file, str) or Path(file).name != file:
            raise ValueError(
                f"{index}: {name} is in {file!r}: must be the name of a file of the folder"
            )
    return weight_map


class Files:
    """The safetensors files of a folder, by tensor.

    Raises ValueError for a missing or damaged file or a name twice.
    """

    folder: Path
    files: dict[str, str]
    """The file of each tensor."""
    headers: dict[str, Header]
    """Shape and dtype of each tensor."""

    def __init__(self, folder: str | Path, block: Block = WEIGHT_BLOCK):
        """Read the headers. block: (rows, columns) of a block of float8, where scales are for blocks."""
        self.folder = Path(folder)
        self.block = block
        self.files = {}
        self.headers = {}
        self._opened: dict[str, Any] = {}
        paths = sorted(self.folder.glob("*.safetensors"))
        indexed = set(read_weight_map(self.folder / INDEX).values())
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

    def _handle(self, file: str) -> Any:
        """Return an open file. Opening one costs as much as it has tensors, so the last ones stay open."""
        if file not in self._opened:
            while len(self._opened) >= OPEN_FILES:
                self._opened.pop(next(iter(self._opened)))
            try:
                self._opened[file] = safe_open(self.folder / file, "pt")
            except (SafetensorError, OSError) as error:
                raise ValueError(f"{self.folder / file}: {error}; fetch the file again") from None
        return self._opened[file]

    def _read_headers(self, file: str) -> None:
        opened = self._handle(file)
        for name in opened.keys():  # noqa: SIM118 (not a dictionary)
            if name in self.files:
                raise ValueError(f"{self.folder}: {name} is in {self.files[name]} and in {file}")
            lazy = opened.get_slice(name)
            self.files[name] = file
            self.headers[name] = Header(tuple(lazy.get_shape()), lazy.get_dtype())

    def names(self) -> list[str]:
        """Return every tensor but scales, file by file."""
        names = [name for name in self.files if not self.is_scale(name)]
        return sorted(names, key=lambda name: (self.files[name], name))

    def is_scale(self, name: str) -> bool:
        """Return True for a tensor that is the scale of another, or of its input."""
        stem, _, last = name.rpartition(".")
        if last in ACTIVATION_SCALES:
            return f"{stem}.weight" in self.files
        return any(
            name.endswith(suffix) and name.removesuffix(suffix) in self.files for suffix in SUFFIXES
        )

    def leave_out(self, names: Iterable[str]) -> None:
        """Forget tensors that are not to be read, with their scales."""
        for name in list(names):
            stem = name.removesuffix("weight")
            scales = [name + suffix for suffix in SUFFIXES]
            activations = [stem + suffix for suffix in ACTIVATION_SCALES]
            for known in (name, *scales, *activations):
                self.files.pop(known, None)
                self.headers.pop(known, None)

    def _scale_name(self, name: str) -> str | None:
        """Return the scale of a tensor; None where it has none."""
        found = [name + suffix for suffix in SUFFIXES if name + suffix in self.files]
        if len(found) > 1:
            raise ValueError(f"{self.folder}: {name} has two scales: {' and '.join(found)}")
        return found[0] if found else None

    def check_dtypes(self) -> None:
        """Raise ValueError for a tensor whose numbers minglm does not read: integers, or float8 of unknown layout."""
        for name in self.names():
            header = self.headers[name]
            scale = self._scale_name(name)
            if header.dtype not in (*PLAIN, *FLOAT8):
                raise ValueError(
                    f"{self.folder}: {name} is {header.dtype}; minglm reads {', '.join((*PLAIN, *FLOAT8))}"
                )
            if header.dtype in PLAIN and scale is not None:
                raise ValueError(
                    f"{self.folder}: {name} is {header.dtype} and has a scale, {scale}"
                )
            if header.dtype in PLAIN:
                continue
            if scale is None:
                raise ValueError(
                    f"{self.folder}: {name} is float8 and has no {name}_scale_inv beside it"
                )
            of_scale = self.headers[scale]
            if of_scale.dtype not in (*PLAIN, "F8_E8M0"):
                raise ValueError(f"{self.folder}: {scale} is {of_scale.dtype}; minglm reads floats")
            if scale_grid(header.shape, of_scale.shape, self.block) is None:
                rows, columns = self.block
                raise ValueError(
                    f"{self.folder}: {scale} has the shape {of_scale.shape}; for {name} {header.shape} minglm "
                    f"reads one scale for each block of {rows} x {columns}, row, or matrix"
                )

    def _read_stored(self, name: str) -> Tensor:
        file = self.files[name]
        try:
            return self._handle(file).get_tensor(name)
        except (SafetensorError, OSError) as error:
            raise ValueError(f"{self.folder / file}: {error}; fetch the file again") from None

    def read(self, name: str) -> Tensor:
        """Read one tensor, as `check_dtypes` accepts it; float8 is multiplied out, to float32."""
        tensor = self._read_stored(name)
        scale = self._scale_name(name)
        if scale is None:
            return tensor
        return multiply_out(tensor, self._read_stored(scale), self.block)


def _with_fused(wanted: dict[str, Entry], stored: set[str], experts: int) -> dict[str, Entry]:
    """Replace single matrices by stacks of all experts where a file has stacks."""
    by_target: dict[str, list[str]] = {}
    for name, entry in wanted.items():
        by_target.setdefault(entry.target, []).append(name)
    wanted = dict(wanted)
    for name in stored:
        layer, _, fused = name.partition("mlp.experts.")
        if fused not in FUSED:
            continue
        stacks = [f"{layer}mlp.experts.{stack}" for stack in FUSED[fused]]
        members = [member for stack in stacks for member in by_target.get(stack, [])]
        if not members:
            continue
        first = wanted[members[0]]
        for member in members:
            del wanted[member]
        rows, columns = first.shape
        wanted[name] = Entry((experts, len(stacks) * rows, columns), name, kind=first.kind)
    return wanted


LAYER = re.compile(r"model\.layers\.(\d+)\.")


def _layer_of(name: str) -> int:
    """Return the number of a tensor's layer; -1 outside the layers."""
    found = LAYER.match(name)
    return int(found[1]) if found else -1


def _check_writer(files: Files) -> None:
    """Refuse names of another writer with a word on what they are."""
    for name in files.files:
        prefix, found, _ = name.partition("embed_tokens.weight")
        if found and prefix != "model." and _layer_of(name) < 0:
            raise ValueError(
                f"{files.folder}: the embedding is called {name}, not model.embed_tokens.weight: this is a part of a "
                "larger model, or an unfinished conversion; export the language model with the tool that wrote it"
            )
        if name.endswith("rotary_emb.inv_freq"):
            raise ValueError(
                f"{files.folder}: {name} is written by old tools; minglm computes it; remove it from the file"
            )


def _settle_mtp(files: Files, config: ModelConfig) -> ModelConfig:
    """Leave the MTP layer out, with a warning, where config.json or the files have none."""
    layers = config.num_hidden_layers
    beyond = [name for name in files.names() if _layer_of(name) >= layers]
    if config.num_nextn_predict_layers and not beyond:
        reason = "config.json promises an MTP layer and no file has it; loading without"
        warnings.warn(f"{files.folder}: {reason}", stacklevel=5)
        return replace(config, num_nextn_predict_layers=0)
    if not config.num_nextn_predict_layers and f"model.layers.{layers}.eh_proj.weight" in beyond:
        reason = "the files hold an MTP layer and config.json has none; loading without"
        warnings.warn(f"{files.folder}: {reason}", stacklevel=5)
        files.leave_out(beyond)
    return config


def _check_layers(files: Files, config: ModelConfig) -> None:
    """Refuse more layers than the headers name, before anything is made for each."""
    found = len({_layer_of(name) for name in files.files} - {-1})
    if config.num_hidden_layers > found:
        raise ValueError(
            f"{files.folder}: config.json has num_hidden_layers = {config.num_hidden_layers}, the files have {found}"
        )


def _check_experts(files: Files, config: ModelConfig) -> None:
    """Refuse another number of experts than the routers have, before a name is made for each."""
    routers = [name for name in files.files if name.endswith(".mlp.gate.weight")]
    for name in routers:
        _check_shape(files, name, (config.n_routed_experts, config.hidden_size))
    has_experts = config.first_k_dense_replace < config.num_hidden_layers
    if not routers and (has_experts or config.num_nextn_predict_layers):
        raise ValueError(f"{files.folder}: no layer has a router (mlp.gate.weight)")


def _check_shape(files: Files, name: str, wanted: tuple[int, ...]) -> None:
    shape = files.headers[name].shape
    if shape != wanted:
        raise ValueError(
            f"{files.folder}: {name} has the shape {shape}, config.json asks for {wanted}"
        )


def check(files: Files, config: ModelConfig) -> ModelConfig:
    """Compare headers with the expected names. Return the config, without its MTP layer where no file has it.

    Raises ValueError, in one line, for a missing or unknown tensor, a wrong shape, or numbers that are not read.
    """
    _check_writer(files)
    _check_layers(files, config)
    config = _settle_mtp(files, config)
    _check_experts(files, config)
    wanted = expected(config)
    # Without shared experts some tools write theirs as matrices of no rows.
    files.leave_out(
        [name for name in files.names() if name not in wanted and 0 in files.headers[name].shape]
    )
    stored = set(files.names())
    wanted = _with_fused(wanted, stored, config.n_routed_experts)
    absent = [
        name
        for name, entry in wanted.items()
        if entry.kind != EntryKind.COPY and name not in stored
    ]
    unknown = sorted(stored - set(wanted))
    for problem, names in (("is missing", absent), ("is unknown", unknown)):
        if names:
            more = f", and {len(names) - 1} more" if len(names) > 1 else ""
            raise ValueError(
                f"{files.folder}: tensor {names[0]} {problem}{more}; config.json describes another model"
            )
    for name in sorted(stored):
        _check_shape(files, name, wanted[name].shape)
    files.check_dtypes()
    return config


def open_folder(folder: str | Path) -> OpenedCheckpoint:
    """Open a checkpoint and check config.json and files against each other. No weight is read."""
    values = read_config(folder)
    where = str(Path(folder) / "config.json")
    config = from_hf(values, where)
    files = Files(folder, block_of_config(values, where))
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


def named_dtype(values: Mapping[str, Any]) -> str:
    """Return the dtype that a config.json names; empty where it names none."""
    return str(values.get("torch_dtype") or values.get("dtype") or "")


class ReleasedWeights:
    """The weights of an opened checkpoint, as the tensors of the model.

    dtype: of all parameters; None: each as stored, float8 as config.json says.
    """

    def __init__(self, opened: OpenedCheckpoint, dtype: torch.dtype | None = None) -> None:
        self.files = opened.files
        self.dtype = dtype
        self.config_dtype = DTYPES.get(named_dtype(opened.values), torch.bfloat16)
        self.entries = expected(opened.config)
        self.shapes: dict[str, tuple[int, ...]] = {}
        for entry in self.entries.values():
            stack = () if entry.expert is None else (opened.config.n_routed_experts,)
            self.shapes[entry.target] = (*stack, *entry.shape)

    def kept_dtype(self, name: str, stored: torch.dtype) -> torch.dtype:
        """Return the dtype in which a tensor of a file is kept."""
        if BIAS in name:
            return torch.float32
        if self.dtype is not None:
            return self.dtype
        return self.config_dtype if self.files.headers[name].dtype in FLOAT8 else stored

    def targets_of(self, name: str) -> list[str]:
        """Return the tensors of the model that a tensor of a file belongs to."""
        if name in self.entries:
            return [self.entries[name].target]
        layer, _, fused = name.partition("mlp.experts.")
        return [f"{layer}mlp.experts.{stack}" for stack in FUSED[fused]]

    def read(
        self, targets: Collection[str], device: str | torch.device = "cpu"
    ) -> dict[str, Tensor]:
        """Read some tensors of the model, one tensor of a file at a time.

        Raises ValueError where matrices of one stack have several dtypes, and where a copy differs from its original.
        """
        state: dict[str, Tensor] = {}
        copies = []
        for name in self.files.names():
            if not any(target in targets for target in self.targets_of(name)):
                continue
            if name in self.entries and self.entries[name].kind == EntryKind.COPY:
                copies.append(name)
            else:
                self._place(name, state, targets, device)
        for name in copies:
            self._compare(name, state[self.entries[name].target])
        return state

    def _place(
        self,
        name: str,
        state: dict[str, Tensor],
        targets: Collection[str],
        device: str | torch.device,
    ) -> None:
        """Copy one tensor of a file to where it belongs; it is freed before the next one is read."""
        tensor = self.files.read(name)
        kept = self.kept_dtype(name, tensor.dtype)
        for target, expert, part in _pieces(name, tensor, self.entries):
            if target not in targets:
                continue
            if target not in state:
                state[target] = torch.empty(self.shapes[target], dtype=kept, device=device)
            if state[target].dtype != kept:
                raise ValueError(
                    f"{self.files.folder}: {name} is {kept}, other matrices of its stack {state[target].dtype}"
                )
            destination = state[target] if expert is None else state[target][expert]
            destination.copy_(part)

    def _compare(self, name: str, original: Tensor) -> None:
        """Refuse a copy that differs from its original."""
        if torch.equal(self.files.read(name).to(original.dtype), original.cpu()):
            return
        remedy = "num_nextn_predict_layers to 0 to load without the MTP layer"
        if _layer_of(name) < 0:
            remedy = "tie_word_embeddings to false"
        raise ValueError(
            f"{self.files.folder}: {name} differs from {self.entries[name].target}, and minglm has one tensor for both; "
            f"set in config.json {remedy}"
        )


def fill(
    model: HFModel,
    opened: OpenedCheckpoint,
    dtype: torch.dtype | None = None,
    device: str | torch.device = "cpu",
) -> None:
    """Read all weights into a model built on the meta device. dtype, errors: as in `ReleasedWeights`."""
    weights = ReleasedWeights(opened, dtype)
    state = weights.read(weights.shapes, device)
    if model.config.tie_word_embeddings:
        state["lm_head.weight"] = state["model.embed_tokens.weight"]
    model.load_state_dict(state, assign=True)
    if model.config.tie_word_embeddings:
        model.lm_head.weight = model.model.embed_tokens.weight
    model.dtype = model.lm_head.weight.dtype
    model.checkpoint_origin = HFOrigin(opened.values, dict(opened.files.files))
