"""Draw tokens in C: temperature and top-p (paper 4, sampler settings).

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
