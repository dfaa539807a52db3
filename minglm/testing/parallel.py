"""Contracts of what runs on many ranks: an optimizer of sharded weights, an exchange of sequences (no section in the paper).

    from minglm.testing.parallel import check_sharded_optimizer
    check_sharded_optimizer(lambda named_parameters, config: MyMuon(named_parameters, config))

Unlike the other contracts these are called on every rank of a process group, for example in a program under
`torchrun --nproc-per-node 4`; 2 and 4 ranks divide in enough ways. What many ranks compute together must be
what one process computes alone, and the contract is that process: every rank knows the whole. Each rank draws
the same examples from the same seed. A failure on any rank is raised on all of them, so that none waits for
another.
"""

import copy
import random
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Placement, Replicate, Shard, distribute_tensor

from minglm.config import OptimizerConfig
from minglm.data.packing import Batch
from minglm.model.attention import Attend
from minglm.model.glm import GLM
from minglm.model.moe import Dispatcher
from minglm.parallel import Replicas, Workers
from minglm.parallel.gradients import global_norm
from minglm.parallel.local import local
from minglm.parallel.workers import gathered
from minglm.testing.model import (
    drawn_documents,
    experts_of,
    normal,
    plain_experts,
    tiny_model,
    torch_attention,
)
from minglm.testing.optim import MakeOptimizer
from minglm.testing.strategies import numbers
from minglm.train.loop import accumulate_batch
from minglm.train.loss import LossWeights

MakeAttend = Callable[[dist.ProcessGroup], Attend]
"""(ranks that share each row) to attention for the positions of this rank."""
MakeDispatcher = Callable[[dist.ProcessGroup, int], Dispatcher]
"""(ranks that divide the experts, number of experts) to a dispatcher."""
ShareModel = Callable[[GLM], Workers]
"""A model, which it shards in place, to the workers that share its batches."""

RATE = 0.01
CLOSE = 2e-5  # Newton-Schulz magnifies rounding a few hundred times; a wrong rule moves a weight by about 2e-3


def assert_on_all(holds: bool, message: str) -> None:
    """Raise AssertionError on every rank if `holds` is false on any."""
    broken = torch.tensor(0 if holds else 1)
    dist.all_reduce(broken)
    assert not broken, message


class Layout(NamedTuple):
    """Where the two kinds of parameters are: matrices of the dense part, and stacks of experts."""

    name: str
    dense: DeviceMesh
    dense_placements: Sequence[Placement]
    sparse: DeviceMesh
    sparse_placements: Sequence[Placement]

    def shard(self, whole: Tensor) -> DTensor:
        """Return the DTensor of a whole tensor that every rank has."""
        if whole.ndim == 3:
            mesh, placements = self.sparse, self.sparse_placements
        else:
            mesh, placements = self.dense, self.dense_placements
        return distribute_tensor(whole.clone(), mesh, placements, src_data_rank=None)


