"""Decide which tokens come next: sources mixed by weight, drawn in a repeatable order (paper 2.2, 2.3, Figure 3).

Each stage of training names its sources and their weights in tokens. The source that lags furthest behind its share

    weight / (sum of weights) * (tokens drawn so far)  -  tokens drawn from it so far

gives the next unit, so the shares hold at every moment and not only on average. Within a source nothing comes
twice before everything came once; each epoch has a new order, and for truncation a new random position of the
first cut.

Choices, and why:
- A unit is what goes into one row: a row cut from the source's concatenated documents (truncate), or a document or a
  row-sized piece of a long one (best_fit). So the pieces of a long file are spread over an epoch, and a batch is not
  one file from end to end.
- Best fit works on a pool several times the batch; it gives the fullest rows, and always the row with the document
  that has waited longest.
- Everything depends only on (seed, source, epoch), so the state is a few cursors and the spans in the pool: short, JSON,
  and exact. Ranks share one order and each takes its rows of it: a run may resume on another number of ranks.

Simplified against the paper: its weights and the number of epochs per source are not published.
"""

import zlib
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from minglm.config.training import Packing
from minglm.data.packing import (
    Batch,
    Span,
    TokensAndMask,
    TruncatedRows,
    best_fit,
    cut_to_fit,
    fill,
)

POOL_BATCHES = 4
"""Best fit chooses from documents with the tokens of so many batches."""

Documents = Sequence[np.ndarray]
"""Integer arrays, or a `Shard`."""


class SourceSpan(NamedTuple):
    """Tokens `start` to `stop` of a document of a source."""

    source: str
    document: int
    start: int
    stop: int

    @property
    def length(self) -> int:
        """Return its number of tokens."""
        return self.stop - self.start


class Epoch(NamedTuple):
    """One epoch of a source."""

    units: Sequence[Sequence[Span]]
    """Each unit is a list of spans."""
    order: np.ndarray
    """int64: the order in which the units are drawn."""


