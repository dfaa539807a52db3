"""Muon on sharded parameters is Muon: owners get whole matrices, and one rank or four take the same steps."""

from collections import Counter

import numpy as np
import pytest
import torch
import torch.distributed as dist
from helpers.world import run_ranks
from hypothesis import given
from hypothesis import strategies as st
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate, Shard, distribute_tensor

from minglm.config import OptimizerConfig
from minglm.optim import muon
from minglm.optim.muon import Muon
from minglm.parallel import owners
from minglm.parallel.local import local
from minglm.parallel.owners import Rows, plan_rows, ranks_of_rows, rows_on_ranks
from minglm.testing.parallel import check_sharded_optimizer


@given(
    parts=st.lists(st.tuples(st.integers(1, 3), st.integers(1, 6)), min_size=1, max_size=5),
    matrix_rows=st.integers(1, 5),
    ranks=st.integers(1, 7),
    first=st.integers(0, 6),
)
def test_every_row_comes_to_its_matrix(parts, matrix_rows, ranks, first):
    """What each rank sends is what the others expect, each matrix arrives once and in order, and owners are even."""
    parameters = tuple(Rows(stack, matrix_rows * matrices) for stack, matrices in parts)
    plans = [plan_rows(parameters, matrix_rows, ranks, r, first % ranks) for r in range(ranks)]
    owned = [plan.owned for plan in plans]
    total = sum(stack * matrices for stack, matrices in parts)
    assert sum(owned) == total == plans[0].matrices and max(owned) - min(owned) <= 1

    # Every row is its own number; a rank holds the rows of each member of a stack that torch.chunk gives it.
    held = [[] for _ in range(ranks)]
    number = 0
    for part in parameters:
        for _ in range(part.stack):
            rows = torch.arange(number, number + part.rows)
            number += part.rows
            for rank, chunk in enumerate(rows.chunk(ranks)):
                held[rank].extend(chunk.tolist())
    sent = [
        np.split(rows, np.cumsum(plan.sent)[:-1]) for rows, plan in zip(held, plans, strict=True)
    ]

    matrices = []
    for rank, plan in enumerate(plans):
        arrived = [sent[source][rank] for source in range(ranks)]
        assert [len(rows) for rows in arrived] == plan.received
        matrices.append(np.concatenate(arrived)[plan.order])
    assert np.concatenate(matrices).tolist() == list(range(number))


def test_shapes_take_turns_in_having_one_more():
    """Ten shapes of one matrix each on four ranks: no rank owns more than three."""
    plans = [
        [plan_rows((Rows(1, 8),), 8, 4, rank, turn % 4) for turn in range(10)] for rank in range(4)
    ]
    assert [sum(plan.owned for plan in mine) for mine in plans] == [3, 3, 2, 2]


def test_a_head_may_lie_on_several_ranks_and_a_rank_may_have_none():
    """Six rows in heads of four on four ranks: two rows on each of the first three."""
    assert rows_on_ranks(Rows(1, 8), 4, 3).tolist() == [[3, 1, 0], [0, 2, 2]]
    assert rows_on_ranks(Rows(1, 2), 2, 3).tolist() == [[1, 1, 0]]


@pytest.mark.parametrize("ranks", [2, 4])
def test_sharded_muon_keeps_the_contract(ranks):
    """For every layout of the ranks, drawn models take the same three steps as in one process."""
    run_ranks(check_sharded_optimizer, ranks, Muon)


class ShardsAreMatrices(Muon):
    """The trap: each rank orthogonalises the rows that it has."""

    def _muon(self, group, parameters, turns):
        for parameter in parameters:
            gradient = local(parameter.grad)
            if gradient.numel():
                orthogonal = self.newton_schulz(gradient, group["steps"])
                local(parameter).add_(orthogonal, alpha=-group["lr"])


class RestsByRows(Muon):
    """The trap of the rule for rest: rows rest where their rank has no gradient, not where the matrix has none."""

    def _muon(self, group, parameters, turns):
        before = [local(parameter).clone() for parameter in parameters]
        super()._muon(group, parameters, turns)
        for parameter, old in zip(parameters, before, strict=True):
            if not local(parameter.grad).any():
                local(parameter).copy_(old)


class KeepsLocalState(Muon):
    """A momentum without the global shape: its checkpoint fits this layout only."""

    @staticmethod
    def _initial_state(kind, parameter):
        return Muon._initial_state(kind, local(parameter))


