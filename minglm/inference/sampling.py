"""Sample the next token: temperature, cuts, and randomness that belongs to the request (paper 4, sampler settings).

    p = softmax(logits / T), cut and normalised;   token = CDF^-1(u);   u = hash(seed of the request, index of token)

The cuts, in this order: top-k keeps the k most likely tokens; top-p keeps the smallest set of the most likely of those
with at least this share of their mass; min-p keeps those with at least this share of the most likely token's probability.
The most likely token always stays. Rules of a request (`logit_rules.py`) change the logits before the cuts. Since u does not come from a shared generator, a request gets the same completion
alone, in any batch, in any order, and a run that resumes needs no random state.
"""

from collections.abc import Sequence as Several
from enum import IntEnum
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from minglm.inference.pages import integers
from minglm.inference.request import PromptLogprob, TopLogprobs
from minglm.inference.scheduler import Sequence
from minglm.kernels.dispatch import Operation, select


def _wrapped(number: int) -> int:
    """Return a Python integer as int64 arithmetic would hold it."""
    return (number + 2**63) % 2**64 - 2**63


# Constants of splitmix64: the two multipliers of its finaliser, and 2^64 over the golden ratio.
_MULTIPLIER_1 = _wrapped(0xBF58476D1CE4E5B9)
_MULTIPLIER_2 = _wrapped(0x94D049BB133111EB)
_GOLDEN = _wrapped(0x9E3779B97F4A7C15)


class Purpose(IntEnum):
    """What a uniform number is for; each purpose has a sequence of numbers of its own."""

    SAMPLE = 1
    """The next token."""
    ACCEPT = 2
    """Whether a draft is accepted."""
    RESIDUAL = 3
    """The token after the accepted drafts."""
    DRAFT = 4
    """A draft."""


class SamplerSettings:
    """The sampler settings of a batch as tensors; a cut that no request asks for is None.

    plain: no cut, or top-p alone, no `top_logprobs`, and no rules.
    """

    def __init__(self, sequences: list[Sequence], device: torch.device) -> None:
        requests = [sequence.request for sequence in sequences]

        def column(values: list, neutral: float | None = None) -> Tensor | None:
            if all(value == neutral for value in values):
                return None
            return torch.tensor(values, device=device)

        self.sequences = sequences
        self.device = device
        self.seeds_B = torch.tensor([request.seed for request in requests], device=device)
        temperatures = [request.temperature for request in requests]
        self.temperature_B = torch.tensor(temperatures, device=device).float()
        self.top_p_B = column([request.top_p for request in requests], neutral=1)
        self.top_k_B = column([request.top_k for request in requests], neutral=0)
        self.min_p_B = column([request.min_p for request in requests], neutral=0)
        self.top_logprobs = [request.top_logprobs for request in requests]
        self.max_top_logprobs = max(self.top_logprobs)
        self.has_rules = any(sequence.rules is not None for sequence in sequences)
        has_more_cuts = self.top_k_B is not None or self.min_p_B is not None
        self.plain = not (has_more_cuts or self.max_top_logprobs or self.has_rules)

    def ruled(self, logits_BV: Tensor, rows: Several[int] | None = None) -> Tensor | None:
        """Return the logits after the rules of the requests, None if no request has any.

        rows: the row of each sequence's logits; None: one row for each.
        """
        if not self.has_rules:
            return None
        ruled_BV = logits_BV.float().clone()
        for b, sequence in zip(rows or range(len(self.sequences)), self.sequences, strict=True):
            if sequence.rules is not None:
                sequence.rules.apply(ruled_BV[b])
        return ruled_BV

    def next_index(self, sequences: list[Sequence]) -> Tensor:
        """Return the index of each sequence's next token, int64 (B,)."""
        counts = [len(sequence.completion.tokens) for sequence in sequences]
        return integers(counts, self.device)


