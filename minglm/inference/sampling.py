"""Drawing the next token: temperature, cuts, and randomness that belongs to the request (paper 4, sampler settings).

    p = softmax(logits / T), cut and normalised;   token = CDF^-1(u);   u = hash(seed of the request, index of token)

The cuts, in this order: top-k keeps the k likeliest tokens; top-p of those the smallest set of likeliest with at least
this share of their mass; min-p those with at least this share of the likeliest one's probability. The likeliest stays
in any case. Since u is not drawn from a shared generator, a request gives the same answer alone, in any batch, in any
order, and a run that resumes needs no random state.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F

from minglm.kernels.dispatch import Operation, select

_MIX = (
    -4658895280553007687,
    -7723592293110705685,
)  # the two multipliers of the splitmix64 finaliser, as int64
_GOLDEN = -7046029254386353131
DRAW, ACCEPT, RESIDUAL, DRAFT = range(1, 5)
"""What a number is for: each purpose has numbers of its own."""


class Settings:
    """The sampler settings of a batch as tensors; a cut that no request asks for is None."""

    def __init__(self, sequences, device):
        def column(name, none=None):
            values = [getattr(sequence.request, name) for sequence in sequences]
            return (
                None
                if all(value == none for value in values)
                else torch.tensor(values, device=device)
            )

        self.sequences = sequences
        self.seeds_B, self.temperature_B = column("seed"), column("temperature").float()
        self.top_p_B, self.top_k_B, self.min_p_B = (
            column("top_p", 1),
            column("top_k", 0),
            column("min_p", 0),
        )
        self.tops = [sequence.request.top_logprobs for sequence in sequences]
        self.top = max(self.tops)
        self.plain = (
            self.top_k_B is None and self.min_p_B is None and not self.top
        )  # no cut, or top-p alone

    def index(self, sequences):
        """The number of each sequence's next token, int64 (B,)."""
        return torch.tensor(
            [len(s.completion.tokens) for s in sequences], device=self.seeds_B.device
        )


def _unsigned_shift(x, bits):
    return (x >> bits) & ((1 << (64 - bits)) - 1)


def _wrapped(number):
    """A Python integer as an int64 holds it."""
    return (number + 2**63) % 2**64 - 2**63


def uniforms(seeds_B, index_B, purpose=DRAW):
    """A number in [0, 1) for each (seed, index): float64 (B,), from int64 (B,) and (B,); splitmix64 of all three."""
    x = seeds_B
    for step in ((index_B + 1) * _GOLDEN, _wrapped((purpose + 1) * _GOLDEN)):
        x = x + step
        x = (x ^ _unsigned_shift(x, 30)) * _MIX[0]
        x = (x ^ _unsigned_shift(x, 27)) * _MIX[1]
        x = x ^ _unsigned_shift(x, 31)
    return _unsigned_shift(x, 11).double() / (1 << 53)


def cut(p_BV, top_p_B=None, top_k_B=None, min_p_B=None):
    """Probabilities with 0 for everything that top-k, top-p or min-p leave out, not normalised.

    p (B, V); top_p and min_p float (B,), 1 and 0 for none; top_k int (B,), 0 for none.
    """
    ordered, index = p_BV.sort(dim=-1, descending=True, stable=True)
    outside = torch.zeros_like(ordered, dtype=torch.bool)
    if top_k_B is not None:
        rank_V = torch.arange(p_BV.shape[1], device=p_BV.device)
        outside |= (rank_V >= top_k_B[:, None]) & (top_k_B > 0)[:, None]
    left = ordered.masked_fill(outside, 0.0)
    before, whole = left.cumsum(-1) - left, left.sum(-1, keepdim=True)
    if top_p_B is not None:
        outside |= (before >= top_p_B[:, None] * whole) & (top_p_B < 1)[
            :, None
        ]  # a sum may round up to one
    if min_p_B is not None:
        outside |= ordered < min_p_B[:, None] * ordered[:, :1]
    outside[:, 0] = False
    return p_BV.scatter(1, index, ordered.masked_fill(outside, 0.0))


def distribution(logits_BV, temperature_B, top_p_B=None, top_k_B=None, min_p_B=None):
    """What is drawn from: (p, q), both float32 (B, V); None stands for settings that no row has.

    p is the softmax at the temperature (at temperature 0: at 1), which training reproduces. q is p after the cuts, not
    normalised (at temperature 0: one for the largest logit, the first of equals).
    """
    greedy_B = temperature_B == 0
    some_greedy = bool(greedy_B.any())
    divisor_B = temperature_B.masked_fill(greedy_B, 1.0) if some_greedy else temperature_B
    p_BV = q_BV = (logits_BV.float() / divisor_B[:, None]).softmax(-1)
    if top_p_B is not None or top_k_B is not None or min_p_B is not None:
        q_BV = cut(p_BV, top_p_B, top_k_B, min_p_B)
    if some_greedy:
        best_BV = torch.zeros_like(p_BV).scatter_(1, logits_BV.argmax(-1, keepdim=True), 1.0)
        q_BV = torch.where(greedy_B[:, None], best_BV, q_BV)
    return p_BV, q_BV


