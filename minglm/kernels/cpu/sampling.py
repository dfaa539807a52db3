"""Draw tokens in C, temperature and top-p, and look up the log-probability of given ones (paper 4, sampler settings).

Equations and reference: `minglm.inference.sampling`.
"""

import torch

from minglm.kernels.cpu.build import address, lanes, loaded_library


def sample_c(
    logits_BV: torch.Tensor,
    temperature_B: torch.Tensor,
    top_p_B: torch.Tensor | None,
    seeds_B: torch.Tensor,
    index_B: torch.Tensor,
    purpose: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Draw a token for each row of logits float32 (B, V); return tokens int64 (B,) and log-probabilities float32 (B,).

    temperature float32 (B,); top_p float32 (B,), None for no cut. The random number of a row is that of
    `minglm.inference.sampling.uniforms` for seeds and index int64 (B,) and the purpose.
    """
    B, V = logits_BV.shape
    logits_BV = logits_BV.contiguous()
    tokens_B = torch.empty_like(seeds_B)
    logprobs_B = logits_BV.new_empty(B)
    scratch = logits_BV.new_empty(V + lanes())
    loaded_library().sample(
        address(logits_BV),
        address(temperature_B),
        address(top_p_B),
        address(seeds_B),
        address(index_B),
        purpose,
        address(tokens_B),
        address(logprobs_B),
        address(scratch),
        B,
        V,
    )
    return tokens_B, logprobs_B


def log_probabilities_c(
    logits_BV: torch.Tensor, temperature_B: torch.Tensor, tokens_B: torch.Tensor
) -> torch.Tensor:
    """Return the log-probability of a token of each row, float32 (B,), with the bits that `sample_c` gives it.

    logits float32 (B, V); temperature float32 (B,), 0 counts as 1; tokens int64 (B,).
    """
    B, V = logits_BV.shape
    logits_BV = logits_BV.contiguous()
    temperature_B = temperature_B.contiguous()
    tokens_B = tokens_B.contiguous()
    logprobs_B = logits_BV.new_empty(B)
    scratch = logits_BV.new_empty(V + lanes())
    loaded_library().log_probabilities(
        address(logits_BV),
        address(temperature_B),
        address(tokens_B),
        address(logprobs_B),
        address(scratch),
        B,
        V,
    )
    return logprobs_B