def _unsigned_shift(x: Tensor, bits: int) -> Tensor:
    """Shift int64 right as if it were unsigned."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)


def uniforms(seeds_B: Tensor, index_B: Tensor, purpose: Purpose = Purpose.SAMPLE) -> Tensor:
    """Return a number in [0, 1) for each (seed, index), from int64 (B,) and (B,): float64 (B,), splitmix64 of all three."""
    x = seeds_B
    for step in ((index_B + 1) * _GOLDEN, _wrapped((purpose + 1) * _GOLDEN)):
        x = x + step
        x = (x ^ _unsigned_shift(x, 30)) * _MULTIPLIER_1
        x = (x ^ _unsigned_shift(x, 27)) * _MULTIPLIER_2
        x = x ^ _unsigned_shift(x, 31)
    return _unsigned_shift(x, 11).double() / (1 << 53)  # the upper 53 bits


def cut(
    p_BV: Tensor,
    top_p_B: Tensor | None = None,
    top_k_B: Tensor | None = None,
    min_p_B: Tensor | None = None,
) -> Tensor:
    """Return the probabilities with 0 for all tokens that top-k, top-p or min-p leave out, not normalised.

    p (B, V); top_p and min_p float (B,), 1 and 0 for no cut; top_k int (B,), 0 for no cut.
    """
    sorted_BV, index_BV = p_BV.sort(dim=-1, descending=True, stable=True)
    outside_BV = torch.zeros_like(sorted_BV, dtype=torch.bool)
    if top_k_B is not None:
        rank_V = torch.arange(p_BV.shape[1], device=p_BV.device)
        outside_BV |= (rank_V >= top_k_B[:, None]) & (top_k_B > 0)[:, None]
    if top_p_B is not None:
        # A token is outside if the tokens before it already have the share top-p of what top-k left.
        left_BV = sorted_BV.masked_fill(outside_BV, 0.0)
        before_BV = left_BV.cumsum(-1) - left_BV
        total_B1 = left_BV.sum(-1, keepdim=True)
        is_cut_B = top_p_B < 1  # a sum may round up to one
        outside_BV |= (before_BV >= top_p_B[:, None] * total_B1) & is_cut_B[:, None]
    if min_p_B is not None:
        outside_BV |= sorted_BV < min_p_B[:, None] * sorted_BV[:, :1]
    outside_BV[:, 0] = False  # the most likely token stays
    return p_BV.scatter(1, index_BV, sorted_BV.masked_fill(outside_BV, 0.0))


def distribution(
    logits_BV: Tensor,
    temperature_B: Tensor,
    top_p_B: Tensor | None = None,
    top_k_B: Tensor | None = None,
    min_p_B: Tensor | None = None,
    ruled_BV: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Return what is sampled from: (p, q), both float32 (B, V). None stands for a setting that no row has.

    p is the softmax at the temperature (at temperature 0: at 1), which training reproduces. q is p after the cuts, not
    normalised (at temperature 0: one for the largest logit, the first of equals). ruled: the logits after the rules of
    the requests, from which q is made. A row that has lost all of its tokens gets the q of its own logits.
    """
    greedy_B = temperature_B == 0
    some_greedy = bool(greedy_B.any())
    divisor_B = temperature_B.masked_fill(greedy_B, 1.0) if some_greedy else temperature_B
    p_BV = (logits_BV.float() / divisor_B[:, None]).softmax(-1)
    q_BV = p_BV
    if ruled_BV is not None:
        lost_B1 = ruled_BV.amax(-1, keepdim=True) == -torch.inf
        logits_BV = torch.where(lost_B1, logits_BV.float(), ruled_BV)
        q_BV = (logits_BV / divisor_B[:, None]).softmax(-1)
    if top_p_B is not None or top_k_B is not None or min_p_B is not None:
        q_BV = cut(q_BV, top_p_B, top_k_B, min_p_B)
    if some_greedy:
        best_BV = torch.zeros_like(p_BV).scatter_(1, logits_BV.argmax(-1, keepdim=True), 1.0)
        q_BV = torch.where(greedy_B[:, None], best_BV, q_BV)
    return p_BV, q_BV


