"""Released checkpoints, in and out: folders of safetensors shards beside a config.json (names: `minglm.model.hf.names`).

What is missing, unknown or of the wrong shape is found from the files' headers, before the first weight is read.

Choices
- Streaming: one tensor is read, and copied to where it belongs; one shard is collected, and written. Beside the model
  there is never more than that in memory.
- The dtype of each tensor is kept. Blocks of float8 (`NAME_scale_inv`) and float8 rows (`weight_scale`) are multiplied
  out into the dtype that config.json names; the selection bias of a router is float32 always.
- All *.safetensors of a folder are read, whatever its index says: GLM-4.6 keeps the MTP layer in a file of its own.
  Copies of embedding and head are compared with the originals, not loaded, and written again where they came from.
- transformers leaves the MTP layer out on loading, and so on saving. A folder whose config.json promises the layer and
  whose files lack it is loaded without it, with a warning; a folder with a part of it is refused.
- Where tensors came from is remembered in `model.checkpoint_origin`, so that an unchanged model is written as the same files.
"""

import json
import math
import warnings
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from minglm.common.files import atomic_path, write_json
from minglm.kernels.fp8 import WEIGHT_BLOCK, dequantize, quantize
from minglm.model.hf.config import from_hf, to_hf
from minglm.model.hf.names import FUSED, Entry, expected, goes_to_float8

INDEX = "model.safetensors.index.json"
SCALES = {
    "weight_scale_inv": WEIGHT_BLOCK,
    "weight_scale": (1, None),
}  # a scale for each block, or for each row
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
BIAS = "e_score_correction_bias"


@dataclass(frozen=True)
class HFOrigin:
    """Where a model came from: its parsed config.json, and the file of each tensor."""

    config: dict
    files: dict[str, str]


def read_config(folder):
    """The parsed config.json of a folder. Raises ValueError, one line, where there is none."""
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


class Files:
    """The safetensors files of a folder, by tensor. Raises ValueError for a missing or damaged file or a name twice.

    files: {tensor: file name}; headers: {tensor: (shape, dtype as safetensors writes it)}.
    """

    def __init__(self, folder):
        self.folder, self.files, self.headers = Path(folder), {}, {}
        paths, index = sorted(self.folder.glob("*.safetensors")), self.folder / INDEX
        try:
            named = (
                set(json.loads(index.read_text())["weight_map"].values())
                if index.exists()
                else set()
            )
        except (ValueError, KeyError, AttributeError) as error:
            raise ValueError(
                f"{index}: no weight_map in it ({error}); fetch the file again"
            ) from None
        if lost := sorted(named - {path.name for path in paths}):
            raise ValueError(
                f"{self.folder}: {lost[0]} is missing ({len(lost)} of {len(named)} files); fetch it again"
            )
        if not paths:
            raise ValueError(
                f"{self.folder}: no *.safetensors file; give the folder of a released checkpoint"
            )
        for path in paths:
            with self._open(path.name) as file:
                for name in file.keys():  # noqa: SIM118 (not a dictionary)
                    if name in self.files:
                        raise ValueError(
                            f"{self.folder}: {name} is in {self.files[name]} and in {path.name}"
                        )
                    piece = file.get_slice(name)
                    self.files[name], self.headers[name] = (
                        path.name,
                        (tuple(piece.get_shape()), piece.get_dtype()),
                    )

    def _open(self, file):
        try:
            return safe_open(self.folder / file, "pt")
        except (SafetensorError, OSError) as error:
            raise ValueError(f"{self.folder / file}: {error}; fetch the file again") from None

    def names(self):
        """Every tensor but scales, file by file."""
        return sorted(
            (name for name in self.files if not self.is_scale(name)),
            key=lambda n: (self.files[n], n),
        )

    def is_scale(self, name):
        """Whether a tensor is the scale of another."""
        stem, _, last = name.rpartition(".")
        return last in SCALES and f"{stem}.weight" in self.files

    def read(self, name):
        """One tensor; float8 comes multiplied out, as float32."""
        with self._open(self.files[name]) as file:
            tensor = file.get_tensor(name)
        if tensor.dtype != torch.float8_e4m3fn:
            return tensor
        for suffix, (rows, columns) in SCALES.items():
            scale = name.removesuffix("weight") + suffix
            if scale in self.files:
                with self._open(self.files[scale]) as file:
                    found = file.get_tensor(scale)
                block = (rows, columns or tensor.shape[-1])
                blocks = tuple(math.ceil(size / part) for size, part in zip(tensor.shape, block))
                if found.numel() != math.prod(blocks):
                    raise ValueError(
                        f"{self.folder}: {scale} has the shape {tuple(found.shape)}, not {blocks}"
                    )
                return dequantize(tensor, found.view(blocks), block=block)
        raise ValueError(f"{self.folder}: {name} is float8 and has no {name}_scale_inv beside it")


