"""Send new weights to an engine over HTTP in the way that was asked for (paper 3.5: weights to disaggregated engines).

    disk        a released checkpoint in a folder that both see; the engine reads it     vLLM, SGLang, minglm
    tensors     inside requests, bucket by bucket                                        SGLang, minglm
    broadcast   tensor by tensor, from the trainer to all GPUs of the engine             SGLang, vLLM

    POST /update_weights_from_tensor        {serialized_named_tensors: [base64, ...], load_format, flush_cache, weight_version}
    POST /init_weights_update_group         {master_address, master_port, rank_offset, world_size, group_name, backend}
    POST /update_weights_from_distributed   {names, dtypes, shapes, group_name, flush_cache, weight_version}

    POST /init_weight_transfer_engine       vLLM: {init_info: {master_address, master_port, rank_offset, world_size}}
    POST /start_weight_update               {is_checkpoint_format}, after /pause
    POST /update_weights                    {update_info: {names, dtype_names, shapes}}
    POST /finish_weight_update              and /reset_prefix_cache, /resume

The disk is in `minglm.inference.remote`; here are the other two. Fields: SGLang's `srt/managers/io_struct.py`
and `srt/entrypoints/http_server.py`, what it unpickles, `srt/utils/common.py`; vLLM's
`distributed/weight_transfer/nccl_engine.py` and `entrypoints/serve/dev/rlhf/api_router.py`. They are started
as `minglm.inference.remote` says, and vLLM with --weight-transfer-config '{"backend": "nccl"}' for the
broadcast.

Choices
- SGLang gets a pickle of names and CPU tensors for each of its tensor-parallel ranks, by their released names, as its own
  clients send it. Our server reads no pickle: it gets the bytes of a safetensors file, by the names of `GLM`.
- SGLang joins the broadcast's group by `rendezvous` and a private function of torch, which puts prefixes before the keys;
  the trainer calls the same function, so that both find one another whatever torch calls the keys.
- vLLM's broadcast is NCCL without torch.distributed, which the trainer joins by vLLM's own classes: it needs vLLM beside it.
  Its tensors in requests are handles of a GPU's memory, for a trainer on the same GPU; they are not used here.

Simplified: no request may be under way, or its tokens come from weights of two versions. The trainer's
rollouts have ended when it sends weights. Real engines on GPUs have not been run.
"""

import base64
import contextlib
import datetime
import pickle
import socket
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future
from typing import Any, Generic, Protocol, TypeVar
from urllib.parse import urlsplit

import safetensors.torch
import torch
import torch.distributed as dist
from torch import Tensor

from minglm.common.mistakes import one_line

Result = TypeVar("Result")
JSONObject = dict[str, Any]
Call = Callable[[str, str, JSONObject | None], JSONObject]
"""Calls the engine: verb, path, body -> its answer. Raises ValueError, in one line."""
Bucket = Mapping[str, Tensor]

BUCKET_BYTES = 16 * 2**20
"""Bytes of weights in one request; base64 makes a third more of them."""
TIMEOUT = datetime.timedelta(seconds=300)
"""Time that a member of a broadcast waits for the others."""


class Sender(Protocol):
    """Sends weights, bucket by bucket."""

    def send(self, buckets: Iterable[Bucket], version: str) -> None:
        """Have the engine use the tensors of some buckets. Raises ValueError, in one line, where it does not.

        version: what the engine calls its weights from now on.
        """
        ...

    def close(self) -> None:
        """Leave what was joined."""
        ...


def in_buckets(
    tensors: Iterable[tuple[str, Tensor]], most_bytes: int = BUCKET_BYTES
) -> Iterator[dict[str, Tensor]]:
    """Yield named tensors together, at most so many bytes of them, or one that is larger."""
    bucket: dict[str, Tensor] = {}
    filled = 0
    for name, tensor in tensors:
        if bucket and filled + tensor.nbytes > most_bytes:
            yield bucket
            bucket = {}
            filled = 0
        bucket[name] = tensor
        filled += tensor.nbytes
    yield bucket