class Mixture:
    """An endless stream of batches."""

    def __init__(
        self,
        sources: Mapping[str, Documents],
        weights: Mapping[str, float],
        sequence_length: int,
        packing: Packing | str = Packing.TRUNCATE,
        seed: int = 0,
        masks: Mapping[str, Sequence[np.ndarray]] | None = None,
        pad: int = 0,
    ):
        """Start the stream.

        Args:
            sources: {name: documents}; every document brings its end token.
            weights: {name: relative weight in tokens}; sources without a weight are not drawn.
            masks: {name: boolean arrays, one per document}, or a `Shard` of them; False for tokens that are not targets,
                such as a user's turn. In a source without masks every token is a target.
            pad: id that fills up rows.

        Raises:
            ValueError: for a weight that names no source, or a source without tokens.
        """
        if packing not in list(Packing):
            raise ValueError(f"packing = {packing!r}: must be {' or '.join(Packing)}")
        self.packing = Packing(packing)
        self.weights = _normalised(weights, sources)
        self.sources = sources
        self.masks = masks or {}
        self.sequence_length = sequence_length
        self.seed = seed
        self.pad = pad
        self._lengths = {name: _lengths(sources[name]) for name in self.weights}
        for name, lengths in self._lengths.items():
            if not lengths.sum():
                raise ValueError(
                    f"source {name!r} has no tokens; take it out of the mixture or add documents to it"
                )
            if name in self.masks and not np.array_equal(_lengths(self.masks[name]), lengths):
                raise ValueError(
                    f"masks of source {name!r} do not have the lengths of its documents"
                )
        self._units: dict[str, Epoch] = {}  # the present epoch of each source, made when needed
        self._epoch: dict[str, int] = dict.fromkeys(self.weights, 0)
        self._cursor: dict[str, int] = dict.fromkeys(self.weights, 0)  # in the present epoch
        self._drawn: dict[str, int] = dict.fromkeys(self.weights, 0)  # tokens
        # Best fit: spans that were drawn and not yet used, oldest first.
        self._pool: list[SourceSpan] = []

    def next(self, rows: int, rank: int = 0, ranks: int = 1) -> Batch:
        """Return the next `rows` rows; a rank gets every ranks-th of them, and all ranks advance alike."""
        is_best_fit = self.packing == Packing.BEST_FIT
        chosen = self._fitted(rows) if is_best_fit else [self._draw() for _ in range(rows)]
        spans = [[self._read(span) for span in row] for row in chosen[rank::ranks]]
        return fill(spans, self.sequence_length, separate=is_best_fit, pad=self.pad)

    @property
    def epochs(self) -> dict[str, float]:
        """Return {source: epochs drawn of it}: above one, documents have been repeated."""
        return {name: self._drawn[name] / int(self._lengths[name].sum()) for name in self.weights}

    def state_dict(self) -> dict[str, Any]:
        """Return everything that decides the batches to come, as plain JSON values."""
        return {
            "epoch": {**self._epoch},
            "cursor": {**self._cursor},
            "drawn": {**self._drawn},
            "pool": [list(span) for span in self._pool],
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from the state of a mixture of the same sources.

        Raises ValueError if the sources differ.
        """
        if set(state["epoch"]) != set(self.weights):
            raise ValueError(
                f"the saved mixture has sources {sorted(state['epoch'])}, this one {sorted(self.weights)}"
            )
        self._epoch = {**state["epoch"]}
        self._cursor = {**state["cursor"]}
        self._drawn = {**state["drawn"]}
        self._pool = [SourceSpan(*span) for span in state["pool"]]
        self._units = {}

    def _draw(self) -> list[SourceSpan]:
        """Draw the spans of one unit from the source that lags most; ties go to the source named first."""
        total = sum(self._drawn.values())
        name = max(self.weights, key=lambda n: self.weights[n] * total - self._drawn[n])
        if name not in self._units:
            self._units[name] = self._new_epoch(name)
        units, order = self._units[name]
        unit = units[int(order[self._cursor[name]])]
        spans = [SourceSpan(name, *span) for span in unit]
        self._drawn[name] += sum(span.length for span in spans)
        self._cursor[name] += 1
        if self._cursor[name] == len(units):
            self._epoch[name] += 1
            self._cursor[name] = 0
            del self._units[name]
        return spans

    def _new_epoch(self, name: str) -> Epoch:
        """Make one epoch of a source: its units, and a random order of them."""
        lengths = self._lengths[name]
        rng = np.random.default_rng([self.seed, zlib.crc32(name.encode()), self._epoch[name]])
        if self.packing == Packing.TRUNCATE:
            document_order = rng.permutation(len(lengths))
            offset = int(rng.integers(self.sequence_length))
            units = TruncatedRows(lengths, document_order, self.sequence_length, offset)
        else:
            units = [[Span(*span)] for span in cut_to_fit(lengths, self.sequence_length).tolist()]
        return Epoch(units, rng.permutation(len(units)))

    def _fitted(self, rows: int) -> list[list[SourceSpan]]:
        """Return the next rows by best fit."""
        wanted = POOL_BATCHES * rows * self.sequence_length
        size = sum(span.length for span in self._pool)
        while size < wanted:
            (span,) = self._draw()
            self._pool.append(span)
            size += span.length

        lengths = [span.length for span in self._pool]
        fitted = best_fit(lengths, self.sequence_length)
        # The row with the oldest document comes first, then the fullest rows.
        fitted.sort(key=lambda row: (0 not in row, -sum(lengths[i] for i in row)))
        chosen = fitted[:rows]
        used = {i for row in chosen for i in row}
        spans = [[self._pool[i] for i in row] for row in chosen]
        self._pool = [span for i, span in enumerate(self._pool) if i not in used]
        return spans

    def _read(self, span: SourceSpan) -> TokensAndMask:
        tokens = self.sources[span.source][span.document][span.start : span.stop]
        masks = self.masks.get(span.source)
        mask = None if masks is None else masks[span.document][span.start : span.stop]
        return tokens, mask


def _normalised(weights: Mapping[str, float], sources: Mapping[str, Documents]) -> dict[str, float]:
    """Return the weights that are not zero, with sum one. Raises ValueError for impossible ones."""
    for name, weight in weights.items():
        if name not in sources:
            raise ValueError(
                f"mixture names the source {name!r}; the corpus has {', '.join(sorted(sources))}"
            )
        if not (weight >= 0 and np.isfinite(weight)):
            raise ValueError(
                f"mixture gives {name!r} the weight {weight}: it must be finite and not negative"
            )
    total = sum(weights.values())
    if total <= 0:
        raise ValueError("the mixture needs at least one source with a positive weight")
    return {name: weight / total for name, weight in weights.items() if weight}


def _lengths(documents: Documents) -> np.ndarray:
    """Return the tokens of each document, int64; a `Shard` knows them without reading a token."""
    lengths = getattr(documents, "lengths", None)
    if lengths is None:
        lengths = np.array([len(d) for d in documents], dtype=np.int64)
    return lengths
