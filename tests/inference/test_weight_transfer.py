"""Weights without a disk: inside requests, and by broadcast to processes that join as SGLang's do; every field is checked."""

import asyncio
import base64
import io
import json
import multiprocessing
import pickle
import queue
import sys
import types

import pytest
import safetensors.torch
import torch
import torch.distributed as dist
from helpers.serving import running
from helpers.world import PRELOADED
from hypothesis import given
from hypothesis import strategies as st
from inference.test_remote import ASKED, TOKENIZER, Fake, failing, served, spoiled
from torch.distributed.distributed_c10d import (
    Backend,
    _new_process_group_helper,
    _world,
    default_pg_timeout,
    rendezvous,
)

from minglm.config.run import WeightTransfer
from minglm.inference import Engine, weight_transfer
from minglm.inference.client import EngineGenerator
from minglm.inference.remote import RemoteGenerator
from minglm.inference.weight_transfer import in_buckets
from minglm.testing.model import tiny_model

RANKS = 2
"""Of the fake engine, tensor-parallel."""


class AllowingUnpickler(pickle.Unpickler):
    """Reads what SGLang's own reads: names of torch and of plain containers."""

    def find_class(self, module, name):
        """Return a class or a function, if it is allowed."""
        assert module.split(".")[0] in ("torch", "collections"), f"{module}.{name}"
        return super().find_class(module, name)


def be_a_rank(connection, asked, rank):
    """Be a rank of the engine: join the group as SGLang does, and receive until there is no more to receive."""
    address = f"tcp://{asked['master_address']}:{asked['master_port']}"
    size, name = asked["world_size"], asked["group_name"]
    store, _, _ = next(rendezvous(address, rank, size))
    prefixed = dist.PrefixStore(name, store)
    backend = Backend(asked["backend"])
    group, _ = _new_process_group_helper(
        size, rank, [], backend, prefixed, group_name=name, timeout=default_pg_timeout
    )
    _world.pg_group_ranks[group] = {number: number for number in range(size)}
    connection.send("joined")
    while asked := connection.recv():
        found = {}
        rows = zip(asked["names"], asked["dtypes"], asked["shapes"], strict=True)
        for name, dtype, shape in rows:
            tensor = torch.empty(shape, dtype=getattr(torch, dtype))
            dist.broadcast(tensor, src=0, group=group)
            found[name] = tensor.numpy()
        connection.send(found)


class FakeSGLang(Fake):
    """The fake of SGLang's protocol, with the endpoints that take weights without a disk."""

    def __init__(self, change=lambda path, answer: answer):
        super().__init__("sglang", change)
        self.received = {}
        self.ranks = []

    def answer(self, path, body):
        """Return what the engine says, None for an unknown path."""
        if path == "/get_server_info":
            return {"tp_size": RANKS, "model_path": "somewhere"}
        if path == "/update_weights_from_tensor":
            payloads = body.pop("serialized_named_tensors")
            assert body == {
                "load_format": None,
                "flush_cache": True,
                "weight_version": body["weight_version"],
            }
            assert len(payloads) == RANKS
            for payload in payloads:
                named = AllowingUnpickler(io.BytesIO(base64.b64decode(payload))).load()
                self.received |= dict(named)
            return self.updated(body)
        if path == "/init_weights_update_group":
            fields = {"master_address", "master_port", "rank_offset", "world_size"}
            assert body.keys() == fields | {"group_name", "backend"}
            assert body["rank_offset"] == 1 and body["world_size"] == 1 + RANKS
            self.start(body)
            return {"success": True, "message": "Succeeded"}
        if path == "/update_weights_from_distributed":
            assert body.keys() == {
                *("names", "dtypes", "shapes"),
                *("group_name", "flush_cache", "weight_version"),
            }
            for connection in self.ranks:
                connection.send(body)
            for connection in self.ranks:
                arrays = connection.recv()
                self.received |= {name: torch.from_numpy(a) for name, a in arrays.items()}
            return self.updated(body)
        if path == "/destroy_weights_update_group":
            for connection in self.ranks:
                connection.send(None)
            return {"success": True, "message": "Succeeded"}
        return super().answer(path, body)

    def start(self, body):
        """Start the ranks, and wait until they have joined."""
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(PRELOADED)
        for rank in range(RANKS):
            ours, theirs = context.Pipe()
            target = (theirs, body, body["rank_offset"] + rank)
            context.Process(target=be_a_rank, args=target, daemon=True).start()
            self.ranks.append(ours)
        for connection in self.ranks:
            assert connection.poll(60) and connection.recv() == "joined"

    def updated(self, body):
        """Return the answer to an update."""
        self.version = body["weight_version"]
        return {"success": True, "message": "Success"}


