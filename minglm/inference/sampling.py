"""Drawing the next token: temperature, nucleus, and randomness that belongs to the request (paper 4, sampler settings).

    p = softmax(logits / T), cut to the smallest set of likeliest tokens with mass >= top_p;   token = CDF^-1(u)

u is a hash of (seed of the request, index of the token), not a draw from a shared generator. A request therefore gives
the same answer alone, in any batch, in any order, and a run that resumes needs no random state.
"""

import torch

_MIX = (-4658895280553007687, -7723592293110705685)  # the two multipliers of the splitmix64 finaliser, as int64
_GOLDEN = -7046029254386353131


def _unsigned_shift(x, bits):
    return (x >> bits) & ((1 << (64 - bits)) - 1)


def uniforms(seeds_B, index_B):
    """A number in [0, 1) for each (seed, index): float64 (B,), from int64 (B,) and (B,); splitmix64 of both."""
    x = seeds_B
    for word in (index_B, torch.ones_like(index_B)):
        x = x + (word + 1) * _GOLDEN
        x = (x ^ _unsigned_shift(x, 30)) * _MIX[0]
        x = (x ^ _unsigned_shift(x, 27)) * _MIX[1]
        x = x ^ _unsigned_shift(x, 31)
    return _unsigned_shift(x, 11).double() / (1 << 53)


def nucleus(probabilities_BV, top_p_B):
    """Probabilities with 0 for everything outside the nucleus, not renormalised. The likeliest token always stays."""
    ordered, index = probabilities_BV.sort(dim=-1, descending=True, stable=True)
    outside = (ordered.cumsum(-1) - ordered >= top_p_B[:, None]) & (top_p_B < 1)[:, None]  # a sum may round up to one
    outside[:, 0] = False
    return probabilities_BV.scatter(1, index, ordered.masked_fill(outside, 0.0))


def sample(logits_BV, temperature_B, top_p_B, uniform_B):
    """Draw one token per row.

    logits float (B, V); temperature and top_p float (B,), temperature 0 is greedy; uniform float64 (B,) in [0, 1).
    Returns tokens int64 (B,) and their log-probabilities float32 (B,) at that temperature, before the nucleus (at
    temperature 0: at temperature 1).
    """
    greedy_B = temperature_B == 0
    scaled_BV = logits_BV.float() / temperature_B.masked_fill(greedy_B, 1.0)[:, None]
    log_p_BV = scaled_BV.log_softmax(-1)
    p_BV = log_p_BV.exp()
    if (top_p_B < 1).any():
        p_BV = nucleus(p_BV, top_p_B)
    cdf_BV = p_BV.cumsum(-1, dtype=torch.float64)
    tokens_B = torch.searchsorted(cdf_BV, (uniform_B * cdf_BV[:, -1])[:, None], right=True).squeeze(1)
    tokens_B = tokens_B.clamp(max=logits_BV.shape[1] - 1)
    tokens_B = torch.where(greedy_B, logits_BV.argmax(-1), tokens_B)
    return tokens_B, log_p_BV.gather(1, tokens_B[:, None]).squeeze(1)