class TensorSender:
    """Sends tensors inside requests.

    copies: of the payload, one for each tensor-parallel rank of SGLang; 0: one safetensors file, for our server.
    """

    def __init__(self, call: Call, copies: int = 0) -> None:
        self.call = call
        self.copies = copies

    def send(self, buckets: Iterable[Bucket], version: str) -> None:
        """Send buckets. Errors: as `Sender.send`."""
        for bucket in buckets:
            self._send(bucket, version)

    def _send(self, bucket: Bucket, version: str) -> None:
        tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in bucket.items()}
        if self.copies:
            content = pickle.dumps([*tensors.items()])
        else:
            content = safetensors.torch.save(tensors)
        body = {
            "serialized_named_tensors": [base64.b64encode(content).decode()] * (self.copies or 1),
            "load_format": None if self.copies else "safetensors",
            "flush_cache": True,
            "weight_version": version,
        }
        check(self.call("POST", "/update_weights_from_tensor", body))

    def close(self) -> None:
        """Do nothing: nothing was joined."""


class BroadcastSender:
    """Sends tensors by torch.distributed, from rank 0 of a group to SGLang's ranks.

    url: of the engine. receivers: its ranks. backend: nccl for tensors on GPUs, gloo for others.
    Raises ValueError, in one line, where the engine does not join.
    """

    def __init__(self, call: Call, url: str, receivers: int, backend: str) -> None:
        self.call = call
        self.name = "minglm_weights"
        host = own_address(url)
        size = receivers + 1
        self.store = dist.TCPStore(
            host, 0, size, is_master=True, timeout=TIMEOUT, wait_for_workers=False
        )
        body = {
            "master_address": host,
            "master_port": self.store.port,
            "rank_offset": 1,
            "world_size": size,
            "group_name": self.name,
            "backend": backend,
        }
        joining = Started(lambda: join(self.store, self.name, size, backend))
        check(call("POST", "/init_weights_update_group", body))
        self.group: dist.ProcessGroup = joining.result()

    def send(self, buckets: Iterable[Bucket], version: str) -> None:
        """Broadcast buckets, while the engine receives them. Errors: as `Sender.send`."""
        for bucket in buckets:
            self._send(bucket, version)

    def _send(self, bucket: Bucket, version: str) -> None:
        body = {
            "names": [*bucket],
            "dtypes": dtypes_of(bucket),
            "shapes": shapes_of(bucket),
            "group_name": self.name,
            "flush_cache": True,
            "weight_version": version,
        }
        sending = Started(lambda: self._broadcast(bucket))
        check(self.call("POST", "/update_weights_from_distributed", body))
        sending.result()

    def _broadcast(self, bucket: Bucket) -> None:
        for tensor in bucket.values():
            dist.broadcast(tensor.detach().contiguous(), group_src=0, group=self.group)

    def close(self) -> None:
        """Leave the group. An engine that lives on leaves it as well."""
        with contextlib.suppress(ValueError):  # it is gone, or too old to leave
            self.call("POST", "/destroy_weights_update_group", {"group_name": self.name})
        dist.destroy_process_group(self.group)


class VLLMSender:
    """Sends tensors by NCCL, from rank 0 of a group of vLLM's own to vLLM's workers.

    url: of the engine. receivers: its workers. device: of the tensors.
    Raises ValueError, in one line, without vLLM in this process, and where the engine does not join.
    """

    def __init__(self, call: Call, url: str, receivers: int, device: torch.device) -> None:
        try:
            from vllm.distributed.device_communicators.pynccl import (  # pyright: ignore[reportMissingImports]  # optional
                PyNcclCommunicator,
            )
            from vllm.distributed.utils import (  # pyright: ignore[reportMissingImports]  # optional
                StatelessProcessGroup,
            )
        except ImportError as error:
            raise ValueError(
                "rollout_weights = broadcast: vLLM's broadcast needs vLLM in the trainer's environment too "
                f"({error}); install it, or use rollout_weights = disk"
            ) from None
        self.call = call
        host, port, size = own_address(url), free_port(), receivers + 1

        def join_workers() -> Any:
            group = StatelessProcessGroup.create(host=host, port=port, rank=0, world_size=size)
            return PyNcclCommunicator(group, device=device)

        joining = Started(join_workers)
        info = {
            "master_address": host,
            "master_port": port,
            "rank_offset": 1,
            "world_size": size,
        }
        call("POST", "/init_weight_transfer_engine", {"init_info": info})
        self.group: Any = joining.result()

    def send(self, buckets: Iterable[Bucket], version: str) -> None:
        """Broadcast buckets, while the engine receives them and answers nobody. Errors: as `Sender.send`."""
        with paused(self.call):
            self.call("POST", "/start_weight_update", {"is_checkpoint_format": True})
            for bucket in buckets:
                info = {
                    "names": [*bucket],
                    "dtype_names": dtypes_of(bucket),
                    "shapes": shapes_of(bucket),
                }
                sending = Started(lambda bucket=bucket: self._broadcast(bucket))
                self.call("POST", "/update_weights", {"update_info": info})
                sending.result()
            self.call("POST", "/finish_weight_update", {})
            self.call("POST", "/reset_prefix_cache", None)

    def _broadcast(self, bucket: Bucket) -> None:
        for tensor in bucket.values():
            self.group.broadcast(tensor.detach().contiguous(), src=0)

    def close(self) -> None:
        """Let the group go."""
        self.group = None


