"""Bring whole matrices together from the rows that many ranks hold, and the rows back (no section in the paper).

    ranks hold rows  ->  all-to-all  ->  each matrix whole on one rank, its owner  ->  all-to-all  ->  ranks hold rows

Muon needs whole matrices, and a sharded model has rows. If every rank collected every matrix, all would do the same
work: 34 s a step for GLM-4.5 on 512 GPUs, where the busiest owner takes 80 ms, and each rank sends 2.8 GB
each way (arithmetic, for H100s at 400 TFLOP/s). Matrices of one shape travel together, in two collectives.

`to_owners` and `from_owners` have two forms. `AllHere` is for matrices that are whole in this process, and
moves nothing. `Owners` exchanges rows within a group of ranks.

Choices:
- Each rank sends exactly the rows that it has, without padding. It may have few rows of a matrix or none: rows are
  divided as torch.chunk divides them, and where each head is a matrix of its own, ranks are cut anywhere inside a head.
- The owner of a matrix follows from its number: neighbouring matrices have the same owner or the next. Rows that lie in
  the order of the matrices then lie in the order of the owners too, and need no sorting before they are sent.
- Where the matrices of a shape cannot be divided evenly, the ranks take turns in owning one more (`turns`): a model has
  many shapes of fewer matrices than ranks, and the first ranks would else own those of every shape.
- A stack of experts whose expert axis is sharded is a stack of whole matrices. Only sharded rows need an exchange.
- Copies of rows (`dp_replicate`) are treated alike by every group of ranks that holds a copy; no two groups talk.
"""

import functools
from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple, Protocol

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor


def ranks_of_rows(parameter: Tensor) -> dist.ProcessGroup | None:
    """Return the ranks among which the rows of a parameter's matrices are divided; None where matrices are whole.

    parameter: (rows, columns) or (stack, rows, columns). Raises ValueError for sharded columns, which no
    exchange joins, and for rows that are sharded over two axes of the mesh.
    """
    if not isinstance(parameter, DTensor):
        return None
    row_axis = parameter.ndim - 2
    found: list[dist.ProcessGroup] = []
    for mesh_axis, placement in enumerate(parameter.placements):
        whole = placement.is_replicate() or parameter.device_mesh.size(mesh_axis) == 1
        if whole or (row_axis and placement.is_shard(0)):
            continue
        if not placement.is_shard(row_axis) or found:
            raise ValueError(
                f"a parameter of shape {tuple(parameter.shape)} is placed as {parameter.placements}: "
                "Muon needs matrices whose rows alone are sharded, over one axis of the mesh"
            )
        found.append(parameter.device_mesh.get_group(mesh_axis))
    return found[0] if found else None


class Rows(NamedTuple):
    """The sharded rows of one parameter, before they are cut into matrices."""

    stack: int
    """Matrices, or matrices of joined heads, that lie one after the other."""
    rows: int
    """Rows of each, on all ranks together."""


class Plan(NamedTuple):
    """Which rows one rank sends and receives."""

    sent: list[int]
    """Rows that go to each rank."""
    received: list[int]
    """Rows that come from each rank."""
    order: np.ndarray
    """int64: the number, in the order of arrival, of each row of the owned matrices."""
    owned: int
    """Matrices that this rank owns."""
    matrices: int
    """Matrices that all ranks own."""


