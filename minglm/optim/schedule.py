"""What changes during pre- and mid-training, as pure functions of the tokens seen so far. Paper 2.4, Figure 3.

    learning rate   0 -> peak, linear, over the warm-up; then a cosine to a tenth of the peak at the last token
    batch           16M -> 64M tokens, linear, over the first 500B tokens; then constant
    bias rate       0.001 in the first stage (15T tokens), 0 afterwards
    MTP weight      0.3 in the first stage, 0.1 afterwards
    rotary base     10,000, and 1,000,000 from the first 32K stage on

Choices:
- Tokens, never steps: the batch grows, so "step 1000" means nothing until the whole history of the batch is known.
  A function of tokens gives the same value whatever the batch, and a resumed run needs to remember one number.
- One cosine over all stages, to the end of mid-training. The paper tried a constant rate with a short decay
  (WSD) and found it worse on SimpleQA and MMLU; `optimizer.schedule` = wsd is here to repeat that comparison.
- The paper gives neither the length of the warm-up nor the shape of the batch's ramp: here 200B tokens and linear.

`tokens` is always the count seen before the step in question. None of these functions keeps state.
"""

import math


def learning_rate(tokens, config, total_tokens):
    """Linear warm-up from zero, then a cosine to `final_lr_ratio` of the peak at `total_tokens`, constant after.

    tokens, total_tokens: counts of tokens; config: OptimizerConfig. Returns a float.
    Raises ValueError when the warm-up does not fit into the training.
    """
    _check(config, total_tokens)
    if tokens < config.warmup_tokens:
        return config.peak_lr * tokens / config.warmup_tokens
    done = min(1.0, (tokens - config.warmup_tokens) / (total_tokens - config.warmup_tokens))
    ratio = config.final_lr_ratio
    return config.peak_lr * (ratio + (1 - ratio) * (1 + math.cos(math.pi * done)) / 2)


def learning_rate_wsd(tokens, config, total_tokens, decay_share=0.2):
    """Warm-up, stable, decay: the alternative the paper rejects, with the same end points as `learning_rate`.

    The rate stays at its peak until the last `decay_share` of the tokens, then falls linearly. Returns a float.
    """
    _check(config, total_tokens)
    if tokens < config.warmup_tokens:
        return config.peak_lr * tokens / config.warmup_tokens
    start = max(config.warmup_tokens, (1 - decay_share) * total_tokens)
    done = min(1.0, max(0.0, (tokens - start) / (total_tokens - start)))
    return config.peak_lr * (1 - (1 - config.final_lr_ratio) * done)


def _check(config, total_tokens):
    if config.warmup_tokens >= total_tokens:
        raise ValueError(
            f"optimizer.warmup_tokens = {config.warmup_tokens}: must be less than the {total_tokens} tokens of training"
        )


def batch_tokens(tokens, config):
    """Tokens of the next optimizer step: linear from `batch_tokens_start` to `batch_tokens_end`. Returns an int."""
    done = min(1.0, tokens / config.batch_ramp_tokens) if config.batch_ramp_tokens else 1.0
    return round(
        config.batch_tokens_start + (config.batch_tokens_end - config.batch_tokens_start) * done
    )


def stage_at(tokens, stages):
    """The stage in progress, from a StagesConfig. A boundary belongs to the stage that begins there.

    Returns (name, StageConfig, tokens already seen in it); after the end, the last stage that has tokens.
    """
    start, found = 0, None
    for name, stage in stages.items():
        if stage.tokens and (found is None or tokens >= start):
            found = name, stage, tokens - start
        start += stage.tokens
    assert found is not None, "a run without tokens has no stage"
    return found


def bias_rate(tokens, balance, stages):
    """Step of the router's selection bias: BalanceConfig's `bias_rate` in the first stage, 0 afterwards."""
    return balance.bias_rate if tokens < stages.general.tokens else 0.0


def mtp_weight(tokens, balance, stages):
    """Weight of the MTP loss: `mtp_weight` in the first stage, `mtp_weight_late` afterwards."""
    return balance.mtp_weight if tokens < stages.general.tokens else balance.mtp_weight_late


def rope_theta(tokens, stages):
    """Base of the rotary frequencies in the stage in progress."""
    return stage_at(tokens, stages)[1].rope_theta