@contextlib.contextmanager
def paused(call: Call) -> Iterator[None]:
    """Let vLLM answer nobody meanwhile.

    It answers again also where the update fails: the run stops then, and the next one sends all weights, but a
    paused engine would keep everybody waiting. Raises ValueError, in one line, where it does not pause or resume.
    """
    call("POST", "/pause?mode=keep", None)
    try:
        yield
    except BaseException:
        with contextlib.suppress(ValueError):  # the first error says why
            call("POST", "/resume", None)
        raise
    call("POST", "/resume", None)


class Started(Generic[Result]):
    """A function that runs beside a call to the engine, which takes part in it.

    Where the call fails, nobody waits for the function: its thread ends with the process.
    """

    def __init__(self, function: Callable[[], Result]) -> None:
        self.outcome: Future[Result] = Future()
        threading.Thread(target=self._run, args=(function,), daemon=True).start()

    def _run(self, function: Callable[[], Result]) -> None:
        try:
            self.outcome.set_result(function())
        except Exception as error:  # whatever it is: who waits raises it
            self.outcome.set_exception(error)

    def result(self) -> Result:
        """Wait for the function, and return its result.

        Raises ValueError, in one line, where torch gives up.
        """
        try:
            return self.outcome.result()
        except RuntimeError as error:
            raise ValueError(
                f"the broadcast of weights has ended: {one_line(str(error))}"
            ) from None


def check(answer: JSONObject) -> None:
    """Raise ValueError for the answer to an update that did not succeed."""
    if answer.get("success") is not True:
        raise ValueError(f"the engine does not take the weights: {answer.get('message')}")


def dtypes_of(bucket: Bucket) -> list[str]:
    """Return the dtypes of the tensors, as torch calls them."""
    return [str(tensor.dtype).removeprefix("torch.") for tensor in bucket.values()]


def shapes_of(bucket: Bucket) -> list[list[int]]:
    """Return the shapes of the tensors."""
    return [[*tensor.shape] for tensor in bucket.values()]


def free_port() -> int:
    """Return a port of this machine that nobody listens at."""
    with socket.socket() as probe:
        probe.bind(("", 0))
        return probe.getsockname()[1]


def own_address(url: str) -> str:
    """Return the address of this machine that the host of a URL sees."""
    found = urlsplit(url)
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.connect((found.hostname, found.port or 80))  # sends nothing
        return probe.getsockname()[0]


def join(store: dist.Store, name: str, size: int, backend: str) -> dist.ProcessGroup:
    """Return the group of a broadcast, as its rank 0, beside the groups that this process has already."""
    from torch.distributed.distributed_c10d import (
        Backend,
        GroupName,
        _new_process_group_helper,
        _world,
    )

    group, _ = _new_process_group_helper(
        size,
        0,
        [],
        Backend(backend),
        dist.PrefixStore(name, store),
        group_name=GroupName(name),
        timeout=TIMEOUT,
    )
    assert isinstance(group, dist.ProcessGroup), "rank 0 is in it"
    _world.pg_group_ranks[group] = {rank: rank for rank in range(size)}
    return group