def _with_fused(wanted, found, experts):
    """The expected tensors, with stacks of all experts in the place of single matrices where a file has stacks."""
    for name in found:
        layer, _, fused = name.partition("mlp.experts.")
        if fused not in FUSED:
            continue
        stacks = {f"{layer}mlp.experts.{stack}" for stack in FUSED[fused]}
        members = {n: e for n, e in wanted.items() if e.target in stacks}
        if members:
            first = next(iter(members.values()))
            shape = (experts, len(stacks) * first.shape[0], first.shape[1])
            wanted = {n: e for n, e in wanted.items() if n not in members} | {
                name: Entry(shape, name, kind=first.kind)
            }
    return wanted


def check(files, config):
    """Compare headers with the table of names. Returns the config, without its MTP layer where no file has it.

    Raises ValueError, in one line, for a missing or unknown tensor or a wrong shape.
    """
    found = set(files.names())
    wanted = _with_fused(expected(config), found, config.n_routed_experts)
    absent = [name for name, entry in wanted.items() if entry.kind != "copy" and name not in found]
    has_mtp = any(name.startswith(f"model.layers.{config.num_hidden_layers}.") for name in found)
    if absent and not has_mtp and all(wanted[name].kind == "mtp" for name in absent):
        why = "config.json promises an MTP layer and no file has it; loading without"
        warnings.warn(f"{files.folder}: {why}", stacklevel=4)
        return check(files, replace(config, num_nextn_predict_layers=0))
    unknown = sorted(found - set(wanted))
    for what, names in (("is missing", absent), ("is unknown", unknown)):
        if names:
            more = f", and {len(names) - 1} more" if len(names) > 1 else ""
            raise ValueError(
                f"{files.folder}: tensor {names[0]} {what}{more}; config.json describes another model"
            )
    for name in sorted(found):
        if (shape := files.headers[name][0]) != wanted[name].shape:
            raise ValueError(
                f"{files.folder}: {name} has the shape {shape}, config.json asks for {wanted[name].shape}"
            )
    return config


def open_folder(folder):
    """(ModelConfig, `Files`, parsed config.json) of a checkpoint, checked against each other. No weight is read."""
    values = read_config(folder)
    config = from_hf(values, str(Path(folder) / "config.json"))
    files = Files(folder)
    return check(files, config), files, values


def _places(name, tensor, entries):
    """(target, expert or None, piece) for everything that one tensor of a file holds."""
    if name in entries:
        yield entries[name].target, entries[name].expert, tensor
        return
    layer, _, fused = name.partition("mlp.experts.")
    for stack, piece in zip(FUSED[fused], tensor.chunk(len(FUSED[fused]), 1)):
        yield f"{layer}mlp.experts.{stack}", None, piece


def fill(model, files, values, dtype=None, device="cpu"):
    """Read all weights into a model built on the meta device, one tensor at a time.

    dtype: of all parameters; None: each as stored, float8 as config.json says. Raises ValueError where matrices of one
    stack have several dtypes.
    """
    entries, shapes = expected(model.config), {n: t.shape for n, t in model.state_dict().items()}
    named = DTYPES.get(values.get("torch_dtype", values.get("dtype")), torch.bfloat16)
    state, copies = {}, []

    def place(name):  # a function, so that what it read is gone before the next is read
        tensor = files.read(name)
        if dtype is not None or BIAS in name:
            kept = torch.float32 if BIAS in name else dtype
        else:
            kept = named if files.headers[name][1] == "F8_E4M3" else tensor.dtype
        for target, expert, piece in _places(name, tensor, entries):
            if target not in state:
                state[target] = torch.empty(shapes[target], dtype=kept, device=device)
            if state[target].dtype != kept:
                raise ValueError(
                    f"{files.folder}: {name} is {kept}, other matrices of its stack {state[target].dtype}"
                )
            (state[target] if expert is None else state[target][expert]).copy_(piece)

    for name in files.names():
        if name in entries and entries[name].kind == "copy":
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