def layouts() -> Iterator[Layout]:
    """Yield every division of the ranks into copies, shards of the dense part, and experts times shards of each."""
    ranks = dist.get_world_size()
    for copies in divisors(ranks):
        fsdp = ranks // copies
        if fsdp == 1:
            continue
        for ep in divisors(fsdp):
            yield Layout(
                f"dp_replicate {copies}, fsdp {fsdp}, efsdp {fsdp // ep}, ep {ep}",
                init_device_mesh("cpu", (copies, fsdp), mesh_dim_names=("dp_replicate", "fsdp")),
                (Replicate(), Shard(0)),
                init_device_mesh(
                    "cpu",
                    (copies, fsdp // ep, ep),
                    mesh_dim_names=("dp_replicate", "efsdp", "ep"),
                ),
                (Replicate(), Shard(1), Shard(0)),
            )


def divisors(number: int) -> list[int]:
    """Return the divisors of a small number, smallest first."""
    return [n for n in range(1, number + 1) if number % n == 0]


def check_sharded_optimizer(make_optimizer: MakeOptimizer, examples: int = 5) -> None:
    """Hold an optimizer of sharded parameters to what it does with whole ones, for every layout of the ranks.

    make_optimizer: as in `minglm.testing.optim.check_optimizer`. Called on every rank. Some parameters have
    fewer rows than there are ranks, some a gradient that is zero in the rows of one rank, or everywhere, and
    heads are cut anywhere.
    """
    for number, layout in enumerate(layouts()):
        for example in range(examples):
            _check_example(make_optimizer, layout, seed=1000 * number + example)


def _check_example(make_optimizer: MakeOptimizer, layout: Layout, seed: int) -> None:
    """Compare three steps of one drawn model, sharded and whole."""
    draw = random.Random(seed)
    head = draw.randint(2, 4)
    shapes = {
        "model.embed_tokens.weight": (draw.randint(1, 9), 4),
        "model.layers.0.self_attn.q_proj.weight": (head * draw.randint(1, 5), draw.randint(2, 7)),
        "model.layers.0.self_attn.q_proj.bias": (draw.randint(1, 5),),
        "model.layers.1.mlp.gate.weight": (draw.randint(2, 9), draw.randint(2, 9)),
    }
    rows, columns, F, D = (draw.randint(2, 9) for _ in range(4))
    for layer in range(draw.randint(1, 6)):
        shapes[f"model.layers.{layer}.self_attn.o_proj.weight"] = (rows, columns)
    E = draw.randint(1, 2) * layout.sparse.shape[-1]
    shapes["model.layers.1.mlp.experts.gate_EFD"] = (E, F, D)
    shapes["model.layers.1.mlp.experts.up_EFD"] = (E, F, D)
    shapes["model.layers.1.mlp.experts.down_EDF"] = (E, D, F)

    config = OptimizerConfig(peak_lr=RATE, muon_head_dim=draw.choice([0, head]))
    weights = {name: normal(seed + i, *shape) for i, (name, shape) in enumerate(shapes.items())}
    whole = {name: torch.nn.Parameter(weight.clone()) for name, weight in weights.items()}
    sharded = {name: torch.nn.Parameter(layout.shard(weight)) for name, weight in weights.items()}
    whole_optimizer = make_optimizer(list(whole.items()), config)
    sharded_optimizer = make_optimizer(list(sharded.items()), config)
    _check_state(sharded_optimizer, sharded, layout)

    for step in range(3):
        absent = draw.choice(list(shapes)) if step == 1 else None
        for i, name in enumerate(shapes):
            gradient = _drawn_gradient(draw, normal(seed + 99 * step + i + 50, *shapes[name]))
            whole[name].grad = None if name == absent else gradient
            sharded[name].grad = None if name == absent else layout.shard(gradient)
        whole_optimizer.step()
        sharded_optimizer.step()
        for name, parameter in sharded.items():
            expected = local(layout.shard(whole[name].detach()))
            error = (local(parameter.detach()) - expected).abs()
            assert_on_all(
                bool((error < CLOSE).all()),
                f"{name} {shapes[name]} sharded as {layout.name}: step {step + 1} differs from that of one process",
            )


def _drawn_gradient(draw: random.Random, gradient: Tensor) -> Tensor:
    """Set nothing, the first row of each matrix, all but the last row, the first matrix, or everything to zero."""
    last_row = gradient.ndim - 2
    kind = draw.choice(["whole", "whole", "row", "rows", "matrix", "nothing"])
    if gradient.ndim == 1 or kind == "whole":
        return gradient
    if kind == "row":
        gradient.narrow(last_row, 0, 1).zero_()
    elif kind == "rows":
        gradient.narrow(last_row, 0, gradient.shape[last_row] - 1).zero_()
    elif kind == "matrix" and gradient.ndim == 3:
        gradient[0].zero_()
    elif kind == "nothing":
        gradient.zero_()
    return gradient


def _check_state(
    optimizer: torch.optim.Optimizer, parameters: dict[str, torch.nn.Parameter], layout: Layout
) -> None:
    """Demand that the state is sharded as its parameter is, so that a checkpoint can be read in another layout."""
    for name, parameter in parameters.items():
        assert isinstance(parameter, DTensor)
        values = optimizer.state[parameter]
        tensors = [value for value in values.values() if value.ndim]
        alike = [
            isinstance(value, DTensor)
            and value.shape == parameter.shape
            and value.device_mesh == parameter.device_mesh
            and value.placements == parameter.placements
            for value in tensors
        ]
        assert_on_all(
            bool(tensors) and all(alike),
            f"the state of {name} is not sharded as {layout.name}, like the parameter",
        )


def check_sequence_exchange(make_attend: MakeAttend, examples: int = 6) -> None:
    """Hold attention over rows that are cut among ranks to PyTorch's own over whole rows, gradients included.

    make_attend: from the group of ranks to attention (`minglm.model.attention.Attend`) for this rank's
    positions, which are S / ranks consecutive ones in the order of the ranks. Called on every rank. Heads are
    drawn with as many key/value heads as ranks, more, and fewer; rows with and without packed documents.
    """
    group = dist.group.WORLD
    assert group is not None
    ranks = dist.get_world_size()
    rank = dist.get_rank()
    attend = make_attend(group)
    for seed in range(examples):
        draw = random.Random(seed)
        M = draw.choice([1, ranks // 2, ranks, 2 * ranks])
        N = max(M, ranks) * draw.randint(1, 2)
        B = draw.randint(1, 2)
        S = ranks * draw.randint(1, 40)
        shapes = [(B, S, N, 8), (B, S, M, 8), (B, S, M, 8), (B, S, N, 8)]
        q, k, v, weight = (
            normal(seed + 10 + i, *shape, scale=1.5) for i, shape in enumerate(shapes)
        )
        documents_BS = drawn_documents(seed, B, S) if draw.random() < 0.7 else None
        wholes = [x.clone().requires_grad_() for x in (q, k, v)]
        expected = torch_attention(wholes[0], wholes[1], wholes[2], documents_BS)
        (expected * weight).sum().backward()

        def mine(x: Tensor, S: int = S) -> Tensor:
            return x.detach()[:, rank * S // ranks : (rank + 1) * S // ranks]

        parts = [mine(x).clone().requires_grad_() for x in (q, k, v)]
        part_documents_BS = None if documents_BS is None else mine(documents_BS)
        out = attend(parts[0], parts[1], parts[2], part_documents_BS)
        (out * mine(weight)).sum().backward()

        case = f"{N} query heads, {M} key/value heads, {S} positions on {ranks} ranks"
        # float32: sums in another order
        error = (out - mine(expected)).abs().max()
        assert_on_all(bool(error < 1e-5), f"attention differs from that over whole rows: {case}")
        for name, part, whole in zip("qkv", parts, wholes, strict=True):
            assert part.grad is not None and whole.grad is not None
            error = (part.grad - mine(whole.grad)).norm() / whole.grad.norm()
            assert_on_all(
                bool(error < 2e-6),
                f"the gradient of {name} differs from that over whole rows: {case}",
            )


def check_token_exchange(make_dispatcher: MakeDispatcher, examples: int = 12) -> None:
    """Hold a dispatcher of divided experts to the layer of one process that has all of them, gradients included.

    make_dispatcher: from the group of ranks and the number of experts to a dispatcher
    (`minglm.model.moe.Dispatcher`). Called on every rank, which has E / ranks consecutive experts. Ranks have
    different numbers of tokens, some have none, and in some examples all tokens go to the experts of one
    rank.
    """
    group = dist.group.WORLD
    assert group is not None
    ranks = dist.get_world_size()
    rank = dist.get_rank()
    for seed in range(examples):
        draw = random.Random(seed)
        E = ranks * draw.randint(1, 3)
        K = draw.randint(1, min(E, 3))
        D, width = draw.randint(1, 6), draw.randint(1, 6)
        tokens = [draw.randint(0, 6) for _ in range(ranks)]
        T = sum(tokens)
        begin = sum(tokens[:rank])
        mine = slice(begin, begin + tokens[rank])
        scores_TE = torch.rand(T, E, generator=numbers(seed))
        if seed % 3 == 0:  # a crowd at the first experts
            scores_TE = scores_TE - 2.0 * torch.arange(E)
        experts_TK = scores_TE.topk(K).indices
        shapes = [(T, D), (T, K), (E, width, D), (E, width, D), (E, D, width)]
        values = [normal(seed + 10 + i, *shape) for i, shape in enumerate(shapes)]
        gradient_TD = normal(seed + 20, T, D)
        double = torch.nn.Linear(D, D, bias=False)  # stands for the shared expert
        torch.nn.init.constant_(double.weight, 0.5)

        wholes = [value.clone().requires_grad_() for value in values]
        expected_TD = plain_experts(wholes[0], experts_TK, *wholes[1:]) + double(wholes[0]).double()
        expected_TD.backward(gradient_TD.to(expected_TD.dtype))

        own = slice(rank * E // ranks, (rank + 1) * E // ranks)
        where = [mine, mine, own, own, own]
        parts = [value[part].clone().requires_grad_() for value, part in zip(values, where)]
        dispatcher = make_dispatcher(group, E)
        y_TD = dispatcher(parts[0], experts_TK[mine], parts[1], experts_of(*parts[2:]), double)
        y_TD.backward(gradient_TD[mine])

        case = f"{E} experts, {K} a token, {tokens} tokens on {ranks} ranks"
        difference = (y_TD.detach() - expected_TD[mine].detach()).abs()
        assert_on_all(bool((difference < 1e-4).all()), f"the result differs: {case}")
        names = ("x", "the weights", "gate", "up", "down")
        for name, part, found, whole in zip(names, where, parts, wholes, strict=True):
            wanted = torch.zeros_like(whole) if whole.grad is None else whole.grad
            present = found.grad is not None or not found.numel()
            assert_on_all(present, f"a rank has no gradient of {name}: {case}")
            if found.grad is None:
                found.grad = torch.zeros_like(found)
            close = torch.allclose(found.grad, wanted[part], atol=3e-4, rtol=1e-4)  # float32
            assert_on_all(close, f"the gradient of {name} differs: {case}")


def check_layout(share_model: ShareModel, examples: int = 2, close: float = 4e-6) -> None:
    """Hold a model that ranks share to what one process computes: loss, loads, norm and the gradient of each parameter.

    share_model: shards the model that it gets, in place, and returns the workers that share its batches
    (`minglm.parallel.workers.Workers`). Called on every rank. Batches are drawn with fewer rows than ranks
    and with more, cut into micro-batches, packed or not; models with tied embeddings, with recomputation,
    with and without the MTP loss.
    close: bound on the norm of a difference over the norm of the gradient, or over a hundredth of that of all
    gradients where this is larger: terms that nearly cancel leave their rounding behind. In one process
    another order of the same float32 sums changes the worst of these gradients by 1.2e-6, and ranks have
    several; a wrong scale changes each of them by its size.
    """
    ranks = dist.get_world_size()
    for seed in range(examples):
        draw = random.Random(seed)
        plain = tiny_model(seed, tie_word_embeddings=seed % 3 == 1)
        shared = copy.deepcopy(plain)
        shared.recompute = draw.random() < 0.5
        workers = share_model(shared)
        weights = LossWeights(mtp=draw.choice([0.0, 0.3]), balance=0.05)
        rows = draw.choice([1, ranks - 1, ranks + 1, 2 * ranks])
        microbatch_rows = draw.randint(1, 2)
        batch = _drawn_batch(seed, rows, packed=seed % 2 == 0)
        case = f"{rows} rows, {microbatch_rows} at a time, {weights}, recompute {shared.recompute}"
        wanted = accumulate_batch(plain, batch, weights, microbatch_rows, Replicas(plain))
        found = accumulate_batch(shared, batch, weights, microbatch_rows, workers)
        assert wanted.tokens_per_expert_LE is not None and found.tokens_per_expert_LE is not None
        loads = torch.equal(found.tokens_per_expert_LE, wanted.tokens_per_expert_LE)
        assert_on_all(loads, f"the loads of the experts differ: {case}")
        pairs = zip(found[:3], wanted[:3], strict=True)
        terms = max(abs(a - b) for a, b in pairs)
        assert_on_all(terms < 1e-5, f"the terms of the loss differ by {terms}: {case}")
        norm = global_norm(plain)
        assert_on_all(
            _relative(global_norm(shared), norm, norm) < close, f"the norms differ: {case}"
        )
        parameters = dict(shared.named_parameters())
        for name, parameter in plain.named_parameters():
            gradient = parameters[name].grad
            same = (gradient is None) == (parameter.grad is None)
            assert_on_all(same, f"{name} has a gradient here and none there: {case}")
            if gradient is not None and parameter.grad is not None:
                difference = _relative(gathered(gradient), parameter.grad, norm)
                assert_on_all(
                    difference < close, f"the gradient of {name} differs by {difference}: {case}"
                )


def _relative(found: Tensor, wanted: Tensor, norm: Tensor) -> float:
    """Return the norm of the difference over the norm of a gradient, or over a hundredth of that of all gradients."""
    return float((found - wanted).norm() / torch.maximum(wanted.norm(), norm / 100))


def _drawn_batch(seed: int, rows: int, packed: bool) -> Batch:
    """Draw rows of eight tokens of the tiny model's vocabulary, a fifth of them no targets."""
    B, S = rows, 8
    tokens_BS = torch.randint(0, 24, (B, S), generator=numbers(seed))
    mask_BS = torch.rand(B, S, generator=numbers(seed + 1)) < 0.8
    mask_BS[:, 0] = False
    if not packed:
        return Batch(tokens_BS, mask_BS)
    documents_BS = drawn_documents(seed + 2, B, S)
    return Batch(tokens_BS, mask_BS & (documents_BS >= 0), documents_BS)
