"""Plan a stage of supervised fine-tuning (paper 3.1). Its examples are those of `minglm.data.dialogues`."""

import math

from minglm.config import RunConfig, SFTConfig
from minglm.train.loop import Phase

WARMUP_SHARE = 0.05  # of the tokens


def phase(name: str, config: SFTConfig, run: RunConfig, tokens: int) -> Phase:
    """Return the `Phase` of an SFT stage over `tokens` tokens: warm-up over 5%, then cosine to a tenth of the peak.

    run: for what SFT shares with the later stages of pre-training: the weights of the MTP and balance losses,
    micro-batches, clipping and the guard. The selection bias moves only with `balance_bias`.
    """
    warmup_tokens = WARMUP_SHARE * tokens

    def learning_rate(tokens_seen: int) -> float:
        if tokens_seen < warmup_tokens:
            return config.peak_lr * (tokens_seen + 1) / (warmup_tokens + 1)
        angle = math.pi * (tokens_seen - warmup_tokens) / max(1, tokens - warmup_tokens)
        return config.peak_lr * (0.1 + 0.45 * (1 + math.cos(angle)))  # 1 at angle 0, 0.1 at pi

    return Phase(
        name=name,
        tokens=tokens,
        start=0,
        sequence_length=config.sequence_length,
        learning_rate=learning_rate,
        batch_tokens=lambda tokens_seen: config.batch_tokens,
        mtp_weight=lambda tokens_seen: run.balance.mtp_weight_late,
        bias_rate=lambda tokens_seen: run.balance.bias_rate if config.balance_bias else 0.0,
        balance_weight=run.balance.sequence_loss_weight if config.balance_loss else 0.0,
        optimizer=run.optimizer,
    )
