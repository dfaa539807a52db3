"""DeepEP's kernels behind the dispatcher: the same layer and gradients, its arguments, and what is refused without them."""

import sys

import pytest
import torch
import torch.distributed as dist
from helpers import fake_deep_ep
from helpers.world import run_ranks

from minglm.config import Layout, ParallelConfig
from minglm.parallel import parallelize
from minglm.parallel.deepep import DeepEPDispatcher
from minglm.parallel.mesh import build_meshes
from minglm.parallel.shard import shard
from minglm.parallel.world import World
from minglm.recipe import preflight
from minglm.testing.model import experts_of, normal, plain_experts
from minglm.testing.parallel import check_layout, check_token_exchange

CPU = torch.device("cpu")
CUDA = torch.device("cuda")


def with_fake(check, make):
    """Hold dispatchers to their contract with the stand-in in the place of the package."""
    sys.modules["deep_ep"] = fake_deep_ep
    check(lambda group, experts: make(group, experts, hidden_size=8))
    return fake_deep_ep.CALLS


@pytest.mark.parametrize("ranks", [2, 4])
def test_exchange_keeps_the_contract(ranks):
    """The layer and all five gradients are those of one process, for crowded experts and for ranks without tokens.

    Four calls a layer, in the same order on every rank: a rank without tokens takes part.
    """
    for calls in run_ranks(with_fake, ranks, check_token_exchange, DeepEPDispatcher):
        assert calls == ["layout", "dispatch", "combine", "dispatch again", "combine"] * 12


class ReadsTooEarly(DeepEPDispatcher):
    """Nothing waits until the tokens have arrived."""

    def dispatch(self, x_TD, experts_TK, weights_TK):
        arrival = super().dispatch(x_TD, experts_TK, weights_TK)
        return arrival._replace(event=fake_deep_ep.EventOverlap([]))


class ForgetsTheWeights(DeepEPDispatcher):
    """The ranks of the experts add up without weights."""

    def dispatch(self, x_TD, experts_TK, weights_TK):
        return super().dispatch(x_TD, experts_TK, torch.ones_like(weights_TK))


@pytest.mark.parametrize("twin", [ReadsTooEarly, ForgetsTheWeights])
def test_contract_finds_broken_exchange(twin):
    """Each mistake in the use of the package is found."""
    with pytest.raises(AssertionError, match="differs"):
        run_ranks(with_fake, 2, check_token_exchange, twin)


def check_shared_model():
    """Hold a sharded model that exchanges tokens so to one process."""
    sys.modules["deep_ep"] = fake_deep_ep

    def share_model(model):
        meshes = build_meshes(Layout(1, 1, 2, 2, 1), "cpu")
        shard(model, meshes, ParallelConfig(dispatcher="deepep"))
        kinds = {
            type(layer.mlp.dispatcher)
            for layer in model.model.layers
            if hasattr(layer.mlp, "dispatcher")
        }
        assert kinds == {DeepEPDispatcher}
        return parallelize(model, world=World(CPU), meshes=meshes)

    check_layout(share_model)


def test_a_model_that_exchanges_so_computes_what_one_process_computes():
    """Loss, loads, norm and every gradient; with recomputation, the exchange runs again in the backward pass."""
    run_ranks(check_shared_model, 2)


def in_bfloat16():
    """Return the relative error of a layer of 512 hidden units in bfloat16, for what the kernels demand of tokens."""
    sys.modules["deep_ep"] = fake_deep_ep
    fake_deep_ep.STRICT = True
    E, T, K, D, F = 4, 6, 2, 512, 8
    experts_TK = (
        torch.rand(T, E, generator=torch.Generator().manual_seed(dist.get_rank())).topk(K).indices
    )
    x_TD, weights_TK = normal(1, T, D), normal(2, T, K).softmax(1)
    matrices = [
        normal(3 + i, *shape) / 10 for i, shape in enumerate([(E, F, D), (E, F, D), (E, D, F)])
    ]
    own = slice(dist.get_rank() * 2, dist.get_rank() * 2 + 2)
    dispatcher = DeepEPDispatcher(dist.group.WORLD, E, D)
    half = x_TD.bfloat16().requires_grad_()
    y_TD = dispatcher(half, experts_TK, weights_TK, experts_of(*(m[own] for m in matrices)))
    y_TD.backward(torch.ones_like(y_TD))
    wanted = plain_experts(x_TD, experts_TK, weights_TK, *matrices)
    return y_TD.dtype, half.grad.dtype, float((y_TD - wanted).norm() / wanted.norm())


def test_tokens_travel_in_bfloat16():
    """Tokens, sums and gradients are what the kernels take; bfloat16 tells 0.4% apart, and rounds a few times."""
    for dtype, gradient, error in run_ranks(in_bfloat16, 2):
        assert dtype == gradient == torch.bfloat16 and error < 0.02


def test_a_machine_that_cannot_run_the_kernels_says_what_it_lacks(monkeypatch, tmp_path):
    """In this order: GPUs, their age, the package, ranks on the machine, NVLink, network cards; then nothing is missing."""
    monkeypatch.setattr(preflight, "INFINIBAND", tmp_path / "none")
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 8)

    def lacks(ep=16, device=CUDA):
        return preflight.deepep_lacks(ep, device)

    assert lacks(device=CPU).startswith("its kernels need GPUs")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    assert "compute capability 8.0" in lacks()
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    assert "it needs the package deep_ep" in lacks()
    monkeypatch.setattr(preflight.importlib.util, "find_spec", lambda name: name)
    assert lacks() == (
        "of parallel.ep = 16 ranks 8 must share a machine, and this one has 1; start another number on each"
    )
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "8")
    monkeypatch.setattr(torch.cuda, "can_device_access_peer", lambda own, other: other < 7)
    assert "NVLink" in lacks()
    monkeypatch.setattr(torch.cuda, "can_device_access_peer", lambda own, other: True)
    assert (
        lacks()
        == "parallel.ep = 16 goes beyond one machine, and this one has no RDMA network card; use an ep of up to 8"
    )
    assert lacks(ep=8) == ""
    monkeypatch.setattr(preflight, "INFINIBAND", tmp_path)
    assert lacks() == ""
