"""Put the trajectories of an update into tensors, and score the tokens that were sampled (paper 3.2).

    trajectories -> rows, a segment each, shortest first -> micro-batches -> padded tensors -> log-probabilities

The answers to a prompt pass through the model with one copy of it, and without padding (`share_prompts`): most
tokens of an update are those of prompts, where prompts hold tools. What the routers of the experts saw is then
no longer that of whole texts, so an update that balances them pads its rows in place of that.

A row carries what the loss needs to know of the whole trajectory: its advantage, and whom it votes with.

Where ranks share a row, each computes some of its positions (`SegmentBatch.cut`) and the log-probabilities of the tokens
after them. Every sampled token then belongs to one rank, and sums over ranks are those over whole rows.
"""

from collections.abc import Callable, Hashable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from minglm.config import Aggregation
from minglm.kernels.attention import Documents, SharedPrompts
from minglm.kernels.attention.shared import Text
from minglm.model.glm import GLM, Output
from minglm.model.mtp import shift
from minglm.parallel.sequence import RowPart
from minglm.rl.episode import Segment

MOST_COPIES = 8
"""Bound on the positions of whole texts, padded, where prompts are shared: so many times those of the pass.

The MTP layer, and attention but in C, copy prompts to each of their answers (`SharedPrompts.unpack`).
"""


class Sample(NamedTuple):
    """A trajectory to learn from."""

    segments: Sequence[Segment]
    advantage: float
    prompt: int = 0
    """Number of its prompt in the rollout."""


class Row(NamedTuple):
    """A segment of a trajectory, and what the loss needs to know of the whole."""

    segment: Segment
    advantage: float
    owner: int
    """Number of what it votes with: of its trajectory in the batch, or of its prompt (`Aggregation.PROMPT`)."""
    tokens: int
    """Sampled tokens of the whole owner."""
    exact_T: Tensor | None = None
    """float32, the log-probability of each sampled token by the engine's own decoder; None unless they are exact."""


class ModelInput(NamedTuple):
    """What passes through the model for a batch: arguments of `GLM.hidden`."""

    tokens_BS: Tensor
    positions_BS: Tensor | None
    documents_BS: Documents
    imposed_BSLK: Tensor | None


class SegmentBatch(NamedTuple):
    """Segments as tensors, padded on the right."""

    tokens_BS: Tensor
    """int64."""
    mask_BS: Tensor
    """bool, True on the tokens that the model sampled."""
    sampling_logprobs_BS: Tensor
    """float32, as the rollout engine recorded them; 0 elsewhere."""
    proximal_logprobs_BS: Tensor
    """float32, as the trainer recorded them before its first update; elsewhere, and where it did not, as sampled."""
    documents_BS: Tensor
    """int32, 0 in the segment and -1 on padding."""
    imposed_BSLK: Tensor | None = None
    """int16: the experts that the engine chose, -1 where none is known; None without routing replay."""
    exact_BS: Tensor | None = None
    """float32, the log-probabilities by the engine's own decoder, 0 elsewhere; None unless they are wanted."""
    positions_BS: Tensor | None = None
    """int64, places in the whole rows; None: the rows are whole."""
    ahead: int = 0
    """Positions at the end that another rank computes; their tokens are targets here."""
    shared: SharedPrompts | None = None
    """How the segments lie in the row that passes through the model; None: they pass as they are."""

    @property
    def begin(self) -> int:
        """Place of the first position in the whole rows."""
        return 0 if self.positions_BS is None else int(self.positions_BS[0, 0])

    @property
    def computed(self) -> int:
        """Number of positions that this process computes, from the first one on."""
        return self.tokens_BS.shape[1] - self.ahead

    @property
    def predicted_BS(self) -> Tensor:
        """bool, True on the sampled tokens that this process predicts: those after a position that it computes."""
        predicted_BS = self.mask_BS.clone()
        predicted_BS[:, 0] = False
        predicted_BS[:, self.computed + 1 :] = False
        return predicted_BS

    @property
    def passing_BSLK(self) -> Tensor | None:
        """The imposed experts of the positions that pass through the model; None without routing replay."""
        if self.imposed_BSLK is None:
            return None
        if self.shared is not None:
            return self.shared.pack(self.imposed_BSLK)
        return self.imposed_BSLK[:, : self.computed]

    def model_input(self) -> ModelInput:
        """Return what passes through the model."""
        shared = self.shared
        if shared is not None:
            tokens_BS = shared.pack(self.tokens_BS)
            return ModelInput(tokens_BS, shared.positions_T[None], shared, self.passing_BSLK)
        positions_BS = self.positions_BS
        if positions_BS is not None:
            positions_BS = positions_BS[:, : self.computed]
        tokens_BS = self.tokens_BS[:, : self.computed]
        documents_BS = self.documents_BS[:, : self.computed]
        return ModelInput(tokens_BS, positions_BS, documents_BS, self.passing_BSLK)

    def to(self, device: torch.device) -> "SegmentBatch":
        """Return the batch on a device."""
        shared = self.shared and self.shared.to(device)
        return self._map(lambda x: x.to(device))._replace(shared=shared)

    def cut(self, part: RowPart) -> "SegmentBatch":
        """Return the positions of each row that belong to a rank, and up to `AHEAD` after them.

        The length of the rows is a multiple of the ranks that share them.
        """
        if part.ranks == 1:
            return self
        B, S = self.tokens_BS.shape
        begin, end, ahead = part.bounds(S)
        positions_BS = torch.arange(S, device=self.tokens_BS.device).expand(B, S)
        numbered = self._replace(positions_BS=positions_BS)
        return numbered._map(lambda x: x[:, begin:end])._replace(ahead=ahead)

    def _map(self, change: Callable[[Tensor], Tensor]) -> "SegmentBatch":
        """Return the batch with every tensor changed."""
        tensors = {name: x for name, x in self._asdict().items() if isinstance(x, Tensor)}
        return self._replace(**{name: change(x) for name, x in tensors.items()})