@functools.lru_cache(maxsize=1024)
def plan_rows(
    parameters: tuple[Rows, ...], matrix_rows: int, ranks: int, rank: int, first: int
) -> Plan:
    """Decide which rows of matrices of `matrix_rows` rows this rank sends and receives.

    first: the rank that is the first to own one matrix more than others.
    """
    tables = [rows_on_ranks(part, matrix_rows, ranks) for part in parameters]
    table = np.concatenate(tables)  # (matrices, ranks)

    # Each rank owns matrices that follow one another: as many as any other, or one more.
    owned = np.full(ranks, len(table) // ranks)
    owned[(first + np.arange(len(table) % ranks)) % ranks] += 1
    stop = owned.cumsum()
    start = stop - owned

    mine = table[start[rank] : stop[rank]]
    rows_before = np.concatenate([[0], table[:, rank].cumsum()])
    sent = rows_before[stop] - rows_before[start]

    # Rows arrive rank by rank, and from each rank matrix by matrix. A stable sort by matrix puts the rows of each
    # matrix together, and leaves the ranks in order.
    arrivals = np.tile(np.arange(len(mine)), ranks)
    matrix_of_row = np.repeat(arrivals, mine.T.reshape(-1))
    return Plan(
        sent=sent.tolist(),
        received=mine.sum(0).tolist(),
        order=np.argsort(matrix_of_row, kind="stable"),
        owned=len(mine),
        matrices=len(table),
    )


def rows_on_ranks(part: Rows, matrix_rows: int, ranks: int) -> np.ndarray:
    """Count the rows of each matrix of a parameter that each rank holds: int64 (matrices, ranks).

    Every rank holds ceil(rows / ranks) rows of each member of the stack, the last ones fewer, as `Shard` places them.
    """
    most = -(-part.rows // ranks)
    begin = np.minimum(np.arange(ranks) * most, part.rows)
    end = np.minimum(begin + most, part.rows)
    top = np.arange(0, part.rows, matrix_rows)[:, None]
    overlap = np.minimum(end, top + matrix_rows) - np.maximum(begin, top)
    return np.tile(overlap.clip(min=0), (part.stack, 1))


class Together(Protocol):
    """Bring matrices of one shape together, and the result back to where the rows are."""

    def to_owners(
        self, updates: Sequence[Tensor], gradients: Sequence[Tensor]
    ) -> tuple[Tensor, Tensor]:
        """Return whole matrices (owned, rows, columns), and which of them have a gradient: bool (owned, 1, 1).

        updates, gradients: the local part of each parameter, (rows, columns) or (stack, rows, columns). A
        matrix has a gradient if any value of it, on any rank, is not zero.
        """
        ...

    def from_owners(self, matrices: Tensor) -> list[Tensor]:
        """Return what belongs to the local part of each parameter, as rows (all rows, columns)."""
        ...


class AllHere:
    """Matrices that are whole in this process."""

    def __init__(self, matrix_rows: int) -> None:
        self.matrix_rows = matrix_rows
        self.lengths: list[int] = []

    def to_owners(
        self, updates: Sequence[Tensor], gradients: Sequence[Tensor]
    ) -> tuple[Tensor, Tensor]:
        """Join the matrices to one stack; arguments and results as in `Together`."""
        shape = (self.matrix_rows, updates[0].shape[-1])
        stacks = [update.reshape(-1, *shape) for update in updates]
        informed = [
            gradient.reshape(-1, *shape).flatten(-2).any(-1)[..., None, None]
            for gradient in gradients
        ]
        self.lengths = [len(stack) for stack in stacks]
        return torch.cat(stacks), torch.cat(informed)

    def from_owners(self, matrices: Tensor) -> list[Tensor]:
        """Divide the stack again; arguments and results as in `Together`."""
        return [stack.flatten(0, 1) for stack in matrices.split(self.lengths)]


class Owners:
    """Matrices whose rows are divided among the ranks of a group; each rank owns some of them."""

    def __init__(
        self, parts: Sequence[Rows], matrix_rows: int, group: dist.ProcessGroup, turn: int
    ):
        self.matrix_rows = matrix_rows
        self.group = group
        ranks = dist.get_world_size(group)
        rank = dist.get_rank(group)
        self.plan = plan_rows(tuple(parts), matrix_rows, ranks, rank, turn % ranks)
        self.lengths: list[int] = []

    def to_owners(
        self, updates: Sequence[Tensor], gradients: Sequence[Tensor]
    ) -> tuple[Tensor, Tensor]:
        """Send rows to the owners of their matrices; arguments and results as in `Together`."""
        columns = updates[0].shape[-1]
        parts = []
        for update, gradient in zip(updates, gradients, strict=True):
            # A further column travels with each row: whether the row's gradient has a value that is not zero.
            informed = gradient.reshape(-1, columns).any(1, keepdim=True)
            rows = update.reshape(-1, columns)
            parts.append(torch.cat([rows, informed.to(rows.dtype)], 1))
        self.lengths = [len(part) for part in parts]

        arrived = self._exchange(torch.cat(parts), self.plan.sent, self.plan.received)
        order = self._order(arrived.device)
        matrices = arrived[:, :-1][order].view(self.plan.owned, self.matrix_rows, columns)
        informed = arrived[:, -1][order].view(self.plan.owned, self.matrix_rows)
        return matrices, informed.any(1)[:, None, None]

    def from_owners(self, matrices: Tensor) -> list[Tensor]:
        """Send rows back to the ranks that hold them; arguments and results as in `Together`."""
        rows = matrices.flatten(0, 1)
        as_arrived = torch.empty_like(rows)
        as_arrived[self._order(rows.device)] = rows
        returned = self._exchange(as_arrived, self.plan.received, self.plan.sent)
        return list(returned.split(self.lengths))

    def _order(self, device: torch.device) -> Tensor:
        return torch.tensor(self.plan.order, device=device)

    def _exchange(self, rows: Tensor, sent: list[int], received: list[int]) -> Tensor:
        """Send `sent[i]` rows to rank i of the group, in order; return the rows that come, rank by rank."""
        arrived = rows.new_empty(sum(received), rows.shape[1])
        dist.all_to_all_single(arrived, rows, received, sent, group=self.group)
        return arrived


def bring_together(
    parameters: Sequence[Tensor],
    matrix_rows: int,
    turns: "Counter[dist.ProcessGroup]",
) -> Together:
    """Return what brings the matrices of these parameters together: all of one shape, with rows on the same ranks.

    matrix_rows: rows of a matrix; fewer than those of a parameter where each of its heads is one. turns: the
    matrices that each group has been given in this step; the new ones are added.
    """
    group = ranks_of_rows(parameters[0])
    if group is None:
        return AllHere(matrix_rows)
    parts = []
    for parameter in parameters:
        assert isinstance(parameter, DTensor)
        here = parameter.to_local()
        parts.append(Rows(here.shape[0] if here.ndim == 3 else 1, parameter.shape[-2]))
    owners = Owners(parts, matrix_rows, group, turns[group])
    turns[group] += owners.plan.matrices
    return owners