def log_distribution(logits_BV: Tensor, temperature_B: Tensor) -> Tensor:
    """Return the logarithm of the p of `distribution`, float32 (B, V), finite where p itself would be 0 in float32."""
    divisor_B = temperature_B.masked_fill(temperature_B == 0, 1.0)
    return (logits_BV.float() / divisor_B[:, None]).log_softmax(-1)


def draw(q_BV: Tensor, uniform_B: Tensor) -> Tensor:
    """Return the token, int64 (B,), at which the cumulated q passes `uniform_B` times its sum.

    In two steps, first a chunk of the vocabulary and then the token in it: a float64 sum over a whole vocabulary is the
    slowest part of sampling.
    """
    B, V = q_BV.shape
    width = 1 << (V.bit_length() + 1) // 2  # about the square root of V
    rows = torch.arange(B, device=q_BV.device)

    # The chunk: where the cumulated sums of the chunks pass the goal.
    chunks = F.pad(q_BV, (0, -V % width)).view(B, -1, width)  # (B, chunks, width)
    ends = chunks.sum(-1, dtype=torch.float64).cumsum(-1)
    goal_B1 = uniform_B[:, None] * ends[:, -1:]
    last_chunk = ends.shape[1] - 1
    chunk_B1 = torch.searchsorted(ends, goal_B1, right=True).clamp_(max=last_chunk)

    # The token: where the cumulated sums inside the chunk do, counted from the beginning of the vocabulary.
    inside = chunks[rows, chunk_B1[:, 0]].cumsum(-1, dtype=torch.float64)
    inside += ends.gather(1, chunk_B1) - inside[:, -1:]
    # Rounding may leave the goal just outside its chunk: never draw a token of probability 0.
    goal_B1 = torch.minimum(goal_B1, inside[:, -1:] * (1 - 2**-52))
    tokens_B1 = chunk_B1 * width + torch.searchsorted(inside, goal_B1, right=True)
    return tokens_B1.squeeze(1).clamp_(max=V - 1)