@pytest.fixture(scope="module")
def model():
    """Return a tiny model whose vocabulary is the tokenizer's."""
    return tiny_model(0, vocab_size=TOKENIZER.vocab_size)


def released(weights, folder):
    """Return the tensors of a released checkpoint with these weights, as they are written to a disk."""
    model = tiny_model(0, vocab_size=TOKENIZER.vocab_size)
    model.load_state_dict(weights)
    model.save_pretrained(folder)
    return safetensors.torch.load_file(folder / "model.safetensors")


def same(ours, theirs):
    """Return whether named tensors are equal to the bit, names and dtypes included."""
    return ours.keys() == theirs.keys() and all(
        ours[name].dtype == tensor.dtype and torch.equal(ours[name], tensor)
        for name, tensor in theirs.items()
    )


@pytest.mark.parametrize("transfer", [WeightTransfer.TENSORS, WeightTransfer.BROADCAST])
def test_sglang_gets_the_tensors_of_a_checkpoint(tmp_path, model, transfer, monkeypatch):
    """Each rank has them, after each update and in several buckets, without any file; answers name their version."""
    monkeypatch.setattr(weight_transfer.in_buckets, "__defaults__", (2**14,))
    fake = FakeSGLang()
    with served(fake) as url:
        folder = tmp_path / "weights"
        generator = RemoteGenerator(url, model, TOKENIZER, folder, transfer=transfer)
        first = dict(fake.received)
        changed = {name: tensor + 1 for name, tensor in model.state_dict().items()}
        generator.update_weights(changed, 3)
        assert asyncio.run(generator.generate(ASKED)).versions == [3, 3]
        generator.close()
        assert not folder.exists()
    assert same(first, released(model.state_dict(), tmp_path / "first"))
    assert same(fake.received, released(changed, tmp_path / "second"))
    assert sum("/update_weights" in path for _, path, _ in fake.asked) > 4, "several buckets"


class FakeVLLM(Fake):
    """The fake of vLLM's protocol, with the endpoints of its broadcast; `wire` is what NCCL would carry."""

    def __init__(self, wire, change=lambda path, answer: answer):
        super().__init__("vllm", change)
        self.wire = wire
        self.received = {}
        self.port = None

    def answer(self, path, body):
        """Return what the engine says, None for an unknown path."""
        if path == "/get_world_size":
            return {"world_size": RANKS}
        if path == "/init_weight_transfer_engine":
            info = body["init_info"]
            assert body.keys() == {"init_info"}
            assert info.keys() == {"master_address", "master_port", "rank_offset", "world_size"}
            assert (info["rank_offset"], info["world_size"]) == (1, 1 + RANKS)
            assert self.wire.get(timeout=60) == (info["master_address"], info["master_port"])
            return {"message": "Weight transfer initialized"}
        if path == "/start_weight_update":
            assert body == {"is_checkpoint_format": True}
            return {"message": "Weight update started"}
        if path == "/update_weights":
            info = body["update_info"]
            assert body.keys() == {"update_info"}
            assert info.keys() == {"names", "dtype_names", "shapes"}
            rows = zip(info["names"], info["dtype_names"], info["shapes"], strict=True)
            for name, dtype, shape in rows:
                tensor = self.wire.get(timeout=60)
                assert ([*tensor.shape], tensor.dtype) == (shape, getattr(torch, dtype))
                self.received[name] = tensor.clone()
            return {"message": "Weights updated"}
        if path == "/finish_weight_update":
            return {"message": "Weight update finished"}
        return super().answer(path, body)


