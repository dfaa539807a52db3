"""Pack documents into rows of equal length: cut anywhere, or fitted whole (paper 2.4, "Hyper-parameters").

A batch is a rectangle of B rows and S positions; documents have any length. There are two ways to fill it:

    truncate   concatenate all documents and cut every S tokens: no padding, but most rows begin and end inside a
               document. The paper's choice for pre-training: cutting at random is a useful augmentation.
    best_fit   put each whole document into the row with the least room that still holds it, longest document first:
               a little padding, and only documents longer than a row are cut. The paper's choice for mid-training,
               where a cut would take a repository or a chain of thought apart.

Best-fit decreasing opens a row only when no open row has room. So any two rows together exceed the capacity,
and there are at most 11/9 of the fewest possible rows, plus one.

Choices: in rows filled by best fit, attention and the positions stay inside a document (`documents_BS`); in
truncated rows attention runs over the whole row, as in plain pre-training. The first token of a row, and of a
fitted document, has no context to be predicted from and is not a target. `minglm.data.mixture` decides which
documents come when.
"""

from bisect import bisect_left, insort
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from typing import NamedTuple

import numpy as np
import torch


@dataclass(frozen=True)
class Batch:
    """Rows to train on."""

    tokens_BS: torch.Tensor
    """int64"""
    mask_BS: torch.Tensor
    """bool: True where the token is a target, predicted from the positions before it"""
    documents_BS: torch.Tensor | None = None
    """int32 or None. None: attention is causal over the row. Otherwise it also stays inside equal ids;
    padding has id -1 and mask False."""
    positions_BS: torch.Tensor | None = None
    """int64 or None: restarts at 0 in each document"""
    ahead: int = 0
    """Positions at the end of each row that are only there to be predicted, where the rest of the row is
    elsewhere (`minglm.parallel.sequence`). The model does not compute them."""

    def map(self, function: Callable[[torch.Tensor], torch.Tensor]) -> "Batch":
        """Return the batch with every tensor replaced by function(tensor)."""
        tensors = {}
        for field in fields(self):
            value = getattr(self, field.name)
            if isinstance(value, torch.Tensor):
                tensors[field.name] = function(value)
        return replace(self, **tensors)

    def inputs(self) -> "Batch":
        """Return the positions that the model computes: all but those `ahead`."""
        length = self.tokens_BS.shape[1] - self.ahead
        return replace(self.map(lambda tensor_BS: tensor_BS[:, :length]), ahead=0)

    def attended_length(self) -> float:
        """Return how long rows of one document would be in which a position attends to as many others as here."""
        if self.positions_BS is None:
            return self.tokens_BS.shape[1]
        return 2 * self.positions_BS.double().mean().item() + 1

    def split(self, rows: int) -> list["Batch"]:
        """Return the same rows as batches of at most `rows` rows each."""
        starts = range(0, len(self.tokens_BS), rows)
        return [self.map(lambda tensor, s=start: tensor[s : s + rows]) for start in starts]

    def to(self, device: torch.device | str) -> "Batch":
        """Copy the batch to another device; copies overlap with computation if the memory is pinned."""
        return self.map(lambda tensor: tensor.to(device, non_blocking=True))


class Span(NamedTuple):
    """Tokens `start` to `stop` of a document."""

    document: int
    start: int
    stop: int


