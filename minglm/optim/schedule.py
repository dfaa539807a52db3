"""Learning rate, batch size and loss weights as pure functions of the tokens seen so far (paper 2.4, Figure 3).

    learning rate   0 -> peak, linear, over the warm-up; then a cosine to a tenth of the peak at the last token
    batch           16M -> 64M tokens, linear, over the first 500B tokens; then constant
    bias rate       0.001 in the first stage (15T tokens), 0 afterwards
    MTP weight      0.3 in the first stage, 0.1 afterwards

Choices:
- Tokens, never steps: the batch grows, so "step 1000" means nothing until the whole history of the batch is known.
  A function of tokens gives the same value whatever the batch, and a resumed run needs to remember one number.
- One cosine over all stages, to the end of mid-training. The paper tried a constant rate with a short decay
  (WSD) and found it worse on SimpleQA and MMLU; `optimizer.schedule` = wsd is here to repeat that comparison.
- The paper gives neither the length of the warm-up nor the shape of the batch's ramp: here 200B tokens and linear.

`tokens` is always the count seen before the step in question. None of these functions keeps state.
"""

import math

from minglm.config import BalanceConfig, OptimizerConfig, StagesConfig


def learning_rate(tokens: int, config: OptimizerConfig, total_tokens: int) -> float:
    """Return the rate after a linear warm-up from zero and a cosine to `final_lr_ratio` of the peak.

    tokens: seen so far; total_tokens: where the cosine ends, and from where on the rate is constant.
    Raises ValueError when the warm-up does not fit into the training.
    """
    _check(config, total_tokens)
    if tokens < config.warmup_tokens:
        return config.peak_lr * tokens / config.warmup_tokens
    progress = min(1.0, (tokens - config.warmup_tokens) / (total_tokens - config.warmup_tokens))
    ratio = config.final_lr_ratio
    return config.peak_lr * (ratio + (1 - ratio) * (1 + math.cos(math.pi * progress)) / 2)


def learning_rate_wsd(
    tokens: int, config: OptimizerConfig, total_tokens: int, decay_share: float = 0.2
) -> float:
    """Return the rate of warmup-stable-decay, the alternative that the paper rejects.

    The rate stays at its peak until the last `decay_share` of the tokens, then falls linearly. Its end points
    are those of `learning_rate`, and so are the errors.
    """
    _check(config, total_tokens)
    if tokens < config.warmup_tokens:
        return config.peak_lr * tokens / config.warmup_tokens
    start = max(config.warmup_tokens, (1 - decay_share) * total_tokens)
    progress = min(1.0, max(0.0, (tokens - start) / (total_tokens - start)))
    return config.peak_lr * (1 - (1 - config.final_lr_ratio) * progress)


def _check(config: OptimizerConfig, total_tokens: int) -> None:
    if config.warmup_tokens >= total_tokens:
        raise ValueError(
            f"optimizer.warmup_tokens = {config.warmup_tokens}: must be less than the {total_tokens} tokens of training"
        )


def batch_tokens(tokens: int, config: OptimizerConfig) -> int:
    """Return the tokens of the next optimizer step: linear from `batch_tokens_start` to `batch_tokens_end`."""
    progress = 1.0
    if config.batch_ramp_tokens:
        progress = min(1.0, tokens / config.batch_ramp_tokens)
    growth = config.batch_tokens_end - config.batch_tokens_start
    return round(config.batch_tokens_start + growth * progress)


def bias_rate(tokens: int, balance: BalanceConfig, stages: StagesConfig) -> float:
    """Return the step of the router's selection bias: `bias_rate` in the first stage, 0 afterwards."""
    return balance.bias_rate if tokens < stages.general.tokens else 0.0


def mtp_weight(tokens: int, balance: BalanceConfig, stages: StagesConfig) -> float:
    """Return the weight of the MTP loss: `mtp_weight` in the first stage, `mtp_weight_late` afterwards."""
    return balance.mtp_weight if tokens < stages.general.tokens else balance.mtp_weight_late