def fake_vllm(wire, monkeypatch):
    """Let this process have the two classes of vLLM that a trainer joins its workers by."""

    class StatelessProcessGroup:
        @staticmethod
        def create(host, port, rank, world_size):
            assert (rank, world_size) == (0, 1 + RANKS)
            return host, port

    class PyNcclCommunicator:
        def __init__(self, group, device):
            assert device == torch.device("cpu")
            wire.put(group)

        def broadcast(self, tensor, src):
            assert src == 0 and tensor.is_contiguous()
            wire.put(tensor)

    contents = {
        "vllm": {},
        "vllm.distributed": {},
        "vllm.distributed.device_communicators": {},
        "vllm.distributed.device_communicators.pynccl": {"PyNcclCommunicator": PyNcclCommunicator},
        "vllm.distributed.utils": {"StatelessProcessGroup": StatelessProcessGroup},
    }
    for name, values in contents.items():
        module = types.ModuleType(name)
        module.__dict__.update(values)
        monkeypatch.setitem(sys.modules, name, module)


def test_vllm_gets_the_tensors_of_a_checkpoint(tmp_path, model, monkeypatch):
    """What the trainer broadcasts is what the requests announce, while the engine is paused; without vLLM it says so."""
    monkeypatch.setattr(weight_transfer.in_buckets, "__defaults__", (2**14,))
    broadcast = WeightTransfer.BROADCAST
    wire = queue.Queue()
    fake = FakeVLLM(wire)
    folder = tmp_path / "weights"
    with served(fake) as url:
        with pytest.raises(ValueError, match="needs vLLM in the trainer's environment too"):
            RemoteGenerator(url, model, TOKENIZER, folder, transfer=broadcast)
        fake_vllm(wire, monkeypatch)
        generator = RemoteGenerator(url, model, TOKENIZER, folder, transfer=broadcast)
        first = dict(fake.received)
        changed = {name: tensor + 1 for name, tensor in model.state_dict().items()}
        generator.update_weights(changed, 3)
        assert asyncio.run(generator.generate(ASKED)).versions == [3, 3]
        generator.close()
    assert same(first, released(model.state_dict(), tmp_path / "first"))
    assert same(fake.received, released(changed, tmp_path / "second"))
    paths = [path for _, path, _ in fake.asked]
    first_update = paths[paths.index("/pause?mode=keep") : paths.index("/resume") + 1]
    middle = first_update[2:-3]
    assert len(middle) > 1 and set(middle) == {"/update_weights"}
    assert first_update[:2] == ["/pause?mode=keep", "/start_weight_update"]
    assert first_update[-3:] == ["/finish_weight_update", "/reset_prefix_cache", "/resume"]


@pytest.mark.parametrize(
    "path",
    ["/start_weight_update", "/update_weights", "/finish_weight_update", "/reset_prefix_cache"],
)
def test_a_failed_broadcast_leaves_no_engine_paused(tmp_path, model, monkeypatch, path):
    """vLLM is resumed after a failure at any point, and the error says where that was."""
    wire = queue.Queue()
    fake_vllm(wire, monkeypatch)
    fake = FakeVLLM(wire, failing(path))
    broadcast = WeightTransfer.BROADCAST
    with served(fake) as url, pytest.raises(ValueError, match=f"{path} has status 500"):
        RemoteGenerator(url, model, TOKENIZER, tmp_path, transfer=broadcast)
    asked = [path for _, path, _ in fake.asked]
    assert "/pause?mode=keep" in asked and asked[-2:] == [path, "/resume"]


@given(sizes=st.lists(st.integers(0, 40), min_size=1), most=st.integers(1, 100))
def test_buckets_hold_everything_once_and_in_order(sizes, most):
    """No bucket of two or more tensors is larger than the bound, and none could have had the first of the next."""
    named = [(str(number), torch.zeros(size)) for number, size in enumerate(sizes)]
    found = [*in_buckets(named, most)]
    assert [name for bucket in found for name in bucket] == [name for name, _ in named]
    filled = [sum(tensor.nbytes for tensor in bucket.values()) for bucket in found]
    assert all(size <= most or len(bucket) == 1 for size, bucket in zip(filled, found))
    for size, following in zip(filled, found[1:]):
        assert size + next(iter(following.values())).nbytes > most


