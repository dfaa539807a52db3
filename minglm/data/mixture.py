"""Which tokens come next: sources mixed by weight, drawn in a repeatable order (paper 2.2, 2.3, Figure 3).

Each stage of training names its sources and their weights in tokens. Of all sources the one that lags furthest behind

    weight / (sum of weights) * (tokens drawn so far)  -  tokens drawn from it so far

gives next, so the shares hold at every moment and not only on average. Inside a source nothing comes twice before
everything came once; each epoch has a new order, and for truncation a new random place to begin cutting.

Choices, and why:
- The unit drawn is what goes into one row: a row cut from the source's concatenated documents (truncate), or a document
  or a row-sized part of a long one (best_fit). So the parts of one long file are spread over an epoch, and a batch is
  not one file from end to end.
- Best fit works on a pool several times the batch; it gives the fullest rows, and always the row with the document
  that has waited longest.
- Everything follows from (seed, source, epoch), so the state is a few cursors and the spans in the pool: short, JSON,
  and exact. Ranks share one order and each takes its rows of it: a run may resume on another number of ranks.

Simplified against the paper: its weights and the number of epochs per source are not published.
"""

import zlib

import numpy as np

from minglm.data.fim import rewrite
from minglm.data.packing import Cut, best_fit, fill, pieces

POOL = 4
"""Rows' worth of documents best fit chooses from, in batches."""


class Mixture:
    """An endless stream of batches.

    sources: {name: documents}, each a sequence of integer arrays; every document brings its own end token.
    weights: {name: relative weight in tokens}; sources without a weight are not drawn.
    packing: "truncate" or "best_fit". masks: {name: boolean arrays, one per document}, False for tokens that are no
    targets, such as a user's turn; sources not in it are targets throughout. pad: id that fills up rows.
    Raises ValueError for a weight that names no source, or a source without tokens.
    """

    def __init__(
        self, sources, weights, sequence_length, packing="truncate", seed=0, masks=None, pad=0
    ):
        if packing not in ("truncate", "best_fit"):
            raise ValueError(f"packing = {packing!r}: must be truncate or best_fit")
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
        self.weights = {name: weight / total for name, weight in weights.items() if weight}
        self.sources, self.masks, self.packing, self.seed, self.pad = (
            sources,
            masks or {},
            packing,
            seed,
            pad,
        )
        self.sequence_length = sequence_length
        self._lengths = {name: _lengths(sources[name]) for name in self.weights}
        for name, lengths in self._lengths.items():
            if not lengths.sum():
                raise ValueError(
                    f"source {name!r} has no tokens; take it out of the mixture or add documents to it"
                )
            if name in self.masks and [len(m) for m in self.masks[name]] != lengths.tolist():
                raise ValueError(
                    f"masks of source {name!r} do not have the lengths of its documents"
                )
        self._units = {}  # the present epoch of each source, made when first needed
        self._epoch = dict.fromkeys(self.weights, 0)
        self._cursor = dict.fromkeys(self.weights, 0)
        self._drawn = dict.fromkeys(self.weights, 0)
        self._pool = []  # best fit: spans drawn and not yet given, oldest first

    def next(self, rows, rank=0, ranks=1):
        """The next `rows` rows as a Batch; a rank gets every ranks-th of them, and all ranks advance alike."""
        separate = self.packing == "best_fit"
        chosen = self._fitted(rows) if separate else [self._draw() for _ in range(rows)]
        spans = [[self._read(*span) for span in row] for row in chosen[rank::ranks]]
        return fill(spans, self.sequence_length, separate, self.pad)

    @property
    def epochs(self):
        """{source: epochs begun of it, as a real number}: above one, documents have been repeated."""
        return {name: self._drawn[name] / int(self._lengths[name].sum()) for name in self.weights}

    def state_dict(self):
        """Everything that decides the batches to come, as plain JSON values."""
        spans = [list(span) for span in self._pool]
        return {
            "epoch": {**self._epoch},
            "cursor": {**self._cursor},
            "drawn": {**self._drawn},
            "pool": spans,
        }

    def load_state_dict(self, state):
        """Continue from a state of a Mixture over the same sources. Raises ValueError where the sources differ."""
        if set(state["epoch"]) != set(self.weights):
            raise ValueError(
                f"the saved mixture has sources {sorted(state['epoch'])}, this one {sorted(self.weights)}"
            )
        self._epoch, self._cursor, self._drawn = (
            {**state["epoch"]},
            {**state["cursor"]},
            {**state["drawn"]},
        )
        self._pool = [tuple(span) for span in state["pool"]]
        self._units = {}

    def _draw(self):
        """The spans of one unit, from the source that lags most; ties go to the source named first."""
        total = sum(self._drawn.values())
        name = max(self.weights, key=lambda n: self.weights[n] * total - self._drawn[n])
        if name not in self._units:
            self._units[name] = self._shuffled(name)
        units, order = self._units[name]
        spans = [(name, *span) for span in units[int(order[self._cursor[name]])]]
        self._drawn[name] += sum(stop - start for _, _, start, stop in spans)
        self._cursor[name] += 1
        if self._cursor[name] == len(units):
            self._epoch[name], self._cursor[name] = self._epoch[name] + 1, 0
            del self._units[name]
        return spans

    def _shuffled(self, name):
        """One epoch of a source: its units, each a list of (document, start, stop), and a random order of them."""
        lengths = self._lengths[name]
        random = np.random.default_rng([self.seed, zlib.crc32(name.encode()), self._epoch[name]])
        if self.packing == "truncate":
            order = random.permutation(len(lengths))
            units = Cut(
                lengths, order, self.sequence_length, int(random.integers(self.sequence_length))
            )
        else:
            units = pieces(lengths, self.sequence_length)[:, None].tolist()
        return units, random.permutation(len(units))

    def _fitted(self, rows):
        """The next rows by best fit."""
        room = POOL * rows * self.sequence_length
        size = sum(stop - start for _, _, start, stop in self._pool)
        while size < room:
            (span,) = self._draw()
            self._pool.append(span)
            size += span[3] - span[2]
        lengths = [stop - start for _, _, start, stop in self._pool]
        fitted = best_fit(lengths, self.sequence_length)
        fitted.sort(key=lambda row: (0 not in row, -sum(lengths[i] for i in row)))
        given = {i for row in fitted[:rows] for i in row}
        chosen = [[self._pool[i] for i in row] for row in fitted[:rows]]
        self._pool = [span for i, span in enumerate(self._pool) if i not in given]
        return chosen

    def _read(self, name, document, start, stop):
        masks = self.masks.get(name)
        return self.sources[name][document][start:stop], None if masks is None else masks[document][
            start:stop
        ]


