"""Hand new weights from the trainer to processes that roll out: through memory, a file, or a broadcast (paper 3.5).

    buckets of whole tensors -> float8 in blocks, where the config asks for it -> channel -> checksum -> state dict

Every hand-over has a version and a checksum, and a worker uses nothing that it has not checked.

    shared_memory   a safetensors file in the memory of the machine (/dev/shm), which a worker maps
    file            the same on a disk that all machines see
    broadcast       torch.distributed, bucket by bucket, from the trainer to a group of all workers

Choices
- A sharded trainer gathers a bucket at a time, so the whole model is never in its memory twice.
- Quantisation happens once, before dispatch, at every update: attention, MLP, experts and the MTP layer's, in blocks of
  128 x 128; not embeddings, norms, biases or routers (paper 3.5; slime's `quantizer_fp8.py`). A worker multiplies by the
  scales when it loads them, so its model has the values that float8 can hold, whatever its arithmetic.
- A file is written under a temporary name and moved into place, and removed when every worker has newer weights.
"""

import datetime
import json
import math
import re
import shutil
import tempfile
import zlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file
from torch import Tensor

from minglm.common.files import atomic_path, own_prefix
from minglm.kernels.fp8 import dequantize, quantize

SCALE = "_scale_inv"
"""What the name of a matrix's scales ends in, as in released float8 checkpoints."""

MATRICES = re.compile(r"\.layers\.\d+\..*(?<!eh)_(proj(_with_mqa)?\.weight|EFD|EDF)$")
"""Names of the matrices that float8 is for."""

MEMORY = Path("/dev/shm")
TIMEOUT = datetime.timedelta(seconds=60)
"""Time that a member of a broadcast waits for the others."""


class Notice(NamedTuple):
    """What a worker needs to know to fetch one version of the weights; plain values."""

    version: int
    where: Any
    """Of the channel that published it."""


Bucket = Mapping[str, Tensor]
Notify = Callable[[int, Notice], None]
"""Tells a worker, by its number, what to fetch."""


def in_float8(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return tensors with every matrix that goes to float8 replaced by its blocks and their scales."""
    found = {}
    for name, tensor in tensors.items():
        if MATRICES.search(name):
            found[name], found[name + SCALE] = quantize(tensor)
        else:
            found[name] = tensor
    return found


def decoded(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Undo `in_float8`, up to its rounding: return tensors without scales, float32 where they had some."""
    found = {}
    for name, tensor in tensors.items():
        if name.endswith(SCALE):
            continue
        scale = tensors.get(name + SCALE)
        found[name] = tensor if scale is None else dequantize(tensor, scale)
    return found


class Channel(Protocol):
    """How weights reach the workers."""

    def publish(
        self, buckets: Iterable[Bucket], version: int, workers: Sequence[int], notify: Notify
    ) -> None:
        """Let some workers fetch the weights, each of which is notified once.

        Raises RuntimeError where one of them has died meanwhile.
        """
        ...

    def close(self) -> None:
        """Release what the channel holds."""
        ...


def checksum_of(tensors: Mapping[str, Tensor]) -> int:
    """Return the CRC-32 of names and bytes."""
    value = 0
    for name in sorted(tensors):
        value = zlib.crc32(name.encode(), value)
        value = zlib.crc32(as_bytes(tensors[name]).numpy().data, value)
    return value


def as_bytes(tensor: Tensor) -> Tensor:
    """Return a tensor's bytes, uint8 (bytes,), on the CPU."""
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)


class FileChannel:
    """Weights in a file: in the memory of this machine, or in a folder that all machines see; None: in memory."""

    def __init__(self, folder: Path | None = None) -> None:
        self.is_temporary = folder is None
        if folder is None:
            memory = MEMORY if MEMORY.is_dir() else None
            folder = Path(tempfile.mkdtemp(prefix=own_prefix("weights", memory), dir=memory))
        self.folder = folder
        self.folder.mkdir(parents=True, exist_ok=True)

    def publish(
        self, buckets: Iterable[Bucket], version: int, workers: Sequence[int], notify: Notify
    ) -> None:
        """Write a file. The one before it is removed: every worker has fetched it, or died."""
        tensors: dict[str, Tensor] = {}
        for bucket in buckets:
            for name, tensor in bucket.items():
                tensors[name] = tensor.detach().to("cpu", copy=True).contiguous()
        path = self.folder / f"version-{version:08}.safetensors"
        with atomic_path(path) as temporary:
            save_file(tensors, temporary)
        notice = Notice(version, (str(path), checksum_of(tensors)))
        for worker in workers:
            notify(worker, notice)
        for old in self.folder.glob("version-*.safetensors"):
            if old != path:
                old.unlink()

    def close(self) -> None:
        """Remove the file, and the folder if the channel has made it."""
        for path in self.folder.glob("version-*.safetensors"):
            path.unlink()
        if self.is_temporary:
            shutil.rmtree(self.folder, ignore_errors=True)