WRONG = [
    (Fake("vllm"), WeightTransfer.TENSORS, "tensors: vllm, which answers .* takes no such weights"),
    (Fake("minglm"), WeightTransfer.BROADCAST, "broadcast: minglm, which answers"),
    (
        FakeSGLang(spoiled("/get_server_info", tp_size=None)),
        WeightTransfer.TENSORS,
        "does not say its tp_size",
    ),
    (
        FakeSGLang(spoiled("/update_weights_from_tensor", success=False, message="no parameter x")),
        WeightTransfer.TENSORS,
        "does not take the weights: no parameter x",
    ),
    (
        FakeSGLang(spoiled("/update_weights_from_distributed", success=False, message="no group")),
        WeightTransfer.BROADCAST,
        "does not take the weights: no group",
    ),
]


@pytest.mark.parametrize(("fake", "transfer", "message"), WRONG)
def test_an_engine_that_takes_no_such_weights_is_refused(tmp_path, model, fake, transfer, message):
    """In one line, which names the engine; a disk is the remedy where the engine knows no other way."""
    with served(fake) as url, pytest.raises(ValueError, match=message) as raised:
        RemoteGenerator(url, model, TOKENIZER, tmp_path, transfer=transfer)
    assert "\n" not in str(raised.value) and url in str(raised.value)
    for connection in getattr(fake, "ranks", []):
        connection.send(None)
    for group in [group for group, name in _world.pg_names.items() if name == "minglm_weights"]:
        dist.destroy_process_group(group)


def test_our_own_server_takes_tensors(tmp_path, model, monkeypatch):
    """Answers are those of an engine of the run, before and after new weights; what it cannot use changes nothing."""
    monkeypatch.setattr(weight_transfer.in_buckets, "__defaults__", (2**14,))
    engine = Engine(tiny_model(5, vocab_size=TOKENIZER.vocab_size), TOKENIZER)

    def take(tensors):
        engine.update_weights(tensors, partial=True)

    local = EngineGenerator(Engine(model, TOKENIZER))
    with running(engine, limit=64, take_weights=take) as (http, _, _):
        url = str(http.base_url)
        folder = tmp_path / "weights"
        generator = RemoteGenerator(url, model, TOKENIZER, folder, transfer=WeightTransfer.TENSORS)
        assert asyncio.run(generator.generate(ASKED)) == asyncio.run(local.generate(ASKED))
        other = {name: tensor * 0.5 for name, tensor in model.state_dict().items()}
        generator.update_weights(other)
        local.update_weights(other)
        wanted = asyncio.run(local.generate(ASKED))
        assert asyncio.run(generator.generate(ASKED)) == wanted
        assert not folder.exists()
        for tensors in ({"nothing": torch.zeros(1)}, {"model.norm.weight": torch.zeros(3)}):
            payload = base64.b64encode(safetensors.torch.save(tensors)).decode()
            body = {"serialized_named_tensors": [payload], "load_format": "safetensors"}
            refused = http.post("/update_weights_from_tensor", json=body)
            assert refused.json()["success"] is False, json.dumps(refused.json())
        for field, value in (
            ("serialized_named_tensors", ["AAAA"]),
            ("serialized_named_tensors", [payload, payload]),
            ("load_format", None),
            ("load_format", "pickle"),
        ):
            refused = http.post("/update_weights_from_tensor", json={**body, field: value})
            assert refused.status_code == 400 and field in refused.text
        again = asyncio.run(generator.generate(ASKED))
        assert again == wanted
    with running(engine, limit=64) as (http, _, _):
        kept = http.post("/update_weights_from_tensor", json=body)
        assert kept.status_code == 403 and "--accept-weights" in kept.text