def _plan_files(sizes, released, shard_bytes):
    """{tensor: file}: where each came from, or if any is new, shards of about `shard_bytes` in order."""
    if released is not None and all(name in released.files for name in sizes):
        return {name: released.files[name] for name in sizes}
    shards, filled = [[]], 0
    for name, size in sizes.items():
        if shards[-1] and filled + size > shard_bytes:
            shards.append([])
            filled = 0
        shards[-1].append(name)
        filled += size
    if len(shards) == 1:
        return dict.fromkeys(sizes, "model.safetensors")
    return {
        n: f"model-{i:05}-of-{len(shards):05}.safetensors"
        for i, shard in enumerate(shards, 1)
        for n in shard
    }


def _stored(name, tensor, dtype):
    """What a file holds of one tensor: {name: tensor}, two of them in float8."""
    if dtype == "fp8" and goes_to_float8(name):
        q, scale = quantize(tensor)
        return {name: q, f"{name}_scale_inv": scale}
    if BIAS in name:
        return {name: tensor.float()}
    kept = torch.bfloat16 if dtype == "fp8" else tensor.dtype if dtype is None else DTYPES[dtype]
    return {name: tensor.to(kept).contiguous()}


def refuse_taken(folder):
    """Raise ValueError for a folder that already holds a checkpoint, or anything else with a config.json."""
    if (Path(folder) / "config.json").exists():
        raise ValueError(f"{folder} already holds a checkpoint; choose another folder")


def save(model, folder, dtype=None, shard_gigabytes=5.0):
    """Write a model as a released checkpoint: shards, their index, and last config.json, which makes it complete.

    dtype: None (each tensor as it is), float32, bfloat16, float16, or fp8 (projections in blocks of float8, the rest in
    bfloat16). Raises ValueError for another dtype and for a folder that already holds a checkpoint.
    """
    folder, released = Path(folder), model.checkpoint_origin
    if dtype not in (None, "fp8", *DTYPES):
        raise ValueError(f"dtype = {dtype!r}: must be one of fp8, {', '.join(DTYPES)}")
    refuse_taken(folder)
    folder.mkdir(parents=True, exist_ok=True)
    state = model.state_dict()
    entries = {
        n: e
        for n, e in expected(model.config).items()
        if e.kind != "copy" or (released and n in released.files)
    }
    width = {"fp8": 1, None: 4}.get(dtype) or DTYPES[dtype].itemsize
    sizes = {name: math.prod(entry.shape) * width for name, entry in entries.items()}
    where, written, total = _plan_files(sizes, released, shard_gigabytes * 1e9), {}, 0
    for file in dict.fromkeys(where.values()):
        tensors = {}
        for name in (name for name in entries if where[name] == file):
            entry = entries[name]
            whole = state[entry.target].detach()
            tensors |= _stored(
                name, (whole if entry.expert is None else whole[entry.expert]).cpu(), dtype
            )
        with atomic_path(folder / file) as temporary:
            save_file(tensors, temporary, metadata={"format": "pt"})
        written |= dict.fromkeys(tensors, file)
        total += sum(tensor.nbytes for tensor in tensors.values())
    if len(set(written.values())) > 1:
        write_json(
            folder / INDEX,
            {"metadata": {"total_size": total}, "weight_map": dict(sorted(written.items()))},
        )
    name = (
        {v: k for k, v in DTYPES.items()}[state["lm_head.weight"].dtype] if dtype is None else dtype
    )
    name, fp8 = ("bfloat16", True) if dtype == "fp8" else (name, False)
    base = None if released is None else released.config
    write_json(folder / "config.json", to_hf(model.config, base, name, fp8))