def _lengths(documents):
    """Tokens of each document, int64; a `Shard` knows them without reading a token."""
    found = getattr(documents, "lengths", None)
    return np.array([len(d) for d in documents], dtype=np.int64) if found is None else found


def tokenize(documents, tokenizer, fim_rate=0.0, seed=0, fim_characters=600, first=0):
    """Documents to arrays of ids: {source: list of uint16 or uint32 arrays}, each ending with `<|endoftext|>`.

    fim_rate: share of the source "code" rewritten for fill-in-the-middle, in spans of `fim_characters` characters
    (0: whole files); choose what fits well into a row, at two to four characters a token. A file with rewritten spans
    becomes several documents. Deterministic by seed and the place of each document, counted from `first`.
    """
    dtype = np.uint16 if tokenizer.vocab_size <= 1 << 16 else np.uint32
    shards = {}
    for at in range(0, len(documents), 256):
        group = list(enumerate(documents[at : at + 256], first + at))
        rewritten = {index for index, d in group if d.source == "code" and fim_rate > 0}
        plain = [(index, d) for index, d in group if index not in rewritten]
        ids = dict(
            zip(
                [i for i, _ in plain],
                tokenizer.encode_batch([d.text for _, d in plain]),
                strict=True,
            )
        )
        for index, document in group:
            if index in ids:
                sequences = [ids[index]]
            else:
                rng = np.random.default_rng([seed, index])
                sequences = rewrite(document.text, tokenizer, rng, fim_rate, fim_characters)
            arrays = [
                np.array([*sequence, tokenizer.end], dtype=dtype)
                for sequence in sequences
                if sequence
            ]
            shards.setdefault(document.source, []).extend(arrays)
    return shards