class SampledLogProbabilities(NamedTuple):
    """What the model says of the tokens that were sampled."""

    logprobs_BS: Tensor
    """float32, at each sampled token its log-probability; 0 elsewhere."""
    entropy_sum: Tensor
    """Scalar float32: sum over the sampled tokens of the entropy that they were sampled from, nats."""
    out: Output
    """The pass that it comes from: states, and what the routers chose."""


def padded(
    rows: Sequence[Sequence[Any]], fill: Any, dtype: torch.dtype, length: int | None = None
) -> Tensor:
    """Return rows as a tensor (B, S), filled up on the right. length: S; None: that of the longest row."""
    length = length or max(len(row) for row in rows)
    return torch.tensor([[*row, *[fill] * (length - len(row))] for row in rows], dtype=dtype)


def collate(segments: Sequence[Segment], pad: int, multiple: int = 1) -> SegmentBatch:
    """Return segments as tensors, padded on the right with the id `pad` to a length that is a multiple of `multiple`."""
    longest = max(len(segment.tokens) for segment in segments)
    length = -(-longest // multiple) * multiple
    documents = [[0] * len(segment.tokens) for segment in segments]
    return SegmentBatch(
        tokens_BS=padded([s.tokens for s in segments], pad, torch.int64, length),
        mask_BS=padded([s.mask for s in segments], False, torch.bool, length),
        sampling_logprobs_BS=padded([s.logprobs for s in segments], 0.0, torch.float32, length),
        proximal_logprobs_BS=padded(
            [s.proximal_logprobs or s.logprobs for s in segments], 0.0, torch.float32, length
        ),
        documents_BS=padded(documents, -1, torch.int32, length),
        imposed_BSLK=_imposed([segment.experts_SLK for segment in segments], length),
    )


def _prompt_length(segment: Segment) -> int:
    """Return the number of tokens before the first one that the model sampled."""
    return segment.mask.index(True) if True in segment.mask else len(segment.tokens)


def _prompt(segment: Segment) -> Hashable:
    """Return what two segments with one prompt have in common: its tokens, and the experts imposed on it."""
    length = _prompt_length(segment)
    experts_SLK = segment.experts_SLK
    imposed = None if experts_SLK is None else experts_SLK[:length].numpy().tobytes()
    return tuple(segment.tokens[:length]), imposed


def share_prompts(batch: SegmentBatch, segments: Sequence[Segment]) -> SegmentBatch:
    """Return the batch of these segments so that they pass through the model in one row, with each prompt once.

    The last token of a segment predicts nothing, and is left out.
    """
    texts = []
    for segment in segments:
        length = _prompt_length(segment)
        answer = max(0, len(segment.tokens) - 1 - length)
        texts.append(Text(_prompt(segment), length, answer))
    return batch._replace(shared=SharedPrompts.of(texts, batch.tokens_BS.shape[1]))


def _imposed(experts: Sequence[Tensor | None], length: int) -> Tensor | None:
    """Return the experts of some segments (S, L, K) as int16 (B, length, L, K), -1 where none is known; None without any."""
    known = [experts_SLK for experts_SLK in experts if experts_SLK is not None]
    if not known:
        return None
    imposed_BSLK = torch.full((len(experts), length, *known[0].shape[1:]), -1, dtype=torch.int16)
    for row_SLK, experts_SLK in zip(imposed_BSLK, experts, strict=True):
        if experts_SLK is not None:
            row_SLK[: len(experts_SLK)] = experts_SLK
    return imposed_BSLK


def sampled_log_probabilities(
    model: GLM, batch: SegmentBatch, temperature: float
) -> SampledLogProbabilities:
    """Return log-probabilities and entropies of the sampled tokens that this process predicts.

    temperature: the logits are divided by it, as in the rollout.
    """
    given = batch.model_input()
    out = model.hidden(
        given.tokens_BS,
        given.positions_BS,
        given.documents_BS,
        imposed_BSLK=given.imposed_BSLK,
    )
    predicted_BS = batch.predicted_BS
    # position s predicts token s + 1
    follows_BS = shift(predicted_BS, 1, False)[:, : batch.computed]
    if batch.shared is None:
        hidden_TD = out.hidden_BSD[follows_BS]
    else:
        hidden_TD = out.hidden_BSD[0].index_select(0, batch.shared.places_BS[follows_BS])
    targets_T = batch.tokens_BS[predicted_BS]
    logprobs_T, entropy_T = model.lm_head.token_log_probabilities(hidden_TD, targets_T, temperature)
    zeros_BS = torch.zeros(predicted_BS.shape, dtype=torch.float32, device=predicted_BS.device)
    logprobs_BS = zeros_BS.masked_scatter(predicted_BS, logprobs_T)
    return SampledLogProbabilities(logprobs_BS, entropy_T.sum(), out)


def rows_of(samples: Sequence[Sample], aggregation: Aggregation) -> list[Row]:
    """Return the segments of all trajectories, shortest first, with the owners that the aggregation counts."""
    owners = list(range(len(samples)))
    if aggregation == Aggregation.PROMPT:
        owners = [sample.prompt for sample in samples]
    tokens = dict.fromkeys(owners, 0)
    for owner, sample in zip(owners, samples, strict=True):
        tokens[owner] += sum(sum(segment.mask) for segment in sample.segments)
    rows = []
    for owner, sample in zip(owners, samples, strict=True):
        for segment in sample.segments:
            rows.append(Row(segment, sample.advantage, owner, tokens[owner]))
    return sorted(rows, key=lambda row: len(row.segment.tokens))


def by_prompt(rows: Sequence[Row]) -> list[list[Row]]:
    """Return the rows of each prompt together, in the order of the first of each."""
    groups: dict[Hashable, list[Row]] = {}
    for row in rows:
        groups.setdefault(_prompt(row.segment), []).append(row)
    return list(groups.values())


def sharing_microbatches(groups: Sequence[Sequence[Row]], most_tokens: int) -> Iterator[list[Row]]:
    """Cut the rows of each prompt, so that no micro-batch of more than one row exceeds a bound.

    It computes at most `most_tokens`, and its whole texts, padded, are at most `MOST_COPIES` times as many.
    """
    microbatch: list[Row] = []
    tokens = 0
    longest = 0
    for group in groups:
        prompt = _prompt_length(group[0].segment)
        added = prompt
        for row in group:
            length = len(row.segment.tokens)
            added += length - prompt
            longest = max(longest, length)
            padded = longest * (len(microbatch) + 1)
            too_large = tokens + added > most_tokens or padded > MOST_COPIES * most_tokens
            if microbatch and too_large:
                yield microbatch
                microbatch = []
                tokens = 0
                added = longest = length
            microbatch.append(row)
            tokens += added
            added = 0
    if microbatch:
        yield microbatch


def microbatches(rows: Sequence[Row], most_tokens: int) -> Iterator[list[Row]]:
    """Cut rows, shortest first, so that no padded micro-batch of more than one row exceeds `most_tokens`."""
    microbatch: list[Row] = []
    for row in rows:
        longest = len(row.segment.tokens)
        if microbatch and longest * (len(microbatch) + 1) > most_tokens:
            yield microbatch
            microbatch = []
        microbatch.append(row)
    if microbatch:
        yield microbatch