def best_fit(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """Pack documents of these lengths into rows of `capacity` tokens by best-fit decreasing.

    Returns the rows as lists of indices into `lengths`, every index once. It takes O(n log n) comparisons:
    open rows are grouped by the room they have left, and a bisection finds the least room that suffices.
    Raises ValueError for a length below 1 or above the capacity; `cut_to_fit` splits long documents first.
    """
    rows: list[list[int]] = []
    rows_with_room: dict[int, list[int]] = {}  # {room: numbers of the rows with exactly this room}
    rooms: list[int] = []  # its keys, sorted
    longest_first = sorted(range(len(lengths)), key=lambda i: (-lengths[i], i))
    for index in longest_first:
        length = int(lengths[index])
        if not 1 <= length <= capacity:
            raise ValueError(
                f"document {index} has {length} tokens: a row of {capacity} holds 1 to {capacity}"
            )
        # The first room that is large enough is the best fit.
        place = bisect_left(rooms, length)
        if place < len(rooms):
            room = rooms[place]
            row = rows_with_room[room].pop()
            if not rows_with_room[room]:
                del rows_with_room[room]
                del rooms[place]
        else:
            room = capacity
            row = len(rows)
            rows.append([])
        rows[row].append(index)
        room -= length
        if room:
            if room not in rows_with_room:
                rows_with_room[room] = []
                insort(rooms, room)
            rows_with_room[room].append(row)
    return rows


def cut_to_fit(lengths: Sequence[int] | np.ndarray, capacity: int) -> np.ndarray:
    """Cut documents into spans that fit a row.

    Returns an int64 array (spans, 3) of (document, start, stop), in order: one span for a document that fits,
    capacity-sized spans and a rest for a longer one, none for an empty one.
    """
    lengths = np.asarray(lengths, dtype=np.int64)
    counts = -(-lengths // capacity)  # spans of each document, rounded up
    document = np.repeat(np.arange(len(lengths)), counts)
    first_span = np.repeat(np.cumsum(counts) - counts, counts)  # of the same document
    start = (np.arange(len(document)) - first_span) * capacity
    stop = np.minimum(start + capacity, lengths[document])
    return np.stack([document, start, stop], axis=1)


class TruncatedRows(Sequence[list[Span]]):
    """Rows of `capacity` tokens, cut from concatenated documents: a sequence of lists of spans.

    The stream of documents is a ring: what lies before the offset follows the last document. Tokens that do
    not fill a row are left out, fewer than `capacity` of them; a stream shorter than a row is repeated until
    it fills one. A row is computed when it is asked for, because an epoch of a large source has millions of
    them.
    """

    def __init__(
        self,
        lengths: Sequence[int] | np.ndarray,
        order: Sequence[int] | np.ndarray,
        capacity: int,
        offset: int = 0,
    ):
        """Prepare the rows. Raises ValueError if there are no tokens.

        Args:
            lengths: tokens of each document.
            order: the order of the documents in the stream.
            offset: the position in the stream at which the first row begins.
        """
        self.lengths = np.asarray(lengths, dtype=np.int64)
        self.order = np.asarray(order, dtype=np.int64)
        self.capacity = capacity
        self.offset = offset
        self.ends = np.cumsum(self.lengths[self.order])  # in the stream
        self.total = int(self.ends[-1]) if len(self.ends) else 0
        if not self.total:
            raise ValueError("nothing to cut: the documents hold no tokens")

    def __len__(self) -> int:
        return max(1, self.total // self.capacity)

    def __getitem__(self, row: int) -> list[Span]:  # pyright: ignore[reportIncompatibleMethodOverride]  # no slices
        if not 0 <= row < len(self):
            raise IndexError(row)
        position = (self.offset + row * self.capacity) % self.total
        room = self.capacity
        spans = []
        while room:
            slot = int(np.searchsorted(self.ends, position, side="right"))
            document = int(self.order[slot])
            length = int(self.lengths[document])
            start = position - (int(self.ends[slot]) - length)
            taken = min(room, length - start)
            spans.append(Span(document, start, start + taken))
            room -= taken
            position = (position + taken) % self.total
        return spans


TokensAndMask = tuple[np.ndarray, np.ndarray | None]
"""Ids of a span, and a boolean array that says which are targets (None: all)."""


def fill(
    rows: Sequence[Sequence[TokensAndMask]], capacity: int, separate: bool, pad: int = 0
) -> Batch:
    """Make a batch from rows of token spans.

    Args:
        separate: keep attention and positions inside each span (best fit), or let them run over the row (truncate).
        pad: the id that fills up short rows.
    """
    shape = (len(rows), capacity)
    tokens_BS = np.full(shape, pad, dtype=np.int64)
    mask_BS = np.zeros(shape, dtype=bool)
    documents_BS = np.full(shape, -1, dtype=np.int32)
    positions_BS = np.zeros(shape, dtype=np.int64)
    for row, spans in enumerate(rows):
        start = 0
        for number, (tokens, mask) in enumerate(spans):
            stop = start + len(tokens)
            assert stop <= capacity, f"row {row} holds {stop} tokens, capacity {capacity}"
            tokens_BS[row, start:stop] = tokens
            mask_BS[row, start:stop] = True if mask is None else mask
            documents_BS[row, start:stop] = number
            positions_BS[row, start:stop] = np.arange(len(tokens))
            if separate:
                mask_BS[row, start] = False
            start = stop
    mask_BS[:, 0] = False
    return Batch(
        tokens_BS=torch.from_numpy(tokens_BS),
        mask_BS=torch.from_numpy(mask_BS),
        documents_BS=torch.from_numpy(documents_BS) if separate else None,
        positions_BS=torch.from_numpy(positions_BS) if separate else None,
    )