class BroadcastChannel:
    """Weights from rank 0 of a process group, the trainer, to its other ranks, the workers.

    host: the trainer's address.
    """

    def __init__(self, host: str) -> None:
        self.host = host
        self.attempt = 0
        self.store = dist.TCPStore(host, 0, is_master=True, wait_for_workers=False)

    def publish(
        self, buckets: Iterable[Bucket], version: int, workers: Sequence[int], notify: Notify
    ) -> None:
        """Send bucket by bucket, to a group of these workers that lives as long.

        Errors: as `Channel.publish`.
        """
        self.attempt += 1
        size = len(workers) + 1
        for rank, worker in enumerate(workers, 1):
            notify(worker, Notice(version, (self.host, self.store.port, self.attempt, rank, size)))
        group = _join(self.store, self.attempt, 0, size)
        for bucket in buckets:
            _send(group, bucket)
        _send(group, {})

    def close(self) -> None:
        """Close the store."""
        del self.store


def fetch(notice: Notice) -> dict[str, Tensor]:
    """Return the weights of a notice, as they were published.

    Raises ValueError where the checksum differs, and RuntimeError where the broadcast ended early.
    """
    if len(notice.where) == 2:
        path, expected = notice.where
        tensors = load_file(path)
        if checksum_of(tensors) != expected:
            raise ValueError(f"{path}: the weights of version {notice.version} are damaged")
        return tensors
    host, port, attempt, rank, size = notice.where
    store = dist.TCPStore(host, port, is_master=False)
    group = _join(store, attempt, rank, size)
    tensors = {}
    while bucket := _receive(group):
        tensors |= bucket
    return tensors


def _join(
    store: dist.Store, attempt: int, rank: int, size: int
) -> Any:  # torch's stubs do not know what a group can do
    """Return the process group of one broadcast; its members all call this."""
    prefixed = dist.PrefixStore(f"weights/{attempt}", store)
    return dist.ProcessGroupGloo(prefixed, rank, size, TIMEOUT)


def _send(group: Any, bucket: Bucket) -> None:
    """Broadcast a bucket as one run of bytes, after a message that says what it holds."""
    plan = [(name, str(t.dtype).removeprefix("torch."), [*t.shape]) for name, t in bucket.items()]
    parts = [as_bytes(tensor) for tensor in bucket.values()]
    content = torch.cat(parts) if parts else torch.empty(0, dtype=torch.uint8)
    head = json.dumps([plan, len(content), zlib.crc32(content.numpy().data)]).encode()
    group.broadcast(torch.tensor([len(head)]), 0).wait()
    group.broadcast(torch.frombuffer(bytearray(head), dtype=torch.uint8), 0).wait()
    if plan:
        group.broadcast(content, 0).wait()


def _receive(group: Any) -> dict[str, Tensor]:
    """Return the next bucket; an empty one ends the weights. Raises ValueError where its checksum differs."""
    size = torch.zeros(1, dtype=torch.int64)
    group.broadcast(size, 0).wait()
    head = torch.zeros(int(size), dtype=torch.uint8)
    group.broadcast(head, 0).wait()
    plan, length, expected = json.loads(bytes(head.tolist()))
    if not plan:
        return {}
    content = torch.zeros(length, dtype=torch.uint8)
    group.broadcast(content, 0).wait()
    if zlib.crc32(content.numpy().data) != expected:
        raise ValueError(f"a bucket of weights that begins with {plan[0][0]} is damaged")
    tensors = {}
    for name, dtype_name, shape in plan:
        dtype = getattr(torch, dtype_name)
        count = math.prod(shape) * dtype.itemsize
        tensors[name] = content[:count].clone().view(dtype).reshape(shape)
        content = content[count:]
    return tensors
