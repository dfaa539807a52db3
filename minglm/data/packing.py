"""Documents into rows of equal length: cut anywhere, or fitted whole (paper 2.4, "Hyper-parameters").

A batch is a rectangle of B rows and S positions; documents have any length. Two ways to fill it:

    truncate   concatenate all documents and cut every S tokens: no padding, but most rows begin and end inside a
               document. The paper's choice for pre-training: cutting at random is a useful augmentation.
    best_fit   put each whole document into the row with the least room that still holds it, longest document first:
               a little padding, and only documents longer than a row are cut. The paper's choice for mid-training,
               where a cut would take a repository or a chain of thought apart.

Best-fit decreasing opens a row only when no open row has room. So any two rows together exceed the capacity, and the
rows are at most 11/9 of the fewest possible, plus one.

Choices: in rows filled by best fit, attention and the positions stay inside a document (`documents_BS`); in truncated
rows attention runs over the whole row, as in plain pre-training. The first token of a row, and of a fitted document,
has nothing before it to be predicted from and is no target. `minglm.data.mixture` decides which documents come when.
"""

from bisect import bisect_left, insort
from dataclasses import dataclass, fields

import numpy as np
import torch


@dataclass(frozen=True)
class Batch:
    """Rows to train on.

    tokens_BS: int64. mask_BS: bool; True where the token is a target, predicted from the positions before it.
    documents_BS: int32 or None. None: attention is causal over the row. Else it also stays inside equal ids; padding
    has id -1 and mask False. positions_BS: int64 or None; restarts at 0 in each document.
    """

    tokens_BS: torch.Tensor
    mask_BS: torch.Tensor
    documents_BS: torch.Tensor | None = None
    positions_BS: torch.Tensor | None = None

    def _map(self, function):
        tensors = [getattr(self, field.name) for field in fields(self)]
        return Batch(*[None if tensor is None else function(tensor) for tensor in tensors])

    def split(self, rows):
        """The same rows as a list of batches of at most `rows` rows each."""
        return [
            self._map(lambda t, at=at: t[at : at + rows])
            for at in range(0, len(self.tokens_BS), rows)
        ]

    def to(self, device):
        """The batch on another device; copies overlap with computation where the memory is pinned."""
        return self._map(lambda tensor: tensor.to(device, non_blocking=True))


def best_fit(lengths, capacity):
    """Best-fit decreasing: documents of these lengths into rows of `capacity` tokens.

    Returns the rows as lists of indices into `lengths`, every index once. O(n log n) comparisons: open rows are grouped
    by the room they have left, and a bisection finds the least room that suffices.
    Raises ValueError for a length below 1 or above the capacity; `pieces` splits long documents first.
    """
    rows, open_rows, rooms = (
        [],
        {},
        [],
    )  # open_rows: {room: rows with exactly this room}; rooms: its keys, sorted
    for index in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        length = int(lengths[index])
        if not 1 <= length <= capacity:
            raise ValueError(
                f"document {index} has {length} tokens: a row of {capacity} holds 1 to {capacity}"
            )
        found = bisect_left(rooms, length)
        if found < len(rooms):
            room = rooms[found]
            row = open_rows[room].pop()
            if not open_rows[room]:
                del open_rows[room], rooms[found]
        else:
            room, row = capacity, len(rows)
            rows.append([])
        rows[row].append(index)
        room -= length
        if room:
            if room not in open_rows:
                open_rows[room] = []
                insort(rooms, room)
            open_rows[room].append(row)
    return rows


def pieces(lengths, capacity):
    """Cut documents into spans that fit a row.

    lengths: tokens per document. Returns an int64 array (n, 3) of (document, start, stop), in order: one span for a
    document that fits, capacity-sized spans and a rest for a longer one, none for an empty one.
    """
    lengths = np.asarray(lengths, dtype=np.int64)
    counts = -(-lengths // capacity)
    document = np.repeat(np.arange(len(lengths)), counts)
    start = (np.arange(len(document)) - np.repeat(np.cumsum(counts) - counts, counts)) * capacity
    return np.stack([document, start, np.minimum(start + capacity, lengths[document])], axis=1)


class Cut:
    """Rows of `capacity` tokens, cut from concatenated documents: a sequence of lists of (document, start, stop).

    lengths: tokens per document. order: the documents' order in the stream. offset: where in the stream the first row
    begins; the stream is a ring, so what lies before the offset follows the last document. Tokens that fill no row
    are left out, fewer than `capacity` of them; a stream shorter than a row is repeated until it fills one. A row is
    worked out when it is asked for: an epoch of a large source has millions of them.
    Raises ValueError when there are no tokens.
    """

    def __init__(self, lengths, order, capacity, offset=0):
        self.lengths, self.order = np.asarray(lengths, dtype=np.int64), np.asarray(order)
        self.capacity, self.offset = capacity, offset
        self.ends = np.cumsum(self.lengths[self.order])
        self.total = int(self.ends[-1]) if len(self.ends) else 0
        if not self.total:
            raise ValueError("nothing to cut: the documents hold no tokens")

    def __len__(self):
        return max(1, self.total // self.capacity)

    def __getitem__(self, row):
        if not 0 <= row < len(self):
            raise IndexError(row)
        at, left, spans = (self.offset + row * self.capacity) % self.total, self.capacity, []
        while left:
            slot = int(np.searchsorted(self.ends, at, side="right"))
            document = int(self.order[slot])
            start = int(at - (self.ends[slot] - self.lengths[document]))
            taken = int(min(left, self.lengths[document] - start))
            spans.append((document, start, start + taken))
            left -= taken
            at = (at + taken) % self.total
        return spans


def fill(rows, capacity, separate, pad=0):
    """A Batch from rows of token spans.

    rows: list of rows, each a list of (tokens, mask) arrays, the mask bool or None for "all are targets".
    separate: keep attention and positions inside each span (best fit) or run over the whole row (truncate).
    pad: the id that fills up short rows.
    """
    tokens_BS = np.full((len(rows), capacity), pad, dtype=np.int64)
    mask_BS = np.zeros((len(rows), capacity), dtype=bool)
    documents_BS = np.full((len(rows), capacity), -1, dtype=np.int32)
    positions_BS = np.zeros((len(rows), capacity), dtype=np.int64)
    for row, spans in enumerate(rows):
        at = 0
        for number, (tokens, mask) in enumerate(spans):
            stop = at + len(tokens)
            assert stop <= capacity, f"row {row} holds {stop} tokens, capacity {capacity}"
            tokens_BS[row, at:stop] = tokens
            mask_BS[row, at:stop] = True if mask is None else mask
            documents_BS[row, at:stop] = number
            positions_BS[row, at:stop] = np.arange(len(tokens))
            if separate:
                mask_BS[row, at] = False
            at = stop
    mask_BS[:, 0] = False
    layout = (documents_BS, positions_BS) if separate else ()
    return Batch(*[torch.from_numpy(array) for array in (tokens_BS, mask_BS, *layout)])


def utilisation(batch):
    """Share of a batch's positions that hold a token of a document, 0 to 1."""
    if batch.documents_BS is None:
        return 1.0
    return float((batch.documents_BS >= 0).float().mean())