@pytest.mark.parametrize(
    ("twin", "message"),
    [
        (ShardsAreMatrices, "differs from that of one process"),
        (RestsByRows, "differs from that of one process"),
        (KeepsLocalState, "is not sharded as"),
    ],
)
def test_contract_refuses_broken_twins(twin, message):
    """Each known way to get sharded Muon wrong fails the contract, on all ranks at once."""
    with pytest.raises(Exception, match=message):
        run_ranks(check_sharded_optimizer, 2, twin)


SHAPES = {
    "model.layers.0.self_attn.q_proj.weight": (12, 8),
    "model.layers.1.self_attn.q_proj.weight": (12, 8),
    "model.layers.0.self_attn.o_proj.weight": (8, 12),
    "model.layers.0.mlp.gate_proj.weight": (12, 8),
    "model.layers.1.mlp.experts.gate_EFD": (4, 6, 8),
    "model.layers.1.mlp.experts.up_EFD": (4, 6, 8),
    "model.layers.1.mlp.experts.down_EDF": (4, 8, 6),
    "model.norm.weight": (8,),
}


def collectives_of_a_step(efsdp, head_dim):
    """Return how often each collective is called in a step."""
    dense = init_device_mesh("cpu", (4,))
    sparse = init_device_mesh("cpu", (efsdp, 4 // efsdp))
    parameters = {}
    for name, shape in SHAPES.items():
        mesh, placements = (
            (sparse, [Shard(1), Shard(0)]) if len(shape) == 3 else (dense, [Shard(0)])
        )
        weight = distribute_tensor(torch.randn(shape), mesh, placements, src_data_rank=None)
        parameters[name] = torch.nn.Parameter(weight)
        parameters[name].grad = weight.clone()
    optimizer = Muon(parameters.items(), OptimizerConfig(muon_head_dim=head_dim))

    calls = Counter()

    def counted(name):
        original = getattr(dist, name)

        def call(*args, **kwargs):
            calls[name] += 1
            return original(*args, **kwargs)

        return call

    names = ["all_to_all_single", "all_reduce", "all_gather", "all_gather_into_tensor", "broadcast"]
    with pytest.MonkeyPatch.context() as patch:
        for name in names:
            patch.setattr(dist, name, counted(name))
        optimizer.step()
    return dict(calls)


def collectives():
    """Return the collectives of a step in four settings."""
    steps = [collectives_of_a_step(1, 0), collectives_of_a_step(4, 0), collectives_of_a_step(4, 4)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(muon, "STACK_BYTES", 4 * 2 * 12 * 8 // 4)  # two projections
        return [*steps, collectives_of_a_step(1, 0)]


def test_two_collectives_for_each_shape():
    """However many matrices there are, each shape that is sharded by rows takes two all-to-alls, and nothing else."""
    for whole_experts, sharded_experts, heads, two_by_two in run_ranks(collectives, 4):
        assert whole_experts == {"all_to_all_single": 2 * 2}  # (12, 8) and (8, 12)
        assert sharded_experts == {"all_to_all_single": 2 * 4}  # and experts' (6, 8) and (8, 6)
        # and heads of (4, 8), whose projections leave the stack of (12, 8)
        assert heads == {"all_to_all_single": 2 * 5}
        assert two_by_two == {
            "all_to_all_single": 2 * 3
        }  # three matrices of (12, 8), two at a time


def placed(mesh, placements):
    """Return whether the rows of a matrix that is placed so are divided, or the message."""
    weight = distribute_tensor(torch.ones(4, 4), mesh, placements, src_data_rank=None)
    try:
        return ranks_of_rows(weight) is not None
    except ValueError as error:
        return str(error)


def placements():
    """Return what is said of several placements of a matrix."""
    line, plane = init_device_mesh("cpu", (2,)), init_device_mesh("cpu", (1, 2))
    return [
        placed(line, [Shard(0)]),
        placed(line, [Replicate()]),
        placed(plane, [Shard(0), Replicate()]),  # one rank on the first axis
        placed(plane, [Shard(1), Shard(0)]),
        placed(line, [Shard(1)]),
    ]


def test_which_placements_are_exchanged_and_which_refused():
    """Rows on several ranks are exchanged, whole matrices are not, and sharded columns get one clear line."""
    for divided, copied, alone, rows, columns in run_ranks(placements, 2):
        assert (divided, copied, alone, rows) == (True, False, False, True)
        assert "whose rows alone are sharded" in columns


def test_plain_tensors_are_not_exchanged():
    """A parameter that is no DTensor is whole."""
    parameter = torch.nn.Parameter(torch.ones(4, 4))
    assert ranks_of_rows(parameter) is None
    assert isinstance(owners.bring_together([parameter], 4, Counter()), owners.AllHere)