def sample(
    logits_BV: Tensor,
    temperature_B: Tensor,
    top_p_B: Tensor | None,
    uniform_B: Tensor,
    top_k_B: Tensor | None = None,
    min_p_B: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Sample one token per row.

    logits float (B, V); temperature, top_p and min_p float (B,), top_k int (B,); uniform float64 (B,) in [0, 1).
    Returns tokens int64 (B,) and their log-probabilities float32 (B,) at that temperature, before the cuts.
    """
    p_BV, q_BV = distribution(logits_BV, temperature_B, top_p_B, top_k_B, min_p_B)
    tokens_B = draw(q_BV, uniform_B)
    logprobs_B = p_BV.gather(1, tokens_B[:, None]).squeeze(1).log()
    return tokens_B, logprobs_B


def top_logprobs(logits_BV: Tensor, temperature_B: Tensor, counts: list[int]) -> list[TopLogprobs]:
    """Return for each row of logits (B, V) its `counts` most likely tokens with their log-probabilities."""
    logp_BV = log_distribution(logits_BV, temperature_B)
    top = logp_BV.topk(min(max(counts), logp_BV.shape[1]))
    all_ids = top.indices.tolist()
    all_logprobs = top.values.tolist()
    rows: list[TopLogprobs] = []
    for count, ids, logprobs in zip(counts, all_ids, all_logprobs, strict=True):
        rows.append(tuple(zip(ids[:count], logprobs[:count], strict=True)))
    return rows


def prompt_scores(logits_SV: Tensor, targets: list[int], count: int) -> list[PromptLogprob]:
    """Return how likely each target was: logits (S, V) before each of S targets, at temperature 1.

    count: how many of the most likely tokens to report with each.
    """
    if not targets:
        return []
    logp_SV = logits_SV.float().log_softmax(-1)
    targets_S1 = torch.tensor(targets, device=logits_SV.device)[:, None]
    logp_S1 = logp_SV.gather(1, targets_S1)
    ranks = ((logp_SV > logp_S1).sum(1) + 1).tolist()
    tops: list[TopLogprobs] = [()] * len(targets)
    if count:
        tops = top_logprobs(logits_SV, torch.ones_like(logp_S1[:, 0]), [count] * len(targets))
    logprobs = logp_S1[:, 0].tolist()
    return list(map(PromptLogprob, targets, logprobs, ranks, tops))


def drawn_log_probabilities(logits_BV: Tensor, temperature_B: Tensor, tokens_B: Tensor) -> Tensor:
    """Return the log-probability that `sample_next` gives a token of each row when it draws it: float32 (B,).

    logits float (B, V); temperature float32 (B,), 0 counts as 1; tokens int64 (B,). In C it has the same bits.
    """
    compute = select(Operation.DRAWN_LOG_PROBABILITIES, logits_BV)
    return compute(logits_BV, temperature_B, tokens_B)


def drawn_log_probabilities_with_torch(
    logits_BV: Tensor, temperature_B: Tensor, tokens_B: Tensor
) -> Tensor:
    """Compute `drawn_log_probabilities` in PyTorch, finite where the probability itself would be 0 in float32."""
    logp_BV = log_distribution(logits_BV, temperature_B)
    return logp_BV.gather(1, tokens_B[:, None]).squeeze(1)


class Sampled(NamedTuple):
    """The next token of each sequence of a batch."""

    tokens: list[int]
    logprobs: list[float]
    """The log-probability of each token at its temperature, before the cuts."""
    top_logprobs: list[TopLogprobs]
    """For each sequence the most likely tokens that its request asked for."""


def sample_next(logits_BV: Tensor, settings: SamplerSettings, index_B: Tensor) -> Sampled:
    """Sample the next token of each sequence from logits (B, V); index int64 (B,) numbers the tokens of each."""
    compute = select(Operation.SAMPLING, logits_BV, plain_sampling=settings.plain)
    return compute(logits_BV, settings, index_B)


def sample_with_torch(logits_BV: Tensor, settings: SamplerSettings, index_B: Tensor) -> Sampled:
    """Compute `sample_next` for any settings: logits float (B, V), index int64 (B,)."""
    s = settings
    ruled_BV = s.ruled(logits_BV)
    cuts = (s.top_p_B, s.top_k_B, s.min_p_B)
    p_BV, q_BV = distribution(logits_BV, s.temperature_B, *cuts, ruled_BV=ruled_BV)
    tokens_B = draw(q_BV, uniforms(s.seeds_B, index_B))
    # Rules may force a token whose probability is 0 in float32.
    logprobs_B = p_BV.gather(1, tokens_B[:, None]).squeeze(1).log()
    if ruled_BV is not None:
        logp_BV = log_distribution(logits_BV, s.temperature_B)
        logprobs_B = logp_BV.gather(1, tokens_B[:, None]).squeeze(1)
    top: list[TopLogprobs] = [()] * len(p_BV)
    if s.max_top_logprobs:
        top = top_logprobs(logits_BV, s.temperature_B, s.top_logprobs)
    return Sampled(tokens_B.tolist(), logprobs_B.tolist(), top)


def sample_with_c(logits_BV: Tensor, settings: SamplerSettings, index_B: Tensor) -> Sampled:
    """Compute `sample_next` in C, for plain settings: logits float32 (B, V) on a CPU, index int64 (B,)."""
    from minglm.kernels.cpu.sampling import sample_c

    s = settings
    tokens_B, logprobs_B = sample_c(
        logits_BV, s.temperature_B, s.top_p_B, s.seeds_B, index_B, Purpose.SAMPLE
    )
    return Sampled(tokens_B.tolist(), logprobs_B.tolist(), [()] * len(logits_BV))