def draw(q_BV, uniform_B):
    """The token int64 (B,) at which the cumulated q passes `uniform_B` times its sum.

    In two steps, first a stretch of the vocabulary and then the token in it: a float64 sum over a whole vocabulary is
    the slowest part of sampling.
    """
    B, V = q_BV.shape
    width = 1 << (V.bit_length() + 1) // 2
    parts = F.pad(q_BV, (0, -V % width)).view(B, -1, width)
    ends = parts.sum(-1, dtype=torch.float64).cumsum(-1)
    goal_B1 = uniform_B[:, None] * ends[:, -1:]
    part_B1 = torch.searchsorted(ends, goal_B1, right=True).clamp_(max=ends.shape[1] - 1)
    inside = parts[torch.arange(B, device=q_BV.device), part_B1[:, 0]].cumsum(
        -1, dtype=torch.float64
    )
    inside += ends.gather(1, part_B1) - inside[:, -1:]
    # rounding may leave the goal just outside its stretch: never draw what has no probability
    goal_B1 = torch.minimum(goal_B1, inside[:, -1:] * (1 - 2**-52))
    tokens_B1 = part_B1 * width + torch.searchsorted(inside, goal_B1, right=True)
    return tokens_B1.squeeze(1).clamp_(max=V - 1)


def sample(logits_BV, temperature_B, top_p_B, uniform_B, top_k_B=None, min_p_B=None):
    """Draw one token per row.

    logits float (B, V); temperature, top_p and min_p float (B,), top_k int (B,); uniform float64 (B,) in [0, 1).
    Returns tokens int64 (B,) and their log-probabilities float32 (B,) at that temperature, before the cuts.
    """
    p_BV, q_BV = distribution(logits_BV, temperature_B, top_p_B, top_k_B, min_p_B)
    tokens_B = draw(q_BV, uniform_B)
    return tokens_B, p_BV.gather(1, tokens_B[:, None]).squeeze(1).log()


def likeliest(p_BV, counts):
    """For each row its `counts` likeliest tokens with their log-probabilities: ((id, log-probability), ...)."""
    top = p_BV.topk(min(max(counts), p_BV.shape[1]))
    rows = zip(counts, top.indices.tolist(), top.values.log().tolist(), strict=True)
    return [tuple(zip(ids[:count], logprobs[:count], strict=True)) for count, ids, logprobs in rows]


class Sampled(NamedTuple):
    """The next token of each sequence of a batch."""

    tokens: list[int]
    logprobs: list[float]
    """Log-probability of each token at its temperature, before the cuts."""
    likeliest: list[tuple[tuple[int, float], ...]]
    """For each sequence the likeliest tokens that its request asked for."""


def sample_next(logits_BV: torch.Tensor, settings: Settings, index_B: torch.Tensor) -> Sampled:
    """Draw the next token of each sequence from logits (B, V); index int64 (B,) numbers the tokens of each."""
    compute = select(Operation.SAMPLING, logits_BV, plain_sampling=settings.plain)
    return compute(logits_BV, settings, index_B)


def sample_with_torch(
    logits_BV: torch.Tensor, settings: Settings, index_B: torch.Tensor
) -> Sampled:
    """Compute `sample_next` for any settings: logits float (B, V), index int64 (B,)."""
    s = settings
    p_BV, q_BV = distribution(logits_BV, s.temperature_B, s.top_p_B, s.top_k_B, s.min_p_B)
    tokens_B = draw(q_BV, uniforms(s.seeds_B, index_B))
    logprobs_B = p_BV.gather(1, tokens_B[:, None]).squeeze(1).log()
    best = likeliest(p_BV, s.tops) if s.top else [()] * len(p_BV)
    return Sampled(tokens_B.tolist(), logprobs_B.tolist(), best)


def sample_with_c(logits_BV: torch.Tensor, settings: Settings, index_B: torch.Tensor) -> Sampled:
    """Compute `sample_next` in C, for plain settings: logits float32 (B, V) on a CPU, index int64 (B,)."""
    from minglm.kernels.cpu.sampling import sample_c

    s = settings
    tokens_B, logprobs_B = sample_c(logits_BV, s.temperature_B, s.top_p_B, s.seeds_B, index_B, DRAW)
    return Sampled(tokens_B.tolist(), logprobs_B.tolist(), [()] * len(logits_BV))
